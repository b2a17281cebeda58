"""The memory of devices, and one line for what does not fit, before it is allocated.

A GPU or a TPU reports that it has too little. A CPU does not: there the system kills the process without a word.
"""

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lattejax.errors import UserError

GIB = 2**30


# Where Linux states how much memory a container may use, with control groups of version 2 and 1.
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_bytes(limits: Sequence[str] = CONTAINER_LIMITS) -> int:
    """The memory of this machine, or of the container that this process runs in, if that is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in limits:
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            found.append(int(Path(path).read_text()))
    return min(found)


def device_bytes(device: jax.Device) -> int:
    """The memory of a device; those of a CPU share the machine's."""
    reported = device.memory_stats() or {}
    return reported.get("bytes_limit") or machine_bytes() // jax.local_device_count(device.platform)


def bytes_per_device(tree: Any) -> int:
    """How much of a tree of arrays, or their descriptions, each device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check_fits(needed: int, available: int, what: str) -> None:
    """Raises `UserError` if `what` needs more bytes than there are."""
    if needed > available:
        raise UserError(f"{what} needs {needed / GIB:,.1f} GiB of memory; there are {available / GIB:,.1f} GiB")


def check_compiled(compiled: jax.stages.Compiled, what: str) -> None:
    """Raises `UserError` if a compiled program needs more memory than one of its devices has."""
    if (memory := compiled.memory_analysis()) is None:  # not every backend knows
        return
    needed = memory.argument_size_in_bytes + bytes_beyond_arguments(memory)
    check_fits(needed, device_bytes(jax.local_devices()[0]), f"{what}, on each device,")


def bytes_beyond_arguments(memory: Any) -> int:
    """What a device needs for a program's temporaries, and for results that do not take an argument's place.

    `memory` is what `compiled.memory_analysis()` returns.
    """
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def call_checked(function: jax.stages.Wrapped, what: str, *arguments: Any, **static: Any) -> Any:
    """Calls a jitted function, after `check_compiled`; it is compiled once for both."""
    check_compiled(function.lower(*arguments, **static).compile(), what)
    return function(*arguments, **static)
