"""Shares of the information against closed forms, and against the curvature of the profile."""

import json
import math

import pytest
import torch
from torch.distributions import Normal, Uniform

from engine import EstimateError, Evidence, Parameter, ParameterSpace, Registry
from engine.estimate import estimate
from engine.shares import shares
from modalities import Gaussian, PoissonCounts

AB = ParameterSpace([Parameter("a"), Parameter("b")])
CX, CY = [[1.0, 0.6], [0.6, 2.0]], [[0.5, -0.3], [-0.3, 3.0]]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def pair():
    plugins = {
        "x": Gaussian(parameter_names=("a", "b"), covariance=CX),
        "y": Gaussian(parameter_names=("a", "b"), covariance=CY),
    }
    return estimate(Evidence(AB, plugins, {"x": [[0.0, 1.0]], "y": [[0.5, 0.0]]}))


def test_shares_of_a_parameter_are_those_of_its_variance(pair):
    found = shares(pair)
    Jx, Jy = torch.linalg.inv(double(CX)), torch.linalg.inv(double(CY))
    C = torch.linalg.inv(Jx + Jy)
    for j, name in enumerate("ab"):
        expected = {"x": float((C @ Jx @ C)[j, j] / C[j, j]), "y": float((C @ Jy @ C)[j, j] / C[j, j])}
        assert dict(found.marginal[name]) == pytest.approx(expected, rel=1e-9)
        held = {"x": float(Jx[j, j] / (Jx + Jy)[j, j]), "y": float(Jy[j, j] / (Jx + Jy)[j, j])}
        assert dict(found.conditional[name]) == pytest.approx(held, rel=1e-9)
        without = {"x": math.sqrt(double(CY)[j, j] / C[j, j]), "y": math.sqrt(double(CX)[j, j] / C[j, j])}
        assert dict(found.growth[name]) == pytest.approx(without, rel=1e-9)
    for row in (*found.marginal.values(), *found.conditional.values(), *(d.shares for d in found.directions)):
        assert sum(row.values()) == pytest.approx(1.0, abs=1e-12)


def test_a_share_is_the_plugins_part_of_the_curvature_of_the_profile(pair):
    """Along the profile of a, S falls by the sum of what each plugin falls by."""
    found, evidence = shares(pair), pair._evidence
    C = pair.covariance
    h = 1e-2
    path = C[:, 0] / C[0, 0]  # of the maximum over b, for a Gaussian
    fall = {}
    for name in ("x", "y"):
        one = evidence.only([name])
        S = one.value(pair.theta + h * double([[-1.0], [0.0], [1.0]]) * path)
        fall[name] = float(2 * S[1] - S[0] - S[2]) / h**2
    assert sum(fall.values()) == pytest.approx(1 / float(C[0, 0]), rel=1e-6)
    assert {n: v * float(C[0, 0]) for n, v in fall.items()} == pytest.approx(dict(found.marginal["a"]), rel=1e-5)


def test_directions_are_the_eigenvectors_of_the_scaled_information(pair):
    found = shares(pair)
    J = pair.information
    unit = J.diagonal().rsqrt()
    values, vectors = torch.linalg.eigh(J * unit[:, None] * unit)
    assert [d.strength for d in found.directions] == pytest.approx(values.flip(0).tolist(), rel=1e-9)
    for d, v in zip(found.directions, vectors.mT.flip(0), strict=True):
        assert float(d.vector @ J @ d.vector) == pytest.approx(1.0, rel=1e-9)  # one standard error long
        w = d.vector / unit
        assert abs(float(w @ v) / float(w.norm())) == pytest.approx(1.0, rel=1e-9)
        expected = {n: float(d.vector @ c.information @ d.vector) for n, c in pair.contributions.items()}
        assert dict(d.shares) == pytest.approx(expected, rel=1e-9)
    assert found.text_of(found.directions[0]).count("a") == 1


def test_shares_do_not_depend_on_units():
    def of(scale):
        def mean(theta, scale):
            return theta * scale

        plugins = {
            n: Gaussian(
                mean, parameter_names=("a", "b"), covariance=C, inputs={"scale": [1.0, scale]}, event_shape=(2,)
            )
            for n, C in (("x", CX), ("y", CY))
        }
        return shares(estimate(Evidence(AB, plugins, {"x": [[0.0, 1.0]], "y": [[0.5, 0.0]]})))

    one, other = of(1.0), of(1e6)
    for name in "ab":
        assert dict(one.marginal[name]) == pytest.approx(dict(other.marginal[name]), rel=1e-6)
    for d, e in zip(one.directions, other.directions, strict=True):
        assert dict(d.shares) == pytest.approx(dict(e.shares), rel=1e-6)
        assert one.text_of(d) == other.text_of(e)


def test_what_only_one_plugin_knows_is_lost_without_it():
    plugins = {"line": Gaussian(parameter_names=("a",), sd=1.0), "point": Gaussian(parameter_names=("a", "b"), sd=1.0)}
    found = shares(estimate(Evidence(AB, plugins, {"line": [[0.0]], "point": [[1.0, 1.0]]})))
    assert dict(found.growth["b"]) == {"line": pytest.approx(1.0), "point": math.inf}
    assert dict(found.marginal["b"]) == {"line": pytest.approx(0.0, abs=1e-12), "point": pytest.approx(1.0)}
    assert found.growth["a"]["line"] == pytest.approx(math.sqrt(2.0))
    assert "∞" in str(found)


def sum_of(theta):
    return theta.sum(-1, keepdim=True)


def test_along_a_flat_direction_nobody_has_a_share():
    plugins = {
        n: Gaussian(sum_of, parameter_names=("a", "b"), sd=s, event_shape=(1,)) for n, s in (("x", 1.0), ("y", 2.0))
    }
    fit = estimate(Evidence(AB, plugins, {"x": [[0.0]], "y": [[1.0]]}))
    found = shares(fit)
    assert all(math.isnan(v) for v in found.marginal["a"].values())
    assert len(found.directions) == 1
    assert dict(found.directions[0].shares) == pytest.approx({"x": 0.8, "y": 0.2}, rel=1e-9)
    assert "not_identified" in str(found)
    assert found.to_dict()["marginal"]["a"] == {"x": None, "y": None}


def test_a_parameter_on_its_bound_takes_no_part():
    space = ParameterSpace([Parameter("a", bounds=(0.0, math.inf)), Parameter("b")])
    plugins = {"x": Gaussian(parameter_names=("a", "b"), covariance=CX), "y": Gaussian(parameter_names=("b",), sd=1.0)}
    fit = estimate(Evidence(space, plugins, {"x": [[-2.0, 0.0]], "y": [[0.3]]}))
    assert fit.status == "at_bound"
    found = shares(fit)
    assert all(math.isnan(v) for v in found.marginal["a"].values())
    Jx = torch.linalg.inv(double(CX))[1, 1]
    assert dict(found.marginal["b"]) == pytest.approx({"x": float(Jx / (Jx + 1)), "y": float(1 / (Jx + 1))}, rel=1e-9)


def test_the_prior_has_a_share_where_it_took_part():
    space = ParameterSpace([Parameter("a", Normal(0.0, 2.0))])
    evidence = Evidence(space, {"x": Gaussian(parameter_names=("a",), sd=1.0)}, {"x": [[1.0]]}, prior=True)
    assert dict(shares(estimate(evidence)).marginal["a"]) == pytest.approx({"prior": 0.2, "x": 0.8}, rel=1e-6)


def test_counts_share_as_their_fisher_information():
    space = ParameterSpace([Parameter("mu", Uniform(0.0, 10.0))])
    plugins = {
        "x": PoissonCounts(signal=[5.0], background=[50.0], strength="mu"),
        "y": PoissonCounts(signal=[9.0], background=[40.0], strength="mu"),
    }
    fit = estimate(Evidence(space, plugins, {"x": [[57.0]], "y": [[50.0]]}))
    mu = fit["mu"].value
    J = {"x": 57 * 25 / (50 + 5 * mu) ** 2, "y": 50 * 81 / (40 + 9 * mu) ** 2}
    expected = {n: v / sum(J.values()) for n, v in J.items()}
    assert dict(shares(fit).marginal["mu"]) == pytest.approx(expected, rel=1e-8)


def test_a_failed_fit_has_none():
    space = ParameterSpace([Parameter("mu", bounds=(-3.0, -1.0))])
    counts = PoissonCounts(signal=[1.0], background=[0.0], strength="mu")
    with pytest.raises(EstimateError, match="a failed fit has no shares"):
        shares(estimate(Evidence(space, {"up": counts}, {"up": [[5.0]]})))


def test_the_order_of_plugins_changes_no_bit(tmp_path):
    answers = []
    for k, names in enumerate(("xy", "yx")):
        registry = Registry.create(tmp_path / str(k), [Parameter("a"), Parameter("b")])
        for n in names:
            registry.append(
                n,
                Gaussian(parameter_names=("a", "b"), covariance=CX if n == "x" else CY),
                observations=[[float(ord(n)), 0.3]],
            )
        told = registry.shares().to_dict()
        answers.append(json.dumps({key: v for key, v in told.items() if key != "provenance"}))
    assert answers[0] == answers[1]
