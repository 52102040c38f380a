r"""A learned posterior of one observation, as evidence: what it says less what the prior said.

.. math:: s(x; \theta) = \log q(\theta \mid x) - \log \pi(\theta) = \log p(x \mid \theta) - \log p(x)

where q is right. π is the prior that θ was trained on; dividing by it is what lets N posteriors add. q is a product of
one-dimensional conditional mixtures of Gaussians, each cut off at the bounds of its parameter: it integrates to 1
within them, leaks nowhere, and s is finite and smooth up to the bounds and, continued, beyond. Gamma and log-normal
priors are treated in log θ and beta priors in the logit, as they have no density, or an infinite one, at 0. (A Laplace
prior has a kink, which dividing by it puts into s: mind the second derivative there.)

References:
    | Papamakarios and Murray (2016), Fast ε-free inference of simulation models, https://arxiv.org/abs/1605.06376:
      E[−log q(θ | x)] is least at the posterior; mixtures of Gaussians
    | Uria, Murray, Larochelle (2013), RNADE, https://arxiv.org/abs/1306.0186: one dimension after the other
    | Deistler, Goncalves, Macke (2022), Truncated proposals, https://arxiv.org/abs/2210.04815, and Greenberg et al.
      (2019), https://arxiv.org/abs/1905.07488: what leaks out of a prior's bounds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ModalityError
from engine.learning import Learnable
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from modalities._flows import AutoregressiveMixture
from modalities._networks import check_hidden
from modalities._prior import PriorCoordinates, prior_blocks

__all__ = ["NeuralPosterior"]


class NeuralPosterior(Learnable):
    """A learned log-ratio of posterior and training prior.

    Arguments:
        parameter_names: The components of θ, continuous ones.
        event_shape: The shape of one observation.
        summary: A module from x to features, trained along unless frozen.
        features: How many features; found by a trial call where left out.
        prior: The prior that θ is trained on: a :class:`engine.parameters.ParameterSpace` or a sequence of
            :class:`engine.parameter.Parameter`, or what they write down. Where it is left out,
            :meth:`standardise` takes the attribute ``training_prior``, which :func:`engine.learning.fit` sets.
        components: How many Gaussians there are for each parameter.
        hidden: The widths of the network's hidden layers.
        activation: "silu", "tanh", "softplus", "gelu" or "mish".
        simulator: An importable ``simulator(theta, generator)``, kept with the plugin by its name.

    Raises:
        ModalityError: for arguments that break a rule above, or a prior that has no density: a flat one without two
            bounds, one of a discrete parameter, or one under an equality.

    Example:
        >>> from torch.distributions import Uniform
        >>> prior = [Parameter("t", Uniform(0.0, 2.0))]
        >>> posterior = NeuralPosterior(("t",), (3,), prior=prior, hidden=(16,))
        >>> theta = torch.linspace(0.0, 2.0, 2001)[:, None]
        >>> density = (posterior(torch.zeros(3), theta) - torch.tensor(2.0).log()).exp()  # e^s π
        >>> round(torch.trapezoid(density, theta[:, 0]).item(), 4)
        1.0
    """

    box: Tensor

    def __init__(
        self,
        parameter_names: Sequence[str],
        event_shape: Sequence[int] = (),
        *,
        summary: nn.Module | None = None,
        features: int | None = None,
        prior: ParameterSpace | Sequence[Parameter] | Sequence[Mapping[str, Any]] | None = None,
        components: int = 8,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
        simulator: object = None,
    ) -> None:
        super().__init__(parameter_names, event_shape, summary=summary, features=features, simulator=simulator)
        size = len(self.parameter_names)
        self.density = AutoregressiveMixture(
            size, self.features, components, check_hidden("hidden", hidden), activation
        )
        self.register_buffer("box", torch.tensor([[-torch.inf], [torch.inf]], dtype=torch.float64).repeat(1, size))
        self._known: tuple[object, PriorCoordinates] | None = None
        if prior is not None:
            self._take(prior)

    def _take(self, prior: object) -> None:
        """The coordinates of a prior, which is configuration from now on."""
        blocks = prior_blocks(prior, self.parameter_names)
        assert self._configuration is not None
        self._configuration["prior"] = blocks
        c = self._prior
        centre, scale = torch.tensor(c.centre, dtype=torch.float64), torch.tensor(c.scale, dtype=torch.float64)
        self.theta_centre.copy_(centre)
        self.theta_scale.copy_(scale)
        self.box.copy_((torch.tensor([c.low, c.high], dtype=torch.float64) - centre) / scale)

    @property
    def _prior(self) -> PriorCoordinates:
        blocks = (self._configuration or {}).get("prior")
        if blocks is None:
            raise ModalityError(
                "a NeuralPosterior must know the prior that it is trained on, got none; pass prior=, or set "
                "training_prior before standardise"
            )
        if self._known is None or self._known[0] is not blocks:
            self._known = blocks, PriorCoordinates(blocks)
        return self._known[1]

    def standardise(self, features: Tensor, theta: Tensor) -> None:
        """Set the centres and scales, of features from training data and of θ from the training prior.

        Arguments:
            features: Raw features, shape (n, F).
            theta: Shape (n, P_m).

        Raises:
            ModalityError: where neither ``prior`` nor ``training_prior`` was given, or θ lies outside.
        """
        super().standardise(features, theta)
        self._take(
            self.training_prior if self.training_prior is not None else [p.to_toml() for p in self._prior.parameters]
        )
        z = self.standard_theta(theta)
        outside = ~((z >= self.box[0] - 1e-4) & (z <= self.box[1] + 1e-4))
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise ModalityError(
                f"θ must lie within the training prior, got {theta[row, column].item():g} for "
                f"'{self.parameter_names[column]}' in row {row}; give the prior that the pairs were drawn from"
            )

    def standard_theta(self, theta: Tensor) -> Tensor:
        """θ (..., P_m) in the prior's coordinates, where its median is 0 and its central 68 % is −1 to 1."""
        return ((self._prior.to_z(theta) - self.theta_centre) / self.theta_scale).to(self.dtype)

    def evidence_of(self, features: Tensor, theta: Tensor) -> Tensor:
        """log q − log π of rows of standardised features (n, F) and theta (n, P_m); −∞ where θ is no value of the prior."""
        there = ~theta.isnan().any(-1)
        z = torch.where(there[..., None], theta, 0.0)
        log_pi = self._prior.log_prior(z * self.theta_scale + self.theta_centre).to(z.dtype)
        value = self._log_q(z, features) - self.theta_scale.log().sum() - log_pi
        return value if self._prior.identity else torch.where(there, value, -torch.inf)

    def loss_of(self, features: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """−log q(θ | x) in nats, a density of the standardised theta (n, P_m) given features (n, F); generator is not used."""
        return -self._log_q(theta, features)

    def _log_q(self, z: Tensor, features: Tensor) -> Tensor:
        low, high = self.box.to(z.dtype)
        return self.density(z, features, (low, high))
