"""WebDataset: tar files whose members `key.jpg`, `key.txt`, `key.json` make one record, local or remote.

A key ends at the first dot of a member's file name. Each tar file becomes one shard.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from lattejax.configuration import Images
from lattejax.encoding.items import Item, Picture, checked
from lattejax.encoding.order import Part
from lattejax.encoding.sources.features import decoded, keyed_item
from lattejax.errors import UserError, first_line, parsing
from lattejax.files import parse_json

CHUNK = 1 << 20  # bytes
IMAGES = ("jpg", "jpeg", "png", "webp")
# Taken only if the config says so; as are names with a further point, such as 0.img.jpg.
OTHER_IMAGES = {*IMAGES, "bmp", "gif", "jfif", "jpe", "tif", "tiff", "avif", "heic", "jp2"}
TEXTS, BRACES = ("txt", "text", "caption"), re.compile(r"\{(\d+)\.\.(\d+)\}")


class WebDatasetRecords:
    """Tar files by a pattern, "shards/{00000..00099}.tar" or "gs://bucket/*.tar"; see `sources.Records`.

    Without keys in the config, a record is its image with its text ("txt", or "text" or "caption" in "json"), and the
    "questions" and "conversations" in "json". With keys, they are paths like "jpg", "txt", "json/long_caption".
    """

    names_are_shards = True

    def __init__(self, images: Images):
        self.images = images
        urls = expand(images.name)
        self.urls = {url.rpartition("/")[2]: url for url in urls}
        if len(self.urls) < max(1, len(urls)):
            raise UserError(f"config.images.name={images.name!r} names no files, or two of one name")
        self.names = list(self.urls)
        self.sizes = {"train": len(self.names)}
        self.identity = f"the tar files {images.name.rpartition('/')[2]}"

    @functools.cached_property
    def version(self) -> str:
        return hashlib.sha256("\n".join(map(_state, sorted(self.urls.values()))).encode()).hexdigest()

    def read(self, part: Part, names: Sequence[str]) -> Iterator[Item]:
        for file in names:
            for key, fields in read_tar(self.urls[file]):
                name = f"{file}, {key}"
                yield checked(name, functools.partial(self._item, name, fields))

    def _item(self, name: str, fields: dict[str, bytes]) -> Item:
        record: dict[str, Any] = dict(fields)
        for key in record.keys() & {"json"}:
            record[key] = parse_json(decoded(record[key], key), "its json")
        return keyed_item(name, record, self._keys(record), _picture, lambda key, value: decoded(value, key))

    def _keys(self, record: dict[str, Any]) -> Images:
        """The config's keys, or those that this record has."""
        chosen, described = self.images, record.get("json", {})
        if chosen.keys:
            return chosen
        image = next((key for key in IMAGES if key in record), "")
        if not image and (others := sorted(key for key in record if key.rpartition(".")[2] in OTHER_IMAGES)):
            raise UserError(
                f"its picture ends in .{others[0]}, not in .{', .'.join(IMAGES)}; convert it, or set images.image_key "
                "and the keys of the texts"
            )
        in_json = (f"json/{key}" for key in ("text", "caption") if described.get(key))
        caption = next((key for key in TEXTS if key in record), next(in_json, ""))
        talks = [f"json/{key}" for key in ("questions", "conversations") if described.get(key)]
        if len(talks) > 1:
            raise UserError("its json has questions and conversations; put all into one of them")
        return dataclasses.replace(chosen, image_key=image, caption_key=caption, conversations_key="".join(talks))


def _picture(value: Any, name: str) -> Picture:
    if not isinstance(value, bytes):
        raise UserError(f"{name} is no image")
    return Picture(name, lambda: value, len(value))


def expand(pattern: str) -> list[str]:
    """The files that a pattern names: braces with numbers, `{000..012}`, and wildcards."""
    if braces := BRACES.search(pattern):
        first, last = braces.groups()
        numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
        return [
            url for number in numbers for url in expand(pattern[: braces.start()] + number + pattern[braces.end() :])
        ]
    if not glob.has_magic(pattern):
        return [pattern]
    try:
        files, path = url_to_fs(pattern)
        return sorted(files.unstrip_protocol(found) if "://" in pattern else found for found in files.glob(path))
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"config.images.name={pattern!r} cannot be listed: {first_line(error)}") from error


class Header(tarfile.TarInfo):
    """A member's header. tarfile takes a damaged or missing one for the end of the file; here it is an error."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # the zeros at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is truncated or damaged at byte {tar.offset:,}: {error}") from error


def read_tar(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields the keys and the members' contents by extension, of members that follow each other with one key.

    Raises:
      UserError: the file is missing, truncated, damaged or no tar file.
    """
    key, fields = None, {}
    with parsing(url), fsspec.open(url, "rb", compression="infer") as opened:
        with tarfile.open(fileobj=opened, mode="r|", tarinfo=Header) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                directory, slash, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                if not stem:  # a hidden file
                    continue
                if directory + slash + stem != key:
                    if fields:
                        yield key, fields
                    key, fields = directory + slash + stem, {}
                fields[extension.lower()] = tar.extractfile(member).read()
        while opened.read(CHUNK):  # to the checksum of a compressed file
            pass
        if fields:
            yield key, fields


def _state(url: str) -> str:
    """Changes if the file is written again."""
    try:
        files, path = url_to_fs(url)
        info = files.info(path)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {first_line(error)}") from error
    known = {key: info[key] for key in ("size", "mtime", "etag", "ETag", "updated", "LastModified") if key in info}
    return json.dumps({"url": url} | known, default=str)
