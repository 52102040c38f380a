"""What the battery found: one check each, a table of them, and why a check does not apply."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Check", "Report", "Skip", "show"]


@dataclass(frozen=True)
class Check:
    """What one check found.

    Arguments:
        name: The check, as ``report[name]`` finds it.
        passed: Whether the modality passed; None where the check does not apply or could not judge.
        detail: What was seen; for a failure the rule, the value seen and the next step.

    Example:
        >>> Check("finite", True, "finite for 8 observations at 2 θ").passed
        True
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Report:
    """What the battery found; prints as a table.

    Arguments:
        modality: The class that was checked.
        checks: One :class:`Check` each, in the order they ran.

    Example:
        >>> report = Report("Decay", (Check("shape", True, "as asked"), Check("score", False, "no gradient")))
        >>> report.passed, report["score"].detail
        (False, 'no gradient')
    """

    modality: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}; there are {', '.join(check.name for check in self.checks)}")

    def __str__(self) -> str:
        words = {True: "passed", False: "FAILED", None: "skipped"}
        found = [check.passed for check in self.checks]
        counts = ", ".join(f"{found.count(value)} {word.lower()}" for value, word in words.items())
        wide = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{self.modality}: {counts}"]
        for check in self.checks:
            head = f"  {words[check.passed]:<7}  {check.name:<{wide}}  "
            lines += textwrap.wrap(head + check.detail, 110, subsequent_indent=" " * len(head))
        return "\n".join(lines)


class Skip(Exception):  # noqa: N818  (it is no error)
    """Why a check does not apply."""


def show(values: Tensor) -> str:
    """The entries of a vector, for messages."""
    return "[" + ", ".join(f"{v:.6g}" for v in values.flatten().tolist()) + "]"
