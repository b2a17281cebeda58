"""The training loop's records: of the profiler, and of a window of steps."""

import functools

import pytest

from lattejax.interrupts import Interrupted
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
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
