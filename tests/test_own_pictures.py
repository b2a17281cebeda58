"""A user's own pictures through all commands: convert, encode, train, sample."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from lattejax.data.pipeline import every
from lattejax.encoding.encode import encode
from lattejax.errors import UserError
from lattejax.flow.schedule import Sampling
from lattejax.runs.data import open_data
from lattejax.runs.run import Run
from lattejax.sampling.images import ImageSampler
from tests import checkpoints, pictures
from tests.helpers import ENVIRONMENT, tiny_flags


def succeed(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def vlm():
    return checkpoints.convert(checkpoints.random_model(checkpoints.tiny_config(**checkpoints.OF_DIGITS)))


def test_pictures_become_latents_a_trained_pathway_and_drawings(vlm, tmp_path, forked_command):
    """JPEG photos with captions, a random DC-AE in diffusers' format and a random Qwen2-VL; encoding on two devices; a
    few steps of training on shared contexts; a drawing that equals the library's."""
    checkpoints.random_autoencoder("in-1.0").save_pretrained(tmp_path / "diffusers")
    dc_ae, latents, workdir = tmp_path / "dc_ae", tmp_path / "latents", tmp_path / "run"
    said = succeed(forked_command("convert", f"--source={tmp_path / 'diffusers'}", "--scale=0.3", f"--out={dc_ae}"))
    assert "is complete" in said
    photos = pictures.folder(tmp_path / "photos", 20, listed=True)
    flags = tiny_flags(
        **pictures.settings(
            photos,
            dc_ae,
            model__text__vocab_size=checkpoints.VOCABULARY,
            pretrain__init_from=str(vlm),
            train__steps=3,
            eval__every=0,
            train__learning_rate=0.05,
            train__ema_decay=0.0,
        )
    )
    two_devices = {"XLA_FLAGS": ENVIRONMENT["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"}
    said = succeed(forked_command("encode", *flags, f"--out={latents}", env=two_devices))
    assert "16 of 20" in said and "images/s" in said and "is complete" in said
    again = pictures.config(photos, dc_ae, data__latents=str(tmp_path / "again"))
    encode(again, again.data.latents)
    ours, theirs = (
        np.stack([drawing.latents for drawing in every(open_data(config).drawings("train"))])
        for config in (pictures.config(photos, dc_ae), again)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert "held_out_loss" in succeed(forked_command("train", *flags, f"--workdir={workdir}"))
    assert not (workdir / "vlm").exists(), "the frozen VLM is referred to, not copied"
    out = tmp_path / "drawn.png"
    arguments = ["--prompt=a flower", "--num=2", "--steps=4", f"--out={out}", "--npz"]
    succeed(forked_command("sample", f"--workdir={workdir}", *arguments))
    drawn = np.load(out.with_suffix(".npz"))["arr_0"]
    assert drawn.shape == (2, pictures.SIZE, pictures.SIZE, 3) and Image.open(out).format == "PNG"
    assert drawn.std() > 1 and np.any(drawn[0] != drawn[1])

    grid = np.asarray(Image.open(Run.open(workdir).workdir.image("samples", "train", 3)))
    assert grid.std() > 1

    # The autoencoder may move, but not change.
    moved = tmp_path / "moved"
    os.rename(dc_ae, moved)
    with pytest.raises(UserError, match="holds no converted autoencoder"):
        ImageSampler.load(workdir)
    sampler = ImageSampler.load(workdir, str(moved))
    prompts = [sampler.encoder.drawing("a flower")]
    again = sampler(prompts, Sampling(4, guidance=2.0), images_per_prompt=2, batch_size=2)
    assert np.abs(again.astype(int) - drawn).max() <= 1  # padded to another batch: float32 sums in another order
    record = json.loads((moved / "autoencoder.json").read_text())
    (moved / "autoencoder.json").write_text(json.dumps(record | {"scale": 0.4}))
    with pytest.raises(UserError, match=r"scale 0\.3 of the run .*, 0\.4 of "):
        ImageSampler.load(workdir, str(moved))
