"""Arguments of a modality as checked float64 tensors, and the randomness of its simulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from engine.errors import ModalityError

__all__ = ["Exact", "Numbers", "check_covariance", "float64", "own_generator", "per_entry", "require"]

#: What a numeric argument may be: a tensor, or plain numbers, nested where it has several dimensions.
Numbers: TypeAlias = Tensor | Sequence[Any] | float


def require(name: str, tensor: Tensor, ok: Tensor, rule: str, advice: str) -> None:
    """Refuse a tensor with an entry that is not ``ok``, naming the first one and what to do about it."""
    if not bool(ok.all()):
        at = (~ok).nonzero()[0].tolist()
        where = f" at index {at[0] if len(at) == 1 else tuple(at)}" if at else ""
        raise ModalityError(f"{name} must be {rule}, got {tensor[tuple(at)].item():g}{where}; {advice}")


def float64(name: str, value: Numbers, shape: Sequence[int | None] | None = None, advice: str = "") -> Tensor:
    """``value`` as a finite float64 tensor that nobody else writes to.

    Arguments:
        name: The argument's name, for messages.
        value: A tensor or (nested) numbers.
        shape: The shape it must have; None in it stands for any size of at least 1.
        advice: What to do about a wrong shape.

    Raises:
        ModalityError: for something that is no tensor, another shape, or an entry that is not finite.

    Example:
        >>> float64("sd", [1, 2], shape=(2,))
        tensor([1., 2.], dtype=torch.float64)
        >>> float64("sd", [1.0, float("nan")])
        Traceback (most recent call last):
        engine.errors.ModalityError: sd must be finite, got nan at index 1; ...
    """
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = f"{value!r}" if isinstance(value, str) else type(value).__name__
        raise ModalityError(f"{name} must be a tensor or plain numbers, got {kind} ({error}); pass numbers") from error
    if shape is not None:
        fits = len(shape) == tensor.dim() and all(
            n == size or (n is None and size > 0) for n, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("n" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "")
            advice = advice or "give one value for each entry"
            raise ModalityError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}; {advice}")
    require(name, tensor, tensor.isfinite(), "finite", "repair or leave out that entry")
    return tensor


def per_entry(name: str, value: Numbers, size: int) -> Tensor:
    """Positive numbers of shape (size,), from one for all entries or one for each.

    Raises:
        ModalityError: for another shape, or a value that is not positive.
    """
    tensor = float64(name, value)
    if tensor.dim() == 0:
        tensor = tensor.repeat(size)
    elif tensor.shape != (size,):
        raise ModalityError(
            f"{name} must be one number or have shape ({size},), got {tuple(tensor.shape)}; "
            "give one value for each entry"
        )
    require(name, tensor, tensor > 0, "> 0", "give a positive value")
    return tensor


def check_covariance(name: str, value: Numbers, size: int) -> Tensor:
    """A symmetric positive definite matrix, shape (size, size).

    Raises:
        ModalityError: for another shape, asymmetry beyond 1e-8 of the diagonal's scale, or a matrix that
            is not positive definite.
    """
    matrix = float64(name, value, (size, size), "one row and one column for each entry of the data")
    variance = matrix.diagonal()
    require(f"{name}'s diagonal", variance, variance > 0, "> 0", "give a positive variance")
    tolerance = 1e-8 * (variance[:, None] * variance).sqrt()
    gap = matrix - matrix.mT
    require(f"{name} minus its transpose", gap, gap.abs() <= tolerance, "0", "symmetrise it: (C + C.mT) / 2")
    if int(torch.linalg.cholesky_ex(matrix).info) != 0:
        low = torch.linalg.eigvalsh(matrix)[0].item()
        raise ModalityError(
            f"{name} must be positive definite, got a smallest eigenvalue of {low:.3g}; "
            "remove entries that repeat others, or add the variance that is missing"
        )
    return matrix


def own_generator(generator: torch.Generator | None) -> torch.Generator:
    """The generator given, or a fresh one seeded by the operating system: never torch's global one."""
    if generator is not None:
        return generator
    fresh = torch.Generator()
    fresh.seed()
    return fresh


class Exact(nn.Module):
    """A module whose own numbers stay float64 whatever it is cast to: measurements are not weights."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = {name: b for name, b in self._buffers.items() if b is not None and b.dtype == torch.float64}
        super()._apply(fn, recurse)
        for name, known in kept.items():
            cast = self._buffers[name]
            self._buffers[name] = known if cast is None else known.to(cast.device)
        return self
