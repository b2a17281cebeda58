"""The linear map, against Flax's."""

import jax
import numpy as np
from flax import nnx

from lattejax.models.linear import Linear


def test_it_is_flaxs_linear_with_its_weight_turned():
    ours, theirs = Linear(5, 3, rngs=nnx.Rngs(7)), nnx.Linear(5, 3, rngs=nnx.Rngs(7))
    np.testing.assert_array_equal(ours.weight[...], theirs.kernel[...].T)
    theirs.bias[...] = ours.bias[...] = np.arange(3.0)
    x = jax.random.normal(jax.random.key(0), (2, 4, 5))
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-6)
