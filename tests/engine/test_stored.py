"""Plugins written by this version load in every later one; what was touched, or holds code, does not."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import EvidenceError, TamperedError
from engine.plugin import changed_files, content_hash, describe, read_plugin

STORED = Path(__file__).parents[1] / "stored"
X, THETA = torch.tensor([[0.3, -0.2]], dtype=torch.float64), torch.tensor([[0.1, 0.4]], dtype=torch.float64)
#: The scalars at X and THETA, printed by tests/stored/make.py when the files were written.
SCALARS = {"neural_ratio": -0.5901681305309238, "neural_likelihood": -1.5895629613860758}


def unpack(name, folder):
    with zipfile.ZipFile(STORED / f"{name}_0.1.zip") as archive:
        archive.extractall(folder)
    return Path(folder) / name


@pytest.mark.parametrize("name", SCALARS)
def test_a_plugin_is_built_from_stored_bytes(name, tmp_path):
    modality = read_plugin(unpack(name, tmp_path))

    assert modality(X, THETA).item() == pytest.approx(SCALARS[name], rel=1e-12)
    assert modality.training_prior.names == ("a", "b")


def test_a_calibration_comes_back_with_its_fields(tmp_path):
    calibrated = read_plugin(unpack("neural_ratio", tmp_path))
    delta, slope, variance, error = calibrated.calibration.at(torch.zeros(1, 2, dtype=torch.float64))

    assert calibrated.calibration.simulations == 5000
    # x ~ N(θ, ½²) has Fisher information 4, of which a small network keeps a part
    assert slope[0].diagonal().min() > 1.0
    assert torch.linalg.eigvalsh(variance[0]).min() > 0.0
    assert torch.linalg.eigvalsh(error[0]).min() > 0.0
    assert delta.abs().max() < 2.0


def test_a_tampered_byte_is_named(tmp_path):
    folder = unpack("neural_ratio", tmp_path)
    content = content_hash(folder)
    chunk = max(folder.rglob("c/*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))

    assert changed_files(folder, content) == [str(chunk.relative_to(folder))]
    with pytest.raises(TamperedError, match=chunk.name):
        read_plugin(folder)


def test_weights_that_are_a_pickle_do_not_load(tmp_path):
    folder = unpack("neural_likelihood", tmp_path)
    weights = folder / "weights.zarr"
    for path in sorted(weights.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    weights.rmdir()
    weights.write_bytes(pickle.dumps({"state": 1}))

    with pytest.raises(EvidenceError):
        read_plugin(folder)


def test_an_array_of_objects_does_not_load(tmp_path):
    folder = unpack("neural_likelihood", tmp_path)
    header = next(path for path in (folder / "weights.zarr").rglob("zarr.json") if '"data_type"' in path.read_text())
    text = header.read_text()
    kind = text.split('"data_type": "')[1].split('"')[0]
    header.write_text(text.replace(f'"data_type": "{kind}"', '"data_type": "object"'))

    with pytest.raises(EvidenceError):
        read_plugin(folder)
    assert np.dtype(object).hasobject
    assert describe(folder).factory == "modalities:NeuralLikelihood"
