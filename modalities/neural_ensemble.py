r"""Several learned scalars of the same data as one, their mean: :math:`s = \frac1M \sum_j s_j`.

Networks trained from different initial weights share what the data say and differ in what they do not; the mean of M
scores keeps the first and averages the second. An error that the training data themselves led all of them into stays:
where the simulations are few, more of them raise N_max, and more members do not. Of densities it is the geometric mean,
whose integral over x is <= 1 and depends on θ, so that it is not normalised. The mean of the densities would be, but a
sum over observations adds logarithms, and it is their mean that has the mean score.

References:
    | Lakshminarayanan, Pritzel, Blundell (2017), Deep ensembles, https://arxiv.org/abs/1612.01474
    | Hermans et al. (2022), A crisis in simulation-based inference?, https://arxiv.org/abs/2110.06581: ensembles are
      less often too sure
    | Heskes (1998), Selecting weighting factors in logarithmic opinion pools, NeurIPS 10: the geometric mean
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from engine.errors import ModalityError
from engine.learning import Learnable

__all__ = ["NeuralEnsemble"]


class NeuralEnsemble(Learnable):
    """The mean of learned modalities of one class, trained together on the same pairs.

    Arguments:
        members: Modalities of one class with the same parameters and event shape, each built by a call of its own, so
            that their initial weights differ.
        simulator: An importable ``simulator(theta, generator)``, kept with the plugin by its name.

    Raises:
        ModalityError: for members that are none, or not alike, or one object twice.

    Example:
        >>> from modalities import MixtureDensity
        >>> ensemble = NeuralEnsemble([MixtureDensity(("t",), (2,), hidden=(8,)) for _ in range(3)])
        >>> x, theta = torch.randn(5, 2), torch.rand(5, 1)
        >>> ensemble.standardise(ensemble.raw_features(x), theta)
        >>> each = torch.stack([m(x, theta) for m in ensemble.members])
        >>> torch.equal(ensemble(x, theta), each.mean(0))
        True
    """

    def __init__(self, members: Sequence[Learnable], *, simulator: object = None) -> None:
        given = list(members) if isinstance(members, Sequence | nn.ModuleList) else [members]
        for n, member in enumerate(given):
            if not isinstance(member, Learnable):
                raise ModalityError(f"members must be Learnable, got {type(member).__name__} as member {n}")
            first = given[0]
            same = ("parameter_names", "event_shape")
            if type(member) is not type(first) or any(getattr(member, a) != getattr(first, a) for a in same):
                raise ModalityError(
                    "members must be of one class with the same parameters and event shape, got "
                    f"{_describe(first)} and {_describe(member)} as member {n}; sum the others as plugins of their own"
                )
        if not given or len({id(m) for m in given}) != len(given):
            seen = "none" if not given else "one of them twice"
            raise ModalityError(f"members must be several modalities, got {seen}; build each by a call of its own")
        first = given[0]
        self._plain = all(m.summary is None for m in given)  # then x itself is every member's features
        total = first.features if self._plain else sum(m.features for m in given)
        super().__init__(first.parameter_names, first.event_shape, features=total, simulator=simulator)
        self.members = nn.ModuleList(given)
        assert self._configuration is not None
        self._configuration["members"] = given
        self.support, self.support_rule, self.support_advice = (
            first.support,
            first.support_rule,
            first.support_advice,
        )

    @property
    def _each(self) -> list[Learnable]:
        return [cast(Learnable, m) for m in self.members]

    def _split(self, raw: Tensor) -> Sequence[Tensor]:
        return [raw] * len(self.members) if self._plain else raw.split([m.features for m in self._each], -1)

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """The mean of the members' scalars in nats: x (*batch, *event_shape), theta (*batch, P_m) -> (*batch)."""
        return torch.stack([m.log_evidence(x, theta) for m in self._each]).mean(0)

    def raw_features(self, x: Tensor) -> Tensor:
        """The members' features of rows x (n, *event_shape) side by side; x itself once where no member has a summary."""
        return x.reshape(len(x), -1) if self._plain else torch.cat([m.raw_features(x) for m in self._each], -1)

    def standardise(self, features: Tensor, theta: Tensor) -> None:
        """Let each member set its centres and scales.

        Arguments:
            features: What :meth:`raw_features` returns, shape (n, F).
            theta: Shape (n, P_m).
        """
        for member, part in zip(self._each, self._split(features), strict=True):
            if self.training_prior is not None:
                member.training_prior = self.training_prior
            member.standardise(part, theta)

    def evidence_of(self, features: Tensor, theta: Tensor) -> Tensor:
        """The mean of the members' scalars of features (n, F), as :meth:`raw_features` has them, and theta (n, P_m)."""
        return torch.stack(
            [
                m.evidence_of(m.standard_features(part), m.standard_theta(theta)) + m.constant()
                for m, part in zip(self._each, self._split(features), strict=True)
            ]
        ).mean(0)

    def loss_of(self, features: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The mean of the members' losses of features (n, F) and theta (n, P_m); generator serves one after the other."""
        return torch.stack(
            [
                m.loss_of(m.standard_features(part), m.standard_theta(theta), generator)
                for m, part in zip(self._each, self._split(features), strict=True)
            ]
        ).mean(0)

    def loss(
        self, x: Tensor | None, theta: Tensor, generator: torch.Generator | None = None, features: Tensor | None = None
    ) -> Tensor:
        """The mean of the members' mean losses, with what their summaries' penalties add.

        Arguments:
            x: Shape (n, *event_shape); None where its features are given.
            theta: Shape (n, P_m).
            generator: The source of the losses' randomness.
            features: What :meth:`raw_features` returned for x, where the summaries are frozen.
        """
        parts: Sequence[Tensor | None] = [None] * len(self.members) if features is None else self._split(features)
        losses = [m.loss(x, theta, generator, part) for m, part in zip(self._each, parts, strict=True)]
        return torch.stack(losses).mean()

    @property
    def frozen_summary(self) -> bool:
        """Whether each member has a summary that training must leave alone."""
        return all(m.frozen_summary for m in self._each)


def _describe(member: Learnable) -> str:
    return f"{type(member).__name__} of {', '.join(member.parameter_names)}, event_shape {tuple(member.event_shape)}"
