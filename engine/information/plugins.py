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
    drop = [without] if isinstance(without, str) else list(without)
    keep = list(registry.plugins) if only is None else [only] if isinstance(only, str) else list(only)
    for name in (*keep, *drop):
        if name not in registry.plugins:
            raise UnknownPluginError(f"no plugin '{name}'; there are {', '.join(registry.plugins) or 'none'}")
    out = {name: registry.modality(name) for name in keep if name not in drop}
    if not out:
        raise UnknownPluginError(f"no plugin is left; there are {', '.join(registry.plugins) or 'none'}")
    return out
