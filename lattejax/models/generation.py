"""The generation pathway: the velocity of noisy latents, computed by one timestep-expert group.

LaTtE-Flow (arXiv 2506.06952). Every group starts from the embedded noisy latents themselves and ends in the image head:
it is a complete velocity network of M layers for its interval of flow time. The groups share their ends (embedding,
time embedding and head), or have each its own.

Axes: B batch, K group, M layer in group, L = K M layers, T context token, N image token, D width, C latent channel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lattejax.flow.path import velocity_towards
from lattejax.models import functional
from lattejax.models.conditioning import CONDITIONINGS, Step
from lattejax.models.functional import Params
from lattejax.models.generation_config import GenerationConfig
from lattejax.models.generation_ends import Head, HeadModulation, LatentEmbedding
from lattejax.models.generation_layer import GenerationLayer, Modulation
from lattejax.models.layers import Layers, by_rows, rows_of_one_group
from lattejax.models.rotary import multimodal_rotary
from lattejax.models.text import KeysValues


class Context(NamedTuple):
    """The prompts' part in attention: the VLM's keys and values at each layer. Also the position where the image
    starts."""

    layers: KeysValues | list[KeysValues]  # [L or M, B, T, G, d], or a list of L or M arrays [B, T, G, d]
    mask: Bool[Array, "B T"]
    next_position: Int[Array, "B"]


class Modulations(NamedTuple):
    """Each row's flow time, and the modulations that one group computes from its `Step`."""

    t: Float[Array, "B"]
    layers: Modulation | list[Modulation]  # each layer's, in the form of the layers: stacked or a list
    head: HeadModulation


def init(config: GenerationConfig, decoder_layers: Params | None, key: jax.Array) -> Params:
    """Returns the pathway's weights: `experts`, stacked on a leading axis L, and `embedding`, `time` and `head`. If the
    groups have their own, these three are in `ends`, stacked on a leading axis K.

    With the VLM's `decoder_layers` (stacked on L), each expert layer has a replica of the VLM layer at its depth: a
    copy, or with `replica_init="random"` random weights of that shape. Without them, the experts have no decoder.
    """
    embedding, time, experts, head = jax.random.split(key, 4)

    def init_end(module, argument, key):
        if config.shared_ends:
            return functional.init(module, argument, key=key)
        return functional.init_stacked(module, argument, key=key, count=config.num_groups)

    layers = functional.init_stacked(GenerationLayer, config.layer, key=experts, count=config.text.num_layers)
    if decoder_layers is None:
        del layers["decoder"]
    elif config.replica_init == "vlm":
        layers["decoder"] = jax.tree.map(jnp.copy, decoder_layers)
    ends = {
        "embedding": init_end(LatentEmbedding, config, embedding),
        "time": init_end(CONDITIONINGS[config.conditioning], config.text.hidden_size, time),
        "head": init_end(Head, config, head),
    }
    return {"experts": layers, **(ends if config.shared_ends else {"ends": ends})}


def group_layers(config: GenerationConfig, layers: Params, group: int) -> Params:
    """Returns one group's slice of a stack or list of L layers."""
    return Layers(layers)[config.layers_of[group]]


def shared_by_groups(params: Params) -> Params:
    """The parts of the pathway's weights that are not on an axis of layers or groups."""
    return {name: part for name, part in params.items() if name not in ("experts", "ends")}


def params_of_group(config: GenerationConfig, params: Params, group: int) -> Params:
    """One group's own M layers and ends, and what the groups share."""
    ends = jax.tree.map(lambda x: x[group], params.get("ends", {}))
    return shared_by_groups(params) | ends | {"experts": group_layers(config, params["experts"], group)}


def of_group(
    config: GenerationConfig, params: Params, contexts: Context, rows: Int[Array, "B"] | None, group: int
) -> tuple[Params, Context]:
    """One group's pathway, and each row's context at the group's layers.

    Args:
      config: the pathway's geometry.
      params: the pathway's weights, all L layers in `experts`.
      contexts: the contexts of U prompts at all L layers.
      rows: the index of each row's prompt; None: the contexts are the rows' already.
      group: the group's index.
    """
    context = contexts._replace(layers=group_layers(config, contexts.layers, group))
    return params_of_group(config, params, group), context if rows is None else pick(context, rows)


def pick(context: Context, rows: Int[Array, "B"]) -> Context:
    """Gathers each row's context from a table."""
    layers = Layers(context.layers).map_arrays(lambda x: x[rows])
    return Context(layers, context.mask[rows], context.next_position[rows])


def image_positions(config: GenerationConfig, start: Int[Array, "B"]) -> Int[Array, "B 3 N"]:
    """The image tokens' (time, row, column): (p, p + row, p + column), p being the position after the prompt."""
    rows, columns = config.grid
    offsets = np.indices((1, rows, columns)).reshape(3, -1)
    return start[:, None, None] + jnp.asarray(offsets, start.dtype)


def condition(config: GenerationConfig, params: Params, step: Step) -> Modulations:
    """Computes one group's modulations. They depend only on `step` and the weights, so `sampling.images` computes those
    of all steps in advance. `params` are as in `velocity`."""
    c = functional.bind(CONDITIONINGS[config.conditioning], config.text.hidden_size, params=params["time"])(step)

    def modulate(layer: Params) -> Modulation:
        return functional.bind(GenerationLayer, config.layer, params=layer).modulate(c)

    layers = Layers(params["experts"]).map(modulate)
    return Modulations(step.start, layers, functional.bind(Head, config, params=params["head"]).modulate(c))


def velocity(
    config: GenerationConfig,
    params: Params,
    context: Context,
    x_t: Float[Array, "B h w C"],
    modulations: Modulations,
    remat: str = "none",
) -> Float[Array, "B h w C"]:
    """One group's estimate of the flow's velocity at x_t, given its `modulations`.

    Args:
      config: the pathway's geometry.
      params: `embedding`, `time`, `head`, and in `experts` the group's own M layers, stacked or as a list. Their
        dtype is the dtype of the computation.
      context: the prompts' keys and values at those M layers, in the same form.
      x_t: noisy latents.
      modulations: see `condition`; each row's, or of length 1 if it is the same for all rows. Flow times are
        inside the group's interval, or near it if intervals overlap in training.
      remat: what a layer keeps for the backward pass, see `layers.Layers.scan`.
    """
    h, _ = _run_layers(config, params, context, x_t, modulations, remat)
    out = functional.bind(Head, config, params=params["head"])(h, modulations.head).astype(x_t.dtype)
    if config.prediction == "velocity":
        return out
    return velocity_towards(out, x_t, jnp.broadcast_to(modulations.t, (len(x_t),)))


def attention_maps(
    config: GenerationConfig, params: Params, context: Context, x_t: Float[Array, "B h w C"], modulations: Modulations
) -> Float[Array, "M B H N N"]:
    """The map (or its logits) that each layer passes to the next, including the residual it added.

    Arguments are as in `velocity`. Without residual attention nothing is handed on: a ValueError.
    """
    if config.residual_attention == "none":
        raise ValueError("residual_attention='none' hands no maps on")
    _, maps = _run_layers(config, params, context, x_t, modulations, keep_maps=True)
    return jnp.stack(maps)


def _run_layers(
    config: GenerationConfig,
    params: Params,
    context: Context,
    x_t: Float[Array, "B h w C"],
    modulations: Modulations,
    remat: str = "none",
    keep_maps: bool = False,
) -> tuple[Float[Array, "B N D"], Float[Array, "M B H N N"] | list[Float[Array, "B H N N"] | None] | None]:
    """Returns one group's hidden states after its last layer and, if they are kept, what its layers hand on."""
    embed = functional.bind(LatentEmbedding, config, params=params["embedding"])
    h = embed(x_t.astype(embed.proj.weight.dtype))
    text = config.text
    positions = image_positions(config, context.next_position)
    rotary = multimodal_rotary(positions, text.head_dim, text.rope_theta, text.mrope_section)

    def body(carry, inputs):
        h, previous_map = carry
        params, modulation, keys_values = inputs
        layer = functional.bind(GenerationLayer, config.layer, params=params)
        h, own_map = layer(by_rows(h), modulation, rotary, keys_values, context.mask, previous_map)
        return (h, own_map), own_map if keep_maps else None

    # The first layer has no previous map. In a scan it adds a map of zeros, which is equivalent.
    shape = (h.shape[0], text.num_heads, h.shape[1], h.shape[1])
    no_map = None if config.residual_attention == "none" else jnp.zeros(shape, h.dtype)
    layers = Layers(params["experts"]).zip(modulations.layers, context.layers)
    (h, _), maps = layers.scan(body, (h, no_map), remat, unrolled=lambda carry: (carry[0], None))
    return h, maps


def group_velocities(
    config: GenerationConfig,
    params: Params,
    contexts: Context,
    rows: Int[Array, "K B"] | None,
    x_t: Float[Array, "K B h w C"],
    t: Float[Array, "K B"],
    *,
    remat: str = "none",
    unroll: bool = False,
) -> Float[Array, "K B h w C"]:
    """The velocities of each group's own rows: the form for training, on stacked layers.

    Args:
      config: the pathway's geometry.
      params: the pathway's weights, all L layers in `experts`.
      contexts: a table of U prompts' contexts at all L layers, [L, U, …]; or, without `rows`, those of each group's own
        rows, [K, L, B, …].
      rows: the index of each row's prompt in the table.
      x_t: noisy latents.
      t: flow times of the groups: inside their intervals, or a little beyond with `train.interval_overlap`.
      remat: what a layer keeps for the backward pass, see `layers.Layers.scan`.
      unroll: compiles longer, for steps that need not stack what each layer keeps for the backward pass.
    """

    def one(own, context, x_t, t):
        own = shared_by_groups(params) | own
        if unroll:
            own["experts"], layers = Layers(own["experts"]).unstack(), Layers(context.layers).unstack()
            context = context._replace(layers=layers)
        with rows_of_one_group():
            return velocity(config, own, context, x_t, condition(config, own, Step(t, t)), remat)

    groups = config.num_groups
    if config.group_sizes or groups == 1:  # groups that differ, or a single group, whose products need no axis K
        velocities = []
        for k in range(groups):
            table = contexts if rows is not None else jax.tree.map(lambda x, k=k: x[k], contexts)
            own, context = of_group(config, params, table, None if rows is None else rows[k], k)
            velocities.append(one(own, context, x_t[k], t[k]))
        return jnp.stack(velocities)

    # Equal groups are one computation on an axis K, which a mesh can shard: groups do not interact.
    def grouped(stacked):
        return jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), stacked)

    if rows is None:
        size = config.text.num_layers // groups

        def own_layers(layers, k):
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, k * size, size), layers)

        context = contexts._replace(layers=jax.vmap(own_layers)(contexts.layers, jnp.arange(groups)))
    else:
        context = jax.vmap(lambda layers, rows: pick(contexts._replace(layers=layers), rows))(
            grouped(contexts.layers), rows
        )
    own = {"experts": grouped(params["experts"]), **params.get("ends", {})}
    return jax.vmap(one)(own, context, x_t, t)
