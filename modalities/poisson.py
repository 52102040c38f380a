r"""Counts in bins, :math:`n_b \sim \mathrm{Poisson}(\nu_b(\theta))`, with the modifiers of HistFactory.

.. math:: \nu_b(\theta) = \sum_s \Big(\prod_j \theta_{j}\Big)_{sb} \prod_p \eta_{sp}(\alpha_p)
    \Big(y_{sb} + \sum_p \Delta_{spb}(\alpha_p)\Big)

A sample s expects the nominal yields :math:`y_{sb}`. Free factors multiply them: the signal strength, ``scale``
(normfactor) and ``per_bin`` (shapesys, staterror). ``normalisation`` (normsys) multiplies by
:math:`\eta = h^{\alpha}` for α >= 0 and :math:`l^{-\alpha}` below, interpolation code 1; ``shape`` (histosys)
adds :math:`\alpha (h_b - y_b)` for α >= 0 and :math:`\alpha (y_b - l_b)` below, code 0. Both have a kink at
α = 0, where derivatives are those of the upper branch. What constrains α and the factors is another plugin, a
:class:`~modalities.Constraint`, registered once however many channels share the nuisance.

References:
    | Cranmer, Lewis, Moneta, Shibata, Verkerke (2012), HistFactory, sections 3 and 4, CERN-OPEN-2012-016
    | https://cds.cern.ch/record/1456844
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from engine.modality import Modality
from modalities._densities import poisson_constant, poisson_derivatives, poisson_log_density
from modalities._histfactory import affine_rate, compile_channel, layout
from modalities._predictor import jacobian
from modalities._rates import Rate
from modalities._tensors import Exact, Numbers, own_generator, require

__all__ = ["PoissonCounts"]

_KEPT = 2**18  # products of two slopes that are kept, where they are not more
_PIECE = 2**18  # entries that are worked on together


class PoissonCounts(Exact, Modality):
    """Evidence from counts in independent bins, event shape (bins,).

    The parameters are those named by the arguments, in the order of first mention: ``strength``, ``scale``,
    ``normalisation``, ``shape``, ``per_bin``. One name may have several roles.

    Arguments:
        signal: Events per bin expected at unit strength, shape (bins,); the sample "signal".
        background: Events per bin, shape (bins,), the sample "background"; or sample name -> events.
        strength: The parameter that multiplies the signal; None leaves its yield fixed. Not used
            without a signal, as in a control region.
        scale: Free factors: parameter -> the sample, or samples, that it multiplies.
        normalisation: Nuisance α -> {sample: (lo, hi)}, its factors at α = −1 and α = +1, positive.
        shape: Nuisance α -> {sample: (lo, hi)}, its yields at α = −1 and α = +1, each of shape (bins,).
        per_bin: Sample -> one parameter a bin that multiplies it, or several such sequences.

    Counts may be any real number >= 0, so that expected (Asimov) data can be scored. The evidence is −∞ where
    a rate is negative, or 0 in a bin that has counts.

    Raises:
        ModalityError: for no sample or no parameter, yields of another shape, a sample that does not exist,
            or a factor that is not positive; from ``simulate``, for a negative rate.

    Example:
        >>> counts = PoissonCounts(signal=[5.0, 9.0], background=[50.0, 40.0], strength="mu")
        >>> counts.rate(torch.tensor([1.0])).tolist()
        [55.0, 49.0]
        >>> [round(v, 9) for v in counts(torch.tensor([57.0, 49.0]), torch.tensor([[1.0], [2.0]])).tolist()]
        [-5.844406188, -6.62224479]
        >>> PoissonCounts(background={"top": [80.0], "qcd": [20.0]}, scale={"k_top": "top"},
        ...               normalisation={"lumi": {"top": (0.9, 1.1), "qcd": (0.8, 1.2)}}).parameter_names
        ('k_top', 'lumi')
    """

    normalised = True
    support = constraints.nonnegative
    support_rule = "counts must be >= 0"
    support_advice = "background-subtracted data belongs in a Gaussian modality"

    nominal: Tensor
    columns: Tensor
    log_hi: Tensor
    log_lo: Tensor
    shift_hi: Tensor
    shift_lo: Tensor
    offset: Tensor
    slope: Tensor
    products: Tensor

    def __init__(
        self,
        signal: Numbers | None = None,
        background: Numbers | Mapping[str, Numbers] | None = None,
        strength: str | None = "mu",
        *,
        scale: Mapping[str, str | Sequence[str]] | None = None,
        normalisation: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
        shape: Mapping[str, Mapping[str, Sequence[Numbers]]] | None = None,
        per_bin: Mapping[str, Sequence[str] | Sequence[Sequence[str]]] | None = None,
    ) -> None:
        channel = compile_channel(
            signal, background, strength, scale or {}, normalisation or {}, shape or {}, per_bin or {}
        )
        super().__init__(parameter_names=channel.names, event_shape=channel.nominal.shape[1:])
        self._normalised_samples, self._shaped = channel.log_factors is not None, channel.shifts is not None
        self.register_buffer("nominal", channel.nominal, persistent=False)
        self.register_buffer("columns", channel.columns, persistent=False)
        if channel.log_factors is not None:
            self.register_buffer("log_hi", channel.log_factors[0], persistent=False)
            self.register_buffer("log_lo", channel.log_factors[1], persistent=False)
        if channel.shifts is not None:
            self.register_buffer("shift_hi", channel.shifts[0], persistent=False)
            self.register_buffer("shift_lo", channel.shifts[1], persistent=False)
        affine, size = affine_rate(channel), channel.nominal.shape[1] * len(channel.names) ** 2
        self._affine, self._products = affine is not None, affine is not None and size <= _KEPT
        self._layout = layout(channel)
        if affine is not None:
            offset, slope = affine
            self.register_buffer("offset", offset, persistent=False)
            self.register_buffer("slope", slope, persistent=False)  # (P_m, bins)
            if self._products:
                products = (slope[:, None] * slope).flatten(0, 1)  # (P_m P_m, bins)
                self.register_buffer("products", products, persistent=False)

    @property
    def concave(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the rate is affine in θ: free factors that do not multiply each other, symmetric shapes."""
        return self._affine and self._own_rate

    @property
    def has_derivatives(self) -> bool:
        """Whether the rate is the one whose derivatives are known: not where a subclass writes another."""
        return super().has_derivatives and (self._own_rate or type(self).derivatives is not PoissonCounts.derivatives)

    @property
    def _own_rate(self) -> bool:
        return type(self).rate is PoissonCounts.rate and "rate" not in vars(self)

    def rate(self, theta: Tensor) -> Tensor:
        """The expected counts ν(θ): (*batch, P_m) -> (*batch, bins); negative where θ leaves the model."""
        theta = theta.to(torch.float64)
        above, below = torch.where(theta >= 0, theta, 0.0), torch.where(theta < 0, -theta, 0.0)
        yields = self.nominal
        if self._shaped:
            yields = yields + torch.einsum("...p,psb->...sb", above, self.shift_hi)
            yields = yields - torch.einsum("...p,psb->...sb", below, self.shift_lo)
        if self._normalised_samples:  # clamped: a rate that overflows has no gradient that is a number
            yields = yields * (above @ self.log_hi + below @ self.log_lo).clamp(max=600.0).exp()[..., None]
        factors = torch.cat([theta, torch.ones_like(theta[..., :1])], -1)
        for column in self.columns.unbind():
            yields = yields * factors[..., column]
        return yields.sum(-2)

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """log p(x | θ) in nats: x (*batch, bins), θ (*batch, P_m) -> (*batch)."""
        return poisson_log_density(x.to(torch.float64), self.rate(theta)).sum(-1)

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the scalar has of x alone, most of its cost: x (*batch, bins) -> (*batch)."""
        return (poisson_constant(x.to(torch.float64)),)

    @torch.no_grad()
    def derivatives(self, x: Tensor, theta: Tensor, constant: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """s, J w and Jᵀ diag(n/ν²) J − Σ_b w_b ∇²ν_b, where w = n/ν − 1 and J = ∂ν/∂θ.

        Arguments:
            x: Counts, shape (*batch, bins).
            theta: Values of :attr:`parameter_names`, shape (*batch, P_m).
            constant: What :meth:`prepare` returned for x.
        """
        x, theta = x.to(torch.float64), theta.to(torch.float64)
        constant = poisson_constant(x) if constant is None else constant
        value, score, information = (self._by_slope if self._affine else self._by_samples)(x, theta)
        return value + constant, score, information

    def _by_slope(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For an affine rate: J is constant, and so are the products of its rows."""
        P, bins = self.slope.shape
        rate = torch.addmm(self.offset, theta.reshape(-1, P), self.slope).reshape(*theta.shape[:-1], bins)
        f, w, curvature = poisson_derivatives(x, rate)
        if self._products:
            information = _rows(self.products, curvature).unflatten(-1, (P, P))
        else:
            information = torch.stack([_rows(self.slope, curvature * row) for row in self.slope], -2)
        return f.sum(-1), _rows(self.slope, w), information

    def _by_samples(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For any rate, in pieces: T points with N observations each."""
        (S, bins), P = self.nominal.shape, theta.shape[-1]
        batch = torch.broadcast_shapes(x.shape[:-1], theta.shape[:-1])
        shared = len(batch) > 0 and (theta.dim() == 1 or theta.shape[-2] == 1)
        N, lead = (batch[-1], batch[:-1]) if shared else (1, batch)
        theta = theta.squeeze(-2) if shared and theta.dim() > 1 else theta
        theta, x = theta.expand(*lead, P).reshape(-1, P), x.expand(*batch, bins).reshape(-1, N, bins)
        step = max(1, _PIECE // ((S * min(N, bins) + P) * bins))
        pieces = [self._piece(*part) for part in zip(x.split(step), theta.split(step), strict=True)]
        value, score, information = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return value.reshape(batch), score.reshape(*batch, P), information.reshape(*batch, P, P)

    def _piece(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (_, N, bins), P = x.shape, theta.shape[-1]
        logs = (self.log_hi, self.log_lo) if self._normalised_samples else None
        shifts = (self.shift_hi, self.shift_lo) if self._shaped else None
        rate = Rate(theta, self.nominal, self.columns, logs, shifts, self._layout.flat, self._layout.shaped)
        f, w, curvature = poisson_derivatives(x, rate.value[:, None])
        slope = rate.slope[:, None]  # (T, 1, P, bins)
        if N <= P:
            information = (slope * curvature[:, :, None]) @ slope.mT
        else:
            products = (slope.mT[..., None] * slope.mT[..., None, :]).flatten(-2)[:, 0]  # (T, bins, P P)
            information = (curvature @ products).unflatten(-1, (P, P))
        if bins >= N:
            bend = rate.bend(w)
        else:
            single = torch.eye(bins, dtype=w.dtype, device=w.device).expand(len(x), -1, -1)
            bend = (w @ rate.bend(single).flatten(-2)).unflatten(-1, (P, P))
        return f.sum(-1), w @ rate.slope.mT, information - bend

    @torch.no_grad()
    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One set of counts for each θ: (*batch, P_m) -> (*batch, bins), float64.

        Raises:
            ModalityError: where θ gives a negative rate.
        """
        rate = self.rate(theta)
        require("the expected counts", rate, rate >= 0, ">= 0 to simulate", "bound the parameters, or their priors")
        return torch.poisson(rate, generator=own_generator(generator))

    def expected_information(self, theta: Tensor) -> Tensor:
        """Jᵀ diag(1/ν) J with J = ∂ν/∂θ: (*batch, P_m) -> (*batch, P_m, P_m).

        A bin that expects nothing adds nothing; NaN where a rate is negative.
        """
        rate, slope = self.rate(theta), jacobian(self.rate, theta)
        weight = torch.where(rate > 0, 1.0 / torch.where(rate > 0, rate, 1.0), torch.where(rate == 0, 0.0, math.nan))
        return slope.mT @ (weight[..., None] * slope)

    def stack_key(self) -> Hashable | None:
        """Which kinds of interpolation and of factors it has: all else is a tensor."""
        return self._layout, self._shaped, self._affine


def _rows(matrix: Tensor, vectors: Tensor) -> Tensor:
    """A matrix (Q, D) times vectors (*batch, D): (*batch, Q), as one product of two matrices."""
    return (matrix @ vectors.reshape(-1, matrix.shape[-1]).mT).mT.reshape(*vectors.shape[:-1], len(matrix))
