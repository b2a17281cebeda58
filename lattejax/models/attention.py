"""Attention whose scores take a bounded amount of memory, for any sequence length. The caller's mask is not bounded.

Axes: B batch, T query, S key, H query head, G KV head, d head dimension.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Scores [T, S] of one head in memory at a time. A twelve-megapixel photo has 62,000 patches, and so 4e9 scores.
MOST_SCORES = 1 << 24


def attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S G d"],
    v: Float[Array, "B S G d"],
    mask: Bool[Array, "B T S"] | Bool[Array, "B 1 S"],
    most_scores: int = MOST_SCORES,
) -> Float[Array, "B T H d"]:
    """`jax.nn.dot_product_attention` in blocks of queries, so that no head has more than `most_scores` scores at a
    time."""
    length, block = q.shape[1], max(1, most_scores // k.shape[1])
    if length <= block:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    count = -(-length // block)

    def blocks(x: Array) -> Array:  # [B, T, …] -> [count, B, block, …]
        x = jnp.pad(x, [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)

    def one(part: tuple[Array, Array]) -> Array:
        q, mask = part
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])

    if mask.shape[1] == 1:
        mixed = jax.lax.map(lambda q: one((q, mask)), blocks(q))
    else:
        mixed = jax.lax.map(one, (blocks(q), blocks(mask)))
    return jnp.moveaxis(mixed, 0, 1).reshape(q.shape[0], count * block, *q.shape[2:])[:, :length]
