"""Shared by the convolutional autoencoders: a convolution with PyTorch's padding, and a chain of modules.

Axes: B batch, H row, W column, C channel.
"""

import functools
from collections.abc import Iterator, Sequence

from flax import nnx
from jaxtyping import Array, Float


def conv(inputs: int, outputs: int, kernel: int, rngs: nnx.Rngs, **settings) -> nnx.Conv:
    """A convolution padded on all sides by half its kernel, also if it is strided."""
    return nnx.Conv(inputs, outputs, (kernel, kernel), padding=kernel // 2, rngs=rngs, **settings)


class Chain(nnx.Module):
    """Modules under the names 0, 1, …"""

    def __init__(self, modules: Sequence[nnx.Module]):
        self.length = len(modules)
        for i, module in enumerate(modules):
            setattr(self, str(i), module)

    def __iter__(self) -> Iterator[nnx.Module]:
        return (getattr(self, str(i)) for i in range(self.length))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        return functools.reduce(lambda x, module: module(x), self, x)
