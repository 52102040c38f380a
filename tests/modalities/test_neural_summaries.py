"""Summaries: symmetries, closed forms, and what a plugin's folder keeps of them."""

import copy

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from engine.errors import ModalityError
from engine.plugin import read_plugin, write_plugin
from modalities import NeuralRatio
from modalities.summaries import MLP, Bottleneck, DeepSets, ImageSummary, SeriesSummary

pytestmark = pytest.mark.usefixtures("seeded")


def test_a_set_has_no_order_and_what_fills_it_up_does_not_matter():
    sets = DeepSets(2, 4, hidden=(16,), pooled=8, mask=True).double()
    x = torch.randn(3, 6, 3).double()
    x[..., 2] = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    found = sets(x)
    torch.testing.assert_close(sets(x[:, torch.randperm(6)]), found)
    other = x.clone()
    other[:, [2, 4], :2] = 99.0
    assert torch.equal(sets(other), found)
    torch.testing.assert_close(sets(x[:, [0, 1, 3, 5]]), found)
    assert bool(torch.isfinite(sets(torch.zeros(2, 3, 3).double())).all())  # a set of nothing


def test_how_many_elements_there_are_is_a_feature():
    sets = DeepSets(1, 2, hidden=(16,))
    assert not torch.allclose(sets(torch.ones(1, 3, 1)), sets(torch.ones(1, 30, 1)))
    assert torch.equal(sets(torch.ones(1, 3)), sets(torch.ones(1, 3, 1)))


@pytest.mark.parametrize(
    ("summary", "shape"),
    [
        (MLP(6, 5), (6,)),
        (MLP(6, 5), (2, 3)),
        (DeepSets(3, 5), (7, 3)),
        (ImageSummary(1, 5, width=4), (20, 20)),
        (ImageSummary(3, 5, width=4, depth=2, grid=2), (3, 12, 15)),
        (SeriesSummary(1, 5, width=4), (60,)),
        (SeriesSummary(2, 5, width=4, kernel=3), (2, 41)),
        (Bottleneck(MLP(4, 10), 5), (4,)),
    ],
)
def test_each_maps_rows_by_themselves_is_smooth_and_is_kept_in_a_folder(summary, shape, tmp_path):
    x = torch.randn(4, *shape)
    summary.eval()
    together = summary(x)
    assert together.shape == (4, 5)
    torch.testing.assert_close(together, torch.cat([summary(row[None]) for row in x]), rtol=1e-4, atol=1e-5)
    ratio = NeuralRatio(("t",), shape, summary=summary, hidden=(8,))
    assert ratio.features == 5
    write_plugin(tmp_path / "p", ratio)
    again = read_plugin(tmp_path / "p")
    theta = torch.tensor([0.3])
    assert torch.equal(ratio.eval()(x, theta), again(x, theta))
    exact = copy.deepcopy(summary).double()
    leaf = x[:1].double().requires_grad_()
    (first,) = torch.autograd.grad(exact(leaf).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert bool((second != 0).any())


def test_the_penalty_is_the_divergence_from_a_standard_normal():
    bottleneck = Bottleneck(MLP(3, 4, hidden=(8,)), 2, beta=0.3).train()
    x = torch.randn(50, 3)
    bottleneck(x)
    mean, log_variance = bottleneck.encoder(x).chunk(2, -1)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(-1).mean()
    torch.testing.assert_close(bottleneck.penalty(), 0.3 * expected)


def test_the_noise_follows_torch_s_seed_and_is_absent_in_evaluation():
    bottleneck = Bottleneck(MLP(3, 4, hidden=(8,)), 2)
    x = torch.randn(2000, 3)

    def draw(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return bottleneck.train()(x).detach()

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    mean = bottleneck.eval()(x).detach()
    assert torch.equal(mean, bottleneck(x).detach())
    sd = (0.5 * bottleneck.encoder(x).chunk(2, -1)[1]).exp().detach()
    z = (draw(3) - mean) / sd
    assert z.mean().item() == pytest.approx(0.0, abs=0.05)
    assert z.std().item() == pytest.approx(1.0, abs=0.05)


def test_a_penalty_without_a_call_in_training_is_an_error_and_a_copy_can_be_made_after_one():
    bottleneck = Bottleneck(MLP(3, 4, hidden=(8,)), 2)
    with pytest.raises(ModalityError, match="penalty\\(\\) belongs to a call in training"):
        bottleneck.penalty()
    bottleneck.train()(torch.randn(5, 3))
    copy.deepcopy(bottleneck).eval()


def test_a_loss_in_training_has_the_penalty_and_one_in_evaluation_has_not():
    ratio = NeuralRatio(("t",), (3,), summary=Bottleneck(MLP(3, 4, hidden=(8,)), 2, beta=1e6), hidden=(8,))
    x, theta = torch.randn(20, 3), torch.randn(20, 1)
    assert ratio.train().loss(x, theta, torch.Generator().manual_seed(0)).item() > 100.0
    assert ratio.eval().loss(x, theta, torch.Generator().manual_seed(0)).item() < 10.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(0, 2), "inputs must be a whole number >= 1, got 0"),
        (lambda: MLP(3, 2)(torch.zeros(2, 4)), "x must have 3 entries each, got shape .2, 4."),
        (lambda: DeepSets(2, 2)(torch.zeros(2, 4, 3)), r"x must have shape \(n, N, 2\) for sets"),
        (lambda: ImageSummary(3, 2)(torch.zeros(2, 1, 9, 9)), r"x must have shape \(n, 3, H, W\)"),
        (lambda: SeriesSummary(2, 2)(torch.zeros(2, 9)), r"x must have shape \(n, 2, T\)"),
        (lambda: SeriesSummary(2, 2, kernel=4), "kernel must be odd"),
        (lambda: Bottleneck(MLP(3, 3), 2)(torch.zeros(2, 3)), r"encoder must return shape \(n, 4\)"),
        (lambda: Bottleneck(torch.sin, 2), "encoder must be an nn.Module, got builtin_function_or_method"),
        (lambda: Bottleneck(MLP(3, 4), 2, beta=-1.0), "beta must be a number >= 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ModalityError, match=message):
        build()
