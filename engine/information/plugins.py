"""Which plugins of a registry a question about information is asked of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import UnknownPluginError
from engine.modality import Modality

if TYPE_CHECKING:
    from engine.registry import Registry

__all__: list[str] = []  # what worth and interactions ask a registry


def plugins_of(
    registry: Registry, only: Sequence[str] | str | None = None, without: Sequence[str] | str = ()
) -> dict[str, Modality]:
    """The live plugins by name; UnknownPluginError for names that are not there, or where none is left."""
    names = registry.chosen(only, without)
    if not names:
        raise UnknownPluginError(f"no plugin is left; there are {', '.join(registry.plugins) or 'none'}")
    return {name: registry.modality(name) for name in names}
