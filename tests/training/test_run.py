"""Whole runs, tiny: what is written, what stays untouched, and what survives a kill."""

import functools
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image

from lattejax.data import digits
from lattejax.errors import UserError
from lattejax.models import qwen2_vl
from lattejax.training import stages
from lattejax.training.interrupt import Interrupted, InterruptGuard
from lattejax.training.loop import run_stage
from lattejax.training.step import init_state
from lattejax.weights.checkpoints import Checkpoints
from lattejax.weights.runs import Run, abstract_params, abstract_trained
from tests.helpers import ROOT, assert_same_bits, run_door, run_interrupted, start_door, tiny_config, tiny_flags

STAGE_KEYS = {
    "stage",
    "step",
    "seconds",
    "loss",
    "grad_norm",
    "learning_rate",
    "images_per_second",
    "data_wait_seconds",
}


def final_arrays(path) -> dict:
    """The last training checkpoint: weights, average and optimizer state."""
    run = Run.open(path)
    state = jax.eval_shape(lambda params: init_state(run.config.train, params), abstract_trained(run.config))
    checkpoints = Checkpoints(run.workdir.checkpoints("train"))
    assert checkpoints.latest_step == run.config.train.steps
    return checkpoints.restore(checkpoints.latest_step, params=state.params, ema=state.ema, optimizer=state.optimizer)


def records(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def steady(lines: list[dict]) -> list[dict]:
    """Metrics without what the clock says."""
    clock = {"seconds", "images_per_second", "data_wait_seconds", "model_flops_per_second"}
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run in this process, and the logits of held-out questions between its two stages."""
    path = tmp_path_factory.mktemp("run")
    between = {}

    def watched(plan, config, workdir, clock, guard):
        if plan.name == "train":
            between["logits"] = held_out_logits(path)
        return run_stage(plan, config, workdir, clock, guard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run_stage", watched)
        results = stages.train(tiny_config(), path, InterruptGuard())
    return path, results, between["logits"]


def held_out_logits(path) -> np.ndarray:
    run = Run.open(path)
    source = digits.Questions("test", run.encoder)
    prompts = run.encoder.batch([source.unanswered(i) for i in range(0, 40)])
    vlm, config = run.vlm(), run.config.model_config.vlm
    return np.asarray(qwen2_vl.logits(config, vlm, qwen2_vl.forward(config, vlm, prompts)[0]))


def test_generation_training_leaves_the_vlms_logits_bit_identical(finished):
    path, _, before = finished
    assert held_out_logits(path).tobytes() == before.tobytes()


def test_a_run_writes_all_that_it_promises(finished):
    path, results, _ = finished
    assert set(results) == {
        "held_out_loss",
        "answer_accuracy",
        "generated_accuracy_guidance_1",
        "generated_accuracy_guidance_2",
        "frechet_guidance_1",
        "frechet_guidance_2",
        "frechet_train_test",
        "seconds",
    }
    assert json.loads((path / "results.json").read_text()) == results
    lines = records(path)
    train = [line for line in lines if line["stage"] == "train"]
    assert [line["step"] for line in train if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert STAGE_KEYS | {"loss_per_group", "grad_norm_per_group", "model_flops_per_second"} <= set(train[0])
    assert len(train[0]["loss_per_group"]) == len(train[0]["grad_norm_per_group"]) == 2
    assert [line["step"] for line in train if "held_out_loss_per_group" in line] == [6, 12]
    assert [line["step"] for line in lines if "answer_accuracy" in line] == [6]
    assert Image.open(path / "samples" / "train_0000012.png").width > 64
    assert list((path / "tensorboard" / "train").glob("events*"))
    assert not (path / "checkpoints" / "pretrain").exists(), "the VLM is stored once"


def test_loss_is_the_mean_of_the_groups_losses(finished):
    for line in records(finished[0]):
        if "loss_per_group" in line:
            assert line["loss"] == pytest.approx(np.mean(line["loss_per_group"]), rel=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_kill_and_rerun_equals_an_uninterrupted_run_bit_for_bit(finished, tmp_path, stage):
    """SIGKILL once some steps after a checkpoint are logged; then the same command."""
    whole = finished[0]
    command = ["train", *tiny_flags(), f"--workdir={os.path.relpath(tmp_path, ROOT)}"]
    with open(tmp_path / "output.txt", "w") as output:
        process = start_door(*command, stdout=output, stderr=output)
        deadline = time.monotonic() + 300
        while not logged(tmp_path, stage, 6):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "results.json").exists()
    done = run_door(*command)
    assert done.returncode == 0, done.stderr

    expected, resumed = final_arrays(whole), final_arrays(tmp_path)
    assert resumed.pop("progress") == expected.pop("progress")
    assert_same_bits(resumed, expected)
    assert_same_bits(Run.open(tmp_path).vlm(), Run.open(whole).vlm())
    assert steady(records(tmp_path)) == steady(records(whole)), "no line is lost and none stands twice"
    first, second = (json.loads((path / "results.json").read_text()) for path in (whole, tmp_path))
    assert first | {"seconds": 0} == second | {"seconds": 0}


def logged(path, stage: str, step: int) -> bool:
    metrics = path / "metrics.jsonl"
    return metrics.exists() and any(line["stage"] == stage and line["step"] >= step for line in records(path))


def test_a_signal_saves_the_step_under_way(finished, tmp_path):
    """The state after the interrupted step is saved, and going on from it ends where the whole run ends."""
    with pytest.MonkeyPatch.context() as patch, InterruptGuard() as guard:
        patch.setattr(stages, "run_stage", functools.partial(run_interrupted, before_step=7))
        with pytest.raises(Interrupted, match="SIGTERM"):
            stages.train(tiny_config(), tmp_path, guard)
    assert Checkpoints(Run.open(tmp_path).workdir.checkpoints("train")).latest_step == 7
    stages.train(tiny_config(), tmp_path, InterruptGuard())
    assert_same_bits(final_arrays(tmp_path), final_arrays(finished[0]))


def test_a_workdir_of_another_config_is_refused_with_the_difference(finished):
    with pytest.raises(UserError, match=r"train\.learning_rate: 0\.002 -> 0\.5"):
        stages.train(tiny_config(train__learning_rate=0.5), finished[0], InterruptGuard())


def test_init_from_takes_weights_and_tokenizer_with_a_fresh_optimizer(finished, tmp_path):
    """Zero steps in both stages: the new run's weights are the old one's VLM and average."""
    whole = finished[0]
    config = tiny_config(pretrain__init_from=str(whole), train__init_from=str(whole), pretrain__steps=0, train__steps=0)
    stages.train(config, tmp_path, InterruptGuard())
    new, old = Run.open(tmp_path), Run.open(whole)
    assert_same_bits(new.vlm(), old.vlm())
    assert_same_bits(new.trained(), old.trained())
    assert new.encoder.tokenizer.get_vocab() == old.encoder.tokenizer.get_vocab()
    state = jax.eval_shape(lambda params: init_state(config.train, params), abstract_trained(config))
    fresh = Checkpoints(new.workdir.checkpoints("train")).restore(0, optimizer=state.optimizer)["optimizer"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh))


def test_init_from_weights_of_another_shape_are_refused(finished, tmp_path):
    config = tiny_config(pretrain__init_from=str(finished[0]), model__text__intermediate_size=56)
    with pytest.raises(UserError, match="do not fit the config"):
        stages.train(config, tmp_path, InterruptGuard())


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    config = tiny_config(model__text__vocab_size=300)
    with pytest.raises(UserError, match=r"more than config\.model\.text\.vocab_size=300"):
        stages.train(config, tmp_path, InterruptGuard())
    assert not list(tmp_path.iterdir()), "nothing is written before all is checked"


def test_abstract_weights_describe_the_real_ones(finished):
    run = Run.open(finished[0])
    for abstract, real in [(abstract_params(run.config), run.params()), (abstract_trained(run.config), run.trained())]:
        assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), real)


# ---- Blend, and prompts with images


def test_blend_trains_what_answers_and_goes_on_after_a_signal(finished, tmp_path):
    """From the first run's VLM: both losses and the answers are in the metrics, the layers that answer move with their
    average, the rest of the VLM does not, and an interrupted run ends where the whole one ends."""
    settings = dict(model__variant="blend", pretrain__init_from=str(finished[0]), pretrain__steps=0)
    settings |= dict(eval__final_images=0)  # the next test scores drawings
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    results = stages.train(tiny_config(**settings), whole, InterruptGuard())
    assert set(results) == {name for name in finished[1] if "guidance" not in name}
    train = [line for line in records(whole) if line["stage"] == "train"]
    assert all({"loss", "answer_loss", "loss_per_group"} <= set(line) for line in train if "learning_rate" in line)
    assert [line["step"] for line in train if {"answer_accuracy", "held_out_loss"} <= set(line)] == [6, 12]

    run = Run.open(whole)
    before, after, average = run.pretrained_vlm(), run.vlm(), run.trained()["vlm"]["text"]["layers"]
    assert_same_bits(after["text"]["layers"], average)
    assert_same_bits(after["vision"], before["vision"])
    assert_same_bits(after["text"]["vocabulary"], before["text"]["vocabulary"])
    moved = jax.tree.map(lambda a, b: np.any(a != b), after["text"]["layers"], before["text"]["layers"])
    assert all(jax.tree.leaves(moved))

    with pytest.MonkeyPatch.context() as patch, InterruptGuard() as guard:
        patch.setattr(stages, "run_stage", functools.partial(run_interrupted, before_step=7))
        with pytest.raises(Interrupted, match="SIGTERM"):
            stages.train(tiny_config(**settings), cut, guard)
    stages.train(tiny_config(**settings), cut, InterruptGuard())
    ours, theirs = final_arrays(cut), final_arrays(whole)
    assert ours.pop("progress") == theirs.pop("progress")
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("variant", [pytest.param("couple", marks=pytest.mark.slow), "blend"])
def test_prompts_that_show_pictures_train_and_score(finished, tmp_path, variant):
    config = tiny_config(
        model__variant=variant,
        pretrain__init_from=str(finished[0]),
        pretrain__steps=0,
        train__steps=2,
        train__share_contexts=False,
        eval__every=0,
        data__prompts="pictures",
        data__prompt_length=36,
    )
    results = stages.train(config, tmp_path, InterruptGuard())
    assert set(results) == set(finished[1])
    assert Image.open(tmp_path / "samples" / "train_0000002.png").width > 64
