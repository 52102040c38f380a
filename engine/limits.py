"""Constraint data given at a call: bounds and right-hand sides that differ between data sets, or that are learned.

Searches must start inside them: points screened over the prior are folded between the bounds of each data set, and the
best of them moved to the nearest point that its other constraints allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.constraints import Ball, Linear, Simplex
from engine.errors import ParameterError
from engine.feasible import FeasibleSet, MatrixCone, NormCone
from engine.objective import Objective
from engine.parameters import ParameterSpace
from engine.search import Starts, nearest, starting_points

__all__ = ["Limits"]

_TRIED = 4  # times as many points as are kept are moved into the limits before the best are chosen
_UNBOUNDED = ("lower", "upper")  # what may be infinite, where it limits nothing
_CLOSE = 0.02  # of a typical size: points nearer than this are one


class Limits:
    """The feasible sets of B data sets, with gradients to the numbers in them.

    Arguments:
        space: The parameters and constraints as declared.
        given: What takes the place of declared numbers: parameter -> ``{"lower": ..., "upper": ...}``; the name of a
            linear constraint -> any of its ``lower``, ``upper``, ``equal`` and ``coefficients``, as far as they were
            declared; of a simplex -> ``total``; of a ball -> ``radius`` and ``centre``. Each is a number or a tensor, with
            a leading dimension B where it differs between data sets.
        count: B.

    Raises:
        ParameterError: for a name or a field that was not declared, NaN or what is no number, or another shape. Numbers
            that leave a data set no room are no error: its status says ``infeasible``.

    Example:
        >>> from engine import Parameter
        >>> space = ParameterSpace([Parameter("a"), Parameter("b")], [Linear({"a": 1, "b": 1}, upper=1.0, name="budget")])
        >>> upper = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> limits = Limits(space, {"budget": {"upper": upper}, "a": {"lower": 0.5}}, count=2)
        >>> inside = limits.inside(torch.arange(2))
        >>> inside.b.tolist(), inside.lower.tolist(), inside.b.requires_grad
        ([[2.0], [3.0]], [[0.5, -inf], [0.5, -inf]], True)
    """

    def __init__(self, space: ParameterSpace, given: Mapping[str, Any], count: int) -> None:
        self.space, self.count = space, count
        self.some = bool(given)
        self._set = space.feasible
        if not isinstance(given, Mapping):
            raise ParameterError(
                f"limits map names to their numbers, got {given!r:.100}; write {{'a': {{'upper': 1.0}}}}"
            )
        if not given:
            return
        named = {c.name: c for c in space.constraints}
        for name, fields in given.items():
            if name not in space and name not in named:
                raise ParameterError(
                    f"no parameter or constraint {name!r}; there are {', '.join([*space.names, *named])}"
                )
            if not isinstance(fields, Mapping):
                raise ParameterError(
                    f"the limits of '{name}' are written {{'lower': ..., 'upper': ...}}, got {fields!r:.100}"
                )
        fractions = {n for c in space.constraints if isinstance(c, Simplex) for n in c.parameters}
        base, P = space.feasible, len(space)
        columns = {side: list(getattr(base, side).expand(count, P).unbind(-1)) for side in ("lower", "upper")}
        for name, fields in given.items():
            if name in space:
                for side, value in self._fields(name, fields, {"lower": (), "upper": ()}).items():
                    if side == "lower" and name in fractions:
                        value = torch.where(value >= 0.0, value, 0.0)
                    columns[side][space.index(name)] = value
        A, b = list(base.A.expand(count, -1, -1).unbind(1)), list(base.b.expand(count, -1).unbind(1))
        C, d = list(base.C.expand(count, -1, -1).unbind(1)), list(base.d.expand(count, -1).unbind(1))
        cones = list(base.cones)
        for name, fields in given.items():
            constraint = named.get(name) if name not in space else None
            if isinstance(constraint, Linear):
                self._linear(constraint, fields, A, b, C, d)
            elif isinstance(constraint, Simplex):
                row = space.equalities.index(name)
                d[row] = self._fields(name, fields, {"total": ()}).get("total", d[row])
            elif isinstance(constraint, Ball):
                k = space.cones.index(name)
                cones[k] = self._ball(constraint, fields, cones[k])
            elif constraint is not None:
                raise ParameterError(f"the constraint '{name}' has no numbers to give")
        self._set = FeasibleSet(
            torch.stack(columns["lower"], -1),
            torch.stack(columns["upper"], -1),
            torch.stack(A, 1) if A else base.A,
            torch.stack(b, 1) if b else base.b,
            torch.stack(C, 1) if C else base.C,
            torch.stack(d, 1) if d else base.d,
            tuple(cones),
        )

    def inside(self, rows: Tensor) -> FeasibleSet:
        """The sets of some of the data sets, by their ``rows`` (k,), with gradients."""
        return self._set.rows(rows)

    def numbers(self, rows: Tensor) -> list[Tensor]:
        """Everything that the sets of some data sets, by their ``rows`` (k,), are made of: (k, ...) each, with gradients."""
        inside = self.inside(rows)
        fields = [inside.lower, inside.upper, inside.A, inside.b, inside.C, inside.d]
        fields += [t for cone in inside.cones for t in vars(cone).values()]
        return [t for t in fields if t.requires_grad]

    def spread(self, theta: Tensor, owner: Tensor | None = None) -> Tensor:
        """Points of the declared bounds, put between the bounds of each data set so that they cover them.

        A point between both stays. Others are folded back at the nearer bound, as often as it takes; where bounds are
        wider than the declared ones, all points are stretched first.

        Arguments:
            theta: Shape (n, P).
            owner: Which data set each point belongs to, shape (n,).

        Returns:
            With owner, shape (n, P). Without, every point for each data set, shape (B, n, P), or (1, n, P) where
            they have the same bounds.
        """
        low, high = self._set.lower.detach().expand(self.count, -1), self._set.upper.detach().expand(self.count, -1)
        if owner is not None:
            low, high = low[owner], high[owner]
        else:
            alike = bool((low == low[:1]).all()) and bool((high == high[:1]).all())
            low, high = (t[: 1 if alike else None, None] for t in (low, high))
        base = self.space.feasible
        theta = torch.where(base.lower.isfinite(), _stretched(theta, base.lower, base.upper, low, high), theta)
        theta = torch.where(
            base.upper.isfinite() & ~base.lower.isfinite(),
            -_stretched(-theta, -base.upper, -base.lower, -high, -low),
            theta,
        )
        width = high - low
        part = ((theta - low) / width) % 2.0
        folded = low + width * torch.minimum(part, 2.0 - part)
        folded = torch.where(width.isfinite() & (width > 0), folded, torch.minimum(torch.maximum(theta, low), high))
        folded = torch.where(low.isfinite() & high.isinf(), low + (theta - low).abs(), folded)
        folded = torch.where(high.isfinite() & low.isinf(), high - (theta - high).abs(), folded)
        return torch.where((theta >= low) & (theta <= high), theta, folded)

    def detached(self) -> FeasibleSet:
        """All sets, as numbers."""
        s = self._set
        cones = tuple(
            replace(c, constant=c.constant.detach())
            if isinstance(c, MatrixCone)
            else replace(c, constant=c.constant.detach(), radius=c.radius.detach())
            for c in s.cones
        )
        lower, upper, A, b, C, d = (t.detach() for t in (s.lower, s.upper, s.A, s.b, s.C, s.d))
        return FeasibleSet(lower, upper, A, b, C, d, cones)

    def _fields(self, name: str, fields: Mapping[str, Any], known: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Checked values (B, *shape) of the fields that a name may have."""
        out = {}
        for field, value in fields.items():
            if field not in known:
                raise ParameterError(
                    f"'{name}' takes {', '.join(known) or 'nothing'}, got {field!r}: it was not declared with it"
                )
            shape = known[field]
            try:
                tensor = torch.as_tensor(value, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError):
                raise ParameterError(
                    f"{field} of '{name}' must be a number or a tensor, got {value!r:.100}; use ±inf for no limit"
                ) from None
            if tensor.shape not in (shape, (self.count, *shape)):
                raise ParameterError(
                    f"{field} of '{name}' must have shape {shape} or {(self.count, *shape)}, got {tuple(tensor.shape)}"
                )
            if bool(torch.isnan(tensor).any()):
                at = torch.isnan(tensor).nonzero()[0].tolist()
                raise ParameterError(
                    f"{field} of '{name}' must be a number, got NaN at index {at}; use ±inf for no limit"
                )
            if field not in _UNBOUNDED and bool(torch.isinf(tensor).any()):
                at = torch.isinf(tensor).nonzero()[0].tolist()
                raise ParameterError(
                    f"{field} of '{name}' must be finite, got {tensor[tuple(at)].item()} at index {at}; "
                    "only a limit may be infinite"
                )
            out[field] = tensor.expand(self.count, *shape)
        return out

    def _linear(
        self,
        constraint: Linear,
        fields: Mapping[str, Any],
        A: list[Tensor],
        b: list[Tensor],
        C: list[Tensor],
        d: list[Tensor],
    ) -> None:
        name, space = constraint.name, self.space
        sides = [side for n, side in space.inequalities if n == name]
        known: dict[str, tuple[int, ...]] = dict.fromkeys(sides, ()) if sides else {"equal": ()}
        values = self._fields(name, fields, {**known, "coefficients": (len(constraint.parameters),)})
        row = None
        if "coefficients" in values:
            place = torch.zeros(len(constraint.parameters), len(space), dtype=torch.float64)
            for k, p in enumerate(constraint.parameters):
                place[k, space.index(p)] = 1.0
            row = values["coefficients"] @ place
        for i, (n, side) in enumerate(space.inequalities):
            if n != name:
                continue
            sign = -1.0 if side == "lower" else 1.0
            A[i] = A[i] if row is None else sign * row
            b[i] = sign * values[side] if side in values else b[i]
        for i, n in enumerate(space.equalities):
            if n == name:
                C[i] = C[i] if row is None else row
                d[i] = values.get("equal", d[i])

    def _ball(self, constraint: Ball, fields: Mapping[str, Any], cone: MatrixCone | NormCone) -> NormCone:
        assert isinstance(cone, NormCone)
        values = self._fields(constraint.name, fields, {"radius": (), "centre": (len(constraint.parameters),)})
        constant = -values["centre"] if "centre" in values else cone.constant.expand(self.count, -1)
        return replace(cone, constant=constant, radius=values.get("radius", cone.radius.expand(self.count)))


def limited_starts(
    objective: Objective,
    given: Limits,
    middle: Tensor,
    idle: Tensor,
    start: Mapping[str, float] | Tensor | None,
    *,
    screen: int,
    polish: int,
    seed: int,
) -> Starts:
    """Where searches start inside limits that were given at the call, as :func:`engine.search.starting_points` says it.

    Arguments:
        objective: S of B data sets.
        given: Their limits.
        middle, idle, screen, polish, seed: As there.
        start: One more starting point, (P,), (B, P) or by name; one outside the limits is moved to the nearest inside.
    """
    space, P, B = given.space, len(given.space), objective.count
    inside = given.detached()
    theta, owner = middle.new_zeros(0, P), torch.zeros(0, dtype=torch.long)
    if screen:
        wide: Any = _Spread(objective, given)
        found = starting_points(
            wide, space.feasible, middle, idle, start=None, screen=screen, polish=_TRIED * polish, seed=seed
        )
        theta, owner = given.spread(found.theta, found.owner), found.owner
    if start is not None:
        theta = torch.cat([_begin(space, start, middle, B), theta])
        owner = torch.cat([torch.arange(B), owner])
    moved, fine = nearest(inside.rows(owner), theta, space.scale)
    value = torch.where(fine, objective.value(moved, owner), -torch.inf)
    chosen, rows = [], torch.arange(len(owner))
    if start is not None:  # which is among them, whatever its value
        chosen.append((torch.isfinite(value) & (rows < B)).nonzero()[:, 0])
        value[:B] = -torch.inf
        polish -= 1
    for _ in range(max(polish, 0)):
        best = torch.full((B,), -torch.inf, dtype=torch.float64).scatter_reduce(0, owner, value, "amax")
        hit = torch.isfinite(value) & (value == best[owner])
        first = torch.full((B,), len(owner)).scatter_reduce(0, owner[hit], rows[hit], "amin")
        first = first[first < len(owner)]
        chosen.append(first)
        mine = torch.full((B, P), torch.inf, dtype=torch.float64).index_put((owner[first],), moved[first])
        value[((moved - mine[owner]) / space.scale).norm(dim=-1) <= _CLOSE * P**0.5] = -torch.inf
    picked = torch.cat(chosen) if chosen else rows[:0]
    picked = picked[owner[picked].argsort(stable=True)]
    return Starts(moved[picked], owner[picked])


class _Spread:
    """S at points that are first put between the bounds of each data set."""

    def __init__(self, objective: Objective, given: Limits) -> None:
        self.parameters, self.count, self.value = objective.parameters, objective.count, objective.value
        self._objective, self._given = objective, given

    def values(self, theta: Tensor) -> Tensor:
        """S (B, n) of every data set at each of n points, theta (n, P)."""
        placed = self._given.spread(theta)
        if len(placed) == 1:
            return self._objective.values(placed[0])
        whole = torch.ones(len(theta), dtype=torch.long)
        return torch.stack([self._objective.value(at, b * whole) for b, at in enumerate(placed)])


def _begin(space: ParameterSpace, start: Mapping[str, float] | Tensor, middle: Tensor, count: int) -> Tensor:
    """A start that was given, (B, P), wherever it lies."""
    if isinstance(start, Mapping):
        at = middle.clone()
        for name, value in start.items():
            at[space.index(name)] = float(value)
        return space.check_theta(at).expand(count, -1)
    at = torch.as_tensor(start).detach()
    at = space.check_theta(at) if at.dim() == 2 and len(at) == count else space.tensor(at)
    return at.expand(count, -1)


def _stretched(theta: Tensor, lower: Tensor, upper: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Points above a finite lower bound, stretched (or moved, where nothing bounds them from above) to wider bounds."""
    low, high = torch.where(low.isfinite(), torch.minimum(low, lower), lower), torch.maximum(high, upper)
    high = torch.where(high.isfinite(), high, upper)
    factor = torch.where(upper.isfinite(), (high - low) / (upper - lower), 1.0)
    moved = low + (theta - lower) * factor
    return torch.where((low == lower) & (high == upper), theta, moved)
