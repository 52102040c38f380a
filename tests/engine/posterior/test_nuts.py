"""Chains: seeds, torch's global state, walls, interruptions."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Gamma, Normal, Uniform

from engine import Evidence, Linear, Parameter, ParameterSpace
from engine.posterior import nuts as module
from engine.posterior import posterior
from engine.posterior.lockstep import Ask, in_step
from modalities import Gaussian, PoissonCounts


def chains_left() -> bool:
    """Whether the thread of a chain has not ended; other libraries have threads of their own."""
    return any(t.name == "chain" for t in threading.enumerate())


def counts() -> Evidence:
    space = ParameterSpace([Parameter("rate", prior=Gamma(2.0, 1.0))])
    return Evidence(
        space, {"n": PoissonCounts(signal=[1.0], strength="rate")}, {"n": [[4.0], [5.0], [2.0]]}, prior=True
    )


def test_chains_are_the_gamma_posterior_and_leave_no_trace_in_torch() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    before = (torch.get_default_dtype(), torch.get_num_threads(), Distribution._validate_args)
    post = posterior(counts(), method="nuts", draws=400, warmup=100, chains=2, seed=0)
    assert torch.equal(torch.rand(3), expected)  # the global generator was not drawn from
    assert (torch.get_default_dtype(), torch.get_num_threads(), Distribution._validate_args) == before
    n = min(post.diagnostics["ess_bulk"], post.diagnostics["ess_tail"])
    assert post.mean["rate"] == pytest.approx(13 / 4, abs=4.5 * math.sqrt(13) / 4 / math.sqrt(n))
    assert post.sd["rate"] == pytest.approx(math.sqrt(13) / 4, rel=4.5 * 1.5 / math.sqrt(2 * n))
    log_marginal = math.lgamma(13) - 13 * math.log(4.0) - sum(math.lgamma(k + 1) for k in (4, 5, 2))
    found = post.log_marginal_likelihood
    assert found.method == "bridge"
    assert found.value == pytest.approx(log_marginal, abs=4.5 * found.error)
    assert found.error < 0.05
    assert post.diagnostics["divergences"] == 0
    assert post.theta.shape == (400, 1)
    assert post.to_xarray().sizes == {"chain": 2, "draw": 200}


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before() -> None:
    settings = {"method": "nuts", "draws": 30, "warmup": 20, "chains": 2}
    first = posterior(counts(), seed=3, **settings)
    torch.rand(5)
    again, other = posterior(counts(), seed=3, **settings), posterior(counts(), seed=4, **settings)
    assert torch.equal(first.theta, again.theta)
    assert not torch.equal(first.theta, other.theta)


@pytest.mark.slow
def test_a_wall_that_no_coordinate_carries_shows_as_divergences() -> None:
    space = ParameterSpace(
        [Parameter("a", prior=Uniform(0.0, 1.0)), Parameter("b", prior=Uniform(0.0, 1.0))],
        [Linear({"a": 1.0, "b": 1.0}, upper=1.0)],
    )
    evidence = Evidence(space, {"g": Gaussian(parameter_names=("a", "b"), sd=0.2)}, {"g": [[0.6, 0.6]]}, prior=True)
    post = posterior(evidence, method="nuts", draws=100, warmup=60, chains=2, seed=0)
    assert bool(space.contains(post.theta).all())
    assert post.status == "unreliable"
    assert "draws diverged: a wall" in post.reason
    assert posterior(evidence, method="importance").status == "converged"


def test_a_stop_keeps_the_draws_that_are_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def stopped(evaluate, samplers, seeds):
        def counted(y: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal count
            count += 1
            if count == 500:
                raise KeyboardInterrupt
            return evaluate(y)

        in_step(counted, samplers, seeds)

    monkeypatch.setattr(module, "in_step", stopped)
    state = torch.get_rng_state()
    post = posterior(counts(), method="nuts", draws=1000, warmup=60, chains=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert post.status == "interrupted"
    assert f"stopped after {len(post.theta)} of 1000 draws" in post.reason
    assert post.theta.shape == (len(post.theta), 1)
    assert 2 * 20 <= len(post.theta) < 1000
    assert post.chains == 2  # of one length
    assert bool(torch.isfinite(post.theta).all())
    assert 2.0 < post.mean["rate"] < 4.5
    assert not chains_left()


def test_chains_in_step_are_those_of_each_alone() -> None:
    """Whatever else is answered in one evaluation, and in whatever order chains end, random numbers are a chain's own."""

    def walk(steps: int, out: list[float]) -> Callable[[Ask], None]:
        def run(ask: Ask) -> None:
            y = torch.zeros(1).double()
            for _ in range(steps):
                value, slope = ask(y)
                y = y + 0.5 * slope + torch.randn(1).double()
                out.append(float(y + value))

        return run

    def evaluate(y: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(y))
        return -0.5 * y.square().sum(-1), -y

    steps, seeds = [5, 9, 3], [1, 2, 3]
    calls: list[int] = []
    together: list[list[float]] = [[], [], []]
    in_step(evaluate, [walk(n, out) for n, out in zip(steps, together, strict=True)], seeds)
    assert calls == [3, 3, 3, 2, 2, 1, 1, 1, 1]
    for n, seed, out in zip(steps, seeds, together, strict=True):
        alone: list[float] = []
        in_step(evaluate, [walk(n, alone)], [seed])
        assert alone == out
    assert not chains_left()


def test_what_a_chain_or_the_density_raises_ends_all_of_them() -> None:
    ended: list[int] = []

    def sampler(number: int, steps: int) -> Callable[[Ask], None]:
        def run(ask: Ask) -> None:
            try:
                for _ in range(steps):
                    ask(torch.zeros(1))
                if number == 1:
                    raise ValueError("of chain 1")
            finally:
                ended.append(number)

        return run

    with pytest.raises(ValueError, match="of chain 1"):
        in_step(lambda y: (y[:, 0], y), [sampler(0, 9), sampler(1, 2), sampler(2, 9)], [0, 0, 0])
    assert sorted(ended) == [0, 1, 2]

    def bad(y: Tensor) -> tuple[Tensor, Tensor]:
        raise ArithmeticError("of the density")

    with pytest.raises(ArithmeticError, match="of the density"):
        in_step(bad, [sampler(3, 9), sampler(4, 9)], [0, 0])
    assert sorted(ended) == [0, 1, 2, 3, 4]
    assert not chains_left()


def test_a_stop_before_there_are_draws_stops() -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    from engine.posterior.modes import find_modes
    from engine.posterior.target import Target

    target = Target(counts())
    with pytest.raises(KeyboardInterrupt):
        module.nuts(target, find_modes(target), 100, torch.Generator().manual_seed(0), tick=stop)


def test_importing_the_engine_imports_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, engine; from engine import Registry, Posterior; "
        "print(sorted({'pyro', 'arviz', 'pandas', 'xarray', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_twenty_correlated_parameters_by_laplace_and_importance() -> None:
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    covariance = root @ root.mT / 20 + 0.05 * torch.eye(20)
    names = tuple(f"p{i}" for i in range(20))
    space = ParameterSpace([Parameter(n, prior=Normal(0.0, 1.0)) for n in names])
    x = torch.randn(20, generator=generator, dtype=torch.float64)
    evidence = Evidence(
        space, {"g": Gaussian(parameter_names=names, covariance=covariance)}, {"g": x[None]}, prior=True
    )
    exact = torch.linalg.inv(torch.linalg.inv(covariance) + torch.eye(20))
    mean = exact @ torch.linalg.solve(covariance, x)
    law = torch.distributions.MultivariateNormal(torch.zeros(20).double(), covariance + torch.eye(20))
    for method in ("laplace", "importance"):
        post = posterior(evidence, method=method, draws=2000, seed=2)
        assert post.status == "converged", post.reason
        n = post.diagnostics.get("ess_bulk", post.diagnostics.get("ess"))
        found = torch.tensor([post.mean[p] for p in names]).double()
        assert float(((found - mean) / exact.diagonal().sqrt()).abs().max()) < 5.0 / math.sqrt(n)
        sd = torch.tensor([post.sd[p] for p in names]).double()
        assert float((sd / exact.diagonal().sqrt() - 1.0).abs().max()) < 5.0 / math.sqrt(2 * n)
        marginal = post.log_marginal_likelihood
        assert marginal.value == pytest.approx(float(law.log_prob(x)), abs=4.5 * marginal.error + 0.02)
