"""Atomic file writes, on a local disk or in a remote store: a killed process leaves the old file or the new one."""

import contextlib
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from etils import epath

from lattejax.errors import UserError


def is_remote(path: epath.Path) -> bool:
    """Whether a path is in an object store (gs://…), not on a disk."""
    return "://" in os.fspath(path)


def write_atomically(path: epath.Path, data: bytes) -> None:
    """Writes a file and creates its parent directories.

    Writes of remote objects are atomic already; on a local disk a rename makes them so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_bytes(data)
    else:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # several processes may write one file
        temporary.write_bytes(data)
        temporary.replace(path)


def write_with(path: epath.Path, save: Callable[[BinaryIO], None]) -> None:
    """Lets `save` write to a file in memory, and writes that."""
    file = io.BytesIO()
    save(file)
    write_atomically(path, file.getvalue())


def resolve_path(path: str | os.PathLike) -> epath.Path:
    """Returns a local path, absolute as Orbax requires, or a remote path unchanged."""
    path = epath.Path(path)
    return path if is_remote(path) else path.expanduser().resolve()


@contextlib.contextmanager
def local_files(directory: epath.Path) -> Iterator[str]:
    """Yields a local directory with the files of `directory`, without subdirectories, for libraries that need one."""
    if not is_remote(directory):
        yield os.fspath(directory)
        return
    with tempfile.TemporaryDirectory() as local:
        for file in directory.iterdir():
            if file.is_file():
                (epath.Path(local) / file.name).write_bytes(file.read_bytes())
        yield local


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[epath.Path]:
    """Yields a directory to fill, which becomes `path` when the block succeeds; an exception leaves nothing at `path`.

    Until then it is beside `path`, under the name of `path` with ".partial-" and some digits; a killed process leaves
    it. A remote store has no rename: there the block fills `path` itself, and should write last what readers check for.

    Raises:
      UserError: there is something at `path` already, or it cannot be written.
    """
    path = resolve_path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; remove it or choose another --out")
    if is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object; raises `UserError` if it holds something else or is truncated."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value
