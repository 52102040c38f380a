r"""What a posterior is: draws, moments, quantiles and intervals, its diagnostics, and what they say it is worth."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.errors import PosteriorError
from engine.parameters import ParameterSpace
from engine.posterior.marginal import BayesFactor, MarginalLikelihood, bayes_factor, refuse_unnormalised
from engine.posterior.weighted import highest_density, quantiles, weighted_moments

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from engine.posterior.update import Source
    from engine.registry import Registry

__all__ = ["Posterior", "PosteriorStatus"]


class PosteriorStatus(StrEnum):
    """What a posterior is worth; compares equal to its text.

    Example:
        >>> PosteriorStatus.UNRELIABLE == "unreliable", str(PosteriorStatus.CONVERGED)
        (True, 'converged')
    """

    CONVERGED = "converged"  #: every diagnostic of its method passed
    UNRELIABLE = "unreliable"  #: a diagnostic failed; the reason says which, and what to try
    INTERRUPTED = "interrupted"  #: stopped by the user; it is made of the draws that were finished
    OUTSIDE_DOMAIN = "outside_domain"  #: it or the data lie outside what a learned plugin was trained on
    BEYOND_CERTIFICATE = "beyond_certificate"  #: more observations than the certificates of learned plugins carry
    UNCERTIFIED = "uncertified"  #: a learned plugin of which nobody knows the bias
    FAILED = "failed"  #: there is no posterior to speak of; draws are NaN


@dataclass(frozen=True, eq=False)
class Posterior:
    r"""π(θ | x) ∝ exp S(θ) π(θ): draws of equal weight, and the weighted points that moments are computed from.

    Attributes:
        parameters: The space whose order everything here follows.
        method: ``"laplace"``, ``"importance"``, ``"grid"`` or ``"nuts"``: how it was made.
        status, reason: What it is worth, and why in words.
        theta: Draws of equal weight, shape (draws, P), float64, in natural units; NaN where it failed.
        points: What moments and quantiles are computed from, shape (M, P): weighted draws, nodes of a grid, or the draws.
        log_weights: Their log weights, which sum to one, shape (M,).
        diagnostics: What the method says of itself, as plain values by name: ``k_hat``, ``ess``, ``evaluations``, and for
            NUTS ``r_hat``, ``ess_bulk``, ``ess_tail`` (the worst parameter of each) and ``divergences``.
        chains: How many chains the draws are from; 1 for independent ones.
        fixed: Parameters that were held, with their values.
        trust: Plugin -> what its certificate says of its part here (:class:`engine.trust.Trust`).
        refinement: How learned scalars were refined (:class:`engine.refinement.Refinement`); None where none was.
        provenance: The registry's digest, the data's hash, the plugins and the versions.
        seed: What everything random followed from.
        unnormalised: Plugins whose scalar lacks a constant, so that there is no marginal likelihood.

    Example:
        >>> from torch.distributions import Normal
        >>> from engine import Evidence, Parameter
        >>> from engine.posterior import posterior
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 2.0))])
        >>> evidence = Evidence(space, {"a": Gaussian(parameter_names=("mu",), sd=2.0)}, {"a": [[1.0]]}, prior=True)
        >>> post = posterior(evidence, method="laplace", draws=1000, seed=0)
        >>> post.draws["mu"].shape, round(post.mean["mu"], 3), round(post.sd["mu"], 2)  # N(1/2, √2)
        (torch.Size([1000]), 0.5, 1.41)
        >>> post.status, round(post.quantile("mu", 0.5), 2)
        (<PosteriorStatus.CONVERGED: 'converged'>, 0.5)
    """

    parameters: ParameterSpace
    method: str
    status: PosteriorStatus
    reason: str
    theta: Tensor
    points: Tensor
    log_weights: Tensor
    diagnostics: Mapping[str, Any]
    chains: int = 1
    fixed: Mapping[str, float] = field(default_factory=dict)
    trust: Mapping[str, Any] = field(default_factory=dict)
    refinement: Any = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    unnormalised: tuple[str, ...] = ()
    seed: int = 0
    _marginal: MarginalLikelihood | None = field(default=None, repr=False)
    _raw: Tensor | None = field(default=None, repr=False)  # log weights before they were smoothed
    _pool: Tensor | None = field(default=None, repr=False)  # draws to re-weight, where points are nodes
    _base: tuple[PosteriorStatus, str] | None = field(default=None, repr=False)  # before certificates had their say
    _made: tuple[PosteriorStatus, str] | None = field(default=None, repr=False)  # before it was re-weighted
    _source: Source | None = field(default=None, repr=False)

    @property
    def converged(self) -> bool:
        """Whether it can be used as it is: :attr:`PosteriorStatus.CONVERGED`."""
        return self.status is PosteriorStatus.CONVERGED

    @cached_property
    def draws(self) -> Mapping[str, Tensor]:
        """Parameter -> draws of equal weight, shape (draws,), float64, in the parameter's unit."""
        return dict(zip(self.parameters.names, self.theta.unbind(-1), strict=True))

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        mean, covariance = weighted_moments(self.points, self.log_weights)
        for name, value in self.fixed.items():  # not what rounding makes of a constant
            i = self.parameters.index(name)
            mean[i], covariance[i], covariance[:, i] = value, 0.0, 0.0
        return mean, covariance

    @cached_property
    def mean(self) -> Mapping[str, float]:
        """Parameter -> posterior mean, in its unit."""
        return dict(zip(self.parameters.names, self._moments[0].tolist(), strict=True))

    @cached_property
    def sd(self) -> Mapping[str, float]:
        """Parameter -> posterior standard deviation, in its unit; 0 for one that was fixed."""
        each = self.covariance.diagonal().clamp_min(0.0).sqrt()
        return dict(zip(self.parameters.names, each.tolist(), strict=True))

    @property
    def covariance(self) -> Tensor:
        """The posterior covariance, shape (P, P), in the order of :attr:`parameters`."""
        return self._moments[1]

    @property
    def correlation(self) -> Tensor:
        """The correlation matrix, shape (P, P); NaN where a standard deviation is zero."""
        each = self.covariance.diagonal().clamp_min(0.0).sqrt()
        return self.covariance / (each[:, None] * each)

    def quantile(self, name: str, q: float) -> float:
        """The value of one parameter below which a fraction of the posterior lies.

        Arguments:
            name: Which parameter.
            q: The fraction, in (0, 1).

        Returns:
            In the parameter's unit; a whole number for a discrete one.

        Raises:
            PosteriorError: for a fraction that is none, or a posterior that failed.
            ParameterError: for a name that is not there.
        """
        if not 0.0 < q < 1.0:
            raise PosteriorError(f"a quantile's fraction lies between 0 and 1, got {q}; write 0.16 for 16 %")
        return self._quantiles(name, [q])[0]

    def _quantiles(self, name: str, fractions: list[float]) -> list[float]:
        if self.status is PosteriorStatus.FAILED:
            raise PosteriorError(f"a posterior that failed has no quantiles: {self.reason}")
        i = self.parameters.index(name)
        return quantiles(self.points[:, i], self.log_weights, fractions, whole=self.parameters[name].discrete)

    def interval(self, name: str, level: float = 0.6827, kind: str = "equal_tailed") -> tuple[float, float]:
        """A credible interval of one parameter: (low, high), in its unit.

        Arguments:
            name: Which parameter.
            level: The posterior probability inside, in (0, 1).
            kind: ``"equal_tailed"`` (as much above as below) or ``"highest_density"`` (the shortest interval).

        Raises:
            PosteriorError: for a level or a kind that is none, or a posterior that failed.
            ParameterError: for a name that is not there.
        """
        if not 0.0 < level < 1.0:
            raise PosteriorError(f"a credible level lies between 0 and 1, got {level}; write 0.6827 for 68.27 %")
        if kind == "equal_tailed":
            low, high = self._quantiles(name, [0.5 - level / 2, 0.5 + level / 2])
            return low, high
        if kind != "highest_density":
            raise PosteriorError(
                f"the kind of a credible interval is 'equal_tailed' or 'highest_density', got {kind!r}"
            )
        self._quantiles(name, [0.5])
        i = self.parameters.index(name)
        return highest_density(self.points[:, i], self.log_weights, level, whole=self.parameters[name].discrete)

    @property
    def log_marginal_likelihood(self) -> MarginalLikelihood:
        """log p(x) = log ∫ exp S(θ) π(θ) dθ in nats, with its standard error.

        Raises:
            PosteriorError: naming the plugin whose scalar lacks a constant, or where it was not found.
        """
        refuse_unnormalised(self.unnormalised)
        if self._marginal is None:
            raise PosteriorError(
                f"this posterior has no marginal likelihood ({self.reason}); ask for method='importance'"
            )
        return self._marginal

    def bayes_factor(self, other: Posterior) -> BayesFactor:
        """How much more probable this hypothesis makes the data than another one: see :func:`bayes_factor`.

        Arguments:
            other: A posterior of the same data and plugins under another hypothesis (``fixed=``, or other priors).

        Raises:
            PosteriorError: naming the plugin that is not normalised; or for other data or plugins.
        """
        return bayes_factor(self, other)

    # -- more and less data ---------------------------------------------------------------------------------

    def append(
        self, data: Mapping[str, Any], registry: Registry | None = None, *, recompute: bool | None = None
    ) -> Posterior:
        """The posterior with more plugins' data, by re-weighting the points that are here with the new scalars alone.

        What it costs does not depend on the plugins that are there already. Where the weights are too uneven
        (k̂ > 0.7), it is computed anew.

        Arguments:
            data: Plugin -> (N, *event_shape), of plugins that took no part so far.
            registry: Which registry has them; by default the one that this posterior came from.
            recompute: None as said above; False never (the status says so); True always.

        Returns:
            A new posterior; this one stays as it is.

        Raises:
            PosteriorError: for a plugin that took part already, or a posterior that failed.
            UnknownPluginError, ObservationError, ModalityError: as :meth:`engine.Registry.posterior`.
        """
        from engine.posterior.update import appended

        return appended(self, data, registry, recompute)

    def without(self, *names: str, recompute: bool | None = None) -> Posterior:
        """The posterior without some plugins, by dividing their scalars out of the weights.

        Arguments:
            names: Plugins that took part.
            recompute: As for :meth:`append`.

        Returns:
            A new posterior; this one stays as it is.

        Raises:
            PosteriorError: for a plugin that took no part, or where none would be left.
        """
        from engine.posterior.update import removed

        return removed(self, names, recompute)

    # -- out of here ----------------------------------------------------------------------------------------

    def to_dict(self, draws: bool = False) -> dict[str, Any]:
        """Everything a machine would want, as plain values; infinite and undefined numbers are None.

        Arguments:
            draws: Whether to have all draws too.
        """
        failed = self.status is PosteriorStatus.FAILED
        names = self.parameters.names
        try:
            marginal: Any = self.log_marginal_likelihood.to_dict()
        except PosteriorError as error:
            marginal = {"value": None, "error": None, "reason": str(error)}
        return {
            "status": str(self.status),
            "converged": self.converged,
            "reason": self.reason,
            "method": self.method,
            "draws": len(self.theta),
            "chains": self.chains,
            "seed": self.seed,
            "parameters": {
                n: {
                    "mean": _plain(self.mean[n]),
                    "sd": _plain(self.sd[n]),
                    "quantiles": {}
                    if failed
                    else dict(zip(_SHOWN, self._quantiles(n, [float(q) for q in _SHOWN]), strict=True)),
                    "unit": self.parameters[n].unit,
                    "fixed": n in self.fixed,
                }
                for n in names
            },
            "order": list(names),
            "covariance": _plain(self.covariance.tolist()),
            "log_marginal_likelihood": marginal,
            "diagnostics": _plain(dict(self.diagnostics)),
            "provenance": dict(self.provenance),
            **({"trust": {n: _plain(asdict(t)) for n, t in self.trust.items()}} if self.trust else {}),
            **({"refinement": _plain(self.refinement.to_dict())} if self.refinement is not None else {}),
            **({"values": {n: _plain(v.tolist()) for n, v in self.draws.items()}} if draws else {}),
        }

    def to_json(self, indent: int | None = 2, draws: bool = False) -> str:
        """:meth:`to_dict` as JSON text, indented by ``indent`` blanks; None for one line; ``draws`` adds all draws."""
        return json.dumps(self.to_dict(draws=draws), indent=indent, allow_nan=False, ensure_ascii=False)

    def to_arviz(self) -> Any:
        """The draws for ArviZ: an ``InferenceData`` whose ``posterior`` has dimensions (chain, draw)."""
        from engine.posterior.export import to_arviz

        return to_arviz(self)

    def to_xarray(self) -> xr.Dataset:
        """The draws as an ``xarray.Dataset`` with dimensions (chain, draw), units and provenance as attributes."""
        from engine.posterior.export import to_xarray

        return to_xarray(self)

    def to_pandas(self) -> pd.DataFrame:
        """The draws as a table: a column for each parameter, a row for each draw."""
        from engine.posterior.export import to_pandas

        return to_pandas(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the draws with diagnostics and provenance: ``.nc`` (NetCDF), ``.zarr`` or ``.json``, whole or not at all.

        Arguments:
            path: Where to; a file or folder of that name is replaced.

        Raises:
            PosteriorError: for another suffix, or a place that cannot be written; nothing is left half-written.
        """
        from engine.posterior.export import save

        save(self, path)

    def to_getdist(self, root: str | PathLike[str]) -> None:
        """Write GetDist's chains: ``root.txt`` (or ``root_1.txt`` … by chain), ``root.paramnames`` and ``root.ranges``.

        Arguments:
            root: Folder and first part of the names.

        Raises:
            PosteriorError: for a place that cannot be written.
        """
        from engine.posterior.export import to_getdist

        to_getdist(self, root)

    def __str__(self) -> str:
        from engine.posterior.table import posterior_text

        return posterior_text(self)


_SHOWN = ("0.025", "0.16", "0.5", "0.84", "0.975")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
