"""Discrete parameters are enumerated, alone and beside continuous ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical as Index
from torch.distributions import Normal

from engine import Evidence, Modality, Parameter, ParameterSpace, PosteriorError, Registry
from engine.posterior import posterior
from modalities import Categorical


class Switched(Modality):
    """x ~ N(μ + shift[h], 1): which of three shifts it is, and μ."""

    normalised = True

    def __init__(self, parameter_names=("h", "mu")) -> None:
        super().__init__(parameter_names=parameter_names, event_shape=())

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        shift = torch.tensor([0.0, 2.0, 7.0], dtype=theta.dtype)[theta[..., 0].round().long().clamp(0, 2)]
        return -0.5 * (x - theta[..., 1] - shift) ** 2 - 0.5 * math.log(2 * math.pi)


def switched() -> Evidence:
    weights = torch.tensor([0.5, 0.3, 0.2])
    space = ParameterSpace([Parameter("h", Index(weights)), Parameter("mu", Normal(0.0, 1.0))])
    return Evidence(space, {"s": Switched()}, {"s": torch.tensor([2.5, 1.5]).double()}, prior=True)


def exact() -> tuple[Tensor, Tensor, float]:
    """P(h | x), E(μ | h, x) and log p(x): x = μ + shift + noise, so (x₁, x₂) has covariance 1 + δ."""
    shift = torch.tensor([0.0, 2.0, 7.0]).double()
    x = torch.tensor([2.5, 1.5]).double()
    law = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double() + 1.0)
    joint = law.log_prob(x - shift[:, None]) + torch.tensor([0.5, 0.3, 0.2]).double().log()
    return torch.softmax(joint, 0), (x - shift[:, None]).sum(-1) / 3.0, float(torch.logsumexp(joint, 0))


@pytest.mark.parametrize("method", ["importance", "grid", "laplace", "auto"])
def test_cells_have_their_weights_and_their_continuous_posterior(method: str) -> None:
    post = posterior(switched(), method=method, draws=4000, seed=2)
    assert post.status == "converged"
    probabilities, means, log_marginal = exact()
    h = post.points[:, 0]
    for k in range(3):
        share = float(post.log_weights.exp()[h == k].sum())
        assert share == pytest.approx(float(probabilities[k]), abs=0.01)
        drawn = float((post.draws["h"] == k).double().mean())
        assert drawn == pytest.approx(float(probabilities[k]), abs=4.5 * math.sqrt(0.25 / 4000))
    assert post.mean["mu"] == pytest.approx(float(probabilities @ means), abs=0.03)
    assert post.log_marginal_likelihood.value == pytest.approx(log_marginal, abs=0.02)
    assert post.quantile("h", 0.5) in (0.0, 1.0)
    assert set(post.draws["h"].tolist()) <= {0.0, 1.0, 2.0}
    assert set(post.interval("h", 0.9)) <= {0.0, 1.0, 2.0}


def test_all_discrete_is_exact(tmp_path: Path) -> None:
    r = Registry.create(
        tmp_path / "w", [Parameter("h", Index(torch.tensor([0.2, 0.8]))), Parameter("g", Index(torch.ones(3)))]
    )
    r.append("a", Categorical(parameter_names=("h",), probabilities=[[0.5, 0.5], [0.9, 0.1]]))
    r.append("b", Categorical(parameter_names=("g",), probabilities=[[0.1, 0.9], [0.6, 0.4], [0.3, 0.7]]))
    data = {"a": [0, 1, 1], "b": [1, 1]}
    post = r.posterior(data, draws=10)
    expected = r.probabilities(data)
    found = {
        (int(a), int(b)): p for (a, b), p in zip(post.points.tolist(), post.log_weights.exp().tolist(), strict=True)
    }
    assert found == pytest.approx(expected, abs=1e-12)
    total = sum(
        w * h0 * (1 / 3) * g0 for w, h0 in zip((0.2, 0.8), (0.125, 0.009), strict=True) for g0 in (0.81, 0.16, 0.49)
    )
    assert post.log_marginal_likelihood.value == pytest.approx(math.log(total), abs=1e-6)
    assert post.log_marginal_likelihood.method == "exact"


def test_nuts_and_too_many_cells_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PosteriorError, match=r"NUTS follows gradients, and 'h' is discrete: use method='grid'"):
        posterior(switched(), method="nuts")
    r = Registry.create(
        tmp_path / "w",
        [*(Parameter(f"g{i}", Index(torch.ones(10))) for i in range(3)), Parameter("mu", Normal(0.0, 1.0))],
    )
    r.append("a", Switched(parameter_names=("g0", "mu")))
    with pytest.raises(PosteriorError, match="have 1000 combinations of values, and 256 can be enumerated"):
        r.posterior({"a": [1.0]})


def test_a_discrete_parameter_that_is_fixed_leaves_nuts_its_gradients() -> None:
    post = posterior(switched(), method="nuts", fixed={"h": 1.0}, draws=400, warmup=100, chains=2, seed=1)
    assert post.mean["mu"] == pytest.approx(0.0, abs=4.5 * math.sqrt(1 / 3) / math.sqrt(post.diagnostics["ess_bulk"]))
