"""Random access to the records of a JSON file, without reading it into memory."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from lattejax.errors import UserError
from lattejax.files import check_file, parse_json, readable

CHUNK = 1 << 20  # bytes read at a time
LONGEST = 1 << 26  # bytes of one record


class JsonRecords:
    """The objects of a JSON array, or of a file with one JSON object per line; blank lines are skipped.

    Only the records' places are kept, 16 bytes each.

    Raises:
      UserError: the file cannot be read, or is neither an array nor lines.
    """

    def __init__(self, path: Path):
        self.path = path
        check_file(epath.Path(path), most_bytes=math.inf)
        with readable(path), path.open("rb") as opened:
            start = len(b"\xef\xbb\xbf") if opened.read(3) == b"\xef\xbb\xbf" else 0
            opened.seek(start)
            first = opened.read(CHUNK).lstrip()[:1]
            opened.seek(start)
            self.in_lines = first != b"["
            places = list_lines(opened, start) if self.in_lines else list_array(opened, start, str(path))
            self.places = np.array(list(places), np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.places)

    def where(self, index: int) -> str:
        return f"{self.path}, record {index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one record; raises `UserError`, with its place, if it is not a JSON object in UTF-8."""
        start, stop = self.places[index]
        with readable(self.path), self.path.open("rb") as opened:
            opened.seek(start)
            text = opened.read(stop - start)
        try:
            return parse_json(text.decode(), self.where(index))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(index)} is not UTF-8: {error}") from error


def file_state(path: Path) -> str:
    """A file's size and time, which change if it is written again."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a ValueError: a name that no file can have
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def list_lines(opened: Any, start: int) -> Iterator[tuple[int, int]]:
    for line in opened:
        if line.strip():
            yield start, start + len(line)
        start += len(line)


def list_array(opened: Any, start: int, name: str) -> Iterator[tuple[int, int]]:
    """Yields where the elements of a JSON array begin and end, in bytes."""
    decoder, buffer, at, ended = json.JSONDecoder(), "", 0, False

    def fill() -> bool:
        nonlocal buffer, at, start, ended
        more = opened.read(max(CHUNK, len(buffer) - at))  # doubled for a long record
        buffer, start, at = buffer[at:] + more.decode("latin-1"), start + at, 0  # one character for each byte
        ended = not more
        return bool(more)

    def skip(inside: bool = True) -> str:
        """The next character that is no space; nothing at the end of the file, which must not be `inside` the array."""
        nonlocal at
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n":
                at += 1
            if at < len(buffer):
                return buffer[at]
            if not fill():
                if inside:
                    raise UserError(f"{name} is truncated: its JSON array has no end")
                return ""

    def check_end() -> None:
        if more := skip(inside=False):
            raise UserError(f"{name} is not valid JSON, byte {start + at:,}: found {more!r} after the array")

    skip()
    at += 1
    if skip() == "]":
        at += 1
        return check_end()
    while True:
        skip()
        while True:
            try:
                _, stop = decoder.raw_decode(buffer, at)
            except RecursionError:
                raise UserError(f"{name} is not valid JSON: it is nested too deeply") from None
            except ValueError as error:
                if len(buffer) - at > LONGEST or not fill():
                    raise UserError(f"{name} is not valid JSON, byte {start + at:,}: {error}") from None
            else:
                if stop < len(buffer) or ended or not fill():
                    break
        yield start + at, start + stop
        at = stop
        separator = skip()
        at += 1
        if separator == "]":
            return check_end()
        if separator != ",":
            raise UserError(f"{name} is not valid JSON, byte {start + at:,}: found {separator!r} between two records")
