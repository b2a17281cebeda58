"""Captions and questions become chat-template prompts here, and prompts become arrays: the one place for both."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError
from transformers import Qwen2VLImageProcessorPil

from lattejax.data.tokenizer import IMAGE_PAD, TURN_END, VISION_START, Tokenizer
from lattejax.errors import UserError
from lattejax.models.qwen2_vl import Prompts
from lattejax.models.rotary import patch_positions, token_positions
from lattejax.models.vision import Images, VisionConfig


@dataclasses.dataclass(frozen=True, eq=False)
class ReadableImage:
    """An image as the vision tower reads it: flattened patches [P, patch_dim], and how many (frames, rows, columns)."""

    patches: np.ndarray
    grid: tuple[int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """Token ids [T], the images they refer to, and which tokens are the answer to be learnt [T]."""

    input_ids: np.ndarray
    images: tuple[ReadableImage, ...] = ()
    is_answer: np.ndarray | None = None


def open_image(path: str) -> Image.Image:
    """Opens an image file; raises `UserError` where there is none, or what is there is no image."""
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        with file.open("rb") as opened:
            return Image.open(opened).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


class PromptEncoder:
    """Turns texts and images into prompts for one tokenizer and one vision tower."""

    def __init__(self, tokenizer: Tokenizer, vision: VisionConfig, *, min_pixels: int, max_pixels: int):
        self.tokenizer = tokenizer
        self.merge = vision.spatial_merge_size
        self.patch_dim = vision.patch_dim
        self.image_token = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self.stop_tokens = (tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.pad_token_id)
        self.processor = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
        )
        self._tokenize = functools.lru_cache(maxsize=4096)(self._tokenize_chat)

    def read_image(self, image: Image.Image) -> ReadableImage:
        """Resizes, normalises and cuts an image as Qwen2-VL's processor does."""
        features = self.processor(images=[image.convert("RGB")], return_tensors="np")
        return ReadableImage(features["pixel_values"], tuple(int(n) for n in features["image_grid_thw"][0]))

    def question(self, question: str, images: Sequence[ReadableImage] = (), answer: str | None = None) -> EncodedPrompt:
        """A user's turn with images before the text, up to the answer, or with it if there is one."""
        if not question.strip():
            raise UserError("the question is empty")
        prompt = self._with_images(self._tokenize(question, len(images), None), images)
        if answer is None:
            return EncodedPrompt(prompt, tuple(images))
        whole = self._with_images(self._tokenize(question, len(images), answer), images)
        return EncodedPrompt(whole, tuple(images), np.arange(len(whole)) >= len(prompt))

    def drawing(self, caption: str, images: Sequence[ReadableImage] = ()) -> EncodedPrompt:
        """A prompt to draw: the whole chat template of a caption, with images to look at before it, up to and
        including the assistant's `<|vision_start|>`."""
        if not caption.strip():
            raise UserError("a prompt is empty; say what to draw")
        return EncodedPrompt(self._drawing(caption, images), tuple(images))

    def unconditional(self) -> EncodedPrompt:
        """The same template with an empty caption: what guidance points away from."""
        return EncodedPrompt(self._drawing("", ()))

    def _drawing(self, caption: str, images: Sequence[ReadableImage]) -> np.ndarray:
        return self._with_images(self._tokenize(caption, len(images), VISION_START), images)

    def _tokenize_chat(self, text: str, num_images: int, answer: str | None) -> list[int]:
        """Token ids of a chat with one pad an image; `answer` is "<|vision_start|>" for a prompt to draw."""
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if answer is not None:
            chat += answer if answer == VISION_START else answer + TURN_END
        return self.tokenizer(chat, add_special_tokens=False)["input_ids"]

    def _with_images(self, ids: list[int], images: Sequence[ReadableImage]) -> np.ndarray:
        """Repeats each image's pad once for every merged patch."""
        counts = iter(int(np.prod(image.grid)) // self.merge**2 for image in images)
        return np.repeat(ids, [next(counts) if token == self.image_token else 1 for token in ids])

    def check_length(self, prompts: Iterable[EncodedPrompt], length: int) -> None:
        """Raises `UserError` for a prompt that is longer than `length` tokens."""
        for prompt in prompts:
            if len(prompt.input_ids) > length:
                raise UserError(
                    f"a prompt has {len(prompt.input_ids)} tokens, more than the {length} that the config gives it: "
                    f"{self.tokenizer.decode(prompt.input_ids)!r}"
                )

    def batch(self, prompts: Sequence[EncodedPrompt], length: int | None = None) -> Prompts:
        """Pads prompts to one length (the longest's if None) and their images to one number of patches.

        Raises:
          UserError: a prompt is longer than `length`.
        """
        length = length or max(len(prompt.input_ids) for prompt in prompts)
        self.check_length(prompts, length)
        rows = len(prompts)
        input_ids = np.full((rows, length), self.tokenizer.pad_token_id, np.int32)
        mask = np.zeros((rows, length), bool)
        position_ids = np.zeros((rows, 3, length), np.int32)
        for row, prompt in enumerate(prompts):
            ids, grids = prompt.input_ids, [image.grid for image in prompt.images]
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
            position_ids[row, :, : len(ids)] = token_positions(ids, grids, self.image_token, self.merge)
        return Prompts(input_ids, mask, position_ids, self._batch_images(prompts, input_ids))

    def _batch_images(self, prompts: Sequence[EncodedPrompt], input_ids: np.ndarray) -> Images | None:
        most_images = max(len(prompt.images) for prompt in prompts)
        if not most_images:
            return None
        most_patches = max(len(image.patches) for prompt in prompts for image in prompt.images)
        shape = (len(prompts), most_images, most_patches)
        patches = np.zeros((*shape, self.patch_dim), np.float32)
        positions = np.zeros((*shape, 2), np.int32)
        mask = np.zeros(shape, bool)
        index = np.full(input_ids.shape, -1, np.int32)
        for row, prompt in enumerate(prompts):
            places = []
            for i, image in enumerate(prompt.images):
                count = len(image.patches)
                patches[row, i, :count] = image.patches
                positions[row, i, :count] = patch_positions(image.grid, self.merge)
                mask[row, i, :count] = True
                places.append((i * most_patches + np.arange(0, count, self.merge**2)) // self.merge**2)
            if places:
                index[row, input_ids[row] == self.image_token] = np.concatenate(places)
        return Images(patches, positions, mask, index)


def question_batch(encoder: PromptEncoder, prompts: Sequence[EncodedPrompt], length: int) -> dict[str, object]:
    """A training batch of questions with answers.

    `target_weights` [B, T] are those of the tokens to be predicted (the answers' alone), scaled so that the mean over
    rows of a row's weighted sum is the mean over all answer tokens of the batch.
    """
    weights = np.zeros((len(prompts), length), np.float32)
    for row, prompt in enumerate(prompts):
        weights[row, : len(prompt.input_ids)] = prompt.is_answer
    return {"prompts": encoder.batch(prompts, length), "target_weights": weights * (len(prompts) / weights.sum())}
