"""Scores: a new one needs a file and a line of registration, and the config chooses it; bad settings are refused."""

import contextlib
import dataclasses
import json
import sys
import types

import numpy as np
import pytest

from lattejax.configuration.sections import Settings
from lattejax.errors import UserError
from lattejax.evaluation import registry
from lattejax.evaluation.asked import AskedScore
from lattejax.evaluation.fid import FIDMonitor
from lattejax.evaluation.protocol import Report
from lattejax.evaluation.words import WordScore
from lattejax.runs.data import open_data
from lattejax.runs.run import Run
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.scores import final_scores, scores_on_demand, settings_on_demand
from tests.helpers import tiny_config


@dataclasses.dataclass(frozen=True)
class Brightness:
    """The brightness of one prompt's drawings, and the worst group's loss."""

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


def test_scores_are_taken_as_the_config_schedules_them(registered, tmp_path):
    """One every four steps; another of that type only at the end, with the last held-out losses; others on demand, with
    these losses measured again; and none that the config does not list."""
    evaluators = {
        "held_out_loss": {},
        "brightness": {"every": 4, "images": 2},
        "last": {"type": "brightness", "at": "end", "images": 2},
        "on_demand": {"type": "brightness", "at": "demand", "images": 2},
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
        assert found["brightness"] == pytest.approx(results["brightness"], abs=0.01), "drawn with the average"
        assert found["worst_loss"] == pytest.approx(np.max(last["held_out_loss_per_group"]))
    assert {"answer_accuracy", "held_out_loss"} <= set(results) and not list(tmp_path.glob("samples/*"))
    run = Run.open(tmp_path)
    figures = scores_on_demand(run, ["on_demand", "held_out_loss"]).figures
    assert set(figures) == {"brightness", "worst_loss", "held_out_loss", "held_out_loss_per_group"}
    np.testing.assert_allclose(figures["held_out_loss_per_group"], last["held_out_loss_per_group"], rtol=1e-6)
    assert set(settings_on_demand(run, ["on_demand"])["scores"]) == {"on_demand"}
    settings = settings_on_demand(run, [])
    assert set(settings["scores"]) == {"last", "answers", "on_demand"}, "those that are taken, and no others"
    assert (settings["seed"], settings["examples"]) == (run.config.seed, run.config.eval.examples)
    assert settings["batch_size"] == run.config.eval.batch_size
    with pytest.raises(UserError, match="last and on_demand would return figures of the same names"):
        scores_on_demand(run, [])

    # As if the last evaluation had left the loss out, as `every` may: the loss of step 6 is not the final one.
    kept = [line for line in lines if line["step"] < 8 or "held_out_loss" not in line]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    evaluation = dataclasses.replace(run.config.eval, evaluators=Settings(held_out_loss={"every": 6}))
    again = final_scores(dataclasses.replace(run, config=dataclasses.replace(run.config, eval=evaluation)))
    assert set(again) == {"held_out_loss"}
    assert again["held_out_loss"] == pytest.approx(results["held_out_loss"], rel=1e-6)
    stale = [line["held_out_loss"] for line in kept if "held_out_loss" in line][-1]
    assert again["held_out_loss"] != pytest.approx(stale, rel=1e-6)


@pytest.mark.parametrize(
    "evaluators, named",
    [
        ({"vid": {}}, "config.eval.evaluators.vid is unknown; use some of held_out_loss, answers"),
        ({"brightness": {"every": 3, "images": 1}}, r"every=3 must be a multiple of eval\.every=2"),
        ({"brightness": {"images": 0}}, "images=0 must be positive"),
        ({"brightness": {"count": 1}}, "unexpected keyword argument 'count'"),
        ({"mine": {"type": "vid"}}, "config.eval.evaluators.mine.type='vid' is unknown; use some of held_out_loss"),
        ({"brightness": {"at": "noon", "images": 1}}, "at='noon' must be one of training, end, demand, never"),
        ({"brightness": {"at": "end", "every": 2, "images": 1}}, "every=2 needs at='training'"),
        ({"answers": {"examples": -1}}, "evaluators.answers: examples=-1 must be from 0"),
        ({"digits": {"images": 15}}, "evaluators.digits: images=15 must be a multiple of 10"),
        ({"digits": {"images": 10, "guidance": (-1,)}}, "evaluators.digits: guidance=\\(-1,\\) must be from 0"),
        ({"brightness": {"images": np.float32(1)}}, "has a value that JSON cannot represent"),
        ({"brightness": 3}, "must have a section of settings for each name"),
    ],
)
def test_evaluators_that_do_not_fit_are_refused(evaluators, named, registered):
    with pytest.raises(UserError, match=named):
        config = tiny_config(eval__every=2, eval__evaluators=evaluators)
        registry.open_evaluators(config, open_data(config))


DIGITS = {"type": "digits", "images": 10}
BRIGHT = {"type": "brightness", "images": 2}


@pytest.mark.parametrize(
    "one, two, is_refused",
    [
        ({"type": "answers", "examples": 1}, {"type": "answers", "turn": "first"}, True),
        ({"type": "answers"}, {"type": "answers", "at": "end"}, False),
        (DIGITS, DIGITS | {"guidance": (1, 2)}, False),
        (
            DIGITS | {"at": "end", "guidance": (1,)},
            DIGITS | {"at": "end", "guidance": (2,)},
            True,
        ),  # frechet_train_test
        (BRIGHT, BRIGHT, True),
        (BRIGHT, BRIGHT | {"images": 3}, False),  # perhaps part of its figures' names
        (BRIGHT | {"at": "demand"}, BRIGHT | {"at": "demand"}, False),  # a user can name one
    ],
)
def test_two_scores_whose_figures_have_the_same_names_are_refused_before_training(one, two, is_refused, registered):
    config = tiny_config(eval__evaluators={"one": one, "two": two})
    message = "config.eval.evaluators.one and config.eval.evaluators.two would return figures of the same names"
    with pytest.raises(UserError, match=message) if is_refused else contextlib.nullcontext():
        assert len(registry.open_evaluators(config, open_data(config))) == 2


@pytest.mark.parametrize(
    "score, one, two, are_shared",
    [
        (WordScore, dict(prefix="unseen_", guidance=()), dict(prefix="", guidance=()), False),
        (WordScore, dict(prefix="", guidance=(1, 3)), dict(prefix="", guidance=(3.0, 5)), True),
        (WordScore, dict(prefix="", guidance=(1, 3)), dict(prefix="", guidance=()), False),
        (AskedScore, dict(vlm="weights/one", guidance=()), dict(vlm="weights/two", guidance=()), True),
        (AskedScore, dict(vlm="weights/one", guidance=()), dict(vlm="", guidance=()), False),
        (FIDMonitor, dict(images=2000), dict(images=1000), False),
    ],
)
def test_names_of_figures_depend_on_some_settings(score, one, two, are_shared):
    keys = [set(score.named_by.fget(types.SimpleNamespace(**settings))) for settings in (one, two)]
    assert bool(keys[0] & keys[1]) == are_shared
