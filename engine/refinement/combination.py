r"""What is measured of each observation: the learned score, or where that tells little, its best combination with log-ratios.

Beside a fold of the mean, or where a network is crude, the learned score at θ0 is poorly correlated with the true one, though
the scalar as a function of θ knows more. With the features F(x) = [u(x; θ0), s(x; θ_k) − s(x; θ0)] at a few points θ_k of the
training prior, of which simulations tell the slope A = ∂E F/∂θ and the covariance K, the combination

.. math:: w(x) = A^\top K^{-1} F(x)

has the most information of all linear ones, :math:`A^\top K^{-1} A` [Hansen 1982], and takes the score's place. Any fixed
weights are honest; those of a pilot's simulations are taken where they are better in others. The points are those of many
spread over the prior that add most, one after the other: each costs an evaluation of every simulation.

References:
    | Hansen (1982), Large sample properties of generalized method of moments estimators, Econometrica 50, 1029
    | Heyde (1997), Quasi-Likelihood and its Application, chapter 2 (the best combination of estimating functions)
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.certificate.scores import score_rows, scored_rows
from engine.modality import Modality
from engine.parameters import ParameterSpace

__all__: list[str] = []  # the machinery of refinement

_POINTS = 16  # of the prior, of which
_CHOSEN = 4  # take part in a combination at most, and
_OVERALL = 8  # in telling roots apart
_LEAST = 0.05  # the growth of the information's log-determinant for which a point is taken
_FAR = 50.0  # nats of a ratio at which it is cut: tails of densities are no information
_NUMBERS = 2**18  # entries of x and θ that are evaluated together
_ROWS = 40  # simulations at the reference for each feature at least: fewer fit weights to their noise
_GAIN = 1.2  # the least gain of information in some direction for which features are worth their time


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

    def overall(self, x: Tensor) -> Tensor:
        """s(x; θ_k) less the highest of them, (n, k), of observations x (n, *event_shape), at points all over the prior."""
        s = self._scalars(x, torch.arange(_OVERALL))
        return (s - s.amax(-1, keepdim=True)).nan_to_num(nan=0.0).clamp(min=-_FAR)

    def features(self, x: Tensor, at: Tensor, which: Tensor | None = None) -> Tensor:
        """[u | s(x; θ_k) − s(x; at)] (n, P + K) of observations x (n, *event_shape) with the score at ``at`` (n, P).

        Arguments:
            x, at: The observations, and where their score is taken.
            which: Of the points k, the rest of which have zeros.
        """
        which = torch.arange(len(self.points)) if which is None else which
        s, u = scored_rows(self.modality, x, at)
        ratios = x.new_zeros(len(x), len(self.points), dtype=torch.float64)
        found = self._scalars(x, which) - s[:, None]
        ratios[:, which] = found.nan_to_num(nan=0.0, posinf=_FAR, neginf=-_FAR).clamp(-_FAR, _FAR)
        return torch.cat([u, ratios], -1)

    def measured(self, x: Tensor, at: Tensor, weights: Tensor | None) -> Tensor:
        """The score u(x; at) (n, P), or its combination w (n, P) with weights (P + K, P)."""
        if weights is None:
            return score_rows(self.modality, x, at)
        which = weights[at.shape[1] :].abs().amax(-1).nonzero()[:, 0]
        return self.features(x, at, which) @ weights

    def _scalars(self, x: Tensor, which: Tensor) -> Tensor:
        m, theta, out = self.modality, self.points[which], []
        step = max(1, _NUMBERS // max(1, len(which) * (x[:1].numel() + theta.shape[1])))
        with torch.no_grad():
            for part in x.to(m.dtype).split(step):
                out.append(m(part[:, None], theta.to(m.dtype)).double())
        return torch.cat(out) if out else torch.zeros(0, len(which), dtype=torch.float64)


def best_weights(still: Tensor, moved: Tensor, step: Tensor) -> Tensor | None:
    """Weights (P + K, P) of the best combination, or None where the score, the first P features, does as well.

    Each half of the simulations says what weights of the other are worth.

    Arguments:
        still: Features of simulations at the reference, (n, P + K).
        moved: Features at one end of a pair less those at the other, (m, P + K).
        step: θ at the first end less θ at the other, (m, P).
    """
    P = step.shape[1]
    use = _chosen(*_moments(still, moved, step), P)
    if len(use) == P:
        return None
    still, moved, size = still[:, use], moved[:, use], still.shape[1]
    halves = [_moments(still[k::2], moved[k::2], step[k::2]) for k in (0, 1)]
    unit = torch.eye(len(use), P, dtype=torch.float64)
    for (A, K), other in zip(halves, reversed(halves), strict=True):
        plain, combined = _information(A, K, unit), _information(A, K, _weights(*other))
        scale = (plain + combined).diagonal().clamp_min(1e-300).sqrt()
        plain, combined = plain / scale / scale[:, None], combined / scale / scale[:, None]
        ratio = torch.linalg.eigvals(torch.linalg.solve(plain + 1e-9 * torch.eye(P), combined)).real
        if not (float(ratio.amax()) > _GAIN and float(ratio.clamp_min(0.0).prod()) > 1.0):
            return None
    weights = torch.zeros(size, P, dtype=torch.float64)
    weights[use] = _weights(*_moments(still, moved, step))
    return weights


def _chosen(A: Tensor, K: Tensor, P: int) -> Tensor:
    """The features that are worth their time: the first P, and those that add most to the information one by one."""
    use, left = list(range(P)), list(range(P, len(K)))
    size = (A.mT @ _weights(A, K)).diagonal().clamp_min(1e-300).sqrt()  # of all: the units of θ do not matter

    def height(use: list[int]) -> float:
        J = A[use].mT @ _weights(A[use], K[use][:, use])
        return float(torch.linalg.eigvalsh(J / size / size[:, None]).clamp_min(1e-9).log().sum())

    now = height(use)
    while left and len(use) < P + _CHOSEN:
        heights = [height([*use, k]) for k in left]
        best = max(range(len(left)), key=heights.__getitem__)
        if heights[best] - now < _LEAST:
            break
        use.append(left.pop(best))
        now = heights[best]
    return torch.tensor(use)


def _moments(still: Tensor, moved: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The slope A (F, P) of the features' mean, and their covariance K (F, F)."""
    A = torch.linalg.solve(step.mT @ step, step.mT @ moved).mT
    return A, torch.cov(still.mT).reshape(len(A), len(A))


def _weights(A: Tensor, K: Tensor) -> Tensor:
    size = K.diagonal().clamp_min(1e-300).sqrt()
    values, axes = torch.linalg.eigh(K / size / size[:, None])
    real = values > 1e-8 * values[-1]  # ratios of neighbours are nearly dependent
    inverse = (axes[:, real] / values[real]) @ axes[:, real].mT
    return inverse @ (A / size[:, None]) / size[:, None]


def _information(A: Tensor, K: Tensor, weights: Tensor) -> Tensor:
    slope, spread = weights.mT @ A, weights.mT @ K @ weights
    size = spread.diagonal().clamp_min(1e-300).sqrt()
    slope, spread = slope / size[:, None], spread / size / size[:, None]
    return slope.mT @ torch.linalg.pinv(spread, rtol=1e-10, hermitian=True) @ slope
