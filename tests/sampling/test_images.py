"""The sampler: one context pass, K loops, and images that depend on seed and sample index alone."""

import jax
import numpy as np
import pytest

from lattejax.errors import UserError
from lattejax.models import couple, functional, generation, qwen2_vl
from lattejax.sampling import images as sampling
from lattejax.sampling.images import ImageSampler, draw_latents, sample_noise
from tests.helpers import encoder_for, randomize, tiny_config

CONFIG = tiny_config()
MODEL = CONFIG.model_config
ENCODER = encoder_for(CONFIG)
VLM = randomize(qwen2_vl.init(MODEL.vlm, jax.random.key(0)), 1, 0.1)
PARAMS = randomize(couple.init_generation(MODEL, VLM, jax.random.key(1)), 2, 0.1)


def sampler() -> ImageSampler:
    return ImageSampler(MODEL, CONFIG.autoencoder, ENCODER, qwen2_vl.unstack(VLM))


def draw(prompts=("a handwritten seven", "a handwritten two"), **overrides) -> np.ndarray:
    settings = dict(images_per_caption=3, num_steps=5, guidance=2.0, seed=0, batch_size=6)
    return sampler()(PARAMS, list(prompts), **settings | overrides)


def test_images_do_not_depend_on_the_batches_they_are_drawn_in():
    """Up to one grey level, where float32 sums of another shape fall on the other side of the rounding."""
    whole = draw()
    assert whole.shape == (6, 8, 8, 3) and whole.dtype == np.uint8
    for batch_size in (1, 4):
        assert np.abs(whole.astype(int) - draw(batch_size=batch_size)).max() <= 1
    np.testing.assert_array_equal(draw(), whole)


def test_seed_sample_and_prompt_matter():
    whole = draw()
    assert len(np.unique(whole.reshape(6, -1), axis=0)) == 6
    assert np.any(draw(seed=1) != whole)
    swapped = draw(("a handwritten two", "a handwritten seven"))
    assert np.any(swapped[:3] != whole[:3]), "the same noise under another prompt"


@pytest.mark.parametrize("steps, guidance", [(5, 2.0), (1, 3.0), (4, 1.0)])
def test_sampling_equals_a_plain_loop(steps, guidance):
    """Euler by hand: group by owner of the step's start, guidance from two separate passes. To 1e-4, in float32."""
    contexts = sampler().read(["a handwritten seven"])
    noise = sample_noise(3, np.arange(2), MODEL.generation.latent_shape)
    listed = PARAMS | {"experts": functional.unstack(PARAMS["experts"])}
    schedule = sampler().intervals.schedule(steps)
    rows = np.zeros(2, int)
    ours = draw_latents(MODEL, listed, contexts, rows, noise, guidance, schedule=schedule, guided=guidance != 1)
    x = noise
    for step in range(steps):
        group = step * MODEL.generation.num_groups // steps
        own = listed | {"experts": generation.group_layers(MODEL.generation, listed["experts"], group)}
        t = np.array([step / steps], np.float32)
        conditional, unconditional = (
            generation.velocity(
                MODEL.generation, own, couple.group_context(MODEL, contexts, group, rows + prompt), x, t
            )
            for prompt in (0, 1)
        )
        x = x + (unconditional + guidance * (conditional - unconditional)) / steps
    np.testing.assert_allclose(ours, x, rtol=1e-4, atol=1e-4)


def test_a_sampling_call_traces_the_context_pass_once_and_outside_the_loop(monkeypatch):
    """Over several batches and many steps; and the drawing itself has no VLM weight among its inputs."""
    passes, calls = [], []
    forward, drawing = qwen2_vl.forward, sampling.draw_latents

    def counted(*args, **kwargs):
        passes.append(isinstance(args[2].input_ids, jax.core.Tracer))
        return forward(*args, **kwargs)

    def recorded(*args, **kwargs):
        calls.append(args)
        return drawing(*args, **kwargs)

    monkeypatch.setattr(qwen2_vl, "forward", counted)
    monkeypatch.setattr(sampling, "draw_latents", recorded)
    sampling.read_prompts.clear_cache()
    drawing.clear_cache()
    draw(batch_size=2, num_steps=7)
    assert passes == [True], "one context pass, traced under jit"
    assert len(calls) == 3
    vlm = {leaf.shape for leaf in jax.tree.leaves(VLM["text"]["vocabulary"])} | {
        leaf.shape for leaf in jax.tree.leaves(VLM["vision"])
    }
    big = {shape for shape in vlm if len(shape) > 1}
    assert not big & {np.shape(leaf) for leaf in jax.tree.leaves(calls[0])}
    sampling.read_prompts.clear_cache()


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompts_are_refused(prompt):
    with pytest.raises(UserError, match="prompt is empty"):
        draw((prompt,))
