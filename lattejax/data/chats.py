"""Chats of texts and images, and what a prompt encoder makes of them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lattejax.errors import UserError
from lattejax.models.text import MOST_POSITIONS

Chat = tuple[tuple[str, tuple[str | None, ...]], ...]  # turns: role and content, with None for an image


@dataclasses.dataclass(frozen=True, eq=False)
class ReadableImage:
    """An image for the vision tower: flattened patches [P, patch_dim], and their grid (frames, rows, columns)."""

    patches: np.ndarray
    grid: tuple[int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """Token ids [T], the images they refer to, and which tokens are the answer to learn [T].

    Raises:
      UserError: the prompt is longer than any that the model reads.
    """

    input_ids: np.ndarray
    images: tuple[ReadableImage, ...] = ()
    is_answer: np.ndarray | None = None

    def __post_init__(self):
        if (length := len(self.input_ids)) > MOST_POSITIONS:
            raise UserError(f"a prompt has {length:,} tokens, more than the {MOST_POSITIONS:,} that the model reads")


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """One turn of a chat: texts and images, in order; a text alone may be given as it is."""

    role: str  # "system", "user" or "assistant"
    content: str | Sequence[str | ReadableImage]

    def __post_init__(self):
        content = (self.content,) if isinstance(self.content, str) else tuple(self.content)
        object.__setattr__(self, "content", content)

    @property
    def images(self) -> tuple[ReadableImage, ...]:
        return tuple(part for part in self.content if isinstance(part, ReadableImage))

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(part for part in self.content if isinstance(part, str))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Turn) and (self.role, self.content) == (other.role, other.content)


class Bounds(NamedTuple):
    """How many images the prompts of a data set have at most, and how many patches each image."""

    images: int
    patches: int


NO_IMAGES = Bounds(0, 0)
