"""The FID monitor: its figures are those of the drawings that the sampler makes."""

import jax
import numpy as np
import pytest

from lattejax.data.digits import WORDS
from lattejax.errors import UserError
from lattejax.evaluation import fid
from lattejax.evaluation.adm import write_reference
from lattejax.evaluation.frechet import Gaussian, frechet_distance
from lattejax.evaluation.protocol import Subject
from lattejax.evaluation.registry import open_evaluators
from lattejax.files import resolve_path
from lattejax.models import latte_flow, qwen2_vl
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.pixels import PixelConfig
from lattejax.parallel.mesh import one_device
from lattejax.runs.data import open_data
from tests.helpers import encoder_for, randomize, tiny_config
from tests.pixel_features import PixelFeatures, random_pictures


@pytest.fixture
def reference(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "FeatureExtractor", lambda weights, mesh: PixelFeatures())
    monkeypatch.setattr(fid.inception, "find", lambda path: path)
    monkeypatch.setattr(fid.inception, "load", lambda path: None)
    features = PixelFeatures()(random_pictures(30))
    gaussians = [Gaussian(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (features.pool, features.spatial)]
    path = tmp_path / "reference.npz"
    write_reference(resolve_path(path), *gaussians, (4, 8, 8, 3), [random_pictures(4)], {})
    return str(path)


def test_its_figures_are_those_of_what_is_drawn_for_every_prompt_in_turn(reference, monkeypatch):
    monkeypatch.setattr(fid, "AT_A_TIME", 8)
    config = tiny_config(eval__evaluators={"fid": {"images": 20, "reference": reference}})
    [scheduled] = open_evaluators(config, open_data(config))
    assert list(scheduled.moments) == ["train"]
    model = config.model_config
    params = latte_flow.init(model, qwen2_vl.init(model.vlm, jax.random.key(0)), jax.random.key(1))
    weights = latte_flow.unstack(randomize(params, 2, 0.1))
    pixels = Autoencoder(PixelConfig())
    encoder = encoder_for(config)
    subject = Subject(
        config, open_data(config), encoder, one_device(), lambda: weights, open_decoder=lambda: (pixels, {})
    )
    figures = scheduled.evaluator(subject).figures
    assert set(figures) == {"fid_20", "sfid_20", "inception_score_20"}
    prompts = [encoder.drawing(f"a handwritten {word}") for word in WORDS]
    samples = np.arange(20)
    requests = [prompts[i % 10] for i in samples]
    contexts = subject.sampler.read(requests)
    empty = np.full(20, contexts.mask.shape[0] - 1)
    settings = config.eval.sampling, config.seed
    drawn = np.asarray(subject.sampler.draw(contexts, samples, empty, samples, *settings))
    features = [PixelFeatures()(images).pool for images in (drawn, random_pictures(30))]
    assert figures["fid_20"] == pytest.approx(frechet_distance(*features), rel=0.01), "a grey level"


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"images": 9}, "images=9 must be at least 10"),
        ({"images": 20, "reference": "nothing.npz"}, r"evaluators\.fid: there is no .*nothing\.npz"),
        ({"images": 0}, "images=0 must be from 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, named, reference):
    config = tiny_config(eval__evaluators={"fid": {"reference": reference} | settings})
    with pytest.raises(UserError, match=named):
        open_evaluators(config, open_data(config))


def test_missing_weights_are_named_before_work_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = tiny_config(eval__evaluators={"fid": {"images": 20, "reference": "a.npz"}})
    with pytest.raises(UserError, match="there are no Inception weights in"):
        open_evaluators(config, open_data(config))
