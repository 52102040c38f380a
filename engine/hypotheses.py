r"""Two hypotheses compared, and several weighed: what differences of S are worth.

The log-likelihood ratio of two hypotheses is :math:`S(\theta_1) - S(\theta_2)`: constants cancel, so that
scalars known up to c(x) suffice. Its p-value is

- Wilks': :math:`2\,\Delta S \sim \chi^2_k` where the null fixes k parameters that the alternative leaves free
  (½χ²₀ + ½χ²₁ where the one it fixes lies on a bound);
- Neyman and Pearson's for two points: under θ2, locally, ΔS is normal with mean −d²/2 and variance d²,
  :math:`d^2 = (\theta_1-\theta_2)^\top I(\theta_2) (\theta_1-\theta_2)`, I the expected information.

References:
    | Wilks, Ann. Math. Stat. 9 (1938) 60; Chernoff, Ann. Math. Stat. 25 (1954) 573
    | Neyman and Pearson, Phil. Trans. R. Soc. A 231 (1933) 289; Le Cam (1960), local asymptotic normality
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import scipy.stats
import torch
from torch import Tensor

from engine.errors import EstimateError, ModalityError, ParameterError
from engine.estimate import estimate
from engine.evidence import Evidence
from engine.result import Estimate, Status

__all__ = ["Comparison", "compare", "probabilities"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the data say between an alternative and a null.

    Attributes:
        log_ratio: S(alternative) − S(null) in nats: above zero the data prefer the alternative.
        p_value: The probability, were the null true, of a log-ratio at least as large; None where
            no law for it is known (``reason`` says why).
        method: ``"wilks"``, ``"wilks at a bound"``, ``"normal"`` or ``"none"``.
        degrees_of_freedom: How many parameters the null fixes beyond the alternative.
        null, alternative: The two points θ, shape (P,) each.
        reason: How the p-value came about, in words.

    Example:
        >>> theta = torch.tensor([0.0]), torch.tensor([2.0])
        >>> result = Comparison(2.0, 0.0455, "wilks", 1, *theta, reason="Wilks, 1 degree of freedom")
        >>> round(result.significance, 2)
        2.0
        >>> print(result)
        ΔS = 2.0000 nats, p = 0.0455 (2.00 σ): Wilks, 1 degree of freedom
    """

    log_ratio: float
    p_value: float | None
    method: str
    degrees_of_freedom: int
    null: Tensor
    alternative: Tensor
    reason: str

    @property
    def significance(self) -> float | None:
        """The p-value as a number of sigmas, never below 0: two-sided for Wilks' law, where it is √(2ΔS) with one
        degree of freedom, else one-sided; None without a p-value."""
        if self.p_value is None:
            return None
        tail = 0.5 * self.p_value if self.method == "wilks" else self.p_value
        return max(0.0, float(scipy.stats.norm.isf(tail)))

    def __str__(self) -> str:
        p = "no p-value" if self.p_value is None else f"p = {self.p_value:.4g} ({self.significance:.2f} σ)"
        return f"ΔS = {self.log_ratio:.4f} nats, {p}: {self.reason}"


def compare(
    evidence: Evidence, null: Mapping[str, float], alternative: Mapping[str, float] | None = None, *, seed: int = 0
) -> Comparison:
    """Compare two hypotheses; parameters that one does not fix take their best values under it.

    Arguments:
        evidence: S, without the prior.
        null: The values the null fixes, by name.
        alternative: The values the alternative fixes; None leaves everything free.
        seed: Of starting points, and of simulations where a plugin has no closed expected information.

    Returns:
        The log-ratio in nats with its p-value, or with the reason why there is none.

    Raises:
        EstimateError: when one of the fits fails, or the evidence includes the prior.
        ParameterError: for a name that is not there, or a value outside its bounds.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu")])
        >>> evidence = Evidence(space, {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, {"a": [[2.0]]})
        >>> print(compare(evidence, {"mu": 0.0}))
        ΔS = 2.0000 nats, p = 0.0455 (2.00 σ): Wilks, 1 degree of freedom
    """
    if evidence.prior:
        raise EstimateError("a likelihood ratio leaves the prior out; build the evidence with prior=False")
    space = evidence.parameters
    alternative = dict(alternative or {})
    if dict(null) == alternative:
        raise EstimateError(
            f"two different hypotheses are needed, got {alternative} twice; fix a parameter in the null"
        )
    for values in (null, alternative):
        space.indices(list(values))
    below, above = _best(evidence, null, "null", seed), _best(evidence, alternative, "alternative", seed)
    ratio = above[1] - below[1]
    nested = all(name in null and null[name] == value for name, value in alternative.items())
    k = len(null) - len(alternative)
    heard = {p for m in evidence.modalities.values() for p in m.parameter_names}
    k -= len([n for n in null if n not in alternative and n not in heard])  # these cost the fit nothing
    if nested and k > 0:
        on_bound = [n for n in null if n not in alternative and null[n] in space[n].bounds]
        q = max(0.0, 2.0 * ratio)
        plural = "" if k == 1 else "s"
        if not on_bound:
            p = float(scipy.stats.chi2.sf(q, k))
            return Comparison(ratio, p, "wilks", k, below[0], above[0], f"Wilks, {k} degree{plural} of freedom")
        if k == 1:
            p = 0.5 * float(scipy.stats.chi2.sf(q, 1)) if q > 0 else 1.0
            reason = f"½χ²₀ + ½χ²₁, '{on_bound[0]}' lies on its bound"
            return Comparison(ratio, p, "wilks at a bound", 1, below[0], above[0], reason)
        reason = f"'{on_bound[0]}' and others are fixed on a bound together, where no simple law holds"
        return Comparison(ratio, None, "none", k, below[0], above[0], reason)
    if set(null) == set(alternative) == set(space.names):
        return _two_points(evidence, below[0], above[0], ratio, seed)
    reason = "the hypotheses are neither nested nor both points; simulate to calibrate their ratio"
    return Comparison(ratio, None, "none", max(k, 0), below[0], above[0], reason)


def probabilities(
    evidence: Evidence,
    hypotheses: Mapping[str, Mapping[str, float]] | Sequence[Mapping[str, float]] | Tensor | None = None,
    weights: Sequence[float] | Tensor | None = None,
) -> dict[Any, float]:
    """The posterior probabilities of hypotheses: the softmax of the sum plus the log prior weights.

    Arguments:
        evidence: S, without the prior.
        hypotheses: Points θ: a mapping from their names, a sequence, or a tensor (H, P). None takes every
            value of the parameters that are indices over hypotheses (``prior=Categorical``), with their
            prior's weights; all parameters must then be discrete.
        weights: Prior weights, H positive numbers; equal by default for given hypotheses.

    Returns:
        Hypothesis -> probability; the key is its name, its position, or (for discrete parameters) the index,
        a tuple of indices where there are several parameters.

    Raises:
        ParameterError: for an unusable set of hypotheses or weights.
        EstimateError: when every hypothesis makes the data impossible, or the evidence includes the prior.

    Example:
        >>> from torch.distributions import Categorical as Index
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Categorical
        >>> space = ParameterSpace([Parameter("h", prior=Index(torch.tensor([0.5, 0.5])))])
        >>> coin = Categorical(parameter_names=("h",), probabilities=[[0.5, 0.5], [0.9, 0.1]])
        >>> answer = probabilities(Evidence(space, {"coin": coin}, {"coin": [0, 0, 1]}))
        >>> {h: round(p, 4) for h, p in answer.items()}  # 0.125 against 0.081
        {0: 0.6068, 1: 0.3932}
    """
    if evidence.prior:
        raise EstimateError("give the evidence without the prior: the weights of the hypotheses are their prior")
    space = evidence.parameters
    if hypotheses is None:
        if not all(space.discrete):
            names = [n for n, d in zip(space.names, space.discrete, strict=True) if not d]
            raise ParameterError(
                f"{', '.join(names)}: not an index over hypotheses; give the hypotheses as points θ, "
                "or declare the parameter with prior=Categorical(probs)"
            )
        ranges = [torch.arange(p.bounds[0], p.bounds[1] + 1, dtype=torch.float64) for p in space]
        theta = torch.cartesian_prod(*ranges).reshape(-1, len(space))
        keys: list[Any] = [tuple(int(v) for v in row) if len(row) > 1 else int(row[0]) for row in theta.tolist()]
        log_prior = space.log_prior(theta)
    else:
        if isinstance(hypotheses, Tensor):
            theta, keys = space.check_theta(hypotheses), list(range(len(hypotheses)))
        elif isinstance(hypotheses, Mapping):
            theta, keys = torch.stack([space.tensor(h) for h in hypotheses.values()]), list(hypotheses)
        else:
            theta, keys = torch.stack([space.tensor(h) for h in hypotheses]), list(range(len(hypotheses)))
        log_prior = torch.zeros(len(theta), dtype=torch.float64)
    if weights is not None:
        given = torch.as_tensor(weights, dtype=torch.float64)
        if given.shape != (len(theta),) or not bool((given >= 0).all()) or not float(given.sum()) > 0:
            raise ParameterError(f"weights must be {len(theta)} numbers >= 0, not all zero; got {given.tolist()}")
        log_prior = (given / given.sum()).log()
    total = evidence.value(theta) + log_prior
    if not bool(torch.isfinite(total).any()):
        raise EstimateError(
            "the data are impossible under every hypothesis (S = −∞ for all); check data and hypotheses"
        )
    return dict(zip(keys, torch.softmax(total, 0).tolist(), strict=True))


def _best(evidence: Evidence, fixed: Mapping[str, float], which: str, seed: int) -> tuple[Tensor, float]:
    space = evidence.parameters
    if set(fixed) == set(space.names):
        theta = space.tensor(fixed)
        return theta, float(evidence.value(theta[None])[0])
    fit: Estimate = estimate(evidence, fixed=fixed, seed=seed)
    if fit.status is Status.FAILED:
        raise EstimateError(f"the fit under the {which} {dict(fixed)} failed: {fit.reason}")
    return fit.theta, fit.log_evidence


def _two_points(evidence: Evidence, null: Tensor, alternative: Tensor, ratio: float, seed: int) -> Comparison:
    try:
        information = torch.stack(list(evidence.expected_information(null, seed=seed).values())).sum(0)
        source = "expected"
    except ModalityError:
        information, source = evidence.derivatives(null[None]).information[0], "observed"
    change = alternative - null
    d2 = float(change @ information @ change)
    if not d2 > 0:
        return Comparison(
            ratio, None, "none", 0, null, alternative, "the two points cannot be told apart by these plugins"
        )
    p = float(scipy.stats.norm.sf((ratio + 0.5 * d2) / math.sqrt(d2)))
    reason = f"two points, normal law under the null with {source} information (d = {math.sqrt(d2):.3g})"
    return Comparison(ratio, p, "normal", 0, null, alternative, reason)
