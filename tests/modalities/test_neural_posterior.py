"""A posterior less its prior: normalised for every family, right up to the edges of a box, and for priors that vary."""

import math

import pytest
import torch
from torch.distributions import (
    Beta,
    Cauchy,
    Exponential,
    Gamma,
    HalfCauchy,
    HalfNormal,
    Laplace,
    LogNormal,
    Normal,
    StudentT,
    Uniform,
)
from torch.distributions import Categorical as CategoricalLaw

from engine.constraints import Simplex
from engine.errors import ModalityError
from engine.learning import fit
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from engine.plugin import read_plugin, write_plugin
from modalities import NeuralPosterior
from modalities._flows import log_normal_mass
from modalities._prior import PriorCoordinates, prior_blocks

pytestmark = pytest.mark.usefixtures("seeded")
PRIORS = {
    "uniform": Parameter("t", Uniform(2.0, 3.0)),
    "flat": Parameter("t", bounds=(-2.0, 3.0)),
    "normal": Parameter("t", Normal(5.0, 2.0)),
    "truncated normal": Parameter("t", Normal(5.0, 2.0), bounds=(4.5, math.inf)),
    "half-normal": Parameter("t", HalfNormal(3.0)),
    "exponential": Parameter("t", Exponential(0.5)),
    "log-normal": Parameter("t", LogNormal(0.5, 0.4)),
    "truncated log-normal": Parameter("t", LogNormal(0.5, 0.4), bounds=(0.5, 4.0)),
    "gamma": Parameter("t", Gamma(3.0, 2.0)),
    "beta": Parameter("t", Beta(2.0, 3.0)),
    "laplace": Parameter("t", Laplace(1.0, 0.5)),
    "student": Parameter("t", StudentT(4.0, 1.0, 0.5)),
    "cauchy": Parameter("t", Cauchy(1.0, 0.5)),
    "half-cauchy": Parameter("t", HalfCauchy(0.5)),
}


def grid_of(parameter, n=4001):
    low, high = parameter.bounds
    if parameter.prior is not None:
        low, high = (parameter.prior.quantile(u, low, high) for u in (1e-5, 1 - 1e-5))
    return torch.linspace(low, high, n, dtype=torch.float64)


@pytest.mark.parametrize("name", PRIORS)
def test_evidence_times_prior_is_a_density_of_theta(name):
    """q = e^s π integrates to 1 whatever the weights, so that all constants and Jacobians are there."""
    parameter = PRIORS[name]
    posterior = NeuralPosterior(("t",), (2,), prior=[parameter], hidden=(8,), components=3).double()
    grid = grid_of(parameter, 40_001)
    if "cauchy" in name:  # the mixture's tails are those of Gaussians
        grid = torch.linspace(max(-60.0, parameter.bounds[0]), 60.0, 200_001, dtype=torch.float64)
    density = (posterior(torch.tensor([0.3, -1.0]).double(), grid[:, None]) + parameter.log_prior(grid)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("name", PRIORS)
def test_its_own_prior_density_is_that_of_the_engine(name):
    parameter = PRIORS[name]
    prior = PriorCoordinates(prior_blocks([parameter], ("t",)))
    theta = grid_of(parameter, 101)[1:-1, None]
    found = prior.log_prior(prior.to_z(theta)) + prior.log_slope(theta)
    torch.testing.assert_close(found, parameter.log_prior(theta[:, 0]), rtol=1e-9, atol=1e-9)


def test_two_parameters_integrate_to_one_over_a_box():
    prior = [Parameter("a", Uniform(0.0, 1.0)), Parameter("b", Uniform(-3.0, 3.0))]
    posterior = NeuralPosterior(("a", "b"), (2,), prior=prior, hidden=(8,), components=3).double()
    a, b = torch.linspace(0, 1, 401).double(), torch.linspace(-3, 3, 401).double()
    density = posterior(torch.zeros(2).double(), torch.cartesian_prod(a, b)).exp().reshape(401, 401) / 6.0
    assert torch.trapezoid(torch.trapezoid(density, b), a).item() == pytest.approx(1.0, abs=1e-4)


CASES = {
    "box": (Parameter("t", Uniform(0.0, 1.0)), 0.25, (0.0, 1.0)),
    "normal": (Parameter("t", Normal(1.0, 0.5)), 0.4, (0.0, 2.0)),
    "gamma": (Parameter("t", Gamma(3.0, 2.0)), 0.5, (0.3, 3.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_it_learns_the_likelihood_up_to_a_constant_of_x_for_uniform_and_other_priors(train, case):
    """x = θ + σ ε. s − log N(x; θ, σ²) must not vary with θ, over the whole box with its edges."""
    parameter, sd, (low, high) = CASES[case]
    theta = ParameterSpace([parameter]).sample_prior(10_000, seed=1).float()
    x = theta + sd * torch.randn(theta.shape)
    posterior = NeuralPosterior(("t",), (1,), prior=[parameter], hidden=(32,), components=4)
    train(posterior, theta, x, epochs=25, rate=5e-3)
    grid = torch.linspace(low, high, 41)[:, None]
    for seen in (low + 0.1 * (high - low), 0.5 * (low + high), low + 0.9 * (high - low)):
        exact = Normal(grid[:, 0], sd).log_prob(torch.tensor(seen))
        near = exact > exact.max() - 3.0
        error = (posterior(torch.tensor([seen]), grid) - exact)[near]
        assert float(error.std()) < 0.12
        assert float((error - error.mean()).abs().max()) < 0.35


def test_it_is_smooth_at_the_edges_of_the_box_and_goes_on_beyond():
    posterior = NeuralPosterior(("t",), (1,), prior=[PRIORS["uniform"]], hidden=(8,)).double()
    theta = torch.tensor([[2.0], [2.0 + 1e-6], [3.0], [3.0 + 1e-6], [2.5]], dtype=torch.float64).requires_grad_()
    s = posterior(torch.tensor([0.4]).double(), theta)
    (score,) = torch.autograd.grad(s.sum(), theta, create_graph=True)
    (second,) = torch.autograd.grad(score.sum(), theta)
    assert bool(torch.isfinite(torch.stack([s, score[:, 0], second[:, 0]])).all())
    torch.testing.assert_close(second[0], second[1], rtol=1e-3, atol=1e-3)


def test_where_the_prior_has_no_value_it_is_impossible():
    posterior = NeuralPosterior(("t",), (1,), prior=[PRIORS["gamma"]], hidden=(8,))
    theta = torch.tensor([[-1.0], [0.0], [0.5]]).requires_grad_()
    s = posterior(torch.tensor([0.4]), theta)
    assert torch.isfinite(s).tolist() == [False, False, True]
    (score,) = torch.autograd.grad(s[2], theta)
    assert bool(torch.isfinite(score).all())


def test_the_prior_comes_from_training_and_is_kept_with_the_plugin(tmp_path):
    posterior = NeuralPosterior(("b", "a"), (1,), hidden=(8,))
    theta, x = torch.rand(50, 2), torch.randn(50, 1)
    with pytest.raises(ModalityError, match="must know the prior that it is trained on, got none"):
        posterior.standardise(x, theta)
    space = ParameterSpace(
        [Parameter("a", Uniform(0.0, 1.0)), Parameter("c"), Parameter("b", Beta(2.0, 2.0), unit="m")]
    )
    posterior.training_prior = space
    posterior.standardise(x, theta)
    assert [block["name"] for block in posterior.configuration["prior"]] == ["b", "a"]
    write_plugin(tmp_path / "p", posterior)
    again = read_plugin(tmp_path / "p")
    assert torch.equal(posterior.eval()(x, theta), again(x, theta))
    with pytest.raises(ModalityError, match=r"must lie within the training prior, got 2 for 'a' in row 0"):
        posterior.standardise(x[:2], torch.tensor([[0.5, 2.0], [0.5, 0.5]]))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([Parameter("t")], "needs a proper prior, got .* or two finite bounds"),
        ([Parameter("u", Normal(0.0, 1.0))], "none for 't' among u"),
        ([Parameter("t", CategoricalLaw(torch.ones(3)))], "needs continuous parameters, got 't'"),
        (
            ParameterSpace([Parameter("t"), Parameter("u")], [Simplex(["t", "u"])]),
            "got the equality .* among its parameters",
        ),
        (Normal(0.0, 1.0), "prior must be a ParameterSpace or a sequence of Parameter, got Normal"),
    ],
)
def test_a_prior_without_a_density_is_refused(prior, message):
    with pytest.raises(ModalityError, match=message):
        NeuralPosterior(("t",), (1,), prior=prior)


def test_the_mass_of_a_normal_in_an_interval_is_exact_far_out_and_twice_differentiable():
    low = torch.tensor([-1.0, 5.0, -30.0, -0.001], dtype=torch.float64)
    high = torch.tensor([2.0, 6.0, -25.0, 0.001], dtype=torch.float64)
    x = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, 20_001).double()
    expected = torch.trapezoid(Normal(0.0, 1.0).log_prob(x).exp(), x).log()
    torch.testing.assert_close(log_normal_mass(low, high), expected, rtol=1e-6, atol=1e-6)
    args = (low.clone().requires_grad_(), high.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(log_normal_mass, args)
    for dtype in (torch.float32, torch.float64):  # log Φ(b) ≈ −b² / 2 − log(−b): slope −b − 1 / b, second −1 + 1 / b²
        b = torch.tensor([-20.0, -300.0, -1e5], dtype=dtype).requires_grad_()
        (slope,) = torch.autograd.grad(log_normal_mass(b - 1e6, b).sum(), b, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), b)
        torch.testing.assert_close(slope.detach(), (-b - 1.0 / b).detach(), rtol=1e-3, atol=0.0)
        torch.testing.assert_close(second, (-1.0 + 1.0 / b.square()).detach(), rtol=2e-2, atol=0.0)


def test_fit_gives_it_the_prior_and_an_error_takes_it_back():
    posterior = NeuralPosterior(("t",), (1,), hidden=(8,), prior=[PRIORS["beta"]])
    prior = ParameterSpace([Parameter("u"), Parameter("t", Uniform(0.0, 1.0))])

    def simulate(theta, generator):
        return theta + 0.2 * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)

    def broken(theta, generator):
        return torch.full_like(theta, math.nan)

    with pytest.raises(ModalityError):
        fit(posterior, prior=prior, simulate=broken, simulations=1000)
    assert posterior.configuration["prior"][0]["prior"]["distribution"] == "Beta"
    fit(posterior, prior=prior, simulate=simulate, simulations=2000, epochs=10, learning_rate=0.01)
    assert posterior.configuration["prior"][0]["prior"]["distribution"] == "Uniform"
    theta = torch.linspace(0.0, 1.0, 501, dtype=torch.float64)[:, None]
    density = posterior(torch.tensor([0.1], dtype=torch.float64), theta).exp()
    assert torch.trapezoid(density, theta[:, 0]).item() == pytest.approx(1.0, abs=1e-3)
    assert density.argmax() < 150  # near 0.1, not near 0.9
