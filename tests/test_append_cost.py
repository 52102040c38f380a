"""Appending a plugin leaves the others alone: nothing of theirs is written, and nothing of theirs is read."""

from __future__ import annotations

import builtins
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Uniform

from engine import Parameter, Registry, TamperedError
from modalities import Gaussian, NeuralLikelihood, NeuralRatio, PoissonCounts

DATA = {
    "spectrum": torch.linspace(-1.0, 1.0, 30, dtype=torch.float64).reshape(10, 3),
    "image": torch.linspace(0.0, 1.0, 20, dtype=torch.float64).reshape(10, 2),
    "rates": torch.tensor([[9.0, 4.0], [11.0, 6.0]]),
    "length": torch.tensor([[0.3], [0.1]], dtype=torch.float64),
}


def learned(kind: type, size: int, seed: int) -> NeuralLikelihood | NeuralRatio:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modality = kind(("a", "b"), (size,), hidden=(8,))
        modality.standardise(torch.randn(50, size), torch.rand(50, 2))
    return modality.double()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry.create(tmp_path / "work", [Parameter(name, Uniform(-1.0, 1.0)) for name in ("a", "b")])
    registry.append("spectrum", learned(NeuralLikelihood, 3, 0))
    registry.append("image", learned(NeuralRatio, 2, 1))
    registry.append("rates", PoissonCounts(signal=[1.0, 1.0], background=[9.0, 4.0], strength="a"))
    registry.append("length", Gaussian(parameter_names=("b",), sd=0.5))
    return registry


def fifth() -> NeuralLikelihood | NeuralRatio:
    return learned(NeuralLikelihood, 4, 5)


def state(folder: Path) -> dict[str, tuple[str, int, int, int]]:
    """Every file below a folder, and the folders: content, inode, when it was changed, and its permissions."""
    out = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        out[str(path.relative_to(folder))] = (content, status.st_ino, status.st_mtime_ns, status.st_mode)
    return out


def total(registry: Registry) -> Tensor:
    theta = torch.tensor([[0.1, 0.2], [-0.5, 0.7]], dtype=torch.float64)
    return registry.log_evidence(DATA, theta)


def test_not_a_byte_of_the_others_changes_and_the_ledger_only_grows(registry: Registry) -> None:
    folders = {name: registry.path / "plugins" / name for name in registry.plugins}
    before, ledger, sum_before = (
        {name: state(folder) for name, folder in folders.items()},
        (registry.path / "registry.toml").read_bytes(),
        total(registry),
    )
    registry.append("fifth", fifth())
    assert {name: state(folder) for name, folder in folders.items()} == before
    assert (registry.path / "registry.toml").read_bytes().startswith(ledger)
    assert sorted(p.name for p in (registry.path / "plugins").iterdir()) == sorted([*folders, "fifth"])
    assert torch.equal(total(Registry.open(registry.path)), sum_before)  # and so the old sum is the same to the bit


def test_nothing_of_the_others_is_read(registry: Registry, tmp_path: Path) -> None:
    digest = registry.digest
    plugins, away = registry.path / "plugins", tmp_path / "away"
    away.mkdir()
    for folder in list(plugins.iterdir()):  # what is not there cannot be read: only the folders' names are left
        folder.rename(away / folder.name)
        folder.mkdir()
    registry = Registry.open(registry.path)
    registry.append("fifth", fifth())
    with pytest.raises(TamperedError):
        registry.verify()  # which does read them
    for folder in away.iterdir():
        assert list((plugins / folder.name).iterdir()) == []  # nor written
        (plugins / folder.name).rmdir()
        folder.rename(plugins / folder.name)
    assert Registry.open(registry.path).verify().plugins == 5
    assert registry.at(digest).digest == digest


def test_an_append_opens_the_same_files_whatever_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counted(real: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            opened.append(str(path))
            return real(path, *args, **kwargs)

        return call

    found = []
    for there in (1, 30):
        registry = Registry.create(tmp_path / f"of-{there}", [Parameter("b", Uniform(-1.0, 1.0))])
        for n in range(there):
            registry.append(f"there-{n}", Gaussian(parameter_names=("b",), sd=0.5 + n))
        with monkeypatch.context() as patched:
            for module, name in ((os, "open"), (io, "open"), (builtins, "open")):
                patched.setattr(module, name, counted(getattr(module, name)))
            opened.clear()
            registry.append("new", Gaussian(parameter_names=("b",), sd=0.1))
        assert any("registry.toml" in path for path in opened)
        assert not [path for path in opened if "there-" in path]
        found.append(len(opened))
    assert found[0] == found[1]
