"""Fitting a modality's scalar from simulations or labelled pairs.

Names are imported when they are first used, as in :mod:`engine`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.learning.fitting import fit
    from engine.learning.learnable import Learnable
    from engine.learning.training import Training, TrainingError

__all__ = ["Learnable", "Training", "TrainingError", "fit"]

_HOME = {"Learnable": "learnable", "Training": "training", "TrainingError": "training", "fit": "fitting"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'engine.learning' has no attribute {name!r}")
    value = getattr(import_module(f"engine.learning.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
