"""The linear map, against Flax's."""

import jax
import numpy as np
import pytest
from flax import nnx

from lattejax.models.linear import Linear


@pytest.mark.parametrize("outputs", [(6,), (2, 3), (1, 3, 2)], ids=repr)
@pytest.mark.parametrize("rows", [(), (0,), (1,), (2, 4), (3, 1, 2)], ids=repr)
def test_it_equals_flaxs_linear_with_a_transposed_weight(rows, outputs):
    """Outputs may have several axes; they are Flax's outputs in order."""
    ours, theirs = Linear(5, *outputs, rngs=nnx.Rngs(7)), nnx.Linear(5, 6, rngs=nnx.Rngs(7))
    assert ours.weight.shape == (*outputs, 5)
    np.testing.assert_array_equal(ours.weight[...].reshape(6, 5), theirs.kernel[...].T)
    theirs.bias[...], ours.bias[...] = np.arange(6.0), np.arange(6.0).reshape(outputs)
    x = jax.random.normal(jax.random.key(0), (*rows, 5))
    assert ours(x).shape == (*rows, *outputs)
    np.testing.assert_allclose(ours(x).reshape(*rows, 6), theirs(x), rtol=1e-6)
