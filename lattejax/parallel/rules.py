"""Which parameter is cut along which axis of the mesh: a table of path patterns.

Matrices are cut over `tensor` along the axis that heads or hidden units stand on, so that a layer's two halves need one
sum, and over `fsdp` along the other. Whatever no rule names is replicated.
"""

import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lattejax.models.functional import Params

# A pattern that a parameter's path ends with, and the axes of its last dimensions; a leading one of layers is not cut.
RULES = (
    (r"vocabulary/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj|qkv|fc1)/kernel", ("fsdp", "tensor")),
    (r"(q_proj|k_proj|v_proj|qkv|fc1)/bias", ("tensor",)),
    (r"(o_proj|down_proj|attention/proj|fc2)/kernel", ("tensor", "fsdp")),
)


def shardings(mesh: Mesh, params: Params) -> Params:
    """Returns a NamedSharding for each parameter.

    Raises:
      ValueError: a dimension is no multiple of the mesh axis that it is cut over.
    """

    def sharding(path, array) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for pattern, axes in RULES if re.search(f"{pattern}$", name)), ())
        for size, axis in zip(array.shape[array.ndim - len(axes) :], axes, strict=True):
            if size % mesh.shape[axis]:
                raise ValueError(f"mesh axis {axis}={mesh.shape[axis]} does not divide {name} of shape {array.shape}")
        return NamedSharding(mesh, PartitionSpec(*(None,) * (array.ndim - len(axes)), *axes))

    return jax.tree.map_with_path(sharding, params)


def by_layer(mesh: Mesh, stacked: Params) -> Params:
    """Returns a NamedSharding for each leaf of what has an entry for each of the L layers on its leading axis: the
    experts' weights, or the contexts that they see. A device along `expert` holds its own groups' layers and no others.

    Raises:
      ValueError: L is no multiple of the mesh axis.
    """
    for leaf in jax.tree.leaves(stacked):
        if leaf.shape[0] % mesh.shape["expert"]:
            raise ValueError(f"mesh axis expert={mesh.shape['expert']} does not divide the {leaf.shape[0]} layers")
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec("expert")), stacked)
