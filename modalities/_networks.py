"""Small smooth networks that the learned modalities share, and the checks of what shapes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from engine.errors import ModalityError
from engine.learning import Learnable

__all__ = ["Pairwise", "activation_of", "check_choice", "check_count", "check_hidden", "mlp", "redraw", "soft_cap"]

# Each twice differentiable everywhere: the information is a second derivative of what they build.
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}


def activation_of(name: str) -> type[nn.Module]:
    """The class of a smooth activation, by name.

    Raises:
        ModalityError: for another name.
    """
    check_choice(
        "activation", name, _ACTIVATIONS, "a kinked one, such as ReLU, has no second derivative to estimate by"
    )
    return _ACTIVATIONS[name]


def check_choice(name: str, value: object, allowed: Collection[str], advice: str) -> None:
    """Refuse what is not one of some words."""
    if not isinstance(value, str) or value not in allowed:
        raise ModalityError(f"{name} must be one of {', '.join(allowed)}, got {value!r}; {advice}")


def check_count(name: str, value: object, least: int = 1) -> int:
    """A whole number that is large enough.

    Raises:
        ModalityError: for anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModalityError(f"{name} must be a whole number >= {least}, got {value!r}; give a count")
    return value


def check_hidden(name: str, value: object) -> tuple[int, ...]:
    """The widths of hidden layers.

    Raises:
        ModalityError: for anything but a sequence of whole numbers >= 1.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ModalityError(f"{name} must be the widths of the hidden layers, got {value!r}; write (64, 64)")
    for n, width in enumerate(value):
        check_count(f"{name}[{n}]", width)
    return tuple(value)


def mlp(inputs: int, hidden: Sequence[int], outputs: int, activation: str) -> nn.Sequential:
    """Linear layers with an activation between any two: (*, inputs) -> (*, outputs)."""
    smooth, layers, width = activation_of(activation), [], inputs
    for size in hidden:
        layers += [nn.Linear(width, size), smooth()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def redraw(network: nn.Module) -> None:
    """Draw every layer's weights anew, as its constructor does."""
    for layer in network.modules():
        reset = getattr(layer, "reset_parameters", None)
        if layer is not network and callable(reset):
            reset()


def soft_cap(value: Tensor, cap: float) -> Tensor:
    """``value`` within (−cap, cap), smoothly; itself near 0."""
    return cap * torch.tanh(value / cap)


class Pairwise(Learnable):
    """A learned modality that broadcasts by itself, so that what depends on x or θ alone is computed once for each.

    Its ``evidence_of`` takes features (*batch, F) and θ (*batch, P_m) with batches that broadcast.
    """

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """s(x; θ) in nats: x (*batch, *event_shape), θ (*batch, P_m) -> (*batch), both batches broadcast."""
        lead = x.shape[: x.dim() - len(self.event_shape)]
        features = self.summarise(x.reshape(-1, *self.event_shape)).reshape(*lead, self.features)
        return self.evidence_of(features, self.standard_theta(theta)) + self.constant()
