"""What the numbers and names in a question must be, so that nothing is computed for one that makes no sense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np

from engine.modality import Modality
from engine.parameters import ParameterSpace

__all__: list[str] = []  # what questions about information refuse


def whole(
    what: str, value: object, least: int = 1, hint: str = "", error: type[ValueError | RuntimeError] = ValueError
) -> int:
    """A whole number of at least ``least``, or an error of the asker's kind.

    Example:
        >>> whole("epochs", 1.5, hint="15 is the default")
        Traceback (most recent call last):
        ValueError: epochs must be a whole number of at least 1, got 1.5; 15 is the default
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        end = f"; {hint}" if hint else ""
        raise error(f"{what} must be a whole number of at least {least}, got {value!r:.60}{end}")
    return int(value)


def real(value: Any) -> float:
    """The number; NaN for what is none: texts, truth values, lists.

    Example:
        >>> real(2), real("2"), real(True)
        (2.0, nan, nan)
    """
    if isinstance(value, str | bytes | bool | np.bool_):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def called(value: object) -> str:
    """What messages call a value of a wrong kind.

    Example:
        >>> called("a"), called(3), called({})
        ("'a'", '3', 'a dict')
    """
    if value is None or isinstance(value, str | bytes | int | float):
        return f"{value!r:.60}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def refuse_wrong_plugins(
    space: object, modalities: object, error: type[ValueError | RuntimeError] = ValueError
) -> None:
    """Refuse a space that is none, and plugins that are none, with an error of the asker's kind."""
    if not isinstance(space, ParameterSpace):
        raise error(
            f"the law of θ must be a ParameterSpace, got {called(space)}; write ParameterSpace([Parameter(...)])"
        )
    if not isinstance(modalities, Mapping):
        raise error(f"plugins must be given by name, as {{'a': modality}}, got {called(modalities)}")
    for name, modality in modalities.items():
        if not isinstance(name, str) or not isinstance(modality, Modality):
            raise error(f"plugin {name!r} must be a Modality with a name, got {called(modality)}")
        for parameter in modality.parameter_names:
            if parameter not in space:
                raise error(
                    f"plugin '{name}' depends on '{parameter}', and the parameters are {', '.join(space.names)}: add it, or "
                    "correct its parameter_names"
                )
