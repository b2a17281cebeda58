"""The paper's layer: the weights of a VLM layer, with time conditioning and residual attention.

LaTtE-Flow (arXiv 2506.06952), "timestep-conditioned residual attention". With h the hidden states of the noisy image
and c the time embedding,

    h <- h + scale_attn(c) * RMS(Attention(RMS(h), context))
    h <- h + scale_mlp(c)  * RMS(FFN(RMS(h) * (1 + scale(c)) + shift(c)))

Queries come from the image. Keys and values are the VLM's at the same depth (the context) and the image's own,
under one softmax; image tokens attend to the entire context and to all image tokens. Before the image-to-image block A
of the attention map multiplies the values, the previous layer's block is added to it:

    A_l <- A_l + gate_l(c) * A_{l-1}

The paper leaves these open, and we chose: scale_attn and scale_mlp are 1 + linear(silu(c)), shift and scale are
linear(silu(c)), gate is tanh(linear(c)) for each head, A is the map after the softmax. All these linears start at zero,
and the norms after attention and FFN at one. Two alternatives can be compared: one gate for all heads of a layer, and A
as the scores before the softmax. Modulations, gates and softmax are at least float32 even with bfloat16 weights: in
bfloat16, 1 + 0.003 is 1.

Axes: B batch, T context token, N image token, H query head, G KV head, R query heads per KV head (H = G R), D width,
d head dimension.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from lattejax.models.linear import Linear, zeros
from lattejax.models.rotary import Rotary
from lattejax.models.text import DecoderLayer, KeysValues, TextConfig

RESIDUAL_ATTENTION = ("none", "probabilities", "logits")
RESIDUAL_GATES = ("head", "layer")


class Modulation(NamedTuple):
    """One layer's modulation, computed from the time embedding."""

    attention_scale: Float[Array, "B 1 D"]
    mlp_scale: Float[Array, "B 1 D"]
    mlp_norm_scale: Float[Array, "B 1 D"]
    mlp_norm_shift: Float[Array, "B 1 D"]
    residual_gate: Float[Array, "B H"] | None


def _zero_linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> Linear:
    return Linear(inputs, outputs, init=zeros, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Geometry and options; the geometry is that of the VLM layer whose weights a generation layer starts from."""

    text: TextConfig
    residual_attention: str = "probabilities"  # added from the layer before: its map, its "logits", or nothing ("none")
    residual_gate: str = "head"  # one gate for each "head", or one for the "layer"

    def __post_init__(self):
        for name, known in (("residual_attention", RESIDUAL_ATTENTION), ("residual_gate", RESIDUAL_GATES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {list(known)}")

    @property
    def num_gates(self) -> int:
        if self.residual_attention == "none":
            return 0
        return self.text.num_heads if self.residual_gate == "head" else 1


class GenerationLayer(nnx.Module):
    """`decoder` has the VLM layer's own weights (Blend) or a replica of them (Couple); the rest is generation's."""

    def __init__(self, config: LayerConfig, *, rngs: nnx.Rngs):
        width, eps = config.text.hidden_size, config.text.rms_norm_eps
        self.decoder = DecoderLayer(config.text, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(width, epsilon=eps, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, epsilon=eps, rngs=rngs)
        self.modulation = _zero_linear(width, 4 * width, rngs)
        self.residual_attention, self.num_heads = config.residual_attention, config.text.num_heads
        if config.num_gates:
            self.residual_gate = _zero_linear(width, config.num_gates, rngs)

    def modulate(self, c: Float[Array, "B D"]) -> Modulation:
        """Computes the layer's modulation from c."""
        attention_scale, mlp_scale, norm_scale, norm_shift = jnp.split(
            self.modulation(jax.nn.silu(c))[:, None], 4, axis=-1
        )
        gate = None
        if self.residual_attention != "none":
            gate = jnp.tanh(self.residual_gate(c))
            gate = jnp.broadcast_to(gate, (len(gate), self.num_heads))
        return Modulation(1 + attention_scale, 1 + mlp_scale, norm_scale, norm_shift, gate)

    def __call__(
        self,
        h: Float[Array, "B N D"],
        modulation: Modulation,
        rotary: Rotary,
        context: KeysValues,
        context_mask: Bool[Array, "B T"],
        previous_map: Float[Array, "B H N N"] | None,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B H N N"] | None]:
        """Runs the layer; returns the new hidden states and the part of the attention map that the next layer adds.

        `previous_map` is None in the first layer of a group, and without residual attention.
        """
        mixed, attention_map = self.attention(h, modulation, rotary, context, context_mask, previous_map)
        h = (h + modulation.attention_scale * self.attention_norm(mixed)).astype(h.dtype)
        h = (h + modulation.mlp_scale * self.mlp_norm(self.feed_forward(h, modulation))).astype(h.dtype)
        return h, None if self.residual_attention == "none" else attention_map

    def attention(
        self,
        h: Float[Array, "B N D"],
        modulation: Modulation,
        rotary: Rotary,
        context: KeysValues,
        context_mask: Bool[Array, "B T"],
        previous_map: Float[Array, "B H N N"] | None,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B H N N"]]:
        """The first half of the layer, without the norm after it; also returns the image-to-image map or its logits."""
        q, k, v = self.decoder.attention.project(self.decoder.input_norm(h), rotary)
        residual = None
        if previous_map is not None:
            residual = modulation.residual_gate[:, :, None, None] * previous_map
        on_logits = {"none": False, "probabilities": False, "logits": True}[self.residual_attention]
        mixed, attention_map = attend(q, context, context_mask, KeysValues(k, v), residual, on_logits)
        return self.decoder.attention.output(mixed), attention_map

    def feed_forward(self, h: Float[Array, "B N D"], modulation: Modulation) -> Float[Array, "B N D"]:
        """The second half of the layer, without the norm after it."""
        x = self.decoder.post_attention_norm(h) * (1 + modulation.mlp_norm_scale) + modulation.mlp_norm_shift
        return self.decoder.mlp(x.astype(h.dtype))


def attend(
    q: Float[Array, "B N H d"],
    context: KeysValues,
    context_mask: Bool[Array, "B T"],
    image: KeysValues,
    residual: Float[Array, "B H N N"] | None,
    on_logits: bool = False,
) -> tuple[Float[Array, "B N H d"], Float[Array, "B H N N"]]:
    """Attention over context and image under one softmax, as two products.

    `residual` is added to the image-to-image block of the map, or of its logits. Returns the mixed values and that
    block, including the residual.
    """
    groups = image.keys.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)  # the softmax is at least float32
    q = rearrange(q, "B N (G R) d -> B N G R d", G=groups) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
    on_context = jnp.einsum("bngrd,btgd->bgrnt", q, context.keys, preferred_element_type=wide)
    on_context = jnp.where(context_mask[:, None, None, None, :], on_context, -jnp.inf)
    on_image = jnp.einsum("bngrd,bmgd->bgrnm", q, image.keys, preferred_element_type=wide)
    if residual is not None:
        residual = rearrange(residual, "B (G R) N M -> B G R N M", G=groups)
    if residual is not None and on_logits:
        on_image = on_image + residual
    logits = on_image

    peak = jnp.maximum(on_context.max(-1, keepdims=True), on_image.max(-1, keepdims=True))
    peak = jax.lax.stop_gradient(peak)
    on_context, on_image = jnp.exp(on_context - peak), jnp.exp(on_image - peak)
    total = on_context.sum(-1, keepdims=True) + on_image.sum(-1, keepdims=True)
    on_context, on_image = on_context / total, on_image / total
    if residual is not None and not on_logits:
        on_image = on_image + residual
    on_context, on_image = on_context.astype(q.dtype), on_image.astype(q.dtype)

    mixed = jnp.einsum("bgrnt,btgd->bngrd", on_context, context.values)
    mixed = mixed + jnp.einsum("bgrnm,bmgd->bngrd", on_image, image.values)
    carried = logits.astype(q.dtype) if on_logits else on_image
    return (
        rearrange(mixed, "B N G R d -> B N (G R) d"),
        rearrange(carried, "B G R N M -> B (G R) N M"),
    )
