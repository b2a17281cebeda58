"""DC-AE, the deep-compression autoencoder: images to latents with sides 32 times shorter, and back.

Follows DC-AE (arXiv 2410.10733) and its implementation in diffusers (AutoencoderDC). Both published families are
supported: `in-1.0` (pixel shuffles, no multi-scale tokens, batch norm in the decoder) and `sana-1.0` (strided
convolutions and interpolation, 5×5 multi-scale tokens). Modules and their attributes have diffusers' names, so a
weight's path here is its name there. Batch norms use their running averages: the autoencoder is not trained.

Axes: B batch, H row, W column, C channel, G attention group, N pixel, d head dimension.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Array, Float

from lattejax.models.convolution import Chain, conv
from lattejax.ranges import Depth, Range, Size, check_ranges

EPSILON = 1e-5  # of all norms
ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu}
BLOCKS = ("ResBlock", "EfficientViTBlock")
NORMS = ("rms_norm", "batch_norm")
Kernel = Annotated[int, Range(1, 99)]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks at one resolution; `depth` 0 omits the stage, which is allowed only for the first."""

    width: Size
    depth: Depth
    block: str = "ResBlock"
    norm: str = "rms_norm"
    activation: str = "silu"
    multiscales: tuple[Kernel, ...] = ()  # kernel sizes of the convolutions that make additional tokens for attention

    def __post_init__(self):
        check_ranges(self)
        for name, known in (("block", BLOCKS), ("norm", NORMS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {list(known)}")


@dataclasses.dataclass(frozen=True)
class DCAEConfig:
    """Geometry; stages are listed from the image to the latents, also for the decoder."""

    encoder: tuple[Stage, ...]
    decoder: tuple[Stage, ...]
    in_channels: Size = 3
    latent_channels: Size = 32
    head_dim: Size = 32
    unshuffle: bool = True  # down by moving pixels to channels; otherwise by a strided convolution
    shuffle: bool = True  # up by moving channels to pixels; otherwise by repeating pixels
    encoder_shortcut: bool = True  # around the encoder's last convolution
    decoder_shortcut: bool = True  # around the decoder's first
    last_activation: str = "relu"

    def __post_init__(self):
        check_ranges(self)
        if self.last_activation not in ACTIVATIONS:
            raise ValueError(f"last_activation={self.last_activation!r} is unknown; use one of {list(ACTIVATIONS)}")
        if len(self.encoder) != len(self.decoder):
            raise ValueError(f"the encoder has {len(self.encoder)} stages, the decoder {len(self.decoder)}")
        if any(stage.depth == 0 for stage in (*self.encoder[1:], *self.decoder[1:])):
            raise ValueError("only the first stage may be omitted (depth 0)")

    @property
    def compression(self) -> int:
        """Pixels of an image along one side of a latent."""
        return 2 ** (len(self.encoder) - 1)


def unshuffle(x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
    """Moves each square of 2×2 pixels into channels, in PyTorch's order."""
    return rearrange(x, "B (h r) (w s) C -> B h w (C r s)", r=2, s=2)


def shuffle(x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
    """The inverse of `unshuffle`."""
    return rearrange(x, "B h w (C r s) -> B (h r) (w s) C", r=2, s=2)


def average(x: Float[Array, "B H W C"], channels: int) -> Float[Array, "B H W c"]:
    """Averages groups of neighbouring channels; returns `channels` of them."""
    return reduce(x, "B H W (c group) -> B H W c", "mean", c=channels)


def spread(x: Float[Array, "B H W C"], channels: int) -> Float[Array, "B H W c"]:
    """Repeats each channel; returns `channels` of them."""
    return repeat(x, "B H W C -> B H W (C times)", times=channels // x.shape[-1])


class RMSNorm(nnx.Module):
    """RMS norm over channels, with scale and bias."""

    def __init__(self, channels: int):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        variance = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(variance + EPSILON)).astype(x.dtype) * self.scale[...] + self.bias[...]


def norm(kind: str, channels: int, rngs: nnx.Rngs) -> nnx.Module:
    if kind == "batch_norm":
        return nnx.BatchNorm(channels, use_running_average=True, epsilon=EPSILON, rngs=rngs)
    return RMSNorm(channels)


class ResBlock(nnx.Module):
    def __init__(self, stage: Stage, *, rngs: nnx.Rngs):
        self.conv1 = conv(stage.width, stage.width, 3, rngs)
        self.conv2 = conv(stage.width, stage.width, 3, rngs, use_bias=False)
        self.norm = norm(stage.norm, stage.width, rngs)
        self.activation = ACTIVATIONS[stage.activation]

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x + self.norm(self.conv2(self.activation(self.conv1(x))))


class MultiscaleProjection(nnx.Module):
    """Tokens of a larger neighbourhood: a convolution within each channel, then a linear map within each head."""

    def __init__(self, channels: int, heads: int, kernel: int, *, rngs: nnx.Rngs):
        self.proj_in = conv(channels, channels, kernel, rngs, feature_group_count=channels, use_bias=False)
        self.proj_out = conv(channels, channels, 1, rngs, feature_group_count=heads, use_bias=False)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.proj_out(self.proj_in(x))


class LinearAttention(nnx.Module):
    """Attention by ReLU kernels, whose cost is linear in the number of pixels."""

    def __init__(self, stage: Stage, head_dim: int, *, rngs: nnx.Rngs):
        heads = stage.width // head_dim
        width = heads * head_dim
        self.to_q, self.to_k, self.to_v = (nnx.Linear(stage.width, width, use_bias=False, rngs=rngs) for _ in range(3))
        self.to_qkv_multiscale = Chain(
            [MultiscaleProjection(3 * width, 3 * heads, kernel, rngs=rngs) for kernel in stage.multiscales]
        )
        self.to_out = nnx.Linear(width * (1 + len(stage.multiscales)), stage.width, use_bias=False, rngs=rngs)
        self.norm_out = norm(stage.norm, stage.width, rngs)
        self.head_dim = head_dim

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        height, width = x.shape[1:3]
        tokens = jnp.concatenate([self.to_q(x), self.to_k(x), self.to_v(x)], axis=-1)
        tokens = jnp.concatenate([tokens, *(scale(tokens) for scale in self.to_qkv_multiscale)], axis=-1)
        # Consecutive channels form groups of [q | k | v]: the output of to_q is not only queries.
        groups = rearrange(tokens, "B H W (G channels) -> B G (H W) channels", channels=3 * self.head_dim)
        q, k, v = jnp.split(groups.astype(jnp.float32), 3, axis=-1)
        mixed = mix(jax.nn.relu(q), jax.nn.relu(k), v, linear=height * width > self.head_dim)
        mixed = rearrange(mixed.astype(x.dtype), "B G (H W) d -> B H W (G d)", H=height)
        return x + self.norm_out(self.to_out(mixed))


def mix(
    q: Float[Array, "B G N d"], k: Float[Array, "B G N d"], v: Float[Array, "B G N d"], linear: bool
) -> Float[Array, "B G N d"]:
    """Averages values with weights q·k; the two methods differ in cost and in rounding."""
    least = 1e-15
    if linear:
        values = jnp.pad(v, [(0, 0)] * 3 + [(0, 1)], constant_values=1.0)  # the last one sums the weights
        memory = jnp.einsum("BGNd,BGNe->BGde", k, values)
        mixed = jnp.einsum("BGNd,BGde->BGNe", q, memory)
        return mixed[..., :-1] / (mixed[..., -1:] + least)
    weights = jnp.einsum("BGNd,BGMd->BGNM", q, k)
    return jnp.einsum("BGNM,BGMd->BGNd", weights / (weights.sum(axis=-1, keepdims=True) + least), v)


class GatedConv(nnx.Module):
    """The feed-forward half: up to eight times the width, a 3×3 convolution within channels, a gate, and back."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv_inverted = conv(width, 8 * width, 1, rngs)
        self.conv_depth = conv(8 * width, 8 * width, 3, rngs, feature_group_count=8 * width)
        self.conv_point = conv(4 * width, width, 1, rngs, use_bias=False)
        self.norm = RMSNorm(width)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        hidden, gate = jnp.split(self.conv_depth(jax.nn.silu(self.conv_inverted(x))), 2, axis=-1)
        return x + self.norm(self.conv_point(hidden * jax.nn.silu(gate)))


class EfficientViTBlock(nnx.Module):
    def __init__(self, stage: Stage, head_dim: int, *, rngs: nnx.Rngs):
        self.attn = LinearAttention(stage, head_dim, rngs=rngs)
        self.conv_out = GatedConv(stage.width, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.conv_out(self.attn(x))


class Down(nnx.Module):
    """To half the height and width."""

    def __init__(self, inputs: int, outputs: int, unshuffles: bool, shortcut: bool, *, rngs: nnx.Rngs):
        self.conv = conv(inputs, outputs // 4 if unshuffles else outputs, 3, rngs, strides=1 if unshuffles else 2)
        self.unshuffles, self.shortcut, self.outputs = unshuffles, shortcut, outputs

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        y = self.conv(x)
        y = unshuffle(y) if self.unshuffles else y
        return y + average(unshuffle(x), self.outputs) if self.shortcut else y


class Up(nnx.Module):
    """To twice the height and width."""

    def __init__(self, inputs: int, outputs: int, shuffles: bool, shortcut: bool, *, rngs: nnx.Rngs):
        self.conv = conv(inputs, 4 * outputs if shuffles else outputs, 3, rngs)
        self.shuffles, self.shortcut, self.outputs = shuffles, shortcut, outputs

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        y = shuffle(self.conv(x)) if self.shuffles else self.conv(repeat(x, "B H W C -> B (H r) (W s) C", r=2, s=2))
        return y + shuffle(spread(x, 4 * self.outputs)) if self.shortcut else y


def blocks(stage: Stage, head_dim: int, rngs: nnx.Rngs) -> list[nnx.Module]:
    if stage.block == "ResBlock":
        return [ResBlock(stage, rngs=rngs) for _ in range(stage.depth)]
    return [EfficientViTBlock(stage, head_dim, rngs=rngs) for _ in range(stage.depth)]


class Encoder(nnx.Module):
    def __init__(self, config: DCAEConfig, *, rngs: nnx.Rngs):
        first, second = config.encoder[:2]
        if first.depth:
            self.conv_in = conv(config.in_channels, first.width, 3, rngs)
        else:
            self.conv_in = Down(config.in_channels, second.width, config.unshuffle, shortcut=False, rngs=rngs)
        stages = []
        for i, stage in enumerate(config.encoder):
            modules = blocks(stage, config.head_dim, rngs)
            if stage.depth and i + 1 < len(config.encoder):
                modules.append(Down(stage.width, config.encoder[i + 1].width, config.unshuffle, True, rngs=rngs))
            stages.append(Chain(modules))
        self.down_blocks = Chain(stages)
        self.conv_out = conv(config.encoder[-1].width, config.latent_channels, 3, rngs)
        self.shortcut, self.latent_channels = config.encoder_shortcut, config.latent_channels

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        x = self.down_blocks(self.conv_in(images))
        return self.conv_out(x) + average(x, self.latent_channels) if self.shortcut else self.conv_out(x)


class Decoder(nnx.Module):
    def __init__(self, config: DCAEConfig, *, rngs: nnx.Rngs):
        widths = [stage.width for stage in config.decoder]
        self.conv_in = conv(config.latent_channels, widths[-1], 3, rngs)
        stages = []
        for i, stage in enumerate(config.decoder):
            modules = blocks(stage, config.head_dim, rngs)
            if stage.depth and i + 1 < len(widths):
                modules.insert(0, Up(widths[i + 1], stage.width, config.shuffle, True, rngs=rngs))
            stages.append(Chain(modules))
        self.up_blocks = Chain(stages)
        last = widths[0] if config.decoder[0].depth else widths[1]
        self.norm_out = RMSNorm(last)
        if config.decoder[0].depth:
            self.conv_out = conv(last, config.in_channels, 3, rngs)
        else:
            self.conv_out = Up(last, config.in_channels, config.shuffle, shortcut=False, rngs=rngs)
        self.activation = ACTIVATIONS[config.last_activation]
        self.shortcut, self.width = config.decoder_shortcut, widths[-1]

    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        x = self.conv_in(latents)
        x = x + spread(latents, self.width) if self.shortcut else x
        for stage in reversed(list(self.up_blocks)):
            x = stage(x)
        return self.conv_out(self.activation(self.norm_out(x)))
