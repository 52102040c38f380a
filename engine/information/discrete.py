r"""The decomposition of a table p(x_1, x_2, y), exactly: a convex programme.

.. math:: q^* = \arg\max_{q \in \Delta_p} H_q(Y \mid X_1, X_2), \qquad
          -H_q(Y \mid X_1, X_2) = \sum_{x_1, x_2, y} q(x_1, x_2, y) \log \frac{q(x_1, x_2, y)}{q(x_1, x_2)}

a relative-entropy cone programme over the cells that both marginals allow.

References:
    | Bertschinger et al., Entropy 16 (2014) 2161, https://arxiv.org/abs/1311.2852, problem (9)
    | Makkeh, Theis, Vicente, Entropy 19 (2017) 530, https://arxiv.org/abs/1702.03958, the cone programme
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from engine.errors import EstimateError
from engine.information.decomposition import Decomposition, taken_apart, unit_factor

__all__ = ["decompose"]

_SUM = 1e-6  # how far a table's sum may be from 1
_LARGEST = 20_000  # cells that the cone programme is given
_LOOSE = 1e-4  # nats by which a solution may pass the bounds that it must lie between


def decompose(table: Tensor | np.ndarray | Any, unit: str = "nats") -> Decomposition:
    """Redundancy, unique information, synergy and I(X_1; X_2 | Y) of a discrete law.

    Arguments:
        table: p(x_1, x_2, y), shape (n1, n2, n_y), nonnegative, with sum 1.
        unit: ``"nats"`` or ``"bits"``, of the answer.

    Returns:
        A :class:`engine.information.Decomposition`, exact to about 1e-6.

    Raises:
        ValueError: for what is no table of numbers, another shape, negative or non-finite entries, or a sum that is not 1, and for a
            table of more than 20,000 possible cells (:func:`engine.information.decompose_samples` takes larger ones).
        EstimateError: where the solver fails.

    Example:
        >>> import torch
        >>> AND = torch.zeros(2, 2, 2)
        >>> for a in (0, 1):
        ...     for b in (0, 1):
        ...         AND[a, b, a & b] = 0.25
        >>> print(decompose(AND, unit="bits"))
        redundancy 0.3113, unique 0 and 0, synergy 0.5 bits; the sum of both misses 0.1887 bits
    """
    unit_factor(unit)
    p = checked_table(table)
    p1, p2, joint = p.sum(1), p.sum(0), p.sum(2)
    p_y = p.sum((0, 1))
    information1, information2 = information(p1), information(p2)
    total = entropy(joint) + entropy(p_y) - entropy(p)
    conditional = entropy(p1) + entropy(p2) - entropy(p_y) - entropy(p)
    low, high = max(information1, information2), information1 + information2
    if min(information1, information2) <= 1e-15:  # a part that tells nothing shares nothing
        least = low
    else:
        least = entropy(p_y) + _least_negative_entropy(p1, p2)
        if not low - _LOOSE <= least <= min(high, total) + _LOOSE:
            raise EstimateError(
                f"the least information of a law with these marginals must lie in [{low:.6g}, {min(high, total):.6g}] nats, and the "
                f"solver found {least:.6g}; merge cells of tiny probability"
            )
        least = min(least, total)
    return taken_apart(information1, information2, least, total, max(0.0, conditional)).to(unit)


def checked_table(table: Any) -> np.ndarray:
    """p(x_1, x_2, y) as float64 with sum 1. ValueError for what is none."""
    try:
        p = np.asarray(table.detach().cpu() if isinstance(table, Tensor) else table)
    except (TypeError, ValueError) as error:  # rows of unequal lengths
        raise ValueError(
            f"a table is p(x1, x2, y), real numbers of shape (n1, n2, n_y), got a {type(table).__name__} that is no array; give every "
            "row as many entries"
        ) from error
    if p.dtype.kind not in "biuf":
        raise ValueError(
            f"a table is p(x1, x2, y), real numbers of shape (n1, n2, n_y), got a {type(table).__name__}: "
            f"{' '.join(repr(table).split()):.60}; give an array of probabilities with y on the last axis"
        )
    p = p.astype(np.float64)
    if p.ndim != 3 or 0 in p.shape:
        raise ValueError(f"a table is p(x1, x2, y) of shape (n1, n2, n_y), got shape {p.shape}; put y on the last axis")
    bad = np.argwhere(~(np.isfinite(p) & (p >= 0.0)))
    if len(bad):
        at = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"probabilities must be finite and >= 0, got {p[at]} at {at}; counts belong divided by their sum"
        )
    if abs(p.sum() - 1.0) > _SUM:
        raise ValueError(f"a table's probabilities must sum to 1, got {p.sum():.6g}; divide it by its sum")
    return p / p.sum()


def entropy(p: np.ndarray) -> float:
    """−Σ p log p in nats of a table of any shape."""
    p = p[p > 0.0]
    return float(-(p * np.log(p)).sum())


def information(p: np.ndarray) -> float:
    """I(X; Y) in nats of a table p(x, y)."""
    return max(0.0, entropy(p.sum(1)) + entropy(p.sum(0)) - entropy(p))


def _least_negative_entropy(p1: np.ndarray, p2: np.ndarray) -> float:
    """min −H_q(Y | X_1, X_2) over q with marginals p(x_1, y), p(x_2, y)."""
    import cvxpy as cp
    from scipy import sparse

    a, b, y = np.nonzero((p1[:, None, :] > 0.0) & (p2[None, :, :] > 0.0))
    if len(a) > _LARGEST:
        raise ValueError(
            f"the cone programme takes tables of at most {_LARGEST} possible cells, got {len(a)}; decompose_samples takes "
            "posteriors of any number of values"
        )

    def sums(*index: np.ndarray, shape: tuple[int, ...]) -> sparse.csr_matrix:
        rows = np.ravel_multi_index(index, shape)
        return sparse.csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))), (int(np.prod(shape)), len(rows)))

    q = cp.Variable(len(a), nonneg=True)
    pairs = sums(a, b, shape=(len(p1), len(p2)))
    constraints = []
    for matrix, p in ((sums(a, y, shape=p1.shape), p1), (sums(b, y, shape=p2.shape), p2)):
        there = p.ravel() > 0.0
        constraints.append(matrix[there] @ q == p.ravel()[there])
    problem = cp.Problem(cp.Minimize(cp.sum(cp.rel_entr(q, pairs.T @ (pairs @ q)))), constraints)
    try:
        problem.solve(solver=cp.CLARABEL)
    except cp.SolverError as error:
        raise EstimateError(f"the cone programme of a table of {len(a)} cells was not solved: {error}") from error
    if problem.status not in ("optimal", "optimal_inaccurate") or q.value is None:
        raise EstimateError(f"the cone programme of a table of {len(a)} cells ended as {problem.status}")
    found = np.maximum(q.value, 0.0)
    together = pairs.T @ (pairs @ found)
    some = found > 0.0
    return float((found[some] * np.log(found[some] / together[some])).sum())
