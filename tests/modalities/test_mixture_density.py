"""The conditional mixture of Gaussians against torch.distributions, quadrature and a known likelihood."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from engine.errors import ModalityError
from modalities import MixtureDensity
from modalities.summaries import MLP

pytestmark = pytest.mark.usefixtures("seeded")


def built(size=2, **options):
    mixture = MixtureDensity(("a", "b"), (size,), components=3, hidden=(16,), **options)
    mixture.standardise(3.0 + 2.0 * torch.randn(200, size), 5.0 * torch.rand(200, 2))
    return mixture


@pytest.mark.parametrize("diagonal", [False, True])
def test_it_integrates_to_one_over_x(diagonal):
    mixture = built(diagonal=diagonal)
    grid = torch.linspace(-40.0, 46.0, 1201)
    x = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    for theta in ([0.0, 5.0], [2.0, 1.0]):
        density = mixture(x, torch.tensor(theta)).double().exp()
        assert abs(torch.trapezoid(torch.trapezoid(density, grid), grid).item() - 1.0) < 1e-3
    assert mixture.normalised


def test_it_is_the_mixture_of_torch_distributions_that_its_head_describes():
    mixture = built(3).double()
    theta, x = 5.0 * torch.rand(7, 2).double(), 3.0 + 2.0 * torch.randn(7, 3).double()
    log_weights, means, log_scales, below = mixture.head(mixture.standard_theta(theta))
    factor = log_scales.exp().diag_embed() @ (torch.eye(3) + below)  # the whitening matrix, lower triangular
    covariance = torch.linalg.inv(factor.mT @ factor)
    law = MixtureSameFamily(Categorical(logits=log_weights), MultivariateNormal(means, covariance))
    expected = law.log_prob(mixture.standard_features(x)) - mixture.feature_scale.log().sum()
    torch.testing.assert_close(mixture(x, theta), expected)


def test_a_grid_of_theta_and_data_gives_what_rows_give():
    mixture = built()
    x, theta = torch.randn(5, 2), torch.rand(4, 2)
    rows = mixture.evidence_of(
        mixture.summarise(x.repeat(4, 1)), mixture.standard_theta(theta.repeat_interleave(5, 0))
    ).reshape(4, 5)
    torch.testing.assert_close(mixture(x, theta[:, None]), rows + mixture.constant())
    assert mixture(x[0], theta[0]).shape == ()


def test_it_learns_a_gaussian_likelihood_and_its_fisher_information(train):
    """x ~ N(θ, 0.5²) twice: s is the log density, and −E ∇²s = 2 / 0.25 = 8."""
    theta = 4.0 * torch.rand(8000, 1)
    x = theta + 0.5 * torch.randn(8000, 2)
    mixture = train(MixtureDensity(("t",), (2,), components=2, hidden=(32,)), theta, x)
    fresh = 0.3 + 3.4 * torch.rand(4000, 1)
    new = fresh + 0.5 * torch.randn(4000, 2)
    exact = Normal(fresh, 0.5).log_prob(new).sum(-1)
    assert abs((exact - mixture(new, fresh)).mean().item()) < 0.02  # the divergence, in nats
    at = fresh.clone().requires_grad_()
    (score,) = torch.autograd.grad(mixture(new, at).sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(score.sum(), at)
    assert -second.mean().item() == pytest.approx(8.0, rel=0.06)
    exact_score = ((new - fresh) / 0.25).sum(-1, keepdim=True)
    assert (score * exact_score).mean().item() == pytest.approx(8.0, rel=0.06)  # a flipped sign would give −8


def test_with_a_summary_it_is_no_density_of_x():
    assert not MixtureDensity(("t",), (4,), summary=MLP(4, 2)).normalised


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 0}, "components must be a whole number >= 1, got 0"),
        ({"hidden": 64}, "hidden must be the widths of the hidden layers, got 64"),
        ({"hidden": (64, 0)}, "hidden\\[1\\] must be a whole number >= 1, got 0"),
        ({"activation": "relu"}, "activation must be one of silu, tanh, .* got 'relu'; .* no second derivative"),
        ({"simulator": 3}, "simulator must be a function"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ModalityError, match=message):
        MixtureDensity(("t",), (2,), **options)
