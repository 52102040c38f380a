"""Designs against closed forms: Neyman's allocation, Kiefer and Wolfowitz's line, Hoel and Levine's extrapolation."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, Uniform

from engine import Evidence, Linear, Modality, Parameter, ParameterSpace, Registry, Simplex
from engine.errors import EstimateError, ParameterError
from engine.estimate import estimate
from engine.information import Outlook, dependence, design, forecast
from engine.information.rounding import whole_numbers
from modalities import Gaussian, PoissonCounts


def two(sd=(2.0, 1.0)):
    space = ParameterSpace([Parameter("a"), Parameter("b")])
    kinds = {n: Gaussian(parameter_names=(n,), sd=s) for n, s in zip("ab", sd, strict=True)}
    return Outlook.at(space, kinds, torch.zeros(2))


def line(theta, t):
    return theta[..., :1] + theta[..., 1:] * t


def on_a_line(times, sd=1.0):
    space = ParameterSpace([Parameter("offset"), Parameter("slope")])
    kinds = {
        str(t): Gaussian(line, parameter_names=("offset", "slope"), sd=[sd], inputs={"t": [float(t)]}) for t in times
    }
    return Outlook.at(space, kinds, torch.zeros(2))


def plan(outlook, costs, budget, target=None, **settings):
    return design(outlook, costs, budget, target, whole=False, **settings)


@pytest.mark.parametrize(
    ("criterion", "target"), [("A", None), ("c", {"a": 1.0, "b": 1.0}), ("c", {"a": 1.0, "b": -1.0})]
)
def test_numbers_of_two_strata_are_neymans_allocation(criterion, target):
    """Min σ₁²/n₁ + σ₂²/n₂ under c₁n₁ + c₂n₂ = B: nᵢ = B (σᵢ/√cᵢ) / Σ σⱼ√cⱼ, with the value (Σ σⱼ√cⱼ)² / B."""
    sd, cost, B = (2.0, 1.0), (3.0, 0.5), 70.0
    best = plan(two(sd), dict(zip("ab", cost, strict=True)), B, target, criterion=criterion)
    root = sum(s * math.sqrt(c) for s, c in zip(sd, cost, strict=True))
    for name, s, c in zip("ab", sd, cost, strict=True):
        assert best.more[name] == pytest.approx(B * s / math.sqrt(c) / root, rel=1e-4)
    assert best.value == pytest.approx(root**2 / B, rel=1e-8)
    assert best.cost == pytest.approx(B, rel=1e-6)


def test_tolerances_weigh_the_errors_of_a_total():
    """Σ C_jj / t_j²: as if σⱼ were σⱼ / tⱼ."""
    best = plan(two(), {"a": 1.0, "b": 1.0}, 30.0, {"a": 4.0, "b": 1.0}, criterion="A")
    assert best.more["a"] == pytest.approx(10.0, rel=1e-4)
    assert best.value == pytest.approx(4.0 / 10.0 / 16.0 + 1.0 / 20.0, rel=1e-8)


def test_a_combination_is_the_variance_of_its_coefficients():
    best = plan(two(), {"a": 1.0, "b": 1.0}, 30.0, {"a": 3.0, "b": -1.0})
    assert best.value == pytest.approx((3.0 * 2.0 + 1.0) ** 2 / 30.0, rel=1e-8)
    assert best.more["a"] == pytest.approx(30.0 * 6.0 / 7.0, rel=1e-4)


def test_the_volume_is_least_where_every_kind_has_half_of_the_budget():
    best = plan(two(), {"a": 3.0, "b": 0.5}, 70.0, criterion="D")
    assert best.more["a"] == pytest.approx(70.0 / 2 / 3.0, rel=1e-4)
    assert best.more["b"] == pytest.approx(70.0 / 2 / 0.5, rel=1e-4)
    assert best.value == pytest.approx(math.log(4.0 / (35.0 / 3.0) * 1.0 / 70.0), abs=1e-6)


def test_a_straight_line_is_measured_at_its_ends():
    """Kiefer and Wolfowitz (1960): D-optimal on [−1, 1] is half at each end."""
    times = np.linspace(-1.0, 1.0, 9).tolist()
    best = plan(on_a_line(times), dict.fromkeys(map(str, times), 1.0), 10.0, criterion="D")
    assert best.more["-1.0"] == pytest.approx(5.0, rel=1e-3)
    assert best.more["1.0"] == pytest.approx(5.0, rel=1e-3)
    assert sum(best.more.values()) == pytest.approx(10.0, rel=1e-6)


@pytest.mark.parametrize("t", [1.5, 2.0, 5.0])
def test_extrapolation_of_a_line_is_hoel_and_levines(t):
    """Weights |L_i(t)| / Σ|L| at ±1 with Lagrange's L, and the variance (Σ|L|)² = t² for one observation in all."""
    best = plan(
        on_a_line([-1.0, -0.5, 0.0, 0.5, 1.0]),
        dict.fromkeys(["-1.0", "-0.5", "0.0", "0.5", "1.0"], 1.0),
        1.0,
        {"offset": 1.0, "slope": t},
    )
    assert best.value == pytest.approx(t**2, rel=1e-7)
    assert best.more["-1.0"] == pytest.approx(0.5 * (t - 1.0) / t, abs=1e-3)
    assert best.more["1.0"] == pytest.approx(0.5 * (t + 1.0) / t, abs=1e-3)


def test_the_volume_of_some_parameters_leaves_the_others_free():
    """D for the slope alone is its variance, with the offset free: c-optimal, 1/Σt² at ±1."""
    outlook, costs = on_a_line([-1.0, 0.0, 1.0]), dict.fromkeys(["-1.0", "0.0", "1.0"], 1.0)
    volume, one = plan(outlook, costs, 6.0, ["slope"], criterion="D"), plan(outlook, costs, 6.0, "slope")
    assert volume.value == pytest.approx(math.log(1.0 / 6.0), abs=1e-6)
    assert one.value == pytest.approx(1.0 / 6.0, rel=1e-7)


def test_a_single_direction_is_enough_where_only_that_is_asked_for():
    """The offset alone is known best by measuring at 0 alone, where nothing is known of the slope."""
    best = plan(on_a_line([-1.0, 0.0, 2.0]), dict.fromkeys(["-1.0", "0.0", "2.0"], 1.0), 4.0, "offset")
    assert best.value == pytest.approx(0.25, rel=1e-6)
    assert best.forecast.sd["offset"] == pytest.approx(0.5, rel=1e-5)


def test_what_is_known_already_counts():
    """With n₀ of a known, the best is n_a + n₀ = n_b for equal errors and costs."""
    outlook = two((1.0, 1.0))
    known = Outlook(
        outlook.parameters, outlook.theta, torch.diag(torch.tensor([6.0, 0.0]).double()), outlook.units, outlook.held
    )
    best = plan(known, {"a": 1.0, "b": 1.0}, 10.0, criterion="A")
    assert best.more == pytest.approx({"a": 2.0, "b": 8.0}, abs=1e-3)


def test_limits_hold_and_the_rest_of_the_budget_goes_elsewhere():
    settings = {"criterion": "A", "at_least": {"b": 3.0}, "at_most": {"a": 5.0, "b": 40.0}}
    best = plan(two(), {"a": 1.0, "b": 1.0}, 30.0, **settings)
    assert best.more == pytest.approx({"a": 5.0, "b": 25.0}, abs=1e-3)
    settings["at_most"] = {"a": 5.0, "b": 7.0}
    best = plan(two(), {"a": 1.0, "b": 1.0}, 30.0, **settings)
    assert best.more == pytest.approx({"a": 5.0, "b": 7.0}, abs=1e-3)
    assert best.cost == pytest.approx(12.0, abs=1e-3)


@pytest.mark.parametrize("criterion", ["c", "A", "D"])
@pytest.mark.parametrize("seed", range(4))
def test_whole_numbers_are_the_best_that_a_search_of_all_finds(criterion, seed):
    generator = np.random.default_rng(seed)
    space = ParameterSpace([Parameter("a"), Parameter("b")])
    slopes = generator.normal(size=(3, 2))
    kinds = {str(m): Gaussian(_sum_of, parameter_names=("a", "b"), sd=[1.0], inputs={"w": slopes[m]}) for m in range(3)}
    outlook = Outlook.at(space, kinds, torch.zeros(2))
    costs, budget = dict(zip(kinds, (1.0, 1.7, 2.3), strict=True)), 17.0
    target = "a" if criterion == "c" else None
    best = design(outlook, costs, budget, target, criterion=criterion)
    reached = math.inf
    for numbers in itertools.product(range(18), range(11), range(8)):
        if numbers @ np.array(list(costs.values())) <= budget:
            J = sum(n * np.outer(w, w) for n, w in zip(numbers, slopes, strict=True))
            if np.linalg.matrix_rank(J) == 2:
                C = np.linalg.inv(J)
                reached = min(reached, {"c": C[0, 0], "A": C.trace(), "D": math.log(np.linalg.det(C))}[criterion])
    assert best.value == pytest.approx(reached, rel=1e-6, abs=1e-6)
    assert best.bound <= best.value + 1e-6
    assert all(k == round(k) for k in best.more.values())
    assert best.cost <= budget + 1e-6
    assert 0.85 < best.efficiency <= 1.0


def _sum_of(theta, w):
    return (theta * w).sum(-1, keepdim=True)


def test_a_cheap_kind_beside_an_expensive_one_is_filled_up_quickly():
    best = design(two(), {"a": 1000.0, "b": 0.01}, 1500.0, criterion="A")
    assert best.more["a"] == 1
    assert best.more["b"] == 50_000
    assert best.cost <= 1500.0


def test_rounding_alone_never_leaves_the_limits():
    def variance(n):
        return float((1.0 / np.maximum(n, 1e-9)).sum())

    got = whole_numbers(variance, np.array([2.5, 2.5]), np.ones(2), 5.0, np.array([0.0, 0.0]), np.array([2.9, 9.0]))
    assert got.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"costs": {"c": 1.0}}, "costs names 'c', of which no more can be taken; there are a, b"),
        ({"costs": {"a": 0.0}}, "costs of 'a' must be > 0 and finite, got 0.0"),
        ({"budget": -1.0}, "the budget of a design must be > 0 and finite"),
        ({"budget": 0.5}, "a budget of 0.5 buys no observation, of which the cheapest costs 1"),
        ({"budget": 1.0}, r"buys no whole numbers of a, b that determine '[ab]'"),
        ({"costs": {"a": 1.0}, "target": "b", "criterion": "c"}, "no numbers of a determine 'b'"),
        ({"costs": {}}, "cost of at least one kind; there are a, b"),
        ({"at_least": {"a": 50.0}}, "at_least costs 50, more than the budget of 30"),
        ({"at_least": {"a": 5.0}, "at_most": {"a": 2.0}}, "at_least of 'a' is more than its at_most"),
        ({"criterion": "E"}, "one of c, A, D, got 'E'"),
        ({"criterion": "c"}, "criterion 'c' needs a target, one of a, b"),
        ({"criterion": "c", "target": ["a", "b"]}, "one parameter or a combination"),
        ({"costs": {"a": 1.0}}, "no numbers of a determine 'b'"),
        ({"target": {"a": -1.0}}, "tolerances > 0"),
        ({"target": {"a": math.nan}}, "finite numbers"),
        ({"target": {"a": "x"}}, "finite numbers"),
        ({"target": 3}, "a target is a parameter, several, or parameter -> number, got 3"),
        ({"target": ["a", 3]}, "a target is a parameter, several, .* got .'a', 3."),
        ({"costs": "a"}, "costs must be numbers by kind, as {'a': 1.0}, got 'a'"),
        ({"costs": {"a": "1"}}, "costs of 'a' must be > 0 and finite, got '1'"),
        ({"costs": {"a": True}}, "costs of 'a' must be > 0 and finite, got True"),
        ({"budget": "30"}, "the budget of a design must be > 0 and finite, .* got '30'"),
        ({"budget": None}, "the budget of a design must be > 0 and finite, .* got None"),
        ({"at_least": {"a": "x"}}, "at_least of 'a' must be >= 0, got 'x'"),
        ({"at_least": 3}, "at_least must be numbers by kind, .* got 3"),
        ({"at_most": 0}, "at_most must be numbers by kind, .* got 0"),
        ({"at_most": {"a": None}}, "at_most of 'a' must be >= 0, got None"),
        ({"costs": {"a": 1.0}, "at_least": {"b": 1}}, "at_least names 'b', which has no cost"),
        ({"whole": "no"}, "whole is True or False, got 'no'"),
        ({"seed": -1}, "a seed is a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(change, said):
    settings = {"costs": {"a": 1.0, "b": 1.0}, "budget": 30.0, "criterion": "A", **change}
    with pytest.raises(EstimateError, match=said):
        design(two(), **settings)


def test_a_forecast_adds_information():
    """Poisson counts of a rate r have information 1/r each, a prior 1/s²."""
    space = ParameterSpace([Parameter("r", prior=Normal(4.0, 0.5), bounds=(0.0, math.inf))])
    counts = {"counts": PoissonCounts(signal=[1.0], strength="r")}
    outlook = Outlook.at(space, counts, {"r": 5.0}, prior=True)
    found = forecast(outlook, {"counts": 10})
    assert found.sd["r"] == pytest.approx((10 / 5.0 + 4.0) ** -0.5, rel=1e-9)
    assert found.before.sd.item() == pytest.approx(0.5, rel=1e-9)


def test_a_forecast_after_an_estimate_has_the_information_that_the_data_turned_out_to_have():
    """Observed n/r̂² = n / x̄² beside 1/r̂ for those to come."""
    space = ParameterSpace([Parameter("r", bounds=(0.0, math.inf))])
    modality = PoissonCounts(signal=[1.0], strength="r")
    fit = estimate(Evidence(space, {"counts": modality}, {"counts": [[3.0], [7.0], [8.0]]}))
    found = forecast(fit, {"counts": 5})
    r = 6.0
    assert found.sd["r"] == pytest.approx((18.0 / r**2 + 5.0 / r) ** -0.5, rel=1e-7)


def test_a_kind_without_a_closed_form_is_simulated():
    class Simulated(Gaussian):
        has_expected_information = False

    space = ParameterSpace([Parameter("a")])
    outlook = Outlook.at(space, {"x": Simulated(parameter_names=("a",), sd=2.0)}, torch.zeros(1), seed=3)
    n = 20_000
    assert outlook.units["x"].item() == pytest.approx(0.25, abs=4.0 * 0.25 * math.sqrt(2.0 / n))


def test_a_kind_that_nobody_has_data_of_makes_a_parameter_known():
    space = ParameterSpace([Parameter("a"), Parameter("b")])
    fit = estimate(Evidence(space, {"sum": Gaussian(_total, parameter_names=("a", "b"), sd=[1.0])}, {"sum": [[3.0]]}))
    assert fit.status == "not_identified"
    with pytest.raises(EstimateError, match="no numbers of sum determine 'a'"):
        design(fit, {"sum": 1.0}, 10.0, "a")
    found = forecast(fit, {"only b": 4}, new={"only b": Gaussian(parameter_names=("b",), sd=1.0)})
    assert math.isinf(found.before.sd[0])
    assert found.sd["a"] == pytest.approx(math.sqrt(1.0 + 0.25), rel=1e-9)
    assert "now known" in str(found)


def _total(theta):
    return theta.sum(-1, keepdim=True)


def test_fixed_parameters_and_constraints_count():
    space = ParameterSpace([Parameter("a"), Parameter("b")])
    kinds = {"a": Gaussian(parameter_names=("a",), sd=1.0), "b": Gaussian(parameter_names=("b",), sd=1.0)}
    data = {"a": [[1.0]], "b": [[2.0]]}
    held = estimate(Evidence(space, kinds, data), fixed={"b": 2.0})
    assert forecast(held, {"a": 3}).sd == pytest.approx({"a": 0.5, "b": 0.0})
    with pytest.raises(EstimateError, match="'b' is held"):
        design(held, {"a": 1.0}, 3.0, "b")
    tied = ParameterSpace([Parameter("a"), Parameter("b")], [Linear({"a": 1, "b": -1}, equal=0)])
    both = estimate(Evidence(tied, kinds, data))
    assert forecast(both, {"a": 3}).sd == pytest.approx({"a": 5.0**-0.5, "b": 5.0**-0.5}, rel=1e-6)
    best = design(both, {"a": 1.0, "b": 2.0}, 4.0, "b")  # one parameter: the cheap kind alone
    assert best.more == {"a": 4, "b": 0}
    assert best.value == pytest.approx(1.0 / 6.0, rel=1e-6)


def test_three_fractions_that_add_up_to_one():
    """Along a simplex of three, C of the first of equal fractions is (2/3) σ²."""
    space = ParameterSpace([Parameter(n, Uniform(0.0, 1.0)) for n in "fgh"], [Simplex(["f", "g", "h"])])
    kinds = {"x": Gaussian(parameter_names=("f", "g", "h"), sd=0.1)}
    fit = estimate(Evidence(space, kinds, {"x": [[0.3, 0.3, 0.4]]}))
    assert forecast(fit, {"x": 3}).sd["f"] == pytest.approx(math.sqrt(2.0 / 3.0 * 0.01 / 4.0), rel=1e-6)
    best = design(fit, {"x": 1.0}, 3.0, "f")
    assert best.value == pytest.approx(2.0 / 3.0 * 0.01 / 4.0, rel=1e-6)


def test_a_bad_request_for_a_forecast_is_refused():
    with pytest.raises(EstimateError, match="no kind of data 'c' to take more of; there are a, b"):
        forecast(two(), {"c": 1})
    with pytest.raises(EstimateError, match=r"must lie between 0 and 1e\+12, got -1"):
        forecast(two(), {"a": -1})
    with pytest.raises(EstimateError, match="has its kinds of data already"):
        forecast(two(), {"a": 1}, new={"c": Gaussian(parameter_names=("a",), sd=1.0)})


def test_parts_that_were_found_to_depend_have_no_forecast():
    space = ParameterSpace([Parameter("mu")])
    kinds = {n: Gaussian(parameter_names=("mu",), sd=1.0) for n in "ab"}
    e = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit = estimate(Evidence(space, kinds, {"a": e[:, :1], "b": 0.8 * e[:, :1] + 0.6 * e[:, 1:]}))
    assert forecast(fit, {"a": 100}).sd["mu"] == pytest.approx(500.0**-0.5, rel=1e-6)
    with pytest.raises(
        EstimateError, match=r"'a' and 'b' depend on each other; append an interaction of them \(or train"
    ):
        forecast(dependence(fit).applied(fit), {"a": 100})


def refitted(seed, sets):
    """The mean error of bao's second sample simulated at θ̂ and refitted with everything, and the forecast."""
    from pathlib import Path

    registry = Registry.open(Path(__file__).parents[3])
    fit = registry.estimate()
    told = forecast(fit, {"bao": 1})
    modality = registry.modality("bao")
    local = fit.theta[fit.parameters.indices(modality.parameter_names)]
    x = modality.simulate(local.expand(sets, -1), torch.Generator().manual_seed(seed))
    data = {n: o.expand(sets, *o.shape) for n, o in registry.observed.items()}
    data["bao"] = torch.cat([data["bao"], x[:, None]], 1)
    many = registry.estimate_many(data, start=fit.theta, screen=0, polish=1, shape=False)
    return fit, told, many


def test_a_doubled_bao_sample_has_the_forecast_error():
    """Within 5 % for every parameter, of 40 refits of the cosmology workspace."""
    fit, told, many = refitted(seed=0, sets=40)
    sd = many.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    for i, name in enumerate(fit.parameters.names):
        assert told.sd[name] == pytest.approx(float(sd[:, i].mean()), rel=0.05), name
    assert told.sd["rd"] < 0.99 * fit["rd"].error  # and it is another error than the one before
    assert told.sd["Om"] < 0.9 * fit["Om"].error


class Tie(Modality):
    """log p(a, b | mu) − log p(a | mu) − log p(b | mu) of noises with sd 1 that correlate by 0.8."""

    parts = ("a", "b")

    def __init__(self):
        super().__init__(parameter_names=("mu",), event_shape=(2,))

    def log_evidence(self, x, theta):
        z = x - theta
        joint = (z[..., 0] ** 2 - 1.6 * z[..., 0] * z[..., 1] + z[..., 1] ** 2) / 0.36
        return -0.5 * math.log(0.36) - 0.5 * joint + 0.5 * z.square().sum(-1)


def tied(n=40):
    kinds = {k: Gaussian(parameter_names=("mu",), sd=1.0) for k in "abc"} | {"ab": Tie()}
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = {"a": x[:, :1], "b": 0.8 * x[:, :1] + 0.6 * x[:, 1:2], "c": x[:, 2:]}
    return estimate(Evidence(ParameterSpace([Parameter("mu")]), kinds, data))


def test_kinds_that_are_tied_bring_their_interaction():
    """A pair with ρ = 0.8 tells 1ᵀ C⁻¹ 1 = 2 / 1.8 of mu, and not 2."""
    found = forecast(tied(), {"a": 60, "b": 60})
    assert found.sd["mu"] == pytest.approx((100 * 2 / 1.8 + 40) ** -0.5, rel=1e-9)


def test_tied_kinds_are_bought_together():
    """A pair for 2 tells 1.11, one of c for 1.5 tells 1: all of 30 goes to c, and to pairs where c costs 2."""
    fit = tied()
    assert design(fit, {"a": 1.0, "b": 1.0, "c": 1.5}, 30.0).more == {"a": 0, "b": 0, "c": 20}
    best = design(fit, {"a": 1.0, "b": 1.0, "c": 2.0}, 30.0)
    assert best.more == {"a": 15, "b": 15, "c": 0}
    assert (best.cost, best.value) == (30.0, pytest.approx(1 / (55 * 2 / 1.8 + 40), rel=1e-9))
    some = design(fit, {"a": 1.0, "b": 1.0, "c": 2.0}, 30.0, at_most={"b": 5})
    assert some.more == {"a": 5, "b": 5, "c": 10}


def test_an_interaction_is_no_kind_to_be_bought():
    fit = tied()
    for ask in (lambda: forecast(fit, {"ab": 10}), lambda: design(fit, {"ab": 1.0}, 10.0)):
        with pytest.raises(EstimateError, match=r"'ab',? (which )?has no data of its own"):
            ask()
    with pytest.raises(EstimateError, match="'a' and 'b' together, of which as many must be taken"):
        forecast(fit, {"a": 10})
    with pytest.raises(EstimateError, match="give the costs of both"):
        design(fit, {"a": 1.0}, 10.0)
    with pytest.raises(EstimateError, match="'tie' is an interaction"):
        forecast(fit, {"tie": 1}, new={"tie": Tie()})


def test_kinds_that_tell_nothing_of_the_target_are_refused():
    space = ParameterSpace([Parameter("a"), Parameter("b")])
    kinds = {n: Gaussian(parameter_names=(n,), sd=1.0) for n in "ab"}
    fit = estimate(Evidence(space, kinds, {"a": [[0.0]], "b": [[1.0]]}))
    with pytest.raises(EstimateError, match="nothing that a tell makes 'b' better known"):
        design(fit, {"a": 1.0}, 10.0, "b")
    for criterion in "AD":
        with pytest.raises(EstimateError, match="nothing that a tell makes 'b' better known"):
            design(fit, {"a": 1.0}, 10.0, ["b"], criterion=criterion)


def test_a_parameter_that_nothing_tells_of_is_no_obstacle_where_it_is_not_asked_for():
    assert design(two(), {"a": 1.0}, 5.0, "a").value == pytest.approx(4.0 / 5.0)


SPACE = ParameterSpace([Parameter("a"), Parameter("b")])
KIND = Gaussian(parameter_names=("a",), sd=1.0)
ZEROS = torch.zeros(2)


def fitted():
    return estimate(Evidence(ParameterSpace([Parameter("a")]), {"k": KIND}, {"k": [[1.0], [2.0]]}))


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: forecast(two(), {"a": "x"}), "further observations of 'a' must lie between 0 and 1e\\+12, got 'x'"),
        (lambda: forecast(two(), {"a": "3"}), "further observations of 'a' must lie between 0 and 1e\\+12, got '3'"),
        (lambda: forecast(two(), {"a": True}), "further observations of 'a' must lie between 0 and 1e\\+12, got True"),
        (lambda: forecast(two(), {"a": 10**30}), "must lie between 0 and 1e\\+12, got 1000000"),
        (
            lambda: design(two(), costs={"a": 1e-9, "b": 1.0}, budget=1e6),
            "buys 1e\\+15 of 'a', beside which other kinds are lost",
        ),
        (lambda: forecast(two(), {"a": None}), "further observations of 'a' must lie between 0 and 1e\\+12, got None"),
        (lambda: forecast(two(), 3), "asked for as kind -> number, got 3"),
        (lambda: forecast(two(), {"a": 1}, seed="x"), "a seed is a whole number"),
        (lambda: forecast(None, {"a": 1}), "a forecast takes one Estimate or an Outlook, got None"),
        (lambda: design([], {"a": 1.0}, 1.0), "a forecast takes one Estimate or an Outlook, got a list"),
        (lambda: forecast(fitted(), {"k": 1}, seed=-1), "a seed is a whole number"),
        (lambda: forecast(fitted(), {"k": 1}, new=3), "plugins must be given by name, .* got 3"),
        (lambda: forecast(fitted(), {"k": 1}, new={"n": 3}), "plugin 'n' must be a Modality with a name, got 3"),
        (
            lambda: forecast(fitted(), {"n": 1}, new={"n": Gaussian(parameter_names=("z",), sd=1.0)}),
            "plugin 'n' depends on 'z', and the parameters are a",
        ),
        (lambda: Outlook.after(3), "a forecast takes one Estimate or an Outlook, got 3"),
        (
            lambda: Outlook.after(fitted(), simulations="x"),
            "simulations must be a whole number of at least 100, got 'x'",
        ),
        (lambda: Outlook.at(3, {}, ZEROS), "must be a ParameterSpace, got 3"),
        (lambda: Outlook.at(SPACE, {"a": 3}, ZEROS), "plugin 'a' must be a Modality"),
        (
            lambda: Outlook.at(SPACE, {"a": KIND}, ZEROS, simulations=1),
            "simulations must be a whole number of at least 100",
        ),
    ],
)
def test_what_no_forecast_can_be_asked_with_is_refused(ask, said):
    with pytest.raises(EstimateError, match=said):
        ask()


@pytest.mark.parametrize(
    ("theta", "said"),
    [
        ("ab", "by name or in order, got 'ab'"),
        (3, "got 3"),
        ({"a": "x", "b": 1.0}, "θ must be numbers, got 'x' for 'a'"),
    ],
)
def test_a_place_that_is_none_is_refused(theta, said):
    with pytest.raises(ParameterError, match=said):
        Outlook.at(SPACE, {"a": KIND}, theta)


def test_a_registry_is_no_estimate(tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("a")])
    for ask in (lambda: forecast(registry, {"a": 1}), lambda: design(registry, {"a": 1.0}, 1.0, "a")):
        with pytest.raises(EstimateError, match=r"got a Registry; pass registry\.estimate\(...\)"):
            ask()


def test_limits_of_tied_kinds_name_the_kinds_that_were_written():
    fit, costs = tied(), {"a": 1.0, "b": 1.0, "c": 2.0}
    with pytest.raises(EstimateError, match="at_least of 'b' is more than its at_most"):
        design(fit, costs, 60.0, at_least={"b": 5}, at_most={"b": 2})
    with pytest.raises(
        EstimateError, match="at_least of 'b' is more than at_most of 'a', and as many of both are taken"
    ):
        design(fit, costs, 60.0, at_least={"b": 5}, at_most={"a": 2})


def test_a_forecast_and_a_design_say_what_the_estimate_is_that_they_rest_on():
    good = forecast(fitted(), {"k": 1})
    assert (good.status, good.converged, good.doubt) == ("converged", True, "")
    assert str(good).startswith("after 1 more of 'k'")
    assert forecast(two(), {"a": 1}).to_dict()["status"] is None  # before any data
    fit = estimate(Evidence(SPACE, {"k": KIND}, {"k": [[1.0], [2.0]]}))
    poor, best = forecast(fit, {"k": 1}), design(fit, {"k": 1.0}, 3.0, "a")
    for found in (poor, best):
        assert str(found).startswith("it rests on an estimate that is not_identified: ")
        told = found.to_dict()
        assert (told["status"], told["converged"], told["reason"]) == ("not_identified", False, fit.reason)
        assert str(found).count("it rests on") == 1
