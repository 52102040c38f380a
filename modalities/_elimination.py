r"""A sum over discrete latents, one variable after the other: :math:`\log \sum_z \prod_j f_j`.

Factors are log-densities with a dimension for each variable and for each plate. A plate stands for as many
independent copies of what is in it, so that variables in a plate are summed before the plate is multiplied out.

References:
    | Obermeyer, Bingham, Jankowiak, Chiu, Pradhan, Rush, Goodman (2019), Tensor variable elimination for plated
      factor graphs
    | https://arxiv.org/abs/1902.03210
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ModalityError

__all__ = ["Factor", "Variable", "eliminate"]


@dataclass(frozen=True)
class Factor:
    """A log-density with one dimension for each plate and variable, and the plates it is in."""

    value: Tensor
    plates: frozenset[str]


@dataclass(frozen=True)
class Variable:
    """A discrete latent: its name, its dimension in every factor (< 0) and the plates it is in."""

    name: str
    dim: int
    plates: frozenset[str]


def eliminate(factors: Sequence[Factor], variables: Sequence[Variable], plates: Mapping[str, int]) -> Tensor:
    """log Σ over all variables of the product of all factors, a scalar.

    Arguments:
        factors: All of one rank, with size 1 in the dimensions that they do not depend on.
        variables: What is summed.
        plates: Plate -> its dimension (< 0).

    Raises:
        ModalityError: where variables of different plates meet in such a way that no order sums them.

    Example:
        >>> p = torch.tensor([[0.25, 0.75]]).T.log()                    # p(z), two values in dimension -2
        >>> f = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).log()  # p(x_i | z), x_1 ... x_3 in dimension -1
        >>> plate, z = frozenset({"n"}), Variable("z", -2, frozenset())
        >>> round(eliminate([Factor(p, frozenset()), Factor(f, plate)], [z], {"n": -1}).exp().item(), 6)  # one z for all
        0.0915
    """
    left, total = list(factors), None
    while left:
        deepest = max((f.plates for f in left), key=lambda p: (len(p), sorted(p)))
        here, left = [f for f in left if f.plates == deepest], [f for f in left if f.plates != deepest]
        local = [v for v in variables if v.plates == deepest]
        for values, own in _components([f.value for f in here], local):
            value = _summed(values, own)
            rest = [v for v in variables if value.shape[v.dim] > 1]
            target = frozenset().union(*(v.plates for v in rest))
            if deepest and not target < deepest:
                names = ", ".join(f"'{v.name}'" for v in rest)
                raise ModalityError(
                    f"discrete latents must be summed plate by plate, got {names}, which meet in the plates "
                    f"{', '.join(sorted(deepest))} without one that is in all of them; put them into nested plates"
                )
            for plate in sorted(deepest - target):
                value = value.sum(plates[plate], keepdim=True)
            if deepest:
                left.append(Factor(value, target))
            else:
                total = value.sum() if total is None else total + value.sum()
    assert total is not None
    return total


def _components(values: Sequence[Tensor], variables: Sequence[Variable]) -> list[tuple[list[Tensor], list[Variable]]]:
    """Factors that share none of the variables, apart."""
    groups: list[tuple[list[Tensor], list[Variable]]] = []
    for value in values:
        own = [v for v in variables if value.shape[v.dim] > 1]
        touched = [g for g in groups if any(v in g[1] for v in own)]
        merged = [value], own
        for g in touched:
            merged[0].extend(g[0])
            merged[1].extend(v for v in g[1] if v not in own)
        groups = [g for g in groups if all(g is not t for t in touched)] + [merged]
    return groups


def _summed(values: list[Tensor], variables: Sequence[Variable]) -> Tensor:
    """The product of factors, summed over variables, the cheapest one first."""
    left = list(variables)
    while left:
        costs = [_cost(values, v) for v in left]
        variable = left.pop(costs.index(min(costs)))
        touched = [t for t in values if t.shape[variable.dim] > 1]
        values = [t for t in values if t.shape[variable.dim] == 1]
        values.append(_log_sum(_product(touched), variable.dim))
    return _product(values)


def _cost(values: Sequence[Tensor], variable: Variable) -> int:
    return math.prod(torch.broadcast_shapes(*(t.shape for t in values if t.shape[variable.dim] > 1)))


def _product(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _log_sum(value: Tensor, dim: int) -> Tensor:
    """log Σ exp, whose derivatives are no NaN where all terms are −∞."""
    top = value.detach().amax(dim, keepdim=True)
    top = torch.where(top > -math.inf, top, 0.0)
    total = (value - top).exp().sum(dim, keepdim=True)
    there = total > 0
    return torch.where(there, torch.where(there, total, 1.0).log() + top, -math.inf)
