"""Complete tiny runs: the files they write, the weights they must not change, and resuming after a kill."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lattejax.data import digits
from lattejax.errors import UserError
from lattejax.interrupts import Interrupted
from lattejax.models import qwen2_vl
from lattejax.runs.checkpoints import Checkpoints
from lattejax.runs.run import Run
from lattejax.runs.shapes import abstract_params, abstract_trained
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.loop import run_stage
from lattejax.training.step import init_state
from tests.helpers import NO_SCORES, ROOT, assert_same_bits, compilations, run_interrupted, tiny_config, tiny_flags

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
    return checkpoints.restore(checkpoints.latest_step, **state.arrays)


def records(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def steady(lines: list[dict]) -> list[dict]:
    """Metrics without times."""
    clock = {"seconds", "images_per_second", "data_wait_seconds", "model_flops_per_second"}
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run in this process; with the logits of held-out questions between its two stages, and the
    number of programs that each of the second stage's evaluations compiled."""
    path = tmp_path_factory.mktemp("run")
    seen = {"compiled": []}

    def watched(plan, config, workdir, clock, guard):
        def evaluate(state):
            with compilations() as count:
                found = plan.evaluate(state)
            seen["compiled"].append(count())
            return found

        if plan.name == "train":
            seen["logits"] = held_out_logits(path)
            return run_stage(dataclasses.replace(plan, evaluate=evaluate), config, workdir, clock, guard)
        return run_stage(plan, config, workdir, clock, guard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run_stage", watched)
        results = stages.train(tiny_config(), path, InterruptGuard())
    return path, results, seen


def held_out_logits(path) -> np.ndarray:
    run = Run.open(path)
    source = digits.Questions("test", run.encoder)
    prompts = jax.tree.map(jnp.asarray, run.encoder.batch([source.unanswered(i) for i in range(0, 40)]))
    vlm, config = run.vlm(), run.config.model_config.vlm
    return np.asarray(qwen2_vl.logits(config, vlm, qwen2_vl.forward(config, vlm, prompts)[0]))


def test_generation_training_leaves_the_vlms_logits_bit_identical(finished):
    path, _, seen = finished
    assert held_out_logits(path).tobytes() == seen["logits"].tobytes()


def test_the_second_evaluation_compiles_nothing(finished):
    first, second = finished[2]["compiled"]
    assert first > 0 and second == 0


def test_a_run_writes_all_its_files(finished):
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


# ---- Kills and damage


def test_a_repeatedly_killed_run_equals_an_uninterrupted_one_bit_for_bit(finished, tmp_path, forked_command):
    """SIGTERM while XLA compiles, SIGKILL in a step of the first stage, SIGKILL while a checkpoint of the second is
    being written, SIGTERM in a step; each time the same command resumes. The instants are random, from one seed."""
    uninterrupted, rng = finished[0], np.random.default_rng(0)
    attempt = Attempts(forked_command, tmp_path, tiny_flags())

    # Nothing is trained yet: it ends at once, and leaves no checkpoint.
    starting = attempt.has_printed("pretrain: 53,488 trained parameters")
    assert attempt.stop(signal.SIGTERM, starting, rng.uniform(0, 0.2)) == 75
    assert "stopped by SIGTERM; run the same command again" in attempt.output()
    assert not list((tmp_path / "checkpoints" / "pretrain").glob("[0-9]*"))

    assert attempt.stop(signal.SIGKILL, lambda: logged(tmp_path, "pretrain", 4), rng.uniform(0, 0.1)) == -signal.SIGKILL
    saving = tmp_path / "checkpoints" / "train"
    assert attempt.stop(signal.SIGKILL, lambda: any(saving.glob("*.orbax-checkpoint-tmp*")), 0) == -signal.SIGKILL
    assert not (tmp_path / "results.json").exists()
    assert attempt.stop(signal.SIGTERM, lambda: logged(tmp_path, "train", 8), rng.uniform(0, 0.05)) == 75
    assert attempt.finish() == 0, attempt.output()
    assert_equal_runs(tmp_path, uninterrupted)


def assert_equal_runs(ours, theirs) -> None:
    """Weights, average, optimizer, data position, metrics and scores."""
    expected, resumed = final_arrays(theirs), final_arrays(ours)
    assert resumed.pop("progress") == expected.pop("progress")
    assert_same_bits(resumed, expected)
    assert_same_bits(Run.open(ours).vlm(), Run.open(theirs).vlm())
    assert steady(records(ours)) == steady(records(theirs)), "no line is lost or repeated"
    first, second = (json.loads((path / "results.json").read_text()) for path in (theirs, ours))
    assert first | {"seconds": 0} == second | {"seconds": 0}


class Attempts:
    """Runs the same command repeatedly."""

    def __init__(self, forks, workdir, flags, output=None):
        self.forks, self.command = forks, ["train", *flags, f"--workdir={os.path.relpath(workdir, ROOT)}"]
        self._output = output or workdir / "output.txt"

    def output(self) -> str:
        return self._output.read_text()

    def has_printed(self, text: str):
        return lambda: text in self.output()

    def stop(self, signum: int, when, seconds: float, or_ended: bool = False) -> int:
        """Starts the command, and sends a signal `seconds` after `when` holds; returns the exit code."""
        process = self.forks.start(*self.command, output=self._output)
        deadline = time.monotonic() + 300
        while not when():
            if or_ended and process.poll() is not None:
                return process.returncode
            assert process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.002)
        time.sleep(seconds)
        process.send_signal(signum)
        return process.wait()

    def finish(self) -> int:
        return self.forks.start(*self.command, output=self._output).wait()


@pytest.mark.slow
def test_soak(tmp_path_factory, forked_command):
    """Twenty kills at random instants of a run, except during imports, with SIGKILL and SIGTERM, each while a second
    trainer tries to start, which is refused or killed too: the result equals an uninterrupted run's bit for bit."""
    settings = dict(pretrain__steps=100, train__steps=2000, checkpoint__every=10, log_every=10, eval__every=200)
    flags, rng = tiny_flags(**settings, eval__evaluators__digits__at="never"), np.random.default_rng(0)
    uninterrupted, killed = (tmp_path_factory.mktemp(name) for name in ("uninterrupted", "killed"))
    assert Attempts(forked_command, uninterrupted, flags).finish() == 0
    attempt, kills, refused = Attempts(forked_command, killed, flags), 0, 0
    output = tmp_path_factory.mktemp("second") / "output.txt"
    while kills < 20:
        signum = signal.SIGKILL if rng.random() < 0.5 else signal.SIGTERM
        seconds = []

        def both_started(seconds=seconds) -> bool:
            if (started := "trained parameters" in attempt.output()) and not seconds:
                seconds.append(forked_command.start(*attempt.command, output=output))
            return started

        code = attempt.stop(signum, both_started, rng.uniform(0, 6), or_ended=True)
        for second in seconds:
            if second.poll() is None:
                second.send_signal(signal.SIGKILL)
            assert second.wait() in (2, -signal.SIGKILL), output.read_text()
            refused += "is being written by process" in output.read_text()
        lines = records(killed) if (killed / "metrics.jsonl").exists() else [{"stage": "", "step": 0}]
        print(f"{kills}: {signal.Signals(signum).name}, exit code {code}, at {lines[-1]['stage']} {lines[-1]['step']}")
        assert code in (75, -signal.SIGKILL), f"{attempt.output()}; if it has ended, it was too short"
        kills += 1
    assert refused
    assert attempt.finish() == 0, attempt.output()
    assert_equal_runs(killed, uninterrupted)


def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(finished, tmp_path, caplog):
    """A file of the newest one's average is truncated. From the previous one, the run ends with the same state."""
    path = shutil.copytree(finished[0], tmp_path / "run")
    (path / "results.json").unlink()
    newest = path / "checkpoints" / "train" / "12"
    largest = max(
        (file for file in (newest / "ema").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)
    assert any(leaf.size for leaf in jax.tree.leaves(Run.open(path).trained()))
    assert f"{newest} is damaged" in caplog.text and "using that of step 8" in caplog.text
    assert newest.is_dir(), "readers do not move checkpoints"
    stages.train(tiny_config(), path, InterruptGuard())
    assert "using an earlier one" in caplog.text
    assert (path / "checkpoints" / "damaged" / "train_12").is_dir()
    assert_equal_runs(path, finished[0])


def test_too_many_steps_that_are_not_finite_stop_the_run_and_name_their_records(finished, tmp_path):
    """NaN latents in steps 3 and 6; only one step may be skipped."""
    settings = dict(pretrain__init_from=str(finished[0]), pretrain__steps=0, most_skipped_steps=1, eval__every=0)
    plans = []

    def poisoned(plan, *args):
        plans.append(dataclasses.replace(plan, batches=PoisonedBatches(plan.batches, {3, 6})))
        return run_stage(plans[-1], *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run_stage", poisoned)
        with pytest.raises(UserError, match=r"train: 2 steps until step 6 .*most_skipped_steps=1; .* is of step 4"):
            stages.train(tiny_config(**settings), tmp_path, InterruptGuard())
    skipped = {int(n): r for line in records(tmp_path) for n, r in line.get("skipped_records", {}).items()}
    assert skipped == {step: plans[0].batches.records(step - 1) for step in (3, 6)}
    assert [line["skipped_steps"] for line in records(tmp_path) if "skipped_steps" in line] == [0, 1, 1]
    assert all(np.isfinite(line["loss"]) for line in records(tmp_path) if "loss" in line)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(Run.open(tmp_path).trained()))


class PoisonedBatches:
    """Batches with NaN in the latents of some steps."""

    def __init__(self, batches, steps):
        self.batches, self.steps, self.step = batches, steps, 0

    def __next__(self):
        self.step += 1
        batch = next(self.batches)
        if self.step in self.steps:
            batch["images"]["latents"] = np.full_like(batch["images"]["latents"], np.nan)
        return batch

    def __getattr__(self, name):
        return getattr(self.batches, name)


def logged(path, stage: str, step: int) -> bool:
    metrics = path / "metrics.jsonl"
    return metrics.exists() and any(line["stage"] == stage and line["step"] >= step for line in records(path))


@pytest.mark.slow  # the ordinary tests cover almost the same, by kills and Blend's signal
def test_a_signal_saves_the_current_step(finished, tmp_path):
    """The state after the interrupted step is saved, and resuming from it ends like the uninterrupted run."""
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
    source = str(finished[0])
    steps = {"pretrain__steps": 0, "train__steps": 0}
    config = tiny_config(pretrain__init_from=source, train__init_from=source, **steps, **NO_SCORES)
    stages.train(config, tmp_path, InterruptGuard())
    new, old = Run.open(tmp_path), Run.open(source)
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


def test_blend_trains_the_answering_layers_and_resumes_after_a_signal(finished, tmp_path):
    """From the first run's VLM: both losses and the answers are in the metrics, the layers that answer move with their
    average, the rest of the VLM does not, and an interrupted run ends like an uninterrupted one."""
    settings = dict(model__variant="blend", pretrain__init_from=str(finished[0]), pretrain__steps=0)
    settings |= dict(eval__evaluators__final_digits__at="never")  # the next test scores drawings
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    results = stages.train(tiny_config(**settings), uninterrupted, InterruptGuard())
    of_drawn = {name for name in finished[1] if "guidance" in name or "frechet" in name}  # none of these
    assert set(results) == set(finished[1]) - of_drawn
    train = [line for line in records(uninterrupted) if line["stage"] == "train"]
    assert all({"loss", "answer_loss", "loss_per_group"} <= set(line) for line in train if "learning_rate" in line)
    assert [line["step"] for line in train if {"answer_accuracy", "held_out_loss"} <= set(line)] == [6, 12]

    run = Run.open(uninterrupted)
    before, after, average = run.pretrained_vlm(), run.vlm(), run.trained()["vlm"]["text"]["layers"]
    assert_same_bits(after["text"]["layers"], average)
    assert_same_bits(after["vision"], before["vision"])
    assert_same_bits(after["text"]["vocabulary"], before["text"]["vocabulary"])
    moved = jax.tree.map(lambda a, b: np.any(a != b), after["text"]["layers"], before["text"]["layers"])
    assert all(jax.tree.leaves(moved))

    with pytest.MonkeyPatch.context() as patch, InterruptGuard() as guard:
        patch.setattr(stages, "run_stage", functools.partial(run_interrupted, before_step=7))
        with pytest.raises(Interrupted, match="SIGTERM"):
            stages.train(tiny_config(**settings), stopped, guard)
    stages.train(tiny_config(**settings), stopped, InterruptGuard())
    ours, theirs = final_arrays(stopped), final_arrays(uninterrupted)
    assert ours.pop("progress") == theirs.pop("progress")
    assert_same_bits(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["couple", "blend"])
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
