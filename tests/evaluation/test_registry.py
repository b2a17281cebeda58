"""Scores: another one is a file and a line of registration, chosen by the config; and what does not fit is refused."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest

from lattejax.errors import UserError
from lattejax.evaluation import registry
from lattejax.evaluation.protocol import Report
from lattejax.runs.data import open_data
from lattejax.runs.run import Run
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.scores import scores_on_demand
from tests.helpers import tiny_config


@dataclasses.dataclass(frozen=True)
class Brightness:
    """How bright the drawings of one prompt are, and the worst group's loss."""

    images: int
    judges = "pathway"

    @classmethod
    def open(cls, config, source, *, images):
        if images < 1:
            raise UserError(f"images={images} must be positive")
        return cls(images)

    def __call__(self, subject):
        sampler = subject.sampler
        prompts = [sampler.encoder.drawing("a handwritten two")]
        drawn = sampler(prompts, subject.config.eval.sampling, images_per_prompt=self.images, batch_size=self.images)
        return Report({"brightness": float(drawn.mean()), "worst_loss": float(subject.held_out_losses.max())})


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(sys.modules, "brightness", types.SimpleNamespace(Brightness=Brightness))
    monkeypatch.setitem(registry.EVALUATORS, "brightness", "brightness:Brightness")


def test_scores_are_taken_when_the_config_says(registered, tmp_path):
    """One every four steps; one of its kind at the end alone, with the last held-out losses; others on demand, where
    these losses are measured again; and none that the config does not list."""
    evaluators = {
        "held_out_loss": {},
        "brightness": {"every": 4, "images": 2},
        "last": {"type": "brightness", "at": "end", "images": 2},
        "asked": {"type": "brightness", "at": "demand", "images": 2},
        "unused": {"type": "brightness", "at": "never"},
        "answers": {"at": "end", "examples": 0},
    }
    settings = dict(pretrain__steps=0, train__steps=8, eval__every=2)
    results = stages.train(tiny_config(**settings, eval__evaluators=evaluators), tmp_path, InterruptGuard())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    taken = {line["step"]: line for line in lines if "brightness" in line}
    assert list(taken) == [4, 8]
    last = next(line for line in reversed(lines) if "held_out_loss" in line)
    for found in (taken[8], results):
        assert 0 < found["brightness"] < 255
        assert found["worst_loss"] == pytest.approx(np.max(last["held_out_loss_per_group"]))
    assert {"answer_accuracy", "held_out_loss"} <= set(results) and not list(tmp_path.glob("samples/*"))
    run = Run.open(tmp_path)
    asked = scores_on_demand(run, ["asked", "held_out_loss"]).figures
    assert set(asked) == {"brightness", "worst_loss", "held_out_loss", "held_out_loss_per_group"}
    np.testing.assert_allclose(asked["held_out_loss_per_group"], last["held_out_loss_per_group"], rtol=1e-6)
    with pytest.raises(UserError, match="two evaluators return brightness"):  # `last` and `asked`
        scores_on_demand(run, [])


@pytest.mark.parametrize(
    "asked, named",
    [
        ({"fid": {}}, "config.eval.evaluators.fid is unknown; use some of held_out_loss, answers"),
        ({"brightness": {"every": 3, "images": 1}}, r"every=3 must be a multiple of eval\.every=2"),
        ({"brightness": {"images": 0}}, "images=0 must be positive"),
        ({"brightness": {"count": 1}}, "unexpected keyword argument 'count'"),
        ({"mine": {"type": "fid"}}, "config.eval.evaluators.mine.type='fid' is unknown; use some of held_out_loss"),
        ({"brightness": {"at": "noon", "images": 1}}, "at='noon' must be one of training, end, demand, never"),
        ({"brightness": {"at": "end", "every": 2, "images": 1}}, "every=2 goes with at='training'"),
        ({"answers": {"examples": -1}}, "evaluators.answers: examples=-1 must be a whole number"),
        ({"digits": {"images": 15}}, "evaluators.digits: images=15 must be a positive multiple of 10"),
        ({"digits": {"images": 10, "guidance": (-1,)}}, "evaluators.digits: guidance=-1: guidance=-1.0 must be from 0"),
        ({"brightness": {"images": np.float32(1)}}, "has what JSON cannot hold"),
        ({"brightness": 3}, "must have a section of settings for each name"),
    ],
)
def test_what_does_not_fit_is_refused(asked, named, registered):
    with pytest.raises(UserError, match=named):
        asked_for = tiny_config(eval__every=2, eval__evaluators=asked)
        registry.open_evaluators(asked_for, open_data(asked_for))


def test_two_figures_of_one_name_are_refused(registered):
    twice = [lambda subject: Report({"brightness": 1.0})] * 2
    with pytest.raises(UserError, match="two evaluators return brightness"):
        registry.take_scores(twice, None)
