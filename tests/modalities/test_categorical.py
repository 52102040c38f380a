import math

import numpy as np
import pytest
import torch

from engine.errors import ModalityError
from modalities import Categorical

F64 = torch.float64
TABLE = [[0.9, 0.1, 0.0], [0.25, 0.5, 0.25]]


def quadratic(theta):
    return torch.cat([theta, theta.square(), torch.zeros_like(theta)], -1)


def test_a_table_scores_each_hypothesis_by_its_row():
    table = Categorical(parameter_names=("h",), probabilities=TABLE)
    grid = table(torch.arange(3)[None], torch.tensor([[0.0], [1.0]], dtype=F64)[:, None])
    np.testing.assert_allclose(grid.exp().numpy(), TABLE, rtol=1e-12)
    assert grid[0, 2].item() == -math.inf


def test_what_is_no_row_of_the_table_is_impossible_with_a_score_of_zero():
    table = Categorical(parameter_names=("h",), probabilities=TABLE)
    theta = torch.tensor([[-1.0], [0.0], [0.5], [1.0], [2.0]], dtype=F64, requires_grad=True)
    value = table(torch.tensor(0.0), theta)
    assert value.isfinite().tolist() == [False, True, False, True, False]
    (score,) = torch.autograd.grad(value.sum(), theta)
    assert score.abs().sum() == 0
    assert table.expected_information(theta.detach()).shape == (5, 1, 1)
    assert table.expected_information(theta.detach()).abs().sum() == 0


def test_logits_are_normalised_over_the_categories():
    categorical = Categorical(quadratic, parameter_names=("a",), categories=3)
    logits = np.array([0.7, 0.49, 0.0])
    expected = logits - np.log(np.exp(logits).sum())
    ours = categorical(torch.arange(3), torch.tensor([0.7], dtype=F64))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_the_information_is_the_variance_of_the_slope_over_the_categories():
    categorical = Categorical(quadratic, parameter_names=("a",), categories=3)
    logits, slope = np.array([0.7, 0.49, 0.0]), np.array([1.0, 1.4, 0.0])
    p = np.exp(logits) / np.exp(logits).sum()
    expected = (p * slope**2).sum() - (p * slope).sum() ** 2
    ours = categorical.expected_information(torch.tensor([[0.7]], dtype=F64)).item()
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_an_index_that_is_no_category_is_outside_the_support_and_impossible():
    for categorical, theta in (
        (Categorical(parameter_names=("h",), probabilities=TABLE), torch.zeros(1)),
        (Categorical(quadratic, parameter_names=("a",), categories=3), torch.zeros(1)),
    ):
        x = torch.tensor([-1.0, 0.0, 1.5, 2.0, 3.0])
        assert categorical.support.check(x).tolist() == [False, True, False, True, False]
        assert (categorical(x, theta) == -math.inf)[[0, 2, 4]].all()
        assert categorical.support_rule == "a category must be a whole number from 0 to 2"


def test_simulated_categories_have_the_frequencies_of_their_row():
    table = Categorical(parameter_names=("h",), probabilities=TABLE)
    x = table.simulate(
        torch.tensor([0.0, 1.0])[:, None].repeat_interleave(100_000, 0), torch.Generator().manual_seed(0)
    )
    found = np.stack([np.bincount(row.long(), minlength=3) / 100_000 for row in x.reshape(2, -1)])
    np.testing.assert_allclose(found, TABLE, atol=5 * 0.5 / math.sqrt(100_000))
    assert found[0, 2] == 0.0
    with pytest.raises(ModalityError, match="h must be a whole number from 0 to 1, got 2 at index 1; name a row"):
        table.simulate(torch.tensor([[0.0], [2.0]]), torch.Generator())


def test_rows_that_add_up_to_one_but_for_rounding_are_normalised():
    table = Categorical(parameter_names=("h",), probabilities=[[1 / 3, 0.3333333, 0.3333333]])
    assert table(torch.arange(3), torch.zeros(1)).exp().sum().item() == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one of logits and probabilities must be given, got neither"),
        (
            {"logits": quadratic, "probabilities": TABLE},
            "exactly one of logits and probabilities must be given, got both",
        ),
        (
            {"probabilities": TABLE, "parameter_names": ("a", "b")},
            "must hold one discrete parameter with probabilities",
        ),
        ({"probabilities": [0.5, 0.5]}, r"probabilities must have shape \(n, n\), got \(2,\); one row per hypothesis"),
        ({"probabilities": [[1.5, -0.5]]}, r"probabilities must be >= 0, got -0.5 at index \(0, 1\)"),
        ({"probabilities": [[0.5, 0.5], [0.5, 0.4]]}, "sum of probabilities must be 1 within 1e-6, got 0.9 at index 1"),
        ({"probabilities": TABLE, "categories": 4}, "categories must be the 3 columns of the table, got 4"),
        ({"probabilities": TABLE, "inputs": {"t": 1.0}}, "need a function to go to, got a table"),
        ({"logits": quadratic}, "categories must be a whole number >= 1 with logits, got None"),
        ({"logits": "package:f", "categories": 3}, "logits must be a function of θ, got the text 'package:f'; pass"),
    ],
)
def test_an_argument_that_breaks_a_rule_is_named_with_the_value_seen(kwargs, message):
    with pytest.raises(ModalityError, match=message):
        Categorical(**{"parameter_names": ("h",), **kwargs})


def test_logits_of_another_length_are_named():
    categorical = Categorical(quadratic, parameter_names=("a",), categories=2)
    with pytest.raises(ModalityError, match=r"logits must return shape \(\*batch, 2\), .* got \(4, 3\)"):
        categorical(torch.tensor(0), torch.zeros(4, 1))
