"""The linear map of all transformers here.

Its weight is [outputs, inputs], as in PyTorch and unlike Flax: on CPUs this makes a product with few rows of x, such as
a decoded token or the 64 tokens of an image, faster. Outputs may have several axes: attention projections have an axis
of heads, so that a mesh shards complete heads.
"""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

lecun_normal = nnx.initializers.lecun_normal()
zeros = nnx.initializers.zeros


class Linear(nnx.Module):
    """x · weightᵀ + bias; weights start lecun-normal or as `init` defines, the bias at zero."""

    def __init__(
        self,
        inputs: int,
        *outputs: int,
        use_bias: bool = True,
        init: nnx.initializers.Initializer = lecun_normal,
        rngs: nnx.Rngs,
    ):
        self.weight = nnx.Param(init(rngs.params(), (inputs, math.prod(outputs))).T.reshape(*outputs, inputs))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "..."]:
        """Returns y [*rows, *outputs]."""
        # Rows on one axis: to sum over several, CPUs would first transpose the operands of the weight's gradient.
        # Outputs on one axis, also for CPUs; but merging an axis before the heads would hide the heads from a mesh.
        weight = self.weight[...]
        flat = weight.reshape(*weight.shape[:-3], -1, weight.shape[-1])
        y = jnp.einsum("ri,...oi->r...o", x.reshape(-1, x.shape[-1]), flat)
        y = y.reshape(*x.shape[:-1], *weight.shape[:-1])
        return y if self.bias is None else y + self.bias[...]
