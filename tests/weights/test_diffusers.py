"""DC-AE against diffusers' AutoencoderDC, both published families in small, from checkpoints that diffusers wrote."""

import json
import os

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from etils import epath

from lattejax.errors import UserError
from lattejax.models import dc_ae
from lattejax.weights import diffusers

encode = jax.jit(dc_ae.encode, static_argnames="config")
decode = jax.jit(dc_ae.decode, static_argnames="config")

VIT = "EfficientViTBlock"
FAMILIES = {
    "in-1.0": dict(
        encoder_block_types=("ResBlock", "ResBlock", VIT, VIT),
        decoder_block_types=("ResBlock", "ResBlock", VIT, VIT),
        encoder_block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32, 64),
        encoder_layers_per_block=(0, 2, 1, 1),
        decoder_layers_per_block=(0, 1, 2, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        decoder_norm_types=("batch_norm", "batch_norm", "rms_norm", "rms_norm"),
        decoder_act_fns=("relu", "relu", "silu", "silu"),
    ),
    "sana-1.0": dict(
        encoder_block_types=("ResBlock", "ResBlock", VIT),
        decoder_block_types=("ResBlock", "ResBlock", VIT),
        encoder_block_out_channels=(16, 32, 64),
        decoder_block_out_channels=(16, 32, 64),
        encoder_layers_per_block=(1, 1, 2),
        decoder_layers_per_block=(1, 2, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    torch.manual_seed(0)
    model = AutoencoderDC(latent_channels=8, attention_head_dim=8, **FAMILIES[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, epath.Path(path)


# Latents' height and width. Heads have 8 channels: up to 8 pixels attention is quadratic, beyond it is linear.
@pytest.mark.parametrize("size", [(1, 1), (2, 4), (3, 3), (8, 8), (5, 2)])
def test_latents_and_images_equal_diffusers(checkpoint, size):
    model, path = checkpoint
    config, params = diffusers.read(path)
    height, width = (config.compression * side for side in size)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, height, width)).astype(np.float32)
    with torch.no_grad():
        latents = model.encode(torch.tensor(images)).latent
        expected = model.decode(latents).sample.numpy()
    tolerance = dict(rtol=1e-4, atol=1e-4)  # float32 on both sides; random weights make latents of up to 30
    ours = encode(config, params, images.transpose(0, 2, 3, 1))
    assert ours.shape == (2, *size, 8)
    np.testing.assert_allclose(ours, latents.numpy().transpose(0, 2, 3, 1), **tolerance)
    drawn = decode(config, params, latents.numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(drawn, expected.transpose(0, 2, 3, 1), **tolerance)


def edit(path, change):
    values = json.loads((path / "config.json").read_text())
    change(values)
    (path / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda d: os.truncate(d / diffusers.WEIGHTS, 3000), "cannot be read as safetensors"),
        (lambda d: (d / diffusers.WEIGHTS).unlink(), "has neither"),
        (lambda d: edit(d, lambda c: c.update(_class_name="AutoencoderKL")), "'AutoencoderKL'"),
        (lambda d: edit(d, lambda c: c.update(latent_channels=4)), "misshapen: decoder.conv_in.weight"),
        (lambda d: edit(d, lambda c: c.update(encoder_layers_per_block=[1, 1, 1])), "left over: encoder.down_blocks"),
        (lambda d: edit(d, lambda c: c.update(decoder_act_fns="gelu")), "activation='gelu'"),
        (lambda d: edit(d, lambda c: c.pop("attention_head_dim")), "attention_head_dim"),
    ],
)
def test_a_broken_checkpoint_is_named(damage, named, tmp_path):
    AutoencoderDC(latent_channels=8, attention_head_dim=8, **FAMILIES["sana-1.0"]).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=named):
        diffusers.read(epath.Path(tmp_path))
