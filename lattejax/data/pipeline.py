"""Deterministic batches: row j of batch n is record π(n·B + j), where π shuffles each epoch, from the seed."""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from etils import epy

with epy.lazy_imports():
    import grain


@runtime_checkable
class RandomAccess(Protocol):
    """Records by index, several at once, which is faster for any storage."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Any]: ...


class Batches(Iterator[Any]):
    """An infinite iterator of batches, prefetched by other threads.

    `get_state()` is a small JSON object, the position after the last returned batch; `set_state` goes back to it. The
    position counts complete batches, so it does not depend on which rows of each batch are read.

    Args:
      source: the records.
      make_batch: turns a list of the source's records, and their positions in the stream, into a batch. A position is
        of one record in one epoch.
      batch_size: records in a complete batch, over all processes; batches may span epochs.
      seed: the seed of the shuffle.
      threads: the number of prefetching threads.
      rows: which of a batch's rows are read, in order; None: all.
      chosen: the indices of the records that are read; None: all.
    """

    def __init__(
        self,
        source: RandomAccess,
        make_batch: Callable[[Sequence[Any], Sequence[int]], Any],
        *,
        batch_size: int,
        seed: int,
        threads: int,
        rows: Sequence[int] | None = None,
        chosen: Sequence[int] | None = None,
    ):
        self._chosen = range(len(source)) if chosen is None else chosen
        # Infinite, reshuffled in each epoch. A stage of no steps opens its batches too, and never reads one.
        self._shuffled = grain.MapDataset.range(max(len(self._chosen), 1)).seed(seed).shuffle()
        self._source, self._make_batch = source, make_batch
        self._rows, self._batch_size = range(batch_size) if rows is None else rows, batch_size
        batches = grain.MapDataset.range(sys.maxsize // batch_size)
        batches = batches.map(self._make)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        self._iterator = iter(batches.to_iter_dataset(options))

    def _make(self, batch: int) -> Any:
        positions = [batch * self._batch_size + row for row in self._rows]
        return self._make_batch(self._source.__getitems__(self.records(batch, self._rows)), positions)

    def records(self, batch: int, rows: Sequence[int] | None = None) -> list[int]:
        """The indices of the records in some rows of a batch, or in all of them."""
        rows = range(self._batch_size) if rows is None else rows
        return [self._chosen[int(self._shuffled[batch * self._batch_size + row])] for row in rows]

    def example(self) -> Any:
        """A batch of one record, whose arrays have the shapes of every batch's but for their number of rows."""
        return self._make_batch(self._source.__getitems__([0]), [0])

    def __next__(self) -> Any:
        return next(self._iterator)

    def get_state(self) -> Any:
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)


def chunks(source: RandomAccess, size: int = 1024) -> Iterator[Sequence[Any]]:
    """All records, in order, in chunks."""
    for start in range(0, len(source), size):
        yield source.__getitems__(list(range(start, min(start + size, len(source)))))


def every(source: RandomAccess) -> Iterator[Any]:
    """Every record, in order."""
    return itertools.chain.from_iterable(chunks(source))


class Streams(Iterator[dict[str, Any]]):
    """Combines iterators of batches into one, which yields dicts of batches; its state is a dict of their states."""

    def __init__(self, **streams: Batches):
        self._streams = streams

    def __next__(self) -> dict[str, Any]:
        return {name: next(stream) for name, stream in self._streams.items()}

    def example(self) -> dict[str, Any]:
        """A batch of one record of each stream, see `Batches.example`."""
        return {name: stream.example() for name, stream in self._streams.items()}

    def records(self, batch: int) -> dict[str, list[int]]:
        """The indices of all records in a batch, for each stream."""
        return {name: stream.records(batch) for name, stream in self._streams.items()}

    def get_state(self) -> dict[str, Any]:
        return {name: stream.get_state() for name, stream in self._streams.items()}

    def set_state(self, states: dict[str, Any]) -> None:
        for name, stream in self._streams.items():
            stream.set_state(states[name])
