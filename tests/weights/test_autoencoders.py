"""DC-AE and TAESD against diffusers, from checkpoints that diffusers wrote; TAESD3's own weights on a photo."""

import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderTiny
from etils import epath
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image

from lattejax.errors import UserError
from lattejax.models.autoencoders import Autoencoder
from lattejax.weights.autoencoders import StoredAutoencoder, convert
from lattejax.weights.diffusers import WEIGHTS, read, read_geometry, read_taesd
from tests import checkpoints
from tests.helpers import assert_same_bits, shared_data


@functools.partial(jax.jit, static_argnums=0)
def encode(config, params, images):
    return Autoencoder(config).encode(params["encoder"], images)


@functools.partial(jax.jit, static_argnums=0)
def decode(config, params, latents):
    return Autoencoder(config).decode(params["decoder"], latents)


@pytest.fixture(scope="module", params=[*checkpoints.DC_AE, "TAESD"])
def checkpoint(request, tmp_path_factory):
    model = checkpoints.random_autoencoder(request.param)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, epath.Path(path)


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().transpose(0, 2, 3, 1)


# Latents' height and width. DC-AE's heads have 8 channels: up to 8 pixels attention is quadratic, above that linear.
@pytest.mark.parametrize("size", [(2, 4), (8, 8), (5, 2)])
def test_latents_and_images_equal_diffusers(checkpoint, size):
    model, path = checkpoint
    config, params = read(path)
    height, width = (config.compression * side for side in size)
    images = torch.tensor(np.random.default_rng(0).uniform(-1, 1, (2, 3, height, width)).astype(np.float32))
    with torch.no_grad():
        latents = model.encode(images).to_tuple()[0]
        expected = model.decode(latents).sample
    tolerance = dict(rtol=1e-4, atol=1e-4)  # float32 on both sides; with random weights, latents are up to 30
    ours = encode(config, params, channels_last(images))
    assert ours.shape == (2, *size, config.latent_channels)
    np.testing.assert_allclose(ours, channels_last(latents), **tolerance)
    np.testing.assert_allclose(decode(config, params, channels_last(latents)), channels_last(expected), **tolerance)


def diffusers_taesd3(encoder, decoder) -> AutoencoderTiny:
    """TAESD3 in diffusers, whose decoder's layer indices start after the clamp."""
    model = AutoencoderTiny(latent_channels=16).eval()
    state = {f"encoder.layers.{name}": tensor.float() for name, tensor in load_file(encoder).items()}
    for name, tensor in load_file(decoder).items():
        index, rest = name.split(".", 1)
        state[f"decoder.layers.{int(index) - 1}.{rest}"] = tensor.float()
    model.load_state_dict(state)
    return model


def test_taesd3s_own_weights_reconstruct_a_photo_as_in_diffusers():
    """256 pixels of a photo to latents and back: within 0.1 dB of diffusers, and recognisable (above 19 dB)."""
    encoder, decoder = (shared_data(f"weights/taesd3/taesd3_{part}.safetensors") for part in ("encoder", "decoder"))
    config, params = read_taesd(epath.Path(encoder), epath.Path(decoder))
    photo = load_sample_image("china.jpg")[None, 100:356, 200:456].astype(np.float32) / 127.5 - 1
    drawn = np.asarray(decode(config, params, encode(config, params, photo)))
    model = diffusers_taesd3(encoder, decoder)
    with torch.no_grad():
        latents = model.encode(torch.tensor(photo.transpose(0, 3, 1, 2))).latents
        expected = channels_last(model.decode(latents).sample)
    np.testing.assert_allclose(encode(config, params, photo), channels_last(latents), rtol=1e-4, atol=1e-4)

    def psnr(image):
        return 10 * np.log10(4 / np.mean((np.clip(image, -1, 1) - photo) ** 2))

    print(f"PSNR {psnr(drawn):.2f} dB, diffusers {psnr(expected):.2f} dB")
    assert abs(psnr(drawn) - psnr(expected)) < 0.1 and psnr(drawn) > 19


def test_taesds_own_files_are_read_and_broken_ones_named(tmp_path):
    """With their layers' names and small random weights."""
    model = AutoencoderTiny(latent_channels=3)
    encoder, decoder = (epath.Path(tmp_path) / f"{part}.safetensors" for part in ("encoder", "decoder"))
    state = model.state_dict()
    save_file({name.removeprefix("encoder.layers."): state[name] for name in state if "encoder" in name}, encoder)
    theirs = {name.removeprefix("decoder.layers."): state[name] for name in state if "decoder" in name}
    theirs = {f"{int(name.split('.')[0]) + 1}.{name.split('.', 1)[1]}": value for name, value in theirs.items()}
    save_file(theirs, decoder)
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda c: (c.pop("upsample_fn"), c.pop("shift_factor")))  # as earlier diffusers wrote it
    (config, ours), (expected_config, expected) = read_taesd(encoder, decoder), read(encoder.parent)
    assert config == expected_config
    assert_same_bits(ours, expected)
    save_file(theirs | {"2.weight": torch.ones(2)}, decoder)
    with pytest.raises(UserError, match="unexpected: decoder"):
        read_taesd(encoder, decoder)


def edit(path, change):
    values = json.loads((path / "config.json").read_text())
    change(values)
    (path / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda d: os.truncate(d / WEIGHTS, 3000), "cannot be read as safetensors"),
        (lambda d: (d / WEIGHTS).unlink(), "has neither"),
        (lambda d: edit(d, lambda c: c.update(_class_name="AutoencoderKL")), "'AutoencoderKL'"),
        (lambda d: edit(d, lambda c: c.update(latent_channels=4)), "of the wrong shape: decoder.conv_in.weight"),
        (lambda d: edit(d, lambda c: c.update(encoder_layers_per_block=[1, 1, 1])), "unexpected: encoder.down_blocks"),
        (lambda d: edit(d, lambda c: c.update(decoder_act_fns="gelu")), "activation='gelu'"),
        (lambda d: edit(d, lambda c: c.pop("attention_head_dim")), "attention_head_dim"),
        (lambda d: edit(d, lambda c: c.update(encoder_out_shortcut=None)), "encoder_out_shortcut=None must be true or"),
        (lambda d: edit(d, lambda c: c.update(decoder_in_shortcut="no")), "decoder_in_shortcut='no' must be true or"),
        (lambda d: edit(d, lambda c: c.update(upsample_block_type=7)), "upsample_block_type=7 is not supported"),
        (lambda d: edit(d, lambda c: c.update(downsample_block_type="convolution")), "only 'pixel_unshuffle', 'conv'"),
        (lambda d: edit(d, lambda c: c.update(latent_channels=7)), "a network that cannot run.* EinopsError"),
        (lambda d: edit(d, lambda c: c.update(attention_head_dim=128)), "a network that cannot run"),
    ],
)
def test_a_broken_checkpoint_is_named(damage, named, tmp_path):
    AutoencoderDC(latent_channels=8, attention_head_dim=8, **checkpoints.DC_AE["sana-1.0"]).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=named):
        read(epath.Path(tmp_path))


def test_the_published_spelling_of_a_strided_convolution_is_read(tmp_path):
    AutoencoderDC(latent_channels=8, attention_head_dim=8, **checkpoints.DC_AE["sana-1.0"]).save_pretrained(tmp_path)
    expected = read_geometry(epath.Path(tmp_path))
    edit(tmp_path, lambda c: c.update(downsample_block_type="Conv"))
    assert read_geometry(epath.Path(tmp_path)) == expected and not expected.unshuffle


# ---- Converted


def save(family: str, directory, **stated) -> str:
    """Saves a checkpoint whose config.json states the given scale or shift, and no other."""
    checkpoints.random_autoencoder(family).save_pretrained(directory)

    def state(values):
        values.pop("scaling_factor", None)
        values.pop("shift_factor", None)
        values.update(stated)

    edit(directory, state)
    return str(directory)


@pytest.mark.parametrize(
    "family, stated, flags, scale, shift",
    [
        ("in-1.0", {}, {"scale": 0.3189}, 0.3189, 0.0),
        ("sana-1.0", {"scaling_factor": 0.41407}, {}, 0.41407, 0.0),
        ("sana-1.0", {"scaling_factor": 0.41407}, {"scale": 0.41407}, 0.41407, 0.0),
        ("TAESD", {"scaling_factor": 1.0, "shift_factor": 0.5}, {}, 1.0, 0.5),
    ],
)
def test_a_converted_autoencoder_scales_as_its_checkpoint_or_the_user_states(
    family, stated, flags, scale, shift, tmp_path
):
    source = save(family, tmp_path / "checkpoint", **stated)
    convert(source, tmp_path / "out", **flags)
    stored = StoredAutoencoder.open(str(tmp_path / "out"))
    assert (stored.identity.scale, stored.identity.shift) == (scale, shift)
    _, params = read(epath.Path(source))
    for part in ("encoder", "decoder"):
        assert_same_bits(stored.weights(part), params[part])


def test_a_converted_autoencoder_shifts_and_scales_its_networks_latents(tmp_path):
    source = save("TAESD", tmp_path / "checkpoint", scaling_factor=0.3, shift_factor=0.5)
    convert(source, tmp_path / "out")
    stored, (config, params) = StoredAutoencoder.open(str(tmp_path / "out")), read(epath.Path(source))
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    latents = jax.jit(stored.autoencoder.encode)(stored.weights("encoder"), images)
    np.testing.assert_allclose(latents, (encode(config, params, images) - 0.5) * 0.3, rtol=1e-4, atol=1e-4)
    drawn = jax.jit(stored.autoencoder.decode)(stored.weights("decoder"), latents)
    np.testing.assert_allclose(drawn, decode(config, params, latents / 0.3 + 0.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "stated, flags, named",
    [
        ({}, {}, r"does not state the scale .* --scale"),
        ({"scaling_factor": 1.0}, {}, r"does not state the scale"),  # diffusers writes this if none was stated
        ({"scaling_factor": 0.41407}, {"scale": 0.3189}, r"--scale=0\.3189, but .* states 0\.41407"),
        ({}, {"scale": -1.0}, r"scale=-1\.0 must be above 0"),
        ({}, {"scale": float("nan")}, r"scale=nan must be above 0"),
        ({"scaling_factor": "large"}, {}, "large"),
        ({}, {"scale": 0.3, "shift": float("inf")}, "shift=inf must be from"),
    ],
)
def test_a_bad_scale_is_refused(stated, flags, named, tmp_path):
    source = save("in-1.0", tmp_path / "checkpoint", **stated)
    with pytest.raises(UserError, match=named):
        convert(source, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_damaged_conversions_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no autoencoder\.json"):
        StoredAutoencoder.open(str(tmp_path))
    path = epath.Path(shutil.copytree(checkpoints.convert_autoencoder(), tmp_path / "copy"))
    stored = StoredAutoencoder.open(str(path))
    (path / "decoder").rmtree()
    with pytest.raises(UserError, match="decoder"):
        stored.weights("decoder")
    (path / "autoencoder.json").write_text('{"scale": 1.0}')
    with pytest.raises(UserError, match="shift"):
        StoredAutoencoder.open(str(path))
