"""Which group takes each sampling step, with which solver, and whether with guidance."""

from fractions import Fraction

import numpy as np
import pytest

from lattejax.flow.intervals import Intervals
from lattejax.flow.schedule import Sampling, split_steps


def singles(intervals: Intervals, sampling: Sampling):
    """(group, guided, solver, start, end) of every step."""
    return [
        (segment.group, segment.guided, segment.solver, *step)
        for segment in split_steps(intervals, sampling)
        for step in segment.steps
    ]


@pytest.mark.parametrize("groups, steps", [(4, 40), (3, 10), (4, 3), (1, 5), (7, 40)])
def test_segments_hold_every_step_once_and_in_order(groups, steps):
    flat = singles(Intervals.equal(groups), Sampling(steps))
    assert [start for *_, start, _ in flat] == [i / steps for i in range(steps)]
    assert [group for group, *_ in flat] == [i * groups // steps for i in range(steps)]


def test_forty_steps_of_four_groups_are_four_loops():
    assert [len(segment.steps) for segment in split_steps(Intervals.equal(4), Sampling(40))] == [10, 10, 10, 10]


@pytest.mark.parametrize("scale, interval, guided", [(2.0, (0.2, 0.6), {2, 3, 4, 5}), (1.0, (0.0, 1.0), set())])
def test_only_steps_that_start_in_the_guidance_interval_are_guided(scale, interval, guided):
    flat = singles(Intervals.equal(2), Sampling(10, scale, interval))
    assert {i for i, step in enumerate(flat) if step[1]} == guided


@pytest.mark.parametrize("groups, steps", [(4, 40), (3, 30), (4, 10), (7, 40), (3, 1)])
def test_heuns_second_stage_never_leaves_the_groups_interval(groups, steps):
    """By exact integer arithmetic: step i of n ends at (i+1)/n, its group's interval at (k+1)/K, which is inside."""
    for i, (group, _, solver, _, _) in enumerate(singles(Intervals.equal(groups), Sampling(steps, solver="heun"))):
        inside = (i + 1) * groups <= (group + 1) * steps
        assert solver == ("heun" if inside else "euler")


def test_shifted_steps_are_assigned_by_the_time_that_the_network_sees():
    """The numbers of steps for a shift of 0.3 and 40 steps."""
    schedule = Intervals.equal(4).schedule(40, shift=0.3)
    assert [len(steps) for steps in schedule] == [22, 9, 6, 3]
    ends = [end for steps in schedule for _, end in steps]
    u = np.arange(1, 41) / 40
    np.testing.assert_allclose(ends, 0.3 * u / (1 - 0.7 * u))


@pytest.mark.parametrize(
    "shift, steps, groups", [(0.5, 3, 2), (0.5, 12, 2), (0.3, 40, 4), (1 / 3, 4, 2), (3.0, 100, 4)]
)
def test_a_shifted_time_on_an_edge_equals_that_edge(shift, steps, groups):
    """By exact fractions: the owner of every step, also where a float formula would be off by one rounding."""
    exact = Fraction(shift).limit_denominator(1000)
    for i, (group, _, solver, _, _) in enumerate(
        singles(Intervals.equal(groups), Sampling(steps, shift=shift, solver="heun"))
    ):
        start, end = (exact * u / (exact * u + 1 - u) for u in (Fraction(i, steps), Fraction(i + 1, steps)))
        assert group == int(start * groups)
        assert solver == ("heun" if end * groups <= group + 1 else "euler")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_steps=0), "num_steps=0 must be from 1"),
        (dict(guidance_interval=(0.5, 0.2)), r"guidance_interval=\(0\.5, 0\.2\) must be two increasing"),
        (dict(guidance_interval=(-0.5, 0.2)), "guidance_interval"),
        (dict(solver="rk4"), r"solver='rk4' must be one of \['euler', 'heun'\]"),
        (dict(shift=0.0), r"shift=0\.0 must be from 0\.001 to 1000"),
        (dict(shift=1e-9), r"shift=1e-09 must be from"),
        (dict(shift=float("inf")), "shift=inf must be from"),
        (dict(shift=float("nan")), "shift=nan must be from"),
    ],
)
def test_invalid_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)
