r"""What the prior integrates to, with some parameters held, where constraints cut from it or parameters are flat.

:meth:`engine.ParameterSpace.log_prior` is not normalised again over constraints, nor at values that are fixed, and a flat
prior is 1. A marginal likelihood needs ∫ π(θ) dθ over what is free; without constraints it is a product of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import scipy.optimize
import torch

from engine.constraints import Ball, Simplex
from engine.errors import PosteriorError
from engine.parameters import ParameterSpace
from engine.posterior.target import Target

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

_DRAWS = 2**16


def refuse_improper(space: ParameterSpace, fixed: Mapping[str, float], what: str = "a posterior") -> None:
    """Refuse free parameters whose prior has no finite mass. PosteriorError, naming the first, and what needs it."""
    held = {n for c in space.constraints if isinstance(c, Simplex | Ball) for n in c.parameters}
    for i, p in enumerate(space):
        if p.prior is not None or p.name in fixed or p.name in held or all(map(math.isfinite, p.bounds)):
            continue
        if space.constraints and all(math.isfinite(_end(space, i, sign)) for sign in (1.0, -1.0)):
            continue
        low, high = p.bounds
        raise PosteriorError(
            f"{what} needs proper priors, got '{p.name}' with a flat one over ({low:g}, {high:g}); "
            "declare it with a prior or with finite bounds"
            + (f", or hold it: fixed={{'{p.name}': ...}}" if what == "a posterior" else "")
        )


def _end(space: ParameterSpace, i: int, sign: float) -> float:
    """How far a component can go within bounds and linear constraints; infinite where it can go on for ever."""
    s, c = space.feasible, np.zeros(len(space))
    c[i] = -sign
    bounds = [
        (None if math.isinf(a) else a, None if math.isinf(b) else b)
        for a, b in zip(s.lower.tolist(), s.upper.tolist(), strict=True)
    ]
    A, b = (s.A.numpy(), s.b.numpy()) if len(s.b) else (None, None)
    C, d = (s.C.numpy(), s.d.numpy()) if len(s.d) else (None, None)
    found = scipy.optimize.linprog(c, A_ub=A, b_ub=b, A_eq=C, b_eq=d, bounds=bounds)
    return -float(found.fun) if found.status == 0 else math.inf


def log_prior_mass(target: Target) -> tuple[float, float]:
    """log ∫ π(θ) dθ over the free, continuous components, and its standard error, in nats.

    Arguments:
        target: Which components are free. Discrete ones are fixed here, so that their prior's weight is a factor.

    Example:
        >>> from engine import Evidence, Parameter
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("a", bounds=(0.0, 2.0)), Parameter("b", bounds=(0.0, 3.0))])
        >>> evidence = Evidence(space, {"g": Gaussian(parameter_names=("a",), sd=1.0)}, {"g": [[1.0]]}, prior=True)
        >>> round(log_prior_mass(Target(evidence, {"b": 1.0}))[0], 6)  # log 2
        0.693147
    """
    space = target.space
    middle = target.complete(torch.zeros(1, len(target.names), dtype=torch.float64))[0]
    if not space.constraints:
        total = 0.0
        for p, value in zip(space, middle, strict=True):
            if p.name in target.fixed:
                total += float(p.log_prior(value))
            elif p.prior is None:
                total += math.log(p.bounds[1] - p.bounds[0])
        return total, 0.0
    if not target.size:
        return float(space.log_prior(middle)), 0.0
    u = torch.quasirandom.SobolEngine(target.size, scramble=True, seed=0).draw(_DRAWS, dtype=torch.float64)
    u = u.clamp(1e-12, 1.0 - 1e-12)
    c = torch.zeros(_DRAWS, len(target.names), dtype=torch.float64)
    log_q = torch.zeros(_DRAWS, dtype=torch.float64)
    tied = {target.names[j] for members, _ in target.fractions for j in members}
    columns = {n: j for j, n in enumerate(target.volume)}
    for n in target.volume:
        if n in tied:
            continue
        p, j = space[n], target.names.index(n)
        i = space.index(n)
        low, high = _range(target, i)
        if p.prior is None:
            c[:, j] = low + (high - low) * u[:, columns[n]]
            log_q -= math.log(high - low)
        else:
            c[:, j] = torch.from_numpy(np.asarray(p.quantile(u[:, columns[n]].numpy())))
            log_q += p.log_prior(c[:, j])
    for members, sum_ in target.fractions:  # uniform on the simplex, by sticks
        left = torch.full((_DRAWS,), sum_, dtype=torch.float64)
        for k, j in enumerate(members[:-1]):
            part = 1.0 - (1.0 - u[:, columns[target.names[j]]]) ** (1.0 / (len(members) - 1 - k))
            c[:, j] = left * part
            left = left - c[:, j]
        c[:, members[-1]] = left
        log_q += math.lgamma(len(members)) - (len(members) - 1) * math.log(sum_)
    ratios = space.log_prior(target.complete(c)) - log_q
    mean = torch.logsumexp(ratios, 0) - math.log(_DRAWS)
    relative = (ratios - mean).exp()
    return float(mean), float(relative.std() / math.sqrt(_DRAWS)) if bool(torch.isfinite(mean)) else math.inf


def _range(target: Target, i: int) -> tuple[float, float]:
    """The widest range of a flat component: its bounds, a ball around it, or what linear constraints leave."""
    space = target.space
    low, high = float(space.lower[i]), float(space.upper[i])
    for c in space.constraints:
        if isinstance(c, Ball) and space.names[i] in c.parameters:
            at = c.centre[c.parameters.index(space.names[i])]
            low, high = max(low, at - c.radius), min(high, at + c.radius)
        elif isinstance(c, Simplex) and space.names[i] in c.parameters:
            high = min(high, c.total)
    if math.isinf(low):
        low = -_end(space, i, -1.0)
    if math.isinf(high):
        high = _end(space, i, 1.0)
    return low, high
