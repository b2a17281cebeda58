"""The linear map, against Flax's."""

import jax
import numpy as np
import pytest
from flax import nnx

from lattejax.models.linear import Linear


@pytest.mark.parametrize("rows", [(), (0,), (1,), (2, 4), (3, 1, 2)], ids=repr)
def test_it_is_flaxs_linear_with_its_weight_turned(rows):
    ours, theirs = Linear(5, 3, rngs=nnx.Rngs(7)), nnx.Linear(5, 3, rngs=nnx.Rngs(7))
    np.testing.assert_array_equal(ours.weight[...], theirs.kernel[...].T)
    theirs.bias[...] = ours.bias[...] = np.arange(3.0)
    x = jax.random.normal(jax.random.key(0), (*rows, 5))
    assert ours(x).shape == (*rows, 3)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-6)
