"""A checkpoint is restored as it was written, or reported as damaged."""

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lattejax.errors import UserError
from lattejax.runs import checkpoints as module
from lattejax.runs.checkpoints import Checkpoints, DamagedCheckpoint, fingerprints
from tests.helpers import assert_same_bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_fingerprint_detects_every_changed_bit_and_every_exchange(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(jnp.dtype(dtype))
    array[0, 0, 0] = 1
    original = fingerprints({"a": {"x": array}})["a"]
    assert fingerprints({"a": {"x": jnp.asarray(array)}})["a"] == original
    found = {original}
    for place in [(0, 0, 1), (1, 2, 3)]:
        changed = array.copy()
        changed[place] = ~changed[place] if dtype == "bool" else changed[place] + 1
        found.add(fingerprints({"a": {"x": changed}})["a"])
    found.add(fingerprints({"a": {"x": np.swapaxes(array, 0, 1).reshape(2, 3, 4)}})["a"])
    assert len(found) == (3 if dtype == "bool" else 4), "of equal values an exchange is none"
    assert fingerprints({"b": {"x": array, "y": array}})["b"] != original


def test_a_checkpoint_with_another_fingerprint_is_damaged(tmp_path, caplog):
    arrays, directory = {"params": {"x": jnp.arange(5.0)}, "ema": {"x": jnp.ones(3)}}, epath.Path(tmp_path / "stage")
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, arrays, {"data": step})
    checkpoints.wait()
    progress = directory / "2" / "progress" / "metadata"
    progress.write_text(progress.read_text().replace(fingerprints(arrays)["ema"], "0" * 16))
    assert checkpoints.restore(2, params=arrays["params"])["progress"] == {"data": 2}
    assert not caplog.text, "reading undamaged items logs nothing"
    with pytest.raises(DamagedCheckpoint, match="2 is damaged: ema is not what was written"):
        checkpoints.restore(2, **arrays)
    step, restored = checkpoints.restore_latest(**arrays)
    assert step == 1 and restored["progress"] == {"data": 1}
    assert checkpoints.steps == [1] and (tmp_path / "damaged" / "stage_2").is_dir()
    (directory / "1" / "params").rename(directory / "1" / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="1 is damaged"):
        checkpoints.restore_latest(**arrays)
    assert checkpoints.steps == [1], "if all are damaged, none is moved"
    checkpoints.close()


TEMPORARY = {
    "network": OSError("UNAVAILABLE: connection reset by peer"),
    "bucket": ValueError("PERMISSION_DENIED: Error opening gs://bucket/a"),
    "memory": MemoryError("RESOURCE_EXHAUSTED: out of memory"),
}


@pytest.mark.parametrize("case", TEMPORARY)
def test_an_error_that_may_be_temporary_is_retried_and_is_no_damage(case, tmp_path, monkeypatch, caplog):
    """Two failures, then success; and only failures, which are reported without moving the checkpoint."""
    monkeypatch.setattr(module, "RETRY_SECONDS", (0, 0))
    arrays, left = {"params": {"x": jnp.arange(5.0)}}, [TEMPORARY[case]] * 2
    checkpoints = Checkpoints(epath.Path(tmp_path / "stage"))
    checkpoints.save(1, arrays, {})
    checkpoints.wait()
    restore = checkpoints._manager.restore

    def failing(*args, **kwargs):
        if left:
            raise left.pop()
        return restore(*args, **kwargs)

    monkeypatch.setattr(checkpoints._manager, "restore", failing)
    step, restored = checkpoints.restore_latest(**arrays)
    assert step == 1 and caplog.text.count("trying again") == 2
    assert_same_bits(restored["params"], arrays["params"])
    left.extend([TEMPORARY[case]] * 3)
    with pytest.raises(UserError, match="1 cannot be read: ") as reported:
        checkpoints.restore_latest(**arrays)
    assert not isinstance(reported.value, DamagedCheckpoint)
    assert checkpoints.steps == [1] and not (tmp_path / "damaged").exists()
    checkpoints.close()


def test_weights_of_another_shape_are_no_damage_and_are_not_retried(tmp_path, caplog):
    checkpoints = Checkpoints(epath.Path(tmp_path / "stage"))
    checkpoints.save(1, {"params": {"x": jnp.arange(5.0)}}, {})
    checkpoints.wait()
    for other in ({"x": jnp.arange(6.0)}, {"y": jnp.arange(5.0)}):
        with pytest.raises(UserError, match="cannot be read") as reported:
            checkpoints.restore_latest(params=other)
        assert not isinstance(reported.value, DamagedCheckpoint)
    assert "trying again" not in caplog.text and checkpoints.steps == [1]
    checkpoints.close()


def test_checkpoints_are_kept_by_count_and_by_interval(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path / "stage"), keep=2, keep_every=4)
    for step in range(1, 10):
        checkpoints.save(step, {"params": {"x": jnp.ones(2)}}, {})
    checkpoints.wait()
    assert checkpoints.steps == [4, 8, 9]
    checkpoints.close()
