"""Prompts: captions and questions in the chat template, and their conversion to arrays."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epy
from PIL import Image

from lattejax.configuration import Config
from lattejax.data.chats import Bounds, Chat, EncodedPrompt, ReadableImage, Turn
from lattejax.data.images import on_white
from lattejax.data.tokenizer import (
    IMAGE_PAD,
    TEXT_END,
    TURN_END,
    VISION_START,
    Tokenizer,
    check_unicode,
    has_special_tokens,
    mark_special_tokens,
    tokenize_marked,
    unused_character,
)
from lattejax.errors import UserError, parsing
from lattejax.models.qwen2_vl import Prompts
from lattejax.models.rotary import patch_positions, token_positions
from lattejax.models.vision import Images

with epy.lazy_imports():
    import transformers


class PromptEncoder:
    """Turns texts and images into prompts for one tokenizer and one image processor."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        processor: "transformers.Qwen2VLImageProcessorPil",
        *,
        stop_tokens: Sequence[int] | None = None,
    ):
        """Takes the model's tokenizer and processor; an answer ends with `<|im_end|>` or one of the `stop_tokens`."""
        self.tokenizer, self.processor = tokenizer, processor
        self.merge = processor.merge_size
        self.patch_dim = 3 * processor.temporal_patch_size * processor.patch_size**2
        self.image_token, turn_end, text_end = tokenizer.convert_tokens_to_ids([IMAGE_PAD, TURN_END, TEXT_END])
        self.stop_tokens = tuple(dict.fromkeys([turn_end, *(stop_tokens or [text_end])]))
        self.pad_token = turn_end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._tokenize_kept = functools.lru_cache(maxsize=4096)(self._tokenize_chat)

    def read_image(self, image: Image.Image) -> ReadableImage:
        """Resizes, normalises and patchifies an image as Qwen2-VL's processor does; transparent pixels become white.

        Raises:
          UserError: the processor rejects it, e.g. because it is 200 times as long as wide.
        """
        with parsing(f"an image of {image.width}x{image.height} pixels"):
            features = self.processor(images=[on_white(image)], return_tensors="np")
        return ReadableImage(features["pixel_values"], tuple(int(n) for n in features["image_grid_thw"][0]))

    def image_of_size(self, width: int, height: int) -> ReadableImage:
        """An image without patches, with the grid that an image of this size would have.

        Raises:
          UserError: the processor rejects it.
        """
        with parsing(f"an image of {width}x{height} pixels"):
            sides = resized(width, height, self.processor)
        columns, rows = (side // self.processor.patch_size for side in sides)
        return ReadableImage(np.empty((0, self.patch_dim), np.float32), (1, rows, columns))

    def chat(self, turns: Sequence[Turn]) -> EncodedPrompt:
        """A chat so far, up to where the assistant's answer begins."""
        return self._encode(turns)

    def question(self, question: str, images: Sequence[ReadableImage] = (), answer: str | None = None) -> EncodedPrompt:
        """A user's turn with images before the text, up to the answer, or including it if it is given."""
        if not question.strip():
            raise UserError("the question is empty")
        asked = [Turn("user", (*images, question))]
        return self.chat(asked) if answer is None else self.conversation([*asked, Turn("assistant", answer)])

    def conversation(self, turns: Sequence[Turn]) -> EncodedPrompt:
        """A complete chat, whose last turn is the assistant's; what the assistant says is to be learnt.

        Raises:
          UserError: a longer chat does not begin with a shorter one's tokens, by this chat template.
        """
        answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
        chats = [
            (self.chat(turns[:place]), self._encode(turns[:place], TURN_END, turns[place].text)) for place in answers
        ]
        complete = chats[-1][1]
        is_answer = np.zeros(len(complete.input_ids), bool)
        for asked, answered in chats:
            if not np.array_equal(complete.input_ids[: len(answered.input_ids)], answered.input_ids):
                raise UserError("the chat template changes earlier turns when a conversation grows")
            is_answer[len(asked.input_ids) : len(answered.input_ids)] = True
        return dataclasses.replace(complete, is_answer=is_answer)

    def drawing(self, caption: str, images: Sequence[ReadableImage] = ()) -> EncodedPrompt:
        """A prompt to draw, conditioned on `images`: the chat template of the images and then the caption, up to and
        including the assistant's `<|vision_start|>`."""
        if not caption.strip():
            raise UserError("a prompt is empty; describe what to draw")
        return self._encode([Turn("user", (*images, caption))], VISION_START)

    def drawings(self, captions: Sequence[str]) -> list[EncodedPrompt]:
        """The same for many captions without images; several times as fast."""
        if not all(map(str.strip, captions)):
            raise UserError("a prompt is empty; describe what to draw")
        if self._around_text is None:
            return [self.drawing(caption) for caption in captions]
        before, after = self._around_text
        plain = [caption for caption in captions if not has_special_tokens(self.tokenizer, caption)]
        check_unicode(plain)
        texts = [before + caption + after + VISION_START for caption in plain]
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
        special = set(captions) - set(plain)
        return [
            self.drawing(caption) if caption in special else EncodedPrompt(np.array(next(ids))) for caption in captions
        ]

    @functools.cached_property
    def _around_text(self) -> tuple[str, str] | None:
        """The chat template's text before and after a user's text; None if the template also changes the text."""
        chats = {text: self._render((("user", (text,)),)) for text in ("@", " a\n", "{{ b }} <c>&'")}
        before, _, after = chats["@"].rpartition("@")
        return (before, after) if all(chat == before + text + after for text, chat in chats.items()) else None

    def unconditional(self) -> EncodedPrompt:
        """The same template with an empty caption: the unconditional prompt of guidance."""
        return self._encode([Turn("user", "")], VISION_START)

    def _encode(self, turns: Sequence[Turn], end: str = "", answer: str = "") -> EncodedPrompt:
        """The chat template, followed by the assistant's answer and a special token. Special tokens that the turns and
        the answer spell out are text."""
        images = tuple(image for turn in turns for image in turn.images)
        chat = tuple(
            (turn.role, tuple(part if isinstance(part, str) else None for part in turn.content)) for turn in turns
        )
        is_short = len(str((chat, answer))) <= 1000  # as captions are, which training repeats; a server sees long ones
        ids = (self._tokenize_kept if is_short else self._tokenize_chat)(chat, answer, end)
        if ids.count(self.image_token) != len(images):
            raise UserError(f"the chat template shows {ids.count(self.image_token)} images of {len(images)}")
        # Each image's pad is repeated once for every merged patch.
        counts = iter(int(np.prod(image.grid)) // self.merge**2 for image in images)
        ids = np.repeat(ids, [next(counts) if token == self.image_token else 1 for token in ids])
        return EncodedPrompt(ids, images)

    def _tokenize_chat(self, chat: Chat, answer: str, end: str) -> list[int]:
        """Token ids of a chat, with one pad per image."""
        texts = [answer, *(part for _, content in chat for part in content if part is not None)]
        check_unicode(texts)
        mark = unused_character(texts)

        chat = tuple((role, mark_special_tokens(self.tokenizer, content, mark)) for role, content in chat)
        (marked,) = mark_special_tokens(self.tokenizer, (answer,), mark)
        return tokenize_marked(self.tokenizer, self._render(chat) + marked + end, mark)

    def _render(self, chat: Chat) -> str:
        messages = [
            {
                "role": role,
                "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content],
            }
            for role, content in chat
        ]
        with parsing("the chat, by its template,"):  # which may refuse it
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def check_length(self, prompts: Iterable[EncodedPrompt], length: int) -> None:
        """Raises `UserError` for a prompt that is longer than `length` tokens."""
        for prompt in prompts:
            if len(prompt.input_ids) > length:
                raise UserError(
                    f"a prompt has {len(prompt.input_ids)} tokens, more than the config's limit of {length}: "
                    f"{self.tokenizer.decode(prompt.input_ids)!r}"
                )

    def batch(
        self,
        prompts: Sequence[EncodedPrompt],
        length: int | None = None,
        bounds: Bounds | None = None,
    ) -> Prompts:
        """Pads prompts to one length and one number of images, and images to one number of patches; None: the largest.

        Raises:
          UserError: a prompt is longer than `length`, or its images exceed the bounds.
        """
        length = length or max(len(prompt.input_ids) for prompt in prompts)
        self.check_length(prompts, length)
        largest = largest_images(prompts)
        bounds = bounds or largest
        if largest.images > bounds.images or largest.patches > bounds.patches:
            raise UserError(f"prompts have {largest.images} images of {largest.patches} patches, more than {bounds}")
        batch = prompt_arrays(len(prompts), length, (*bounds, self.patch_dim))
        batch.input_ids[:] = self.pad_token
        for row, prompt in enumerate(prompts):
            ids, grids = prompt.input_ids, [image.grid for image in prompt.images]
            batch.input_ids[row, : len(ids)] = ids
            batch.mask[row, : len(ids)] = True
            batch.position_ids[row, :, : len(ids)] = token_positions(ids, grids, self.image_token, self.merge)
        if batch.images is not None:
            self._fill_images(prompts, batch.input_ids, batch.images)
        return batch

    def _fill_images(self, prompts: Sequence[EncodedPrompt], input_ids: np.ndarray, images: Images) -> None:
        patches, positions, mask, index = images
        most_patches = patches.shape[2]
        index[:] = -1
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


def resized(width: int, height: int, processor: "transformers.Qwen2VLImageProcessorPil") -> tuple[int, int]:
    """Width and height to which a processor resizes an image of this size.

    Raises:
      ValueError: its sides differ too much.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    factor, bounds = processor.patch_size * processor.merge_size, processor.size
    height, width = smart_resize(height, width, factor, bounds["shortest_edge"], bounds["longest_edge"])
    return width, height


def prompt_arrays(
    rows: int, length: int, images: tuple[int, int, int] = (0, 0, 0), make: Callable[..., Any] = np.zeros
) -> Prompts:
    """The arrays of a batch of prompts, to be filled.

    Args:
      rows: rows in the batch.
      length: tokens in each row.
      images: images in each row, patches in each image, and values in each patch.
      make: makes or describes an array of a shape and a dtype.
    """
    *shape, patch_dim = (rows, *images)
    pictures = None
    if images[0]:
        pictures = Images(
            make((*shape, patch_dim), np.float32),
            make((*shape, 2), np.int32),
            make(tuple(shape), bool),
            make((rows, length), np.int32),
        )
    prompts = make((rows, length), np.int32), make((rows, length), bool), make((rows, 3, length), np.int32)
    return Prompts(*prompts, pictures)


def largest_images(prompts: Sequence[EncodedPrompt]) -> Bounds:
    """The bounds that all images in the prompts reach."""
    patches = max((len(image.patches) for prompt in prompts for image in prompt.images), default=0)
    return Bounds(max(len(prompt.images) for prompt in prompts), patches)


def question_batch(
    encoder: PromptEncoder,
    prompts: Sequence[EncodedPrompt],
    length: int,
    bounds: Bounds | None = None,
    weights: str = "tokens",
) -> dict[str, Any]:
    """A training batch of questions with answers; `bounds` as in `PromptEncoder.batch`.

    `target_weights` [B, T] are not zero at the tokens to predict, which are only the answers'. They are 1, or, with
    `weights="answers"`, have the sum 1 in each answer. `objectives.weigh_answers` scales them, once the rows of all
    processes are together.
    """
    batch = question_arrays(encoder.batch(prompts, length, bounds))
    for row, prompt in enumerate(prompts):
        own = prompt.is_answer.astype(np.float32)
        if weights == "answers":
            answers = np.cumsum(np.diff(own, prepend=0) > 0)  # which one a token belongs to, from 1
            own /= np.bincount(answers, own)[answers].clip(1)
        batch["target_weights"][row, : len(own)] = own
    return batch


def question_arrays(prompts: Prompts, make: Callable[..., Any] = np.zeros) -> dict[str, Any]:
    """A batch of questions, with weights to be filled; `make` as in `prompt_arrays`."""
    return {"prompts": prompts, "target_weights": make(prompts.input_ids.shape, np.float32)}


def prompt_encoder(config: Config, tokenizer: Tokenizer, stop_tokens: Sequence[int] = ()) -> PromptEncoder:
    """A config's encoder, with the given tokenizer, its vision tower's patches and its bounds on image sizes."""
    return PromptEncoder(tokenizer, image_processor(config), stop_tokens=stop_tokens)


def image_processor(config: Config) -> "transformers.Qwen2VLImageProcessorPil":
    vision = config.model.vision
    return transformers.Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        size={"shortest_edge": config.data.min_pixels, "longest_edge": config.data.max_pixels},
    )
