"""The shapes that signatures name are checked while tests run."""

import jax.numpy as jnp
import jaxtyping
import pytest
from flax import nnx

from lattejax.flow.path import interpolate
from lattejax.models.pixels import Encoder, PixelConfig


def test_flow_times_for_other_rows_are_refused():
    latents = jnp.zeros((2, 4, 4, 3))
    with pytest.raises(jaxtyping.TypeCheckError, match="'t'"):
        interpolate(latents, latents, jnp.zeros(3))


def test_a_module_refuses_images_without_colours():
    with pytest.raises(jaxtyping.TypeCheckError, match="'images'"):
        Encoder(PixelConfig(), rngs=nnx.Rngs(0))(jnp.zeros((2, 4, 4, 1)))
