"""The score of generated digits: does a classifier read the digit that the prompt asked for?"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from etils import epy

from lattejax.configuration import Config
from lattejax.data import digits
from lattejax.data.examples import Source
from lattejax.data.prompts import EncodedPrompt, PromptEncoder
from lattejax.errors import UserError
from lattejax.evaluation.drawn import score_drawings
from lattejax.evaluation.frechet import frechet_distance
from lattejax.evaluation.protocol import Report, Subject
from lattejax.flow.schedule import Guidance
from lattejax.ranges import Size, check_ranges

with epy.lazy_imports():
    from sklearn import svm

CLASSES = len(digits.WORDS)


def _vectors(images: np.ndarray) -> np.ndarray:
    """Grey pixels in [0, 1], flattened [n, 64]."""
    return images[..., 0].reshape(len(images), -1) / 255.0


class DigitReader:
    """Classifies generated digits with a support vector machine, fitted on the real training digits."""

    def __init__(self):
        train = digits.load("train")
        self._machine = svm.SVC(gamma="scale", C=10.0).fit(_vectors(train.images), train.labels)

    def score(self, images: np.ndarray) -> dict[str, float]:
        """The share of images classified as the requested digit, and their Fréchet distance to the test images.

        Args:
          images: uint8 [10 · n, 8, 8, 3], zeros first. The distance is in pixels of [0, 1].
        """
        drawn, asked = _vectors(images), np.repeat(np.arange(CLASSES), len(images) // CLASSES)
        return {
            "generated_accuracy": float(np.mean(self._machine.predict(drawn) == asked)),
            "frechet": frechet_distance(drawn, _vectors(digits.load("test").images)),
        }


@functools.cache
def digit_reader() -> DigitReader:
    """The reader, fitted once per process."""
    return DigitReader()


def frechet_train_test() -> float:
    """The Fréchet distance of the training images to the test images: what a perfect generator would reach."""
    return frechet_distance(*(_vectors(digits.load(split).images) for split in ("train", "test")))


@dataclasses.dataclass(frozen=True)
class DigitScore:
    """The score of `images` generated images, the same number of each digit. They are drawn as config.eval defines, or
    at each of several guidance scales; in that case the score of the training images is reported too."""

    config: Config
    images: Size
    guidance: tuple[Guidance, ...] = ()
    judges = "pathway"
    num_prompts = CLASSES

    def __post_init__(self):
        check_ranges(self)
        if self.images % CLASSES:
            raise ValueError(f"images={self.images} must be a multiple of {CLASSES}")

    @property
    def named_by(self) -> list[bool]:
        return [bool(self.guidance)]  # with scales there is a figure of the training images, too

    @classmethod
    def open(cls, config: Config, source: Source, *, images: int, guidance: Sequence[float] = ()) -> "DigitScore":
        if config.data.source != "digits":
            raise UserError(f"config.data.source={config.data.source!r} has no digits to score")
        return cls(config, images, tuple(guidance))

    def prompts(self, encoder: PromptEncoder) -> list[EncodedPrompt]:
        """One for each digit, zero first."""
        return digits.requests(encoder, self.config.data.prompts)

    def score(self, images: np.ndarray) -> dict[str, float]:
        """See `DigitReader.score`."""
        return digit_reader().score(images)

    def __call__(self, subject: Subject) -> Report:
        figures = score_drawings(self, self.score, subject, self.config, self.guidance)
        return Report(figures | ({"frechet_train_test": frechet_train_test()} if self.guidance else {}))
