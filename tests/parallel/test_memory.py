"""What needs more memory than there is, is one line, before anything is allocated."""

import jax
import jax.numpy as jnp
import pytest

from lattejax.errors import UserError
from lattejax.parallel import memory
from tests.helpers import tiny_flags


def test_a_compiled_program_is_compared_with_a_device(monkeypatch):
    x = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    compiled = jax.jit(lambda x: (x @ x) @ (x + 1)).lower(x).compile()
    memory.check_compiled(compiled, "a product")
    monkeypatch.setattr(memory, "device_bytes", lambda device: 8_000_000)
    with pytest.raises(UserError, match=r"a product, on each device, needs [\d.]+ GiB of memory; there are 0\.0 GiB"):
        memory.check_compiled(compiled, "a product")


def test_a_call_is_compared_with_a_device_and_compiled_once(monkeypatch):
    traced = []
    double = jax.jit(lambda x: traced.append(x) or 2 * x)
    assert memory.call_checked(double, "doubling", jnp.ones(10)).sum() == 20
    assert len(traced) == 1
    monkeypatch.setattr(memory, "device_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="doubling, on each device, needs"):
        memory.call_checked(double, "doubling", jnp.ones(1000))


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--config.model.text.intermediate_size=1048576", "--config.model.text.num_layers=96"], "what is trained"),
        (
            ["--config.model.text.intermediate_size=8192", "--config.pretrain.batch_size=1048576"],
            "a step with config.pretrain.batch_size=1048576",
        ),
    ],
)
def test_a_config_that_needs_more_memory_than_there_is_leaves_one_line(flags, named, tmp_path, forked_command):
    """Before a batch is read."""
    no_average = {f"{stage}__ema_decay": 0.0 for stage in ("pretrain", "train")}  # so few steps: a warning of it
    done = forked_command("train", *tiny_flags(**no_average), *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr and "GiB of memory" in done.stderr
