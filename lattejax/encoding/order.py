"""The order of a source's records, and their division into shards. It survives additions.

Records are numbered by their place in an order that is kept in `order.json`. What is added later comes after everything
that is there, so a shard's records never change, and neither does whether they are held out. A record that no latents
were made of may go, or get another name: its place stays empty.
"""

import dataclasses
import json
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath, epy

from lattejax.errors import UserError, parsing
from lattejax.files import read_json, write_atomically

with epy.lazy_imports():
    import tensorflow_datasets as tfds

ORDER = "order.json"


@dataclasses.dataclass(frozen=True)
class Order:
    """The records of the source's own splits, in order.

    Attributes:
      counts: for each of the source's splits its number of records when it was first encoded, and after each
        addition.
      names: the records' names in order, if the source's own order may change; "" is an empty place.
    """

    counts: dict[str, tuple[int, ...]]
    names: tuple[str, ...] | None

    def save(self, path: epath.Path) -> None:
        write_atomically(path, (json.dumps(dataclasses.asdict(self)) + "\n").encode())

    @classmethod
    def load(cls, path: epath.Path) -> "Order":
        values = read_json(path)
        with parsing(f"{path}, the order of the records,"):
            counts = {split: tuple(map(int, each)) for split, each in values["counts"].items()}
            names = values["names"]
            if not all(counts.values()) or not all(isinstance(name, str) for name in names or ()):
                raise TypeError("its counts are empty, or its names no texts")
            return cls(counts, None if names is None else tuple(names))


class Part(NamedTuple):
    """The records that one shard is made of: numbers in the order of one of the source's splits."""

    split: str
    records: range


def first_order(sizes: dict[str, int], names: Sequence[str] | None) -> Order:
    """Names are shuffled, so that held-out records are like the others; without names the source has its own order."""
    return Order({split: (size,) for split, size in sizes.items()}, None if names is None else _shuffled(names, 0))


def extended(
    known: Order,
    sizes: dict[str, int],
    names: Sequence[str] | None,
    what: str,
    encoded: Callable[[], Container[str]] = frozenset,
) -> Order:
    """The order with the records that have been added since, without those that may go; the same object if nothing
    has changed.

    Args:
      known: the order until now.
      sizes: the number of records in each of the source's splits.
      names: the records' names, if the source has any.
      what: names the source in errors.
      encoded: returns the names of the records that must stay; called only if some are gone.

    Raises:
      UserError: such records are gone.
    """
    if known.counts.keys() != sizes.keys() or (known.names is None) != (names is None):
        raise UserError(f"{what} has the splits {', '.join(sizes)}, and had {', '.join(known.counts)}")
    if names is not None:
        return _renamed(known, names, what, encoded)
    for split, size in sizes.items():
        if size < known.counts[split][-1]:
            before = known.counts[split][-1]
            raise UserError(
                f"{what} has {size:,} records in {split!r}; it had {before:,} when it was encoded: restore them, or "
                "use another --out"
            )
    if all(size == known.counts[split][-1] for split, size in sizes.items()):
        return known
    return Order({split: (*each, sizes[split]) for split, each in known.counts.items()}, None)


def _renamed(known: Order, names: Sequence[str], what: str, encoded: Callable[[], Container[str]]) -> Order:
    """`extended`, of a source that names its records; it has one split."""
    there, listed = set(known.names), set(names)
    gone = there - listed - {""}
    if gone:
        must_stay = encoded()
        if lost := sorted(name for name in gone if name in must_stay):
            raise UserError(f"{what} lacks {len(lost)} records that it had, such as {lost[0]!r}; use another --out")
    new = [name for name in names if name not in there]
    if not gone and not new:
        return known
    [(split, counts)] = known.counts.items()
    stay = ("" if name in gone else name for name in known.names)
    return Order(
        {split: (*counts, len(known.names) + len(new)) if new else counts},
        (*stay, *_shuffled(new, len(known.names))),
    )


def _shuffled(names: Sequence[str], seed: int) -> tuple[str, ...]:
    names = sorted(names)
    return tuple(names[i] for i in np.random.default_rng(seed).permutation(len(names)))


# ---- Splits and parts


def ranges(split: str, sizes: dict[str, int]) -> dict[str, range]:
    """The records in a split, in tensorflow-datasets' notation, given the sizes of the source's own splits.

    Raises:
      UserError: it does not fit the sizes, or takes two ranges of one split.
    """
    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[n], num_bytes=0) for name, n in sizes.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(f"split {split!r} does not fit the splits {sizes}: {error}") from error
    if len({part.splitname for part in parts}) < len(parts):
        raise UserError(f"split {split!r} takes two ranges of one split; give one")
    return {part.splitname: range(sizes[part.splitname])[part.from_ : part.to] for part in parts}


def check_disjoint(train: dict[str, range], test: dict[str, range]) -> None:
    """Raises `UserError` if training records are also held out."""
    for name in train.keys() & test.keys():
        shared = set(train[name]) & set(test[name])
        if shared:
            raise UserError(f"config.images.train and .test share {len(shared)} pictures of {name!r}; hold out others")


def divide(order: Order, splits: dict[str, str], shard_size: int) -> dict[str, list[Part]]:
    """The parts of each of our splits: at most `shard_size` records, all added at the same time.

    Raises:
      UserError: a split is empty, the splits overlap, or earlier records have changed between them.
    """
    stages = [dict(zip(order.counts, sizes, strict=True)) for sizes in zip(*order.counts.values(), strict=True)]
    taken = {ours: ranges(spec, stages[-1]) for ours, spec in splits.items()}
    check_disjoint(taken["train"], taken["test"])
    divided: dict[str, list[Part]] = {ours: [] for ours in splits}
    for ours, spec in splits.items():
        if not any(taken[ours].values()):
            raise UserError(f"config.images.{ours} has no pictures")
        before = dict.fromkeys(order.counts, 0)
        for sizes in stages:
            then = ranges(spec, sizes)
            for name, records in taken[ours].items():
                stop = min(records.stop, sizes[name])
                if then.get(name, range(0)) != range(records.start, stop):
                    raise UserError(
                        f"config.images.{ours}={spec!r} would now choose other records than at the first encoding; "
                        f"hold out a number ({name}[:{max(1, sizes[name] // 20)}]), not a share"
                    )
                for first in range(max(records.start, before[name]), stop, shard_size):
                    divided[ours].append(Part(name, range(first, min(first + shard_size, stop))))
            before = sizes
    return divided
