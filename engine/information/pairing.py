r"""Orders of paired units that are as likely as the one that came, if nothing ties two parts but what is known to.

Given θ, all other parts of the units, and which observations of one part there are, the law of who belongs to whom is known:
every order π of that part is as likely as any other if it is independent of the rest, and has a probability
:math:`\propto \prod_i \exp s(x_i, y_{\pi(i)})` if it is tied by s, the interactions that it takes part in: what each single part is
like cancels. So orders drawn from that law compare with the order that came, and p-values are exact for any number of units.

Where units are alike in strata only (:mod:`engine.information.strata`), orders stay within them.

Tied orders are drawn by a Markov chain that exchanges the partners of disjoint pairs of units. It walks from the order that came to
a hub, and from the hub anew for every draw: because steps can be reversed, the order that came is then one such draw itself,
however short the walks are.

References:
    | Berrett, Wang, Barber, Samworth, J. R. Stat. Soc. B 82 (2020) 175, https://arxiv.org/abs/1807.05405, the conditional permutation test
    | Besag and Clifford, Biometrika 76 (1989) 633, walks from a hub
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__: list[str] = []  # what tests of independence draw from

_STEPS = 50  # of a walk, each of which may exchange every unit's partner once


class Pairing:
    """Draws of orders.

    Arguments:
        n: How many units.
        seed: Of the draws.
        log_weights: s of unit i with the partner of unit j, shape (n, n), nats; finite on its diagonal. None for a part that
            nothing ties.
        strata: The stratum of each unit, shape (n,), within which orders stay; None for one.

    Example:
        >>> tied = Pairing(2, 0, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # its own order is e² times as likely as the other
        >>> own = (tied.draw(4000)[:, 0] == 0).double().mean()
        >>> abs(float(own) - 0.881) < 0.02
        True
        >>> Pairing(4, 0, strata=torch.tensor([0, 1, 0, 1])).draw(100).sort(0).values[[0, -1]].tolist()
        [[0, 1, 0, 1], [2, 3, 2, 3]]
    """

    def __init__(self, n: int, seed: int, log_weights: Tensor | None = None, strata: Tensor | None = None) -> None:
        self._rng, self._rows, self._s = np.random.default_rng(seed), np.arange(n), log_weights
        self._strata = np.zeros(n) if strata is None else strata.numpy()
        self._sorted = torch.from_numpy(np.argsort(self._strata, kind="stable"))
        self._hub: Tensor | None = None

    def draw(self, count: int) -> Tensor:
        """Orders, shape (count, n)."""
        if self._s is None:
            order = torch.empty(count, len(self._rows), dtype=torch.int64)
            order[:, self._sorted] = self._shuffled(count)
            return order
        if self._hub is None:
            self._hub = self._walked(torch.from_numpy(self._rows.copy())[None])
        return self._walked(self._hub.repeat(count, 1))

    def _shuffled(self, count: int) -> Tensor:
        """Units stratum by stratum, those of each in random order, shape (count, n)."""
        if not self._strata.any():
            return torch.from_numpy(self._rng.permuted(np.tile(self._rows, (count, 1)), axis=1))
        return torch.from_numpy(np.argsort(self._strata + self._rng.random((count, len(self._rows))), axis=1))

    def _walked(self, order: Tensor) -> Tensor:
        s, count = self._s, len(order)
        assert s is not None
        strata = torch.from_numpy(self._strata)
        for _ in range(_STEPS):
            units = self._shuffled(count)[
                :, int(self._rng.integers(2)) :
            ]  # neighbours exchange partners, now these, now those
            half = units.shape[1] // 2
            i, k = units[:, : 2 * half : 2], units[:, 1 : 2 * half : 2]
            at_i, at_k = order.gather(1, i), order.gather(1, k)
            gain = s[i, at_k] + s[k, at_i] - s[i, at_i] - s[k, at_k]
            swap = torch.from_numpy(self._rng.random((count, half))) < gain.double().sigmoid()
            swap &= strata[i] == strata[k]
            order.scatter_(1, i, torch.where(swap, at_k, at_i))
            order.scatter_(1, k, torch.where(swap, at_i, at_k))
        return order
