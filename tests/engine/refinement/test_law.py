"""The law of a score beside a reference point, against closed forms."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Uniform

from engine import ModalityError, Parameter, ParameterSpace
from engine.certificate import calibrate
from engine.refinement.law import FieldLaws, SimulatedLaws

sys.path.append(str(Path(__file__).parents[1] / "certificate"))
from scored_laws import TRUE, WRONG, CurvedLaw, Family, LinearLaw, OwnNumbers, Quadratic, chi2, closed

BOX = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-2.0, 2.0))])
SQUARE = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-1.0, 1.0))])
REFERENCE, WIDTH = torch.tensor([0.13, -0.6]).double(), torch.tensor([0.3, 0.4]).double()


def law(modality, simulate, seed, *, space=BOX, reference=REFERENCE, width=WIDTH, n=2000):
    return SimulatedLaws("w", modality, simulate, space).laws(
        reference[None], torch.diag(width**2)[None], n, (seed, 1)
    )[0]


def slope_errors(law):
    """The standard error of each entry of ∂m/∂θ at the reference, (P, P)."""
    linear = [k for k in range(len(law.powers)) if int(law.powers[k].sum()) == 1]
    linear.sort(key=lambda k: int(law.powers[k].argmax()))
    inner = law.covariance.reshape(len(law.powers), 2, len(law.powers), 2)[linear][:, :, linear]
    return torch.einsum("kj,lj,kala->aj", law.frame, law.frame, inner).sqrt()


@pytest.mark.parametrize("own", [False, True], ids=["common numbers", "own numbers"])
def test_mean_slope_and_variance_scatter_about_the_closed_forms_as_they_say(own):
    R, beside = 120, REFERENCE + torch.tensor([0.1, -0.2])
    delta, A, K, _ = closed(WRONG, TRUE, REFERENCE[None])
    at, off, slopes, variances, V = [], [], [], [], None
    for seed in range(R):
        found = law(WRONG, OwnNumbers(TRUE, seed) if own else TRUE, seed)
        mean, slope, V = found.at(REFERENCE)
        at.append(chi2(mean - delta[0], V))
        mean, _, spread = found.at(beside)
        off.append(chi2(mean - delta[0] - A @ (beside - REFERENCE), spread))
        slopes.append((slope - A) / slope_errors(found) if own else slope - A)
        variances.append(found.variance)
    for chi in (at, off):
        assert abs(float(torch.stack(chi).mean()) - 2.0) < 4.0 * 2.0 / math.sqrt(R)
    if own:
        pulls = torch.stack(slopes)
        assert ((pulls.std(0) - 1.0).abs() < 4.0 / math.sqrt(2 * R)).all()
        assert (pulls.mean(0).abs() < 4.0 / math.sqrt(R)).all()
    else:  # what a linear simulator adds to both ends of a pair cancels
        assert torch.stack(slopes).abs().max() < 1e-6
    # K from the simulations near the reference: its mean to 1 %, its scatter √(2/1200)
    K_mean = torch.stack(variances).mean(0)
    assert (K_mean / K - 1.0).abs().max() < 0.02
    assert float((torch.stack(variances)[:, 0, 0] / K[0, 0]).std()) < 0.07
    # 1600 simulations for the mean, most of them close by: no worse than 1000 at the point
    assert float(torch.linalg.solve(K, V).trace()) / 2 < 1.0 / 1000
    assert float(torch.linalg.solve(K, V).trace()) / 2 > 1.0 / 1600


def test_a_law_that_bends_is_followed_and_its_slope_is_that_of_the_mean_score():
    simulate, scalar = CurvedLaw(), Family([[0.9, 0.1], [0.1, 1.2]], [0.05, -0.1])
    reference, width, R = torch.tensor([0.4, -0.3]).double(), torch.tensor([0.06, 0.06]).double(), 80
    delta = simulate.mean(reference) - reference @ scalar.normaliser - scalar.shift
    K = simulate.root(reference) @ simulate.root(reference).mT
    at, slopes, errors, variances = [], [], [], []
    for seed in range(R):
        found = law(scalar, simulate, seed, space=SQUARE, reference=reference, width=width)
        mean, slope, V = found.at(reference)
        at.append(chi2(mean - delta, V))
        errors.append(slope_errors(found))
        slopes.append(slope)
        variances.append(found.variance)
    assert abs(float(torch.stack(at).mean()) - 2.0) < 4.0 * 2.0 / math.sqrt(R)
    slopes, errors = torch.stack(slopes), torch.stack(errors)
    A = simulate.slope(reference)
    assert (A - A.mT).abs().max() > 0.1
    # the cubes that are left out: 0.45/2 · (2 · 0.06)² at most
    assert ((slopes.mean(0) - A).abs() < 4.0 * slopes.std(0) / math.sqrt(R) + 0.004).all()
    # unequal distances of the pairs have unequal errors where the spread of x depends on θ: within a quarter
    assert ((slopes.std(0) / errors.mean(0) - 1.0).abs() < 4.0 / math.sqrt(2 * R) + 0.25).all()
    assert (torch.stack(variances).mean(0) / K - 1.0).abs().max() < 0.03


def test_a_wide_law_has_cubes():
    scalar = Family([[0.9, 0.1], [0.1, 1.2]], [0.05, -0.1])
    reference = torch.tensor([0.1, -0.1]).double()
    found = law(
        scalar, CurvedLaw(), 3, space=SQUARE, reference=reference, width=torch.tensor([0.3, 0.3]).double(), n=20_000
    )
    assert int(found.powers.sum(-1).max()) == 3
    narrow = law(scalar, CurvedLaw(), 3, space=SQUARE, reference=reference, width=torch.tensor([0.03, 0.03]).double())
    assert int(narrow.powers.sum(-1).max()) == 2
    beside = reference + torch.tensor([0.25, -0.2])
    simulate = CurvedLaw()
    true = simulate.mean(beside) - reference @ scalar.normaliser - scalar.shift
    mean, slope, V = found.at(beside)
    assert float(chi2(mean - true, V)) < 18.4  # χ² of 2 degrees, 1e-4
    assert (slope - simulate.slope(beside)).abs().max() < 0.15


def test_the_slope_of_a_law_is_the_derivative_of_its_mean():
    found = law(Family(torch.eye(2), [0.0, 0.0]), CurvedLaw(), 1, space=SQUARE, width=torch.tensor([0.3, 0.2]).double())
    at = REFERENCE + torch.tensor([0.05, 0.1])
    h = 1e-6
    for j in range(2):
        e = h * torch.eye(2).double()[j]
        numeric = (found.at(at + e)[0] - found.at(at - e)[0]) / (2 * h)
        assert torch.allclose(found.at(at)[1][:, j], numeric, atol=1e-6)


def test_the_noise_of_the_slope_is_what_it_adds_to_the_information():
    weights = torch.tensor([[2.0, 0.3], [0.3, 1.0]]).double()
    at = REFERENCE + torch.tensor([0.05, -0.1])
    _, A, _, _ = closed(WRONG, TRUE, REFERENCE[None])
    more, noise = [], []
    for seed in range(120):
        found = law(WRONG, OwnNumbers(TRUE, seed), seed)
        slope = found.at(at)[1]
        gap = slope - A
        more.append(gap.mT @ weights @ gap)
        noise.append(found.slope_noise(at, weights))
    more, noise = torch.stack(more), torch.stack(noise).mean(0)
    assert ((more.mean(0) - noise).abs() < 4.0 * more.std(0) / math.sqrt(120)).all()
    assert float(noise[0, 0]) > 6.0 * float(more[:, 0, 0].std()) / math.sqrt(120)
    common = law(WRONG, TRUE, 0)
    assert common.slope_noise(REFERENCE, weights).abs().max() < 1e-6 * float(noise[0, 0])


@pytest.mark.parametrize("reference", [[1.0, -2.0], [-1.0, 0.5], [0.97, 1.95]])
def test_at_a_bound_simulations_stay_inside_and_the_slope_is_known_all_the_same(reference):
    reference, seen = torch.tensor(reference).double(), []

    def simulate(theta, generator):
        seen.append(theta)
        return TRUE(theta, generator)

    found = law(WRONG, simulate, 1, reference=reference)
    theta = torch.cat(seen)
    assert ((theta >= BOX.lower) & (theta <= BOX.upper)).all()
    delta, A, _, _ = closed(WRONG, TRUE, reference[None])
    mean, slope, V = found.at(reference)
    assert float(chi2(mean - delta[0], V)) < 18.4
    assert (slope - A).abs().max() < 1e-5


@pytest.mark.parametrize("power", [-7, 6])
def test_units_of_theta_do_not_change_the_law(power):
    unit = torch.tensor([10.0**power, 1.0]).double()
    there = ParameterSpace(
        [Parameter("a", Uniform(-float(unit[0]), float(unit[0]))), Parameter("b", Uniform(-2.0, 2.0))]
    )
    scaled = Quadratic(WRONG.design / unit, WRONG.metric, WRONG.offset)
    simulate = LinearLaw(TRUE.design / unit, TRUE.covariance)
    here = law(WRONG, OwnNumbers(TRUE, 3), 1)
    found = law(scaled, OwnNumbers(simulate, 3), 1, space=there, reference=REFERENCE * unit, width=WIDTH * unit)
    for one, other, size in zip(
        here.at(REFERENCE), found.at(REFERENCE * unit), (unit, unit * unit[:, None], unit * unit[:, None]), strict=True
    ):
        assert torch.allclose(other * size, one, rtol=1e-7, atol=1e-9)
    assert torch.allclose(found.variance * unit * unit[:, None], here.variance, rtol=1e-8)


def test_the_same_seed_gives_the_same_bits():
    first, second, other = law(WRONG, TRUE, 1), law(WRONG, TRUE, 1), law(WRONG, TRUE, 2)
    assert torch.equal(first.coefficients, second.coefficients)
    assert torch.equal(first.covariance, second.covariance)
    assert not torch.equal(first.coefficients, other.coefficients)


def test_a_score_without_variance_is_refused_by_the_plugins_name():
    blind = Quadratic([[1.0, 1.0], [0.5, 0.5]], torch.eye(2), torch.zeros(2))
    simulate = LinearLaw([[1.0, 0.0], [0.0, 1.0]], torch.eye(2))
    with pytest.raises(
        ModalityError, match=r"plugin 'w': the scores of 1600 simulations at θ = \(0.13, -0.6\) have no variance"
    ):
        law(blind, simulate, 1)

    def off(theta, generator):
        raise ValueError("off")

    with pytest.raises(ModalityError, match="plugin 'w': the simulator raised ValueError: off"):
        law(WRONG, off, 1)


def test_draws_that_are_no_observations_are_left_out_of_both_ends_of_a_pair():
    def leaky(theta, generator):
        x = TRUE(theta, generator)
        return torch.where(torch.rand(len(theta), 1, generator=generator) < 0.05, torch.nan, x)

    laws = SimulatedLaws("w", WRONG, leaky, BOX)
    found = laws.laws(REFERENCE[None], torch.diag(WIDTH**2)[None], 4000, (1, 1))[0]
    assert abs(laws.excluded - 200) < 5 * math.sqrt(200)
    assert found.simulations < 4000
    delta, A, _, _ = closed(WRONG, TRUE, REFERENCE[None])
    mean, slope, V = found.at(REFERENCE)
    assert float(chi2(mean - delta[0], V)) < 18.4
    assert (slope - A).abs().max() < 1e-5


def test_the_law_of_a_calibrated_scalar_is_its_fields():
    calibrated = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=3000, seed=1)
    points = BOX.sample_prior(4, 1)
    found = FieldLaws(calibrated).laws(points, torch.eye(2).double().expand(4, 2, 2), 0, (0,))
    for at, one, mean, slope, K, V in zip(points, found, *calibrated.calibration.at(points), strict=True):
        m, A, spread = one.at(at)
        assert torch.equal(m, mean)
        assert torch.allclose(A, slope, atol=1e-12)
        assert torch.equal(spread, V)
        assert torch.equal(one.variance, K)
        beside = at + torch.tensor([0.01, 0.02])
        assert torch.allclose(one.at(beside)[0], mean + slope @ (beside - at), atol=1e-12)
