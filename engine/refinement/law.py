r"""The law of a learned score beside a reference point: its mean as a function of where the data come from, and its variance.

At a reference θ0 the score :math:`u(x; \theta_0)` of simulations made at θ0 + z is regressed on
:math:`1, z, z z, z z z`: the mean m(z) with :math:`\delta = m(0)` and :math:`A = \partial m/\partial z`, and the residual
variance K at θ0. Pairs of simulations at ± z from one stream of random numbers sharpen A, since what a smooth simulator
adds to both cancels in their difference. The covariance of the coefficients is White's: it holds whatever the powers of z
leave out, and where the variance of the score changes with z.

References:
    | White (1980), A heteroskedasticity-consistent covariance matrix estimator and a direct test for heteroskedasticity,
      Econometrica 48, 817
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
from engine.refinement.combination import Combination, best_weights

__all__: list[str] = []  # the machinery of refinement

_PAIRS = 0.2  # the share of the simulations that come in pairs
_SPREAD = (
    0.2  # the share that lie all over the width; the others lie close to the reference point, where m matters most
)
_CLOSE = 0.1  # of the width
_VERIFIED = 4000  # simulations at a root, to see whether it is the right one
_REACH = 4.0  # widths to the ends of a pair, where that is
_LINEAR = 0.3  # of the parameter's scale at most: even powers cancel in a pair, and others are small that near
_NEAR = 0.5  # K is measured within this part of the width
_NUMBERS = 2**23  # that are multiplied out at once
_CUBIC = 0.1  # of the parameter's scale: widths from which cubes take part
_PILOT = 0.2  # of the simulations, or so many at most, to see which combination of features is best:
_ENOUGH = 4000
_INNER = 0.1  # widths to the ends of the pairs which tell that,
_SAME = 0.5  # if their scores differ by no more than this of their variance: by 2, where they have nothing in common


@dataclass(frozen=True, eq=False)
class Law:
    """m(z), its covariance, and K, at one reference point.

    Attributes:
        reference: θ0, shape (P,).
        frame: F of the coordinates y = F z in which the law holds for |y| of about 1, shape (P, P).
        powers: Exponents of y, shape (p, P), whole numbers; the first row is 0.
        coefficients: Shape (p, P).
        covariance: Of the coefficients, (p P, p P), by function then component.
        variance: K, shape (P, P).
        simulations: How many it took.
        weights: Of the features of :class:`engine.refinement.combination.Combination` whose law it is, (P + K, P); None
            where it is that of the score.
    """

    reference: Tensor
    frame: Tensor
    powers: Tensor
    coefficients: Tensor
    covariance: Tensor
    variance: Tensor
    simulations: int
    weights: Tensor | None = None

    def at(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """m (P,), ∂m/∂θ (P, P) and V (P, P), the covariance of m, for data from theta (P,)."""
        y = self.frame @ (theta - self.reference)
        f = (y**self.powers).prod(-1)
        P = len(y)
        slope = torch.zeros(P, P, dtype=torch.float64)
        for j in range(P):
            lowered = self.powers.clone()
            lowered[:, j] = (lowered[:, j] - 1).clamp_min(0)
            slope[:, j] = (self.powers[:, j] * (y**lowered).prod(-1)) @ self.coefficients
        inner = self.covariance.reshape(len(f), P, len(f), P)
        return f @ self.coefficients, slope @ self.frame, torch.einsum("p,paqb,q->ab", f, inner, f)

    def slope_noise(self, theta: Tensor, weights: Tensor) -> Tensor:
        """What the noise of the slope adds to Aᵀ Ω A on average, (P, P), at theta (P,) for weights Ω (P, P)."""
        y, P = self.frame @ (theta - self.reference), len(theta)
        lowered = (self.powers - torch.eye(P, dtype=torch.long)[:, None]).clamp_min(0)  # one for each derivative
        g = self.frame.mT @ (self.powers.mT * (y**lowered).prod(-1))  # (P, p)
        inner = self.covariance.reshape(g.shape[1], P, g.shape[1], P)
        return torch.einsum("jp,kq,paqb,ab->jk", g, g, inner, weights)


class Laws(Protocol):
    """Where the law of a plugin's score comes from."""

    kind: str
    identity: str  # what tells it from others, as text

    @property
    def combination(self) -> Combination | None:
        """Where other features than the score are to be had."""
        ...

    def laws(self, references: Tensor, spreads: Tensor, simulations: int, seed: tuple[int, ...]) -> list[Law]:
        """The laws at reference points (K, P_m), for data from about them, with ``spreads`` (K, P_m, P_m), covariances."""
        ...

    def expected(self, theta: Tensor, roots: Tensor, seed: tuple[int, ...]) -> tuple[Tensor, Tensor | None, int]:
        """:func:`features` of data from theta (P_m,): their mean (F,), covariance (F, F), and from how many simulations.

        Where the covariance is None, theta is the only root, and the data have to tell it.
        """
        ...


def features(modality: Modality, x: Tensor, roots: Tensor, combination: Combination | None = None) -> Tensor:
    """What tells roots (k, P) apart, (n, F), of observations x (n, *event_shape): the same for all of them.

    The score at each root, the products of its components, the scalar there less that at the first, and log-ratios at points
    all over the prior, which a wrong root alone does not pass by either.
    """
    found = [scored_rows(modality, x, theta.expand(len(x), -1)) for theta in roots]
    i, j = torch.triu_indices(roots.shape[1], roots.shape[1])
    columns = [u[:, i] * u[:, j] for _, u in found] + [(s - found[0][0])[:, None] for s, _ in found[1:]]
    if len(roots) > 1:  # of one root alone they are what it was found by
        columns += [u for _, u in found]
    if combination is not None:
        columns.append(combination.overall(x))
    return torch.cat(columns, -1)


class FieldLaws:
    """Laws from the fields of a calibrated modality: no simulator is needed."""

    kind = "calibrated"
    combination = None

    def __init__(self, modality: Calibrated) -> None:
        self.calibration = modality.calibration
        self.identity = self.kind

    def laws(self, references: Tensor, spreads: Tensor, simulations: int, seed: tuple[int, ...]) -> list[Law]:
        """The fields at the reference points."""
        P = references.shape[1]
        powers = torch.tensor(exponents(P, 1))
        order = powers[1:].argmax(-1)  # which component each linear function is
        out = []
        for reference, mean, slope, K, V in zip(references, *self.calibration.at(references), strict=True):
            covariance = torch.zeros((P + 1) * P, (P + 1) * P, dtype=torch.float64)
            covariance[:P, :P] = V
            coefficients = torch.cat([mean[None], slope.mT[order]])
            out.append(Law(reference, torch.eye(P, dtype=torch.float64), powers, coefficients, covariance, K, 0))
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
        self.combination = Combination(self.modality, prior)
        self.made, self.excluded = 0, 0
        self.identity = f"{self.kind} by {getattr(simulate, '__qualname__', type(simulate).__qualname__)}"

    @property
    def lost(self) -> float:
        """The share of all simulations so far that were not finite."""
        return self.excluded / max(1, self.made)

    def laws(self, references: Tensor, spreads: Tensor, simulations: int, seed: tuple[int, ...]) -> list[Law]:
        """Regressions on fresh simulations, from the same random numbers for the same seed."""
        both = zip(references, spreads, strict=True)
        return [self._law(reference, spread, simulations, seed) for reference, spread in both]

    def _law(self, reference: Tensor, spread: Tensor, simulations: int, seed: tuple[int, ...]) -> Law:
        P = len(reference)
        pairs = round(0.5 * _PAIRS * simulations)
        generator = generator_of(*seed, 0)
        width, axes = principal(spread, self.prior.scale)
        y = torch.randn(simulations - 2 * pairs, P, generator=generator, dtype=torch.float64)
        y[round(_SPREAD * simulations) :] *= _CLOSE
        reach = torch.minimum(_REACH * width, width.clamp_min(_LINEAR))
        step = torch.randn(pairs, P, generator=generator, dtype=torch.float64)

        def stretched(lengths: Tensor) -> Tensor:  # symmetric: the signs and the order of the axes do not matter
            return (axes * lengths) @ axes.mT

        alone = reflected(reference + (y @ stretched(width)) * self.prior.scale, self.prior)
        ends = paired_theta(reference, (step @ stretched(reach)) * self.prior.scale, self.prior)
        pilot = min(_ENOUGH, round(_PILOT * simulations)) // 4
        near = paired_theta(reference, (step[:pilot] @ stretched(_INNER * width)) * self.prior.scale, self.prior)
        weights = self._weights(reference, near, [end[:pilot] for end in ends], 2 * pilot, seed)
        rows, u, lost = self._scores(alone, reference, seed, 1, weights)
        found = [self._scores(end, reference, seed, 2, weights) for end in ends]
        self.excluded += lost + sum(part[2] for part in found)
        self.made += simulations
        frame = stretched(1.0 / width.clamp_min(1e-300)) / self.prior.scale
        y = (alone[rows] - reference) @ frame.mT
        _, ends, difference = paired(found, ends)
        y_ends = [(end - reference) @ frame.mT for end in ends]
        degree = 3 if bool((width > _CUBIC).any()) else 2
        powers = torch.tensor(exponents(P, degree))

        def functions(y: Tensor) -> Tensor:
            return (y[:, None] ** powers).prod(-1)

        B = functions(y)
        D = functions(y_ends[0]) - functions(y_ends[1])
        D = torch.where(D.square().mean(0) > 1e-18, D, 0.0)  # of even ones rounding is left, which is no regressor
        residual = u - B @ _least_squares(B, u)
        weight = torch.exp(-0.5 * (y / _NEAR).square().sum(-1))
        K = (residual * weight[:, None]).mT @ residual / weight.sum() * (len(u) / max(1, len(u) - len(powers)))
        self._check(K, reference, len(u))
        apart = difference - D @ _least_squares(D, difference)
        unequal = _errors(apart, (y_ends[0] - y_ends[1]).square().sum(-1))[:, None]
        D, difference, apart = D / unequal, difference / unequal, apart / unequal
        K_pair = apart.mT @ apart / max(1, len(apart) - len(powers))
        gram, right = _weighted(B, u, K)
        more, beside = _weighted(D, difference, K_pair + 1e-12 * K)
        inverse = pseudo_inverse(gram + more)
        c = (inverse @ (right + beside)).reshape(len(powers), P)
        # with what the powers leave out, and variances that are not K; of pairs, K_pair is the mean of all that
        covariance = inverse @ (_outer_products(B, u - B @ c, K) + more) @ inverse
        covariance = 0.5 * (covariance + covariance.mT)
        made = len(u) + 2 * len(difference)
        return Law(reference, frame, powers, c, covariance, K, made, weights)

    def _weights(
        self, reference: Tensor, near: list[Tensor], far: list[Tensor], n: int, seed: tuple[int, ...]
    ) -> Tensor | None:
        """The best combination of features at a reference by simulations of its own: n there, and pairs.

        Slopes are those of pairs so near that means are straight lines between them, where a simulator adds the same to both
        ends of a pair; where it does not, ends that are ``far`` from each other tell more.
        """
        if n < self.combination.fewest:
            return None
        take = self.combination.features
        still = self._measured(reference.expand(n, -1), reference, seed, 4, take)[1]
        for part, ends in enumerate((near, far)):
            found = [self._measured(end, reference, seed, 5 + part, take) for end in ends]
            _, ends, moved = paired(found, ends)
            step = ends[0] - ends[1]
            apart = (step != 0).all(-1)  # a held component, or a bound, may leave none
            P = len(reference)
            if part or float((moved[:, :P].var(0) / still[:, :P].var(0).clamp_min(1e-300)).amax()) < _SAME:
                return best_weights(still, moved[apart], step[apart])
        return None

    def expected(self, theta: Tensor, roots: Tensor, seed: tuple[int, ...]) -> tuple[Tensor, Tensor | None, int]:
        """The mean (F,) and covariance (F, F) of :func:`features` of n simulations at theta (P,), and n."""
        at = theta.expand(_VERIFIED, -1)
        blocks = simulate_blocks(
            self.simulate, at, seed[0], (*seed[1:], 3), tuple(self.modality.event_shape), self.tick
        )
        x = torch.cat([part.x for _, part in blocks])
        f = features(self.modality, x, roots, self.combination)
        return f.mean(0), torch.cov(f.T).reshape(f.shape[1], -1), len(f)

    def _scores(
        self, true: Tensor, reference: Tensor, seed: tuple[int, ...], part: int, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, int]:
        return self._measured(true, reference, seed, part, lambda x, at: self.combination.measured(x, at, weights))

    def _measured(
        self,
        true: Tensor,
        reference: Tensor,
        seed: tuple[int, ...],
        part: int,
        measure: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, int]:
        at, path = reference.expand(len(true), -1), (*seed[1:], part)
        try:
            return simulated_scores(self.modality, self.simulate, true, at, seed[0], path, self.tick, measure)
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


def principal(spread: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The widths (..., P) along the principal axes (..., P, P), columns, of a covariance in units of ``scale`` (P,)."""
    variance, axes = torch.linalg.eigh(spread / scale / scale[:, None])
    return variance.clamp_min(0.0).sqrt(), axes


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


def _outer_products(B: Tensor, e: Tensor, K: Tensor) -> Tensor:
    """Σ g gᵀ of the terms g = B ⊗ K⁻¹ e of the normal equations, from their residuals e (n, P) [White 1980]."""
    n, p = B.shape
    weighted, total = e @ torch.linalg.inv(K), torch.zeros(p * e.shape[1], p * e.shape[1], dtype=torch.float64)
    for some in torch.arange(n).split(max(1, _NUMBERS // len(total))):
        g = (B[some, :, None] * weighted[some, None]).flatten(1)
        total += g.mT @ g
    return total * (n / max(1, n - p))


def _weighted(B: Tensor, u: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    root = torch.linalg.cholesky(torch.linalg.inv(K))
    gram, right, _ = normal_equations(B, u, root.expand(len(u), -1, -1))
    return gram, right
