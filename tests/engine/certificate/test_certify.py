"""Certificates: what a right scalar gets, what each kind of wrong one gets, and that neither is a matter of luck."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import Normal, Uniform

from engine import ModalityError, Parameter, ParameterError, ParameterSpace
from engine.certificate import calibrate, certify

sys.path.append(str(Path(__file__).parent))
from scored_laws import (
    TRUE,
    WRONG,
    CurvedLaw,
    Family,
    LinearLaw,
    Network,
    Quadratic,
    Shape,
    Wave,
    chi2,
    closed,
    unit_normal,
)

BOX = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-2.0, 2.0))])
LINE = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0))])
POINTS = torch.tensor([[0.0, 0.0], [0.6, -1.2], [-0.8, 1.5], [0.9, -1.9]]).double()


def check(certificate, name):
    (found,) = [c for c in certificate.checks if c.name == name]
    return found


def p_value(found):
    return float(re.search(r"p = ([\d.e-]+)", found.note)[1])


def rate(scalar, law, theta):
    delta, _, K, _ = closed(scalar, law, theta)
    return chi2(delta, K)


# -- a right scalar ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right():
    """Certificates of the true log-likelihood of 2 parameters from different simulations."""
    return [certify(TRUE.exact(), prior=BOX, simulate=TRUE, simulations=1500, seed=seed) for seed in range(20)]


def test_a_true_log_likelihood_passes_and_false_alarms_are_rare(right):
    assert all(c.passed for c in right)
    noted = [c.name for certificate in right for c in certificate.checks if c.verdict == "noted"]
    # 6 tests of 20 certificates, each at 3 standard errors or 1e-3: 0.2 expected of the second identity
    assert len(noted) <= 3, noted
    assert sum(c.sandwich for c in right) <= 3


def test_its_p_values_are_uniform_and_its_ratio_scatters_as_it_says(right):
    p = [p_value(check(c, "first Bartlett identity")) for c in right]
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    ratio = [check(c, "second Bartlett identity") for c in right]
    pulls = torch.tensor([(r.value - r.expected) / r.error for r in ratio])
    assert abs(float(pulls.mean())) < 4.0 / math.sqrt(20)
    assert abs(float(pulls.std()) - 1.0) < 4.0 / math.sqrt(40)
    excess = torch.tensor([c.excess / c.excess_error for c in right])
    assert abs(float(excess.mean())) < 4.0 / math.sqrt(20)
    assert abs(float(excess.std()) - 1.0) < 4.0 / math.sqrt(40) + 0.2  # seven points, and a field, of each
    ranks = [c.value for certificate in right for c in certificate.checks if c.name.startswith(("SBC", "expected"))]
    p = stats.kstwo.sf(ranks, 300)
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_its_budget_is_what_so_many_simulations_can_certify():
    sizes = []
    for n in (2000, 20_000):
        c = certify(TRUE.exact(), prior=BOX, simulate=TRUE, simulations=n, seed=1)
        assert 0.2 * c.limit() < c.n_max() <= c.limit()
        assert c.limit() < 0.09 * n / 2.0  # κ² n / P
        assert c.limit(kappa=0.6) == pytest.approx(4.0 * c.limit(), rel=1e-12)
        sizes.append(c.limit())
    assert 2.0 < sizes[1] / sizes[0] < 30.0


def test_a_density_that_bends_passes_too():
    law = CurvedLaw()

    class Curved(Family):
        def log_evidence(self, x, theta):
            root = law.root(theta)
            z = torch.linalg.solve_triangular(root, (x - law.mean(theta))[..., None], upper=False)[..., 0]
            return -0.5 * z.square().sum(-1) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    space = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Normal(0.0, 0.5))])
    c = certify(Curved(torch.eye(2), [0.0, 0.0]), prior=space, simulate=law, simulations=20_000, seed=3)
    assert c.passed
    assert not [one for one in c.checks if one.verdict == "noted"]
    assert not c.sandwich
    # J and K are Fisher's information here, A too
    at = space.sample_prior(100, 1)
    relative = torch.linalg.solve(c.variance.at(at), c.information.at(at).reshape(-1, 2, 2)) - torch.eye(2)
    assert float(relative.abs().mean()) < 0.1  # √(2 · 28 functions / 20,000) = 0.05 on average


# -- a wrong mean -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong():
    return certify(WRONG, prior=BOX, simulate=TRUE, simulations=40_000, seed=2)


def test_the_budget_of_a_wrong_scalar_is_its_closed_form(wrong):
    assert check(wrong, "first Bartlett identity").verdict == "noted"
    true = rate(WRONG, TRUE, POINTS)
    assert (true > 0.02).any()
    assert (true[0] != true).sum() == 3
    error, K = wrong.mean.error(POINTS), closed(WRONG, TRUE, POINTS)[2]
    noise = torch.linalg.solve(K.expand(4, 2, 2), error).diagonal(dim1=-2, dim2=-1).sum(-1)
    slack = 4.0 * 2.0 * (true * noise / 2.0).sqrt() + 4.0 * noise + 0.05 * true  # of |δ̂|², and of K
    assert ((wrong.rate(POINTS) - true).abs() < slack).all()
    assert (slack < 0.45 * true).sum() >= 2
    for theta, r in zip(POINTS, wrong.rate(POINTS), strict=True):
        assert wrong.n_max(0.3, theta) == pytest.approx(0.09 / float(r), rel=1e-12)
        assert wrong.n_max(0.6, theta) == pytest.approx(0.36 / float(r), rel=1e-12)
        assert wrong.n_max(0.3, dict(zip("ab", theta.tolist(), strict=True))) == wrong.n_max(0.3, theta)


def test_its_fields_are_the_closed_forms(wrong):
    delta, _, K, J = closed(WRONG, TRUE, POINTS)
    assert (chi2(wrong.mean.at(POINTS) - delta, wrong.mean.error(POINTS)) < 18.4).all()  # χ² of 2 degrees, 1e-4
    assert (wrong.variance.at(POINTS) / K - 1.0).abs().max() < 0.25
    assert torch.allclose(wrong.information.at(POINTS).reshape(-1, 2, 2), J.expand(4, 2, 2), atol=1e-9)
    ratio = check(wrong, "second Bartlett identity")
    exact = float(torch.linalg.solve(K, J).trace()) / 2.0
    assert abs(ratio.value - exact) < 4.0 * ratio.error + 0.01
    assert ratio.verdict == "noted"
    assert wrong.sandwich


def test_the_median_over_the_prior_is_that_of_the_closed_form(wrong):
    theta = BOX.sample_prior(4000, 9)
    true = float(torch.quantile(0.09 / rate(WRONG, TRUE, theta), 0.5))
    assert wrong.n_max() == pytest.approx(true, rel=0.15)
    low, middle, high = wrong.quantiles()
    assert low < middle < high
    assert middle == wrong.n_max()
    expected = torch.quantile(0.09 / rate(WRONG, TRUE, theta), torch.tensor([0.05]).double())
    assert low == pytest.approx(float(expected), rel=0.15)


def test_a_mean_that_no_polynomial_holds_is_an_excess():
    height = 0.3
    for seed in range(2):
        c = certify(Wave(height, 40.0), prior=LINE, simulate=unit_normal, simulations=20_000, seed=seed)
        assert c.excess > 10.0 * c.excess_error
        assert check(c, "first Bartlett identity").verdict == "noted"
        # E δ² = ε²/2, of which the field takes a part at the points and the excess the rest; K is 1, plus it
        at = LINE.sample_prior(5000, seed)
        assert float(c.mean.at(at).square().mean()) + c.excess == pytest.approx(height**2 / 2, rel=0.35)
        assert c.n_max() == pytest.approx(0.09 / (height**2 / 2), rel=0.5)
        assert float(c.rate(at).min()) >= c.excess
    smooth = certify(Wave(0.0, 40.0), prior=LINE, simulate=unit_normal, simulations=20_000, seed=0)
    assert smooth.excess < 4.0 * smooth.excess_error
    assert smooth.n_max() > 20.0 * c.n_max()


# -- wrong curvature --------------------------------------------------------------------------------------


def shape(kind, factor=1.0, **settings):
    return certify(Shape(kind, factor), prior=LINE, simulate=unit_normal, simulations=8000, seed=3, **settings)


def test_a_scalar_with_its_sign_flipped_fails_by_the_second_identity_alone():
    c = shape("normal", -1.0)
    second = check(c, "second Bartlett identity")
    assert second.verdict == "failed"
    assert second.value == pytest.approx(-1.0, abs=4.0 * second.error)
    assert check(c, "first Bartlett identity").verdict == "passed"
    assert not c.passed
    assert second in c.failures


@pytest.mark.parametrize(
    ("factor", "verdict"), [(0.15, "failed"), (0.5, "noted"), (1.0, "passed"), (2.0, "noted"), (6.0, "failed")]
)
def test_a_scalar_times_a_factor_has_the_inverse_factor_in_its_second_identity(factor, verdict):
    c = shape("normal", factor)
    second = check(c, "second Bartlett identity")
    assert second.value == pytest.approx(1.0 / factor, abs=4.0 * second.error)
    assert second.error < 0.03 / factor
    assert second.verdict == verdict
    assert c.sandwich == (factor != 1.0)
    # δ is 0 whatever the factor: N_max does not see it
    assert check(c, "first Bartlett identity").verdict == "passed"


def test_an_overconfident_scalar_fails_coverage_at_a_material_distance():
    c = shape("normal", 4.0)
    failed = {one.name: one for one in c.failures}
    assert "expected coverage (TARP)" in failed
    assert failed["expected coverage (TARP)"].value > 0.1
    assert failed["expected coverage (TARP)"].value > 3.0 * failed["expected coverage (TARP)"].error
    for one in shape("normal").checks:
        if one.name.startswith(("SBC", "expected")):
            assert one.verdict == "passed"


def test_coverage_that_draws_from_the_prior_cannot_tell_is_not_checked():
    narrow = LinearLaw([[1.0]], [[1e-8]])
    c = certify(narrow.exact(("a",)), prior=LINE, simulate=narrow, simulations=2000, seed=1)
    found = check(c, "coverage")
    assert found.verdict == "not checked"
    assert "too few to rank" in found.note


def test_a_network_of_relu_has_no_curvature_and_a_smooth_one_has():
    torch.manual_seed(0)

    def network(activation):
        net = nn.Sequential(nn.Linear(2, 32), activation, nn.Linear(32, 1)).double()
        return certify(Network(net), prior=LINE, simulate=unit_normal, simulations=4000, seed=1)

    flat, smooth = network(nn.ReLU()), network(nn.Tanh())
    assert check(flat, "curvature").verdict == "noted"
    assert "second derivatives of the scalar are all zero" in check(flat, "curvature").note
    assert not flat.curvature
    assert check(smooth, "curvature").verdict == "passed"
    assert smooth.curvature


def test_a_derivative_that_jumps_is_fine_and_a_score_that_jumps_is_noted():
    huber, stairs = shape("huber"), shape("stairs")
    assert check(huber, "curvature").verdict == "passed"
    found = check(stairs, "curvature")
    assert found.verdict == "noted"
    # −∇²s is 0.04 where it is defined, its mean slope 1.04: the gap of 1 in units of K ≈ 1
    assert found.value == pytest.approx(1.0, abs=0.25)
    assert not stairs.curvature
    # Huber's score of a standard normal: K = E min(z², 1) and J = P(|z| < 1), Fisher's information having no part in it
    inside = 2.0 * stats.norm.cdf(1.0) - 1.0
    K = inside - 2.0 * stats.norm.pdf(1.0) + 1.0 - inside
    second = check(huber, "second Bartlett identity")
    assert second.value == pytest.approx(inside / K, abs=4.0 * second.error)
    assert second.verdict == "noted"


def test_the_normalisation_of_a_ratio_is_its_mean_over_independent_pairs():
    found = check(shape("ratio"), "normalisation")
    assert found.verdict == "passed"
    assert found.value == pytest.approx(1.0, abs=4.0 * found.error)
    assert found.error < 0.02
    found = check(shape("ratio", 1.3), "normalisation")
    assert found.verdict == "noted"
    assert found.value == pytest.approx(math.exp(0.3), abs=4.0 * found.error)
    assert check(shape("normal"), "normalisation").verdict == "not checked"


# -- labelled pairs ---------------------------------------------------------------------------------------


def pairs(n, seed, space=BOX, law=TRUE):
    theta = space.sample_prior(n, seed)
    return theta, law(theta, torch.Generator().manual_seed(seed + 1000))


def test_pairs_give_the_same_fields_and_say_what_they_cannot_tell():
    c = certify(WRONG, prior=BOX, pairs=pairs(20_000, 5), seed=1)
    assert (c.source, c.simulations, c.excluded) == ("pairs", 20_000, 0)
    assert math.isnan(c.excess)
    assert math.isnan(c.excess_error)
    assert "what the field leaves out was not checked" in check(c, "first Bartlett identity").note
    assert check(c, "first Bartlett identity").verdict == "noted"
    delta, _, _, J = closed(WRONG, TRUE, POINTS)
    assert (chi2(c.mean.at(POINTS) - delta, c.mean.error(POINTS)) < 18.4).all()
    assert torch.allclose(c.information.at(POINTS).reshape(-1, 2, 2), J.expand(4, 2, 2), atol=1e-9)
    true = float(torch.quantile(0.09 / rate(WRONG, TRUE, BOX.sample_prior(4000, 9)), 0.5))
    assert c.n_max() == pytest.approx(true, rel=0.2)
    assert {one.name for one in c.checks} >= {"SBC of a", "SBC of b", "expected coverage (TARP)"}


def test_pairs_of_a_true_log_likelihood_pass_with_uniform_p_values():
    found = [certify(TRUE.exact(), prior=BOX, pairs=pairs(1500, seed), seed=seed) for seed in range(10)]
    assert all(c.passed for c in found)
    p = [p_value(check(c, "first Bartlett identity")) for c in found]
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_pairs_that_are_sorted_are_no_other_pairs():
    theta, x = pairs(4000, 3)
    order = theta[:, 0].argsort()
    c = certify(TRUE.exact(), prior=BOX, pairs=(theta[order], x[order]), seed=1)
    assert c.passed
    assert all(one.verdict == "passed" for one in c.checks if one.name.startswith(("SBC", "expected")))
    outside = [c.domain.outside(TRUE.exact(), part)[0] for part in x.split(100)]
    assert not any(outside)


def test_pairs_that_cannot_be_used_are_refused_and_rows_with_nan_counted():
    theta, x = pairs(3000, 5)
    spoiled = x.clone()
    spoiled[:30, 1] = torch.nan
    theta_nan = theta.clone()
    theta_nan[30:40, 0] = torch.inf
    c = certify(WRONG, prior=BOX, pairs=(theta_nan, spoiled), seed=1)
    assert (c.simulations, c.excluded) == (2960, 40)
    far = theta.clone()
    far[7, 1] = 2.5
    with pytest.raises(ModalityError, match=r"inside the prior, got \[.*, 2.5\] in row 7 and 1 such rows"):
        certify(WRONG, prior=BOX, pairs=(far, x))
    with pytest.raises(ModalityError, match=r"theta \(n, 2\) and x \(n, 3\), got \(3000, 2\) and \(3000, 2\)"):
        certify(WRONG, prior=BOX, pairs=(theta, x[:, :2]))
    with pytest.raises(ModalityError, match="at least 1200 pairs, got 1000"):
        certify(WRONG, prior=BOX, pairs=(theta[:1000], x[:1000]))
    with pytest.raises(ModalityError, match="a simulator or pairs, got both"):
        certify(WRONG, prior=BOX, pairs=(theta, x), simulate=TRUE)


# -- calibrated scalars -----------------------------------------------------------------------------------


def test_the_certificate_of_a_calibrated_scalar_is_about_what_calibration_left():
    calibrated = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=8000, seed=1)
    c = certify(calibrated, prior=BOX, simulate=TRUE, simulations=40_000, seed=2)
    raw = certify(WRONG, prior=BOX, simulate=TRUE, simulations=4000, seed=2)
    assert c.calibrated
    assert not raw.calibrated
    left = closed(WRONG, TRUE, POINTS)[0] - calibrated.calibration.mean.at(POINTS)
    assert (chi2(c.mean.at(POINTS) - left, c.mean.error(POINTS)) < 18.4).all()
    assert c.n_max() > 20.0 * raw.n_max()
    assert not c.sandwich
    looked_at = {one.name for one in c.checks if one.verdict != "not checked"}
    assert looked_at == {"first Bartlett identity", "curvature"}
    assert {one.name for one in c.checks} - looked_at == {"normalisation", "coverage by SBC and TARP"}


# -- input ------------------------------------------------------------------------------------------------


def test_simulations_that_are_no_observations_are_counted_and_left_out():
    def leaky(theta, generator):
        x = TRUE(theta, generator)
        return torch.where(torch.rand(len(theta), 1, generator=generator) < 0.01, torch.nan, x)

    c = certify(WRONG, prior=BOX, simulate=leaky, simulations=10_000, seed=2)
    assert abs(c.excluded - 100) < 50
    assert c.simulations + c.excluded == 10_000
    delta = closed(WRONG, TRUE, POINTS)[0]
    assert (chi2(c.mean.at(POINTS) - delta, c.mean.error(POINTS)) < 18.4).all()
    assert "more were no observations" in str(c)


def test_what_cannot_be_certified_is_refused():
    with pytest.raises(ModalityError, match="at least 1200 simulations, got 100"):
        certify(WRONG, prior=BOX, simulate=TRUE, simulations=100)
    with pytest.raises(ModalityError, match="no simulator of its own"):
        certify(WRONG, prior=BOX)
    with pytest.raises(ModalityError, match=r"NaN or infinite values in 1000 of 1000 draws"):
        certify(WRONG, prior=BOX, simulate=lambda theta, _: torch.full((len(theta), 3), torch.inf), simulations=2000)
    flat = ParameterSpace([Parameter("a"), Parameter("b", Uniform(-2.0, 2.0))])
    with pytest.raises(ParameterError, match="'a' must have a continuous prior"):
        certify(WRONG, prior=flat, simulate=TRUE, simulations=2000)


def test_a_simulator_that_always_says_the_same_is_certified_for_nothing():
    # δ = 1 − θ and no variance at all: one observation is too many
    c = certify(Shape(), prior=LINE, simulate=lambda theta, _: torch.ones_like(theta), simulations=2000, seed=1)
    assert c.n_max() < 1e-6
    assert not c.passed
    assert c.domain.outside(Shape(), torch.tensor([[1.0], [1.0]])) == (False, "")
    outside, why = c.domain.outside(Shape(), torch.tensor([[1.0], [1.3]]))
    assert outside
    assert why == "observation 1 differs in feature 0, which is the same in all training simulations"


def test_kappa_and_theta_of_a_budget_are_checked(wrong):
    for kappa in (0.0, -1.0, math.nan):
        with pytest.raises(ParameterError, match="kappa must be positive"):
            wrong.n_max(kappa)
    for theta in (torch.zeros(3), torch.tensor([0.0, math.nan]), torch.zeros(2, 2)):
        with pytest.raises(ParameterError):
            wrong.n_max(0.3, theta)


def test_the_seed_decides():
    first, second, other = (certify(WRONG, prior=BOX, simulate=TRUE, simulations=1500, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.mean.coefficients, second.mean.coefficients)
    assert first.checks == second.checks
    assert not torch.equal(first.mean.coefficients, other.mean.coefficients)


def test_a_certificate_in_words_has_its_budget_and_every_check(wrong):
    text = str(wrong)
    assert text.startswith("certificate of the raw scalar of a, b, from 40000 simulations")
    assert f"carries {wrong.n_max():.3g} observations" in text
    for one in wrong.checks:
        assert one.name in text
        assert one.verdict in text


def test_very_many_simulations_at_few_points_still_measure_j_at_all_points():
    law = LinearLaw([[1.0], [0.4]], [[1.0, 0.2], [0.2, 1.0]])
    scalar = Quadratic([[1.1], [0.3]], torch.eye(2), [0.0, 0.1], parameter_names=("a",))
    c = certify(scalar, prior=LINE, simulate=law, simulations=100_000, seed=1)
    assert c.simulations == 100_000
    J = float(closed(scalar, law, torch.zeros(1, 1).double())[3])
    assert torch.allclose(c.information.at(LINE.sample_prior(50, 1)), torch.tensor(J).double(), atol=1e-9)
