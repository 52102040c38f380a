"""Smooth densities of weighted points: areas and heights of closed forms, and nothing beyond a limit."""

import math

import numpy as np
import pytest

from engine.report.density import curve, height, surface


def _gaussian(rho, n, seed=0):
    z = np.random.default_rng(seed).standard_normal((n, 2))
    return z @ np.linalg.cholesky([[1.0, rho], [rho, 1.0]]).T


def _area(found, level):
    edge = height(found.f, level)
    return float((found.f >= edge).sum() * (found.x[1] - found.x[0]) * (found.y[1] - found.y[0]))


@pytest.mark.parametrize("rho", [0.0, 0.8, -0.97])
def test_regions_of_a_gaussian_have_their_areas(rho):
    found = surface(_gaussian(rho, 4000), np.ones(4000), (-np.inf, -np.inf), (np.inf, np.inf))
    for level in (0.68, 0.95):
        exact = -2.0 * math.log(1.0 - level) * math.pi * math.sqrt(1.0 - rho**2)
        assert _area(found, level) == pytest.approx(exact, rel=0.05)


def test_weights_count_as_often_as_they_say():
    wide = 2.0 * _gaussian(0.0, 20_000)
    weights = np.exp(-0.5 * (wide**2).sum(1) * (1.0 - 0.25))  # N(0, 2) to N(0, 1)
    found = surface(wide, weights, (-np.inf, -np.inf), (np.inf, np.inf))
    assert _area(found, 0.68) == pytest.approx(-2.0 * math.log(0.32) * math.pi, rel=0.05)


def test_a_density_that_is_highest_at_a_limit_stays_so_and_does_not_pass_it():
    values = np.abs(np.random.default_rng(1).standard_normal(8000))
    found = curve(values, np.ones(8000), 0.0, np.inf)
    assert found.x[0] >= 0.0
    assert found.f[0] == pytest.approx(math.sqrt(2.0 / math.pi), rel=0.05)  # the half-normal at zero
    assert float(found.f.sum() * (found.x[1] - found.x[0])) == pytest.approx(1.0)
    flat = curve(np.random.default_rng(2).uniform(2.0, 3.0, 8000), np.ones(8000), 2.0, 3.0)
    assert flat.x[0] >= 2.0
    assert flat.x[-1] <= 3.0
    assert flat.f == pytest.approx(np.ones_like(flat.f), rel=0.15)


def test_fractions_have_no_mass_where_they_would_sum_to_more_than_all():
    points = np.random.default_rng(3).dirichlet([1.0, 1.0, 1.0], 8000)[:, :2]
    found = surface(points, np.ones(8000), (0.0, 0.0), (1.0, 1.0), lambda x, y: x + y <= 1.0)
    x, y = np.meshgrid(found.x, found.y)
    assert (found.f[x + y > 1.0] == 0.0).all()
    inside = found.f[x + y < 0.999]
    assert np.quantile(inside, [0.05, 0.95]) == pytest.approx([2.0, 2.0], rel=0.2)  # flat, up to the edge


def test_points_that_are_all_the_same_have_no_density():
    with pytest.raises(ValueError, match="points that differ"):
        curve(np.ones(10), np.ones(10), 0.0, 2.0)
