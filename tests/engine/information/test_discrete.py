"""Tables are taken apart as their closed forms say."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.information import decompose

sys.path.append(str(Path(__file__).parent))
from gates import TABLES, TRUTHS

PARTS = ("redundancy", "unique1", "unique2", "synergy", "conditional_information")


@pytest.mark.parametrize("gate", TABLES)
def test_a_gate_is_taken_apart_as_its_closed_form_says(gate):
    found = decompose(TABLES[gate], unit="bits")
    for name, truth in zip(PARTS, TRUTHS[gate], strict=True):
        assert getattr(found, name) == pytest.approx(truth, abs=1e-4), name


def test_synergy_and_what_a_sum_misses_are_different_things():
    """Independent noisy copies: synergy, and adding is right. Y = a ⊕ b from (a, b) and b: no synergy, and adding loses a bit."""
    copies, keyed = (
        decompose(TABLES[n], "bits") for n in ("independent copies, 10 % flip", "X1 = (a, b), X2 = b, Y = a ⊕ b")
    )
    assert copies.synergy > 0.2 > 1e-6 > copies.conditional_information
    assert keyed.synergy < 1e-6 < 0.99 < keyed.conditional_information


def test_a_noisy_and_is_right_where_a_published_tool_is_wrong():
    """dit 2.3's PID_BROJA says R = .0759, at a law q that is not the least: U must vanish by exchange of X1 and X2."""
    found = decompose(TABLES["AND, 10 % flip"], "bits")
    assert found.redundancy == pytest.approx(0.1468, abs=1e-4)
    assert found.redundancy == pytest.approx(found.information1, abs=1e-5)


def test_the_parts_add_up_and_units_are_consistent():
    p = np.random.default_rng(1).dirichlet(np.full(24, 0.5)).reshape(3, 4, 2)
    found, bits = decompose(p), decompose(torch.from_numpy(p), unit="bits")
    p1, p2, py = p.sum(1), p.sum(0), p.sum((0, 1))
    told = (p * np.log(p / (p.sum(2)[:, :, None] * py))).sum()
    assert found.redundancy + found.unique1 + found.unique2 + found.synergy == pytest.approx(told, abs=1e-9)
    assert found.redundancy + found.unique1 == pytest.approx(
        (p1 * np.log(p1 / np.outer(p1.sum(1), py))).sum(), abs=1e-9
    )
    assert found.redundancy + found.unique2 == pytest.approx(
        (p2 * np.log(p2 / np.outer(p2.sum(1), py))).sum(), abs=1e-9
    )
    lost = (p * np.log(p * py / (p1[:, None, :] * p2[None, :, :]))).sum()
    assert found.conditional_information == pytest.approx(lost, abs=1e-9)
    assert bits.synergy == pytest.approx(found.synergy / np.log(2.0), abs=1e-9)
    assert bits.to("nats").redundancy == pytest.approx(found.redundancy, abs=1e-9)


def test_exchanging_the_parts_exchanges_what_is_unique():
    p = np.random.default_rng(2).dirichlet(np.full(18, 0.5)).reshape(3, 2, 3)
    one, other = decompose(p), decompose(p.transpose(1, 0, 2))
    assert one.unique1 == pytest.approx(other.unique2, abs=1e-6)
    assert one.redundancy == pytest.approx(other.redundancy, abs=1e-6)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (np.ones((2, 2)) / 4, r"shape \(n1, n2, n_y\), got shape \(2, 2\)"),
        (np.ones((2, 2, 2)), "must sum to 1, got 8; divide it by its sum"),
        (np.where(np.arange(8).reshape(2, 2, 2) == 5, -0.125, 0.125), r"got -0.125 at \(1, 0, 1\)"),
        ("abc", r"a table is p\(x1, x2, y\), real numbers of shape .*, got a str: 'abc'; give an array"),
        (None, "got a NoneType: None"),
        ({"p": 1.0}, "real numbers of shape .*, got a dict"),
        ([[0.5, [0.5]]], "got a list that is no array; give every row as many entries"),
        (torch.full((1, 1, 1), 1j), "real numbers of shape .*, got a Tensor"),
        (np.full((2, 2, 2), np.nan), r"got nan at \(0, 0, 0\)"),
        (
            np.random.default_rng(0).dirichlet(np.ones(27_000)).reshape(30, 30, 30),
            "at most 20000 possible cells, got 27000",
        ),
    ],
)
def test_what_is_no_table_is_refused(table, said):
    with pytest.raises(ValueError, match=said):
        decompose(table)


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="one of nats, bits, got 'dits'"):
        decompose(TABLES["AND"], unit="dits")
