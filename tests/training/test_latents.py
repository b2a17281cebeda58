"""Training on cached latents: a stopped run resumes exactly; other latents and other autoencoders are refused."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from lattejax.data.prompts import prompt_encoder
from lattejax.encoding.encode import encode
from lattejax.errors import UserError
from lattejax.interrupts import Interrupted
from lattejax.models import latte_flow
from lattejax.parallel.mesh import one_device
from lattejax.runs.run import Run
from lattejax.training import generation_stage, stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.weights.pretrained import Pretrained
from tests import checkpoints, pictures
from tests.helpers import assert_same_bits, run_interrupted, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    vlm = checkpoints.convert(checkpoints.random_model(checkpoints.tiny_config(**checkpoints.OF_DIGITS)))
    photos = pictures.folder(tmp_path_factory.mktemp("pictures") / "photos", 20)
    config = pictures.config(
        photos,
        checkpoints.convert_autoencoder(),
        model__text__vocab_size=checkpoints.VOCABULARY,
        pretrain__init_from=str(vlm),
        train__steps=4,
        train__share_contexts=False,
        eval__every=0,
    )
    encode(config, config.data.latents)
    return config


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    stages.train(config, path, InterruptGuard())
    return path


@pytest.mark.slow
def test_a_stopped_run_resumes_its_data_and_ends_like_an_uninterrupted_one(config, finished, tmp_path):
    with pytest.MonkeyPatch.context() as patch, InterruptGuard() as guard:
        patch.setattr(stages, "run_stage", functools.partial(run_interrupted, before_step=2))
        with pytest.raises(Interrupted):
            stages.train(config, tmp_path, guard)
    assert Run.open(tmp_path).trained_step == 2
    stages.train(config, tmp_path, InterruptGuard())
    assert_same_bits(Run.open(tmp_path).trained(), Run.open(finished).trained())


def test_the_metrics_have_the_held_out_loss_and_the_time_waited_for_data(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("data_wait_seconds", -1) >= 0 for line in lines)
    results = json.loads((finished / "results.json").read_text())
    assert results["held_out_loss"] == [line for line in lines if "held_out_loss" in line][-1]["held_out_loss"]


def test_a_run_resumes_only_with_its_own_latents(config, finished, tmp_path):
    """Other latents at the same path are refused. The source of the pictures no longer matters."""
    moved = dataclasses.replace(config, images=dataclasses.replace(config.images, name="gone"))
    stages.open_workdir(moved, finished)
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "data.json").write_text('{"identity": "others"}')
    with pytest.raises(UserError, match="holds other latents than those"):
        stages.train(config, workdir, InterruptGuard())


def test_a_pathway_is_not_trained_on_latents_of_another_scale(config, finished, tmp_path):
    other = checkpoints.convert_autoencoder(scale=0.5)
    data = dataclasses.replace(config.data, autoencoder=str(other), latents=str(tmp_path / "latents"))
    train = dataclasses.replace(config.train, init_from=str(finished))
    pretrain = dataclasses.replace(config.pretrain, init_from=str(finished))
    config = dataclasses.replace(config, data=data, train=train, pretrain=pretrain)
    encode(config, config.data.latents)
    with pytest.raises(UserError, match=r"scale 0\.25 of .*, 0\.5 of"):
        stages.train(config, tmp_path / "run", InterruptGuard())
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_too_long_is_found_before_training(config, tmp_path):
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, prompt_length=30))
    with pytest.raises(UserError, match="more than the config's limit of 30"):
        stages.train(short, tmp_path / "run", InterruptGuard())
    assert not (tmp_path / "run").exists()


def test_a_frozen_vlm_is_referred_to_and_a_trained_one_is_not(config, finished, tmp_path):
    source = Pretrained.open(config.pretrain.init_from)
    assert json.loads((finished / "vlm.json").read_text())["sha256"] == source.record["sha256"]
    assert_same_bits(Run.open(finished).pretrained_vlm("bfloat16"), source.params("bfloat16"))
    from_run = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, init_from=str(finished)))
    assert stages.converted_vlm(from_run).directory == source.directory

    values = json.loads((finished / "config.json").read_text())
    values["model"]["variant"], values["data"] = "blend", dataclasses.asdict(tiny_config().data)
    (tmp_path / "config.json").write_text(json.dumps(values))
    shutil.copy(finished / "vlm.json", tmp_path)
    blend = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, init_from=str(tmp_path)))
    assert stages.converted_vlm(blend).directory == source.directory, "it has not been trained yet"
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    assert stages.converted_vlm(blend) is None

    (tmp_path / "vlm.json").write_text(json.dumps({"path": str(source.directory), "sha256": {}}))
    with pytest.raises(UserError, match="holds other weights than"):
        Run.open(tmp_path).pretrained_vlm()


def test_contexts_are_computed_in_batches(config, monkeypatch):
    """The table does not depend on the number of prompts at a time."""
    run_config = dataclasses.replace(config, train=dataclasses.replace(config.train, share_contexts=True))
    encoder = prompt_encoder(config, checkpoints.tokenizer())
    vlm = {"vlm": Pretrained.open(config.pretrain.init_from).params("float32")}
    captions = [f"a flower {i}" for i in range(4)]
    expected = generation_stage.frozen_inputs(run_config, encoder, captions, vlm, one_device()).contexts
    monkeypatch.setattr(latte_flow, "PROMPTS_AT_A_TIME", 2)
    pieces = generation_stage.frozen_inputs(run_config, encoder, captions, vlm, one_device()).contexts
    for ours, theirs in zip(jax.tree.leaves(pieces), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
