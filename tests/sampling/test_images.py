"""The sampler: one context pass, K loops, and images that depend only on seed and sample index."""

import functools
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from lattejax.data import digits
from lattejax.flow.schedule import Sampling, split_steps
from lattejax.models import generation, latte_flow, qwen2_vl
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.conditioning import Step
from lattejax.models.pixels import PixelConfig
from lattejax.sampling import images as sampling_module
from lattejax.sampling.grid import LABEL_HEIGHT, MARGIN, grid_size, labelled_grid
from lattejax.sampling.images import ImageSampler, draw_latents, sample_noise
from tests.helpers import compilations, encoder_for, randomize, tiny_config

CONFIGS = {variant: tiny_config(model__variant=variant) for variant in latte_flow.VARIANTS}
CONFIGS["uneven"] = tiny_config(model__group_sizes=(1, 3), model__interval_edges=(0.0, 0.3, 1.0))
CONFIG = CONFIGS["couple"]
MODEL = CONFIG.model_config
ENCODER = encoder_for(CONFIG)
PROMPTS = [ENCODER.drawing(text) for text in ("a handwritten seven", "a handwritten two")]


@functools.cache
def sampler(variant: str = "couple") -> ImageSampler:
    model = CONFIGS[variant].model_config
    params = latte_flow.init(model, qwen2_vl.init(model.vlm, jax.random.key(0)), jax.random.key(1))
    weights = latte_flow.unstack(randomize(params, 2, 0.1))
    return ImageSampler(model, Autoencoder(PixelConfig()), ENCODER, weights, {})


FIVE_STEPS = Sampling(5)


def draw(prompts=PROMPTS, sampling=FIVE_STEPS, variant="couple", **overrides) -> np.ndarray:
    settings = dict(images_per_prompt=3, seed=0, batch_size=6)
    return sampler(variant)(prompts, sampling, **settings | overrides)


def differ(images: np.ndarray, others: np.ndarray) -> bool:
    """By more than rounding."""
    return np.abs(images.astype(int) - others).max() > 1


def test_images_do_not_depend_on_the_batches_they_are_drawn_in():
    """Up to one grey level: float32 sums of another shape may round the other way."""
    expected = draw()
    assert expected.shape == (6, 8, 8, 3) and expected.dtype == np.uint8
    for batch_size in (1, 4):
        assert np.abs(expected.astype(int) - draw(batch_size=batch_size)).max() <= 1
    np.testing.assert_array_equal(draw(), expected)


def test_seed_sample_and_prompt_matter():
    images = draw()
    assert len(np.unique(images.reshape(6, -1), axis=0)) == 6
    assert differ(draw(seed=1), images)
    assert differ(draw(PROMPTS[::-1])[:3], images[:3]), "the same noise with another prompt"


def test_prompts_are_read_some_at_a_time(monkeypatch):
    expected = draw([*PROMPTS, *PROMPTS[:1]]).astype(int)
    monkeypatch.setattr(latte_flow, "PROMPTS_AT_A_TIME", 3)
    read_prompts, read = sampling_module.read_prompts, []

    def record(config, vlm, prompts):
        read.append(len(prompts.mask))
        return read_prompts(config, vlm, prompts)

    monkeypatch.setattr(sampling_module, "read_prompts", record)
    assert np.abs(draw([*PROMPTS, *PROMPTS[:1]]) - expected).max() <= 1
    assert read == [3, 1]


def test_prompts_of_other_lengths_compile_nothing():
    texts = ["a handwritten seven", "two", "a very neatly handwritten four", "a digit", "one more"]
    prompts = [ENCODER.drawing(text) for text in texts]
    assert len({len(prompt.input_ids) for prompt in prompts}) > 2
    draw(prompts[:3], images_per_prompt=2)
    with compilations() as count:
        draw(prompts[1:4], images_per_prompt=2)
        draw([prompts[4], prompts[0], prompts[2]], images_per_prompt=2)
    assert count() == 0


SAMPLINGS = {
    "more steps than groups": Sampling(5),
    "one step": Sampling(1, guidance=3.0),
    "no guidance": Sampling(4, guidance=1.0),
    "guidance in an interval": Sampling(7, guidance_interval=(0.2, 0.6)),
    "Heun": Sampling(4, solver="heun"),
    "Heun over steps that cross the edge": Sampling(3, solver="heun"),
    "shifted": Sampling(5, shift=0.4),
    "all at once": Sampling(5, guidance_interval=(0.0, 0.5), solver="heun", shift=2.0),
    "with an image": Sampling(5, guidance=3.0),
}


@pytest.mark.parametrize(
    "case, variant", [*((case, "couple") for case in SAMPLINGS), ("all at once", "blend"), ("all at once", "uneven")]
)
def test_sampling_equals_a_plain_loop(case, variant):
    """Owner, solver and shift computed by hand, guidance from two separate passes. To 1e-4, in float32."""
    sampling, ours = SAMPLINGS[case], sampler(variant)
    model, rows = ours.config, np.zeros(2, int)
    picture = ENCODER.read_image(Image.fromarray(digits.load("test").images[0]))
    contexts = ours.read([ENCODER.drawing("another one", [picture])] if case == "with an image" else PROMPTS[:1])
    noise = sample_noise(3, np.arange(2), model.generation.latent_shape)
    segments = split_steps(model.generation.intervals, sampling)
    drawn = draw_latents(model, ours.pathway, contexts, rows, rows + 1, noise, sampling.guidance, segments=segments)

    @functools.partial(jax.jit, static_argnames="group")
    def velocity(x, t, group, prompt):
        own = model.generation.layers_of[group]
        context = generation.pick(contexts._replace(layers=contexts.layers[own]), rows + prompt)
        pathway = ours.pathway | {"experts": ours.pathway["experts"][own]}
        conditioning = generation.condition(model.generation, pathway, Step(t[None], t[None]))
        return generation.velocity(model.generation, pathway, context, x, conditioning)

    def guided(x, t, group, scale):
        unconditional = velocity(x, np.float32(t), group, 1)
        return unconditional + scale * (velocity(x, np.float32(t), group, 0) - unconditional)

    x, (low, high), (_, edge, _) = noise, sampling.guidance_interval, model.generation.intervals.edges
    times = [i / sampling.num_steps for i in range(sampling.num_steps + 1)]
    times = [sampling.shift * t / (1 + (sampling.shift - 1) * t) for t in times]
    for start, end in itertools.pairwise(times):
        group, scale = int(start >= edge), sampling.guidance if low <= start < high else 1.0
        first = guided(x, start, group, scale)
        step = x + (end - start) * first
        if sampling.solver == "heun" and end <= (edge, 1.0)[group] + 1e-9:
            step = x + (end - start) * (first + guided(step, end, group, scale)) / 2
        x = step
    np.testing.assert_allclose(drawn, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", latte_flow.VARIANTS)
def test_prompts_with_and_without_images_can_be_drawn_together(variant):
    """Conditioning images matter, and a prompt's drawing does not depend on the other prompts, up to one grey level."""
    pictures = [ENCODER.read_image(Image.fromarray(image)) for image in digits.load("test").images[:2]]
    shown = [ENCODER.drawing("another one", [picture]) for picture in pictures]
    both = ENCODER.drawing("a mix of the two", pictures)
    prompts = [*shown, PROMPTS[0], both]
    together = draw(prompts, variant=variant).reshape(4, 3, 8, 8, 3).astype(int)
    assert differ(draw(shown[::-1], variant=variant)[:3], together[0]), "the same noise and text, another picture"
    # The noise depends on the sample index, so each prompt keeps its place.
    for i in (1, 2, 3):
        alone = draw([PROMPTS[1]] * i + [prompts[i]], variant=variant)[3 * i :].astype(int)
        assert np.abs(alone - together[i]).max() <= 1


def test_a_negative_prompt_replaces_the_empty_prompt():
    """An empty negative prompt changes nothing; with the prompt itself as negative, guidance has no effect."""
    empty = ENCODER.unconditional()
    np.testing.assert_array_equal(draw(negative=[empty, empty]), draw())
    other = draw(negative=[PROMPTS[1], empty])
    assert differ(other[:3], draw()[:3])
    np.testing.assert_array_equal(other[3:], draw()[3:])
    away_from_itself = draw(negative=PROMPTS, sampling=Sampling(5, guidance=3.0)).astype(int)
    assert np.abs(away_from_itself - draw(sampling=Sampling(5, guidance=1.0))).max() <= 1
    with pytest.raises(ValueError, match="there are 1 negative prompts for 2 prompts"):
        draw(negative=PROMPTS[:1])


def test_the_loops_read_no_weights_of_the_time_conditioning():
    """Time embedding and modulations are computed for all steps before the loops."""
    ours = sampler()
    contexts, segments = ours.read(PROMPTS[:1]), split_steps(ours.config.generation.intervals, Sampling(4))
    noise = np.zeros((1, *ours.config.generation.latent_shape), np.float32)
    drawing = functools.partial(draw_latents, ours.config, segments=segments)
    (call,) = jax.make_jaxpr(drawing)(ours.pathway, contexts, *np.eye(2, 1, dtype=np.int32), noise, 2.0).eqns
    loops = [eqn for eqn in call.params["jaxpr"].eqns if eqn.primitive.name == "scan"]
    layer = ours.pathway["experts"][0]
    conditioning = (ours.pathway["time"]["fc1"], layer["modulation"], ours.pathway["head"]["modulation"])
    read = {var.aval.shape for loop in loops for var in loop.invars}
    assert len(loops) == 2 and layer["decoder"]["mlp"]["up_proj"]["weight"].shape in read
    assert not read & {linear["weight"].shape for linear in conditioning}


def test_a_sampling_call_traces_the_context_pass_once_and_outside_the_loop(monkeypatch):
    """For several batches and many steps; and drawing itself has no VLM weights among its inputs."""
    passes, calls = [], []
    forward, call, drawing = qwen2_vl.forward, sampling_module.call_checked, sampling_module.draw_latents

    def counted(*args, **kwargs):
        passes.append(isinstance(args[2].input_ids, jax.core.Tracer))
        return forward(*args, **kwargs)

    def recorded(function, what, *args, **kwargs):
        if function is drawing:
            calls.append(args)
        return call(function, what, *args, **kwargs)

    monkeypatch.setattr(qwen2_vl, "forward", counted)
    monkeypatch.setattr(sampling_module, "call_checked", recorded)
    sampling_module.read_prompts.clear_cache()
    drawing.clear_cache()
    draw(sampling=Sampling(7), batch_size=2)
    assert passes == [True], "one context pass, traced under jit"
    assert len(calls) == 3
    tables = jax.tree.leaves((sampler().vlm["text"]["vocabulary"], sampler().vlm["vision"]))
    big = {leaf.shape for leaf in tables if leaf.ndim > 1}
    assert not big & {np.shape(leaf) for leaf in jax.tree.leaves(calls[0])}
    sampling_module.read_prompts.clear_cache()


def test_a_grid_enlarges_small_images_and_its_size_is_known():
    images = np.random.default_rng(0).integers(0, 256, (2 * 9, 8, 16, 3)).astype(np.uint8)
    grid = labelled_grid(images, ["a", "b"])
    assert grid.size == grid_size((8, 16), 2, 9) == (MARGIN + 8 * (64 + MARGIN), MARGIN + 2 * (LABEL_HEIGHT + 2 * 36))
    left, top = MARGIN + 2 * (64 + MARGIN), MARGIN + 2 * LABEL_HEIGHT + 2 * 36
    shown = np.asarray(grid)[top : top + 32, left : left + 64]
    np.testing.assert_array_equal(shown, images[9 + 2].repeat(4, axis=0).repeat(4, axis=1))
