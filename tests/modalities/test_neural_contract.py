"""Each learned class passes the shipped battery, where it can be without a simulator, from its folder too."""

import copy
import functools

import pytest
import torch
from torch.distributions import Beta, LogNormal, Normal, Uniform

from engine.parameter import Parameter
from engine.plugin import read_plugin, write_plugin
from engine.testing import check_modality
from modalities import MixtureDensity, NeuralEnsemble, NeuralLikelihood, NeuralPosterior, NeuralRatio
from modalities.summaries import MLP, Bottleneck, DeepSets, ImageSummary, SeriesSummary

P = ("a", "b")
BOX = [Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Normal(0.0, 1.0))]
POSITIVE = [Parameter("a", LogNormal(0.0, 1.0)), Parameter("b", Beta(2.0, 3.0))]
PLANE, QUADRANT = [[0.3, -0.8], [-0.6, 0.7]], [[0.5, 0.3], [2.0, 0.9]]


def three(number=8):
    return 1.0 + 2.0 * torch.randn(number, 3)


def mixed(number=8):
    return torch.stack([torch.randn(number), torch.arange(number) % 3, 3.0 * (torch.arange(number) % 4)], -1)


def sets(number=5):
    return torch.cat([torch.randn(number, 4, 2), (torch.rand(number, 4, 1) > 0.3).float()], -1)


def posteriors():
    return [NeuralPosterior(P, (3,), prior=BOX, summary=MLP(3, 2), hidden=(8,)) for _ in range(2)]


CASES = {
    "mixture density": (lambda: MixtureDensity(P, (3,), hidden=(16,)), three, PLANE),
    "mixture density diagonal": (lambda: MixtureDensity(P, (3,), diagonal=True, components=2), three, PLANE),
    "mixture density summary": (lambda: MixtureDensity(P, (3,), summary=MLP(3, 2)), three, PLANE),
    "likelihood": (lambda: NeuralLikelihood(P, (3,)), three, PLANE),
    "likelihood maf": (lambda: NeuralLikelihood(P, (3,), flow="maf", transforms=3, hidden=(16,)), three, PLANE),
    "likelihood bpf": (lambda: NeuralLikelihood(P, (3,), flow="bpf", transforms=2, hidden=(16,)), three, PLANE),
    "likelihood nsf": (lambda: NeuralLikelihood(P, (3,), flow="nsf", transforms=2, hidden=(16,)), three, PLANE),
    "likelihood scalar": (lambda: NeuralLikelihood(P), lambda: three()[:, 0], PLANE),
    "likelihood mixed": (lambda: NeuralLikelihood(P, (3,), discrete={1: 3, 2: "count"}), mixed, PLANE),
    "likelihood discrete": (
        lambda: NeuralLikelihood(P, (2,), discrete={0: 3, 1: "count"}),
        lambda: mixed()[:, 1:],
        PLANE,
    ),
    "ratio": (lambda: NeuralRatio(P, (3,)), three, PLANE),
    "ratio of sets": (lambda: NeuralRatio(P, (4, 3), summary=DeepSets(2, 5, mask=True)), sets, PLANE),
    "ratio of images": (
        lambda: NeuralRatio(P, (12, 12), summary=ImageSummary(1, 5, width=4)),
        lambda: torch.randn(4, 12, 12),
        PLANE,
    ),
    "ratio of series": (
        lambda: NeuralRatio(P, (40,), summary=SeriesSummary(1, 5, width=4)),
        lambda: torch.randn(4, 40),
        PLANE,
    ),
    "ratio bottleneck": (lambda: NeuralRatio(P, (3,), summary=Bottleneck(MLP(3, 4), 2)), three, PLANE),
    "posterior": (lambda: NeuralPosterior(P, (3,), prior=BOX), three, PLANE),
    "posterior positive": (lambda: NeuralPosterior(P, (3,), prior=POSITIVE), three, QUADRANT),
    "ensemble": (lambda: NeuralEnsemble([NeuralRatio(P, (3,), hidden=(8,)) for _ in range(3)]), three, PLANE),
    "ensemble of posteriors": (lambda: NeuralEnsemble(posteriors()), three, PLANE),
}


@functools.cache
def case(name):
    build, data, theta = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modality, x = build(), data()
        modality.standardise(modality.raw_features(x), 0.1 + 0.8 * torch.rand(len(x), 2))
    return modality, theta, x


@pytest.mark.parametrize("name", CASES)
def test_it_passes_every_check_that_needs_no_simulator(name):
    modality, theta, x = case(name)
    report = check_modality(modality, theta, x, raises=False)
    assert [(check.name, check.detail) for check in report.checks if check.passed is False] == []
    unsaid = {check.name for check in report.checks if check.passed is None}
    assert unsaid == {
        *("closed form", "concave", "simulate"),
        *("first Bartlett identity", "second Bartlett identity", "expected information"),
    }
    assert modality.learned
    assert modality.dtype == torch.float32


@pytest.mark.parametrize("name", CASES)
def test_a_folder_in_float64_gives_back_the_same_bits(name, tmp_path):
    modality, theta, x = case(name)
    exact = type(modality)(**copy.deepcopy(modality.configuration))
    exact.load_state_dict(modality.state_dict())
    exact.double().eval()
    write_plugin(tmp_path / "p", exact)
    at = torch.tensor(theta, dtype=torch.float64)[:, None]
    assert torch.equal(read_plugin(tmp_path / "p")(x.double(), at), exact(x.double(), at))


@pytest.mark.parametrize("name", CASES)
def test_its_second_derivatives_are_finite_over_the_whole_prior(name):
    modality, _, x = case(name)
    low = 0.02 if name == "posterior positive" else -0.999
    theta = (low + (0.999 - low) * torch.rand(300, 2, generator=torch.Generator().manual_seed(0))).requires_grad_()
    rows = x[torch.arange(300) % len(x)]
    (score,) = torch.autograd.grad(modality(rows, theta).sum(), theta, create_graph=True)
    seconds = [torch.autograd.grad(score[:, j].sum(), theta, retain_graph=True)[0] for j in range(2)]
    assert bool(torch.isfinite(torch.stack([score, *seconds])).all())


def test_construction_alone_draws_from_the_global_generator():
    modality, theta, x = case("ratio")
    before = torch.random.get_rng_state()
    modality(x, torch.tensor(theta)[:, None])
    modality.loss(x, torch.rand(8, 2, generator=torch.Generator()), torch.Generator())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_summary_may_have_another_precision_than_the_scalar_on_top():
    ratio = NeuralRatio(P, (3,), summary=MLP(3, 2).double(), hidden=(8,))
    assert ratio.dtype == torch.float32
    assert ratio(three(), torch.tensor(PLANE[0])).dtype == torch.float32
