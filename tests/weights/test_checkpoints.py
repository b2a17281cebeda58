"""What is read from a checkpoint is what was written, or it is said that it is not."""

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lattejax.weights.checkpoints import Checkpoints, DamagedCheckpoint, fingerprints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_fingerprint_tells_every_changed_bit_and_every_exchange(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(jnp.dtype(dtype))
    array[0, 0, 0] = 1
    whole = fingerprints({"a": {"x": array}})["a"]
    assert fingerprints({"a": {"x": jnp.asarray(array)}})["a"] == whole
    found = {whole}
    for place in [(0, 0, 1), (1, 2, 3)]:
        changed = array.copy()
        changed[place] = ~changed[place] if dtype == "bool" else changed[place] + 1
        found.add(fingerprints({"a": {"x": changed}})["a"])
    found.add(fingerprints({"a": {"x": np.swapaxes(array, 0, 1).reshape(2, 3, 4)}})["a"])
    assert len(found) == (4 if dtype != "bool" else len(found))
    assert fingerprints({"b": {"x": array, "y": array}})["b"] != whole


def test_a_checkpoint_that_says_another_fingerprint_is_damaged(tmp_path):
    arrays, directory = {"params": {"x": jnp.arange(5.0)}, "ema": {"x": jnp.ones(3)}}, epath.Path(tmp_path / "stage")
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, arrays, {"data": step})
    checkpoints.wait()
    progress = directory / "2" / "progress" / "metadata"
    progress.write_text(progress.read_text().replace(fingerprints(arrays)["ema"], "0" * 16))
    assert checkpoints.restore(2, params=arrays["params"])["progress"] == {"data": 2}
    with pytest.raises(DamagedCheckpoint, match="2 is damaged: ema is not what was written"):
        checkpoints.restore(2, **arrays)
    step, restored = checkpoints.restore_latest(**arrays)
    assert step == 1 and restored["progress"] == {"data": 1}
    assert checkpoints.steps == [1] and (tmp_path / "damaged" / "stage_2").is_dir()
    (directory / "1" / "params").rename(directory / "1" / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="1 is damaged"):
        checkpoints.restore_latest(**arrays)
    assert checkpoints.steps == [1], "where none is whole, none is moved"
    checkpoints.close()


def test_checkpoints_are_kept_by_count_and_by_interval(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path / "stage"), keep=2, keep_every=4)
    for step in range(1, 10):
        checkpoints.save(step, {"params": {"x": jnp.ones(2)}}, {})
    checkpoints.wait()
    assert checkpoints.steps == [4, 8, 9]
    checkpoints.close()
