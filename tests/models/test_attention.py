"""Attention in blocks of queries against attention in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lattejax.models.attention import attention


@pytest.mark.parametrize("rows", [True, False], ids=["a mask for each query", "one mask for all"])
@pytest.mark.parametrize("most_scores", [1, 13, 3 * 13, 5 * 13, 11 * 13])
def test_blocks_of_queries_change_nothing(most_scores, rows):
    """Blocks that divide the 11 queries and blocks that do not; masks, grouped heads, and gradients."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, length, heads, 8), np.float32) for length, heads in ((11, 4), (13, 2), (13, 2)))
    mask = rng.random((2, 11 if rows else 1, 13)) < 0.6
    mask[..., 0] = True
    q, k, v, mask = map(jnp.asarray, (q, k, v, mask))

    def total(q, k, v, most):
        return (attention(q, k, v, mask, most) ** 2).sum()

    expected, blocks = (attention(q, k, v, mask, most) for most in (11 * 13, most_scores))
    np.testing.assert_allclose(blocks, expected, rtol=1e-6, atol=1e-6)
    gradients = [jax.grad(total, argnums=(0, 1, 2))(q, k, v, most) for most in (11 * 13, most_scores)]
    for ours, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
