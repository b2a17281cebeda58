"""The files of latents that an encoding has written: their descriptions, their checks, and the manifest of all."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from lattejax.data import latents
from lattejax.data.latents import MANIFEST, MOST_CAPTIONS, SPLITS, Encoding, File, Shard
from lattejax.errors import UserError
from lattejax.files import read_json, write_atomically


class Written(NamedTuple):
    """A completely written file."""

    shard: Shard
    captions: list[str] | None  # the distinct captions, unless there are too many for a table


def description(out: epath.Path, file: File) -> epath.Path:
    return out / f"{file.name}.json"


def read_descriptions(out: epath.Path, files: Sequence[File]) -> dict[File, Written]:
    """Reads the descriptions of the files that any worker has completely written."""
    written = {}
    for file in files:
        path = description(out, file)
        if path.exists():
            values = read_json(path)
            captions = values.get("captions")
            if not isinstance(captions, list | None) or not all(isinstance(each, str) for each in captions or ()):
                raise UserError(f"{path} does not describe a file of latents: its captions are no texts; remove it")
            written[file] = Written(Shard.parse(values.get("shard"), path), captions)
    return written


def check_shard(out: epath.Path, shard: Shard) -> None:
    latents.check_size(out, shard)
    if hash_file(out / shard.file) != shard.sha256:
        file = out / shard.file
        raise UserError(f"{file} has changed since it was written; remove it and {shard.file}.json, and encode again")


def hash_file(path: epath.Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def count_unreadable(written: dict[File, Written]) -> int:
    return sum(len(one.shard.unreadable) for one in written.values())


def check_unreadable(written: dict[File, Written], most: int) -> None:
    """Raises `UserError` if more pictures than allowed are unreadable, and names the last of them."""
    if (count := count_unreadable(written)) > most:
        named = [problem for one in written.values() for problem in one.shard.unreadable][-5:]
        raise UserError(
            f"{count} pictures cannot be read, more than config.images.most_unreadable={most}: {'; '.join(named)}; "
            "repair them or allow more, and run lattejax.encode again"
        )


def finish(out: epath.Path, encoding: Encoding, written: dict[File, Written]) -> None:
    """Writes the metadata and the manifest, which need all files."""
    shards = {split: [one.shard for file, one in written.items() if file.split == split] for split in SPLITS}
    for split in SPLITS:
        if not any(shard.records for shard in shards[split]):
            raise UserError(f"none of the pictures of config.images.{split} could be read")
    manifest = {
        "encoding": encoding.as_json(),
        "captions": _join([one.captions for one in written.values()]),
        "shards": [dataclasses.asdict(one.shard) for one in written.values()],
    }
    if (out / MANIFEST).exists() and read_json(out / MANIFEST) == manifest:
        return
    latents.write_metadata(out, encoding.latent_shape, shards)
    write_atomically(out / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def _join(tables: Sequence[list[str] | None]) -> list[str] | None:
    """The distinct captions of all tables, sorted; None if there are too many."""
    if None in tables:
        return None
    captions = sorted(set().union(*tables))
    return captions if len(captions) <= MOST_CAPTIONS else None
