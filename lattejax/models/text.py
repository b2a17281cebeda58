"""Qwen2-VL's language model: a pre-norm decoder with grouped-query attention, M-RoPE and a gated feed-forward network.

Follows Qwen2-VL (arXiv 2409.12191) and its implementation in transformers. `Attention.project` and `Attention.output`
are separate, because the generation pathway has its own attention between them.

Axes: B batch, T token, S cached token, L layer, H query head, G KV head, D width, d head dimension, V vocabulary.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lattejax.models import functional
from lattejax.models.attention import attention
from lattejax.models.functional import Params
from lattejax.models.layers import Layers, by_rows
from lattejax.models.linear import Linear
from lattejax.models.rotary import Rotary, multimodal_rotary, rotate
from lattejax.ranges import Range, Size, check_ranges

MOST_POSITIONS = 32_768  # tokens that Qwen2-VL reads: its max_position_embeddings
Part = Annotated[int, Range(0, 2**20)]  # of a head's frequencies, for time, rows or columns


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Geometry of the language model; the defaults are Qwen2-VL-2B's."""

    vocab_size: Size = 151_936
    hidden_size: Size = 1536
    intermediate_size: Size = 8960
    num_layers: Annotated[int, Range(1, 1000)] = 28
    num_heads: Size = 12
    num_kv_heads: Size = 2
    rope_theta: Annotated[float, Range(1, 1e12)] = 1_000_000.0
    mrope_section: tuple[Part, Part, Part] = (16, 24, 24)
    rms_norm_eps: Annotated[float, Range(0, 0.1)] = 1e-6
    tie_word_embeddings: bool = True

    def __post_init__(self):
        check_ranges(self)
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide hidden_size={self.hidden_size} "
                f"and be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section={self.mrope_section} must sum to half the head dimension, {self.head_dim // 2}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class KeysValues(NamedTuple):
    """One layer's keys, after rotation, and values; or a stack's, with a leading axis L."""

    keys: Float[Array, "B S G d"]
    values: Float[Array, "B S G d"]


class Attention(nnx.Module):
    """The projections around attention; the caller computes attention between them."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        width, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = Linear(width, heads, head_dim, rngs=rngs)
        self.k_proj = Linear(width, kv_heads, head_dim, rngs=rngs)
        self.v_proj = Linear(width, kv_heads, head_dim, rngs=rngs)
        self.o_proj = Linear(heads * head_dim, width, use_bias=False, rngs=rngs)

    def project(
        self, x: Float[Array, "B T D"], rotary: Rotary
    ) -> tuple[Float[Array, "B T H d"], Float[Array, "B T G d"], Float[Array, "B T G d"]]:
        """Returns rotated queries, rotated keys, and values."""
        return rotate(self.q_proj(x), rotary), rotate(self.k_proj(x), rotary), self.v_proj(x)

    def output(self, mixed: Float[Array, "B T H d"]) -> Float[Array, "B T D"]:
        return self.o_proj(rearrange(mixed, "B T H d -> B T (H d)"))


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, use_bias=False, rngs=rngs)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, use_bias=False, rngs=rngs)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One layer of the language model. A generation layer starts from the same weights."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.input_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.post_attention_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: Rotary,
        mask: Bool[Array, "B T S"],
        cache: KeysValues | None = None,
        slot: Int[Array, ""] | Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Runs the layer on T tokens.

        Without a cache the tokens attend to each other (S = T). With a cache, their keys and values are first written
        into it from `slot` on, which is each row's own or the same for all, and they attend to all of its S slots that
        `mask` allows.
        """
        q, k, v = self.attention.project(self.input_norm(x), rotary)
        if cache is not None:
            k, v = write_from(cache.keys, k, slot), write_from(cache.values, v, slot)
        x = x + self.attention.output(attention(q, k, v, mask))
        x = x + self.mlp(self.post_attention_norm(x))
        return x, KeysValues(k, v)


def write_from(
    cache: Float[Array, "B S G d"], new: Float[Array, "B T G d"], slot: Int[Array, ""] | Int[Array, "B"]
) -> Float[Array, "B S G d"]:
    """Writes T tokens into a cache from a slot on; S must be at least slot + T."""
    new = new.astype(cache.dtype)
    if slot.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=1)
    return jax.vmap(lambda row, own, at: jax.lax.dynamic_update_slice_in_dim(row, own, at, axis=0))(cache, new, slot)


class Vocabulary(nnx.Module):
    """Both ends of the model: token ids to embeddings, and the last hidden states, normed, to logits."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        scale = config.hidden_size**-0.5
        self.embedding = nnx.Param(scale * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)))
        self.final_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)
        self.tied = config.tie_word_embeddings

    def embed(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.embedding[...][input_ids]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        hidden = self.final_norm(hidden)
        return hidden @ self.embedding[...].T if self.tied else self.lm_head(hidden)


def init(config: TextConfig, key: jax.Array) -> Params:
    """Returns random weights: `vocabulary`, and `layers` stacked on a leading axis L."""
    ends, layers = jax.random.split(key)
    return {
        "vocabulary": functional.init(Vocabulary, config, key=ends),
        "layers": functional.init_stacked(DecoderLayer, config, key=layers, count=config.num_layers),
    }


def decode(
    config: TextConfig,
    layers: Params,
    x: Float[Array, "B T D"],
    position_ids: Int[Array, "B 3 T"],
    mask: Bool[Array, "B T S"],
    cache: KeysValues | list[KeysValues] | None = None,
    slot: Int[Array, ""] | Int[Array, "B"] | None = None,
    remat: str = "none",
) -> tuple[Float[Array, "B T D"], KeysValues | list[KeysValues]]:
    """Runs every layer on T tokens; returns hidden states, before the final norm, and every layer's keys and values.

    `layers` and `cache` have one of the forms of `models.layers`; the returned keys and values have the same form.
    """
    rotary = multimodal_rotary(position_ids, config.head_dim, config.rope_theta, config.mrope_section)

    def body(x, layer_and_cache):
        layer, layer_cache = layer_and_cache
        return functional.bind(DecoderLayer, config, params=layer)(by_rows(x), rotary, mask, layer_cache, slot)

    return Layers(layers).zip(cache).scan(body, x, remat)
