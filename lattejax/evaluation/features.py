"""The Inception features of pictures, computed over the mesh."""

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from lattejax.models import functional
from lattejax.models.functional import Params
from lattejax.models.inception import Features, Inception, resize
from lattejax.parallel import hosts, rules
from lattejax.parallel.mesh import batches_of, row_shares
from lattejax.parallel.rows import Rows
from lattejax.weights.inception import InceptionWeights

PICTURES_PER_DEVICE = 64  # at a time
PRECISION = "float32, highest matmul precision"  # as it is recorded


class FeatureExtractor:
    """Computes features of pictures of any size; devices take different pictures."""

    def __init__(self, weights: InceptionWeights, mesh: Mesh):
        self.weights, self.mesh = weights, mesh
        self._params = rules.place(mesh, weights.params, axes=())

    def __call__(self, images: UInt8[np.ndarray, "N H W 3"]) -> Features:
        """Returns features as NumPy arrays, on every process; every process must have all pictures."""
        parts = []
        for rows in batches_of(len(images), PICTURES_PER_DEVICE * row_shares(self.mesh), self.mesh):
            batch = Rows.place_flat(self.mesh, images[rows])
            parts.append(hosts.fetch(_extract(self._params, resize(batch))))
        return Features(*(np.concatenate(of_kind)[: len(images)] for of_kind in zip(*parts, strict=True)))


@jax.jit
def _extract(params: Params, images: Float[Array, "B 299 299 3"]) -> Features:
    return functional.bind(Inception, params=params)(images)
