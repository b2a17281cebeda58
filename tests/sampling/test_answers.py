"""Answers against greedy decoding without a cache, and sampling against transformers' top-p filter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from lattejax.data import digits
from lattejax.models import qwen2_vl
from lattejax.sampling import answers
from lattejax.sampling.answers import Answerer, Decoding, TokenSampling, choose, keep_top
from lattejax.sampling.padding import bucket
from tests.helpers import encoder_for, randomize, tiny_config

CONFIG = tiny_config()
VLM_CONFIG = CONFIG.model_config.vlm
ENCODER = encoder_for(CONFIG)
VLM = randomize(qwen2_vl.init(VLM_CONFIG, jax.random.key(0)), 1, 0.1)


@pytest.fixture
def answerer():
    return Answerer(VLM_CONFIG, qwen2_vl.unstack(VLM), ENCODER)


def prompts():
    source = digits.Questions("test", ENCODER)
    return [source.unanswered(0), ENCODER.question("Is this a seven?"), source.unanswered(5)]


def tokens(answerer, count, stops=(-1,), **settings):
    answerer.encoder = encoder_for(CONFIG)
    answerer.encoder.stop_tokens = stops
    batch = answerer.encoder.batch(prompts())
    return np.stack(list(answerer.tokens(batch, Decoding(max_tokens=count, **settings))), axis=1)


def greedy(prompt, count):
    """Token ids, each from a new pass over the complete text so far."""
    ids, generated = prompt.input_ids, []
    forward = jax.jit(qwen2_vl.forward, static_argnames="config")
    for _ in range(count):
        text = type(prompt)(ids, prompt.images)
        hidden, _ = forward(VLM_CONFIG, VLM, ENCODER.batch([text], len(prompt.input_ids) + count))
        generated.append(int(np.argmax(qwen2_vl.logits(VLM_CONFIG, VLM, hidden)[0, len(ids) - 1])))
        ids = np.append(ids, generated[-1])
    return generated


def test_tokens_equal_greedy_decoding_without_a_cache(answerer):
    """In a batch of prompts of different lengths, one without an image."""
    np.testing.assert_array_equal(tokens(answerer, 5), [greedy(prompt, 5) for prompt in prompts()])


def test_rows_stop_at_their_stop_tokens_and_decoding_stops_with_the_last_row(answerer):
    free = tokens(answerer, 6)
    stops = (int(free[0, 2]), int(free[1, 1]), int(free[2, 3]))
    lengths = [next(i for i, token in enumerate(row) if token in stops) + 1 for row in free]
    stopped = tokens(answerer, 6, stops)
    assert stopped.shape[1] == max(lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(stopped[row, :length], free[row, :length])
        assert set(stopped[row, length:]) <= {stops[0]}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_do_not_depend_on_the_batch_and_equal_the_streamed_text(answerer, temperature):
    decoding = Decoding(max_tokens=4, temperature=temperature, top_p=0.9, seed=1)
    together = answerer.generate(prompts(), decoding, batch_size=3)
    assert answerer.generate(prompts(), decoding, batch_size=2) == together
    assert "".join(answerer.stream(prompts()[0], decoding)).strip() == together[0]
    if not temperature:
        assert [answerer.generate([prompt], decoding)[0] for prompt in prompts()] == together


def test_the_same_seed_repeats_an_answer_and_another_seed_changes_it(answerer):
    drawn = [tokens(answerer, 8, temperature=2.0, seed=seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("top_p", [1e-40, 0.1, 0.5, 0.9, 1.0])
def test_top_p_keeps_what_transformers_keeps(top_p):
    logits = np.random.default_rng(0).standard_normal((5, 200)).astype(np.float32) * 3
    expected = TopPLogitsWarper(top_p)(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(keep_top(jnp.asarray(logits), top_p), expected)


def test_samples_follow_the_distribution():
    """Shares of 4,000 samples, within five standard deviations; top_p=0.9 keeps the first three of four tokens."""
    logits = np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.9)):
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), np.arange(4000))
        drawn = choose(jnp.tile(logits, (4000, 1)), TokenSampling(keys, temperature, top_p), 3)
        expected = np.exp(logits / temperature) * (np.arange(4) < (3 if top_p < 1 else 4))
        expected /= expected.sum()
        shares = np.bincount(drawn, minlength=4) / 4000
        assert np.all(np.abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000))


def test_a_tiny_temperature_or_top_p_is_greedy(answerer):
    np.testing.assert_array_equal(tokens(answerer, 5, temperature=1e-4), tokens(answerer, 5))
    np.testing.assert_array_equal(tokens(answerer, 5, temperature=5.0, top_p=1e-6), tokens(answerer, 5))


@pytest.mark.parametrize(
    "setting",
    [
        dict(max_tokens=0),
        dict(temperature=-1.0),
        dict(temperature=1e-40),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(seed=-1),
        dict(seed=2**63),
    ],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Decoding(**setting)


def test_buckets_waste_at_most_a_quarter():
    sizes = [bucket(size) for size in range(1, 5000)]
    assert all(size <= padded <= 1.25 * size for size, padded in zip(range(1, 5000), sizes, strict=True))
    assert len(set(sizes)) == 8 + 4 * 9 + 1  # four per doubling from 8 to 4,096, and one more


def test_prefill_and_decoding_are_compiled_once_for_a_range_of_lengths(answerer):
    """Texts of 33 to 40 tokens and answers of up to 8 or 9 give one shape; the 41st token gives another."""
    answers.read.clear_cache()
    answers.read_token.clear_cache()
    questions, lengths = [ENCODER.question("seven " * count + "?") for count in range(1, 30)], set()
    for prompt in questions:
        length = len(prompt.input_ids)
        if 33 <= length <= 40 and length not in lengths:
            list(answerer.stream(prompt, Decoding(max_tokens=7 + len(lengths) % 2)))
            lengths.add(length)
    assert len(lengths) > 2
    assert (answers.read._cache_size(), answers.read_token._cache_size()) == (1, 1)
    longer = next(prompt for prompt in questions if len(prompt.input_ids) > 40)
    list(answerer.stream(longer, Decoding(max_tokens=3)))
    assert answers.read._cache_size() == 2


def test_batches_of_one_call_are_compiled_once_whatever_images_they_have(answerer):
    """The first batch has two rows with an image, the second has none."""
    answers.read.clear_cache()
    questions = [prompts()[0], prompts()[2], prompts()[1], ENCODER.question("Is this number even or odd?")]
    together = answerer.generate(questions, Decoding(max_tokens=3), batch_size=2)
    assert answers.read._cache_size() == 1
    assert answerer.generate(questions, Decoding(max_tokens=3), batch_size=4) == together
