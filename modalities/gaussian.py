r"""Measurements with Gaussian errors, :math:`x \sim \mathcal{N}(m(\theta), C)`.

.. math:: \log p(x \mid \theta) = -\tfrac12 r^T C^{-1} r - \tfrac12 \log\det C - \tfrac{D}{2} \log 2\pi,
    \qquad r = x - m(\theta)

The expected information is :math:`J^T C^{-1} J` with :math:`J = \partial m / \partial\theta`, plus
:math:`\tfrac12 \mathrm{tr}(C^{-1} \partial_a C\, C^{-1} \partial_b C)` where C depends on θ.

References:
    | Tegmark, Taylor, Heavens (1997), Karhunen-Loeve eigenvalue problems in cosmology, eq. 15
    | https://arxiv.org/abs/astro-ph/9603021
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.errors import ModalityError
from engine.modality import Modality
from modalities._densities import LOG_2PI, cholesky, whiten, whitening
from modalities._predictor import Function, Predictor, check_function, event_size, jacobian
from modalities._tensors import Exact, Numbers, check_covariance, own_generator, per_entry

__all__ = ["Gaussian"]

_KEPT = 2**22  # numbers that are kept for one block of data


class Gaussian(Exact, Modality):
    """Evidence from values with Gaussian errors, independent or correlated.

    Arguments:
        mean: The expected data, a function or ``nn.Module`` called as ``mean(theta, **inputs)`` with θ of
            shape (*batch, P_m), returning (*batch, D); None for θ itself, so that D = P_m. With None or an
            ``nn.Linear`` and known errors s is a concave quadratic form, whose derivatives are written down.
        parameter_names: The components of θ, in the order the functions index them.
        covariance: A symmetric positive definite matrix (D, D), or a function called like ``mean`` that
            returns (*batch, D, D).
        sd: Instead of ``covariance``, the standard deviations of independent entries, in the units of x:
            one number, (D,), or a function called like ``mean`` that returns (*batch, D).
        inputs: Known quantities that the functions need, name -> numbers.
        event_shape: (D,), or () for scalar data, where D = 1; needed where nothing else says D.
        missing: Whether NaN in x marks entries that were not measured; the marginal density of the others
            is scored, 0 where there are none.

    Where a function's covariance is not positive definite, or its sd not positive, the evidence is −∞.

    Raises:
        ModalityError: for arguments that break a rule above; when evaluated, for a function that returns
            another shape.

    Example:
        >>> def line(theta, t):
        ...     return theta[..., :1] + theta[..., 1:] * t
        >>> gaussian = Gaussian(line, parameter_names=("offset", "slope"), sd=0.5, inputs={"t": [0.0, 1.0]},
        ...                     event_shape=(2,))
        >>> round(gaussian(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 1.0])).item(), 9)
        -0.951582705
        >>> gaussian.expected_information(torch.tensor([1.0, 1.0])).tolist()
        [[8.0, 4.0], [4.0, 4.0]]
    """

    normalised = True

    mean: Predictor
    sd: Tensor | Predictor
    covariance: Tensor | Predictor
    factor: Tensor
    whitener: Tensor

    def __init__(
        self,
        mean: Function | None = None,
        *,
        parameter_names: Sequence[str],
        covariance: Numbers | Function | None = None,
        sd: Numbers | Function | None = None,
        inputs: Mapping[str, Numbers] | None = None,
        event_shape: Sequence[int] | None = None,
        missing: bool = False,
    ) -> None:
        super().__init__(parameter_names=parameter_names)
        errors, name = (sd, "sd") if covariance is None else (covariance, "covariance")
        if errors is None or (covariance is not None and sd is not None):
            given = "neither" if errors is None else "both"
            raise ModalityError(
                f"exactly one of covariance and sd must be given, got {given}; sd is for independent errors"
            )
        if isinstance(errors, str):
            check_function(name, errors)
        size = event_size("mean", mean, len(self.parameter_names), event_shape, {name: errors})
        self.event_shape = torch.Size((size,) if event_shape is None else event_shape)
        self.allows_missing = missing
        self._diagonal, self._varies = covariance is None, callable(errors)
        self.mean = Predictor("mean", mean, (size,), None if mean is None and self._varies else inputs)
        if callable(errors):
            setattr(self, name, Predictor(name, errors, (size,) if self._diagonal else (size, size), inputs))
        elif self._diagonal:
            self.register_buffer("sd", per_entry("sd", errors, size), persistent=False)
        else:
            self.register_buffer("covariance", check_covariance("covariance", errors, size), persistent=False)
            self.register_buffer("factor", torch.linalg.cholesky(self.covariance), persistent=False)
            self.register_buffer("whitener", whitening(self.factor), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """float64, whatever the dtype of a mean with weights."""
        return torch.float64

    @property
    def concave(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the mean is affine in θ and the errors are known: s is a quadratic form then."""
        return self._affine and not self._varies

    @property
    def _affine(self) -> bool:
        """Whether the mean is θ itself, or an ``nn.Linear`` of it."""
        return self.mean.function is None or type(self.mean.function) is nn.Linear

    @property
    def has_derivatives(self) -> bool:
        """Whether s is a quadratic form of θ; with a function inside, no closed form is faster than differentiation."""
        quadratic = self._affine and not self._varies
        return super().has_derivatives and (quadratic or type(self).derivatives is not Gaussian.derivatives)

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """log p(x | θ) in nats: x (*batch, *event_shape), θ (*batch, P_m) -> (*batch)."""
        x = x.to(torch.float64) if self.event_shape else x.to(torch.float64)[..., None]
        mean = self.mean(theta)
        overflow = mean.isinf()  # infinitely far from any data, but whitened it would be NaN
        mean = torch.where(overflow, 0.0, mean)
        if self.allows_missing:
            measured = ~x.isnan()
            residual = torch.where(measured, torch.where(measured, x, 0.0) - mean, 0.0)
            value = self._log_density(residual, theta, measured, measured.sum(-1, dtype=torch.float64))
        else:
            value = self._log_density(x - mean, theta, None, x.shape[-1])
        return torch.where(overflow.any(-1), -math.inf, value)

    def _log_density(self, residual: Tensor, theta: Tensor, measured: Tensor | None, count: int | Tensor) -> Tensor:
        if self._diagonal:
            sd, valid = self._sd(theta)
            z = residual / sd
            log_sd = sd.log() if measured is None else torch.where(measured, sd.log(), 0.0)
            half_log_det = log_sd.sum(-1)
        else:
            _, whitener, valid = self._factors(theta, measured)
            z = whiten(whitener, residual)
            half_log_det = -whitener.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = -0.5 * z.square().sum(-1) - half_log_det - 0.5 * LOG_2PI * count
        return value if valid is None else torch.where(valid, value, -math.inf)

    def _sd(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Standard deviations, broadcasting to (*batch, D), and for which θ they are such (None: all)."""
        if not isinstance(self.sd, Predictor):
            return self.sd, None
        sd = self.sd(theta)
        return torch.where(sd <= 0, 1.0, sd), ~(sd <= 0).any(-1)

    def _factors(self, theta: Tensor, measured: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The Cholesky factor, its inverse, and for which θ they exist (None: all)."""
        if isinstance(self.covariance, Predictor):
            covariance = self.covariance(theta)
        elif measured is None:
            return self.factor, self.whitener, None
        else:
            covariance = self.covariance
        if measured is not None:  # the marginal: unit variance and no correlation adds nothing to a zero residual
            both = measured[..., :, None] & measured[..., None, :]
            identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
            covariance = torch.where(both, covariance, identity)
        factor, valid = cholesky(covariance)
        return factor, whitening(factor), valid

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of data with missing entries, the whitener and the precision of the others (*batch, D, D), and s at x = θ (*batch).

        Nothing for data so large that they would take more than 64 MB, nor without missing entries.
        """
        if not self.allows_missing or x.numel() * self.mean.shape[0] > _KEPT:
            return ()
        return self._marginal(x if self.event_shape else x[..., None])

    def _marginal(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        measured = ~x.isnan()
        if self._diagonal:
            sd, _ = self._sd(x)
            whitener = torch.diag_embed(torch.where(measured, sd.reciprocal(), 0.0))
            half_log_det = torch.where(measured, sd.log(), 0.0).sum(-1)
        else:
            _, whitener, _ = self._factors(x, measured)
            half_log_det = -whitener.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            whitener = whitener * measured[..., None, :]
        peak = -half_log_det - 0.5 * LOG_2PI * measured.sum(-1, dtype=torch.float64)
        return whitener, whitener.mT @ whitener, peak

    @torch.no_grad()
    def derivatives(self, x: Tensor, theta: Tensor, *prepared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s, W'C⁻¹r and W'C⁻¹W, where the mean is Wθ + c and C does not depend on θ.

        Arguments:
            x: Observations, shape (*batch, *event_shape).
            theta: Values of :attr:`parameter_names`, shape (*batch, P_m).
            prepared: What :meth:`prepare` returned for x.
        """
        theta, x = theta.to(torch.float64), x.to(torch.float64) if self.event_shape else x.to(torch.float64)[..., None]
        residual = x - self.mean(theta)
        if self.allows_missing:
            whitener, precision, peak = prepared or self._marginal(x)
            z = whiten(whitener, torch.where(x.isnan(), 0.0, residual))
            return peak - 0.5 * z.square().sum(-1), *self._pulled_back(whiten(whitener.mT, z), precision)
        if self._diagonal:
            sd = self._sd(theta)[0]
            z = residual / sd
            value = -0.5 * z.square().sum(-1) - sd.log().sum(-1) - 0.5 * LOG_2PI * x.shape[-1]
            return value, *self._pulled_back(z / sd, sd**-2)
        value = self._log_density(residual, theta, None, x.shape[-1])
        precision = self.whitener.mT @ self.whitener
        return value, *self._pulled_back(whiten(precision, residual), precision)

    def _pulled_back(self, slope: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
        """From the mean (*batch, D) and its precision, a matrix or a diagonal, to θ."""
        diagonal = precision.dim() == 1
        if self.mean.function is None:
            return slope, torch.diag_embed(precision) if diagonal else precision
        W = self.mean.function.weight.to(torch.float64)  # pyright: ignore[reportFunctionMemberAccess]
        return slope @ W, W.mT @ (precision[:, None] * W if diagonal else precision @ W)

    @torch.no_grad()
    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One complete observation for each θ: (*batch, P_m) -> (*batch, *event_shape).

        Raises:
            ModalityError: where θ gives no covariance.
        """
        mean = self.mean(theta)
        noise = torch.randn(mean.shape, generator=own_generator(generator), dtype=mean.dtype, device=mean.device)
        if self._diagonal:
            sd, valid = self._sd(theta)
            noise = sd * noise
        else:
            factor, _, valid = self._factors(theta)
            noise = whiten(factor, noise)
        if valid is not None and not bool(valid.all()):
            at = theta[~valid][0].tolist()
            rule = "sd must be > 0" if self._diagonal else "covariance must be positive definite"
            raise ModalityError(f"{rule} to simulate, got one that is not at θ = {at}; keep the prior where it is")
        return mean + noise if self.event_shape else (mean + noise)[..., 0]

    def expected_information(self, theta: Tensor, measured: Tensor | None = None) -> Tensor:
        """The expected information of one observation: (*batch, P_m) -> (*batch, P_m, P_m).

        Only ``measured`` entries (event_shape, boolean; all by default) count. NaN where θ gives no covariance.
        """
        slope = jacobian(self.mean, theta)  # (*batch, D, P_m)
        there = None if measured is None else measured.reshape(-1)
        if there is not None:
            slope = slope * there[:, None]
        if self._diagonal:
            sd, valid = self._sd(theta)
            slope = slope / sd[..., None]
            information = slope.mT @ slope
            if isinstance(self.sd, Predictor):
                relative = jacobian(self.sd, theta) / sd[..., None]
                relative = relative if there is None else relative * there[:, None]
                information = information + 2.0 * relative.mT @ relative
        else:
            _, whitener, valid = self._factors(theta, there)
            slope = whitener @ slope
            information = slope.mT @ slope
            if isinstance(self.covariance, Predictor):
                change = jacobian(self.covariance, theta)  # (*batch, D, D, P_m)
                if there is not None:
                    change = change * (there[:, None] & there)[..., None]
                change = torch.einsum("...ij,...jkp,...lk->...ilp", whitener, change, whitener).flatten(-3, -2)
                information = information + 0.5 * change.mT @ change
        return information if valid is None else torch.where(valid[..., None, None], information, math.nan)

    def stack_key(self) -> Hashable | None:
        """Its kind of errors where nothing but tensors is inside; None with a function of θ."""
        if self.mean.function is not None or self._varies:
            return None
        return tuple(self.event_shape), self._diagonal, self.allows_missing
