"""Integrating dx/dt = v(x, t) from noise at t = 0 to latents at t = 1."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The velocity's inputs besides x, from the flow times at which it is evaluated and up to which it is followed. They are
# computed for all steps at once; each array has a leading axis of steps.
Conditions = Callable[[Float[Array, "steps"], Float[Array, "steps"]], Any]
Velocity = Callable[[Float[Array, "B h w C"], Any], Float[Array, "B h w C"]]  # at x, given one step's conditions
Steps = tuple[tuple[float, float], ...]  # (start, end) of each


def euler(velocity: Velocity, conditions: Conditions, x: Float[Array, "B h w C"], steps: Steps) -> jax.Array:
    """Takes the steps, in order, with Euler's method, as one compiled loop.

    Args:
      velocity: dx/dt [B, h, w, C] at x, per unit of flow time.
      conditions: the velocity's other inputs at the S steps, from their flow times [S].
      x: where the first step starts.
      steps: the flow times at which each step starts and ends.

    Returns:
      x at the end of the last step, [B, h, w, C].
    """

    starts, ends = _times(steps, x)

    def step(x, inputs):
        length, at_start = inputs
        return x + length * velocity(x, at_start), None

    return jax.lax.scan(step, x, (ends - starts, conditions(starts, ends)))[0]


def heun(velocity: Velocity, conditions: Conditions, x: Float[Array, "B h w C"], steps: Steps) -> jax.Array:
    """Takes the steps with Heun's method: the mean of the velocities at the step's start and at Euler's estimate of its
    end. So a step computes two velocities, the second with the conditions of its end. Arguments and result as of
    `euler`."""

    starts, ends = _times(steps, x)

    def step(x, inputs):
        length, at_start, at_end = inputs
        first = velocity(x, at_start)
        second = velocity(x + length * first, at_end)
        return x + length * (first + second) / 2, None

    return jax.lax.scan(step, x, (ends - starts, conditions(starts, ends), conditions(ends, ends)))[0]


def _times(steps: Steps, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    starts, ends = jnp.asarray(steps, x.dtype).reshape(-1, 2).T
    return starts, ends


SOLVERS = {"euler": euler, "heun": heun}
