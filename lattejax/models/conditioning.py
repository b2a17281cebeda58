"""What a velocity is conditioned on, besides its prompt: maps the `Step` of each row to a vector c.

The paper conditions on flow time only. Another kind is a module, here or elsewhere, and a line in `CONDITIONINGS`;
`config.model.conditioning` chooses it. `sampling.images` computes c for all steps in advance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lattejax.models.linear import Linear

TIME_CHANNELS = 256


class Step(NamedTuple):
    """For each row the flow time at which its velocity is evaluated, and the time up to which it is followed: the end
    of the step in sampling, the same time in training."""

    start: Float[Array, "B"]
    end: Float[Array, "B"]


class TimeEmbedding(nnx.Module):
    """Sinusoids of 1000·t through a two-layer SiLU network; in t's precision, whatever the weights' dtype."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(TIME_CHANNELS, width, rngs=rngs)
        self.fc2 = Linear(width, width, rngs=rngs)

    def __call__(self, step: Step) -> Float[Array, "B D"]:
        t, half = step.start, TIME_CHANNELS // 2
        frequencies = 1000 * np.exp(-np.log(10_000) * np.arange(half) / half)
        angles = t[:, None] * jnp.asarray(frequencies, t.dtype)  # bfloat16 could not tell 999 from 1000
        sinusoids = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.fc2(jax.nn.silu(self.fc1(sinusoids)))


# Modules that are constructed from the width D and map a `Step` to c.
CONDITIONINGS: dict[str, type[nnx.Module]] = {"time": TimeEmbedding}
