"""Appending to a posterior and taking away from it: what must agree, what it costs, and when it is computed anew."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, Uniform

from engine import ObservationError, Parameter, PosteriorError, Registry, UnknownPluginError
from modalities import Gaussian

DATA = {
    "a": torch.tensor([[1.0, 0.0], [0.5, 0.4]]).double(),
    "b": torch.tensor([[0.5, 0.2]]).double(),
    "c": torch.tensor([[0.0, 1.0]]).double(),
}
CALLS: Counter[str] = Counter()  # rows of θ that each plugin was asked about


class Counted(Gaussian):
    """A Gaussian that counts for how many θ it is evaluated."""

    normalised = True

    def __init__(self, parameter_names, sd, tag: str = "") -> None:
        super().__init__(parameter_names=parameter_names, sd=sd)
        self.tag = tag

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        CALLS[self.tag] += theta.numel() // theta.shape[-1]
        return super().log_evidence(x, theta)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    r = Registry.create(
        tmp_path_factory.mktemp("update") / "w",
        [Parameter("mu", Normal(0.0, 2.0)), Parameter("nu", Uniform(-6.0, 6.0))],
    )
    for name, sd in (("a", [1.0, 1.0]), ("b", [0.5, 0.7]), ("c", [1.0, 2.0]), ("d", [0.05, 0.05])):
        r.append(name, Gaussian(parameter_names=("mu", "nu"), sd=sd))
    return r


def agree(post, exact, n: float, tolerance: float = 0.0) -> None:
    for p in ("mu", "nu"):
        sd = exact.sd[p]
        assert post.mean[p] == pytest.approx(exact.mean[p], abs=(4.5 / math.sqrt(n) + tolerance) * sd)
        assert post.sd[p] == pytest.approx(sd, rel=4.5 * 1.3 / math.sqrt(2 * n) + tolerance)
        drawn = min(n, len(post.theta))
        assert float(post.draws[p].mean()) == pytest.approx(exact.mean[p], abs=(5 / math.sqrt(drawn) + tolerance) * sd)
    found, expected = post.log_marginal_likelihood, exact.log_marginal_likelihood
    assert found.value == pytest.approx(expected.value, abs=4.5 * math.hypot(found.error, expected.error) + 1e-3)


@pytest.mark.parametrize("method", ["laplace", "importance", "grid", pytest.param("nuts", marks=pytest.mark.slow)])
def test_more_and_less_agree_with_the_posterior_that_is_computed_anew(registry: Registry, method: str) -> None:
    post = registry.posterior({"a": DATA["a"], "b": DATA["b"]}, method=method, draws=2000, seed=4)
    tolerance = 0.02 if method == "laplace" else 0.0
    more = post.append({"c": DATA["c"]})
    assert more.status == "converged"
    assert more.method == method
    assert more.diagnostics["k_hat"] < 0.7
    agree(more, registry.posterior(DATA, method="grid"), more.diagnostics["ess"], tolerance)
    less = more.without("a")
    n = less.diagnostics.get("ess", 4e4)  # a grid is computed anew
    agree(less, registry.posterior({"b": DATA["b"], "c": DATA["c"]}, method="grid"), n, tolerance)
    assert set(less.provenance["plugins"]) == {"b", "c"}
    if method == "grid":
        assert less.diagnostics["updates"][-1] == "computed anew because a grid ends where its posterior did"
        return
    assert less.diagnostics["updates"] == ["re-weighted by 'c'", "re-weighted without 'a'"]
    back = less.without("c").append({"a": DATA["a"], "c": DATA["c"]})
    torch.testing.assert_close(back._raw.exp(), more._raw.exp(), rtol=1e-9, atol=1e-15)  # to the rounding


def test_a_posterior_appended_to_says_the_data_that_one_computed_anew_says(registry: Registry) -> None:
    post = registry.posterior({"a": DATA["a"]}, method="laplace").append({"b": DATA["b"]})
    anew = registry.posterior({"b": DATA["b"], "a": DATA["a"]}, method="laplace")
    assert post.provenance == anew.provenance
    factor = post.bayes_factor(anew)
    assert factor.log == pytest.approx(0.0, abs=4.5 * factor.error)
    assert factor.error < 0.05


def test_a_strong_plugin_in_conflict_is_computed_anew(registry: Registry) -> None:
    post = registry.posterior(DATA, method="importance", draws=1000, seed=1)
    far = {"d": torch.tensor([[4.0, -3.0]]).double()}
    kept = post.append(far, recompute=False)
    assert kept.status == "unreliable"
    assert kept.diagnostics["k_hat"] > 0.7
    again = post.append(far)
    assert again.status == "converged"
    assert "computed anew because its draws do not cover the new posterior (k̂" in again.reason
    exact = registry.posterior({**DATA, **far}, method="grid")
    agree(again, exact, again.diagnostics["ess"])
    assert abs(kept.mean["mu"] - exact.mean["mu"]) > 3.0 * exact.sd["mu"]  # it would have been wrong


def test_a_sign_or_a_factor_in_the_weights_would_be_seen(registry: Registry) -> None:
    """The tolerance of the comparison above is far below what a scalar doubled or with its sign flipped would do."""
    post = registry.posterior({"a": DATA["a"], "b": DATA["b"]}, method="grid")
    one, two = post.append({"c": DATA["c"]}), registry.posterior(DATA, method="grid")
    assert abs(post.mean["nu"] - two.mean["nu"]) > 4.5 / math.sqrt(one.diagnostics["ess"]) * two.sd["nu"]


def test_what_an_append_costs_does_not_depend_on_the_plugins_there(tmp_path: Path) -> None:
    asked = {}
    for count in (2, 12):
        r = Registry.create(tmp_path / str(count), [Parameter("mu", Normal(0.0, 1.0))])
        data = {}
        for i in range(count):
            r.append(f"p{i}", Counted(("mu",), 1.0 + 0.1 * i, tag=f"p{i}"))
            data[f"p{i}"] = torch.tensor([[0.3 + 0.01 * i]]).double()
        r.append("new", Counted(("mu",), 1.0, tag="new"))
        post = r.posterior(data, method="importance", draws=500)
        CALLS.clear()
        more = post.append({"new": torch.tensor([[0.5]]).double()})
        assert "re-weighted" in more.reason
        asked[count] = dict(CALLS)
        CALLS.clear()
        more.without("p1")
        assert set(CALLS) == {"p1"}
    assert asked[2] == asked[12] == {"new": 2002}  # at each draw, and at one of them twice: it must not be random


def test_unusable_appends_are_refused(registry: Registry) -> None:
    post = registry.posterior({"a": DATA["a"], "b": DATA["b"]}, method="laplace")
    with pytest.raises(PosteriorError, match="'a' took part already, and would be counted twice"):
        post.append({"a": DATA["a"]})
    with pytest.raises(ObservationError, match="given the same data"):
        post.append({"c": DATA["a"]})
    with pytest.raises(UnknownPluginError, match="no plugin 'z'"):
        post.append({"z": DATA["a"]})
    with pytest.raises(PosteriorError, match="'c' took no part; there are a, b"):
        post.without("c")
    with pytest.raises(PosteriorError, match="some must stay"):
        post.without("a", "b")
    with pytest.raises(PosteriorError, match="give what to append"):
        post.append({})


def test_a_plugin_with_a_parameter_of_its_own_is_computed_anew(tmp_path: Path) -> None:
    r = Registry.create(tmp_path / "w", [Parameter("mu", Normal(0.0, 2.0))])
    r.append("a", Gaussian(parameter_names=("mu",), sd=1.0))
    post = r.posterior({"a": [[1.0]]}, method="laplace")
    r.append("b", Gaussian(parameter_names=("mu", "nu"), sd=1.0), parameters=[Parameter("nu", Normal(0.0, 1.0))])
    more = post.append({"b": [[0.5, 0.5]]})
    assert "there are parameters that it knows nothing of (nu)" in more.reason
    assert more.mean["nu"] == pytest.approx(0.25, abs=0.01)


def test_a_discrete_posterior_is_updated_exactly(tmp_path: Path) -> None:
    from torch.distributions import Categorical as Index

    from modalities import Categorical

    r = Registry.create(tmp_path / "w", [Parameter("h", Index(torch.tensor([0.2, 0.3, 0.5])))])
    tables = {"a": [[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], "b": [[0.1, 0.9], [0.6, 0.4], [0.3, 0.7]]}
    for name, table in tables.items():
        r.append(name, Categorical(parameter_names=("h",), probabilities=table))
    post = r.posterior({"a": [1, 0]}, draws=100).append({"b": [1]})
    expected = r.probabilities({"a": [1, 0], "b": [1]})
    weights = dict(zip(post.points[:, 0].tolist(), post.log_weights.exp().tolist(), strict=True))
    assert weights == pytest.approx({float(h): p for h, p in expected.items()}, abs=1e-12)
    assert "exactly" in post.reason


class Cut(Gaussian):
    """A Gaussian that is impossible below 0."""

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        return torch.where(theta[..., 0] < 0.0, -torch.inf, super().log_evidence(x, theta))


@pytest.mark.parametrize("method", ["auto", "importance", "grid"])
def test_what_a_part_hid_from_the_draws_comes_back_when_it_goes(tmp_path: Path, method: str) -> None:
    """A narrow part, or one that excluded half of the line, taken away: N(0, 1/√(1/9 + 1)) and N(1.8, the same) are left."""
    r = Registry.create(tmp_path / "w", [Parameter("mu", Normal(0.0, 3.0))])
    for name, plugin in (
        ("wide", Gaussian(parameter_names=("mu",), sd=1.0)),
        ("narrow", Gaussian(parameter_names=("mu",), sd=0.1)),
        ("cut", Cut(parameter_names=("mu",), sd=1.0)),
    ):
        r.append(name, plugin)
    sd = (1.0 / (1.0 / 9.0 + 1.0)) ** 0.5
    for other, x, mean in (("narrow", 2.0, 1.8), ("cut", 0.0, 0.0)):
        data = {"wide": torch.tensor([[x]]), other: torch.tensor([[0.0 if other == "narrow" else 0.1]])}
        post = r.posterior(data, method=method, seed=0).without(other)
        assert post.converged
        assert post.mean["mu"] == pytest.approx(mean, abs=0.1 * sd)
        assert post.sd["mu"] == pytest.approx(sd, rel=0.1)
        expected = float(Normal(0.0, 10.0**0.5).log_prob(torch.tensor(x)))
        assert post.log_marginal_likelihood.value == pytest.approx(expected, abs=0.05)
