"""Requests that no posterior answers are refused by name, with the next step."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, Uniform

from engine import Ball, Linear, Modality, ModalityError, Parameter, ParameterError, PosteriorError, Registry
from modalities import Gaussian


class Unnormalised(Modality):
    def __init__(self, parameter_names=("mu",)) -> None:
        super().__init__(parameter_names=parameter_names, event_shape=())

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        return -0.5 * (x - theta[..., 0]) ** 2


class Heir(Gaussian):
    """Writes another scalar, and says nothing of its constants."""

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        return 2.0 * super().log_evidence(x, theta)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    r = Registry.create(tmp_path / "w", [Parameter("mu", Normal(0.0, 1.0)), Parameter("flat")])
    r.append("a", Gaussian(parameter_names=("mu",), sd=1.0))
    r.append("b", Unnormalised())
    return r


X = {"a": [[0.5]]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 0}, "a posterior needs at least one draw, got draws=0; 1000 is usual"),
        ({"draws": 2.5}, "at least one draw, got draws=2.5"),
        ({"method": "mcmc"}, "one of auto, laplace, importance, grid, nuts, got 'mcmc'"),
        ({"method": "nuts", "chains": 0, "fixed": {"flat": 0.0}}, "at least one chain"),
        ({}, "a posterior needs proper priors, got 'flat' with a flat one over (-inf, inf); declare it with a prior"),
    ],
)
def test_requests_are_refused(registry: Registry, arguments: dict, message: str) -> None:
    with pytest.raises(PosteriorError, match=re.escape(message)):
        registry.posterior(X, **arguments)


def test_values_that_cannot_be_fixed_are_refused(registry: Registry) -> None:
    with pytest.raises(ParameterError, match="no parameter 'rho'"):
        registry.posterior(X, fixed={"rho": 1.0, "flat": 0.0})


def test_a_grid_of_four_parameters_is_refused(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d")
    r = Registry.create(tmp_path / "w", [Parameter(n, Uniform(0.0, 1.0)) for n in names])
    r.append("g", Gaussian(parameter_names=names, sd=0.1))
    data = {"g": [[0.5, 0.5, 0.5, 0.5]]}
    with pytest.raises(PosteriorError, match=r"up to 3 continuous parameters, got 4 \(a, b, c, d\); hold some"):
        r.posterior(data, method="grid")
    assert r.posterior(data, method="grid", fixed={"a": 0.5}, draws=10).status == "converged"


def test_a_flat_prior_is_proper_where_constraints_bound_it(tmp_path: Path) -> None:
    r = Registry.create(
        tmp_path / "w",
        [Parameter(n) for n in ("s", "c", "u", "v")],
        [Ball(["s", "c"], 2.0), Linear({"u": 1.0, "v": 1.0}, -1.0, 1.0), Linear({"u": 1.0, "v": -1.0}, -1.0, 1.0)],
    )
    r.append("g", Gaussian(parameter_names=("s", "c", "u", "v"), sd=0.05))
    post = r.posterior({"g": [[0.1, 0.2, 0.1, 0.0]]}, method="importance", draws=100)
    area = math.log(math.pi * 4.0) + math.log(2.0)  # of the ball, of the square on its corner
    assert post.log_marginal_likelihood.value == pytest.approx(-area, abs=0.05)


def test_a_plugin_without_its_constants_is_named(registry: Registry) -> None:
    post = registry.posterior({**X, "b": [0.3]}, fixed={"flat": 0.0}, draws=10)
    assert post.unnormalised == ("b",)
    with pytest.raises(PosteriorError, match=r"with all its constants, and 'b' does not say so"):
        post.log_marginal_likelihood  # noqa: B018
    with pytest.raises(PosteriorError, match=r"and 'b' does not say so"):
        registry.bayes_factor({**X, "b": [0.3]}, {"mu": 0.0, "flat": 0.0}, {"flat": 0.0})
    assert "'b' not normalised" in str(post)
    assert post.to_dict()["log_marginal_likelihood"]["value"] is None
    without = registry.posterior(X, fixed={"flat": 0.0}, draws=10)
    assert without.log_marginal_likelihood.value == pytest.approx(-0.5 * math.log(4 * math.pi) - 0.25 / 4, abs=0.01)


def test_normalised_is_not_inherited_by_another_scalar() -> None:
    assert Gaussian.normalised
    assert not Heir.normalised


def test_hypotheses_about_other_data_are_not_compared(registry: Registry) -> None:
    a, b = (registry.posterior({"a": [[x]]}, fixed={"flat": 0.0}, draws=10) for x in (0.5, 0.6))
    with pytest.raises(PosteriorError, match="about the same data and plugins, and these have other data"):
        a.bayes_factor(b)


def test_impossible_data_are_an_error(tmp_path: Path) -> None:
    class Never(Modality):
        def __init__(self, parameter_names=("mu",)) -> None:
            super().__init__(parameter_names=parameter_names, event_shape=())

        def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
            return torch.full_like(x * theta[..., 0], -math.inf) + 0.0 * theta[..., 0]

    from engine import Evidence, ParameterSpace
    from engine.posterior import posterior

    space = ParameterSpace([Parameter("mu", Normal(0.0, 1.0))])
    for method in ("laplace", "grid", "auto"):
        with pytest.raises(PosteriorError, match="the data are impossible"):
            posterior(Evidence(space, {"n": Never()}, {"n": torch.zeros(1)}, prior=True), method=method)


def test_a_plugin_that_returns_nan_is_named(tmp_path: Path) -> None:
    class Broken(Modality):
        def __init__(self, parameter_names=("mu",)) -> None:
            super().__init__(parameter_names=parameter_names, event_shape=())

        def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
            return x + theta[..., 0].sqrt()

    from engine import Evidence, ParameterSpace
    from engine.posterior import posterior

    space = ParameterSpace([Parameter("mu", Normal(0.0, 1.0))])
    with pytest.raises(ModalityError, match="plugin 'broken'"):
        posterior(Evidence(space, {"broken": Broken()}, {"broken": torch.zeros(1)}, prior=True))


def test_quantiles_and_intervals_that_are_none(registry: Registry) -> None:
    post = registry.posterior(X, fixed={"flat": 0.0}, draws=10)
    with pytest.raises(PosteriorError, match=r"between 0 and 1, got 1\.5"):
        post.quantile("mu", 1.5)
    with pytest.raises(PosteriorError, match="between 0 and 1, got 95"):
        post.interval("mu", 95)
    with pytest.raises(PosteriorError, match="'equal_tailed' or 'highest_density', got 'wald'"):
        post.interval("mu", kind="wald")
    with pytest.raises(ParameterError, match="no parameter 'x'"):
        post.quantile("x", 0.5)
