"""The features of pictures: equal to the graph rendered in PyTorch, and to the two ports that published scores use."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from lattejax.models import functional, inception
from lattejax.models.inception import Inception
from lattejax.weights import inception as weights
from tests.models import inception_rendering

STATE = inception_rendering.random_weights()
IN_CI = {"8, grey": (8, 8, 1), "256x200": (256, 200, 3)}
LARGER = {"64, a batch of 2": (64, 64, 3, 2), "299": (299, 299, 3)}
SIZES = IN_CI | LARGER
TOLERANCE = 1e-4  # features have a standard deviation of about 1


def pictures(rows: int, columns: int, channels: int, batch: int = 1) -> np.ndarray:
    """Random grey levels, coarse and fine."""
    rng = np.random.default_rng(rows)
    coarse = rng.integers(0, 256, (batch, 1 + rows // 8, 1 + columns // 8, channels))
    coarse = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :rows, :columns]
    fine = rng.integers(-30, 31, (batch, rows, columns, channels))
    return np.clip(coarse + fine, 0, 255).astype(np.uint8).repeat(3 // channels, axis=-1)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return inception_rendering.save(STATE, tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture(scope="module")
def extract(file):
    params = weights.load(str(file)).params
    network = jax.jit(lambda params, x: functional.bind(Inception, params=params)(x))
    return lambda images: network(params, inception.resize(images))


@pytest.mark.parametrize(
    "size", [size if size in IN_CI else pytest.param(size, marks=pytest.mark.slow) for size in SIZES]
)
def test_features_equal_the_graph_in_pytorch(size, extract):
    images = pictures(*SIZES[size])
    expected = inception_rendering.features(STATE, images)
    assert all(np.std(of_kind) > 0.2 for of_kind in expected), "not near zero, where all is equal"
    for ours, theirs in zip(extract(images), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_features_of_floats_are_those_of_grey_levels(extract):
    images = pictures(*SIZES["8, grey"])
    for floats, integers in zip(extract(images.astype(np.float32)), extract(images), strict=True):
        np.testing.assert_allclose(floats, integers, atol=TOLERANCE)


# ---- The ports themselves


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_features_equal_torch_fidelitys(size, extract, ports, file):
    names = ["2048", "logits_unbiased"]
    theirs = ports[0].FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=str(file))
    images = pictures(*SIZES[size])
    pool, logits = theirs(torch.tensor(images).permute(0, 3, 1, 2))
    ours = extract(images)
    np.testing.assert_allclose(ours.pool, pool, atol=TOLERANCE)
    np.testing.assert_allclose(ours.logits, logits, atol=TOLERANCE)


@pytest.mark.slow
def test_features_equal_pytorch_fids(extract, ports, file, monkeypatch):
    """At 299×299, since it resizes in another way, and from x/256, which it scales to (x - 128)/128."""
    fidelity, theirs = ports

    def network(**_):
        return fidelity.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))

    monkeypatch.setattr(theirs, "_inception_v3", network)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda url, progress: torch.load(file))
    images = pictures(*SIZES["299"])
    (pool,) = theirs.InceptionV3([3], resize_input=False).eval()(torch.tensor(images).permute(0, 3, 1, 2) / 256)
    np.testing.assert_allclose(extract(images).pool, pool[..., 0, 0], atol=TOLERANCE)
