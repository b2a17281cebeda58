"""Weights in safetensors: one file, or several with an index that names each tensor's file.

Opening checks that every file is complete. Tensors are then read one at a time, and shards written one at a time, so
that memory holds no more than that.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lattejax.errors import UserError
from lattejax.files import check_files, check_name, is_remote, read_json

SINGLE = "model.safetensors"  # transformers' name; with ".index.json", the name of the index of several files
INDEX = SINGLE + ".index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
COUNTER = ".num_batches_tracked"  # of PyTorch's batch norms: an integer, not a weight
SHARD_BYTES = 1 << 30

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shards:
    """The tensors of a directory, opened for reading."""

    directory: epath.Path
    files: Mapping[str, str]  # each tensor's file
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # their names in NumPy

    @classmethod
    def open(cls, directory: epath.Path, single: str = SINGLE) -> "Shards":
        """Opens the weights of a directory; `single` is the file's name if there is only one.

        Raises:
          UserError: a file is missing or truncated, or a tensor is stored twice or is not of a floating-point dtype.
        """
        check_local(directory)
        check_files(directory)
        files, shapes, dtypes = {}, {}, {}
        for file in _file_names(directory, single):
            with _open(directory / file) as tensors:
                for name in list(tensors.keys()):
                    view = tensors.get_slice(name)
                    if name in files:
                        raise UserError(f"{directory}: {name} is stored twice, in {files[name]} and in {file}")
                    if name.endswith(COUNTER):
                        continue
                    if view.get_dtype() not in DTYPES:
                        raise UserError(f"{directory}: {name} has dtype {view.get_dtype()}; use one of {tuple(DTYPES)}")
                    files[name], shapes[name] = file, tuple(view.get_shape())
                    dtypes[name] = DTYPES[view.get_dtype()]
        return cls(directory, files, shapes, dtypes)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        with _open(self.directory / self.files[name]) as tensors:
            return tensors.get_tensor(name)

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of every file."""
        hashes = {}
        for file in sorted(set(self.files.values())):
            with (self.directory / file).open("rb") as opened:
                hashes[file] = hashlib.file_digest(opened, "sha256").hexdigest()
        return hashes


def are_stored(directory: epath.Path) -> bool:
    """Whether a directory holds weights in this format."""
    return (directory / INDEX).exists() or (directory / SINGLE).exists()


def check_tensors(have: Mapping[str, tuple], want: Mapping[str, tuple], config: epath.Path) -> None:
    """Raises `UserError` unless names and shapes of the stored tensors match a config file."""
    problems = {
        "missing": sorted(want.keys() - have.keys()),
        "unexpected": sorted(have.keys() - want.keys()),
        "of the wrong shape": [
            f"{name} {have[name]}, not {want[name]}"
            for name in sorted(want.keys() & have.keys())
            if have[name] != want[name]
        ],
    }
    found = [
        f"{problem}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if names[5:] else ''}"
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise UserError(f"the weights do not fit {config}; {'; '.join(found)}")


def check_local(directory: epath.Path) -> None:
    """Raises `UserError` for a remote directory, which safetensors can neither read nor write."""
    if is_remote(directory):
        raise UserError(
            f"{directory} is remote; safetensors are read and written only on a local disk: copy them to or from it"
        )


def _file_names(directory: epath.Path, single: str) -> list[str]:
    index = directory / f"{single}.index.json"
    if not index.exists():
        if not (directory / single).exists():
            raise UserError(f"{directory} has neither {index.name} nor {single}")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index} is not an index of weights: its weight_map is {weight_map!r:.100}")
    files = sorted(set(weight_map.values()))
    for file in files:
        check_name(file, index.name)
    absent = [file for file in files if not (directory / file).is_file()]
    if absent:
        raise UserError(f"{directory} lacks {', '.join(absent)}, which {index.name} names")
    return files


def _open(path: epath.Path) -> Any:
    try:
        # Read, not memory-mapped: mapped pages would count as memory in use until the file is closed.
        return safe_open(path, framework="np", backend="pread")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error


def write(directory: epath.Path, shards: Iterable[dict[str, np.ndarray]], count: int) -> None:
    """Writes `count` shards, with transformers' file names and index."""
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, 1):
        file = SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def split(sizes: Mapping[T, int]) -> list[list[T]]:
    """Splits items, given with their sizes in bytes, into shards of at most SHARD_BYTES, in order; a larger item gets
    its own shard."""
    shards, filled = [], 0
    for item, size in sizes.items():
        if not shards or filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    return shards
