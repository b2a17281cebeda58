"""Flow matching on straight paths: x_t = t·x1 + (1 − t)·x0, from noise x0 at t = 0 to latents x1 at t = 1.

The target is the path's velocity, x1 − x0 (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003).
"""

from jaxtyping import Array, Float


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


def guide(
    conditional: Float[Array, "*rows h w C"],
    unconditional: Float[Array, "*rows h w C"],
    scale: float | Float[Array, ""],
) -> Float[Array, "*rows h w C"]:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) on every channel; scale 1 means no guidance."""
    return unconditional + scale * (conditional - unconditional)
