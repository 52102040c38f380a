r"""Summaries f(x) for learned modalities: networks from one observation to features, each row by itself.

Smooth activations and no statistics of the batch throughout, so that a scalar on top can be differentiated twice and
scores every (x, θ) alone. A foundation model takes the same place: any ``nn.Module`` from x (n, *event_shape) to
features (n, F) whose constructor keeps its arguments in attributes of the same names.

- a vector, or anything flattened: :class:`MLP`
- a set, such as the particles of a collision: :class:`DeepSets`
- an image: :class:`ImageSummary`
- a time series or a spectrum: :class:`SeriesSummary`
- any of them with no more than a budget of information about x in the features: :class:`Bottleneck`

References:
    | Zaheer et al. (2017), Deep sets, https://arxiv.org/abs/1703.06114
    | Alemi, Fischer, Dillon, Murphy (2017), Deep variational information bottleneck, https://arxiv.org/abs/1612.00410
    | Tishby, Pereira, Bialek (1999), The information bottleneck method, https://arxiv.org/abs/physics/0004057
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ModalityError
from modalities._networks import activation_of, check_count, check_hidden, mlp

__all__ = ["MLP", "Bottleneck", "DeepSets", "ImageSummary", "SeriesSummary"]


class MLP(nn.Module):
    """A plain network of x, flattened.

    Arguments:
        inputs: How many entries x has.
        outputs: How many features it returns.
        hidden: The widths of the hidden layers.
        activation: "silu", "tanh", "softplus", "gelu" or "mish".

    Raises:
        ModalityError: for arguments that break a rule above, and when called, for x of another size.

    Example:
        >>> MLP(6, 2, hidden=(8,))(torch.zeros(5, 3, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64), activation: str = "silu") -> None:
        super().__init__()
        self.inputs, self.outputs = check_count("inputs", inputs), check_count("outputs", outputs)
        self.hidden, self.activation = check_hidden("hidden", hidden), activation
        self.network = mlp(inputs, self.hidden, outputs, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, outputs) of x (n, *event_shape)."""
        flat = x.reshape(len(x), -1)
        if flat.shape[1] != self.inputs:
            raise ModalityError(f"x must have {self.inputs} entries each, got shape {tuple(x.shape)}; correct inputs")
        return self.network(flat)


class DeepSets(nn.Module):
    """Features of a set, the same for every order of its elements: ρ(mean of φ(element), log number).

    Arguments:
        inputs: How many numbers describe an element, without the mask.
        outputs: How many features it returns.
        hidden: The widths of the hidden layers of φ, and of ρ.
        pooled: How many numbers φ returns.
        mask: Whether the last of an element's numbers says whether it is there, 1, or fills up the set, 0: then x is
            (n, N, inputs + 1), and what a filling element else contains does not matter as long as it is finite.
        activation: "silu", "tanh", "softplus", "gelu" or "mish".

    Raises:
        ModalityError: for arguments that break a rule above, and when called, for x of another shape.

    Example:
        >>> sets = DeepSets(2, 3, hidden=(8,), mask=True)
        >>> elements = torch.tensor([[[1.0, 2.0, 1.0], [3.0, 4.0, 1.0], [9.0, 9.0, 0.0]]])
        >>> torch.allclose(sets(elements), sets(elements[:, [1, 0]]), atol=1e-6)
        True
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int] = (64, 64),
        pooled: int = 64,
        mask: bool = False,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = check_count("inputs", inputs), check_count("outputs", outputs)
        self.hidden, self.pooled = check_hidden("hidden", hidden), check_count("pooled", pooled)
        self.mask, self.activation = mask, activation
        self.element = mlp(inputs, self.hidden, pooled, activation)
        self.set = mlp(pooled + 1, self.hidden, outputs, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, outputs) of sets x (n, N, inputs), or (n, N, inputs + 1) with a mask, or (n, N) of numbers."""
        width = self.inputs + self.mask
        x = x[..., None] if x.dim() == 2 and width == 1 else x
        if x.dim() != 3 or x.shape[-1] != width:
            raise ModalityError(
                f"x must have shape (n, N, {width}) for sets of N elements, got {tuple(x.shape)}; correct inputs or mask"
            )
        there = x[..., self.inputs :] if self.mask else torch.ones_like(x[..., :1])
        count = there.sum(-2)
        mean = (self.element(x[..., : self.inputs]) * there).sum(-2) / count.clamp_min(1.0)
        return self.set(torch.cat([mean, count.clamp_min(0.5).log()], -1))


class ImageSummary(nn.Module):
    """Features of an image: convolutions that halve it, then the means over a coarse grid.

    Arguments:
        channels: How many channels the image has.
        outputs: How many features it returns.
        width: Channels after the first convolution; each later one has twice as many.
        depth: How many convolutions, each of which halves the image.
        grid: Over how many patches along each axis what is left is averaged; 1 forgets where things are.
        activation: "silu", "tanh", "softplus", "gelu" or "mish".

    Raises:
        ModalityError: for arguments that break a rule above, and when called, for x of another shape.

    Example:
        >>> ImageSummary(1, 4, width=4)(torch.zeros(2, 32, 32)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self, channels: int, outputs: int, width: int = 16, depth: int = 3, grid: int = 4, activation: str = "silu"
    ) -> None:
        super().__init__()
        self.channels, self.outputs = check_count("channels", channels), check_count("outputs", outputs)
        self.width, self.depth, self.grid = (
            check_count("width", width),
            check_count("depth", depth),
            check_count("grid", grid),
        )
        self.activation = activation
        self.convolutions, last = _convolutions(nn.Conv2d, channels, width, depth, 3, activation)
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.head = nn.Linear(last * grid * grid, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, outputs) of images x (n, channels, H, W), or (n, H, W) of one channel."""
        x = x[:, None] if x.dim() == 3 and self.channels == 1 else x
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ModalityError(
                f"x must have shape (n, {self.channels}, H, W), got {tuple(x.shape)}; correct channels or the order of axes"
            )
        return self.head(self.pool(self.convolutions(x)).flatten(1))


class SeriesSummary(nn.Module):
    """Features of a regularly sampled series: convolutions that halve it, then the means over a few stretches.

    Arguments:
        channels: How many numbers are measured at each time.
        outputs: How many features it returns.
        width: Channels after the first convolution; each later one has twice as many.
        depth: How many convolutions, each of which halves the series.
        kernel: How many times each convolution looks at, an odd number.
        grid: Over how many stretches what is left is averaged; 1 forgets when things happen.
        activation: "silu", "tanh", "softplus", "gelu" or "mish".

    Raises:
        ModalityError: for arguments that break a rule above, and when called, for x of another shape.

    Example:
        >>> SeriesSummary(2, 4, width=4)(torch.zeros(3, 2, 100)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        width: int = 16,
        depth: int = 3,
        kernel: int = 5,
        grid: int = 8,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.channels, self.outputs = check_count("channels", channels), check_count("outputs", outputs)
        self.width, self.depth, self.grid = (
            check_count("width", width),
            check_count("depth", depth),
            check_count("grid", grid),
        )
        self.kernel, self.activation = check_count("kernel", kernel), activation
        if kernel % 2 == 0:
            raise ModalityError(f"kernel must be odd, so that it has a middle, got {kernel}; add one")
        self.convolutions, last = _convolutions(nn.Conv1d, channels, width, depth, kernel, activation)
        self.pool = nn.AdaptiveAvgPool1d(grid)
        self.head = nn.Linear(last * grid, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, outputs) of series x (n, channels, T), or (n, T) of one channel."""
        x = x[:, None] if x.dim() == 2 and self.channels == 1 else x
        if x.dim() != 3 or x.shape[1] != self.channels:
            raise ModalityError(
                f"x must have shape (n, {self.channels}, T), got {tuple(x.shape)}; correct channels or the order of axes"
            )
        return self.head(self.pool(self.convolutions(x)).flatten(1))


def _convolutions(
    layer: type[nn.Conv1d] | type[nn.Conv2d], channels: int, width: int, depth: int, kernel: int, activation: str
) -> tuple[nn.Sequential, int]:
    smooth, layers, last = activation_of(activation), [], channels
    for n in range(depth):
        layers += [layer(last, width * 2**n, kernel, stride=2, padding=kernel // 2), smooth()]
        last = width * 2**n
    return nn.Sequential(*layers), last


class Bottleneck(nn.Module):
    r"""Features that may not say more about x than they are worth: a variational information bottleneck.

    The encoder's outputs are the means μ and the logarithms of the variances σ² of independent latents. In training
    the features are draws from them, and :meth:`penalty` is β KL(N(μ, σ²) ‖ N(0, 1)), a bound from above of β I(x; z)
    in nats, which :meth:`engine.learning.Learnable.loss` adds; in evaluation they are μ, without noise. β trades
    information about θ for simplicity: at 1 the whole bound counts as much as the loss, and 1e-3 to 1e-2 is where
    a regulariser lives.

    Arguments:
        encoder: A module from x (n, *event_shape) to (n, 2 · features).
        features: How many latents there are.
        beta: β >= 0, nats of loss for a nat of information.

    Raises:
        ModalityError: for arguments that break a rule above, and when called, for an encoder of another size.

    Example:
        >>> bottleneck = Bottleneck(MLP(3, 2 * 2, hidden=(8,)), features=2, beta=0.01)
        >>> bottleneck(torch.zeros(5, 3)).shape, bottleneck.penalty().shape
        (torch.Size([5, 2]), torch.Size([]))
    """

    def __init__(self, encoder: nn.Module, features: int, beta: float = 1e-3) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise ModalityError(f"encoder must be an nn.Module, got {type(encoder).__name__}; wrap it in one")
        if not isinstance(beta, int | float) or isinstance(beta, bool) or not 0 <= beta < float("inf"):
            raise ModalityError(f"beta must be a number >= 0, got {beta!r}; 0 switches the penalty off")
        self.encoder, self.features, self.beta = encoder, check_count("features", features), beta
        self._divergence: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Latents (n, features) of x (n, *event_shape), with noise from torch's global generator in training."""
        outputs = self.encoder(x)
        if outputs.dim() != 2 or outputs.shape[1] != 2 * self.features:
            raise ModalityError(
                f"encoder must return shape (n, {2 * self.features}), means and log variances of {self.features} "
                f"latents, got {tuple(outputs.shape)}; let it return twice as many numbers"
            )
        mean, log_variance = outputs.chunk(2, -1)
        if not self.training:
            self._divergence = None
            return mean
        each = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
        self._divergence = each.sum(-1).mean()
        return mean + (0.5 * log_variance).exp() * torch.randn_like(mean)

    def penalty(self) -> Tensor:
        """β times the mean divergence of the last call in training, in nats, with its graph.

        Raises:
            ModalityError: before any call in training.
        """
        if self._divergence is None:
            raise ModalityError("penalty() belongs to a call in training, got none before it; call the module first")
        return self.beta * self._divergence

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_divergence": None}  # it belongs to one call, and its graph cannot be copied
