"""The score of drawings by the words of their prompts: does a classifier read in a drawing what was asked for?

The classifier is trained on the real pictures, to tell from each the words of its caption: which colour, which shape.
It serves any data set whose captions choose from a few words, as "a small red circle at the top" does.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from lattejax.configuration import Config
from lattejax.data.examples import Source
from lattejax.data.prompts import EncodedPrompt, PromptEncoder
from lattejax.errors import UserError
from lattejax.evaluation.drawn import score_drawings
from lattejax.evaluation.protocol import Report, Subject
from lattejax.flow.schedule import Guidance
from lattejax.models import functional
from lattejax.models.convolution import Chain, conv
from lattejax.models.functional import Params
from lattejax.ranges import Size, check_pattern, check_ranges
from lattejax.sampling.images import decode_images
from lattejax.weights.autoencoders import StoredAutoencoder

MOST_PICTURES = 20_000  # of a split, to train the reader and to try it
EPOCHS, BATCH, RATE = 12, 64, 2e-3
GRID, CHANNELS, WIDTH = 16, 48, 128  # the reader's patches in a row, its first channels, and its last

Words = dict[str, tuple[str, ...]]  # the words of each attribute, such as {"colour": ("red", "blue")}


# ---- What captions say


def read_caption(caption: str, words: Words) -> list[int] | None:
    """The index of the one word of each attribute that a caption has; None unless it has one of each.

    Words are compared regardless of case; one that is part of a longer match ("top" of "top left") does not count.
    """
    found = []
    for of_attribute in words.values():
        forms = [re.compile(re.escape(word), re.IGNORECASE) for word in of_attribute]
        longest_first = sorted(of_attribute, key=len, reverse=True)
        matches = re.findall(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", caption, re.IGNORECASE)
        said = {next(i for i, form in enumerate(forms) if form.fullmatch(match)) for match in matches}
        if len(said) != 1:
            return None
        found.append(said.pop())
    return found


class Described(NamedTuple):
    """Some of a split's drawings: their indices, captions, and the words of each attribute in these."""

    indices: list[int]
    captions: list[str]
    labels: Int[np.ndarray, "N A"]


def find_described(source: Source, split: str, words: Words, matching: str = "") -> Described:
    """A fixed choice of a split's drawings: those whose captions have one word of each attribute, and match a pattern.

    Raises:
      UserError: there are none.
    """
    drawings = source.drawings(split, None)
    order = np.random.default_rng(0).permutation(len(drawings))[:MOST_PICTURES]
    found = []
    for start in range(0, len(order), BATCH):
        rows = sorted(order[start : start + BATCH].tolist())
        for index, drawing in zip(rows, drawings.__getitems__(rows), strict=True):
            captions = (prompt.caption for prompt in drawing.prompts if re.search(matching, prompt.caption))
            read = ((caption, read_caption(caption, words)) for caption in captions)
            found += [(index, caption, label) for caption, label in read if label is not None][:1]
    if not found:
        matches = f" and matches {matching!r}" if matching else ""
        raise UserError(f"no caption of the {split} split has one word of each of {', '.join(words)}{matches}")
    indices, captions, labels = zip(*found, strict=True)
    return Described(list(indices), list(captions), np.array(labels))


def decode_pictures(config: Config, source: Source, split: str, indices: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
    """The pictures of a split's drawings, decoded from their latents."""
    stored, drawings = StoredAutoencoder.open_for(config.data), source.drawings(split, None)
    decoder, size, images = stored.weights("decoder"), config.eval.batch_size, []
    for start in range(0, len(indices), size):
        latents = [drawing.latents for drawing in drawings.__getitems__(list(indices[start : start + size]))]
        rows = np.stack(latents + latents[:1] * (size - len(latents)))  # of one shape, so compiled once
        images.append(np.asarray(decode_images(stored.autoencoder, decoder, rows))[: len(latents)])
    return np.concatenate(images)


# ---- The reader


class Network(nnx.Module):
    """A grid of at most 16×16 square patches, two convolutions, and a classifier for each attribute."""

    def __init__(self, side: int, counts: tuple[int, ...], *, rngs: nnx.Rngs):
        patch = -(-side // GRID)
        self.patches = nnx.Conv(3, CHANNELS, (patch, patch), strides=patch, rngs=rngs)
        self.wide, self.deep = (conv(channels, 2 * CHANNELS, 3, rngs) for channels in (CHANNELS, 2 * CHANNELS))
        size = 2 * CHANNELS * (-(-side // patch) // 2) ** 2
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        self.dense = nnx.Linear(size, WIDTH, rngs=rngs)
        self.heads = Chain([nnx.Linear(WIDTH, count, rngs=rngs) for count in counts])

    def __call__(self, pixels: UInt8[Array, "B H W 3"]) -> list[Float[Array, "B words"]]:
        """Returns the logits of each attribute's words."""
        x = pixels.astype(jnp.float32) / 127.5 - 1
        x = jax.nn.relu(self.wide(jax.nn.relu(self.patches(x))))
        x = jax.nn.relu(self.deep(nnx.avg_pool(x, (2, 2), (2, 2))))
        x = jax.nn.relu(self.dense(self.norm(x.reshape(len(x), -1))))
        return [head(x) for head in self.heads]


class WordReader:
    """Tells the words of pictures; trained, always from one seed, on real ones.

    Args:
      images: the real pictures.
      labels: the index of each attribute's word.
      counts: how many words each attribute has.
    """

    def __init__(self, images: UInt8[np.ndarray, "N H W 3"], labels: Int[np.ndarray, "N A"], counts: tuple[int, ...]):
        self._geometry = images.shape[1], counts
        self._params = fit(self._geometry, images, labels)

    def __call__(self, images: UInt8[np.ndarray, "N H W 3"]) -> Int[np.ndarray, "N A"]:
        """Returns the index of each attribute's most probable word."""
        padded = np.concatenate([images, np.repeat(images[:1], -len(images) % BATCH, axis=0)])
        batches = padded.reshape(-1, BATCH, *images.shape[1:])
        return np.concatenate([predict(self._geometry, self._params, batch) for batch in batches])[: len(images)]


_READERS: dict[Any, WordReader] = {}  # the last one


def train_reader(config: Config, source: Source, words: Words) -> WordReader:
    """The reader of a data set's pictures; scores of the same words share it, as do the runs of a sweep."""
    key = config.data, source.identities, tuple(words.items())
    if key not in _READERS:
        described = find_described(source, "train", words)
        pictures = decode_pictures(config, source, "train", described.indices)
        _READERS.clear()
        _READERS[key] = WordReader(pictures, described.labels, tuple(map(len, words.values())))
    return _READERS[key]


Geometry = tuple[int, tuple[int, ...]]  # the pictures' side, and the number of each attribute's words


@functools.partial(jax.jit, static_argnames="geometry")
def predict(geometry: Geometry, params: Params, pixels: UInt8[Array, "B H W 3"]) -> Int[Array, "B A"]:
    return jnp.stack(
        [jnp.argmax(each, axis=-1) for each in functional.bind(Network, *geometry, params=params)(pixels)], 1
    )


def fit(geometry: Geometry, images: UInt8[np.ndarray, "N H W 3"], labels: Int[np.ndarray, "N A"]) -> Params:
    """Trains the network."""
    total, rng = len(images), np.random.default_rng(0)
    size = min(BATCH, total)
    steps = EPOCHS * (total // size)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, RATE), weight_decay=0.01)
    params = functional.init(Network, *geometry, key=jax.random.key(0))
    state = optimizer.init(params)

    def loss(params: Params, pixels: Array, labels: Array) -> Array:
        logits = functional.bind(Network, *geometry, params=params)(pixels)
        each = [optax.softmax_cross_entropy_with_integer_labels(of, labels[:, i]) for i, of in enumerate(logits)]
        return jnp.mean(sum(each))

    @jax.jit
    def step(params: Params, state: optax.OptState, pixels: Array, labels: Array) -> tuple[Params, optax.OptState]:
        updates, state = optimizer.update(jax.grad(loss)(params, pixels, labels), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(EPOCHS):
        order = rng.permutation(total)
        for start in range(0, total - size + 1, size):
            rows = order[start : start + size]
            params, state = step(params, state, images[rows], labels[rows])
    return params


# ---- The score


@dataclasses.dataclass(frozen=True, eq=False)
class WordScore:
    """The share of `images` drawings in which the reader finds the words of their prompts.

    There are as many different prompts as `num_prompts`, a fixed choice of the held-out captions in which the pattern
    `matching` is found. They are drawn as config.eval defines, or at each of several guidance scales. The figures'
    names begin with the prefix.
    """

    config: Config
    source: Source
    words: Words
    images: Size
    num_prompts: Size
    guidance: tuple[Guidance, ...] = ()
    matching: str = ""
    prefix: str = ""
    judges = "pathway"

    def __post_init__(self):
        check_ranges(self)
        if self.images % self.num_prompts:
            raise ValueError(f"images={self.images} must be a multiple of prompts={self.num_prompts}")
        check_pattern("matching", self.matching)
        if not self.words:
            raise ValueError("words is empty; it has the words of each attribute")
        for attribute, of_attribute in self.words.items():
            different = {word.lower() for word in of_attribute if isinstance(word, str) and word.strip()}
            if len(different) < max(2, len(of_attribute)):
                raise ValueError(f"words.{attribute}={of_attribute!r} must be two or more texts, all different")
        if len(self.captions) < self.num_prompts:
            raise ValueError(f"prompts={self.num_prompts}, but {len(self.captions)} different captions are held out")

    @property
    def named_by(self) -> list[tuple[str, float | None]]:
        return [(self.prefix, scale) for scale in self.guidance or (None,)]

    @classmethod
    def open(
        cls,
        config: Config,
        source: Source,
        *,
        words: Mapping[str, Sequence[str]],
        images: int,
        prompts: int,
        guidance: Sequence[float] = (),
        matching: str = "",
        prefix: str = "",
    ) -> "WordScore":
        if config.data.prompts != "captions":
            raise UserError(f"config.data.prompts={config.data.prompts!r} have no words to read")
        words = {name: tuple(of) for name, of in words.items()}
        return cls(config, source, words, images, prompts, tuple(guidance), matching, prefix)

    @functools.cached_property
    def captions(self) -> list[str]:
        """The prompts."""
        different = sorted(set(self._held_out.captions))
        return np.random.default_rng(0).permutation(different)[: self.num_prompts].tolist()

    @functools.cached_property
    def _held_out(self) -> Described:
        return find_described(self.source, "test", self.words, self.matching)

    @functools.cached_property
    def reader(self) -> WordReader:
        return train_reader(self.config, self.source, self.words)

    @functools.cached_property
    def reader_accuracy(self) -> Float[np.ndarray, "A"]:
        """The reader's own accuracy on held-out real pictures, of captions such as those that are drawn."""
        pictures = decode_pictures(self.config, self.source, "test", self._held_out.indices)
        return np.mean(self.reader(pictures) == self._held_out.labels, axis=0)

    def prompts(self, encoder: PromptEncoder) -> list[EncodedPrompt]:
        return encoder.drawings(self.captions)

    def score(self, images: np.ndarray) -> dict[str, float]:
        """The share of images [P · n, H, W, 3] in which each attribute is read as asked, and all of them; and the
        reader's own accuracy on held-out pictures. Drawings that are clearer than pictures may score higher."""
        asked = np.array([read_caption(caption, self.words) for caption in self.captions])
        right = self.reader(images) == np.repeat(asked, len(images) // len(asked), axis=0)
        shares = {f"drawn_{name}": float(share) for name, share in zip(self.words, right.mean(axis=0), strict=True)}
        own = {f"reader_{name}": float(share) for name, share in zip(self.words, self.reader_accuracy, strict=True)}
        figures = shares | {"drawn_as_asked": float(np.mean(np.all(right, axis=1)))} | own
        return {f"{self.prefix}{name}": value for name, value in figures.items()}

    def __call__(self, subject: Subject) -> Report:
        return Report(score_drawings(self, self.score, subject, self.config, self.guidance))
