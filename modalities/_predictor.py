"""What a modality predicts from θ: a function, an ``nn.Module``, or θ itself, and its Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from engine.errors import ModalityError
from modalities._tensors import Exact, Numbers, float64

__all__ = ["Function", "Predictor", "check_function", "event_size", "jacobian"]

#: (θ (*batch, P_m), **inputs) -> a tensor (*batch, ...)
Function: TypeAlias = Callable[..., Tensor]


class Predictor(Exact):
    """A checked function of θ in float64: (*batch, P_m) -> (*batch, *shape).

    Arguments:
        name: The argument that the function was passed as, for messages.
        function: A function or ``nn.Module``, called as ``function(theta, **inputs)``; None returns θ. A
            module is called in the dtype of its own weights.
        shape: What it predicts for one θ.
        inputs: Known quantities that it needs (redshifts, times), held as float64 buffers.

    Raises:
        ModalityError: for something that cannot be called or inputs that are not named numbers; when
            called, for a prediction of another shape or a dtype that is neither float32 nor float64.

    Example:
        >>> line = Predictor("mean", lambda theta, t: theta[..., :1] * t, (3,), {"t": [0.0, 1.0, 2.0]})
        >>> line(torch.tensor([[2.0]])).tolist()
        [[0.0, 2.0, 4.0]]
    """

    def __init__(
        self, name: str, function: Function | None, shape: Sequence[int], inputs: Mapping[str, Numbers] | None = None
    ) -> None:
        super().__init__()
        check_function(name, function)
        if function is None and inputs:
            raise ModalityError(f"inputs {tuple(inputs)} need a function to go to, got {name}=None; drop them")
        self.name, self.function, self.shape = name, function, tuple(shape)
        self.input_names = check_names(inputs)
        for key, value in (inputs or {}).items():
            self.register_buffer(f"input_{key}", float64(f"inputs[{key!r}]", value), persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        """The prediction, shape (*batch, *shape), float64."""
        theta = theta.to(torch.float64)
        if self.function is None:
            value = theta
        else:
            dtype = self._dtype()
            inputs = {key: getattr(self, f"input_{key}").to(dtype) for key in self.input_names}
            value = self.function(theta.to(dtype), **inputs)
        expected = (*theta.shape[:-1], *self.shape)
        if not isinstance(value, Tensor):
            raise ModalityError(f"{self.name} must return a tensor, got {type(value).__name__}; compute it with torch")
        if value.shape != expected:
            raise ModalityError(
                f"{self.name} must return shape (*batch, {', '.join(map(str, self.shape))}), which is {expected} for θ "
                f"of shape {tuple(theta.shape)}, got {tuple(value.shape)}; index θ as theta[..., i] and keep leading "
                "dimensions"
            )
        if value.dtype not in (torch.float32, torch.float64):
            raise ModalityError(f"{self.name} must return float32 or float64, got {value.dtype}; widen it first")
        return value.to(torch.float64)

    def _dtype(self) -> torch.dtype:
        if not isinstance(self.function, torch.nn.Module):
            return torch.float64
        # The only floating tensors of this module that are not its inputs are those of the function.
        weights = (t for name, t in (*self.named_parameters(), *self.named_buffers()) if name.startswith("function."))
        return next((t.dtype for t in weights if t.is_floating_point()), torch.float64)


def check_function(name: str, function: object) -> None:
    """Refuse what is neither None nor can be called with θ."""
    if isinstance(function, str):
        raise ModalityError(f"{name} must be a function of θ, got the text {function!r}; pass the function itself")
    if function is not None and not callable(function):
        raise ModalityError(
            f"{name} must be a function of θ or an nn.Module, got {type(function).__name__}; "
            "wrap known numbers in a function, or pass them through 'inputs'"
        )


def check_names(inputs: Mapping[str, Numbers] | None) -> tuple[str, ...]:
    """The names of the inputs, each a keyword that a function can take."""
    if inputs is not None and not isinstance(inputs, Mapping):
        raise ModalityError(f"inputs must map names to numbers, got {type(inputs).__name__}; write {{'z': z}}")
    for key in inputs or {}:
        if not isinstance(key, str) or not key.isidentifier():
            raise ModalityError(f"inputs must be named by Python identifiers, got {key!r}; rename it")
    return tuple(inputs or ())


def event_size(
    name: str, function: object, parameters: int, event_shape: Sequence[int] | None, sized: Mapping[str, Any]
) -> int:
    """How many entries one observation has: from ``event_shape``, else θ itself, else a sized argument.

    Arguments:
        name: The argument that the function was passed as, for messages.
        function: What predicts the entries; None for θ itself.
        parameters: P_m.
        event_shape: (), (D,) or None.
        sized: Arguments that may have shape (D, ...), by name.

    Raises:
        ModalityError: when ``function`` is none, the sizes disagree, or nothing says how many entries there are.
    """
    check_function(name, function)
    if isinstance(event_shape, int):
        raise ModalityError(f"event_shape must be () or (D,), got {event_shape}; write ({event_shape},)")
    if event_shape is not None and len(event_shape) > 1:
        raise ModalityError(f"event_shape must be () or (D,), got {tuple(event_shape)}; flatten the data")
    size = None if event_shape is None else (event_shape[0] if event_shape else 1)
    if function is None:
        if size not in (None, parameters):
            raise ModalityError(
                f"event_shape must match the {parameters} parameters where {name} is None, "
                f"got {tuple(event_shape or ())}; pass a function as {name}"
            )
        return parameters
    for value in sized.values():
        shape = (len(value),) if isinstance(value, Sequence) else tuple(getattr(value, "shape", ()))
        size = shape[0] if size is None and shape else size
    if size is None:
        raise ModalityError(
            f"event_shape must be given where the shape of {' or '.join(sized)} does not say it, got None; "
            "pass event_shape=(D,)"
        )
    if size < 1:
        raise ModalityError(f"event_shape must have at least one entry, got {size}; leave the plugin out instead")
    return size


def jacobian(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """∂f/∂θ of an f (*batch, P_m) -> (*batch, *shape), one point at a time: (*batch, *shape, P_m).

    Example:
        >>> jacobian(lambda t: t**2, torch.tensor([1.0, 3.0], dtype=torch.float64)).tolist()
        [[2.0, 0.0], [0.0, 6.0]]
    """
    # Forward derivatives as the transpose of the transpose: P_m passes, and every function that can be
    # differentiated twice has them, which is not so of torch's own forward mode.
    theta = theta.to(torch.float64)
    value, pull_back, *_ = torch.func.vjp(function, theta)
    _, push_forward, *_ = torch.func.vjp(lambda cotangent: pull_back(cotangent)[0], torch.zeros_like(value))
    directions = torch.eye(theta.shape[-1], dtype=theta.dtype, device=theta.device)
    return torch.func.vmap(lambda d: push_forward(d.expand_as(theta))[0], out_dims=-1)(directions)
