"""Multi-process runs: connecting the processes, agreeing on values, and ending together."""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name
from jax.experimental import multihost_utils

from lattejax.errors import UserError, first_line
from lattejax.interrupts import Interrupted

CLUSTERS = ("none", "auto", "explicit")
FAILED = 2  # the exit code of all failures, see `errors.UserError`
END = "lattejax/end"  # the key under which a process announces that all must end
SECONDS_BETWEEN_CHECKS = 0.5
SECONDS_TO_END = 10
SECONDS_TO_FAIL_TOGETHER = 10


def connect(cluster: str, coordinator: str = "", processes: int = 0, process: int = 0, seconds: int = 300) -> None:
    """Joins the processes of a job; call it before anything asks for devices.

    Args:
      cluster: "none": a single process; "auto": the description of a TPU pod, SLURM or another scheduler, which must
        exist; "explicit": the arguments below.
      coordinator: host:port of process 0, reachable from all.
      processes: the number of processes.
      process: this process's index, from 0.
      seconds: how long to wait for the others.

    Raises:
      UserError: the processes cannot connect.
    """
    if cluster == "none":
        return
    explicit = {}
    if cluster == "explicit":
        if not coordinator or not 0 <= process < processes:
            raise UserError(
                f"--cluster=explicit needs --coordinator=host:port, --processes and 0 <= --process < --processes; "
                f"found {coordinator!r}, {processes} and {process}"
            )
        explicit = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    # JAX's own preemption service would handle SIGTERM itself; here the training loop agrees on when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**explicit, initialization_timeout=seconds)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--cluster={cluster}: the processes cannot connect: {first_line(error)}") from error
    print(
        f"process {jax.process_index()} of {jax.process_count()}, with {jax.local_device_count()} devices", flush=True
    )
    threading.Thread(target=_watch_for_end, daemon=True).start()


# ---- One process that ends would leave the others waiting for it: it ends all


def is_one_of_several() -> bool:
    """Whether this process is connected to others; asks for no devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


_before_end: list[Callable[[], None]] = []  # completes what this process is writing


def finish_before_end(finish: Callable[[], None]) -> None:
    """From here on, `finish` is called before this process ends because another was asked to stop."""
    _before_end[:] = [finish]


def end(interrupted: Interrupted) -> None:
    """Ends this process, from any thread, and all others with it."""
    print(interrupted, file=sys.stderr, flush=True)
    sys.stdout.flush()
    end_all(interrupted.exit_code, str(interrupted))
    os._exit(interrupted.exit_code)


def end_all(code: int, reason: str) -> None:
    """Ends all processes, if there are several: the others print which one and why, and exit with the same code."""
    if is_one_of_several():
        distributed.global_state.client.key_value_set(
            END, f"{jax.process_index()} {code} {reason}", allow_overwrite=True
        )
        _end_together(code)


def all_fail(name: str) -> bool:
    """Called by a process that fails at `name`: whether all others fail there too, within seconds."""
    if not is_one_of_several():
        return True
    try:
        distributed.global_state.client.wait_at_barrier(name, 1000 * SECONDS_TO_FAIL_TOGETHER)
    except jax.errors.JaxRuntimeError:  # the others do not fail
        return False
    return True


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Within it, an error is printed and no more: the process ends afterwards in any case."""
    try:
        yield
    except Exception:
        traceback.print_exc()


def _watch_for_end() -> None:
    client = distributed.global_state.client
    while True:
        time.sleep(SECONDS_BETWEEN_CHECKS)
        try:
            index, code, reason = client.key_value_try_get(END).split(" ", 2)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the job ends
        if index != str(jax.process_index()):
            print(f"process {index} has ended all: {reason}", file=sys.stderr, flush=True)
            if int(code) != FAILED:
                for finish in _before_end:
                    with reported():
                        finish()
            _end_together(int(code))
        return


def _end_together(code: int) -> None:
    """Exits without waiting for computations. Process 0 stays the longest, because the others ask it for the reason."""
    try:
        distributed.global_state.client.wait_at_barrier(END, 1000 * SECONDS_TO_END)
        time.sleep(SECONDS_BETWEEN_CHECKS * is_first())
    except jax.errors.JaxRuntimeError as error:  # a process is gone already
        print(f"some processes did not answer: {first_line(error)}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this is the process that writes the shared files."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """A barrier: returns when all processes have called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Returns a tree of complete NumPy arrays on every process, however the tree's arrays are sharded."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: (
            np.asarray(x)
            if not isinstance(x, jax.Array) or x.is_fully_replicated or x.is_fully_addressable
            else multihost_utils.process_allgather(x, tiled=True)
        ),
        tree,
    )


def from_first(values: np.ndarray) -> np.ndarray:
    """The first process's array, on every process; all processes must call it, with arrays of one shape and dtype."""
    return values if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def all_agree(good: bool) -> bool:
    """Whether `good` holds on every process; all processes must call it."""
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.asarray(good))))
