"""Drawing what a score of drawings evaluates, at one or several guidance scales."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from lattejax.configuration import Config
from lattejax.data.prompts import EncodedPrompt, PromptEncoder
from lattejax.evaluation.protocol import Subject

Figures = dict[str, float]


class Requests(Protocol):
    """What is drawn: so many images, the same number for each prompt."""

    images: int
    num_prompts: int

    def prompts(self, encoder: PromptEncoder) -> list[EncodedPrompt]: ...


def score_drawings(
    requests: Requests,
    figures: Callable[[np.ndarray], Figures],
    subject: Subject,
    config: Config,
    guidance: Sequence[float] = (),
) -> Figures:
    """Draws images as config.eval defines, and returns their figures.

    Args:
      requests: what is drawn.
      figures: figures of images [P · n, H, W, 3]: n of each of the P prompts, in order.
      subject: the model.
      config: the run's config.
      guidance: several scales, each of which is appended to its figures' names; empty: config.eval's own.
    """

    def at(scale: float) -> Figures:
        images = subject.sampler(
            requests.prompts(subject.encoder),
            dataclasses.replace(config.eval.sampling, guidance=scale),
            images_per_prompt=requests.images // requests.num_prompts,
            batch_size=config.eval.batch_size,
            seed=config.seed,
        )
        return figures(images)

    if not guidance:
        return at(config.eval.guidance)
    each = {scale: at(float(scale)) for scale in guidance}
    return {f"{name}_guidance_{scale:g}": value for scale in guidance for name, value in each[scale].items()}
