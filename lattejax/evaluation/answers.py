"""The accuracy of answers to held-out questions."""

import dataclasses

import numpy as np

from lattejax.configuration import Config
from lattejax.data.examples import Questions, Source
from lattejax.errors import UserError
from lattejax.evaluation.protocol import Report, Subject
from lattejax.ranges import Natural, check_ranges
from lattejax.sampling.answers import Answerer, Decoding

TURNS = {"last": -1, "first": 0}


@dataclasses.dataclass(frozen=True)
class AnswerAccuracy:
    """The share of `examples` held-out questions (0: all) that greedy decoding answers word for word.

    Of a conversation it is one answer, after the true ones before it: that of the "last" or of the "first" `turn`.
    """

    examples: Natural
    turn: str = "last"
    judges = "vlm"
    named_by = ("",)

    def __post_init__(self):
        check_ranges(self)
        if self.turn not in TURNS:
            raise ValueError(f"turn={self.turn!r} must be one of {', '.join(TURNS)}")

    @classmethod
    def open(
        cls, config: Config, source: Source, *, examples: int | None = None, turn: str = "last"
    ) -> "AnswerAccuracy":
        """`examples` defaults to `config.eval.examples`."""
        if not source.has_questions:
            raise UserError(f"config.data.source={config.data.source!r} has no questions whose answers could be scored")
        return cls(config.eval.examples if examples is None else examples, turn)

    def __call__(self, subject: Subject) -> Report:
        answerer = subject.answerer
        questions = subject.source.questions("test", answerer.encoder)
        size = subject.config.eval.batch_size
        accuracy = answer_accuracy(answerer, questions, self.examples, size, TURNS[self.turn])
        return Report({"answer_accuracy": accuracy})


def answer_accuracy(answerer: Answerer, questions: Questions, examples: int, batch_size: int, turn: int = -1) -> float:
    """The share of held-out questions that are answered word for word.

    Args:
      answerer: the model.
      questions: held-out questions.
      examples: how many of them to use, a fixed random choice; 0: all.
      batch_size: questions per batch.
      turn: which answer of a conversation: 0 the first, −1 the last.
    """
    total = len(questions)
    chosen = np.random.default_rng(0).permutation(total)[: examples or total].tolist()
    expected = [questions.text(i, turn)[1] for i in chosen]
    longest = max(len(ids) for ids in answerer.encoder.tokenizer(expected, add_special_tokens=False)["input_ids"])
    decoding, size = Decoding(max_tokens=longest + 1), min(batch_size, len(chosen))  # and the turn's end
    answers = []
    for start in range(0, len(chosen), size):  # a batch at a time, since pictures take memory
        batch = chosen[start : start + size]
        prompts = [questions.unanswered(i, turn) for i in batch + batch[-1:] * (size - len(batch))]  # all of one shape
        answers += answerer.generate(prompts, decoding, size)[: len(batch)]
    return float(np.mean([answer == text for answer, text in zip(answers, expected, strict=True)]))
