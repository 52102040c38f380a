r"""Calibrated scalars: what a learned score is worth at every θ, measured once over the prior.

A learned score :math:`u = \nabla_\theta s(x; \theta)` has a mean :math:`\delta(\theta) = E_{x|\theta}[u]` where a true one has
none, a slope :math:`A(\theta) = \partial E_{x|\theta'}[u(x; \theta)] / \partial \theta'` at θ' = θ and a variance
:math:`K(\theta)` which differ where those of a true one are both Fisher's information. Given the three, the mean score
:math:`\bar u` of N observations at a reference point θ0 is a summary statistic with a known law, and

.. math:: \tilde s(\theta) = -\tfrac12\, r^\top \Omega\, r, \qquad r = \bar u - \delta - A (\theta - \theta_0), \qquad
    \Omega = [K / N + V]^{-1}

is a calibrated concave evidence around θ0 whatever the network's faults, V being the covariance of :math:`\hat\delta`.

References:
    | Gouriéroux, Monfort and Renault, J. Appl. Econometrics 8 (1993) S85, indirect inference
    | Hansen, Econometrica 50 (1982) 1029, the efficient weights and the test of fit
    | Alsing and Wandelt, MNRAS 476 (2018) L60, scores as summary statistics
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.certificate.draws import least_simulations, paired_theta, simulate_blocks, spread_theta, steps
from engine.certificate.fields import MARGIN, MeanField, VarianceField, fit_mean, fit_slope, fit_variance
from engine.certificate.scores import score_rows
from engine.errors import ModalityError
from engine.learning.simulator import Simulate, generator_of
from engine.modality import Modality
from engine.parameters import ParameterSpace
from engine.report.progress import progress_bar

__all__ = ["Calibrated", "Calibration", "calibrate"]

_MOVED = 0.2  # the share of the simulations made beside θ, which measure the slope
_STEP = 0.25  # their distance, in units of the parameter's scale


@dataclass(frozen=True, eq=False)
class Calibration:
    """The fields δ(θ), A(θ) and K(θ) of one scalar, with their own errors.

    Attributes:
        space: The parameters and the prior that they were fitted over.
        mean: δ, P components.
        slope: A, P² components by row.
        variance: K.
        simulations: How many were used.
        excluded: How many more were no observations.
        seed: Of the simulations.

    Example:
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Uniform(-1.0, 1.0))])
        >>> fields = calibrate(Gaussian(parameter_names=("mu",), sd=0.5), prior=space, simulations=2000).calibration
        >>> Calibration.from_plain(space, fields.to_plain()).simulations
        2000
    """

    space: ParameterSpace
    mean: MeanField
    slope: MeanField
    variance: VarianceField
    simulations: int
    excluded: int
    seed: int

    def at(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """δ (n, P), A (n, P, P), K (n, P, P) and V (n, P, P), the covariance of δ, at theta (n, P)."""
        P = len(self.space)
        slope = self.slope.at(theta).reshape(-1, P, P)
        return self.mean.at(theta), slope, self.variance.at(theta), self.mean.error(theta)

    def to_plain(self) -> dict[str, Any]:
        """The fields as plain values and tensors; :meth:`from_plain` reads them back."""
        return {
            "mean": self.mean.to_plain(),
            "slope": self.slope.to_plain(),
            "variance": self.variance.to_plain(),
            "simulations": self.simulations,
            "excluded": self.excluded,
            "seed": self.seed,
        }

    @classmethod
    def from_plain(cls, space: ParameterSpace, table: Mapping[str, Any]) -> Calibration:
        """What :meth:`to_plain` gave, with the space that it was fitted over.

        Arguments:
            space: The modality's own parameters.
            table: The plain values.
        """
        return cls(
            space,
            MeanField.from_plain(space, table["mean"]),
            MeanField.from_plain(space, table["slope"]),
            VarianceField.from_plain(space, table["variance"]),
            int(table["simulations"]),
            int(table["excluded"]),
            int(table["seed"]),
        )


class Calibrated(Modality):
    """A learned modality with its calibration: the same raw scalar, whose estimates use the calibrated one.

    :func:`calibrate` makes it. ``log_evidence`` is the raw scalar of one observation; the calibrated scalar is one of a
    data set, which estimates build around θ̂ (see :mod:`engine.refinement`).

    Arguments:
        modality: The learned one.
        fields: What :meth:`Calibration.to_plain` gave.

    Example:
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Uniform(-1.0, 1.0))])
        >>> calibrated = calibrate(Gaussian(parameter_names=("mu",), sd=0.5), prior=space, simulations=2000)
        >>> calibrated.calibrated_score(torch.ones(3, 1), torch.zeros(3, 1)).shape
        torch.Size([3, 1])
    """

    learned = True

    def __init__(self, modality: Modality, fields: Mapping[str, Any]) -> None:
        super().__init__(modality.parameter_names, modality.event_shape)
        self.modality = modality
        self._fields = dict(fields)
        self.parameter_units = modality.parameter_units
        self.support, self.support_rule, self.support_advice = (
            modality.support,
            modality.support_rule,
            modality.support_advice,
        )
        self.allows_missing = modality.allows_missing
        self._space: ParameterSpace | None = getattr(modality, "training_prior", None)
        self._calibration: Calibration | None = None

    @property
    def training_prior(self) -> ParameterSpace | None:
        """The prior that it was trained and calibrated on."""
        return self._space

    @training_prior.setter
    def training_prior(self, space: ParameterSpace | None) -> None:
        self._space, self._calibration = space, None
        if space is not None and hasattr(self.modality, "training_prior"):
            self.modality.training_prior = space  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    @property
    def calibration(self) -> Calibration:
        """Its fields."""
        if self._calibration is None:
            if self._space is None:
                raise ModalityError("a calibrated modality needs its training_prior, which is missing")
            self._calibration = Calibration.from_plain(self._space, self._fields)
        return self._calibration

    @property
    def dtype(self) -> torch.dtype:
        """That of the learned modality."""
        return self.modality.dtype

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """The raw scalar: x (*batch, *event_shape), θ (*batch, P_m) -> (*batch)."""
        return self.modality(x, theta)

    @property
    def has_simulator(self) -> bool:
        """Whether the learned modality came with a simulator."""
        return self.modality.has_simulator

    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """By the learned modality's simulator: θ (*batch, P_m) -> (*batch, *event_shape)."""
        return self.modality.simulate(theta, generator)

    def calibrated_score(self, x: Tensor, theta: Tensor) -> Tensor:
        """u − δ̂(θ) of single observations, in nats per unit of θ.

        Arguments:
            x: Shape (n, *event_shape).
            theta: Shape (n, P_m).

        Returns:
            Shape (n, P_m), float64.
        """
        return score_rows(self.modality, x, theta) - self.calibration.mean.at(theta)


def calibrate(
    modality: Modality,
    *,
    prior: ParameterSpace,
    simulate: Simulate | None = None,
    simulations: int = 100_000,
    seed: int = 0,
    progress: bool | None = None,
) -> Calibrated:
    """Measure δ(θ), A(θ) and K(θ) of a scalar over the prior, so that its estimates need no simulator later.

    Arguments:
        modality: The learned one; it is copied. A calibrated one is calibrated anew.
        prior: Has the modality's parameters, each with a prior.
        simulate: ``simulate(theta, generator)``, θ (n, P_m) -> x (n, *event_shape); the modality's own by default.
        simulations: How many; a fifth of them beside θ, for the slope. The certificate says what they are worth.
        seed: Of the simulations.
        progress: Whether to show a bar; by default, on a terminal.

    Returns:
        The calibrated modality.

    Raises:
        ModalityError: for a simulator that fails (:func:`engine.learning.simulator.draw`), a scalar without a finite
            score, or too few simulations.
        ParameterError: for a parameter that has no continuous prior.

    Example:
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Uniform(-1.0, 1.0))])
        >>> calibrated = calibrate(Gaussian(parameter_names=("mu",), sd=0.5), prior=space, simulations=5000)
        >>> _, slope, variance, _ = calibrated.calibration.at(torch.zeros(1, 1, dtype=torch.float64))
        >>> round(slope.item(), 3), 3.5 < variance.item() < 4.5  # both are 1 / 0.5²
        (4.0, True)
    """
    inner = modality.modality if isinstance(modality, Calibrated) else modality
    simulate = own_simulator(inner, simulate)
    space = prior.only(inner.parameter_names)
    P = len(space)
    least = least_simulations(P)
    if simulations < least:
        raise ModalityError(f"calibrating {P} parameters takes at least {least} simulations, got {simulations}")
    inner = copy.deepcopy(inner).eval()
    pairs = round(0.5 * _MOVED * simulations)
    theta = spread_theta(space, simulations - 2 * pairs, seed, 0)
    base = spread_theta(space, pairs, seed, 1)
    step = _STEP * space.scale * steps(pairs, P, generator_of(seed, 2))
    ends = paired_theta(base, step, space)
    with progress_bar("calibrating", simulations, progress) as tick:
        rows, u, lost = simulated_scores(inner, simulate, theta, theta, seed, (3,), tick)
        # both ends of a pair from one stream of random numbers: what a smooth simulator adds to both cancels
        found = [simulated_scores(inner, simulate, end, base, seed, (4,), tick) for end in ends]
    theta = theta[rows]
    mean, variance = fit_law(space, theta, u)
    both, ends, pair = paired(found, ends)
    at = base[both]
    slope = fit_slope(space, at, ends[0] - at, ends[1] - at, pair, variance.root(at))
    lost += sum(part[2] for part in found)
    calibration = Calibration(space, mean, slope, variance, simulations, lost, seed)
    out = Calibrated(inner, calibration.to_plain())
    out.training_prior = space
    return out.eval()


def own_simulator(modality: Modality, simulate: Simulate | None) -> Simulate:
    """The simulator that was given, or else the modality's own. ModalityError where there is none."""
    if simulate is None and not modality.has_simulator:
        raise ModalityError(f"{type(modality).__name__} has no simulator of its own: pass simulate=")
    return modality.simulate if simulate is None else simulate


def simulated_scores(
    modality: Modality,
    simulate: Simulate,
    true: Tensor,
    at: Tensor,
    seed: int,
    path: tuple[int, ...],
    tick: Any = None,
    measure: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """u(x; at) of x simulated at ``true`` (n, P): the rows that were observations, u, and how many were not.

    Arguments:
        modality: Whose score.
        simulate: The simulator.
        true, at: Shape (n, P) each.
        seed, path: Of the blocks of simulations.
        tick: Told how many were made.
        measure: What to take instead of the score, of x and its row of ``at``.
    """
    kept, u, lost = [], [], 0
    for start, draws in simulate_blocks(simulate, true, seed, path, tuple(modality.event_shape), tick):
        kept.append(start + draws.rows)
        rows = at[kept[-1]]
        u.append(score_rows(modality, draws.x, rows) if measure is None else measure(draws.x, rows))
        lost += draws.excluded
    return torch.cat(kept), torch.cat(u), lost


def paired(found: Sequence[tuple[Tensor, Tensor, int]], ends: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """The rows that both ends of a pair have, the ends of those, and u at the first end less u at the second.

    Arguments:
        found: What :func:`simulated_scores` gave for either end.
        ends: Shape (n, P) each.
    """
    n = len(ends[0])
    full = [torch.full((n, u.shape[1]), torch.nan, dtype=torch.float64).index_copy(0, rows, u) for rows, u, _ in found]
    difference = full[0] - full[1]
    rows = torch.isfinite(difference).all(-1).nonzero()[:, 0]
    return rows, [end[rows] for end in ends], difference[rows]


def fit_law(
    space: ParameterSpace, theta: Tensor, u: Tensor, tried: Sequence[int] | None = None
) -> tuple[MeanField, VarianceField]:
    """δ(θ) and K(θ) of scores u (n, P) of observations at theta (n, P): least squares, variance, weighted least squares."""
    first = fit_mean(space, theta, u, tried=tried)
    variance = fit_variance(space, theta, u - first.at(theta))
    return fit_mean(space, theta, u, variance.root(theta), tried, margin=MARGIN), variance
