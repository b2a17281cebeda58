"""Orbax checkpoints: what a killed run goes on from, and what sampling and chatting read.

A stage's checkpoint has four items: `params`, `ema` and `optimizer`, arrays, and `progress`, a JSON object with the
data iterator's state and a fingerprint of each of the others. Each is read on its own, so that sampling reads the
average alone. Orbax commits a checkpoint as a whole: one that a kill has cut short is never taken for a checkpoint.
Arrays are read to wherever they are asked for, so another mesh or number of devices is as good as the one that wrote.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, UInt32

from lattejax.errors import UserError
from lattejax.parallel import hosts
from lattejax.weights import layouts
from lattejax.weights.trees import like, stored_target

FINGERPRINTS = "fingerprints"  # in `progress`


class DamagedCheckpoint(UserError):
    """A checkpoint whose bytes do not decode, or are not what was written."""


class Checkpoints:
    """One stage's checkpoints in a directory, local or remote; writing goes on in the background."""

    def __init__(self, directory: epath.Path, *, keep: int | None = None, keep_every: int = 0):
        """Opens a directory.

        Args:
          directory: of the checkpoints, each in one of its own with its step for a name.
          keep: how many stay there when new ones are written; None: all.
          keep_every: those of steps that this divides stay besides; 0: none.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None)
        self._directory, self._manager = directory, ocp.CheckpointManager(directory, options=options)

    @property
    def steps(self) -> list[int]:
        """Those there are, the latest last."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, arrays: dict[str, Any], progress: dict[str, Any]) -> None:
        """Starts writing a checkpoint; the arrays may be donated as soon as this returns."""
        progress = progress | {FINGERPRINTS: fingerprints(arrays)}
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        self._manager.save(step, args=ocp.args.Composite(**items, progress=ocp.args.JsonSave(progress)))

    def restore(self, step: int, **targets: Any) -> dict[str, Any]:
        """Reads the named arrays into trees like `targets`, and `progress`.

        Raises:
          DamagedCheckpoint: they do not decode, or are not what was written.
          UserError: they are of another model; or they could not be read, several times, for a reason that may pass.
        """
        targets = {name: like(tree) for name, tree in targets.items()}
        name, restored = f"the checkpoint {self._directory / str(step)}", {}
        problem, is_damage = "", False  # and not the error, which would keep what was read
        try:
            restored = _read_patiently(lambda: self._read(step, targets), name)
        except Exception as error:  # Orbax and TensorStore raise whatever they meet
            problem, is_damage = _first_line(error), _is_damage(error)
        if not hosts.all_agree(not problem):
            problem = problem or "another process cannot read it"
            if not hosts.all_agree(not is_damage):
                raise DamagedCheckpoint(f"{name} is damaged: {problem}")
            raise UserError(f"{name} cannot be read: {problem}")
        written = restored["progress"].pop(FINGERPRINTS, {})
        found = fingerprints({name: restored[name] for name in targets})
        if other := [name for name in targets if found[name] != written.get(name)]:
            raise DamagedCheckpoint(f"{name} is damaged: {', '.join(other)} is not what was written")
        return restored

    def _read(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        items = {name: stored_target(self._directory / str(step) / name, tree) for name, tree in targets.items()}
        items = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        args = ocp.args.Composite(**items, progress=ocp.args.JsonRestore())
        read = dict(self._manager.restore(step, args=args))
        return read | {name: layouts.as_wanted(read[name], tree) for name, tree in targets.items()}

    def restore_latest(self, put_aside: bool = True, **targets: Any) -> tuple[int, dict[str, Any]]:
        """Reads the latest checkpoint that is whole, and returns its step with it; a damaged one is named, and put
        aside where it can be looked at, unless `put_aside` is false.

        Raises:
          DamagedCheckpoint: none is whole.
          UserError: as `restore`; then none is put aside.
        """
        damaged = {}
        for step in reversed(self.steps):
            try:
                restored = self.restore(step, **targets)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            if put_aside:
                self._put_aside(damaged)
            elif hosts.is_first():
                for problem in damaged.values():
                    logging.warning("%s; that of step %s is taken", problem, step)
            return step, restored
        raise DamagedCheckpoint("; ".join(damaged.values()) or f"{self._directory} has no checkpoint")

    def _put_aside(self, damaged: dict[int, str]) -> None:
        for step, error in damaged.items():
            aside = self._directory.parent / "damaged" / f"{self._directory.name}_{step}"
            if hosts.is_first():
                logging.warning("%s; it is put aside as %s, and an earlier one is taken", error, aside)
                if aside.exists():
                    aside.rmtree()
                aside.parent.mkdir(parents=True, exist_ok=True)
                (self._directory / str(step)).rename(aside)
        if damaged:
            hosts.wait_for_all("damaged checkpoints are put aside")
            self._manager.reload()

    def wait(self) -> None:
        """Returns when the last checkpoint is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last checkpoint to be written."""
        self.wait()
        self._manager.close()


# ---- What a read error means

RETRY_SECONDS = (1, 5, 20)  # between one try and the next
# TensorStore's words for bytes that are not there or do not decode, and Orbax's for those of another model.
DAMAGE = re.compile(r"DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|Error decoding|checksum|decompress|Item .* was not found")
ANOTHER_MODEL = re.compile(r"tree structures do not match|not compatible with the stored shape")


def _read_patiently(read: Callable[[], Any], name: str) -> Any:
    """Reads, and tries again after an error that may pass: of a network, a bucket, memory.

    Several processes read together, and try once: a second try of one would wait for the others, who make none.
    """
    for seconds in RETRY_SECONDS if jax.process_count() == 1 else ():
        try:
            return read()
        except Exception as error:
            if _is_damage(error) or ANOTHER_MODEL.search(str(error)):
                raise
            logging.warning("%s cannot be read (%s); trying again in %s s", name, _first_line(error), seconds)
            time.sleep(seconds)
    return read()


def _is_damage(error: BaseException | None) -> bool:
    """Whether bytes are missing or do not decode; any other error may be the way there."""
    while error is not None:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | FileNotFoundError) or DAMAGE.search(
            str(error)
        ):
            return True
        error = error.__cause__
    return False


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


# ---- Fingerprints


def fingerprints(arrays: dict[str, Any]) -> dict[str, str]:
    """Returns a hash of each tree's bits, computed where they are: the same on every mesh."""
    sums = hosts.fetch(_bit_sums(arrays))
    return {
        name: hashlib.sha256(np.asarray(jax.tree.leaves(tree), np.uint32).tobytes()).hexdigest()[:16]
        for name, tree in sums.items()
    }


@jax.jit
def _bit_sums(tree: Any) -> Any:
    """For each array a sum of 32 bits over its elements, in which each counts by its place."""

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
