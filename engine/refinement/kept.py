"""Refined chunks of many data sets, kept on disk, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.learning.folder import load_arrays, load_facts, save
from engine.refinement.solve import TABLES, TENSORS, Rows

__all__: list[str] = []  # the machinery of refinement


class Kept:
    """A folder in which every question has a folder of its own, named after all that its answer depends on."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=repr).encode()).hexdigest()
        self.folder = Path(folder) / f"refined-{digest[:16]}"

    def load(self, first: int) -> tuple[Rows, list[dict[str, Any]]] | None:
        """The chunk whose first data set is ``first``, and its records; None where it was not finished."""
        chunk = self._chunk(first)
        if not chunk.exists():
            return None
        arrays = load_arrays(chunk)
        tables = [
            {key.split("/", 1)[1]: t for key, t in arrays.items() if key.startswith(f"{table}/")} for table in TABLES
        ]
        return Rows(*(arrays[name] for name in TENSORS), *tables), load_facts(chunk)["records"]  # pyright: ignore[reportArgumentType]

    def save(self, first: int, rows: Rows, records: list[dict[str, Any]]) -> None:
        """Keep a chunk: whole, or not at all."""
        arrays: dict[str, Tensor] = {name: getattr(rows, name) for name in TENSORS}
        arrays |= {f"{table}/{key}": t for table in TABLES for key, t in getattr(rows, table).items()}
        save(self._chunk(first), arrays, {"records": records})

    def _chunk(self, first: int) -> Path:
        return self.folder / f"from-{first:09d}"
