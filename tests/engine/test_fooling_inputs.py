"""Inputs that other tools accept in silence end here in an error that names its cause, or in the right number."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.distributions import Normal, Uniform

from engine import (
    Evidence,
    Modality,
    ModalityError,
    ObservationError,
    Parameter,
    ParameterSpace,
    Registry,
    UnknownPluginError,
)
from engine.estimate import estimate
from modalities import Constraint, Gaussian, PoissonCounts, StudentT

ONE_SIGMA = 0.682689492137086


class Scalar(Modality):
    """s(x; θ) is whatever ``function(x, theta)`` returns."""

    def __init__(self, function, parameter_names=("a",), event_shape=(), weight=None):
        super().__init__(parameter_names=parameter_names, event_shape=event_shape)
        self.function = function
        if weight is not None:
            self.register_buffer("weight", weight)

    def log_evidence(self, x, theta):
        return self.function(x, theta)


def space(*names, **options):
    return ParameterSpace([Parameter(n, **options) for n in names])


def fit(parameters, modalities, data, prior=False, **options):
    return estimate(Evidence(parameters, modalities, data, prior=prior), **options)


def quadratic(x, theta):
    return -0.5 * (x - theta[..., 0]) ** 2


# ---- a likelihood that raises


def division(x, theta):
    raise ZeroDivisionError("the detector was off")


@pytest.mark.parametrize("names", [("tracker",), tuple(f"tracker {i}" for i in range(9))])
def test_an_exception_in_a_likelihood_is_an_error_with_the_plugin_s_name(names):
    modalities = {n: Scalar(division) for n in names} | {"good": Scalar(quadratic)}
    data = {n: [float(i)] for i, n in enumerate(modalities)}
    with pytest.raises(ModalityError, match=r"tracker.*ZeroDivisionError.*the detector was off") as caught:
        fit(space("a"), modalities, data)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "good" not in str(caught.value)


def test_an_exception_at_one_corner_of_theta_alone_is_not_taken_for_minus_infinity():
    def touchy(x, theta):
        if bool((theta[..., 0] > 4.0).any()):
            raise ValueError("no table beyond 4")
        return quadratic(x, theta)

    with pytest.raises(ModalityError, match=r"'tracker'.*no table beyond 4"):
        fit(space("a", prior=Uniform(0.0, 5.0)), {"tracker": Scalar(touchy)}, {"tracker": [2.0]})


# ---- what is not one scalar for each (x, θ)


RETURNS = {
    "a Python float": (lambda x, theta: -1.5, "got builtins.float -1.5"),
    "None": (lambda x, theta: None, "got None"),
    "a numpy array": (lambda x, theta: np.zeros(3), "got numpy.ndarray of shape"),
    "a numpy scalar": (lambda x, theta: np.float64(1.0), "got numpy.float64"),
    "one torch scalar for the whole batch": (lambda x, theta: quadratic(x, theta).sum(), r"got \(\)"),
    "a sum over θ": (lambda x, theta: quadratic(x, theta).sum(0), "one scalar for each"),
    "one value for each event entry": (lambda x, theta: quadratic(x, theta)[..., None], "one scalar for each"),
    "NaN": (lambda x, theta: quadratic(x, theta) * math.nan, "a number or −∞, got nan"),
    "+∞": (lambda x, theta: quadratic(x, theta) + math.inf, "a number or −∞, got inf"),
    "float16": (lambda x, theta: quadratic(x, theta).half(), "float16"),
    "bfloat16": (lambda x, theta: quadratic(x, theta).bfloat16(), "bfloat16"),
    "complex numbers": (lambda x, theta: quadratic(x, theta) + 0j, "complex128"),
    "integers": (lambda x, theta: quadratic(x, theta).round().long(), "int64"),
    "a tuple": (lambda x, theta: (quadratic(x, theta),), "got builtins.tuple"),
    "a detached scalar": (lambda x, theta: quadratic(x, theta.detach()), "detached"),
}


@pytest.mark.parametrize("what", RETURNS)
def test_a_wrong_return_is_an_error_that_says_what_came_back_and_from_which_plugin(what):
    function, message = RETURNS[what]
    modalities = {"tracker": Scalar(function), "good": Scalar(quadratic)}
    with pytest.raises(ModalityError, match=message) as caught:
        fit(space("a"), modalities, {"tracker": [0.5, 0.6, 0.7, 0.8, 0.9], "good": [1.0, 2.0]})
    assert "'tracker'" in str(caught.value)


@pytest.mark.parametrize("what", ["a Python float", "one torch scalar for the whole batch", "None"])
def test_a_wrong_return_is_seen_even_for_one_theta_and_one_observation(what):
    function, message = RETURNS[what]
    evidence = Evidence(space("a"), {"tracker": Scalar(function)}, {"tracker": [0.5]})
    with pytest.raises(ModalityError, match=message):
        evidence.value(torch.tensor([[1.0]]))


def test_nan_at_one_observation_names_the_parameter_s_value():
    def broken(x, theta):
        return quadratic(x, theta) + torch.where(x == 7.0, math.nan, 0.0)

    evidence = Evidence(space("a"), {"tracker": Scalar(broken)}, {"tracker": [1.0, 7.0]})
    with pytest.raises(ModalityError, match=r"nan from plugin 'tracker' at a = 0.25, observation 1"):
        evidence.value(torch.tensor([[0.25]]))


def test_nan_of_one_among_many_stacked_plugins_is_pinned_on_that_one():
    modalities = {f"p{i}": StudentT(parameter_names=("a",), scale=1.0, df=3.0) for i in range(9)}
    modalities["p4"].df.fill_(math.nan)
    evidence = Evidence(space("a"), modalities, {f"p{i}": [[float(i)]] for i in range(9)})
    with pytest.raises(ModalityError, match="'p4'"):
        evidence.value(torch.tensor([[0.25]]))


def test_a_nan_gradient_beside_a_finite_scalar_is_an_error():
    def masked(x, theta):  # the classical trap: the gradient of the branch not taken is 0 × ∞
        a = theta[..., 0]
        return quadratic(x, theta) + torch.where(a > 10.0, (a - 10.0).sqrt(), torch.zeros_like(a))

    evidence = Evidence(space("a"), {"tracker": Scalar(masked)}, {"tracker": [1.0]})
    with pytest.raises(ModalityError, match=r"score of plugin 'tracker' is nan at θ = \(0.25\)"):
        evidence.derivatives(torch.tensor([[0.25]]))


# ---- the same data under two names


def test_the_same_data_under_two_names_is_an_error_that_names_both():
    x = torch.tensor([[57.0, 49.0], [51.0, 42.0]], dtype=torch.float64)
    counts = {n: PoissonCounts(signal=[5.0, 9.0], background=[50.0, 40.0]) for n in ("north", "south", "west")}
    with pytest.raises(ObservationError, match=r"'north' and 'south'.*counted twice"):
        fit(space("mu"), counts, {"north": x, "west": x + 1.0, "south": x.clone()})


@pytest.mark.parametrize("convert", [lambda x: x.float(), lambda x: x.int(), lambda x: x.numpy(), lambda x: x.tolist()])
def test_the_same_data_in_another_dtype_or_container_is_still_the_same_data(convert):
    x = torch.tensor([[57.0, 49.0]], dtype=torch.float64)
    counts = {n: PoissonCounts(signal=[5.0, 9.0], background=[50.0, 40.0]) for n in ("north", "south")}
    with pytest.raises(ObservationError, match="'north' and 'south'"):
        fit(space("mu"), counts, {"north": x, "south": convert(x)})


def test_the_same_data_scored_by_two_models_is_an_error_too():
    x = torch.tensor([[57.0], [49.0]])
    modalities = {
        "counts": PoissonCounts(signal=[5.0], background=[50.0]),
        "values": Gaussian(parameter_names=("mu",), sd=7.0),
    }
    with pytest.raises(ObservationError, match="'counts' and 'values'"):
        fit(space("mu"), modalities, {"counts": x, "values": x})


def test_two_measurements_that_agree_can_be_allowed_and_then_count_twice():
    modalities = {n: Gaussian(parameter_names=("mu",), sd=1.0) for n in ("north", "south")}
    x = torch.tensor([[1.0], [3.0]])
    evidence = Evidence(space("mu"), modalities, {"north": x, "south": x}, allow_identical=True)
    assert estimate(evidence)["mu"].error == pytest.approx(math.sqrt(1 / 4), rel=1e-12)


def test_nominal_values_of_two_nuisances_may_coincide():
    modalities = {"alpha": Constraint("alpha"), "beta": Constraint("beta")}
    both = fit(space("alpha", "beta"), modalities, {"alpha": [[0.0]], "beta": [[0.0]]})
    assert both.sd.tolist() == pytest.approx([1.0, 1.0], rel=1e-12)


def test_one_constraint_of_one_nuisance_under_two_names_is_an_error_that_names_both():
    modalities = {"from channel 1": Constraint("alpha"), "from channel 2": Constraint("alpha")}
    with pytest.raises(ObservationError, match="'from channel 1' and 'from channel 2'"):
        fit(space("alpha"), modalities, {"from channel 1": [[0.0]], "from channel 2": [[0.0]]})


# ---- (a + b)²


def test_a_sum_of_two_parameters_is_not_identified_along_their_difference():
    sums = Scalar(lambda x, theta: -0.5 * (x - theta.sum(-1)) ** 2, ("a", "b"))
    result = fit(space("a", "b"), {"sums": sums}, {"sums": [3.0]})
    assert result.status == "not_identified"
    assert not result.converged
    (direction,) = result.null_directions
    assert direction == {"a": pytest.approx(math.sqrt(0.5)), "b": pytest.approx(-math.sqrt(0.5))} or direction == {
        "a": pytest.approx(-math.sqrt(0.5)),
        "b": pytest.approx(math.sqrt(0.5)),
    }
    assert result.sd.tolist() == [math.inf, math.inf]
    assert not result["a"].identified
    assert float(result.theta.sum()) == pytest.approx(3.0, abs=1e-7)  # what is known is right
    assert tuple(result.interval("a")) == (-math.inf, math.inf)


def test_the_null_direction_is_in_natural_units():
    # a/1000 + b: the flat direction is (1000, −1)/√(10⁶ + 1)
    sums = Scalar(lambda x, theta: -0.5 * (x - theta[..., 0] / 1000.0 - theta[..., 1]) ** 2, ("a", "b"))
    (direction,) = fit(space("a", "b"), {"sums": sums}, {"sums": [3.0]}).null_directions
    assert direction["a"] / direction["b"] == pytest.approx(-1000.0, rel=1e-9)
    assert math.hypot(*direction.values()) == pytest.approx(1.0, rel=1e-12)


# ---- the minimum lies outside a bound


def test_a_maximum_outside_a_bound_has_the_projected_covariance_and_a_profile_interval_from_the_bound():
    """S = −½ (z − θ)ᵀ J (z − θ) with z₁ < 0 ≤ θ₁: by hand, θ̂ = (0, z₂ + J₁₂/J₂₂ z₁), var θ̂₂ = 1/J₂₂."""
    rho, z = 0.6, (-0.5, 1.0)
    covariance = [[1.0, rho], [rho, 1.0]]
    parameters = ParameterSpace([Parameter("a", bounds=(0.0, math.inf)), Parameter("b")])
    result = fit(parameters, {"m": Gaussian(parameter_names=("a", "b"), covariance=covariance)}, {"m": [z]})
    assert result.status == "at_bound"
    assert result.converged
    assert dict(result.bounds) == {"a": "lower"}
    assert result.theta.tolist() == pytest.approx([0.0, z[1] - rho * z[0]], abs=1e-12)
    assert result.covariance.tolist() == [[0.0, 0.0], [0.0, pytest.approx(1.0 - rho**2, rel=1e-12)]]
    assert (result["a"].error, result["a"].bound) == (0.0, "lower")
    # the profile of a is −½ (z₁ − a)²: D(a) = (a − z₁)² − z₁² = 1
    low, high = interval = result.interval("a", level=ONE_SIGMA)
    assert (low, interval.at_bound) == (0.0, ("low",))
    assert high == pytest.approx(z[0] + math.sqrt(1.0 + z[0] ** 2), abs=1e-5)

    # the profile of b maximises over a ≥ 0
    def drop(b):
        free = max(0.0, z[0] + rho * (b - z[1]))
        r = np.array([z[0] - free, z[1] - b])
        return r @ np.linalg.inv(covariance) @ r - z[0] ** 2 - 1.0

    at = float(result.theta[1])
    ends = scipy.optimize.brentq(drop, at - 3.0, at), scipy.optimize.brentq(drop, at, at + 3.0)
    assert tuple(result.interval("b", level=ONE_SIGMA)) == pytest.approx(ends, abs=1e-5)


# ---- very different precisions


def test_a_constraint_of_1e8_events_leaves_a_unit_nuisance_its_unit_error():
    modalities = {
        "control": PoissonCounts(background=[1e8], strength=None, scale={"k": "background"}),
        "auxiliary": Constraint("alpha"),
    }
    result = fit(space("k", "alpha", bounds=(-10.0, 10.0)), modalities, {"control": [[1e8]], "auxiliary": [[0.3]]})
    assert result.status == "converged"
    assert result["k"].error == pytest.approx(1e-4, rel=1e-9)
    assert result["alpha"].error == pytest.approx(1.0, rel=1e-9)
    assert result["alpha"].value == pytest.approx(0.3, abs=1e-9)
    assert tuple(result.interval("alpha", level=ONE_SIGMA)) == pytest.approx((-0.7, 1.3), abs=1e-5)


def test_1e8_events_that_share_a_nuisance_with_their_constraint_leave_it_its_unit_error():
    """n ~ Poisson(1e8 k 1.1^α), α ~ N(0, 1): k takes all that the counts say, so that α keeps 1 and
    σ(k)² = 1e-8 + (ln 1.1)²; their correlation is −ln 1.1 / σ(k)."""
    control = PoissonCounts(
        background=[1e8],
        strength=None,
        scale={"k": "background"},
        normalisation={"alpha": {"background": (1 / 1.1, 1.1)}},
    )
    parameters = ParameterSpace([Parameter("k", bounds=(0.0, 10.0)), Parameter("alpha", bounds=(-5.0, 5.0))])
    result = fit(
        parameters, {"control": control, "auxiliary": Constraint("alpha")}, {"control": [[1e8]], "auxiliary": [[0.0]]}
    )
    assert result.status == "converged"
    sd_k = math.hypot(1e-4, math.log(1.1))
    assert result["alpha"].error == pytest.approx(1.0, rel=1e-6)
    assert result["k"].error == pytest.approx(sd_k, rel=1e-6)
    assert float(result.correlation[0, 1]) == pytest.approx(-math.log(1.1) / sd_k, rel=1e-6)


def test_a_float32_objective_with_a_large_offset_has_the_error_of_its_curvature():
    def offset(x, theta):
        assert theta.dtype == torch.float32
        return 1e4 - 0.5 * (x - theta[..., 0]) ** 2

    modality = Scalar(offset, weight=torch.zeros(1, dtype=torch.float32))
    result = fit(space("a"), {"m": modality}, {"m": [0.25]})
    assert result.status == "converged"
    assert result["a"].error == pytest.approx(1.0, rel=1e-6)
    assert result["a"].value == pytest.approx(0.25, abs=1e-4)


def test_float32_scalars_are_summed_in_float64():
    """1000 float32 scalars near 1e4: a float32 sum would have steps of 1 nat at 1e7."""

    def offset(x, theta):
        return 1e4 - 0.5 * (x - theta[..., 0]) ** 2

    x = torch.linspace(-1.0, 1.0, 1001, dtype=torch.float64)
    modality = Scalar(offset, weight=torch.zeros(1, dtype=torch.float32))
    result = fit(space("a"), {"m": modality}, {"m": x})
    assert result.status == "converged"
    assert result["a"].error == pytest.approx(1001**-0.5, rel=1e-6)
    assert result["a"].value == pytest.approx(0.0, abs=1e-3 * 1001**-0.5)


# ---- data that cannot be counts


@pytest.mark.parametrize(
    ("bad", "rule", "seen"),
    [
        (math.nan, "values must be finite", "nan"),
        (math.inf, "values must be finite", "inf"),
        (-3.0, "counts must be >= 0", "-3"),
    ],
)
def test_impossible_counts_are_an_error_with_rule_value_index_and_plugin(bad, rule, seen):
    x = torch.full((20, 2), 50.0, dtype=torch.float64)
    x[17, 1] = bad
    counts = PoissonCounts(signal=[5.0, 9.0], background=[50.0, 40.0])
    with pytest.raises(ObservationError, match=rf"{rule}, got {seen} at observation 17, entry \[1\].*plugin 'tracker'"):
        fit(space("mu"), {"tracker": counts}, {"tracker": x})


# ---- a modality that is dropped, unknown or not a number


def two_detectors():
    return {n: Gaussian(parameter_names=("mu",), sd=s) for n, s in (("north", 1.0), ("south", 2.0))}


def test_a_dropped_modality_leaves_the_estimate_of_the_others():
    modalities = two_detectors()
    assert fit(space("mu"), modalities, {"south": [[1.5]]})["mu"].error == pytest.approx(2.0, rel=1e-12)
    both = fit(space("mu"), modalities, {"south": [[1.5]], "north": [[0.5]]})
    assert both["mu"].error == pytest.approx(1 / math.sqrt(1.25), rel=1e-12)


def test_an_unknown_modality_is_an_error_that_lists_those_there_are():
    with pytest.raises(UnknownPluginError, match="'east'; there are north, south"):
        fit(space("mu"), two_detectors(), {"north": [[0.5]], "east": [[1.0]]})
    with pytest.raises(KeyError):
        fit(space("mu"), two_detectors(), {"north": [[0.5]], "east": [[1.0]]})


def test_a_modality_of_nan_is_an_error_and_not_a_missing_one():
    with pytest.raises(ObservationError, match=r"nan at observation 0.*plugin 'south'"):
        fit(space("mu"), two_detectors(), {"north": [[0.5]], "south": [[math.nan]]})


def test_a_modality_of_none_is_an_error():
    with pytest.raises(ObservationError, match="plugin 'south'"):
        fit(space("mu"), two_detectors(), {"north": [[0.5]], "south": None})


# ---- the prior


@pytest.mark.parametrize("plugins", [1, 3, 12])
def test_the_prior_is_added_once_however_many_plugins_there_are(plugins):
    """Normal prior (1, 0.5²) and n measurements of sd 2: precision 4 + n/4, mean by weights."""
    parameters = ParameterSpace([Parameter("mu", prior=Normal(1.0, 0.5))])
    x = [3.0 + 0.1 * i for i in range(plugins)]
    modalities = {f"p{i}": Gaussian(parameter_names=("mu",), sd=2.0) for i in range(plugins)}
    data = {f"p{i}": [[x[i]]] for i in range(plugins)}
    result = fit(parameters, modalities, data, prior=True)
    precision = 4.0 + plugins / 4.0
    assert result["mu"].value == pytest.approx((4.0 * 1.0 + sum(x) / 4.0) / precision, rel=1e-10)
    assert result["mu"].error == pytest.approx(precision**-0.5, rel=1e-10)
    assert float(result.contributions["prior"].information[0, 0]) == pytest.approx(4.0, rel=1e-12)
    without = fit(parameters, modalities, data)
    assert without["mu"].error == pytest.approx(2.0 / math.sqrt(plugins), rel=1e-10)
    assert "prior" not in without.contributions


# ---- the same through the front door


@pytest.fixture
def registry(tmp_path):
    registry = Registry.create(tmp_path / "analysis", parameters=[Parameter("mu", prior=Uniform(0.0, 10.0))])
    for name, background in (("north", 50.0), ("south", 40.0)):
        registry.append(name, PoissonCounts(signal=[5.0, 9.0], background=[background, 40.0]))
    return registry


def test_a_registry_refuses_the_same_inputs(registry):
    good = torch.tensor([[57.0, 49.0], [60.0, 51.0]])
    assert registry.estimate({"north": good}).converged
    assert registry.estimate({"north": good, "south": good + 1.0}).converged
    with pytest.raises(ObservationError, match=r"'north' and 'south'.*counted twice"):
        registry.estimate({"north": good, "south": good})
    with pytest.raises(UnknownPluginError, match=r"'east'.*north, south"):
        registry.estimate({"north": good, "east": good + 1.0})
    with pytest.raises(ObservationError, match=r"counts must be >= 0, got -1 at observation 0, entry \[1\].*'north'"):
        registry.estimate({"north": [[57.0, -1.0]]})
    with pytest.raises(ObservationError, match=r"got nan at observation 1.*'south'"):
        registry.log_evidence({"south": [[57.0, 1.0], [math.nan, 2.0]]}, torch.tensor([[1.0]]))


def test_a_registry_adds_the_prior_once(registry):
    x = torch.tensor([[57.0, 49.0], [60.0, 51.0]])
    theta, data = torch.tensor([[1.0], [2.0]]), {"north": x, "south": x + 1.0}
    gap = registry.log_evidence(data, theta, prior=True) - registry.log_evidence(data, theta)
    assert gap.tolist() == pytest.approx([-math.log(10.0)] * 2, rel=1e-12)
