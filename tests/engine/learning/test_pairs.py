"""Labelled pairs, wherever they lie, and pairs that break a rule."""

import math

import numpy as np
import pytest
import torch
import zarr

from engine import ObservationError, ParameterError
from engine.learning import TrainingError, fit

QUICK = {"epochs": 3, "progress": False}


@pytest.fixture
def stored(tmp_path):
    """Pairs as a zarr group, in chunks of 100 rows."""

    def write(theta, x):
        group = zarr.open_group(str(tmp_path / "pairs.zarr"), mode="w")
        for name, values in (("theta", theta), ("x", x)):
            array = values.numpy()
            group.create_array(name, data=array, chunks=(100, *array.shape[1:]))
        return tmp_path / "pairs.zarr"

    return write


def test_tensors_arrays_and_zarr_are_the_same_pairs(straight, pairs, stored, tmp_path, weights, same_bits):
    theta, x = pairs
    path = stored(theta, x)
    group = zarr.open_group(str(path), mode="r")
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    kinds = [(theta, x), (theta.numpy(), mapped), [theta, x.numpy().astype(">f8")], (group["theta"], group["x"])]
    found = []
    for kind in (*kinds, group, path, str(path)):
        modality = straight()
        fit(modality, pairs=kind, **QUICK)
        found.append(weights(modality))
    assert all(same_bits(found[0], other) for other in found)


def test_integers_are_numbers_and_float32_is_taken_as_it_is(straight, pairs, weights, same_bits):
    theta, x = pairs[0].float(), (10 * pairs[1]).round()
    found = []
    for kind in (x, x.to(torch.int16), x.float(), x.to(torch.int16).numpy()):
        modality = straight()
        fit(modality, pairs=(theta, kind), **QUICK)
        found.append(weights(modality))
    assert all(same_bits(found[0], other) for other in found)


@pytest.mark.parametrize("known", [True, False])
def test_the_training_prior_is_what_the_pairs_were_drawn_from_if_that_is_known(straight, pairs, prior, known):
    modality = straight()
    fit(modality, prior=prior if known else None, pairs=pairs, **QUICK)
    assert modality.training_prior == (prior if known else None)


def test_pairs_on_disk_that_exceed_the_memory_are_read_in_blocks_that_are_shuffled(straight, pairs, stored):
    theta, x = (values.repeat(10, 1) for values in pairs)
    x[:, 0] = torch.arange(len(x))  # so that rows can be told apart
    epochs, current = [], []

    class Watching(straight):
        def loss(self, x, theta, generator=None, features=None):
            if self.training:
                current.append(x[:, 0].clone())
            elif current:
                epochs.append(torch.cat(current))
                current.clear()
            return super().loss(x, theta, generator, features)

    training = fit(Watching(), pairs=stored(theta, x), memory=1, **QUICK)
    first, second, _ = epochs
    assert len(first) == 5400
    assert torch.equal(first.sort().values, second.sort().values)
    assert not torch.equal(first, second)
    held_out = set(range(6000)) - set(first.long().tolist())
    assert len(held_out) == training.held_out == 600
    assert len({row // 1000 for row in held_out}) == 6  # from every block
    steps = (first[1:] - first[:-1]).abs()
    assert steps.median() > 300  # not in the order of the rows


def test_pairs_in_blocks_are_learned_as_well_as_in_memory(straight, prior, simulate, stored, matrix):
    theta = prior.sample_prior(5000, seed=1)
    theta = theta[theta[:, 0].argsort()]  # in an order that would mislead
    x = simulate(theta, torch.Generator().manual_seed(2))
    modality = straight()
    fit(modality, pairs=stored(theta, x), memory=1, epochs=25, learning_rate=0.02)
    slope = (modality.feature_scale[:, None] * modality.mean.weight / modality.theta_scale).detach()
    assert (slope - matrix).abs().max() < 4 * 0.5 / math.sqrt(4500 / 3)


def test_sets_are_taken_from_pairs_too(straight, prior, simulate, weights, same_bits):
    theta = prior.sample_prior(100, seed=1)
    x = simulate(theta[:, None].expand(-1, 3, -1), torch.Generator().manual_seed(2))
    modality = straight()
    training = fit(modality, pairs=(theta, x), **QUICK)
    assert training.simulations == 100
    assert training.held_out == 10


@pytest.mark.parametrize("memory", [2**30, 1])
def test_rows_with_nan_are_left_out_and_counted(straight, pairs, stored, memory, weights, same_bits):
    theta, x = pairs[0].clone(), pairs[1].clone()
    theta[3, 1] = math.nan
    x[[5, 8], 2] = torch.tensor([math.nan, math.inf]).double()
    good = torch.ones(600, dtype=torch.bool)
    good[[3, 5, 8]] = False
    modality, without = straight(), straight()
    training = fit(modality, pairs=stored(theta, x), memory=memory, **QUICK)
    fit(without, pairs=(theta[good], x[good]), **QUICK)
    assert (training.excluded, training.simulations) == (3, 600)
    assert same_bits(weights(modality), weights(without))


def test_blocks_of_nothing_but_nan_are_passed_over(straight, pairs, stored):
    theta, x = (values.repeat(10, 1) for values in pairs)
    x[1000:3900] = math.nan
    training = fit(straight(), pairs=stored(theta, x), memory=1, epochs=6)
    assert training.excluded == 2900
    assert training.held_out == 310
    assert all(map(math.isfinite, training.losses))


def test_more_than_half_the_rows_with_nan_are_refused(straight, pairs):
    theta, x = pairs[0], pairs[1].clone()
    x[:301] = math.nan
    with pytest.raises(ObservationError, match=r"half.*301 of 600"):
        fit(straight(), pairs=(theta, x), **QUICK)


def test_theta_outside_the_prior_is_refused_with_row_and_count(straight, pairs, prior):
    theta = pairs[0].clone()
    theta[[17, 40], 1] = -0.5
    with pytest.raises(ParameterError, match=r"b = -0.5 at row 17 \(and 1 more of 600 rows\)"):
        fit(straight(), prior=prior, pairs=(theta, pairs[1]), **QUICK)
    assert fit(straight(), pairs=(theta, pairs[1]), **QUICK).simulations == 600  # without a prior there is no rule


def test_too_few_pairs_are_refused(straight, pairs):
    with pytest.raises(TrainingError, match=r"more θ than there are parameters \(2\).* 3 in all and 1"):
        fit(straight(), pairs=(pairs[0][:3], pairs[1][:3]), **QUICK)
    with pytest.raises(TrainingError, match=r" 1 in all and 1"):
        fit(straight(), pairs=(pairs[0][:1], pairs[1][:1]), **QUICK)
    fit(straight(), pairs=(pairs[0][:9], pairs[1][:9]), **QUICK)


def test_theta_that_never_changes_is_refused(straight, pairs):
    theta = pairs[0].clone()
    theta[:, 0] = 0.25
    with pytest.raises(TrainingError, match=r"a = 0\.25 throughout"):
        fit(straight(), pairs=(theta, pairs[1]), **QUICK)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda theta, x: (theta[:, :1], x), ["(n, 2)", "a, b", "(600, 1)"]),
        (lambda theta, x: (theta[0], x), ["(n, 2)", "(2,)"]),
        (lambda theta, x: (theta, x[:, :2]), ["(n, *event_shape) = (600, 3)", "(600, 2)"]),
        (lambda theta, x: (theta, x[:500]), ["(500, 3)", "600 θ"]),
        (lambda theta, x: (theta, x.new_zeros(600, 0, 3)), ["(600, 0, 3)"]),
        (lambda theta, x: (theta, x.to(torch.float16)), ["float16", "x of the pairs"]),
        (lambda theta, x: (theta > 0, x), ["bool", "theta of the pairs"]),
        (lambda theta, x: (theta.tolist(), x), ["list", "torch.as_tensor"]),
        (lambda theta, x: (theta, x, x), ["(theta, x)", "tuple"]),
        (lambda theta, x: {"theta": theta, "x": x}, ["(theta, x)", "dict"]),
        (lambda theta, x: (np.array([["a", "b"]]), x), ["str", "theta"]),
    ],
)
def test_what_is_no_pairs_is_told_what_would_be(straight, pairs, change, words):
    with pytest.raises(ObservationError) as error:
        fit(straight(), pairs=change(*pairs), **QUICK)
    for word in words:
        assert word in str(error.value)


def test_a_zarr_group_without_x_is_told_what_it_lacks(straight, tmp_path):
    group = zarr.open_group(str(tmp_path / "g.zarr"), mode="w")
    group.create_array("theta", data=np.zeros((5, 2)))
    with pytest.raises(ObservationError, match="none called 'x'; it holds theta"):
        fit(straight(), pairs=group, **QUICK)
