"""The paper's timestep intervals: which group of layers owns which part of the flow.

LaTtE-Flow (arXiv 2506.06952), "layerwise timestep experts": the L layers are cut into K groups of consecutive layers,
and group k owns the flow times [edge_k, edge_{k+1}), the last one closed. Time runs from noise at t = 0 to the image at
t = 1, so group 0 owns the noisiest interval. One edge table serves training, sampling and evaluation; step times are
computed from their index, never accumulated.

Axes: K group, b rows of one group.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# For each group, the (start, end) of the steps that it runs.
Schedule = tuple[tuple[tuple[float, float], ...], ...]


@dataclasses.dataclass(frozen=True)
class Intervals:
    """The edge table: K + 1 rising numbers from 0 to 1."""

    edges: tuple[float, ...]

    @classmethod
    def equal(cls, num_groups: int) -> "Intervals":
        return cls(tuple(k / num_groups for k in range(num_groups + 1)))

    @property
    def num_groups(self) -> int:
        return len(self.edges) - 1

    @property
    def lengths(self) -> tuple[float, ...]:
        return tuple(float(length) for length in np.diff(self.edges))

    def group_of(self, t: float | np.ndarray) -> np.ndarray:
        """Returns the group that owns flow time t; on the host, in float64."""
        return np.clip(np.searchsorted(self.edges, t, side="right") - 1, 0, self.num_groups - 1)

    def draw(self, u: Float[Array, "K b"]) -> Float[Array, "K b"]:
        """Maps uniform draws in [0, 1) to flow times, row k into group k's interval, for a uniform density of t.

        Rounding never carries a draw out of its interval: it is held between the first and the last number of u's
        precision that `group_of` gives to the group.
        """
        edges = np.asarray(self.edges)
        low, high = edges[:-1].astype(u.dtype), edges[1:].astype(u.dtype)
        first = np.where(low < edges[:-1], np.nextafter(low, np.inf, dtype=u.dtype), low)
        last = np.where(high >= edges[1:], np.nextafter(high, -np.inf, dtype=u.dtype), high)
        t = low[:, None] + (high - low)[:, None] * u
        return jnp.clip(t, first[:, None], last[:, None])

    def weights(self) -> np.ndarray:
        """The weight K·P_k of group k's examples, P_k being its share of the density of t.

        Every group gets an equal share of each batch, whatever its interval's length; so weighted, the batch's mean
        loss is an unbiased estimate of the mean over t.
        """
        return self.num_groups * np.asarray(self.lengths)

    def schedule(self, num_steps: int) -> Schedule:
        """Deals `num_steps` equal steps out to the groups: a step belongs to the group that owns its start."""
        times = [i / num_steps for i in range(num_steps + 1)]
        steps: list[list[tuple[float, float]]] = [[] for _ in range(self.num_groups)]
        for start, end in itertools.pairwise(times):
            steps[int(self.group_of(start))].append((start, end))
        return tuple(tuple(group) for group in steps)
