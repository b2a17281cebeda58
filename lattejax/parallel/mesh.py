"""The mesh of devices: axes `expert`, `data`, `fsdp` and `tensor`, any of which may be 1."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("expert", "data", "fsdp", "tensor")


def make_mesh(sizes: dict[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Arranges all devices in a mesh.

    Args:
      sizes: of the axes; those that are not named are 1, and one may be -1: all that is left.
      devices: to use; None: all there are.

    Raises:
      ValueError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    for name, size in sizes.items():
        if name not in AXES:
            raise ValueError(f"mesh axis {name!r} is unknown; use {', '.join(AXES)}")
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {name}={size} must be positive, or -1 for all that is left")
    shape = [sizes.get(axis, 1) for axis in AXES]
    if shape.count(-1) > 1:
        raise ValueError(f"the mesh {sizes} leaves two axes open; only one may be -1")
    if -1 in shape:
        shape[shape.index(-1)] = max(1, len(devices) // math.prod(size for size in shape if size != -1))
    if math.prod(shape) != len(devices):
        raise ValueError(f"the mesh {dict(zip(AXES, shape, strict=True))} does not fit the {len(devices)} devices")
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
