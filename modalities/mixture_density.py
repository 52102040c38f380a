r"""The likelihood of a few numbers as a conditional mixture of Gaussians, whose parts are a network's outputs.

.. math:: p(f \mid \theta) = \sum_k w_k(\theta)\, N\big(f;\, \mu_k(\theta),\, (L_k^T L_k)^{-1}(\theta)\big),
    \qquad L_k = \mathrm{diag}(d_k)\,(I + A_k)

A is strictly lower triangular: its entries are regression coefficients, which have no scale and need no bound, and
log det L is Σ log d. The network sees θ alone, so that N observations at one θ cost one call of it, and what is done
for each observation is a small triangular product: of all learned likelihoods here this one is the quickest.

References:
    | Bishop (1994), Mixture density networks, Aston University NCRG/94/004
    | Williams (1996), Using neural networks to model conditional multivariate densities: the Cholesky factor of the
      inverse covariance as the outputs, Neural Computation 8, 843
    | Papamakarios, Sterratt, Murray (2019), Sequential neural likelihood: maximum likelihood on simulated pairs,
      https://arxiv.org/abs/1805.07226
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from modalities._densities import LOG_2PI
from modalities._networks import Pairwise, check_count, check_hidden, mlp, redraw, soft_cap

__all__ = ["MixtureDensity"]

_LOG_SCALE = 8.0  # no Gaussian is narrower or wider than e^∓8 standard deviations of the data


class MixtureDensity(Pairwise):
    """A learned likelihood: a mixture of Gaussians with weights, means and covariances that depend on θ.

    Arguments:
        parameter_names: The components of θ.
        event_shape: The shape of one observation.
        summary: A module from x to features; the mixture is then a density of the features, not of x, and
            ``normalised`` is False.
        features: How many features; found by a trial call where left out.
        components: How many Gaussians.
        hidden: The widths of the network's hidden layers.
        activation: "silu", "tanh", "softplus", "gelu" or "mish".
        diagonal: Whether each Gaussian has independent features, for many features.
        simulator: An importable ``simulator(theta, generator)``, kept with the plugin by its name.

    Raises:
        ModalityError: for arguments that break a rule above.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> theta = torch.rand(2000, 1, generator=generator)
        >>> x = theta + 0.1 * torch.randn(2000, 2, generator=generator)
        >>> with torch.random.fork_rng():
        ...     _ = torch.manual_seed(0)
        ...     mixture = MixtureDensity(("t",), (2,), components=2, hidden=(16,))
        >>> mixture.standardise(x, theta)
        >>> optimiser = torch.optim.Adam(mixture.parameters(), 0.02)
        >>> for _ in range(200):
        ...     optimiser.zero_grad()
        ...     mixture.loss(x, theta).backward()
        ...     _ = optimiser.step()
        >>> s = mixture(torch.tensor([0.5, 0.5]), torch.tensor([[0.5], [0.6]]))
        >>> [round(v, 1) for v in (s.diff() + 1.0).abs().tolist()]  # log N(x; θ, 0.1²) twice is 1 nat less at 0.6
        [0.1]
    """

    def __init__(
        self,
        parameter_names: Sequence[str],
        event_shape: Sequence[int] = (),
        *,
        summary: nn.Module | None = None,
        features: int | None = None,
        components: int = 8,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
        diagonal: bool = False,
        simulator: object = None,
    ) -> None:
        super().__init__(parameter_names, event_shape, summary=summary, features=features, simulator=simulator)
        self.normalised = summary is None
        number = check_count("components", components)
        hidden = check_hidden("hidden", hidden)
        self.head = _Head(len(self.parameter_names), self.features, number, hidden, activation, diagonal)

    def evidence_of(self, features: Tensor, theta: Tensor) -> Tensor:
        """log p(features | θ) of standardised features (*batch, F) and theta (*batch, P_m), which broadcast."""
        log_weights, means, log_scales, coefficients = self.head(theta)
        residual = features[..., None, :] - means
        if coefficients is not None:
            residual = residual + torch.einsum("...ij,...j->...i", coefficients, residual)
        square = (residual * log_scales.exp()).square().sum(-1)
        return (log_weights - 0.5 * square + log_scales.sum(-1)).logsumexp(-1) - 0.5 * LOG_2PI * self.features

    def loss_of(self, features: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """−log p(features | θ) in nats, of standardised features (n, F) and theta (n, P_m); generator is not used."""
        return -self.evidence_of(features, theta)

    def constant(self) -> Tensor | float:
        """−Σ log scale of the features: with it the density integrates to 1 over x, where there is no summary."""
        return -self.feature_scale.log().sum()


class _Head(nn.Module):
    """θ (*batch, P_m) -> log w (*batch, C), μ (*batch, C, F), log d (*batch, C, F) and A (*batch, C, F, F) or None."""

    def __init__(
        self, inputs: int, features: int, components: int, hidden: Sequence[int], activation: str, diagonal: bool
    ) -> None:
        super().__init__()
        self.size, self.number = features, components
        self.below = 0 if diagonal else features * (features - 1) // 2
        rows, columns = torch.tril_indices(features, features, -1)
        self.place = (rows * features + columns).tolist()  # of A's entries
        self.network = mlp(inputs, hidden, components * (1 + 2 * features + self.below), activation)
        self._spread()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        redraw(self.network)
        self._spread()

    @torch.no_grad()
    def _spread(self) -> None:
        """Set the components apart: those that begin alike would long stay alike."""
        bias = cast(Tensor, self.network[-1].bias).zero_()
        bias[self.number : self.number * (1 + self.size)].normal_()

    def forward(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        size, number = self.size, self.number
        logits, means, scales, below = self.network(theta).split(
            [number, number * size, number * size, number * self.below], -1
        )
        means, scales = means.unflatten(-1, (number, size)), scales.unflatten(-1, (number, size))
        coefficients = None
        if self.below:
            flat = means.new_zeros(*means.shape[:-1], size * size)
            at = torch.tensor(self.place, device=flat.device)
            flat = flat.index_copy(-1, at, below.unflatten(-1, (number, self.below)))
            coefficients = flat.unflatten(-1, (size, size))
        return logits.log_softmax(-1), means, soft_cap(scales, _LOG_SCALE), coefficients
