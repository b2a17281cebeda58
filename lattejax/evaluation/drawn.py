"""What a model draws and answers in an evaluation, as its config says."""

import numpy as np
from PIL import Image

from lattejax.configuration import Config
from lattejax.data import digits
from lattejax.evaluation.digits import answer_accuracy
from lattejax.flow.schedule import Sampling
from lattejax.models.functional import Params
from lattejax.runs.data import open_data
from lattejax.runs.inference import inference_weights
from lattejax.runs.run import Run
from lattejax.sampling.grid import labelled_grid
from lattejax.sampling.images import ImageSampler


def held_out_answers(run: Run, vlm: Params, examples: int) -> float:
    """The share of `examples` held-out questions that are answered right; 0: of all."""
    config = run.config
    return answer_accuracy(
        config.model_config.vlm,
        inference_weights(config, {"vlm": vlm}, run.mesh)["vlm"],
        run.encoder,
        open_data(config).questions("test", run.encoder),
        examples=examples,
        batch_size=config.eval.batch_size,
    )


def sample_grid(config: Config, sampler: ImageSampler) -> Image.Image:
    """Draws the config's prompts, or where prompts are pictures one of each digit."""
    settings = config.eval
    if config.data.prompts == "captions":
        labels, prompts = settings.prompts, [sampler.encoder.drawing(prompt) for prompt in settings.prompts]
    else:
        labels = [f"{digits.REQUEST} {word}" for word in digits.WORDS]
        prompts = digits.requests(sampler.encoder, config.data.prompts)
    images = sampler(
        prompts,
        settings.sampling,
        images_per_prompt=settings.images_per_prompt,
        batch_size=settings.batch_size,
        seed=config.seed,
    )
    return labelled_grid(images, labels)


def draw_digits(config: Config, sampler: ImageSampler, count: int, sampling: Sampling) -> np.ndarray:
    """Draws `count` images, zeros first, as many of each digit."""
    return sampler(
        digits.requests(sampler.encoder, config.data.prompts),
        sampling,
        images_per_prompt=count // len(digits.WORDS),
        batch_size=config.eval.batch_size,
        seed=config.seed,
    )
