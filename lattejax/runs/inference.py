"""Weights for drawing and answering: in the dtype of the computation, and where they are used."""

import functools

import jax
from jax.sharding import Mesh, NamedSharding

from lattejax.configuration import Config
from lattejax.models import functional, latte_flow
from lattejax.models.functional import Params
from lattejax.parallel import rules


def sampling_axes(part: str) -> tuple[str, ...]:
    """Over which axes of a mesh a part of the model is cut for drawing and answering.

    The pathway's over `tensor` alone: each device draws images of its own, and in every one of their steps another
    group works. The VLM's over `fsdp` too, since it reads a prompt once.
    """
    return ("fsdp", "tensor") if part == "vlm" else ("tensor",)


def inference_weights(config: Config, params: Params, mesh: Mesh) -> Params:
    """Casts weights to the dtype of the computation, cuts them by `sampling_axes`, and gives each layer a tree of its
    own."""
    placed = {}
    for name, part in params.items():
        placed |= rules.shardings(mesh, {name: part}, sampling_axes(name))
    leaves, tree = jax.tree.flatten(placed)
    return latte_flow.unstack(_cast_and_cut(config.dtype, tree, tuple(leaves))(params))


@functools.lru_cache(maxsize=8)
def _cast_and_cut(dtype: str, tree: jax.tree_util.PyTreeDef, leaves: tuple[NamedSharding, ...]) -> jax.stages.Wrapped:
    """Kept, so that a run's evaluations after the first compile nothing."""
    return jax.jit(functools.partial(functional.cast_floats, dtype=dtype), out_shardings=tree.unflatten(leaves))
