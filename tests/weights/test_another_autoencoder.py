"""A new autoencoder needs a file of modules, and a line of registration for them and for the reader of its
config.json."""

import dataclasses
import json
import types

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from lattejax.models import autoencoders as networks
from lattejax.models.convolution import conv
from lattejax.weights import autoencoders, diffusers
from lattejax.weights.autoencoders import StoredAutoencoder


@dataclasses.dataclass(frozen=True)
class PointConfig:
    """A linear map of each pixel's colours."""

    latent_channels: int
    compression: int = 1


class Encoder(nnx.Module):
    def __init__(self, config, *, rngs):
        self.conv = conv(3, config.latent_channels, 1, rngs)

    def __call__(self, images):
        return self.conv(images)


class Decoder(nnx.Module):
    def __init__(self, config, *, rngs):
        self.conv = conv(config.latent_channels, 3, 1, rngs)

    def __call__(self, latents):
        return self.conv(latents)


@pytest.fixture
def checkpoint(monkeypatch, tmp_path):
    monkeypatch.setitem(networks.NETWORKS, PointConfig, types.SimpleNamespace(Encoder=Encoder, Decoder=Decoder))
    monkeypatch.setitem(diffusers.CLASSES, "AutoencoderPoint", lambda values: PointConfig(values["latent_channels"]))
    rng = np.random.default_rng(0)
    weights = {
        "encoder.conv.weight": rng.standard_normal((2, 3, 1, 1)),
        "encoder.conv.bias": rng.standard_normal(2),
        "decoder.conv.weight": rng.standard_normal((3, 2, 1, 1)),
        "decoder.conv.bias": rng.standard_normal(3),
    }
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_file(weights, directory / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderPoint", "latent_channels": 2, "scaling_factor": 0.5}
    (directory / "config.json").write_text(json.dumps(config))
    return directory, weights


def test_it_is_converted_and_encodes(checkpoint, tmp_path):
    directory, weights = checkpoint
    autoencoders.convert(str(directory), tmp_path / "ours")
    stored = StoredAutoencoder.open(str(tmp_path / "ours"))
    assert stored.autoencoder.latent_shape(8) == (8, 8, 2)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32)
    expected = 0.5 * (images @ weights["encoder.conv.weight"][:, :, 0, 0].T + weights["encoder.conv.bias"])
    np.testing.assert_allclose(stored.autoencoder.encode(stored.weights("encoder"), images), expected, atol=1e-6)
