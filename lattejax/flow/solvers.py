"""Integrating dx/dt = v(x, t) from noise at t = 0 to latents at t = 1."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Velocity = Callable[[Float[Array, "B h w C"], Float[Array, ""]], Float[Array, "B h w C"]]


def euler(velocity: Velocity, x: Float[Array, "B h w C"], steps: tuple[tuple[float, float], ...]) -> jax.Array:
    """Takes the given (start, end) steps, in order, by Euler's rule, as one compiled loop."""
    starts, ends = jnp.asarray(steps, x.dtype).reshape(-1, 2).T

    def step(x, times):
        start, end = times
        return x + (end - start) * velocity(x, start), None

    return jax.lax.scan(step, x, (starts, ends))[0]
