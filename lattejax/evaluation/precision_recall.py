"""Precision and recall of generated pictures by balls around features (Kynkäänniemi et al., arXiv 1904.06991).

A ball around a feature reaches to its third nearest neighbour of the same set. Precision is the share of samples inside
a ball of the reference, recall the share of the reference inside a ball of the samples. Distances are computed a pair
of blocks at a time, on this process's devices, so that memory does not grow with the number of pictures.

Axes: n, m features of two blocks, d dimension.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

NEIGHBOURS = 3
DISTANCES = "float32"  # as it is recorded
ROWS = "rows"  # the mesh axis that the first block's features are sharded over


class Blocks(Protocol):
    """Features in blocks, which are read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Float[np.ndarray, "n d"]: ...


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(samples: Blocks, reference: Blocks) -> PrecisionRecall:
    """Returns both.

    Raises:
      ValueError: a set has three features or fewer.
    """
    samples, reference = _Padded(samples), _Padded(reference)
    sample_radii, reference_radii = _radii(samples), _radii(reference)
    inside, covered = ([np.zeros(blocks.rows, bool) for _ in blocks.counts] for blocks in (samples, reference))
    for i in range(len(samples)):
        u = samples[i]
        for j in range(len(reference)):
            found = _coverage(u, reference[j], sample_radii[i], reference_radii[j])
            inside[i] |= np.asarray(found[0])
            covered[j] |= np.asarray(found[1])
    return PrecisionRecall(samples.mean(inside), reference.mean(covered))


class _Padded:
    """Blocks on the devices, padded to one size, so that one program serves all pairs."""

    def __init__(self, blocks: Blocks):
        devices = np.array(jax.local_devices())
        self._blocks, self._sharding = blocks, NamedSharding(Mesh(devices, (ROWS,)), PartitionSpec(ROWS))
        self.counts = [len(blocks[i]) for i in range(len(blocks))]
        self.rows = -(-max(self.counts) // len(devices)) * len(devices)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> tuple[Float[Array, "n d"], Bool[Array, "n"]]:
        """A block's features, and which of its rows they are."""
        features, count = self._blocks[index], self.counts[index]
        padded = np.zeros((self.rows, features.shape[1]), np.float32)
        padded[:count] = features
        return jax.device_put((padded, np.arange(self.rows) < count), self._sharding)

    def mean(self, shares: list[Bool[np.ndarray, "n"]]) -> float:
        return float(np.mean(np.concatenate([x[:count] for x, count in zip(shares, self.counts, strict=True)])))


def _radii(blocks: _Padded) -> list[Float[Array, "n"]]:
    """The squared distance of each feature to its third nearest neighbour; each pair of blocks is visited once."""
    if sum(blocks.counts) <= NEIGHBOURS:
        raise ValueError(f"{sum(blocks.counts)} features have no balls; each set needs more than {NEIGHBOURS}")
    nearest = [jnp.full((blocks.rows, NEIGHBOURS + 1), jnp.inf)] * len(blocks)  # itself too, at distance 0
    for i in range(len(blocks)):
        u = blocks[i]
        nearest[i], _ = _nearest(u, u, nearest[i], nearest[i])
        for j in range(i + 1, len(blocks)):
            nearest[i], nearest[j] = _nearest(u, blocks[j], nearest[i], nearest[j])
    return [each[:, -1] for each in nearest]


Block = tuple[Float[Array, "n d"], Bool[Array, "n"]]


def _squared_distances(u: Float[Array, "n d"], v: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|u|² − 2·u·v + |v|², the original evaluator's formula, in float32; it casts the features to float16."""
    product = jnp.matmul(u, v.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(u * u, axis=1)[:, None] - 2 * product + jnp.sum(v * v, axis=1), 0)


@jax.jit
def _nearest(
    u: Block, v: Block, nearest_u: Float[Array, "n k"], nearest_v: Float[Array, "m k"]
) -> tuple[Float[Array, "n k"], Float[Array, "m k"]]:
    """Updates the k smallest squared distances of each block's features with those to the other block's."""
    distances = _squared_distances(u[0], v[0])

    def update(nearest: Array, found: Array, exist: Array) -> Array:
        candidates = jnp.concatenate([nearest, jnp.where(exist, found, jnp.inf)], axis=1)
        return -jax.lax.top_k(-candidates, nearest.shape[1])[0]

    return update(nearest_u, distances, v[1]), update(nearest_v, distances.T, u[1])


@jax.jit
def _coverage(
    u: Block, v: Block, radii_u: Float[Array, "n"], radii_v: Float[Array, "m"]
) -> tuple[Bool[Array, "n"], Bool[Array, "m"]]:
    """Which of u lie in a ball of v, and which of v in a ball of u."""
    distances = _squared_distances(u[0], v[0])
    in_ball_of_v = jnp.any((distances <= radii_v) & v[1], axis=1)
    in_ball_of_u = jnp.any((distances <= radii_u[:, None]) & u[1][:, None], axis=0)
    return in_ball_of_v, in_ball_of_u
