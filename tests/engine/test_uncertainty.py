"""Errors and intervals: closed forms, iminuit's, and the coverage they claim."""

import itertools
import math

import iminuit
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import torch
from torch.distributions import Normal, Uniform

from engine import EstimateError, Evidence, Modality, ModalityError, Parameter, ParameterSpace
from engine.estimate import estimate
from engine.uncertainty import covariance
from modalities import Constraint, Gaussian, PoissonCounts, StudentT

ONE_SIGMA = 0.682689492137086
ROOTS = {"xtol": 1e-14, "rtol": 1e-14}


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Surface(Modality):
    """s(x; θ) = function(θ)."""

    def __init__(self, function, parameter_names):
        super().__init__(parameter_names=parameter_names, event_shape=())
        self.function = function

    def log_evidence(self, x, theta):
        return self.function(theta) + 0.0 * x


def surface(function, parameters, **options):
    space = ParameterSpace(parameters)
    return estimate(Evidence(space, {"s": Surface(function, space.names)}, {"s": [0.0]}), **options)


# ---- observed and expected information


def test_observed_and_expected_information_of_counts_are_their_two_closed_forms():
    """Σ n s²/ν² and N Σ s²/ν: equal only where n is what is expected."""
    signal, background = torch.tensor([5.0, 9.0], dtype=torch.float64), torch.tensor([50.0, 40.0], dtype=torch.float64)
    x = torch.tensor([[75.0, 39.0], [70.0, 36.0], [81.0, 40.0]], dtype=torch.float64)
    modality = PoissonCounts(signal=signal, background=background)
    fit = estimate(Evidence(ParameterSpace([Parameter("mu", bounds=(-4.0, 20.0))]), {"m": modality}, {"m": x}))
    rate = fit.theta * signal + background
    observed, expected = float((x.sum(0) * signal**2 / rate**2).sum()), float((3 * signal**2 / rate).sum())
    assert observed / expected < 0.95
    assert fit.uncertainty("observed").sd.item() == pytest.approx(observed**-0.5, rel=1e-9)
    assert fit.uncertainty("expected").sd.item() == pytest.approx(expected**-0.5, rel=1e-9)
    assert fit["mu"].error == pytest.approx(observed**-0.5, rel=1e-9)


def test_expected_information_of_the_whole_sum_adds_closed_forms_of_its_plugins():
    """Student's t has (ν+1)/(ν+3)/σ² an observation, whatever the data; a Gaussian 1/σ²; the prior its own precision."""
    x = torch.tensor([[0.0], [0.5], [9.0]], dtype=torch.float64)
    modalities = {
        "t": StudentT(parameter_names=("mu",), scale=2.0, df=4.0),
        "g": Gaussian(parameter_names=("mu",), sd=3.0),
    }
    space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 5.0))])
    fit = estimate(Evidence(space, modalities, {"t": x, "g": [[1.0]]}, prior=True))
    information = 3 * 5 / 7 / 4 + 1 / 9 + 1 / 25
    assert fit.uncertainty("expected").sd.item() == pytest.approx(information**-0.5, rel=1e-9)
    assert abs(fit.uncertainty("observed").sd.item() / information**-0.5 - 1) > 0.01


class Simulated(Modality):
    """x ~ N(a², 1) with a simulator and no closed form."""

    def __init__(self):
        super().__init__(parameter_names=("a",), event_shape=())

    def log_evidence(self, x, theta):
        return -0.5 * (x - theta[..., 0] ** 2) ** 2

    def simulate(self, theta, generator=None):
        mean = theta[..., 0] ** 2
        return mean + torch.randn(mean.shape, generator=generator, dtype=mean.dtype)


def test_expected_information_without_a_closed_form_comes_from_simulated_scores():
    """(∂a²/∂a)² = 4a² an observation; the variance of R squared scores has relative error √(2/R)."""
    space = ParameterSpace([Parameter("a", bounds=(0.1, 5.0))])
    fit = estimate(Evidence(space, {"m": Simulated()}, {"m": [4.0, 4.5, 6.0, 3.5]}))
    a, R = fit["a"].value, 20_000
    exact = (4 * 4 * a**2) ** -0.5
    assert fit.uncertainty("expected", simulations=R).sd.item() == pytest.approx(exact, rel=4 * 0.5 * math.sqrt(2 / R))
    one, two = (fit.uncertainty("expected", simulations=R, seed=7).matrix for _ in range(2))
    assert torch.equal(one, two)
    observed = fit.uncertainty("observed").sd.item()  # −Σ s'' = Σ (6a² − 2x) = 4 · 4a² at the maximum: here they agree
    assert observed == pytest.approx(exact, rel=1e-8)


def test_expected_information_of_incomplete_data_counts_what_was_measured():
    """Half of the entries missing: half of the information."""
    x = torch.tensor([[0.4, math.nan], [math.nan, 0.7], [math.nan, 0.1], [0.3, math.nan]], dtype=torch.float64)
    modality = Gaussian(
        lambda t: t.expand(*t.shape[:-1], 2), parameter_names=("mu",), sd=1.0, event_shape=(2,), missing=True
    )
    fit = estimate(Evidence(ParameterSpace([Parameter("mu")]), {"m": modality}, {"m": x}))
    assert fit.uncertainty("observed").sd.item() == pytest.approx(0.5, rel=1e-12)
    assert fit.uncertainty("expected").sd.item() == pytest.approx(0.5, rel=1e-12)


def test_expected_information_of_a_plugin_with_neither_closed_form_nor_simulator_is_refused_by_name():
    fit = surface(lambda t: -(t**2).sum(-1), [Parameter("a")])
    with pytest.raises(ModalityError, match="plugin 's'"):
        fit.uncertainty("expected")


def test_the_kind_asked_for_is_the_covariance_of_the_estimate():
    x = 2.0 * normals(50, 1, seed=1)
    evidence = Evidence(ParameterSpace([Parameter("mu")]), {"m": Gaussian(parameter_names=("mu",), sd=1.0)}, {"m": x})
    for kind in ("observed", "expected", "godambe"):
        fit = estimate(evidence, covariance=kind)
        assert fit.covariance_kind == kind
        assert torch.equal(fit.covariance, fit.uncertainty(kind).matrix)
        low, high = fit.interval("mu", level=ONE_SIGMA, method="wald")
        assert high - low == pytest.approx(2 * fit["mu"].error, rel=1e-9)
    assert fit["mu"].error > 1.5 * 50**-0.5


def test_a_saddle_has_no_covariance():
    with pytest.raises(EstimateError, match="negative eigenvalue"):
        covariance(
            torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64)),
            torch.zeros(2, dtype=torch.bool),
            torch.zeros(2),
            kind="observed",
        )


# ---- Godambe


def misspecified(seed, n=400):
    """400 values scored with σ = 1 whose true sd is 1.824: the mean's true sd is 0.0912, claimed 0.0500."""
    return 0.3 + 1.824 * normals(n, 1, seed=seed)


def test_godambe_of_a_mean_with_the_wrong_error_is_the_sample_s_own():
    x = misspecified(0)
    fit = estimate(
        Evidence(ParameterSpace([Parameter("mu")]), {"m": Gaussian(parameter_names=("mu",), sd=1.0)}, {"m": x})
    )
    assert fit.uncertainty("observed").sd.item() == pytest.approx(0.05, rel=1e-12)
    sample = float(x.std(correction=0)) / 20.0
    assert fit.uncertainty("godambe").sd.item() == pytest.approx(sample, rel=1e-9)
    assert sample == pytest.approx(0.0912, rel=4 / math.sqrt(800))  # the relative error of a sample's sd is 1/√(2N)


def test_godambe_of_a_mean_with_the_wrong_error_is_the_scatter_of_the_estimate():
    """2000 repetitions in closed form (checked above for one): sd of θ̂ and the mean Godambe error agree within 3 s.e."""
    x = 0.3 + 1.824 * normals(2000, 400, seed=3)
    scatter, claimed = float(x.mean(1).std()), float(x.std(1, correction=0).mean()) / 20.0
    assert scatter == pytest.approx(0.0912, rel=3 / math.sqrt(2 * 2000))
    assert claimed == pytest.approx(scatter, rel=3 / math.sqrt(2 * 2000))


def regression(seed=4, n=300):
    """A line through data whose scatter grows with t: errors from the assumed σ are wrong for both parameters."""
    t = torch.linspace(0.0, 3.0, n, dtype=torch.float64)
    y = 1.0 + 0.5 * t + (0.2 + t**2) * normals(n, seed=seed)
    return t, y


class Line(Modality):
    """x = (t, y), y ~ N(a + b t, 1)."""

    def __init__(self):
        super().__init__(parameter_names=("a", "b"), event_shape=(2,))

    def log_evidence(self, x, theta):
        return -0.5 * (x[..., 1] - theta[..., 0] - theta[..., 1] * x[..., 0]) ** 2


def test_godambe_of_a_regression_is_white_s_sandwich():
    t, y = regression()
    fit = estimate(
        Evidence(ParameterSpace([Parameter("a"), Parameter("b")]), {"m": Line()}, {"m": torch.stack([t, y], 1)})
    )
    X = torch.stack([torch.ones_like(t), t], 1)
    bread = torch.linalg.inv(X.mT @ X)
    residual = y - X @ torch.linalg.lstsq(X, y).solution
    white = bread @ (X.mT @ (residual[:, None] ** 2 * X)) @ bread
    found = fit.uncertainty("godambe").matrix
    assert torch.allclose(found, white, rtol=1e-8)
    assert white[1, 1] > 3 * bread[1, 1]


def test_godambe_of_a_right_model_is_the_observed_covariance():
    """K = J in the mean; N = 20,000 leaves 4 √(2/N) in each variance."""
    N = 20_000
    x = normals(N, 2, seed=8) @ torch.linalg.cholesky(torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)).mT
    modality = Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.6], [0.6, 2.0]])
    fit = estimate(Evidence(ParameterSpace([Parameter("a"), Parameter("b")]), {"m": modality}, {"m": x}))
    assert torch.allclose(
        fit.uncertainty("godambe").matrix, fit.covariance, rtol=4 * math.sqrt(2 / N), atol=4 * math.sqrt(2) / N
    )


def test_godambe_with_a_prior_counts_the_prior_in_the_curvature_and_not_in_the_variability():
    """C = (J + 1/τ²)⁻¹ K (J + 1/τ²)⁻¹ with J = N and K the centred sum of squares."""
    x = misspecified(1, n=50)
    space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 0.1))])
    fit = estimate(Evidence(space, {"m": Gaussian(parameter_names=("mu",), sd=1.0)}, {"m": x}, prior=True))
    K = float(((x - x.mean()) ** 2).sum())
    assert fit.uncertainty("godambe").sd.item() == pytest.approx(math.sqrt(K) / (50 + 100), rel=1e-9)


def dependent(N, seed, correlation=0.8):
    """x_m = θ + σ_m ε_m with σ = (1, 2) and correlated noise; θ = 0."""
    e = normals(*np.atleast_1d(N), 2, seed=seed)
    second = correlation * e[..., 0] + math.sqrt(1 - correlation**2) * e[..., 1]
    return e[..., 0, None], 2.0 * second[..., None]


def additive(x1, x2):
    modalities = {"one": Gaussian(parameter_names=("mu",), sd=1.0), "two": Gaussian(parameter_names=("mu",), sd=2.0)}
    return estimate(Evidence(ParameterSpace([Parameter("mu")]), modalities, {"one": x1, "two": x2}))


def test_paired_godambe_of_dependent_plugins_is_the_variance_of_their_summed_scores():
    x1, x2 = dependent(200, seed=5)
    fit = additive(x1, x2)
    score = (x1 - fit.theta) + (x2 - fit.theta) / 4.0
    J = 200 * 1.25
    assert fit["mu"].error == pytest.approx(J**-0.5, rel=1e-12)
    paired = fit.uncertainty("godambe", paired=True).sd.item()
    assert paired == pytest.approx(math.sqrt(float(((score - score.mean()) ** 2).sum())) / J, rel=1e-9)
    separate = sum(float(((x - x.mean()) ** 2).sum()) * w**2 for x, w in ((x1, 1.0), (x2, 0.25)))
    assert fit.uncertainty("godambe").sd.item() == pytest.approx(math.sqrt(separate) / J, rel=1e-9)


def test_paired_godambe_restores_the_coverage_that_dependence_takes():
    """Known for N = 5: true sd 0.512, claimed 0.400, coverage 0.565. The estimate and both errors are closed forms
    (checked above); 20,000 repetitions at N = 5 and 4,000 at N = 200, within 3.5 standard errors."""
    true_sd = math.sqrt((1 + 0.25 + 2 * 0.25 * 0.8 * 2) / 1.25**2)

    def repeat(N, R, seed):
        x1, x2 = dependent((R, N), seed)
        score = (x1 + x2 / 4.0)[..., 0]
        estimates = score.mean(1) / 1.25
        godambe = (score - score.mean(1, keepdim=True)).square().sum(1).sqrt() / (1.25 * N)
        return estimates, godambe

    estimates, _ = repeat(5, 20_000, seed=6)
    claimed = (1.25 * 5) ** -0.5
    assert claimed == pytest.approx(0.400, abs=5e-4)
    assert true_sd / math.sqrt(5) == pytest.approx(0.512, abs=5e-4)
    assert float(estimates.std()) == pytest.approx(0.512, rel=3.5 / math.sqrt(40_000))
    coverage = float((estimates.abs() < claimed).double().mean())
    assert coverage == pytest.approx(0.565, abs=3.5 * math.sqrt(0.565 * 0.435 / 20_000))

    estimates, godambe = repeat(200, 4_000, seed=7)
    coverage = float((estimates.abs() < godambe).double().mean())
    assert coverage == pytest.approx(0.683, abs=3.5 * math.sqrt(0.683 * 0.317 / 4_000))


def test_godambe_at_a_bound_is_projected_too():
    x = torch.stack([-0.5 + 2.0 * normals(100, seed=9), 1.0 + 3.0 * normals(100, seed=10)], 1)
    space = ParameterSpace([Parameter("a", bounds=(0.0, math.inf)), Parameter("b")])
    fit = estimate(Evidence(space, {"m": Gaussian(parameter_names=("a", "b"), sd=1.0)}, {"m": x}))
    assert dict(fit.bounds) == {"a": "lower"}
    found = fit.uncertainty("godambe").matrix
    assert found[0].tolist() == [0.0, 0.0]
    assert float(found[1, 1]) == pytest.approx(float(x[:, 1].var(correction=0)) / 100, rel=1e-9)


def test_godambe_without_enough_units_is_refused_by_name():
    fit = estimate(
        Evidence(
            ParameterSpace([Parameter("mu")]), {"lone": Gaussian(parameter_names=("mu",), sd=1.0)}, {"lone": [[1.0]]}
        )
    )
    with pytest.raises(EstimateError, match="at least 2 independent observations, got 1 of 'lone'"):
        fit.uncertainty("godambe")


def test_paired_units_of_unequal_number_are_refused():
    x1, x2 = dependent(20, seed=11)
    with pytest.raises(EstimateError, match="same number"):
        additive(x1, x2[:10]).uncertainty("godambe", paired=True)


def test_godambe_beside_an_auxiliary_measurement_takes_its_own_variance():
    """A constraint is one observation of known variance: K gets 1/σ² from it, as J does."""
    x = misspecified(2)
    modalities = {
        "m": Gaussian(lambda t: t.sum(-1, keepdim=True), parameter_names=("mu", "shift"), sd=1.0, event_shape=(1,)),
        "aux": Constraint("shift", sd=0.1),
    }
    fit = estimate(
        Evidence(ParameterSpace([Parameter("mu"), Parameter("shift")]), modalities, {"m": x, "aux": [[0.0]]})
    )
    variance = float(x.var(correction=0)) / 400 + 0.1**2
    assert float(fit.uncertainty("godambe").matrix[0, 0]) == pytest.approx(variance, rel=1e-9)


# ---- profile intervals


@pytest.mark.parametrize("n", [1, 3, 10, 250])
@pytest.mark.parametrize("level", [ONE_SIGMA, 0.9545, 0.997])
def test_profile_interval_of_a_poisson_mean_is_where_the_deviance_reaches_its_threshold(n, level):
    """D(λ) = 2 [λ − n − n ln(λ/n)]."""
    space = ParameterSpace([Parameter("mu", bounds=(0.0, 1e4))])
    fit = estimate(Evidence(space, {"m": PoissonCounts(signal=[1.0])}, {"m": [[float(n)]]}))
    threshold = scipy.stats.chi2.ppf(level, 1)

    def gap(rate):
        return 2.0 * (rate - n - n * math.log(rate / n)) - threshold

    low, high = scipy.optimize.brentq(gap, 1e-12, n, **ROOTS), scipy.optimize.brentq(gap, n, 20.0 * n + 50.0, **ROOTS)
    ends = fit.interval("mu", level=level)
    assert tuple(ends) == pytest.approx((low, high), abs=1e-5 * math.sqrt(n))
    assert (ends.level, ends.method, ends.at_bound) == (level, "profile", ())


def test_profile_interval_of_a_gaussian_is_its_wald_interval():
    fit = estimate(
        Evidence(ParameterSpace([Parameter("mu")]), {"m": Gaussian(parameter_names=("mu",), sd=2.0)}, {"m": [[3.0]]})
    )
    for level in (ONE_SIGMA, 0.95, 0.9999):
        z = scipy.stats.norm.ppf(0.5 + level / 2)
        for method in ("profile", "wald"):
            assert tuple(fit.interval("mu", level=level, method=method)) == pytest.approx(
                (3.0 - 2 * z, 3.0 + 2 * z), abs=1e-5
            )


def test_profile_intervals_do_not_depend_on_how_a_parameter_is_written():
    n = 4.0
    plain = estimate(
        Evidence(
            ParameterSpace([Parameter("mu", bounds=(1e-6, 100.0))]), {"m": PoissonCounts(signal=[1.0])}, {"m": [[n]]}
        )
    )
    logarithmic = surface(lambda t: n * t[..., 0] - t[..., 0].exp(), [Parameter("log mu".replace(" ", "_"))])
    assert tuple(math.exp(v) for v in logarithmic.interval("log_mu")) == pytest.approx(
        tuple(plain.interval("mu")), rel=1e-5
    )
    assert logarithmic["log_mu"].error * 4.0 == pytest.approx(plain["mu"].error, rel=1e-6)


def test_an_upper_limit_alone_has_an_open_lower_end():
    """n = b + 1 counts over b = 100, rate exp(a) + b: D(−∞) = 2 [n ln(n/b) − (n − b)] ≈ 0.01 < 1."""
    n, b = 101.0, 100.0

    def S(t):
        rate = t[..., 0].exp() + b
        return n * rate.log() - rate

    fit = surface(S, [Parameter("a")])
    assert fit["a"].value == pytest.approx(0.0, abs=1e-6)
    low, high = ends = fit.interval("a", level=ONE_SIGMA)
    assert low == -math.inf
    assert ends.at_bound == ()

    def gap(a):
        rate = math.exp(a) + b
        return 2.0 * (n * math.log(n / rate) - (n - rate)) - 1.0

    assert high == pytest.approx(scipy.optimize.brentq(gap, 0.0, 10.0, **ROOTS), abs=1e-5)
    assert fit.interval("a", level=0.05).low > -10  # D reaches 0.0039 on the way down


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_interval_ends_that_a_bound_cuts_are_the_bound(side):
    """θ̂ = 0.4 from a bound at 0, σ = 1: the profile at the bound is 0.16 < 1."""
    bounds = (0.0, 50.0) if side > 0 else (-50.0, 0.0)
    fit = surface(lambda t: -0.5 * (t[..., 0] - 0.4 * side) ** 2, [Parameter("a", bounds=bounds)])
    assert fit.status == "converged"
    expected = sorted((0.0, 1.4 * side))
    for method in ("profile", "wald"):
        ends = fit.interval("a", level=ONE_SIGMA, method=method)
        assert list(ends) == pytest.approx(expected, abs=1e-5)
        assert ends.at_bound == (("low",) if side > 0 else ("high",))
        assert (ends.low, ends.high) == tuple(ends)


def test_both_ends_may_be_bounds():
    fit = surface(lambda t: -0.5 * (t[..., 0] - 0.1) ** 2, [Parameter("a", prior=Uniform(-0.2, 0.3))])
    ends = fit.interval("a", level=0.95)
    assert tuple(ends) == (-0.2, 0.3)
    assert ends.at_bound == ("low", "high")


def test_a_wald_interval_at_a_bound_is_refused_and_the_profile_offered():
    fit = surface(
        lambda t: -0.5 * (t[..., 0] + 0.5) ** 2 - 0.5 * t[..., 1] ** 2,
        [Parameter("a", bounds=(0.0, 9.0)), Parameter("b")],
    )
    with pytest.raises(EstimateError, match=r"'a' is held by its lower bound.*profile"):
        fit.interval("a", method="wald")
    assert tuple(fit.interval("b", level=ONE_SIGMA, method="wald")) == pytest.approx((-1.0, 1.0), abs=1e-6)


def test_a_parameter_that_is_not_identified_has_an_infinite_interval():
    space = [Parameter("a"), Parameter("b"), Parameter("c")]
    fit = surface(lambda t: -0.5 * (t[..., 0] + t[..., 1] - 1.0) ** 2 - 0.5 * (t[..., 2] - 3.0) ** 2, space)
    found = fit.intervals(level=ONE_SIGMA)
    assert tuple(found["a"]) == (-math.inf, math.inf)
    assert tuple(found["b"]) == (-math.inf, math.inf)
    assert tuple(found["c"]) == pytest.approx((2.0, 4.0), abs=1e-5)
    assert tuple(fit.interval("a", method="wald")) == (-math.inf, math.inf)


def test_a_degenerate_parameter_inside_bounds_has_the_interval_that_the_bounds_leave():
    """a + b = 1 ± 1 with 0 ≤ b ≤ 10: a reaches from 1 − 10 − 1 to 1 − 0 + 1."""
    space = [Parameter("a", bounds=(-100.0, 100.0)), Parameter("b", bounds=(0.0, 10.0))]
    fit = surface(lambda t: -0.5 * (t[..., 0] + t[..., 1] - 1.0) ** 2, space)
    assert fit.status == "not_identified"
    assert tuple(fit.interval("a", level=ONE_SIGMA)) == pytest.approx((-10.0, 2.0), abs=1e-5)
    b = fit.interval("b", level=ONE_SIGMA)
    assert tuple(b) == (0.0, 10.0)
    assert b.at_bound == ("low", "high")


def on_off(n, tau):
    """n ~ Poisson(10 mu + 2 g) with tau ~ Poisson(tau g), and the profile −2 ln λ(mu) in closed form: the best g solves
    (b + tau) b g² + [(b + tau) A − (n + m) b] g − m A = 0, A = 10 mu, b = 2, m = tau."""
    space = ParameterSpace([Parameter("mu", bounds=(-10.0, 10.0)), Parameter("g", bounds=(0.0, 50.0))])
    modalities = {
        "main": PoissonCounts(signal=[10.0], background=[2.0], per_bin={"background": ["g"]}),
        "aux": Constraint("g", kind="poisson", scale=tau),
    }
    fit = estimate(Evidence(space, modalities, {"main": [[n]], "aux": [[tau]]}))

    def cost(mu):
        A, b = 10.0 * mu, 2.0
        p, q, r = (b + tau) * b, (b + tau) * A - (n + tau) * b, -tau * A
        g = (-q + math.sqrt(q * q - 4 * p * r)) / (2 * p)
        return (A + b * g) - n * math.log(A + b * g) + tau * g - tau * math.log(g)

    at = (n - 2.0) / 10.0  # where both measurements are met: g = 1
    return fit, at, lambda mu: 2.0 * (cost(mu) - cost(at))


@pytest.mark.parametrize("level", [ONE_SIGMA, 0.95, 0.997, 0.9995, 0.99999])
@pytest.mark.parametrize(("n", "tau"), [(1.0, 2.0), (2.0, 4.0), (5.0, 4.0), (30.0, 9.0)])
def test_a_profile_follows_a_nuisance_to_where_a_straight_step_from_the_maximum_is_impossible(n, tau, level):
    """Few counts: a linear step makes the rate or the nuisance negative, where S is −∞, though the profile is finite."""
    fit, at, drop = on_off(n, tau)
    assert fit["mu"].value == pytest.approx(at, abs=1e-6)
    threshold = scipy.stats.chi2.ppf(level, 1)
    ends = (
        scipy.optimize.brentq(lambda mu: drop(mu) - threshold, -9.9, at),
        scipy.optimize.brentq(lambda mu: drop(mu) - threshold, at, 9.9),
    )
    assert tuple(fit.interval("mu", level=level)) == pytest.approx(ends, abs=1e-4)


def test_intervals_of_rising_levels_contain_one_another():
    fit, *_ = on_off(2.0, 4.0)
    found = [fit.interval("mu", level=level) for level in (0.5, ONE_SIGMA, 0.9, 0.95, 0.99, 0.997, 0.9995, 0.99999)]
    for inner, outer in itertools.pairwise(found):
        assert outer.low < inner.low < inner.high < outer.high


def test_an_evidence_that_ends_at_a_wall_has_its_interval_end_there():
    """−a²/2 for a < ½ and impossible beyond: D never reaches 1 on the right."""
    fit = surface(
        lambda t: torch.where(t[..., 0] < 0.5, -0.5 * t[..., 0] ** 2, -math.inf), [Parameter("a", bounds=(-9.0, 9.0))]
    )
    assert tuple(fit.interval("a", level=ONE_SIGMA)) == pytest.approx((-1.0, 0.5), abs=1e-5)


def skewed():
    """Two Poisson regions that share two correlated nuisances."""
    modalities = {
        "signal": PoissonCounts(
            signal=[6.0, 2.0],
            background=[8.0, 10.0],
            normalisation={"a": {"background": (0.8, 1.25), "signal": (0.9, 1.1)}, "b": {"background": (0.7, 1.4)}},
        ),
        "control": PoissonCounts(
            background=[30.0],
            strength=None,
            normalisation={"a": {"background": (0.85, 1.2)}, "b": {"background": (1.1, 0.9)}},
        ),
        "aux a": Constraint("a"),
        "aux b": Constraint("b"),
    }
    data = {"signal": [[19.0, 12.0]], "control": [[36.0]], "aux a": [[0.0]], "aux b": [[0.0]]}
    space = ParameterSpace(
        [Parameter("mu", bounds=(-1.0, 20.0)), Parameter("a", bounds=(-5.0, 5.0)), Parameter("b", bounds=(-5.0, 5.0))]
    )

    def cost(mu, a, b):
        def eta(alpha, low, high):
            return high**alpha if alpha >= 0 else low**-alpha

        common = eta(a, 0.8, 1.25) * eta(b, 0.7, 1.4)
        rates = [mu * s * eta(a, 0.9, 1.1) + y * common for s, y in ((6.0, 8.0), (2.0, 10.0))]
        rates.append(30.0 * eta(a, 0.85, 1.2) * eta(b, 1.1, 0.9))
        if min(rates) <= 0:
            return 1e9
        return sum(r - n * math.log(r) for r, n in zip(rates, (19.0, 12.0, 36.0), strict=True)) + 0.5 * (a * a + b * b)

    return Evidence(space, modalities, data), cost


def test_intervals_with_correlated_nuisances_are_those_of_minos():
    evidence, cost = skewed()
    fit = estimate(evidence)
    minuit = iminuit.Minuit(cost, mu=1.0, a=0.1, b=0.1)
    minuit.errordef, minuit.strategy, minuit.tol = iminuit.Minuit.LIKELIHOOD, 2, 1e-5
    minuit.migrad()
    minuit.minos()
    assert minuit.valid
    assert float(fit.correlation[0, 1].abs()) > 0.2
    for name, ends in fit.intervals(level=ONE_SIGMA).items():
        errors, value = minuit.merrors[name], minuit.values[name]
        assert errors.is_valid
        assert fit[name].value == pytest.approx(value, abs=1e-3 * fit[name].error)
        assert tuple(ends) == pytest.approx((value + errors.lower, value + errors.upper), abs=3e-3 * fit[name].error)
    low, high = fit.interval("mu", level=ONE_SIGMA)
    assert (high - fit["mu"].value) / (fit["mu"].value - low) > 1.05  # and they are not symmetric


def test_all_intervals_at_once_are_the_intervals_one_by_one():
    evidence, _ = skewed()
    fit = estimate(evidence)
    together = fit.intervals(level=0.95)
    for name, ends in together.items():
        assert tuple(fit.interval(name, level=0.95)) == pytest.approx(tuple(ends), abs=1e-5 * fit[name].error)


def test_a_profile_that_finds_a_higher_maximum_says_so_and_where():
    """Started at the lower of two peaks and never screened elsewhere, the profile walks into the higher one."""

    def S(t):
        a = t[..., 0]
        return torch.stack([-0.5 * (a / 1.0) ** 2, 3.0 - 0.5 * ((a - 4.0) / 0.5) ** 2]).logsumexp(0)

    space = ParameterSpace([Parameter("a", bounds=(-50.0, 50.0))])
    fit = estimate(Evidence(space, {"s": Surface(S, ("a",))}, {"s": [0.0]}), start={"a": 0.0}, screen=16, polish=1)
    if abs(fit["a"].value) < 0.5:
        with pytest.raises(EstimateError, match=r"higher maximum.*a = "):
            fit.interval("a", level=0.9999)


def test_profile_intervals_of_scales_1e_9_and_1e9_scale_along():
    J = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    scale = torch.tensor([1e-9, 1e9], dtype=torch.float64)

    def S(t):
        z = t / scale - 1.0
        return -0.5 * (z @ J * z).sum(-1) - 0.05 * (z**4).sum(-1)

    tiny = surface(S, [Parameter(n, bounds=(-20 * s, 20 * s)) for n, s in zip("ab", scale.tolist(), strict=True)])

    def unscaled(t):
        z = t - 1.0
        return -0.5 * (z @ J * z).sum(-1) - 0.05 * (z**4).sum(-1)

    plain = surface(unscaled, [Parameter(n, bounds=(-20, 20)) for n in "ab"])
    for n, s in zip("ab", scale.tolist(), strict=True):
        assert [v / s for v in tiny.interval(n)] == pytest.approx(list(plain.interval(n)), abs=1e-5)


# ---- coverage at a bound


RHO = 0.8
DISTANCES = (0.0, 0.5, 1.0, 2.0)
PROJECTED = (0.682, 0.690, 0.681, 0.681)  # published coverage of b at those distances of a from its bound
PROFILE = (0.685, 0.708, 0.696, 0.683)
FULL = (0.793, 0.766, 0.723, 0.684)


def at_bound_fit(z):
    space = ParameterSpace([Parameter("a", bounds=(0.0, math.inf)), Parameter("b")])
    modality = Gaussian(parameter_names=("a", "b"), covariance=[[1.0, RHO], [RHO, 1.0]])
    return estimate(Evidence(space, {"m": modality}, {"m": [list(z)]}), screen=16, polish=1)


def by_hand(z):
    """θ̂_b, its projected error and the profile's D(b) at the true b = 0, in closed form."""
    z1, z2 = z
    b = z2 - RHO * min(z1, 0.0)
    sd = math.sqrt(1.0 - RHO**2) if z1 < 0 else 1.0

    def q(r1, r2):
        return (r1 * r1 - 2 * RHO * r1 * r2 + r2 * r2) / (1 - RHO**2)

    free = max(0.0, z1 - RHO * z2)
    return b, sd, q(z1 - free, z2) - q(min(z1, 0.0), z2 - b)


def test_estimates_errors_and_intervals_near_a_bound_are_the_closed_forms_for_a_grid_of_data():
    for d in DISTANCES:
        for u in (-1.7, -0.6, -0.1, 0.4, 1.3):
            for v in (-1.2, 0.1, 0.9):
                z = (d + u, RHO * u + math.sqrt(1 - RHO**2) * v)
                fit = at_bound_fit(z)
                b, sd, drop = by_hand(z)
                assert fit.status == ("at_bound" if z[0] < 0 else "converged")
                assert fit["b"].value == pytest.approx(b, abs=1e-8)
                assert fit["b"].error == pytest.approx(sd, rel=1e-9)
                low, high = fit.interval("b", level=ONE_SIGMA)
                assert (low <= 0.0 <= high) == (drop <= 1.0)


@pytest.mark.parametrize(
    ("distance", "projected", "profile", "full"), list(zip(DISTANCES, PROJECTED, PROFILE, FULL, strict=True))
)
def test_the_closed_forms_have_the_published_coverage(distance, projected, profile, full):
    """Integrals over the data of what the grid above shows the engine to return; the published numbers are
    simulations, with a standard error of about 0.002: within 3 of them."""

    def coverage(inside):
        def over_v(u):
            v = np.linspace(-6.0, 6.0, 4001)
            z2 = RHO * u + math.sqrt(1 - RHO**2) * v
            return float(np.sum(inside(distance + u, z2) * scipy.stats.norm.pdf(v)) * (v[1] - v[0]))

        u = np.linspace(-6.0, 6.0, 801)
        return float(np.sum([over_v(t) * scipy.stats.norm.pdf(t) for t in u]) * (u[1] - u[0]))

    def estimate_of(z1, z2):
        return z2 - RHO * min(z1, 0.0)

    def drop(z1, z2):
        def q(r1, r2):
            return (r1 * r1 - 2 * RHO * r1 * r2 + r2 * r2) / (1 - RHO**2)

        return q(z1 - np.maximum(0.0, z1 - RHO * z2), z2) - q(min(z1, 0.0), z2 - estimate_of(z1, z2))

    tolerance = 3 * 0.002
    assert coverage(lambda z1, z2: np.abs(estimate_of(z1, z2)) <= (0.6 if z1 < 0 else 1.0)) == pytest.approx(
        projected, abs=tolerance
    )
    assert coverage(lambda z1, z2: drop(z1, z2) <= 1.0) == pytest.approx(profile, abs=tolerance)
    assert coverage(lambda z1, z2: np.abs(estimate_of(z1, z2)) <= 1.0) == pytest.approx(full, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("distance", "projected", "profile"), list(zip(DISTANCES, PROJECTED, PROFILE, strict=True)))
def test_simulated_coverage_near_a_bound_is_the_published_one(distance, projected, profile):
    """1000 data sets a distance, within 3.5 standard errors (0.0147 each)."""
    R = 1000
    e = normals(R, 2, seed=20)
    data = torch.stack([distance + e[:, 0], RHO * e[:, 0] + math.sqrt(1 - RHO**2) * e[:, 1]], 1)
    inside = torch.zeros(2)
    for z in data.tolist():
        fit = at_bound_fit(z)
        low, high = fit.interval("b", level=ONE_SIGMA)
        inside += torch.tensor([abs(fit["b"].value) <= fit["b"].error, low <= 0.0 <= high])
    for found, expected in zip((inside / R).tolist(), (projected, profile), strict=True):
        assert found == pytest.approx(expected, abs=3.5 * math.sqrt(0.683 * 0.317 / R))
