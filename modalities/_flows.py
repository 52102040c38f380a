r"""Conditional densities of a few numbers, smooth in what they are conditional on.

``"mixture"`` is written here: one-dimensional conditional mixtures, each number given those before it,

.. math:: q(x \mid c) = \prod_i \sum_k w_{ik}\, N(x_i;\, \mu_{ik}, \sigma_{ik}^2), \qquad
    w, \mu, \sigma = \text{functions of } x_{<i} \text{ and } c

optionally each Gaussian cut off at the ends of an interval, where the density stays finite and positive. The others
are zuko's flows. Of its MAF the affine step is replaced by one whose logarithm is capped by a hyperbolic tangent:
zuko's own, s / (1 + |s| / c), has a second derivative that jumps at 0.

References:
    | Germain, Gregor, Murray, Larochelle (2015), MADE, https://arxiv.org/abs/1502.03509: the masked network
    | Uria, Murray, Larochelle (2013), RNADE, https://arxiv.org/abs/1306.0186: the conditional mixtures
    | Papamakarios, Pavlakou, Murray (2017), Masked autoregressive flow, https://arxiv.org/abs/1705.07057
    | Ramasinghe et al. (2021), Robust normalizing flows using Bernstein-type polynomials,
      https://arxiv.org/abs/2102.03509
    | Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows, https://arxiv.org/abs/1906.04032
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from engine.errors import ModalityError
from modalities._densities import LOG_2PI
from modalities._networks import activation_of, check_choice, check_count, check_hidden, redraw, soft_cap

__all__ = ["FLOWS", "AutoregressiveMixture", "ZukoDensity", "conditional_density", "log_normal_mass"]

#: What :func:`conditional_density` builds.
FLOWS = ("mixture", "maf", "bpf", "nsf")

_LOG_SCALE = 8.0  # of a mixture's Gaussian, whose sd is between e^−8 and e^8
_LOG_SLOPE = 7.0  # of one affine step


def conditional_density(
    flow: str, size: int, context: int, transforms: int, hidden: Sequence[int], components: int, activation: str
) -> nn.Module:
    """A module called with values (*, size) and a context (*, context) that returns log densities (*).

    Raises:
        ModalityError: for a flow, a count or an activation that there is not.
    """
    check_choice("flow", flow, FLOWS, "'mixture' and 'maf' are smooth, 'bpf' nearly, 'nsf' is not")
    if flow == "mixture" or (flow == "maf" and size == 1):  # an affine step of one number is a Gaussian
        return AutoregressiveMixture(size, context, components, hidden, activation)
    return ZukoDensity(flow, size, context, transforms, hidden, activation)


class AutoregressiveMixture(nn.Module):
    """Mixtures of Gaussians of each number given those before it, cut off at the ends of a box where one is given."""

    def __init__(self, size: int, context: int, components: int, hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        self.components = check_count("components", components)
        masked = _zuko().nn.MaskedMLP
        earlier = torch.ones(size, size, dtype=torch.bool).tril(-1)
        seen = torch.cat([earlier, torch.ones(size, context, dtype=torch.bool)], 1)
        self.network = masked(
            seen.repeat_interleave(3 * components, 0), check_hidden("hidden", hidden), activation_of(activation)
        )
        self._spread()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        redraw(self.network)
        self._spread()

    @torch.no_grad()
    def _spread(self) -> None:
        """Set the components apart: those that begin alike would long stay alike."""
        bias = self.network[-1].bias.zero_().view(-1, 3, self.components)
        bias[:, 1] = torch.linspace(-1.5, 1.5, self.components) if self.components > 1 else 0.0
        bias[:, 2] = -0.5

    def forward(self, value: Tensor, context: Tensor, box: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """log q(value | context): (*, D) and (*, C) -> (*); box has the ends of D intervals, which may be infinite."""
        outputs = self.network(torch.cat([value, context], -1))
        logits, mean, raw = outputs.unflatten(-1, (value.shape[-1], 3, self.components)).unbind(-2)
        log_sd = soft_cap(raw, _LOG_SCALE)
        z = (value[..., None] - mean) * (-log_sd).exp()
        each = logits.log_softmax(-1) - 0.5 * z.square() - log_sd
        if box is not None:
            low, high = (end.clamp(-1e4, 1e4)[:, None] for end in box)
            each = each - log_normal_mass((low - mean) * (-log_sd).exp(), (high - mean) * (-log_sd).exp())
        return each.logsumexp(-1).sum(-1) - 0.5 * LOG_2PI * value.shape[-1]


def log_normal_mass(low: Tensor, high: Tensor) -> Tensor:
    """log(Φ(high) − Φ(low)) for low < high, exact far out on either side.

    Example:
        >>> low, high = torch.tensor([-1.0, 30.0]).double(), torch.tensor([1.0, 31.0]).double()
        >>> log_normal_mass(low, high)
        tensor([-3.8172e-01, -4.5432e+02], dtype=torch.float64)
    """
    right = low + high > 0  # on the right both Φ are near 1: look at it from the other side
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    top, bottom = _log_ndtr(high), _log_ndtr(low)
    gap = (top - bottom).clamp_min(1e-12)
    return top + torch.log(-torch.expm1(-gap))


def _log_ndtr(x: Tensor) -> Tensor:
    """log Φ(x), far on the left by Mills' ratio as a series, where torch's derivatives lose all digits."""
    far = x < -12.0
    away = torch.where(far, x, -20.0)
    inverse, series = away.square().reciprocal(), torch.ones_like(away)
    for odd in (15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = 1.0 - odd * inverse * series
    tail = series.log() - 0.5 * away.square() - (-away).log() - 0.5 * LOG_2PI
    return torch.where(far, tail, torch.special.log_ndtr(torch.where(far, 0.0, x)))


class ZukoDensity(nn.Module):
    """One of zuko's autoregressive flows with a standard normal base."""

    def __init__(
        self, flow: str, size: int, context: int, transforms: int, hidden: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        flows = _zuko().flows
        shared = {
            "transforms": check_count("transforms", transforms),
            "hidden_features": check_hidden("hidden", hidden),
            "activation": activation_of(activation),
        }
        if flow == "maf":
            built = flows.MAF(size, context, univariate=SmoothAffine, shapes=[(), ()], **shared)
        else:
            built = {"bpf": flows.BPF, "nsf": flows.NSF}[flow](size, context, **shared)
        self.transform = built.transform

    def forward(self, value: Tensor, context: Tensor) -> Tensor:
        """log q(value | context): (*, D) and (*, C) -> (*)."""
        z, log_slope = self.transform(context).call_and_ladj(value)
        return log_slope - 0.5 * z.square().sum(-1) - 0.5 * LOG_2PI * value.shape[-1]


class SmoothAffine(Transform):
    """x e^a + b, with |a| < 7 by a hyperbolic tangent, so that it has every derivative."""

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = 1  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.shift, self.log_scale = shift, soft_cap(scale, _LOG_SLOPE)

    def _call(self, x: Tensor) -> Tensor:
        return x * self.log_scale.exp() + self.shift

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.shift) * (-self.log_scale).exp()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """a, whatever x and y are."""
        return self.log_scale.expand(x.shape)


def _zuko() -> Any:
    validates = Distribution._validate_args  # which zuko switches off for everybody
    try:
        import zuko.flows
        import zuko.nn
    except ImportError as error:
        raise ModalityError(
            f"flows need the package zuko, which cannot be imported: {error}; pip install zuko"
        ) from error
    finally:
        Distribution.set_default_validate_args(validates)
    return zuko
