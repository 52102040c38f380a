"""State that must not change: of the process, and of a modality; and equality to the last bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.modality import Modality

__all__ = ["global_state", "same", "tensors"]

# What the process shares -> how to read it, how to put it back.
_GLOBAL: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's global random state": (torch.get_rng_state, torch.set_rng_state),
    "numpy's global random state": (np.random.get_state, np.random.set_state),
    "python's global random state": (random.getstate, random.setstate),
}


@contextmanager
def global_state() -> Iterator[Callable[[], list[str]]]:
    """What of the process's state has changed since entry, as a function; put back at the end."""
    before = {name: look() for name, (look, _) in _GLOBAL.items()}

    def changed() -> list[str]:
        return [name for name, (look, _) in _GLOBAL.items() if not same(look(), before[name])]

    try:
        yield changed
    finally:
        for name in changed():
            _GLOBAL[name][1](before[name])


def tensors(modality: Modality) -> dict[str, Tensor]:
    """A copy of the tensors in a modality's state."""
    return {name: t.detach().clone() for name, t in modality.state_dict().items() if isinstance(t, Tensor)}


def same(a: Any, b: Any) -> bool:
    """Bit for bit, through tensors, arrays and containers; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
