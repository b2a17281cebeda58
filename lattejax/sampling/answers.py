"""Answering prompts with text, token by token with a KV cache.

There are two compiled functions: one reads the prompts and chooses the first token, one reads a token and chooses the
next. Prompts, images and caches are padded to a few sizes (`sampling.padding`), so that both work for many lengths
without recompilation.

Axes: B batch, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from lattejax.data.prompts import EncodedPrompt, PromptEncoder
from lattejax.models import qwen2_vl
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import DecodeState, Prompts, VLMConfig
from lattejax.models.text import MOST_POSITIONS
from lattejax.parallel import hosts
from lattejax.ranges import Range, Seed, check_ranges
from lattejax.runs.inference import inference_weights
from lattejax.runs.run import Run
from lattejax.sampling.padding import bucket, padded
from lattejax.sampling.streams import TextStream
from lattejax.weights.pretrained import Pretrained

LEAST_TEMPERATURE = 1e-6  # below this, logits divided by it overflow float32
MaxTokens = Annotated[int, Range(1, MOST_POSITIONS)]
Temperature = Annotated[float, Range(0, 1000)]
TopP = Annotated[float, Range(0, 1, above=True)]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    `temperature` 0 takes the likeliest token. Otherwise tokens are sampled at that temperature from the likeliest
    tokens with a total probability of `top_p`; the samples of the n-th prompt are a function of `seed` and n.
    """

    max_tokens: MaxTokens = 256  # of an answer, including the stop token
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Seed = 0

    def __post_init__(self):
        check_ranges(self)
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature={self.temperature} must be 0 or at least {LEAST_TEMPERATURE}")


class TokenSampling(NamedTuple):
    """Sampling parameters, and a PRNG key for each row."""

    keys: Key[Array, "B"]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


def keep_top(logits: Float[Array, "B V"], top_p: float | Float[Array, ""] | Float[Array, "B 1"]) -> Float[Array, "B V"]:
    """Keeps the fewest likeliest tokens whose total probability reaches `top_p`, and masks the rest with -inf."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) | (top_p >= 1)  # rounded sums may reach 1 before the last token
    kept = kept.at[..., 0].set(True)  # whatever `top_p` is: float32 may round it to 0
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


class Penalty(NamedTuple):
    """Repetition penalty: makes tokens that have been read or generated less likely, as in transformers (Keskar et al.,
    arXiv 1909.05858)."""

    scale: Float[Array, ""]  # above 1; below it such tokens become more likely
    seen: Bool[Array, "B V"]

    def of(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        logits = logits.astype(jnp.float32)
        return jnp.where(self.seen, jnp.where(logits < 0, logits * self.scale, logits / self.scale), logits)

    def after(self, token: Int[Array, "B"]) -> "Penalty":
        return self._replace(seen=self.seen.at[jnp.arange(len(token)), token].set(True))


def choose(
    logits: Float[Array, "B V"],
    sampling: TokenSampling | None,
    count: int | Int[Array, ""],
    penalty: Penalty | None = None,
) -> Int[Array, "B"]:
    """The next token: the likeliest, or sampled; `count` distinguishes the samples of one answer."""
    if penalty is not None:
        logits = penalty.of(logits)
    if sampling is None:
        return jnp.argmax(logits, axis=-1)
    logits = keep_top(logits.astype(jnp.float32) / sampling.temperature, sampling.top_p)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(sampling.keys, count)
    return jax.vmap(jax.random.categorical)(keys, logits)


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def read(
    config: VLMConfig,
    params: Params,
    prompts: Prompts,
    sampling: TokenSampling | None,
    penalty: Penalty | None = None,
    *,
    capacity: int,
):
    """Reads complete prompts; returns each answer's first token, and the state to continue from."""
    logits, state = qwen2_vl.prefill(config, params, prompts, capacity)
    return choose(logits, sampling, jnp.zeros((), jnp.int32), penalty), state


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def read_token(
    config: VLMConfig,
    params: Params,
    state: DecodeState,
    token: Int[Array, "B"],
    sampling: TokenSampling | None,
    count: Int[Array, ""],
    penalty: Penalty | None = None,
):
    """Reads one token of every answer; returns the next token, the `count`-th from 0, and the new state and penalty."""
    logits, state = qwen2_vl.decode_token(config, params, state, token)
    if penalty is not None:
        penalty = penalty.after(token)
    return choose(logits, sampling, count, penalty), state, penalty


@functools.partial(jax.jit, static_argnames="config")
def score_answers(
    config: VLMConfig, params: Params, prompts: Prompts, is_answer: Bool[Array, "B T"]
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """The log-probability of each row's answer tokens, and whether each of them is the likeliest."""
    hidden, _ = qwen2_vl.forward(config, params, prompts)
    targets, counted = prompts.input_ids[:, 1:], is_answer[:, 1:]

    def score(logits: Array, targets: Array) -> tuple[Array, Array]:
        each = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return each, jnp.argmax(logits, axis=-1) == targets

    each, likeliest = qwen2_vl.map_logits(config, params, hidden[:, :-1], targets, score)
    return jnp.sum(each, axis=1, where=counted), jnp.all(likeliest, axis=1, where=counted)


class Answerer:
    """Answers prompts with a VLM.

    Args:
      config: the VLM's geometry.
      params: its weights, a tree for each layer (`qwen2_vl.unstack`). Their dtype is the computation's.
      encoder: its prompt encoder.
      repetition_penalty: the model's repetition penalty, see `Penalty`; 1: none.
    """

    def __init__(self, config: VLMConfig, params: Params, encoder: PromptEncoder, repetition_penalty: float = 1.0):
        self.config, self.params, self.encoder = config, params, encoder
        self.repetition_penalty = repetition_penalty

    @classmethod
    def load(cls, weights: epath.PathLike, dtype: str = "bfloat16", mesh: Mesh | None = None) -> "Answerer":
        """Opens weights that `lattejax.convert` wrote; see `Pretrained.params`."""
        pretrained = Pretrained.open(weights)
        encoder = pretrained.encoder  # raises before the weights are read
        penalty = pretrained.generation.repetition_penalty
        params = qwen2_vl.unstack(pretrained.params(dtype, mesh), release=True)
        return cls(pretrained.vlm_config, params, encoder, penalty)

    @classmethod
    def of(cls, run: Run) -> "Answerer":
        """Reads the VLM of a run or an export, in its config's dtype, onto the run's mesh; see `Run.vlm`."""
        encoder = run.encoder  # raises before the weights are read
        vlm = inference_weights(run.config, {"vlm": run.vlm()}, run.mesh)["vlm"]
        return cls(run.vlm_config, vlm, encoder, run.generation.repetition_penalty)

    def generate(
        self, prompts: Sequence[EncodedPrompt], decoding: Decoding = Decoding(), batch_size: int = 8
    ) -> list[str]:
        """Returns the answers to prompts of any lengths, with any images, in order."""
        answers = []
        for start in range(0, len(prompts), batch_size):
            # The last batch is padded, so that every call has the same shape, and truncated below.
            rows = np.minimum(np.arange(start, start + min(batch_size, len(prompts))), len(prompts) - 1)
            batch = padded(self.encoder, [prompts[row] for row in rows], prompts)
            tokens = np.stack(list(self.tokens(batch, decoding, rows)), axis=1)
            answers.extend(self.encoder.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return [text.strip() for text in answers[: len(prompts)]]

    def log_likelihoods(
        self, prompts: Sequence[EncodedPrompt], batch_size: int = 8
    ) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
        """For complete prompts (see `PromptEncoder.conversation`): the natural logarithm of the probability of the
        answers' tokens, without stop tokens, and whether greedy decoding gives exactly these."""
        sums, likeliest = [], []
        for start in range(0, len(prompts), batch_size):
            rows = np.minimum(np.arange(start, start + min(batch_size, len(prompts))), len(prompts) - 1)
            batch = padded(self.encoder, [prompts[row] for row in rows], prompts)
            counted = np.zeros(batch.mask.shape, bool)
            for place, row in enumerate(rows):
                ids = prompts[row].input_ids
                counted[place, : len(ids)] = prompts[row].is_answer & ~np.isin(ids, self.encoder.stop_tokens)
            each, best = hosts.fetch(score_answers(self.config, self.params, batch, counted))
            sums.append(each)
            likeliest.append(best)
        return np.concatenate(sums)[: len(prompts)], np.concatenate(likeliest)[: len(prompts)]

    def stream(self, prompt: EncodedPrompt, decoding: Decoding = Decoding()) -> Iterator[str]:
        """Yields one answer in pieces, whenever its tokens form complete characters."""
        text = TextStream(self.encoder.tokenizer)
        for token in self.tokens(padded(self.encoder, [prompt]), decoding):
            yield text.add(int(token[0]))
        yield text.end()

    def tokens(
        self, prompts: Prompts, decoding: Decoding = Decoding(), rows: Sequence[int] | np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Yields the answers' tokens [B], one at a time, until every row has reached a stop token.

        A finished row keeps yielding the first stop token.

        Args:
          prompts: the prompts, up to where the answers begin.
          decoding: how tokens are chosen.
          rows: the indices that seed the rows' samples; None: 0, 1, …
        """
        size, length = prompts.input_ids.shape
        capacity = bucket(length + decoding.max_tokens) - length
        sampling = None
        if decoding.temperature > 0:
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
                jax.random.key(decoding.seed), np.arange(size) if rows is None else np.asarray(rows)
            )
            sampling = TokenSampling(keys, decoding.temperature, decoding.top_p)
        penalty = self._penalty(prompts)
        token, state = read(self.config, self.params, prompts, sampling, penalty, capacity=capacity)
        stops, done = self.encoder.stop_tokens, np.zeros(size, bool)
        for count in range(1, decoding.max_tokens + 1):
            if count < decoding.max_tokens:  # dispatched before waiting for this token
                following, state, penalty = read_token(self.config, self.params, state, token, sampling, count, penalty)
            chosen = np.where(done, stops[0], hosts.fetch(token))
            yield chosen
            done |= np.isin(chosen, stops)
            if done.all() or count == decoding.max_tokens:
                return
            token = following

    def _penalty(self, prompts: Prompts) -> Penalty | None:
        if self.repetition_penalty == 1:
            return None
        rows, places = np.nonzero(prompts.mask)
        seen = np.zeros((len(prompts.mask), self.config.text.vocab_size), bool)
        seen[rows, prompts.input_ids[rows, places]] = True
        return Penalty(np.float32(self.repetition_penalty), seen)
