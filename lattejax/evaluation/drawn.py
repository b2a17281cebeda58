"""Drawing what a score of drawings evaluates, at one or several guidance scales."""

import dataclasses
from collections.abc import Sequence

from lattejax.configuration import Config
from lattejax.evaluation.protocol import DrawingScore, Subject


def score_drawings(
    score: DrawingScore, subject: Subject, config: Config, guidance: Sequence[float] = ()
) -> dict[str, float]:
    """Draws a score's images as config.eval defines, and returns its figures.

    Args:
      score: what is drawn, and how many of each prompt.
      subject: the model.
      config: the run's config.
      guidance: several scales, each of which is appended to its figures' names; empty: config.eval's own.
    """
    if guidance:
        each = {scale: _drawn(score, subject, config, float(scale)) for scale in guidance}
        return {f"{name}_guidance_{scale:g}": value for scale in guidance for name, value in each[scale].items()}
    return _drawn(score, subject, config, config.eval.guidance)


def _drawn(score: DrawingScore, subject: Subject, config: Config, guidance: float) -> dict[str, float]:
    images = subject.sampler(
        score.prompts(subject.encoder),
        dataclasses.replace(config.eval.sampling, guidance=guidance),
        images_per_prompt=score.images // score.num_prompts,
        batch_size=config.eval.batch_size,
        seed=config.seed,
    )
    return score.score(images)
