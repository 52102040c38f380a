"""What a search maximises: S of one data set, or of each of B data sets, at points that say which they belong to."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.evidence import Derivatives, Evidence
from engine.parameters import ParameterSpace

__all__: list[str] = []  # the machinery of estimates: see engine.estimate


class Objective(Protocol):
    """S of B data sets that share their parameters and plugins."""

    parameters: ParameterSpace
    prior: bool

    @property
    def count(self) -> int:
        """B."""
        ...

    @property
    def coarse(self) -> bool:
        """Whether some plugin is evaluated in float32."""
        ...

    @property
    def concave(self) -> bool:
        """Whether S is concave in θ over the whole feasible set, so that a local maximum is the global one."""
        ...

    def value(self, theta: Tensor, items: Tensor) -> Tensor:
        """S (K,) of data sets ``items`` (K,) at theta (K, P)."""
        ...

    def values(self, theta: Tensor) -> Tensor:
        """S (B, n) of every data set at each of n points, theta (n, P)."""
        ...

    def derivatives(self, theta: Tensor, items: Tensor) -> Derivatives:
        """S and its derivatives, of data sets ``items`` (K,) at theta (K, P)."""
        ...


def log_concave(space: ParameterSpace) -> bool:
    """Whether the prior's density is log-concave, as uniform, normal and half-normal ones are."""
    return all(p.prior is None or p.prior.log_concave for p in space)


class One:
    """One data set's evidence as an :class:`Objective`.

    Arguments:
        evidence: S.

    Example:
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> modality = Gaussian(parameter_names=("mu",), sd=2.0)
        >>> one = One(Evidence(ParameterSpace([Parameter("mu")]), {"a": modality}, {"a": [[1.0], [3.0]]}))
        >>> one.count, one.values(torch.zeros(3, 1)).shape
        (1, torch.Size([1, 3]))
    """

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.parameters = evidence.parameters
        self.prior = evidence.prior
        modalities = evidence.modalities.values()
        self.coarse = any(m.dtype == torch.float32 for m in modalities)
        self.concave = all(m.concave for m in modalities) and (not self.prior or log_concave(self.parameters))
        self.count = 1

    def value(self, theta: Tensor, items: Tensor) -> Tensor:
        """S (K,) at theta (K, P)."""
        return self.evidence.value(theta)

    def values(self, theta: Tensor) -> Tensor:
        """S (1, n) at theta (n, P)."""
        return self.evidence.value(theta)[None]

    def derivatives(self, theta: Tensor, items: Tensor) -> Derivatives:
        """S and its derivatives at theta (K, P)."""
        return self.evidence.derivatives(theta)
