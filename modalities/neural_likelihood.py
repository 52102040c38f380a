r"""A learned likelihood p(x | θ): a conditional density that integrates to 1 over x, whatever the weights.

.. math:: s(x; \theta) = \sum_i \log p(d_i \mid d_{<i}, \theta) + \log q\big(c \mid d, \theta\big)

d are the entries of x that are categories or counts, c the continuous ones, both in the order of x; either may be
absent. Trained by maximum likelihood on simulated pairs, E[−log q] is least at the true density, for any distribution
of θ that covers the prior. A bias of the learned score that is left makes itself felt √N times over: certify.

=============  ===================================================================================================
``"mixture"``  mixtures of Gaussians of each number given those before it; smooth, quick and the default
``"maf"``      affine steps, each number given those before it; smooth. One number alone is done by ``"mixture"``
``"bpf"``      Bernstein polynomials; smooth but at 5 standard deviations, where they end; slow
``"nsf"``      rational splines: the score has kinks and the second derivative jumps, so that no information can be
               read off it; for comparison, or where scores are all that is used (refined evidence)
=============  ===================================================================================================

References:
    | Papamakarios, Sterratt, Murray (2019), Sequential neural likelihood, https://arxiv.org/abs/1805.07226
    | Papamakarios, Pavlakou, Murray (2017), Masked autoregressive flow, https://arxiv.org/abs/1705.07057
    | Boelts, Lueckmann, Gao, Macke (2022), Flexible and efficient simulation-based inference for models of
      decision-making, https://doi.org/10.7554/eLife.77220: mixed data
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.errors import ModalityError
from engine.learning import Learnable
from modalities._discrete import DiscreteChain, Entries, check_discrete
from modalities._flows import FLOWS, conditional_density
from modalities._networks import check_choice, check_count, check_hidden

__all__ = ["NeuralLikelihood"]

_DISTINCT, _MANY = 0.5, 100  # the share of distinct values below which an entry is not continuous; rows to tell by


class NeuralLikelihood(Learnable):
    """A learned likelihood of continuous, discrete or mixed data.

    Arguments:
        parameter_names: The components of θ.
        event_shape: The shape of one observation.
        summary: A module from x to features; what is learned is then the density of the features, not of x, and
            ``normalised`` is False.
        features: How many features; found by a trial call where left out.
        flow: "mixture", "maf", "bpf" or "nsf", for the continuous part.
        transforms: How many steps a flow has; not used by "mixture".
        hidden: The widths of each network's hidden layers.
        components: How many Gaussians "mixture" has for each number, and (negative) binomials each count.
        activation: "silu", "tanh", "softplus", "gelu" or "mish".
        discrete: Which entries of the flattened x are discrete: index -> number of categories, which are 0, 1, ...;
            "count" for whole numbers >= 0 that vary at least as much as a Poisson law's; or "binomial 100" for those
            out of 100 that vary at least as much as a binomial law's. Categories can have any law.
        simulator: An importable ``simulator(theta, generator)``, kept with the plugin by its name.

    Raises:
        ModalityError: for arguments that break a rule above, and by :meth:`standardise` for data that do.

    Example:
        >>> likelihood = NeuralLikelihood(("t",), (2,), discrete={1: 3}, hidden=(16,))
        >>> s = likelihood(torch.tensor([[0.5, 0.0], [0.5, 2.0], [0.5, 1.5]]), torch.tensor([0.3]))
        >>> torch.isfinite(s)  # there is no category 1.5
        tensor([ True,  True, False])
        >>> x = torch.stack(torch.meshgrid(torch.linspace(-20, 20, 4001), torch.arange(3.0), indexing="ij"), -1)
        >>> round(likelihood(x, torch.tensor([0.3])).exp().sum().item() * 0.01, 3)
        1.0
    """

    def __init__(
        self,
        parameter_names: Sequence[str],
        event_shape: Sequence[int] = (),
        *,
        summary: nn.Module | None = None,
        features: int | None = None,
        flow: str = "mixture",
        transforms: int = 5,
        hidden: Sequence[int] = (64, 64),
        components: int = 8,
        activation: str = "silu",
        discrete: Mapping[int, int | str] | Mapping[str, int | str] | Sequence[int] = (),
        simulator: object = None,
    ) -> None:
        super().__init__(parameter_names, event_shape, summary=summary, features=features, simulator=simulator)
        check_choice("flow", flow, FLOWS, "'mixture' and 'maf' are smooth, 'bpf' nearly, 'nsf' is not")
        check_count("transforms", transforms)
        hidden = check_hidden("hidden", hidden)
        kinds = check_discrete(discrete, self.features)
        if kinds and summary is not None:
            raise ModalityError(
                f"discrete {list(kinds)} must be entries of x itself, got a summary too; drop one of them"
            )
        self.normalised = summary is None
        self._discrete = list(kinds)
        self._continuous = [i for i in range(self.features) if i not in kinds]
        size, given = len(self.parameter_names), 0
        if kinds:
            assert self._configuration is not None
            self._configuration["discrete"] = {str(i): kind.text for i, kind in kinds.items()}  # keys are text
            self.chain = DiscreteChain(
                list(kinds.values()), size, hidden, check_count("components", components), activation
            )
            self.support, given = Entries(kinds, self.event_shape), self.chain.encoded
            self.support_rule = "categories and counts must be whole numbers in range"
            self.support_advice = "number categories from 0, and leave out entries of any other"
        if self._continuous:
            self.density = conditional_density(
                flow, len(self._continuous), size + given, transforms, hidden, components, activation
            )

    def evidence_of(self, features: Tensor, theta: Tensor) -> Tensor:
        """log p of rows of standardised features (n, F), discrete entries as they are, and standardised theta (n, P_m)."""
        if not self._discrete:
            return self.density(features, theta)
        value, seen = self.chain(features[:, self._discrete], theta)
        if not self._continuous:
            return value
        return value + self.density(features[:, self._continuous], torch.cat([theta, seen], -1))

    def loss_of(self, features: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """−log p in nats, of rows of standardised features (n, F) and theta (n, P_m); generator is not used."""
        return -self.evidence_of(features, theta)

    def standardise(self, features: Tensor, theta: Tensor) -> None:
        """Set the centres and scales from training data; discrete entries stay as they are.

        Warns where an entry that is taken for continuous repeats itself: its density has spikes, which take all there is
        to gain in training and leave little of θ.

        Arguments:
            features: Raw features, shape (n, F).
            theta: Shape (n, P_m).

        Raises:
            ModalityError: for a value that is no category or count where one is expected.
        """
        super().standardise(features, theta)
        if self._discrete:
            self.chain.standardise(features[:, self._discrete])
            self.feature_centre[self._discrete], self.feature_scale[self._discrete] = 0.0, 1.0
        if self.normalised:
            self._warn_of_ties(features[:, self._continuous])

    def _warn_of_ties(self, columns: Tensor) -> None:
        rows = len(columns)
        distinct = [len(column.unique()) for column in columns.unbind(-1)]
        tied = [(i, d) for i, d in zip(self._continuous, distinct, strict=True) if 1 < d < _DISTINCT * rows]
        if rows >= _MANY and tied:
            seen = ", ".join(f"{d} in entry {i}" for i, d in tied[:3]) + (", …" if len(tied) > 3 else "")
            warnings.warn(
                f"{type(self).__name__} takes entries of x for continuous that repeat their values: {seen} of {rows:,} rows "
                "are distinct. Declare categories and counts with discrete={index: categories, 'count' or 'binomial N'}, "
                "or use NeuralRatio",
                stacklevel=3,
            )

    def constant(self) -> Tensor | float:
        """−Σ log scale of the features: with it the density integrates to 1 over x, where there is no summary."""
        return -self.feature_scale.log().sum()
