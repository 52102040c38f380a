"""Which plugins of a registry a question about information is asked of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from engine.errors import UnknownPluginError
from engine.information.checks import called
from engine.modality import Modality

if TYPE_CHECKING:
    from engine.registry import Registry

__all__: list[str] = []  # what worth and interactions ask a registry


def plugins_of(
    registry: Registry,
    only: Sequence[str] | str | None,
    without: Sequence[str] | str,
    question: str,
    takes: str = "a Registry",
) -> dict[str, Modality]:
    """The live plugins by name.

    Arguments:
        registry: Whose.
        only, without: Names of plugins to keep or to leave out.
        question, takes: The function that asks, and what it takes, for messages.

    Raises:
        ValueError: for what is no registry, and names that are none.
        UnknownPluginError: for names that are not there, or where none is left.
    """
    from engine.registry import Registry

    if not isinstance(registry, Registry):
        raise ValueError(
            f"{question} takes {takes}, got {called(registry)}; plugins by name go to {question}_of(space, plugins)"
        )
    for what, names in (("only", only), ("without", without)):
        given = [names] if isinstance(names, str) or names is None else names
        if not isinstance(given, Collection) or not all(isinstance(n, str) or n is None for n in given):
            raise ValueError(f"{what} must be the name of a plugin, or several, got {names!r:.60}")
    names = registry.chosen(only, without)
    if not names:
        raise UnknownPluginError(f"no plugin is left; there are {', '.join(registry.plugins) or 'none'}")
    return {name: registry.modality(name) for name in names}
