"""Writing one shard: the latents, captions, questions and images of some records."""

import itertools
import json
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from lattejax.configuration import Config
from lattejax.data import conversations
from lattejax.data.stored import (
    CAPTIONS,
    IMAGES,
    KINDS,
    LATENTS,
    MANIFEST,
    QUESTIONS,
    SUMMARY,
    RecordWriter,
    Shard,
    StoredFile,
    StoredRecords,
    features,
    file_name,
)
from lattejax.encoding.items import Item
from lattejax.encoding.prepare import Prepared
from lattejax.encoding.written import Survey, Written, hash_file
from lattejax.errors import one_line
from lattejax.files import PARTIAL, TEMPORARY

Encoder = Callable[[UInt8[np.ndarray, "B S S 3"]], Float[jax.Array, "B h w C"]]


class ShardWriter:
    """Writes one shard under temporary names, and then under its own.

    Args:
      out: the directory.
      name: the shard's name.
      config: the run's config.
      known: the shard as it is there, if only its texts and images are to be written.
    """

    def __init__(self, out: epath.Path, name: str, config: Config, known: Written | None = None):
        self.out, self.name, self.config, self.known = out, name, config, known
        kinds = KINDS if known is None else tuple(kind for kind in KINDS if kind != LATENTS)
        suffix = f"{PARTIAL}{secrets.token_hex(4)}"
        self._partial = {kind: out / (file_name(kind, name) + suffix) for kind in kinds}
        self._stack = ExitStack()
        self._writers = {kind: self._stack.enter_context(RecordWriter(path)) for kind, path in self._partial.items()}
        self._serializer = features(config.data.latent_shape)
        self.survey, self.left_out, self.too_long = Survey(), [], False  # whether one was too long

    def write(self, prepared: Iterator[Prepared], encoder: Encoder) -> Written | None:
        """Writes all records; returns what is to be recorded. Returns None, and changes nothing, if the stored latents
        are of other pictures."""
        with self._stack:
            if self.known is None:
                settings = self.config.images
                for one, latents in encode_all(self._texts_of(prepared), settings.batch_size, settings.flip, encoder):
                    values = {"latents": latents, "picture": one.item.name}
                    contents = np.asarray(latents, "<f4").tobytes()
                    self._writers[LATENTS].write(self._serializer.serialize_example(values), contents)
            else:
                drawn = [(one.item.name, one.digests[one.item.drawn]) for one in self._texts_of(prepared)]
                if drawn != self._known_drawings():
                    self.discard()
                    return None
        return self._publish()

    def discard(self) -> None:
        self._stack.close()
        for path in self._partial.values():
            path.unlink(missing_ok=True)

    def _texts_of(self, prepared: Iterator[Prepared]) -> Iterator[Prepared]:
        """Writes the records' texts and images, and yields those with a picture to draw."""
        for one in prepared:
            self.survey.see(one.item, one.digests)
            if one.problem:
                self.left_out.append(one_line(one.problem))
                self.too_long |= one.too_long
                continue
            self.survey.keep(one.item)
            self._write_texts(one)
            if one.item.drawn is not None:
                yield one

    def _write_texts(self, one: Prepared) -> None:
        item, first = one.item, self._writers[IMAGES].records
        places = {index: first + i for i, index in enumerate(one.shown)}
        for image in one.shown.values():
            self._writers[IMAGES].write(image.data)
            self.survey.see_image(image.size)
        if item.drawn is not None:
            prompts = [[prompt.text, [places[index] for index in prompt.shown]] for prompt in item.prompts]
            values = {"name": item.name, "digest": one.digests[item.drawn], "prompts": prompts}
            self._writers[CAPTIONS].write(as_bytes(values), as_bytes(prompts))
        for talk in item.conversations:
            self._writers[QUESTIONS].write(as_bytes(conversations.to_json(conversations.renumbered(talk, places))))

    def _known_drawings(self) -> list[tuple[str, str]]:
        records = StoredRecords(self.out, [self.known.shard.files[CAPTIONS]])
        values = (json.loads(record) for record in records.__getitems__(range(len(records))))
        return [(value["name"], value["digest"]) for value in values]

    def _publish(self) -> Written:
        files = {} if self.known is None else {LATENTS: self.known.shard.files[LATENTS]}
        for kind, path in self._partial.items():
            writer = self._writers[kind]
            files[kind] = StoredFile(
                file_name(kind, self.name), writer.records, path.stat().length, hash_file(path), writer.contents
            )
        # Without a description the shard is not there: a process that is killed in between leaves no mixture. Another
        # worker may have written a manifest of the shard as it was.
        for file in (f"{self.name}.json", MANIFEST, SUMMARY):
            (self.out / file).unlink(missing_ok=True)
        for kind, path in self._partial.items():
            path.replace(self.out / file_name(kind, self.name))
        for pattern in (f"*-{self.name}.array_record{PARTIAL}*", f"{self.name}.json.*{TEMPORARY}"):
            for left in self.out.glob(pattern):  # from killed workers
                left.unlink()
        return self.survey.describe(Shard({kind: files[kind] for kind in KINDS}, self.left_out))


def as_bytes(values: Any) -> bytes:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def prepare_all(
    items: Iterator[Item], prepare: Callable[[Item], Prepared], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Prepared]:
    """Prepares records in threads, at most `ahead` of them in advance, and yields them in order."""
    waiting: list[Future[Prepared]] = []
    try:
        for item in items:
            waiting.append(pool.submit(prepare, item))
            if len(waiting) > ahead:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        for future in waiting:
            future.cancel()


def encode_all(
    prepared: Iterator[Prepared], batch_size: int, flip: bool, encoder: Encoder
) -> Iterator[tuple[Prepared, Float[np.ndarray, "h w C"]]]:
    """Yields each record with its latents, and with `flip` again with the latents of its mirror image.

    The device works on one batch while the previous one is written and the next one is read.
    """
    waiting = iter(())
    while batch := list(itertools.islice(prepared, batch_size)):
        pixels = np.stack([one.pixels for one in batch])
        pixels = np.pad(pixels, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
        views = [encoder(view) for view in ((pixels, pixels[:, :, ::-1]) if flip else (pixels,))]
        yield from waiting
        waiting = _fetch(batch, views)
    yield from waiting


def _fetch(
    batch: list[Prepared], views: list[Float[jax.Array, "B h w C"]]
) -> Iterator[tuple[Prepared, Float[np.ndarray, "h w C"]]]:
    views = jax.device_get(views)
    for i, one in enumerate(batch):
        for view in views:
            yield one, view[i]
