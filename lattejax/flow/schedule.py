"""A sampling call's steps: which group takes each, and with which solver.

LaTtE-Flow (arXiv 2506.06952): a step runs entirely in the group that owns its start.
"""

import dataclasses
import itertools
from typing import NamedTuple

from lattejax.flow.intervals import Intervals
from lattejax.flow.solvers import SOLVERS, Steps

MOST_GUIDANCE = 1000.0  # far beyond any useful scale; rejects infinities and typing errors
LEAST_SHIFT = 0.001  # the largest is its inverse; beyond these, float32 cannot tell the first or the last steps apart


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the flow is integrated."""

    num_steps: int = 40
    guidance: float = 2.0  # the scale; 1: no guidance
    # Only steps that start at a flow time in [low, high) are guided (Kynkäänniemi et al., arXiv 2404.07724).
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    solver: str = "euler"
    shift: float = 1.0  # of the step times, see `flow.densities.Shifted`

    def __post_init__(self):
        low, high = self.guidance_interval
        for name, good, expected in (
            ("num_steps", self.num_steps > 0, "positive"),
            ("guidance", 0 <= self.guidance <= MOST_GUIDANCE, f"from 0 to {MOST_GUIDANCE:.0f}"),
            ("guidance_interval", 0 <= low <= high <= 1, "two increasing flow times from 0 to 1"),
            ("solver", self.solver in SOLVERS, f"one of {list(SOLVERS)}"),
            ("shift", LEAST_SHIFT <= self.shift <= 1 / LEAST_SHIFT, f"from {LEAST_SHIFT} to {1 / LEAST_SHIFT:.0f}"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {expected}")


class Segment(NamedTuple):
    """Consecutive steps of one group with the same settings; they run in one compiled loop."""

    group: int
    guided: bool
    solver: str
    steps: Steps


def split_steps(intervals: Intervals, sampling: Sampling) -> tuple[Segment, ...]:
    """Assigns a sampling call's steps to the groups.

    A step runs entirely in the group that owns its start. If Heun's second stage falls beyond the end of that group's
    interval, it is dropped: the step becomes an Euler step.
    """
    low, high = sampling.guidance_interval

    def segment(group: int, step: tuple[float, float]) -> Segment:
        start, end = step
        guided = sampling.guidance != 1 and low <= start < high
        inside = end <= intervals.edges[group + 1]
        return Segment(group, guided, sampling.solver if inside else "euler", (step,))

    schedule = intervals.schedule(sampling.num_steps, sampling.shift)
    singles = [segment(group, step) for group, steps in enumerate(schedule) for step in steps]
    alike = itertools.groupby(singles, key=lambda single: single[:3])
    return tuple(Segment(*kind, tuple(single.steps[0] for single in run)) for kind, run in alike)
