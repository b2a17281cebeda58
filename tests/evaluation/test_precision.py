"""Matrix products of images and features are of the highest precision, which only accelerators tell apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lattejax.encoding.encode import encode_pixels
from lattejax.evaluation import features, precision_recall
from lattejax.models import functional
from lattejax.models.inception import SIDE, Inception
from lattejax.sampling.images import decode_images
from lattejax.weights.autoencoders import StoredAutoencoder
from tests import checkpoints
from tests.helpers import products

HIGHEST = jax.lax.Precision.HIGHEST


def programs():
    stored = StoredAutoencoder.open(str(checkpoints.convert_autoencoder()))
    latents, pixels = np.zeros((1, 2, 2, 8), np.float32), np.zeros((1, 16, 16, 3), np.uint8)
    inception = jax.eval_shape(lambda: functional.init(Inception, key=jax.random.key(0)))
    block = jnp.zeros((4, 3)), jnp.ones(4, bool)
    yield "decode", decode_images, (stored.autoencoder, stored.weights("decoder"), latents), 0
    yield "encode", encode_pixels, (stored.autoencoder, stored.weights("encoder"), pixels), 0
    yield "features", features._extract, (inception, jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)), ()
    yield "nearest", precision_recall._nearest, (block, block, jnp.zeros((4, 4)), jnp.zeros((4, 4))), ()
    yield "coverage", precision_recall._coverage, (block, block, jnp.zeros(4), jnp.zeros(4)), ()


@pytest.mark.parametrize("name", ["decode", "encode", "features", "nearest", "coverage"])
def test_all_products_are_of_the_highest_precision(name):
    [(function, arguments, static)] = [program[1:] for program in programs() if program[0] == name]
    program = jax.make_jaxpr(function, static_argnums=static)(*arguments).jaxpr
    found = [product.params["precision"] for product in products(program)]
    assert found and all(one in (HIGHEST, (HIGHEST, HIGHEST)) for one in found)
