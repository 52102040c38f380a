r"""Probabilities of whole numbers given θ, one after the other: categories, counts, and counts out of a number.

A count is a mixture of negative binomials, :math:`\mathrm{Var}\, n = m (1 + e^\kappa)` each, that reaches the Poisson
law as κ falls. With r = m e^−κ,

.. math:: \log p(n) = (r + n) \log\frac{r + n}{r + m} + n \log\frac{m}{n}
    - \tfrac12 \log 2\pi n (1 + n / r) + \delta(r + n) - \delta(r) - \delta(n),

δ what Stirling's formula leaves of log Γ: no two terms of the size of n log n or r log r cancel. A count out of a
number is a mixture of binomials, each written around n / N for the same reason.

References:
    | Cameron and Trivedi (2013), Regression analysis of count data, 2nd edition, Cambridge, section 3.3
    | Boelts, Lueckmann, Gao, Macke (2022), Flexible and efficient simulation-based inference for models of
      decision-making, https://doi.org/10.7554/eLife.77220: mixed data as discrete, then continuous
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from engine.errors import ModalityError
from modalities._densities import LOG_2PI
from modalities._networks import check_hidden, mlp, redraw, soft_cap
from modalities._tensors import require

__all__ = ["DiscreteChain", "Entries", "Kind", "binomial", "check_discrete", "negative_binomial"]

_OVERDISPERSION = 10.0  # |κ| below it: a variance within 5e-5 of a Poisson law's, or 20,000 times it


class Kind(NamedTuple):
    """What a discrete entry is: "category" with the number of them, "binomial" with that of trials, or "count" with 0."""

    law: str
    size: int = 0

    @property
    def most(self) -> float:
        """The largest value there is."""
        return {"category": self.size - 1, "binomial": self.size, "count": math.inf}[self.law]

    @property
    def text(self) -> int | str:
        """As it is asked for."""
        return {"category": self.size, "binomial": f"binomial {self.size}", "count": "count"}[self.law]

    @property
    def rule(self) -> str:
        """What its values must be."""
        if self.law == "count":
            return "a count, a whole number >= 0"
        what = "a category" if self.law == "category" else "a count"
        return f"{what} from 0 to {int(self.most)}"

    def allows(self, value: Tensor) -> Tensor:
        """Entry by entry, whether there is such a value."""
        return (value >= 0) & (value <= self.most) & value.isfinite() & (value == value.floor())


def check_discrete(discrete: object, entries: int) -> dict[int, Kind]:
    """Which entries are discrete, and what they are, in the order of the entries.

    Raises:
        ModalityError: for anything else than {index: number of categories >= 2, "count" or "binomial N"}.
    """
    if isinstance(discrete, Sequence) and not isinstance(discrete, str) and not discrete:
        return {}
    if not isinstance(discrete, Mapping):
        raise ModalityError(f"discrete must be a mapping, got {discrete!r}; write {{0: 3, 2: 'count'}}")
    kinds: dict[int, Kind] = {}
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
        kinds[index] = _kind(index, kind)
    return dict(sorted(kinds.items()))


def _kind(index: int, kind: object) -> Kind:
    if kind == "count":
        return Kind("count")
    if isinstance(kind, int) and not isinstance(kind, bool) and kind >= 2:
        return Kind("category", int(kind))
    if isinstance(kind, str) and (found := re.fullmatch(r"binomial ([1-9]\d{0,8})", kind)):
        return Kind("binomial", int(found[1]))
    raise ModalityError(
        f"discrete[{index}] must be a number of categories >= 2, 'count', or 'binomial N' for a count out of N, got {kind!r}"
    )


class Entries(constraints.Constraint):
    """The values that entries of x may take, where some of them are categories or counts."""

    event_dim = 0

    def __init__(self, kinds: Mapping[int, Kind], event_shape: Sequence[int]) -> None:
        limit = torch.full((math.prod(event_shape),), math.nan, dtype=torch.float64)
        for index, kind in kinds.items():
            limit[index] = kind.most
        self.limit = limit.reshape(tuple(event_shape))
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each entry of value (*, *event_shape) is allowed."""
        limit = self.limit.to(value.device)
        return (limit.isnan() & value.isfinite()) | ((value >= 0) & (value <= limit) & (value == value.floor()))


class DiscreteChain(nn.Module):
    """log p(d | θ) = Σ_i log p(d_i | d_<i, θ) of discrete entries."""

    centre: Tensor
    scale: Tensor

    def __init__(
        self, kinds: Sequence[Kind], context: int, hidden: Sequence[int], components: int, activation: str
    ) -> None:
        super().__init__()
        self.kinds, self.components = tuple(kinds), components
        self.register_buffer("centre", torch.zeros(len(self.kinds)))  # of log(1 + n), or of the logit of n / N
        self.register_buffer("scale", torch.ones(len(self.kinds)))
        self.networks, seen = nn.ModuleList(), context
        for law, size in self.kinds:
            outputs = {"category": size, "binomial": 2 * components, "count": 3 * components}[law]
            self.networks.append(mlp(seen, check_hidden("hidden", hidden), outputs, activation))
            seen += size if law == "category" else 1
        self.encoded = seen - context
        self._spread()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        redraw(self.networks)
        self._spread()

    @torch.no_grad()
    def _spread(self) -> None:
        """Set the components of counts apart: those that begin alike would long stay alike."""
        for kind, network in zip(self.kinds, cast(Any, self.networks), strict=True):
            if kind.law != "category":
                bias = network[-1].bias.zero_().view(-1, self.components)
                bias[1] = torch.linspace(-1.0, 1.0, self.components) if self.components > 1 else 0.0

    def standardise(self, values: Tensor) -> None:
        """Set the centre and scale of counts from training data (n, m).

        Raises:
            ModalityError: for a value that is no category or count.
        """
        for i, kind in enumerate(self.kinds):
            column = values[:, i]
            require(
                f"discrete entry {i} of x", column, kind.allows(column), kind.rule, "correct discrete, or the simulator"
            )
            if kind.law != "category":
                coded = _coded(kind, column.to(torch.float64))
                sd = float(coded.std()) if len(coded) > 1 else 0.0
                self.centre[i], self.scale[i] = float(coded.mean()), max(sd, 0.05)

    def forward(self, values: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """log p (n), −∞ for values that there are not, and the values as a network takes them (n, encoded)."""
        total, seen, known = values.new_zeros(len(values)), [theta], []
        for i, kind in enumerate(self.kinds):
            fine = kind.allows(values[:, i])
            value = torch.where(fine, values[:, i], 0.0)
            outputs = self.networks[i](torch.cat([*seen, *known], -1))
            if kind.law == "category":
                index = value.long()[:, None]
                each = outputs.log_softmax(-1).gather(-1, index)[:, 0]
                known.append(nn.functional.one_hot(index[:, 0], kind.size).to(values.dtype))
            else:
                logits, raw, *shape = outputs.unflatten(-1, (-1, self.components)).unbind(-2)
                place = self.centre[i] + self.scale[i] * soft_cap(raw, 20.0)
                if kind.law == "binomial":
                    part = binomial(value[:, None], kind.size, place)
                else:
                    part = negative_binomial(value[:, None], place, soft_cap(shape[0] - 2.0, _OVERDISPERSION))
                each = (logits.log_softmax(-1) + part).logsumexp(-1)
                known.append(((_coded(kind, value) - self.centre[i]) / self.scale[i])[:, None])
            total = total + torch.where(fine, each, -math.inf)
        return total, torch.cat(known, -1)


def _coded(kind: Kind, value: Tensor) -> Tensor:
    """A count as a network is given it: log(1 + n), or the logit of (n + ½) / (N + 1)."""
    if kind.law == "count":
        return value.log1p()
    return (value + 0.5).log() - (kind.size - value + 0.5).log()


def binomial(n: Tensor, trials: int, logit: Tensor) -> Tensor:
    """log p(n) in nats of counts n out of a number of trials, each with the log-odds given, entry by entry.

    Example:
        >>> n, logit = torch.tensor([0.0, 2.0]).double(), torch.tensor(0.5).double().log()
        >>> binomial(n, 3, logit).exp()  # p = 1/3: (2/3)³ and 3 (1/3)² (2/3)
        tensor([0.2963, 0.2222], dtype=torch.float64)
    """
    exact = n.to(torch.float64)
    share = exact / trials
    peak = torch.lgamma(torch.tensor(trials + 1.0, dtype=torch.float64)) - torch.lgamma(exact + 1.0)
    peak = (
        peak - torch.lgamma(trials - exact + 1.0) + torch.xlogy(exact, share) + torch.xlogy(trials - exact, 1.0 - share)
    )
    hit = torch.where(n > 0, nn.functional.logsigmoid(logit) - share.clamp(min=0.5 / trials).log().to(n.dtype), 0.0)
    miss = torch.where(
        n < trials, nn.functional.logsigmoid(-logit) - (1.0 - share).clamp(min=0.5 / trials).log().to(n.dtype), 0.0
    )
    return peak.to(n.dtype) + n * hit + (trials - n) * miss


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
