"""The training loop's records: of the profiler, and of a window of steps."""

import functools
import types

import numpy as np
import pytest

from lattejax.interrupts import Interrupted
from lattejax.training import loop, stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.loop import Window
from tests.helpers import NO_SCORES, run_interrupted, tiny_config


def test_a_run_that_is_stopped_among_the_profiled_steps_resumes_and_records_the_rest(tmp_path):
    """A record is complete when a signal stops the run, and when the stage ends; `profile` may change on resume."""
    settings = dict(pretrain__steps=0, train__steps=4, eval__every=0, profile__start=2) | NO_SCORES
    with pytest.MonkeyPatch.context() as patch, InterruptGuard() as guard:
        patch.setattr(stages, "run_stage", functools.partial(run_interrupted, before_step=2))
        with pytest.raises(Interrupted):
            stages.train(tiny_config(**settings, profile__steps=2), tmp_path, guard)
    (first,) = tmp_path.glob("profile/**/*.xplane.pb")
    stages.train(tiny_config(**settings, profile__steps=100), tmp_path, InterruptGuard())
    (second,) = set(tmp_path.glob("profile/**/*.xplane.pb")) - {first}
    assert second.stat().st_size > 1000


def test_a_process_that_ends_after_a_save_loses_no_curves(tmp_path):
    """TensorBoard's files are written every two minutes, and before the process may end."""
    events = []

    class Ending(InterruptGuard):
        def saved(self, finish=lambda: None):
            finish()
            events.append(b"".join(file.read_bytes() for file in tmp_path.glob("tensorboard/**/events*")))

    settings = dict(pretrain__steps=0, train__steps=4, eval__every=0, log_every=1, checkpoint__every=2) | NO_SCORES
    stages.train(tiny_config(**settings), tmp_path, Ending())
    assert [written.count(b"loss_per_group/0") for written in events[-3:-1]] == [2, 4]


def test_rates_are_those_of_the_steps_since_the_clock_started(monkeypatch):
    """Three of four steps are an earlier process's: they count in the means, and not in the rates."""
    clock = iter(range(0, 1000, 2))  # two seconds between any two looks at it
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))

    def metrics(loss: float) -> dict[str, np.ndarray]:
        return {"loss": np.float32(loss), "skipped": np.int32(0)}

    stopped = Window()
    for step in (1, 2, 3):
        stopped.add(step, metrics(step))
    window = Window.loaded(stopped.dumped())
    window.add(4, metrics(6))
    means, skipped, timing = window.close(batch_size=10, flops_per_example=100.0)
    assert means == {"loss": 3.0} and skipped == []
    assert timing["images_per_second"] == 5.0 and timing["model_flops_per_second"] == 500.0
    for step in (5, 6):
        window.add(step, metrics(step))
    assert window.close(batch_size=10, flops_per_example=100.0)[2]["images_per_second"] == 10.0, "the next window"
