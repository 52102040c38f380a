"""Decompositions from samples agree with the convex programme, and with numerical integration where θ is ±1."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.information import decompose, decompose_samples

sys.path.append(str(Path(__file__).parent))
from gates import TABLES
from samples import counted, two_sided

PARTS = ("redundancy", "unique1", "unique2", "synergy")


@pytest.mark.parametrize("gate", TABLES)
def test_a_gate_from_20_000_samples_is_that_of_the_convex_programme(gate):
    exact = decompose(TABLES[gate], unit="bits")
    first, second, both, prior = counted(TABLES[gate], 20_000, seed=0)
    found = decompose_samples(first, second, both, prior=prior, unit="bits")
    for name in PARTS:
        assert getattr(found, name) == pytest.approx(getattr(exact, name), abs=0.03), name
    assert found.gap < 1e-3


@pytest.mark.parametrize(("rho", "synergy"), [(0.0, 0.0744), (0.5, 0.0), (-0.5, 0.2856)])
def test_binary_theta_with_normal_noise_is_as_integrated_numerically(rho, synergy):
    first, second, both, s12 = two_sided(40_000, rho, seed=1)
    found = decompose_samples(first, second, both, conditional=s12, unit="bits")
    assert found.redundancy == pytest.approx(0.1607, abs=0.01)
    assert found.unique1 == pytest.approx(0.3252, abs=0.01)
    assert found.unique2 == pytest.approx(0.0, abs=0.01)
    assert found.synergy == pytest.approx(synergy, abs=0.01)
    lost = -0.5 * math.log2(1.0 - rho**2)  # the sum misses it whatever the sign of ρ
    assert found.conditional_information == pytest.approx(lost, abs=4 * found.errors["conditional_information"] + 1e-6)


def test_without_a_joint_law_there_is_no_synergy_and_r_and_u_are_the_same():
    first, second, both, _ = two_sided(5000, 0.0, seed=2)
    alone, with_joint = decompose_samples(first, second), decompose_samples(first, second, both)
    assert alone.synergy is None
    assert alone.joint_information is None
    assert alone.conditional_information is None
    assert alone.redundancy == with_joint.redundancy
    assert "synergy unknown" in str(alone)


def test_errors_are_the_scatter_of_repetitions():
    """U1 of 24 sets of 1000 samples: its spread is the error that each states, within three standard errors of the ratio."""
    runs = [decompose_samples(*two_sided(1000, 0.0, seed=s)[:2], cells=16) for s in range(100, 124)]
    spread = np.std([r.unique1 for r in runs], ddof=1)
    stated = math.sqrt(np.mean([r.errors["unique1"] ** 2 for r in runs]))
    assert 1 / 1.5 < spread / stated < 1.5


def test_what_few_cells_lose_is_in_the_errors():
    first, second, _, _ = two_sided(4000, 0.0, seed=3)
    few, some, many = (decompose_samples(first, second, cells=c) for c in (4, 32, 64))
    assert few.information1 == some.information1 == many.information1  # of the draws themselves
    assert some.redundancy == pytest.approx(many.redundancy, abs=1e-3)
    assert few.redundancy == pytest.approx(many.redundancy, abs=2 * few.errors["redundancy"])
    assert few.errors["redundancy"] > 3 * many.errors["redundancy"]


@pytest.mark.parametrize("sd", [0.1, 0.3, 1.0])
def test_errors_cover_what_two_clouds_of_equal_channels_make_of_them(sd):
    """Two measurements with noise sd of θ ~ N(0, 1): R = I = ½ ln(1 + 1/sd²), U = 0. Posteriors on 400 points are as good as exact."""
    points = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    generator = torch.Generator().manual_seed(1)
    sides = []
    for _ in range(2):
        x = torch.randn(1000, dtype=torch.float64, generator=generator)
        x = x + sd * torch.randn(1000, dtype=torch.float64, generator=generator)
        sides.append(torch.softmax(-0.5 * ((x[:, None] - points) / sd) ** 2, -1))
    found = decompose_samples(*sides)
    truth = 0.5 * math.log(1.0 + 1.0 / sd**2)
    for name, value in (("redundancy", truth), ("unique1", 0.0), ("unique2", 0.0)):
        assert abs(getattr(found, name) - value) < 2.0 * found.errors[name] + 1e-3
        assert found.errors[name] < 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.ones(200, 2), torch.ones(200, 2) / 2), r"each row of posterior1 .* with sum 2 in row 0"),
        ((torch.ones(200, 2) / 2, torch.ones(200, 3) / 3), "2 in posterior1 and 3 in posterior2"),
        ((torch.ones(200) / 2, torch.ones(200, 2) / 2), r"posterior1 must have shape \(n, n_y\)"),
        ((torch.ones(50, 2) / 2, torch.ones(50, 2) / 2), "at least 20, got 5 batches of 50 and 50"),
    ],
)
def test_what_are_no_posteriors_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        decompose_samples(*arguments)


def test_a_prior_of_other_labels_is_refused():
    with pytest.raises(ValueError, match="prior must hold 2 probabilities"):
        decompose_samples(torch.ones(200, 2) / 2, torch.ones(200, 2) / 2, prior=[0.2, 0.2, 0.6])
