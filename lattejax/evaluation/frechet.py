"""The Fréchet distance between two sets of vectors, each modelled as a Gaussian (Heusel et al., arXiv 1706.08500)."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float
from scipy.linalg.lapack import dpstrf

# How far a covariance may be from a symmetric, positive semi-definite one, as a share of its largest variance; one of
# few vectors, stored in float32, is off by 1e-5.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance (ddof = 1) of vectors, in float64."""

    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]

    def distance(self, other: "Gaussian") -> float:
        """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½), in float64.

        The trace of the root is the sum of the square roots of the eigenvalues of Σa Σb. With Σ = R Rᵀ these are the
        singular values of Raᵀ Rb, exact to rounding also where a covariance is singular; no matrix root is computed.

        Raises:
          ValueError: one of them is not symmetric or not positive semi-definite.
        """
        product = self.factor.T @ other.factor
        trace_of_root = np.linalg.svd(product, compute_uv=False).sum()
        traces = np.trace(self.covariance) + np.trace(other.covariance)
        return float(np.sum((self.mean - other.mean) ** 2) + traces - 2 * trace_of_root)

    @functools.cached_property
    def factor(self) -> Float[np.ndarray, "d r"]:
        """R with R Rᵀ = Σ, and as many columns as Σ has rank: Cholesky's method with pivots.

        Raises:
          ValueError: Σ is not symmetric or not positive semi-definite.
        """
        largest = self.covariance.diagonal().max()
        packed, pivots, rank, _ = dpstrf(self.covariance, lower=1, tol=np.finfo(np.float64).eps * largest)
        factor = np.empty((len(self.covariance), rank))
        factor[pivots - 1] = np.tril(packed)[:, :rank]
        if np.abs(self.covariance - self.covariance.T).max() > TOLERANCE * largest:
            raise ValueError("the covariance is not symmetric")
        if np.abs(factor @ factor.T - self.covariance).max() > TOLERANCE * largest:
            raise ValueError("the covariance is not positive semi-definite")
        return factor


class Moments:
    """The Gaussian of vectors that come in batches; memory does not grow with their number."""

    def __init__(self, size: int):
        self.count, self._mean, self._scatter = 0, np.zeros(size), np.zeros((size, size))

    def add(self, vectors: Float[np.ndarray, "n d"]) -> None:
        """Adds a batch: sums around its own mean, so that nothing cancels (Chan et al., 1979)."""
        vectors, total = vectors.astype(np.float64), self.count + len(vectors)
        mean = vectors.mean(axis=0)
        centred, shift = vectors - mean, mean - self._mean
        self._scatter += centred.T @ centred
        self._scatter += np.outer(shift * (self.count * len(vectors) / total), shift)
        self._mean += shift * (len(vectors) / total)
        self.count = total

    @property
    def gaussian(self) -> Gaussian:
        """Raises `ValueError` for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"{self.count} vectors have no covariance; at least 2 do")
        return Gaussian(self._mean.copy(), self._scatter / (self.count - 1))


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """The distance between two sets of at least two vectors."""
    gaussians = []
    for vectors in (a, b):
        moments = Moments(vectors.shape[1])
        moments.add(vectors)
        gaussians.append(moments.gaussian)
    return gaussians[0].distance(gaussians[1])
