"""What is asked of the engine, and what it tells while it works, by a job's `tell`, from its own thread."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from lattejax.data.prompts import EncodedPrompt
from lattejax.flow.schedule import Sampling
from lattejax.sampling.answers import Decoding


@dataclasses.dataclass
class Progress:
    """A drawing has taken a step; `group` has taken it."""

    group: int
    step: int  # of `steps`, from 1
    steps: int


@dataclasses.dataclass
class Picture:
    """A picture, or a preview of one; `pixels` [·, H, W, 3] may still be being computed."""

    index: int  # of the drawing's pictures
    preview: int | None  # the preview's index, from 0; None: the finished picture
    pixels: jax.Array
    place: int  # in `pixels`


@dataclasses.dataclass
class Token:
    """The next token of an answer."""

    token: int
    logprob: tuple[float, list[tuple[int, float]]] | None
    cached_tokens: int  # of the answer's prompt, which were not read again


@dataclasses.dataclass
class Done:
    """The job is complete."""


@dataclasses.dataclass
class Failed:
    """The job has failed, before or after it began."""

    reason: str  # "late": it has waited too long; "stopping": so does the server; else an error's first line
    is_refusal: bool = False  # the request is bad, and `reason` tells the client why


@dataclasses.dataclass(eq=False)
class Job:
    """One request. `tell` must not block."""

    prompt: EncodedPrompt
    tell: Callable[[Any], None]
    is_cancelled: bool = dataclasses.field(default=False, init=False)
    submitted: float = dataclasses.field(default_factory=time.monotonic, init=False)  # since when it waits

    def cancel(self) -> None:
        """Its rows leave at the next step."""
        self.is_cancelled = True


@dataclasses.dataclass(eq=False)
class Drawing(Job):
    """Pictures of one prompt: those that `ImageSampler` draws of it with the seed."""

    negative: EncodedPrompt | None
    sampling: Sampling
    count: int
    seed: int
    previews: int = 0  # of each picture, at most
    wants_progress: bool = False


@dataclasses.dataclass(eq=False)
class Chat(Job):
    """The answer that continues a conversation."""

    decoding: Decoding
    top_logprobs: int | None = None
