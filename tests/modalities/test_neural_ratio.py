"""The three losses against their definitions, and the learned ratio against a known one."""

import math

import pytest
import torch
from torch.distributions import Normal
from torch.nn.functional import cross_entropy, logsigmoid

from engine.errors import ModalityError
from modalities import NeuralRatio

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("loss", ["contrastive", "binary", "balanced"])
def test_it_learns_the_ratio_of_likelihood_and_evidence(train, loss):
    """θ ~ N(0, 1), x = θ + 0.7 ε: log r = log N(x; θ, 0.7²) − log N(x; 0, 1 + 0.7²)."""
    theta = torch.randn(10_000, 1)
    x = theta[:, 0] + 0.7 * torch.randn(10_000)
    ratio = train(NeuralRatio(("t",), (), hidden=(32, 32), loss=loss, contrast=5), theta, x, epochs=20)

    def exact(x, t):
        return Normal(t, 0.7).log_prob(x) - Normal(0.0, math.sqrt(1.49)).log_prob(x)

    t = 3.0 * torch.rand(2000) - 1.5
    new = t + 0.7 * torch.randn(2000)
    error = ratio(new, t[:, None]) - exact(new, t)
    assert float(error.square().mean().sqrt()) < (0.3 if loss == "balanced" else 0.15)
    assert not ratio.normalised


def test_the_contrastive_loss_is_nre_c_with_the_class_none():
    ratio = NeuralRatio(("t",), (2,), hidden=(8,), contrast=3).double()
    x, theta = torch.randn(6, 2).double(), torch.randn(6, 1).double()
    found = ratio.loss_of(x, theta, torch.Generator().manual_seed(5))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(5))
    expected = torch.zeros(6, dtype=torch.float64)
    for place, row in enumerate(order.tolist()):
        others = [int(order[place - j]) for j in (1, 2, 3)]
        assert row not in others
        h = ratio.evidence_of(x[row].expand(4, 2), theta[[row, *others]])
        with_own = torch.cat([h[:3], h.new_tensor([math.log(3.0)])])
        without = torch.cat([h[1:], h.new_tensor([math.log(3.0)])])
        expected[row] = 0.5 * cross_entropy(with_own, torch.tensor(0)) + 0.5 * cross_entropy(without, torch.tensor(3))
    torch.testing.assert_close(found, expected)


def test_the_binary_and_the_balanced_loss_are_those_of_the_papers():
    ratio = NeuralRatio(("t",), (2,), hidden=(8,), loss="binary").double()
    x, theta = torch.randn(6, 2).double(), torch.randn(6, 1).double()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(5))
    other = torch.empty(6, dtype=torch.long)
    other[order] = order.roll(1)
    own, indep = ratio.evidence_of(x, theta), ratio.evidence_of(x, theta[other])
    expected = -0.5 * logsigmoid(own) - 0.5 * logsigmoid(-indep)
    torch.testing.assert_close(ratio.loss_of(x, theta, torch.Generator().manual_seed(5)), expected)
    balanced = NeuralRatio(("t",), (2,), hidden=(8,), loss="balanced", balance=7.0).double()
    balanced.load_state_dict(ratio.state_dict())
    expected = expected + 7.0 * (own.sigmoid().mean() + indep.sigmoid().mean() - 1.0) ** 2
    torch.testing.assert_close(balanced.loss_of(x, theta, torch.Generator().manual_seed(5)), expected)


def test_the_contrast_comes_from_the_given_generator_alone():
    ratio = NeuralRatio(("t",), (2,), hidden=(8,), contrast=4)
    x, theta = torch.randn(20, 2), torch.randn(20, 1)
    before = torch.random.get_rng_state()
    one, again, other = (ratio.loss(x, theta, torch.Generator().manual_seed(s)).item() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one == again
    assert one != other


def test_few_pairs_are_contrasted_with_what_there_is():
    ratio = NeuralRatio(("t",), (2,), hidden=(8,), contrast=10)
    assert ratio.loss(torch.randn(1, 2), torch.randn(1, 1)).item() == 0.0
    assert torch.isfinite(ratio.loss(torch.randn(2, 2), torch.randn(2, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mse"}, "loss must be one of contrastive, balanced, binary, got 'mse'"),
        ({"contrast": 0}, "contrast must be a whole number >= 1, got 0"),
        ({"balance": -1.0}, "balance must be >= 0, got -1"),
        ({"hidden": ()}, r"hidden must have at least one layer, got \(\)"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ModalityError, match=message):
        NeuralRatio(("t",), (2,), **options)
