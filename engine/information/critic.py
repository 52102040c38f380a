r"""Critics T(x, y) trained side by side: four small networks for each of G chunks, all in one batch of matrix products.

A critic is separable, :math:`T(x, y) = T_0(x, y) + \langle f(x), g(y) \rangle + a(x) + b(y)`, so that n x and n y give n² scores
for n evaluations. T_0 is the log ratio that x and y would have if they were jointly normal, from their covariance: networks,
which begin at zero, learn what is left. CLUB's critic is log q(y | x), normal with mean and log variance
from a network of x, written the same way: y² and y are features of y.

A tenth of each chunk is held out. After every epoch the estimator is read off there; smoothed (median of 5, then a Gaussian of
one epoch), its peak says when the critic knew most that carries over, and the value on the *training* part at that epoch is
returned: that of the held-out part is noisier by a factor of three.

A chunk's critic is the mean T of its four networks, which have other weights at first: what each makes of the noise is different, and
less of it is left in the mean. Their width is doubled until the held-out value grows no more (:func:`saturated`).

References:
    | Abdelaleem, Martini, Nemenman, Accurate estimation of mutual information in high dimensional data (2025),
    | https://arxiv.org/abs/2506.00330, the max-test
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d, median_filter
from torch import Tensor
from torch.nn.functional import silu

from engine.information.estimators import Estimator
from engine.learning.simulator import generator_of

__all__: list[str] = []  # the machinery of engine.information.mutual

_WIDTH, _WIDEST = 32, 256  # of hidden layers; an embedding has a quarter
_SHARE, _LITTLE = 0.01, 0.005  # of the held-out value, and nats, below which a wider critic finds no more
_NETWORKS = 4  # whose mean is a critic
_STEPS, _LEAST_BATCH, _MOST_BATCH = 24, 64, 256  # an epoch
_RATE, _DECAY = 2e-3, 1e-2
OTHERS = 64  # other pairs for each x, against which a training value is read off
_SHORTEST = 20  # steps of a schedule with a rise and a fall
_RIDGE = 1e-6  # of covariances, of unit variances
_HELD = 10  # one in so many


@dataclass(frozen=True, eq=False)
class Trained:
    """What G critics found.

    Attributes:
        values: Nats on the training part at the peak of the held-out part, shape (G,).
        held_out: The smoothed values there, shape (G,).
        epochs: When that was, shape (G,).
        last: Whether the peak was the last epoch of any: training ended too early.
    """

    values: Tensor
    held_out: Tensor
    epochs: Tensor
    last: bool


def saturated(x: Tensor, y: Tensor, estimator: Estimator, epochs: int, normal: bool, seed: int) -> tuple[int, Trained]:
    """The width from which a critic that is twice as wide finds no more on held-out samples, and that critic, trained.

    Arguments:
        x, y, estimator, epochs, normal, seed: As for :func:`train`, of one chunk, γ = 1.
    """
    width, found = _WIDTH, train(x, y, estimator, epochs, normal, seed, 1)
    while width < _WIDEST:
        wider = train(x, y, estimator, epochs, normal, seed, 1, width=2 * width)
        before, after = float(found.held_out), float(wider.held_out)
        if not after > before + max(_LITTLE, _SHARE * abs(before)):
            break
        width, found = 2 * width, wider
    return width, found


def train(
    x: Tensor,
    y: Tensor,
    estimator: Estimator,
    epochs: int,
    normal: bool,
    seed: int,
    *path: int,
    width: int = _WIDTH,
) -> Trained:
    """Critics of x (G, n, d_x) and y (G, n, d_y).

    Arguments:
        x, y: G chunks, standardised.
        estimator: What is maximised, and read off.
        epochs: How many.
        normal: Whether critics begin at the log ratio of a normal law.
        seed, path: Of weights and orders.
        width: Of hidden layers.
    """
    G, n = x.shape[:2]
    generator = generator_of(seed, *path)
    held = max(2, n // _HELD)
    x, y = (v.float().repeat(_NETWORKS, 1, 1) for v in (x, y))
    x_held, y_held, x, y = x[:, :held], y[:, :held], x[:, held:], y[:, held:]
    n -= held
    nets = _Nets(x, y, estimator.name == "club", normal, width, generator)
    optimiser = torch.optim.AdamW(nets.weights, lr=_RATE, weight_decay=_DECAY, foreach=True)
    batch = min(n, max(_LEAST_BATCH, min(n // _STEPS, _MOST_BATCH)))
    steps = n // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=_RATE, total_steps=max(epochs * steps, _SHORTEST), pct_start=0.1
    )
    kept, track = [], []

    def look() -> None:
        with torch.no_grad():
            f, g = nets.mean_features(x_held, y_held)
            track.append(estimator.value(f @ g.mT, None))
            kept.append([w.detach().clone() for w in nets.weights])

    look()  # the normal law alone is a candidate
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(n, generator=generator)
            for rows in order[: steps * batch].reshape(steps, batch):
                loss = -estimator.objective(nets.scores(x[:, rows], y[:, rows]), None).sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            look()
    smooth = _smoothed(torch.stack(track, -1).double().numpy())
    peak = smooth.argmax(-1)
    values = torch.empty(G, dtype=torch.float64)
    shifts = (1 + torch.randperm(n - 1, generator=generator)[:OTHERS]).tolist()
    with torch.no_grad():
        for epoch in np.unique(peak):
            nets.weights = kept[epoch]
            some = torch.from_numpy(np.flatnonzero(peak == epoch))
            values[some] = _train_value(nets, x, y, shifts, estimator)[some].double()
    at = torch.from_numpy(np.take_along_axis(smooth, peak[:, None], -1)[:, 0])
    return Trained(values, at, torch.from_numpy(peak), bool((peak == epochs).any()))


def _train_value(nets: _Nets, x: Tensor, y: Tensor, shifts: list[int], estimator: Estimator) -> Tensor:
    """The estimator over every pair of the training part; x_i meets y_{i − s} for each shift s, so that every y comes as often."""
    f, g = nets.mean_features(x, y)
    others = torch.stack([(f * g.roll(s, 1)).sum(-1) for s in shifts], -1)
    return estimator.value(others, (f * g).sum(-1))


def _smoothed(track: np.ndarray) -> np.ndarray:
    """Median of 5, then a Gaussian of one epoch, along the last axis."""
    track = np.nan_to_num(track, nan=-np.inf, neginf=-1e3)
    return gaussian_filter1d(median_filter(track, size=(1, 5), mode="nearest"), 1.0, axis=-1, mode="nearest")


class _Nets:
    """Networks f and g of two hidden layers for each row of x, and the normal law's part."""

    def __init__(
        self, x: Tensor, y: Tensor, likelihood: bool, normal: bool, width: int, generator: torch.Generator
    ) -> None:
        self.likelihood, self.dy = likelihood, y.shape[-1]
        self.normal = _NormalRatio(x, y) if normal and not likelihood else None
        self.weights: list[Tensor] = []
        told = width // 4 + 1
        for d, out in ((x.shape[-1], 2 * self.dy if likelihood else told), (self.dy, told)):
            for a, b in ((d, width), (width, width), (width, out)):
                w = torch.randn(len(x), a, b, generator=generator, dtype=torch.float32) / math.sqrt(a)
                self.weights += [w.requires_grad_(), torch.zeros(len(x), 1, b, dtype=torch.float32).requires_grad_()]
        if not likelihood:
            with torch.no_grad():  # f = 0 and b = 0 at first, g is not, so that there is a slope
                self.weights[4].zero_()
                self.weights[10][..., -1:].zero_()

    def _run(self, x: Tensor, w: list[Tensor]) -> Tensor:
        h = silu(torch.baddbmm(w[1], x, w[0]))
        h = silu(torch.baddbmm(w[3], h, w[2]))
        return torch.baddbmm(w[5], h, w[4])

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """f (G, n, e) and g (G, m, e) with T = f · g."""
        f = self._run(x, self.weights[:6])
        if self.likelihood:  # −½ (y − μ)² / v − ½ log 2πv as a product of features
            mean, log_v = f[..., : self.dy], f[..., self.dy :].clamp(-8.0, 8.0)
            precision = (-log_v).exp()
            constant = -0.5 * (mean.square() * precision + log_v + math.log(2.0 * math.pi)).sum(-1, keepdim=True)
            left = torch.cat([-0.5 * precision, mean * precision, constant], -1)
            return left, torch.cat([y.square(), y, torch.ones_like(y[..., :1])], -1)
        g = self._run(y, self.weights[6:])
        a, b = f[..., -1:], g[..., -1:]
        left, right = [f[..., :-1]], [g[..., :-1]]
        if self.normal is not None:
            linear, own_x, own_y = self.normal.parts(x, y)
            left, right, a, b = [*left, linear], [*right, y], a + own_x, b + own_y
        return torch.cat([*left, a, torch.ones_like(a)], -1), torch.cat([*right, torch.ones_like(b), b], -1)

    def mean_features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The same of each chunk's mean T, with the features of its networks side by side."""
        f, g = (v.unflatten(0, (_NETWORKS, -1)).permute(1, 2, 0, 3).flatten(2) for v in self.features(x, y))
        return f / _NETWORKS, g

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """T (4 G, n, m) of every network."""
        f, g = self.features(x, y)
        return f @ g.mT


class _NormalRatio:
    """log p(x, y) / p(x) p(y) of the normal law with the covariance of x (G, n, d_x) and y (G, n, d_y)."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        z = torch.cat([x, y], -1).double()
        self.mean = z.mean(1, keepdim=True)
        C = (z - self.mean).mT @ (z - self.mean) / z.shape[1]
        C = C + _RIDGE * torch.eye(C.shape[-1], dtype=C.dtype)
        d = x.shape[-1]
        P, Px, Py = (torch.linalg.inv(m) for m in (C, C[:, :d, :d], C[:, d:, d:]))
        self.xx, self.yy, self.xy = (m.float() for m in (P[:, :d, :d] - Px, P[:, d:, d:] - Py, P[:, :d, d:]))
        ratio = torch.logdet(C[:, :d, :d]) + torch.logdet(C[:, d:, d:]) - torch.logdet(C)
        self.constant = 0.5 * ratio.float()[:, None, None]
        self.mean_x, self.mean_y = self.mean[..., :d].float(), self.mean[..., d:].float()

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What multiplies y (G, n, d_y), and the parts of x and y alone, (G, n, 1) each."""
        x, v = x - self.mean_x, y - self.mean_y
        linear = -(x @ self.xy)
        own_x = (
            -0.5 * ((x @ self.xx) * x).sum(-1, keepdim=True)
            + self.constant
            - (linear * self.mean_y).sum(-1, keepdim=True)
        )
        return linear, own_x, -0.5 * ((v @ self.yy) * v).sum(-1, keepdim=True)
