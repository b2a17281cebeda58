"""Orbax checkpoints: a killed run resumes from them, and sampling and chatting read them.

A stage's checkpoint has four items: the arrays `params`, `ema` and `optimizer`, and `progress`, a JSON object with the
data iterator's state and a fingerprint of each item. Each item is read separately, so that sampling reads only
the average. Orbax commits checkpoints atomically: an incomplete one is never taken for a checkpoint. Arrays are read to
the requested devices, so a checkpoint can be restored on another mesh or number of devices.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, UInt32
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lattejax.errors import UserError, first_line, parsing
from lattejax.files import check_files, check_space
from lattejax.parallel import hosts
from lattejax.weights import layouts
from lattejax.weights.trees import byte_count, like, stored_target

FINGERPRINTS = "fingerprints"  # in `progress`


class DamagedCheckpoint(UserError):
    """A checkpoint whose bytes do not decode, or differ from those written."""


class Checkpoints:
    """One stage's checkpoints in a directory, local or remote; they are written in the background."""

    def __init__(self, directory: epath.Path, *, keep: int | None = None, keep_every: int = 0):
        """Opens a directory.

        Args:
          directory: the directory; each checkpoint is a subdirectory, named by its step.
          keep: how many of the latest to keep when new ones are written; None: all.
          keep_every: checkpoints at multiples of this step are kept too; 0: none.
        """
        self._kept = _Kept(keep, keep_every)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._kept)
        self._directory, self._attempts = directory, itertools.count()
        if directory.exists():
            check_files(directory, deep=True)
        with parsing(f"the list of checkpoints in {directory}"):
            self._manager = ocp.CheckpointManager(directory, options=options)

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, in increasing order."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def keep_step(self, step: int | None) -> None:
        """Keeps the checkpoint of this step, too, when new ones are written; it replaces the step of the last call."""
        self._kept.step = step

    def save(self, step: int, arrays: dict[str, Any], progress: dict[str, Any]) -> None:
        """Starts writing a checkpoint; the arrays may be donated as soon as this returns.

        Raises:
          UserError: the disk has no room for it. All earlier ones are complete.
        """
        self.wait()
        if hosts.is_first():
            check_space(self._directory, byte_count(arrays), f"the checkpoint of step {step}")
        progress = progress | {FINGERPRINTS: fingerprints(arrays) | {"progress": _hash(progress)}}
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        self._manager.save(step, args=ocp.args.Composite(**items, progress=ocp.args.JsonSave(progress)))

    def restore(self, step: int, **targets: Any) -> dict[str, Any]:
        """Reads the named arrays into trees like `targets`, and `progress`.

        Raises:
          DamagedCheckpoint: they do not decode, or differ from what was written.
          UserError: they belong to another model, or could not be read in several attempts, for a reason that may
            be temporary.
        """
        targets = {name: like(tree) for name, tree in targets.items()}
        name, restored = f"the checkpoint {self._directory / str(step)}", {}
        problem, is_damage = "", False  # not the error itself, which would keep the arrays read alive
        try:
            restored = _read_with_retries(lambda: self._read(step, targets), name)
        except Exception as error:  # Orbax and TensorStore raise many types
            problem, is_damage = first_line([*_causes(error)][-1]), _is_damage(error)
        if problem:
            if not hosts.all_fail(f"reading {name}, attempt {next(self._attempts)}"):
                raise UserError(f"{name} cannot be read by process {jax.process_index()}: {problem}")
            if not hosts.all_agree(not is_damage):
                raise DamagedCheckpoint(f"{name} is damaged: {problem}")
            raise UserError(f"{name} cannot be read: {problem}")
        written = restored["progress"].pop(FINGERPRINTS, {})
        found = fingerprints({name: restored[name] for name in targets})
        if "progress" in written:  # unless an earlier version wrote the checkpoint
            found["progress"] = _hash(restored["progress"])
        if other := [name for name in found if found[name] != written.get(name)]:
            raise DamagedCheckpoint(f"{name} is damaged: {', '.join(other)} is not what was written")
        return restored

    def _read(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        items = {name: stored_target(self._directory / str(step) / name, tree) for name, tree in targets.items()}
        items = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        args = ocp.args.Composite(**items, progress=ocp.args.JsonRestore())
        read = dict(self._manager.restore(step, args=args))
        return read | {name: layouts.as_wanted(read[name], tree) for name, tree in targets.items()}

    def restore_latest(self, move_damaged: bool = True, **targets: Any) -> tuple[int, dict[str, Any]]:
        """Reads the latest undamaged checkpoint; returns its step and its items. Warns of damaged ones, and moves
        them away for inspection unless `move_damaged` is false.

        Raises:
          DamagedCheckpoint: there is no undamaged one.
          UserError: as `restore`; then none is moved.
        """
        damaged = {}
        for step in reversed(self.steps):
            try:
                restored = self.restore(step, **targets)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            if move_damaged:
                self._move_damaged(damaged)
            elif hosts.is_first():
                for problem in damaged.values():
                    logging.warning("%s; using that of step %s", problem, step)
            return step, restored
        raise DamagedCheckpoint("; ".join(damaged.values()) or f"{self._directory} has no checkpoint")

    def _move_damaged(self, damaged: dict[int, str]) -> None:
        for step, error in damaged.items():
            target = self._directory.parent / "damaged" / f"{self._directory.name}_{step}"
            if hosts.is_first():
                logging.warning("%s; moved to %s, using an earlier one", error, target)
                if target.exists():
                    target.rmtree()
                target.parent.mkdir(parents=True, exist_ok=True)
                (self._directory / str(step)).rename(target)
        if damaged:
            hosts.wait_for_all("damaged checkpoints are moved")
            self._manager.reload()

    def wait(self) -> None:
        """Returns when the last checkpoint is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last checkpoint to be written."""
        self.wait()
        self._manager.close()


@dataclasses.dataclass
class _Kept(preservation_policy.PreservationPolicy):
    """The latest `latest` checkpoints (None: all), those at multiples of `every` (0: none), and one more."""

    latest: int | None
    every: int
    step: int | None = None

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: preservation_policy.PreservationContext
    ) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]  # in increasing order
        latest = steps if self.latest is None else steps[-self.latest :]
        return [step in latest or step == self.step or bool(self.every and step % self.every == 0) for step in steps]


# ---- Classifying read errors

RETRY_SECONDS = (1, 5, 20)  # between attempts
# TensorStore's messages for bytes that are missing or do not decode, and Orbax's for a checkpoint of another model.
DAMAGE = re.compile(
    r"DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION: Error reading|Error decoding|checksum|decompress"
    r"|Item .* was not found"
)
DAMAGE_TYPES = json.JSONDecodeError, UnicodeDecodeError, RecursionError, FileNotFoundError
ANOTHER_MODEL = re.compile(r"tree structures do not match|not compatible with the stored shape")


def _read_with_retries(read: Callable[[], Any], name: str) -> Any:
    """Reads, and retries after an error that may be temporary: of a network, a bucket, memory.

    Several processes read together and only once: a retry of one would wait for the others, which do not retry.
    """
    for seconds in RETRY_SECONDS if jax.process_count() == 1 else ():
        try:
            return read()
        except Exception as error:
            if isinstance(error, UserError) or _is_damage(error) or ANOTHER_MODEL.search(str(error)):
                raise
            logging.warning("%s cannot be read (%s); trying again in %s s", name, first_line(error), seconds)
            time.sleep(seconds)
    return read()


def _is_damage(error: BaseException) -> bool:
    """Whether bytes are missing or do not decode; any other error may be temporary."""
    return any(isinstance(each, DAMAGE_TYPES) or DAMAGE.search(str(each)) for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, and so on: the last says most."""
    while error is not None:
        yield error
        error = error.__cause__


# ---- Fingerprints


def fingerprints(arrays: dict[str, Any]) -> dict[str, str]:
    """Returns a hash of each tree's bits, computed on their devices; it is the same on every mesh."""
    sums = hosts.fetch(_bit_sums(arrays))
    return {
        name: hashlib.sha256(np.asarray(jax.tree.leaves(tree), np.uint32).tobytes()).hexdigest()[:16]
        for name, tree in sums.items()
    }


def _hash(values: dict[str, Any]) -> str:
    """Returns a hash of a JSON object, the same before it is written and after it is read."""
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _bit_sums(tree: Any) -> Any:
    """For each array a 32-bit sum over its elements that depends on their positions."""

    def bit_sum(x: Array) -> UInt32[Array, ""]:
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)
        place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
        for axis in reversed(range(bits.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= bits.shape[axis]
        # Multiplying by odd constants loses nothing modulo 2^32; the shift brings high bits to the low ones.
        mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
        return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)

    return jax.tree.map(bit_sum, tree)
