r"""What θ's components must satisfy together: linear rows, a simplex, a ball, a positive semidefinite matrix.

Bounds of single parameters belong to :class:`engine.Parameter`; what ties several together is declared on a
:class:`engine.ParameterSpace` and kept in ``registry.toml``. Every set here is convex, and so is their
intersection; one that is empty, or has no room to move in, is refused when it is declared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from engine.errors import ParameterError
from engine.feasible import MatrixCone, NormCone

__all__ = ["Ball", "Linear", "PositiveSemidefinite", "Rows", "Simplex", "SpaceConstraint", "constraint_from_toml"]


@dataclass(frozen=True, eq=False)
class Rows:
    """What one constraint asks of θ (P,), as numbers.

    Attributes:
        A, b: Inequalities A θ ≤ b, shapes (m, P) and (m,).
        C, d: Equalities C θ = d, shapes (e, P) and (e,).
        sides: Which side of the constraint each inequality is.
        nonnegative: Positions of components that must be >= 0.
        cone: A cone, where there is one.

    Example:
        >>> rows = Linear({"a": 1.0, "b": 2.0}, upper=3.0).rows({"a": 0, "b": 1})
        >>> rows.A.tolist(), rows.b.tolist(), rows.sides
        ([[1.0, 2.0]], [3.0], ('upper',))
    """

    A: Tensor
    b: Tensor
    C: Tensor
    d: Tensor
    sides: tuple[str, ...] = ()
    nonnegative: tuple[int, ...] = ()
    cone: MatrixCone | NormCone | None = None


def _rows(P: int, **given: Any) -> Rows:
    none, nothing = torch.zeros(0, P, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    return Rows(**{"A": none, "b": nothing, "C": none, "d": nothing, **given})


def _number(what: str, value: Any) -> float:
    try:
        number = None if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = None
    if number is None:
        raise ParameterError(f"{what} must be a number, got {repr(value)[:100]}")
    if math.isnan(number):
        raise ParameterError(f"{what} must be a number, got NaN; leave a limit out where there is none")
    return number


def _text(number: float) -> str:
    """As short as tells it from others: a constraint's formula is its name where it has no other."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _names(what: str, names: Sequence[str], least: int) -> tuple[str, ...]:
    out = None if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    if out is None or not all(isinstance(n, str) for n in out):
        raise ParameterError(f"{what} needs the names of parameters in a sequence, got {repr(names)[:100]}")
    if len(out) < least or len(set(out)) != len(out):
        raise ParameterError(f"{what} needs at least {least} parameters, each once, got {', '.join(out) or 'none'}")
    return out


class _Named:
    """A constraint's name and its plain values."""

    kind: ClassVar[str]
    name: str

    def _set(self, **values: Any) -> None:
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def _name(self, name: str | None, otherwise: str) -> None:
        if name is not None and (not isinstance(name, str) or not name or not name.isprintable() or '"' in name):
            raise ParameterError(f"a constraint's name is printable text without quotes, got {name!r}")
        self._set(name=otherwise if name is None else name)

    def to_toml(self) -> dict[str, Any]:
        """Plain values for a ``[[constraint]]`` block; :func:`constraint_from_toml` reads them back."""
        raise NotImplementedError

    def _asks(self) -> dict[str, Any]:
        raise NotImplementedError

    def meaning(self) -> str:
        """What it asks, as JSON: equal for two that ask the same, whatever they are called.

        The order in which parameters are listed, and the sign of both sides, make no difference; a common factor does.
        """
        return json.dumps(self._asks(), sort_keys=True, separators=(",", ":"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and self.to_toml() == other.to_toml()

    def __hash__(self) -> int:
        return hash(repr(self.to_toml()))


class Linear(_Named):
    """A linear combination of parameters between limits, or equal to a value: lower ≤ Σ c_j θ_j ≤ upper.

    Arguments:
        coefficients: Parameter -> c_j, finite and not all zero.
        lower, upper: Limits; at least one is finite.
        equal: The value it must have, in place of limits.
        name: How messages call it; its formula where left out.

    Raises:
        ParameterError: for coefficients or limits that are no numbers, or limits that leave no room.

    Example:
        >>> Linear({"a": 1, "b": 2}, upper=3), Linear({"a": 1, "b": -1}, equal=0, name="balance").name
        (Linear(a + 2 b ≤ 3), 'balance')
    """

    kind = "linear"
    coefficients: dict[str, float]
    lower: float
    upper: float

    def __init__(
        self,
        coefficients: Mapping[str, float],
        lower: float | None = None,
        upper: float | None = None,
        *,
        equal: float | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(coefficients, Mapping):
            raise ParameterError(
                f"coefficients must map parameters to numbers, got {coefficients!r}; write {{'a': 1.0}}"
            )
        names = _names("a linear constraint", tuple(coefficients), 1)
        c = {n: _number(f"the coefficient of '{n}'", coefficients[n]) for n in names}
        if not all(math.isfinite(v) for v in c.values()) or not any(c.values()):
            raise ParameterError(f"coefficients must be finite and not all zero, got {c}")
        if equal is not None and (lower is not None or upper is not None):
            raise ParameterError("a linear constraint has limits or is an equality, got both; give equal= alone")
        if equal is not None:
            lower = upper = equal
        low = -math.inf if lower is None else _number("lower", lower)
        high = math.inf if upper is None else _number("upper", upper)
        if low == -math.inf and high == math.inf:
            raise ParameterError(
                f"a linear constraint needs a finite limit, got ({low:g}, {high:g}); give lower, upper or equal"
            )
        if low > high or low == math.inf or high == -math.inf:
            raise ParameterError(f"limits must satisfy lower ≤ upper, got ({low:g}, {high:g})")
        self._set(coefficients={n: v for n, v in c.items() if v}, lower=low, upper=high)
        self._name(name, str(self))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names it ties together."""
        return tuple(self.coefficients)

    def rows(self, index: Mapping[str, int]) -> Rows:
        """What it asks of θ, where index is the position of each of the P parameters."""
        row = torch.zeros(len(index), dtype=torch.float64)
        for name, value in self.coefficients.items():
            row[index[name]] = value
        if self.lower == self.upper:
            return _rows(len(index), C=row[None], d=torch.tensor([self.upper], dtype=torch.float64))
        sides = tuple(s for s, v in (("lower", self.lower), ("upper", self.upper)) if math.isfinite(v))
        A = torch.stack([-row if s == "lower" else row for s in sides])
        b = torch.tensor([-self.lower if s == "lower" else self.upper for s in sides], dtype=torch.float64)
        return _rows(len(index), A=A, b=b, sides=sides)

    def to_toml(self) -> dict[str, Any]:
        """Plain values for a ``[[constraint]]`` block."""
        limits = {k: v for k, v in (("lower", self.lower), ("upper", self.upper)) if math.isfinite(v)}
        if self.lower == self.upper:
            limits = {"equal": self.upper}
        return {"name": self.name, "kind": self.kind, "coefficients": dict(self.coefficients), **limits}

    def _asks(self) -> dict[str, Any]:
        ordered = dict(sorted(self.coefficients.items()))
        sign = 1.0 if next(iter(ordered.values())) > 0 else -1.0
        low, high = sorted((sign * self.lower + 0.0, sign * self.upper + 0.0))  # -0.0 equals 0.0
        return {"kind": self.kind, "coefficients": {n: sign * v for n, v in ordered.items()}, "limits": [low, high]}

    def __str__(self) -> str:
        text = ""
        for n, v in self.coefficients.items():
            size = "" if abs(v) == 1 else f"{_text(abs(v))} "
            text += (" − " if v < 0 else " + ") + size + n if text else ("−" if v < 0 else "") + size + n
        if self.lower == self.upper:
            return f"{text} = {_text(self.upper)}"
        low = f"{_text(self.lower)} ≤ " if math.isfinite(self.lower) else ""
        return f"{low}{text}" + (f" ≤ {_text(self.upper)}" if math.isfinite(self.upper) else "")

    def __repr__(self) -> str:
        return f"Linear({self})"


class Simplex(_Named):
    """Fractions: parameters that are not negative and sum to a total.

    Arguments:
        parameters: At least two names.
        total: What they sum to, positive.
        name: How messages call it.

    Raises:
        ParameterError: for names that are none, or a total that is not positive.

    Example:
        >>> Simplex(["signal", "top", "qcd"])
        Simplex(signal + top + qcd = 1, each ≥ 0)
    """

    kind = "simplex"
    parameters: tuple[str, ...]
    total: float

    def __init__(self, parameters: Sequence[str], total: float = 1.0, *, name: str | None = None) -> None:
        size = _number("the total of a simplex", total)
        if not 0.0 < size < math.inf:
            raise ParameterError(f"the total of a simplex must be positive and finite, got {size:g}")
        self._set(parameters=_names("a simplex", parameters, 2), total=size)
        self._name(name, str(self))

    def rows(self, index: Mapping[str, int]) -> Rows:
        """What it asks of θ, where index is the position of each of the P parameters."""
        row = torch.zeros(len(index), dtype=torch.float64)
        columns = [index[n] for n in self.parameters]
        row[columns] = 1.0
        total = torch.tensor([self.total], dtype=torch.float64)
        return _rows(len(index), C=row[None], d=total, nonnegative=tuple(columns))

    def to_toml(self) -> dict[str, Any]:
        """Plain values for a ``[[constraint]]`` block."""
        return {"name": self.name, "kind": self.kind, "parameters": list(self.parameters), "total": self.total}

    def _asks(self) -> dict[str, Any]:
        return {"kind": self.kind, "parameters": sorted(self.parameters), "total": self.total}

    def __str__(self) -> str:
        return f"{' + '.join(self.parameters)} = {_text(self.total)}, each ≥ 0"

    def __repr__(self) -> str:
        return f"Simplex({self})"


class PositiveSemidefinite(_Named):
    """A symmetric matrix of parameters that must be positive semidefinite, as a covariance is.

    Arguments:
        matrix: Names, n rows of n; the same name at (i, j) and (j, i). ``None`` is an entry that is 0.
        name: How messages call it.

    Raises:
        ParameterError: for a matrix that is not square and symmetric, or a name in two places.

    Example:
        >>> PositiveSemidefinite([["vxx", "vxy"], ["vxy", "vyy"]]).parameters
        ('vxx', 'vxy', 'vyy')
    """

    kind = "positive_semidefinite"
    matrix: tuple[tuple[str | None, ...], ...]

    def __init__(self, matrix: Sequence[Sequence[str | None]], *, name: str | None = None) -> None:
        if (
            isinstance(matrix, str)
            or not isinstance(matrix, Sequence)
            or not all(isinstance(row, Sequence) and not isinstance(row, str) for row in matrix)
        ):
            raise ParameterError(f"a positive semidefinite matrix is given as rows of names, got {matrix!r:.100}")
        rows = tuple(tuple(None if n in (None, "") else n for n in row) for row in matrix)
        n = len(rows)
        if n < 2 or any(len(row) != n for row in rows):
            raise ParameterError(
                f"a positive semidefinite matrix has n ≥ 2 rows of n names, got {[list(r) for r in rows]}"
            )
        places: dict[str, tuple[int, int]] = {}
        for i in range(n):
            for j in range(i + 1):
                entry = rows[i][j]
                if entry != rows[j][i]:
                    raise ParameterError(
                        f"the matrix must be symmetric, got {entry!r} at ({i}, {j}) and {rows[j][i]!r} at ({j}, {i})"
                    )
                if entry is None:
                    continue
                if not isinstance(entry, str) or places.setdefault(entry, (i, j)) != (i, j):
                    raise ParameterError(
                        f"each entry is a parameter of its own, got {entry!r} at ({i}, {j}) again; use None for 0"
                    )
        if any(rows[i][i] is None for i in range(n)):
            raise ParameterError("the diagonal must be parameters, got None there: a variance of 0 has no covariances")
        self._set(matrix=rows)
        self._name(name, str(self))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names it ties together, row by row."""
        return tuple(dict.fromkeys(n for row in self.matrix for n in row if n is not None))

    def rows(self, index: Mapping[str, int]) -> Rows:
        """What it asks of θ, where index is the position of each of the P parameters."""
        n = len(self.matrix)
        F = torch.zeros(n, n, len(index), dtype=torch.float64)
        for i, row in enumerate(self.matrix):
            for j, entry in enumerate(row):
                if entry is not None:
                    F[i, j, index[entry]] = 1.0
        return _rows(len(index), cone=MatrixCone(F, torch.zeros(n, n, dtype=torch.float64)))

    def to_toml(self) -> dict[str, Any]:
        """Plain values for a ``[[constraint]]`` block."""
        return {"name": self.name, "kind": self.kind, "matrix": [[n or "" for n in row] for row in self.matrix]}

    def _asks(self) -> dict[str, Any]:
        order = sorted(range(len(self.matrix)), key=lambda i: self.matrix[i][i] or "")
        return {"kind": self.kind, "matrix": [[self.matrix[i][j] or "" for j in order] for i in order]}

    def __str__(self) -> str:
        return f"[{'; '.join(' '.join(n or '0' for n in row) for row in self.matrix)}] ⪰ 0"

    def __repr__(self) -> str:
        return f"PositiveSemidefinite({self})"


class Ball(_Named):
    """Parameters that lie within a distance of a point: ‖θ − centre‖ ≤ radius.

    Arguments:
        parameters: At least two names.
        radius: Positive.
        centre: One value for each; zeros where left out.
        name: How messages call it.

    Raises:
        ParameterError: for names that are none, a radius that is not positive, or another number of values.

    Example:
        >>> Ball(["S", "C"])  # of a decay's asymmetries: S² + C² ≤ 1
        Ball(‖(S, C)‖ ≤ 1)
    """

    kind = "ball"
    parameters: tuple[str, ...]
    radius: float
    centre: tuple[float, ...]

    def __init__(
        self,
        parameters: Sequence[str],
        radius: float = 1.0,
        centre: Sequence[float] | None = None,
        *,
        name: str | None = None,
    ) -> None:
        names = _names("a ball", parameters, 2)
        size = _number("the radius of a ball", radius)
        if not 0.0 < size < math.inf:
            raise ParameterError(f"the radius of a ball must be positive and finite, got {size:g}")
        if centre is not None and not isinstance(centre, Sequence):
            raise ParameterError(
                f"the centre of a ball has a value for each of {', '.join(names)}, got {centre!r:.100}"
            )
        at = tuple(_number("the centre of a ball", v) for v in ([0.0] * len(names) if centre is None else centre))
        if len(at) != len(names) or not all(map(math.isfinite, at)):
            raise ParameterError(f"the centre of a ball has a finite value for each of {', '.join(names)}, got {at}")
        self._set(parameters=names, radius=size, centre=at)
        self._name(name, str(self))

    def rows(self, index: Mapping[str, int]) -> Rows:
        """What it asks of θ, where index is the position of each of the P parameters."""
        G = torch.zeros(len(self.parameters), len(index), dtype=torch.float64)
        for i, n in enumerate(self.parameters):
            G[i, index[n]] = 1.0
        centre, radius = (torch.tensor(v, dtype=torch.float64) for v in (self.centre, self.radius))
        return _rows(len(index), cone=NormCone(G, -centre, torch.zeros(len(index), dtype=torch.float64), radius))

    def to_toml(self) -> dict[str, Any]:
        """Plain values for a ``[[constraint]]`` block."""
        block = {"name": self.name, "kind": self.kind, "parameters": list(self.parameters)}
        return {**block, "radius": self.radius, "centre": list(self.centre)}

    def _asks(self) -> dict[str, Any]:
        centre = dict(sorted((n, c + 0.0) for n, c in zip(self.parameters, self.centre, strict=True)))
        return {"kind": self.kind, "centre": centre, "radius": self.radius}

    def __str__(self) -> str:
        point = ", ".join(
            f"{n} − {_text(c)}" if c > 0 else f"{n} + {_text(-c)}" if c else n
            for n, c in zip(self.parameters, self.centre, strict=True)
        )
        return f"‖({point})‖ ≤ {_text(self.radius)}"

    def __repr__(self) -> str:
        return f"Ball({self})"


#: Any of the constraints that a parameter space can have.
SpaceConstraint: TypeAlias = Linear | Simplex | PositiveSemidefinite | Ball

_FIELDS: dict[str, tuple[Any, set[str], set[str]]] = {
    "linear": (Linear, {"coefficients"}, {"lower", "upper", "equal"}),
    "simplex": (Simplex, {"parameters"}, {"total"}),
    "positive_semidefinite": (PositiveSemidefinite, {"matrix"}, set()),
    "ball": (Ball, {"parameters"}, {"radius", "centre"}),
}


def constraint_from_toml(block: Mapping[str, Any]) -> SpaceConstraint:
    """The constraint that ``to_toml`` wrote.

    Arguments:
        block: Plain values, with its ``kind``.

    Raises:
        ParameterError: naming what is wrong.

    Example:
        >>> constraint_from_toml({"kind": "linear", "coefficients": {"a": 1.0, "b": 1.0}, "upper": 2.0})
        Linear(a + b ≤ 2)
    """
    kind = block.get("kind")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ParameterError(f"the kind of a constraint is one of {', '.join(_FIELDS)}, got {kind!r}")
    made, needed, optional = _FIELDS[kind]
    given = {key: value for key, value in block.items() if key != "kind"}
    missing, unknown = needed - set(given), set(given) - needed - optional - {"name"}
    if missing or unknown:
        wrong = f"is missing {sorted(missing)}" if missing else f"has unknown fields {sorted(unknown)}"
        raise ParameterError(f"a {kind} constraint {wrong}; it takes {sorted(needed | optional | {'name'})}")
    try:
        return made(**given)
    except (TypeError, AttributeError) as error:
        raise ParameterError(f"the {kind} constraint {given.get('name', '')!r} cannot be read: {error}") from error
