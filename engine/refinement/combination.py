r"""What is measured of each observation: the learned score, or where that tells little, its best combination with log-ratios.

Beside a fold of the mean, or where a network is crude, the learned score at θ0 is poorly correlated with the true one, though
the scalar as a function of θ knows more. With the features F(x) = [u(x; θ0), s(x; θ_k) less the highest of them] at points θ_k
all over the training prior, of which simulations tell the slope A = ∂E F/∂θ and the covariance K, the combination

.. math:: w(x) = A^\top K^{-1} F(x)

has the most information of all linear ones, :math:`A^\top K^{-1} A` [Hansen 1982], and takes the score's place. Any fixed
weights are honest; those of a pilot's simulations are taken where they are better in others.

References:
    | Hansen (1982), Large sample properties of generalized method of moments estimators, Econometrica 50, 1029
    | Heyde (1997), Quasi-Likelihood and its Application, chapter 2 (the best combination of estimating functions)
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.certificate.scores import score_rows
from engine.modality import Modality
from engine.parameters import ParameterSpace

__all__: list[str] = []  # the machinery of refinement

_POINTS = 16
_DEEPEST = 50.0  # nats below the highest at which a scalar is cut: tails of densities are no information
_NUMBERS = 2**18  # entries of x and θ that are evaluated together
_ROWS = 40  # simulations at the reference for each feature at least: fewer fit weights to their noise
_GAIN = 1.15  # the least gain of information in some direction for which features are worth their time


class Combination:
    """Features of a learned scalar about which its score at one point does not know.

    Arguments:
        modality: The learned one.
        prior: What it was trained on, from which the points are taken.
    """

    def __init__(self, modality: Modality, prior: ParameterSpace) -> None:
        self.modality = modality
        if prior.constraints:
            self.points = prior.sample_prior(_POINTS, 0)
        else:
            sobol = torch.quasirandom.SobolEngine(len(prior), scramble=True, seed=0)
            self.points = prior.quantile(sobol.draw(_POINTS, dtype=torch.float64).clamp(1e-6, 1 - 1e-6).numpy())

    @property
    def fewest(self) -> int:
        """The simulations at a reference that weights take at least."""
        return _ROWS * sum(self.points.shape)

    def ratios(self, x: Tensor) -> Tensor:
        """s(x; θ_k) less the highest of them, (n, K), of observations x (n, *event_shape); no less than −50 nats."""
        m = self.modality
        step = max(1, _NUMBERS // (len(self.points) * max(1, x[:1].numel() + self.points.shape[1])))
        theta, out = self.points.to(m.dtype), []
        with torch.no_grad():
            for part in x.to(m.dtype).split(step):
                s = m(part[:, None], theta).double()
                out.append((s - s.amax(-1, keepdim=True)).nan_to_num(nan=0.0).clamp(min=-_DEEPEST))
        return torch.cat(out) if out else torch.zeros(0, len(self.points), dtype=torch.float64)

    def features(self, x: Tensor, at: Tensor) -> Tensor:
        """[u | ratios] (n, P + K) of observations x (n, *event_shape) with the score at ``at`` (n, P)."""
        return torch.cat([score_rows(self.modality, x, at), self.ratios(x)], -1)

    def measured(self, x: Tensor, at: Tensor, weights: Tensor | None) -> Tensor:
        """The score u(x; at) (n, P), or its combination w (n, P) with weights (P + K, P)."""
        return score_rows(self.modality, x, at) if weights is None else self.features(x, at) @ weights


def best_weights(still: Tensor, moved: Tensor, step: Tensor) -> Tensor | None:
    """Weights (P + K, P) of the best combination, or None where the score, the first P features, does as well.

    Each half of the simulations says what weights of the other are worth.

    Arguments:
        still: Features of simulations at the reference, (n, P + K).
        moved: Features at one end of a pair less those at the other, (m, P + K).
        step: θ at the first end less θ at the other, (m, P).
    """
    P, halves = step.shape[1], []
    for k in (0, 1):
        halves.append(_moments(still[k::2], moved[k::2], step[k::2]))
    unit = torch.eye(still.shape[1], P, dtype=torch.float64)
    gain, more = [], []
    for (A, K), other in zip(halves, reversed(halves), strict=True):
        plain, combined = _information(A, K, unit), _information(A, K, _weights(*other))
        size = (plain + combined).diagonal().clamp_min(1e-300).sqrt()
        plain, combined = plain / size / size[:, None], combined / size / size[:, None]
        ratio = torch.linalg.eigvals(torch.linalg.solve(plain + 1e-9 * torch.eye(P), combined)).real
        gain.append(float(ratio.amax()))
        more.append(float(ratio.clamp_min(0.0).prod()))
    if not (min(gain) > _GAIN and min(more) > 1.0):
        return None
    return _weights(*_moments(still, moved, step))


def _moments(still: Tensor, moved: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The slope A (F, P) of the features' mean, and their covariance K (F, F)."""
    A = torch.linalg.solve(step.mT @ step, step.mT @ moved).mT
    return A, torch.cov(still.mT)


def _weights(A: Tensor, K: Tensor) -> Tensor:
    size = K.diagonal().clamp_min(1e-300).sqrt()
    values, axes = torch.linalg.eigh(K / size / size[:, None])
    real = values > 1e-8 * values[-1]  # the highest of the ratios is 0 nearly everywhere: they are nearly dependent
    inverse = (axes[:, real] / values[real]) @ axes[:, real].mT
    return inverse @ (A / size[:, None]) / size[:, None]


def _information(A: Tensor, K: Tensor, weights: Tensor) -> Tensor:
    slope, spread = weights.mT @ A, weights.mT @ K @ weights
    size = spread.diagonal().clamp_min(1e-300).sqrt()
    slope, spread = slope / size[:, None], spread / size / size[:, None]
    return slope.mT @ torch.linalg.pinv(spread, rtol=1e-10, hermitian=True) @ slope
