"""Both ends of the generation pathway, shared by the groups or each group's own: the embedding of latents, the head.

Axes: B batch, N image token, D width, C latent channel; h, w rows and columns of latents.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, Int

from lattejax.models.generation_config import GenerationConfig
from lattejax.models.linear import Linear, zeros


def sincos(positions: Int[np.ndarray, "n"], channels: int) -> Float[np.ndarray, "n {channels}"]:
    """The sine-cosine embedding of positions along one axis: sines, then cosines, of amplitude 1.

    Frequencies fall from 1 towards 10⁻⁴ rad per position. `channels` is even. Computed on the host, in float64.
    """
    half = channels // 2
    angles = np.asarray(positions)[:, None] * 10_000.0 ** (-np.arange(half) / half)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


class LatentEmbedding(nnx.Module):
    """A linear map of each patch of latents, plus its position on the grid.

    M-RoPE alone cannot tell columns apart: at the VLM's theta of 10⁶ the fastest column channel turns by 1.8e-4 rad
    from one column to the next. So with `latent_position="sincos"` a fixed table is added, half of its channels for the
    row and half for the column. The paper does not state how it encodes the positions of latents; the table is our
    choice, following BAGEL (arXiv 2505.14683), which also keeps Qwen's M-RoPE.
    """

    def __init__(self, config: GenerationConfig, *, rngs: nnx.Rngs):
        self.proj = Linear(config.token_dim, config.text.hidden_size, rngs=rngs)
        self.config = config

    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B N D"]:
        patch = self.config.patch_size
        patches = rearrange(latents, "B (h p) (w q) C -> B (h w) (p q C)", p=patch, q=patch)
        h = self.proj(patches)
        if self.config.latent_position == "none":
            return h
        if self.config.latent_position != "sincos":
            raise NotImplementedError(self.config.latent_position)
        # Two short constants in the compiled program, not one for the entire grid.
        (rows, columns), width = self.config.grid, h.shape[-1]
        row, column = (jnp.asarray(sincos(np.arange(count), width // 2)) for count in (rows, columns))
        table = jnp.concatenate(
            [repeat(row, "h d -> (h w) d", w=columns), repeat(column, "w d -> (h w) d", h=rows)], axis=-1
        )
        return (h + table).astype(h.dtype)  # rounded to bfloat16 once, after the sum


class HeadModulation(NamedTuple):
    scale: Float[Array, "B 1 D"]
    shift: Float[Array, "B 1 D"]


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
        modulated = self.norm(h) * (1 + modulation.scale) + modulation.shift  # in the modulation's precision
        patches = self.proj(modulated.astype(h.dtype))
        (rows, _), patch = self.config.grid, self.config.patch_size
        return rearrange(patches, "B (h w) (p q C) -> B (h p) (w q) C", h=rows, p=patch, q=patch)
