"""The shapes of arrays in files: the same as in memory, or those from before heads had a separate axis.

Attention's projections of queries, keys and values are [heads, head dimension, inputs] in memory. Hugging Face's
checkpoints have heads and head dimension on one axis, and so do our earlier runs, exports and converted weights. Both
have the same elements in the same order: reading only changes the shape, and a checkpoint's fingerprint is the same.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

# A pattern for the end of a path, and the axes that files merge: from the first to the last, counted from the end.
MERGED = (
    (r"(q_proj|k_proj|v_proj)/weight$", (-3, -2)),
    (r"(q_proj|k_proj|v_proj)/bias$", (-2, -1)),
    (r"qkv/weight$", (-4, -2)),
    (r"qkv/bias$", (-3, -1)),
)


def merged_axes(path: str, ndim: int) -> slice:
    """The axes that files merge of an array at a path ("text/layers/attention/q_proj/bias"); empty for most arrays."""
    for pattern, (first, last) in MERGED:
        if re.search(pattern, path):
            return slice(ndim + first, ndim + last + 1)
    return slice(0, 0)


def merge_axes(path: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of an array at a path in Hugging Face's and in earlier files."""
    axes = merged_axes(path, len(shape))
    if axes.start == axes.stop:
        return tuple(shape)
    return (*shape[: axes.start], math.prod(shape[axes]), *shape[axes.stop :])


def as_stored(target: Any, stored: Mapping[str, Sequence[int]]) -> Any:
    """Describes a tree with the shapes that it has in a file.

    Args:
      target: describes the wanted arrays, by shape, dtype and optionally sharding.
      stored: the shape of each array in the file, by path.

    Returns:
      `target`, with merged axes where the file has them. Merged axes are not sharded: each device reads all of them.
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
    """Converts arrays that were read with `as_stored` to the shapes and shardings of `target`."""

    def convert(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if x.shape == wanted.shape:
            return x
        reshape = jax.jit(lambda x: x.reshape(wanted.shape), out_shardings=wanted.sharding)
        return reshape(x)

    return jax.tree.map(convert, tree, target)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a tree, or of its description, by path."""
    return {keystr(path): tuple(x.shape) for path, x in jax.tree.leaves_with_path(tree)}


def keystr(path: tuple) -> str:
    """A JAX key path as "text/layers/attention/q_proj/bias"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
