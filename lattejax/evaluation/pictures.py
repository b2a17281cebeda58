"""The scores of a set of pictures against a reference: FID, sFID, Inception Score, precision and recall."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from lattejax.errors import UserError
from lattejax.evaluation.frechet import Gaussian, Moments
from lattejax.evaluation.inception_score import SPLITS, InceptionScore
from lattejax.evaluation.precision_recall import NEIGHBOURS, Blocks, precision_recall
from lattejax.models.inception import CLASSES, POOL, SPATIAL, Features

FEWEST = max(SPLITS, NEIGHBOURS + 1)  # pictures that have all scores
PUBLISHED = 50_000  # pictures of published scores


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What pictures are compared with; an absent part leaves out the scores that need it."""

    pool: Gaussian
    spatial: Gaussian | None = None
    features: Blocks | None = None  # of pool_3

    @property
    def left_out(self) -> dict[str, str]:
        """The scores that cannot be computed, and why."""
        reasons = {}
        if self.spatial is None:
            reasons["sfid"] = "the reference has no mu_s and sigma_s"
        if self.features is None:
            reasons |= dict.fromkeys(("precision", "recall"), "the reference has no pictures (arr_0)")
        return reasons


class Statistics:
    """What FID and sFID need of pictures, collected from their features; memory does not grow with their number."""

    def __init__(self):
        self._pool, self._spatial = Moments(POOL), Moments(SPATIAL)

    def add(self, features: Features) -> None:
        self._pool.add(features.pool)
        self._spatial.add(features.spatial)

    @property
    def pool(self) -> Gaussian:
        return self._pool.gaussian

    @property
    def spatial(self) -> Gaussian:
        return self._spatial.gaussian


def score_pictures(
    parts: Iterable[Features], total: int, pool: Blocks | None, reference: Reference
) -> dict[str, float]:
    """Returns the scores by name.

    Args:
      parts: the features of all pictures, in their order.
      total: how many there are, at least `FEWEST`.
      pool: their pool_3 features again, in blocks; needed if the reference has features.
      reference: what to compare them with.

    Raises:
      UserError: a score is not finite.
    """
    statistics, inception_score = Statistics(), InceptionScore(total, CLASSES)
    for features in parts:
        statistics.add(features)
        inception_score.add(features.logits)
    figures = {"fid": statistics.pool.distance(reference.pool)}
    if reference.spatial is not None:
        figures["sfid"] = statistics.spatial.distance(reference.spatial)
    figures["inception_score"] = inception_score.score
    if reference.features is not None:
        figures |= precision_recall(pool, reference.features)._asdict()
    if not all(np.isfinite(value) for value in figures.values()):
        raise UserError(f"the scores are not finite: {figures}; the Inception weights or the reference are damaged")
    return figures
