"""How good an estimate is: error, bias, and whether its own error bar is true."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine import Modality, Status
from engine.many import estimate_many
from examples.learned_estimate.ringdown import CENTRE, SPACE, information

__all__ = ["LEVEL", "Score", "Summary", "score", "summary"]

LEVEL = 0.6827


@dataclass(frozen=True)
class Score:
    """One kind of estimate, of many data sets.

    Attributes:
        mse: Mean squared error over the Cramér–Rao bound, mean over θ's components; 1 where the bound is attained.
        mse_noise: The standard error of that, from the number of data sets.
        bias: Root mean square of the bias at different θ, in standard errors (root of the Cramér–Rao bound), its
            sampling noise subtracted.
        pull: Standard deviation of (θ̂ − θ) / claimed error, of each component; where no bound holds θ̂.
        coverage: How often the 68 % profile interval covers θ, for each component; NaN where not asked for.
        bound: Share of the data sets of which a bound holds θ̂.
        lost: Share of the data sets without a usable θ̂.
    """

    mse: float
    mse_noise: float
    bias: float
    pull: tuple[float, ...]
    coverage: tuple[float, ...]
    bound: float
    lost: float


@dataclass(frozen=True)
class Summary:
    """A mean over seeds and its standard error; 0 where that is not known."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}" if self.error else f"{self.value:.2f}"


def score(modalities: Mapping[str, Modality], data: Mapping[str, Tensor], theta: Tensor, *, intervals: bool) -> Score:
    """Estimate every data set and compare with the θ that made it.

    Arguments:
        modalities: The plugins to sum, by name.
        data: name -> (K, R, N, *event_shape): R data sets at each of K values of θ.
        theta: Shape (K, P).
        intervals: Whether to find profile intervals too.
    """
    K, R, N = next(iter(data.values())).shape[:3]
    flat = {name: x.flatten(0, 1) for name, x in data.items()}
    search: dict[str, Any] = {"screen": 256}
    if all(modalities[name].concave for name in data):
        search = {"screen": 0, "start": CENTRE}
    fits = estimate_many(SPACE, modalities, flat, progress=False, **search)
    made = theta.repeat_interleave(R, 0)
    off, info = fits.theta - made, N * information(data, theta)
    error = torch.einsum("bi,bij,bj->b", off, info.repeat_interleave(R, 0), off) / len(SPACE)
    usable = torch.tensor([status not in (Status.FAILED, Status.NOT_IDENTIFIED) for status in fits.status])
    bound = torch.linalg.inv(info).diagonal(dim1=-2, dim2=-1)[:, None]
    per_point = torch.where(usable[:, None], off, torch.nan).reshape(K, R, -1) / bound.sqrt()
    bias = per_point.nanmean(1).square() - (per_point - per_point.nanmean(1, True)).square().nanmean(1) / (R - 1)
    held = (fits.sd == 0.0).any(-1)
    pulls = (off / fits.sd)[usable & ~held]
    coverage = (math.nan,) * len(SPACE)
    if intervals:
        ends = fits.intervals(LEVEL)
        inside = [(ends[p][:, 0] <= made[:, i]) & (made[:, i] <= ends[p][:, 1]) for i, p in enumerate(SPACE.names)]
        coverage = tuple(float(column.double().mean()) for column in inside)
    return Score(
        mse=float(error[usable].mean()),
        mse_noise=float(error[usable].std() / math.sqrt(int(usable.sum()))),
        bias=float(bias.mean().clamp_min(0.0).sqrt()),
        pull=tuple(pulls.std(0).tolist()),
        coverage=coverage,
        bound=float(held.double().mean()),
        lost=float((~usable).double().mean()),
    )


def summary(values: Sequence[float], noise: Sequence[float] | None = None) -> Summary:
    """The mean over seeds; its error is the seeds' scatter, or the known noise of each where that is larger."""
    n = len(values)
    scatter = statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    known = math.sqrt(sum(e * e for e in noise)) / n if noise else 0.0
    return Summary(statistics.fmean(values), max(scatter, known))
