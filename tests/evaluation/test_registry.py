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
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from tests.helpers import tiny_config


@dataclasses.dataclass(frozen=True)
class Brightness:
    """How bright the drawings of one prompt are, and the worst group's loss."""

    images: int

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


class LastBrightness(Brightness):
    """The same under another name."""


@pytest.fixture
def registered(monkeypatch):
    module = types.SimpleNamespace(Brightness=Brightness, LastBrightness=LastBrightness)
    monkeypatch.setitem(sys.modules, "brightness", module)
    for name in ("Brightness", "LastBrightness"):
        monkeypatch.setitem(registry.EVALUATORS, name.lower(), f"brightness:{name}")


def test_scores_are_taken_when_the_config_says(registered, tmp_path):
    """One every four steps, and one at the end alone, with the last held-out losses."""
    evaluators = {"brightness": {"every": 4, "images": 3}, "lastbrightness": {"images": 2}}
    settings = dict(pretrain__steps=0, train__steps=8, eval__every=2, eval__scored_images=0, eval__final_images=0)
    results = stages.train(tiny_config(**settings, eval__evaluators=evaluators), tmp_path, InterruptGuard())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    taken = {line["step"]: line for line in lines if "brightness" in line}
    assert list(taken) == [4, 8]
    last = next(line for line in reversed(lines) if "held_out_loss" in line)
    for found in (taken[8], results):
        assert 0 < found["brightness"] < 255
        assert found["worst_loss"] == pytest.approx(np.max(last["held_out_loss_per_group"]))
    assert {"answer_accuracy", "held_out_loss"} <= set(results), "the run's own scores stay"


@pytest.mark.parametrize(
    "asked, named",
    [
        ({"fid": {}}, "config.eval.evaluators.fid is unknown; use some of held_out_loss, answers"),
        ({"brightness": {"every": 3, "images": 1}}, r"every=3 must be a multiple of eval\.every=2"),
        ({"brightness": {"images": 0}}, "images=0 must be positive"),
        ({"brightness": {"count": 1}}, "unexpected keyword argument 'count'"),
        ({"answers": {}}, "evaluators.answers is taken then without being listed"),
        ({"brightness": {"images": np.float32(1)}}, "has what JSON cannot hold"),
        ({"brightness": 3}, "must have a section of settings for each name"),
    ],
)
def test_what_does_not_fit_is_refused(asked, named, registered):
    with pytest.raises(UserError, match=named):
        asked_for = tiny_config(eval__every=2, eval__evaluators=asked)
        registry.open_evaluators(asked_for, open_data(asked_for))


def test_scores_that_the_data_cannot_have_are_refused():
    digits = tiny_config(eval__final_images=15)
    with pytest.raises(UserError, match="ask for 15 digits; it must be a positive multiple of 10"):
        registry.open_evaluators(digits, open_data(digits))


def test_two_figures_of_one_name_are_refused(registered):
    twice = [registry.Scheduled(lambda subject: Report({"brightness": 1.0}), ["train"])] * 2
    with pytest.raises(UserError, match="two evaluators return brightness"):
        registry.take_scores(twice, "train", None)
