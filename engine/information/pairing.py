r"""Orders of paired units that are as likely as the one that came, if nothing ties two parts but what is known to.

Given θ, all other parts of the units, and which observations of one part there are, the law of who belongs to whom is known:
every order π of that part is as likely as any other if it is independent of the rest, and has a probability
:math:`\propto \prod_i \exp s(x_i, y_{\pi(i)})` if it is tied by s, the interactions that it takes part in: what each single part is
like cancels. So orders drawn from that law compare with the order that came, and p-values are exact for any number of units.

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

    Example:
        >>> tied = Pairing(2, 0, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # its own order is e² times as likely as the other
        >>> own = (tied.draw(4000)[:, 0] == 0).double().mean()
        >>> abs(float(own) - 0.881) < 0.02
        True
    """

    def __init__(self, n: int, seed: int, log_weights: Tensor | None = None) -> None:
        self._rng, self._rows, self._s = np.random.default_rng(seed), np.arange(n), log_weights
        self._hub: Tensor | None = None

    def draw(self, count: int) -> Tensor:
        """Orders, shape (count, n)."""
        if self._s is None:
            return self._shuffled(count)
        if self._hub is None:
            self._hub = self._walked(torch.from_numpy(self._rows.copy())[None])
        return self._walked(self._hub.repeat(count, 1))

    def _shuffled(self, count: int) -> Tensor:
        return torch.from_numpy(self._rng.permuted(np.tile(self._rows, (count, 1)), axis=1))

    def _walked(self, order: Tensor) -> Tensor:
        s, (count, n) = self._s, order.shape
        assert s is not None
        half = n // 2
        for _ in range(_STEPS):
            units = self._shuffled(count)
            i, k = units[:, :half], units[:, half : 2 * half]
            at_i, at_k = order.gather(1, i), order.gather(1, k)
            gain = s[i, at_k] + s[k, at_i] - s[i, at_i] - s[k, at_k]
            swap = torch.from_numpy(self._rng.random((count, half))) < gain.double().sigmoid()
            order.scatter_(1, i, torch.where(swap, at_k, at_i))
            order.scatter_(1, k, torch.where(swap, at_i, at_k))
        return order
