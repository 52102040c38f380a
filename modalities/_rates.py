r"""The rate of a HistFactory channel with its first and second derivatives, in closed form.

.. math:: \nu_b = \sum_s F_{sb} E_s Y_{sb}, \qquad F = \prod_f \theta_{c(f)}, \quad E = \exp(g \cdot \alpha), \quad
    Y = y + \Delta \cdot \alpha

with the free factors F of a sample, its normalisations E and its shapes Y. What is done is the product rule; the sign of
α decides which side of an interpolation g and Δ are taken from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Rate"]


class Rate:
    """The expected counts ν(θ) at T points, with slope and curvature.

    Arguments:
        theta: Parameters, shape (T, P).
        nominal: Yields, shape (S, B).
        columns: Which column of (θ, 1) is a factor of a bin, shape (F, S, B).
        logs: log hi and log lo of the normalisations, each (P, S); None where there are none.
        shifts: hi − y and y − lo of the shapes, each (P, S, B); None where there are none.
        flat: For each row of ``columns``, whether it is the same in all bins of a sample.
        shaped: The parameters that have shapes.

    Attributes:
        value: ν, shape (T, B).
        slope: ∂ν/∂θ, shape (T, P, B).

    Example:
        >>> theta = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
        >>> product = Rate(theta, torch.tensor([[5.0]], dtype=torch.float64), torch.tensor([[[0]], [[1]]]), None, None, [True] * 2)
        >>> product.value.item(), product.slope.tolist(), product.bend(torch.ones(1, 1, 1, dtype=torch.float64)).tolist()
        (30.0, [[[15.0], [10.0]]], [[[[0.0, 5.0], [5.0, 0.0]]]])
    """

    def __init__(
        self,
        theta: Tensor,
        nominal: Tensor,
        columns: Tensor,
        logs: tuple[Tensor, Tensor] | None,
        shifts: tuple[Tensor, Tensor] | None,
        flat: Sequence[bool],
        shaped: Sequence[int] = (),
    ) -> None:
        T, P = theta.shape
        self._columns, self._flat, self._P = columns, flat, P
        self._ones = torch.ones_like(nominal).expand(T, *nominal.shape)
        self._factors = torch.cat([theta, torch.ones_like(theta[:, :1])], -1)[:, columns]  # (T, F, S, B)
        up = theta >= 0
        above, below = torch.where(up, theta, 0.0), torch.where(up, 0.0, -theta)
        yields, self._shifts = nominal.expand(T, *nominal.shape), None
        if shifts is not None:
            self._shaped = torch.tensor(shaped, device=theta.device)
            self._shifts = hi, lo = shifts[0][self._shaped], shifts[1][self._shaped]  # (Q, S, B)
            a, b = above[:, self._shaped], below[:, self._shaped]
            yields = yields + (a @ hi.flatten(1) - b @ lo.flatten(1)).unflatten(-1, nominal.shape)
            self._up = up[:, self._shaped].to(theta.dtype)[..., None]  # (T, Q, 1)
        scale, self._log_slope = torch.ones_like(theta[:, :1]), None  # E (T, S or 1), g (T, P, S)
        if logs is not None:  # clamped: a rate that overflows has no gradient that is a number
            exponent = above @ logs[0] + below @ logs[1]
            scale = exponent.clamp(max=600.0).exp()
            self._log_slope = torch.where(up[..., None], logs[0], -logs[1]) * (exponent <= 600.0)[:, None]
        self._scale = scale[..., None]
        self._yields, product = self._scale * yields, self._without()
        self._samples, self._scaled = product * self._yields, product * self._scale  # F E Y and F E (T, S, B)
        self.value, self.slope = self._samples.sum(1), self._first()

    def _first(self) -> Tensor:
        T, _, bins = self._samples.shape
        slope = torch.zeros(T, self._P + 1, bins, dtype=self._samples.dtype, device=self._samples.device)
        for f, column in enumerate(self._columns):
            slope = slope.scatter_add(1, column.expand(T, -1, -1), self._without(f) * self._yields)
        if self._shifts is not None:
            sides = []
            for shift in self._shifts:
                side = self._scaled[:, None, 0] * shift[:, 0]  # (T, Q, B)
                for s in range(1, shift.shape[1]):
                    side = torch.addcmul(side, self._scaled[:, None, s], shift[:, s])
                sides.append(side)
            slope = slope.index_add(1, self._shaped, self._up * sides[0] + (1.0 - self._up) * sides[1])
        slope = slope[:, : self._P]
        return slope if self._log_slope is None else torch.baddbmm(slope, self._log_slope, self._samples)

    def bend(self, weight: Tensor) -> Tensor:
        """Σ_b w_b ∇²ν_b: N sets of weights for each point, shape (T, N, B) -> (T, N, P, P)."""
        T, N, _ = weight.shape
        P, w, g = self._P, weight[:, :, None], self._log_slope
        zeros = torch.zeros(T, N, P + 1, P + 1, dtype=weight.dtype, device=weight.device)
        half, both = zeros[..., :P, :P], None  # one of two mixed derivatives; what is symmetric already
        if g is not None:
            g = g[:, None]  # (T, 1, P, S)
            both = (g * (weight @ self._samples.mT)[:, :, None]) @ g.mT
            if self._shifts is not None:
                half = half.index_add(-1, self._shaped, g @ self._shifted(w * self._scaled[:, None]))
        for f, column in enumerate(self._columns):
            moved = w * self._without(f)[:, None]  # (T, N, S, B)
            if g is not None:
                of = zeros[..., :1, :].expand(-1, -1, len(column), -1)
                source = moved * self._yields[:, None]
                half = half + of.scatter_add(-1, column.expand(T, N, -1, -1), source)[..., :P].mT @ g.mT
            if self._shifts is not None:
                half = half.index_add(-1, self._shaped, self._factor_shift(f, moved * self._scale[:, None], zeros))
            for k in range(f):
                pair = (column * (P + 1) + self._columns[k]).flatten().expand(T, N, -1)
                source = (w * (self._without(f, k) * self._yields)[:, None]).flatten(2)
                half = half + zeros.flatten(2).scatter_add(-1, pair, source).unflatten(-1, (P + 1, P + 1))[..., :P, :P]
        return half + half.mT if both is None else half + half.mT + both

    def _factor_shift(self, f: int, weight: Tensor, zeros: Tensor) -> Tensor:
        """Σ_sb w_sb Δ_qsb into the parameter that is factor f of the bin: (T, N, S, B) -> (T, N, P, Q)."""
        assert self._shifts is not None
        column = self._columns[f]
        if self._flat[f]:
            source, row = self._shifted(weight), column[:, 0]  # (T, N, S, Q)
        else:
            hi, lo = (weight[..., None] * shift.movedim(0, -1) for shift in self._shifts)
            up = self._up[:, None, None].mT
            source, row = (up * hi + (1.0 - up) * lo).flatten(2, 3), column.flatten()
        index = row[:, None].expand(*weight.shape[:2], -1, source.shape[-1])
        return zeros[..., : source.shape[-1]].scatter_add(2, index, source)[:, :, : self._P]

    def _shifted(self, weight: Tensor) -> Tensor:
        """Σ_b w_sb Δ_qsb of the side that α is on: (T, N, S, B) -> (T, N, S, Q)."""
        assert self._shifts is not None
        hi, lo = (torch.einsum("tnsb,qsb->tnsq", weight, shift) for shift in self._shifts)
        up = self._up[:, None].mT
        return up * hi + (1.0 - up) * lo

    def _without(self, *rows: int) -> Tensor:
        """The product of the factors but some: (T, S, B)."""
        product = self._ones
        for f in range(self._factors.shape[1]):
            product = product if f in rows else product * self._factors[:, f]
        return product
