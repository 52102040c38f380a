"""Calibration against scalars whose δ, A and K are closed forms."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Beta, LogNormal, Normal, Uniform

from engine import Modality, ModalityError, Parameter, ParameterError, ParameterSpace
from engine.certificate import Calibrated, calibrate
from engine.certificate.draws import paired_theta, reflected, spread_theta
from engine.plugin import read_plugin, write_plugin

sys.path.append(str(Path(__file__).parent))
from scored_laws import TRUE, WRONG, CurvedLaw, Family, LinearLaw, Quadratic, Shape, chi2, closed, unit_normal

BOX = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-2.0, 2.0))])
SQUARE = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-1.0, 1.0))])
LINE = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0))])
PRIORS = {
    "uniform": BOX,
    "normal": ParameterSpace([Parameter("a", Normal(0.3, 0.5)), Parameter("b", Normal(-1.0, 1.0))]),
    "truncated": ParameterSpace(
        [Parameter("a", Normal(0.0, 1.0), bounds=(-0.5, 1.5)), Parameter("b", Normal(0.0, 2.0), bounds=(-1.0, 1.0))]
    ),
    "skewed": ParameterSpace([Parameter("a", LogNormal(0.0, 0.5)), Parameter("b", Beta(2.0, 5.0))]),
}


def test_repeated_calibrations_scatter_about_the_true_mean_score_as_they_say():
    law = LinearLaw([[1.0], [0.5]], [[1.0, 0.3], [0.3, 2.0]])
    scalar = Quadratic([[0.8], [0.7]], [[1.0, 0.1], [0.1, 0.6]], [0.1, -0.2], parameter_names=("a",))
    R, at = 50, torch.tensor([[0.3], [0.97], [-0.6]]).double()
    true, found = closed(scalar, law, at)[0], []
    for seed in range(R):
        mean, _, _, V = calibrate(scalar, prior=LINE, simulate=law, simulations=1500, seed=seed).calibration.at(at)
        found.append(chi2(mean - true, V))
    mean = torch.stack(found).mean(0)
    # χ² of 1 degree, although the same simulations choose the degree of the polynomial
    assert ((mean - 1.0).abs() < 4.0 * math.sqrt(2.0 / R)).all(), mean


def test_the_covariance_of_the_mean_score_falls_as_one_over_the_simulations():
    at = torch.tensor([[0.3, -0.5]]).double()
    K = closed(WRONG, TRUE, at)[2]
    size = []
    for n in (3000, 12_000):
        calibration = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=n, seed=5).calibration
        functions = len(calibration.mean.basis)
        V = calibration.at(at)[3][0]
        # between K/n times 1 and times the number of functions, 80 % of the simulations being at θ itself
        size.append(float((V @ torch.linalg.inv(K)).trace() / 2 * 0.8 * n))
        assert 0.8 < size[-1] < 1.5 * functions
    assert 0.3 < size[0] / size[1] < 3.0


@pytest.mark.parametrize("name", PRIORS)
def test_the_slope_and_the_variance_of_a_wrong_linear_scalar_are_the_closed_forms(name):
    space = PRIORS[name]
    calibration = calibrate(WRONG, prior=space, simulate=TRUE, simulations=20_000, seed=3).calibration
    at = space.sample_prior(200, 8)
    mean, slope, K, V = calibration.at(at)
    delta, A, variance, J = closed(WRONG, TRUE, at)
    assert (slope - A).abs().max() < 1e-6  # the noise of a linear simulator cancels in a pair
    assert (A - A.mT).abs().max() > 0.3  # so that a transpose would show
    assert (A - J).abs().min() > 0.02  # and J in its place too
    relative = (K - variance) @ torch.linalg.inv(variance)
    assert float(relative.abs().mean()) < 4.0 * math.sqrt(2.0 * 6 / 16_000)
    assert float(chi2(mean - delta, V).median()) < 12.0  # one draw of it all over the prior


def test_fields_that_bend_are_followed_over_the_prior():
    law, scalar = CurvedLaw(), Family([[0.9, 0.1], [0.1, 1.2]], [0.05, -0.1])
    calibration = calibrate(scalar, prior=SQUARE, simulate=law, simulations=40_000, seed=1).calibration
    at = SQUARE.sample_prior(400, 3)
    mean, slope, K, V = calibration.at(at)
    delta = law.mean(at) - at @ scalar.normaliser - scalar.shift
    variance = law.root(at) @ law.root(at).mT
    pull = chi2(mean - delta, V)
    assert float(pull.mean()) < 2.0 + 4.0 * 2.0 / math.sqrt(10)  # about ten independent numbers in the field
    # what is left of the noise of a pair is about 0.3 of its distance: 0.3 √(6 functions / 4000 pairs) = 0.012
    assert float((slope - law.slope(at)).abs().mean()) < 0.02
    assert float((slope - law.slope(at)).abs().max()) < 0.15
    relative = torch.linalg.solve(variance, K - variance)
    assert float(relative.abs().mean()) < 0.03


def test_a_simulator_that_draws_its_own_random_numbers_is_calibrated_too():
    # nothing cancels in its pairs: the slope has the noise of √2 scores at a distance of half a scale
    own = torch.Generator().manual_seed(77)
    calibration = calibrate(
        WRONG, prior=BOX, simulate=lambda theta, _: TRUE(theta, own), simulations=20_000, seed=1
    ).calibration
    at = torch.tensor([[0.0, 0.0], [0.5, -1.0]]).double()
    _, A, _, _ = closed(WRONG, TRUE, at)
    gap = (calibration.at(at)[1] - A).abs()
    # scale 0.68 and 1.36, step a quarter, 2000 pairs: √(2 · 1.5)/(2 · 0.17 √2000) = 0.11 for a constant
    assert float(gap.max()) < 4.0 * 0.11
    assert float(gap.max()) > 1e-6


def test_only_the_parameters_of_the_modality_take_part_in_its_own_order():
    wide = ParameterSpace([Parameter("c", Normal(0.0, 1.0)), Parameter("b", Uniform(-2.0, 2.0)), *list(BOX)[:1]])
    calibrated = calibrate(WRONG, prior=wide, simulate=TRUE, simulations=3000, seed=1)
    assert calibrated.calibration.space.names == ("a", "b")
    again = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=3000, seed=1)
    assert torch.equal(calibrated.calibration.mean.coefficients, again.calibration.mean.coefficients)


def test_the_seed_decides_and_nothing_else_does():
    torch.manual_seed(1)
    first = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=3000, seed=4).calibration
    torch.manual_seed(2)
    second = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=3000, seed=4).calibration
    other = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=3000, seed=5).calibration
    for field in ("mean", "slope", "variance"):
        same = [getattr(c, field).coefficients for c in (first, second)]
        assert torch.equal(*same)
    assert not torch.equal(first.mean.coefficients, other.mean.coefficients)


def test_a_calibrated_modality_keeps_the_raw_scalar_and_takes_the_mean_score_off():
    calibrated = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=20_000, seed=2)
    theta = BOX.sample_prior(4000, 3)
    x = TRUE(theta, torch.Generator().manual_seed(1))
    assert torch.equal(calibrated(x, theta), WRONG(x, theta))
    assert calibrated.learned
    assert (calibrated.parameter_names, calibrated.event_shape) == (WRONG.parameter_names, WRONG.event_shape)
    u = calibrated.calibrated_score(x, theta)
    raw = (x - theta @ WRONG.design.mT - WRONG.offset) @ WRONG.linear.mT
    assert torch.allclose(u, raw - calibrated.calibration.mean.at(theta), atol=1e-12)
    sd = closed(WRONG, TRUE, theta)[2].diagonal().sqrt() / math.sqrt(4000)
    assert (u.mean(0).abs() < 5.0 * sd).all()
    assert (raw.mean(0).abs() > 5.0 * sd).any()


def test_calibrating_again_starts_from_the_learned_scalar():
    once = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=3000, seed=4)
    twice = calibrate(once, prior=BOX, simulate=TRUE, simulations=3000, seed=4)
    assert isinstance(twice.modality, Quadratic)
    assert torch.equal(once.calibration.mean.coefficients, twice.calibration.mean.coefficients)


def test_calibrating_leaves_the_modality_alone():
    before = {key: t.clone() for key, t in WRONG.state_dict().items()}
    calibrated = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=3000, seed=4)
    calibrated.modality.offset.add_(1.0)
    assert all(torch.equal(t, before[key]) for key, t in WRONG.state_dict().items())
    assert not hasattr(WRONG, "training_prior")


@pytest.mark.parametrize("name", PRIORS)
def test_a_folder_gives_the_same_fields_and_prior_back(tmp_path, name):
    space = PRIORS[name]
    calibrated = calibrate(WRONG, prior=space, simulate=TRUE, simulations=3000, seed=4)
    write_plugin(tmp_path / "p", calibrated)
    again = read_plugin(tmp_path / "p", trust=True)
    assert isinstance(again, Calibrated)
    assert again.training_prior == space
    at = space.sample_prior(50, 1)
    for a, b in zip(calibrated.calibration.at(at), again.calibration.at(at), strict=True):
        assert torch.equal(a, b)
    x = TRUE(at, torch.Generator().manual_seed(1))
    assert torch.equal(again(x, at), calibrated(x, at))
    assert (again.calibration.simulations, again.calibration.excluded, again.calibration.seed) == (3000, 0, 4)


def test_a_calibrated_modality_without_its_prior_says_so():
    calibrated = Calibrated(
        Shape(), calibrate(Shape(), prior=LINE, simulate=unit_normal, simulations=1000).calibration.to_plain()
    )
    with pytest.raises(ModalityError, match="needs its training_prior"):
        _ = calibrated.calibration


class WithSimulator(Shape):
    def simulate(self, theta, generator=None):
        return unit_normal(theta, generator)


def test_a_modalitys_own_simulator_is_used_and_passed_on():
    calibrated = calibrate(WithSimulator(), prior=LINE, simulations=1000, seed=1)
    assert calibrated.has_simulator
    theta = torch.zeros(5, 1).double()
    g = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(calibrated.simulate(theta, g[0]), unit_normal(theta, g[1]))
    with pytest.raises(ModalityError, match="no simulator of its own"):
        calibrate(Shape(), prior=LINE)
    assert not calibrate(Shape(), prior=LINE, simulate=unit_normal, simulations=1000).has_simulator


def test_one_percent_of_draws_that_are_no_observations_are_counted_and_left_out():
    def leaky(theta, generator):
        x = TRUE(theta, generator)
        lost = torch.rand(len(theta), generator=generator) < 0.01
        return torch.where(lost[:, None], torch.nan, x)

    calibration = calibrate(WRONG, prior=BOX, simulate=leaky, simulations=20_000, seed=2).calibration
    assert abs(calibration.excluded - 200) < 5 * math.sqrt(200)
    at = torch.tensor([[0.3, -0.5]]).double()
    mean, slope, _, V = calibration.at(at)
    delta, A, _, _ = closed(WRONG, TRUE, at)
    assert float(chi2(mean - delta, V)) < 18.4  # χ² of 2 degrees, 1e-4
    assert (slope - A).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["raises", "nan", "shape", "text", "complex"])
def test_a_simulator_that_is_none_stops_with_what_it_did(kind):
    def broken(theta, generator):
        if kind == "raises":
            raise RuntimeError("the detector is off")
        x = TRUE(theta, generator)
        if kind == "nan":
            return torch.where(torch.rand(len(theta), 1, generator=generator) < 0.6, torch.nan, x)
        return {"shape": x[:, :2], "text": "x", "complex": x.to(torch.complex128)}[kind]

    message = {
        "raises": "the simulator raised RuntimeError: the detector is off, for 1000 θ, the first of them",
        "nan": r"returned NaN or infinite values in \d+ of 1000 draws, first at θ = \(",
        "shape": r"must return a real tensor of shape \(n, \*event_shape\) = \(1000, 3\)",
        "text": "got str",
        "complex": "got torch.complex128",
    }[kind]
    with pytest.raises(ModalityError, match=message):
        calibrate(WRONG, prior=BOX, simulate=broken, simulations=3000)


def test_a_simulator_that_works_in_place_does_not_change_what_it_was_asked_for():
    def in_place(theta, generator):
        x = unit_normal(theta, generator)
        theta.zero_()
        return x

    calibration = calibrate(Shape(), prior=LINE, simulate=in_place, simulations=20_000, seed=2).calibration
    assert (calibration.at(torch.tensor([[0.8]]).double())[0]).abs() < 0.1


class Detached(Modality):
    learned = True

    def __init__(self, parameter_names=("a",)):
        super().__init__(parameter_names, event_shape=(1,))

    def log_evidence(self, x, theta):
        return -x[..., 0].square() + 0.0 * theta[..., 0].detach()


class Infinite(Detached):
    def log_evidence(self, x, theta):
        root = (theta[..., 0] - 0.3).sqrt()
        return -torch.where(theta[..., 0] > 0.3, root, 0.0) * x[..., 0]  # the derivative of what was not taken is NaN


def test_a_scalar_without_a_score_stops_with_its_name():
    with pytest.raises(ModalityError, match="Detached does not depend on θ"):
        calibrate(Detached(), prior=LINE, simulate=unit_normal, simulations=1000)
    with pytest.raises(
        ModalityError, match=r"the score of Infinite is not finite for \d+ of \d+ pairs, first at θ = \("
    ):
        calibrate(Infinite(), prior=LINE, simulate=unit_normal, simulations=1000)


def test_too_few_simulations_and_parameters_without_a_prior_are_refused():
    with pytest.raises(ModalityError, match="at least 1200 simulations, got 1000"):
        calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=1000)
    flat = ParameterSpace([Parameter("a", bounds=(-1.0, 1.0)), Parameter("b", Uniform(-2.0, 2.0))])
    with pytest.raises(ParameterError, match="'a' must have a continuous prior"):
        calibrate(WRONG, prior=flat, simulate=TRUE, simulations=3000)


def test_thetas_fill_the_prior_with_half_of_them_dense_at_its_edges():
    theta = spread_theta(LINE, 40_000, 3)
    assert (theta.abs() <= 1.0).all()
    edge = float((theta.abs() > 0.98).double().mean())
    # uniform: 0.02; arcsine: 2/π arccos 0.98 = 0.1276
    expected = 0.5 * 0.02 + 0.5 * 2.0 / math.pi * math.acos(0.98)
    assert abs(edge - expected) < 5.0 * math.sqrt(expected / 40_000)
    plain = spread_theta(LINE, 40_000, 3, edges=False)
    assert abs(float((plain.abs() > 0.98).double().mean()) - 0.02) < 5.0 * math.sqrt(0.02 / 40_000)


def test_what_leaves_the_prior_is_folded_back_and_a_pair_at_its_edge_stays_a_pair():
    theta = torch.tensor([[1.3, 0.0], [-1.2, 3.5], [0.2, 0.3]]).double()
    assert torch.allclose(reflected(theta, BOX), torch.tensor([[0.7, 0.0], [-0.8, 0.5], [0.2, 0.3]]).double())
    step = torch.tensor([[0.2, -0.5], [5.0, 0.1]]).double()
    first, second = paired_theta(torch.tensor([1.0, -2.0]).double(), step, BOX)
    assert torch.allclose(first, torch.tensor([[1.0, -2.0], [1.0, -1.8]]).double())
    assert torch.allclose(second, torch.tensor([[0.6, -1.0], [-1.0, -2.0]]).double())
    open_ = ParameterSpace([Parameter("a", Normal(0.0, 1.0)), Parameter("b", LogNormal(0.0, 1.0))])
    first, second = paired_theta(torch.tensor([0.0, 0.1]).double(), torch.tensor([[3.0, 0.4]]).double(), open_)
    assert torch.allclose(first, torch.tensor([[3.0, 0.8]]).double())
    assert torch.allclose(second, torch.tensor([[-3.0, 0.0]]).double())


def test_a_linear_law_has_the_moments_that_the_closed_forms_take_for_granted():
    law = LinearLaw([[1.0, 0.5], [0.0, 2.0]], [[1.0, 0.6], [0.6, 2.0]])
    scalar = Quadratic([[0.8, 0.0], [0.3, 1.5]], [[1.0, 0.2], [0.2, 0.5]], [0.1, -0.2], factor=1.7)
    theta = torch.tensor([0.4, -0.9]).double()
    x = law(theta.expand(200_000, 2), torch.Generator().manual_seed(0))
    leaf = theta.expand(200_000, 2).clone().requires_grad_()
    (u,) = torch.autograd.grad(scalar(x, leaf).sum(), leaf)
    delta, _, K, _ = closed(scalar, law, theta[None])
    assert ((u.mean(0) - delta[0]).abs() < 5.0 * (K.diagonal() / 200_000).sqrt()).all()
    assert (torch.cov(u.T) / K - 1.0).abs().max() < 5.0 * math.sqrt(2.0 / 200_000) * 2.0
