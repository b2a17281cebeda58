"""Streaming decoding against greedy decoding that reads everything again for each token."""

import jax
import numpy as np

from lattejax.data import digits
from lattejax.models import qwen2_vl
from lattejax.sampling.answers import answer, stream, stream_text
from tests.helpers import encoder_for, randomize, tiny_config

CONFIG = tiny_config()
VLM_CONFIG = CONFIG.model_config.vlm
ENCODER = encoder_for(CONFIG)
VLM = randomize(qwen2_vl.init(VLM_CONFIG, jax.random.key(0)), 1, 0.1)
LISTED = qwen2_vl.unstack(VLM)


def prompts():
    source = digits.Questions("test", ENCODER)
    return [source.unanswered(0), ENCODER.question("Is this a seven?"), source.unanswered(5)]


def greedy(prompt, count):
    """Token ids, each from a fresh pass over the whole text so far."""
    ids, said = prompt.input_ids, []
    forward = jax.jit(qwen2_vl.forward, static_argnames="config")
    for _ in range(count):
        whole = type(prompt)(ids, prompt.images)
        hidden, _ = forward(VLM_CONFIG, VLM, ENCODER.batch([whole], len(prompt.input_ids) + count))
        said.append(int(np.argmax(qwen2_vl.logits(VLM_CONFIG, VLM, hidden)[0, len(ids) - 1])))
        ids = np.append(ids, said[-1])
    return said


def test_streamed_tokens_are_the_greedy_ones():
    """In a batch of prompts of different lengths, one without an image."""
    streamed = stream(VLM_CONFIG, LISTED, ENCODER.batch(prompts()), max_tokens=5, stop_tokens=(-1,))
    np.testing.assert_array_equal(np.stack(list(streamed), axis=1), [greedy(prompt, 5) for prompt in prompts()])


def test_rows_stop_at_their_stop_tokens_and_the_stream_with_the_last():
    free = np.stack(list(stream(VLM_CONFIG, LISTED, ENCODER.batch(prompts()), max_tokens=6, stop_tokens=(-1,))), 1)
    stops = (int(free[0, 2]), int(free[1, 1]), int(free[2, 3]))
    lengths = [next(i for i, token in enumerate(row) if token in stops) + 1 for row in free]
    tokens = np.stack(list(stream(VLM_CONFIG, LISTED, ENCODER.batch(prompts()), max_tokens=6, stop_tokens=stops)), 1)
    assert tokens.shape[1] == max(lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(tokens[row, :length], free[row, :length])
        assert set(tokens[row, length:]) <= {stops[0]}


def test_answers_do_not_depend_on_the_batch_and_equal_the_streamed_text():
    settings = dict(max_tokens=4, batch_size=2)
    together = answer(VLM_CONFIG, LISTED, ENCODER, prompts(), **settings)
    alone = [answer(VLM_CONFIG, LISTED, ENCODER, [prompt], **settings)[0] for prompt in prompts()]
    pieces = [list(stream_text(VLM_CONFIG, LISTED, ENCODER, prompt, max_tokens=4)) for prompt in prompts()]
    assert together == alone == ["".join(parts).strip() for parts in pieces]
