"""Which group owns which flow time, in training and in sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lattejax.flow.densities import Shifted
from lattejax.flow.intervals import Intervals


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7])
def test_an_edge_belongs_to_the_group_that_starts_there(groups):
    intervals = Intervals.equal(groups)
    for k, edge in enumerate(intervals.edges[:-1]):
        assert intervals.group_of(edge) == k
        assert intervals.group_of(np.nextafter(edge, -1)) == max(k - 1, 0)
    assert intervals.group_of(0.0) == 0
    assert intervals.group_of(1.0) == groups - 1, "the last interval is closed"


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 25, 30, 40, 41, 1000])
def test_every_step_runs_once_in_the_group_that_owns_its_start(groups, steps):
    """For step counts that K divides or not; expected owners by exact integer arithmetic."""
    schedule = Intervals.equal(groups).schedule(steps)
    flat = [(k, step) for k, group in enumerate(schedule) for step in group]
    assert [start for _, (start, _) in flat] == [i / steps for i in range(steps)]
    assert [end for _, (_, end) in flat] == [(i + 1) / steps for i in range(steps)]
    assert [k for k, _ in flat] == [i * groups // steps for i in range(steps)]


def test_four_groups_get_ten_of_forty_steps_each():
    assert [len(group) for group in Intervals.equal(4).schedule(40)] == [10, 10, 10, 10]


@pytest.mark.parametrize("edges", [(0.0,), (0.0, 0.5), (0.2, 1.0), (0.0, 0.6, 0.4, 1.0), (0.0, 0.5, 0.5, 1.0)])
def test_edges_that_do_not_increase_from_0_to_1_are_refused(edges):
    with pytest.raises(ValueError, match="must increase from 0 to 1"):
        Intervals(edges)


def test_owners_in_a_compiled_step_are_those_of_the_host():
    """For float32 values at and next to edges that float32 rounds up and down."""
    intervals = Intervals((0.0, 0.1, 1 / 3, 0.7, 1.0))
    near = np.float32(intervals.edges)
    t = np.concatenate([near, np.nextafter(near, np.float32(-1)), np.nextafter(near, np.float32(2))])
    t = t[(t >= 0) & (t <= 1)]
    np.testing.assert_array_equal(jax.jit(intervals.owners)(t), intervals.group_of(t.astype(np.float64)))


def test_uneven_intervals_own_their_share_of_steps():
    assert [len(group) for group in Intervals((0.0, 0.1, 0.5, 1.0)).schedule(10)] == [1, 4, 5]


@pytest.mark.parametrize("edges", [(0.0, 1 / 3, 2 / 3, 1.0), (0.0, 0.1, 0.7, 1.0), tuple(k / 7 for k in range(8))])
def test_draws_stay_in_their_interval_by_the_table_that_sampling_uses(edges):
    """Including the smallest and the largest float32 draw, for edges that float32 rounds up and down."""
    intervals = Intervals(edges)
    largest = np.nextafter(np.float32(1), np.float32(0))
    u = np.concatenate([np.float32([0, largest]), np.random.default_rng(0).random(1000, np.float32)])
    t = np.asarray(intervals.draw(jnp.asarray(np.tile(u, (intervals.num_groups, 1)))))
    assert t.dtype == np.float32
    for k in range(intervals.num_groups):
        assert set(intervals.group_of(t[k].astype(np.float64))) == {k}
        assert t[k].min() == pytest.approx(edges[k], abs=1e-6)
        assert t[k].max() == pytest.approx(edges[k + 1], abs=1e-6)


def test_draws_reach_a_share_of_their_intervals_length_into_the_neighbours():
    intervals, largest = Intervals((0.0, 0.2, 0.6, 1.0)), np.nextafter(np.float32(1), np.float32(0))
    u = jnp.asarray(np.tile(np.float32([0, largest]), (3, 1)))
    expected = [(0, 0.22), (0.16, 0.64), (0.56, 1)]
    np.testing.assert_allclose(intervals.draw(u, overlap=0.1), expected, atol=1e-6)
    np.testing.assert_array_equal(intervals.draw(u, overlap=0.0), intervals.draw(u))
    assert float(intervals.draw(u, Shifted(0.1), overlap=1.0).max()) < 1, "time 1 has no velocity to learn"


@pytest.mark.parametrize("edges", [(0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.1, 0.5, 1.0)])
def test_stratified_weighted_mean_is_unbiased_and_less_noisy_than_plain_draws(edges):
    """The estimate of ∫ f over 4,000 batches, within four standard errors of the exact value."""
    intervals = Intervals(edges)
    groups, rows, batches = intervals.num_groups, 12, 4000

    def f(t):
        return jnp.exp(3 * t) + jnp.cos(20 * t)

    exact = (np.exp(3) - 1) / 3 + np.sin(20) / 20
    u = jax.random.uniform(jax.random.key(0), (batches, groups, rows // groups))
    stratified = jax.vmap(lambda u: jnp.sum(f(intervals.draw(u)).mean(axis=1) * intervals.masses()))(u)
    plain = f(jax.random.uniform(jax.random.key(1), (batches, rows))).mean(axis=1)
    assert abs(stratified.mean() - exact) < 4 * stratified.std() / np.sqrt(batches)
    assert stratified.std() < plain.std()
