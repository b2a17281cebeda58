"""What `lattejax.encode` writes and training reads, on disk.

encoding.json                          the settings that determine the contents; written first
order.json                             the order of the source's records, see `encoding.order`
latents-<split>-00007.array_record     latents, in tensorflow-datasets' format
captions-<split>-00007.array_record    for each drawing its prompts
questions-<split>-00007.array_record   conversations
images-<split>-00007.array_record      the images that prompts and conversations show, as PNG, JPEG or WebP
<split>-00007.json                     these four files' numbers of records, sizes and hashes, and what was left out
dataset_info.json, features.json       for tensorflow-datasets' `tfds.builder_from_directory`, which reads the latents
manifest.json                          all of this together; required for reading
summary.json                           what it holds, for people; written last

A shard is four files with one number. Latents are stored scaled, as the flow uses them.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath, epy

from lattejax.errors import UserError
from lattejax.files import check_name

with epy.lazy_imports():
    import tensorflow_datasets as tfds

NAME = "latents"
TEMPLATE = "latents-{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}"  # of files that tensorflow-datasets reads
LATENTS, CAPTIONS, QUESTIONS, IMAGES = KINDS = ("latents", "captions", "questions", "images")
ENCODING, MANIFEST, SUMMARY = "encoding.json", "manifest.json", "summary.json"
VERSION = 2  # of the layout; the first had latents and captions in one file, and no questions
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class StoredFile:
    file: str
    records: int
    bytes: int
    sha256: str
    contents: str = ""  # a hash of what training reads, in order; empty if the file is older than this field

    @classmethod
    def parse(cls, values: Any, where: epath.Path) -> "StoredFile":
        """Checks a description from a JSON file; raises `UserError`, with `where`, if it is none."""
        kinds = {"file": str, "records": int, "bytes": int, "sha256": str, "contents": str}
        if not isinstance(values, dict) or not kinds.keys() - {"contents"} <= values.keys() <= kinds.keys():
            raise UserError(f"{where} does not describe a file of latents: {values!r:.200}")
        wrong = [key for key, value in values.items() if type(value) is not kinds[key]]
        if wrong or values["records"] < 0 or values["bytes"] < 0:
            raise UserError(f"{where} describes a file of latents with a wrong {', '.join(wrong) or 'size'}")
        check_name(values["file"], str(where))
        return cls(**values)

    def check_size(self, directory: epath.Path) -> None:
        """Raises `UserError` if the file is missing or has the wrong size."""
        path = directory / self.file
        size = path.stat().length if path.exists() else None
        if size != self.bytes:
            described = description(self.file)
            if size is None:
                raise UserError(f"{path} is missing; remove {described} and encode again")
            raise UserError(
                f"{path} is truncated or overwritten: {size} bytes, expected {self.bytes}; remove it and {described}, "
                "and encode again"
            )


@dataclasses.dataclass(frozen=True)
class Shard:
    """The files of some records, by kind."""

    files: dict[str, StoredFile]
    left_out: list[str]  # records, each with the reason

    @classmethod
    def parse(cls, values: Any, where: epath.Path) -> "Shard":
        """Checks a description from a JSON file, of this version or the first."""
        if isinstance(values, dict) and "unreadable" in values:
            values = {**values}
            left_out = values.pop("unreadable")
            files = {LATENTS: values}
        elif isinstance(values, dict) and values.keys() == {"files", "left_out"} and isinstance(values["files"], dict):
            files, left_out = values["files"], values["left_out"]
        else:
            raise UserError(f"{where} does not describe a file of latents: {values!r:.200}")
        if not isinstance(left_out, list) or not all(isinstance(line, str) for line in left_out):
            raise UserError(f"{where} describes a file of latents with a wrong list of what was left out")
        if not files.keys() <= set(KINDS) or LATENTS not in files:
            raise UserError(f"{where} does not describe a file of latents: {values!r:.200}")
        return cls({kind: StoredFile.parse(file, where) for kind, file in files.items()}, left_out)


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}"


def file_name(kind: str, shard: str) -> str:
    return f"{kind}-{shard}.array_record"


def description(file: str) -> str:
    """The name of the file that describes a shard's file."""
    if "-of-" in file:  # of the first version
        return f"{file}.json"
    return f"{file.partition('-')[2].removesuffix('.array_record')}.json"


# ---- Writing


WRITER_OPTIONS = "group_size:1"


class RecordWriter(contextlib.AbstractContextManager):
    """Writes records of bytes, and hashes what training reads of them."""

    def __init__(self, path: epath.Path):
        self._writer, self._digest, self.records = (
            ArrayRecordWriter(os.fspath(path), WRITER_OPTIONS),
            hashlib.sha256(),
            0,
        )

    def write(self, record: bytes, *contents: bytes) -> None:
        """`contents` are the parts that training reads; by default all."""
        self._writer.write(record)
        self.records += 1
        for part in contents or (record,):
            self._digest.update(len(part).to_bytes(8, "little") + part)

    @property
    def contents(self) -> str:
        return self._digest.hexdigest()

    def __exit__(self, *error: Any) -> None:
        self._writer.close()


def features(latent_shape: tuple[int, int, int]) -> "tfds.features.FeaturesDict":
    """The features of a record of latents."""
    latents = tfds.features.Tensor(shape=latent_shape, dtype=np.float32, encoding=tfds.features.Encoding.BYTES)
    return tfds.features.FeaturesDict({"latents": latents, "picture": tfds.features.Text()})


def write_metadata(
    directory: epath.Path, latent_shape: tuple[int, int, int], shards: dict[str, Sequence[StoredFile]]
) -> None:
    """Writes tensorflow-datasets' metadata about the latents of each split."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=NAME, filetype_suffix="array_record", template=TEMPLATE
    )
    infos = []
    for split, of_split in shards.items():
        lengths, size = [shard.records for shard in of_split], sum(shard.bytes for shard in of_split)
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=size, filename_template=template.replace(split=split)
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features(latent_shape),
        split_infos=infos,
        filename_template=template,
        check_data=False,
    )


# ---- Reading


class _CompleteFile(NamedTuple):
    """What ArrayRecord's data source takes for a file: with its number of records, so that it need not open it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class StoredRecords:
    """Random access to the records of several files, as bytes."""

    def __init__(self, directory: epath.Path, files: Iterable[StoredFile]):
        known = [(os.fspath(directory / one.file), one.records) for one in files if one.records]
        files = [_CompleteFile(path, skip=0, take=records, examples_in_shard=records) for path, records in known]
        self._source = ArrayRecordDataSource(files) if files else ()

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
        if len(indices) < 2:  # of several, each call starts threads, which takes milliseconds
            return [self._source[index] for index in indices]
        return self._source.__getitems__(list(indices))
