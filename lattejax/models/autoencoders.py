"""Autoencoders: images to latents and back, with any network.

DC-AE, TAESD and bare pixels each have a file for their modules. This file has what they share, and is the only place
where latents are scaled: networks neither scale nor clip, and nothing outside this file scales.

Axes: B batch, H row, W column of an image, h and w of latents, C latent channel.
"""

import dataclasses
from typing import Annotated, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float

from lattejax.models import dc_ae, functional, pixels, taesd
from lattejax.models.dc_ae import DCAEConfig
from lattejax.models.functional import Params
from lattejax.models.pixels import PixelConfig
from lattejax.models.taesd import TAESDConfig
from lattejax.ranges import Range, check_ranges


@runtime_checkable
class NetworkConfig(Protocol):
    """The geometry of a network in `NETWORKS`: a frozen dataclass."""

    @property
    def latent_channels(self) -> int: ...

    @property
    def compression(self) -> int:
        """Pixels per latent, along each side."""


NETWORKS = {DCAEConfig: dc_ae, TAESDConfig: taesd, PixelConfig: pixels}
PIXELS = "pixels"  # the autoencoder without weights


Scale = Annotated[float, Range(0, 1e6, above=True)]
Shift = Annotated[float, Range(-1e6, 1e6)]


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A network, and the map between its latents z and those that the flow sees, (z - shift) * scale.

    Raises:
      ValueError: the scale is not positive, or one of the two is not finite.
    """

    network: NetworkConfig
    scale: Scale = 1.0
    shift: Shift = 0.0

    def __post_init__(self):
        check_ranges(self)

    def init(self, key: jax.Array) -> Params:
        """Returns random weights: `encoder` and `decoder`."""
        network, (encoder, decoder) = NETWORKS[type(self.network)], jax.random.split(key)
        return {
            "encoder": functional.init(network.Encoder, self.network, key=encoder),
            "decoder": functional.init(network.Decoder, self.network, key=decoder),
        }

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Rows, columns and channels of a square image's latents; raises `ValueError` if its side does not fit."""
        side, rest = divmod(image_size, self.network.compression)
        if rest:
            raise ValueError(f"image_size={image_size} is no multiple of {self.network.compression} pixels per latent")
        return side, side, self.network.latent_channels

    def encode(self, encoder: Params, images: Float[Array | np.ndarray, "B H W 3"]) -> Float[Array, "B h w C"]:
        """Takes images in [-1, 1], whose sides the network's compression divides; returns scaled latents."""
        latents = functional.bind(NETWORKS[type(self.network)].Encoder, self.network, params=encoder)(images)
        return (latents - self.shift) * self.scale

    def decode(self, decoder: Params, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Takes latents as `encode` returns them; returns images in about [-1, 1]."""
        latents = latents / self.scale + self.shift
        return functional.bind(NETWORKS[type(self.network)].Decoder, self.network, params=decoder)(latents)
