r"""Which method, and what its answer is worth.

``auto`` tries the methods in the order of what they cost and takes the first whose own diagnostics pass:
Laplace's approximation, importance sampling, a grid (up to three parameters), NUTS. Where none passes, it returns the one
that failed by least, and its status says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import PosteriorError
from engine.evidence import Evidence
from engine.parameters import ParameterSpace
from engine.posterior.cells import cells
from engine.posterior.found import Found, joined
from engine.posterior.grid import MOST, grid
from engine.posterior.importance import importance
from engine.posterior.laplace import laplace
from engine.posterior.marginal import MarginalLikelihood
from engine.posterior.mass import log_prior_mass, refuse_improper
from engine.posterior.modes import Modes, find_modes
from engine.posterior.nuts import nuts
from engine.posterior.result import Posterior, PosteriorStatus
from engine.posterior.target import Target
from engine.posterior.weighted import normalise
from engine.report.progress import progress_bar
from engine.search import check_seed

__all__ = ["METHODS", "posterior"]

#: What can be asked for.
METHODS = ("auto", "laplace", "importance", "grid", "nuts")


def posterior(
    evidence: Evidence,
    *,
    method: str = "auto",
    draws: int = 1000,
    seed: int = 0,
    fixed: Mapping[str, float] | None = None,
    start: Tensor | None = None,
    chains: int = 4,
    warmup: int = 300,
    screen: int = 1024,
    provenance: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Posterior:
    """The posterior of one data set: π(θ | x) ∝ exp S(θ) π(θ).

    Arguments:
        evidence: S with the prior (``prior=True``).
        method: ``"laplace"`` (a Gaussian in unconstrained coordinates), ``"importance"``, ``"grid"`` (up to three
            continuous parameters; discrete ones are enumerated), ``"nuts"``; or ``"auto"``, the cheapest whose own
            diagnostics pass.
        draws: How many draws of equal weight.
        seed: What everything random follows from.
        fixed: Parameters to hold, by name.
        start: One more point where a maximum may be, shape (P,).
        chains, warmup: Of NUTS: how many chains share the draws, and how long each adapts.
        screen: How many points of the prior are tried to find the maxima.
        provenance: What to carry along.
        progress: Whether to show how far it is; by default, on a terminal.

    Returns:
        A :class:`Posterior`; look at its ``status``. Ctrl-C during NUTS returns the draws that are finished.

    Raises:
        PosteriorError: for no draws, an unknown method, an improper prior, a grid of more than three parameters, or a discrete
            parameter under NUTS.
        ParameterError: for values that cannot be fixed, or an improper set of constraints.
        ModalityError: when a plugin breaks its contract on the way; the message names it.

    Example:
        >>> from torch.distributions import Gamma
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import PoissonCounts
        >>> space = ParameterSpace([Parameter("rate", prior=Gamma(2.0, 1.0))])
        >>> counts = PoissonCounts(signal=[1.0], strength="rate")
        >>> post = posterior(Evidence(space, {"a": counts}, {"a": [[4.0]]}, prior=True), method="grid")
        >>> round(post.mean["rate"], 3), post.log_marginal_likelihood.method  # Gamma(6, 2)
        (3.0, 'grid')
    """
    fixed = {name: float(value) for name, value in (fixed or {}).items()}
    _check(evidence, method, draws, chains, warmup, seed)
    refuse_improper(evidence.parameters, fixed)
    targets = cells(evidence, fixed, method)
    _check_grid(targets[0], method)
    began = time.monotonic()
    work = _Work(targets, draws, seed, start, screen, chains, warmup, progress)
    if method != "auto":
        found, why = work.run(method), ""
    else:
        found, why = _automatic(work)
    mass = [log_prior_mass(t) for t in targets]
    found_mass = torch.tensor([m for m, _ in mass], dtype=torch.float64)
    share = normalise(found_mass).exp()
    mass_error = float((share * torch.tensor([e for _, e in mass], dtype=torch.float64)).square().sum().sqrt())
    marginal = None
    if found.log_integral == found.log_integral:  # not NaN
        value = found.log_integral - float(torch.logsumexp(found_mass, 0))
        marginal = MarginalLikelihood(value, (found.error**2 + mass_error**2) ** 0.5, found.integral)
    status = PosteriorStatus.UNRELIABLE if found.problems else PosteriorStatus.CONVERGED
    if found.interrupted:
        status = PosteriorStatus.INTERRUPTED
    stopped = f"stopped after {len(found.theta)} of {draws} draws; " if found.interrupted else ""
    reason = stopped + "; ".join([*found.problems, *([found.note] if found.note else []), *([why] if why else [])])
    diagnostics = {**found.diagnostics, "seconds": round(time.monotonic() - began, 3)}
    return Posterior(
        parameters=evidence.parameters,
        method=found.method,
        status=status,
        reason=reason,
        theta=found.theta,
        points=found.points,
        log_weights=found.log_weights,
        diagnostics=diagnostics,
        chains=found.chains,
        fixed=fixed,
        provenance=dict(provenance or {}),
        unnormalised=tuple(n for n, m in evidence.modalities.items() if not m.normalised),
        seed=seed,
        _marginal=marginal,
        _raw=found.raw,
        _pool=found.pool,
        _base=(status, reason),
    )


def no_posterior(space: ParameterSpace, method: str, draws: int, reason: str, **fields: Any) -> Posterior:
    """A posterior that failed: all NaN.

    Arguments:
        space: θ.
        method, draws: As they were asked for.
        reason: Why there is none.
        fields: Others of :class:`Posterior`.
    """
    nothing = torch.full((draws, len(space)), torch.nan, dtype=torch.float64)
    even = torch.zeros(draws, dtype=torch.float64)
    return Posterior(space, method, PosteriorStatus.FAILED, reason, nothing, nothing, even, {}, **fields)


def _check(evidence: Evidence, method: str, draws: int, chains: int, warmup: int, seed: int) -> None:
    if not evidence.prior:
        raise PosteriorError("a posterior needs the prior: build the evidence with prior=True")
    check_request(method, draws, chains, warmup, seed)


def check_request(method: object, draws: object, chains: int, warmup: int, seed: object) -> None:
    """Refuse what no posterior can be asked for. PosteriorError."""
    if method not in METHODS:
        raise PosteriorError(f"the method of a posterior is one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise PosteriorError(f"a posterior needs at least one draw, got draws={draws!r}; 1000 is usual")
    check_seed(seed, PosteriorError)
    if method == "nuts" and (chains < 1 or warmup < 1 or draws < chains):
        raise PosteriorError(
            f"NUTS needs at least one chain, one draw of warm-up and one draw for each chain, got chains={chains}, "
            f"warmup={warmup}, draws={draws}"
        )


def _check_grid(target: Target, method: str) -> None:
    if method == "grid" and target.size > MOST:
        raise PosteriorError(
            f"a grid has up to {MOST} continuous parameters, got {target.size} ({', '.join(target.volume)}); "
            "hold some with fixed=, or use method='importance' or 'nuts'"
        )


class _Work:
    """The methods over all cells of one posterior; maxima are looked for once."""

    def __init__(
        self,
        targets: list[Target],
        draws: int,
        seed: int,
        start: Tensor | None,
        screen: int,
        chains: int,
        warmup: int,
        progress: bool | None,
    ) -> None:
        self.targets, self.draws, self.seed, self.start = targets, draws, seed, start
        self.screen = screen if len(targets) == 1 else max(32, min(screen, 4096 // len(targets)))
        self.chains, self.warmup, self.progress = chains, warmup, progress
        self._modes: list[Modes | None] | None = None
        self.size = targets[0].size

    @property
    def modes(self) -> list[Modes | None]:
        if self._modes is None:
            self._modes = [self._of(t) for t in self.targets]
            for target, modes in zip(self.targets, self._modes, strict=True):
                if modes is not None:
                    target.evidence.refuse_random(target.natural(modes.z[:1])[0])
                    break
            if all(m is None for m in self._modes) and self.size:
                raise PosteriorError(
                    "the data are impossible (S = −∞) at every point of the prior that was tried; check bounds and data"
                )
        return self._modes

    def _of(self, target: Target) -> Modes | None:
        if not target.size:
            return None
        try:
            return find_modes(target, start=self.start, screen=self.screen, seed=self.seed)
        except PosteriorError:
            if len(self.targets) == 1:
                raise
            return None  # one hypothesis that makes the data impossible is no reason to stop

    def run(self, method: str) -> Found:
        if not self.size:
            return self._enumerated()
        parts: list[Found] = []
        total = self.chains * (self.warmup - (-self.draws // self.chains)) if method == "nuts" else len(self.targets)
        for i, (target, modes) in enumerate(zip(self.targets, self.modes, strict=True)):
            if modes is None:
                continue
            generator = torch.Generator().manual_seed(_seed(self.seed, method, i))
            if method == "nuts":
                with progress_bar("sampling", total, self.progress) as tick:
                    parts.append(
                        nuts(target, modes, self.draws, generator, chains=self.chains, warmup=self.warmup, tick=tick)
                    )
            elif method == "importance":
                with progress_bar("weighing draws", None, self.progress) as tick:
                    parts.append(importance(target, modes, self.draws, generator, tick=tick))
            elif method == "grid":
                parts.append(grid(target, modes, self.draws, generator))
            else:
                parts.append(laplace(target, modes, self.draws, generator))
        return joined(parts, self.draws, torch.Generator().manual_seed(_seed(self.seed, method, -1)))

    def _enumerated(self) -> Found:
        """Nothing is continuous: every combination of values, each with its exact weight."""
        generator = torch.Generator().manual_seed(_seed(self.seed, "grid", 0))
        parts = [grid(t, None, self.draws, generator) for t in self.targets]
        best = max(range(len(parts)), key=lambda i: parts[i].log_integral)
        self.targets[best].evidence.refuse_random(parts[best].theta[0])
        if not any(p.log_integral > -torch.inf for p in parts):
            raise PosteriorError("the data are impossible (S = −∞) under every value; check bounds and data")
        return joined([p for p in parts if p.log_integral > -torch.inf], self.draws, generator)


def _automatic(work: _Work) -> tuple[Found, str]:
    """The first method whose diagnostics pass, and why it was taken."""
    if not work.size:
        return work.run("grid"), "chosen because nothing is continuous: it is exact"
    order = ["laplace", "importance"]
    order += ["grid"] if work.size <= MOST else []
    order += ["nuts"] if len(work.targets) == 1 and work.draws >= work.chains else []
    tried: list[tuple[Found, str]] = []
    for method in order:
        found = work.run(method)
        if not found.problems or found.interrupted:
            before = "".join(f"; {f.method} did not pass ({f.problems[0]})" for f, _ in tried)
            return found, f"chosen as the cheapest whose diagnostics pass{before}"
        tried.append((found, method))
    # Laplace's is an approximation whose error is known to be too large; of the others, the one that complains least
    best = min(tried[1:], key=lambda pair: (len(pair[0].problems), pair[0].diagnostics.get("k_hat", 0.0)))[0]
    others = "; ".join(f"{f.method}: {f.problems[0]}" for f, _ in tried if f is not best)
    return best, f"no method passes ({others})"


def _seed(seed: int, method: str, cell: int) -> int:
    return (seed * 1_000_003 + METHODS.index(method) * 7919 + (cell + 1) * 104_729) % (2**63 - 1)
