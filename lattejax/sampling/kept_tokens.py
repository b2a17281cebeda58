"""The computations behind `conversations`, on a table of KV caches.

Axes: B batch, T token, R row of the table, the last one for padding, S slot, V vocabulary, D width, P patch.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lattejax.models import functional, qwen2_vl, vision
from lattejax.models.functional import Params
from lattejax.models.layers import Layers
from lattejax.models.qwen2_vl import VLMConfig
from lattejax.models.text import KeysValues, TextConfig, Vocabulary
from lattejax.models.vision import Images
from lattejax.sampling.answers import Decoding, Penalty, keep_top

MOST_LOGPROBS = 20  # alternatives to a token


class Table(NamedTuple):
    """What is kept: a cache for each layer, and which tokens a row has seen, if the model penalizes repetition."""

    cache: list[KeysValues]  # of each layer, [R, S, G, d]
    seen: Bool[Array, "R V"] | None


class ImageTokens(NamedTuple):
    """The tokens of a prompt's images, each at its place in the prompt, and which of the T tokens to read are some."""

    tokens: Float[Array, "S D"]
    is_image: Bool[Array, "1 T"]


class Choices(NamedTuple):
    """How each row's next token is chosen; see `Decoding`. `count` is its index in the answer."""

    seed: UInt32[Array, "B"]
    count: Int[Array, "B"]
    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]

    @classmethod
    def of(cls, rows: Sequence[tuple[Decoding, int]], size: int) -> "Choices":
        """Those of some answers, padded to `size` rows."""
        rows = [*rows, *[(Decoding(), 0)] * (size - len(rows))]
        return cls(
            np.array([decoding.seed for decoding, _ in rows], np.uint32),
            np.array([count for _, count in rows], np.int32),
            np.array([decoding.temperature for decoding, _ in rows], np.float32),
            np.array([decoding.top_p for decoding, _ in rows], np.float32),
        )


class Chosen(NamedTuple):
    """Each row's next token, and its log-probability and those of the likeliest tokens, if they are wanted."""

    token: Int[Array, "B"]
    logprob: Float[Array, "B"]
    top_tokens: Int[Array, "B N"]
    top_logprobs: Float[Array, "B N"]


def empty_table(text: TextConfig, dtype: jax.typing.DTypeLike, rows: int, slots: int, penalized: bool) -> Table:
    """A table that holds nothing."""

    def zeros() -> jax.Array:  # separate arrays, because they are donated
        return jnp.zeros((rows, slots, text.num_kv_heads, text.head_dim), dtype)

    cache = [KeysValues(zeros(), zeros()) for _ in range(text.num_layers)]
    return Table(cache, jnp.zeros((rows, text.vocab_size), bool) if penalized else None)


def slots_of(table: Table) -> int:
    return table.cache[0].keys.shape[1]


def with_more_slots(table: Table, more: int) -> Table:
    """The same table with `more` slots at the end of each row."""
    return table._replace(cache=jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, 0)]), table.cache))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="tokens")
def see(
    config: VLMConfig,
    params: Params,
    tokens: Float[Array, "S D"],
    patches: Float[Array, "P patch_dim"],
    positions: Int[Array, "P 2"],
    mask: Bool[Array, "P"],
    place: Int[Array, ""],
) -> Float[Array, "S D"]:
    """Encodes an image with the vision tower's weights, and writes its tokens from `place` on."""
    images = Images(patches[None, None], positions[None, None], mask[None, None], jnp.zeros((1, 1), jnp.int32))
    encoded = vision.encode(config.vision, params, images)[0, 0]
    return jax.lax.dynamic_update_slice_in_dim(tokens, encoded.astype(tokens.dtype), place, axis=0)


@functools.partial(jax.jit, donate_argnames="table")
def mark(table: Table, row: Int[Array, ""], seen: Bool[Array, "V"]) -> Table:
    """Replaces what a row has seen."""
    return table._replace(seen=table.seen.at[row].set(seen))


@functools.partial(jax.jit, static_argnames=("config", "window"), donate_argnames="table")
def read_tokens(
    config: VLMConfig,
    params: Params,
    table: Table,
    rows: Int[Array, "B"],
    start: Int[Array, "B"],
    input_ids: Int[Array, "B T"],
    position_ids: Int[Array, "B 3 T"],
    images: ImageTokens | None,
    last: Int[Array, ""],
    choices: Choices,
    penalty: Float[Array, ""],
    wants_logprobs: Bool[Array, ""],
    *,
    window: int,
) -> tuple[Chosen, Table]:
    """Reads T tokens of some of the table's rows, and chooses what follows the one at `last`.

    Args:
      config: the VLM's geometry.
      params: its weights, a tree for each layer.
      table: see `Table`.
      rows: the rows; padding is the last row's.
      start: how many tokens each row holds.
      input_ids: the tokens to read.
      position_ids: their positions.
      images: the image tokens among those of a prompt (of a single row); None: the tokens are an answer's.
      last: the index of the last token that is no padding.
      choices: how tokens are chosen.
      penalty: the repetition penalty; 1: none.
      wants_logprobs: whether log-probabilities are computed.
      window: the slots that are attended to, at least start + T.
    """
    vocabulary = functional.bind(Vocabulary, config.text, params=params["text"]["vocabulary"])
    x = vocabulary.embed(input_ids)
    if images is not None:
        own = jax.lax.dynamic_slice_in_dim(images.tokens, start[0], input_ids.shape[1])
        x = jnp.where(images.is_image[..., None], own[None].astype(x.dtype), x)
    cache = Layers(table.cache).map_arrays(lambda kept: kept[rows, :window])
    hidden, cache = qwen2_vl.continue_reading(config, params, cache, start, x, position_ids)
    places = start[:, None] + jnp.arange(input_ids.shape[1])

    def write(kept: Array, read: Array) -> Array:
        new = jnp.take_along_axis(read, places[..., None, None], axis=1)
        return kept.at[rows[:, None], places].set(new)

    written = [jax.tree.map(write, kept, read) for kept, read in zip(table.cache, cache, strict=True)]
    logits = vocabulary.logits(jax.lax.dynamic_slice_in_dim(hidden, last, 1, axis=1))[:, 0]
    seen = table.seen
    if seen is not None:
        seen = seen.at[rows, input_ids[:, 0]].set(True) if images is None else seen
        penalized = Penalty(penalty, seen[rows]).of(logits)
    else:
        penalized = logits
    token = choose_each(penalized, choices)
    return Chosen(token, *log_probabilities(logits, token, wants_logprobs)), Table(written, seen)


def choose_each(logits: Float[Array, "B V"], choices: Choices) -> Int[Array, "B"]:
    """The next token of each row: the likeliest at a temperature of 0, else sampled as `Answerer` samples that of a
    single prompt."""
    logits = logits.astype(jnp.float32)

    def sample(_: None) -> Int[Array, "B"]:
        temperature = jnp.where(choices.temperature > 0, choices.temperature, 1)[:, None]
        kept = keep_top(logits / temperature, choices.top_p[:, None])

        def one(seed, count, row):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), count)
            return jax.random.categorical(key, row)

        sampled = jax.vmap(one)(jnp.asarray(choices.seed), jnp.asarray(choices.count), kept)
        return jnp.where(choices.temperature > 0, sampled, jnp.argmax(logits, axis=-1))

    any_sampled = jnp.any(choices.temperature > 0)  # sorting the vocabulary takes longer than a small model
    return jax.lax.cond(any_sampled, sample, lambda _: jnp.argmax(logits, axis=-1), None)


def log_probabilities(
    logits: Float[Array, "B V"], token: Int[Array, "B"], wanted: Bool[Array, ""]
) -> tuple[Float[Array, "B"], Int[Array, "B N"], Float[Array, "B N"]]:
    """Log-probabilities by the model itself, before temperature and penalty: the token's, and the likeliest ones'."""
    count = min(MOST_LOGPROBS, logits.shape[-1])

    def compute(_: None):
        by_token = jax.nn.log_softmax(logits.astype(jnp.float32))
        top, tokens = jax.lax.top_k(by_token, count)
        return jnp.take_along_axis(by_token, token[:, None], axis=1)[:, 0], tokens, top

    def skip(_: None):
        rows = len(logits)
        return jnp.zeros(rows), jnp.zeros((rows, count), jnp.int32), jnp.zeros((rows, count))

    return jax.lax.cond(wanted, compute, skip, None)
