"""The Inception Score (Salimans et al., arXiv 1606.03498), of ten contiguous splits."""

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax, xlogy

SPLITS = 10


class InceptionScore:
    """exp of the mean divergence of a picture's class probabilities from their split's mean, averaged over splits.

    Split i of N pictures has those from i·N/10 on, in the order of the samples: of 50,000 each has 5,000. Memory does
    not grow with N.
    """

    def __init__(self, total: int, classes: int):
        self._starts = np.arange(SPLITS) * total // SPLITS
        self._count, self._total = 0, total
        self._probabilities, self._negentropies = np.zeros((SPLITS, classes)), np.zeros(SPLITS)

    def add(self, logits: Float[np.ndarray, "n c"]) -> None:
        """Adds the next pictures' logits."""
        logs = log_softmax(logits.astype(np.float64), axis=1)
        probabilities = np.exp(logs)
        negentropies = np.sum(probabilities * logs, axis=1)
        splits = np.searchsorted(self._starts, self._count + np.arange(len(logits)), side="right") - 1
        for split in np.unique(splits):
            rows = splits == split
            self._probabilities[split] += probabilities[rows].sum(axis=0)
            self._negentropies[split] += negentropies[rows].sum()
        self._count += len(logits)

    @property
    def score(self) -> float:
        """Raises `ValueError` before all pictures are added, or if they are fewer than the splits."""
        if self._count != self._total or self._total < SPLITS:
            raise ValueError(f"{self._count} pictures of {self._total}; the score needs all, and at least {SPLITS}")
        counts = np.diff([*self._starts, self._total])
        marginals = self._probabilities / counts[:, None]
        divergences = self._negentropies / counts - xlogy(marginals, marginals).sum(axis=1)
        return float(np.mean(np.exp(divergences)))
