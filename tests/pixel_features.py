"""Pictures, and features of them at once: for tests of what surrounds the Inception network."""

import types
from typing import Any

import numpy as np

from lattejax.models.inception import CLASSES, POOL, SPATIAL, Features


class PixelFeatures:
    """In the place of `FeatureExtractor`: the first features are the pixels in [0, 1], of the spatial ones their
    squares, and of the logits five times the pixels in reverse order; the others are zero."""

    weights = types.SimpleNamespace(sha256="of pixels", are_published=False)

    def __call__(self, images: np.ndarray) -> Features:
        pixels = (images.reshape(len(images), -1) / 255).astype(np.float32)
        first = ((pixels, POOL), (pixels**2, SPATIAL), (5 * pixels[:, ::-1], CLASSES))
        return Features(*(np.pad(each, ((0, 0), (0, size - each.shape[1]))) for each, size in first))


def random_pictures(count: int, seed: int = 0, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def result(**settings: Any) -> dict[str, Any]:
    """A result in a file of `evaluate --reference --out`, as it would be of 50,000 drawings; figures are made up."""
    settings = {
        "num": 50_000,
        "guidance": 5.0,
        "num_steps": 40,
        "guidance_interval": [0.0, 1.0],
        "solver": "euler",
        "shift": 1.0,
        "seed": 0,
        "prompts": "the data",
        "num_prompts": 1000,
        "prompts_sha256": "01" * 32,
        "weights": "0123456789abcdef",
        "dtype": "bfloat16",
        "image_size": 256,
        "quantisation": "rounded down",
        "inception_sha256": "6726825d" * 8,
        "reference_sha256": "ab" * 32,
    } | settings
    return {
        "figures": {"fid": 5.8125, "inception_score": 213.0625, "precision": 0.75},
        "only_a_monitor_because": [],
        "left_out": {},
        "settings": settings,
        "reference": {"file": "/somewhere/VIRTUAL_imagenet256_labeled.npz", "description": "as | ADM <has> it"},
        "device": "1 x cpu cpu",
        "inception_precision": "float32, highest matmul precision",
        "lattejax_version": "0.1.0",
        "jax_version": "0.10.2",
    }
