"""What a score is: something that draws, asks or measures with a model, and returns named figures and pictures."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from PIL import Image

from lattejax.configuration import Config
from lattejax.data.examples import Source
from lattejax.data.prompts import EncodedPrompt, PromptEncoder
from lattejax.sampling.answers import Answerer
from lattejax.sampling.images import ImageSampler


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures are numbers, or vectors with an entry for each group; both go by the names under which they are kept."""

    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    pictures: dict[str, Image.Image] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model under evaluation. What it is asked with is made when first asked for, and shared by all evaluators."""

    config: Config
    source: Source
    make_answerer: Callable[[], Answerer]
    make_sampler: Callable[[], ImageSampler]
    make_held_out_losses: Callable[[], Float[np.ndarray, "K"]]

    @functools.cached_property
    def answerer(self) -> Answerer:
        """Answers questions, after held-out pictures or others."""
        return self.make_answerer()

    @functools.cached_property
    def sampler(self) -> ImageSampler:
        """Draws images."""
        return self.make_sampler()

    @functools.cached_property
    def held_out_losses(self) -> Float[np.ndarray, "K"]:
        """Each group's flow-matching loss on held-out drawings."""
        return self.make_held_out_losses()


class Evaluator(Protocol):
    """A score. `registry` lists them."""

    @classmethod
    def open(cls, config: Config, source: Source, **settings: Any) -> "Evaluator":
        """Makes one, before any work starts.

        Args:
          config: the run's.
          source: its data.
          settings: of config.eval.evaluators.<name>.

        Raises:
          UserError: settings or data do not fit.
          TypeError: a setting is unknown.
        """

    def __call__(self, subject: Subject) -> Report: ...


class DrawingScore(Protocol):
    """A score of drawings alone, which can also be had of images that somebody else draws: a sweep does, at several
    numbers of steps."""

    num_prompts: int

    def prompts(self, encoder: PromptEncoder) -> list[EncodedPrompt]: ...

    def score(self, images: np.ndarray) -> dict[str, float]:
        """Figures of images [P · n, H, W, 3], n of each of the P prompts, in their order."""
