"""The Fréchet distance between two sets of vectors, each modelled as a Gaussian (Heusel et al., arXiv 1706.08500)."""

import numpy as np
from jaxtyping import Float


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½), in float64.

    The trace of the root is the sum of the square roots of the eigenvalues of Σa Σb, which are real and non-negative up
    to rounding; no matrix root is computed.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0))
    mean_term = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    return float(mean_term + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())
