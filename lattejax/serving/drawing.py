"""Drawing on the device: rows of any requests, each with its own flow time, in batches of one group.

Tables hold the rows' latents, the velocities of their last evaluation, and the contexts of prompts. A step gathers the
rows that take part, and writes them back; no request has weights or programs of its own.

Axes: V rows of a step (velocities to evaluate), S slot of a table of rows, U slot of the table of contexts, L layer,
T context token, C latent channel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from lattejax.data.prompts import EncodedPrompt
from lattejax.errors import UserError
from lattejax.flow.path import guide
from lattejax.models import generation, latte_flow
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.conditioning import Step
from lattejax.models.functional import Params
from lattejax.models.generation import Context
from lattejax.models.generation_config import GenerationConfig
from lattejax.models.latte_flow import ModelConfig
from lattejax.models.qwen2_vl import Prompts
from lattejax.models.text import KeysValues
from lattejax.sampling.images import ImageSampler, decode_images, sample_noise
from lattejax.sampling.padding import fitting
from lattejax.serving.steps import Evaluation

PICTURES = 4  # developed or begun by one call
LEAST_ROWS = 2


class State(NamedTuple):
    """The rows in flight; the last slot is for padding."""

    latents: Float[Array, "S h w C"]
    velocity: Float[Array, "S h w C"]


class StepInputs(NamedTuple):
    """What one step does. Slot, conditional, unconditional, guidance, own and previous have an entry for each image;
    the rest, for each velocity, of which an image has one, or two with guidance."""

    indices: Int[Array, "5 V"]  # slot, conditional, unconditional; image, context
    numbers: Float[Array, "5 V"]  # start, end; guidance, own, previous


class Part(NamedTuple):
    """One image's part of a step."""

    slot: int
    context: int
    unconditional: int  # its context
    guidance: float
    evaluation: Evaluation


def pack(parts: Sequence[Part], size: int, padding: int) -> StepInputs:
    """Arranges the parts of a step in a batch of `size` velocities, padded with the slot `padding`."""
    indices, numbers = np.zeros((5, size), np.int32), np.zeros((5, size), np.float32)
    slot, conditional, unconditional, image, context = indices
    start, end, guidance, own, previous = numbers
    slot[:], image[:], context[:] = padding, size - 1, parts[0].context
    start[:], end[:], guidance[:] = parts[0].evaluation.start, parts[0].evaluation.end, 1
    place = 0
    for i, part in enumerate(parts):
        contexts = [part.context, part.unconditional] if part.evaluation.is_guided else [part.context]
        slot[i], own[i], previous[i] = part.slot, part.evaluation.own, part.evaluation.previous
        conditional[i] = place
        unconditional[i] = place + len(contexts) - 1
        guidance[i] = part.guidance if part.evaluation.is_guided else 1
        both = slice(place, place + len(contexts))
        image[both], context[both] = i, contexts
        start[both], end[both] = part.evaluation.start, part.evaluation.end
        place += len(contexts)
    return StepInputs(indices, numbers)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def take_step(
    config: GenerationConfig, pathway: Params, contexts: Context, state: State, inputs: StepInputs
) -> tuple[State, Float[Array, ""]]:
    """Evaluates the velocities of some rows by one group, and moves the rows.

    Args:
      config: the pathway's geometry.
      pathway: the group's own pathway, with its layers as a list.
      contexts: the table of contexts at these layers.
      state: the table of rows.
      inputs: see `pack`.

    Returns the new state, and a number that is known when the step is done.
    """
    slot, conditional, unconditional, image, context = inputs.indices
    start, end, guidance, own, previous = inputs.numbers
    x = state.latents[slot]
    step = generation.condition(config, pathway, Step(start, end))
    v = generation.velocity(config, pathway, generation.pick(contexts, context), x[image], step)

    def by_image(values: Array) -> Array:
        return values[:, None, None, None]

    v = guide(v[conditional], v[unconditional], by_image(guidance))
    x = x + by_image(own) * v + by_image(previous) * state.velocity[slot]
    state = State(state.latents.at[slot].set(x), state.velocity.at[slot].set(v))
    return state, jnp.sum(v)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="contexts")
def read_context(config: ModelConfig, vlm: Params, contexts: Context, prompt: Prompts, slot: Int[Array, ""]) -> Context:
    """Reads a prompt into a slot of the table."""
    own = latte_flow.read_prompts(config, vlm, prompt)
    return jax.tree.map(lambda table, one: table.at[slot].set(one[0].astype(table.dtype)), contexts, own)


@functools.partial(jax.jit, donate_argnames="state")
def begin_rows(state: State, slots: Int[Array, "B"], seed: Int[Array, ""], samples: Int[Array, "B"]) -> State:
    """Draws the noise of some rows. What they had is gone, the velocity too: a NaN in it would stay, even times 0."""
    noise = sample_noise(seed, samples, state.latents.shape[1:])
    return State(state.latents.at[slots].set(noise), state.velocity.at[slots].set(0))


@functools.partial(jax.jit, static_argnames="autoencoder")
def develop(
    autoencoder: Autoencoder, decoder: Params, state: State, slots: Int[Array, "B"], left: Float[Array, "B"]
) -> UInt8[Array, "B H W 3"]:
    """Decodes the clean latents that rows are heading for: x + (1 − t)·v, with `left` = 1 − t the time left."""
    latents = state.latents[slots] + left[:, None, None, None] * state.velocity[slots]
    return decode_images(autoencoder, decoder, latents)


class Drawer:
    """The model and the tables.

    Args:
      sampler: the model; on one device.
      slots: images in flight at a time.
      context_slots: prompts whose contexts are held.
      most_rows: velocities in a step.
      most_tokens: tokens of a prompt.
    """

    def __init__(self, sampler: ImageSampler, slots: int, context_slots: int, most_rows: int, most_tokens: int):
        self.sampler, self.most_tokens = sampler, most_tokens
        self.config, self.encoder = sampler.config.generation, sampler.encoder
        self.padding, self.sizes = slots, tuple(LEAST_ROWS * 2**i for i in range(most_rows.bit_length()))
        self.sizes = (*(size for size in self.sizes if size < most_rows), most_rows)
        groups = range(self.config.num_groups)
        self._groups = [generation.params_of_group(self.config, sampler.pathway, group) for group in groups]
        text, (height, width, channels) = self.config.text, self.config.latent_shape
        dtype = jax.tree.leaves(sampler.vlm["text"])[0].dtype

        def zeros() -> jax.Array:
            return jnp.zeros((context_slots, most_tokens, text.num_kv_heads, text.head_dim), dtype)

        kept = [KeysValues(zeros(), zeros()) for _ in range(text.num_layers)]
        mask = jnp.zeros((context_slots, most_tokens), bool)
        self._contexts = self._place(Context(kept, mask, jnp.zeros(context_slots, jnp.int32)))
        rows = [jnp.zeros((slots + 1, height, width, channels), jnp.float32) for _ in range(2)]
        self._state = self._place(State(*rows))

    def _place(self, tree: State | Context) -> State | Context:
        sharding = jax.tree.leaves(self.sampler.vlm["text"])[0].sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.device_put(tree, sharding)

    def check(self, prompt: EncodedPrompt) -> None:
        """Raises `UserError` for a prompt that is too long."""
        if (length := len(prompt.input_ids)) > self.most_tokens:
            raise UserError(f"the prompt has {length} tokens; at most {self.most_tokens} can be drawn")

    def read(self, prompt: EncodedPrompt, slot: int) -> None:
        """Reads a prompt into a slot of the table of contexts."""
        prompts = self.encoder.batch([prompt], self.most_tokens)
        self._contexts = read_context(self.sampler.config, self.sampler.vlm, self._contexts, prompts, np.int32(slot))

    def begin(self, slots: Sequence[int], seed: int) -> None:
        """Draws the noise of an image in each slot, of the samples from 0 on."""
        for start in range(0, len(slots), PICTURES):
            own = self._padded(slots[start : start + PICTURES])
            samples = np.arange(start, start + PICTURES, dtype=np.int32)
            self._state = begin_rows(self._state, own, np.uint32(seed), samples)

    def step(self, group: int, parts: Sequence[Part]) -> jax.Array:
        """Takes a step of one group; returns what is known when it is done."""
        size = fitting(self.sizes, sum(2 if part.evaluation.is_guided else 1 for part in parts))
        layers = self._contexts.layers[self.config.layers_of[group]]
        inputs = pack(parts, size, self.padding)
        contexts = self._contexts._replace(layers=layers)
        self._state, done = take_step(self.config, self._groups[group], contexts, self._state, inputs)
        return done

    def develop(self, slots: Sequence[int], left: Sequence[float]) -> list[jax.Array]:
        """Begins to decode the pictures of some slots, `PICTURES` at a time."""
        found = []
        for start in range(0, len(slots), PICTURES):
            some = slice(start, start + PICTURES)
            own_left = np.zeros(PICTURES, np.float32)
            own_left[: len(left[some])] = left[some]
            inputs = self._padded(slots[some]), own_left
            found.append(develop(self.sampler.autoencoder, self.sampler.decoder, self._state, *inputs))
        return found

    def _padded(self, slots: Sequence[int]) -> np.ndarray:
        return np.array([*slots, *[self.padding] * (PICTURES - len(slots))], np.int32)

    def compile(self, done: Callable[[str], None] = lambda what: None) -> None:
        """Compiles all programs; calls `done` after each. The empty prompt is then in slot 0."""
        self.read(self.encoder.unconditional(), 0)
        done("prompts")
        self.begin([self.padding], 0)
        jax.block_until_ready(self.develop([self.padding], [0.0]))
        done("pictures")
        sizes = {own.stop - own.start: group for group, own in enumerate(self.config.layers_of)}
        for layers, group in sizes.items():
            start, end = self.config.intervals.edges[group : group + 2]
            evaluation = Evaluation(group, False, start, end, np.float32(0), np.float32(0), True)
            for size in self.sizes:
                part = Part(self.padding, 0, 0, 1.0, evaluation)
                jax.block_until_ready(self.step(group, [part] * size))
                done(f"{size} rows of {layers} layers")
