r"""Classical estimators of I(X; Y) from scores T(x_i, y_j) of a critic: what each maximises, and what it reads off.

With E over pairs and E' over pairs that do not belong together, b = log E' exp T:

.. math:: \text{DV}: E\,T - \log E' e^T, \qquad \text{NWJ}: E\,T - E' e^{T - 1}, \qquad
          \text{InfoNCE}: E \log \frac{e^{T(x_i, y_i)}}{\frac1n \sum_j e^{T(x_i, y_j)}} \le \log n

SMILE trains by the Jensen–Shannon objective, whose optimum is log p(x, y) / p(x) p(y), and reads Donsker–Varadhan off with T
clipped to ±τ where it is exponentiated. CLUB, :math:`E \log q(y \mid x) - E' \log q(y \mid x)`, is an upper bound for a true
conditional law, above I by KL(p(x) p(y) ‖ p(x, y)): for normal x and y with correlation ρ it is ρ² / (1 − ρ²). Here the law is a
normal one whose mean and widths are networks, and for another law it bounds nothing. All are in nats.

References:
    | Donsker and Varadhan, Comm. Pure Appl. Math. 36 (1983) 183; Belghazi et al. (2018), https://arxiv.org/abs/1801.04062
    | Nguyen, Wainwright, Jordan, IEEE Trans. Inf. Theory 56 (2010) 5847, https://arxiv.org/abs/0809.0853
    | van den Oord, Li, Vinyals (2018), https://arxiv.org/abs/1807.03748, InfoNCE
    | Song and Ermon (2020), https://arxiv.org/abs/1910.06222, SMILE; Cheng et al. (2020), https://arxiv.org/abs/2006.12013, CLUB
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["ESTIMATORS", "Estimator"]

CLIP = 5.0  # τ of SMILE


@dataclass(frozen=True)
class Estimator:
    """What a critic maximises and what is read off it.

    Both take scores T (G, n, k) of G critics with the pair of row i in column i, or in a column of its own where ``own`` (G, n) is
    given: then all k columns are of other pairs.

    Attributes:
        name: As :func:`engine.information.mutual_information` is asked for it.
        objective: What training maximises.
        value: Nats.
        bounded: Whether the value cannot pass log k.
        upper: Whether it is a bound from above, and no estimate.

    Example:
        >>> T = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> round(float(ESTIMATORS["infonce"].value(T, None)), 3), round(float(ESTIMATORS["dv"].value(T, None)), 3)
        (0.566, 2.0)
    """

    name: str
    objective: Callable[[Tensor, Tensor | None], Tensor]
    value: Callable[[Tensor, Tensor | None], Tensor]
    bounded: bool = False
    upper: bool = False


def _apart(T: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores of pairs (G, n), and of pairs that do not belong together (G, m)."""
    if own is not None:
        return own, T.flatten(1)
    n = T.shape[1]
    off = ~torch.eye(n, dtype=torch.bool)
    return T.diagonal(dim1=1, dim2=2), T[:, off]


def _log_mean_exp(T: Tensor) -> Tensor:
    return torch.logsumexp(T, -1) - math.log(T.shape[-1])


def _dv(T: Tensor, own: Tensor | None) -> Tensor:
    pairs, others = _apart(T, own)
    return pairs.mean(-1) - _log_mean_exp(others)


def _smile(T: Tensor, own: Tensor | None) -> Tensor:
    pairs, others = _apart(T, own)
    return pairs.mean(-1) - _log_mean_exp(others.clamp(-CLIP, CLIP))


def _nwj(T: Tensor, own: Tensor | None) -> Tensor:
    pairs, others = _apart(T, own)
    return pairs.mean(-1) - _log_mean_exp(others - 1.0).exp()


def _js(T: Tensor, own: Tensor | None) -> Tensor:
    pairs, others = _apart(T, own)
    return -softplus(-pairs).mean(-1) - softplus(others).mean(-1)


def _infonce(T: Tensor, own: Tensor | None) -> Tensor:
    if own is None:
        return (T.diagonal(dim1=1, dim2=2) - _log_mean_exp(T)).mean(-1)
    k = T.shape[-1]
    return (own - torch.logaddexp(torch.logsumexp(T, -1), own) + math.log(k + 1)).mean(-1)


def _club(T: Tensor, own: Tensor | None) -> Tensor:
    pairs, others = _apart(T, own)
    return pairs.mean(-1) - others.mean(-1)


def _likelihood(T: Tensor, own: Tensor | None) -> Tensor:
    return (T.diagonal(dim1=1, dim2=2) if own is None else own).mean(-1)


#: Name -> estimator.
ESTIMATORS = {
    e.name: e
    for e in (
        Estimator("smile", _js, _smile),
        Estimator("dv", _dv, _dv),
        Estimator("nwj", _nwj, _nwj),
        Estimator("infonce", _infonce, _infonce, bounded=True),
        Estimator("club", _likelihood, _club, upper=True),
    )
}
