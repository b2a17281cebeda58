"""The paper's timestep intervals: which group of layers owns which part of the flow.

LaTtE-Flow (arXiv 2506.06952), "layerwise timestep experts": the L layers are split into K groups of consecutive layers,
and group k owns the flow times [edge_k, edge_{k+1}); the last interval is closed. Time runs from noise at t = 0 to the
image at t = 1, so group 0 owns the noisiest interval. Training, sampling and evaluation share one edge table. Step
times are computed from their index, never accumulated.

Axes: K group, b rows of one group.
"""

import dataclasses
import itertools
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lattejax.flow.densities import UNIFORM, Density, Shifted

# For each group, the (start, end) of the steps that it runs.
Schedule = tuple[tuple[tuple[float, float], ...], ...]


@dataclasses.dataclass(frozen=True)
class Intervals:
    """The edge table: K + 1 increasing flow times from 0 to 1."""

    edges: tuple[float, ...]

    def __post_init__(self):
        rising = all(low < high for low, high in itertools.pairwise(self.edges))
        if len(self.edges) < 2 or self.edges[0] != 0 or self.edges[-1] != 1 or not rising:
            raise ValueError(
                f"interval_edges={self.edges} must increase from 0 to 1, so that every flow time has one owner"
            )

    @classmethod
    def equal(cls, num_groups: int) -> "Intervals":
        return cls(tuple(k / num_groups for k in range(num_groups + 1)))

    @property
    def num_groups(self) -> int:
        return len(self.edges) - 1

    @property
    def lengths(self) -> tuple[float, ...]:
        return tuple(float(length) for length in np.diff(self.edges))

    def group_of(self, t: float | np.ndarray) -> np.ndarray | np.int64:
        """Returns the group that owns flow time t; on the host, in float64."""
        return np.clip(np.searchsorted(self.edges, t, side="right") - 1, 0, self.num_groups - 1)

    def owners(self, t: Float[Array, "b"]) -> Int[Array, "b"]:
        """The same inside a compiled step, in t's own precision."""
        first, _ = self._range(t.dtype)
        return jnp.searchsorted(jnp.asarray(first[1:]), t, side="right")

    def widened(self, overlap: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns the flow times [K] at which intervals start and at which they end, float64, within 0 and 1, if each
        reaches `overlap` (a share of its length; 0: not at all) into its neighbours."""
        reach = overlap * np.diff(self.edges)
        return np.clip(self.edges[:-1] - reach, 0, 1), np.clip(self.edges[1:] + reach, 0, 1)

    def clip(self, t: Float[Array, "K b"], overlap: float = 0.0) -> Float[Array, "K b"]:
        """Clips flow times to their row's interval: from the first value in t's precision that is not before its start,
        to the last one before its end. So even the last group, which owns 1, never trains on it."""
        first, last = self._range(t.dtype, overlap)
        return jnp.clip(t, first[:, None], last[:, None])

    def _range(self, dtype: np.dtype, overlap: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        starts, ends = self.widened(overlap)
        low, high = starts.astype(dtype), ends.astype(dtype)
        first = np.where(low < starts, np.nextafter(low, np.inf, dtype=dtype), low)
        last = np.where(high >= ends, np.nextafter(high, -np.inf, dtype=dtype), high)
        return first, last

    def draw(self, u: Float[Array, "K b"], density: Density = UNIFORM, overlap: float = 0.0) -> Float[Array, "K b"]:
        """Maps uniform draws in [0, 1) to flow times of the density restricted to each row's interval, which `overlap`
        widens.

        Rounding never moves a draw out of its interval.
        """
        below, above = (density.cumulative(edges).astype(u.dtype)[:, None] for edges in self.widened(overlap))
        return self.clip(density.quantile(below + (above - below) * u), overlap)

    def masses(self, density: Density = UNIFORM) -> np.ndarray:
        """P_k, each group's share of the density of t.

        Every group gets an equal share of each batch, whatever its mass. The batch's loss is Σ P_k·loss_k: each
        example has weight K·P_k, which makes it an unbiased estimate of the mean over t.
        """
        return np.diff(density.cumulative(self.edges))

    def schedule(self, num_steps: int, shift: float = 1.0) -> Schedule:
        """Assigns `num_steps` steps to the groups: a step belongs to the group that owns its start.

        With a shift of 1 the steps are equal. Otherwise their times are shifted (see `densities.Shifted`), and the
        shifted time, which the network sees, determines the group. Times are exact fractions, rounded once, so that a
        time on an edge equals that edge.
        """
        exact = Shifted(Fraction(shift).limit_denominator(10**8))
        times = [float(exact.quantile(Fraction(i, num_steps))) for i in range(num_steps + 1)]
        steps: list[list[tuple[float, float]]] = [[] for _ in range(self.num_groups)]
        for start, end in itertools.pairwise(times):
            steps[int(self.group_of(start))].append((start, end))
        return tuple(tuple(group) for group in steps)
