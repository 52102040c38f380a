r"""The law of a learned score beside a reference point: its mean as a function of where the data come from, and its variance.

At a reference θ0 the score :math:`u(x; \theta_0)` of simulations made at θ0 + z is regressed on
:math:`1, z, z z, z z z`: the mean m(z) with :math:`\delta = m(0)` and :math:`A = \partial m/\partial z`, and the residual
variance K at θ0. Pairs of simulations at ± z from one stream of random numbers sharpen A, since what a smooth simulator
adds to both cancels in their difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.certificate.basis import exponents
from engine.certificate.calibration import Calibrated, paired, simulated_scores
from engine.certificate.draws import paired_theta, reflected, simulate_blocks
from engine.certificate.fields import normal_equations, pseudo_inverse
from engine.certificate.scores import scored_rows
from engine.errors import ModalityError
from engine.learning.simulator import Simulate, generator_of
from engine.modality import Modality
from engine.parameters import ParameterSpace

__all__: list[str] = []  # the machinery of refinement

_PAIRS = 0.2  # the share of the simulations that come in pairs
_SPREAD = (
    0.2  # the share that lie all over the width; the others lie close to the reference point, where m matters most
)
_CLOSE = 0.1  # of the width
_VERIFIED = 2000  # simulations at a root, to see whether it is the right one
_REACH = 4.0  # widths to the ends of a pair, where that is
_LINEAR = 0.3  # of the parameter's scale at most: even powers cancel in a pair, and others are small that near
_NEAR = 0.5  # K is measured within this part of the width
_CUBIC = 0.1  # of the parameter's scale: widths from which cubes take part


@dataclass(frozen=True, eq=False)
class Law:
    """m(z), its covariance, and K, at one reference point.

    Attributes:
        reference: θ0, shape (P,).
        width: How far from it the law holds, shape (P,); infinite where it is exact at θ0 alone and made anew for each.
        powers: Exponents of z, shape (p, P), whole numbers; the first row is 0.
        coefficients: Shape (p, P).
        covariance: Of the coefficients, (p P, p P), by function then component.
        variance: K, shape (P, P).
        simulations: How many it took.
    """

    reference: Tensor
    width: Tensor
    powers: Tensor
    coefficients: Tensor
    covariance: Tensor
    variance: Tensor
    simulations: int

    def at(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """m (P,), ∂m/∂θ (P, P) and V (P, P), the covariance of m, for data from theta (P,)."""
        z = theta - self.reference
        f = (z**self.powers).prod(-1)
        P = len(z)
        slope = torch.zeros(P, P, dtype=torch.float64)
        for j in range(P):
            lowered = self.powers.clone()
            lowered[:, j] = (lowered[:, j] - 1).clamp_min(0)
            slope[:, j] = (self.powers[:, j] * (z**lowered).prod(-1)) @ self.coefficients
        inner = self.covariance.reshape(len(f), P, len(f), P)
        return f @ self.coefficients, slope, torch.einsum("p,paqb,q->ab", f, inner, f)

    def slope_noise(self, theta: Tensor, weights: Tensor) -> Tensor:
        """What the noise of the slope adds to Aᵀ Ω A on average, (P, P), at theta (P,) for weights Ω (P, P)."""
        z, P = theta - self.reference, len(theta)
        lowered = (self.powers - torch.eye(P, dtype=torch.long)[:, None]).clamp_min(0)  # one for each derivative
        g = self.powers.mT * (z**lowered).prod(-1)  # (P, p)
        inner = self.covariance.reshape(g.shape[1], P, g.shape[1], P)
        return torch.einsum("jp,kq,paqb,ab->jk", g, g, inner, weights)


class Laws(Protocol):
    """Where the law of a plugin's score comes from."""

    kind: str
    identity: str  # what tells it from others, as text

    def laws(self, references: Tensor, widths: Tensor, simulations: int, seed: tuple[int, ...]) -> list[Law]:
        """The laws at reference points (K, P_m), for data from within ``widths`` (K, P_m) of them."""
        ...

    def expected(self, theta: Tensor, roots: Tensor, seed: tuple[int, ...]) -> tuple[Tensor, Tensor | None, int]:
        """:func:`features` of data from theta (P_m,): their mean (F,), covariance (F, F), and from how many simulations.

        Where the covariance is None, theta is the only root, and the data have to tell it.
        """
        ...


def features(modality: Modality, x: Tensor, roots: Tensor) -> Tensor:
    """What tells roots (k, P) apart, (n, F), of observations x (n, *event_shape): the same for all of them.

    The products of the components of the score at each root, and the scalar there less that at the first.
    """
    found = [scored_rows(modality, x, theta.expand(len(x), -1)) for theta in roots]
    i, j = torch.triu_indices(roots.shape[1], roots.shape[1])
    columns = [u[:, i] * u[:, j] for _, u in found] + [(s - found[0][0])[:, None] for s, _ in found[1:]]
    return torch.cat(columns, -1)


class FieldLaws:
    """Laws from the fields of a calibrated modality: no simulator is needed."""

    kind = "calibrated"

    def __init__(self, modality: Calibrated) -> None:
        self.calibration = modality.calibration
        self.identity = self.kind

    def laws(self, references: Tensor, widths: Tensor, simulations: int, seed: tuple[int, ...]) -> list[Law]:
        """The fields at the reference points."""
        P = references.shape[1]
        powers = torch.tensor(exponents(P, 1))
        order = powers[1:].argmax(-1)  # which component each linear function is
        out = []
        for reference, mean, slope, K, V in zip(references, *self.calibration.at(references), strict=True):
            covariance = torch.zeros((P + 1) * P, (P + 1) * P, dtype=torch.float64)
            covariance[:P, :P] = V
            coefficients = torch.cat([mean[None], slope.mT[order]])
            out.append(Law(reference, torch.full_like(reference, torch.inf), powers, coefficients, covariance, K, 0))
        return out

    def expected(self, theta: Tensor, roots: Tensor, seed: tuple[int, ...]) -> tuple[Tensor, Tensor | None, int]:
        """The mean (F,) of :func:`features` at theta (P,) alone."""
        mean, _, K, _ = (t[0] for t in self.calibration.at(theta[None]))
        i, j = torch.triu_indices(len(theta), len(theta))
        return (K + mean[:, None] * mean)[i, j], None, 0


class SimulatedLaws:
    """Laws from simulations around each reference point.

    Arguments:
        modality: The learned one.
        simulate: Its simulator.
        prior: The prior that it was trained on: simulations stay inside.

    Attributes:
        tick: Told how many simulations were made.
    """

    kind = "refined"
    tick: Callable[[int], None] | None = None

    def __init__(self, name: str, modality: Modality, simulate: Simulate, prior: ParameterSpace) -> None:
        self.name = name
        self.modality = modality.modality if isinstance(modality, Calibrated) else modality
        self.simulate, self.prior = simulate, prior
        self.excluded = 0
        self.identity = f"{self.kind} by {getattr(simulate, '__qualname__', type(simulate).__qualname__)}"

    def laws(self, references: Tensor, widths: Tensor, simulations: int, seed: tuple[int, ...]) -> list[Law]:
        """Regressions on fresh simulations, from the same random numbers for the same seed."""
        return [
            self._law(reference, width, simulations, seed) for reference, width in zip(references, widths, strict=True)
        ]

    def _law(self, reference: Tensor, width: Tensor, simulations: int, seed: tuple[int, ...]) -> Law:
        P = len(reference)
        pairs = round(0.5 * _PAIRS * simulations)
        generator = generator_of(*seed, 0)
        z = width * torch.randn(simulations - 2 * pairs, P, generator=generator, dtype=torch.float64)
        z[round(_SPREAD * simulations) :] *= _CLOSE
        reach = torch.minimum(_REACH * width, torch.maximum(width, _LINEAR * self.prior.scale))
        step = reach * torch.randn(pairs, P, generator=generator, dtype=torch.float64)
        alone = reflected(reference + z, self.prior)
        ends = paired_theta(reference, step, self.prior)
        rows, u, lost = self._scores(alone, reference, seed, 1)
        found = [self._scores(end, reference, seed, 2) for end in ends]
        self.excluded += lost + sum(part[2] for part in found)
        z = alone[rows] - reference
        _, ends, difference = paired(found, ends)
        degree = 3 if bool((width > _CUBIC * self.prior.scale).any()) else 2
        powers = torch.tensor(exponents(P, degree))
        unit = width.clamp_min(1e-300)

        def functions(z: Tensor) -> Tensor:
            return ((z / unit)[:, None] ** powers).prod(-1)

        B = functions(z)
        D = functions(ends[0] - reference) - functions(ends[1] - reference)
        D = torch.where(D.square().mean(0) > 1e-18, D, 0.0)  # of even ones rounding is left, which is no regressor
        residual = u - B @ _least_squares(B, u)
        weight = torch.exp(-0.5 * (z / (_NEAR * unit)).square().sum(-1))
        K = (residual * weight[:, None]).mT @ residual / weight.sum() * (len(u) / max(1, len(u) - len(powers)))
        self._check(K, reference, len(u))
        apart = difference - D @ _least_squares(D, difference)
        unequal = _errors(apart, ((ends[0] - ends[1]) / unit).square().sum(-1))[:, None]
        D, difference, apart = D / unequal, difference / unequal, apart / unequal
        K_pair = apart.mT @ apart / max(1, len(apart) - len(powers))
        gram, right = _weighted(B, u, K)
        more, beside = _weighted(D, difference, K_pair + 1e-12 * K)
        inverse = pseudo_inverse(gram + more)
        c = (inverse @ (right + beside)).reshape(len(powers), P)
        scale = (unit**powers).prod(-1)  # back from units of the width
        covariance = inverse.reshape(len(powers), P, len(powers), P) / scale[:, None, None, None] / scale[:, None]
        made = len(u) + 2 * len(difference)
        return Law(reference, width, powers, c / scale[:, None], covariance.reshape(inverse.shape), K, made)

    def expected(self, theta: Tensor, roots: Tensor, seed: tuple[int, ...]) -> tuple[Tensor, Tensor | None, int]:
        """The mean (F,) and covariance (F, F) of :func:`features` of n simulations at theta (P,), and n."""
        at = theta.expand(_VERIFIED, -1)
        blocks = simulate_blocks(
            self.simulate, at, seed[0], (*seed[1:], 3), tuple(self.modality.event_shape), self.tick
        )
        x = torch.cat([part.x for _, part in blocks])
        f = features(self.modality, x, roots)
        return f.mean(0), torch.cov(f.T).reshape(f.shape[1], -1), len(f)

    def _scores(self, true: Tensor, reference: Tensor, seed: tuple[int, ...], part: int) -> tuple[Tensor, Tensor, int]:
        at = reference.expand(len(true), -1)
        try:
            return simulated_scores(self.modality, self.simulate, true, at, seed[0], (*seed[1:], part), self.tick)
        except ModalityError as error:
            raise ModalityError(f"plugin '{self.name}': {error}") from error

    def _check(self, K: Tensor, reference: Tensor, n: int) -> None:
        size = K.diagonal().clamp_min(1e-300).sqrt()
        if n < 10 * len(reference) or not bool(torch.linalg.eigvalsh(K / size / size[:, None])[0] > 1e-12):
            at = ", ".join(f"{v:.4g}" for v in reference.tolist())
            raise ModalityError(
                f"plugin '{self.name}': the scores of {n} simulations at θ = ({at}) have no variance in some direction: "
                "the scalar does not depend on all of its parameters there, and cannot be refined"
            )


def _errors(residual: Tensor, squared: Tensor) -> Tensor:
    """Relative errors (n,) of the differences of pairs at squared distances (n,), from their residuals (n, P).

    A part of them is the same for all, that of independent draws; what a simulator adds to both ends cancels but for a
    part that grows with the distance.
    """
    size = (residual / residual.square().mean(0).sqrt().clamp_min(1e-300)).square().mean(-1)
    rise = squared - squared.mean()
    most = float(size.mean() / squared.mean().clamp_min(1e-300))  # none of it the same for all
    slope = min(max(0.0, float(rise @ size / (rise @ rise).clamp_min(1e-300))), most)
    fitted = size.mean() + slope * rise
    return torch.where(size.mean() > 0, fitted.clamp_min(1e-3 * size.mean()), 1.0).sqrt()


def _least_squares(B: Tensor, u: Tensor) -> Tensor:
    return pseudo_inverse(B.mT @ B) @ (B.mT @ u)  # torch.linalg.lstsq does not give the same bits every time


def _weighted(B: Tensor, u: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    root = torch.linalg.cholesky(torch.linalg.inv(K))
    gram, right, _ = normal_equations(B, u, root.expand(len(u), -1, -1))
    return gram, right
