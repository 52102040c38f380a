"""What a new user ran into: random plugins, seeds, indices, reasons that grow, words for no preference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical as Index
from torch.distributions import Normal

from engine import (
    EstimateError,
    ModalityError,
    ObservationError,
    Parameter,
    ParameterError,
    PosteriorError,
    Registry,
)
from engine.posterior.marginal import BayesFactor
from engine.report.contents import report
from modalities import Categorical, Gaussian

X = {"a": [[0.5], [1.5]]}


class Shaky(Gaussian):
    """A Gaussian with new noise at every call."""

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        s = super().log_evidence(x, theta)
        return s + 1e-3 * torch.randn(s.shape, dtype=s.dtype, generator=NOISE)


NOISE = torch.Generator().manual_seed(0)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    r = Registry.create(tmp_path / "w", [Parameter("mu", Normal(0.0, 1.0))])
    r.append("a", Gaussian(parameter_names=("mu",), sd=1.0))
    return r


@pytest.mark.parametrize("method", ["importance", "laplace", "grid", "auto"])
def test_a_random_plugin_is_named(registry: Registry, method: str) -> None:
    registry.append("shaky", Shaky(parameter_names=("mu",), sd=1.0))
    data = {**X, "shaky": torch.tensor([[0.4]])}
    with pytest.raises(ModalityError, match="scalar of plugin 'shaky' must be the same for the same data and θ, got"):
        registry.posterior(data, method=method)
    post = registry.posterior(X, method=method)
    with pytest.raises(ModalityError, match=r"'shaky' must be the same.*fixed seed"):
        post.append({"shaky": data["shaky"]})


@pytest.mark.parametrize("seed", ["a", 2**70, 2**63, 1.5, -1, True, None])
def test_a_seed_is_a_whole_number(registry: Registry, seed: object) -> None:
    message = re.escape(f"a seed is a whole number from 0 to 2**63 - 1, got {seed!r:.60}; 0 is the default")
    with pytest.raises(PosteriorError, match=message):
        registry.posterior(X, seed=seed)  # pyright: ignore[reportArgumentType]
    with pytest.raises(EstimateError, match=message):
        registry.estimate(X, seed=seed)  # pyright: ignore[reportArgumentType]


def test_the_largest_seed_can_be_used_for_everything(registry: Registry) -> None:
    registry.append("b", Gaussian(parameter_names=("mu",), sd=1.0))
    for method in ("importance", "laplace", "grid"):
        post = registry.posterior(X, seed=2**63 - 1, method=method, draws=50)
        assert post.append({"b": [[0.7]]}).without("a").theta.shape == (50, 1)


@pytest.mark.parametrize("data", [5, 2.5, [1.0, 2.0], torch.ones(3, 1)])
def test_data_without_names_are_refused(registry: Registry, data: object) -> None:
    message = (
        rf"data are given as {{'plugin': observations}}, or as a zarr group or its path, got {type(data).__name__}"
    )
    for ask in (registry.posterior, registry.estimate, registry.evidence):
        with pytest.raises(ObservationError, match=message):
            ask(data)


@pytest.fixture
def kinds(tmp_path: Path) -> Registry:
    r = Registry.create(
        tmp_path / "k", [Parameter("kind", Index(torch.tensor([0.2, 0.3, 0.5]))), Parameter("mu", Normal(0.0, 2.0))]
    )
    r.append("table", Categorical(parameter_names=("kind",), probabilities=[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]))
    r.append("a", Gaussian(parameter_names=("mu",), sd=1.0))
    return r


@pytest.mark.parametrize("value", [0.5, 3.0, -1.0])
def test_an_index_is_fixed_at_one_of_its_values(kinds: Registry, value: float) -> None:
    message = re.escape(f"'kind' is an index, which can be fixed at 0, 1, 2; got {value:g}")
    for ask in (kinds.posterior, kinds.estimate):
        with pytest.raises(ParameterError, match=message):
            ask({"table": [1], **X}, fixed={"kind": value})
    assert kinds.posterior({"table": [1], **X}, fixed={"kind": 1}).converged


def test_a_reason_says_the_last_step_and_how_it_was_sampled(registry: Registry) -> None:
    for name in "bcd":
        registry.append(name, Gaussian(parameter_names=("mu",), sd=2.0))
    post = registry.posterior(X, method="importance")
    first = post.append({"b": [[0.2]]})
    assert first.reason.startswith("re-weighted by 'b' (k̂ = ")
    assert first.reason.endswith(f"; {post.reason}")
    last = first.append({"c": [[0.9]]}).append({"d": [[1.1]]})
    assert last.reason.startswith("re-weighted by 'd' (k̂ = ")
    assert last.reason.endswith(f"; step 3 from what was sampled: {post.reason}")
    assert last.reason.count("re-weighted") == 1
    assert last.diagnostics["updates"] == [f"re-weighted by '{n}'" for n in "bcd"]
    anew = last.without("d", recompute=True)
    assert "step" not in anew.append({"d": [[1.1]]}).reason


def test_a_step_that_was_not_reliable_is_not_forgotten(registry: Registry) -> None:
    registry.append("far", Gaussian(parameter_names=("mu",), sd=0.02))
    post = registry.posterior(X, method="importance")
    far = post.append({"far": [[2.5]]}, recompute=False)
    assert far.status == "unreliable"
    back = far.without("far", recompute=False)
    assert back.status == "unreliable"
    assert back.reason.startswith("an earlier step left too few draws, or did not cover; re-weighted without 'far'")


def test_a_factor_within_its_error_prefers_neither(registry: Registry) -> None:
    assert str(BayesFactor(0.0, 0.0)).endswith("B = 1: no preference")
    assert str(BayesFactor(0.2, 0.3)).endswith(": no preference beyond its error")
    assert str(BayesFactor(-0.3, 0.2)).endswith(": barely worth a mention for the second")
    assert str(BayesFactor(2.5, 0.1)).endswith(": positive for the first")
    same = registry.bayes_factor(X, {"mu": 0.5}, {"mu": 0.5})
    assert str(same).endswith("B = 1: no preference")


def test_a_report_holds_free_indices_at_their_most_probable_values(kinds: Registry) -> None:
    """p(kind | 1) ∝ (0.5, 0.1, 0.8) (0.2, 0.3, 0.5): 0.4 / 0.53 for the last."""
    found = report(kinds, {"table": [1], **X}, progress=False)
    assert found.converged
    assert {p.name for p in found.pictures} >= {"corner"}
    said = found.contents
    assert said["estimate"]["reason"].endswith("'kind' = 2 (posterior probability 0.755), an index")
    assert said["estimate"]["parameters"]["kind"]["value"] == 2.0
    assert said["estimate"]["parameters"]["mu"]["value"] == pytest.approx(1.0, abs=1e-9)
    assert said["posterior"]["parameters"]["kind"]["fixed"] is False
    assert said["posterior"]["parameters"]["mu"]["mean"] == pytest.approx(8.0 / 9.0, abs=0.06)  # 2 / (1/4 + 2)
    assert "registry.estimate(data, seed=0, fixed={'kind': 2.0})" in said["python"]
    assert "registry.posterior(data, seed=0, method='auto'" in said["python"]
    assert "--fixed" not in said["command"]
