r"""Units that are alike in what two parts share without depending on each other: covariates, and which entries are missing.

Two parts that carry the same time stamps are independent given θ *and the stamps*, which is all that a sum of
:math:`\log p(x_m \mid t, \theta)` needs; so are two parts whose entries are missing in the same units. A test that pairs any unit with any
other would call both dependence. So orders are drawn within strata of units that are alike in them (local permutation), of what a
polynomial of the covariates leaves, as units of a stratum differ in them a little.

A column that both parts hold is a covariate only if neither models it: then their scores have mean 0 whatever its value. Where
they do not, it is a measurement that is counted twice, and stays in the test.

References:
    | Kim, Neykov, Balakrishnan, Wasserman, Ann. Stat. 50 (2022) 3388, https://arxiv.org/abs/2112.11666, local permutation tests
    | Alexander and Govern, J. Educ. Stat. 19 (1994) 91, equal means without equal variances
    | Rubin, Biometrika 63 (1976) 581, when which entries are missing may be ignored
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch
from torch import Tensor

__all__: list[str] = []  # what engine.information.dependence asks of two parts

_LEAF = 8  # units of a stratum, at least, where there are not a few values alone
_DEGREE, _EACH = 5, 10  # of the polynomial, in each covariate and its normal scores; units for each of its terms
_BIN, _BINS = 25, 20  # units of a group whose mean score is looked at, and the most groups
_GROUP = 10  # units of a group that is looked at
_SAME = 1e-12  # of a variance: what is left of a column that is a polynomial of covariates
_MODELLED = 0.01  # p-values of equal mean scores below which a column is no covariate


@dataclass(frozen=True, eq=False)
class Strata:
    """Units that are alike.

    Attributes:
        labels: The stratum of each unit, shape (n,), from 0 on.
        given: What they are alike in, in words.
        first, second: The columns of the parts that are left to test.
        terms: Of the polynomial, orthonormal, shape (n, K).

    Example:
        >>> t = torch.arange(400.0, dtype=torch.float64)
        >>> y = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> found = Strata.of(*(torch.stack([t, e], 1) for e in y), *y[..., None])
        >>> found.given, found.first, int(found.labels.bincount().min())
        ('an entry that both carry', [1], 12)
    """

    labels: Tensor
    given: str
    first: list[int]
    second: list[int]
    terms: Tensor

    @property
    def count(self) -> int:
        """How many strata there are."""
        return int(self.labels.max()) + 1

    @property
    def shrink(self) -> float:
        """What the squared correlation of two columns is multiplied by to scatter as that of columns which are paired anew.

        Both lie in what the K terms of the polynomial leave of n units less S means; of them paired anew, one does not.
        """
        free = len(self.labels) - self.count
        return max(0.0, 1.0 - (self.terms.shape[1] - 1) / free) if free else 0.0

    def less(self, values: Tensor) -> Tensor:
        """Columns (n, D) without what the polynomial tells of them; NaN, and what it tells all of, stay as they are."""
        known = torch.where(values.isnan(), values.nanmean(0), values)
        left = known - self.terms @ (self.terms.mT @ known)
        whole = left.square().sum(0) < _SAME * (known - known.mean(0)).square().sum(0)
        return torch.where(values.isnan() | whole, values, left)

    @classmethod
    def of(cls, first: Tensor, second: Tensor, score1: Tensor, score2: Tensor) -> Strata | None:
        """Of two parts; None where they share nothing of the kind.

        Arguments:
            first, second: Observations (n, D_m); NaN marks what was not measured.
            score1, score2: Their scores (n, P_m).
        """
        a, b = first.numpy(), second.numpy()
        n = len(a)
        same = _same_columns(a, b)
        same = [(i, j) for i, j in same if not (_modelled(a[:, i], score1) or _modelled(a[:, i], score2))]
        left = [k for k in range(a.shape[1]) if k not in {i for i, _ in same}]
        other = [k for k in range(b.shape[1]) if k not in {j for _, j in same}]
        if not left or not other:  # a part that is nothing but covariates says nothing
            same, left, other = [], list(range(a.shape[1])), list(range(b.shape[1]))
        columns = [a[:, i] for i, _ in same]
        given = (
            ["an entry that both carry" if len(same) == 1 else f"{len(same)} entries that both carry"] if same else []
        )
        gaps = [np.isnan(a[:, left]), np.isnan(b[:, other])]
        gaps = [g[:, g.any(0) & ~g.all(0)] for g in gaps]
        if all(g.shape[1] for g in gaps):
            pattern = np.hstack(gaps)
            few = len(np.unique(np.hstack([pattern, *(c[:, None] for c in columns)]), axis=0)) * _LEAF <= n
            columns += list(pattern.T.astype(np.float64)) if few else [g.sum(1).astype(np.float64) for g in gaps]
            given.append("which entries are missing")
        if not columns:
            return None
        ranks = scipy.stats.rankdata(np.stack(columns, 1), method="dense", axis=0)
        values, labels = np.unique(ranks, axis=0, return_inverse=True)
        labels = labels.reshape(-1) if len(values) * _LEAF <= n else _leaves(ranks)
        terms = _terms([a[:, i] for i, _ in same], n)
        return cls(torch.from_numpy(labels.astype(np.int64)), " and ".join(given), left, other, terms)


def _same_columns(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int]]:
    """(i, j) of columns that vary, have no gap, and are the same in both; each at most once."""
    there = {np.ascontiguousarray(b[:, j]).tobytes(): j for j in reversed(range(b.shape[1]))}
    found: dict[int, int] = {}
    for i in range(a.shape[1]):
        j = there.get(np.ascontiguousarray(a[:, i]).tobytes())
        if j is not None and j not in found.values() and not np.isnan(a[:, i]).any() and np.ptp(a[:, i]) > 0.0:
            found[i] = j
    return list(found.items())


def _modelled(column: np.ndarray, scores: Tensor) -> bool:
    """Whether the mean of any score (n, P_m) depends on a column (n,), so that the part does not take it as given."""
    n = len(column)
    if len(np.unique(column)) <= max(2, n // _BIN):
        group = np.unique(column, return_inverse=True)[1].reshape(-1)
    else:
        bins = int(np.clip(n // _BIN, 2, _BINS))
        group = (scipy.stats.rankdata(column, method="ordinal") - 1).astype(np.int64) * bins // n
    sizes = np.bincount(group)
    for s in scores.numpy().T:
        parts = [s[group == k] for k in range(len(sizes)) if sizes[k] >= _GROUP]
        if len(parts) < 2 or np.ptp(s) == 0.0:
            continue
        flat = [np.ptp(p) == 0.0 for p in parts]
        if all(flat):
            return True
        moving = [p for p, still in zip(parts, flat, strict=True) if not still]
        if len(moving) > 1 and scipy.stats.alexandergovern(*moving).pvalue * scores.shape[1] < _MODELLED:
            return True
    return False


def _terms(covariates: list[np.ndarray], n: int) -> Tensor:
    """Powers of covariates and of their normal scores, and products of two, orthonormal, as many as n units bear; shape (n, K)."""
    ones = np.ones(n)
    standard = [(c - c.mean()) / c.std() for c in covariates]
    normal = [scipy.stats.norm.ppf((scipy.stats.rankdata(c) - 0.5) / n) for c in covariates]
    terms = [ones]
    for power in range(1, _DEGREE + 1):
        terms += [c**power for c in standard]
        terms += [z**power for z in normal]
        terms += [x * y for k, x in enumerate(standard) for y in standard[:k]] if power == 1 else []
    kept = np.stack(terms[: max(1, n // _EACH)], 1)
    u, size, _ = np.linalg.svd(kept / np.linalg.norm(kept, axis=0), full_matrices=False)
    return torch.from_numpy(u[:, size > 1e-9 * size[0]])


def _leaves(ranks: np.ndarray) -> np.ndarray:
    """Labels (n,) of boxes of at least 8 units that are near each other in their ranks (n, D): halves of the widest side, again and
    again."""
    labels, made = np.zeros(len(ranks), dtype=np.int64), 0
    waiting = [np.arange(len(ranks))]
    while waiting:
        units = waiting.pop()
        if len(units) < 2 * _LEAF:
            labels[units] = made
            made += 1
            continue
        side = ranks[units]
        ordered = units[np.argsort(side[:, int(np.argmax(side.std(0)))], kind="stable")]
        waiting += [ordered[len(ordered) // 2 :], ordered[: len(ordered) // 2]]
    return labels
