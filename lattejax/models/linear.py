"""The linear map of all transformers here.

Its weight stands as [outputs, inputs], as in PyTorch and not as in Flax: on CPUs a product with few rows of x, such as
a decoded token or the 64 tokens of an image, is faster so.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

lecun_normal = nnx.initializers.lecun_normal()
zeros = nnx.initializers.zeros


class Linear(nnx.Module):
    """x · weightᵀ + bias; weights start lecun-normal or as `init` says, the bias at zero."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool = True,
        init: nnx.initializers.Initializer = lecun_normal,
        rngs: nnx.Rngs,
    ):
        self.weight = nnx.Param(init(rngs.params(), (inputs, outputs)).T)
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        weight = self.weight[...]
        # One axis of rows: summing over several, CPUs would turn the operands of the weight's gradient in memory first.
        y = jnp.einsum("ri,oi->ro", x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], len(weight))
        return y if self.bias is None else y + self.bias[...]
