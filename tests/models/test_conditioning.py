"""A new kind of conditioning needs a module and a line of registration, and no other edit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lattejax.errors import UserError
from lattejax.flow.schedule import Sampling
from lattejax.models import latte_flow, qwen2_vl
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.conditioning import CONDITIONINGS, TimeEmbedding
from lattejax.models.pixels import PixelConfig
from lattejax.objectives.flow import FlowRows
from lattejax.sampling.images import ImageSampler, read_prompts
from lattejax.training.generation_stage import flow_loss
from tests.helpers import encoder_for, randomize, tiny_config


class TimeAndLength(nnx.Module):
    """Flow time, and the length of the step to take."""

    def __init__(self, width, *, rngs):
        self.start, self.length = TimeEmbedding(width, rngs=rngs), TimeEmbedding(width, rngs=rngs)

    def __call__(self, step):
        return self.start(step) + self.length(step._replace(start=step.end - step.start))


class OnlyOfLength(TimeAndLength):
    """Its second part vanishes if steps have no length."""

    def __call__(self, step):
        return self.start(step) + (step.end - step.start)[:, None] * self.length(step)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(CONDITIONINGS, "time and length", TimeAndLength)
    monkeypatch.setitem(CONDITIONINGS, "of length", OnlyOfLength)


@pytest.mark.parametrize("name", ["time and length", "of length"])
def test_the_config_chooses_it_and_it_samples_and_trains(name, registered):
    config = tiny_config(model__conditioning=name)
    model, encoder = config.model_config, encoder_for(config)
    params = latte_flow.init(model, qwen2_vl.init(model.vlm, jax.random.key(0)), jax.random.key(1))
    params = randomize(params, 2, 0.1)
    assert set(params["time"]) == {"start", "length"}

    def draw(params):
        sampler = ImageSampler(model, Autoencoder(PixelConfig()), encoder, latte_flow.unstack(params), {})
        settings = dict(images_per_prompt=2, batch_size=2)
        return sampler([encoder.drawing("a handwritten two")], Sampling(4, solver="heun"), **settings)

    time = params["time"]
    other = params | {"time": time | {"length": jax.tree.map(lambda x: x + 0.3, time["length"])}}
    assert np.any(draw(other) != draw(params)), "the length of a step matters"

    trained, fixed = latte_flow.split_trained(model, params)
    assert set(fixed) == {"vlm"}
    loss = flow_loss(config)
    contexts = read_prompts(model, params["vlm"], encoder.batch([encoder.drawing("a handwritten two")]))
    groups, shape = model.generation.num_groups, config.data.latent_shape
    latents, noise = jax.random.normal(jax.random.key(3), (2, groups, 2, *shape))
    rows = FlowRows(jnp.zeros((groups, 2), int), latents, noise)

    def of_group_losses(trained):
        return loss.of_shares(trained, contexts, rows, jnp.full((groups, 2), 0.5))[0]

    gradient = jax.grad(of_group_losses)(trained)["time"]
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["start"]))
    assert all(np.any(leaf) == (name == "time and length") for leaf in jax.tree.leaves(gradient["length"]))


def test_an_unregistered_one_is_refused():
    with pytest.raises(UserError, match="conditioning='time and length' is unknown; use one of"):
        tiny_config(model__conditioning="time and length")
