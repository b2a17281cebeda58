"""Reading PyTorch's files of tensors (.pth) without PyTorch: its zip archives, and the format before 1.6.

Both hold a pickle, which could run any code. Here it can make dictionaries and tensors, and nothing else.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lattejax.errors import UserError, parsing
from lattejax.files import MOST_BYTES

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the earlier format
STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Storage(NamedTuple):
    """Memory that tensors are parts of, to be read later."""

    dtype: np.dtype
    key: str
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
} | {("torch", name): np.dtype(dtype) for name, dtype in STORAGES.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(f"it asks for {module}.{name}; only tensors and dictionaries of them are read")
        return ALLOWED[module, name]

    def persistent_load(self, description: Any) -> _Storage:
        kind, dtype, key, _, length = description[:5]
        if kind != "storage" or not isinstance(dtype, np.dtype) or type(length) is not int:
            raise UserError(f"it has something other than a tensor: {description!r:.100}")
        return _Storage(dtype, str(key), length)


def read_tensors(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Reads a file's dictionary of tensors.

    Args:
      data: the file's contents.
      name: the file, for messages.

    Raises:
      UserError: it is of another format, is damaged, or holds anything else.
    """
    try:
        with parsing("a file of tensors"):
            read = _read_archive if data.startswith(b"PK") else _read_earlier
            return read(data)
    except UserError as error:
        raise UserError(f"{name} cannot be read as PyTorch's tensors: {error}") from error


def _read_archive(data: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickles = [entry for entry in archive.namelist() if entry.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"the archive has {len(pickles)} files data.pkl, expected one")
        folder = pickles[0].removesuffix("data.pkl")

        def read(entry: str, size: int | None = None) -> bytes:
            info = archive.getinfo(folder + entry)
            if info.file_size > MOST_BYTES or (size is not None and info.file_size != size):
                raise UserError(f"{info.filename} has {info.file_size:,} bytes, expected {size or MOST_BYTES:,}")
            return archive.read(info)

        if f"{folder}byteorder" in archive.namelist() and read("byteorder") != b"little":
            raise UserError("its numbers are not little-endian")
        tensors = _check(_Unpickler(io.BytesIO(read("data.pkl"))).load())
        return _fill(tensors, lambda storage: read(f"data/{storage.key}", storage.length * storage.dtype.itemsize))


def _read_earlier(data: bytes) -> dict[str, np.ndarray]:
    file = io.BytesIO(data)
    try:
        start = [_Unpickler(file).load() for _ in range(2)]
    except (pickle.UnpicklingError, EOFError, UserError) as error:
        raise UserError("it is neither an archive nor a file of the format before PyTorch 1.6") from error
    if start != [MAGIC, PROTOCOL]:
        raise UserError("it is neither an archive nor a file of the format before PyTorch 1.6")
    system = _Unpickler(file).load()
    if not system.get("little_endian", True):
        raise UserError("its numbers are not little-endian")
    tensors = _check(_Unpickler(file).load())
    sizes = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    contents = {}
    for key in _Unpickler(file).load():
        length = int.from_bytes(file.read(8), "little")
        if key not in sizes or length != sizes[key].length:
            raise UserError(f"the storage {key!r:.100} has {length:,} elements, and no tensor expects so many")
        contents[key] = file.read(length * sizes[key].dtype.itemsize)
    return _fill(tensors, lambda storage: contents[storage.key])


def _check(found: Any) -> Mapping[str, _Tensor]:
    if not isinstance(found, dict) or not found:
        raise UserError(f"it holds a {type(found).__name__}, expected a dictionary of tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise UserError(f"{name!r:.100} is a {type(value).__name__}, expected a tensor")
    return found


def _fill(tensors: Mapping[str, _Tensor], read: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
    """Copies each tensor out of its storage; each storage is read once."""
    storages: dict[str, np.ndarray] = {}
    filled = {}
    for name, (storage, offset, shape, strides) in tensors.items():
        if storage.key not in storages:
            storages[storage.key] = np.frombuffer(read(storage), storage.dtype, storage.length)
        values = storages[storage.key]
        numbers = [offset, *shape, *strides]
        if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
            raise UserError(f"{name} has shape {shape!r:.100}, strides {strides!r:.100} and offset {offset!r:.100}")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        count = math.prod(shape)
        if count and (last >= len(values) or count > len(values)):
            raise UserError(f"{name} has shape {shape!r:.100}, more than its {len(values):,} stored elements")
        steps = [stride * values.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)
        filled[name] = view.copy()
    return filled
