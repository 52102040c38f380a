r"""Derivatives of a log density in other coordinates, by the chain rule.

.. math:: -\nabla_z^2 = T^\top J T - \textstyle\sum_p g_p \nabla^2 \theta_p - \nabla^2 \log|T|, \qquad T = \partial\theta/\partial z
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.evidence import Derivatives
from engine.terms import gradient

__all__ = ["pulled_back"]


def pulled_back(
    z: Tensor, natural: Callable[[Tensor], Tensor], volume: Callable[[Tensor], Tensor], at: Derivatives
) -> Derivatives:
    """The log density of coordinates z with its gradient and −∇², from that of θ.

    Arguments:
        z: Shape (k, D).
        natural: z -> θ (k, P).
        volume: z -> log |∂θ/∂z|, shape (k,).
        at: The log density of θ(z), with its derivatives in θ.

    Example:
        >>> z = torch.zeros(1, 1).double()  # θ = e^z of density e^−θ: log density z − e^z
        >>> one = Derivatives(-torch.ones(1).double(), -torch.ones(1, 1).double(), torch.zeros(1, 1, 1).double(), torch.zeros(1))
        >>> found = pulled_back(z, torch.exp, lambda z: z[:, 0], one)
        >>> found.value.item(), found.score.item(), found.information.item()
        (-1.0, 0.0, 1.0)
    """
    leaf = z.detach().clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        theta, size = natural(leaf), volume(leaf)
        T = torch.stack([gradient(theta[:, p].sum(), leaf, retain=True) for p in range(theta.shape[-1])], -2)
        first = gradient((theta * at.score).sum() + size.sum(), leaf)
        columns = [
            gradient(first[:, j].sum(), leaf, retain=True) if first.requires_grad else torch.zeros_like(z)
            for j in range(z.shape[-1])
        ]
        second = torch.stack(columns, -2).detach()
    T = T.detach()
    information = T.mT @ at.information @ T - second
    return Derivatives(at.value + size.detach(), first.detach(), 0.5 * (information + information.mT), at.resolution)
