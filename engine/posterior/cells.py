"""The cells of the discrete parameters: every combination of their values, each with a density over the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from engine.errors import PosteriorError
from engine.evidence import Evidence
from engine.parameters import ParameterSpace
from engine.posterior.target import Target

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

_MOST = 4096
_MIXED = 256  # where each cell has continuous parameters of its own to sample


def cells(evidence: Evidence, fixed: Mapping[str, float], method: str) -> list[Target]:
    """A density for every combination of the values that discrete parameters can have.

    Arguments:
        evidence: S with the prior.
        fixed: Parameters that are held.
        method: For the messages.

    Raises:
        PosteriorError: for too many combinations, or a discrete parameter under NUTS.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical as Index
        >>> from engine import Parameter
        >>> from modalities import Categorical
        >>> space = ParameterSpace([Parameter("h", prior=Index(torch.tensor([0.5, 0.5])))])
        >>> coin = Categorical(parameter_names=("h",), probabilities=[[0.5, 0.5], [0.9, 0.1]])
        >>> [t.fixed for t in cells(Evidence(space, {"coin": coin}, {"coin": [0]}, prior=True), {}, "grid")]
        [{'h': 0.0}, {'h': 1.0}]
    """
    space: ParameterSpace = evidence.parameters
    discrete = [p for p in space if p.discrete and p.name not in fixed]
    if not discrete:
        return [Target(evidence, fixed)]
    names = ", ".join(f"'{p.name}'" for p in discrete)
    if method == "nuts":
        raise PosteriorError(
            f"NUTS follows gradients, and {names} is discrete: use method='grid' or 'importance', which enumerate its values, "
            "or hold it with fixed="
        )
    values = [[float(v) for v in range(int(p.bounds[0]), int(p.bounds[1]) + 1)] for p in discrete]
    count = math.prod(map(len, values))
    most = _MOST if all(n in fixed or space[n].discrete for n in space.names) else _MIXED
    if count > most:
        raise PosteriorError(
            f"the discrete parameters {names} have {count} combinations of values, and {most} can be enumerated here; "
            "hold some of them with fixed=, or give them fewer values"
        )
    return [
        Target(evidence, {**fixed, **{p.name: v for p, v in zip(discrete, row, strict=True)}})
        for row in itertools.product(*values)
    ]
