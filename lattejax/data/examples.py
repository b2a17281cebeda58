"""What the two stages train on: the interface of a source, and how its records become batches."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lattejax.configuration import Config
from lattejax.data.identity import Identity
from lattejax.data.prompts import EncodedPrompt, PromptEncoder, ReadableImage
from lattejax.models.qwen2_vl import Prompts


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """Latents [h, w, C] as the flow sees them, and what they show: in words, perhaps after images to look at."""

    latents: np.ndarray
    caption: str
    images: tuple[ReadableImage, ...] = ()


@runtime_checkable
class Drawings(Protocol):
    """Random access to what is to be drawn."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> list[Drawing]: ...


@runtime_checkable
class Questions(Protocol):
    """Random access to questions about pictures, each with its answer."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> list[EncodedPrompt]: ...

    def text(self, index: int) -> tuple[str, str]:
        """Question and answer."""

    def unanswered(self, index: int) -> EncodedPrompt:
        """The same prompt, up to where the answer is to be given."""


@runtime_checkable
class Source(Protocol):
    """A data set, in the splits "train" and "test".

    `captions` are all there are, where they are few enough to be read once for all; otherwise none. `identities` tell
    one data set from another, in what it holds and in which order: a new run notes the first, and an earlier one may
    have noted any of them. `has_questions` says whether it can train a VLM, and Blend.
    """

    captions: tuple[str, ...]
    identities: tuple[str, ...]
    has_questions: bool

    @classmethod
    def open(cls, config: Config, autoencoder: Callable[[], Identity]) -> "Source":
        """Opens the config's data set, whose latents are to be those of an autoencoder; `autoencoder` tells which.

        Raises:
          UserError: it is not there or not complete, or does not go with the rest of the config.
        """

    def drawings(self, split: str, encoder: PromptEncoder) -> Drawings: ...

    def questions(self, split: str, encoder: PromptEncoder) -> Questions | None: ...

    def requests(self, encoder: PromptEncoder) -> list[tuple[str, EncodedPrompt]]:
        """Prompts to draw samples of, each with a label, where `config.data.prompts` is not "captions"."""

    def texts(self) -> Iterable[str]:
        """Everything that is said, to train a tokenizer on."""


def encode_prompts(encoder: PromptEncoder, drawings: Sequence[Drawing]) -> list[EncodedPrompt]:
    if any(drawing.images for drawing in drawings):
        return [encoder.drawing(drawing.caption, drawing.images) for drawing in drawings]
    return encoder.drawings([drawing.caption for drawing in drawings])


def image_batcher(
    config: Config, encoder: PromptEncoder, captions: Sequence[str]
) -> Callable[[Sequence[Drawing]], dict[str, Any]]:
    """Returns what makes a batch of drawings: latents, with the numbers of their captions in the table of `captions`
    where those are read once for all, and otherwise with their prompts."""
    numbers = {caption: number for number, caption in enumerate(captions)}

    def batch(drawings: Sequence[Drawing]) -> dict[str, Any]:
        def prompts() -> Prompts:
            return encoder.batch(encode_prompts(encoder, drawings), config.data.prompt_length)

        images = image_arrays(config, len(drawings), prompts)
        np.stack([drawing.latents for drawing in drawings], out=images["latents"])
        if "caption" in images:
            images["caption"][:] = [numbers[drawing.caption] for drawing in drawings]
        return images

    return batch


def image_arrays(
    config: Config, rows: int, prompts: Callable[[], Prompts], make: Callable[..., Any] = np.zeros
) -> dict[str, Any]:
    """A batch of drawings still to be filled, but for its `prompts`, which it has where captions are not read once for
    all; `make` makes or describes an array of a shape and a dtype."""
    images = {"latents": make((rows, *config.data.latent_shape), np.float32)}
    if config.train.share_contexts:
        return images | {"caption": make((rows,), np.int32)}
    return images | {"prompts": prompts()}
