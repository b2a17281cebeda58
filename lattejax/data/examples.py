"""Training data of both stages: the interface of a data source, and the batching of its records."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lattejax.configuration import Config
from lattejax.data.chats import Bounds
from lattejax.data.identity import Identity
from lattejax.data.prompts import EncodedPrompt, PromptEncoder, ReadableImage
from lattejax.errors import UserError
from lattejax.models.qwen2_vl import Prompts


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A caption, optionally after images."""

    caption: str
    images: tuple[ReadableImage, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """Scaled latents [h, w, C], as the flow uses them, and the prompts that ask for them, of which one is taken."""

    latents: np.ndarray
    prompts: tuple[Prompt, ...]


@runtime_checkable
class Drawings(Protocol):
    """Random access to the images to draw. `bounds` of the images in their prompts give all batches one shape."""

    bounds: Bounds

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> list[Drawing]: ...

    def without_pixels(self) -> Iterable[EncodedPrompt]:
        """All prompts, to check their lengths; their images may lack patches."""

    def prompt_texts(self) -> Iterable[list[str]]:
        """The texts of each drawing's prompts, in order."""


@runtime_checkable
class Questions(Protocol):
    """Random access to questions about pictures, each with its answer. `bounds` as for `Drawings`."""

    bounds: Bounds

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> list[EncodedPrompt]: ...

    def text(self, index: int, turn: int = -1) -> tuple[str, str]:
        """Question and answer: of a conversation its last, or those of another turn, 0 the first."""

    def unanswered(self, index: int, turn: int = -1) -> EncodedPrompt:
        """The same prompt, up to where that answer begins."""

    def without_pixels(self) -> Iterable[EncodedPrompt]:
        """All questions with answers, to check their lengths; their images may lack patches."""


@runtime_checkable
class Source(Protocol):
    """A data set, in the splits "train" and "test".

    `captions` lists all captions if they are few enough for a table of contexts; otherwise it is empty. `identities`
    identify the data set's contents and order: a new run records the first, and an earlier run may have recorded any of
    them. `has_drawings` is whether it can train a generation pathway, `has_questions` whether it can train a VLM, and
    Blend.
    """

    captions: tuple[str, ...]
    identities: tuple[str, ...]
    has_drawings: bool
    has_questions: bool

    @classmethod
    def open(cls, config: Config, autoencoder: Callable[[], Identity]) -> "Source":
        """Opens the config's data set; `autoencoder` returns the autoencoder that its latents must be of.

        Raises:
          UserError: it is missing or incomplete, or does not fit the rest of the config.
        """

    def drawings(self, split: str, encoder: PromptEncoder) -> Drawings: ...

    def questions(self, split: str, encoder: PromptEncoder) -> Questions | None: ...

    def requests(self, encoder: PromptEncoder) -> list[tuple[str, EncodedPrompt]]:
        """Prompts for sample images, each with a label, if `config.data.prompts` is not "captions"."""

    def texts(self) -> Iterable[str]:
        """All texts, to train a tokenizer on."""


def encode_prompts(encoder: PromptEncoder, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
    if any(prompt.images for prompt in prompts):
        return [encoder.drawing(prompt.caption, prompt.images) for prompt in prompts]
    return encoder.drawings([prompt.caption for prompt in prompts])


def choose_prompt(drawing: Drawing, seed: int, position: int) -> Prompt:
    """One of a drawing's prompts: a function of the seed and of the row's position in the stream of all epochs."""
    if len(drawing.prompts) == 1:
        return drawing.prompts[0]
    return drawing.prompts[np.random.default_rng((seed, position)).integers(len(drawing.prompts))]


def seen_drawings(config: Config, drawings: Drawings) -> list[int] | None:
    """The indices of the drawings to train on: of those none of whose captions matches `data.unseen`; None: all.

    Raises:
      UserError: there are none.
    """
    if not config.data.unseen:
        return None
    unseen = re.compile(config.data.unseen)
    seen = [index for index, texts in enumerate(drawings.prompt_texts()) if not any(map(unseen.search, texts))]
    if not seen and len(drawings):
        raise UserError(f"config.data.unseen={config.data.unseen!r} matches all captions: nothing is left to train on")
    return seen


def image_batcher(
    config: Config, encoder: PromptEncoder, captions: Sequence[str], bounds: Bounds | None = None
) -> Callable[..., dict[str, Any]]:
    """Returns a function that makes a batch of drawings and their positions in the stream (by default 0, 1, …).

    A batch has latents, with the indices of their captions in `captions` if contexts are shared, otherwise with their
    prompts, padded to `bounds` as in `PromptEncoder.batch`.
    """
    indices = {caption: index for index, caption in enumerate(captions)}

    def batch(drawings: Sequence[Drawing], positions: Sequence[int] | None = None) -> dict[str, Any]:
        positions = range(len(drawings)) if positions is None else positions
        rows = zip(drawings, positions, strict=True)
        chosen = [choose_prompt(drawing, config.seed, position) for drawing, position in rows]

        def prompts() -> Prompts:
            return encoder.batch(encode_prompts(encoder, chosen), config.data.prompt_length, bounds)

        images = image_arrays(config, len(drawings), prompts)
        np.stack([drawing.latents for drawing in drawings], out=images["latents"])
        if "caption" in images:
            images["caption"][:] = [indices[prompt.caption] for prompt in chosen]
        return images

    return batch


def image_arrays(
    config: Config, rows: int, prompts: Callable[[], Prompts], make: Callable[..., Any] = np.zeros
) -> dict[str, Any]:
    """The arrays of a batch of drawings, to be filled. `prompts` are complete, and present only if contexts are not
    shared. `make` makes or describes an array of a shape and a dtype."""
    images = {"latents": make((rows, *config.data.latent_shape), np.float32)}
    if config.train.share_contexts:
        return images | {"caption": make((rows,), np.int32)}
    return images | {"prompts": prompts()}
