"""The score of the digits run: are answers right, and are generated digits read as what was asked for?"""

from collections.abc import Callable

import numpy as np
from sklearn.svm import SVC

from lattejax.data import digits
from lattejax.data.prompts import PromptEncoder
from lattejax.evaluation.frechet import frechet_distance
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import VLMConfig
from lattejax.sampling.answers import answer

LONGEST_ANSWER = 6  # tokens


def answer_accuracy(
    config: VLMConfig, params: Params, encoder: PromptEncoder, *, examples: int, batch_size: int
) -> float:
    """The share of held-out questions that greedy decoding answers word for word.

    Args:
      config: the VLM's geometry.
      params: its weights, a tree for each layer.
      encoder: of the prompts.
      examples: how many of the held-out questions, a fixed random choice; 0: all.
      batch_size: questions answered at a time.
    """
    questions = digits.Questions("test", encoder)
    total = len(questions)
    chosen = np.random.default_rng(0).permutation(total)[: examples or total].tolist()
    prompts = [questions.unanswered(i) for i in chosen]
    answers = answer(config, params, encoder, prompts, max_tokens=LONGEST_ANSWER, batch_size=batch_size)
    return float(np.mean([said == questions.text(i)[1] for said, i in zip(answers, chosen, strict=True)]))


def _vectors(images: np.ndarray) -> np.ndarray:
    """Grey pixels in [0, 1], flattened [n, 64]."""
    return images[..., 0].reshape(len(images), -1) / 255.0


def generation_scores(draw: Callable[[float], np.ndarray], images_per_digit: int) -> dict[str, float]:
    """Scores generated digits at guidance 1 and 2.

    A support vector machine fitted on the real training digits reads them. The Fréchet distance is to the test images,
    in pixels of [0, 1]; `frechet_train_test`, the training images' own, is what it can be hoped to reach.

    Args:
      draw: takes a guidance scale, returns uint8 images [10 · images_per_digit, 8, 8, 3], zeros first.
      images_per_digit: images of each digit.
    """
    train, test = digits.load("train"), digits.load("test")
    reader = SVC(gamma="scale", C=10.0).fit(_vectors(train.images), train.labels)
    real = _vectors(test.images)
    asked = np.repeat(np.arange(10), images_per_digit)
    scores = {}
    for guidance in (1, 2):
        drawn = _vectors(draw(float(guidance)))
        scores[f"generated_accuracy_guidance_{guidance}"] = float(np.mean(reader.predict(drawn) == asked))
        scores[f"frechet_guidance_{guidance}"] = frechet_distance(drawn, real)
    scores["frechet_train_test"] = frechet_distance(_vectors(train.images), real)
    return scores
