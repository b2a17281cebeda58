"""TAESD, the tiny autoencoder: plain convolutions, fast, for latents of the Stable Diffusion families.

Follows github.com/madebyollin/taesd and its implementation in diffusers (AutoencoderTiny). Modules and their attributes
have diffusers' names, so a weight's path here is its name there.

Axes: B batch, H row, W column, C channel.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import repeat
from flax import nnx
from jaxtyping import Array, Float

from lattejax.models.convolution import Chain, conv
from lattejax.ranges import Depth, Size, check_ranges


@dataclasses.dataclass(frozen=True)
class TAESDConfig:
    """Geometry; the defaults are TAESD3's."""

    width: Size = 64
    encoder_blocks: tuple[Depth, ...] = (1, 3, 3, 3)  # at each resolution, from the image to the latents
    decoder_blocks: tuple[Depth, ...] = (3, 3, 3, 1)  # and back
    in_channels: Size = 3
    latent_channels: Size = 16

    def __post_init__(self):
        check_ranges(self)

    @property
    def compression(self) -> int:
        """Pixels of an image along one side of a latent."""
        return 2 ** (len(self.encoder_blocks) - 1)


class ReLU(nnx.Module):
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return jax.nn.relu(x)


class Double(nnx.Module):
    """Repeats each pixel twice in both directions."""

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return repeat(x, "B H W C -> B (H r) (W s) C", r=2, s=2)


class Block(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        first, second, third = (conv(width, width, 3, rngs) for _ in range(3))
        self.conv = Chain([first, ReLU(), second, ReLU(), third])

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return jax.nn.relu(self.conv(x) + x)


class Encoder(nnx.Module):
    def __init__(self, config: TAESDConfig, *, rngs: nnx.Rngs):
        layers = [conv(config.in_channels, config.width, 3, rngs)]
        for i, count in enumerate(config.encoder_blocks):
            if i:
                layers.append(conv(config.width, config.width, 3, rngs, strides=2, use_bias=False))
            layers.extend(Block(config.width, rngs=rngs) for _ in range(count))
        layers.append(conv(config.width, config.latent_channels, 3, rngs))
        self.layers = Chain(layers)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        return self.layers((images + 1) / 2)


class Decoder(nnx.Module):
    def __init__(self, config: TAESDConfig, *, rngs: nnx.Rngs):
        layers = [conv(config.latent_channels, config.width, 3, rngs), ReLU()]
        *inner, last = config.decoder_blocks
        for count in inner:
            layers.extend(Block(config.width, rngs=rngs) for _ in range(count))
            layers.extend([Double(), conv(config.width, config.width, 3, rngs, use_bias=False)])
        layers.extend(Block(config.width, rngs=rngs) for _ in range(last))
        layers.append(conv(config.width, config.in_channels, 3, rngs))
        self.layers = Chain(layers)

    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        return self.layers(jnp.tanh(latents / 3) * 3) * 2 - 1
