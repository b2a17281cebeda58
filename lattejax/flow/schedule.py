"""A sampling call's steps: which group takes each, and with which solver.

LaTtE-Flow (arXiv 2506.06952): a step runs entirely in the group that owns its start.
"""

import dataclasses
import itertools
from typing import Annotated, NamedTuple

from lattejax.flow.intervals import Intervals
from lattejax.flow.solvers import SOLVERS, Steps
from lattejax.ranges import Range, Share, check_ranges

NumSteps = Annotated[int, Range(1, 10_000)]  # beyond, float32 adds more error than shorter steps save
Guidance = Annotated[float, Range(0, 1000)]  # far beyond any useful scale
Shift = Annotated[float, Range(0.001, 1000)]  # beyond, float32 cannot tell the first or the last steps apart


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the flow is integrated."""

    num_steps: NumSteps = 40
    guidance: Guidance = 2.0  # the scale; 1: no guidance
    # Only steps that start at a flow time in [low, high) are guided (Kynkäänniemi et al., arXiv 2404.07724).
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    solver: str = "euler"
    shift: Shift = 1.0  # of the step times, see `flow.densities.Shifted`

    def __post_init__(self):
        check_ranges(self)
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"guidance_interval={self.guidance_interval!r} must be two increasing flow times")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r} must be one of {list(SOLVERS)}")


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
