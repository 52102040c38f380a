r"""Marginal likelihoods :math:`p(x) = \int p(x \mid \theta)\, \pi(\theta)\, d\theta`, and their ratio, the Bayes factor.

References:
    | Kass and Raftery, J. Am. Stat. Assoc. 90 (1995) 773
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import PosteriorError

if TYPE_CHECKING:
    from engine.posterior.result import Posterior

__all__ = ["BayesFactor", "MarginalLikelihood", "bayes_factor"]


@dataclass(frozen=True)
class MarginalLikelihood:
    """log p(x) in nats.

    Attributes:
        value: In nats.
        error: Its standard error, in nats.
        method: ``"importance"``, ``"bridge"``, ``"grid"`` or ``"exact"``.

    Example:
        >>> print(MarginalLikelihood(-28.475, 0.002, "bridge"))
        -28.4750 ± 0.002 nats (bridge)
    """

    value: float
    error: float
    method: str

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """Plain values; None for what is not finite."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.2g} nats ({self.method})"


@dataclass(frozen=True)
class BayesFactor:
    """p(x | one hypothesis) / p(x | another).

    Attributes:
        log: Its logarithm in nats: above zero the data prefer the first.
        error: The standard error of the logarithm.
        note: What is said against one of the posteriors that it rests on; empty where both have converged.

    Example:
        >>> print(BayesFactor(2.5, 0.1))
        log B = 2.50 ± 0.10 nats, B = 12.2: positive for the first
    """

    log: float
    error: float
    note: str = ""

    @property
    def value(self) -> float:
        """B itself; infinite past the largest number."""
        return math.exp(self.log) if self.log < 709.0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values; None for what is not finite."""
        plain = {"log": self.log, "error": self.error, "value": self.value}
        return {**{k: v if math.isfinite(v) else None for k, v in plain.items()}, "note": self.note}

    def __str__(self) -> str:
        size = 2.0 * abs(self.log)  # Kass and Raftery's table of 2 log B
        words = ("barely worth a mention", "positive", "strong", "very strong")[
            (size >= 2) + (size >= 6) + (size >= 10)
        ]
        side = f"{words} for {'the first' if self.log >= 0 else 'the second'}"
        if not abs(self.log) > self.error:
            side = "no preference" if self.log == 0.0 else "no preference beyond its error"
        note = f" ({self.note})" if self.note else ""
        return f"log B = {self.log:.2f} ± {self.error:.2f} nats, B = {self.value:.3g}: {side}{note}"


def refuse_unnormalised(names: Sequence[str]) -> None:
    """Refuse plugins whose scalar lacks a constant. PosteriorError, naming them."""
    if names:
        listed = ", ".join(f"'{n}'" for n in names)
        raise PosteriorError(
            f"a marginal likelihood needs every plugin's scalar to be log p(x | θ) with all its constants, and {listed} does "
            "not say so (normalised is False); leave it out, or set normalised = True on its class if it is"
        )


def bayes_factor(first: Posterior, second: Posterior) -> BayesFactor:
    """The Bayes factor of two hypotheses about the same data.

    Arguments:
        first, second: Their posteriors: with parameters fixed, with other priors, of the same plugins and data.

    Returns:
        Its logarithm in nats with a standard error.

    Raises:
        PosteriorError: naming a plugin whose scalar is not normalised; where the data or the plugins are not the same; or
            where a marginal likelihood was not found.

    Example:
        >>> from torch.distributions import Normal
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.posterior import posterior
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 3.0))])
        >>> evidence = Evidence(space, {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, {"a": [[2.0]]}, prior=True)
        >>> point, free = posterior(evidence, fixed={"mu": 0.0}), posterior(evidence)
        >>> round(bayes_factor(free, point).log, 3)  # N(2; 0, √10) against N(2; 0, 1)
        0.649
    """
    for what in ("data", "plugins"):
        a, b = first.provenance.get(what), second.provenance.get(what)
        if a != b:
            raise PosteriorError(
                f"a Bayes factor compares two hypotheses about the same data and plugins, and these have other {what}; "
                "ask both of the same data"
            )
    one, other = first.log_marginal_likelihood, second.log_marginal_likelihood
    against = [f"the {which} is {p.status}" for which, p in (("first", first), ("second", second)) if not p.converged]
    return BayesFactor(one.value - other.value, math.hypot(one.error, other.error), "; ".join(against))
