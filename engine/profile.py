r"""Profile-likelihood intervals: where twice the drop of the profiled evidence reaches a threshold.

:math:`D(\psi) = 2\,[S(\hat\theta) - \max_{\theta: \theta_j = \psi} S(\theta)]` and the interval is
:math:`\{\psi: D(\psi) \le \chi^2_{1}(\mathrm{level})\}`. Both ends of every parameter are searched
together, by Newton's method on √D, whose slope the score gives for nothing (envelope theorem). An end that
a bound cuts short is that bound; one that the evidence never reaches is infinite.

References:
    | Venzon and Moolgavkar, Appl. Stat. 37 (1988) 87
    | James and Roos (1975), MINOS, Comput. Phys. Commun. 10, 343
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy.stats
import torch
from torch import Tensor

from engine.errors import EstimateError
from engine.evidence import Derivatives, Evidence
from engine.optimise import maximise
from engine.uncertainty import Interval

__all__ = ["profile_at", "profile_intervals", "profiled"]

_ROWS = 1024  # points profiled together, which bounds memory
_FAR = 1e8  # in standard errors: an end that is further away does not exist


def profiled(
    evidence: Evidence, theta: Tensor, columns: Tensor, values: Tensor, lower: Tensor, upper: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """max S with one component held, for K problems at once.

    Arguments:
        evidence: S.
        theta: Starting points, shape (K, P).
        columns: Which component each row holds, shape (K,).
        values: What it is held at, shape (K,).
        lower, upper, scale: As in :func:`engine.optimise.maximise`, shape (P,).

    Returns:
        S (K,) in nats, dS/dψ (K,), θ (K, P) and whether each row converged (K,).

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("a"), Parameter("b")])
        >>> pair = Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.5], [0.5, 1.0]])
        >>> evidence = Evidence(space, {"pair": pair}, {"pair": [[0.0, 0.0]]})
        >>> box = (space.lower, space.upper, space.scale)
        >>> start, held = torch.zeros(1, 2).double(), torch.ones(1).double()
        >>> S, slope, theta, fine = profiled(evidence, start, torch.tensor([0]), held, *box)
        >>> [round(v, 9) for v in theta[0].tolist()], round(slope.item(), 9), fine.item()
        ([1.0, 0.5], -1.0, True)
    """
    K = len(columns)
    rows = torch.arange(K)
    low, high = lower.repeat(K, 1), upper.repeat(K, 1)
    low[rows, columns] = high[rows, columns] = values
    theta = theta.clone()
    theta[rows, columns] = values
    solution = maximise(evidence.derivatives, theta, low, high, scale, value=evidence.value)
    fine = solution.converged | (solution.edm < 1e-6) | torch.isinf(solution.at.value)
    return solution.at.value, solution.at.score[rows, columns], solution.theta, fine


def profile_at(
    evidence: Evidence,
    theta: Tensor,
    columns: Sequence[int],
    values: Tensor,
    lower: Tensor,
    upper: Tensor,
    scale: Tensor,
) -> Tensor:
    """max S over the other components, with some held at given values.

    Arguments:
        evidence: S.
        theta: Where the searches start, shape (P,).
        columns: The C components held.
        values: What they are held at, shape (K, C), inside their bounds.
        lower, upper, scale: As in :func:`engine.optimise.maximise`, shape (P,).

    Returns:
        Shape (K,), in nats; −∞ where no search found a possible point.

    Raises:
        EstimateError: naming the first point where no maximum was found.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("a"), Parameter("b")])
        >>> pair = Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.5], [0.5, 1.0]])
        >>> evidence = Evidence(space, {"pair": pair}, {"pair": [[0.0, 0.0]]})
        >>> box = (space.lower, space.upper, space.scale)
        >>> theta, held = torch.zeros(2).double(), torch.tensor([[0.0], [1.0], [2.0]]).double()
        >>> S = profile_at(evidence, theta, [0], held, *box)
        >>> [round(v, 9) for v in (2 * (S[0] - S)).tolist()]
        [0.0, 1.0, 4.0]
    """
    start, low, high = (t.repeat(len(values), 1) for t in (theta, lower, upper))
    for t in (start, low, high):
        t[:, columns] = values
    out = []
    for part in zip(start.split(_ROWS), low.split(_ROWS), high.split(_ROWS), strict=True):
        solution = maximise(evidence.derivatives, *part, scale, value=evidence.value)
        fine = solution.converged | (solution.edm < 1e-6) | torch.isinf(solution.at.value)
        if not bool(fine.all()):
            row = part[0][int((~fine).nonzero()[0]), columns].tolist()
            where = ", ".join(f"{evidence.parameters.names[c]} = {v:.6g}" for c, v in zip(columns, row, strict=True))
            raise EstimateError(
                f"the profile at {where} did not converge; hold fewer components, or stay nearer to the maximum"
            )
        out.append(solution.at.value)
    return torch.cat(out)


def profile_intervals(
    evidence: Evidence,
    theta: Tensor,
    maximum: float,
    covariance: Tensor,
    columns: Sequence[int],
    lower: Tensor,
    upper: Tensor,
    scale: Tensor,
    *,
    level: float = 0.6827,
) -> list[Interval]:
    """The profile intervals of several components of one estimate.

    Arguments:
        evidence: S.
        theta: θ̂, shape (P,).
        maximum: S(θ̂) in nats.
        covariance: Its covariance, shape (P, P): a guess of the width, no more.
        columns: Which components.
        lower, upper, scale: Bounds and typical sizes, shape (P,).
        level: The confidence level, in (0, 1).

    Returns:
        The intervals, in the order of ``columns``.

    Raises:
        EstimateError: when the search finds a higher maximum than θ̂, or does not converge.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("a"), Parameter("b")])
        >>> pair = Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.5], [0.5, 1.0]])
        >>> evidence = Evidence(space, {"pair": pair}, {"pair": [[0.0, 0.0]]})
        >>> box = (space.lower, space.upper, space.scale)
        >>> theta, maximum = torch.zeros(2).double(), float(evidence.value(torch.zeros(1, 2))[0])
        >>> profile_intervals(evidence, theta, maximum, pair.covariance, [1], *box, level=0.95)
        [Interval(-1.95996398, 1.95996398, level=0.95, method='profile')]
    """
    target = math.sqrt(float(scipy.stats.chi2.ppf(level, 1)))
    at = evidence.derivatives(theta[None])
    noise = 1e-6 + 16.0 * float(at.resolution[0])
    ends = [
        _End(c, side, theta, float((lower, upper)[side > 0][c]), at, covariance, float(scale[c]), target)
        for c in columns
        for side in (-1, 1)
    ]
    for _ in range(80):
        live = [end for end in ends if end.where is None]
        if not live:
            break
        start = torch.minimum(torch.maximum(torch.stack([end.start for end in live]), lower), upper)
        column, psi = (
            torch.tensor([end.column for end in live]),
            torch.tensor([end.psi for end in live], dtype=torch.float64),
        )
        value, slope, found, fine = profiled(evidence, start, column, psi, lower, upper, scale)
        for k, end in enumerate(live):
            drop = 2.0 * (maximum - float(value[k]))
            name = evidence.parameters.names[end.column]
            if not bool(fine[k]):
                raise EstimateError(
                    f"the profile of '{name}' at {end.psi:.6g} did not converge; "
                    "try method='wald', or look at that region with registry.log_evidence"
                )
            if drop < -noise:
                names = evidence.parameters.names
                point = ", ".join(f"{n} = {v:.6g}" for n, v in zip(names, found[k].tolist(), strict=True))
                raise EstimateError(
                    f"the profile found a higher maximum than this estimate (by {-drop / 2:.3g} nats) at {point}; "
                    "estimate again with start= that point"
                )
            end.learn(drop, float(slope[k]), found[k])
    else:
        name = next(evidence.parameters.names[end.column] for end in ends if end.where is None)
        raise EstimateError(
            f"the profile interval of '{name}' was not found in 80 steps; look at registry.log_evidence along it"
        )
    out = []
    for low, high in zip(ends[::2], ends[1::2], strict=True):
        assert low.where is not None
        assert high.where is not None
        marks = tuple(mark for mark, end in (("low", low), ("high", high)) if end.cut)
        out.append(Interval(low.where, high.where, level=level, method="profile", at_bound=marks))
    return out


class _End:
    """The search for one end of one interval: how far from θ̂_j √D reaches its target.

    ``inner`` is the furthest distance known to lie inside, ``outer`` the nearest known to lie outside. Where
    S is −∞ the fault may be the start's, which put the other components where they cannot be: such a
    distance is ``blocked``, and tried again a few times after the inner end has advanced.
    """

    def __init__(
        self,
        column: int,
        side: int,
        theta: Tensor,
        bound: float,
        at: Derivatives,
        covariance: Tensor,
        scale: float,
        target: float,
    ) -> None:
        self.column, self.side, self.bound, self.target = column, side, bound, target
        self.centre = float(theta[column])
        self.reach = abs(bound - self.centre)
        self.inner, self.outer, self.blocked, self.retries = 0.0, math.inf, math.inf, 4
        variance = float(covariance[column, column])
        known = math.isfinite(variance) and variance > 0
        # D ≈ 2 |g| δ + J δ²: the first term is there where the maximum sits on a bound
        push = abs(float(at.score[0, column]))
        curvature = 1.0 / variance if known else max(0.0, float(at.information[0, column, column]))
        flat = not known and push * scale < 1e-12 and curvature * scale**2 < 1e-12
        self.width = scale if flat else target**2 / (push + math.sqrt(push**2 + curvature * target**2))
        self.step = min(self.width, self.reach)
        #: how the other components follow, per unit of this one, from the last conditional maximum on
        tilt = (
            torch.nan_to_num(covariance[column] / variance, nan=0.0, posinf=0.0, neginf=0.0) if known else 0.0 * theta
        )
        self.tilt = tilt.index_fill(0, torch.tensor([column]), 1.0)
        self.base, self.base_step = theta, 0.0
        self.cut = self.step == 0
        self.where: float | None = bound if self.cut else None

    @property
    def psi(self) -> float:
        """Where √D is to be evaluated."""
        return self.bound if self.step >= self.reach else self.centre + self.side * self.step

    @property
    def start(self) -> Tensor:
        """Where the other components start there."""
        return self.base + self.side * (self.step - self.base_step) * self.tilt

    def learn(self, drop: float, slope: float, found: Tensor) -> None:
        """Take D and dS/dψ at :attr:`psi`, and the conditional maximum; finish, or choose the next step."""
        root, step = math.sqrt(max(drop, 0.0)), self.step
        if math.isinf(root):
            self.blocked = step
        else:
            if step != self.base_step:
                self.tilt = (found - self.base) / (self.side * (step - self.base_step))
            self.base, self.base_step = found, step
            if root >= self.target:
                self.outer = step
            elif step > self.inner:
                self.inner = step
                if math.isfinite(self.blocked) and self.retries:
                    self.retries, self.blocked = self.retries - 1, math.inf
        limit = min(self.outer, self.blocked)
        inside = root < self.target
        if abs(root - self.target) < 1e-6 * self.target or limit - self.inner < 1e-9 * self.width:
            self.where = self.psi
        elif inside and step >= self.reach:
            self.where, self.cut = self.bound, True
        elif inside and step > _FAR * self.width:
            self.where = self.side * math.inf
        else:
            self.step = min(self._next(root, -slope * self.side, limit), self.reach)

    def _next(self, root: float, fall: float, limit: float) -> float:
        """Newton's step on √D where it can be trusted, else half-way to the limit, else four times as far."""
        widest = limit if math.isfinite(limit) else 4.0 * self.step
        if math.isfinite(root) and root > 0.05 * self.target and fall > 0:
            newton = self.step + (self.target - root) * root / fall  # d√D/dψ = (−dS/dψ) / √D
            if self.inner < newton < widest:
                # far outside, where S may fall exponentially, Newton's steps on √D are too short
                return newton if root < 4.0 * self.target else min(newton, 0.5 * (self.inner + limit))
            if newton >= widest and not math.isfinite(limit):
                return widest
        return 0.5 * (self.inner + limit) if math.isfinite(limit) else widest
