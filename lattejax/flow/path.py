"""Flow matching on straight paths: x_t = t·x1 + (1 − t)·x0, from noise x0 at t = 0 to latents x1 at t = 1.

The target is the path's velocity, x1 − x0 (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

LEAST_TIME_LEFT = 0.05


def interpolate(
    latents: Float[Array, "*rows h w C"], noise: Float[Array, "*rows h w C"], t: Float[Array, "*rows"]
) -> Float[Array, "*rows h w C"]:
    """Returns x_t, with one t per row."""
    t = t[..., None, None, None]
    return t * latents + (1 - t) * noise


def target_velocity(
    latents: Float[Array, "*rows h w C"], noise: Float[Array, "*rows h w C"]
) -> Float[Array, "*rows h w C"]:
    return latents - noise


def velocity_towards(
    latents: Float[Array, "*rows h w C"], x_t: Float[Array, "*rows h w C"], t: Float[Array, "*rows"]
) -> Float[Array, "*rows h w C"]:
    """The velocity at x_t of the straight path that ends at an estimate of the clean latents: (x1 − x_t)/(1 − t).

    The time left, 1 − t, counts as at least `LEAST_TIME_LEFT`, so that errors of the estimate are not amplified without
    bound near t = 1. This is how Li and He (arXiv 2511.13720) predict x; their loss compares it with the same function
    of the true latents.
    """
    return (latents - x_t) / jnp.maximum(1 - t, LEAST_TIME_LEFT)[..., None, None, None]


def guide(
    conditional: Float[Array, "*rows h w C"],
    unconditional: Float[Array, "*rows h w C"],
    scale: float | Float[Array, ""] | Float[Array, "*rows 1 1 1"],
) -> Float[Array, "*rows h w C"]:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) on every channel; scale 1 means no guidance.

    The scale is the same for all rows, or each row's own.
    """
    return unconditional + scale * (conditional - unconditional)
