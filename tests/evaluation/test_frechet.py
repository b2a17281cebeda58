"""The Fréchet distance against closed forms and against a matrix root."""

import numpy as np
import pytest
import scipy.linalg

from lattejax.data import digits
from lattejax.evaluation.digits import DigitReader, frechet_train_test
from lattejax.evaluation.frechet import Gaussian, frechet_distance


def test_shifted_and_scaled_sets_have_their_closed_form():
    """b = 3·a + 2: means two apart, standard deviations s and 3s on every axis, |μ|² + Σ (s − 3s)²."""
    a = np.random.default_rng(0).standard_normal((500, 6))
    a -= a.mean(axis=0)
    expected = 6 * 4 + 4 * np.trace(np.cov(a, rowvar=False))
    assert frechet_distance(a, 3 * a + 2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_equals_the_form_with_a_matrix_root():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((300, 8)), rng.standard_normal((200, 8)) @ rng.standard_normal((8, 8)) + 0.5
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(
        np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_constant_pixels_are_allowed():
    a = np.random.default_rng(0).standard_normal((100, 5))
    a[:, 2] = 1.0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_what_is_no_covariance_is_refused():
    def gaussian(covariance: np.ndarray) -> Gaussian:
        return Gaussian(np.zeros(len(covariance)), covariance)

    for covariance, problem in (
        (np.diag([1.0, 2.0, 3.0, -4.0]), "not positive semi-definite"),
        (np.array([[0.0, 1.0], [1.0, 0.0]]), "not positive semi-definite"),
        (np.array([[2.0, 1.0], [0.5, 2.0]]), "not symmetric"),
    ):
        with pytest.raises(ValueError, match=problem):
            gaussian(covariance).distance(gaussian(covariance))
    few = np.random.default_rng(0).standard_normal((20, 100))
    for dtype in (np.float32, np.float64):  # singular, and rounded
        rounded = gaussian(np.cov(few, rowvar=False).astype(dtype).astype(np.float64))
        assert rounded.distance(rounded) == pytest.approx(0, abs=1e-4)
    assert gaussian(np.zeros((3, 3))).distance(gaussian(np.eye(3))) == pytest.approx(3)


def test_real_digits_are_classified_correctly_and_noise_is_not():
    """The scores of real test pictures, in order and shifted by one class, and of noise."""
    test = digits.load("test")
    real = np.concatenate([test.images[test.labels == digit][:30] for digit in range(10)])
    reader = DigitReader()
    right, wrong = reader.score(real), reader.score(np.roll(real, 30, axis=0))
    assert right["generated_accuracy"] > 0.97 and wrong["generated_accuracy"] < 0.03
    assert right["frechet"] == pytest.approx(wrong["frechet"])
    noise = np.random.default_rng(0).integers(0, 256, real.shape).astype(np.uint8)
    assert reader.score(noise)["frechet"] > 10 * right["frechet"]
    assert frechet_train_test() < 0.2
