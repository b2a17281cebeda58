"""One's own pictures, through the doors as a new user takes them: convert, encode, train, sample."""

import os

import numpy as np
import pytest
from PIL import Image

from lattejax.sampling.images import ImageSampler
from lattejax.weights.runs import Run
from tests import checkpoints, pictures
from tests.helpers import ENVIRONMENT, run_door, tiny_flags


def succeed(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def vlm():
    return checkpoints.convert(checkpoints.random_model(checkpoints.tiny_config(**checkpoints.OF_DIGITS)))


def test_pictures_become_latents_a_trained_pathway_and_drawings(vlm, tmp_path):
    """Photos as JPEGs with captions, a random DC-AE as diffusers writes it, a random Qwen2-VL; a few steps of training
    on the captions' shared contexts; a drawing that is what the library draws. Encoded on two devices."""
    checkpoints.random_autoencoder("in-1.0").save_pretrained(tmp_path / "diffusers")
    dc_ae, latents, workdir = tmp_path / "dc_ae", tmp_path / "latents", tmp_path / "run"
    said = succeed(run_door("convert", f"--source={tmp_path / 'diffusers'}", "--scale=0.3", f"--out={dc_ae}"))
    assert "is whole" in said
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
    two_devices = ENVIRONMENT | {"XLA_FLAGS": ENVIRONMENT["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"}
    said = succeed(run_door("encode", *flags, f"--out={latents}", env=two_devices))
    assert "16 of 20" in said and "images/s" in said and "is whole" in said
    assert "held_out_loss" in succeed(run_door("train", *flags, f"--workdir={workdir}"))
    assert not (workdir / "vlm").exists(), "the frozen VLM is referred to, not copied"
    out = tmp_path / "drawn.png"
    arguments = ["--prompt=a flower", "--num=2", "--steps=4", f"--out={out}", "--npz"]
    succeed(run_door("sample", f"--workdir={workdir}", *arguments))
    drawn = np.load(out.with_suffix(".npz"))["arr_0"]
    assert drawn.shape == (2, pictures.SIZE, pictures.SIZE, 3) and Image.open(out).format == "PNG"
    assert drawn.std() > 1 and np.any(drawn[0] != drawn[1])

    moved = tmp_path / "moved"
    os.rename(dc_ae, moved)
    done = run_door("sample", f"--workdir={workdir}", *arguments)
    assert done.returncode == 2 and "holds no converted autoencoder" in done.stderr
    succeed(run_door("sample", f"--workdir={workdir}", f"--autoencoder={moved}", *arguments))
    np.testing.assert_array_equal(np.load(out.with_suffix(".npz"))["arr_0"], drawn)
    sampler = ImageSampler.load(workdir, str(moved))
    assert sampler.autoencoder.scale == 0.3
    grid = np.asarray(Image.open(Run.open(workdir).workdir.image("samples", "train", 3)))
    assert grid.std() > 1
