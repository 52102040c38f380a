r"""Probabilities of whole numbers given θ, one after the other: categories and counts.

A count is a mixture of negative binomials, :math:`\mathrm{Var}\, n = m (1 + e^\kappa)` each, that reaches the Poisson
law as κ falls. With r = m e^−κ,

.. math:: \log p(n) = (r + n) \log\frac{r + n}{r + m} + n \log\frac{m}{n}
    - \tfrac12 \log 2\pi n (1 + n / r) + \delta(r + n) - \delta(r) - \delta(n),

δ what Stirling's formula leaves of log Γ: no two terms of the size of n log n or r log r cancel.

References:
    | Cameron and Trivedi (2013), Regression analysis of count data, 2nd edition, Cambridge, section 3.3
    | Boelts, Lueckmann, Gao, Macke (2022), Flexible and efficient simulation-based inference for models of
      decision-making, https://doi.org/10.7554/eLife.77220: mixed data as discrete, then continuous
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from engine.errors import ModalityError
from modalities._densities import LOG_2PI
from modalities._networks import check_hidden, mlp, redraw, soft_cap
from modalities._tensors import require

__all__ = ["DiscreteChain", "Entries", "check_discrete", "negative_binomial"]

_OVERDISPERSION = 10.0  # |κ| below it: a variance within 5e-5 of a Poisson law's, or 20,000 times it


def check_discrete(discrete: object, entries: int) -> dict[int, int]:
    """Which entries are discrete -> how many categories, 0 for a count, in the order of the entries.

    Raises:
        ModalityError: for anything else than {index: number of categories >= 2 or "count"}.
    """
    if isinstance(discrete, Sequence) and not isinstance(discrete, str) and not discrete:
        return {}
    if not isinstance(discrete, Mapping):
        raise ModalityError(f"discrete must be a mapping, got {discrete!r}; write {{0: 3, 2: 'count'}}")
    kinds: dict[int, int] = {}
    for key, kind in discrete.items():
        try:
            index = int(key)
        except (TypeError, ValueError):
            index = -1
        if not 0 <= index < entries or isinstance(key, float | bool) or index in kinds:
            raise ModalityError(
                f"discrete must name entries of x from 0 to {entries - 1}, each once, got {key!r}; number the entries "
                "of the flattened x"
            )
        whole = isinstance(kind, int) and not isinstance(kind, bool) and kind >= 2
        if kind != "count" and not whole:
            raise ModalityError(f"discrete[{index}] must be a number of categories >= 2 or 'count', got {kind!r}")
        kinds[index] = 0 if kind == "count" else int(kind)
    return dict(sorted(kinds.items()))


class Entries(constraints.Constraint):
    """The values that entries of x may take, where some of them are categories or counts."""

    event_dim = 0

    def __init__(self, kinds: Mapping[int, int], event_shape: Sequence[int]) -> None:
        limit = torch.full((math.prod(event_shape),), math.nan, dtype=torch.float64)
        for index, categories in kinds.items():
            limit[index] = categories - 1 if categories else math.inf
        self.limit = limit.reshape(tuple(event_shape))
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each entry of value (*, *event_shape) is allowed."""
        limit = self.limit.to(value.device)
        return (limit.isnan() & value.isfinite()) | ((value >= 0) & (value <= limit) & (value == value.floor()))


class DiscreteChain(nn.Module):
    """log p(d | θ) = Σ_i log p(d_i | d_<i, θ) of entries that are categories or counts."""

    centre: Tensor
    scale: Tensor

    def __init__(
        self, kinds: Sequence[int], context: int, hidden: Sequence[int], components: int, activation: str
    ) -> None:
        super().__init__()
        self.kinds, self.components = tuple(kinds), components
        self.register_buffer("centre", torch.zeros(len(self.kinds)))  # of log(1 + n), for counts
        self.register_buffer("scale", torch.ones(len(self.kinds)))
        self.networks, seen = nn.ModuleList(), context
        for categories in self.kinds:
            outputs = categories or 3 * components
            self.networks.append(mlp(seen, check_hidden("hidden", hidden), outputs, activation))
            seen += categories or 1
        self.encoded = seen - context
        self._spread()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        redraw(self.networks)
        self._spread()

    @torch.no_grad()
    def _spread(self) -> None:
        """Set the components of counts apart: those that begin alike would long stay alike."""
        for categories, network in zip(self.kinds, cast(Any, self.networks), strict=True):
            if not categories:
                bias = network[-1].bias.zero_().view(3, self.components)
                bias[1] = torch.linspace(-1.0, 1.0, self.components) if self.components > 1 else 0.0

    def standardise(self, values: Tensor) -> None:
        """Set the centre and scale of counts from training data (n, m).

        Raises:
            ModalityError: for a value that is no category or count.
        """
        for i, categories in enumerate(self.kinds):
            rule = f"a category from 0 to {categories - 1}" if categories else "a count, a whole number >= 0"
            require(
                f"discrete entry {i} of x",
                values[:, i],
                _allowed(values[:, i], categories),
                rule,
                "correct discrete, or the simulator",
            )
            if not categories:
                logs = values[:, i].to(torch.float64).log1p()
                sd = float(logs.std()) if len(logs) > 1 else 0.0
                self.centre[i], self.scale[i] = float(logs.mean()), max(sd, 0.05)

    def forward(self, values: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """log p (n), −∞ for values that there are not, and the values as a network takes them (n, encoded)."""
        total, seen, known = values.new_zeros(len(values)), [theta], []
        for i, categories in enumerate(self.kinds):
            fine = _allowed(values[:, i], categories)
            value = torch.where(fine, values[:, i], 0.0)
            outputs = self.networks[i](torch.cat([*seen, *known], -1))
            if categories:
                index = value.long()[:, None]
                each = outputs.log_softmax(-1).gather(-1, index)[:, 0]
                known.append(nn.functional.one_hot(index[:, 0], categories).to(values.dtype))
            else:
                logits, raw, kappa = outputs.unflatten(-1, (3, self.components)).unbind(-2)
                log_mean = self.centre[i] + self.scale[i] * soft_cap(raw, 20.0)
                part = negative_binomial(value[:, None], log_mean, soft_cap(kappa - 2.0, _OVERDISPERSION))
                each = (logits.log_softmax(-1) + part).logsumexp(-1)
                known.append(((value.log1p() - self.centre[i]) / self.scale[i])[:, None])
            total = total + torch.where(fine, each, -math.inf)
        return total, torch.cat(known, -1)


def _allowed(value: Tensor, categories: int) -> Tensor:
    below = value < categories if categories else torch.isfinite(value)
    return (value >= 0) & below & (value == value.floor())


def negative_binomial(n: Tensor, log_mean: Tensor, kappa: Tensor) -> Tensor:
    """log p(n) in nats of counts n with mean m = e^log_mean and variance m (1 + e^kappa), entry by entry.

    Example:
        >>> n, log_mean = torch.tensor([0.0, 3.0]).double(), torch.tensor(3.0).double().log()
        >>> negative_binomial(n, log_mean, torch.tensor(-40.0).double())  # Poisson: −3, 3 log 3 − 3 − log 3!
        tensor([-3.0000, -1.4959], dtype=torch.float64)
        >>> negative_binomial(n, log_mean, torch.tensor(0.0).double()).exp()  # r = 3: 1/8, and 10/64
        tensor([0.1250, 0.1563], dtype=torch.float64)
    """
    mean, r = log_mean.exp(), (log_mean - kappa).exp()
    none = -r * torch.log1p(kappa.exp())  # (r / (r + m))^r, and m / r = e^κ
    some = n > 0
    count = torch.where(some, n, 1.0)
    matched = -0.5 * (LOG_2PI + count.log() + torch.log1p(count / r))
    matched = matched + _stirling_rest(r + count) - _stirling_rest(r) - _stirling_rest(count)
    excess = (mean - count) / count
    near = excess.abs() < 0.5  # else the two terms of the deviance round differently, a million times over
    log_ratio = torch.where(near, torch.log1p(torch.where(near, excess, 0.0)), log_mean - count.log())
    deviance = (r + count) * torch.log1p((count - mean) / (r + mean)) + count * log_ratio
    return torch.where(some, matched + deviance, none)


def _stirling_rest(z: Tensor) -> Tensor:
    """δ(z) = log Γ(z) − (z − ½) log z + z − ½ log 2π for z > 0."""
    large = z > 10.0
    big, small = torch.where(large, z, 20.0), torch.where(large, 1.0, z)
    inverse = big.square().reciprocal()
    series = (1.0 / 12.0 - inverse * (1.0 / 360.0 - inverse * (1.0 / 1260.0 - inverse / 1680.0))) / big
    exact = torch.lgamma(small) - (small - 0.5) * small.log() + small - 0.5 * LOG_2PI
    return torch.where(large, series, exact)
