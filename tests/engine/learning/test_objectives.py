"""Objectives are data: graphs and weights give the loss."""

import pytest
import torch

from engine.learning import TrainingError
from engine.learning.objectives import METHODS, Objective

PUBLISHED = {  # Abdelaleem, Nemenman, Martini (2025), the table of methods
    "beta-vae": "I(Z; X) − β [I(X; Z)]",
    "dvib": "I(Z; X) − β [I(Y; Z)]",
    "beta-dvcca": "I(Z; X) − β [I(X; Z) + I(Y; Z)]",
    "joint-beta-dvcca": "I(Z; X, Y) − β [I(X; Z) + I(Y; Z)]",
    "beta-dvcca-private": "I(Z; X) + I(W_X; X) + I(W_Y; Y) − β [I(X; Z, W_X) + I(Y; Z, W_Y)]",
    "dvsib": "I(Z_X; X) + I(Z_Y; Y) − β [I(Z_Y; Z_X) + I(X; Z_X) + I(Y; Z_Y)]",
    "dvsib-private": (
        "I(Z_X; X) + I(Z_Y; Y) + I(W_X; X) + I(W_Y; Y) − β [I(Z_Y; Z_X) + I(X; Z_X, W_X) + I(Y; Z_Y, W_Y)]"
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_named_methods_are_the_published_ones(name):
    assert str(METHODS[name]) == f"{name}: {PUBLISHED[name]}"
    assert METHODS[name].data == (("X",) if name == "beta-vae" else ("X", "Y"))


def test_the_loss_is_what_is_kept_less_beta_times_what_is_told():
    mine = Objective(
        "three kinds", {"Z": ["A", "B"], "W": ["C"]}, {"A": ["Z"], "C": ["Z", "W"]}, {"W": 0.5}, {"A": 3.0}
    )
    kept = {"Z": torch.tensor(2.0, requires_grad=True), "W": torch.tensor(4.0, requires_grad=True)}
    told = {"A": torch.tensor(-1.0, requires_grad=True), "C": torch.tensor(0.5, requires_grad=True)}
    loss = mine.loss(kept, told, beta=2.0)
    assert loss.item() == 2.0 + 0.5 * 4.0 - 2.0 * (3.0 * -1.0 + 0.5)
    loss.backward()
    assert [t.grad.item() for t in (*kept.values(), *told.values())] == [1.0, 0.5, -6.0, -2.0]
    assert mine.data == ("A", "B", "C")


@pytest.mark.parametrize(
    ("encoder", "decoder", "options", "said"),
    [
        ({}, {"X": ["Z"]}, {}, "at least one node"),
        ({"Z": ["X"]}, {}, {}, "at least one node"),
        ({"Z": "X"}, {"X": ["Z"]}, {}, "list of different parents for 'Z', got 'X'"),
        ({"Z": ["X", "X"]}, {"X": ["Z"]}, {}, "different parents"),
        ({"Z": ["X"], "V": ["Z"]}, {"X": ["Z"]}, {}, "'V' made of 'Z', which is a latent itself"),
        ({"Z": ["X"]}, {"X": ["V"]}, {}, "tell 'X' from other latents of its encoder, Z, got 'V'"),
        ({"Z": ["X"]}, {"Z": ["Z"]}, {}, "tell 'Z' from other latents"),
        ({"Z": ["X"]}, {"X": ["Z"]}, {"decoder_weights": {"Y": 1.0}}, "nodes of its decoder graph, X, got 'Y'"),
        ({"Z": ["X"]}, {"X": ["Z"]}, {"encoder_weights": {"Z": -1.0}}, "numbers >= 0, got -1.0 for 'Z'"),
    ],
)
def test_graphs_that_do_not_fit_are_refused(encoder, decoder, options, said):
    with pytest.raises(TrainingError, match=said):
        Objective("mine", encoder, decoder, **options)


def test_bounds_of_other_nodes_are_refused():
    with pytest.raises(TrainingError, match="decoder's Y, got X"):
        METHODS["dvib"].loss({"Z": torch.tensor(1.0)}, {"X": torch.tensor(1.0)}, beta=1.0)
