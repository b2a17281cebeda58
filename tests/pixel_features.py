"""Pictures, and features of them at once: for tests of what surrounds the Inception network."""

import types

import numpy as np

from lattejax.models.inception import CLASSES, POOL, SPATIAL, Features


class PixelFeatures:
    """In the place of `FeatureExtractor`: the first features are the pixels in [0, 1], the others zero."""

    weights = types.SimpleNamespace(sha256="of pixels", are_published=False)

    def __call__(self, images: np.ndarray) -> Features:
        pixels = (images.reshape(len(images), -1) / 255).astype(np.float32)
        return Features(*(np.pad(pixels, ((0, 0), (0, size - pixels.shape[1]))) for size in (POOL, SPATIAL, CLASSES)))


def random_pictures(count: int, seed: int = 0, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)
