"""A folder of pictures with texts.

Each picture has a text file of the same name; or all are listed in `metadata.jsonl`, one JSON object on each line:

    {"file_name": "a.jpg", "text": "a red bicycle"}
    {"file_name": "b.jpg", "text": ["a soup", "a bowl of soup on a table"], "questions": [
        {"question": "What is in the bowl?", "answer": "Soup."},
        [{"role": "user", "content": "Hot?"}, {"role": "assistant", "content": "Yes."}, …]]}
    {"file_name": "c.jpg", "text": "the same at night", "prompt_images": ["b.jpg"]}

(each really on one line). The third asks for a picture, conditioned on another. A record needs texts or questions.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from lattejax.configuration import Images
from lattejax.encoding.items import Item, Picture, checked, make_item
from lattejax.encoding.order import Part
from lattejax.encoding.sources.json_records import JsonRecords, file_state
from lattejax.errors import UserError
from lattejax.files import check_name, read_bytes, read_text, resolve_path

METADATA = "metadata.jsonl"
TEXT_KEYS = ("text", "caption")
KEYS = {"file_name", *TEXT_KEYS, "questions", "prompt_images"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class FolderRecords:
    """Image files, each with a text file of the same name, or all listed in metadata.jsonl; see `sources.Records`."""

    names_are_shards = False

    def __init__(self, images: Images):
        self.folder = Path(resolve_path(images.name))
        if not self.folder.is_dir():
            raise UserError(f"config.images.name={images.name!r} is not a folder")
        self.identity = f"the folder {Path(images.name).expanduser().name}"
        if (self.folder / METADATA).exists():
            self.listed = JsonRecords(self.folder / METADATA)
            self.indices, self.others = _index(self.listed)
            self.names = list(self.indices)
        else:
            self.listed, self.others = None, set()
            files = (file for file in self.folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.is_dir())
            self.names = [str(file.relative_to(self.folder)) for file in files]
        self.sizes = {"train": len(self.names)}

    @functools.cached_property
    def version(self) -> str:
        """A hash of the sizes and times of all files."""
        digest = hashlib.sha256()
        if self.listed is not None:
            digest.update(file_state(self.listed.path).encode())
        for name in (*sorted(self.names), *sorted(self.others.difference(self.names))):
            file = self.folder / name
            digest.update(f"{name!r}{file_state(file)}".encode())
            if self.listed is None:
                digest.update(file_state(file.with_suffix(".txt")).encode())
        return digest.hexdigest()

    def read(self, part: Part, names: Sequence[str]) -> Iterator[Item]:
        make = self._beside if self.listed is None else self._listed
        for name in names:
            yield checked(name, functools.partial(make, name))

    def _beside(self, name: str) -> Item:
        text = (self.folder / name).with_suffix(".txt")
        if not text.exists():
            raise UserError(f"it has no caption: there is neither {text.name} nor {METADATA}")
        return make_item(name, [self._picture(name)], captions=read_text(epath.Path(text)), drawn=0)

    def _listed(self, name: str) -> Item:
        index = self.indices[name]
        values = self.listed[index]
        if unknown := values.keys() - KEYS:
            raise UserError(f"{self.listed.where(index)} has unknown keys {', '.join(sorted(unknown))}")
        if name != values.get("file_name"):
            _check_listed(values, name)
        others = values.get("prompt_images", [])
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise UserError(f"its prompt_images are {others!r:.60}, not a list of file names")
        return make_item(
            name,
            [self._picture(file) for file in (name, *others)],
            captions=next((values[key] for key in TEXT_KEYS if key in values), ()),
            questions=values.get("questions", ()),
            drawn=0,
            shown=range(1, 1 + len(others)),
        )

    def _picture(self, name: str) -> Picture:
        check_name(name, METADATA)
        file = self.folder / name
        if not os.path.isfile(file):
            raise UserError(f"there is no file {file}")
        return Picture(name, functools.partial(read_bytes, epath.Path(file)), os.path.getsize(file))


def _index(listed: JsonRecords) -> tuple[dict[str, int], set[str]]:
    """The records by file name; a record without one, or with that of an earlier one, by its place. And the names of
    all pictures that prompts show."""
    indices: dict[str, int] = {}
    others: set[str] = set()
    for index in range(len(listed)):
        try:
            values = listed[index]
        except UserError:
            values = {}
        name, shown = values.get("file_name"), values.get("prompt_images")
        others.update(other for other in (shown if isinstance(shown, list) else ()) if isinstance(other, str))
        if not isinstance(name, str) or name in indices:
            name = f"{METADATA}, record {index + 1}"
        indices[name] = index
    return indices, others


def _check_listed(values: dict, name: str) -> None:
    file = values.get("file_name")
    if isinstance(file, str):
        raise UserError(f"{file} is listed twice")
    raise UserError(f'it has no "file_name": {values!r:.100}')
