"""Densities of flow time: how often training visits each t, and how sampling spaces its steps. Noise is at t = 0."""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float
from scipy.special import ndtr


@runtime_checkable
class Density(Protocol):
    """What a density provides. Two that are equal must be the same density, as those of a frozen dataclass are."""

    def cumulative(self, t: float | Sequence[float] | np.ndarray) -> np.ndarray | np.float64:
        """The share of flow times below t: on the host, in float64."""

    def quantile(self, u: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
        """The inverse of `cumulative`, in JAX: it makes flow times of uniform numbers."""


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The uniform density."""

    def cumulative(self, t: float | Sequence[float] | np.ndarray) -> np.ndarray | np.float64:
        return np.asarray(t, np.float64)

    def quantile(self, u: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
        return u


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """logit(t) is normal (Esser et al., arXiv 2403.03206): with mean 0
    and std below 1.4, times in the middle are the most frequent."""

    mean: float
    std: float

    def cumulative(self, t: float | Sequence[float] | np.ndarray) -> np.ndarray | np.float64:
        t = np.asarray(t, np.float64)
        with np.errstate(divide="ignore"):
            return ndtr((np.log(t) - np.log1p(-t) - self.mean) / self.std)

    def quantile(self, u: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
        return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))


@dataclasses.dataclass(frozen=True)
class Shifted:
    """t = s·u / (1 + (s − 1)·u) of a uniform u: s below 1 favours noise. s = 1/3 is SD3's shift of 3."""

    shift: float | Fraction

    def cumulative(self, t: float | Sequence[float] | np.ndarray) -> np.ndarray | np.float64:
        t = np.asarray(t, np.float64)
        return t / (self.shift - (self.shift - 1) * t)

    def quantile(self, u: Float[Array, "*rows"] | Fraction) -> Float[Array, "*rows"] | Fraction:
        return self.shift * u / (self.shift * u + (1 - u))  # exactly 0 and 1 at both ends


UNIFORM = Uniform()
