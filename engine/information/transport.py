r"""The decomposition from samples: posteriors p(y | x_1) and p(y | x_2) at draws of each part, coupled label by label.

R, U_1 and U_2 depend on x_i through its posterior alone, so each part is a cloud of posteriors: equal ones are merged, and many are
gathered in cells of both parts together (k-means on √p, Hellinger's distance), which loses second order in a cell's width. With
:math:`p(i \mid y)` and :math:`p(j \mid y)` the laws of the cells, the least information is a transport problem for each label,

.. math:: \min_q I_q = \min_{q, r} \sum_y p(y)\, \mathrm{KL}\big(q(\cdot, \cdot \mid y) \,\|\, r\big), \qquad
          q(\cdot, \cdot \mid y) \in \Pi\big(p(i \mid y),\, p(j \mid y)\big)

solved by turns: q(· | y) is r scaled to its marginals (Sinkhorn), all labels in one batch, and r = Σ_y p(y) q(· | y). Both
steps lower a convex function. The scalings are dual variables: with f = r_new / r_old,
:math:`\sum_i p(i) \max_j \log f_{ij} - \sum_{ij} r_{new} \log f_{ij}` bounds what is left to gain.

What is left of two errors is measured and added: what cells lose of :math:`I_i = E\, \mathrm{KL}(p(y \mid x_i) \,\|\, p(y))`, half of
which is given back to the least information; and what finitely many samples make of equal channels, two clouds that differ, by
which R is too small and U too large. That falls with the samples, so that a fifth of them shows more of it than all do: the
difference is part of the errors.

References:
    | Liang et al., Quantifying and modeling multimodal interactions (2023), https://arxiv.org/abs/2302.12247, the batched estimator
    | Banerjee, Rauh, Montúfar, Computing the unique information (2018), https://arxiv.org/abs/1709.07487, the turns
    | Csiszár and Tusnády, Statistics and Decisions, Suppl. 1 (1984) 205; Cuturi (2013), https://arxiv.org/abs/1306.0895
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from engine.information.checks import called, whole
from engine.information.decomposition import Decomposition, taken_apart, unit_factor
from engine.search import check_seed

__all__ = ["decompose_samples"]

_SUM = 1e-4  # how far a posterior's sum may be from 1
_SAME = 9  # decimals in which posteriors agree that are merged
_TURNS = 400
_SCALINGS, _FINISH = 2, 200  # Sinkhorn steps a turn, which go on from the last ones, and at the end
_RELAXED = 1.5  # longer steps: a third of the turns saved; 2 is too long
_GAP = 1e-4  # nats that may be left to gain
_TINY = 1e-300
#: What each number is of I_1, I_2, the least information and I.
_WAYS = {
    "redundancy": np.array([1.0, 1.0, -1.0, 0.0]),
    "unique1": np.array([0.0, -1.0, 1.0, 0.0]),
    "unique2": np.array([-1.0, 0.0, 1.0, 0.0]),
    "synergy": np.array([0.0, 0.0, -1.0, 1.0]),
    "information1": np.array([1.0, 0.0, 0.0, 0.0]),
    "information2": np.array([0.0, 1.0, 0.0, 0.0]),
    "joint_information": np.array([0.0, 0.0, 0.0, 1.0]),
}
_FEW = 20  # samples of a batch below which nothing can be said
_OFF = 5.0  # standard errors of a mean of posteriors from the prior,
_RARE = 15.0  # draws that may be missing: what one in n / 15 of them adds is not seen in n, once in e^15 times,
_LABEL, _LABELS = 0.01, 0.03  # and what one label, and all up to one, may be off by
_WORSE, _LOSS = 3.0, 0.01  # standard errors, and nats, below zero that a synergy may be


def decompose_samples(
    posterior1: Tensor,
    posterior2: Tensor,
    joint: Tensor | None = None,
    *,
    conditional: Tensor | None = None,
    prior: Tensor | Sequence[float] | None = None,
    unit: str = "nats",
    cells: int = 64,
    batches: int = 5,
    seed: int = 0,
) -> Decomposition:
    """Redundancy, unique information and, where joint posteriors are given, synergy, from samples of x_1 and x_2.

    Continuous θ is given by its posterior on points of equal prior weight, such as a grid of the prior's quantiles.

    Arguments:
        posterior1: p(y | x_1) at n1 draws of x_1 from its own marginal law, shape (n1, n_y); each row sums to 1.
        posterior2: The same of x_2, shape (n2, n_y); its draws may be others.
        joint: p(y | x_1, x_2) at n draws of both together, shape (n, n_y); None where nobody knows it: then synergy is None.
        conditional: log p(x_1, x_2 | y) − log p(x_1 | y) − log p(x_2 | y) at n draws of (x_1, x_2, y), shape (n,), nats. Its mean
            is I(X_1; X_2 | Y).
        prior: p(y), shape (n_y,); equal by default.
        unit: ``"nats"`` or ``"bits"``, of the answer.
        cells: The most cells of posteriors for each part.
        batches: Disjoint parts of the samples, solved apart: their scatter, and how far their mean is from the answer of all samples,
            make the error.
        seed: Of the cells' first centres and of the split into batches.

    Returns:
        A :class:`engine.information.Decomposition` with standard errors. ``gap`` is the most that the optimisation may have left.
        It is not reliable where the posteriors contradict each other: their mean over draws is the prior, and synergy is >= 0.

    Raises:
        ValueError: for posteriors that are none or of different labels, fewer than 20 samples a batch, log ratios that are NaN, and
            settings that are none.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> a, b = torch.randint(2, (2, 4000), generator=generator)
        >>> sides = torch.tensor([[1.0, 0.0], [0.5, 0.5]])  # p(y | a) of y = a and b
        >>> joint = torch.eye(2)[a & b]
        >>> found = decompose_samples(sides[a], sides[b], joint, prior=[0.75, 0.25], unit="bits")
        >>> abs(found.redundancy - 0.3113) < 0.02, abs(found.synergy - 0.5) < 0.03, found.unique1 < 0.02
        (True, True, True)
    """
    unit_factor(unit)
    cells, batches = whole("cells", cells, 1, "64 is the default"), whole("batches", batches, 2, "5 is the default")
    check_seed(seed, ValueError)
    first, second = _checked("posterior1", posterior1), _checked("posterior2", posterior2)
    both = None if joint is None else _checked("joint", joint)
    labels = first.shape[1]
    for name, given in (("posterior2", second), ("joint", both)):
        if given is not None and given.shape[1] != labels:
            raise ValueError(
                f"posteriors must be of the same labels, got {labels} in posterior1 and {given.shape[1]} in {name}"
            )
    p_y = torch.full((labels,), 1.0 / labels, dtype=torch.float64) if prior is None else _law(prior, labels)
    sizes = [len(t) for t in (first, second, both) if t is not None]
    if min(sizes) < _FEW * batches:
        *most, last = map(str, sizes)
        raise ValueError(
            f"samples are split into at least 2 batches of at least {_FEW}, got {batches} batches of {', '.join(most)} and {last}; "
            "draw more, or take fewer batches"
        )
    c = None if conditional is None else _ratios(conditional)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(t), generator=generator) for t in (first, second)]
    parts = [t[order].tensor_split(batches) for t, order in zip((first, second), orders, strict=True)]
    numbers, lost, gap = _solved(first, second, both, p_y, cells, seed)
    given_back = 0.5 * sum(lost)  # to the least information, of which none or all may be right
    shares = [None] * batches if both is None else both.tensor_split(batches)
    rows = np.array(
        [
            _solved(one, two, share, p_y, cells, seed + k + 1)[0]
            for k, (one, two, share) in enumerate(zip(*parts, shares, strict=True))
        ]
    )
    first_alone, second_alone, least, *together = numbers.tolist()
    found = taken_apart(first_alone, second_alone, least + given_back, together[0] if together else None, None, gap)
    errors = {}
    for name, way in _WAYS.items():
        if both is None and way[3]:
            continue
        values = rows @ way[: rows.shape[1]]
        bias = values.mean() - numbers @ way[: len(numbers)]
        errors[name] = math.hypot(values.std(ddof=1) / math.sqrt(batches), bias, way[2] * given_back)
    if c is not None:
        found = replace(found, conditional_information=float(c.mean()))
        errors["conditional_information"] = float(c.std() / len(c) ** 0.5)
    found = replace(found, errors=errors)
    named = {"posterior1": first, "posterior2": second, **({} if both is None else {"joint": both})}
    faults = off_the_prior(named, p_y, "draw x from its marginal law, or give prior=")
    reason = "; ".join(filter(None, [*faults, negative(found, "joint", "posterior1", "posterior2")]))
    return replace(found, reliable=not reason, reason=reason).to(unit)


def negative(found: Decomposition, joint: str, first: str, second: str) -> str:
    """Why the synergy of a decomposition in nats cannot be; empty where it can.

    Arguments:
        found: Of samples, with errors.
        joint, first, second: What messages call the posteriors.
    """
    synergy = 0.0 if found.synergy is None else found.synergy
    if synergy >= -max(_WORSE * found.errors.get("synergy", 0.0), _LOSS):
        return ""
    return f"synergy is negative by more than its error, which no joint law allows: {joint} contradicts {first} and {second}"


def off_the_prior(posteriors: Mapping[str, Tensor], p_y: Tensor, remedy: str) -> list[str]:
    """Which posteriors have a mean over their draws that is not the prior, and where.

    Labels are looked at one by one, and all up to each: a shift of many labels is small in every one.

    Arguments:
        posteriors: What messages call them -> p(y | x), shape (n, n_y).
        p_y: The prior, shape (n_y,).
        remedy: What to do.
    """
    faults = []
    for name, posterior in posteriors.items():
        n, worst, said = len(posterior), 1.0, ""
        for most, p, prior in ((_LABEL, posterior, p_y), (_LABELS, posterior.cumsum(-1), p_y.cumsum(-1))):
            mean = p.mean(0)
            allowed = (_OFF * p.std(0) / n**0.5 + _RARE / n).clamp_min(most)
            off = (mean - prior).abs() / allowed
            k = int(off.argmax())
            if float(off[k]) > worst:
                worst = float(off[k])
                which = f"label {k} has" if p is posterior else f"labels 0 to {k} have"
                said = f"{which} {float(mean[k]):.3g} where the prior has {float(prior[k]):.3g}"
        if said:
            faults.append(f"the mean of {name} over its draws is not the prior: {said}; {remedy}")
    return faults


def _solved(
    first: Tensor, second: Tensor, both: Tensor | None, p_y: Tensor, cells: int, seed: int
) -> tuple[np.ndarray, tuple[float, float], float]:
    """One set of samples.

    Returns:
        I_1, I_2, the least information of cells and, with joint posteriors, I, shape (3,) or (4,), nats; what cells lose of I_1 and
        I_2; and a bound on what is left to gain.
    """
    p1, p2 = _cells(first, second, cells, seed)
    least, left = _least(p1, p2, p_y)
    whole = [_information((t / t.sum(0).clamp_min(_TINY)).mT, p_y) for t in (first, second)]
    lost = [max(0.0, w - _information(p, p_y)) for w, p in zip(whole, (p1, p2), strict=True)]
    numbers = [*whole, least]
    if both is not None:
        numbers.append(_information((both / both.sum(0).clamp_min(_TINY)).mT, p_y))
    return np.array(numbers), (lost[0], lost[1]), left


def _checked(name: str, posterior: Tensor) -> Tensor:
    """Posteriors (n, n_y) in float64. ValueError for what are none."""
    p = _numbers(name, posterior, "the shape (n, n_y), one row for each draw")
    if p.dim() != 2 or 0 in p.shape:
        raise ValueError(f"{name} must have shape (n, n_y), one row for each draw, got {tuple(p.shape)}")
    bad = ~(torch.isfinite(p) & (p >= 0.0)).all(-1) | ~((p.sum(-1) - 1.0).abs() < _SUM)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"each row of {name} must be >= 0 with sum 1, got {p[at].tolist()[:5]} with sum {float(p[at].sum()):.6g} "
            f"in row {at}; take softmax(s + log prior) over the labels"
        )
    return p / p.sum(-1, keepdim=True)


def _numbers(name: str, given: Any, shape: str) -> Tensor:
    """What was given in float64. ValueError for texts, objects and complex numbers."""
    try:
        t = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must hold numbers of {shape}, got {called(given)}: {error}") from error
    if t.dtype.is_complex:
        raise ValueError(f"{name} must hold real numbers of {shape}, got {t.dtype}; take the real part")
    return t.to(torch.float64)


def _ratios(conditional: Any) -> Tensor:
    """Log ratios (n,). ValueError for what are none: infinite ones are of draws that determine each other."""
    c = _numbers("conditional", conditional, "the shape (n,), one log ratio for each draw").reshape(-1)
    if len(c) < _FEW:
        raise ValueError(
            f"conditional must hold at least {_FEW} log ratios, one for each draw, got {len(c)}; draw more"
        )
    if bool((bad := torch.isnan(c)).any()):
        raise ValueError(
            f"conditional must hold no NaN, got {int(bad.sum())} of {len(c)}, first in row {int(bad.nonzero()[0])}; the draws must "
            "lie where all three laws have a density"
        )
    return c


def _law(prior: Tensor | Sequence[float], labels: int) -> Tensor:
    p = _numbers("prior", prior, "the shape (n_y,), one for each label")
    if p.shape != (labels,) or not bool((p > 0.0).all()) or abs(float(p.sum()) - 1.0) > _SUM:
        raise ValueError(
            f"prior must hold {labels} probabilities > 0 with sum 1, got {p.tolist()[:5]} of shape {tuple(p.shape)}"
        )
    return p / p.sum()


def _cells(first: Tensor, second: Tensor, most: int, seed: int) -> list[Tensor]:
    """p(cell | y), shape (n_y, cells), of both parts' posteriors (n, n_y): each label's weights of the draws are scaled to sum to 1."""
    merged = [np.unique(t.numpy().round(_SAME), axis=0, return_counts=True) for t in (first, second)]
    if max(len(values) for values, _ in merged) > most:
        both = np.sqrt(torch.cat([first, second]).numpy())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty cell is left out below
            _, label = kmeans2(both, most, iter=10, minit="++", rng=np.random.default_rng(seed))
        sums = []
        for part, own in zip((first, second), np.split(label, [len(first)]), strict=True):
            zeros = torch.zeros(most, part.shape[1], dtype=torch.float64)
            sums.append(zeros.index_add_(0, torch.from_numpy(own).long(), part))
    else:
        sums = [torch.from_numpy(values * counts[:, None]) for values, counts in merged]
    filled = [t[t.sum(-1) > 0.0] for t in sums]
    return [(t / t.sum(0).clamp_min(_TINY)).mT.contiguous() for t in filled]


def _information(cells: Tensor, p_y: Tensor) -> float:
    """I(cell; Y) in nats of p(cell | y), shape (n_y, cells)."""
    p = cells * p_y[:, None]
    apart = p.sum(0) * p_y[:, None]
    return float(torch.where(p > 0.0, p * (p.clamp_min(_TINY) / apart.clamp_min(_TINY)).log(), 0.0).sum())


def _least(p1: Tensor, p2: Tensor, p_y: Tensor) -> tuple[float, float]:
    """min I_q(X_1, X_2; Y) in nats for p(i | y), p(j | y), shapes (n_y, n1), (n_y, n2), and a bound on what is left to gain."""
    r = torch.einsum("y,yi,yj->ij", p_y, p1, p2)
    one, two = p_y @ p1, p_y @ p2
    u, v, left = torch.ones_like(p1), torch.ones_like(p2), float("inf")
    for turn in range(_TURNS):
        for _ in range(_SCALINGS):
            u = p1 / (v @ r.mT).clamp_min(_TINY)
            v = p2 / (u @ r).clamp_min(_TINY)
        growth = torch.einsum("y,yi,yj->ij", p_y, u, v)  # Σ_y p(y) q(i, j | y) / r(i, j)
        logs = growth.clamp_min(_TINY).log()
        most = min(float(one @ logs.amax(1)), float(two @ logs.amax(0)))
        left = most - float((r * growth * logs).sum())
        if left < _GAP and turn:
            break
        r = r * growth**_RELAXED
        r = r / r.sum()
    for _ in range(_FINISH):
        u = p1 / (v @ r.mT).clamp_min(_TINY)
        v = p2 / (u @ r).clamp_min(_TINY)
    q = p_y[:, None, None] * u[:, :, None] * r * v[:, None, :]
    together = q.sum(0)
    apart = together * p_y[:, None, None]
    return float(torch.where(q > 0.0, q * (q.clamp_min(_TINY) / apart.clamp_min(_TINY)).log(), 0.0).sum()), max(
        0.0, left
    )
