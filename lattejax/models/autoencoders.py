"""Autoencoders: images to latents and back.

DC-AE and TAESD have a file each for their modules; what is done with either is here. They neither scale nor clip.

Axes: B batch, H row, W column of an image, h and w of latents, C latent channel.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import repeat
from jaxtyping import Array, Float

from lattejax.models import dc_ae, functional, taesd
from lattejax.models.dc_ae import DCAEConfig
from lattejax.models.functional import Params
from lattejax.models.taesd import TAESDConfig

NetworkConfig = DCAEConfig | TAESDConfig
NETWORKS = {DCAEConfig: dc_ae, TAESDConfig: taesd}


def init(config: NetworkConfig, key: jax.Array) -> Params:
    """Returns random weights: `encoder` and `decoder`."""
    network, (encoder, decoder) = NETWORKS[type(config)], jax.random.split(key)
    return {
        "encoder": functional.init(network.Encoder, config, key=encoder),
        "decoder": functional.init(network.Decoder, config, key=decoder),
    }


def encode(config: NetworkConfig, params: Params, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
    """Takes images in [-1, 1], of sides that `config.compression` divides; returns the encoder's latents."""
    return functional.bind(NETWORKS[type(config)].Encoder, config, params=params["encoder"])(images)


def decode(config: NetworkConfig, params: Params, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
    """Takes latents as `encode` returns them; returns images in about [-1, 1]."""
    return functional.bind(NETWORKS[type(config)].Decoder, config, params=params["decoder"])(latents)


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
