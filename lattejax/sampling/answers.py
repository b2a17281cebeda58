"""Answering: a jitted prefill and a jitted one-token step with a KV cache.

Axes: B batch, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lattejax.data.prompts import EncodedPrompt, PromptEncoder
from lattejax.models import qwen2_vl
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import Prompts, VLMConfig

prefill = jax.jit(qwen2_vl.prefill, static_argnames=("config", "capacity"))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode_token(config: VLMConfig, params: Params, state: qwen2_vl.DecodeState, token: jax.Array):
    return qwen2_vl.decode_token(config, params, state, token)


def stream(
    config: VLMConfig, params: Params, prompts: Prompts, *, max_tokens: int, stop_tokens: Sequence[int]
) -> Iterator[np.ndarray]:
    """Yields the greedy answer's tokens [B], one at a time, until every row has met a stop token.

    A row that is done goes on yielding the first stop token.

    Args:
      config: the VLM's geometry.
      params: its weights, a tree for each layer (`qwen2_vl.unstack`).
      prompts: questions, up to where the answer is to be given.
      max_tokens: the longest answer, its stop token included.
      stop_tokens: ids that end an answer.
    """
    logits, state = prefill(config, params, prompts, capacity=max_tokens)
    done = np.zeros(len(prompts.input_ids), bool)
    for count in range(1, max_tokens + 1):
        token = np.where(done, stop_tokens[0], np.asarray(jnp.argmax(logits, axis=-1)))
        yield token
        done |= np.isin(token, stop_tokens)
        if done.all() or count == max_tokens:
            return
        logits, state = decode_token(config, params, state, token)


def answer(
    config: VLMConfig,
    params: Params,
    encoder: PromptEncoder,
    prompts: Sequence[EncodedPrompt],
    *,
    max_tokens: int,
    batch_size: int,
) -> list[str]:
    """Returns the greedy answers to many questions; see `stream` for the weights' form."""
    answers = []
    length = max(len(prompt.input_ids) for prompt in prompts)
    for start in range(0, len(prompts), batch_size):
        # The last batch is filled up, so that every call has one shape, and cut below.
        filled = [prompts[min(i, len(prompts) - 1)] for i in range(start, start + min(batch_size, len(prompts)))]
        tokens = stream(
            config,
            params,
            encoder.batch(filled, length),
            max_tokens=max_tokens,
            stop_tokens=encoder.stop_tokens,
        )
        answers.extend(encoder.tokenizer.batch_decode(np.stack(list(tokens), axis=1), skip_special_tokens=True))
    return [text.strip() for text in answers[: len(prompts)]]


def stream_text(
    config: VLMConfig, params: Params, encoder: PromptEncoder, prompt: EncodedPrompt, *, max_tokens: int
) -> Iterator[str]:
    """Yields one answer piece by piece, as soon as its tokens make whole characters; see `stream` for the weights."""
    tokens: list[int] = []
    said = text = ""
    batch = encoder.batch([prompt])
    for token in stream(config, params, batch, max_tokens=max_tokens, stop_tokens=encoder.stop_tokens):
        tokens.append(int(token[0]))
        text = encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(said) :]
            said = text
    yield text[len(said) :]
