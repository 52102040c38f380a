"""The maximum of the sum agrees with closed forms, scipy and iminuit, and its status says what it is."""

import json
import math

import iminuit
import numpy as np
import pytest
import scipy.optimize
import torch
from torch.distributions import Categorical as Index
from torch.distributions import Normal, Uniform

from engine import (
    EstimateError,
    Evidence,
    Modality,
    ModalityError,
    Parameter,
    ParameterError,
    ParameterSpace,
    Status,
)
from engine.estimate import estimate
from modalities import Categorical, Constraint, Gaussian, PoissonCounts


class Surface(Modality):
    """s(x; θ) = function(θ): an objective with no data to speak of."""

    def __init__(self, function, parameter_names, event_shape=()):
        super().__init__(parameter_names=parameter_names, event_shape=event_shape)
        self.function = function

    def log_evidence(self, x, theta):
        return self.function(theta) + 0.0 * x


def surface(function, parameters, prior=False, **options):
    space = ParameterSpace(parameters)
    evidence = Evidence(space, {"s": Surface(function, space.names)}, {"s": [0.0]}, prior=prior)
    return estimate(evidence, **options)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- agreement with closed forms and other minimisers


def test_weighted_mean_of_three_plugins_is_the_closed_form():
    sd = {"a": 0.5, "b": 2.0, "c": 3.0}
    data = {n: 1.0 + s * normals(4, 1, seed=i) for i, (n, s) in enumerate(sd.items())}
    modalities = {n: Gaussian(parameter_names=("mu",), sd=s) for n, s in sd.items()}
    fit = estimate(Evidence(ParameterSpace([Parameter("mu", unit="m")]), modalities, data))
    weight = {n: 4 / s**2 for n, s in sd.items()}
    total = sum(weight.values())
    assert fit["mu"].value == pytest.approx(sum(weight[n] * float(data[n].mean()) for n in sd) / total, rel=1e-12)
    assert fit["mu"].error == pytest.approx(total**-0.5, rel=1e-12)
    assert fit["mu"].unit == "m"
    assert fit.status is Status.CONVERGED
    assert {n: float(c.information[0, 0]) for n, c in fit.contributions.items()} == pytest.approx(weight, rel=1e-12)
    assert sum(c.log_evidence for c in fit.contributions.values()) == pytest.approx(fit.log_evidence, rel=1e-12)


class Decay(Modality):
    """Counts of an exponential decay on a flat background, n_i ~ Poisson(A exp(−t_i / τ) + b)."""

    def __init__(self, times):
        super().__init__(parameter_names=("A", "tau", "b"), event_shape=(len(times),))
        self.register_buffer("times", torch.as_tensor(times, dtype=torch.float64))

    def log_evidence(self, x, theta):
        A, tau, b = theta[..., :1], theta[..., 1:2], theta[..., 2:]
        rate = A * torch.exp(-self.times / tau) + b
        return (x.xlogy(rate) - rate).sum(-1)


def decay():
    times = np.linspace(0.0, 10.0, 25)
    counts = np.random.default_rng(3).poisson(80.0 * np.exp(-times / 1.7) + 4.0).astype(float)
    space = ParameterSpace(
        [
            Parameter("A", prior=Uniform(1.0, 1000.0)),
            Parameter("tau", prior=Uniform(0.05, 20.0)),
            Parameter("b", prior=Uniform(0.01, 50.0)),
        ]
    )
    evidence = Evidence(space, {"decay": Decay(times)}, {"decay": counts[None]})

    def cost(A, tau, b):
        rate = A * np.exp(-times / tau) + b
        return float(np.sum(rate - counts * np.log(rate)))

    return evidence, cost, times, counts


def test_nonlinear_poisson_fit_solves_the_score_equations_that_scipy_solves():
    evidence, _, times, counts = decay()
    fit = estimate(evidence)

    def score(theta):
        A, tau, b = theta
        decayed = np.exp(-times / tau)
        pull = counts / (A * decayed + b) - 1.0
        return np.array([np.sum(pull * decayed), np.sum(pull * A * decayed * times / tau**2), np.sum(pull)])

    found = scipy.optimize.root(score, [70.0, 2.0, 5.0], tol=1e-14)
    assert found.success
    assert fit.theta.tolist() == pytest.approx(found.x.tolist(), rel=1e-8)


def test_nonlinear_poisson_fit_has_the_errors_correlations_and_intervals_of_iminuit():
    evidence, cost, *_ = decay()
    fit = estimate(evidence)
    minuit = iminuit.Minuit(cost, A=70.0, tau=2.0, b=5.0)
    minuit.errordef, minuit.strategy, minuit.tol = iminuit.Minuit.LIKELIHOOD, 2, 1e-6
    minuit.migrad()
    minuit.hesse()
    assert minuit.valid
    assert fit.theta.tolist() == pytest.approx(list(minuit.values), rel=1e-5)
    assert fit.sd.tolist() == pytest.approx(list(minuit.errors), rel=2e-4)  # its second derivatives are numerical
    assert np.allclose(fit.correlation.numpy(), np.array(minuit.covariance.correlation()), atol=3e-4)
    minuit.minos()
    for name, ends in fit.intervals(level=0.682689492137).items():
        low, high = fit[name].value + minuit.merrors[name].lower, fit[name].value + minuit.merrors[name].upper
        assert tuple(ends) == pytest.approx((low, high), abs=2e-3 * fit[name].error)


def test_a_logistic_regression_is_that_of_scipy():
    x = normals(200, 3, seed=5)
    y = (
        torch.rand(200, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        < torch.sigmoid(x @ torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64))
    ).double()

    class Logistic(Modality):
        def __init__(self):
            super().__init__(parameter_names=("a", "b", "c"), event_shape=(4,))

        def log_evidence(self, x, theta):
            logit = (x[..., :3] * theta).sum(-1)
            return x[..., 3] * logit - torch.nn.functional.softplus(logit)

    space = ParameterSpace([Parameter(n) for n in "abc"])
    fit = estimate(Evidence(space, {"m": Logistic()}, {"m": torch.cat([x, y[:, None]], 1)}))
    X, t = x.numpy(), y.numpy()

    def newton(w):  # iteratively reweighted least squares, written out
        for _ in range(50):
            p = 1.0 / (1.0 + np.exp(-X @ w))
            w = w + np.linalg.solve(X.T @ ((p * (1 - p))[:, None] * X), X.T @ (t - p))
        return w

    w = newton(np.zeros(3))
    p = 1.0 / (1.0 + np.exp(-X @ w))
    assert fit.theta.tolist() == pytest.approx(w.tolist(), rel=1e-8)
    assert np.allclose(fit.covariance.numpy(), np.linalg.inv(X.T @ ((p * (1 - p))[:, None] * X)), rtol=1e-7)


@pytest.mark.parametrize("start", [None, {"x": -1.2, "y": 1.0}, {"x": 30.0, "y": -300.0}])
def test_rosenbrock_s_valley_is_followed_to_its_end(start):
    fit = surface(
        lambda t: -((1.0 - t[..., 0]) ** 2) - 100.0 * (t[..., 1] - t[..., 0] ** 2) ** 2,
        [Parameter("x", bounds=(-50.0, 50.0)), Parameter("y", bounds=(-500.0, 500.0))],
        start=start,
    )
    assert fit.status == "converged"
    assert fit.theta.tolist() == pytest.approx([1.0, 1.0], rel=1e-8)
    hessian = np.array([[802.0, -400.0], [-400.0, 200.0]])  # Rosenbrock's at (1, 1)
    assert np.allclose(fit.covariance.numpy(), np.linalg.inv(hessian), rtol=1e-6)


def test_rosenbrock_in_ten_dimensions_is_followed_to_its_end():
    def chain(t):
        return -(100.0 * (t[..., 1:] - t[..., :-1] ** 2) ** 2 + (1.0 - t[..., :-1]) ** 2).sum(-1)

    fit = surface(chain, [Parameter(f"x{i}", bounds=(-5.0, 10.0)) for i in range(10)])
    assert fit.status in ("converged", "multimodal")  # there is a second minimum of 3.99 near (−1, 1, ..., 1)
    assert fit.theta.tolist() == pytest.approx([1.0] * 10, rel=1e-7)


def test_a_start_on_the_top_of_a_saddle_leaves_it():
    """−(x² − 1)² − y²: the origin is stationary, the maxima are (±1, 0)."""
    fit = surface(
        lambda t: -((t[..., 0] ** 2 - 1.0) ** 2) - t[..., 1] ** 2,
        [Parameter("x", bounds=(-3.0, 3.0)), Parameter("y", bounds=(-3.0, 3.0))],
        start={"x": 0.0, "y": 0.0},
        polish=1,
    )
    assert abs(fit["x"].value) == pytest.approx(1.0, rel=1e-8)
    assert fit["y"].value == pytest.approx(0.0, abs=1e-8)
    assert fit["x"].error == pytest.approx(8**-0.5, rel=1e-7)  # −∂² of (x² − 1)² at 1 is 8


def test_a_start_in_a_region_of_upward_curvature_still_reaches_the_maximum():
    """Cauchy: upward curved beyond ±1 of its centre."""
    fit = surface(lambda t: -torch.log1p((t[..., 0] - 3.0) ** 2), [Parameter("x")], start={"x": 40.0}, polish=1)
    assert fit.status == "converged"
    assert (fit["x"].value, fit["x"].error) == (pytest.approx(3.0, abs=1e-8), pytest.approx(2**-0.5, rel=1e-8))


def test_parameters_of_size_1e_9_and_1e9_are_fitted_together():
    """y = a t + b t² with a ~ 1e-9 and b ~ 1e9 in units of which t makes comparable data."""
    scale = torch.tensor([1e-9, 1e9, 1.0], dtype=torch.float64)
    base = normals(40, 3, seed=8)
    truth = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    y = base @ truth + 0.1 * normals(40, seed=9)
    design = base / scale  # columns of 1e9 and 1e-9

    modality = Gaussian(
        lambda t, X: t @ X.mT, parameter_names=("a", "b", "c"), sd=0.1, inputs={"X": design}, event_shape=(40,)
    )
    space = ParameterSpace(
        [Parameter(n, bounds=(-100 * s, 100 * s)) for n, s in zip("abc", scale.tolist(), strict=True)]
    )
    fit = estimate(Evidence(space, {"m": modality}, {"m": y[None]}))
    solution = torch.linalg.lstsq(base, y).solution
    inverse = torch.linalg.inv(base.mT @ base) * 0.01
    assert fit.status == "converged"
    assert (fit.theta / scale).tolist() == pytest.approx(solution.tolist(), rel=1e-9)
    assert (fit.sd / scale).tolist() == pytest.approx(inverse.diagonal().sqrt().tolist(), rel=1e-9)
    sd = inverse.diagonal().sqrt()
    assert torch.allclose(fit.correlation, inverse / (sd[:, None] * sd), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_nonlinear_fit_is_equivariant_under_a_change_of_unit(scale):
    """Poisson counts with strength in units of ``scale``: θ̂ and its error scale along, S does not move."""
    modality = PoissonCounts(signal=[5.0 / scale, 9.0 / scale], background=[50.0, 40.0])
    space = ParameterSpace([Parameter("mu", bounds=(-3.0 * scale, 30.0 * scale))])
    fit = estimate(Evidence(space, {"m": modality}, {"m": [[57.0, 49.0], [52.0, 55.0]]}))
    n = np.array([109.0, 104.0])

    def score(mu):
        rate = mu * np.array([5.0, 9.0]) + np.array([50.0, 40.0])
        return float(((n / rate - 2.0) * np.array([5.0, 9.0])).sum())

    mu = scipy.optimize.brentq(score, 0.0, 10.0, xtol=1e-15, rtol=1e-15)
    rate = mu * np.array([5.0, 9.0]) + np.array([50.0, 40.0])
    information = float((n * np.array([5.0, 9.0]) ** 2 / rate**2).sum())
    assert fit["mu"].value / scale == pytest.approx(mu, rel=1e-8)
    assert fit["mu"].error / scale == pytest.approx(information**-0.5, rel=1e-8)


def test_a_linear_model_with_thirty_parameters_is_least_squares():
    X, P = normals(100, 30, seed=11), 30
    y = X @ torch.linspace(-1, 1, P, dtype=torch.float64) + normals(100, seed=12)
    names = tuple(f"w{i}" for i in range(P))
    modality = Gaussian(lambda t, X: t @ X.mT, parameter_names=names, sd=1.0, inputs={"X": X}, event_shape=(100,))
    fit = estimate(Evidence(ParameterSpace([Parameter(n) for n in names]), {"m": modality}, {"m": y[None]}))
    assert torch.allclose(fit.theta, torch.linalg.lstsq(X, y).solution, rtol=1e-9, atol=1e-12)
    assert torch.allclose(fit.covariance, torch.linalg.inv(X.mT @ X), rtol=1e-8, atol=1e-12)


# ---- bounds


def test_two_bounds_hold_and_the_rest_is_the_constrained_least_squares_of_scipy():
    X = normals(60, 5, seed=13)
    y = X @ torch.tensor([-1.0, 0.3, 2.0, -0.4, 1.5], dtype=torch.float64) + 0.3 * normals(60, seed=14)
    names = tuple(f"w{i}" for i in range(5))
    modality = Gaussian(lambda t, X: t @ X.mT, parameter_names=names, sd=0.3, inputs={"X": X}, event_shape=(60,))
    space = ParameterSpace([Parameter(n, bounds=(0.0, 1.0)) for n in names])
    fit = estimate(Evidence(space, {"m": modality}, {"m": y[None]}))
    found = scipy.optimize.lsq_linear(X.numpy(), y.numpy(), bounds=(0.0, 1.0), method="bvls", tol=1e-15)
    assert fit.status == "at_bound"
    assert fit.theta.tolist() == pytest.approx(found.x.tolist(), abs=1e-9)
    sides = {names[i]: "lower" if found.active_mask[i] < 0 else "upper" for i in range(5) if found.active_mask[i]}
    assert dict(fit.bounds) == sides
    assert len(sides) >= 3
    free = [i for i, n in enumerate(names) if n not in sides]
    expected = torch.zeros(5, 5, dtype=torch.float64)
    block = torch.linalg.inv((X[:, free].mT @ X[:, free]) / 0.09)
    for a, i in enumerate(free):
        for b, j in enumerate(free):
            expected[i, j] = block[a, b]
    assert torch.allclose(fit.covariance, expected, rtol=1e-9, atol=1e-15)


def test_no_counts_at_all_put_the_strength_on_its_lower_bound():
    modality = PoissonCounts(signal=[2.0], strength="mu")
    fit = estimate(Evidence(ParameterSpace([Parameter("mu", bounds=(0.0, 50.0))]), {"m": modality}, {"m": [[0.0]]}))
    assert (str(fit.status), fit["mu"].value, fit["mu"].bound, fit["mu"].error) == ("at_bound", 0.0, "lower", 0.0)
    assert fit.interval("mu", level=0.682689492137) == (0.0, pytest.approx(0.25, abs=1e-6))  # 2 · 2 mu = 1


def test_a_maximum_exactly_on_a_bound_is_not_held_by_it():
    """Nothing pushes: the multiplier is zero, and the covariance is the full one."""
    fit = surface(lambda t: -0.5 * t[..., 0] ** 2, [Parameter("a", bounds=(0.0, 4.0))])
    assert fit["a"].value == pytest.approx(0.0, abs=1e-8)
    assert fit.converged
    if not fit.bounds:
        assert fit["a"].error == pytest.approx(1.0, rel=1e-9)


def test_an_evidence_that_is_minus_infinity_beyond_a_wall_is_fitted_up_to_it():
    """log θ of a user's own plugin is −∞ at θ = 0, with an infinite score there."""

    def gamma(t):
        a = t[..., 0]
        return torch.where(a > 0, 3.0 * a.log() - a, -math.inf)

    fit = surface(gamma, [Parameter("a", bounds=(0.0, math.inf))], start={"a": 30.0})
    assert (fit["a"].value, fit["a"].error) == (pytest.approx(3.0, rel=1e-8), pytest.approx(3**0.5, rel=1e-8))


# ---- what the data do not fix


def test_a_parameter_that_no_plugin_depends_on_is_not_identified_by_name():
    space = ParameterSpace([Parameter("mu"), Parameter("idle", prior=Uniform(2.0, 6.0))])
    evidence = Evidence(space, {"m": Gaussian(parameter_names=("mu",), sd=1.0)}, {"m": [[0.7]]})
    fit = estimate(evidence)
    assert fit.status == "not_identified"
    assert fit.null_directions == ({"idle": 1.0},)
    assert "idle" in fit.reason
    assert fit["idle"].error == math.inf
    assert not fit["idle"].identified
    assert (fit["mu"].value, fit["mu"].error) == (pytest.approx(0.7, abs=1e-8), pytest.approx(1.0, rel=1e-12))
    assert tuple(fit.interval("idle")) == (2.0, 6.0)
    assert estimate(evidence, fixed={"idle": 3.0}).status == "converged"


def test_a_prior_identifies_what_no_plugin_depends_on():
    space = ParameterSpace([Parameter("mu"), Parameter("idle", prior=Normal(4.0, 0.5))])
    fit = estimate(Evidence(space, {"m": Gaussian(parameter_names=("mu",), sd=1.0)}, {"m": [[0.7]]}, prior=True))
    assert fit.status == "converged"
    assert (fit["idle"].value, fit["idle"].error) == (pytest.approx(4.0, abs=1e-9), pytest.approx(0.5, rel=1e-9))


def test_a_product_of_two_parameters_is_not_identified_along_its_hyperbola():
    """x ~ N(a b, 1): flat along (a, −b) at the maximum."""
    fit = surface(
        lambda t: -0.5 * (6.0 - t[..., 0] * t[..., 1]) ** 2,
        [Parameter("a", bounds=(1.0, 100.0)), Parameter("b", bounds=(0.01, 50.0))],
    )
    assert fit.status == "not_identified"
    (direction,) = fit.null_directions
    a, b = fit.theta.tolist()
    assert a * b == pytest.approx(6.0, rel=1e-7)
    assert direction["a"] / direction["b"] == pytest.approx(-a / b, rel=1e-6)


def test_two_flat_directions_of_four_parameters_are_both_found():
    fit = surface(
        lambda t: -0.5 * (t[..., 0] + t[..., 1] - 1.0) ** 2 - 0.5 * (t[..., 2] - 2.0 * t[..., 3]) ** 2,
        [Parameter(n) for n in "abcd"],
    )
    assert fit.status == "not_identified"
    span = torch.tensor([[d.get(n, 0.0) for n in "abcd"] for d in fit.null_directions], dtype=torch.float64)
    flat = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 1.0]], dtype=torch.float64)
    assert span.shape == (2, 4)
    assert int(torch.linalg.matrix_rank(torch.cat([span, flat]), tol=1e-8)) == 2


def test_an_evidence_that_only_flattens_out_has_no_maximum_and_is_not_identified():
    """−exp(a) rises for ever as a falls, with curvature everywhere."""
    fit = surface(lambda t: -torch.exp(t[..., 0]), [Parameter("a")])
    assert fit.status == "not_identified"
    assert fit["a"].error == math.inf
    assert fit.null_directions == ({"a": pytest.approx(-1.0)},)
    low, high = fit.interval("a")
    assert low == -math.inf
    assert high == pytest.approx(math.log(0.5), abs=0.01)  # D(a) = 2 exp(a) = 1


def test_the_errors_of_a_flattening_evidence_stay_infinite_whatever_is_asked():
    fit = surface(lambda t: -torch.exp(t[..., 0]), [Parameter("a")])
    assert fit.uncertainty("observed").sd.tolist() == [math.inf]


def test_the_same_evidence_inside_bounds_ends_at_the_bound():
    fit = surface(lambda t: -torch.exp(t[..., 0]), [Parameter("a", prior=Uniform(-3.0, 3.0))])
    assert (str(fit.status), fit["a"].value, fit["a"].bound) == ("at_bound", -3.0, "lower")
    _, high = fit.interval("a", level=0.682689492137)
    assert high == pytest.approx(math.log(0.5 + math.exp(-3.0)), abs=1e-5)


def test_an_evidence_without_any_maximum_fails_without_numbers():
    fit = surface(lambda t: t[..., 0] ** 2, [Parameter("a")])
    assert (str(fit.status), fit.converged) == ("failed", False)
    assert math.isnan(fit["a"].value)
    assert math.isnan(fit["a"].error)
    with pytest.raises(EstimateError, match="failed"):
        fit.interval("a")
    with pytest.raises(EstimateError, match="failed"):
        fit.uncertainty()


def test_a_slope_without_end_fails_or_is_not_identified():
    fit = surface(lambda t: t[..., 0], [Parameter("a")])
    assert not fit.converged


def test_an_evidence_that_is_impossible_everywhere_fails_and_says_so():
    fit = surface(lambda t: torch.where(t[..., 0] > 1e6, -t[..., 0], -math.inf), [Parameter("a", bounds=(0.0, 1.0))])
    assert fit.status == "failed"
    assert "−∞ at all" in fit.reason


# ---- several maxima


def two_peaks(t, gap=0.5):
    a = t[..., 0]
    return torch.stack([-0.5 * ((a - 2.0) / 0.1) ** 2, -0.5 * ((a + 2.0) / 0.1) ** 2 - gap]).logsumexp(0)


@pytest.mark.parametrize("seed", range(5))
def test_two_maxima_nearly_as_high_are_multimodal_and_both_reported(seed):
    fit = surface(two_peaks, [Parameter("a", prior=Uniform(-5.0, 5.0))], seed=seed)
    assert fit.status == "multimodal"
    assert not fit.converged
    assert fit["a"].value == pytest.approx(2.0, abs=1e-7)
    ((other, height),) = fit.alternatives
    assert float(other[0]) == pytest.approx(-2.0, abs=1e-7)
    assert fit.log_evidence - height == pytest.approx(0.5, abs=1e-9)


def test_a_second_maximum_far_below_is_no_competitor():
    fit = surface(lambda t: two_peaks(t, gap=8.0), [Parameter("a", prior=Uniform(-5.0, 5.0))])
    assert fit.status == "converged"  # 2ΔS = 16: four standard errors
    assert fit["a"].value == pytest.approx(2.0, abs=1e-7)


def test_exchangeable_parameters_are_multimodal():
    """x1 ~ N(a b, 0.1), x2 ~ N(a + b, 0.1): (a, b) and (b, a) are equally good."""
    fit = surface(
        lambda t: -50.0 * (t[..., 0] * t[..., 1] - 3.0) ** 2 - 50.0 * (t.sum(-1) - 4.0) ** 2,
        [Parameter("a", bounds=(-10.0, 10.0)), Parameter("b", bounds=(-10.0, 10.0))],
    )
    assert fit.status == "multimodal"
    assert sorted(fit.theta.tolist()) == pytest.approx([1.0, 3.0], abs=1e-7)
    ((other, _),) = fit.alternatives
    assert other.tolist() == pytest.approx(fit.theta.flip(0).tolist(), abs=1e-7)


def test_one_maximum_reached_from_many_starts_is_one():
    for seed in range(5):
        assert (
            surface(
                lambda t: -((t - 1.0) ** 4 + (t - 1.0) ** 2).sum(-1), [Parameter("a"), Parameter("b")], seed=seed
            ).status
            == "converged"
        )


@pytest.mark.parametrize("seed", range(5))
def test_the_highest_of_many_maxima_is_found(seed):
    """Rastrigin's function with a period of 3: about a dozen maxima in the box, that at (1, −2) highest by 9 nats."""

    def rastrigin(t):
        d = t - torch.tensor([1.0, -2.0], dtype=torch.float64)
        return -(20.0 + (d**2 - 10.0 * torch.cos(2.0 * math.pi * d / 3.0)).sum(-1))

    box = (-5.0, 5.0)
    fit = surface(rastrigin, [Parameter("a", bounds=box), Parameter("b", bounds=box)], seed=seed)
    assert fit.theta.tolist() == pytest.approx([1.0, -2.0], abs=1e-7)
    assert fit.status == "converged"
    curvature = 2.0 + 10.0 * (2.0 * math.pi / 3.0) ** 2
    assert fit.sd.tolist() == pytest.approx([curvature**-0.5] * 2, rel=1e-7)


# ---- priors


def test_a_maximum_a_posteriori_with_a_correlated_likelihood_is_the_closed_form():
    C = torch.tensor([[1.0, 0.7], [0.7, 2.0]], dtype=torch.float64)
    prior_mean, prior_sd = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    x = torch.tensor([[0.3, 0.8], [1.1, -0.2], [0.4, 0.1]], dtype=torch.float64)
    space = ParameterSpace(
        [Parameter(n, prior=Normal(m, s)) for n, m, s in zip("ab", prior_mean, prior_sd, strict=True)]
    )
    fit = estimate(Evidence(space, {"m": Gaussian(parameter_names=("a", "b"), covariance=C)}, {"m": x}, prior=True))
    precision = 3.0 * torch.linalg.inv(C) + torch.diag(prior_sd**-2)
    theta = torch.linalg.solve(precision, torch.linalg.inv(C) @ x.sum(0) + prior_mean / prior_sd**2)
    assert fit.prior
    assert torch.allclose(fit.theta, theta, rtol=1e-10)
    assert torch.allclose(fit.covariance, torch.linalg.inv(precision), rtol=1e-10)
    log_prior = torch.distributions.Normal(prior_mean, prior_sd).log_prob(fit.theta).sum()
    assert fit.contributions["prior"].log_evidence == pytest.approx(float(log_prior), rel=1e-12)


def test_a_flat_prior_moves_nothing_but_the_height():
    space = ParameterSpace([Parameter("mu", prior=Uniform(0.0, 8.0))])
    modality, data = Gaussian(parameter_names=("mu",), sd=1.0), {"m": [[2.5]]}
    flat, without = (estimate(Evidence(space, {"m": modality}, data, prior=p)) for p in (True, False))
    assert flat["mu"].value == pytest.approx(without["mu"].value, abs=1e-12)
    assert flat["mu"].error == pytest.approx(without["mu"].error, rel=1e-12)
    assert without.log_evidence - flat.log_evidence == pytest.approx(math.log(8.0), rel=1e-12)


# ---- start, fixed


def test_a_start_outside_the_screened_range_finds_what_screening_cannot():
    def needle(t):
        z2 = ((t[..., 0] - 1e4) / 1e-3) ** 2
        return -50.0 * z2 / (1.0 + z2)  # curvature 100 in z: an error of 1e-4

    fit = surface(needle, [Parameter("a", bounds=(-1e6, 1e6))], start={"a": 1e4 + 2e-4})
    assert fit["a"].value == pytest.approx(1e4, abs=1e-8)
    assert fit["a"].error == pytest.approx(1e-4, rel=1e-5)


def test_a_start_may_be_a_tensor_or_some_of_the_names():
    parameters = [Parameter("a"), Parameter("b")]

    def bowl(t):
        return -0.5 * (t**2).sum(-1)

    for start in (torch.tensor([3.0, 4.0]), {"b": 4.0}, {"a": 3.0, "b": 4.0}):
        assert surface(bowl, parameters, start=start).theta.tolist() == pytest.approx([0.0, 0.0], abs=1e-8)
    with pytest.raises(ParameterError, match="'c'"):
        surface(bowl, parameters, start={"c": 1.0})
    with pytest.raises(ParameterError, match="shape"):
        surface(bowl, parameters, start=torch.zeros(3))


def test_a_fixed_parameter_gives_the_conditional_maximum_and_covariance():
    J = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    space = ParameterSpace([Parameter("a"), Parameter("b")])
    evidence = Evidence(space, {"m": Gaussian(parameter_names=("a", "b"), covariance=torch.linalg.inv(J))}, {"m": x})
    fit = estimate(evidence, fixed={"a": 1.5})
    assert fit.status == "converged"
    assert fit["a"].value == 1.5
    assert (fit["a"].error, dict(fit.fixed)) == (0.0, {"a": 1.5})
    assert fit["b"].value == pytest.approx(-1.0 - 0.9 * 0.5, abs=1e-8)
    assert fit["b"].error == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(EstimateError, match="'a' was fixed"):
        fit.interval("a")
    assert set(fit.intervals()) == {"b"}
    low, high = fit.interval("b", level=0.682689492137)
    assert (low, high) == (pytest.approx(fit["b"].value - 1.0, abs=1e-5), pytest.approx(fit["b"].value + 1.0, abs=1e-5))


def test_everything_fixed_is_the_evidence_there():
    space = ParameterSpace([Parameter("a"), Parameter("b")])
    evidence = Evidence(space, {"m": Gaussian(parameter_names=("a", "b"), sd=1.0)}, {"m": [[1.0, 2.0]]})
    fit = estimate(evidence, fixed={"a": 0.0, "b": 0.0})
    assert fit.log_evidence == pytest.approx(-0.5 * 5.0 - math.log(2.0 * math.pi), rel=1e-12)
    assert fit.theta.tolist() == [0.0, 0.0]


def test_values_that_cannot_be_fixed_or_started_from_are_refused():
    parameters = [Parameter("a", bounds=(0.0, 1.0))]
    with pytest.raises(ParameterError, match="outside its bounds"):
        surface(lambda t: -(t[..., 0] ** 2), parameters, fixed={"a": 2.0})
    with pytest.raises(ParameterError, match="no parameter 'z'"):
        surface(lambda t: -(t[..., 0] ** 2), parameters, fixed={"z": 2.0})
    with pytest.raises(ParameterError):
        surface(lambda t: -(t[..., 0] ** 2), parameters, fixed={"a": math.nan})
    with pytest.raises(ParameterError):
        surface(lambda t: -(t[..., 0] ** 2), parameters, start={"a": math.nan})


def test_a_start_outside_the_bounds_is_refused_as_a_fixed_value_is():
    with pytest.raises(ParameterError, match="outside its bounds"):
        surface(lambda t: -(t[..., 0] ** 2), [Parameter("a", bounds=(0.0, 1.0))], start={"a": 2.0})


def test_a_maximum_without_curvature_does_not_claim_an_error_beyond_its_interval():
    """−(a − 1)⁴: no curvature to speak of at the maximum, but D = 1 at 1 ± 2^(−1/4)."""
    fit = surface(lambda t: -((t[..., 0] - 1.0) ** 4), [Parameter("a", bounds=(-9.0, 9.0))])
    assert tuple(fit.interval("a", level=0.682689492137)) == pytest.approx((1 - 0.5**0.25, 1 + 0.5**0.25), abs=1e-4)
    assert not fit.converged or fit["a"].error < 18.0


def test_a_discrete_parameter_left_free_is_refused_with_the_way_out():
    space = ParameterSpace([Parameter("h", prior=Index(torch.tensor([0.5, 0.5])))])
    modality = Categorical(parameter_names=("h",), probabilities=[[0.5, 0.5], [0.9, 0.1]])
    evidence = Evidence(space, {"coin": modality}, {"coin": [0, 0, 1]})
    with pytest.raises(ParameterError, match=r"'h' is an index over hypotheses.*probabilities"):
        estimate(evidence)
    fixed = estimate(evidence, fixed={"h": 1.0})
    assert fixed.log_evidence == pytest.approx(math.log(0.9 * 0.9 * 0.1), rel=1e-12)


def test_an_error_of_a_plugin_stops_the_fit():
    def broken(t):
        return torch.where(t[..., 0] > 0.5, math.nan, -(t[..., 0] ** 2))

    with pytest.raises(ModalityError, match="plugin 's'"):
        surface(broken, [Parameter("a", prior=Uniform(0.0, 1.0))])


# ---- reproducibility, JSON, text


def test_the_same_seed_gives_the_same_bits():
    evidence, *_ = decay()
    one, two = (estimate(evidence, seed=3) for _ in range(2))
    assert torch.equal(one.theta, two.theta)
    assert torch.equal(one.covariance, two.covariance)
    assert one.log_evidence == two.log_evidence


def test_another_seed_gives_the_same_maximum():
    evidence, *_ = decay()
    base = estimate(evidence)
    for seed in range(1, 6):
        other = estimate(evidence, seed=seed)
        assert ((other.theta - base.theta).abs() / base.sd).max() < 1e-6


def awkward():
    """One parameter at its bound, one fixed, one not identified and one fine."""
    space = ParameterSpace(
        [Parameter("held", bounds=(0.0, 9.0), unit="eV"), Parameter("set"), Parameter("idle"), Parameter("fine")]
    )
    modality = Gaussian(parameter_names=("held", "set", "fine"), sd=[1.0, 1.0, 0.5])
    return estimate(
        Evidence(space, {"m": modality}, {"m": [[-1.0, 0.2, 3.0]]}),
        fixed={"set": 0.1},
        provenance={"digest": "sha256:abc"},
    )


def test_json_carries_every_number_and_no_infinity():
    fit = awkward()
    read = json.loads(fit.to_json())
    assert "Infinity" not in fit.to_json()
    assert "NaN" not in fit.to_json()
    assert read["status"] == "not_identified"
    assert read["converged"] is False
    assert read["order"] == ["held", "set", "idle", "fine"]
    assert read["theta"] == fit.theta.tolist()
    assert read["parameters"]["held"] == {
        "value": 0.0, "error": 0.0, "unit": "eV", "identified": True, "bound": "lower", "fixed": False,
    }  # fmt: skip
    assert read["parameters"]["set"]["fixed"] is True
    assert (read["parameters"]["idle"]["error"], read["parameters"]["idle"]["identified"]) == (None, False)
    assert read["parameters"]["fine"]["value"] == pytest.approx(3.0, abs=1e-12)
    assert read["covariance"][3][3] == pytest.approx(0.25, rel=1e-12)
    assert read["null_directions"] == [{"idle": 1.0}]
    assert read["log_evidence"] == fit.log_evidence
    assert read["contributions"]["m"]["information"] == fit.contributions["m"].information.tolist()
    assert read["provenance"] == {"digest": "sha256:abc"}


def test_json_of_a_failed_fit_is_json():
    read = json.loads(surface(lambda t: t[..., 0] ** 2, [Parameter("a")]).to_json())
    assert (read["status"], read["theta"], read["parameters"]["a"]["value"]) == ("failed", [None], None)


def test_the_printed_table_says_status_values_errors_and_notes():
    text = str(awkward())
    assert text.startswith("not_identified — the data say nothing about idle")
    line = {row.split()[0]: row for row in text.splitlines() if row.split()}
    assert "at its lower bound" in line["held"]
    assert "eV" in line["held"]
    assert "fixed" in line["set"]
    assert "not identified" in line["idle"]
    assert "∞" in line["idle"]
    assert "3.00" in line["fine"]
    assert "0.50" in line["fine"]


def test_the_printed_table_of_a_failed_fit_has_no_numbers_to_copy():
    text = str(surface(lambda t: t[..., 0] ** 2, [Parameter("a")]))
    assert text.startswith("failed")
    assert "estimate" not in text.splitlines()[0]
    assert "parameter " not in text


def test_shares_of_the_information_are_printed_per_plugin():
    modalities = {
        "north": Gaussian(parameter_names=("mu",), sd=1.0),
        "south": Gaussian(parameter_names=("mu",), sd=2.0),
    }
    fit = estimate(Evidence(ParameterSpace([Parameter("mu")]), modalities, {"north": [[1.0]], "south": [[2.0]]}))
    lines = str(fit).splitlines()
    assert any("north" in row and "80.0 %" in row for row in lines)
    assert any("south" in row and "20.0 %" in row for row in lines)


def test_an_unknown_kind_of_covariance_or_interval_is_refused_with_those_there_are():
    fit = surface(lambda t: -(t[..., 0] ** 2), [Parameter("a")])
    with pytest.raises(EstimateError, match="observed, expected, godambe, got 'fisher'"):
        fit.uncertainty("fisher")
    with pytest.raises(EstimateError, match="'profile', 'boundary' or 'wald', got 'bootstrap'"):
        fit.interval("a", method="bootstrap")
    with pytest.raises(ParameterError, match="no parameter 'z'"):
        fit["z"]


@pytest.mark.parametrize("method", ["profile", "wald"])
@pytest.mark.parametrize("level", [68.0, 1.0, 0.0, -0.5, math.nan])
def test_a_level_that_is_no_probability_is_refused_by_every_method(method, level):
    fit = surface(lambda t: -(t[..., 0] ** 2), [Parameter("a")])
    with pytest.raises(EstimateError, match="between 0 and 1"):
        fit.interval("a", level=level, method=method)


def test_constraints_and_priors_of_the_same_law_agree():
    """A unit-normal nuisance as a prior or as an auxiliary measurement: the same posterior mode."""
    measured = Gaussian(
        lambda t: t[..., :1] + 0.5 * t[..., 1:], parameter_names=("mu", "alpha"), sd=0.2, event_shape=(1,)
    )
    free = ParameterSpace([Parameter("mu"), Parameter("alpha")])
    with_plugin = estimate(Evidence(free, {"m": measured, "c": Constraint("alpha")}, {"m": [[1.0]], "c": [[0.0]]}))
    known = ParameterSpace([Parameter("mu"), Parameter("alpha", prior=Normal(0.0, 1.0))])
    with_prior = estimate(Evidence(known, {"m": measured}, {"m": [[1.0]]}, prior=True))
    assert torch.allclose(with_plugin.covariance, with_prior.covariance, rtol=1e-10)
    assert with_plugin["mu"].error == pytest.approx(math.hypot(0.2, 0.5), rel=1e-10)
