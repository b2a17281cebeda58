"""Weights for drawing and answering: in the dtype of the computation, and on the devices that use them."""

import functools

import jax
from jax.sharding import Mesh, NamedSharding

from lattejax.configuration import Config
from lattejax.models import functional, latte_flow
from lattejax.models.functional import Params
from lattejax.parallel import rules


def sampling_axes(part: str) -> tuple[str, ...]:
    """The mesh axes over which a part of the model is sharded for drawing and answering.

    The pathway is sharded only over `tensor`: devices draw different images, and the steps of an image use different
    groups. The VLM is also sharded over `fsdp`, because it reads each prompt once.
    """
    return ("fsdp", "tensor") if part == "vlm" else ("tensor",)


def inference_weights(config: Config, params: Params, mesh: Mesh) -> Params:
    """Casts weights to the dtype of the computation, shards them over `sampling_axes`, and unstacks the layers."""
    placed = {}
    for name, part in params.items():
        placed |= rules.shardings(mesh, {name: part}, sampling_axes(name))
    leaves, tree = jax.tree.flatten(placed)
    return latte_flow.unstack(_cast_and_shard(config.dtype, tree, tuple(leaves))(params))


@functools.lru_cache(maxsize=8)
def _cast_and_shard(dtype: str, tree: jax.tree_util.PyTreeDef, leaves: tuple[NamedSharding, ...]) -> jax.stages.Wrapped:
    """Cached, so that a run's evaluations after the first compile nothing."""
    return jax.jit(functools.partial(functional.cast_floats, dtype=dtype), out_shardings=tree.unflatten(leaves))
