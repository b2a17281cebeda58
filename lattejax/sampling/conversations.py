"""Conversations that are read once: the keys and values of earlier turns are kept, and a turn reads only what is new.

A table of KV caches has a row for each conversation, kept after its answer is complete. A prompt that begins with the
tokens of a kept conversation continues in its row; another takes the row that has not been used for longest. Answers
join and leave between tokens, each with its own length, temperature and seed.

Programs are compiled for a few sizes: chunks of a prompt, batches of answers, and windows, the slots of a row that are
attended to.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lattejax.data.prompts import EncodedPrompt
from lattejax.errors import UserError
from lattejax.models.rotary import patch_positions, token_positions
from lattejax.models.text import MOST_POSITIONS
from lattejax.sampling import kept_tokens as kept
from lattejax.sampling.answers import Answerer, Decoding
from lattejax.sampling.kept_rows import Rows, token_keys
from lattejax.sampling.kept_tokens import Choices, Chosen, ImageTokens
from lattejax.sampling.padding import fitting, sizes_up_to

LEAST_WINDOW, LEAST_PATCHES = 128, 256
LONGEST = 200  # a side of an image, in units of the other; the processor refuses more


@dataclasses.dataclass(eq=False)
class Answer:
    """An answer being decoded, or complete."""

    prompt: EncodedPrompt
    keys: list[int]  # a key for each token; equal keys mean equal tokens, see `token_keys`
    decoding: Decoding
    top_logprobs: int | None  # how many alternatives to each token are wanted; None: no log-probabilities
    row: int
    max_tokens: int
    cached: int  # tokens of the prompt that were kept, and need not be read
    read: int  # tokens of the prompt that are in the cache
    position_ids: np.ndarray  # [3, T] of the prompt
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[tuple[float, list[tuple[int, float]]]] = dataclasses.field(default_factory=list)
    is_stopped: bool = False  # by a stop token

    @property
    def is_read(self) -> bool:
        """Whether the prompt is in the cache, and the first token is chosen."""
        return bool(self.tokens)

    @property
    def is_complete(self) -> bool:
        return self.is_stopped or len(self.tokens) == self.max_tokens


class Conversations:
    """Decodes answers in several conversations at a time.

    Args:
      answerer: the model.
      rows: conversations that are kept, and answers at the same time.
      capacity: tokens of a conversation, including the answer.
      chunks: how many tokens of a prompt are read at a time.
    """

    def __init__(
        self,
        answerer: Answerer,
        rows: int = 1,
        capacity: int = MOST_POSITIONS,
        chunks: tuple[int, ...] = (16, 64, 256),
    ):
        self.answerer, self.capacity = answerer, capacity
        self.chunks = tuple(sorted({min(chunk, capacity) for chunk in chunks}))
        self.batches = sizes_up_to(1, rows)
        self.windows = sizes_up_to(LEAST_WINDOW, capacity + self.chunks[-1])
        self.patches = self._patch_sizes()
        self.tokens_read = 0  # in all, by any answer
        self._rows = Rows(rows)
        self._table: kept.Table | None = None
        self._images: jax.Array | None = None

    def _patch_sizes(self) -> tuple[int, ...]:
        """In merged patches, an image of `longest_edge` pixels has `most`. A long one can have more: its shorter side
        does not shrink below one. An image of less than `shortest_edge` is enlarged, and its sides are rounded up."""
        encoder = self.answerer.encoder
        block, pixels = encoder.merge**2, encoder.processor.patch_size**2 * encoder.merge**2
        most, least = (encoder.processor.size[edge] / pixels for edge in ("longest_edge", "shortest_edge"))
        long = max(most, math.sqrt(LONGEST * most), (math.sqrt(LONGEST * least) + 1) * (math.sqrt(least / LONGEST) + 1))
        smallest = max(1, min(LEAST_PATCHES // block, int(most)))
        return tuple(size * block for size in sizes_up_to(smallest, max(1, min(math.ceil(long), self.capacity))))

    # ---- Answers

    def begin(self, prompt: EncodedPrompt, decoding: Decoding, top_logprobs: int | None = None) -> Answer | None:
        """Begins an answer; returns None if all rows are in use.

        Raises:
          UserError: the prompt leaves no room for an answer, or an image is too large. Nothing has changed then.
        """
        length = len(prompt.input_ids)
        if length >= self.capacity:
            raise UserError(f"the conversation has {length:,} tokens; at most {self.capacity - 1:,} can be answered")
        if any(len(image.patches) > self.patches[-1] for image in prompt.images):
            raise UserError(f"an image has more than {self.patches[-1]:,} patches")
        if self._table is None or self._images is None:
            self._forget()
        if self._rows.are_in_use:
            return None
        encoder = self.answerer.encoder
        keys = token_keys(prompt, encoder.image_token, encoder.merge)
        row = self._rows.take(keys)
        cached = len(self._rows.keys[row])
        grids = [image.grid for image in prompt.images]
        positions = token_positions(prompt.input_ids, grids, encoder.image_token, encoder.merge)
        room = min(decoding.max_tokens, self.capacity - length)
        return Answer(prompt, keys, decoding, top_logprobs, row, room, cached, cached, positions)

    def read(self, answer: Answer) -> None:
        """Reads the next chunk of the prompt; with the last one the first token is chosen."""
        ids, start = answer.prompt.input_ids, answer.read
        if self._prepared is not answer:
            self._prepare(answer)
        chunk = fitting(self.chunks, len(ids) - start)
        count = min(chunk, len(ids) - start)
        own = slice(start, start + count)
        input_ids, positions = np.zeros((1, chunk), np.int32), np.zeros((1, 3, chunk), np.int32)
        input_ids[0, :count], positions[0, :, :count] = ids[own], answer.position_ids[:, own]
        is_image = input_ids == self.answerer.encoder.image_token
        is_image[:, count:] = False
        chosen = self._read([answer], input_ids, positions, [start], count - 1, is_image)
        self._rows.keys[answer.row] += answer.keys[own]
        self.tokens_read += count
        answer.read += count
        if answer.read == len(ids):
            self._take(answer, chosen, 0)

    def step(self, answers: Sequence[Answer]) -> None:
        """Reads each answer's last token, and chooses its next one."""
        size = fitting(self.batches, len(answers))
        tokens, positions = np.zeros((size, 1), np.int32), np.zeros((size, 3, 1), np.int32)
        starts = []
        for i, answer in enumerate(answers):
            tokens[i] = answer.tokens[-1]
            positions[i] = answer.position_ids.max() + len(answer.tokens)
            starts.append(len(self._rows.keys[answer.row]))
        chosen = self._read(answers, tokens, positions, starts, 0, None)
        for i, answer in enumerate(answers):
            self._rows.keys[answer.row].append(answer.tokens[-1])
            self._take(answer, chosen, i)
        self.tokens_read += len(answers)

    def end(self, answer: Answer) -> None:
        """Ends an answer, complete or not; what was read is kept, until its row is needed."""
        self._rows.release(answer.row)

    def tokens(self, prompt: EncodedPrompt, decoding: Decoding) -> Iterator[int]:
        """Yields the tokens of one answer, including the stop token."""
        answer = self.begin(prompt, decoding)
        if answer is None:
            raise ValueError("all rows are in use")
        try:
            while not answer.is_read:
                self.read(answer)
            yield answer.tokens[-1]
            while not answer.is_complete:
                self.step([answer])
                yield answer.tokens[-1]
        finally:
            self.end(answer)

    def compile(self, done: Callable[[str], None] = lambda what: None) -> None:
        """Compiles the programs of all sizes, so that none is compiled later; calls `done` after each."""
        self._grow(self.windows[-1])
        scratch = Answer(EncodedPrompt(np.zeros(1, int)), [0], Decoding(), None, len(self._rows), 1, 0, 0, np.zeros(1))
        if self._table.seen is not None:
            self._mark(scratch)
        for size in self.patches:
            self._see(np.zeros((1, self.answerer.encoder.patch_dim)), np.zeros((1, 2), np.int32), size, 0)
            done(f"images of {size} patches")
        for window in self.windows:
            for chunk in (chunk for chunk in self.chunks if chunk <= window):
                arrays = np.zeros((1, chunk), np.int32), np.zeros((1, 3, chunk), np.int32)
                self._read([scratch], *arrays, [window - chunk], 0, np.zeros((1, chunk), bool))
                done(f"{chunk} of {window} tokens")
            for size in self.batches:
                arrays = np.zeros((size, 1), np.int32), np.zeros((size, 3, 1), np.int32)
                self._read([scratch] * size, *arrays, [window - 1] * size, 0, None)
                done(f"{size} answers of {window} tokens")

    # ---- The table

    def _forget(self) -> None:
        """Empties the table: at first, and after a call that was interrupted while it had the table."""
        self._prepared: Answer | None = None
        self._rows.forget()
        answerer, slots = self.answerer, self.windows[0]
        text = answerer.config.text
        dtype = jax.tree.leaves(answerer.params["text"])[0].dtype
        penalized = answerer.repetition_penalty != 1
        self._table = self._place(kept.empty_table(text, dtype, len(self._rows) + 1, slots, penalized))
        self._images = self._place(jnp.zeros((slots + self._most_image_tokens, text.hidden_size), dtype))

    @property
    def _most_image_tokens(self) -> int:
        return self.patches[-1] // self.answerer.encoder.merge**2

    def _grow(self, slots: int) -> None:
        """Makes room for windows of `slots`."""
        if self._table is None:
            self._forget()
        if (more := slots - kept.slots_of(self._table)) > 0:
            table, images = kept.with_more_slots(self._table, more), jnp.pad(self._images, [(0, more), (0, 0)])
            self._table, self._images = self._place(table), self._place(images)

    def _place(self, tree: kept.Table | jax.Array) -> kept.Table | jax.Array:
        """On all devices that hold the weights."""
        sharding = jax.tree.leaves(self.answerer.params["text"])[0].sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.device_put(tree, sharding)

    # ---- Calls on the device

    def _prepare(self, answer: Answer) -> None:
        """Encodes the images that are not read yet, and marks the prompt's tokens for the repetition penalty.

        All answers share the buffer of images: one that is read on after another encodes its own again.
        """
        self._prepared = answer
        encoder, block = self.answerer.encoder, self.answerer.encoder.merge**2
        self._grow(fitting(self.windows, len(answer.keys) + self.chunks[-1]))
        places = np.flatnonzero(answer.prompt.input_ids == encoder.image_token)
        for image in answer.prompt.images:
            count = len(image.patches) // block
            own, places = places[:count], places[count:]
            if own[-1] >= answer.read:
                size = fitting(self.patches, len(image.patches))
                self._see(image.patches, patch_positions(image.grid, encoder.merge), size, int(own[0]))
        if self._table.seen is not None:
            self._mark(answer)

    def _see(self, patches: np.ndarray, positions: np.ndarray, size: int, place: int) -> None:
        count = len(patches)
        padded = np.zeros((size, patches.shape[1]), np.float32), np.zeros((size, 2), np.int32), np.arange(size) < count
        padded[0][:count], padded[1][:count] = patches, positions
        images, self._images = self._images, None
        self._images = kept.see(self.answerer.config, self.answerer.params["vision"], images, *padded, np.int32(place))

    def _mark(self, answer: Answer) -> None:
        vocabulary = self.answerer.config.text.vocab_size
        seen = np.zeros(vocabulary, bool)
        seen[answer.prompt.input_ids] = True
        table, self._table = self._table, None
        self._table = kept.mark(table, np.int32(answer.row), seen)

    def _read(
        self,
        answers: Sequence[Answer],
        input_ids: np.ndarray,
        position_ids: np.ndarray,
        starts: Sequence[int],
        last: int,
        is_image: np.ndarray | None,
    ) -> Chosen:
        """Reads tokens of some rows; the rest of the batch are the scratch row's."""
        size, length = input_ids.shape
        missing = size - len(answers)
        window = fitting(self.windows, max(starts) + length)
        self._grow(window)
        rows = np.array([answer.row for answer in answers] + [len(self._rows)] * missing, np.int32)
        choices = Choices.of([(answer.decoding, len(answer.tokens)) for answer in answers], size)
        images = None if is_image is None else ImageTokens(self._images, is_image)
        table, self._table = self._table, None  # donated: lost if the call is interrupted
        wanted = any(answer.top_logprobs is not None for answer in answers)
        chosen, self._table = kept.read_tokens(
            self.answerer.config,
            self.answerer.params,
            table,
            rows,
            np.array([*starts, *[0] * missing], np.int32),
            input_ids,
            position_ids,
            images,
            np.int32(last),
            choices,
            np.float32(self.answerer.repetition_penalty),
            np.bool_(wanted),
            window=window,
        )
        return jax.device_get(chosen)

    def _take(self, answer: Answer, chosen: Chosen, i: int) -> None:
        """Adds the chosen token to an answer."""
        token = int(chosen.token[i])
        answer.tokens.append(token)
        if answer.top_logprobs is not None:
            others = zip(chosen.top_tokens[i].tolist(), chosen.top_logprobs[i].tolist(), strict=True)
            answer.logprobs.append((float(chosen.logprob[i]), list(others)[: answer.top_logprobs]))
        answer.is_stopped = token in self.answerer.encoder.stop_tokens
