"""What `lattejax.encode` has written (see `data.stored`), as a data set to train on.

Axes: n records, h row, w column, C latent channel.
"""

import dataclasses
import functools
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from lattejax.configuration import Config
from lattejax.data import conversations
from lattejax.data.chats import NO_IMAGES, Bounds
from lattejax.data.examples import Drawing, Prompt
from lattejax.data.identity import Identity
from lattejax.data.images import LONGEST, decode_image
from lattejax.data.manifest import Manifest
from lattejax.data.pipeline import every
from lattejax.data.prompts import EncodedPrompt, PromptEncoder, ReadableImage, Turn
from lattejax.data.stored import CAPTIONS, IMAGES, LATENTS, MANIFEST, QUESTIONS, SPLITS, Shard, StoredRecords
from lattejax.errors import UserError, parsing, require
from lattejax.files import is_remote, resolve_path

OPENED_IMAGES = 16  # kept, as several questions may ask about one; each may be megabytes


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """Cached latents, texts and questions as a data set, see `examples.Source`."""

    directory: epath.Path
    latent_shape: tuple[int, int, int]
    captions: tuple[str, ...]
    identities: tuple[str, ...]
    shards: dict[str, tuple[Shard, ...]]
    views: int = 1  # latents of each picture
    image_sizes: tuple[tuple[int, int], ...] | None = ()  # all that occur; None: too many to list
    most_images: int = 0  # in a prompt or a conversation

    @classmethod
    def open(cls, config: Config, autoencoder: Callable[[], Identity]) -> "LatentSource":
        """Opens the config's latents.

        Raises:
          UserError: their encoding is incomplete, a file is missing or truncated, or their autoencoder, scale, shift,
            size or shape are not the config's.
        """
        data = config.data
        if data.prompts != "captions":
            raise UserError(f"config.data.prompts={data.prompts!r} must be 'captions' for cached latents")
        if not data.latents:
            raise UserError("config.data.latents is empty; it must be a directory that lattejax.encode has written")
        directory = resolve_path(data.latents)
        if is_remote(directory):
            raise UserError(
                f"config.data.latents={data.latents!r} is remote; ArrayRecord needs a local disk or a mount"
            )
        if not (directory / MANIFEST).is_file():
            raise UserError(f"config.data.latents={data.latents!r} has no {MANIFEST}; complete it with lattejax.encode")
        require("tensorflow_datasets", "data", "training on latents")
        source, manifest = cls.at(directory), Manifest.read(directory / MANIFEST)
        manifest.made_by.check(autoencoder(), data.latents, data.autoencoder)
        for key, value in manifest.made.items():
            if getattr(data, key) != value:
                raise UserError(f"config.data.{key}={getattr(data, key)!r}, but {data.latents} was made with {value!r}")
        for shard in itertools.chain.from_iterable(manifest.shards.values()):
            for file in shard.files.values():
                file.check_size(directory)
        if (manifest.max_pixels or 0) < data.max_pixels and manifest.has_images:
            raise UserError(
                f"config.data.max_pixels={data.max_pixels}, but the images in {data.latents} were stored with at most "
                f"{manifest.max_pixels}; lower it, or encode again"
            )
        return source

    @classmethod
    def at(cls, directory: epath.Path) -> "LatentSource":
        """Opens a directory whatever the config; raises `UserError` if its manifest is damaged."""
        manifest = Manifest.read(directory / MANIFEST)
        return cls(
            directory,
            manifest.made["latent_shape"],
            manifest.captions,
            manifest.identities,
            manifest.shards,
            manifest.views,
            manifest.image_sizes,
            manifest.most_images,
        )

    @property
    def has_drawings(self) -> bool:
        return self._has(LATENTS)

    @property
    def has_questions(self) -> bool:
        return self._has(QUESTIONS)

    def _has(self, kind: str) -> bool:
        return all(sum(_records(shard, kind) for shard in self.shards[split]) for split in SPLITS)

    def drawings(self, split: str, encoder: PromptEncoder | None = None) -> "StoredDrawings":
        return StoredDrawings(self, split, encoder)

    def questions(self, split: str, encoder: PromptEncoder) -> "StoredQuestions | None":
        return StoredQuestions(self, split, encoder) if self.has_questions else None

    def requests(self, encoder: PromptEncoder) -> list[tuple[str, EncodedPrompt]]:
        return []  # prompts are texts

    def texts(self) -> Iterator[str]:
        yield from self.captions or self._captions()
        if self.has_questions:
            for split in SPLITS:
                for record in every(StoredRecords(self.directory, _files(self.shards[split], QUESTIONS))):
                    for message in conversations.from_json(json.loads(record)):
                        yield conversations.text_of(message.content)

    def _captions(self) -> Iterator[str]:
        for split in SPLITS:
            for prompts in self.drawings(split).prompts():
                yield from prompts

    def bounds(self, encoder: PromptEncoder) -> Bounds:
        """The bounds of all prompts and conversations, for batches of one shape."""
        if not self.most_images:
            return NO_IMAGES
        if self.image_sizes is None:
            side, most_pixels = encoder.processor.patch_size * encoder.merge, encoder.processor.size["longest_edge"]
            # A long image becomes one row of merged patches, even if that exceeds the pixels allowed.
            merged = max(most_pixels // side**2, math.isqrt(LONGEST * most_pixels) // side)
            return Bounds(self.most_images, merged * encoder.merge**2)
        grids = (encoder.image_of_size(*size).grid for size in self.image_sizes)
        return Bounds(self.most_images, max(int(np.prod(grid)) for grid in grids))


def _files(shards: Iterable[Shard], kind: str) -> list:
    return [shard.files[kind] for shard in shards if kind in shard.files]


def _records(shard: Shard, kind: str) -> int:
    return shard.files[kind].records if kind in shard.files else 0


# ---- Drawings


class StoredDrawings:
    """Random access to the pictures of one split, see `examples.Drawings`."""

    def __init__(self, source: LatentSource, split: str, encoder: PromptEncoder | None):
        from tensorflow_datasets.proto import tf_example_pb2

        shards = source.shards[split]
        self.records = StoredRecords(source.directory, _files(shards, LATENTS))
        self._in_latents = any(CAPTIONS not in shard.files for shard in shards)  # in the first version's files
        self._captions = StoredRecords(source.directory, _files(shards, CAPTIONS))
        self._images = ShardImages(source, split, encoder, CAPTIONS)
        self._name = f"the {split} split of the latents in {source.directory}; encode them again:"
        self._example, self.latent_shape, self._views = tf_example_pb2.Example, source.latent_shape, source.views
        self._source, self._encoder = source, encoder

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def bounds(self) -> Bounds:
        return self._source.bounds(self._encoder)

    def __getitems__(self, indices: Sequence[int]) -> list[Drawing]:
        with parsing(self._name):
            decoded = [self._decode(record) for record in self.records.__getitems__(indices)]
            if self._in_latents:
                return [Drawing(latents, (Prompt(caption),)) for latents, caption in decoded]
            pictures = [index // self._views for index in indices]
            return [
                Drawing(latents, tuple(self._prompts(picture, record)))
                for (latents, _), picture, record in zip(decoded, pictures, self._read(pictures), strict=True)
            ]

    def prompts(self) -> Iterator[list[str]]:
        """The texts of each picture's prompts, without reading latents or images."""
        if self._in_latents:
            for drawing in every(self):
                yield [drawing.prompts[0].caption]
            return
        for record in every(self._captions):
            yield [text for text, _ in json.loads(record)["prompts"]]

    def prompt_texts(self) -> Iterator[list[str]]:
        for texts in self.prompts():
            yield from itertools.repeat(texts, 1 if self._in_latents else self._views)

    def latents_and_texts(self, index: int) -> tuple[np.ndarray, list[str]]:
        """One picture's latents, and the texts of its prompts, without their images."""
        [(latents, caption)] = map(self._decode, self.records.__getitems__([index]))
        if self._in_latents:
            return latents, [caption]
        return latents, [text for text, _ in self._read([index // self._views])[0]]

    def without_pixels(self) -> Iterator[EncodedPrompt]:
        """All prompts, in some order, whose images have no patches: enough to know their lengths."""
        if self._in_latents:
            prompts = ((picture, text, ()) for picture, texts in enumerate(self.prompts()) for text in texts)
        else:
            records = enumerate(every(self._captions))
            prompts = ((picture, *prompt) for picture, record in records for prompt in json.loads(record)["prompts"])
        for chunk in _chunks(prompts):
            yield from self._encoder.drawings([text for _, text, shown in chunk if not shown])
            for picture, text, shown in chunk:
                if shown:
                    yield self._encoder.drawing(text, [self._images.size_only(picture, i) for i in shown])

    def _decode(self, record: bytes) -> tuple[np.ndarray, str]:
        feature = self._example.FromString(record).features.feature
        latents = np.frombuffer(feature["latents"].bytes_list.value[0], np.float32).reshape(self.latent_shape)
        return latents, feature["caption"].bytes_list.value[0].decode() if self._in_latents else ""

    def _read(self, pictures: Sequence[int]) -> list[Any]:
        return [json.loads(record)["prompts"] for record in self._captions.__getitems__(pictures)]

    def _prompts(self, picture: int, prompts: Any) -> Iterator[Prompt]:
        for text, shown in prompts:
            yield Prompt(text, tuple(self._images(picture, i) for i in shown) if self._encoder else ())


def _chunks(values: Iterator[Any], size: int = 1024) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(values, size)):
        yield chunk


class ShardImages:
    """The images that the records of a kind show: by the record's index, and the image's number in its shard."""

    def __init__(self, source: LatentSource, split: str, encoder: PromptEncoder | None, kind: str):
        shards = source.shards[split]
        self._records = StoredRecords(source.directory, _files(shards, IMAGES))
        self._ends = np.cumsum([_records(shard, kind) for shard in shards])
        self._starts = np.cumsum([0, *(_records(shard, IMAGES) for shard in shards)])
        self._encoder = encoder
        self._read = functools.lru_cache(maxsize=OPENED_IMAGES)(self._open)

    def __call__(self, record: int, number: int) -> ReadableImage:
        return self._read(self._index(record, number))

    def size_only(self, record: int, number: int) -> ReadableImage:
        """Without patches, see `PromptEncoder.image_of_size`."""
        from PIL import Image

        index = self._index(record, number)
        with parsing(f"stored image {index}"), Image.open(io.BytesIO(self._bytes(index))) as opened:
            return self._encoder.image_of_size(*opened.size)

    def _index(self, record: int, number: int) -> int:
        return int(self._starts[np.searchsorted(self._ends, record, side="right")]) + number

    def _bytes(self, index: int) -> bytes:
        return self._records.__getitems__([index])[0]

    def _open(self, index: int) -> ReadableImage:
        return self._encoder.read_image(decode_image(io.BytesIO(self._bytes(index)), f"stored image {index}"))


# ---- Questions


class StoredQuestions:
    """Random access to the conversations of one split, see `examples.Questions`."""

    def __init__(self, source: LatentSource, split: str, encoder: PromptEncoder):
        self._records = StoredRecords(source.directory, _files(source.shards[split], QUESTIONS))
        self._images = ShardImages(source, split, encoder, QUESTIONS)
        self._name = f"the {split} questions in {source.directory}; encode them again:"
        self._source, self._encoder = source, encoder

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def bounds(self) -> Bounds:
        return self._source.bounds(self._encoder)

    def __getitems__(self, indices: Sequence[int]) -> list[EncodedPrompt]:
        with parsing(self._name):
            return [
                self._encoder.conversation(self._turns(index, talk, self._images))
                for index, talk in zip(indices, self._read(indices), strict=True)
            ]

    def text(self, index: int, turn: int = -1) -> tuple[str, str]:
        *_, question, answer = conversations.up_to_answer(self._read([index])[0], turn)
        return conversations.text_of(question.content), conversations.text_of(answer.content)

    def unanswered(self, index: int, turn: int = -1) -> EncodedPrompt:
        *asked, _ = conversations.up_to_answer(self._read([index])[0], turn)
        return self._encoder.chat(self._turns(index, asked, self._images))

    def without_pixels(self) -> Iterator[EncodedPrompt]:
        """All conversations, whose images have no patches: enough to know their lengths."""
        for index in range(len(self)):
            yield self._encoder.conversation(self._turns(index, self._read([index])[0], self._images.size_only))

    def _read(self, indices: Sequence[int]) -> list[conversations.Conversation]:
        return [conversations.from_json(json.loads(record)) for record in self._records.__getitems__(indices)]

    def _turns(self, index: int, talk: conversations.Conversation, open_image: Callable) -> list[Turn]:
        return [
            Turn(role, [part if isinstance(part, str) else open_image(index, part) for part in content])
            for role, content in talk
        ]
