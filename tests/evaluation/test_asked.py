"""The score of drawings by a VLM's answers, and the likelihoods it rests on."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lattejax.data import digits
from lattejax.data.chats import EncodedPrompt
from lattejax.errors import UserError
from lattejax.evaluation import asked
from lattejax.evaluation.registry import open_evaluator
from lattejax.models import qwen2_vl
from lattejax.runs.data import open_data
from lattejax.sampling.answers import Answerer, Decoding
from tests.helpers import encoder_for, randomize, tiny_config

CONFIG = tiny_config()
ENCODER = encoder_for(CONFIG)
VLM = randomize(qwen2_vl.init(CONFIG.model_config.vlm, jax.random.key(0)), 1, 0.1)
SETTINGS = {"type": "asked", "images": 6, "prompts": 3}


@pytest.fixture(scope="module")
def answerer():
    return Answerer(CONFIG.model_config.vlm, qwen2_vl.unstack(VLM), ENCODER)


def score(**settings):
    return open_evaluator("asked", SETTINGS | settings, CONFIG, open_data(CONFIG)).evaluator


def log_likelihood(prompt):
    """Of one complete prompt, token by token, in float64."""
    batch = jax.tree.map(jnp.asarray, ENCODER.batch([prompt]))
    hidden, _ = qwen2_vl.forward(CONFIG.model_config.vlm, VLM, batch)
    logits = np.asarray(qwen2_vl.logits(CONFIG.model_config.vlm, VLM, hidden)[0], np.float64)
    total = 0.0
    for place in np.flatnonzero(prompt.is_answer)[:-1]:  # the last ends the turn
        row = logits[place - 1]
        total += row[prompt.input_ids[place]] - np.log(np.sum(np.exp(row - row.max()))) - row.max()
    return total


def test_likelihoods_equal_float64_whatever_the_batch(answerer):
    """Answers of several lengths, with an image and without; float32's rounding over a few tokens is below 1e-4."""
    image = ENCODER.read_image(Image.fromarray(digits.load("test").images[0]).resize((40, 24)))
    complete = [
        ENCODER.question("Which digit is this?", [image], "seven"),
        ENCODER.question("Is this a seven?", (), "yes"),
        ENCODER.question("Is it?", [image, image], "It is a handwritten seven."),
        ENCODER.question("Is it? " * 60, (), "no"),
    ]
    lengths = [len(prompt.input_ids) for prompt in complete]
    assert min(lengths) < qwen2_vl.LOGITS_AT_ONCE < max(lengths), "scored in one block and in several"
    expected = [log_likelihood(prompt) for prompt in complete]
    for size in (1, 2, 3):
        np.testing.assert_allclose(answerer.log_likelihoods(complete, size)[0], expected, atol=1e-4)


def test_what_greedy_decoding_says_is_the_likeliest(answerer):
    prompt = ENCODER.question("Which digit is this?")
    said = np.concatenate(list(answerer.tokens(ENCODER.batch([prompt]), Decoding(max_tokens=3))))
    assert not set(said) & set(ENCODER.stop_tokens)
    others = said.copy()
    others[1] = (others[1] + 1) % 100
    complete = []
    for answer in (said, others):
        ids = np.concatenate([prompt.input_ids, answer, ENCODER.stop_tokens[:1]])
        complete.append(EncodedPrompt(ids, is_answer=np.arange(len(ids)) >= len(prompt.input_ids)))
    assert answerer.log_likelihoods(complete)[1].tolist() == [True, False]


def test_the_judge_is_asked_about_each_drawing_in_words_of_its_prompt():
    questions = []

    class Judge:
        encoder = types.SimpleNamespace(
            read_image=lambda image: np.asarray(image).mean(),
            question=lambda question, images, answer: questions.append((question, images, answer)),
        )

        def log_likelihoods(self, prompts, batch_size):
            assert len(prompts) <= batch_size
            return np.log(np.linspace(0.25, 0.75, len(prompts))), np.arange(len(prompts)) % 2 == 0

    evaluator = score(question="What is this?", answer="It is {prompt}.")
    assert set(evaluator.captions) < set(digits.CAPTIONS) and len(evaluator.captions) == 3
    images = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    figures = evaluator.figures(Judge(), images)
    answers = [f"It is {caption}." for caption in evaluator.captions for _ in range(2)]
    assert questions == [("What is this?", [i], answer) for i, answer in enumerate(answers)]
    assert figures == {"self_consistency_probability": pytest.approx(0.5), "self_consistency_accuracy": 0.5}


@pytest.mark.parametrize("vlm, judge, name", [("", "own", "self_consistency"), ("an outside judge", "other", "asked")])
def test_an_outside_judge_is_asked_if_there_is_one(vlm, judge, name, monkeypatch):
    class Judge:
        def __init__(self, name):
            self.name = name
            self.encoder = types.SimpleNamespace(read_image=lambda image: image, question=lambda *_: name)

        def log_likelihoods(self, prompts, batch_size):
            assert set(prompts) == {judge}
            return np.zeros(len(prompts)), np.ones(len(prompts), bool)

    monkeypatch.setattr(asked.Pretrained, "open", lambda path: None)
    monkeypatch.setattr(asked.Answerer, "load", lambda path, dtype, mesh: Judge({"an outside judge": "other"}[path]))
    subject = types.SimpleNamespace(
        answerer=Judge("own"), encoder=ENCODER, mesh=None, sampler=lambda *_, **__: np.zeros((6, 8, 8, 3), np.uint8)
    )
    assert score(vlm=vlm)(subject).figures == {f"{name}_probability": 1.0, f"{name}_accuracy": 1.0}


def test_without_a_number_of_prompts_those_of_the_config_are_drawn():
    assert score(prompts=0, images=2 * len(CONFIG.eval.prompts)).captions == CONFIG.eval.prompts


@pytest.mark.parametrize(
    "change, named",
    [
        ({"images": 7}, "images=7 must be a multiple of prompts=3"),
        ({"prompts": 11}, "prompts=11, but 10 different captions are held out"),
        ({"question": "Is it red?"}, "neither question='Is it red?' nor answer='yes' contains {prompt}"),
        ({"answer": " "}, "question and answer must not be empty"),
        ({"vlm": "nowhere"}, "nowhere"),
        ({"guidance": [-1.0]}, "guidance"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, named):
    with pytest.raises(UserError) as raised:
        score(**change)
    assert named in str(raised.value)
