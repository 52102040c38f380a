"""Simulated data sets at an estimate, and the maxima of any subset of the plugins for each: the law of what depends on them.

References:
    | Davison and Hinkley (1997), Bootstrap Methods and their Application, section 4.2, parametric tests
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModalityError
from engine.evidence import Evidence
from engine.learning.simulator import draw
from engine.many import estimate_many
from engine.result import Estimate

__all__ = ["maxima", "simulated"]


def simulated(evidence: Evidence, theta: Tensor, toys: int, seed: int = 0) -> dict[str, Tensor]:
    """Data sets like those of an evidence, drawn at one θ.

    Arguments:
        evidence: What plugins there are, and how many observations each has.
        theta: θ, shape (P,).
        toys: How many data sets, B.
        seed: Of the simulations.

    Returns:
        Plugin -> (B, N, *event_shape), float64.

    Raises:
        ModalityError: for a plugin without a simulator, one that fails, or gaps in the data; the message names it.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu")])
        >>> evidence = Evidence(space, {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, {"a": [[1.0], [3.0]]})
        >>> x = simulated(evidence, torch.tensor([5.0]), 1000)["a"]
        >>> x.shape, bool((x.mean() - 5.0).abs() < 0.1)
        (torch.Size([1000, 2, 1]), True)
    """
    data: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    theta = evidence.parameters.tensor(theta)
    for name in evidence.names:
        modality, n = evidence.modalities[name], evidence.observations.lengths[name]
        if not modality.has_simulator:
            raise ModalityError(
                f"toys need a simulator of every plugin, and '{name}' ({type(modality).__name__}) has none; leave toys out"
            )
        if modality.allows_missing and any(bool(torch.isnan(x).any()) for x in evidence.observations.blocks(name)):
            raise ModalityError(f"toys cannot have the gaps of the data of '{name}'; leave toys out")
        local = theta[evidence.parameters.indices(modality.parameter_names)]
        label = f"the simulator of plugin '{name}'"
        drawn = draw(modality.simulate, local.expand(toys * n, -1), generator, modality.event_shape, label)
        if drawn.excluded:
            raise ModalityError(
                f"{label} returned {drawn.excluded} of {toys * n} observations that are not finite; mend it, or leave toys out"
            )
        data[name] = drawn.x.reshape(toys, n, *modality.event_shape)
    return data


def maxima(
    fit: Estimate, evidence: Evidence, data: Mapping[str, Tensor], subsets: Sequence[tuple[str, ...]], seed: int = 0
) -> dict[tuple[str, ...], Tensor]:
    """max S of subsets of the plugins for each of many data sets.

    Arguments:
        fit: Where the searches start, among other points, and what is held.
        evidence: The plugins.
        data: Plugin -> (B, N, *event_shape).
        subsets: Names of plugins, a tuple each.
        seed: Of the other starting points.

    Returns:
        Subset -> (B,), in nats; NaN where a fit failed.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> plugins = {name: Gaussian(parameter_names=("mu",), sd=1.0) for name in "ab"}
        >>> evidence = Evidence(ParameterSpace([Parameter("mu")]), plugins, {"a": [[1.0]], "b": [[3.0]]})
        >>> data = {"a": torch.tensor([[[0.0]], [[1.0]]]), "b": torch.tensor([[[2.0]], [[1.0]]])}
        >>> found = maxima(estimate(evidence), evidence, data, [("a",), ("b",), ("a", "b")])
        >>> (2.0 * (found["a",] + found["b",] - found["a", "b"])).round(decimals=9).abs().tolist()  # (a − b)² / 2
        [2.0, 0.0]
    """
    out: dict[tuple[str, ...], Tensor] = {}
    settings: dict[str, Any] = {"start": fit.theta, "fixed": fit.fixed, "screen": 64, "polish": 3, "seed": seed}
    for key in subsets:
        live, some = {n: evidence.modalities[n] for n in key}, {n: data[n] for n in key}
        found = estimate_many(fit.parameters, live, some, shape=False, allow_identical=True, progress=False, **settings)
        out[key] = found.log_evidence
    return out
