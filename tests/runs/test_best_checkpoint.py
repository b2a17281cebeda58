"""`checkpoint.best` keeps the checkpoint with an evaluator's best figure, also across kills."""

import dataclasses
import functools
import json
import math
import sys
import types

import pytest

from lattejax.errors import UserError
from lattejax.evaluation import registry
from lattejax.evaluation.protocol import Report
from lattejax.interrupts import Interrupted
from lattejax.runs.publishing import export
from lattejax.runs.records import best_step
from lattejax.runs.run import Run
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from tests.helpers import NO_SCORES, assert_same_bits, run_interrupted, tiny_config

FIGURES = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: 1.0, 12: 4.0}  # the lowest at 4 and, later, at 10; the highest at 2


@dataclasses.dataclass(frozen=True)
class Given:
    """A figure for each evaluation."""

    judges = "pathway"
    taken = []  # noqa: RUF012

    @classmethod
    def open(cls, config, source):
        return cls()

    def __call__(self, subject):
        step = 2 * (len(self.taken) + 1)
        self.taken.append(step)
        return Report({"given": FIGURES[step]})


@pytest.fixture
def given(monkeypatch):
    Given.taken.clear()
    monkeypatch.setitem(sys.modules, "given", types.SimpleNamespace(Given=Given))
    monkeypatch.setitem(registry.EVALUATORS, "given", "given:Given")


def config(best: str, **overrides):
    settings = dict(pretrain__steps=0, train__steps=12, eval__every=2, checkpoint__every=100, checkpoint__keep=2)
    settings |= dict(checkpoint__keep_every=10, checkpoint__best=best, eval__evaluators={"given": {}})
    return tiny_config(**settings | overrides)


def kept(path) -> list[int]:
    return sorted(int(each.name) for each in (path / "checkpoints" / "train").iterdir() if each.name.isdigit())


def test_the_best_checkpoint_is_kept_and_can_be_chosen(given, tmp_path, monkeypatch):
    """The run is stopped twice: after the best step, and when its checkpoint would have been removed long since."""
    for before_step in (6, 5):
        with monkeypatch.context() as patch, InterruptGuard() as guard:
            patch.setattr(stages, "run_stage", functools.partial(run_interrupted, before_step=before_step))
            with pytest.raises(Interrupted):
                stages.train(config("lowest given"), tmp_path / "run", guard)
        assert 4 in kept(tmp_path / "run")
    stages.train(config("lowest given"), tmp_path / "run", InterruptGuard())
    assert Given.taken == list(FIGURES) and kept(tmp_path / "run") == [4, 10, 11, 12]
    best, fourth, last = (Run.open(tmp_path / "run", checkpoint=which) for which in ("best", "4", ""))
    assert (best.trained_step, last.trained_step) == (4, 12)
    assert_same_bits(best.trained(), fourth.trained())
    with pytest.raises(AssertionError):
        assert_same_bits(best.trained(), last.trained())
    export(best, tmp_path / "export")
    assert_same_bits(Run.open(tmp_path / "export").trained(), best.trained())
    for which in ("6", "first"):
        with pytest.raises(UserError, match=rf"no checkpoint '{which}'; it has those of the steps 4, 10, 11, 12"):
            Run.open(tmp_path / "run", checkpoint=which)
    with pytest.raises(UserError, match="has no checkpoint 'best'; it has those of the steps none"):
        Run.open(tmp_path / "export", checkpoint="best")


def test_the_best_is_the_lowest_or_the_highest_figure_of_a_checkpoint_that_exists():
    records = [{"stage": "train", "step": step, "given": figure} for step, figure in FIGURES.items()]
    records += [{"stage": "train", "step": 4, "loss": 0.1}, {"stage": "pretrain", "step": 2, "given": 0.0}]
    every = list(FIGURES)
    assert [best_step(records, f"{which} given", every) for which in ("lowest", "highest")] == [4, 2]
    assert [best_step(records, f"{which} given", [8, 10, 12]) for which in ("lowest", "highest")] == [10, 12]
    assert best_step(records, "lowest nothing", every) is best_step(records, "lowest given", []) is None
    assert best_step(records, "", every) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_never_the_best(bad):
    records = [{"stage": "train", "step": step, "given": value} for step, value in ((2, bad), (4, 1.0), (6, bad))]
    assert [best_step(records, f"{which} given", [2, 4, 6]) for which in ("lowest", "highest")] == [4, 4]
    assert best_step(records, "lowest given", [2, 6]) is None


def test_a_figure_that_nothing_returns_is_named(given, tmp_path, capsys):
    stages.train(config("lowest nothing", train__steps=2), tmp_path, InterruptGuard())
    named = "config.checkpoint.best='lowest nothing': no evaluation has this figure yet; this one has given"
    assert named in capsys.readouterr().out
    with pytest.raises(UserError, match="no checkpoint 'best'"):
        Run.open(tmp_path, checkpoint="best")


def test_what_is_no_figure_is_refused_and_earlier_runs_have_no_best(earlier):
    for bad in ("given", "best given", "lowest", "lowest two words"):
        with pytest.raises(UserError, match=r"checkpoint\.best=.* must be empty, or lowest or highest"):
            tiny_config(**NO_SCORES, checkpoint__best=bad)
    assert "best" not in json.loads((earlier / "run" / "config.json").read_text())["checkpoint"]
    with pytest.raises(UserError, match=r"has no best checkpoint: its config\.checkpoint\.best is empty"):
        Run.open(earlier / "run", checkpoint="best")
