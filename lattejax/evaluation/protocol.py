"""What a score is: something that draws, asks or measures with a model, and returns named figures and pictures."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from PIL import Image

from lattejax.configuration import Config
from lattejax.data.examples import Source
from lattejax.data.prompts import EncodedPrompt, PromptEncoder
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.functional import Params
from lattejax.sampling.answers import Answerer
from lattejax.sampling.images import ImageSampler


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures are numbers, or vectors with an entry for each group; both go by the names under which they are kept."""

    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    pictures: dict[str, Image.Image] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model under evaluation, and what can be asked of it. Each is made when first asked for, and shared by all
    evaluators; one copy of the weights serves drawing and answering."""

    config: Config
    source: Source
    encoder: PromptEncoder
    mesh: Mesh
    make_weights: Callable[[], Params]  # for inference, see `runs.inference`
    make_held_out_losses: Callable[[], Float[np.ndarray, "K"]] | None = None
    open_decoder: Callable[[], tuple[Autoencoder, Params]] | None = None  # None: there is nothing yet that draws

    @functools.cached_property
    def weights(self) -> Params:
        return self.make_weights()

    @functools.cached_property
    def answerer(self) -> Answerer:
        """Answers questions."""
        return Answerer(self.config.model_config.vlm, self.weights["vlm"], self.encoder)

    @functools.cached_property
    def sampler(self) -> ImageSampler:
        """Draws images."""
        autoencoder, decoder = self.open_decoder()
        return ImageSampler(self.config.model_config, autoencoder, self.encoder, self.weights, decoder, self.mesh)

    @functools.cached_property
    def held_out_losses(self) -> Float[np.ndarray, "K"]:
        """Each group's flow-matching loss on held-out drawings."""
        return self.make_held_out_losses()


@runtime_checkable
class Evaluator(Protocol):
    """A score. `registry` lists them.

    `judges` is the part of the model that it is about. Those of the "vlm" are taken while a stage trains the VLM, those
    of the "pathway" in the second stage.
    """

    judges: Literal["vlm", "pathway"]

    @classmethod
    def open(cls, config: Config, source: Source, **settings: Any) -> "Evaluator":
        """Makes one, before any work starts.

        Args:
          config: the run's.
          source: its data.
          settings: of config.eval.evaluators.<name>, those that are not about when it is taken.

        Raises:
          UserError: settings or data do not fit.
          TypeError: a setting is unknown.
        """

    def __call__(self, subject: Subject) -> Report: ...


@runtime_checkable
class DrawingScore(Protocol):
    """A score of drawings alone, which can also be had of images that somebody else draws: a sweep does, at several
    numbers of steps."""

    images: int  # that it is taken of, as many of each prompt
    num_prompts: int

    def prompts(self, encoder: PromptEncoder) -> list[EncodedPrompt]: ...

    def score(self, images: np.ndarray) -> dict[str, float]:
        """Figures of images [P · n, H, W, 3], n of each of the P prompts, in their order."""
