"""What a set of samples is asked to show: sample i has prompt i modulo their number, so that prompts are balanced."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Int, UInt8

from lattejax.configuration import Config
from lattejax.data.examples import Source, encode_prompts
from lattejax.data.prompts import EncodedPrompt, PromptEncoder
from lattejax.flow.schedule import Sampling
from lattejax.models.generation import Context
from lattejax.parallel import hosts
from lattejax.parallel.mesh import batches_of
from lattejax.sampling.images import ImageSampler

AT_A_TIME = 1000  # prompts that are encoded, for their hash
OF_A_FILE = "a file"  # `Asked.what` of a user's prompts


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """Prompts that are encoded when they are needed; `identity` is a hash of all of them."""

    count: int
    encode: Callable[[Sequence[int]], list[EncodedPrompt]]
    identity: str
    what: str  # where they come from

    @classmethod
    def texts(cls, encoder: PromptEncoder, texts: Sequence[str], what: str) -> "Asked":
        identity = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        return cls(len(texts), lambda rows: encoder.drawings([texts[row] for row in rows]), identity, what)

    @classmethod
    def of_data(cls, config: Config, source: Source, encoder: PromptEncoder) -> "Asked":
        """The prompts of a run's data: all its captions, such as class names, or, if these are too many to list, those
        of its held-out pictures; the pictures that it suggests, if prompts are pictures."""
        if config.data.prompts != "captions":
            requests = source.requests(encoder)
            identity = hashlib.sha256("\n".join(label for label, _ in requests).encode()).hexdigest()
            return cls(len(requests), lambda rows: [requests[row][1] for row in rows], identity, "pictures of the data")
        if source.captions:
            return cls.texts(encoder, source.captions, "all captions of the data")
        drawings = source.drawings("test", encoder)

        def encode(rows: Sequence[int]) -> list[EncodedPrompt]:
            return encode_prompts(encoder, [drawing.prompts[0] for drawing in drawings.__getitems__(list(rows))])

        return cls(len(drawings), encode, source.identities[0], "the captions of held-out pictures")

    def encoded_identity(self, count: int) -> str:
        """A hash of the first `count` prompts as the model reads them: their tokens and images."""
        digest = hashlib.sha256()
        for start in range(0, count, AT_A_TIME):
            for prompt in self.encode(list(range(start, min(start + AT_A_TIME, count)))):
                images = [array for image in prompt.images for array in (np.asarray(image.grid), image.patches)]
                for array in (prompt.input_ids.astype(np.int32), *images):
                    digest.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
        return digest.hexdigest()


class SetDrawer:
    """Draws samples of a set by their indices: noise from (seed, index), prompt from the index modulo their number.

    A set therefore is the same, within one grey level, for any batch size and number of devices.
    """

    def __init__(self, sampler: ImageSampler, asked: Asked, sampling: Sampling, *, batch_size: int, seed: int):
        self._sampler, self._asked, self._sampling = sampler, asked, sampling
        self._batch_size, self._seed = batch_size, seed
        self._read: tuple[list[int], Context] | None = None  # the last batch's prompts, which the next may share

    def __call__(self, samples: Int[np.ndarray, "N"]) -> UInt8[np.ndarray, "N H W 3"]:
        """Returns the pictures, on every process."""
        drawn: list[jax.Array] = []
        for rows in batches_of(len(samples), self._batch_size, self._sampler.mesh):
            asked, row_prompts = np.unique(samples[rows] % self._asked.count, return_inverse=True)
            contexts = self._contexts(asked.tolist())
            empty = np.full(len(rows), contexts.mask.shape[0] - 1, np.int32)
            indices = samples[rows].astype(np.int32)
            settings = self._sampling, self._seed
            drawn.append(self._sampler.draw(contexts, row_prompts.astype(np.int32), empty, indices, *settings))
        return np.concatenate(hosts.fetch(drawn))[: len(samples)]

    def _contexts(self, asked: list[int]) -> Context:
        if self._read is None or self._read[0] != asked:
            self._read = asked, self._sampler.read(self._asked.encode(asked))
        return self._read[1]
