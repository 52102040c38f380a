r"""What two parts tell about a variable, taken apart: redundancy, unique information and synergy.

.. math:: I(X_1; Y) = R + U_1, \quad I(X_2; Y) = R + U_2, \quad I(X_1, X_2; Y) = R + U_1 + U_2 + S

With :math:`\Delta_p = \{q : q(x_i, y) = p(x_i, y)\}`, the laws that keep what each part alone tells,
:math:`R = I(X_1; Y) + I(X_2; Y) - \min_{q \in \Delta_p} I_q(X_1, X_2; Y)` (Bertschinger et al.). R, U_1 and U_2 are functions of
the two marginals; S needs the joint law.

Synergy is not what adding scalars misses. A sum of log-evidences takes parts for independent given Y, and loses
:math:`I(X_1; X_2 \mid Y)`. Two independent noisy copies of Y have synergy and nothing is lost; Y = a ⊕ b with X_1 = (a, b),
X_2 = b has no synergy and loses one bit. So both are told.

References:
    | Williams and Beer (2010), https://arxiv.org/abs/1004.2515
    | Bertschinger, Rauh, Olbrich, Jost, Ay, Entropy 16 (2014) 2161, https://arxiv.org/abs/1311.2852
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

__all__ = ["UNITS", "Decomposition"]

#: What one nat is in each unit.
UNITS: Mapping[str, float] = {"nats": 1.0, "bits": 1.0 / math.log(2.0)}


def unit_factor(unit: str) -> float:
    """What one nat is in a unit. ValueError for any but nats and bits."""
    if unit not in UNITS:
        raise ValueError(f"a unit of information is one of {', '.join(UNITS)}, got {unit!r}")
    return UNITS[unit]


@dataclass(frozen=True)
class Decomposition:
    """Redundancy, unique information and synergy of two parts about Y.

    Attributes:
        redundancy: R, what both tell.
        unique1, unique2: What only the first, and only the second, tells.
        synergy: S, what only both together tell; None where no joint law is known.
        information1, information2: I(X_1; Y) and I(X_2; Y).
        joint_information: I(X_1, X_2; Y); None where no joint law is known.
        conditional_information: I(X_1; X_2 | Y), what a sum of log-evidences misses; None where it is not known.
        unit: ``"nats"`` or ``"bits"``, of all numbers.
        errors: Standard errors by name, of what was estimated from samples; empty where numbers are exact.
        gap: By how much R may be too small, and U and S too large, because the optimisation ended: an upper bound.
        reliable: Whether the scalars that it was made of passed every gate (:mod:`engine.information.worth`), and posteriors do not
            contradict each other; True for tables.
        reason: What failed; empty where nothing did.

    Example:
        >>> found = Decomposition(0.5, 0.0, 0.0, 1.0, 0.5, 0.5, 1.5, 0.5, unit="bits")
        >>> round(found.to("nats").synergy, 4)
        0.6931
        >>> print(found)
        redundancy 0.5, unique 0 and 0, synergy 1 bits; the sum of both misses 0.5 bits
    """

    redundancy: float
    unique1: float
    unique2: float
    synergy: float | None
    information1: float
    information2: float
    joint_information: float | None
    conditional_information: float | None
    unit: str = "nats"
    errors: Mapping[str, float] = field(default_factory=dict)
    gap: float = 0.0
    reliable: bool = True
    reason: str = ""

    def to(self, unit: str) -> Decomposition:
        """The same in another unit.

        Arguments:
            unit: ``"nats"`` or ``"bits"``.

        Raises:
            ValueError: for any other unit.
        """
        factor = unit_factor(unit) / unit_factor(self.unit)
        scaled: dict[str, Any] = {name: value * factor for name, value in self._numbers().items() if value is not None}
        return replace(self, unit=unit, errors={n: v * factor for n, v in self.errors.items()}, **scaled)

    def _numbers(self) -> dict[str, float | None]:
        words = ("unit", "errors", "reliable", "reason")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in words}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        verdict = {"reliable": self.reliable, "reason": self.reason}
        return {**self._numbers(), "unit": self.unit, "errors": dict(self.errors), **verdict}

    def __str__(self) -> str:
        def said(name: str) -> str:
            value = round(getattr(self, name), 4) + 0.0
            error = self.errors.get(name)
            return f"{value:.4g}" if error is None else f"{value:.3f} ± {error:.3f}"

        synergy = (
            f"synergy {said('synergy')} {self.unit}" if self.synergy is not None else f"{self.unit}; synergy unknown"
        )
        text = f"redundancy {said('redundancy')}, unique {said('unique1')} and {said('unique2')}, {synergy}"
        if self.conditional_information is not None:
            text = f"{text}; the sum of both misses {said('conditional_information')} {self.unit}"
        return text if self.reliable else f"{text}  not reliable: {self.reason}"


def taken_apart(
    information1: float,
    information2: float,
    least: float,
    joint: float | None,
    conditional: float | None,
    gap: float = 0.0,
) -> Decomposition:
    """A decomposition in nats from I(X_1; Y), I(X_2; Y), the least I_q(X_1, X_2; Y), and I_p and I(X_1; X_2 | Y) where known.

    Rounding of ``least`` is kept from making a part negative: it lies between max I_i and Σ I_i.
    """
    least = min(max(least, information1, information2), information1 + information2)
    redundancy = information1 + information2 - least
    return Decomposition(
        redundancy=redundancy,
        unique1=least - information2,
        unique2=least - information1,
        synergy=None if joint is None else joint - least,
        information1=information1,
        information2=information2,
        joint_information=joint,
        conditional_information=conditional,
        gap=gap,
    )
