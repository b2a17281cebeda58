"""Latents on disk, which `lattejax.encode` writes and training reads.

latents-<split>.array_record-00007-of-00100   records (ArrayRecord, in tensorflow-datasets' format)
latents-….json                                that file's number of records, size, hash, and skipped pictures
encoding.json                                 the settings that determine these latents; written first
dataset_info.json, features.json              for tensorflow-datasets' `tfds.builder_from_directory`
manifest.json                                 all of this together; written last, and required for reading

Latents are stored scaled, as the flow uses them. Axes: n records, h row, w column, C latent channel.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath, epy

from lattejax.configuration import Config
from lattejax.data.examples import Drawing
from lattejax.data.identity import Identity
from lattejax.data.pipeline import every
from lattejax.data.prompts import EncodedPrompt, PromptEncoder
from lattejax.errors import UserError, parsing, require
from lattejax.files import check_name, is_remote, read_json, resolve_path

with epy.lazy_imports():
    import tensorflow_datasets as tfds

NAME = "latents"
ENCODING, MANIFEST = "encoding.json", "manifest.json"
SPLITS = ("train", "test")
CROP = "ADM centre crop"
MOST_CAPTIONS = 10_000  # in a table


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The settings and inputs that determine latents."""

    autoencoder: Identity
    image_size: int
    latent_shape: tuple[int, int, int]
    crop: str
    flip: bool
    images: dict[str, str]  # the identity of each split's pictures, see `pictures.Pictures.identity`
    pictures: dict[str, int]  # the number of pictures in each split
    shard_pictures: int

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of latents."""

    file: str
    records: int
    bytes: int
    sha256: str
    unreadable: list[str]  # the skipped pictures, each with the reason
    contents: str = ""  # a hash of its latents and captions, in order; empty if the file is older than this field

    @classmethod
    def parse(cls, values: Any, where: epath.Path) -> "Shard":
        """Checks a description from a JSON file; raises `UserError`, with `where`, if it is none."""
        kinds = {"file": str, "records": int, "bytes": int, "sha256": str, "unreadable": list, "contents": str}
        if not isinstance(values, dict) or not kinds.keys() - {"contents"} <= values.keys() <= kinds.keys():
            raise UserError(f"{where} does not describe a file of latents: {values!r:.200}")
        wrong = [key for key, value in values.items() if type(value) is not kinds[key]]
        if wrong or values["records"] < 0 or values["bytes"] < 0:
            raise UserError(f"{where} describes a file of latents with a wrong {', '.join(wrong) or 'size'}")
        check_name(values["file"], str(where))
        return cls(**values)


class File(NamedTuple):
    """A file to write."""

    split: str
    name: str
    pictures: range


def features(latent_shape: tuple[int, int, int]) -> "tfds.features.FeaturesDict":
    """The features of a record."""
    return tfds.features.FeaturesDict(
        {
            "latents": tfds.features.Tensor(
                shape=latent_shape, dtype=np.float32, encoding=tfds.features.Encoding.BYTES
            ),
            "caption": tfds.features.Text(),
            "picture": tfds.features.Text(),
        }
    )


def files(pictures: dict[str, int], shard_pictures: int) -> list[File]:
    """All files for the given number of pictures in each split."""
    planned = []
    for split in SPLITS:
        starts = range(0, pictures[split], shard_pictures)
        for i, start in enumerate(starts):
            name = f"{NAME}-{split}.array_record-{i:05d}-of-{len(starts):05d}"
            planned.append(File(split, name, range(start, min(start + shard_pictures, pictures[split]))))
    return planned


# ---- Writing


WRITER_OPTIONS = "group_size:1"


def write_records(
    path: epath.Path, latent_shape: tuple[int, int, int], records: Iterable[dict[str, Any]]
) -> tuple[int, str]:
    """Writes a file of records, see `features`; returns their number, and a hash of the fields that training reads."""
    serializer, count, digest = features(latent_shape), 0, hashlib.sha256()
    with contextlib.closing(ArrayRecordWriter(os.fspath(path), WRITER_OPTIONS)) as writer:
        for record in records:
            writer.write(serializer.serialize_example(record))
            count += 1
            for part in (np.asarray(record["latents"], "<f4").tobytes(), record["caption"].encode()):
                digest.update(len(part).to_bytes(8, "little") + part)
    return count, digest.hexdigest()


def write_metadata(directory: epath.Path, latent_shape: tuple[int, int, int], shards: dict[str, list[Shard]]) -> None:
    """Writes tensorflow-datasets' metadata about the files of each split."""
    infos = []
    for split, of_split in shards.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=NAME, split=split, filetype_suffix="array_record"
        )
        lengths, size = [shard.records for shard in of_split], sum(shard.bytes for shard in of_split)
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template))
    tfds.folder_dataset.write_metadata(
        data_dir=directory, features=features(latent_shape), split_infos=infos, check_data=False
    )


# ---- Reading


class LatentDrawings:
    """Random access to one split, see `examples.Drawings`."""

    def __init__(self, directory: epath.Path, split: str, latent_shape: tuple[int, int, int]):
        from tensorflow_datasets.core.decode import DeserializeMethod
        from tensorflow_datasets.proto import tf_example_pb2

        with parsing(f"the description of the latents in {directory}"):
            builder = tfds.builder_from_directory(directory)
            # Decoded here, because decoding by tensorflow-datasets takes three times as long.
            self.records = builder.as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES)
        self._name = f"the {split} split of the latents in {directory}; encode them again:"
        self._example = tf_example_pb2.Example
        self.latent_shape = latent_shape

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, indices: Sequence[int]) -> list[Drawing]:
        with parsing(self._name):
            return [self._decode(record) for record in self.records.__getitems__(list(indices))]

    def _decode(self, record: bytes) -> Drawing:
        feature = self._example.FromString(record).features.feature
        latents, caption = (feature[name].bytes_list.value[0] for name in ("latents", "caption"))
        return Drawing(np.frombuffer(latents, np.float32).reshape(self.latent_shape), caption.decode())


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """Cached latents as a data set, see `examples.Source`; it has no questions."""

    directory: epath.Path
    latent_shape: tuple[int, int, int]
    captions: tuple[str, ...]
    identities: tuple[str, ...]
    has_questions = False

    @classmethod
    def open(cls, config: Config, autoencoder: Callable[[], Identity]) -> "LatentSource":
        """Opens the config's latents.

        Raises:
          UserError: their encoding is incomplete, a file is missing or truncated, or their autoencoder, scale, shift,
            size or shape are not the config's.
        """
        data, directory = config.data, resolve_path(config.data.latents)
        if data.prompts != "captions":
            raise UserError(f"config.data.prompts={data.prompts!r} must be 'captions' for cached latents")
        if not data.latents:
            raise UserError("config.data.latents is empty; it must be a directory that lattejax.encode has written")
        if is_remote(directory):
            raise UserError(
                f"config.data.latents={data.latents!r} is remote; ArrayRecord needs a local disk or a mount"
            )
        if not (directory / MANIFEST).is_file():
            raise UserError(f"config.data.latents={data.latents!r} has no {MANIFEST}; complete it with lattejax.encode")
        require("tensorflow_datasets", "data", "training on latents")
        file = directory / MANIFEST
        manifest = read_json(file)
        with parsing(f"{file}, which lattejax.encode writes,"):
            encoding, shards = manifest["encoding"], [Shard.parse(shard, file) for shard in manifest["shards"]]
            made_by = Identity.parse(encoding["autoencoder"], str(file))
            made = {"image_size": encoding["image_size"], "latent_shape": tuple(encoding["latent_shape"])}
            captions = tuple(manifest["captions"] or ())
            if not all(isinstance(caption, str) for caption in captions):
                raise TypeError("its captions are no texts")
        made_by.check(autoencoder(), data.latents, data.autoencoder)
        for key, value in made.items():
            if getattr(data, key) != value:
                raise UserError(f"config.data.{key}={getattr(data, key)!r}, but {data.latents} was made with {value!r}")
        for shard in shards:
            check_size(directory, shard)
        return cls(directory, data.latent_shape, captions, _identities(shards))

    def drawings(self, split: str, encoder: PromptEncoder | None = None) -> LatentDrawings:
        return LatentDrawings(self.directory, split, self.latent_shape)

    def questions(self, split: str, encoder: PromptEncoder) -> None:
        return None

    def requests(self, encoder: PromptEncoder) -> list[tuple[str, EncodedPrompt]]:
        return []  # prompts are texts

    def texts(self) -> Sequence[str]:
        return self.captions or [drawing.caption for split in SPLITS for drawing in every(self.drawings(split))]


def _identities(shards: Sequence[Shard]) -> tuple[str, ...]:
    """The hash of contents, which is the same if the same pictures are encoded again; and the hash of files, which may
    differ then, as earlier runs recorded it."""
    hashes = [[shard.contents for shard in shards], [shard.sha256 for shard in shards]]
    return tuple(hashlib.sha256(" ".join(of_all).encode()).hexdigest() for of_all in hashes if all(of_all))


def check_size(directory: epath.Path, shard: Shard) -> None:
    """Raises `UserError` if a file is missing or has the wrong size."""
    file = directory / shard.file
    size = file.stat().length if file.exists() else None
    if size != shard.bytes:
        found = "is missing" if size is None else f"is truncated or overwritten: {size} bytes, expected {shard.bytes}"
        raise UserError(f"{file} {found}; remove it and {shard.file}.json, and encode again")
