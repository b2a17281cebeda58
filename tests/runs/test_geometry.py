"""A config that starts from weights has their geometry, without a key of it in the experiment's file."""

import dataclasses
import shutil

import pytest

from lattejax import configuration
from lattejax.errors import UserError
from lattejax.runs.geometry import resolve_config
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.weights.pretrained import Pretrained
from tests import checkpoints


@pytest.fixture(scope="module")
def vlm():
    return checkpoints.convert(checkpoints.random_model(checkpoints.tiny_config(**checkpoints.OF_DIGITS)))


def experiment(vlm):
    """Draws digits with a converted VLM, of which nothing is said but where it is."""
    config = configuration.defaults()
    config.dtype = "float32"
    config.pretrain.init_from = str(vlm)
    config.data.update(source="digits", latents="", autoencoder="pixels", image_size=8, latent_shape=(8, 8, 1))
    config.data.update(prompt_length=60, answer_length=80, min_pixels=64, max_pixels=64)
    config.train.update(steps=1, batch_size=4, share_contexts=False)
    config.eval.update(every=0, examples=4, evaluators={"held_out_loss": {"at": "training"}})
    config.model.update(num_groups=1, patch_size=4)
    return config


def test_the_weights_alone_decide_the_geometry(vlm, tmp_path):
    config = resolve_config(experiment(vlm))
    assert config.model_config.vlm == Pretrained.open(vlm).vlm_config
    assert "held_out_loss" in stages.train(config, tmp_path / "run", InterruptGuard())
    again = experiment(tmp_path / "run")
    resolved = resolve_config(again)
    assert resolved.model_config.vlm == config.model_config.vlm, "a run's weights too"

    # It has its own pathway, and a VLM, when the run that it started from is removed: it can resume.
    stages.train(resolved, tmp_path / "again", InterruptGuard())
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="is not the workdir of a run"):
        resolve_config(again)
    assert resolve_config(again, workdir=tmp_path / "again") == resolved
    assert stages.open_workdir(resolved, tmp_path / "again")[0].trained_step == 1


def test_what_a_config_names_is_not_changed_and_refused_if_it_differs(vlm, tmp_path):
    config = experiment(vlm)
    config.model.text.intermediate_size = 7 * 32
    resolved = resolve_config(config)
    expected = dataclasses.replace(Pretrained.open(vlm).vlm_config.text, intermediate_size=7 * 32)
    assert resolved.model.text == expected
    with pytest.raises(UserError, match=r"config\.model\.text\.intermediate_size is 224, theirs"):
        stages.train(resolved, tmp_path / "run", InterruptGuard())


def test_missing_weights_are_an_error_where_they_are_needed(tmp_path):
    config = experiment(tmp_path / "none")
    with pytest.raises(UserError, match="none"):
        resolve_config(config)
    usual = configuration.resolve(configuration.defaults()).model_config.vlm
    assert resolve_config(config, weights_needed=False).model_config.vlm == usual
