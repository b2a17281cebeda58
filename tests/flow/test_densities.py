"""Densities of flow time against numerical integration, and the same objective for every way of drawing t."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from lattejax.configuration import sections
from lattejax.errors import UserError
from lattejax.flow.densities import LogitNormal, Shifted, Uniform
from lattejax.flow.intervals import Intervals
from lattejax.training.generation_stage import flow_loss
from tests.helpers import tiny_config

# Each with its probability density, written out.
DENSITIES = [
    (Uniform(), lambda t: 1.0),
    (LogitNormal(0.0, 1.0), lambda t: np.exp(-(np.log(t / (1 - t)) ** 2) / 2) / np.sqrt(2 * np.pi) / (t * (1 - t))),
    (
        LogitNormal(-0.5, 0.7),
        lambda t: np.exp(-(((np.log(t / (1 - t)) + 0.5) / 0.7) ** 2) / 2) / np.sqrt(2 * np.pi) / 0.7 / (t * (1 - t)),
    ),
    (Shifted(0.3), lambda t: 0.3 / (0.3 + 0.7 * t) ** 2),
    (Shifted(3.0), lambda t: 3.0 / (3.0 - 2.0 * t) ** 2),
]
UNEVEN = (0.0, 0.1, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Root:
    """A new density, to copy: t = u², which favours noise."""

    def cumulative(self, t):
        return np.sqrt(np.asarray(t, np.float64))

    def quantile(self, u):
        return u**2


DENSITIES.append((Root(), lambda t: 0.5 / np.sqrt(t)))


def test_the_config_chooses_a_new_one(monkeypatch):
    monkeypatch.setitem(sections.DENSITIES, "root", lambda stage: Root())
    config = tiny_config(train__density="root")
    assert flow_loss(config).density == Root()
    with pytest.raises(UserError, match=r"density='square' must be one of .*'root'"):
        tiny_config(train__density="square")


@pytest.mark.parametrize("density, formula", DENSITIES)
def test_cumulative_is_the_integral_of_the_density_and_quantile_its_inverse(density, formula):
    for t in (0.01, 0.3, 0.5, 0.9):
        assert density.cumulative(t) == pytest.approx(quad(formula, 0, t, epsabs=1e-10)[0], abs=1e-7)
        assert density.quantile(jnp.float32(density.cumulative(t))) == pytest.approx(t, rel=1e-4)
    np.testing.assert_allclose(density.cumulative(np.array([0.0, 1.0])), [0, 1])


def test_shifted_is_sd3s_formula_with_time_reversed():
    """SD3: σ' = s·σ / (1 + (s − 1)·σ) with noise at σ = 1."""
    u = np.linspace(0, 1, 11)
    sigma = 1 - u
    with jax.enable_x64(True):
        shifted = np.asarray(Shifted(1 / 3).quantile(jnp.asarray(u)))
    np.testing.assert_allclose(1 - shifted, 3 * sigma / (1 + 2 * sigma), atol=1e-12)


@pytest.mark.parametrize("density", [density for density, _ in DENSITIES])
@pytest.mark.parametrize("edges", [Intervals.equal(4).edges, UNEVEN])
def test_draws_of_every_density_stay_in_their_interval(density, edges):
    """Including the smallest and the largest float32 draw."""
    intervals = Intervals(edges)
    largest = np.nextafter(np.float32(1), np.float32(0))
    u = np.concatenate([np.float32([0, largest]), np.random.default_rng(0).random(1000, np.float32)])
    t = np.asarray(intervals.draw(jnp.asarray(np.tile(u, (intervals.num_groups, 1))), density))
    for k in range(intervals.num_groups):
        assert set(intervals.group_of(t[k].astype(np.float64))) == {k}
        np.testing.assert_array_equal(intervals.owners(jnp.asarray(t[k])), k)


@pytest.mark.parametrize("density, formula", DENSITIES)
def test_stratified_draws_estimate_the_same_objective(density, formula):
    """Σ P_k·mean_k f against ∫ f·p, within four standard errors, on uneven intervals."""
    intervals = Intervals(UNEVEN)

    def f(t):
        return jnp.exp(3 * t) + jnp.cos(20 * t)

    exact = quad(lambda t: float(np.exp(3 * t) + np.cos(20 * t)) * formula(t), 0, 1)[0]
    u = jax.random.uniform(jax.random.key(0), (2000, 3, 4))
    estimates = jax.vmap(lambda u: jnp.sum(f(intervals.draw(u, density)).mean(axis=1) * intervals.masses(density)))(u)
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / np.sqrt(len(u))


def test_a_logit_normal_gives_the_outer_two_of_four_groups_small_masses():
    np.testing.assert_allclose(
        Intervals.equal(4).masses(LogitNormal(0.0, 1.0)), [0.136, 0.364, 0.364, 0.136], atol=1e-3
    )
