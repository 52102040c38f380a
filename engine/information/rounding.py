"""Whole numbers of observations near an optimum that has fractions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__: list[str] = []  # the machinery of engine.information.design

_SLACK = 1e-9  # of the budget: rounding of a sum of costs
_ROUNDS = 1000


def whole_numbers(
    value: Callable[[np.ndarray], float],
    relaxed: np.ndarray,
    price: np.ndarray,
    budget: float,
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
    """Whole numbers within budget and limits: rounded down, what is left spent where it brings most, then exchanged.

    Arguments:
        value: φ of numbers (M,), to be least.
        relaxed: The optimum with fractions, shape (M,).
        price, low, high: Cost, fewest and most of each kind, shape (M,) each.
        budget: What may be spent.

    Example:
        >>> def variance(n):
        ...     return float((np.array([4.0, 1.0]) / np.maximum(n, 1e-9)).sum())
        >>> limits = np.ones(2), 10.0, np.zeros(2), np.full(2, 10.0)
        >>> whole_numbers(variance, np.array([20 / 3, 10 / 3]), *limits).tolist()
        [7.0, 3.0]
    """
    low, high = np.ceil(low - _SLACK), np.floor(high + _SLACK)
    room = budget * (1.0 + _SLACK)
    numbers = np.clip(np.floor(relaxed + 1e-6), low, high)
    numbers = _filled(value, numbers, price, room, high)
    for _ in range(_ROUNDS):
        best, at = value(numbers), None
        for i in range(len(price)):
            for j in range(len(price)):
                spent = price @ numbers
                fewer = max(1.0, np.ceil((price[j] - (room - spent)) / price[i] - _SLACK))
                if i == j or numbers[i] - fewer < low[i]:
                    continue
                tried = numbers.copy()
                tried[i] -= fewer
                left = room - price @ tried
                tried[j] = min(high[j], tried[j] + np.floor(left / price[j]))
                tried = _filled(value, tried, price, room, high)
                if (reached := value(tried)) < best - 1e-12 * abs(best):
                    best, at = reached, tried
        if at is None:
            return numbers
        numbers = at
    return numbers


def _filled(
    value: Callable[[np.ndarray], float], numbers: np.ndarray, price: np.ndarray, room: float, high: np.ndarray
) -> np.ndarray:
    """What is left of the budget spent, on the kind that brings most for its cost; half of what it buys at a time."""
    numbers = numbers.copy()
    while True:
        left, before, best = room - price @ numbers, value(numbers), None
        for m, cost in enumerate(price):
            can = min(high[m] - numbers[m], np.floor(left / cost))
            if can < 1.0:
                continue
            step = max(1.0, np.floor(can / 2.0))
            tried = numbers.copy()
            tried[m] += step
            gain = (before - value(tried)) / (step * cost)
            if best is None or gain > best[0]:
                best = gain, tried
        if best is None:
            return numbers
        numbers = best[1]
