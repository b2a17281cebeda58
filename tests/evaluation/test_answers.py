"""The accuracy of answers: which count as right, of which turn, and how long they may be."""

import types

import pytest

from lattejax.errors import UserError
from lattejax.evaluation.answers import AnswerAccuracy, answer_accuracy
from lattejax.evaluation.registry import open_evaluator
from lattejax.runs.data import open_data
from tests.helpers import tiny_config

ANSWERS = ["red", "a green bicycle", "no", "two of them", "yes"]  # the last turn's; of the first "first" and a number


class Conversations:
    def __len__(self):
        return len(ANSWERS)

    def text(self, index, turn):
        return "?", ANSWERS[index] if turn == -1 else f"first {index}"

    def unanswered(self, index, turn):
        return index, turn


class Answerer:
    """Answers some of both turns rightly."""

    SAID = ("red", "a green", "", "two of them!", "yes")  # right, cut, empty, longer, right
    encoder = types.SimpleNamespace(tokenizer=lambda texts, **_: {"input_ids": [text.split() for text in texts]})

    def __init__(self):
        self.asked, self.most = [], set()

    def generate(self, prompts, decoding, size):
        assert len(prompts) == size
        self.asked += prompts
        self.most.add(decoding.max_tokens)
        return [self.SAID[index] if turn == -1 else f"first {min(index, 2)}" for index, turn in prompts]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_an_answer_is_right_word_for_word(batch_size):
    answerer = Answerer()
    assert answer_accuracy(answerer, Conversations(), 0, batch_size) == 2 / 5
    assert {index for index, _ in answerer.asked} == set(range(5))
    assert answerer.most == {4}, "the longest answer, and the turn's end"
    assert answer_accuracy(Answerer(), Conversations(), 0, batch_size, turn=0) == 3 / 5


def test_the_turn_and_the_number_of_questions_are_the_settings():
    for settings, expected in (({"examples": 0}, 0.4), ({"examples": 0, "turn": "first"}, 0.6)):
        config = tiny_config()
        score = open_evaluator("answers", {"type": "answers"} | settings, config, open_data(config)).evaluator
        source = types.SimpleNamespace(questions=lambda split, encoder: {"test": Conversations()}[split])
        subject = types.SimpleNamespace(answerer=Answerer(), source=source, config=config)
        assert score(subject).figures == {"answer_accuracy": expected}
    few = Answerer()
    answer_accuracy(few, Conversations(), 2, 10)
    assert len(few.asked) == 2
    with pytest.raises((UserError, ValueError), match="turn='second' must be one of last, first"):
        AnswerAccuracy(0, "second")
