"""LLaVA's form: one JSON array, or one JSON object per line, of conversations.

    {"id": "7", "image": "coco/a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A bicycle."}]}

`image` may be a list, or missing. File names are relative to `config.images.data_dir`, or to the JSON file's directory.
An answer that is a mark `<image>` alone asks for a drawing of the picture at that mark. A record with one picture may
also have captions of it, as "text" or "caption".
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from lattejax.configuration import Images
from lattejax.encoding.items import Item, Picture, checked, make_item
from lattejax.encoding.order import Part
from lattejax.encoding.sources.json_records import JsonRecords, file_state
from lattejax.errors import UserError
from lattejax.files import check_name, read_bytes, resolve_path


class LlavaRecords:
    """Conversations about images, see `sources.Records`. Records are known by their number in the file."""

    names_are_shards = False

    def __init__(self, images: Images):
        file = Path(resolve_path(images.name))
        if not file.is_file():
            raise UserError(f"config.images.name={images.name!r} is not a file of LLaVA's form")
        self.records = JsonRecords(file)
        self.folder = Path(resolve_path(images.data_dir)) if images.data_dir else file.parent
        if not self.folder.is_dir():
            raise UserError(f"config.images.data_dir={images.data_dir!r} is not a folder")
        self.identity = f"the conversations {Path(images.name).name}"
        self.sizes = {"train": len(self.records)}
        self.names = [str(index) for index in range(len(self.records))]

    @functools.cached_property
    def version(self) -> str:
        """A hash of the sizes and times of the JSON file and of all images."""
        files: set[str] = set()
        for index in range(len(self.records)):
            with contextlib.suppress(UserError):  # of a record that will be left out
                files.update(_files(self.records[index]))
        digest = hashlib.sha256(file_state(self.records.path).encode())
        for name in sorted(files):
            digest.update(f"{name!r}{file_state(self.folder / name)}".encode())
        return digest.hexdigest()

    def read(self, part: Part, names: Sequence[str]) -> Iterator[Item]:
        for name in names:
            yield checked(self.records.where(int(name)), functools.partial(self._item, int(name)))

    def _item(self, index: int) -> Item:
        values = self.records[index]
        files = _files(values)
        captions = next((values[key] for key in ("text", "caption") if key in values), ())
        if captions and len(files) != 1:
            raise UserError(f"it has a text and {len(files)} images; a text describes one")
        talk = values.get("conversations", [])
        return make_item(
            f"record {values.get('id', index)}",
            [self._picture(file, index) for file in files],
            captions=captions,
            questions=[talk] if talk else [],
            drawn=0 if captions else None,
        )

    def _picture(self, name: str, index: int) -> Picture:
        check_name(name, self.records.where(index))
        file = self.folder / name
        if not os.path.isfile(file):
            raise UserError(f"there is no file {file}")
        return Picture(name, functools.partial(read_bytes, epath.Path(file)), os.path.getsize(file))


def _files(values: dict[str, Any]) -> list[str]:
    """The names of a record's images."""
    files = values.get("image", [])
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise UserError(f"its image is {files!r:.60}, neither a file name nor a list of file names")
    return files
