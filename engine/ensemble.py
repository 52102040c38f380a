r"""The sum over each of B data sets, evaluated together: :math:`S_b(\theta) = \sum_m \sum_i s_m(x_{bmi}; \theta)`.

Every point says which data set it belongs to, so that one call serves searches that have got to different places. Plugins
are summed in the order of their names, in float64, as :class:`engine.evidence.Evidence` does for one data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.datasets import Part
from engine.errors import ModalityError
from engine.evidence import Derivatives, prior_derivatives
from engine.modality import Modality
from engine.objective import log_concave
from engine.parameters import ParameterSpace
from engine.terms import Term
from engine.threads import small_work

__all__ = ["Ensemble"]

_STACK_FROM = 8  # fewer plugins than this are quicker one by one than through vmap


class Ensemble:
    """S of B data sets, as an :class:`engine.objective.Objective`.

    Arguments:
        parameters: The space whose order θ follows.
        modalities: The plugins there are, by name.
        part: The data sets.
        prior: Whether to add the log prior density, once for each data set.

    Raises:
        ModalityError: when a plugin names a parameter that is not there; and, while evaluating, when it
            breaks its contract.

    Example:
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> modality = Gaussian(parameter_names=("mu",), sd=2.0)
        >>> x = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]]).double()
        >>> both = Ensemble(ParameterSpace([Parameter("mu")]), {"a": modality}, Part({"a": x}, {"a": None}, 2))
        >>> at = both.derivatives(torch.tensor([[2.0], [2.0]]).double(), torch.tensor([0, 1]))
        >>> at.score.tolist(), at.information.tolist()
        ([[0.0], [2.0]], [[[0.5]], [[0.5]]])
    """

    def __init__(
        self, parameters: ParameterSpace, modalities: Mapping[str, Modality], part: Part, *, prior: bool = False
    ) -> None:
        self.parameters, self.prior, self.count = parameters, prior, part.count
        self.modalities = {name: modalities[name] for name in sorted(part.x)}
        for name, modality in self.modalities.items():
            if absent := [p for p in modality.parameter_names if p not in parameters]:
                raise ModalityError(
                    f"plugin '{name}' depends on the parameter '{absent[0]}', which is not among {', '.join(parameters.names)}"
                )
        live = self.modalities.values()
        self.coarse = any(m.dtype == torch.float32 for m in live)
        self.concave = all(m.concave for m in live) and (not prior or log_concave(parameters))
        self.cost = sum(part.x[name][0].numel() for name in self.modalities)
        self._terms = [_Many(names, self.modalities, parameters, part) for names in self._groups(part)]
        order = [name for term in self._terms for name in term.names]
        position = {name: i for i, name in enumerate(order)}
        self._sorted = torch.tensor([position[name] for name in sorted(order)])

    def _groups(self, part: Part) -> list[list[str]]:
        groups: dict[Any, list[str]] = {}
        for name, modality in self.modalities.items():
            key: Any = name
            if (stack := modality.stack_key()) is not None:
                tensors = [(k, t.shape, t.dtype) for k, t in (*modality.named_parameters(), *modality.named_buffers())]
                key = (type(modality), stack, repr(tensors), part.x[name].shape, len(modality.parameter_names))
            groups.setdefault(key, []).append(name)
        out = []
        for names in groups.values():
            out += [names] if len(names) >= _STACK_FROM else [[name] for name in names]
        return out

    def value(self, theta: Tensor, items: Tensor) -> Tensor:
        """S (K,) of data sets ``items`` (K,) at theta (K, P), in nats."""
        with torch.no_grad(), small_work(self.cost * len(theta)):
            total = self._add([term.value(theta, items) for term in self._terms], theta, items)
            return total + self.parameters.log_prior(theta) if self.prior else total

    def values(self, theta: Tensor) -> Tensor:
        """S (B, n) of every data set at each of n points, theta (n, P), in nats."""
        with torch.no_grad(), small_work(self.cost * len(theta)):
            parts = [term.values(theta) for term in self._terms]  # (G, B, n)
            n = len(theta)
            flat = [part.reshape(len(part), -1) for part in parts]
            many = torch.arange(self.count).repeat_interleave(n)
            total = self._add(flat, theta, many, repeat=True).reshape(self.count, n)
            return total + self.parameters.log_prior(theta) if self.prior else total

    def derivatives(self, theta: Tensor, items: Tensor) -> Derivatives:
        """S and its derivatives, of data sets ``items`` (K,) at theta (K, P)."""
        theta = theta.detach()
        K, P = theta.shape
        score = torch.zeros(K, P, dtype=torch.float64)
        information = torch.zeros(K, P * P, dtype=torch.float64)
        values, resolutions = [], []
        with small_work(self.cost * K):
            for term in self._terms:
                value, local_score, local_information, resolution = term.derivatives(theta, items)
                values.append(value)
                resolutions.append(resolution)
                score.index_add_(1, term.index.reshape(-1), local_score.movedim(1, 0).reshape(K, term.index.numel()))
                pairs = (term.index[:, :, None] * P + term.index[:, None, :]).reshape(-1)
                information.index_add_(1, pairs, local_information.movedim(1, 0).reshape(K, len(pairs)))
            total = self._add(values, theta, items)
        information = information.reshape(K, P, P)
        if self.prior:
            log_prior, prior_score, prior_information = prior_derivatives(self.parameters, theta)
            total, score, information = total + log_prior, score + prior_score, information + prior_information
        return Derivatives(total, score, information, torch.cat(resolutions).sum(0))

    def _add(self, parts: list[Tensor], theta: Tensor, items: Tensor, repeat: bool = False) -> Tensor:
        """Σ over plugins in the order of their names: parts (G, K) of each term -> (K,)."""
        total = torch.cat(parts)[self._sorted].sum(0)
        if not bool((total < torch.inf).all()):  # false for NaN too
            for term, part in zip(self._terms, parts, strict=True):
                bad = (~(part < torch.inf)).any(0).nonzero()[:, 0]
                if len(bad):
                    term.refuse_bad(theta[bad % len(theta)] if repeat else theta[bad], items[bad])
            raise ModalityError("the sum of the scalars is not a number: they overflow; check for values near 1e308")
        return total


class _Many:
    """A term whose data are B data sets: x (G, B, N, *event)."""

    def __init__(self, names: list[str], modalities: Mapping[str, Modality], space: ParameterSpace, part: Part) -> None:
        empty: Any = {name: part.x[name].new_zeros(0) for name in names}
        self._term = Term(names, [modalities[name] for name in names], space, empty)
        self.names, self.index = names, self._term.index
        self._data = torch.stack([part.x[name] for name in names]).to(self._term.dtype)
        masks = [part.mask[name] for name in names]
        full = torch.ones(self._data.shape[1:3], dtype=torch.bool)
        self._mask = None if all(m is None for m in masks) else torch.stack([full if m is None else m for m in masks])
        self._picked: tuple[Tensor, Tensor, Tensor | None] | None = None

    def _pick(self, items: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (G, K, N, *event) of the data sets of K points, and their mask; the last choice is kept."""
        if len(items) == self._data.shape[1] and bool((items == torch.arange(len(items))).all()):
            return self._data, self._mask
        if self._picked is None or not torch.equal(self._picked[0], items):
            self._picked = (items.clone(), *self._term.pick(self._data, items, self._mask))
        return self._picked[1:]

    def _local(self, theta: Tensor) -> Tensor:
        return theta[:, self.index].movedim(0, 1)  # (G, K, P_m)

    def value(self, theta: Tensor, items: Tensor) -> Tensor:
        """Σ_i s (G, K) at θ (K, P)."""
        x, mask = self._pick(items)
        return self._term.block_value(x, self._local(theta), mask)

    def values(self, theta: Tensor) -> Tensor:
        """Σ_i s (G, B, n) of every data set at θ (n, P)."""
        B, local, out = self._data.shape[1], self._local(theta), []
        if len(theta) < B:  # data sets as they lie in memory, with what is kept of them
            each = [
                self._term.block_value(self._data, local[:, k : k + 1].expand(-1, B, -1), self._mask)
                for k in range(len(theta))
            ]
            return torch.stack(each, 2)
        for b in range(B):
            mask = None if self._mask is None else self._mask[:, b : b + 1]
            out.append(self._term.block_value(self._data[:, b : b + 1], local, mask))
        return torch.stack(out, 1)

    def derivatives(self, theta: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Σ_i s, ∇, −∇² and resolution: (G, K), (G, K, P_m), (G, K, P_m, P_m), (G, K), from θ (K, P)."""
        x, mask = self._pick(items)
        return self._term._block_derivatives(x, self._local(theta), mask)

    def refuse_bad(self, theta: Tensor, items: Tensor) -> None:
        """Name the plugin, θ and observation whose scalar is NaN or +∞."""
        for k in range(len(items)):
            x, mask = self._pick(items[k : k + 1])
            try:
                self._term.refuse_bad_block(x, self._local(theta[k : k + 1]), mask)
            except ModalityError as error:
                raise ModalityError(f"data set {int(items[k])}: {error}") from None
