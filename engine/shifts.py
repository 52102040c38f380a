r"""How far two estimates differ, in units of what they may.

Only what both determine can be compared: the functions :math:`l^\top\theta` in the row spaces of both informations
(:mod:`engine.identified`). The covariance of the difference is

- :math:`C_a + C_b` for two estimates from independent data;
- :math:`C_\text{less} - C_\text{more}` where the data of one are a part of the data of the other, because an efficient
  estimate does not correlate with what could be added to it (Hausman's test).

References:
    | Hausman, Econometrica 46 (1978) 1251; Gratton and Challinor, MNRAS 499 (2020) 3410, nested data
    | Raveri and Hu, Phys. Rev. D 99 (2019) 043506, arXiv:1806.04649, sections III and IV
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import scipy.stats
import torch
from torch import Tensor

from engine.errors import EstimateError
from engine.identified import Determined, Frame, common, frame_of
from engine.result import Estimate, Status

__all__ = ["BeforeAfter", "ParameterShift", "Shift", "before_after"]

_SAME = 1e-9  # of a variance: a smaller reduction of it is none


@dataclass(frozen=True)
class ParameterShift:
    """How far one parameter differs between two estimates.

    Attributes:
        value: The difference, in the parameter's unit.
        error: Its standard error, from what the two estimates do not share.

    Example:
        >>> ParameterShift(3.0, 1.5).pull
        2.0
    """

    value: float
    error: float

    @property
    def pull(self) -> float:
        """The difference in units of its error."""
        return self.value / self.error if self.error > 0 else math.nan


@dataclass(frozen=True, eq=False)
class Shift:
    """The difference of two estimates in the functions of θ that both determine.

    Attributes:
        directions: Those functions l'θ as rows, shape (k, P), in units of the inverse of θ.
        value: l'(θ̂_a − θ̂_b), shape (k,).
        covariance: Of the value, (k, k).
        chi2: value' covariance⁻¹ value; NaN where the covariance is not positive definite, 0 for k = 0.
        dof: k.
        parameters: Parameter -> its own shift, for those that both fix by themselves.
        angle: Between what the two determine, in degrees: 0 but for flat directions that curve in between.

    Example:
        >>> one = torch.ones(1, 1).double()
        >>> round(Shift(one, torch.tensor([2.0]).double(), one, 4.0, 1, {"mu": ParameterShift(2.0, 1.0)}).p_value, 4)
        0.0455
    """

    directions: Tensor
    value: Tensor
    covariance: Tensor
    chi2: float
    dof: int
    parameters: Mapping[str, ParameterShift]
    angle: float = 0.0

    @property
    def p_value(self) -> float | None:
        """The chance of a larger shift, χ² with k degrees of freedom; 1 for k = 0, None where χ² is not defined."""
        return None if math.isnan(self.chi2) else chance(self.chi2, self.dof)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {
            "chi2": number(self.chi2),
            "dof": self.dof,
            "p_value": self.p_value,
            "directions": self.directions.tolist(),
            "value": self.value.tolist(),
            "covariance": self.covariance.tolist(),
            "angle": self.angle,
            "parameters": {n: {**asdict(s), "pull": number(s.pull)} for n, s in self.parameters.items()},
        }


@dataclass(frozen=True, eq=False)
class BeforeAfter:
    """What more data did to an estimate.

    Attributes:
        before, after: The estimates.
        added: The plugins that came.
        shift: From the one to the other, with covariance C_before − C_after, in what both the data before and the data that
            came determine; None where a fit failed, where the data after are not those before and more, or where only an
            interaction came, which has no data of its own.
        parameters: Parameter -> (error before, error after): infinite where it was not identified.
        reason: Why there is no shift; empty where there is one.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> plugins = {name: Gaussian(parameter_names=("mu",), sd=1.0) for name in "ab"}
        >>> both = Evidence(ParameterSpace([Parameter("mu")]), plugins, {"a": [[0.0]], "b": [[2.0]]})
        >>> found = before_after(estimate(both.only(["a"])), estimate(both))
        >>> found.added, round(found.shift.parameters["mu"].value, 9), round(found.shift.parameters["mu"].pull, 9)
        (('b',), 1.0, 1.414213562)
    """

    before: Estimate
    after: Estimate
    added: tuple[str, ...]
    shift: Shift | None
    reason: str = ""

    @property
    def parameters(self) -> dict[str, tuple[float, float]]:
        """Parameter -> (error before, error after)."""
        return {n: (self.before[n].error, self.after[n].error) for n in self.after.parameters.names}

    @property
    def p_value(self) -> float | None:
        """The chance of a larger shift if the new data agree with the old; None without a shift."""
        return None if self.shift is None else self.shift.p_value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines; infinite and undefined numbers are None."""
        return {
            "added": list(self.added),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "shift": None if self.shift is None else self.shift.to_dict(),
            "reason": self.reason,
        }

    def __str__(self) -> str:
        from engine.report.tension import before_after_text

        return before_after_text(self)


def before_after(before: Estimate, after: Estimate) -> BeforeAfter:
    """What an append did to an estimate: errors before and after, and the shift in units of what it may be.

    Arguments:
        before: Without the new data, over the same parameters.
        after: With it, and with all the data before.

    Returns:
        Both, with the shift. Where there is none, ``reason`` says why.

    Raises:
        EstimateError: for estimates of different parameters, or with other parameters fixed.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu")])
        >>> plugins = {"a": Gaussian(parameter_names=("mu",), sd=1.0), "b": Gaussian(parameter_names=("mu",), sd=0.75)}
        >>> both = Evidence(space, plugins, {"a": [[0.0]], "b": [[2.5]]})
        >>> round(before_after(estimate(both.only(["a"])), estimate(both)).shift.chi2, 9)  # 2.5² / (1² + 0.75²)
        4.0
    """
    if before.parameters.names != after.parameters.names or dict(before.fixed) != dict(after.fixed):
        raise EstimateError(
            f"two estimates of the same free parameters are needed, got {before.parameters.names} and {after.parameters.names}"
        )
    old, new = set(before.contributions), set(after.contributions)
    added = tuple(sorted(new - old))
    reason = ""
    if Status.FAILED in (before.status, after.status):
        which = "before" if before.status is Status.FAILED else "after"
        reason = f"the estimate {which} failed"
    elif not old <= new:
        reason = f"the data before are no part of those after: {', '.join(sorted(old - new))} is not there"
    elif not _same_data(before, after):
        reason = "the data before are no part of those after: a plugin was superseded, or has other data"
    elif added and all(_reads_others(after, name) for name in added):
        reason = (
            f"nothing was measured anew: {', '.join(added)} changes how data are read that were there before, and the change of θ̂ has "
            "no such law"
        )
    if reason:
        return BeforeAfter(before, after, added, None, reason)
    frame = frame_of(after)
    few, many = frame.determined(before), frame.determined(after)
    came = torch.stack([after.contributions[n].information for n in added]).sum(0) if added else after.information * 0.0
    basis, cosine = common(few, frame.determined(after, came), many.rank)
    return BeforeAfter(before, after, added, nested(frame, before, after, few, many, basis, cosine))


def _reads_others(after: Estimate, name: str) -> bool:
    """Whether a plugin is an interaction, which has no data of its own."""
    evidence = after._evidence
    return evidence is not None and name in evidence.modalities and bool(evidence.modalities[name].parts)


def _same_data(before: Estimate, after: Estimate) -> bool:
    """Whether the plugins of the first are the same, with the same data, in the second, as far as anyone knows."""
    one, other = before._evidence, after._evidence
    if one is None or other is None or before.refinement is not None or after.refinement is not None:
        known = before.provenance.get("plugins", {}), after.provenance.get("plugins", {})
        return all(known[1].get(n) == content for n, content in known[0].items())
    same = all(other.observations.hashes.get(n) == h for n, h in one.observations.hashes.items())
    return same and all(one.modalities[n] is other.modalities[n] for n in one.names)


def shifted(
    frame: Frame,
    names: Sequence[str],
    change: Tensor,
    covariance: Tensor,
    basis: Tensor,
    cosine: float,
    fixes: Callable[[Tensor], bool],
    held: Collection[str] = (),
) -> Shift:
    """A shift from the change of θ (P,), its covariance (q, q) and the functions (q, k) that are compared.

    Parameters on a bound, ``held``, have no shift of their own: the bound, and not the data, says where they are.
    """
    y = frame.dual @ change
    value, scatter = basis.mT @ y, basis.mT @ covariance @ basis
    chi2, k = 0.0, basis.shape[1]
    if k:
        least, most = torch.linalg.eigvalsh(scatter)[[0, -1]].tolist()
        chi2 = float(value @ torch.linalg.solve(scatter, value)) if least > _SAME * most > 0 else math.nan
    own = {}
    for name, function in zip(names, frame.basis, strict=True):
        variance = float(function @ covariance @ function)
        if k and name not in held and fixes(function) and variance > 0:
            own[name] = ParameterShift(float(function @ y), math.sqrt(variance))
    directions = basis.mT @ frame.dual
    return Shift(directions, value, scatter, chi2, k, own, math.degrees(math.acos(min(1.0, cosine))))


def nested(
    frame: Frame, less: Estimate, more: Estimate, few: Determined, many: Determined, basis: Tensor, cosine: float = 1.0
) -> Shift:
    """From an estimate to one that has more data, with covariance C_less − C_more.

    Arguments:
        frame: Coordinates of both.
        less, more: The estimates, of which the second has all the data of the first.
        few, many: What they determine.
        basis: The functions that are compared, (q, k).
        cosine: Of the angle between what the first and the data that came determine.
    """
    names, covariance = more.parameters.names, few.inverse - many.inverse

    def fixes(function: Tensor) -> bool:
        gain = float(function @ covariance @ function)
        return few.fixes(function) and gain > _SAME * float(function @ few.inverse @ function)

    held = {*less.bounds, *more.bounds}
    return shifted(frame, names, more.theta - less.theta, covariance, basis, cosine, fixes, held)


def chance(statistic: float, dof: int) -> float:
    return float(scipy.stats.chi2.sf(statistic, dof)) if dof else 1.0


def number(value: float) -> float | None:
    return value if math.isfinite(value) else None
