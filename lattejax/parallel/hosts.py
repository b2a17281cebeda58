"""Multi-process runs: connecting the processes, agreeing on values, and ending together."""

import os
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name
from jax.experimental import multihost_utils

from lattejax.errors import UserError

CLUSTERS = ("none", "auto", "explicit")
FAILURE = "lattejax/failure"  # the key under which a process announces its failure
SECONDS_BETWEEN_CHECKS = 0.5
SECONDS_TO_END = 10


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
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--cluster={cluster}: the processes cannot connect: {first_line}") from error
    print(
        f"process {jax.process_index()} of {jax.process_count()}, with {jax.local_device_count()} devices", flush=True
    )
    threading.Thread(target=_watch_for_failure, daemon=True).start()


# ---- A failure of one process ends all: the others would wait for it


def announce_failure(reason: str) -> None:
    """Ends all processes, if there are several: each prints which one failed and why, and exits with code 2."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        distributed.global_state.client.key_value_set(FAILURE, f"{jax.process_index()} {reason}", allow_overwrite=True)
        _end_together()


def _watch_for_failure() -> None:
    client = distributed.global_state.client
    while True:
        time.sleep(SECONDS_BETWEEN_CHECKS)
        try:
            index, _, reason = client.key_value_try_get(FAILURE).partition(" ")
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the job ends
        if index != str(jax.process_index()):
            print(f"error: process {index} failed: {reason}", file=sys.stderr, flush=True)
            _end_together()
        return


def _end_together() -> None:
    """Exits without waiting for computations. Process 0 stays the longest, because the others ask it for the reason."""
    try:
        distributed.global_state.client.wait_at_barrier(FAILURE, 1000 * SECONDS_TO_END)
        time.sleep(SECONDS_BETWEEN_CHECKS * is_first())
    except jax.errors.JaxRuntimeError as error:  # a process is gone already
        print(f"some processes did not answer: {str(error).splitlines()[0]:.200}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(2)


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


def all_agree(good: bool) -> bool:
    """Whether `good` holds on every process; all processes must call it."""
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.asarray(good))))
