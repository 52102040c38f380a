r"""Where a learned scalar was trained: the box of its prior, and how far an observation lies from its simulations.

The score of an observation is its distance to the k-th nearest of a reference sample of simulations, in whitened
features; what it means is its rank among the scores of other simulations, so that no density is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from engine.modality import Modality

__all__ = ["Domain"]

_REFERENCES = 1000
_NEIGHBOUR = 5
_FEATURES = 16  # principal components; beyond them distances say little
_TAIL = 0.01
_LEVEL = 1e-4  # the chance of a false alarm for data of the training distribution
_FAR = 3.0  # times the farthest simulation: outside whatever the numbers


@dataclass(frozen=True, eq=False)
class Domain:
    """A reference sample of simulations in whitened features.

    Attributes:
        centre: Of the features, shape (F,).
        whiten: Features less centre -> components, shape (F, C).
        references: Shape (R, C).
        scores: Of other simulations, ascending, shape (S,).

    Example:
        >>> from modalities import Gaussian
        >>> gaussian = Gaussian(parameter_names=("mu",), sd=1.0)
        >>> x = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> domain = Domain.of(gaussian, x)
        >>> domain.outside(gaussian, x[:100])[0], domain.outside(gaussian, torch.full((1,), 30.0))[0]
        (False, True)
    """

    centre: Tensor
    whiten: Tensor
    references: Tensor
    scores: Tensor

    @classmethod
    def of(cls, modality: Modality, x: Tensor) -> Domain:
        """The domain that simulations x (n, *event_shape) span.

        Arguments:
            modality: Whose features are used.
            x: Simulations over the prior, in no order.
        """
        features = _features(modality, x[: 2 * _REFERENCES])
        centre = features.mean(0)
        values, axes = torch.linalg.eigh(torch.cov(features.T).reshape(features.shape[1], -1))
        use = values > 1e-10 * values[-1].clamp_min(1e-300)
        values, axes = values[use].flip(0)[:_FEATURES], axes[:, use].flip(1)[:, :_FEATURES]
        whiten = axes / values.sqrt()
        rows = (features - centre) @ whiten
        half = len(rows) // 2
        found = cls(centre, whiten, rows[:half], torch.zeros(0, dtype=torch.float64))
        return cls(centre, whiten, rows[:half], found._distance(rows[half:]).sort().values)

    def _distance(self, rows: Tensor) -> Tensor:
        k = min(_NEIGHBOUR, len(self.references))
        parts = [torch.cdist(r, self.references).kthvalue(k, -1).values for r in rows.split(2000)]
        return torch.cat(parts) if parts else rows.new_zeros(0)

    def score(self, modality: Modality, x: Tensor) -> Tensor:
        """The fraction of simulations nearer to the references than each observation, (n,); 1 is farther than all.

        Arguments:
            modality: Whose features are used.
            x: Shape (n, *event_shape).
        """
        distance = self._distance((_features(modality, x) - self.centre) @ self.whiten)
        return torch.searchsorted(self.scores, distance).double() / len(self.scores)

    def outside(self, modality: Modality, x: Tensor) -> tuple[bool, str]:
        """Whether observations x (n, *event_shape) are no draws of the training distribution, and why in words.

        Arguments:
            modality: Whose features are used.
            x: One data set.
        """
        distance = self._distance((_features(modality, x) - self.centre) @ self.whiten)
        far = float(distance.max() / self.scores[-1])
        if far > _FAR:
            return (
                True,
                f"observation {int(distance.argmax())} lies {far:.3g} times as far from its training simulations as any of them",
            )
        many = int((distance > torch.quantile(self.scores, 1 - _TAIL)).sum())
        chance = float(stats.binom.sf(many - 1, len(x), 2 * _TAIL)) if many else 1.0
        if chance < _LEVEL:
            return True, f"{many} of {len(x)} observations lie outside 99 % of its training simulations"
        return False, ""

    def to_plain(self) -> dict[str, Any]:
        """Tensors by name; :meth:`from_plain` reads them back."""
        return {"centre": self.centre, "whiten": self.whiten, "references": self.references, "scores": self.scores}

    @classmethod
    def from_plain(cls, table: Mapping[str, Any]) -> Domain:
        """What :meth:`to_plain` gave, ``table``."""
        return cls(*(table[name].double() for name in ("centre", "whiten", "references", "scores")))


def _features(modality: Modality, x: Tensor) -> Tensor:
    inner = getattr(modality, "modality", modality)
    summarise = getattr(inner, "summarise", None)
    with torch.no_grad():
        found = x.reshape(len(x), -1) if summarise is None else summarise(x.to(inner.dtype))
    return found.double()
