"""The shards that an encoding has written: their descriptions, their checks, and the manifest of all."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from lattejax.data import conversations
from lattejax.data.stored import (
    LATENTS,
    MANIFEST,
    QUESTIONS,
    SPLITS,
    SUMMARY,
    VERSION,
    Shard,
    shard_name,
    write_metadata,
)
from lattejax.encoding.items import Item
from lattejax.encoding.order import Part
from lattejax.errors import UserError, one_line, parsing
from lattejax.files import read_json, write_atomically

MOST_CAPTIONS = 10_000  # in a table
MOST_SIZES = 10_000  # of images, in a list


class File(NamedTuple):
    """A shard to write: its split, its name, and the source's records."""

    split: str
    name: str
    part: Part


def plan_files(parts: dict[str, list[Part]]) -> list[File]:
    return [File(split, shard_name(split, i), part) for split in SPLITS for i, part in enumerate(parts[split])]


@dataclasses.dataclass(frozen=True)
class Written:
    """A completely written shard, and what is known of its records.

    `version` is the source's when the shard was last compared with it. `pictures`, `texts` and `contents` are hashes of
    what the source gave: which records with which pictures, their prompts and conversations, and the pictures' files.
    `limits` is of what decides whether a record is too long, see `prepare.limits_of`; empty if none was.
    """

    shard: Shard
    pictures: str
    texts: str
    captions: list[str] | None  # the distinct captions; None if there are too many for a table, or prompts with images
    image_sizes: list[list[int]] | None  # the distinct sizes of the images; None if there are too many
    most_images: int  # in a prompt or a conversation
    part: tuple[str, int, int] = ("", 0, 0)
    version: str = ""
    contents: str = ""  # empty: written before this field
    limits: str | None = None  # None: written before this field

    def save(self, out: epath.Path, file: File) -> None:
        write_atomically(_description(out, file), (json.dumps(dataclasses.asdict(self)) + "\n").encode())

    @classmethod
    def load(cls, path: epath.Path) -> "Written":
        values = read_json(path)
        with parsing(f"{path}, which describes a shard; remove it, and encode again:"):
            values["shard"], values["part"] = Shard.parse(values.get("shard"), path), tuple(values["part"])
            for name in ("captions", "image_sizes"):
                if not isinstance(values[name], list | None):
                    raise TypeError(f"{name} is no list")
            if not all(isinstance(caption, str) for caption in values["captions"] or ()):
                raise TypeError("its captions are no texts")
            return cls(**values)

    def leaves_out(self, name: str) -> bool:
        """Whether the record of this name is left out."""
        return any(line.startswith(one_line(f"{name}:")) for line in self.shard.left_out)

    def stamped(self, file: File, version: str, **changes: Any) -> "Written":
        part = (file.part.split, file.part.records.start, file.part.records.stop)
        return dataclasses.replace(self, part=part, version=version, **changes)


class Survey:
    """What the records of a shard are: hashes of all records, and the captions and images of those that are kept."""

    def __init__(self):
        self._pictures, self._texts, self._contents = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        self._captions: set[str] | None = set()
        self._sizes: set[tuple[int, int]] | None = set()
        self._most_images = 0

    def see(self, item: Item, digests: dict[int, str]) -> None:
        """Takes a record, and the digests of its pictures' files, into the hashes."""
        pictures = [[picture.name, picture.size] for picture in item.pictures]
        _update(self._pictures, [item.name, pictures, item.drawn, bool(item.problem)])
        prompts = [[prompt.text, prompt.shown] for prompt in item.prompts]
        _update(self._texts, [prompts, [conversations.to_json(talk) for talk in item.conversations]])
        _update(self._contents, sorted(digests.items()))

    def keep(self, item: Item) -> None:
        """Takes the captions of a record that is not left out, and its number of images."""
        counts = [len(prompt.shown) for prompt in item.prompts]
        counts += [sum(isinstance(part, int) for said in talk for part in said.content) for talk in item.conversations]
        self._most_images = max([self._most_images, *counts])
        if self._captions is not None:
            self._captions.update(prompt.text for prompt in item.prompts)
            if len(self._captions) > MOST_CAPTIONS or any(prompt.shown for prompt in item.prompts):
                self._captions = None

    def see_image(self, size: tuple[int, int]) -> None:
        if self._sizes is not None:
            self._sizes.add(size)
            if len(self._sizes) > MOST_SIZES:
                self._sizes = None

    @property
    def hashes(self) -> dict[str, str]:
        """See `Written`."""
        hashes = {"pictures": self._pictures, "texts": self._texts, "contents": self._contents}
        return {name: digest.hexdigest() for name, digest in hashes.items()}

    def describe(self, shard: Shard) -> Written:
        captions = None if self._captions is None else sorted(self._captions)
        sizes = None if self._sizes is None else [list(size) for size in sorted(self._sizes)]
        return Written(shard, captions=captions, image_sizes=sizes, most_images=self._most_images, **self.hashes)


def _update(digest: Any, values: Any) -> None:
    digest.update(json.dumps(values).encode() + b"\n")


def _description(out: epath.Path, file: File) -> epath.Path:
    return out / f"{file.name}.json"


def read_descriptions(out: epath.Path, files: Sequence[File]) -> dict[File, Written]:
    """Reads the descriptions of the shards that any worker has completely written."""
    written = {}
    for file in files:
        path = _description(out, file)
        if path.exists():
            one = Written.load(path)
            if one.part == one.stamped(file, "").part:
                written[file] = one
    return written


def written_versions(out: epath.Path) -> set[str]:
    """The versions of the source with which shards were last compared."""
    return {Written.load(path).version for split in SPLITS for path in out.glob(f"{split}-*.json")}


def check_shard(out: epath.Path, one: Written) -> None:
    """Raises `UserError` if one of a shard's files has changed."""
    for stored in one.shard.files.values():
        stored.check_size(out)
        path = out / stored.file
        if hash_file(path) != stored.sha256:
            name = stored.file.partition("-")[2].removesuffix(".array_record")
            raise UserError(f"{path} has changed since it was written; remove it and {name}.json, and encode again")


def hash_file(path: epath.Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def count_left_out(written: dict[File, Written]) -> int:
    return sum(len(one.shard.left_out) for one in written.values())


def check_left_out(written: dict[File, Written], most: int) -> None:
    """Raises `UserError` if more records than allowed are left out, and names the last of them."""
    if (count := count_left_out(written)) > most:
        named = [problem for one in written.values() for problem in one.shard.left_out][-5:]
        raise UserError(
            f"{count} records cannot be used, more than config.images.most_unreadable={most}: {'; '.join(named)}; "
            "repair them or allow more, and run lattejax.encode again"
        )


def finish(
    out: epath.Path, encoding: dict[str, Any], latent_shape: tuple[int, int, int], written: dict[File, Written]
) -> bool:
    """Writes the metadata and the manifest, which need all shards; returns whether they are new."""
    shards = {split: [one.shard for file, one in written.items() if file.split == split] for split in SPLITS}
    counts = {split: {kind: _count(shards[split], kind) for kind in (LATENTS, QUESTIONS)} for split in SPLITS}
    for split in SPLITS:
        if not any(counts[split].values()):
            raise UserError(f"config.images.{split} has no pictures to draw that could be read, and no questions")
        if any(counts[other][LATENTS] for other in SPLITS) and not counts[split][LATENTS]:
            raise UserError(f"config.images.{split} has no pictures to draw that could be read; the other split has")
    ones = written.values()
    manifest = {
        "version": VERSION,
        "encoding": encoding,
        "captions": _join([one.captions for one in ones], MOST_CAPTIONS),
        "image_sizes": _join([one.image_sizes for one in ones], MOST_SIZES),
        "most_images": max(one.most_images for one in ones),
        "shards": [dataclasses.asdict(one.shard) for one in ones],
    }
    if (out / MANIFEST).exists() and read_json(out / MANIFEST) == manifest:
        return False
    write_metadata(
        out, latent_shape, {split: [shard.files[LATENTS] for shard in of_split] for split, of_split in shards.items()}
    )
    (out / SUMMARY).unlink(missing_ok=True)  # of another manifest
    write_atomically(out / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return True


def _count(shards: Sequence[Shard], kind: str) -> int:
    return sum(shard.files[kind].records for shard in shards)


def _join(tables: Sequence[list[Any] | None], most: int) -> list[Any] | None:
    """The distinct entries of all tables, sorted; None if there are too many."""
    if None in tables:
        return None
    entries = {json.dumps(entry): entry for table in tables for entry in table}
    return sorted(entries.values()) if len(entries) <= most else None
