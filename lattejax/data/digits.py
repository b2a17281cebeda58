"""scikit-learn's 1,797 handwritten digits (in its wheel): pictures to draw, and to answer questions about.

A fixed split: a fifth of the pictures, the same share of each digit, is held out.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from etils import epy
from PIL import Image

from lattejax.configuration import Config
from lattejax.data.chats import Bounds
from lattejax.data.examples import Drawing, Prompt, encode_prompts
from lattejax.data.identity import Identity
from lattejax.data.pipeline import every
from lattejax.data.prompts import EncodedPrompt, PromptEncoder, ReadableImage, largest_images
from lattejax.errors import UserError
from lattejax.models.autoencoders import PIXELS, Autoencoder
from lattejax.models.pixels import PixelConfig

with epy.lazy_imports():
    from sklearn import datasets, model_selection

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {word}" for word in WORDS)
REQUEST = "another picture like this"
QUESTIONS_PER_IMAGE = 4
SIDE = 8  # in pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Digits:
    """Images uint8 [n, 8, 8, 3], white ink on black, and labels [n]."""

    images: np.ndarray
    labels: np.ndarray


@functools.cache
def load(split: str) -> Digits:
    """Returns the "train" or the "test" split."""
    bunch = datasets.load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    train, test = model_selection.train_test_split(
        np.arange(len(grey)), test_size=0.2, random_state=0, stratify=bunch.target
    )
    chosen = {"train": train, "test": test}[split]
    return Digits(np.repeat(grey[chosen][..., None], 3, axis=-1), bunch.target[chosen])


def question_and_answer(label: int, kind: int, index: int) -> tuple[str, str]:
    """The four kinds of questions about one picture. The last kind asks about its own digit in every second picture; in
    the others it asks about another digit, which varies with the picture's `index`."""
    if kind == 0:
        return "Which digit is this?", WORDS[label]
    if kind == 1:
        return "What number is written here?", WORDS[label]
    if kind == 2:
        return "Is this digit even or odd?", ("even", "odd")[label % 2]
    same = index % 2 == 0
    asked = label if same else (label + 1 + index // 2 % 9) % 10
    return f"Is this a {WORDS[asked]}?", "yes" if same else "no"


class DigitSource:
    """The digits as a data set, see `examples.Source`; their prompts are "captions" or "pictures"."""

    captions = CAPTIONS
    identities = ("scikit-learn's digits",)
    has_drawings = has_questions = True

    def __init__(self, prompts: str):
        self.prompts = prompts

    @classmethod
    def open(cls, config: Config, autoencoder: Callable[[], Identity]) -> "DigitSource":
        data = config.data
        if (data.autoencoder, data.image_size) != (PIXELS, SIDE):
            raise UserError(
                f"config.data.autoencoder={data.autoencoder!r} and image_size={data.image_size} must be {PIXELS!r} and "
                f"{SIDE} for the digits"
            )
        if data.latent_shape != (SIDE, SIDE, 1):
            raise UserError(f"config.data.latent_shape={data.latent_shape} must be {(SIDE, SIDE, 1)} for the digits")
        return cls(data.prompts)

    def drawings(self, split: str, encoder: PromptEncoder) -> "Drawings":
        return Drawings(split, encoder, self.prompts)

    def questions(self, split: str, encoder: PromptEncoder) -> "Questions":
        return Questions(split, encoder)

    def requests(self, encoder: PromptEncoder) -> list[tuple[str, EncodedPrompt]]:
        labels = [f"{REQUEST} {word}" for word in WORDS]
        return list(zip(labels, requests(encoder, self.prompts), strict=True))

    def texts(self) -> list[str]:
        kinds = range(QUESTIONS_PER_IMAGE)
        pairs = [question_and_answer(label, kind, index) for label in range(10) for kind in kinds for index in (0, 1)]
        return [*CAPTIONS, REQUEST, *(text for pair in pairs for text in pair)]


@functools.cache
def _read_pictures(split: str, processor: str) -> dict[int, ReadableImage]:
    """The cache of pictures that this processor has read, by index: a run opens its questions several times."""
    return {}


class Questions:
    """Random access to questions about pictures, each with its answer."""

    def __init__(self, split: str, encoder: PromptEncoder):
        self.digits = load(split)
        self.encoder = encoder
        self.images = _read_pictures(split, encoder.processor.to_json_string())

    def __len__(self) -> int:
        return QUESTIONS_PER_IMAGE * len(self.digits.images)

    @property
    def bounds(self) -> Bounds:
        return largest_images([self.unanswered(0)])  # all pictures have one size

    def without_pixels(self) -> Iterator[EncodedPrompt]:
        return every(self)

    def __getitems__(self, indices: Sequence[int]) -> list[EncodedPrompt]:
        return [self._encode(index, self.text(index)[1]) for index in indices]

    def text(self, index: int, turn: int = -1) -> tuple[str, str]:
        del turn  # each has one
        image, kind = divmod(index, QUESTIONS_PER_IMAGE)
        return question_and_answer(int(self.digits.labels[image]), kind, image)

    def unanswered(self, index: int, turn: int = -1) -> EncodedPrompt:
        del turn
        return self._encode(index, None)

    def _encode(self, index: int, answer: str | None) -> EncodedPrompt:
        image = index // QUESTIONS_PER_IMAGE
        if image not in self.images:
            self.images[image] = self.encoder.read_image(Image.fromarray(self.digits.images[image]))
        return self.encoder.question(self.text(index)[0], [self.images[image]], answer)


class Drawings:
    """Random access to the digits' pixels as latents.

    With "captions" the prompt is one of ten captions. With "pictures" it is another picture of the same digit, and a
    request.
    """

    def __init__(self, split: str, encoder: PromptEncoder, prompts: str):
        digits = load(split)
        pixels = digits.images.astype(np.float32) / 127.5 - 1
        self.latents = np.asarray(Autoencoder(PixelConfig()).encode({}, jnp.asarray(pixels)))
        self.labels, self.encoder = digits.labels, encoder
        if prompts == "captions":
            self._prompts = [Prompt(CAPTIONS[label]) for label in self.labels]
        else:
            images = [encoder.read_image(Image.fromarray(image)) for image in digits.images]
            self._prompts = [Prompt(REQUEST, (images[other],)) for other in self._others()]

    def _others(self) -> np.ndarray:
        """For each picture the index of the next picture of its digit, cyclically."""
        others = np.empty(len(self.labels), int)
        for label in range(10):
            own = np.flatnonzero(self.labels == label)
            others[own] = np.roll(own, -1)
        return others

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bounds(self) -> Bounds:
        return largest_images([EncodedPrompt(np.empty(0, int), self._prompts[0].images)])

    def __getitems__(self, indices: Sequence[int]) -> list[Drawing]:
        return [Drawing(self.latents[index], (self._prompts[index],)) for index in indices]

    def without_pixels(self) -> Iterator[EncodedPrompt]:
        return iter(encode_prompts(self.encoder, self._prompts))

    def prompt_texts(self) -> Iterator[list[str]]:
        return ([prompt.caption] for prompt in self._prompts)


def requests(encoder: PromptEncoder, prompts: str) -> list[EncodedPrompt]:
    """A prompt for each digit, in order: its caption, or a request with the first held-out picture."""
    drawings = Drawings("test", encoder, prompts)
    firsts = drawings.__getitems__([int(np.flatnonzero(drawings.labels == label)[0]) for label in range(10)])
    return encode_prompts(encoder, [drawing.prompts[0] for drawing in firsts])
