"""How arrays stand in files: with the axes that they have here, or as they stood before heads had an axis of their own.

Attention's projections of queries, keys and values are [heads, head dimension, inputs] here. Hugging Face's checkpoints
have heads and head dimension on one axis, and so had earlier runs, exports and converted weights of ours. Both
are the same numbers in the same order, so that reading is a change of shape alone, and so is a checkpoint's
fingerprint the same.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

# What a path ends with, and the axes that are one in files: from the first up to the last, counted from the end.
MERGED = (
    (r"(q_proj|k_proj|v_proj)/weight$", (-3, -2)),
    (r"(q_proj|k_proj|v_proj)/bias$", (-2, -1)),
    (r"qkv/weight$", (-4, -2)),
    (r"qkv/bias$", (-3, -1)),
)


def merged_axes(path: str, ndim: int) -> slice:
    """The axes of an array at a path ("text/layers/attention/q_proj/bias") that are one in files; none of most."""
    for pattern, (first, last) in MERGED:
        if re.search(pattern, path):
            return slice(ndim + first, ndim + last + 1)
    return slice(0, 0)


def merge_axes(path: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which an array at a path stands in other files than ours of today."""
    axes = merged_axes(path, len(shape))
    if axes.start == axes.stop:
        return tuple(shape)
    return (*shape[: axes.start], math.prod(shape[axes]), *shape[axes.stop :])


def as_stored(target: Any, stored: Mapping[str, Sequence[int]]) -> Any:
    """Describes a tree for reading it in the shapes that a file has.

    Args:
      target: describes the arrays as they are wanted, by shape, dtype and perhaps sharding.
      stored: the shape of each array in the file, by path.

    Returns:
      `target`, with merged axes where the file has them so. Along those an array is read by each device as a whole.
    """

    def describe(path, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = keystr(path)
        shape = merge_axes(name, x.shape)
        if x.shape == shape or tuple(stored.get(name, ())) != shape:
            return x
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=_merge_sharding(x.sharding, merged_axes(name, x.ndim)))

    return jax.tree.map_with_path(describe, target)


def _merge_sharding(sharding: Sharding | None, axes: slice) -> Sharding | None:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = sharding.spec
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[: axes.start], None, *spec[axes.stop :]))


def as_wanted(tree: Any, target: Any) -> Any:
    """Gives arrays that were read by `as_stored` the shapes and shardings of `target`."""

    def give(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if x.shape == wanted.shape:
            return x
        reshape = jax.jit(lambda x: x.reshape(wanted.shape), out_shardings=wanted.sharding)
        return reshape(x)

    return jax.tree.map(give, tree, target)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a tree, or of what describes one, by path."""
    return {keystr(path): tuple(x.shape) for path, x in jax.tree.leaves_with_path(tree)}


def keystr(path: tuple) -> str:
    """A path of JAX's as "text/layers/attention/q_proj/bias"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
