"""Files of earlier versions can still be read, with the same results: see tests/earlier/README.md."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from lattejax import configuration
from lattejax.configuration.sections import Settings
from lattejax.data.pipeline import every
from lattejax.errors import UserError
from lattejax.flow.schedule import Sampling
from lattejax.runs.data import open_data
from lattejax.runs.inference import inference_weights
from lattejax.runs.publishing import export
from lattejax.runs.run import Run
from lattejax.sampling.answers import Answerer, Decoding
from lattejax.sampling.images import ImageSampler
from lattejax.sweeps import sweep
from lattejax.sweeps.definition import resolve_sweep
from lattejax.sweeps.sweep import run_sweep
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from tests.helpers import NO_SCORES, assert_same_bits, tiny_config

PICTURES = {"run": "run", "export": "export", "couple": "sweep/runs/couple_0", "blend": "sweep/runs/blend_0"}


def assert_draws(workdir: Path, earlier: Path, name: str) -> None:
    """Equal to the stored pictures within two grey levels: float32 sums may be in another order."""
    sampler = ImageSampler.load(workdir)
    prompts = [sampler.encoder.drawing(f"a handwritten {digit}") for digit in ("seven", "three")]
    drawn = sampler(prompts, Sampling(6, guidance=2.0), images_per_prompt=2, batch_size=4, seed=1)
    kept = np.load(earlier / "pictures.npz")[name]
    assert np.abs(drawn.astype(int) - kept).max() <= 2


@pytest.mark.parametrize("name", PICTURES)
def test_earlier_weights_draw_the_same_pictures(earlier, name):
    assert Run.open(earlier / PICTURES[name]).config.model.latent_position == "none"
    assert_draws(earlier / PICTURES[name], earlier, name)


def test_a_run_gives_the_same_answer(earlier):
    run = Run.open(earlier / "run")
    vlm = inference_weights(run.config, {"vlm": run.vlm()}, run.mesh)["vlm"]
    answerer = Answerer(run.vlm_config, vlm, run.encoder)
    digit = answerer.encoder.read_image(Image.open(earlier / "digit.png").convert("RGB"))
    prompts = [answerer.encoder.question("Which digit is this?", [digit])]
    assert answerer.generate(prompts, Decoding(max_tokens=8)) == [(earlier / "answer.txt").read_text().strip()]


def test_a_run_is_exported(earlier, tmp_path):
    export(Run.open(earlier / "run"), tmp_path / "export")
    assert_draws(tmp_path / "export", earlier, "run")


def test_a_resumed_run_ends_as_it_would_have(earlier, tmp_path):
    workdir = shutil.copytree(earlier / "run", tmp_path / "run")
    config = Run.open(workdir).config
    another = dataclasses.replace(config, model=dataclasses.replace(config.model, latent_position="sincos"))
    with pytest.raises(UserError, match=r"belongs to another config \(model\.latent_position: 'none' -> 'sincos'\)"):
        stages.train(another, workdir, InterruptGuard())
    stages.train(config, workdir, InterruptGuard())
    assert Run.open(workdir).trained_step == 8
    assert_draws(workdir, earlier, "export")


def test_a_run_can_start_from_it_with_a_warning_of_changed_settings(earlier, tmp_path, caplog):
    """It starts with the position table, but the earlier run was trained without it; a warning says so."""
    config = Run.open(earlier / "run").config
    start = dict(init_from=str(earlier / "run"), steps=0)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, latent_position="sincos"),
        pretrain=dataclasses.replace(config.pretrain, **start),
        train=dataclasses.replace(config.train, **start),
        eval=dataclasses.replace(config.eval, evaluators=Settings()),
    )
    stages.train(config, tmp_path, InterruptGuard())
    assert_same_bits(Run.open(tmp_path).trained(), Run.open(earlier / "run").trained())
    assert "were trained with latent_position: 'none' -> 'sincos'" in caplog.text


def test_a_finished_sweep_trains_nothing_after_it_has_moved(earlier, monkeypatch):
    base = json.loads((earlier / "sweep" / "vlm" / "config.json").read_text())
    base["model"]["latent_position"] = "none"
    values = dict(base=base, seeds=(0,), variants=(("couple", {}), ("blend", {"model.variant": "blend"})))
    monkeypatch.setattr(sweep, "train", lambda *args: pytest.fail("a finished run is trained again"))
    table = run_sweep(resolve_sweep(ConfigDict(values | {"sample_steps": (2,)})), earlier / "sweep", InterruptGuard())
    assert "| couple | 1 |" in table and "| blend | 1 |" in table


def test_latents_are_read(earlier):
    settings = dict(data__source="latents", data__latents=str(earlier / "latents"), pretrain__steps=0)
    config = tiny_config(**settings | NO_SCORES)
    source = open_data(config)
    drawings = [drawing for split in ("train", "test") for drawing in every(source.drawings(split))]
    kept = np.load(earlier / "records.npz")
    assert [drawing.prompts[0].caption for drawing in drawings] == kept["captions"].tolist()
    assert_same_bits(np.stack([drawing.latents for drawing in drawings]), kept["latents"])


def test_a_users_config_without_the_key_is_told_its_earlier_value(earlier):
    values = json.loads((earlier / "run" / "config.json").read_text())
    with pytest.raises(UserError, match=r"lacks model\.latent_position; model\.latent_position='none' keeps"):
        configuration.resolve(values)
