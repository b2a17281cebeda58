"""What one request, and all together, may ask for."""

import dataclasses
from typing import Annotated

from lattejax.models.text import MOST_POSITIONS
from lattejax.ranges import Range, Size, check_ranges

Count = Annotated[int, Range(1, 1024)]
Seconds = Annotated[float, Range(0, 86_400, above=True)]
Bytes = Annotated[int, Range(1024, 2**30)]
Tokens = Annotated[int, Range(16, MOST_POSITIONS)]
CHARACTERS_PER_TOKEN = 32  # no text of more is read
MARKS_PER_PART = 40  # braces, brackets and commas around a part of a conversation


@dataclasses.dataclass(frozen=True)
class Limits:
    """The server's limits; the commands' flags are named alike."""

    images_per_request: Annotated[int, Range(1, 64)] = 10
    steps: Annotated[int, Range(1, 10_000)] = 200
    prompt_tokens: Tokens = 64  # of a drawing's prompt
    context_tokens: Tokens = 512  # of a conversation, with its answer
    conversations: Annotated[int, Range(1, 256)] = 16  # that are kept, and answers at a time
    batch_size: Annotated[int, Range(1, 256)] = 16  # guided pictures in a step
    pictures: Count = 32  # in flight
    body_bytes: Bytes = 20 * 2**20
    image_pixels: Annotated[int, Range(1, 2**28)] = 16_000_000  # of an image that is sent, before it is decoded
    request_pixels: Annotated[int, Range(1, 2**30)] = 64_000_000  # of all images of a request; at least image_pixels
    queue: Annotated[int, Range(1, 100_000)] = 64  # requests that wait
    queue_seconds: Seconds = 60  # that one may wait
    client_seconds: Seconds = 30  # for a client to send its request, or to take a part of the response

    def __post_init__(self):
        check_ranges(self)
        if self.images_per_request > self.pictures:
            raise ValueError(
                f"images_per_request={self.images_per_request} must be at most pictures={self.pictures}, which are in "
                "flight at a time"
            )

    @property
    def marks(self) -> int:
        """Braces, brackets and commas in a body. Parsing one of these alone would stop the server for seconds."""
        characters = CHARACTERS_PER_TOKEN * (self.context_tokens + 2 * self.prompt_tokens)
        return characters + MARKS_PER_PART * self.context_tokens

    @property
    def step_rows(self) -> Size:
        """Velocities in a step: two for each guided picture."""
        return 2 * self.batch_size
