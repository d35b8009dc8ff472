"""Distances between two sets of embeddings (N, D), in float64.

References: "Frechet Audio Distance", arXiv:1812.08466; "Adapting Frechet Audio Distance for Generative Music
Evaluation", arXiv:2311.01616, section 3.2 (extrapolation to infinite N); "KAD: No More FAD!", arXiv:2502.15602,
equations 5 to 7 (kernel audio distance).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KAD_SCALE = 100.0                                          # by which the kernel distance is told
FEWEST_TO_EXTRAPOLATE = 10
_SIZES = 15                                                # subsets of so many sizes, each drawn so often
_DRAWS = 3
_ROWS = 1024                                               # of a matrix of pairs at once


@dataclass(frozen=True)
class Extrapolated:
    """The Frechet distance at infinite N: value + slope / N is the line through those of subsets of N embeddings.

    r2: the share of their variance that the line explains.
    """

    value: float
    slope: float
    r2: float


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with the means and covariances of x (N, D), y (M, D).

    |mean_x - mean_y|^2 + tr A + tr B - 2 tr (A B)^(1/2) with the unbiased covariances A and B. With A = X^T X and
    B = Y^T Y the last trace is the sum of the singular values of X Y^T, which needs no root of a matrix and is exact
    where there are fewer embeddings than dimensions. Raises ValueError for less than two embeddings in a set.
    """
    x, y = _checked(x, "x", least=2), _checked(y, "y", least=2)
    _same_width(x, y)
    means, (a, b) = (x.mean(axis=0), y.mean(axis=0)), (_factor(x), _factor(y))
    between = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    distance = np.square(means[0] - means[1]).sum() + np.square(a).sum() + np.square(b).sum() - 2 * between
    return max(0.0, float(distance))


def frechet_of_points(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N,): the Frechet distance of each embedding of x (N, D), as a set without spread, from the set y (M, D)."""
    x, y = _checked(x, "x"), _checked(y, "y", least=2)
    _same_width(x, y)
    return np.square(x - y.mean(axis=0)).sum(axis=1) + y.var(axis=0, ddof=1).sum()


def frechet_infinity(x: np.ndarray, y: np.ndarray, seed: int = 0) -> Extrapolated:
    """The Frechet distance of x (N, D) from all of y (M, D) without its bias, which is about proportional to 1 / N.

    A line through the distances of random subsets of x, of half of it up to all, against 1 / N: in smaller ones the
    bias is no longer proportional. Raises ValueError for less than 10 embeddings in x.
    """
    x = _checked(x, "x", least=FEWEST_TO_EXTRAPOLATE)
    generator = np.random.Generator(np.random.PCG64(seed))
    sizes = np.unique(np.linspace(len(x) // 2, len(x), _SIZES).round().astype(int))
    subsets = [generator.permutation(len(x))[:size] for size in sizes for _ in range(1 if size == len(x) else _DRAWS)]
    inverse = np.array([1 / len(subset) for subset in subsets])
    values = np.array([frechet(x[subset], y) for subset in subsets])
    slope, value = np.polyfit(inverse, values, 1)
    spread = np.square(values - values.mean()).sum()
    rest = np.square(values - value - slope * inverse).sum()
    return Extrapolated(float(value), float(slope), float(1 - rest / spread) if spread > 0 else 1.0)


def kernel(x: np.ndarray, y: np.ndarray, bandwidth: float | None = None) -> float:
    """100 times the unbiased squared maximum mean discrepancy of x (N, D) and y (M, D); below zero by chance.

    The kernel is exp(-|a - b|^2 / (2 bandwidth^2)), its bandwidth by default the median distance of two embeddings of
    the reference y. Raises ValueError for less than two embeddings in a set, and where all of y are equal.
    """
    x, y = _checked(x, "x", least=2), _checked(y, "y", least=2)
    _same_width(x, y)
    bandwidth = median_distance(y) if bandwidth is None else bandwidth
    within = [(_kernel_sum(z, z, bandwidth) - len(z)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return KAD_SCALE * (sum(within) - 2 * _kernel_sum(x, y, bandwidth) / (len(x) * len(y)))


def kernel_of_points(x: np.ndarray, y: np.ndarray, bandwidth: float | None = None) -> np.ndarray:
    """(N,): the kernel distance of each embedding in x (N, D), taken as a set without spread, from the set y (M, D)."""
    x, y = _checked(x, "x"), _checked(y, "y", least=2)
    _same_width(x, y)
    bandwidth = median_distance(y) if bandwidth is None else bandwidth
    within = (_kernel_sum(y, y, bandwidth) - len(y)) / (len(y) * (len(y) - 1))
    between = np.array([_kernel_sum(row[None], y, bandwidth) for row in x]) / len(y)
    return KAD_SCALE * (1 + within - 2 * between)


def median_distance(y: np.ndarray) -> float:
    """The median Euclidean distance of two different rows of y (M, D). Raises ValueError if it is zero."""
    y = _checked(y, "y", least=2)
    pairs = [np.sqrt(_squares(y[i : i + 1], y[i + 1 :]))[0] for i in range(len(y) - 1)]
    median = float(np.median(np.concatenate(pairs)))
    if median == 0:
        raise ValueError("the sounds of the reference are the same to the embedding: no bandwidth for the kernel")
    return median


def _factor(x: np.ndarray) -> np.ndarray:
    """A matrix F with F^T F = covariance of x (N, D), of at most D rows."""
    centred = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(x) > x.shape[1] else centred


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, M) squared distances, from differences: products would cancel for embeddings that are close."""
    return np.stack([np.square(y - row).sum(axis=1) for row in x])


def _kernel_sum(x: np.ndarray, y: np.ndarray, bandwidth: float) -> float:
    starts = range(0, len(x), _ROWS)
    return float(sum(np.exp(-_squares(x[i : i + _ROWS], y) / (2 * bandwidth**2)).sum() for i in starts))


def _checked(x: np.ndarray, name: str, least: int = 1) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"{name} must be {least} or more embeddings (N, D), got the shape {x.shape}")
    if not np.isfinite(x).all():
        count = int((~np.isfinite(x)).any(axis=1).sum())
        raise ValueError(f"{name} holds NaN or infinite values in {count} of {len(x)} embeddings")
    return x


def _same_width(x: np.ndarray, y: np.ndarray) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"embeddings of one width are needed, got {x.shape[1]} and {y.shape[1]}")
