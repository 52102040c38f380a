"""Least-squares fields: they find what they can express, and know how well."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, Uniform

from engine import Parameter, ParameterSpace
from engine.certificate.calibration import fit_law
from engine.certificate.draws import spread_theta
from engine.certificate.fields import (
    MeanField,
    VarianceField,
    fit_mean,
    fit_slope,
    fit_variance,
    pseudo_inverse,
)

sys.path.append(str(Path(__file__).parent))
from scored_laws import CurvedLaw, chi2

BOX = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(0.0, 4.0))])
MIXED = ParameterSpace([Parameter("a", Normal(1.0, 2.0)), Parameter("b", Normal(0.0, 1.0), bounds=(-1.0, 0.5))])
LINE = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0))])


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fractions(space, theta):
    """The coordinates in which fields are polynomials."""
    columns = [2.0 * torch.as_tensor(p.prior.cdf(theta[:, j].numpy(), *p.bounds)) - 1.0 for j, p in enumerate(space)]
    return torch.stack(columns, -1)


def cubic(space, theta):
    t, v = fractions(space, theta).unbind(-1)
    return torch.stack([0.3 - t + 0.5 * t * v.square(), 0.2 * v.pow(3) - 0.7 * t * v], -1)


@pytest.mark.parametrize("space", [BOX, MIXED], ids=["uniform", "normal and truncated"])
def test_a_polynomial_without_noise_is_found_to_rounding(space):
    theta, at = space.sample_prior(3000, 0), space.sample_prior(100, 7)
    for root in (None, torch.linalg.cholesky(torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()).expand(3000, 2, 2)):
        field = fit_mean(space, theta, cubic(space, theta), root)
        assert torch.allclose(field.at(at), cubic(space, at), atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_covariance_of_a_mean_is_that_of_repeated_fits(weighted):
    R, n = 150, 1500
    at = BOX.sample_prior(3, 5)
    mixing = torch.tensor([[1.0, 0.5], [0.0, 0.2]]).double()
    found = []
    for seed in range(R):
        theta = BOX.sample_prior(n, seed)
        scale = torch.exp(1.2 * theta[:, :1]) if weighted else torch.ones(n, 1).double()
        e = normal(10_000 + seed, n, 2) @ mixing * scale
        root = torch.linalg.cholesky(torch.linalg.inv(mixing.mT @ mixing)) / scale[..., None] if weighted else None
        field = fit_mean(BOX, theta, cubic(BOX, theta) + e, root, tried=[3])
        found.append(chi2(field.at(at) - cubic(BOX, at), field.error(at)))
    # χ² of 2 degrees at each point: its mean is known to 2/√R
    mean = torch.stack(found).mean(0)
    assert ((mean - 2.0).abs() < 4.0 * 2.0 / math.sqrt(R)).all(), mean


def test_weights_gain_what_the_theory_of_least_squares_says():
    # one constant, two halves of the simulations with sd 1 and 5: weighted 2/(1 + 1/25), equal weights (1 + 25)/2
    R, n = 400, 400
    plain, weighted = [], []
    for seed in range(R):
        theta = LINE.sample_prior(n, seed)
        sd = torch.where(torch.arange(n) % 2 == 0, 1.0, 5.0).double()
        u = (normal(20_000 + seed, n) * sd)[:, None]
        zero = torch.zeros(1, 1).double()
        plain.append(fit_mean(LINE, theta, u, tried=[0]).at(zero)[0, 0])
        weighted.append(fit_mean(LINE, theta, u, (1.0 / sd)[:, None, None], tried=[0]).at(zero)[0, 0])
    expected = (1.0 + 25.0) / 2.0 * (1.0 + 1.0 / 25.0) / 2.0
    ratio = float(torch.stack(plain).var() / torch.stack(weighted).var())
    assert abs(math.log(ratio / expected)) < 4.0 * 2.0 / math.sqrt(R)  # a ratio of two variances of R draws
    assert abs(float(torch.stack(weighted).var()) * n / (2.0 / (1.0 + 1.0 / 25.0)) - 1.0) < 4.0 * math.sqrt(2.0 / R)


def test_the_degree_is_no_higher_than_the_data_ask_for():
    chosen = []
    for seed in range(30):
        theta = LINE.sample_prior(2000, seed)
        u = 0.5 * theta.square() + normal(30_000 + seed, 2000, 1)
        chosen.append(fit_mean(LINE, theta, u).basis.degree)
    assert min(chosen) >= 2
    assert np.median(chosen) <= 4


@pytest.mark.parametrize("seed", range(3))
def test_a_variance_field_is_recovered_with_its_correlation(seed):
    law, space = CurvedLaw(), ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-1.0, 1.0))])
    theta = spread_theta(space, 30_000, seed, 0)
    e = (law.root(theta) @ normal(40_000 + seed, 30_000, 2, 1))[..., 0]
    at = space.sample_prior(200, 9)
    K, true = fit_variance(space, theta, e).at(at), law.root(at) @ law.root(at).mT
    relative = torch.linalg.solve_triangular(law.root(at), K - true, upper=False)
    relative = torch.linalg.solve_triangular(law.root(at), relative.mT, upper=False)
    # about 20 functions for each of 3 entries: √(2 · 20 / 30,000) = 0.037 on average, twice that at the corners
    assert float(relative.abs().mean()) < 0.04
    assert float(relative.abs().max()) < 0.25


@pytest.mark.parametrize("order", [2, 4])
def test_a_variance_that_is_even_in_theta_is_no_constant(order):
    # an odd degree gains nothing for it: a search that ends there would miss a factor of 4
    def true(theta):
        return 1.0 + 3.0 * (theta.square() if order == 2 else (2.0 * theta.square() - 1.0).square())

    at = torch.tensor([[0.0], [0.3826834], [0.7071068], [0.9238795]]).double()
    for seed in range(4):
        theta = spread_theta(LINE, 20_000, seed, 0)
        field = fit_variance(LINE, theta, true(theta).sqrt() * normal(50_000 + seed, 20_000, 1))
        assert (field.at(at)[:, 0] / true(at) - 1.0).abs().max() < 0.15  # 4 √(2 · 9 / 20,000) = 0.12, and its bias


def test_a_variance_field_rests_on_all_points_when_there_are_very_many_simulations():
    # simulations come round and round the same points: every k-th of them may be a few points only
    points = spread_theta(LINE, 512, 0, 0)
    theta = points.repeat(200, 1)
    assert len(theta) // 50_000 == 2
    sd = torch.exp(0.8 * torch.sin(3.0 * theta))
    alternating = torch.arange(len(theta)) % 512 % 2 == 0
    sd = torch.where(alternating[:, None], sd, 2.0 * sd)  # what the even points alone would say is wrong by 4
    field = fit_variance(LINE, theta, sd * normal(1, len(theta), 1))
    at = torch.linspace(-0.9, 0.9, 7).double()[:, None]
    assert (field.at(at)[:, 0] / (2.5 * torch.exp(1.6 * torch.sin(3.0 * at))) - 1.0).abs().max() < 0.25


def test_the_slope_of_pairs_is_the_derivative_of_the_mean_and_no_transpose():
    law = CurvedLaw()
    space = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-1.0, 1.0))])
    base = space.sample_prior(6000, 3)
    step = 0.1 * normal(60_000, 6000, 2)
    noise = 0.02 * normal(60_001, 6000, 2)
    difference = law.mean(base + step) - law.mean(base - step) + noise
    root = (torch.eye(2).double() / 0.02).expand(6000, 2, 2)
    field = fit_slope(space, base, step, -step, difference, root)
    at = space.sample_prior(300, 4)
    gap = field.at(at).reshape(-1, 2, 2) - law.slope(at)
    # 0.02/(2 · 0.1) for each pair, with some 20 functions: 0.1 √(20 / 6000) = 0.006; third derivatives: 0.9/2 · 0.03
    assert float(gap.abs().mean()) < 0.01
    assert float(gap.abs().max()) < 0.06


def test_the_quadratic_term_of_a_pair_that_lies_to_one_side_is_not_its_slope():
    base = LINE.sample_prior(4000, 0)
    first, second = 0.3 * normal(1, 4000, 1).abs(), 0.1 * normal(2, 4000, 1).abs()
    difference = 2.0 * (first - second) + 1.5 * (first.square() - second.square()) + 0.01 * normal(3, 4000, 1)
    field = fit_slope(LINE, base, first, second, difference, (torch.ones(1, 1).double() / 0.01).expand(4000, 1, 1))
    assert (field.at(torch.tensor([[0.0], [0.7]]).double()) - 2.0).abs().max() < 0.02


@pytest.mark.parametrize("power", [-8, -3, 5, 8])
def test_units_of_theta_do_not_change_the_answer(power):
    unit = 10.0**power
    here = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-1.0, 1.0))])
    there = ParameterSpace([Parameter("a", Uniform(-unit, unit)), Parameter("b", Uniform(-1.0, 1.0))])
    law, scale = CurvedLaw(), torch.tensor([unit, 1.0]).double()
    theta = here.sample_prior(4000, 1)
    u = law(theta, torch.Generator().manual_seed(5))
    at = here.sample_prior(5, 2)
    (mean, variance), (mean_u, variance_u) = fit_law(here, theta, u), fit_law(there, theta * scale, u / scale)
    assert torch.allclose(mean_u.at(at * scale) * scale, mean.at(at), rtol=1e-5, atol=1e-7)
    assert torch.allclose(variance_u.at(at * scale) * scale * scale[:, None], variance.at(at), rtol=1e-4, atol=1e-6)
    error = mean_u.error(at * scale) * scale * scale[:, None]
    assert torch.allclose(error, mean.error(at), rtol=1e-3, atol=1e-12)


def test_the_pseudo_inverse_leaves_out_what_is_singular_and_nothing_else():
    unit = torch.diag(torch.tensor([1e-9, 1.0, 1e7]).double())
    full = unit @ torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 3.0]]).double() @ unit
    plain = torch.linalg.inv(torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 3.0]]).double())
    assert torch.allclose(unit @ pseudo_inverse(full) @ unit, plain, rtol=1e-9)
    flat = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()
    assert torch.equal(pseudo_inverse(flat), flat)


def test_fields_come_back_from_plain_values():
    theta = BOX.sample_prior(2000, 0)
    mean, variance = fit_law(BOX, theta, normal(1, 2000, 2))
    at = BOX.sample_prior(10, 1)
    again, spread = MeanField.from_plain(BOX, mean.to_plain()), VarianceField.from_plain(BOX, variance.to_plain())
    assert torch.equal(again.at(at), mean.at(at))
    assert torch.equal(again.error(at), mean.error(at))
    assert torch.equal(spread.at(at), variance.at(at))
