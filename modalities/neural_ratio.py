r"""A learned likelihood-to-evidence ratio r(x; θ) = p(x | θ) / p(x), by telling θ that belong to x from others.

With h the network's output and pairs from the joint p(x, θ) or with θ of another pair, from p(x) p(θ):

- ``"contrastive"``: one x and K θ, of which the k-th is its own, or none (NRE-C with γ = 1),

  .. math:: q(k) = \frac{e^{h_k}}{K + \sum_j e^{h_j}}, \quad q(\text{none}) = \frac{K}{K + \sum_j e^{h_j}}, \qquad
      L = -\tfrac12 \log q(\text{its own}) - \tfrac12 \log q(\text{none});

- ``"binary"``: L = −½ log σ(h) of dependent pairs − ½ log σ(−h) of independent ones (NRE-A);
- ``"balanced"``: the same + λ (E σ(h) of dependent + E σ(h) of independent pairs − 1)² (BNRE), which makes the ratio
  conservative: less sharp where it is not sure, so less often too sure, at the price of efficiency.

Each is least at h = log r, which is log p(x | θ) + c(x) with c = −log p(x) for the prior that θ was trained on.
The constant is right for one observation at a time; sums over N observations rest on the score alone.

References:
    | Cranmer, Pavez, Louppe (2015), https://arxiv.org/abs/1506.02169; Hermans, Begy, Louppe (2020),
      https://arxiv.org/abs/1903.04057: the ratio by binary classification
    | Durkan, Murray, Papamakarios (2020), https://arxiv.org/abs/2002.03712: contrastive learning of it
    | Miller, Weniger, Forré (2022), https://arxiv.org/abs/2210.06170: with the class "none"
    | Delaunoy, Hermans, Rozet, Wehenkel, Louppe (2022), https://arxiv.org/abs/2208.13624: balanced
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from engine.errors import ModalityError
from modalities._networks import Pairwise, activation_of, check_choice, check_count, check_hidden, mlp

__all__ = ["NeuralRatio"]

_LOSSES = ("contrastive", "balanced", "binary")


class NeuralRatio(Pairwise):
    """A learned log-ratio log p(x | θ) − log p(x), for data of any kind.

    Arguments:
        parameter_names: The components of θ.
        event_shape: The shape of one observation.
        summary: A module from x to features, trained along unless frozen.
        features: How many features; found by a trial call where left out.
        hidden: The widths of the hidden layers, at least one. x and θ have first layers of their own, whose outputs
            are added, so that N observations and K θ cost N + K of them.
        activation: "silu", "tanh", "softplus", "gelu" or "mish".
        loss: "contrastive", "balanced" or "binary".
        contrast: K, how many θ of other pairs each x is contrasted with; fewer where a batch has not as many.
        balance: λ of "balanced".
        simulator: An importable ``simulator(theta, generator)``, kept with the plugin by its name.

    Raises:
        ModalityError: for arguments that break a rule above.

    Example:
        >>> ratio = NeuralRatio(("t",), (2,), hidden=(16, 16))
        >>> x, theta = torch.randn(50, 2), torch.rand(50, 1)
        >>> ratio.standardise(x, theta)
        >>> ratio.loss(x, theta, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([])
        >>> ratio(x, theta[:3, None]).shape
        torch.Size([3, 50])
    """

    def __init__(
        self,
        parameter_names: Sequence[str],
        event_shape: Sequence[int] = (),
        *,
        summary: nn.Module | None = None,
        features: int | None = None,
        hidden: Sequence[int] = (64, 64, 64),
        activation: str = "silu",
        loss: str = "contrastive",
        contrast: int = 10,
        balance: float = 100.0,
        simulator: object = None,
    ) -> None:
        super().__init__(parameter_names, event_shape, summary=summary, features=features, simulator=simulator)
        check_choice("loss", loss, _LOSSES, "'contrastive' needs the fewest simulations")
        widths = check_hidden("hidden", hidden)
        if not widths:
            raise ModalityError("hidden must have at least one layer, got (); write (64, 64)")
        if not isinstance(balance, int | float) or isinstance(balance, bool) or not balance >= 0:
            raise ModalityError(f"balance must be >= 0, got {balance!r}; 100 is the paper's")
        self.kind, self.contrast, self.balance = loss, check_count("contrast", contrast), float(balance)
        self.of_features = nn.Linear(self.features, widths[0])
        self.of_theta = nn.Linear(len(self.parameter_names), widths[0], bias=False)
        self.network = nn.Sequential(activation_of(activation)(), *mlp(widths[0], widths[1:], 1, activation))

    def evidence_of(self, features: Tensor, theta: Tensor) -> Tensor:
        """log r of standardised features (*batch, F) and θ (*batch, P_m), which broadcast."""
        return self.network(self.of_features(features) + self.of_theta(theta))[..., 0]

    def loss_of(self, features: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each of n pairs against θ of others, 0 for one pair alone.

        Arguments:
            features: Standardised, shape (n, F).
            theta: Standardised, shape (n, P_m).
            generator: Which others is drawn from it; each x meets K different ones, never its own.
        """
        n = len(theta)
        if n < 2:
            return 0.0 * self.evidence_of(features, theta)
        number = min(self.contrast, n - 1) if self.kind == "contrastive" else 1
        order = torch.randperm(n, generator=generator, device=None if generator is None else generator.device)
        order = order.to(theta.device)
        shifted = [torch.roll(order, j) for j in range(number + 1)]
        rows = torch.stack(shifted, 1)[order.argsort()]  # (n, 1 + K): its own, then K others
        log_ratio = self.evidence_of(features[:, None], theta[rows])
        own, others = log_ratio[:, 0], log_ratio[:, 1:]
        if self.kind == "contrastive":
            none = torch.full_like(log_ratio[:, :1], math.log(number))
            with_own = torch.cat([log_ratio[:, :number], none], -1).logsumexp(-1)
            without = torch.cat([others, none], -1).logsumexp(-1)
            return 0.5 * (with_own - own) + 0.5 * (without - none[:, 0])
        each = 0.5 * (softplus(-own) + softplus(others[:, 0]))
        if self.kind == "binary":
            return each
        return each + self.balance * (own.sigmoid().mean() + others.sigmoid().mean() - 1.0).square()
