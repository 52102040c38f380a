"""The mean of several learned scalars: values, losses, initial weights, and what it passes on."""

import pytest
import torch
from torch.distributions import Normal, Uniform

from engine.errors import ModalityError
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from modalities import MixtureDensity, NeuralEnsemble, NeuralLikelihood, NeuralPosterior, NeuralRatio
from modalities.summaries import MLP, Bottleneck

pytestmark = pytest.mark.usefixtures("seeded")
X, THETA = 3.0 + 2.0 * torch.randn(40, 3), torch.rand(40, 2)


def ratios(number=3, **options):
    return [NeuralRatio(("a", "b"), (3,), hidden=(8,), **options) for _ in range(number)]


@pytest.mark.parametrize("summary", [False, True])
def test_its_scalar_and_its_loss_are_the_means_of_the_members(summary):
    members = [NeuralRatio(("a", "b"), (3,), hidden=(8,), summary=MLP(3, 2) if summary else None) for _ in range(3)]
    ensemble = NeuralEnsemble(members)
    raw = ensemble.raw_features(X)
    assert raw.shape == (40, 6 if summary else 3)
    ensemble.standardise(raw, THETA)
    each = torch.stack([m(X, THETA) for m in members])
    torch.testing.assert_close(ensemble(X, THETA), each.mean(0))
    torch.testing.assert_close(ensemble.evidence_of(raw, THETA) + ensemble.constant(), each.mean(0))
    assert float((each[0] - each[1]).detach().abs().max()) > 1e-3  # initial weights of their own
    generator = torch.Generator().manual_seed(0)
    losses = torch.stack([m.loss(X, THETA, generator) for m in members])
    torch.testing.assert_close(ensemble.loss(X, THETA, torch.Generator().manual_seed(0)), losses.mean())
    kept = ensemble.loss(None, THETA, torch.Generator().manual_seed(0), features=raw)
    torch.testing.assert_close(kept, losses.mean())


def test_penalties_of_its_members_count():
    members = [NeuralRatio(("a",), (3,), hidden=(8,), summary=Bottleneck(MLP(3, 4), 2, beta=b)) for b in (0.0, 100.0)]
    ensemble = NeuralEnsemble(members).train()
    loss = ensemble.loss(X, THETA[:, :1], torch.Generator().manual_seed(0))
    penalties = [m.summary.penalty().item() for m in members]
    assert penalties[0] == 0.0
    assert penalties[1] > 1.0
    assert loss.item() > 0.5 * penalties[1]


def test_a_mean_of_densities_is_not_called_normalised():
    members = [MixtureDensity(("a",), (2,), hidden=(8,)) for _ in range(2)]
    assert members[0].normalised
    assert not NeuralEnsemble(members).normalised


def test_the_training_prior_reaches_posteriors():
    members = [NeuralPosterior(("a", "b"), (3,), hidden=(8,)) for _ in range(2)]
    ensemble = NeuralEnsemble(members)
    ensemble.training_prior = ParameterSpace([Parameter("a", Uniform(0.0, 1.0)), Parameter("b", Normal(0.0, 1.0))])
    ensemble.standardise(ensemble.raw_features(X), THETA)
    assert bool(torch.isfinite(ensemble(X, THETA)).all())


def test_it_takes_the_support_of_its_members():
    ensemble = NeuralEnsemble([NeuralLikelihood(("a",), (2,), discrete={1: 3}, hidden=(8,)) for _ in range(2)])
    assert ensemble.support.check(torch.tensor([0.5, 3.0])).tolist() == [True, False]


def test_frozen_summaries_of_all_members_are_found():
    frozen = [NeuralRatio(("a",), (3,), hidden=(8,), summary=MLP(3, 2).requires_grad_(False)) for _ in range(2)]
    assert NeuralEnsemble(frozen).frozen_summary
    assert not NeuralEnsemble([frozen[0], NeuralRatio(("a",), (3,), hidden=(8,))]).frozen_summary


def test_four_members_have_a_mean_score_with_less_error_than_theirs(train):
    """x = θ + ε at θ ~ U(−2, 2): the mean over θ of the squared mean score, which is 0 for the true likelihood."""
    theta = 4.0 * torch.rand(2000, 1) - 2.0
    x = theta + torch.randn(2000, 1)
    ensemble = NeuralEnsemble([NeuralRatio(("t",), (1,), hidden=(32, 32)) for _ in range(4)])
    train(ensemble, theta, x, epochs=15, batch=200)
    at = torch.linspace(-1.5, 1.5, 13)[:, None, None].expand(13, 4000, 1)
    new = at + torch.randn(13, 4000, 1)

    def delta(modality):
        leaf = at.clone().requires_grad_()
        (score,) = torch.autograd.grad(modality(new, leaf).sum(), leaf)
        return score.mean((1, 2)).square().mean().item()

    assert delta(ensemble) < sum(map(delta, ensemble.members)) / 4.0


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "members must be several modalities, got none"),
        ([torch.nn.Linear(1, 1)], "members must be Learnable, got Linear as member 0"),
        ([*ratios(1), MixtureDensity(("a", "b"), (3,))], "of one class .* MixtureDensity of a, b, .* as member 1"),
        ([*ratios(1), NeuralRatio(("a", "c"), (3,))], "NeuralRatio of a, c, event_shape .3,. as member 1"),
        (ratios(1) * 2, "got one of them twice"),
    ],
)
def test_members_that_do_not_belong_together_are_refused(members, message):
    with pytest.raises(ModalityError, match=message):
        NeuralEnsemble(members)
