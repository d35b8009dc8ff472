"""Distances against scipy, closed forms and double loops."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import pdist

from ldm2.metrics import distances


def draw(count, width=6, seed=0, scale=1.0, shift=0.0):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(width, width))
    return scale * generator.normal(size=(count, width)) @ mixing + shift


def with_moments(mean, deviations):
    """Points whose mean and (diagonal) unbiased covariance are exactly these."""
    width = len(mean)
    corners = np.concatenate([np.eye(width), -np.eye(width)])
    return mean + corners * np.asarray(deviations) * np.sqrt((2 * width - 1) / 2)


def by_scipy(x, y):
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * root.real)


@pytest.mark.parametrize("n, m, width", [(50, 80, 6), (400, 300, 24), (40, 33, 32), (3, 500, 2)])
def test_frechet_is_that_of_scipys_matrix_root(n, m, width):
    x, y = draw(n, width, seed=1), draw(m, width, seed=2, scale=0.7, shift=0.3)
    assert distances.frechet(x, y) == pytest.approx(by_scipy(x, y), rel=1e-6)


def test_frechet_of_gaussians_with_axes_in_common_is_the_closed_form():
    x, y = with_moments([1.0, 2.0, -1.0], [0.5, 3.0, 1e-6]), with_moments([0.0, 2.5, -1.0], [2.0, 1.0, 1e-3])
    expected = 1 + 0.25 + (0.5 - 2) ** 2 + (3 - 1) ** 2 + (1e-6 - 1e-3) ** 2
    assert distances.frechet(x, y) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_fewer_sounds_than_dimensions_loses_no_digits():
    """Two points each, in 512 dimensions: covariances of rank one, along u and v."""
    generator = np.random.default_rng(3)
    u, v = generator.normal(size=(2, 512)) / 512**0.5
    x, y = np.stack([u, -u]), np.stack([v, -v])            # covariances 2 u u^T and 2 v v^T
    expected = 2 * (u @ u) + 2 * (v @ v) - 4 * abs(u @ v)
    assert distances.frechet(x, y) == pytest.approx(expected, rel=1e-12)
    assert distances.frechet(x, x) == pytest.approx(0, abs=1e-14)


def test_frechet_is_symmetric_and_grows_by_the_square_of_a_shift():
    x, y = draw(60, seed=4), draw(70, seed=5)
    assert distances.frechet(x, y) == pytest.approx(distances.frechet(y, x), rel=1e-12)
    assert distances.frechet(x, x + 2.0) == pytest.approx(6 * 4.0, rel=1e-9)


def test_a_point_is_a_set_without_spread():
    x, y = draw(3, seed=6), draw(40, seed=7)
    expected = [np.square(row - y.mean(0)).sum() + np.trace(np.cov(y, rowvar=False)) for row in x]
    np.testing.assert_allclose(distances.frechet_of_points(x, y), expected, rtol=1e-12)
    # Its limit: two sounds that differ by almost nothing.
    near = [distances.frechet(np.stack([row, row + 1e-9]), y) for row in x]
    np.testing.assert_allclose(distances.frechet_of_points(x, y), near, rtol=1e-6)


def test_the_line_at_infinite_n_comes_closer_to_the_truth_than_all_sounds_do():
    """Both sets are of one Gaussian, so the truth is 0, and the distance of N sounds is above it."""
    generator = np.random.default_rng(8)
    x, y = generator.normal(size=(400, 16)), generator.normal(size=(20_000, 16))
    found = distances.frechet_infinity(x, y)
    assert distances.frechet(x, y) > 0.15
    assert abs(found.value) < 0.05
    assert found.slope > 0
    assert found.r2 > 0.9


def test_a_bias_of_exactly_one_over_n_is_taken_away(monkeypatch):
    monkeypatch.setattr(distances, "frechet", lambda x, y: 3.0 + 7.0 / len(x))
    found = distances.frechet_infinity(draw(100), draw(5))
    assert (found.value, found.slope, found.r2) == pytest.approx((3.0, 7.0, 1.0), abs=1e-9)


def test_extrapolating_twice_gives_the_same():
    x, y = draw(50, seed=9), draw(60, seed=10)
    assert distances.frechet_infinity(x, y) == distances.frechet_infinity(x, y)
    assert distances.frechet_infinity(x, y, seed=1) != distances.frechet_infinity(x, y)


def by_loops(x, y, width):
    def k(a, b):
        return np.exp(-np.square(a - b).sum() / (2 * width**2))

    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return 100 * (xx + yy - 2 * np.mean([k(a, b) for a in x for b in y]))


def test_kernel_distance_is_that_of_loops_with_the_median_of_the_reference():
    x, y = draw(13, seed=11), draw(17, seed=12, shift=0.4)
    width = np.median(pdist(y))
    assert distances.median_distance(y) == pytest.approx(width, rel=1e-12)
    assert distances.kernel(x, y) == pytest.approx(by_loops(x, y, width), rel=1e-9)
    assert distances.kernel(x, y, bandwidth=0.3) == pytest.approx(by_loops(x, y, 0.3), rel=1e-9)


def test_kernel_distance_of_two_and_two_points_is_the_closed_form():
    x, y = np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]])               # the reference's bandwidth is 2

    def k(d):
        return np.exp(-d * d / 8)

    expected = 100 * (k(1) + k(2) - 2 * (k(0) + k(2) + k(1) + k(1)) / 4)
    assert distances.kernel(x, y) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_has_no_bias():
    generator = np.random.default_rng(13)
    found = [distances.kernel(generator.normal(size=(12, 4)), generator.normal(size=(15, 4))) for _ in range(300)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 300**0.5
    assert min(found) < 0


def test_pieces_of_the_pairs_add_up(monkeypatch):
    x, y = draw(40, seed=14), draw(37, seed=15)
    whole = distances.kernel(x, y)
    monkeypatch.setattr(distances, "_ROWS", 7)
    assert distances.kernel(x, y) == pytest.approx(whole, rel=1e-12)


def test_kernel_distance_of_a_point_is_that_of_many_equal_ones():
    x, y = draw(2, seed=16), draw(20, seed=17)
    expected = [distances.kernel(np.repeat(row[None], 5, axis=0), y) for row in x]
    np.testing.assert_allclose(distances.kernel_of_points(x, y), expected, rtol=1e-9)


@pytest.mark.parametrize("call, words", [
    (lambda: distances.frechet(draw(1), draw(5)), r"x must be 2 or more .*\(1, 6\)"),
    (lambda: distances.frechet(draw(5), draw(5, width=3)), "one width .* 6 and 3"),
    (lambda: distances.kernel(draw(5) * np.nan, draw(5)), "x holds NaN .* 5"),
    (lambda: distances.kernel(draw(5), np.ones((4, 6))), "no bandwidth"),
    (lambda: distances.frechet_infinity(draw(9), draw(5)), r"x must be 10 or more .*\(9, 6\)"),
    (lambda: distances.frechet(np.zeros(5), draw(5)), r"\(5,\)"),
])
def test_bad_sets_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
