"""Qwen2-VL: the vision-language model, whose keys and values the generation pathway attends to.

Axes: B batch, T token, S cache slot, L layer, D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from lattejax.models import functional, text, vision
from lattejax.models.functional import Params
from lattejax.models.layers import Layers
from lattejax.models.text import KeysValues, TextConfig, Vocabulary
from lattejax.models.vision import Images, VisionConfig

LOGITS_AT_ONCE = 64  # tokens of a row: the logits of a whole prompt take 0.8 GB a row at 2B


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()

    def __post_init__(self):
        if self.vision.hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision.hidden_size={self.vision.hidden_size} must equal text.hidden_size={self.text.hidden_size}"
            )


class Prompts(NamedTuple):
    """A batch of tokenised prompts, padded on the right. Positions are (time, row, column)."""

    input_ids: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    position_ids: Int[Array, "B 3 T"]
    images: Images | None = None


class DecodeState(NamedTuple):
    """The state of one-token decoding: each layer's cache, the open slots, and the next token's slot and position."""

    cache: KeysValues | list[KeysValues]
    open: Bool[Array, "B S"]
    slot: Int[Array, ""]
    position: Int[Array, "B"]


def init(config: VLMConfig, key: jax.Array) -> Params:
    """Returns random weights: `text` and `vision`."""
    text_key, vision_key = jax.random.split(key)
    return {"text": text.init(config.text, text_key), "vision": vision.init(config.vision, vision_key)}


def unstack(params: Params, release: bool = False) -> Params:
    """The same weights with a tree for each layer: the form for inference (see `models.layers`)."""
    return {
        "text": params["text"] | {"layers": Layers(params["text"]["layers"]).unstack(release)},
        "vision": params["vision"] | {"blocks": Layers(params["vision"]["blocks"]).unstack(release)},
    }


def next_positions(prompts: Prompts) -> Int[Array, "B"]:
    """The position that follows each prompt's last unpadded one, on all three axes."""
    return jnp.max(jnp.where(prompts.mask[:, None], prompts.position_ids, -1), axis=(1, 2)) + 1


def forward(
    config: VLMConfig, params: Params, prompts: Prompts, remat: str = "none"
) -> tuple[Float[Array, "B T D"], KeysValues | list[KeysValues]]:
    """Reads complete prompts; returns the last hidden states and every layer's keys (rotated) and values."""
    vocabulary = functional.bind(Vocabulary, config.text, params=params["text"]["vocabulary"])
    x = vocabulary.embed(prompts.input_ids)
    if prompts.images is not None:
        tokens = vision.encode(config.vision, params["vision"], prompts.images, remat)
        x = vision.place(x, tokens, prompts.images.index)
    length = prompts.input_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = causal & prompts.mask[:, None, :]
    return text.decode(config.text, params["text"]["layers"], x, prompts.position_ids, mask, remat=remat)


def logits(config: VLMConfig, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Returns next-token logits for the hidden states of `forward`."""
    return functional.bind(Vocabulary, config.text, params=params["text"]["vocabulary"]).logits(hidden)


def map_logits(
    config: VLMConfig,
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    function: Callable[[Float[Array, "B t V"], Int[Array, "B t"]], Any],
) -> Any:
    """Returns the arrays [B, T] of `function(logits, targets)`, with the logits of a block of tokens at a time, in
    float32. The backward pass computes them again: at no time are all of them in memory."""
    length = targets.shape[1]
    size = min(LOGITS_AT_ONCE, length)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_block(block: tuple[Array, Array]) -> Any:
        return function(logits(config, params, block[0]).astype(jnp.float32), block[1])

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, -length % size), *[(0, 0)] * (x.ndim - 2)])
        return rearrange(padded, "B (n t) ... -> n B t ...", t=size)

    found = jax.lax.map(of_block, (split(hidden), split(targets)))
    return jax.tree.map(lambda x: rearrange(x, "n B t -> B (n t)")[:, :length], found)


def prefill(
    config: VLMConfig, params: Params, prompts: Prompts, capacity: int
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Reads the prompts into a cache with room for `capacity` more tokens; returns the first answer token's logits."""
    hidden, cache = forward(config, params, prompts)
    last = jnp.sum(prompts.mask, axis=1) - 1
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    batch, length = prompts.input_ids.shape

    def make_room(x):  # [B, T, G, d] of one layer
        return jnp.pad(x, [(0, 0), (0, capacity), (0, 0), (0, 0)])

    state = DecodeState(
        cache=Layers(cache).map_arrays(make_room),
        open=jnp.concatenate([prompts.mask, jnp.zeros((batch, capacity), bool)], axis=1),
        slot=jnp.asarray(length, jnp.int32),
        position=next_positions(prompts),
    )
    return logits(config, params, hidden)[:, 0], state


def decode_token(
    config: VLMConfig, params: Params, state: DecodeState, token: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Reads one more token of every prompt; returns the logits of the one after it."""
    vocabulary = functional.bind(Vocabulary, config.text, params=params["text"]["vocabulary"])
    is_open = state.open | (jnp.arange(state.open.shape[1]) == state.slot)
    position_ids = jnp.broadcast_to(state.position[:, None, None], (len(token), 3, 1))
    hidden, cache = text.decode(
        config.text,
        params["text"]["layers"],
        vocabulary.embed(token[:, None]),
        position_ids,
        is_open[:, None],
        state.cache,
        state.slot,
    )
    state = DecodeState(cache, is_open, state.slot + 1, state.position + 1)
    return vocabulary.logits(hidden)[:, 0], state


def continue_reading(
    config: VLMConfig,
    params: Params,
    cache: KeysValues | list[KeysValues],
    start: Int[Array, "B"],
    x: Float[Array, "B T D"],
    position_ids: Int[Array, "B 3 T"],
) -> tuple[Float[Array, "B T D"], KeysValues | list[KeysValues]]:
    """Reads T more tokens of texts whose first `start` tokens are in the cache, each row its own number of them.

    `x` are the embeddings of the new tokens. Slots from start + T on are not read, whatever they hold. Returns the new
    tokens' last hidden states, and the cache with the new tokens at the slots from `start` on.
    """
    slots = jax.tree.leaves(cache)[0].shape[-3]
    place = start[:, None] + jnp.arange(x.shape[1])
    mask = jnp.arange(slots) <= place[..., None]  # a token attends to what is before it, and to itself
    return text.decode(config.text, params["text"]["layers"], x, position_ids, mask, cache, start)
