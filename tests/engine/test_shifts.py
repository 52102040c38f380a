"""Shifts between estimates of which one has more data, against closed forms."""

import json
import math

import pytest
import scipy.stats

from engine import EstimateError, Evidence, Parameter, ParameterSpace, Registry
from engine.estimate import estimate
from engine.shifts import before_after
from modalities import Gaussian

MU = ParameterSpace([Parameter("mu", unit="mm")])
AB = ParameterSpace([Parameter("a"), Parameter("b")])


def both(a, b, sd_a=3.0, sd_b=4.0):
    plugins = {"a": Gaussian(parameter_names=("mu",), sd=sd_a), "b": Gaussian(parameter_names=("mu",), sd=sd_b)}
    return Evidence(MU, plugins, {"a": [[a]], "b": [[b]]})


def test_the_shift_has_the_variance_that_the_new_data_took_away():
    evidence = both(100.0, 110.0)
    found = before_after(estimate(evidence.only(["a"])), estimate(evidence))
    after = (100.0 / 9 + 110.0 / 16) / (1 / 9 + 1 / 16)
    own = found.shift.parameters["mu"]
    assert own.value == pytest.approx(after - 100.0, rel=1e-8)  # up, because the new datum lies higher
    assert own.error == pytest.approx(math.sqrt(9.0 - 1 / (1 / 9 + 1 / 16)), rel=1e-8)
    assert own.pull == pytest.approx(10.0 / 5.0, rel=1e-8)
    assert found.p_value == pytest.approx(scipy.stats.chi2.sf(4.0, 1), rel=1e-7)
    assert found.parameters["mu"] == pytest.approx((3.0, 2.4), rel=1e-9)
    assert found.added == ("b",)


def test_what_was_not_known_before_has_no_shift():
    plugins = {
        "line": Gaussian(parameter_names=("a",), sd=1.0),
        "point": Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.5], [0.5, 1.0]]),
    }
    evidence = Evidence(AB, plugins, {"line": [[0.0]], "point": [[2.0, 5.0]]})
    found = before_after(estimate(evidence.only(["line"])), estimate(evidence))
    assert found.shift.dof == 1
    assert list(found.shift.parameters) == ["a"]
    assert found.shift.chi2 == pytest.approx(2.0, rel=1e-8)
    assert found.parameters["b"][0] == math.inf
    text = str(found)
    assert "now known" in text
    assert "not known" in text


def test_data_about_something_else_move_nothing():
    plugins = {"p": Gaussian(parameter_names=("a",), sd=1.0), "q": Gaussian(parameter_names=("b",), sd=1.0)}
    evidence = Evidence(AB, plugins, {"p": [[0.0]], "q": [[5.0]]})
    found = before_after(estimate(evidence.only(["p"])), estimate(evidence))
    assert (found.shift.dof, found.p_value, found.shift.chi2) == (0, 1.0, 0.0)
    assert "nothing that was known before" in str(found)


def test_a_plugin_that_was_superseded_has_no_shift():
    one, other = both(0.0, 1.0), both(5.0, 1.0)
    found = before_after(estimate(one.only(["a"])), estimate(other))
    assert found.shift is None
    assert found.p_value is None
    assert "superseded, or has other data" in found.reason
    assert before_after(estimate(one), estimate(one.only(["a"]))).reason.endswith("b is not there")
    json.dumps(found.to_dict(), allow_nan=False)


def test_other_parameters_are_refused():
    other = Evidence(AB, {"q": Gaussian(parameter_names=("b",), sd=1.0)}, {"q": [[5.0]]})
    with pytest.raises(EstimateError, match="same free parameters"):
        before_after(estimate(both(0.0, 1.0)), estimate(other))


def test_a_registry_says_what_a_plugin_did(tmp_path):
    registry = Registry.create(tmp_path / "r", [Parameter("mu")])
    for n, sd, x in (("a", 3.0, 100.0), ("b", 4.0, 110.0)):
        registry.append(n, Gaussian(parameter_names=("mu",), sd=sd), observations=[[x]])
    assert registry.before_after("b").shift.parameters["mu"].pull == pytest.approx(2.0, rel=1e-8)
    assert registry.before_after("a").shift.parameters["mu"].pull == pytest.approx(-2.0, rel=1e-8)
