"""A set of pictures and their features on disk, in parts: a killed command resumes at the part it was working on.

set.json     the settings that determine the set
00007.npz    part 7: `pool`, `spatial` and `logits` of its pictures; in `pictures` those that are kept; `digests`, a
             SHA-256 of each; in `made` the device and the versions that made it; and in `set` a hash of set.json: a
             part of other settings is not taken for one of these

Every part is written atomically by the first process.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, UInt8

import lattejax
from lattejax.errors import UserError, parsing
from lattejax.evaluation.features import FeatureExtractor
from lattejax.files import (
    check_file,
    check_space,
    read_json,
    remove_directory,
    remove_leftovers,
    write_atomically,
    write_with,
)
from lattejax.models.inception import CLASSES, POOL, SPATIAL, Features
from lattejax.parallel import hosts

SET, PICTURES, IDENTITY, DIGESTS, MADE = "set.json", "pictures", "set", "digests", "made"
BYTES = 4 * (POOL + SPATIAL + CLASSES)  # of a picture's features
IN_MEMORY = 64_000  # pool_3 features, for precision and recall: 0.5 GB

ReadPictures = Callable[[Int[np.ndarray, "n"]], UInt8[np.ndarray, "n H W 3"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """A set of pictures in a directory; see `open`."""

    directory: epath.Path
    part: int
    kept: Bool[np.ndarray, "N"]
    identity: str  # a hash of its settings

    @classmethod
    def open(
        cls,
        directory: epath.Path,
        settings: dict[str, Any],
        *,
        part: int,
        kept: Bool[np.ndarray, "N"],
        picture: tuple[int, ...],
    ) -> "Parts":
        """Starts a set, or resumes it.

        Args:
          directory: where it is.
          settings: what determines the set; it must be the same when it is resumed.
          part: pictures in a part.
          kept: for each of the N pictures, whether the picture itself is kept beside its features.
          picture: the shape of a picture.

        Raises:
          UserError: the directory has another set, or the disk has no room for this one.
        """
        settings = json.loads(json.dumps(settings | {"total": len(kept), "part": part, "kept": int(kept.sum())}))
        if (directory / SET).exists():
            found = read_json(directory / SET)
            if other := [key for key in settings | found if settings.get(key) != found.get(key)]:
                raise UserError(
                    f"{directory} holds parts of another set, with another {', '.join(other)}; remove it, or choose "
                    "another --out"
                )
        elif hosts.is_first():
            size = len(kept) * BYTES + 2 * int(kept.sum()) * math.prod(picture)  # kept here, then copied to one file
            check_space(directory, size, f"{len(kept):,} pictures' features in {directory}")
            for part_of_others in directory.glob("*.npz") if directory.exists() else ():
                part_of_others.unlink()
            write_atomically(directory / SET, (json.dumps(settings, indent=2) + "\n").encode())
        hosts.wait_for_all(f"{directory} is open")
        if hosts.is_first():
            remove_leftovers(directory)
            remove_leftovers(directory.parent, glob.escape(directory.name))
        identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return cls(directory, part, kept, identity)

    def __len__(self) -> int:
        """The number of parts."""
        return -(-len(self.kept) // self.part)

    def rows(self, index: int) -> Int[np.ndarray, "n"]:
        """The indices of a part's pictures."""
        return np.arange(index * self.part, min((index + 1) * self.part, len(self.kept)))

    def fill(self, read: ReadPictures, extractor: FeatureExtractor, name: str) -> None:
        """Makes the parts that are missing, in their order; all processes must call it.

        Args:
          read: returns the pictures of these indices, on every process.
          extractor: computes their features.
          name: what is made, for progress on standard error.
        """
        exist = np.array([hosts.is_first() and self._is_made(i) for i in range(len(self))], bool)
        exist = hosts.from_first(exist)
        missing, started = np.flatnonzero(~exist).tolist(), time.monotonic()
        for done, index in enumerate(missing, 1):
            rows = self.rows(index)
            pictures = read(rows)
            features = extractor(pictures)
            if not hosts.is_first():
                continue
            arrays = features._asdict() | {
                PICTURES: pictures[self.kept[rows]],
                DIGESTS: np.stack(
                    [np.frombuffer(hashlib.sha256(each.tobytes()).digest(), np.uint8) for each in pictures]
                ),
                MADE: np.array(json.dumps(computed_on())),
                IDENTITY: np.array(self.identity),
            }
            write_with(self._file(index), lambda file, arrays=arrays: np.savez(file, **arrays))
            left = (time.monotonic() - started) / done * (len(missing) - done)
            ready = int(np.minimum(exist.sum() + done, len(self)) * self.part)
            print(
                f"{name}: {min(ready, len(self.kept)):,} of {len(self.kept):,} pictures, {_remaining(left)}",
                file=sys.stderr,
                flush=True,
            )

    def features(self) -> Iterator[Features]:
        """The features of all pictures, in their order."""
        for index in range(len(self)):
            yield Features(*self._read(index, *Features._fields))

    def pictures(self) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """The pictures that are kept."""
        for index in range(len(self)):
            yield self._read(index, PICTURES)[0]

    @property
    def pool(self) -> "PoolBlocks":
        return PoolBlocks(self)

    @property
    def sha256(self) -> str:
        """A hash of all pictures."""
        return hashlib.sha256(b"".join(self._read(i, DIGESTS)[0].tobytes() for i in range(len(self)))).hexdigest()

    @property
    def computed_on(self) -> dict[str, str]:
        """As `computed_on`, with all devices and versions that made a part, and those of this process."""
        every = [json.loads(str(self._read(i, MADE)[0])) for i in range(len(self))] + [computed_on()]
        return {key: "; ".join(dict.fromkeys(each[key] for each in every)) for key in computed_on()}

    def remove(self) -> None:
        """Removes the set."""
        remove_directory(self.directory)

    def _is_made(self, index: int) -> bool:
        if not self._file(index).exists():
            return False
        with self._open(index) as arrays:
            return IDENTITY in arrays and str(arrays[IDENTITY]) == self.identity

    def _file(self, index: int) -> epath.Path:
        return self.directory / f"{index:05d}.npz"

    def _read(self, index: int, *names: str) -> list[np.ndarray]:
        with self._open(index) as arrays:
            return [arrays[name] for name in names]

    @contextlib.contextmanager
    def _open(self, index: int) -> Iterator[Mapping[str, np.ndarray]]:
        file = self._file(index)
        check_file(file, math.inf)
        with parsing(f"{file}, which may be removed to make it again,"), file.open("rb") as opened:
            yield np.load(opened, allow_pickle=False)


class PoolBlocks:
    """The pool_3 features of a set, a part at a time, see `precision_recall.Blocks`."""

    def __init__(self, parts: Parts):
        self._parts = parts
        self._read = functools.lru_cache(max(1, IN_MEMORY // parts.part))(lambda index: parts._read(index, "pool")[0])

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Float[np.ndarray, "n 2048"]:
        return self._read(index)


def computed_on() -> dict[str, str]:
    """The devices and versions of this process, as results have them."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.platform} {device.device_kind}",
        "lattejax_version": lattejax.__version__,
        "jax_version": jax.__version__,
    }


def _remaining(seconds: float) -> str:
    minutes = -(-round(seconds) // 60)
    return "complete" if not seconds else f"{minutes // 60} h {minutes % 60:02d} min left"
