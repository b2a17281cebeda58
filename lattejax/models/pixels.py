"""No autoencoder: latents are pixels, grey or in colour, for images too small to need compression.

With `model.patch_size`, an image token is a square of them.

Axes: B batch, H row, W column, C channel: 1 if grey, or 3.
"""

import dataclasses

import jax.numpy as jnp
from einops import repeat
from flax import nnx
from jaxtyping import Array, Float

COLOURS = (1, 3)


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    latent_channels: int = 1
    compression: int = 1

    def __post_init__(self):
        if self.latent_channels not in COLOURS:
            raise ValueError(f"pixels have 1 channel (grey) or 3, not {self.latent_channels}")


class Encoder(nnx.Module):
    """The colours, or their mean."""

    def __init__(self, config: PixelConfig, *, rngs: nnx.Rngs):
        self.is_grey = config.latent_channels == 1
        del rngs  # no weights

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W C"]:
        return jnp.mean(images, axis=-1, keepdims=True) if self.is_grey else images


class Decoder(nnx.Module):
    def __init__(self, config: PixelConfig, *, rngs: nnx.Rngs):
        self.is_grey = config.latent_channels == 1
        del rngs

    def __call__(self, latents: Float[Array, "B H W C"]) -> Float[Array, "B H W 3"]:
        return repeat(latents, "B H W 1 -> B H W rgb", rgb=3) if self.is_grey else latents
