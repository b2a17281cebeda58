"""TPU chips: their data sheets, and their compiler, which runs on a machine without a TPU."""

import dataclasses
import importlib.metadata
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from packaging.requirements import Requirement

from lattejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, from Google's data sheets (cloud.google.com/tpu/docs); memory as the compiler states it."""

    hbm_gib: float
    teraflops: float  # bfloat16
    hbm_gigabytes_per_second: float
    ici_gigabytes_per_second: float  # sent over all links together: half of the "bidirectional" figure


CHIPS = {
    "v4": Chip(30.75, 275, 1228, 300),
    "v5e": Chip(15.75, 197, 819, 200),
    "v5p": Chip(95.74, 459, 2765, 600),
    "v6e": Chip(31.25, 918, 1640, 400),
}


MOST_CHIPS = 10_000  # the largest pod, of v5p, has 8,960


def open_topology(name: str) -> tuple[Chip, list[Any]]:
    """Returns the chip and the devices of a topology like "v5e:16x16".

    Raises:
      UserError: there is no such topology, or no libtpu.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}(x[1-9]\d{0,3})?", shape):
        raise UserError(f"--topology={name} must be one of {', '.join(CHIPS)} and a shape, like v5e:4x4 or v5p:2x2x4")
    if (count := math.prod(map(int, shape.split("x")))) > MOST_CHIPS:
        raise UserError(f"--topology={name} has {count:,} chips; a plan is for at most {MOST_CHIPS:,}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise it waits for a TPU's metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling does not occupy a TPU
    check_compiler()
    whole = {"chip_config_name": "megacore"} if kind == "v4" else {}  # otherwise each core counts as a device
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **whole)
        return CHIPS[kind], list(described.devices)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--topology={name}: {str(error).splitlines()[0]}") from error


def pods_compiler() -> str:
    """The libtpu that `jax[tpu]` installs on a pod with this JAX, as a requirement: libtpu==0.0.42.*"""
    needs = map(Requirement, importlib.metadata.requires("jax") or ())
    return next(f"{one.name}{one.specifier}" for one in needs if one.name == "libtpu")


def check_compiler() -> None:
    """Raises `UserError` unless the pod's compiler for this JAX is installed: another version makes other programs."""
    wanted = Requirement(pods_compiler())
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"a plan needs the TPU's compiler, which runs without a TPU: pip install --target=tpu_compiler '{wanted}', "
            "and put that directory on PYTHONPATH; installed in the environment it would slow every command down"
        ) from None
    if not wanted.specifier.contains(found):
        raise UserError(f"libtpu {found} is installed, but a pod with JAX {jax.__version__} has {wanted}; install that")
