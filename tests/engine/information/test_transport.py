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


EVEN = torch.ones(200, 2) / 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cells": 0}, "cells must be a whole number of at least 1, got 0"),
        ({"cells": 3.5}, r"cells must be a whole number of at least 1, got 3\.5"),
        ({"batches": 2.5}, r"batches must be a whole number of at least 2, got 2\.5"),
        ({"batches": 1}, "batches must be a whole number of at least 2, got 1"),
        ({"seed": "a"}, "a seed is a whole number"),
        ({"unit": "bytes"}, "one of nats, bits, got 'bytes'"),
        ({"conditional": torch.zeros(0)}, "conditional must hold at least 20 log ratios, .* got 0"),
        ({"conditional": [math.nan] * 30}, "conditional must hold no NaN, got 30 of 30, first in row 0"),
        ({"conditional": "much"}, "conditional must hold numbers .* got 'much'"),
        ({"prior": "flat"}, "prior must hold numbers .* got 'flat'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        decompose_samples(EVEN, EVEN, **settings)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.ones(200, 2), torch.ones(200, 2) / 2), r"each row of posterior1 .* with sum 2 in row 0"),
        ((torch.ones(200, 2) / 2, torch.ones(200, 3) / 3), "2 in posterior1 and 3 in posterior2"),
        ((torch.ones(200) / 2, torch.ones(200, 2) / 2), r"posterior1 must have shape \(n, n_y\)"),
        ((torch.ones(50, 2) / 2, torch.ones(50, 2) / 2), "at least 20, got 5 batches of 50 and 50"),
        ((EVEN, EVEN, EVEN[:30]), "at least 20, got 5 batches of 200, 200 and 30"),
        (("abc", EVEN), r"posterior1 must hold numbers of the shape \(n, n_y\), .* got 'abc'"),
        ((EVEN, [object()] * 200), r"posterior2 must hold numbers of the shape .* got a list"),
        ((EVEN, EVEN * 1j), "posterior2 must hold real numbers .* got torch.complex64"),
    ],
)
def test_what_are_no_posteriors_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        decompose_samples(*arguments)


def test_a_prior_of_other_labels_is_refused():
    with pytest.raises(ValueError, match="prior must hold 2 probabilities"):
        decompose_samples(torch.ones(200, 2) / 2, torch.ones(200, 2) / 2, prior=[0.2, 0.2, 0.6])


def test_posteriors_that_contradict_the_prior_are_not_reliable():
    first, second, both, _ = two_sided(4000, 0.0, seed=4)
    assert decompose_samples(first, second, both).reliable
    found = decompose_samples(first, second, both, prior=[0.3, 0.7], unit="bits")
    assert not found.reliable
    assert "the mean of posterior1 over its draws is not the prior: label " in found.reason
    assert "where the prior has 0.3" in found.reason or "where the prior has 0.7" in found.reason
    assert found.reason.endswith("draw x from its marginal law, or give prior=")
    assert "the mean of joint over its draws" in found.reason


def test_a_shift_of_many_labels_is_seen_though_it_is_small_in_every_one():
    points = torch.special.ndtri((torch.arange(60, dtype=torch.float64) + 0.5) / 60)
    x = math.sqrt(2.0) * torch.randn(1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right, shifted = (torch.softmax(-0.5 * (x + by - points) ** 2, -1) for by in (0.0, 0.5))
    assert decompose_samples(right, right).reliable
    assert (
        "the mean of posterior2 over its draws is not the prior: labels 0 to "
        in decompose_samples(right, shifted).reason
    )


def test_a_joint_that_tells_less_than_its_parts_is_not_reliable():
    first, second, _, _ = two_sided(2000, 0.0, seed=5)
    found = decompose_samples(first, second, torch.full((2000, 2), 0.5, dtype=torch.float64))
    assert found.synergy < -0.1
    assert not found.reliable
    assert found.reason == (
        "synergy is negative by more than its error, which no joint law allows: joint contradicts posterior1 and posterior2"
    )


@pytest.mark.parametrize("n", [100, 300])
def test_posteriors_of_any_true_law_are_reliable(n):
    """Random tables p(y, x1, x2), rare labels and rare data among them, and in every third x2 is a noisy copy of x1."""
    rng = np.random.default_rng(n)
    for case in range(20):
        labels, k1, k2 = rng.choice([2, 3, 20]), rng.choice([2, 8]), rng.choice([2, 8])
        prior = rng.dirichlet(np.full(labels, 0.5)) + 1e-6
        law = rng.dirichlet(np.full(k1 * k2, 0.2), labels).reshape(labels, k1, k2)
        if case % 3 == 0:
            law = law.sum(2)[:, :, None] * rng.dirichlet(np.ones(k2), k1)
        law = prior[:, None, None] / prior.sum() * law + 1e-12
        law = torch.from_numpy(law / law.sum())
        i, j = np.divmod(rng.choice(k1 * k2, n, p=law.sum(0).flatten().numpy()), k2)
        first, second, both = law.sum(2)[:, i], law.sum(1)[:, j], law[:, i, j]
        found = decompose_samples(*((t / t.sum(0)).mT for t in (first, second, both)), prior=law.sum((1, 2)), cells=8)
        assert found.reliable, found.reason
