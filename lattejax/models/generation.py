"""The generation pathway: the velocity of noisy latents, computed by one timestep-expert group.

LaTtE-Flow (arXiv 2506.06952). Every group starts from the embedded noisy latents themselves and ends in the image head:
it is a whole velocity network of M layers for its interval of flow time. Embedding, time embedding and head are shared
by the groups.

Axes: B batch, K group, M layer in group, L = K M layers, T context token, N image token, D width, C latent channel.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lattejax.flow.intervals import Intervals
from lattejax.models import functional
from lattejax.models.functional import Layers, Params
from lattejax.models.generation_layer import GenerationLayer, LayerConfig, Modulation
from lattejax.models.linear import Linear, zeros
from lattejax.models.rotary import multimodal_rotary
from lattejax.models.text import KeysValues, TextConfig

REPLICA_INITS = ("vlm", "random")


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Geometry of the generation pathway; `text` is the VLM's, `latent_shape` the autoencoder's (rows, columns, C).

    The groups are equal in layers and in flow time unless `group_sizes` (summing to L) or `interval_edges` (rising from
    0 to 1) say otherwise.
    """

    text: TextConfig
    latent_shape: tuple[int, int, int]
    num_groups: int = 4
    group_sizes: tuple[int, ...] = ()
    interval_edges: tuple[float, ...] = ()
    residual_attention: str = "probabilities"
    residual_gate: str = "head"
    replica_init: str = "vlm"
    patch_size: int = 1

    def __post_init__(self):
        layers = self.text.num_layers
        if self.group_sizes:
            if len(self.group_sizes) != self.num_groups or min(self.group_sizes) < 1:
                raise ValueError(
                    f"group_sizes={self.group_sizes} must be num_groups={self.num_groups} positive numbers"
                )
            if sum(self.group_sizes) != layers:
                raise ValueError(
                    f"group_sizes={self.group_sizes} sum to {sum(self.group_sizes)}, not to the {layers} layers of the "
                    "language model"
                )
        elif self.num_groups < 1 or layers % self.num_groups:
            fitting = [k for k in range(1, layers + 1) if layers % k == 0]
            raise ValueError(
                f"num_groups={self.num_groups} does not divide the {layers} layers of the language model; use one of "
                f"{fitting}, or give group_sizes"
            )
        if self.intervals.num_groups != self.num_groups:
            raise ValueError(
                f"interval_edges={self.interval_edges} make {self.intervals.num_groups} intervals; num_groups="
                f"{self.num_groups} needs {self.num_groups + 1} edges"
            )
        if self.replica_init not in REPLICA_INITS:
            raise ValueError(f"replica_init={self.replica_init!r} is unknown; use one of {list(REPLICA_INITS)}")
        if self.latent_shape[0] % self.patch_size or self.latent_shape[1] % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide latents of shape {self.latent_shape}")
        _ = self.layer  # checks of its own

    @property
    def intervals(self) -> Intervals:
        """Which group owns which flow time."""
        return Intervals(self.interval_edges) if self.interval_edges else Intervals.equal(self.num_groups)

    @property
    def layers_of(self) -> tuple[slice, ...]:
        """Which of the L layers are each group's."""
        sizes = self.group_sizes or (self.text.num_layers // self.num_groups,) * self.num_groups
        ends = tuple(itertools.accumulate(sizes))
        return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.latent_shape[0] // self.patch_size, self.latent_shape[1] // self.patch_size

    @property
    def token_dim(self) -> int:
        """Latent numbers in one image token."""
        return self.latent_shape[2] * self.patch_size**2

    @property
    def layer(self) -> LayerConfig:
        return LayerConfig(self.text, self.residual_attention, self.residual_gate)


class Context(NamedTuple):
    """What image tokens see of prompts: at each layer the VLM's keys and values, and where images start."""

    layers: KeysValues | list[KeysValues]  # [L or M, B, T, G, d], or a list of so many [B, T, G, d]
    mask: Bool[Array, "B T"]
    next_position: Int[Array, "B"]


TIME_CHANNELS = 256


class TimeEmbedding(nnx.Module):
    """Sinusoids of 1000·t through a two-layer SiLU network."""

    def __init__(self, config: GenerationConfig, *, rngs: nnx.Rngs):
        self.fc1 = Linear(TIME_CHANNELS, config.text.hidden_size, rngs=rngs)
        self.fc2 = Linear(config.text.hidden_size, config.text.hidden_size, rngs=rngs)

    def __call__(self, t: Float[Array, "B"]) -> Float[Array, "B D"]:
        half = TIME_CHANNELS // 2
        frequencies = 1000 * np.exp(-np.log(10_000) * np.arange(half) / half)
        angles = t[:, None] * jnp.asarray(frequencies, t.dtype)  # never in bfloat16, which cannot tell 999 from 1000
        sinusoids = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(self.fc1.weight.dtype)
        return self.fc2(jax.nn.silu(self.fc1(sinusoids)))


class LatentEmbedding(nnx.Module):
    """A linear map of each patch of latents."""

    def __init__(self, config: GenerationConfig, *, rngs: nnx.Rngs):
        self.proj = Linear(config.token_dim, config.text.hidden_size, rngs=rngs)
        self.patch = config.patch_size

    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B N D"]:
        patches = rearrange(latents, "B (h p) (w q) C -> B (h w) (p q C)", p=self.patch, q=self.patch)
        return self.proj(patches)


class HeadModulation(NamedTuple):
    scale: Float[Array, "B 1 D"]
    shift: Float[Array, "B 1 D"]


class Conditioning(NamedTuple):
    """All that one group takes from flow time."""

    layers: Modulation | list[Modulation]  # each layer's, stacked or a list as the layers are
    head: HeadModulation


class Head(nnx.Module):
    """RMS norm, scale and shift from c, and a linear map back to patches of latents. Both maps start at zero."""

    def __init__(self, config: GenerationConfig, *, rngs: nnx.Rngs):
        width = config.text.hidden_size
        self.norm = nnx.RMSNorm(width, epsilon=config.text.rms_norm_eps, rngs=rngs)
        self.modulation = Linear(width, 2 * width, init=zeros, rngs=rngs)
        self.proj = Linear(width, config.token_dim, init=zeros, rngs=rngs)
        self.config = config

    def modulate(self, c: Float[Array, "B D"]) -> HeadModulation:
        return HeadModulation(*jnp.split(self.modulation(jax.nn.silu(c))[:, None], 2, axis=-1))

    def __call__(self, h: Float[Array, "B N D"], modulation: HeadModulation) -> Float[Array, "B h w C"]:
        patches = self.proj(self.norm(h) * (1 + modulation.scale) + modulation.shift)
        (rows, _), patch = self.config.grid, self.config.patch_size
        return rearrange(patches, "B (h w) (p q C) -> B (h p) (w q) C", h=rows, p=patch, q=patch)


def init(config: GenerationConfig, decoder_layers: Params | None, key: jax.Array) -> Params:
    """Returns the pathway's weights: `embedding`, `time`, `experts` stacked on a leading axis L, and `head`.

    With `decoder_layers`, the VLM's (stacked on L), each expert layer has a replica of the VLM layer at its depth: a
    copy, or with `replica_init="random"` random weights of that shape. Without, the experts have no decoder.
    """
    embedding, time, experts, head = jax.random.split(key, 4)
    layers = functional.init_stacked(GenerationLayer, config.layer, key=experts, count=config.text.num_layers)
    if decoder_layers is None:
        del layers["decoder"]
    elif config.replica_init == "vlm":
        layers["decoder"] = jax.tree.map(jnp.copy, decoder_layers)
    return {
        "embedding": functional.init(LatentEmbedding, config, key=embedding),
        "time": functional.init(TimeEmbedding, config, key=time),
        "experts": layers,
        "head": functional.init(Head, config, key=head),
    }


def group_layers(config: GenerationConfig, layers: Layers, group: int) -> Layers:
    """Returns one group's share of what stands for each of the L layers: of a list, or of stacked leaves."""
    own = config.layers_of[group]
    return layers[own] if isinstance(layers, list) else jax.tree.map(lambda x: x[own], layers)


def pick(context: Context, rows: Int[Array, "B"]) -> Context:
    """For each row its prompt's context."""
    pairs = context.layers
    if isinstance(pairs, list):
        layers = jax.tree.map(lambda x: x[rows], pairs)
    else:
        layers = jax.tree.map(lambda x: x[:, rows], pairs)
    return Context(layers, context.mask[rows], context.next_position[rows])


def image_positions(config: GenerationConfig, start: Int[Array, "B"]) -> Int[Array, "B 3 N"]:
    """The image tokens' (time, row, column): (p, p + row, p + column), p being the position after the prompt."""
    rows, columns = config.grid
    offsets = np.indices((1, rows, columns)).reshape(3, -1)
    return start[:, None, None] + jnp.asarray(offsets, start.dtype)


def condition(config: GenerationConfig, params: Params, t: Float[Array, "B"]) -> Conditioning:
    """Computes what one group takes from flow times: a function of nothing else, so that sampling does it ahead of its
    steps. `params` are as in `velocity`."""
    experts: Layers = params["experts"]
    c = functional.bind(TimeEmbedding, config, params=params["time"])(t)

    def modulate(layer: Params) -> Modulation:
        return functional.bind(GenerationLayer, config.layer, params=layer).modulate(c)

    layers = [modulate(layer) for layer in experts] if isinstance(experts, list) else jax.vmap(modulate)(experts)
    return Conditioning(layers, functional.bind(Head, config, params=params["head"]).modulate(c))


def velocity(
    config: GenerationConfig,
    params: Params,
    context: Context,
    x_t: Float[Array, "B h w C"],
    conditioning: Conditioning,
    remat: str = "none",
) -> Float[Array, "B h w C"]:
    """One group's estimate of the flow's velocity at x_t and the flow time that `conditioning` was made of.

    Args:
      config: the pathway's geometry.
      params: `embedding`, `time`, `head`, and in `experts` the group's own M layers, stacked or as a list. Their
        dtype is the dtype of the computation.
      context: the prompts' keys and values at those M layers, in the same form.
      x_t: noisy latents.
      conditioning: of flow times inside the group's interval (see `condition`): each row's, or of length 1 if it is
        the same for the whole batch.
      remat: what a layer keeps for the backward pass, see `functional.over_layers`.
    """
    experts: Layers = params["experts"]
    embed = functional.bind(LatentEmbedding, config, params=params["embedding"])
    h = embed(x_t.astype(embed.proj.weight.dtype))
    text = config.text
    positions = image_positions(config, context.next_position)
    rotary = multimodal_rotary(positions, text.head_dim, text.rope_theta, text.mrope_section)

    def body(carry, inputs):
        h, previous_map = carry
        params, modulation, keys_values = inputs
        layer = functional.bind(GenerationLayer, config.layer, params=params)
        return layer(h, modulation, rotary, keys_values, context.mask, previous_map), None

    if isinstance(experts, list):
        first_map, layers = None, list(zip(experts, conditioning.layers, context.layers, strict=True))
    else:
        # A scan carries one shape throughout: adding a map of zeros is starting afresh.
        shape = (h.shape[0], text.num_heads, h.shape[1], h.shape[1])
        first_map = None if config.residual_attention == "none" else jnp.zeros(shape, h.dtype)
        layers = (experts, conditioning.layers, context.layers)
    (h, _), _ = functional.over_layers(body, (h, first_map), layers, remat)
    return functional.bind(Head, config, params=params["head"])(h, conditioning.head).astype(x_t.dtype)


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
    """Every group's velocities of its own rows: the training form, on stacked layers.

    Args:
      config: the pathway's geometry.
      params: the pathway's weights, all L layers in `experts`.
      contexts: a table of U prompts' contexts at all L layers, [L, U, …]; or, without `rows`, those of each group's own
        rows, [K, L, B, …].
      rows: each row's prompt in the table.
      x_t: noisy latents.
      t: flow times inside the groups' intervals.
      remat: what a layer keeps for the backward pass, see `functional.over_layers`.
      unroll: trades a longer compilation for steps that need not stack what each layer keeps for the backward pass.
    """

    def one(experts, context, x_t, t):
        if unroll:
            experts, context = functional.unstack(experts), context._replace(layers=functional.unstack(context.layers))
        own = params | {"experts": experts}
        return velocity(config, own, context, x_t, condition(config, own, t), remat)

    experts, groups = params["experts"], config.num_groups
    if config.group_sizes or groups == 1:  # groups that differ; and one alone, whose products need no axis K
        velocities = []
        for k in range(groups):
            table = contexts if rows is not None else jax.tree.map(lambda x, k=k: x[k], contexts)
            context = table._replace(layers=group_layers(config, table.layers, k))
            context = context if rows is None else pick(context, rows[k])
            velocities.append(one(group_layers(config, experts, k), context, x_t[k], t[k]))
        return jnp.stack(velocities)

    # Equal groups are one computation on an axis K, which a mesh can divide: nothing of one group meets another's.
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
    return jax.vmap(one)(grouped(experts), context, x_t, t)
