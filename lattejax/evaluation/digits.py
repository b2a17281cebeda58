"""The score of the digits run: are answers right, and are generated digits read as what was asked for?"""

import numpy as np
from etils import epy

from lattejax.configuration import Config
from lattejax.data import digits
from lattejax.data.examples import Questions
from lattejax.data.prompts import PromptEncoder
from lattejax.errors import UserError
from lattejax.evaluation.frechet import frechet_distance
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import VLMConfig
from lattejax.sampling.answers import Answerer, Decoding

with epy.lazy_imports():
    from sklearn import svm

LONGEST_ANSWER = 6  # tokens


def answer_accuracy(
    config: VLMConfig, params: Params, encoder: PromptEncoder, questions: Questions, *, examples: int, batch_size: int
) -> float:
    """The share of held-out questions that greedy decoding answers word for word.

    Args:
      config: the VLM's geometry.
      params: its weights, a tree for each layer.
      encoder: of the prompts.
      questions: held-out ones.
      examples: how many of them, a fixed random choice; 0: all.
      batch_size: questions answered at a time.
    """
    total = len(questions)
    chosen = np.random.default_rng(0).permutation(total)[: examples or total].tolist()
    prompts = [questions.unanswered(i) for i in chosen]
    answers = Answerer(config, params, encoder).generate(prompts, Decoding(max_tokens=LONGEST_ANSWER), batch_size)
    return float(np.mean([said == questions.text(i)[1] for said, i in zip(answers, chosen, strict=True)]))


def _vectors(images: np.ndarray) -> np.ndarray:
    """Grey pixels in [0, 1], flattened [n, 64]."""
    return images[..., 0].reshape(len(images), -1) / 255.0


def check_digits(config: Config) -> None:
    """Raises `UserError` if digits are to be drawn and scored, and the data is something else."""
    for key in ("scored_images", "final_images"):
        if getattr(config.eval, key) and config.data.source != "digits":
            raise UserError(f"config.eval.{key} scores digits; set it to 0 with data.source={config.data.source!r}")


class DigitReader:
    """Reads drawn digits, with a support vector machine fitted on the real training digits."""

    def __init__(self):
        train = digits.load("train")
        self._machine = svm.SVC(gamma="scale", C=10.0).fit(_vectors(train.images), train.labels)

    def score(self, images: np.ndarray) -> dict[str, float]:
        """The share of images read as what was asked for, and their Fréchet distance to the test images.

        Args:
          images: uint8 [10 · n, 8, 8, 3], zeros first. The distance is in pixels of [0, 1].
        """
        drawn, asked = _vectors(images), np.repeat(np.arange(10), len(images) // 10)
        return {
            "generated_accuracy": float(np.mean(self._machine.predict(drawn) == asked)),
            "frechet": frechet_distance(drawn, _vectors(digits.load("test").images)),
        }


def frechet_train_test() -> float:
    """The training images' own distance to the test images: what a generator can hope to reach."""
    return frechet_distance(*(_vectors(digits.load(split).images) for split in ("train", "test")))
