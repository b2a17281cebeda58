"""The Couple variant: a frozen VLM that reads, coupled with a trained generation pathway that draws.

LaTtE-Flow (arXiv 2506.06952), "LaTtE-Flow Couple". The pathway sees a prompt through the VLM's own keys and values,
layer by layer: the ordinary KV cache. Prompts never see image tokens, so contexts depend on the prompt alone; they are
made once and serve every step of training and sampling.

Axes: B batch, U prompts of a table, K group, M layer in group, L layer, T context token.
"""

import dataclasses

import jax
from jaxtyping import Array, Int

from lattejax.models import generation, qwen2_vl
from lattejax.models.functional import Params
from lattejax.models.generation import Context, GenerationConfig
from lattejax.models.qwen2_vl import Prompts, VLMConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vlm: VLMConfig
    generation: GenerationConfig


def init_generation(config: ModelConfig, vlm: Params, key: jax.Array) -> Params:
    """Returns a generation pathway whose layers replicate those of `vlm` (stacked)."""
    return generation.init(config.generation, vlm["text"]["layers"], key)


def read_prompts(config: ModelConfig, vlm: Params, prompts: Prompts) -> Context:
    """Returns the prompts' contexts at all L layers: stacked, or as a list if the VLM's layers are one."""
    _, layers = qwen2_vl.forward(config.vlm, vlm, prompts)
    return Context(layers, prompts.mask, qwen2_vl.next_positions(prompts))


def group_context(config: ModelConfig, table: Context, group: int, index: Int[Array, "B"]) -> Context:
    """Picks one group's layers (from a list), and for each row its prompt, out of a table of contexts."""
    layers = generation.group_layers(config.generation, table.layers, group)
    return jax.tree.map(lambda x: x[index], Context(layers, table.mask, table.next_position))


def share_contexts(config: ModelConfig, table: Context, index: Int[Array, "K B"]) -> Context:
    """Picks every group's layers, and for each row of its share the prompt, out of a stacked table of contexts.

    Returns a `Context` with a leading axis K; a group's share carries that group's layers only.
    """
    layers = generation.split_groups(config.generation, table.layers)
    layers = jax.vmap(lambda layers, index: jax.tree.map(lambda x: x[:, index], layers))(layers, index)
    return Context(layers, table.mask[index], table.next_position[index])
