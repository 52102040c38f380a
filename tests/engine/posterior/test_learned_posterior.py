"""Learned plugins: what their certificates say of a posterior, and refined scalars in the sum."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, Uniform

from engine import Modality, Parameter, ParameterSpace, PosteriorError, Registry, Status
from engine.certificate import certify
from modalities import Gaussian

TRUTH, N = 0.7, 200
PRIOR = ParameterSpace([Parameter("mu", Uniform(-3.0, 3.0))])


class Sharp(Modality):
    """A scalar that was learned badly: four times the information that N(μ, 1) has, and off by 0.1."""

    learned = True

    def __init__(self, parameter_names=("mu",), sd: float = 0.5, shift: float = 0.1) -> None:
        super().__init__(parameter_names=parameter_names, event_shape=())
        self.sd, self.shift, self.training_prior = sd, shift, PRIOR

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        return -0.5 * ((x - theta[..., 0] - self.shift) / self.sd) ** 2


def simulator(theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
    noise = torch.randn(theta.shape[:-1], generator=generator, dtype=theta.dtype)
    return theta[..., 0] + noise


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    r = Registry.create(tmp_path / "w", PRIOR)
    r.append("learned", Sharp(), force="a test of what is said of it")
    r.append("exact", Gaussian(parameter_names=("mu",), sd=0.1))
    return r


def data() -> Tensor:
    return simulator(torch.full((N, 1), TRUTH, dtype=torch.float64), torch.Generator().manual_seed(4))


def test_an_uncertified_plugin_makes_the_posterior_uncertified(registry: Registry) -> None:
    post = registry.posterior({"learned": data(), "exact": [[0.7]]}, refine=False, draws=100)
    assert post.status == "uncertified"
    assert "nothing is known of the bias of 'learned'" in post.reason
    assert post.trust["exact"].verdict == "exact"
    assert post.without("learned").status == "converged"
    alone = registry.posterior({"exact": [[0.7]]}, draws=100)
    assert alone.status == "converged"
    assert alone.append({"learned": data()[:5]}).status == "uncertified"
    assert post.unnormalised == ("learned",)


def test_a_certified_plugin_beyond_what_it_carries_says_so(tmp_path: Path) -> None:
    r = Registry.create(tmp_path / "w", PRIOR)
    modality = Sharp(sd=1.0, shift=0.05)
    r.append("learned", modality, certificate=certify(modality, prior=PRIOR, simulate=simulator, simulations=20_000))
    few, many = (r.posterior({"learned": data()[:n]}, draws=100) for n in (4, N))
    assert few.status == "converged"
    assert many.status == "beyond_certificate"
    assert "200 observations where it can carry" in many.reason


def test_a_posterior_that_leaves_the_training_prior_says_so(tmp_path: Path) -> None:
    r = Registry.create(tmp_path / "w", [Parameter("mu", Normal(0.0, 10.0))])
    modality = Sharp(sd=1.0, shift=0.0)
    r.append("learned", modality, certificate=certify(modality, prior=PRIOR, simulate=simulator, simulations=20_000))
    post = r.posterior({"learned": torch.tensor([2.5]).double()}, draws=100)  # a third of N(2.5, 1) lies beyond 3
    assert post.status == "outside_domain"
    assert "% of the posterior lies outside its training prior" in post.reason


def test_refined_scalars_sum_with_exact_plugins(registry: Registry) -> None:
    x = data()
    raw = registry.posterior({"learned": x, "exact": [[0.75]]}, refine=False, draws=500)
    post = registry.posterior({"learned": x, "exact": [[0.75]]}, refine={"learned": simulator}, draws=500, seed=1)
    information = N + 100.0
    mean, sd = (float(x.sum()) + 75.0) / information, information**-0.5
    assert post.refinement is not None
    assert post.trust["learned"].verdict == "refined"
    assert post.status == "converged"
    assert post.mean["mu"] == pytest.approx(mean, abs=0.1 * sd)
    assert post.sd["mu"] == pytest.approx(sd, rel=0.05)
    assert raw.sd["mu"] < 0.7 * sd  # the raw scalar claims half the error
    assert post.unnormalised == ("learned",)
    left = post.without("learned")
    assert left.sd["mu"] == pytest.approx(0.1, rel=4.5 / math.sqrt(2 * left.diagnostics.get("ess", 2000.0)) + 0.02)
    more = left.append({"learned": x})
    assert "'learned' is calibrated around the estimate" in more.reason or "re-weighted" in more.reason


def test_a_refined_posterior_that_fails_has_no_numbers(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = registry.estimate({"exact": [[0.7]]})
    failed = dataclasses.replace(fit, status=Status.FAILED, reason="the refinement did not settle", _evidence=None)
    monkeypatch.setattr("engine.posterior.ask.refined_estimate", lambda *_, **__: failed)
    post = registry.posterior({"learned": data()}, refine={"learned": simulator}, draws=20)
    assert (post.status, post.reason) == ("failed", "the refinement did not settle")
    assert post.theta.shape == (20, 1)
    assert math.isnan(post.mean["mu"])
    assert str(post) == "failed — the refinement did not settle"
    assert post.to_dict()["parameters"]["mu"]["mean"] is None
    with pytest.raises(PosteriorError, match="failed has no quantiles: the refinement did not settle"):
        post.quantile("mu", 0.5)
    with pytest.raises(PosteriorError, match="has no draws to re-weight"):
        post.append({"exact": [[0.7]]})
