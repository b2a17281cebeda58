"""Which array is cut along which axis of the mesh: a table of path patterns.

Layers stand on a leading axis L; along `expert` it is cut into blocks of whole groups, so that a device has its own
groups' weights, optimizer state and contexts, and no others. Matrices are cut over `tensor` along the axis that heads
or hidden units stand on, so that a layer's two halves need one sum, and over `fsdp` along the other. Whatever no rule
names is replicated, and if it is a matrix, that is said.
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

# Where an array has an entry for each of the L layers on its leading axis, which falls to the groups.
OF_GROUPS = r"(^|/)(experts|contexts/layers)/"

# A pattern that a path ends with, and what the array's last dimensions are cut over.
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
    # Its outputs are four parts of D; what it reads is whole on every device.
    (r"modulation/weight", (None, ("fsdp", "tensor"))),
    # Small, and the same on every device.
    (r"(embedding/proj|head/proj|residual_gate)/weight", ()),
)
MATRICES = ("weight", "embedding")  # the last names of their paths
# What stands by KV heads is repeated along `tensor` where that does not divide them: there are few of them.
KV_HEADS = r"(k_proj|v_proj)/(weight|bias)$"


def spec(mesh: Mesh | AbstractMesh, path: str, shape: Sequence[int], axes: Sequence[str] = AXES) -> PartitionSpec:
    """Returns how the array at a path ("experts/decoder/mlp/up_proj/weight") is cut.

    Args:
      mesh: the mesh.
      path: names separated by slashes. What it begins with does not matter: an optimizer's moments are cut as the
        weights that they belong to.
      shape: the array's.
      axes: of the mesh that are to be used; along the others it is replicated.

    Raises:
      ValueError: a dimension is no multiple of the mesh axes that it is cut over.
    """
    last = next((cut for pattern, cut in RULES if re.search(f"{pattern}$", path)), None)
    if last is None:
        if axes and path.rpartition("/")[2] in MATRICES:
            _warn_of(path)
        last = ()
    cuts = [()] * (len(shape) - len(last)) + [(cut or ()) if not isinstance(cut, str) else (cut,) for cut in last]
    stacked = re.search(OF_GROUPS + r"(?!\d+/)", path)  # not in a list, where each layer is a tree of its own
    if stacked and shape:
        cuts[0] = ("expert",)
    if re.search(KV_HEADS, path) and shape[-len(last)] % mesh.shape["tensor"]:
        axes = [axis for axis in axes if axis != "tensor"]
    cuts = [tuple(axis for axis in cut if axis in axes) for cut in cuts]
    for size, cut in zip(shape, cuts, strict=True):
        if size % math.prod(mesh.shape[axis] for axis in cut):
            sizes = " * ".join(f"{axis}={mesh.shape[axis]}" for axis in cut)
            raise ValueError(f"mesh axis {sizes} does not divide {path} of shape {tuple(shape)}")
    return PartitionSpec(*((cut if len(cut) > 1 else cut[0]) if cut else None for cut in cuts))


@functools.cache  # once for each
def _warn_of(path: str) -> None:
    logging.warning("no rule of parallel.rules names the matrix %s; every device keeps a copy", path)


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
    """Puts a tree's arrays, wherever they are, to where the rules say. What is not on a mesh of all processes yet must
    be the same on each of them."""
    return put(tree, shardings(mesh, tree, axes))


def put(tree: Any, placed: Any) -> Any:
    """`jax.device_put` that also serves devices of other processes."""
    if jax.process_count() == 1:
        return jax.device_put(tree, placed)
    return jax.jit(lambda tree: tree, out_shardings=placed)(jax.tree.map(_unbound, tree))


def _unbound(x: Any) -> Any:
    """What this process alone has is bound to one of its devices, and must not be."""
    if not isinstance(x, jax.Array) or not x.is_fully_addressable or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    return np.asarray(x)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
