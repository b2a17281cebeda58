"""The same results on every mesh: training, drawing, and restoring a checkpoint."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.helpers import ENVIRONMENT, ROOT

# The number of groups, and the meshes: expert, data, fsdp, tensor. In CI each axis is larger than 1 in one of them.
IN_CI = (2, "2x2x1x1", "1x1x2x2")
ON_EIGHT = (4, "4x2x1x1", "2x1x2x2", "1x8x1x1", "1x1x8x1", "1x2x2x2", "2x2x2x1", "4x1x1x2")


@pytest.fixture(scope="module", params=[IN_CI, pytest.param(ON_EIGHT, marks=pytest.mark.slow)], ids=["four", "eight"])
def found(request) -> dict[str, dict]:
    groups, *meshes = request.param
    devices = math.prod(map(int, meshes[0].split("x")))
    flags = f"--xla_force_host_platform_device_count={devices} "
    flags += os.environ["XLA_FLAGS"] if request.param == IN_CI else "--xla_backend_optimization_level=0"
    # The older emitters compile in a third of the time, but their float64 functions are only accurate to 1e-9.
    quick = "fusion_emitters=false" in flags
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.many_devices", str(groups), *meshes],
        cwd=ROOT,
        env=ENVIRONMENT | {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    known = {"layers": 2 * groups, "tolerance": 1e-8 if quick else 1e-10}
    return {name: mesh | known for name, mesh in json.loads(done.stdout.splitlines()[-1]).items()}


def test_ten_steps_and_a_sampling_call_equal_those_on_one_device(found):
    """In float64, relative to each array's largest entry: only the order of sums differs. To 1e-8 where XLA's older
    emitters make functions less accurate; else to 1e-10, and float32's losses to 1e-5. Images to one grey level: a
    float32 sum may round the other way."""
    for name, mesh in found.items():
        assert mesh["moved"] > 0.1, "the steps change the weights"
        for what in ("parameters", "average", "losses"):
            assert mesh[what] < mesh["tolerance"], (name, what)
        assert mesh["images"] <= 1, name
    first = next(iter(found.values()))
    assert first.get("float32_losses", 0) < 1e-5
    assert first["own_prompts"] < 1e-5, "if each row reads its own prompt, and groups share nothing"


def test_batches_flow_times_noise_and_dropout_are_the_same_bits(found):
    assert all(mesh["same_draws"] for mesh in found.values())


def test_checkpoints_are_restored_on_other_meshes_bit_for_bit(found):
    assert all(mesh["restored"] for mesh in found.values())


def test_each_device_holds_only_its_groups_and_sends_only_sums_over_expert_and_data(found):
    """The layers of weights, average and contexts are sharded over the axis `expert`."""
    for name, mesh in found.items():
        expert, _, fsdp, tensor = map(int, name.split("x"))
        assert mesh["layers_of_state"] == mesh["layers_of_contexts"] == [mesh["layers"] // expert], name
        if fsdp == tensor == 1:
            assert mesh["collectives"] == ["all-reduce"], name
    assert next(iter(found.values()))["own_prompts_collectives"] == ["all-reduce"]


def test_groups_that_share_nothing_send_each_other_only_a_few_sums(found):
    """Metrics, and whether the gradient is finite."""
    assert next(iter(found.values()))["sent_between_groups"] < 256


def test_over_fsdp_weights_are_sent_and_activations_are_not(found):
    """Every layer's weights are gathered twice, and their gradients summed. Hidden states that are sharded by their
    width would be summed in every product: 84 times the weights."""
    assert next(iter(found.values()))["sent_over_fsdp"] < 10


def test_attention_over_tensor_sends_nothing(found):
    """Query heads are sharded in both towers and KV heads replicated, so that each half of a layer needs one sum: four
    layers of the text, one of the vision tower. One more is outside the layers; nothing else is sent."""
    read = next(iter(found.values()))["read_over_tensor"]
    assert read["hidden"] < 1e-8
    assert read["sent"] == {"all-reduce": 2 * (4 + 1) + 1}
