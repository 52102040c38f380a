r"""Several tests at once: p-values corrected so that all nulls together are kept at a level.

With sorted p-values :math:`p_{(1)} \le \dots \le p_{(n)}` the corrected ones are :math:`\max_{j \le i} \min(1, (n - j + 1)\, p_{(j)})`:
rejecting those below α errs anywhere in at most α of all cases, whatever ties the tests together.

References:
    | Holm, A simple sequentially rejective multiple test procedure, Scand. J. Stat. 6 (1979) 65
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["holm"]


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's correction of p-values.

    Arguments:
        p: p-values of n tests, shape (n,).

    Returns:
        The corrected ones in the same order, shape (n,).

    Example:
        >>> holm([0.01, 0.04, 0.03, 0.005]).round(4).tolist()
        [0.03, 0.06, 0.06, 0.02]
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order]))
    out = np.empty_like(corrected)
    out[order] = corrected
    return out
