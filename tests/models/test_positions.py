"""The flagship knows where it draws: its velocity depends on the row and column of each latent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lattejax import configuration
from lattejax.models import functional, generation, latte_flow, qwen2_vl
from lattejax.models.conditioning import Step
from lattejax.models.latte_flow import ModelConfig
from lattejax.models.vision import VisionConfig
from tests.helpers import config_file
from tests.models.test_generation import prompts_of_lengths

LAYERS = 2  # of one group, at the flagship's width, heads and theta; narrower feed-forward, as it ignores positions
GRID = (8, 8)


def flagship(variant: str, latent_position: str) -> ModelConfig:
    model = configuration.resolve(config_file("imagenet256")).model_config
    assert model.vlm.text.hidden_size == 1536 and model.vlm.text.rope_theta == 1e6 and model.generation.grid == GRID
    text = dataclasses.replace(model.vlm.text, num_layers=LAYERS, intermediate_size=2048, vocab_size=64)
    vision = VisionConfig(depth=1, embed_dim=16, num_heads=1, patch_size=2, hidden_size=text.hidden_size)
    pathway = dataclasses.replace(model.generation, text=text, num_groups=1, latent_position=latent_position)
    return dataclasses.replace(
        model, vlm=dataclasses.replace(model.vlm, text=text, vision=vision), generation=pathway, variant=variant
    )


@pytest.fixture(scope="module")
def started():
    """Initial weights, but with small random values instead of zeros, which would give zero velocity; and noisy
    latents."""
    config = flagship("couple", "sincos")

    @jax.jit
    def init(key):
        return latte_flow.init(config, qwen2_vl.init(config.vlm, key), key)

    params, rng = init(jax.random.key(0, impl="rbg")), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x if np.any(x) else 0.02 * rng.standard_normal(x.shape, dtype=np.float32), jax.device_get(params)
    )
    return params, rng.standard_normal((1, *config.generation.latent_shape), dtype=np.float32)


def changes(started, variant: str, latent_position: str, dtype: str) -> dict[str, float]:
    """The relative change of the velocity if columns or rows of x_t are shuffled, and the result shuffled back."""
    config = flagship(variant, latent_position)
    params, x_t = functional.cast_floats(started[0], dtype), started[1]
    if variant == "blend":
        params = params | {"experts": {name: part for name, part in params["experts"].items() if name != "decoder"}}
    order = np.random.default_rng(0).permutation(GRID[0])
    x_t = jnp.concatenate([x_t, x_t[:, order], x_t[:, :, order]])

    @jax.jit
    def velocity(params, x_t):
        context = latte_flow.read_prompts(config, params["vlm"], prompts_of_lengths([16]))
        pathway = latte_flow.pathway(config, params)
        conditioning = generation.condition(config.generation, pathway, Step(*[jnp.array([0.5])] * 2))
        rows = jnp.zeros(len(x_t), int)
        return generation.velocity(config.generation, pathway, generation.pick(context, rows), x_t, conditioning)

    back = np.argsort(order)
    v, rows, columns = np.asarray(velocity(params, x_t))
    changed = {"rows": rows[back] - v, "columns": columns[:, back] - v}
    return {name: float(np.linalg.norm(change) / np.linalg.norm(v)) for name, change in changed.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", latte_flow.VARIANTS)
def test_the_flagships_velocity_depends_on_rows_and_columns(started, variant, dtype):
    found = changes(started, variant, "sincos", dtype)
    assert min(found.values()) > 0.1, found


def test_without_the_table_the_flagship_ignores_columns(started):
    """This is why the table exists."""
    found = changes(started, "couple", "none", "float32")
    assert found["columns"] < 1e-3, found
