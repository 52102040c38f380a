r"""Where a learned scalar was trained: the box of its prior, and how far an observation lies from its simulations.

The score of an observation is its distance to the k-th nearest of a reference sample of simulations, in whitened
features; what it means is its rank among the scores of other simulations, so that no density is assumed. Observations of
one θ at the edge of the prior are rarer among those simulations than others: what fraction of them lies in their tail is
known as a function of θ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from engine.certificate.basis import degrees
from engine.certificate.fields import MeanField, fit_mean
from engine.modality import Modality
from engine.parameters import ParameterSpace

__all__ = ["Domain"]

_REFERENCES = 1000
_NEIGHBOUR = 5
_FEATURES = 16  # principal components; beyond them distances say little
_MANY = 500  # features from which so many simulations are enough to find their components
_TAIL = 0.01
_LEVEL = 1e-4  # the chance of a false alarm for data of the training distribution
_NUMBERS = 2**22  # of data whose features are computed together
_FAR = 3.0  # times the farthest simulation: outside whatever the numbers


@dataclass(frozen=True, eq=False)
class Domain:
    """A reference sample of simulations in whitened features.

    Attributes:
        centre: Of the features, shape (F,).
        whiten: Features less centre -> components, shape (F, C).
        references: Shape (R, C).
        scores: Of other simulations, ascending, shape (S,).
        farthest: The highest score of any simulation that was looked at.
        constant: Which features are the same in all simulations, boolean, shape (F,).
        tail: θ -> the fraction of its observations beyond 99 % of ``scores``; None where that is not known.

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
    farthest: float = 0.0
    constant: Tensor | None = None
    tail: MeanField | None = None

    @classmethod
    def of(cls, modality: Modality, x: Tensor) -> Domain:
        """The domain that simulations x (n, *event_shape) span.

        Arguments:
            modality: Whose features are used.
            x: Simulations over the prior, in no order.
        """
        features = _features(modality, x[: 2 * _REFERENCES])
        constant = (features == features[:1]).all(0)
        centre = torch.where(constant, features[0], features.mean(0))
        unit = torch.where(constant, 1.0, features.std(0).clamp_min(1e-300))  # features have units of their own
        some = ((features - centre) / unit)[: len(features) if features.shape[1] <= _MANY else _MANY]
        _, sizes, axes = torch.linalg.svd(some / max(1, len(some) - 1) ** 0.5, full_matrices=False)
        use = sizes > 1e-5 * sizes[:1].clamp_min(1e-150)
        whiten = (axes[use] / sizes[use, None])[:_FEATURES].mT / unit[:, None]
        rows = (features - centre) @ whiten
        half = len(rows) // 2
        found = cls(centre, whiten, rows[:half], torch.zeros(0, dtype=torch.float64))
        scores = found._distance(rows[half:]).sort().values
        return cls(centre, whiten, rows[:half], scores, float(scores[-1]), constant)

    def along(self, modality: Modality, space: ParameterSpace, theta: Tensor, x: Tensor) -> Domain:
        """The same, with the tail of its observations as a function of θ.

        Arguments:
            modality: Whose features are used.
            space: Its parameters.
            theta: Shape (n, P).
            x: Simulations made there, shape (n, *event_shape).
        """
        distance = self._distance(self._whitened(_features(modality, x)))
        points = len(torch.unique(theta, dim=0))
        tried = degrees(len(space), max(1, min(len(x) // 100, points // 3)))
        tail = fit_mean(space, theta, (distance > self._edge)[:, None].double(), tried=tried)
        return replace(self, tail=tail, farthest=max(self.farthest, float(distance.max())))

    @property
    def _edge(self) -> Tensor:
        return torch.quantile(self.scores, 1 - _TAIL)

    def _whitened(self, features: Tensor) -> Tensor:
        return (features - self.centre) @ self.whiten

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
        distance = self._distance(self._whitened(_features(modality, x)))
        return torch.searchsorted(self.scores, distance).double() / len(self.scores)

    def outside(self, modality: Modality, x: Tensor, theta: Tensor | None = None) -> tuple[bool, str]:
        """Whether observations x (n, *event_shape) are no draws of the training distribution, and why in words.

        Arguments:
            modality: Whose features are used.
            x: One data set.
            theta: Where they come from, shape (P,), if anyone knows; from anywhere in the prior by default.
        """
        features = _features(modality, x)
        if self.constant is not None:
            moved = self.constant & ((features - self.centre).abs() > 1e-6 * (1.0 + self.centre.abs()))
            if bool(moved.any()):
                i, j = moved.nonzero()[0].tolist()
                return True, f"observation {i} differs in feature {j}, which is the same in all training simulations"
        distance = self._distance(self._whitened(features))
        far = float(distance.max()) / max(self.farthest, 1e-300)
        if not far <= _FAR:
            return (
                True,
                f"observation {int(distance.argmax())} lies {far:.3g} times as far from its training simulations as any of them",
            )
        many = int((distance > self._edge).sum())
        expected = 2 * _TAIL
        if self.tail is not None and theta is not None:
            known, variance = float(self.tail.at(theta[None])[0, 0]), float(self.tail.error(theta[None])[0, 0, 0])
            expected = min(1.0, max(expected, 1.5 * known + 3.0 * max(0.0, variance) ** 0.5))
        chance = float(stats.binom.sf(many - 1, len(x), expected)) if many else 1.0
        if chance < _LEVEL:
            return True, f"{many} of {len(x)} observations lie outside 99 % of its training simulations"
        return False, ""

    def to_plain(self) -> dict[str, Any]:
        """Plain values and tensors by name; :meth:`from_plain` reads them back."""
        names = ("centre", "whiten", "references", "scores", "farthest", "constant")
        table = {name: getattr(self, name) for name in names}
        return table if self.tail is None else {**table, "tail": self.tail.to_plain()}

    @classmethod
    def from_plain(cls, space: ParameterSpace, table: Mapping[str, Any]) -> Domain:
        """What :meth:`to_plain` gave, ``table``, with the parameters ``space`` that it was found for."""
        tail = table.get("tail")
        return cls(
            table["centre"].double(),
            table["whiten"].double(),
            table["references"].double(),
            table["scores"].double(),
            float(table["farthest"]),
            table["constant"].bool(),
            None if tail is None else MeanField.from_plain(space, tail),
        )


def _features(modality: Modality, x: Tensor) -> Tensor:
    inner = getattr(modality, "modality", modality)
    summarise = getattr(inner, "summarise", None)
    if summarise is None:
        return x.reshape(len(x), -1).double()
    step = max(1, _NUMBERS // max(1, x[:1].numel()))
    with torch.no_grad():
        return torch.cat([summarise(part.to(inner.dtype)) for part in x.split(step)]).double()
