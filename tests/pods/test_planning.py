"""The planner: its descriptions match training's arrays, and it parses compiled programs correctly."""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import pytest

from lattejax.data.examples import image_batcher
from lattejax.data.prompts import question_batch
from lattejax.errors import UserError
from lattejax.models import latte_flow, qwen2_vl
from lattejax.parallel.collectives import Traffic, traffic
from lattejax.parallel.mesh import one_device
from lattejax.pods import chips, programs
from lattejax.runs.data import open_data
from lattejax.training.generation_stage import frozen_inputs
from tests.helpers import ENVIRONMENT, encoder_for, run_command, tiny_config, tiny_flags

PICTURES = dict(data__prompts="pictures", train__share_contexts=False, data__prompt_length=36)


@pytest.mark.parametrize(
    "settings",
    [{}, {"train__share_contexts": False}, {"model__variant": "blend"}, PICTURES],
    ids=["couple", "own prompts", "blend", "pictures"],
)
def test_descriptions_match_the_arrays_that_training_makes(settings):
    config = tiny_config(**settings)
    encoder, source = encoder_for(config), open_data(config)
    drawings = source.drawings("train", encoder).__getitems__(range(config.train.batch_size))
    batch = {"images": image_batcher(config, encoder, source.captions)(drawings)}
    if config.trains_answers:
        questions = source.questions("train", encoder).__getitems__(range(config.train.answer_batch_size))
        batch["questions"] = question_batch(encoder, questions, config.data.answer_length)
    assert described(programs.abstract_batch(config)) == described(batch)

    vlm = qwen2_vl.init(config.model_config.vlm, jax.random.key(0))
    fixed = latte_flow.split_trained(config.model_config, {"vlm": vlm})[1]
    frozen = frozen_inputs(config, encoder, source.captions, fixed, one_device())
    ours = programs.abstract_frozen(config, one_device(), len(source.captions))
    if config.train.share_contexts:  # padded to the longest caption; the config has only an upper bound
        ours, frozen = (
            jax.tree.map(lambda x: jnp.zeros(x.shape[:2] if x.ndim > 1 else x.shape), t) for t in (ours, frozen)
        )
        assert jax.tree.structure(ours) == jax.tree.structure(frozen)
    else:
        assert described(ours) == described(frozen)


def described(tree) -> list:
    return [(jax.tree_util.keystr(path), x.shape, x.dtype) for path, x in jax.tree.leaves_with_path(tree)]


HLO = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather.1 = bf16[16,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %permute = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=2
  %fusion = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
}

%all-reduce-scatter.3 (input: f32[8]) -> f32[2] {
  %all-reduce.9 = f32[8]{0} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%piece (p: f32[6]) -> f32[6] {
  %all-to-all.1 = f32[6]{0} all-to-all(%p), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %constant.5), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %one = f32[6]{0} fusion(%x), kind=kCustom, calls=%piece
  %again = f32[6]{0} all-to-all(%x), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  %sum = (f32[10]{0}, bf16[10]{0}) all-reduce(%a, %b), channel_id=4, replica_groups={}, to_apply=%add
}
"""


def test_traffic_is_counted_by_kind_group_and_loop():
    """By hand: an all-gather of 128 bytes among four chips sends 3/4 of them, seven times, and so on; the sum of 60
    bytes over all eight sends 7/8 of them twice; two instructions with one channel count once."""
    assert traffic(HLO, 8) == {
        "all-gather": Traffic(7, 7 * 128 * 3 / 4),
        "collective-permute": Traffic(7, 7 * 32),
        "reduce-scatter": Traffic(7, 7 * 32 * 3 / 4),
        "all-to-all": Traffic(1, 24 / 2),
        "all-reduce": Traffic(1, 2 * 60 * 7 / 8),
    }


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="the trip count of a loop is unknown"):
        traffic(HLO.replace("direction=LT", "direction=GT"), 8)


@pytest.fixture(scope="module")
def with_libtpu() -> dict[str, str]:
    """The environment of a process with the TPU's compiler. It is in a separate directory, kept between test runs,
    because in the user's environment every command would print warnings and lose seconds."""
    wanted = chips.pods_compiler()
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "lattejax-tests"
    directory = caches / re.sub(r"[^\w.]+", "-", f"{wanted} {sys.implementation.cache_tag}")
    if not directory.exists():
        caches.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=caches) as partial:
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"--target={partial}/libtpu", wanted]
            subprocess.run(install, check=True)
            os.replace(f"{partial}/libtpu", directory)
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(directory)])
    return ENVIRONMENT | {"PYTHONPATH": path, "XLA_FLAGS": ""}  # libtpu does not know all of the CPU's flags


COMPILES = sys.platform == "linux" and platform.machine() == "x86_64"


@pytest.mark.skipif(not COMPILES, reason="libtpu is for Linux on x86-64")
@pytest.mark.parametrize("program, topology", [("train", "v5e:2x2"), ("sample", "v4:2x2x1")])
def test_a_plan_for_real_chips_prints_a_json_object_last(program, topology, with_libtpu):
    settings = dict(model__num_groups=4, train__batch_size=16, train__share_contexts=False, eval__sample_steps=2)
    flags, chip = [*tiny_flags(**settings), "--config.mesh.expert=4"], chips.CHIPS[topology.partition(":")[0]]
    flags += [f"--topology={topology}", "--json", f"--{'no' * (program == 'train')}sample"]
    done = run_command("plan", *flags, env=with_libtpu)
    assert done.returncode == 0, done.stderr[-2000:]
    plan = json.loads(done.stdout.splitlines()[-1])
    assert (plan["program"], plan["chips"], plan["hbm_capacity_gib"]) == (program, 4, chip.hbm_gib)
    assert plan["mesh"] == {"expert": 4, "data": 1, "fsdp": 1, "tensor": 1}
    assert plan["hbm_gib"] == pytest.approx(sum(plan["hbm_parts_gib"].values())) and 0 < plan["hbm_gib"] < 1
    assert plan["hbm_parts_gib"]["padding"] >= 0, "weights that no step reads are on the chips too"
    assert plan["step_seconds_lower_bound"] == max(plan["bounds_seconds"].values()) > 0
    assert plan["images_per_second"] == pytest.approx(plan["images"] / plan["step_seconds_lower_bound"])
    assert plan["tflops_per_chip"] == pytest.approx(chip.teraflops * plan["bounds_seconds"]["compute"])
    assert plan["collective_bytes"] == int(sum(one["sent_bytes"] for one in plan["collectives"].values()))
    if program == "sample":
        assert plan["collectives"] == {}, "chips draw different images"
    else:
        assert plan["hbm_parts_gib"]["optimizer"] == pytest.approx(2 * plan["hbm_parts_gib"]["parameters"], rel=1e-3)
        assert plan["days"] == pytest.approx(12 * plan["step_seconds_lower_bound"] / 86_400)
        assert set(plan["collectives"]) == {"all-reduce"}
    for line in ("memory per chip", "  by interconnect", "from the data sheet: "):
        assert f"\n{line}" in done.stdout


def test_without_libtpu_the_error_names_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"pip install --target=tpu_compiler 'libtpu==0\.0\.\d+\.\*'"):
        chips.open_topology("v5e:2x2")


def test_another_compiler_than_the_pods_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    with pytest.raises(UserError, match=r"libtpu 0\.0\.1 is installed, but a pod with JAX .* has libtpu==0\.0\."):
        chips.check_compiler()


@pytest.mark.parametrize("name", ["v9:4x4", "v5e", "v5e:4", "v5e:4x4 "])
def test_an_invalid_topology_is_refused(name):
    with pytest.raises(UserError, match="must be one of v4, v5e, v5p, v6e and a shape, like v5e:4x4"):
        chips.open_topology(name)
