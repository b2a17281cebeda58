"""Deterministic batches: row j of batch n is record π(n·B + j), π a shuffle of each epoch, drawn from the seed."""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain


class RandomAccess(Protocol):
    """Records by number, many at once: the faster way wherever they are stored."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Any]: ...


def training_batches(
    source: RandomAccess,
    make_batch: Callable[[Sequence[Any]], Any],
    *,
    batch_size: int,
    seed: int,
    threads: int,
    part: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Returns an endless iterator of batches, read ahead off the main thread.

    Its `get_state()` is a small JSON object, the position after the batch last handed out; `set_state` goes back to it.
    The position counts whole batches, so a state also fits another number of parts.

    Args:
      source: of the records.
      make_batch: turns a list of the source's records into a batch.
      batch_size: records in a batch, of all parts together; batches run on across the ends of epochs.
      seed: of the shuffle.
      threads: how many threads read ahead.
      part: (i, n) for the i-th of n contiguous parts of each batch, which is all that is then read.

    Raises:
      ValueError: the source is empty, or n does not divide the batch.
    """
    index, count = part
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {count} parts that read it")
    if not len(source):
        raise ValueError("the data set has no records")
    shuffled = grain.MapDataset.range(len(source)).seed(seed).shuffle()  # goes on, reshuffled, beyond its length

    def batch(number: int) -> Any:
        start = number * batch_size + index * batch_size // count
        return make_batch(source.__getitems__([shuffled[row] for row in range(start, start + batch_size // count)]))

    dataset = grain.MapDataset.range(sys.maxsize // batch_size).map(batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def chunks(source: RandomAccess, size: int = 1024) -> Iterator[Sequence[Any]]:
    """Every record, in order, so many at a time."""
    for start in range(0, len(source), size):
        yield source.__getitems__(list(range(start, min(start + size, len(source)))))


def every(source: RandomAccess) -> Iterator[Any]:
    """Every record, in order."""
    return itertools.chain.from_iterable(chunks(source))


class Streams(Iterator[dict[str, Any]]):
    """Several iterators of batches as one, of dicts with a batch of each; its state is a dict of their states."""

    def __init__(self, **streams: grain.DatasetIterator):
        self._streams = streams

    def __next__(self) -> dict[str, Any]:
        return {name: next(stream) for name, stream in self._streams.items()}

    def get_state(self) -> dict[str, Any]:
        return {name: stream.get_state() for name, stream in self._streams.items()}

    def set_state(self, states: dict[str, Any]) -> None:
        for name, stream in self._streams.items():
            stream.set_state(states[name])
