r"""Which plugin tells what: shares of the information about parameters and about directions in θ.

With :math:`J = \sum_m J_m` the information of the sum at θ̂ and C its inverse, plugin m's share is

- along an eigen-direction v of J in standard errors: :math:`v^\top J_m v / v^\top J v`;
- of a parameter with the others free: the same along its profile, :math:`v = C e_j`, which is also the share of the
  variance :math:`C_{jj}` that its data's noise makes up: :math:`(C J_m C)_{jj} / C_{jj}`;
- of a parameter with the others held: :math:`(J_m)_{jj} / J_{jj}`.

All of them add up to 1 over the plugins. Where plugins depend on each other given θ these are shares of the sum's curvature alone, and
no longer of a variance: what both tell counts twice. ``estimate.dependence`` says whether that was found.

What would be lost is another question, and no share: the error without plugin m over the error with it,
:math:`\sqrt{[(J - J_m)^{-}]_{jj} / C_{jj}}`, infinite where nothing else fixes the parameter.

References:
    | Kay (1993), Fundamentals of Statistical Signal Processing: Estimation Theory, section 3.8
    | Albrecht et al. (2009), arXiv:0901.0721, sections 3 and 4, adding and leaving out information
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimateError
from engine.identified import Frame, frame_of
from engine.result import Estimate, Status, direction_text

__all__ = ["Direction", "Shares", "shares"]

_SMALL = 1e-3  # of the largest component, in standard errors: not worth a word in the text of a direction


@dataclass(frozen=True, eq=False)
class Direction:
    """An eigen-direction of the information in units of the conditional standard errors.

    Attributes:
        vector: The direction in θ of one standard error's length, natural units, shape (P,).
        strength: The eigenvalue, of the information scaled to a unit diagonal: 1 for a parameter that correlates with none.
        shares: Plugin -> its share; they add up to 1.

    Example:
        >>> Direction(torch.tensor([0.5, 0.0]), 1.0, {"a": 0.25, "b": 0.75}).leader
        'b'
    """

    vector: Tensor
    strength: float
    shares: Mapping[str, float]

    @property
    def leader(self) -> str:
        """The plugin with the largest share."""
        return max(self.shares, key=lambda n: self.shares[n])


@dataclass(frozen=True, eq=False)
class Shares:
    """Who contributes what to an estimate.

    Attributes:
        estimate: What the shares are of.
        plugins: Their names, sorted; ``"prior"`` is one where it took part.
        marginal: Parameter -> plugin -> its share of the information about it, the others free; NaN where nobody knows it,
            or something holds it.
        conditional: The same with the others held.
        growth: Parameter -> plugin -> its error without the plugin over its error with it, at least 1 and infinite where it
            would not be identified; from the informations at θ̂, nothing is fitted again.
        directions: The eigen-directions, the best known first.
        provenance: That of the estimate.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> plugins = {"a": Gaussian(parameter_names=("mu",), sd=1.0), "b": Gaussian(parameter_names=("mu",), sd=2.0)}
        >>> found = shares(estimate(Evidence(ParameterSpace([Parameter("mu")]), plugins, {"a": [[0.0]], "b": [[1.0]]})))
        >>> {n: round(v, 9) for n, v in found.marginal["mu"].items()}
        {'a': 0.8, 'b': 0.2}
        >>> {n: round(v, 4) for n, v in found.growth["mu"].items()}  # √5 and √(5/4)
        {'a': 2.2361, 'b': 1.118}
    """

    estimate: Estimate
    plugins: tuple[str, ...]
    marginal: Mapping[str, Mapping[str, float]]
    conditional: Mapping[str, Mapping[str, float]]
    growth: Mapping[str, Mapping[str, float]]
    directions: tuple[Direction, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything a machine would want, as plain values; infinite and undefined numbers are None."""

        def plain(table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
            return {p: {n: v if math.isfinite(v) else None for n, v in row.items()} for p, row in table.items()}

        names = self.estimate.parameters.names
        return {
            "status": str(self.estimate.status),
            "converged": self.estimate.converged,
            "reason": self.estimate.reason,
            "plugins": list(self.plugins),
            "marginal": plain(self.marginal),
            "conditional": plain(self.conditional),
            "growth": plain(self.growth),
            "directions": [
                {
                    "vector": dict(zip(names, d.vector.tolist(), strict=True)),
                    "strength": d.strength,
                    "shares": dict(d.shares),
                }
                for d in self.directions
            ],
            "provenance": dict(self.provenance),
        }

    def text_of(self, direction: Direction) -> str:
        """A direction in words, its components in units of their conditional standard errors.

        Arguments:
            direction: One of :attr:`directions`.
        """
        names, unit = self.estimate.parameters.names, self.estimate.information.diagonal().clamp_min(1e-300).sqrt()
        weights = direction.vector * unit
        weights = weights / weights.norm()
        big = weights.abs() > _SMALL * weights.abs().max()
        return direction_text({n: float(f"{float(w):.3g}") for n, w, b in zip(names, weights, big, strict=True) if b})

    def __str__(self) -> str:
        from engine.report.tension import shares_text

        return shares_text(self)


def shares(fit: Estimate) -> Shares:
    """The share of every plugin in what an estimate knows.

    Arguments:
        fit: The estimate, which has every plugin's information at θ̂.

    Returns:
        The shares. A plugin whose log-evidence curves upwards at θ̂ has negative ones, and others more than 1.

    Raises:
        EstimateError: for a failed fit.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("a"), Parameter("b")])
        >>> both = Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.8], [0.8, 1.0]])
        >>> plugins = {"both": both, "a alone": Gaussian(parameter_names=("a",), sd=1.0)}
        >>> found = shares(estimate(Evidence(space, plugins, {"both": [[0.0, 0.0]], "a alone": [[0.0]]})))
        >>> {n: round(v, 4) for n, v in found.marginal["b"].items()}  # b learns of a through the correlation
        {'a alone': 0.2353, 'both': 0.7647}
        >>> found.growth["b"]["both"]
        inf
    """
    if fit.status is Status.FAILED:
        raise EstimateError(f"a failed fit has no shares: {fit.reason}")
    frame, names = _held(frame_of(fit), fit), fit.parameters.names
    plugins = tuple(sorted(fit.contributions))
    parts = {n: frame.reduced(fit.contributions[n].information) for n in plugins}
    whole = torch.stack([fit.contributions[n].information for n in plugins]).sum(
        0
    )  # shares add up, whatever the covariance
    known, total = frame.determined(fit, whole), frame.reduced(whole)
    C = known.inverse
    marginal, conditional, growth = {}, {}, {}
    without = {n: frame.determined(fit, whole - fit.contributions[n].information) for n in plugins}
    for name, function in zip(names, frame.basis, strict=True):
        if not known.fixes(function) or not fit[name].identified:
            nothing = dict.fromkeys(plugins, math.nan)
            marginal[name] = conditional[name] = growth[name] = nothing
            continue
        path = C @ function  # along the profile
        marginal[name] = {n: float(path @ parts[n] @ path / (path @ total @ path)) for n in plugins}
        i = fit.parameters.index(name)
        own = {n: float(fit.contributions[n].information[i, i]) for n in plugins}
        conditional[name] = {n: v / float(whole[i, i]) for n, v in own.items()}
        growth[name] = {}
        for n in plugins:
            variance = float(function @ without[n].inverse @ function) / float(function @ path)
            growth[name][n] = math.sqrt(max(1.0, variance)) if without[n].fixes(function) else math.inf
    return Shares(fit, plugins, marginal, conditional, growth, _directions(frame, total, parts, fit), fit.provenance)


def _held(frame: Frame, fit: Estimate) -> Frame:
    """Without components on a bound, and along the face of other constraints that hold: these no plugin moves."""
    space = fit.parameters
    held = torch.tensor([n in fit.bounds for n in space.names])
    if fit._face is not None and fit.bounds:
        values, vectors = torch.linalg.eigh(fit._face.free[0])
        free, unit = vectors[:, values > 0.5], fit._face.unit[0]
        return Frame(free * unit[:, None], free.mT / unit)
    inside = ~(frame.basis[held] != 0).any(0)
    return Frame(frame.basis[:, inside], frame.dual[inside])


def _directions(frame: Frame, total: Tensor, parts: Mapping[str, Tensor], fit: Estimate) -> tuple[Direction, ...]:
    """The eigen-directions of the information scaled to a unit diagonal that have curvature, best known first."""
    use = (total.diagonal() > 0).nonzero()[:, 0]
    if not len(use):
        return ()
    unit = total.diagonal()[use].rsqrt()
    values, vectors = torch.linalg.eigh(total[use[:, None], use] * unit[:, None] * unit)
    out = []
    for k in range(len(values) - 1, -1, -1):
        if float(values[k]) <= fit.rank * float(values[-1]):
            continue
        y = torch.zeros(len(total), dtype=torch.float64)
        y[use] = unit * vectors[:, k]
        size = float(y @ total @ y)
        vector = frame.basis @ y / math.sqrt(size)
        weights = vector * fit.information.diagonal().clamp_min(0.0).sqrt()
        first = (weights.abs() >= (1.0 - 1e-6) * weights.abs().max()).nonzero()[0, 0]  # of equal ones, in θ's order
        vector = vector * torch.sign(weights[first])
        out.append(Direction(vector, float(values[k]), {n: float(y @ parts[n] @ y) / size for n in parts}))
    return tuple(out)
