"""Data are checked before anything is evaluated, and read in blocks."""

import math

import numpy as np
import pytest
import torch
import zarr

from engine import ObservationError, Observations, UnknownPluginError
from engine.observations import block_length
from modalities import Constraint, Gaussian, PoissonCounts


@pytest.fixture
def modalities():
    counts = {"signal": torch.tensor([5.0, 9.0]), "background": torch.tensor([50.0, 40.0])}
    return {
        "tracker": PoissonCounts(**counts),
        "calorimeter": PoissonCounts(signal=counts["signal"], background=torch.tensor([60.0, 30.0])),
        "copy": PoissonCounts(**counts),
        "gap": Gaussian(parameter_names=("a", "b"), sd=1.0, missing=True),
        "full": Gaussian(parameter_names=("a", "b"), sd=1.0),
        "aux1": Constraint("a"),
        "aux2": Constraint("b"),
    }


def test_tensors_arrays_lists_and_zarr_are_the_same_data(modalities, tmp_path):
    values = [[57.0, 49.0], [51.0, 44.0]]
    store = zarr.create_array(str(tmp_path / "x.zarr"), data=np.array(values, dtype="f4"), chunks=(1, 2))
    kinds = [
        values,
        np.array(values),
        np.array(values, dtype="i4"),
        torch.tensor(values),
        torch.tensor(values).long(),
        store,
    ]
    hashes = {Observations({"tracker": x}, modalities).hash for x in kinds}
    assert len(hashes) == 1
    group = zarr.open_group(str(tmp_path / "g.zarr"), mode="w")
    group.create_array("tracker", data=np.array(values))
    for data in (group, str(tmp_path / "g.zarr"), tmp_path / "g.zarr"):
        assert {Observations(data, modalities).hash} == hashes


def test_the_hash_tells_other_data_names_and_shapes_apart(modalities):
    a = Observations({"tracker": [[57, 49]]}, modalities).hash
    assert a != Observations({"tracker": [[57, 50]]}, modalities).hash
    assert a != Observations({"copy": [[57, 49]]}, modalities).hash
    assert a != Observations({"tracker": [[57, 49], [57, 49]]}, modalities).hash


def test_blocks_depend_on_the_event_shape_alone_and_cover_everything(modalities):
    x = torch.arange(20_000.0).reshape(10_000, 2)
    blocks = list(Observations({"tracker": x}, modalities).blocks("tracker"))
    assert [len(b) for b in blocks] == [4096, 4096, 1808]
    assert torch.equal(torch.cat(blocks), x.double())
    assert block_length((1024, 1024)) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"tracker": [[57.0, math.nan]]}, ["finite", "nan", "observation 0", "entry [1]", "'tracker'", "'x'"]),
        ({"tracker": [[57.0, 1.0], [math.inf, 1.0]]}, ["inf", "observation 1", "entry [0]"]),
        (
            {"tracker": [[1, 1]] * 5000 + [[4, -3]]},
            ["counts must be >= 0", "-3", "observation 5000", "entry [1]", "Gaussian"],
        ),
        ({"tracker": [57.0, 49.0]}, ["(N, 2", "(2,)", "x[None]"]),
        ({"tracker": [[57.0]]}, ["(N, 2", "(1, 1)", "event_shape"]),
        ({"tracker": np.zeros((0, 2))}, ["0 observations", "'tracker'"]),
        ({}, ["no data"]),
        ({"tracker": np.array([[57.0, 49.0]], dtype=np.float16)}, ["float16", "'tracker'"]),
        ({"tracker": torch.tensor([[57.0, 49.0]]).bfloat16()}, ["bfloat16"]),
        ({"tracker": np.array([[True, False]])}, ["bool"]),
        ({"tracker": np.array([[1 + 2j, 0]])}, ["complex"]),
        ({"tracker": np.array([["a", "b"]])}, ["<U1"]),
        ({"tracker": np.array([[None, 1]])}, ["object"]),
        ({"full": [[1.0, math.nan]]}, ["NaN marks a missing entry only"]),
        ({"gap": [[1.0, math.inf]]}, ["inf"]),
    ],
)
def test_bad_data_is_an_error_with_rule_value_and_place(modalities, data, words):
    with pytest.raises(ObservationError) as error:
        Observations(data, modalities)
    for word in words:
        assert word in str(error.value)


def test_nan_is_a_missing_entry_where_the_modality_allows_it(modalities):
    assert Observations({"gap": [[1.0, math.nan]]}, modalities).lengths == {"gap": 1}


def test_an_unknown_plugin_is_named_with_those_there_are(modalities):
    with pytest.raises(UnknownPluginError, match=r"'traker'; there are .*tracker"):
        Observations({"traker": [[1.0, 1.0]]}, modalities)


def test_the_same_data_under_two_names_is_an_error_naming_both(modalities):
    for pair in (("tracker", "calorimeter"), ("tracker", "copy")):
        with pytest.raises(ObservationError, match="same data") as error:
            Observations({name: [[57, 49]] for name in pair}, modalities)
        assert all(f"'{name}'" in str(error.value) for name in pair)
    assert len(Observations({"tracker": [[57, 49]], "copy": [[57, 49]]}, modalities, allow_identical=True)) == 2


def test_empty_channels_and_nominal_constraints_may_coincide_but_one_model_may_not(modalities):
    assert len(Observations({"tracker": [[0, 0]], "calorimeter": [[0, 0]]}, modalities)) == 2
    assert len(Observations({"aux1": [[0.0]], "aux2": [[0.0]]}, modalities)) == 2
    with pytest.raises(ObservationError, match="same data"):
        Observations({"tracker": [[0, 0]], "copy": [[0, 0]]}, modalities)


def test_a_codec_that_may_run_code_is_refused_before_it_is_used(modalities, tmp_path):
    import json

    zarr.create_array(str(tmp_path / "x.zarr"), data=np.array([[57.0, 49.0]]), zarr_format=2, compressors=None)
    meta = tmp_path / "x.zarr" / ".zarray"
    table = json.loads(meta.read_text())
    table["filters"] = [{"id": "pickle", "protocol": 5}]
    meta.write_text(json.dumps(table))
    with pytest.raises(Exception, match="pickle"):
        Observations({"tracker": zarr.open_array(str(tmp_path / "x.zarr"), mode="r")}, modalities)
