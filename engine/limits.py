"""Constraint data given at a call: bounds and right-hand sides that differ between data sets, or that are learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.constraints import Ball, Linear, Simplex
from engine.errors import ParameterError
from engine.feasible import FeasibleSet, MatrixCone, NormCone
from engine.parameters import ParameterSpace

__all__ = ["Limits"]


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
        ParameterError: for a name or a field that was not declared, NaN, or a tensor of another shape.

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
        base, P = space.feasible, len(space)
        columns = {side: list(getattr(base, side).expand(count, P).unbind(-1)) for side in ("lower", "upper")}
        for name, fields in given.items():
            if name in space:
                for side, value in self._fields(name, fields, {"lower": (), "upper": ()}).items():
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
        """The sets of some of the data sets, with gradients."""
        return self._set.rows(rows)

    def detached(self) -> FeasibleSet:
        """All sets, as numbers."""
        s = self._set
        cones = tuple(
            replace(c, constant=c.constant.detach())
            if isinstance(c, MatrixCone)
            else replace(c, constant=c.constant.detach(), radius=c.radius.detach())
            for c in s.cones
        )
        return FeasibleSet(*(t.detach() for t in (s.lower, s.upper, s.A, s.b, s.C, s.d)), cones)

    def _fields(self, name: str, fields: Mapping[str, Any], known: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Checked values (B, *shape) of the fields that a name may have."""
        out = {}
        for field, value in fields.items():
            if field not in known:
                raise ParameterError(
                    f"'{name}' takes {', '.join(known) or 'nothing'}, got {field!r}: it was not declared with it"
                )
            shape = known[field]
            tensor = torch.as_tensor(value, dtype=torch.float64)
            if tensor.shape not in (shape, (self.count, *shape)):
                raise ParameterError(
                    f"{field} of '{name}' must have shape {shape} or {(self.count, *shape)}, got {tuple(tensor.shape)}"
                )
            if bool(torch.isnan(tensor).any()):
                at = torch.isnan(tensor).nonzero()[0].tolist()
                raise ParameterError(
                    f"{field} of '{name}' must be a number, got NaN at index {at}; use ±inf for no limit"
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
        known: dict[str, tuple[int, ...]] = {side: () for side in sides} if sides else {"equal": ()}
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
