"""How good the estimates of many data sets are: error over the Cramér–Rao bound, coverage, statuses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.many import Estimates
from examples.frozen_backbone.galaxy import NAMES

__all__ = ["LEVEL", "Score", "score", "score_estimates"]

LEVEL = 0.6827


@dataclass(frozen=True)
class Score:
    """Estimates of many data sets against the θ that made them.

    Attributes:
        error: Parameter -> root mean square of (θ̂ − θ) / √(Cramér–Rao bound at θ); 1 where the bound is attained.
        coverage: Parameter -> how often the 68.3 % interval has θ in it.
        sets: How many data sets there are.
        status: Status -> how many of them have it; empty for a network, which gives none.
    """

    error: dict[str, float]
    coverage: dict[str, float]
    sets: int
    status: dict[str, int] = field(default_factory=dict)

    def noise(self, name: str) -> float:
        """About the standard error of ``error``, from the finite number of data sets."""
        return self.error[name] / math.sqrt(2.0 * self.sets)


def score(
    theta: Tensor, ends: Mapping[str, Tensor], made: Tensor, information: Tensor, status: Sequence[str] = ()
) -> Score:
    """Score B estimates; a parameter that the data say nothing about is left out.

    Arguments:
        theta: θ̂, (B, P); NaN where there is none, which counts in the statuses and as an interval that misses.
        ends: Parameter -> interval, (B, 2).
        made: The θ of each data set, (B, P).
        information: Fisher's information of each whole data set, (B, P, P).
        status: Of each data set.
    """
    error, coverage = {}, {}
    known = [p for p in range(len(NAMES)) if bool((information[:, p, p] > 0).all())]
    bound = torch.linalg.inv(information[:, known][:, :, known]).diagonal(dim1=-2, dim2=-1)
    for k, p in enumerate(known):
        pull = (theta[:, p] - made[:, p]) / bound[:, k].sqrt()
        error[NAMES[p]] = float(pull.square().nanmean().sqrt())
        low, high = ends[NAMES[p]].unbind(-1)
        coverage[NAMES[p]] = float(((low <= made[:, p]) & (made[:, p] <= high)).double().mean())
    return Score(error, coverage, len(theta), dict(Counter(map(str, status))))


def score_estimates(fits: Estimates, made: Tensor, information: Tensor) -> Score:
    """The same of what a registry says: profile intervals, and statuses."""
    return score(fits.theta, fits.intervals(LEVEL), made, information, [str(s) for s in fits.status])
