"""A drawing's steps as single evaluations of the velocity, each of one group.

With v the velocity at (x, start), an evaluation sets x ← x + own·v + previous·v', v' being the velocity of the
evaluation before. An Euler step is one, with own = dt. A Heun step is two: Euler's, and then
x + dt·(v − v')/2 at the step's end.
"""

from typing import NamedTuple

import numpy as np

from lattejax.flow.intervals import Intervals
from lattejax.flow.schedule import Sampling, split_steps


class Evaluation(NamedTuple):
    """One evaluation of the velocity."""

    group: int
    is_guided: bool
    start: float  # the flow time at which it is evaluated
    end: float  # the flow time up to which it is followed, and x's after it
    own: np.float32
    previous: np.float32
    ends_step: bool


def evaluations(intervals: Intervals, sampling: Sampling) -> tuple[Evaluation, ...]:
    """Those of a sampling call, in order; the same steps, groups and guidance as `split_steps`."""
    found = []
    for segment in split_steps(intervals, sampling):
        own = segment.group, segment.guided
        for start, end in segment.steps:
            length = np.float32(end) - np.float32(start)
            is_euler = segment.solver == "euler"
            found.append(Evaluation(*own, start, end, length, np.float32(0), is_euler))
            if not is_euler:
                found.append(Evaluation(*own, end, end, length / 2, -length / 2, True))
    return tuple(found)


def edges(steps: tuple[Evaluation, ...], most: int) -> tuple[int, ...]:
    """The evaluations after which there is a preview: one after each group's last evaluation, except the last group's.
    If these are more than `most`, an evenly spread choice."""
    last = [i for i in range(len(steps) - 1) if steps[i].group != steps[i + 1].group]
    if most >= len(last):
        return tuple(last)
    return tuple(last[(2 * i + 1) * len(last) // (2 * most)] for i in range(most))
