"""The Inception network of 2015, whose features the scores of pictures are computed from.

It is not the published Inception v3: average pools leave the padding out of the mean, and the last block has a maximum
pool at the place of its average pool. Pictures are resized as TensorFlow 1 did. Modules and their attributes have the
names of the circulating weights, so a weight's path here is its name there.

References: Rethinking the Inception Architecture (arXiv 1512.00567); the graph classify_image_graph_def.pb; the ports
pytorch-fid and torch-fidelity.

Axes: B batch, H row, W column, C channel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

SIDE = 299  # of the pictures that the network sees
CLASSES = 1008
POOL, SPATIAL = 2048, 17 * 17 * 7  # features of a picture
SPATIAL_CHANNELS = 7
EPSILON = 1e-3  # of batch norms
PRECISION = jax.lax.Precision.HIGHEST  # a TPU's default moves an FID in its second digit


class Features(NamedTuple):
    """What the scores need of each picture."""

    pool: Float[Array, "B 2048"]  # pool_3: FID, precision and recall
    spatial: Float[Array, "B 2023"]  # the first 7 channels of mixed_6/conv, flattened height, width, channel: sFID
    logits: Float[Array, "B 1008"]  # without bias: the Inception Score


# ---- Resizing


def source_pixels(size: int, resized: int) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The two pixels that each pixel of a resized axis lies between, and the second's weight, in float32."""
    places = np.arange(resized, dtype=np.float32) * np.float32(size / resized)
    lower = np.minimum(places.astype(np.int32), size - 1)
    return lower, np.minimum(lower + 1, size - 1), places - lower.astype(np.float32)


@jax.jit
def resize(images: UInt8[Array, "B H W 3"] | Float[Array, "B H W 3"]) -> Float[Array, "B 299 299 3"]:
    """Resizes pictures of any size as TensorFlow 1's bilinear interpolation does: pixel i comes from i·in/out.

    No half-pixel centres and no smoothing, so `jax.image.resize` gives something else.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        lower, upper, weight = source_pixels(x.shape[axis], SIDE)
        low, high = jnp.take(x, lower, axis), jnp.take(x, upper, axis)
        x = low + (high - low) * jnp.expand_dims(weight, [i for i in range(4) if i != axis])
    return x


# ---- Parts


class Unit(nnx.Module):
    """A convolution without bias, a batch norm with its running averages, and ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rows: int,
        columns: int,
        *,
        rngs: nnx.Rngs,
        strides: int = 1,
        padding: str = "SAME",
    ):
        settings = dict(strides=strides, padding=padding, use_bias=False, precision=PRECISION, rngs=rngs)
        self.conv = nnx.Conv(inputs, outputs, (rows, columns), **settings)
        self.bn = nnx.BatchNorm(outputs, use_running_average=True, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        return jax.nn.relu(self.bn(self.conv(x)))


def chain(x: Float[Array, "B H W C"], *units: Unit) -> Float[Array, "B h w c"]:
    for unit in units:
        x = unit(x)
    return x


def concatenate(*branches: Float[Array, "B H W _"]) -> Float[Array, "B H W C"]:
    return jnp.concatenate(branches, axis=-1)


def average(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """The mean of 3×3 pixels, without those outside."""
    return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def halve(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """The maximum of every second 3×3 pixels."""
    return nnx.max_pool(x, (3, 3), (2, 2))


class BlockA(nnx.Module):
    """35×35 pixels."""

    def __init__(self, inputs: int, pooled: int, *, rngs: nnx.Rngs):
        self.branch1x1 = Unit(inputs, 64, 1, 1, rngs=rngs)
        self.branch5x5_1 = Unit(inputs, 48, 1, 1, rngs=rngs)
        self.branch5x5_2 = Unit(48, 64, 5, 5, rngs=rngs)
        self.branch3x3dbl_1 = Unit(inputs, 64, 1, 1, rngs=rngs)
        self.branch3x3dbl_2 = Unit(64, 96, 3, 3, rngs=rngs)
        self.branch3x3dbl_3 = Unit(96, 96, 3, 3, rngs=rngs)
        self.branch_pool = Unit(inputs, pooled, 1, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W c"]:
        return concatenate(
            self.branch1x1(x),
            chain(x, self.branch5x5_1, self.branch5x5_2),
            chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            self.branch_pool(average(x)),
        )


class BlockB(nnx.Module):
    """From 35×35 to 17×17 pixels."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.branch3x3 = Unit(inputs, 384, 3, 3, strides=2, padding="VALID", rngs=rngs)
        self.branch3x3dbl_1 = Unit(inputs, 64, 1, 1, rngs=rngs)
        self.branch3x3dbl_2 = Unit(64, 96, 3, 3, rngs=rngs)
        self.branch3x3dbl_3 = Unit(96, 96, 3, 3, strides=2, padding="VALID", rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        double = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return concatenate(self.branch3x3(x), double, halve(x))


class BlockC(nnx.Module):
    """17×17 pixels; `width` channels between the convolutions."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        inputs = 768
        self.branch1x1 = Unit(inputs, 192, 1, 1, rngs=rngs)
        self.branch7x7_1 = Unit(inputs, width, 1, 1, rngs=rngs)
        self.branch7x7_2 = Unit(width, width, 1, 7, rngs=rngs)
        self.branch7x7_3 = Unit(width, 192, 7, 1, rngs=rngs)
        self.branch7x7dbl_1 = Unit(inputs, width, 1, 1, rngs=rngs)
        self.branch7x7dbl_2 = Unit(width, width, 7, 1, rngs=rngs)
        self.branch7x7dbl_3 = Unit(width, width, 1, 7, rngs=rngs)
        self.branch7x7dbl_4 = Unit(width, width, 7, 1, rngs=rngs)
        self.branch7x7dbl_5 = Unit(width, 192, 1, 7, rngs=rngs)
        self.branch_pool = Unit(inputs, 192, 1, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        double = [getattr(self, f"branch7x7dbl_{i}") for i in range(1, 6)]
        return concatenate(
            self.branch1x1(x),
            chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            chain(x, *double),
            self.branch_pool(average(x)),
        )


class BlockD(nnx.Module):
    """From 17×17 to 8×8 pixels."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.branch3x3_1 = Unit(inputs, 192, 1, 1, rngs=rngs)
        self.branch3x3_2 = Unit(192, 320, 3, 3, strides=2, padding="VALID", rngs=rngs)
        self.branch7x7x3_1 = Unit(inputs, 192, 1, 1, rngs=rngs)
        self.branch7x7x3_2 = Unit(192, 192, 1, 7, rngs=rngs)
        self.branch7x7x3_3 = Unit(192, 192, 7, 1, rngs=rngs)
        self.branch7x7x3_4 = Unit(192, 192, 3, 3, strides=2, padding="VALID", rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        seven = [getattr(self, f"branch7x7x3_{i}") for i in range(1, 5)]
        return concatenate(chain(x, self.branch3x3_1, self.branch3x3_2), chain(x, *seven), halve(x))


class BlockE(nnx.Module):
    """8×8 pixels. The last one has a maximum pool: a slip in the graph, which everyone's scores have since."""

    def __init__(self, inputs: int, is_last: bool, *, rngs: nnx.Rngs):
        self.is_last = is_last
        self.branch1x1 = Unit(inputs, 320, 1, 1, rngs=rngs)
        self.branch3x3_1 = Unit(inputs, 384, 1, 1, rngs=rngs)
        self.branch3x3_2a = Unit(384, 384, 1, 3, rngs=rngs)
        self.branch3x3_2b = Unit(384, 384, 3, 1, rngs=rngs)
        self.branch3x3dbl_1 = Unit(inputs, 448, 1, 1, rngs=rngs)
        self.branch3x3dbl_2 = Unit(448, 384, 3, 3, rngs=rngs)
        self.branch3x3dbl_3a = Unit(384, 384, 1, 3, rngs=rngs)
        self.branch3x3dbl_3b = Unit(384, 384, 3, 1, rngs=rngs)
        self.branch_pool = Unit(inputs, 192, 1, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W c"]:
        single, double = self.branch3x3_1(x), chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = nnx.max_pool(x, (3, 3), (1, 1), "SAME") if self.is_last else average(x)
        return concatenate(
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        )


# ---- The network


class Inception(nnx.Module):
    """Pictures of 299×299 pixels to features."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 3, strides=2, padding="VALID", rngs=rngs)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, 3, padding="VALID", rngs=rngs)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, 3, rngs=rngs)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1, 1, rngs=rngs)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, 3, padding="VALID", rngs=rngs)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            BlockA(inputs, pooled, rngs=rngs) for inputs, pooled in ((192, 32), (256, 64), (288, 64))
        )
        self.Mixed_6a = BlockB(288, rngs=rngs)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            BlockC(width, rngs=rngs) for width in (128, 160, 160, 192)
        )
        self.Mixed_7a = BlockD(768, rngs=rngs)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, False, rngs=rngs), BlockE(2048, True, rngs=rngs)
        self.fc = nnx.Linear(POOL, CLASSES, precision=PRECISION, rngs=rngs)

    def __call__(self, images: Float[Array, "B 299 299 3"]) -> Features:
        """Takes pictures in [0, 255], already resized."""
        x = (images - 128) / 128
        x = halve(chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3))
        x = halve(chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        # The graph counts its blocks from mixed, which is Mixed_5b: its mixed_6 is Mixed_6d.
        spatial = rearrange(self.Mixed_6d.branch1x1(x)[..., :SPATIAL_CHANNELS], "B H W C -> B (H W C)")
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pool = jnp.mean(self.Mixed_7c(self.Mixed_7b(x)), axis=(1, 2))
        logits = jnp.matmul(pool, self.fc.kernel[...], precision=PRECISION)
        return Features(pool, spatial, logits)
