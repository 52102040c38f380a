r"""What a learned scalar may be trusted for: the record that :func:`engine.certificate.certify` makes.

With :math:`\delta = E[u]` and :math:`K = \mathrm{Var}\,u` of the score u of one observation at θ, N observations move θ̂ by
:math:`\sqrt{N\,\delta^\top K^{-1} \delta}` of its standard errors. A certificate has both as fields over the prior, so that
:math:`N_{\max}(\kappa) = \kappa^2 / (\delta^\top K^{-1}\delta)` is known at every θ, with the noise of its own simulations
taken out, and never more than those can certify.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.certificate.domain import Domain
from engine.certificate.fields import MeanField, VarianceField
from engine.errors import ParameterError
from engine.parameters import ParameterSpace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Certificate", "Check"]

#: The bias, in standard errors, that counts as too much.
KAPPA = 0.3
_MAP = 2000  # draws from the prior that quantiles are taken over


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        verdict: ``"passed"``, ``"failed"``, ``"noted"`` (off, but no reason to refuse it) or ``"not checked"``.
        value, error: What was found, with its standard error; NaN where there is no number.
        expected: What a true log-evidence has.
        note: In words.

    Example:
        >>> Check("normalisation", "passed", 1.01, 0.02, 1.0, "the mean of exp(s) over the marginal").verdict
        'passed'
    """

    name: str
    verdict: str
    value: float = math.nan
    error: float = math.nan
    expected: float = math.nan
    note: str = ""


@dataclass(frozen=True, eq=False)
class Certificate:
    """What held-out simulations say of one learned scalar; made by :func:`engine.certificate.certify`.

    Attributes:
        space: The modality's parameters, with the prior that it holds for.
        source: ``"simulations"`` or ``"pairs"``.
        simulations, excluded, seed: How many were used, how many were no observations, and what they follow from.
        calibrated: Whether the score is that of a calibrated modality.
        mean: δ(θ): what is left of the mean score.
        variance: K(θ).
        information: J(θ) = −∂E[u]/∂θ of the scalar at fixed data, P² components by row; None where it was not asked for.
        excess, excess_error: What :math:`\\delta^\\top K^{-1}\\delta` is on average beyond the field, with its error;
            NaN where the simulations cannot tell.
        curvature: Whether second derivatives of the scalar are its curvature.
        checks: What was looked at.
        domain: Where its training data lie; None where it was not asked for.
        subject: :func:`engine.certificate.subject.subject_of` the scalar; empty where nobody noted it.

    Example:
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter
        >>> from engine.certificate import certify
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Uniform(-1.0, 1.0))])
        >>> found = certify(Gaussian(parameter_names=("mu",), sd=1.0), prior=space, simulations=2000)
        >>> found.passed, found.n_max(kappa=0.6) / found.n_max(kappa=0.3)
        (True, 4.0)
    """

    space: ParameterSpace
    source: str
    simulations: int
    excluded: int
    seed: int
    calibrated: bool
    mean: MeanField
    variance: VarianceField
    information: MeanField | None
    excess: float
    excess_error: float
    curvature: bool
    checks: tuple[Check, ...]
    domain: Domain | None
    subject: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing that was looked at failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(c for c in self.checks if c.verdict == "failed")

    @property
    def sandwich(self) -> bool:
        """Whether K and J differ beyond noise, so that an honest covariance is Godambe's."""
        return any(c.name == "second Bartlett identity" and c.verdict != "passed" for c in self.checks)

    def rate(self, theta: Tensor) -> Tensor:
        """δᵀK⁻¹δ, the squared bias in standard errors that each observation adds, shape (n,), for theta (n, P).

        The noise of the certificate's simulations is taken out, but never below that noise itself.
        """
        bias, noise = self._parts(theta)
        return torch.maximum(bias, noise)

    def _parts(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        root = self.variance.root(theta)
        delta = (root.mT @ self.mean.at(theta)[..., None])[..., 0]
        noise = (root.mT @ self.mean.error(theta) @ root).diagonal(dim1=-2, dim2=-1).sum(-1)
        return (delta.square().sum(-1) - noise).clamp_min(0.0) + self.beyond, noise.clamp_min(self.unseen)

    @property
    def beyond(self) -> float:
        """What δᵀK⁻¹δ is known to be beyond the field, on average; 0 where that is no more than noise."""
        return self.excess if self.excess > 2.0 * self.excess_error else 0.0

    @property
    def unseen(self) -> float:
        """What the points of the simulations cannot tell of δᵀK⁻¹δ beyond the field; 0 where nobody looked."""
        return 0.0 if math.isnan(self.excess_error) else self.excess_error

    def n_max(self, kappa: float = KAPPA, theta: Tensor | Mapping[str, float] | None = None) -> float:
        """How many observations the scalar carries before its bias passes κ standard errors of the estimate.

        Arguments:
            kappa: κ > 0.
            theta: A point, (P,) or by name; None takes the median over the prior.

        Returns:
            A number of observations, at most what :meth:`limit` says at the same point.

        Raises:
            ParameterError: for a κ that is no positive number, or a θ of another shape.
        """
        if not kappa > 0:
            raise ParameterError(f"kappa must be positive, got {kappa}; 0.3 standard errors is usual")
        if theta is not None:
            return kappa**2 / float(self.rate(self._point(theta))[0])
        return self.quantiles((0.5,), kappa)[0]

    def limit(self, kappa: float = KAPPA, theta: Tensor | Mapping[str, float] | None = None) -> float:
        """The most that this number of simulations can certify at kappa, at theta or in the median; see :meth:`n_max`."""
        at = self.draws() if theta is None else self._point(theta)
        return kappa**2 / float(self._parts(at)[1].median())

    def quantiles(self, fractions: tuple[float, ...] = (0.05, 0.5, 0.95), kappa: float = KAPPA) -> tuple[float, ...]:
        """Quantiles of :meth:`n_max` over the prior.

        Arguments:
            fractions: In [0, 1].
            kappa: κ.
        """
        budget = kappa**2 / self.rate(self.draws())
        return tuple(torch.quantile(budget, torch.tensor(fractions, dtype=torch.float64)).tolist())

    def draws(self, n: int = _MAP) -> Tensor:
        """Points of the prior, the same every time, (n, P)."""
        return self.space.sample_prior(n, 0)

    def _point(self, theta: Tensor | Mapping[str, float]) -> Tensor:
        given = torch.tensor([theta[n] for n in self.space.names]) if isinstance(theta, Mapping) else theta
        return self.space.tensor(given)[None]

    # -- on disk, and for people ----------------------------------------------------------------------------

    def to_toml(self) -> dict[str, Any]:
        """Plain values and tensors; :meth:`from_toml` reads them back."""
        table: dict[str, Any] = {
            "parameters": [p.to_toml() for p in self.space],
            "source": self.source,
            "simulations": self.simulations,
            "excluded": self.excluded,
            "seed": self.seed,
            "calibrated": self.calibrated,
            "subject": self.subject,
            "curvature": self.curvature,
            "excess": self.excess,
            "excess_error": self.excess_error,
            "summary": self.summary(),
            "checks": [
                {
                    "name": c.name,
                    "verdict": c.verdict,
                    "value": c.value,
                    "error": c.error,
                    "expected": c.expected,
                    "note": c.note,
                }
                for c in self.checks
            ],
            "mean": self.mean.to_plain(),
            "variance": self.variance.to_plain(),
        }
        if self.information is not None:
            table["information"] = self.information.to_plain()
        if self.domain is not None:
            table["domain"] = self.domain.to_plain()
        return table

    @classmethod
    def from_toml(cls, table: Mapping[str, Any]) -> Certificate:
        """What :meth:`to_toml` gave.

        Arguments:
            table: Plain values and tensors.

        Raises:
            KeyError, TypeError, ValueError: for anything else.
        """
        from engine.parameter import Parameter

        space = ParameterSpace([Parameter.from_toml(block) for block in table["parameters"]])
        information, domain = table.get("information"), table.get("domain")
        return cls(
            space=space,
            source=str(table["source"]),
            simulations=int(table["simulations"]),
            excluded=int(table["excluded"]),
            seed=int(table["seed"]),
            calibrated=bool(table["calibrated"]),
            mean=MeanField.from_plain(space, table["mean"]),
            variance=VarianceField.from_plain(space, table["variance"]),
            information=None if information is None else MeanField.from_plain(space, information),
            excess=float(table["excess"]),
            excess_error=float(table["excess_error"]),
            curvature=bool(table["curvature"]),
            checks=tuple(Check(**dict(block)) for block in table["checks"]),
            domain=None if domain is None else Domain.from_plain(space, domain),
            subject=str(table.get("subject", "")),
        )

    def summary(self) -> dict[str, float]:
        """The budget in numbers: N_max at κ = 0.3, its 5, 50 and 95 % quantiles over the prior, and its limit."""
        low, median, high = self.quantiles()
        return {"kappa": KAPPA, "n_max_05": low, "n_max_50": median, "n_max_95": high, "limit": self.limit()}

    def figure(self, path: str | PathLike[str] | None = None, kappa: float = KAPPA) -> Figure:
        """A map of :meth:`n_max` over the prior; see :func:`engine.report.budget.budget_figure` for path and kappa."""
        from engine.report.budget import budget_figure

        return budget_figure(self, path, kappa)

    def __str__(self) -> str:
        from engine.report.tables import certificate_text

        return certificate_text(self)
