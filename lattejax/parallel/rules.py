"""Which array is sharded over which mesh axes: a table of path patterns.

Layers are stacked on a leading axis L, which is sharded over `expert` in blocks of complete groups: a device has the
weights, optimizer state and contexts of its own groups only. So are the ends that are each group's own, on an axis K.
Matrices are sharded over `tensor` on the axis of heads or hidden units, so that each half of a layer needs one sum, and
over `fsdp` on the other axis. An array that matches no rule is replicated over all axes but `expert`; if it is a
matrix, a warning names it.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lattejax.models.functional import Params
from lattejax.parallel.mesh import AXES

# Arrays whose leading axis has an entry for each of the L layers, or the K groups; that axis is sharded over `expert`.
STACKS = r"(^|/)(experts|ends|contexts/layers)/"

# A pattern for the end of a path, and the mesh axes that the array's last dimensions are sharded over.
RULES = (
    (r"vocabulary/embedding", ("tensor", "fsdp")),
    (r"lm_head/weight", ("tensor", "fsdp")),
    # Heads, head dimension, inputs.
    (r"(q_proj|k_proj|v_proj)/weight", ("tensor", None, "fsdp")),
    (r"(q_proj|k_proj|v_proj)/bias", ("tensor", None)),
    (r"qkv/weight", (None, "tensor", None, "fsdp")),
    (r"qkv/bias", (None, "tensor", None)),
    (r"(gate_proj|up_proj|fc1)/weight", ("tensor", "fsdp")),
    (r"fc1/bias", ("tensor",)),
    (r"(o_proj|down_proj|attention/proj|fc2)/weight", ("fsdp", "tensor")),
    # Its outputs are parts of D, four in a layer and two in the head; so its inputs are sharded.
    (r"modulation/weight", (None, ("fsdp", "tensor"))),
    # Small, therefore replicated.
    (r"(embedding/proj|head/proj|residual_gate)/weight", ()),
)
MATRICES = ("weight", "embedding", "kernel", "lora_a", "lora_b")  # the last component of a matrix's path; also Flax's
# Arrays with an axis of KV heads are replicated over `tensor` if it does not divide the few KV heads.
KV_HEADS = r"(k_proj|v_proj)/(weight|bias)$"


def spec(mesh: Mesh | AbstractMesh, path: str, shape: Sequence[int], axes: Sequence[str] = AXES) -> PartitionSpec:
    """Returns how the array at a path ("experts/decoder/mlp/up_proj/weight") is sharded.

    Args:
      mesh: the mesh.
      path: names separated by slashes. Its beginning does not matter: an optimizer's moments are sharded like the
        weights that they belong to.
      shape: the array's shape.
      axes: the mesh axes to use; over the others it is replicated.

    Raises:
      ValueError: a dimension is not a multiple of the mesh axes that it is sharded over.
    """
    last = next((partition for pattern, partition in RULES if re.search(f"{pattern}$", path)), None)
    if last is None:
        if axes and path.rpartition("/")[2] in MATRICES:
            _warn_unmatched(path)
        last = ()
    partitions = [()] * (len(shape) - len(last)) + [(over,) if isinstance(over, str) else over or () for over in last]
    stacked = re.search(STACKS + r"(?!\d+/)", path)  # not in a list, where each layer is a separate tree
    if stacked and shape:
        partitions[0] = ("expert",)
    if re.search(KV_HEADS, path) and shape[-len(last)] % mesh.shape["tensor"]:
        axes = [axis for axis in axes if axis != "tensor"]
    partitions = [tuple(axis for axis in over if axis in axes) for over in partitions]
    for size, over in zip(shape, partitions, strict=True):
        if size % math.prod(mesh.shape[axis] for axis in over):
            sizes = " * ".join(f"{axis}={mesh.shape[axis]}" for axis in over)
            raise ValueError(f"mesh axis {sizes} does not divide {path} of shape {tuple(shape)}")
    return PartitionSpec(*((over if len(over) > 1 else over[0]) if over else None for over in partitions))


@functools.cache  # warns once per path
def _warn_unmatched(path: str) -> None:
    logging.warning("no rule of parallel.rules matches the matrix %s; every device keeps a copy", path)


def shardings(mesh: Mesh | AbstractMesh, tree: Any, axes: Sequence[str] = AXES) -> Any:
    """Returns a NamedSharding for each array of a tree; see `spec`."""

    def sharding(path, array) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(mesh, name, array.shape, axes))

    return jax.tree.map_with_path(sharding, tree)


def abstract(mesh: Mesh, tree: Any, axes: Sequence[str] = AXES) -> Any:
    """Describes a tree's arrays by shape, dtype and sharding."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings(mesh, tree, axes),
    )


def place(mesh: Mesh, tree: Params, axes: Sequence[str] = AXES) -> Params:
    """Moves a tree's arrays to where the rules place them. An array that is not yet on a mesh of all processes must be
    the same on each of them."""
    return put(tree, shardings(mesh, tree, axes))


def put(tree: Any, placed: Any) -> Any:
    """`jax.device_put` that also works with devices of other processes."""
    if jax.process_count() == 1:
        return jax.device_put(tree, placed)
    return jax.jit(lambda tree: tree, out_shardings=placed)(jax.tree.map(_unbound, tree))


def _unbound(x: Any) -> Any:
    """Detaches an array that only this process has from its device, as `put` requires."""
    if not isinstance(x, jax.Array) or not x.is_fully_addressable or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    return np.asarray(x)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
