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
    with pytest.raises(UserError, match=r"a product, on each device, needs [\d.]+ GB of memory; there are 0\.0 GB"):
        memory.check_compiled(compiled, "a product")


def test_a_config_that_needs_more_memory_than_there_is_leaves_one_line(tmp_path, forked_command):
    sizes = ["--config.model.text.intermediate_size=1048576", "--config.model.text.num_layers=96"]
    done = forked_command("train", *tiny_flags(), *sizes, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == 1
    assert "what is trained" in done.stderr and "GB of memory" in done.stderr
