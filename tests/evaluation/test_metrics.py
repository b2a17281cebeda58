"""The scores from given features: equal to the formulas of torch-fidelity and of ADM's evaluator, in float64 NumPy, and
to torch-fidelity and pytorch-fid themselves."""

import importlib

import numpy as np
import pytest
import scipy.linalg
import torch

from lattejax.evaluation.frechet import Moments
from lattejax.evaluation.inception_score import InceptionScore
from lattejax.evaluation.precision_recall import precision_recall

TINY = dict(samples=60, reference=40, size=7, classes=11)
FULL = dict(samples=2600, reference=2300, size=2048, classes=1008)  # more than features, so of full rank
SIZES = [pytest.param(TINY, id="tiny"), pytest.param(FULL, id="full", marks=pytest.mark.slow)]


def features(samples: int, reference: int, size: int, classes: int) -> tuple[np.ndarray, ...]:
    """Two sets of float32 features, some directions much longer than others, that overlap in part; and logits."""
    rng = np.random.default_rng(size)
    mix = np.exp(-np.arange(size) / 2)[:, None] * rng.standard_normal((size, size)) + 0.01 * np.eye(size)
    ours, theirs = (rng.standard_normal((count, size)) @ mix for count in (samples, reference))
    theirs = 0.8 * theirs + 0.3
    return *(x.astype(np.float32) for x in (ours, theirs)), 3 * rng.standard_normal((samples, classes))


def blocks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def gaussian(rows: np.ndarray, size: int):
    moments = Moments(rows.shape[1])
    for block in blocks(rows, size):
        moments.add(block)
    return moments.gaussian


@pytest.mark.parametrize("sizes", SIZES)
def test_the_frechet_distance_equals_both_evaluators_formulas(sizes):
    """torch-fidelity takes the eigenvalues of the product, ADM's evaluator its matrix root. To 1e-6."""
    a, b, _ = features(**sizes)
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (a, b)]
    shift = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    rest = shift @ shift + sum(map(np.trace, covariances))
    product = covariances[0] @ covariances[1]
    by_eigenvalues = rest - 2 * np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()
    for size in (len(a), 13):
        ours = gaussian(a, size).distance(gaussian(b, size))
        assert ours == pytest.approx(by_eigenvalues, rel=1e-6)
    if sizes is TINY:
        assert ours == pytest.approx(rest - 2 * np.trace(scipy.linalg.sqrtm(product).real), rel=1e-6)
    np.testing.assert_allclose(gaussian(a, 13).covariance, covariances[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_inception_score_equals_its_definition(sizes):
    *_, logits = features(**sizes)
    for total in (len(logits), len(logits) - 3):  # splits of unequal length too
        rows = np.exp(logits[:total] - logits[:total].max(axis=1, keepdims=True))
        rows /= rows.sum(axis=1, keepdims=True)
        scores = []
        for i in range(10):
            part = rows[i * total // 10 : (i + 1) * total // 10]
            scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(axis=0))), axis=1))))
        ours = InceptionScore(total, logits.shape[1])
        for block in blocks(logits[:total], 17):
            ours.add(block)
        assert ours.score == pytest.approx(np.mean(scores), rel=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_precision_and_recall_equal_their_definition(sizes):
    a, b, _ = features(**sizes)

    def squared(u, v):
        return np.maximum((u * u).sum(1)[:, None] - 2 * u @ v.T + (v * v).sum(1), 0)

    ours, theirs = a.astype(np.float64), b.astype(np.float64)
    radii = [np.partition(squared(x, x), 3, axis=1)[:, 3] for x in (ours, theirs)]
    distances = squared(ours, theirs)
    precision, recall = np.mean((distances <= radii[1]).any(1)), np.mean((radii[0] >= distances.T).any(1))
    assert 0.05 < precision < 0.999 and 0.05 < recall < 0.999
    for size in (len(a), len(a) // 3 + 1):
        assert precision_recall(blocks(a, size), blocks(b, size)) == pytest.approx((precision, recall), rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SciPy, about pytorch-fid
@pytest.mark.parametrize("size", [2048, 2023])
def test_scores_equal_those_of_torch_fidelity_and_pytorch_fid(size, ports):
    """Their own functions, on as many features as FID (2,048) and sFID (2,023) have, of full rank."""
    a, b, logits = features(**FULL | {"size": size})
    metrics = {name: importlib.import_module(f"torch_fidelity.metric_{name}") for name in ("fid", "isc", "prc")}
    ours = gaussian(a, 1000).distance(gaussian(b, 1000))
    statistics = [metrics["fid"].fid_features_to_statistics(torch.tensor(x).double()) for x in (a, b)]
    theirs = metrics["fid"].fid_statistics_to_metric(*statistics, verbose=False)
    assert ours == pytest.approx(theirs[metrics["fid"].KEY_METRIC_FID], rel=1e-6)
    distance = importlib.import_module("pytorch_fid.fid_score").calculate_frechet_distance
    moments = [(x.astype(np.float64).mean(axis=0), np.cov(x.astype(np.float64), rowvar=False)) for x in (a, b)]
    assert ours == pytest.approx(distance(*moments[0], *moments[1]), rel=1e-6)

    score = InceptionScore(*logits.shape)
    for block in blocks(logits, 1000):
        score.add(block)
    theirs = metrics["isc"].isc_features_to_metric(torch.tensor(logits), splits=10, shuffle=False)
    assert score.score == pytest.approx(theirs["inception_score_mean"], rel=1e-9)

    settings = dict(prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    theirs = metrics["prc"].prc_features_to_metric(torch.tensor(a), torch.tensor(b), **settings)
    found = precision_recall(blocks(a, 1000), blocks(b, 1000))
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-3), "distances near a radius round"


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="1 vectors have no covariance"):
        gaussian(np.ones((1, 3)), 1)
    with pytest.raises(ValueError, match="3 features have no balls"):
        precision_recall([np.ones((3, 2))], [np.ones((9, 2))])
    score = InceptionScore(9, 4)
    score.add(np.ones((9, 4)))
    with pytest.raises(ValueError, match="at least 10"):
        _ = score.score
