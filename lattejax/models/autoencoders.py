"""Autoencoders: images to latents and back.

Axes: B batch, C latent channel.
"""

import dataclasses

import jax.numpy as jnp
from einops import repeat
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class PixelAutoencoder:
    """The identity: latents are grey pixels in [-1, 1], for images so small that nothing need be compressed."""

    image_size: int

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, 1)

    def encode(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 1"]:
        """Takes images in [-1, 1]."""
        return jnp.mean(images, axis=-1, keepdims=True)

    def decode(self, latents: Float[Array, "B H W 1"]) -> Float[Array, "B H W 3"]:
        return repeat(latents, "B H W 1 -> B H W rgb", rgb=3)


AUTOENCODERS = {"pixels": PixelAutoencoder}
