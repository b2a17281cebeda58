"""Writing files so that a kill leaves the old one or the new one, on a local disk as in a remote store."""

import io
import os
from collections.abc import Callable
from typing import BinaryIO

from etils import epath


def is_remote(path: epath.Path) -> bool:
    """Whether a path names an object store (gs://…), not a disk."""
    return "://" in os.fspath(path)


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file and the directories above it.

    A remote object appears whole or not at all; on a local disk the same takes a rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_bytes(data)
    else:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(data)
        temporary.replace(path)


def write_with(path: epath.Path, save: Callable[[BinaryIO], None]) -> None:
    """Lets `save` write to a file in memory, and writes that."""
    file = io.BytesIO()
    save(file)
    write_whole(path, file.getvalue())
