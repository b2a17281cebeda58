"""The speed of drawing images, from prompt tokens to latents; see `measuring`."""

import dataclasses

import jax.numpy as jnp

from lattejax.benchmarks.measuring import (
    Result,
    Work,
    first_group,
    layer_products,
    load_baseline,
    measure,
    must_agree,
    num_tokens,
    random_params,
    random_prompts,
    without_vision,
)
from lattejax.configuration import Config
from lattejax.flow.schedule import Sampling, split_steps
from lattejax.models import flops, latte_flow
from lattejax.sampling.images import draw_latents, read_prompts, sample_noise


def sample(config: Config, work: Work, against: str) -> Result:
    """One call for `batch_size` images, from prompt tokens to latents; against PyTorch, steps of one group."""
    return single_group_steps(config, work) if against == "torch" else complete_images(config, work, against)


def complete_images(config: Config, work: Work, against: str) -> Result:
    """The context pass and all steps, without the autoencoder."""
    config = without_vision(config)
    model, params = config.model_config, random_params(config)
    pathway, vlm = latte_flow.pathway(model, params), params.pop("vlm")
    prompts = random_prompts(config, work.batch_size + 1, work.prompt_tokens)  # and the empty prompt, equally long
    rows, empty = jnp.arange(work.batch_size), jnp.full(work.batch_size, work.batch_size)  # the empty prompt is last

    def draw(model=model):
        segments = split_steps(model.generation.intervals, Sampling(work.steps, work.guidance))
        contexts = read_prompts(model, vlm, prompts)
        noise = sample_noise(0, rows, model.generation.latent_shape)
        return draw_latents(model, pathway, contexts, rows, empty, noise, work.guidance, segments=segments)

    calls = {"ours": draw, "context": lambda: read_prompts(model, vlm, prompts)}
    products = layer_products(model.vlm.text, work.rows * num_tokens(config))
    if against == "vanilla":
        one_group = dataclasses.replace(model.generation, num_groups=1, group_sizes=(), interval_edges=())
        calls["theirs"] = lambda: draw(dataclasses.replace(model, generation=one_group))
    if against == "janus":
        baseline = load_baseline("janus").Janus(work.batch_size, work.prompt_tokens, work.guidance)
        calls["theirs"] = baseline.draw
    work_flops = flops.reading(model.vlm.text, work.prompt_tokens) * len(prompts.mask)
    work_flops += work.steps * work.rows * flops.velocity(model.generation, work.prompt_tokens)
    result, seconds = measure(config, work, calls, products, work_flops, against)
    return result | {
        "seconds_per_image": seconds["ours"] / work.batch_size,
        "context_seconds": seconds["context"],
        "step_seconds": (seconds["ours"] - seconds["context"]) / work.steps,
    }


def single_group_steps(config: Config, work: Work) -> Result:
    """Steps of one group of L/K layers on given contexts; all figures are for one step."""
    config = without_vision(first_group(config))
    model, params = config.model_config, random_params(config)
    pathway = latte_flow.pathway(model, params)
    contexts = read_prompts(model, params.pop("vlm"), random_prompts(config, work.batch_size + 1, work.prompt_tokens))
    rows, empty = jnp.arange(work.batch_size), jnp.full(work.batch_size, work.batch_size)  # the empty prompt is last
    noise = sample_noise(0, rows, model.generation.latent_shape)
    segments = split_steps(model.generation.intervals, Sampling(work.steps, work.guidance))

    def draw():
        return draw_latents(model, pathway, contexts, rows, empty, noise, work.guidance, segments=segments)

    baseline = load_baseline("pathway").Sampler(model.generation, pathway, contexts, noise, work.guidance, work.steps)
    must_agree(draw(), baseline.draw())
    products = layer_products(model.vlm.text, work.rows * num_tokens(config))
    work_flops = work.steps * work.rows * flops.velocity(model.generation, work.prompt_tokens)
    calls = {"ours": draw, "theirs": baseline.draw}
    return measure(config, work, calls, products, work_flops, "torch", work.steps)[0]
