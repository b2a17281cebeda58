"""Several processes that work as one: how they find each other, and what they agree on."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lattejax.errors import UserError

CLUSTERS = ("none", "auto", "explicit")


def connect(cluster: str, coordinator: str = "", processes: int = 0, process: int = 0, seconds: int = 300) -> None:
    """Joins the processes of a job; to be called before anything asks for devices.

    Args:
      cluster: "none": this process is alone; "auto": a TPU pod's, SLURM's or another scheduler's own description is
        used, and has to be there; "explicit": what follows.
      coordinator: host:port of process 0, reachable from all.
      processes: how many there are.
      process: which of them this one is, from 0.
      seconds: how long to wait for the others.

    Raises:
      UserError: they do not find each other.
    """
    if cluster == "none":
        return
    explicit = {}
    if cluster == "explicit":
        if not coordinator or not 0 <= process < processes:
            raise UserError(
                f"--cluster=explicit needs --coordinator=host:port, --processes and --process from 0 to one below; "
                f"found {coordinator!r}, {processes} and {process}"
            )
        explicit = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    # JAX's own preemption service takes SIGTERM for itself; here the training loop agrees on when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**explicit, initialization_timeout=seconds)
    except (RuntimeError, ValueError, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--cluster={cluster}: the processes do not find each other: {first_line}") from error
    print(
        f"process {jax.process_index()} of {jax.process_count()}, with {jax.local_device_count()} devices", flush=True
    )


def is_first() -> bool:
    """Whether this is the process that writes what all share."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Returns a tree of NumPy arrays, whole on every process, wherever its arrays' parts are."""
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
    """Whether it is so on every process; all have to ask."""
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.asarray(good))))
