"""A frozen summary is called once for each row, and never changed."""

import math

import pytest
import torch
from torch import nn

from engine.learning import fit
from modalities import NeuralEnsemble

QUICK = {"simulations": 1200, "epochs": 3, "progress": False}


class Backbone(nn.Module):
    """Two features of x, by layers that would change if they were trained or even run in training mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))
        self.rows, self.calls = 0, 0

    def forward(self, x):
        self.rows += len(x)
        self.calls += 1
        return self.layers(x)


@pytest.fixture
def frozen(straight):
    def build(**options):
        torch.manual_seed(3)
        backbone = Backbone()
        with torch.no_grad():
            backbone(torch.randn(100, 3))  # statistics of its own
        modality = straight(summary=backbone.requires_grad_(False), **options)
        backbone.rows = backbone.calls = 0
        return modality

    return build


@pytest.mark.parametrize("kept", ["memory", "folder", "blocks"])
def test_it_is_called_once_for_each_row_and_its_bits_stay(frozen, simulate, prior, weights, tmp_path, kept):
    modality = frozen()
    before = weights(modality.summary)
    options = {} if kept == "memory" else {"folder": tmp_path / "run", "memory": 1 if kept == "blocks" else 2**30}
    training = fit(modality, prior=prior, simulate=simulate, **QUICK, **options)
    assert training.epochs == 3
    assert modality.summary.rows == 1200
    after = weights(modality.summary)
    assert all(torch.equal(value, after[name].to(value.dtype)) for name, value in before.items())
    assert not any(w.requires_grad for w in modality.summary.parameters())
    assert modality.dtype == torch.float64
    again = frozen()
    if kept != "memory":
        assert fit(again, prior=prior, simulate=simulate, **QUICK, **options) == training
        assert again.summary.calls == 0
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in modality.state_dict().items())


def test_its_features_are_those_of_evaluation_and_are_standardised(frozen, pairs):
    theta, x = pairs
    modality = frozen()
    fit(modality, pairs=(theta, x), epochs=2)
    with torch.no_grad():
        features = modality.summarise(x)
    assert features.mean(0).abs().max() < 0.1
    assert (features.std(0) - 1.0).abs().max() < 0.1


def test_features_that_are_not_finite_are_left_out_and_counted(frozen, pairs, straight):
    class Failing(Backbone):
        def forward(self, x):
            return torch.where(x[:, :1] > 1.0, math.nan, super().forward(x))

    failing = Failing()
    modality = straight(summary=failing.requires_grad_(False))
    training = fit(modality, pairs=pairs, epochs=2)
    assert training.excluded == int((pairs[1][:, 0].float() > 1.0).sum()) > 0


def test_a_constant_feature_is_reported_and_constant_features_are_refused(straight, pairs):
    class Deaf(nn.Module):
        def __init__(self, live):
            super().__init__()
            self.register_buffer("live", torch.tensor(live))

        def forward(self, x):
            return x[:, :2] * self.live + 1.0

    training = fit(straight(summary=Deaf([1.0, 0.0])), pairs=pairs, epochs=2)
    assert training.constant_features == (1,)
    with pytest.raises(ValueError, match=r"frozen summary.*always 1"):
        fit(straight(summary=Deaf([0.0, 0.0])), pairs=pairs, epochs=2)


def test_sets_of_observations_have_a_row_of_features_each(frozen, simulate, prior):
    modality = frozen()
    fit(modality, prior=prior, simulate=lambda t, g: simulate(t[:, None].expand(-1, 4, -1), g), **QUICK)
    assert modality.summary.rows == 4800


def test_frozen_summaries_inside_an_ensemble_are_left_alone_too(frozen, pairs, weights):
    members = [frozen(), frozen()]
    ensemble = NeuralEnsemble(members)
    before = [weights(m.summary) for m in members]
    fit(ensemble, pairs=pairs, epochs=2)
    for member, given in zip(members, before, strict=True):
        assert member.summary.rows == 600
        assert all(torch.equal(t.double(), member.summary.state_dict()[name].double()) for name, t in given.items())
    assert not torch.equal(members[0].mean.weight, members[1].mean.weight)


def test_a_summary_that_is_trained_is_called_in_every_epoch_and_standardised_once(straight, simulate, prior):
    backbone = Backbone()
    backbone.layers = nn.Sequential(nn.Linear(3, 2))
    modality = straight(summary=backbone)
    standardised = []
    original = modality.standardise
    object.__setattr__(modality, "standardise", lambda *a: (standardised.append(len(a[0])), original(*a)))
    modality.summary.rows = 0
    first = modality.summary.layers[0].weight.detach().clone()
    fit(modality, prior=prior, simulate=simulate, **QUICK)
    assert standardised == [1080]
    assert modality.summary.rows > 3 * 1200
    assert not torch.equal(modality.summary.layers[0].weight.detach().float(), first)
