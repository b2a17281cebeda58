"""The device mesh: axes `expert`, `data`, `fsdp` and `tensor`, any of which may have size 1."""

import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("expert", "data", "fsdp", "tensor")
ROW_AXES = ("expert", "data", "fsdp")  # rows are sharded over these, in this order


def mesh_shape(sizes: Mapping[str, int], count: int) -> tuple[int, ...]:
    """Returns the sizes of all axes for `count` devices.

    Args:
      sizes: sizes by axis; missing axes are 1, and one may be -1: all remaining devices.
      count: the number of devices.

    Raises:
      ValueError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    for name, size in sizes.items():
        if name not in AXES:
            raise ValueError(f"mesh axis {name!r} is unknown; use {', '.join(AXES)}")
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {name}={size} must be positive, or -1 for all remaining devices")
    shape = [sizes.get(axis, 1) for axis in AXES]
    if shape.count(-1) > 1:
        raise ValueError(f"the mesh {dict(sizes)} has two axes of -1; only one may be -1")
    if -1 in shape:
        shape[shape.index(-1)] = max(1, count // math.prod(size for size in shape if size != -1))
    if math.prod(shape) != count:
        found = " * ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(f"the mesh {found} does not fit the {count} devices")
    return tuple(shape)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices in a mesh; on a TPU, neighbours on an axis are physically linked.

    Args:
      sizes: see `mesh_shape`.
      devices: the devices to use; None: all devices of all processes.

    Raises:
      ValueError: the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    if devices[0].platform == "tpu":
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        arranged = np.array(devices).reshape(shape)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def one_device() -> Mesh:
    """A mesh of this process's first device only."""
    return make_mesh({}, jax.local_devices()[:1])


def row_shares(mesh: Mesh) -> int:
    """The number of shards of rows that are sharded over all row axes."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def batches_of(total: int, batch_size: int, mesh: Mesh) -> Iterator[np.ndarray]:
    """Splits the indices 0 to total - 1 into batches of equal size: `batch_size`, or `total` if that is smaller,
    rounded up so that every device gets the same number. The last batch is padded with the last index."""
    shares = row_shares(mesh)
    size = -(-min(batch_size, total) // shares) * shares
    for start in range(0, total, size):
        yield np.minimum(np.arange(start, start + size, dtype=np.int32), total - 1)
