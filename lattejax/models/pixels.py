"""No autoencoder: latents are grey pixels, for images too small to need compression.

Axes: B batch, H row, W column.
"""

import dataclasses

import jax.numpy as jnp
from einops import repeat
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    compression: int = 1
    latent_channels: int = 1


class Encoder(nnx.Module):
    """The mean of the three colours."""

    def __init__(self, config: PixelConfig, *, rngs: nnx.Rngs):
        del config, rngs  # no weights

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 1"]:
        return jnp.mean(images, axis=-1, keepdims=True)


class Decoder(nnx.Module):
    def __init__(self, config: PixelConfig, *, rngs: nnx.Rngs):
        del config, rngs

    def __call__(self, latents: Float[Array, "B H W 1"]) -> Float[Array, "B H W 3"]:
        return repeat(latents, "B H W 1 -> B H W rgb", rgb=3)
