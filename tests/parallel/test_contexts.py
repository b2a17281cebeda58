"""Captions' contexts over devices: each holds its own groups' layers, and a training step moves none of them."""

import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from lattejax.parallel import rules
from lattejax.parallel.mesh import make_mesh
from tests.helpers import ENVIRONMENT, ROOT


def test_each_device_keeps_its_own_groups_contexts():
    """Four groups on four devices: one layer's contexts on each; the gradients are those of one device, and the only
    communication is a sum of what the groups share."""
    flags = ENVIRONMENT["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.four_devices"],
        cwd=ROOT,
        env=ENVIRONMENT | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers_on_each_device"] == [1]
    assert found["collectives"] == ["all-reduce"]
    assert found["gibibytes_at_2b"] == pytest.approx([1.069, 1.069 / 4], rel=1e-3)  # 1,001 prompts of 40 tokens
    assert found["difference"] < 1e-5 < found["largest"]  # float32 sums in another order


def test_layers_that_do_not_divide_are_refused():
    mesh = make_mesh({}, jax.devices()[:1])
    assert rules.by_layer(mesh, [jnp.zeros((3, 2))])[0].spec == jax.sharding.PartitionSpec("expert")

    two = types.SimpleNamespace(shape={"expert": 2})
    with pytest.raises(ValueError, match="expert=2 does not divide the 3 layers"):
        rules.by_layer(two, [jnp.zeros((3, 2))])
