"""Code written for one observation, run for a batch by ``torch.vmap``, in float64 and without checks of values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Batched"]

# Where torch asks whether arguments are valid: of a batch there is no single answer, and here a mask takes its place.
_VALIDATION = frozenset(
    f"torch.distributions.{name}"
    for name in ("constraints", "continuous_bernoulli", "distribution", "geometric", "uniform", "wishart")
)
_ALL_TRUE = getattr(torch, "_is_all_true", object())
_FACTORIES = (torch.empty, torch.eye, torch.linspace, torch.logspace, torch.ones, torch.rand, torch.randn, torch.zeros)
_FROM_VALUES = (torch.arange, torch.full, torch.tensor)


class Batched(TorchFunctionMode):
    """Within it, distributions of torch and Pyro work under ``torch.vmap``, and numbers are float64 unless they say otherwise.

    It holds for the thread that enters it, and nothing global is changed: the arguments of a distribution are not
    checked, since under vmap they have no single truth value; a few operations that vmap does not know, or that it
    warns about, are replaced by equal ones; and what would be made in torch's default dtype is made in float64.

    Example:
        >>> with Batched():
        ...     s = torch.vmap(lambda p: torch.distributions.Geometric(p).log_prob(torch.tensor(2.0)))(torch.tensor([0.5, 1.0]))
        >>> [round(p, 9) for p in s.exp().tolist()], s.dtype
        ([0.125, 0.0], torch.float64)
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one function of torch, or what stands for it."""
        kwargs = dict(kwargs or {})
        if func is _ALL_TRUE:
            return torch.ones((), dtype=torch.bool)
        if func is torch.Tensor.__bool__ and sys._getframe(1).f_globals.get("__name__") in _VALIDATION:
            return True
        if func in _FACTORIES and kwargs.get("dtype") is None and kwargs.get("out") is None:
            kwargs["dtype"] = torch.float64
        elif func in _FROM_VALUES:
            return _from_values(func, args, kwargs)
        elif (own := _REPLACED.get(func)) is not None:
            return own(*args, **kwargs)
        return func(*args, **kwargs)


def _from_values(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
    default, dtype = torch.get_default_dtype(), kwargs.get("dtype")
    # torch.distributions turns plain numbers into the default dtype, said aloud
    if dtype is default and sys._getframe(2).f_globals.get("__name__") == "torch.distributions.utils":
        kwargs["dtype"] = torch.float64
    value = func(*args, **kwargs)
    given = args[0] if args else None
    if dtype is None and value.dtype is default and not hasattr(given, "dtype"):
        return func(*args, **{**kwargs, "dtype": torch.float64})
    return value


def _set(tensor: Tensor, index: Any, value: Any) -> None:
    if isinstance(index, Tensor) and index.dtype is torch.bool and not isinstance(value, Tensor):
        tensor.masked_fill_(index, value)
    else:
        tensor[index] = value


def _clamp(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor.copy_(tensor.clamp(*args, **kwargs))


def _close(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Tensor:
    return ((a - b).abs() <= atol + rtol * b.abs()) | (a == b)


def _binomial(count: Tensor, probability: Tensor, **kwargs: Any) -> Tensor:
    return torch.binomial(count + torch.zeros_like(probability), probability + torch.zeros_like(count), **kwargs)


# What fills memory with random numbers would fill it once for the whole batch: new numbers are returned instead.
def _normal(tensor: Tensor, mean: float = 0.0, std: float = 1.0, **kwargs: Any) -> Tensor:
    return mean + std * torch.randn(tensor.shape, dtype=tensor.dtype)


def _uniform(tensor: Tensor, low: float = 0.0, high: float = 1.0, **kwargs: Any) -> Tensor:
    return low + (high - low) * torch.rand(tensor.shape, dtype=tensor.dtype)


def _exponential(tensor: Tensor, rate: float = 1.0, **kwargs: Any) -> Tensor:
    return -torch.log1p(-torch.rand(tensor.shape, dtype=tensor.dtype)) / rate


def _cauchy(tensor: Tensor, median: float = 0.0, sigma: float = 1.0, **kwargs: Any) -> Tensor:
    return median + sigma * torch.tan(torch.pi * (torch.rand(tensor.shape, dtype=tensor.dtype) - 0.5))


_REPLACED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.__setitem__: _set,
    torch.Tensor.clamp_: _clamp,
    torch.isclose: _close,
    torch.binomial: _binomial,
    torch.Tensor.normal_: _normal,
    torch.Tensor.uniform_: _uniform,
    torch.Tensor.exponential_: _exponential,
    torch.Tensor.cauchy_: _cauchy,
}
