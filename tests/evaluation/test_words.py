"""The reader of words: what captions say, what it learns from real pictures, and which settings are refused."""

import re

import numpy as np
import pytest

from lattejax.data import digits
from lattejax.data.digits import DigitSource
from lattejax.errors import UserError
from lattejax.evaluation.registry import open_evaluator
from lattejax.evaluation.words import read_caption
from lattejax.runs.data import open_data
from tests.helpers import tiny_config

WORDS = {"digit": digits.WORDS, "kind": ("handwritten", "printed")}
SETTINGS = {"type": "words", "words": WORDS, "images": 40, "prompts": 10}


@pytest.mark.parametrize(
    "caption, found",
    [
        ("A large RED circle at the top left.", [0, 1]),
        ("a red circle at the top", [0, 0]),
        ("Red, a red circle at the top", [0, 0]),
        ("topless, reddish", None),  # parts of words do not count
        ("a blue circle at the left of a red one", None),  # two colours
        ("a red circle", None),
    ],
)
def test_a_caption_has_one_word_of_each_attribute_or_is_not_read(caption, found):
    words = {"colour": ("red", "blue"), "place": ("top", "top left", "left")}
    assert read_caption(caption, words) == found


def test_letters_that_are_equal_regardless_of_case_are_no_error():
    assert read_caption("a cırcle", {"shape": ("square", "circle")}) == [1]


def test_it_reads_real_pictures_and_scores_each_attribute():
    config = tiny_config(eval__evaluators={"words": SETTINGS})
    score = open_evaluator("words", SETTINGS, config, open_data(config)).evaluator
    assert sorted(score.captions) == sorted(digits.CAPTIONS) and score.captions != list(digits.CAPTIONS)
    test, asked = digits.load("test"), [digits.CAPTIONS.index(caption) for caption in score.captions]
    real = np.concatenate([test.images[test.labels == label][:4] for label in asked])
    figures = score.score(real)
    assert figures["drawn_digit"] == figures["drawn_as_asked"] > 0.9
    assert figures["drawn_kind"] == figures["reader_kind"] == 1
    assert 0.95 < figures["reader_digit"] < 1
    half_wrong = np.concatenate([real[:20], np.roll(real[20:], 4, axis=0)])
    assert score.score(half_wrong)["drawn_digit"] == pytest.approx(figures["drawn_digit"] / 2, abs=0.1)


def test_it_may_draw_some_captions_alone():
    config = tiny_config()
    settings = SETTINGS | {"prompts": 2, "matching": "(two|nine)$", "prefix": "some_"}
    score = open_evaluator("words", settings, config, open_data(config)).evaluator
    assert sorted(score.captions) == sorted(caption for caption in digits.CAPTIONS if re.search("(two|nine)$", caption))
    test, asked = digits.load("test"), [digits.CAPTIONS.index(caption) for caption in score.captions]
    figures = score.score(np.concatenate([test.images[test.labels == label][:20] for label in asked]))
    assert all(name.startswith("some_") for name in figures) and figures["some_drawn_digit"] > 0.9
    assert len(score._held_out.indices) == np.isin(test.labels, asked).sum()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"images": 45}, "images=45 must be a multiple of prompts=10"),
        ({"images": 22, "prompts": 11}, "prompts=11, but 10 different captions are held out"),
        ({"words": {"digit": ["one"]}}, "words.digit=('one',) must be two or more texts, all different"),
        ({"words": {"digit": ["one", "One"]}}, "words.digit=('one', 'One') must be two or more texts, all different"),
        ({"words": {}}, "words is empty"),
        ({"words": {"colour": ["red", "blue"]}}, "no caption of the test split has one word of each of colour"),
        ({"guidance": [float("nan")]}, "guidance"),
        ({"word": 1}, "word"),
        ({"matching": "(one"}, "matching='(one' must be a regular expression"),
        ({"matching": "eleven"}, "has one word of each of digit, kind and matches 'eleven'"),
        ({"matching": "one"}, "prompts=10, but 1 different captions are held out"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, named):
    config = tiny_config()
    with pytest.raises(UserError) as raised:
        open_evaluator("words", SETTINGS | change, config, open_data(config))
    assert named in str(raised.value)


def test_prompts_that_are_pictures_have_no_words():
    config = tiny_config(data__prompts="pictures", train__share_contexts=False)
    with pytest.raises(UserError, match="no words to read"):
        open_evaluator("words", SETTINGS, config, DigitSource("pictures"))
