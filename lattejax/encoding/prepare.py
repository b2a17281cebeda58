"""Preparing records: reading and cropping pictures, bounding images for the vision tower, and checking lengths.

Everything here works on one record, so that it can run in threads.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from lattejax.configuration import Config
from lattejax.data import images
from lattejax.data import tokenizer as tokenizers
from lattejax.data.chats import ReadableImage, Turn
from lattejax.data.prompts import PromptEncoder, image_processor, prompt_encoder, resized
from lattejax.encoding.items import Item, Picture
from lattejax.errors import UserError, parsing
from lattejax.files import resolve_path
from lattejax.runs.run import open_vlm

KEPT_FORMATS = ("JPEG", "PNG", "WEBP")
JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True, eq=False)
class StoredImage:
    """An image for the vision tower: a file's bytes, and its width and height."""

    data: bytes
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A record, ready to be encoded and written; or the reason why it is left out."""

    item: Item
    pixels: UInt8[np.ndarray, "S S 3"] | None = None  # of the picture to draw; None if latents are there already
    digests: dict[int, str] = dataclasses.field(default_factory=dict)  # of its pictures' files
    shown: dict[int, StoredImage] = dataclasses.field(default_factory=dict)
    problem: str = ""
    too_long: bool = False  # whether that is the problem


def find_encoder(config: Config) -> PromptEncoder | None:
    """The prompt encoder that training will have; None if it will train a tokenizer on the texts.

    Raises:
      UserError: the VLM to start from, or the tokenizer, is missing.
    """
    if config.pretrain.init_from:
        return prompt_encoder(config, open_vlm(config.pretrain.init_from).encoder.tokenizer)
    if config.tokenizer.path:
        return prompt_encoder(config, tokenizers.load(resolve_path(config.tokenizer.path)))
    return None


def make_preparation(
    config: Config, encoder: PromptEncoder | None, *, texts_only: bool = False
) -> Callable[[Item], Prepared]:
    """Returns a function that prepares a record.

    Args:
      config: the run's config.
      encoder: checks that prompts and conversations fit `data.prompt_length` and `data.answer_length`; None: unchecked.
      texts_only: whether latents are there already, so that pictures to draw need not be decoded.
    """
    processor = image_processor(config)

    def prepare(item: Item) -> Prepared:
        if item.problem:
            return Prepared(item, problem=item.problem)
        files = {index: read_file(item.pictures[index]) for index in item.used}
        digests = {index: digest(file) for index, file in files.items()}
        try:
            pixels, shown = None, {}
            for index, file in files.items():
                if isinstance(file, UserError):
                    raise file
                picture = item.pictures[index]
                with parsing(f"the image {picture.name}"):
                    if index == item.drawn and not texts_only:
                        pixels = images.square(
                            images.decode_image(io.BytesIO(file), picture.name, turn=picture.turn),
                            config.data.image_size,
                        )
                    if index in item.shown:
                        shown[index] = bounded(picture, file, processor)
        except UserError as error:
            return Prepared(item, digests=digests, problem=f"{item.name}: {error}")
        try:
            if encoder is not None:
                check_lengths(item, shown, encoder, config)
        except UserError as error:
            return Prepared(item, digests=digests, problem=f"{item.name}: {error}", too_long=True)
        return Prepared(item, pixels, digests, shown)

    return prepare


def digests_alone(item: Item) -> Prepared:
    """A record with the digests of its pictures' files, which are not decoded."""
    digests = {} if item.problem else {index: digest(read_file(item.pictures[index])) for index in item.used}
    return Prepared(item, digests=digests)


def limits_of(config: Config, encoder: PromptEncoder | None) -> str:
    """A hash of what decides whether a record is too long, besides the record."""
    if encoder is None:
        return "none"
    data, vision, tokenizer = config.data, config.model.vision, encoder.tokenizer
    limits = [data.prompt_length, data.answer_length, data.min_pixels, data.max_pixels]
    limits += [vision.patch_size, vision.spatial_merge_size, tokenizer.chat_template]
    return hashlib.sha256((json.dumps(limits) + tokenizer.backend_tokenizer.to_str()).encode()).hexdigest()


def read_file(picture: Picture) -> bytes | UserError:
    """A picture's file, or why it cannot be read."""
    try:
        with parsing(f"the image {picture.name}"):
            return picture.read()
    except UserError as error:
        return error


def digest(file: bytes | UserError) -> str:
    """Of a file's contents; "" if it could not be read."""
    return "" if isinstance(file, UserError) else hashlib.sha256(file).hexdigest()[:16]


def bounded(picture: Picture, data: bytes, processor) -> StoredImage:
    """A picture's file as the vision tower may see it: unchanged if it is small enough, otherwise of the size to which
    the processor would resize it, with its largest area.

    Raises:
      UserError: it is no image, or the processor would refuse it.
    """
    image = images.decode_image(io.BytesIO(data), picture.name, turn=False)
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    try:
        size = resized(*image.size, processor)
    except ValueError as error:
        raise UserError(f"the image {picture.name} is refused: {error}") from error
    fits = image.width * image.height <= processor.size["longest_edge"]
    if fits and image.format in KEPT_FORMATS and not turned:
        return StoredImage(data, image.size)
    kind = image.format
    if turned:
        image = images.decode_image(io.BytesIO(data), picture.name, turn=picture.turn)
        size = resized(*image.size, processor)
    image = Image.fromarray(np.asarray(images.on_white(image)))  # without metadata
    if not fits:
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if kind == "JPEG":
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(file, "PNG")
    return StoredImage(file.getvalue(), image.size)


def check_lengths(item: Item, shown: dict[int, StoredImage], encoder: PromptEncoder, config: Config) -> None:
    """Raises `UserError` if a prompt or a conversation is longer than training allows."""
    seen = functools.cache(lambda index: encoder.image_of_size(*shown[index].size))
    prompts = [encoder.drawing(prompt.text, [seen(index) for index in prompt.shown]) for prompt in item.prompts]
    encoder.check_length(prompts, config.data.prompt_length)
    talks = [[Turn(role, _content(content, seen)) for role, content in talk] for talk in item.conversations]
    encoder.check_length(map(encoder.conversation, talks), config.data.answer_length)


def _content(content: tuple[str | int, ...], seen: Callable[[int], ReadableImage]) -> list[str | ReadableImage]:
    return [part if isinstance(part, str) else seen(part) for part in content]
