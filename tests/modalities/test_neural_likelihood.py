"""Conditional densities: normalisation by quadrature and sums, smoothness, and what is learned of known laws."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributions import Binomial, NegativeBinomial, Normal, Poisson

import engine
from engine.errors import ModalityError, ObservationError
from engine.observations import Observations
from engine.plugin import read_plugin, write_plugin
from modalities import MixtureDensity, NeuralLikelihood
from modalities._discrete import binomial, negative_binomial
from modalities._flows import FLOWS
from modalities.summaries import MLP

pytestmark = pytest.mark.usefixtures("seeded")
THETA = torch.tensor([0.7, -1.2])
ROOT = Path(engine.__file__).parents[1]


def built(event, shift=3.0, **options):
    likelihood = NeuralLikelihood(("a", "b"), event, hidden=(16, 16), transforms=3, components=3, **options)
    x = shift + 2.0 * torch.randn(200, *event)
    for index, kind in likelihood.configuration.get("discrete", {}).items():
        flat = x.view(200, -1)
        flat[:, int(index)] = torch.randint(0, kind if isinstance(kind, int) else 9, (200,)).float()
    likelihood.standardise(likelihood.raw_features(x), torch.randn(200, 2))
    return likelihood


@pytest.mark.parametrize("flow", FLOWS)
def test_every_flow_integrates_to_one_over_one_and_two_numbers(flow):
    grid = torch.linspace(-37.0, 43.0, 1601)
    one = built((), flow=flow)(grid, THETA).double().exp()
    assert abs(torch.trapezoid(one, grid).item() - 1.0) < 2e-3
    grid = torch.linspace(-17.0, 23.0, 301)
    two = built((2,), flow=flow)(torch.cartesian_prod(grid, grid), THETA).double().exp().reshape(301, 301)
    assert abs(torch.trapezoid(torch.trapezoid(two, grid), grid).item() - 1.0) < 5e-3


@pytest.mark.parametrize("flow", ["mixture", "maf", "bpf"])
def test_the_second_derivative_of_smooth_flows_has_no_jumps(flow):
    """Along a line in θ, the largest change of ∂²s in a step falls with the step; at a kink it would not."""
    assert _largest_change(flow, 2000) < 0.2 * _largest_change(flow, 250)


def test_that_of_splines_has():
    assert _largest_change("nsf", 2000) > 0.5 * _largest_change("nsf", 250)


def _largest_change(flow, steps):
    torch.manual_seed(1)
    likelihood = built((3,), flow=flow).double()
    with torch.no_grad():
        for weight in likelihood.parameters():
            weight.mul_(1.5)
    line = torch.linspace(-2.0, 2.0, steps, dtype=torch.float64).requires_grad_()
    theta = torch.stack([line, 0.3 * line], -1)
    x = torch.tensor([2.0, 5.0, 1.0], dtype=torch.float64)
    (slope,) = torch.autograd.grad(likelihood(x, theta).sum(), line, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), line)
    return second.diff().abs().max()


def test_one_number_with_two_modes_is_learned_by_a_flow_that_is_affine_elsewhere(train):
    """x = ±θ + 0.3 ε with equal odds; E log p − E log q is the divergence in nats."""
    theta = 0.5 + torch.rand(6000, 1)
    x = theta[:, 0] * (2.0 * torch.randint(0, 2, (6000,)) - 1.0) + 0.3 * torch.randn(6000)

    def exact(x, t):
        return torch.logaddexp(Normal(t, 0.3).log_prob(x), Normal(-t, 0.3).log_prob(x)) - math.log(2.0)

    likelihood = train(NeuralLikelihood(("t",), (), flow="maf", hidden=(32,), components=4), theta, x, epochs=20)
    gap = exact(x, theta[:, 0]) - likelihood(x, theta)
    assert abs(float(gap.mean())) < 0.02
    inside = (theta[:, 0] > 0.6) & (theta[:, 0] < 1.4)
    assert float(gap[inside].abs().quantile(0.9)) < 0.2


def test_mixed_data_add_up_to_one():
    likelihood = built((3,), discrete={0: 3, 2: "count"})
    grid = torch.linspace(-37.0, 43.0, 801)
    total = 0.0
    for category in range(3):
        for count in range(300):
            row = torch.tensor([category, 0.0, count]).repeat(801, 1)
            row[:, 1] = grid
            total += torch.trapezoid(likelihood(row, THETA).double().exp(), grid).item()
            if count > 20 and count % 50 == 0 and total > 1.0 - 1e-6:
                break
    assert abs(total - 1.0) < 2e-3


def test_discrete_data_alone_are_learned(train):
    """k ~ Bernoulli(σ(θ)), n ~ Poisson(5 e^θ (1 + k)): log p in closed form."""
    theta = 2.0 * torch.rand(10_000, 1) - 1.0
    k = (torch.rand(10_000) < theta[:, 0].sigmoid()).float()
    n = torch.poisson(5.0 * theta[:, 0].exp() * (1.0 + k))
    x = torch.stack([k, n], -1)
    likelihood = NeuralLikelihood(("t",), (2,), discrete={0: 2, 1: "count"}, hidden=(32,), components=2)
    train(likelihood, theta, x, epochs=12)

    def exact(x, t):
        k, n = x.unbind(-1)
        return torch.nn.functional.logsigmoid(t * (2.0 * k - 1.0)) + Poisson(5.0 * t.exp() * (1.0 + k)).log_prob(n)

    assert abs(float((exact(x, theta[:, 0]) - likelihood(x, theta)).mean())) < 0.02
    at = theta[:2000].clone().requires_grad_()
    (score,) = torch.autograd.grad(likelihood(x[:2000], at).sum(), at)
    (true,) = torch.autograd.grad(exact(x[:2000], at[:, 0]).sum(), at)
    assert float((score * true).mean() / true.square().mean()) == pytest.approx(1.0, abs=0.1)


def test_the_negative_binomial_is_that_of_torch_and_reaches_poisson():
    n = torch.tensor([0.0, 1.0, 4.0, 30.0, 1000.0], dtype=torch.float64)[:, None]
    log_mean = torch.tensor([-2.0, 0.5, 3.0, 7.0], dtype=torch.float64)
    for kappa in (-5.0, 0.0, 2.0):
        ratio = math.exp(kappa)  # m / r, so that p = m / (m + r)
        law = NegativeBinomial(log_mean.exp() / ratio, probs=torch.tensor(ratio / (1.0 + ratio), dtype=torch.float64))
        found = negative_binomial(n, log_mean, torch.tensor(kappa, dtype=torch.float64))
        torch.testing.assert_close(found, law.log_prob(n), rtol=1e-9, atol=1e-9)
    limit = negative_binomial(n, log_mean, torch.tensor(-40.0, dtype=torch.float64))
    torch.testing.assert_close(limit, Poisson(log_mean.exp()).log_prob(n), rtol=1e-9, atol=1e-9)
    single = negative_binomial(torch.tensor(1e6), torch.tensor(1.001e6).log(), torch.tensor(-8.0))
    double = negative_binomial(
        torch.tensor(1e6).double(), torch.tensor(1.001e6).log().double(), torch.tensor(-8.0).double()
    )
    assert abs(float(single - double)) < 0.01  # lgamma alone would be off by whole nats
    args = (torch.tensor([-1.0, 2.0]).double().requires_grad_(), torch.tensor([-3.0, 0.5]).double().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda m, k: negative_binomial(n[:4], m, k), args)


def test_the_binomial_is_that_of_torch_and_keeps_its_digits():
    n = torch.tensor([0.0, 1.0, 500.0, 999.0, 1000.0], dtype=torch.float64)[:, None]
    logit = torch.tensor([-30.0, -2.0, 0.0, 3.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(binomial(n, 1000, logit), Binomial(1000, logits=logit).log_prob(n), rtol=1e-9, atol=1e-9)
    many, odds = torch.tensor(300_000.0), torch.tensor(-0.85)
    double = Binomial(10**6, logits=odds.double()).log_prob(many.double())
    assert abs(float(binomial(many, 10**6, odds) - double)) < 0.1  # lgamma in float32 would be off by whole nats
    assert torch.autograd.gradgradcheck(lambda z: binomial(n, 1000, z), (logit[1:4].clone().requires_grad_(),))


def test_counts_out_of_a_number_are_learned_and_add_up_to_one(train):
    """a ~ Binomial(40, σ(θ)), b ~ Binomial(40, a / 80 + ¼): the score is that of a alone."""
    theta = 2.0 * torch.rand(8000, 1) - 1.0
    a = torch.binomial(torch.full((8000,), 40.0), theta[:, 0].sigmoid())
    x = torch.stack([a, torch.binomial(torch.full((8000,), 40.0), a / 80.0 + 0.25)], -1)
    likelihood = NeuralLikelihood(
        ("t",), (2,), discrete={0: "binomial 40", 1: "binomial 40"}, hidden=(32,), components=2
    )
    train(likelihood, theta, x, epochs=12)
    grid = torch.cartesian_prod(torch.arange(41.0), torch.arange(41.0))
    assert float(likelihood(grid, torch.tensor([0.4])).double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(likelihood(torch.tensor([41.0, 3.0]), torch.tensor([0.4]))) == -math.inf
    at = theta[:2000].clone().requires_grad_()
    (score,) = torch.autograd.grad(likelihood(x[:2000], at).sum(), at)
    true = (a - 40.0 * theta[:, 0].sigmoid())[:2000, None]
    assert float((score * true).mean() / true.square().mean()) == pytest.approx(1.0, abs=0.1)


def test_numbers_that_repeat_are_not_taken_for_continuous_without_a_word():
    theta, counts = torch.randn(500, 1), torch.poisson(torch.full((500,), 3.0))
    x = torch.stack([torch.randn(500), counts], -1)
    with pytest.warns(UserWarning, match=r"NeuralLikelihood .* repeat .* in entry 1 of 500 rows .* discrete="):
        NeuralLikelihood(("t",), (2,)).standardise(x, theta)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeuralLikelihood(("t",), (2,), discrete={1: "count"}).standardise(x, theta)
        NeuralLikelihood(("t",), (2,)).standardise(torch.stack([x[:, 0], torch.ones(500)], -1), theta)  # constant


def test_values_that_there_are_not_score_minus_infinity_and_are_refused_as_data():
    likelihood = built((2,), discrete={1: 3})
    x = torch.tensor([[0.5, 0.0], [0.5, 3.0], [0.5, -1.0], [0.5, 0.5]])
    theta = THETA.repeat(4, 1).requires_grad_()
    s = likelihood(x, theta)
    assert torch.isfinite(s).tolist() == [True, False, False, False]
    assert bool((s[1:] == -math.inf).all())
    (score,) = torch.autograd.grad(s[:1].sum() + torch.where(torch.isfinite(s[1:]), s[1:], 0.0).sum(), theta)
    assert bool(torch.isfinite(score).all())
    Observations({"p": x[:1]}, {"p": likelihood})
    with pytest.raises(ObservationError, match=r"whole numbers in range.*got 3 at observation 1, entry \[1\]"):
        Observations({"p": x}, {"p": likelihood})


def test_a_configuration_with_discrete_entries_is_written_and_read(tmp_path):
    likelihood = built((4,), discrete={2: "count", 0: 3, 3: "binomial 8"})
    assert likelihood.configuration["discrete"] == {"0": 3, "2": "count", "3": "binomial 8"}
    write_plugin(tmp_path / "p", likelihood)
    again = read_plugin(tmp_path / "p")
    x = torch.tensor([[1.0, 0.3, 7.0, 8.0], [2.0, 9.0, 0.0, 1.0]])
    assert torch.equal(likelihood.eval()(x, THETA), again(x, THETA))
    assert not bool(again.support.check(torch.tensor([3.0, 0.3, 7.0, 8.0])).all())
    assert not bool(again.support.check(torch.tensor([1.0, 0.3, 7.0, 9.0])).all())


def test_flows_leave_torch_as_it_was():
    """The package that flows stand on switches the validation of all distributions off when it is imported."""
    code = """
import torch
from modalities import NeuralLikelihood
for flow in ("mixture", "nsf"):
    NeuralLikelihood(("t",), (2,), flow=flow)
try:
    torch.distributions.Normal(0.0, -1.0)
except ValueError:
    print("validated")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "validated\n"


def test_training_data_that_are_no_categories_are_refused():
    likelihood = NeuralLikelihood(("t",), (2,), discrete={1: 3})
    x = torch.tensor([[0.1, 2.0], [0.2, 3.0]])
    with pytest.raises(ModalityError, match="entry 0 of x must be a category from 0 to 2, got 3 at index 1"):
        likelihood.standardise(x, torch.zeros(2, 1))


def test_weights_drawn_anew_keep_the_components_apart():
    for part in (built((2,)).density, built((2,), discrete={0: "count"}).chain, MixtureDensity(("t",), (2,)).head):
        before = [w.detach().clone() for w in part.parameters()]
        part.reset_parameters()
        changed = [not torch.equal(a, b) for a, b in zip(before, part.parameters(), strict=True)]
        assert all(changed[:-1])
        network = part.networks[0] if hasattr(part, "networks") else part.network
        assert float(network[-1].bias.detach().std()) > 0.1


def test_with_a_summary_it_is_no_density_of_x():
    assert NeuralLikelihood(("t",), (4,)).normalised
    assert not NeuralLikelihood(("t",), (4,), summary=MLP(4, 2)).normalised


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow": "glow"}, "flow must be one of mixture, maf, bpf, nsf, got 'glow'"),
        ({"transforms": 0}, "transforms must be a whole number >= 1, got 0"),
        ({"discrete": {5: 2}}, "discrete must name entries of x from 0 to 1, each once, got 5"),
        (
            {"discrete": {0: 1}},
            r"discrete\[0\] must be a number of categories >= 2, 'count', or 'binomial N' for a count out of N, got 1",
        ),
        ({"discrete": {0: "binomial 0"}}, r"'binomial N' for a count out of N, got 'binomial 0'"),
        ({"discrete": "count"}, "discrete must be a mapping, got 'count'"),
        ({"discrete": {0: 2}, "summary": MLP(2, 2)}, r"discrete \[0\] must be entries of x itself, got a summary"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ModalityError, match=message):
        NeuralLikelihood(("t",), (2,), **options)
