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


def test_a_call_is_compared_with_a_device_and_compiled_once(monkeypatch, caplog):
    double = jax.jit(lambda x: 2 * x)
    x = jnp.ones(10)
    with jax.log_compiles():
        assert memory.call_checked(double, "doubling", x).sum() == 20
    compiled = [record for record in caplog.records if "Finished XLA compilation of jit(<lambda>)" in record.message]
    assert len(compiled) == 1
    monkeypatch.setattr(memory, "device_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="doubling, on each device, needs"):
        memory.call_checked(double, "doubling", jnp.ones(1000))


def test_a_container_may_have_less_memory_than_the_machine(tmp_path):
    two, one = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    machine = memory.machine_bytes([str(two)])  # there is no such file
    two.write_text("max\n")
    one.write_text(f"{2**63 - 4096}\n")
    assert memory.machine_bytes([str(two), str(one)]) == machine
    two.write_text("4096000\n")
    assert memory.machine_bytes([str(two), str(one)]) == 4_096_000


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--config.model.text.intermediate_size=1048576", "--config.model.text.num_layers=1000"], "what is trained"),
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
