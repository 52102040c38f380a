r"""Probabilities that are what they say: one temperature for a scalar, and how far a prediction is off.

:math:`q_T(k \mid x) \propto \pi_k\, e^{s(x; \theta_k) / T}` with the T that held-out pairs find most likely. That is convex in 1/T, so that
Newton's steps find the one minimum, and no ranking of hypotheses changes. One row that tells nothing is added to the n: without it, rows
that are never wrong would ask for infinite odds, which n rows cannot know (Platt's targets).

References:
    | Guo, Pleiss, Sun, Weinberger (2017), On calibration of modern neural networks, https://arxiv.org/abs/1706.04599
    | Platt (1999), Probabilistic outputs for support vector machines, section 2.2, targets that are not 0 and 1
    | Naeini, Cooper, Hauskrecht (2015), AAAI, the expected calibration error
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.errors import ModalityError
from engine.learning.training import TrainingError
from engine.modality import Modality
from engine.parameters import ParameterSpace

__all__ = ["Tempered", "expected_calibration_error", "own_hypothesis", "recalibrate", "temperature"]

_STEPS = 100
_BOX = (1e-3, 1e3)  # of 1/T: hypotheses that are all told apart, or all alike, have no best one
_ROWS = 4096


def expected_calibration_error(probabilities: Tensor, own: Tensor, bins: int = 15) -> float:
    """Σ (share of the rows in a bin) · |accuracy − mean confidence| over equal bins of the highest probability, in [0, 1].

    Arguments:
        probabilities: Of K hypotheses, shape (n, K), rows that add up to 1.
        own: The true hypothesis of each row, whole numbers of shape (n).
        bins: How many. With n rows the expectation for a perfect prediction is about √(bins / n) / 2, not 0.

    Raises:
        ValueError: for shapes that do not fit, or no rows.

    Example:
        >>> p = torch.tensor([[0.8, 0.2]]).repeat(10, 1)
        >>> round(expected_calibration_error(p, torch.tensor([0] * 5 + [1] * 5)), 6)  # 80 % sure, right in half of the cases
        0.3
    """
    if probabilities.dim() != 2 or own.shape != probabilities.shape[:1] or not len(own):
        raise ValueError(
            f"probabilities must have shape (n, K) and own shape (n) with n > 0, got {tuple(probabilities.shape)} and "
            f"{tuple(own.shape)}"
        )
    confidence, best = probabilities.detach().to(torch.float64).max(-1)
    right = (best == own).to(torch.float64)
    at = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, at, right - confidence)
    return float(gap.abs().sum() / len(own))


def temperature(scores: Tensor, own: Tensor, log_prior: Tensor | None = None) -> float:
    """The T > 0 that makes the true hypotheses most likely.

    Arguments:
        scores: s(x_i; θ_k), shape (n, K), nats.
        own: Which of the K is true, whole numbers of shape (n).
        log_prior: log π, shape (K); equal ones where left out.

    Returns:
        T between 0.001 and 1000; the latter where the scores tell less than nothing.

    Raises:
        TrainingError: for shapes that do not fit, fewer than two rows or hypotheses, and scores that are not finite.

    Example:
        >>> s = torch.log(torch.tensor([[0.9, 0.1]])).repeat(8000, 1)  # says 90 %, and is right in 75 %
        >>> round(temperature(s, torch.tensor([0, 0, 0, 1]).repeat(2000)), 2)  # ln 9 / ln 3
        2.0
    """
    s = scores.detach().to(torch.float64)
    if s.dim() != 2 or own.shape != s.shape[:1]:
        raise TrainingError(
            f"scores must have shape (n, K) and own shape (n), got {tuple(s.shape)} and {tuple(own.shape)}; row i of both belongs together"
        )
    if len(s) < 2 or s.shape[1] < 2:
        raise TrainingError(
            f"a temperature takes at least 2 rows of 2 hypotheses, got {len(s)} of {s.shape[1]}; hundreds of rows are a start, and one "
            "hypothesis is always right"
        )
    if log_prior is not None and log_prior.shape != s.shape[1:]:
        raise TrainingError(
            f"log_prior must have shape ({s.shape[1]},), a number for each hypothesis, got {tuple(log_prior.shape)}; leave it out for "
            "equal ones"
        )
    if not bool(torch.isfinite(s).all()):
        row = int((~torch.isfinite(s).all(-1)).nonzero()[0])
        raise TrainingError(
            f"scores must be finite, got row {row} that is not; leave out data that a hypothesis excludes"
        )
    prior = s.new_zeros(s.shape[-1]) if log_prior is None else log_prior.detach().to(torch.float64)
    n = len(s)
    mine = (n * s.gather(-1, own[:, None])[:, 0] + (torch.softmax(prior, -1) * s).sum(-1)) / (n + 1)
    low, high = _BOX
    b = 1.0
    for _ in range(_STEPS):
        p = torch.softmax(b * s + prior, -1)
        mean = (p * s).sum(-1)
        slope = float((mean - mine).mean())
        bend = float((p * (s - mean[:, None]).square()).sum(-1).mean())
        low, high = (low, b) if slope > 0.0 else (b, high)
        step = b - slope / bend if bend > 0.0 else math.nan
        after = step if low < step < high else math.sqrt(low * high)  # outside of what is known: halve its logarithm
        if abs(after - b) <= 1e-12 * b:
            break
        b = after
    return 1.0 / b


class Tempered(Modality):
    """A learned modality's scalar divided by a temperature: the same order of hypotheses, other odds.

    Arguments:
        modality: The learned one.
        temperature: T > 0; above 1 it is made less sure.

    Raises:
        ModalityError: for a temperature that is none.

    Example:
        >>> from modalities import Categorical
        >>> coin = Categorical(parameter_names=("h",), probabilities=[[0.5, 0.5], [0.9, 0.1]])
        >>> x, theta = torch.tensor(0.0), torch.tensor([[1.0]])
        >>> float(Tempered(coin, 2.0)(x, theta) / coin(x, theta))
        0.5
    """

    learned = True

    def __init__(self, modality: Modality, temperature: float) -> None:
        if (
            not isinstance(temperature, int | float)
            or isinstance(temperature, bool)
            or not 0.0 < temperature < math.inf
        ):
            raise ModalityError(f"temperature must be a number > 0, got {temperature!r}; 1 changes nothing")
        super().__init__(modality.parameter_names, modality.event_shape)
        self.modality, self.temperature = modality, float(temperature)
        self.parameter_units = modality.parameter_units
        self.support, self.support_rule, self.support_advice = (
            modality.support,
            modality.support_rule,
            modality.support_advice,
        )
        self.allows_missing = modality.allows_missing
        self._space: ParameterSpace | None = getattr(modality, "training_prior", None)

    @property
    def training_prior(self) -> ParameterSpace | None:
        """The prior that it was trained on."""
        return self._space

    @training_prior.setter
    def training_prior(self, space: ParameterSpace | None) -> None:
        self._space = space
        if space is not None and hasattr(self.modality, "training_prior"):
            self.modality.training_prior = space  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    @property
    def dtype(self) -> torch.dtype:
        """That of the learned modality."""
        return self.modality.dtype

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """s(x; θ) / T in nats: x (*batch, *event_shape), θ (*batch, P_m) -> (*batch)."""
        return self.modality(x, theta) / self.temperature

    @property
    def has_simulator(self) -> bool:
        """Whether the learned modality came with a simulator."""
        return self.modality.has_simulator

    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """By the learned modality's simulator: θ (*batch, P_m) -> (*batch, *event_shape)."""
        return self.modality.simulate(theta, generator)


def recalibrate(
    modality: Modality,
    pairs: tuple[Tensor, Tensor],
    hypotheses: Tensor,
    *,
    log_prior: Tensor | None = None,
) -> Tempered:
    """Find the temperature of a learned scalar by pairs that it has not been trained on.

    Arguments:
        modality: The learned one; it is kept as it is.
        pairs: (theta, x), shapes (n, P_m) and (n, *event_shape): each θ one of the hypotheses.
        hypotheses: All θ that are possible, shape (K, P_m).
        log_prior: log π of each, shape (K); equal ones where left out.

    Returns:
        The modality, tempered. Where x has other laws than in the pairs, another temperature may be right.

    Raises:
        TrainingError: for pairs of unequal rows or other shapes, fewer than two rows or hypotheses, a θ that is no hypothesis, and a
            scalar that is not finite.

    Example:
        >>> from modalities import Gaussian
        >>> both = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> theta = both.repeat(2000, 1)
        >>> x = theta + torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> sure = Gaussian(parameter_names=("mu",), sd=0.5)  # its scalar is four times too steep
        >>> round(recalibrate(sure, (theta, x), both).temperature)
        4
    """
    theta, x = pairs
    P, event = len(modality.parameter_names), tuple(modality.event_shape)
    if hypotheses.dim() != 2 or hypotheses.shape[1] != P or len(hypotheses) < 2:
        raise TrainingError(
            f"hypotheses must have shape (K, {P}) with K >= 2, got {tuple(hypotheses.shape)}; a row is a θ, and one alone is always right"
        )
    if len(torch.unique(hypotheses, dim=0)) < len(hypotheses):
        raise TrainingError(
            f"hypotheses must be different θ, got {hypotheses.tolist()!s:.100} with a row that comes twice; leave it out"
        )
    if theta.dim() != 2 or theta.shape[1] != P or x.dim() < 1 or tuple(x.shape[1:]) != event:
        raise TrainingError(
            f"pairs must be theta (n, {P}) and x (n, {', '.join(map(str, event))}), got {tuple(theta.shape)} and {tuple(x.shape)}; one "
            "observation for each θ"
        )
    if len(theta) != len(x):
        raise TrainingError(
            f"pairs must have as many rows of theta as of x, got {len(theta)} and {len(x)}; row i of both belongs together"
        )
    if len(x) < 2:
        raise TrainingError(f"a temperature takes at least 2 rows, got {len(x)}; hundreds are a start")
    scores = scores_of(modality, x, hypotheses)
    return Tempered(modality, temperature(scores, own_hypothesis(theta, hypotheses), log_prior))


@torch.no_grad()
def scores_of(modality: Modality, x: Tensor, hypotheses: Tensor) -> Tensor:
    """s(x_i; θ_k), (n, K), float64."""
    lead = x.dim() - len(modality.event_shape)
    found = [modality(rows.unsqueeze(lead), hypotheses).to(torch.float64) for rows in x.split(_ROWS)]
    return torch.cat(found)


def own_hypothesis(theta: Tensor, hypotheses: Tensor) -> Tensor:
    """Which hypothesis each θ is.

    Arguments:
        theta: Shape (n, P).
        hypotheses: Shape (K, P), different rows.

    Returns:
        Whole numbers of shape (n).

    Raises:
        TrainingError: for a θ that is none of them, naming its row.

    Example:
        >>> own_hypothesis(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]]))
        tensor([1, 0])
    """
    same = (theta[:, None].to(torch.float64) == hypotheses[None].to(torch.float64)).all(-1)
    if not bool(same.any(-1).all()):
        row = int((~same.any(-1)).nonzero()[0])
        raise TrainingError(
            f"each θ must be one of the hypotheses, got {theta[row].tolist()} in row {row}; add it to them"
        )
    return same.to(torch.int64).argmax(-1)
