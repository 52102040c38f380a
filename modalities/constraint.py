r"""Auxiliary measurements of the parameters themselves: what constrains a nuisance.

.. math:: x \sim \mathcal{N}(\theta, \sigma) \qquad \log x \sim \mathcal{N}(\log\theta, \sigma)
    \qquad x \sim \mathrm{Poisson}(\tau\theta)

The observation is the nominal value that the auxiliary measurement gave (0 for a standardised nuisance, τ for
the Poisson kind), one for a whole analysis: a nuisance that several plugins share is constrained once.

References:
    | Cranmer, Lewis, Moneta, Shibata, Verkerke (2012), HistFactory, section 4, CERN-OPEN-2012-016
    | https://cds.cern.ch/record/1456844
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from engine.errors import ModalityError
from engine.modality import Modality
from modalities._densities import (
    LOG_2PI,
    poisson_constant,
    poisson_derivatives,
    poisson_log_density,
    whiten,
    whitening,
)
from modalities._tensors import Exact, Numbers, check_covariance, own_generator, per_entry, require

__all__ = ["Constraint"]


class Constraint(Exact, Modality):
    """Evidence from auxiliary measurements x of the parameters, event shape (P_m,).

    Arguments:
        parameter_names: The parameters that are constrained; one name may be given as text.
        kind: "normal" (x of any sign), "lognormal" (x > 0, density in x) or "poisson" (real x >= 0).
        sd: σ > 0 of "normal", in the units of θ, or of log x for "lognormal", one number or (P_m,); 1 where
            left out.
        covariance: Instead of ``sd``, the covariance (P_m, P_m) of "normal" measurements that are correlated.
        scale: τ > 0 of "poisson", the counts expected at θ = 1, one number or (P_m,); 1 where left out.

    Where θ <= 0 for "lognormal", or θ < 0 for "poisson", the evidence is −∞.

    Raises:
        ModalityError: for an unknown kind, an argument that its kind does not have, or a bad value.

    Example:
        >>> constraint = Constraint("alpha")
        >>> [round(v, 9) for v in constraint(torch.tensor([0.0]), torch.tensor([[0.0], [1.0]])).tolist()]
        [-0.918938533, -1.418938533]
        >>> Constraint(["g1", "g2"], kind="poisson", scale=[100.0, 25.0]).expected_information(torch.ones(2)).tolist()
        [[100.0, 0.0], [0.0, 25.0]]
    """

    normalised = True
    auxiliary = True

    sd: Tensor
    covariance: Tensor
    factor: Tensor
    whitener: Tensor
    scale: Tensor

    def __init__(
        self,
        parameter_names: str | Sequence[str],
        kind: str = "normal",
        sd: Numbers | None = None,
        covariance: Numbers | None = None,
        scale: Numbers | None = None,
    ) -> None:
        names = (parameter_names,) if isinstance(parameter_names, str) else parameter_names
        super().__init__(parameter_names=names, event_shape=(len(names),))
        takes = {"normal": ("sd", "covariance"), "lognormal": ("sd",), "poisson": ("scale",)}
        if kind not in takes:
            raise ModalityError(f"kind must be one of {', '.join(takes)}, got {kind!r}; choose how x is distributed")
        for name, value in {"sd": sd, "covariance": covariance, "scale": scale}.items():
            if value is not None and name not in takes[kind]:
                raise ModalityError(
                    f"{name} must be left out of kind {kind!r}, got it; that takes {' or '.join(takes[kind])}"
                )
        if sd is not None and covariance is not None:
            raise ModalityError("only one of sd and covariance must be given, got both; drop sd")
        self.kind, self._correlated = kind, covariance is not None
        if covariance is not None:
            self.register_buffer("covariance", check_covariance("covariance", covariance, len(names)), persistent=False)
            self.register_buffer("factor", torch.linalg.cholesky(self.covariance), persistent=False)
            self.register_buffer("whitener", whitening(self.factor), persistent=False)
        elif kind == "poisson":
            self.register_buffer(
                "scale", per_entry("scale", 1.0 if scale is None else scale, len(names)), persistent=False
            )
            self.support, self.support_rule = constraints.nonnegative, "auxiliary counts must be >= 0"
            self.support_advice = "a measurement of either sign belongs in kind 'normal'"
        else:
            self.register_buffer("sd", per_entry("sd", 1.0 if sd is None else sd, len(names)), persistent=False)
        if kind == "lognormal":
            self.support, self.support_rule = constraints.positive, "values must be > 0"
            self.support_advice = "a measurement of either sign belongs in kind 'normal'"

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """log p(x | θ) in nats: x (*batch, P_m), θ (*batch, P_m) -> (*batch)."""
        x, theta = x.to(torch.float64), theta.to(torch.float64)
        if self.kind == "poisson":
            return poisson_log_density(x, self.scale * theta).sum(-1)
        if self._correlated:
            half_log_det = -self.whitener.diagonal().log().sum()
            z = whiten(self.whitener, x - theta)
            return -0.5 * z.square().sum(-1) - half_log_det - 0.5 * LOG_2PI * x.shape[-1]
        if self.kind == "normal":
            return (-0.5 * ((x - theta) / self.sd).square() - self.sd.log() - 0.5 * LOG_2PI).sum(-1)
        impossible = (theta <= 0) | (x <= 0)
        log_x, log_theta = (torch.where(impossible, 1.0, v).log() for v in torch.broadcast_tensors(x, theta))
        value = -0.5 * ((log_x - log_theta) / self.sd).square() - log_x - self.sd.log() - 0.5 * LOG_2PI
        return torch.where(impossible, -math.inf, value).sum(-1)

    @property
    def concave(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether its kind is "normal" or "poisson"; "lognormal" is concave in log θ instead."""
        return self.kind != "lognormal"

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """What a "poisson" scalar has of x alone: x (*batch, P_m) -> (*batch); nothing for the others."""
        return (poisson_constant(x.to(torch.float64)),) if self.kind == "poisson" else ()

    @torch.no_grad()
    def derivatives(self, x: Tensor, theta: Tensor, constant: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """s with C⁻¹ r and C⁻¹, or what the one-dimensional densities give entry by entry.

        Arguments:
            x: Auxiliary measurements, shape (*batch, P_m).
            theta: Values of :attr:`parameter_names`, shape (*batch, P_m).
            constant: What :meth:`prepare` returned for x.
        """
        x, theta = x.to(torch.float64), theta.to(torch.float64)
        if self.kind == "poisson":
            f, slope, curvature = poisson_derivatives(x, self.scale * theta)
            value = f.sum(-1) + (poisson_constant(x) if constant is None else constant)
            return value, self.scale * slope, torch.diag_embed(self.scale.square() * curvature)
        value = self.log_evidence(x, theta)
        if self.kind == "normal":
            precision = self.whitener.mT @ self.whitener if self._correlated else torch.diag_embed(self.sd**-2)
            return value, whiten(precision, x - theta), precision
        impossible = (theta <= 0) | (x <= 0)
        log_ratio = torch.where(impossible, 1.0, x).log() - torch.where(impossible, 1.0, theta).log()
        pull, inverse = log_ratio / self.sd.square(), torch.where(impossible, 0.0, 1.0 / theta)
        return value, pull * inverse, torch.diag_embed((self.sd**-2 + pull) * inverse.square())

    @torch.no_grad()
    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One set of auxiliary measurements for each θ: (*batch, P_m) -> (*batch, P_m).

        Raises:
            ModalityError: where θ is outside what its kind allows.
        """
        theta, generator = theta.to(torch.float64), own_generator(generator)
        if self.kind == "poisson":
            require("θ of a 'poisson' constraint", theta, theta >= 0, ">= 0", "bound the parameter's prior")
            return torch.poisson(self.scale * theta, generator=generator)
        noise = torch.randn(theta.shape, generator=generator, dtype=theta.dtype, device=theta.device)
        if self._correlated:
            return theta + whiten(self.factor, noise)
        if self.kind == "normal":
            return theta + self.sd * noise
        require("θ of a 'lognormal' constraint", theta, theta > 0, "> 0", "bound the parameter's prior")
        return theta * (self.sd * noise).exp()

    def expected_information(self, theta: Tensor) -> Tensor:
        """C⁻¹, diag(1 / (σθ)²) or diag(τ / θ): (*batch, P_m) -> (*batch, P_m, P_m)."""
        theta = theta.to(torch.float64)
        if self._correlated:
            return (self.whitener.mT @ self.whitener).expand(*theta.shape, theta.shape[-1])
        if self.kind == "poisson":
            return torch.diag_embed(self.scale / theta)
        scale = theta if self.kind == "lognormal" else torch.ones_like(theta)
        return torch.diag_embed((self.sd * scale) ** -2)

    def stack_key(self) -> Hashable | None:
        """Its kind, and whether its measurements are correlated."""
        return self.kind, self._correlated
