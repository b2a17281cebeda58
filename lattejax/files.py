"""Reading and writing files, on a local disk or in a remote store.

Writes are atomic: a killed process leaves the old file or the new one. Reads are of ordinary files of a sensible size:
anything else at their place is an error, never a wait.
"""

import contextlib
import glob
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from etils import epath

from lattejax.errors import UserError, refusal
from lattejax.leases import one_writer

STORES = ("gs://", "s3://", "az://")
MOST_BYTES = 1 << 28  # of a file that is read in one piece: descriptions, pictures, tokenizers
TEMPORARY, PARTIAL = ".tmp", ".partial-"  # in the names of unfinished files and directories
ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"  # in those of Orbax


# ---- Paths


def is_remote(path: epath.Path) -> bool:
    """Whether a path is in an object store (gs://…), not on a disk."""
    return "://" in os.fspath(path)


def resolve_path(path: str | os.PathLike) -> epath.Path:
    """Returns a local path, absolute as Orbax requires, or a remote path unchanged.

    Raises:
      UserError: it is empty, of a user or a store that is unknown, or too long.
    """
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise UserError(f"the path {text!r} is no path")
    if "://" in text:
        store = text.partition("://")[0] + "://"
        if store not in STORES:
            raise UserError(f"{text} is in an unknown store; known are {', '.join(STORES)} and local disks")
        return epath.Path(path)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise UserError(f"{text} is in the home directory of an unknown user; write ./{text} for a directory here")
    try:
        return epath.Path(expanded).resolve()
    except (RuntimeError, OSError) as error:  # a loop of symbolic links
        raise UserError(f"{text} cannot be resolved: {error}") from error


def check_name(name: str, where: str) -> None:
    """Raises `UserError` if a listed file name points outside its directory, or is not UTF-8."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith(("/", "~")) or ".." in parts or "\0" in name or "\\" in name:
        raise UserError(f"{where} names {name!r:.100}, which is not in its directory")
    if name != name.encode(errors="replace").decode():
        raise UserError(f"{where} names {name!r:.100}, which is not UTF-8; rename the file")


# ---- Reading


def check_file(path: epath.Path, most_bytes: float = MOST_BYTES) -> None:
    """Raises `UserError` unless there is an ordinary file of at most `most_bytes`."""
    with readable(path):
        if is_remote(path):
            if not path.exists():
                raise UserError(f"there is no {path}")
            return
        if not os.path.exists(path):
            raise UserError(f"there is no {path}")
        if not os.path.isfile(path):
            raise UserError(f"{path} is not a file")
        if (size := os.path.getsize(path)) > most_bytes:
            raise UserError(f"{path} has {size:,} bytes, more than the {most_bytes:,} that are read in one piece")


def check_files(directory: epath.Path, deep: bool = False) -> None:
    """Raises `UserError` if a directory, whose files a library will read, has something else: a device, a pipe, a link
    to nothing. With `deep`, its subdirectories are checked too."""
    if is_remote(directory):
        return
    with readable(directory):
        for path in _entries(directory, deep):
            if not os.path.isfile(path) and os.path.lexists(path):
                raise UserError(f"{path} is not a file")


def _entries(directory: epath.PathLike, deep: bool) -> Iterator[str]:
    for entry in os.scandir(directory):
        if not entry.is_dir():
            yield entry.path
        elif deep:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, as old checkpoints are
                yield from _entries(entry.path, deep)


@contextlib.contextmanager
def readable(path: epath.Path) -> Iterator[None]:
    """Within it, an error of the system is a `UserError` about a file that is read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def read_bytes(path: epath.Path) -> bytes:
    """Reads a file in one piece; raises `UserError` if it cannot be read, or is not an ordinary file."""
    check_file(path)
    with readable(path):
        return path.read_bytes()


def read_text(path: epath.Path) -> str:
    """The same as UTF-8, without a byte order mark."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object; raises `UserError` if it holds something else or is truncated."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Parses a JSON object; raises `UserError`, with `name`, if it is something else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{name} is not valid JSON: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} holds a JSON {type(value).__name__}, expected an object")
    return value


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


# ---- Writing


def write_atomically(path: epath.Path, data: bytes) -> None:
    """Writes a file and creates its parent directories.

    Writes of remote objects are atomic already; on a local disk a rename makes them so.
    """
    if is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return
    with writing(path) as file:
        file.write(data)


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[BinaryIO]:
    """Yields a file to write, which becomes `path` when the block succeeds: for what is too large for memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = secrets.token_hex(4)  # several processes may write one file
    target = path if is_remote(path) else path.with_name(f"{path.name}.{unique}{TEMPORARY}")
    try:
        with target.open("wb") as file:
            yield file
            if target != path:  # a file that is renamed sooner may be empty after a power failure
                file.flush()
                os.fsync(file.fileno())
        if target != path:
            target.replace(path)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def write_with(path: epath.Path, save: Callable[[BinaryIO], None]) -> None:
    """Lets `save` write to a file in memory, and writes that."""
    file = io.BytesIO()
    save(file)
    write_atomically(path, file.getvalue())


def output_file(path: str, suffix: str, flag: str = "--out") -> epath.Path:
    """Returns the path of a file to write, before any work is done for it.

    Raises:
      UserError: it has another suffix, is a directory, or cannot be written.
    """
    if not path.endswith(suffix):
        raise UserError(f"{flag}={path} must end in {suffix}")
    file = resolve_path(path)
    if file.is_dir():
        raise UserError(f"{flag}={path} is a directory")
    check_writable(file, f"{flag}={path}")
    return file


def check_writable(path: epath.Path, name: str) -> None:
    """Raises `UserError`, with `name`, unless a file or directory can be created at `path`; leaves nothing there."""
    if is_remote(path):
        return
    # Missing directories are not created for the check: other processes may be creating theirs there.
    existing = next(parent for parent in path.parents if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        for part in path.relative_to(existing).parts:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(existing / part)  # fails if the disk has no such long names
    except OSError as error:
        raise UserError(f"{name} cannot be written: {refusal(error)}") from error


SPARE_BYTES = 1 << 20  # for descriptions beside arrays


def check_space(path: epath.Path, size: int, name: str) -> None:
    """Raises `UserError`, before anything is written, if a disk has no room for `size` bytes at `path`."""
    if is_remote(path):
        return
    free = shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free
    needed = size + SPARE_BYTES
    if free < needed:
        raise UserError(
            f"{name} needs {needed / 1e6:,.1f} MB, and the disk of {path} has {free / 1e6:,.1f} MB free; make room and "
            "run the same command again"
        )


def remove_leftovers(directory: epath.Path, pattern: str = "*") -> None:
    """Removes what killed processes have left in a directory: unfinished files and directories. `pattern` matches
    the names that they would have had.

    Only the one process that writes there may call this, see `leases`.
    """
    if is_remote(directory):
        return
    for marker in (f"{pattern}{TEMPORARY}", f"{pattern}{PARTIAL}*", f"{pattern}{ORBAX_TEMPORARY}*"):
        for left in directory.glob(marker):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def remove_directory(path: epath.Path) -> None:
    """Removes a directory: a killed process leaves all of it or nothing at `path`. On a disk, see `remove_leftovers`.

    A remote store has no rename: there readers must not take a directory that lacks a file for a complete one.
    """
    if is_remote(path):
        path.rmtree()
        return
    away = path.with_name(f"{path.name}{PARTIAL}{secrets.token_hex(4)}")
    path.replace(away)
    away.rmtree()


def check_new(path: str | os.PathLike) -> epath.Path:
    """Resolves the path of a directory to create; raises `UserError` if there is something already."""
    path = resolve_path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; remove it or choose another --out")
    return path


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[epath.Path]:
    """Yields a directory to fill, which becomes `path` when the block succeeds; an exception leaves nothing at `path`.

    Until then it is beside `path`, under the name of `path` with ".partial-" and some digits; a killed process leaves
    it, and the next one removes it. A remote store has no rename: there the block fills `path` itself, and should write
    last what readers check for.

    Raises:
      UserError: there is something at `path` already, or it cannot be written.
    """
    path = check_new(path)
    if is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    check_writable(path, os.fspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_writer(path.with_name(f".{path.name}"), os.fspath(path)):
        remove_leftovers(path.parent, glob.escape(path.name))
        partial = path.with_name(f"{path.name}{PARTIAL}{secrets.token_hex(4)}")
        try:
            partial.mkdir()
            yield partial
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
