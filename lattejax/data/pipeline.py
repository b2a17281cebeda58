"""Deterministic batches: row j of batch n is record π(n·B + j), π a shuffle of each epoch, drawn from the seed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain


def training_batches(
    source: Any, make_batch: Callable[[Sequence[Any]], Any], *, batch_size: int, seed: int, threads: int
) -> grain.DatasetIterator:
    """Returns an endless iterator of batches, read ahead off the main thread.

    Its `get_state()` is a small JSON object, the position after the batch last handed out; `set_state` goes back to it.

    Args:
      source: a random-access source, with `__len__` and `__getitem__`.
      make_batch: turns a list of the source's records into a batch.
      batch_size: records in a batch; batches run on across the ends of epochs.
      seed: of the shuffle.
      threads: how many threads read ahead.
    """
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=make_batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


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
