r"""The classifier two-sample test: how well a network tells two sets of draws apart; ½ is not at all.

References:
    | Lopez-Paz and Oquab (2017), arXiv:1610.06545
    | Lueckmann et al. (2021), arXiv:2101.04653, the settings that simulation-based inference uses
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from engine.errors import PosteriorError

__all__ = ["c2st"]


def c2st(first: Tensor, second: Tensor, seed: int = 1) -> float:
    """The cross-validated accuracy of a classifier between two samples: 0.5 where they are alike, 1 where they are apart.

    Arguments:
        first, second: Draws, shapes (n, P) and (m, P); of about equal numbers.
        seed: Of the classifier and its folds.

    Returns:
        The accuracy. A sample of 1000 and 1000 has an error of about 0.011.

    Raises:
        PosteriorError: for samples of other shapes, fewer than 20 draws, or numbers that are not finite.

    Example:
        >>> draws = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
        >>> c2st(draws[:150], draws[150:] + 5.0) > 0.95
        True
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1]:
        raise PosteriorError(
            f"two samples of the same parameters are compared, (n, P) and (m, P), got {tuple(first.shape)} and "
            f"{tuple(second.shape)}; stack the draws of one parameter each as columns"
        )
    if min(len(first), len(second)) < 20:
        raise PosteriorError(f"at least 20 draws of each are compared, got {len(first)} and {len(second)}")
    if not (bool(torch.isfinite(first).all()) and bool(torch.isfinite(second).all())):
        raise PosteriorError("draws to compare must be finite; a posterior that failed has none")
    from sbi.utils.metrics import c2st as classify

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(classify(first.detach().float(), second.detach().float(), seed=seed))
