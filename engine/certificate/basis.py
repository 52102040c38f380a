r"""Smooth functions of θ over a prior: Chebyshev polynomials of the prior's cumulative fractions, to a total degree."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from engine.errors import ParameterError
from engine.parameters import ParameterSpace

__all__: list[str] = []  # the machinery of certificates


class Basis:
    """Products of Chebyshev polynomials :math:`T_k(2 F_j(\\theta_j) - 1)` with total degree at most ``degree``.

    F is the prior's cumulative distribution function, which makes every prior a box and a uniform one its own.
    """

    def __init__(self, space: ParameterSpace, degree: int) -> None:
        for parameter in space:
            if parameter.prior is None or parameter.discrete:
                raise ParameterError(
                    f"'{parameter.name}' must have a continuous prior to be simulated from, got {parameter.prior or 'none'}; "
                    "declare Parameter(name, prior=...)"
                )
        self.space, self.degree = space, degree
        self.exponents = torch.tensor(exponents(len(space), degree))

    def __len__(self) -> int:
        return len(self.exponents)

    def __call__(self, theta: Tensor) -> Tensor:
        """The functions (n, p) at theta (n, P); a θ outside the prior counts as on its edge."""
        t = standard(self.space, theta)
        rows = [torch.ones_like(t), t]
        for _ in range(self.degree - 1):
            rows.append(2.0 * t * rows[-1] - rows[-2])
        table = torch.stack(rows[: self.degree + 1], -1)  # (n, P, degree + 1)
        out = torch.ones(len(theta), len(self), dtype=torch.float64)
        for j in range(t.shape[-1]):
            out = out * table[:, j, self.exponents[:, j]]
        return out


def standard(space: ParameterSpace, theta: Tensor) -> Tensor:
    """θ (n, P) as fractions of its prior, stretched to [−1, 1]."""
    columns = []
    for j, parameter in enumerate(space):
        assert parameter.prior is not None
        low, high = parameter.bounds
        fraction = parameter.prior.cdf(theta[:, j].detach().double().numpy(), low, high)
        columns.append(torch.from_numpy(fraction) * 2.0 - 1.0)
    return torch.stack(columns, -1)


def exponents(size: int, degree: int) -> list[tuple[int, ...]]:
    """Every tuple of ``size`` degrees with a sum of at most ``degree``, by their sums."""
    found = []
    for total in range(degree + 1):
        for bars in itertools.combinations(range(total + size - 1), size - 1):
            edges = (-1, *bars, total + size - 1)
            found.append(tuple(b - a - 1 for a, b in itertools.pairwise(edges)))
    return found


def degrees(size: int, most: int) -> list[int]:
    """The total degrees, up to 14, whose basis has at most ``most`` functions of ``size`` parameters; 0 always."""
    return [d for d in range(15) if d == 0 or math.comb(size + d, size) <= most]
