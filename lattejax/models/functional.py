"""The border between Flax NNX and plain JAX.

Modules are written in NNX. Everywhere else a model is a nested dict of arrays (`Params`) and a pure function of it, so
that `jax.jit`, `jax.grad`, `jax.vmap` and `jax.lax.scan` apply directly:

    params = init(DecoderLayer, config, key=key)
    y = bind(DecoderLayer, config, params=params)(x)
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

Params = Any  # a nested dict of arrays


@functools.cache
def _graph(module: type[nnx.Module], *args) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: module(*args, rngs=nnx.Rngs(0))))[0]


def init(module: type[nnx.Module], *args, key: jax.Array) -> Params:
    """Returns random initial parameters of `module(*args)` as a nested dict."""
    return nnx.to_pure_dict(nnx.state(module(*args, rngs=nnx.Rngs(key))))


def init_stacked(module: type[nnx.Module], *args, key: jax.Array, count: int) -> Params:
    """Returns the parameters of `count` such modules, every leaf stacked on a leading axis of that length."""
    return jax.vmap(lambda key: init(module, *args, key=key))(jax.random.split(key, count))


def bind(module: type[nnx.Module], *args, params: Params):
    """Returns `module(*args)` with `params` for its weights. `args` must be hashable."""
    return nnx.merge(_graph(module, *args), nnx.State(params))


def partition(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """Splits a nested dict in two: the leaves whose path ("a/b/c") starts with one of the patterns, and the rest."""
    inside, outside = {}, {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        (inside if any(re.match(pattern, path) for pattern in patterns) else outside)[path] = leaf
    return traverse_util.unflatten_dict(inside, sep="/"), traverse_util.unflatten_dict(outside, sep="/")


def merge(*parts: Params) -> Params:
    """Merges the parts of a nested dict; a later part's leaves replace an earlier one's."""
    flat = {}
    for part in parts:
        flat |= traverse_util.flatten_dict(part, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")


def cast_floats(tree: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Casts every floating-point leaf to `dtype` and leaves the rest (ids, masks, positions) alone."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def parameter_count(params: Params) -> int:
    """The number of parameters in a tree of weights, or of their descriptions."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
