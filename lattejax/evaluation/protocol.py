"""The evaluator protocol: a score evaluates a model by any means, and returns named figures and pictures."""

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
    """The results of scores, by name. A figure is a number, or a vector with an entry for each group."""

    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    pictures: dict[str, Image.Image] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model under evaluation. Its parts are made on first use and shared by all evaluators; drawing and answering use
    one copy of the weights."""

    config: Config
    source: Source
    encoder: PromptEncoder
    mesh: Mesh
    make_weights: Callable[[], Params]  # for inference, see `runs.inference`
    make_held_out_losses: Callable[[], Float[np.ndarray, "K"]] | None = None
    open_decoder: Callable[[], tuple[Autoencoder, Params]] | None = None  # None: the model cannot draw yet
    repetition_penalty: float = 1.0  # of the model's answers

    @functools.cached_property
    def weights(self) -> Params:
        return self.make_weights()

    @functools.cached_property
    def answerer(self) -> Answerer:
        """Answers questions."""
        return Answerer(self.config.model_config.vlm, self.weights["vlm"], self.encoder, self.repetition_penalty)

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

    `judges` is the part of the model that it evaluates. Scores of the "vlm" are taken while a stage trains the VLM,
    scores of the "pathway" in the second stage.

    A class may also have `named_by`: what the names of its figures depend on, such as a prefix, one entry for each set
    of names that it returns. Two scores of a type that share an entry are refused if they would be taken together.
    """

    judges: Literal["vlm", "pathway"]

    @classmethod
    def open(cls, config: Config, source: Source, **settings: Any) -> "Evaluator":
        """Makes an evaluator, before any work starts.

        Args:
          config: the run's config.
          source: the run's data.
          settings: those of config.eval.evaluators.<name>, without the ones that schedule it.

        Raises:
          UserError: settings or data do not fit.
          TypeError: a setting is unknown.
        """

    def __call__(self, subject: Subject) -> Report: ...


@runtime_checkable
class DrawingScore(Protocol):
    """A score of drawings only, so it can also be taken of images drawn elsewhere: a sweep draws them with several
    numbers of steps."""

    images: int  # the number it is taken of, the same number for each prompt
    num_prompts: int

    def prompts(self, encoder: PromptEncoder) -> list[EncodedPrompt]: ...

    def score(self, images: np.ndarray) -> dict[str, float]:
        """Figures of images [P · n, H, W, 3]: n of each of the P prompts, in the prompts' order."""
