"""Combinations of a score with log-ratios over the prior, against closed forms."""

import math

import pytest
import torch
from torch.distributions import Uniform

from engine import Modality, Parameter, ParameterSpace, Registry, Status
from engine.refinement.combination import Combination, best_weights
from engine.refinement.law import SimulatedLaws

BOX = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0))])


class Half(Modality):
    """−½ (x₁ − a)² − ½ (x₂ − a²)² of x ~ N((a, a), 1): at a = 0 the score is x₁ alone, half of the information 2."""

    learned = True

    def __init__(self, parameter_names=("a",)):
        super().__init__(parameter_names, event_shape=(2,))

    def log_evidence(self, x, theta):
        a = theta[..., 0]
        return -0.5 * (x[..., 0] - a).square() - 0.5 * (x[..., 1] - a.square()).square()


def both(theta, generator=None):
    noise = torch.randn(*theta.shape[:-1], 2, generator=generator, dtype=torch.float64)
    return theta.double() + noise


def test_what_the_scalar_knows_beside_its_score_is_used(tmp_path):
    """The variance of θ̂ is 1/(2 N), as of the true likelihood; that of the score alone would be 1/N."""
    B, N, n = 200, 100, 20_000
    made = Registry.create(tmp_path / "r", list(BOX))
    made.append("h", Half())
    x = both(torch.zeros(B, N, 1), torch.Generator().manual_seed(1))
    fits = made.estimate_many({"h": x}, refine={"h": both}, simulations=n, seed=1)
    assert set(fits.status) == {Status.CONVERGED}
    variance = 1.0 / (2 * N)
    # data sets share simulations, of which at least half count at θ̂
    assert abs(float(fits.theta.square().mean()) / variance - 1.0) < 4.0 * math.sqrt(2 / B) + 4.0 * math.sqrt(2 * N / n)
    claimed = fits.covariance[:, 0, 0] / variance - 1.0
    assert abs(float(claimed.mean())) < 0.06
    assert claimed.abs().max() < 0.15 + 0.1  # beside 0 the score knows more, and is left alone where it has 87 %
    efficient = x.mean((1, 2))
    assert (fits.theta[:, 0] - efficient).abs().max() < 5.0 * math.sqrt(variance * 2 * N / n) + 0.3 * math.sqrt(
        variance
    )


class Flat(Modality):
    """−½ (x₁ − a)² − ½ (x₂ − g(a))² of x ~ N((a, sin 14a), 1), with g flat at 0 alone: the score there has 1/197 of the information."""

    learned = True

    def __init__(self):
        super().__init__(("a",), event_shape=(2,))

    def log_evidence(self, x, theta):
        a = theta[..., 0]
        g = torch.sin(14.0 * a) - 14.0 * a * torch.exp(-((30.0 * a).square()))
        return -0.5 * (x[..., 0] - a).square() - 0.5 * (x[..., 1] - g).square()


def waves(theta, generator=None):
    theta = theta.double()
    return torch.cat([theta, torch.sin(14.0 * theta)], -1) + both(torch.zeros_like(theta), generator)


@pytest.mark.parametrize("width", [0.01, 0.08])
def test_the_best_combination_does_not_depend_on_how_far_simulations_are_spread(width):
    """A straight line through a wave is too shallow: slopes are told by pairs that are near each other."""
    laws = SimulatedLaws("f", Flat(), waves, BOX)
    at = torch.zeros(1, 1).double()
    (law,) = laws.laws(at, torch.full((1, 1, 1), width**2).double(), 20_000, (1,))
    assert law.weights is not None
    rows, h = torch.zeros(20_000, 1).double(), 1e-4
    ends = [waves(rows + e, torch.Generator().manual_seed(5)) for e in (h, 0.0, -h)]
    up, still, down = (laws.combination.measured(x, rows, law.weights)[:, 0] for x in ends)
    information = float((up - down).mean() / (2.0 * h)) ** 2 / float(still.var())
    assert information == pytest.approx(1.0 + 14.0**2, rel=0.1)


def test_the_weights_are_those_of_the_best_linear_combination():
    generator = torch.Generator().manual_seed(2)
    root = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.1, -0.5, 2.0]]).double()
    A, K = torch.tensor([[0.3], [1.0], [-0.5]]).double(), root @ root.mT
    still = torch.randn(40_000, 3, generator=generator, dtype=torch.float64) @ root.mT
    step = 0.1 * torch.randn(2000, 1, generator=generator, dtype=torch.float64)
    weights = best_weights(still, step @ A.mT, step)
    assert weights is not None
    expected = torch.linalg.solve(K, A)
    assert (weights / weights[1] - expected / expected[1]).abs().max() < 5.0 * 3.0 / math.sqrt(40_000)
    information = (weights.mT @ A).square() / (weights.mT @ K @ weights)
    assert float(information) == pytest.approx(float(A.mT @ expected), rel=1e-3)


@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["common numbers", "own numbers"])
def test_features_that_know_nothing_more_are_left_out(noise, P):
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        still = torch.randn(2000, 16 + P, generator=generator, dtype=torch.float64)
        step = 0.5 * torch.randn(1000, P, generator=generator, dtype=torch.float64)
        moved = noise * math.sqrt(2) * torch.randn(1000, 16 + P, generator=generator, dtype=torch.float64)
        moved[:, :P] += step
        assert best_weights(still, moved, step) is None


def test_a_few_points_are_chosen_that_tell_most():
    """Features 2 and 5 hold all that the score lacks; the others are copies with noise, or noise."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    z[:, 3] = z[:, 2] + z[:, 3]
    step = 0.1 * torch.randn(2000, 1, generator=generator, dtype=torch.float64)
    slope = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 2.0, 0.0, 0.0]]).double()
    weights = best_weights(z, step * slope, step)
    assert weights is not None
    assert set(weights[:, 0].nonzero()[:, 0].tolist()) == {0, 2, 5}
    assert (weights[[0, 2, 5], 0] - torch.tensor([1.0, 1.0, 2.0])).abs().max() < 5.0 * 3.0 / math.sqrt(4000)


def test_ratios_are_cut_in_the_tails():
    class Cut(Half):
        def log_evidence(self, x, theta):
            s = super().log_evidence(x, theta)
            return torch.where((x[..., 0] > 50.0) & (theta[..., 0] > 0.0), -torch.inf, s)

    found = Combination(Cut(), BOX)
    x = torch.tensor([[0.2, 0.1], [40.0, 0.0], [60.0, 0.0]]).double()
    at = torch.tensor([[-0.5]]).double().expand(3, 1)
    features = found.features(x, at)
    s = Half()(x[:1, None], found.points) - Half()(x[:1], at[:1])
    assert torch.allclose(features[0, 1:], s[0], atol=1e-12)
    assert float(features[0, 0]) == pytest.approx(0.7 - (0.1 - 0.25))  # the score: x₁ − a + 2 a (x₂ − a²)
    assert float(features[1].max()) == 50.0  # nearer to 40
    assert bool((features[2, 1:][found.points[:, 0] > 0.0] == -50.0).all())
    some = found.features(x, at, torch.tensor([1, 3]))
    assert torch.equal(some[:, [2, 4]], features[:, [2, 4]])
    assert int((some[:, 1:] != 0).any(0).sum()) == 2
    overall = found.overall(x)
    assert overall.amax(-1).tolist() == [0.0, 0.0, 0.0]
    assert float(overall.min()) == -50.0
    assert torch.equal(found.points, Combination(Half(), BOX).points)
    assert bool(((found.points > -1.0) & (found.points < 1.0)).all())
    assert float(found.points.mean()) == pytest.approx(0.0, abs=0.05)  # spread evenly
