"""Ratios, p-values and probabilities of hypotheses against closed forms and simulation."""

import math

import pytest
import scipy.stats
import torch
from torch.distributions import Categorical as Index
from torch.distributions import Normal, Uniform

from engine import EstimateError, Evidence, Parameter, ParameterError, ParameterSpace
from engine.hypotheses import compare, probabilities
from modalities import Categorical, Constraint, Gaussian, PoissonCounts


def gaussian(x, bounds=(-math.inf, math.inf)):
    space = ParameterSpace([Parameter("a", bounds=bounds), Parameter("b")])
    modality = Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.6], [0.6, 2.0]])
    return Evidence(space, {"m": modality}, {"m": x})


def test_wilks_p_value_of_a_gaussian_mean_is_exact():
    result = compare(gaussian([[1.5, -0.5]]), {"a": 0.0})
    assert result.log_ratio == pytest.approx(0.5 * 1.5**2, rel=1e-10)  # profiled over b: (x_a)² / 2σ_a²
    assert result.p_value == pytest.approx(scipy.stats.chi2.sf(1.5**2, 1), rel=1e-9)
    assert (result.method, result.degrees_of_freedom) == ("wilks", 1)


def test_fixing_both_components_has_two_degrees_of_freedom():
    x = torch.tensor([[1.5, -0.5]], dtype=torch.float64)
    C = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)
    q = float(x @ torch.linalg.inv(C) @ x.T)
    result = compare(gaussian(x), {"a": 0.0, "b": 0.0})
    assert result.p_value == pytest.approx(math.exp(-q / 2), rel=1e-9)  # χ²₂


def test_a_null_on_the_bound_has_half_the_p_value():
    result = compare(gaussian([[1.5, -0.5]], bounds=(0.0, math.inf)), {"a": 0.0})
    assert result.p_value == pytest.approx(0.5 * scipy.stats.chi2.sf(1.5**2, 1), rel=1e-8)
    assert compare(gaussian([[-1.5, -0.5]], bounds=(0.0, math.inf)), {"a": 0.0}).p_value == 1.0


def test_two_points_have_neyman_and_pearsons_p_value_against_simulation():
    space = ParameterSpace([Parameter("mu", Uniform(0.0, 10.0))])
    counts = PoissonCounts(signal=[50.0, 90.0], background=[500.0, 400.0], strength="mu")
    x = torch.tensor([[540.0, 470.0]], dtype=torch.float64)
    result = compare(Evidence(space, {"c": counts}, {"c": x}), {"mu": 0.0}, {"mu": 1.0})
    null, other = torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
    toys = counts.simulate(null.expand(40_000, 1), torch.Generator().manual_seed(3))
    ratio = counts(toys, other) - counts(toys, null)
    truth = float((ratio >= result.log_ratio).double().mean())
    se = math.sqrt(truth * (1 - truth) / len(ratio))
    assert result.method == "normal"
    assert result.p_value == pytest.approx(truth, abs=5 * se + 0.1 * truth)  # 5 se, and 10 % for the normal law


def test_the_ratio_changes_sign_with_the_roles():
    evidence = gaussian([[1.5, -0.5]])
    one, two = {"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0}
    assert compare(evidence, one, two).log_ratio == pytest.approx(-compare(evidence, two, one).log_ratio)
    assert compare(evidence, one, two).log_ratio > 0


def test_hypotheses_without_a_law_get_no_p_value():
    result = compare(gaussian([[1.5, -0.5]]), {"a": 0.0}, {"b": 0.0})
    assert result.p_value is None
    assert "neither nested" in result.reason


def test_a_parameter_that_no_plugin_hears_costs_no_degree_of_freedom():
    space = ParameterSpace([Parameter("a"), Parameter("idle", Normal(0.0, 1.0))])
    evidence = Evidence(space, {"m": Gaussian(parameter_names=("a",), sd=1.0)}, {"m": [[2.0]]})
    assert compare(evidence, {"a": 0.0, "idle": 0.0}).degrees_of_freedom == 1


def test_probabilities_are_bayes_theorem_over_a_discrete_theta():
    table = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]], dtype=torch.float64)
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    space = ParameterSpace([Parameter("h", prior=Index(prior))])
    modality = Categorical(parameter_names=("h",), probabilities=table)
    other = Categorical(parameter_names=("h",), probabilities=table.flip(1))
    x, y = torch.tensor([0, 2, 2, 1]), torch.tensor([1, 1, 0])
    answer = probabilities(Evidence(space, {"a": modality, "b": other}, {"a": x, "b": y}))
    truth = prior * table[:, x].prod(1) * table.flip(1)[:, y].prod(1)
    truth = truth / truth.sum()
    assert list(answer.values()) == pytest.approx(truth.tolist(), rel=1e-6)  # weights are kept to 7 digits
    assert list(answer) == [0, 1, 2]


def test_given_points_are_weighed_by_name_and_with_weights():
    space = ParameterSpace([Parameter("mu")])
    evidence = Evidence(space, {"a": Constraint("mu")}, {"a": [[1.0]]})
    answer = probabilities(evidence, {"null": {"mu": 0.0}, "one": {"mu": 1.0}}, weights=[3.0, 1.0])
    odds = 3.0 * math.exp(-0.5)
    assert answer == pytest.approx({"null": odds / (1 + odds), "one": 1 / (1 + odds)})
    assert probabilities(evidence, torch.tensor([[0.0], [1.0]]))[1] == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_unusable_hypotheses_are_refused():
    space = ParameterSpace([Parameter("mu")])
    evidence = Evidence(space, {"a": Constraint("mu")}, {"a": [[1.0]]})
    with pytest.raises(ParameterError, match="not an index"):
        probabilities(evidence)
    with pytest.raises(ParameterError, match="weights"):
        probabilities(evidence, torch.tensor([[0.0], [1.0]]), weights=[1.0, -1.0])
    with pytest.raises(EstimateError, match="prior"):
        compare(Evidence(space, {"a": Constraint("mu")}, {"a": [[1.0]]}, prior=True), {"mu": 0.0})
