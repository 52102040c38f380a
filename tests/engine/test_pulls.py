"""Twenty plugins about five shared parameters: estimates scatter as their errors claim and as well as is possible."""

import math

import pytest
import torch

from engine import Evidence, Modality, Parameter, ParameterSpace
from engine.estimate import estimate
from modalities import Gaussian, PoissonCounts

TRUTH = {"strength": 1.3, "scale": 0.9, "shift": -0.4, "width": 1.5, "alpha": 0.3}
N = 100  # observations a plugin


class Peak(Modality):
    """Counts under a peak whose place and width are unknown, n_i ~ Poisson(6 strength exp(−(t_i − shift)²/2 width²) + 1)."""

    def __init__(self, times, parameter_names=("strength", "shift", "width")):
        super().__init__(parameter_names=parameter_names, event_shape=(len(times),))
        self.register_buffer("times", torch.as_tensor(times, dtype=torch.float64))

    def rate(self, theta):
        strength, shift, width = theta[..., :1], theta[..., 1:2], theta[..., 2:]
        return 6.0 * strength * torch.exp(-0.5 * ((self.times - shift) / width) ** 2) + 1.0

    def log_evidence(self, x, theta):
        rate = self.rate(theta)
        return (x.xlogy(rate) - rate).sum(-1)

    def simulate(self, theta, generator=None):
        return torch.poisson(self.rate(theta), generator=generator)

    def expected_information(self, theta):
        slope = torch.func.jacrev(self.rate)(theta)
        return slope.mT @ (slope / self.rate(theta)[:, None])

    def stack_key(self):
        return "peak"


def curve(theta, t):
    return theta[..., :1] * torch.exp(-t / theta[..., 1:2]) + torch.sin(theta[..., 2:] * t)


def modalities():
    """Eight histograms with a nuisance, eight peaks and four curves; no two alike."""
    grid = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    found = {}
    for i in range(8):
        found[f"counts {i}"] = PoissonCounts(
            signal=[2.0 + 0.3 * i, 5.0, 1.0 + 0.1 * i],
            background=[6.0, 3.0 + 0.2 * i, 4.0],
            strength="strength",
            normalisation={
                "alpha": {"background": (0.8 - 0.01 * i, 1.25 + 0.01 * i), "signal": (0.95, 1.05 + 0.01 * i)}
            },
        )
        found[f"peak {i}"] = Peak(torch.linspace(-3.0, 3.0, 6, dtype=torch.float64) + 0.1 * i)
    for i in range(4):
        found[f"curve {i}"] = Gaussian(
            curve,
            parameter_names=("scale", "width", "shift"),
            sd=0.8 + 0.1 * i,
            inputs={"t": 1.0 + i + grid},
            event_shape=(5,),
        )
    return found


SPACE = ParameterSpace(
    [
        Parameter("strength", bounds=(0.01, 10.0)),
        Parameter("scale", bounds=(0.0, 10.0)),
        Parameter("shift", bounds=(-3.0, 3.0)),
        Parameter("width", bounds=(0.2, 8.0)),
        Parameter("alpha", bounds=(-5.0, 5.0)),
    ]
)


def simulated_fits(count, seed, blind=5):
    """Pulls (count, 5), and the errors of θ̂ squared in units of the Cramér–Rao bound, averaged over parameters, (count,).

    Searches start at the truth, to save time; the first ``blind`` ones are repeated without a start.
    """
    plugins, theta = modalities(), SPACE.tensor(TRUTH)
    information = torch.zeros(5, 5, dtype=torch.float64)
    for modality in plugins.values():
        at = SPACE.indices(modality.parameter_names)
        information[torch.tensor(at)[:, None], at] += N * modality.expected_information(theta[at])
    generator = torch.Generator().manual_seed(seed)
    pulls, squares = [], []
    for k in range(count):
        data = {}
        for name, modality in plugins.items():
            local = theta[SPACE.indices(modality.parameter_names)]
            data[name] = modality.simulate(local.expand(N, -1), generator)
        evidence = Evidence(SPACE, plugins, data)
        fit = estimate(evidence, start=TRUTH, screen=1, polish=1)
        assert fit.status == "converged", fit.reason
        if k < blind:
            alone = estimate(evidence)
            assert alone.status == "converged", alone.reason
            assert ((alone.theta - fit.theta) / fit.sd).abs().max() < 1e-6
        error = fit.theta - theta
        pulls.append(error / fit.sd)
        squares.append(float(error @ information @ error) / 5)
    return torch.stack(pulls), torch.tensor(squares)


def check(count, seed, *, mean, width, excess):
    pulls, squares = simulated_fits(count, seed)
    print(
        f"{count} data sets: pull means {pulls.mean(0).tolist()}, widths {pulls.std(0).tolist()}, MSE/CRB {squares.mean():.4f}"
    )
    assert pulls.mean(0).abs().max() < mean
    assert (pulls.std(0) - 1.0).abs().max() < width
    assert 1.0 - excess < squares.mean() < 1.0 + excess


def test_pulls_and_efficiency_of_sixty_data_sets_are_those_of_maximum_likelihood():
    """Five parameters at once: 3.5 standard errors of a mean, 1/√R, of a width, 1/√(2R), and of the scatter in units of
    the Cramér–Rao bound, √(2/5R)."""
    R = 60
    check(R, seed=1, mean=3.5 / math.sqrt(R), width=3.5 / math.sqrt(2 * R), excess=3.5 * math.sqrt(0.4 / R))


@pytest.mark.slow
def test_pulls_and_efficiency_of_a_thousand_data_sets_are_those_of_maximum_likelihood():
    """Means within 0.1 (3.2 standard errors), widths within 0.05 (2.2), and at N = 100 the estimate's squared error
    within 5 % (2.5) of the Cramér–Rao bound."""
    check(1000, seed=3, mean=0.1, width=0.05, excess=0.05)


def test_the_closed_form_of_the_information_is_the_scatter_of_simulated_scores():
    """The bound that the other tests compare with, checked through 20,000 simulated scores: 5 standard errors."""
    theta = SPACE.tensor(TRUTH)
    for modality in (Peak(torch.linspace(-3.0, 3.0, 6)), modalities()["curve 1"], modalities()["counts 3"]):
        local = theta[SPACE.indices(modality.parameter_names)]
        x = modality.simulate(local.expand(20_000, -1), torch.Generator().manual_seed(3))
        leaf = local.expand(20_000, -1).clone().requires_grad_()
        (u,) = torch.autograd.grad(modality(x, leaf).sum(), leaf)
        exact = modality.expected_information(local)
        sd = exact.diagonal().sqrt()
        assert ((u.T @ u / 20_000 - exact) / (sd[:, None] * sd)).abs().max() < 5 * math.sqrt(2 / 20_000)
