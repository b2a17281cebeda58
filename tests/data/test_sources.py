"""A new data source needs a file and a line of registration, and the config chooses it."""

import sys
import types

import numpy as np
import pytest

from lattejax.data import sources
from lattejax.data.chats import NO_IMAGES
from lattejax.data.examples import Drawing, Prompt
from lattejax.data.pipeline import Batches
from lattejax.errors import UserError
from lattejax.flow.schedule import Sampling
from lattejax.runs.data import open_data
from lattejax.runs.run import Run
from lattejax.sampling.images import ImageSampler
from lattejax.training import generation_stage, stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.loop import run_stage
from tests.helpers import NO_SCORES, tiny_config


class Stripes:
    """Dark or light pictures of eight pixels a side; no questions."""

    captions = ("dark", "light")
    identities = ("stripes, first edition",)
    has_drawings, has_questions = True, False
    bounds = NO_IMAGES

    @classmethod
    def open(cls, config, autoencoder):
        if config.data.latent_shape != (8, 8, 1):
            raise UserError("stripes have 8 x 8 pixels")
        return cls()

    def drawings(self, split, encoder):
        return self

    def questions(self, split, encoder):
        return None

    def requests(self, encoder):
        return []

    def texts(self):
        return self.captions

    def __len__(self):
        return 20

    def without_pixels(self):
        return []

    def prompt_texts(self):
        return ([self.captions[i % 2]] for i in range(20))

    def __getitems__(self, indices):
        return [Drawing(np.full((8, 8, 1), i % 2 - 0.5, np.float32), (Prompt(self.captions[i % 2]),)) for i in indices]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(sys.modules, "stripes", types.SimpleNamespace(Stripes=Stripes))
    monkeypatch.setitem(sources.SOURCES, "stripes", "stripes:Stripes")


SETTINGS = NO_SCORES | dict(data__source="stripes", pretrain__steps=0)


def test_captions_that_are_to_stay_unseen_are_not_trained_on(registered):
    config = tiny_config(**SETTINGS, data__unseen="^l.ght")
    drawings = Stripes()
    seen = generation_stage.seen_drawings(config, drawings)
    assert seen == list(range(0, 20, 2))
    batches = Batches(drawings, lambda rows, _: rows, batch_size=7, seed=0, threads=1, chosen=seen)
    read = [drawing.prompts[0].caption for _ in range(5) for drawing in next(batches)]
    assert len(read) == 35 and set(read) == {"dark"}
    assert sorted(index for batch in range(10) for index in batches.records(batch)) == sorted(7 * seen)
    assert generation_stage.seen_drawings(tiny_config(**SETTINGS), drawings) is None
    with pytest.raises(UserError, match="nothing is left to train on"):
        generation_stage.seen_drawings(tiny_config(**SETTINGS, data__unseen="."), drawings)


@pytest.mark.parametrize(
    "unseen, named", [("drak", "matches no caption of 20 captioned pictures"), (".", "all captions")]
)
def test_a_pattern_of_unseen_captions_that_leaves_out_none_or_all_is_refused_before_any_training(
    unseen, named, registered, tmp_path
):
    with pytest.raises(UserError, match=named):
        stages.open_workdir(tiny_config(**SETTINGS, data__unseen=unseen), tmp_path)
    assert not list(tmp_path.iterdir())


def test_it_can_be_trained_on_and_drawn(registered, tmp_path, capsys, monkeypatch):
    recipes = []

    def recorded(recipe, *arguments):
        recipes.append(recipe)
        return run_stage(recipe, *arguments)

    monkeypatch.setattr(stages, "run_stage", recorded)
    config = tiny_config(**SETTINGS, train__steps=2, eval__prompts=("dark",), data__unseen="light")
    results = stages.train(config, tmp_path, InterruptGuard())
    assert "data.unseen leaves out 10 of 20 captioned pictures" in capsys.readouterr().out
    assert set(results) == {"held_out_loss", "seconds"}, "only the scores that it supports"
    read = [index for step in range(2) for index in recipes[0].batches.records(step)["images"]]
    assert read and not any(index % 2 for index in read), "dark ones"
    sampler = ImageSampler.of(Run.open(tmp_path), Run.open(tmp_path).params())
    drawn = sampler([sampler.encoder.drawing("light")], Sampling(2), images_per_prompt=2, batch_size=2)
    assert drawn.shape == (2, 8, 8, 3)
    monkeypatch.setattr(Stripes, "identities", ("stripes, second edition",))
    with pytest.raises(UserError, match="holds other latents than those"):
        stages.train(config, tmp_path, InterruptGuard())


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"data__source": "dots"}, "config.data.source='dots' is unknown; use one of digits, latents, stripes"),
        ({"pretrain__steps": 3}, "pretrain.steps would train on questions, and config.data.source='stripes' has none"),
        (
            {"model__variant": "blend"},
            "model.variant='blend' would train on questions, and config.data.source='stripes' has none",
        ),
        (
            {"eval__evaluators__digits__at": "end"},
            "evaluators.digits: config.data.source='stripes' has no digits to score",
        ),
    ],
)
def test_unsupported_settings_are_refused_before_any_work(changes, named, registered, tmp_path):
    with pytest.raises(UserError, match=named):
        stages.train(tiny_config(**SETTINGS | changes), tmp_path / "run", InterruptGuard())
    assert not (tmp_path / "run").exists()


def test_the_digits_are_refused_at_another_size():
    with pytest.raises(UserError, match=r"image_size=16 must be 'pixels' and 8 for the digits"):
        open_data(tiny_config(data__image_size=16, data__latent_shape=(16, 16, 1)))
