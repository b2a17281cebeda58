"""Paths, guidance and solvers against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lattejax.flow.path import LEAST_TIME_LEFT, guide, interpolate, target_velocity, velocity_towards
from lattejax.flow.solvers import euler, heun


def test_path_runs_from_noise_to_latents_at_constant_velocity():
    latents, noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 5, 2)))
    t = jnp.array([0.0, 0.3, 1.0])
    x = interpolate(latents, noise, t)
    np.testing.assert_array_equal(x[0], noise[0])
    np.testing.assert_array_equal(x[2], latents[2])
    np.testing.assert_allclose(x[1], noise[1] + 0.3 * target_velocity(latents, noise)[1], atol=1e-6)


def test_the_velocity_towards_the_clean_latents_is_the_targets():
    """Except close to t = 1, where the time left counts as more than it is, and at t = 1 it is zero, not 0/0."""
    latents, noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4, 5, 2)))
    t = jnp.array([0.0, 0.3, 0.9, 0.99, 1.0])
    found = velocity_towards(latents, interpolate(latents, noise, t), t)
    slower = np.array([1, 1, 1, 0.01 / LEAST_TIME_LEFT, 0])[:, None, None, None]
    np.testing.assert_allclose(found, slower * target_velocity(latents, noise), atol=1e-5)


def test_guidance_extrapolates_from_the_unconditional_velocity():
    conditional, unconditional = jnp.full((1, 1, 1, 1), 3.0), jnp.full((1, 1, 1, 1), 1.0)
    assert [guide(conditional, unconditional, s).item() for s in (0.0, 1.0, 2.0)] == [1.0, 3.0, 5.0]


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_euler_equals_its_closed_form_on_a_linear_flow(steps):
    """dx/dt = a·x + b·t: the recursion x ← x + (a·x + b·t)/n, in float64 NumPy."""
    a, b = -1.5, 2.0
    times = [(i / steps, (i + 1) / steps) for i in range(steps)]
    x = jnp.full((1, 1, 1, 1), 0.7)
    expected = 0.7
    for start, end in times:
        expected += (end - start) * (a * expected + b * start)
    assert euler(lambda x, t: a * x + b * t, lambda t, end: t, x, tuple(times)).item() == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("solver, order", [(euler, 1), (heun, 2)])
def test_solvers_converge_at_their_order(solver, order):
    """dx/dt = −x, from 1 to 1/e; in float64, where Heun's error exceeds rounding."""

    def error(steps):
        times = tuple((i / steps, (i + 1) / steps) for i in range(steps))
        with jax.enable_x64(True):
            return abs(solver(lambda x, t: -x, lambda t, end: t, jnp.ones((1, 1, 1, 1)), times).item() - np.exp(-1))

    assert error(50) / error(100) == pytest.approx(2**order, rel=0.05)


def test_heun_equals_its_formula_on_uneven_steps():
    x, expected = jnp.full((1, 1, 1, 1), 0.7), 0.7
    for start, end in ((0.0, 0.1), (0.1, 0.4), (0.4, 1.0)):
        first = -1.5 * expected + 2 * start
        second = -1.5 * (expected + (end - start) * first) + 2 * end
        expected += (end - start) * (first + second) / 2
    steps = ((0.0, 0.1), (0.1, 0.4), (0.4, 1.0))
    assert heun(lambda x, t: -1.5 * x + 2 * t, lambda t, end: t, x, steps).item() == pytest.approx(expected, rel=1e-5)
