"""Integrating dx/dt = v(x, t) from noise at t = 0 to latents at t = 1."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Velocity = Callable[[Float[Array, "B h w C"], Float[Array, ""]], Float[Array, "B h w C"]]
Steps = tuple[tuple[float, float], ...]  # (start, end) of each


def euler(velocity: Velocity, x: Float[Array, "B h w C"], steps: Steps) -> jax.Array:
    """Takes the steps, in order, by Euler's rule, as one compiled loop."""

    def step(x, times):
        start, end = times
        return x + (end - start) * velocity(x, start), None

    return jax.lax.scan(step, x, _times(steps, x))[0]


def heun(velocity: Velocity, x: Float[Array, "B h w C"], steps: Steps) -> jax.Array:
    """Takes the steps by Heun's rule: the mean velocity of the step's start and of Euler's guess of its end."""

    def step(x, times):
        start, end = times
        first = velocity(x, start)
        second = velocity(x + (end - start) * first, end)
        return x + (end - start) * (first + second) / 2, None

    return jax.lax.scan(step, x, _times(steps, x))[0]


def _times(steps: Steps, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    starts, ends = jnp.asarray(steps, x.dtype).reshape(-1, 2).T
    return starts, ends


SOLVERS = {"euler": euler, "heun": heun}
