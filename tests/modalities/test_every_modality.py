"""What holds for each class alike: broadcasting, derivatives, stacking, simulation, configuration."""

import copy
import math
from collections import defaultdict

import pytest
import torch
from torch import nn

from engine.observations import Observations
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from engine.terms import Term
from modalities import Categorical, Constraint, Gaussian, PoissonCounts, StudentT

F64 = torch.float64


def line(theta, t):
    return theta[..., :1] + theta[..., 1:2] * t


def curve(theta, t):
    return theta[..., :1] * torch.exp(-theta[..., 1:2] * t)


def noise(theta, t):
    return 0.3 + theta[..., 1:2].square() * (1.0 + t)


def correlated(theta, t):
    d = noise(theta, t)
    return torch.diag_embed(d) + 0.2 * d[..., :, None] * d[..., None, :]


def odds(theta, t):
    return theta[..., :1] * t + (theta[..., 1:2] * t).sin()


T = [0.1, 0.7, 1.3]
COVARIANCE = [[1.0, 0.3, 0.1], [0.3, 2.0, -0.4], [0.1, -0.4, 0.5]]
NAMES = ("a", "b")


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))


def hist(shift=0.0, **kwargs):
    return PoissonCounts(
        signal=[5.0 + shift, 9.0],
        background={"top": [50.0, 40.0 + shift], "qcd": [10.0, 20.0]},
        scale={"k": ["top"]},
        normalisation={"lumi": {"signal": (0.9, 1.2), "top": (0.8, 1.1 + 0.01 * shift)}},
        shape={"jes": {"qcd": ([8.0, 21.0], [13.0, 18.0 - shift])}, "lumi": {"top": ([49.0, 40.0], [51.0, 42.0])}},
        per_bin={"qcd": ["g0", "g1"]},
        **kwargs,
    )


# name -> (modality, θ where it is smooth)
CASES = {
    "gaussian theta sd": (Gaussian(parameter_names=NAMES, sd=[0.5, 2.0]), [0.3, -1.0]),
    "gaussian theta covariance": (Gaussian(parameter_names=("a", "b", "c"), covariance=COVARIANCE), [0.3, -1.0, 2.0]),
    "gaussian function": (Gaussian(curve, parameter_names=NAMES, covariance=COVARIANCE, inputs={"t": T}), [2.0, 0.7]),
    "gaussian function sd": (
        Gaussian(curve, parameter_names=NAMES, sd=0.2, inputs={"t": T}, event_shape=(3,)),
        [2.0, 0.7],
    ),
    "gaussian sd of theta": (
        Gaussian(line, parameter_names=NAMES, sd=noise, inputs={"t": T}, event_shape=(3,)),
        [0.5, 0.8],
    ),
    "gaussian covariance of theta": (
        Gaussian(line, parameter_names=NAMES, covariance=correlated, inputs={"t": T}, event_shape=(3,)),
        [0.5, 0.8],
    ),
    "gaussian network": (Gaussian(network(), parameter_names=NAMES, sd=[0.1, 0.2, 0.3]), [0.5, 0.8]),
    "gaussian scalar": (Gaussian(parameter_names=("a",), sd=0.5, event_shape=()), [0.5]),
    "gaussian missing": (
        Gaussian(curve, parameter_names=NAMES, covariance=COVARIANCE, inputs={"t": T}, missing=True),
        [2.0, 0.7],
    ),
    "poisson": (PoissonCounts(signal=[5.0, 9.0], background=[50.0, 40.0]), [1.3]),
    "poisson histfactory": (hist(), [1.2, 0.9, 0.4, -0.6, 1.1, 0.8]),
    "constraint normal": (Constraint(NAMES, sd=[0.5, 2.0]), [0.3, -1.0]),
    "constraint covariance": (Constraint(NAMES, covariance=[[1.0, 0.6], [0.6, 2.0]]), [0.3, -1.0]),
    "constraint lognormal": (Constraint(NAMES, kind="lognormal", sd=0.2), [0.8, 1.4]),
    "constraint poisson": (Constraint(NAMES, kind="poisson", scale=[50.0, 7.0]), [0.8, 1.4]),
    "student theta": (StudentT(parameter_names=NAMES, scale=[0.5, 2.0], df=3.0), [0.3, -1.0]),
    "student function": (
        StudentT(curve, parameter_names=NAMES, scale=0.3, df=[2.0, 5.0, 30.0], inputs={"t": T}),
        [2.0, 0.7],
    ),
    "categorical logits": (Categorical(odds, parameter_names=NAMES, inputs={"t": T}, categories=3), [0.7, 1.2]),
    "categorical table": (
        Categorical(parameter_names=("h",), probabilities=[[0.9, 0.1, 0.0], [0.25, 0.5, 0.25]]),
        [1.0],
    ),
}
each = pytest.mark.parametrize(("modality", "point"), CASES.values(), ids=CASES)
continuous = {k: v for k, v in CASES.items() if k != "categorical table"}
each_continuous = pytest.mark.parametrize(("modality", "point"), continuous.values(), ids=continuous)


def has_float32(modality):
    return any(p.dtype == torch.float32 for p in modality.parameters())


def simulated(modality, point, n, seed=0):
    theta = torch.tensor(point, dtype=F64).expand(n, -1)
    return modality.simulate(theta, torch.Generator().manual_seed(seed))


@each
def test_a_grid_of_theta_and_data_gives_the_values_of_its_pairs(modality, point):
    x = simulated(modality, point, 4)
    theta = torch.tensor(point, dtype=F64) * torch.linspace(1.0, 1.1, 3, dtype=F64)[:, None]
    if point == [1.0] and isinstance(modality, Categorical):
        theta = torch.tensor([[0.0], [1.0], [0.0]], dtype=F64)
    grid = modality(x[None], theta[:, None])
    assert grid.shape == (3, 4)
    assert grid.dtype == F64
    pairs = torch.stack([torch.stack([modality(x[b], theta[k]) for b in range(4)]) for k in range(3)])
    tolerance = 1e-5 if has_float32(modality) else 1e-13
    torch.testing.assert_close(grid, pairs, rtol=tolerance, atol=tolerance)
    vmapped = torch.func.vmap(lambda t: torch.func.vmap(lambda v: modality(v, t))(x))(theta)
    torch.testing.assert_close(vmapped, pairs, rtol=tolerance, atol=tolerance)


@each_continuous
def test_two_derivatives_agree_with_finite_differences(modality, point):
    x = simulated(modality, point, 3)
    theta = torch.tensor(point, dtype=F64).repeat(2, 1, 1).requires_grad_()
    modality = copy.deepcopy(modality).double()
    assert torch.autograd.gradcheck(lambda t: modality(x, t), theta)
    assert torch.autograd.gradgradcheck(lambda t: modality(x, t), theta, atol=1e-4)


@each_continuous
def test_the_expected_information_is_the_covariance_of_the_simulated_score(modality, point):
    n = 40_000
    x = simulated(modality, point, n, seed=1)
    theta = torch.tensor(point, dtype=F64).repeat(n, 1).requires_grad_()
    (score,) = torch.autograd.grad(modality(x, theta).sum(), theta)
    information = modality.expected_information(theta[0].detach())
    products = score[:, :, None] * score[:, None, :]
    scale = information.diagonal().sqrt()
    error = products.std(0) / math.sqrt(n) + 1e-9 * scale[:, None] * scale
    assert bool((((products.mean(0) - information) / error).abs() < 4.5).all())
    assert bool((score.mean(0).abs() < 4.5 * score.std(0) / math.sqrt(n)).all())  # Bartlett's first identity
    batch = modality.expected_information(theta[:4].detach().reshape(2, 2, -1))
    torch.testing.assert_close(batch[1, 0], information)


@each
def test_simulations_come_from_the_given_generator_alone(modality, point):
    before = torch.random.get_rng_state()
    first, again, other = (simulated(modality, point, 50, seed) for seed in (3, 3, 4))
    theta = torch.tensor(point, dtype=F64).expand(50, -1)
    unseeded = modality.simulate(theta), modality.simulate(theta)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(*unseeded)
    assert first.shape == (50, *modality.event_shape)
    assert first.dtype == F64
    assert bool(torch.isfinite(modality(first, theta)).all())


@each
def test_its_configuration_builds_the_same_modality(modality, point):
    again = type(modality)(**modality.configuration)
    x, theta = simulated(modality, point, 4), torch.tensor(point, dtype=F64)
    assert torch.equal(modality(x, theta), again(x, theta))
    assert again.parameter_names == modality.parameter_names
    assert again.event_shape == modality.event_shape
    assert torch.equal(copy.deepcopy(modality)(x, theta), modality(x, theta))


@each
def test_it_says_that_it_has_a_simulator_an_information_and_every_constant(modality, point):
    assert modality.has_simulator
    assert modality.has_expected_information
    assert modality.normalised
    assert modality.dtype == F64
    assert modality.auxiliary == isinstance(modality, Constraint)


STACKS = {
    "gaussian sd": [Gaussian(parameter_names=NAMES, sd=[s, 2.0]) for s in (0.5, 1.0)],
    "gaussian covariance": [Gaussian(parameter_names=NAMES, covariance=[[1.0, r], [r, 2.0]]) for r in (0.0, 0.5, -0.9)],
    "gaussian missing": [
        Gaussian(parameter_names=NAMES, covariance=[[1.0, r], [r, 2.0]], missing=True) for r in (0.5, -0.9)
    ],
    "gaussian scalar": [Gaussian(parameter_names=("a",), sd=s, event_shape=()) for s in (0.5, 1.0)],
    "poisson": [PoissonCounts(signal=[5.0, s], background=[50.0, 40.0]) for s in (1.0, 9.0)],
    "poisson histfactory": [hist(), hist(shift=1.0, strength="xsec")],
    "poisson structure": [
        PoissonCounts(background={"a": [5.0], "b": [9.0]}, scale={"k": "a", "l": "b"}),
        PoissonCounts(background={"a": [5.0], "b": [9.0]}, scale={"k": "b", "l": "a"}),
    ],
    "constraint normal": [Constraint(NAMES, sd=s) for s in (0.5, 2.0)],
    "constraint covariance": [Constraint(NAMES, covariance=[[1.0, r], [r, 2.0]]) for r in (0.6, -0.6)],
    "constraint lognormal": [Constraint(NAMES, kind="lognormal", sd=s) for s in (0.5, 2.0)],
    "constraint poisson": [Constraint(NAMES, kind="poisson", scale=s) for s in (50.0, 7.0)],
    "student": [StudentT(parameter_names=NAMES, scale=1.0, df=d) for d in (1.0, 5.0)],
    "categorical": [Categorical(parameter_names=("h",), probabilities=[[p, 1.0 - p], [0.5, 0.5]]) for p in (0.1, 1.0)],
}


@pytest.mark.parametrize("modules", STACKS.values(), ids=STACKS)
def test_plugins_of_one_stack_key_evaluated_together_equal_each_alone(modules):
    assert len({m.stack_key() for m in modules}) == 1
    assert modules[0].stack_key() is not None
    hash(modules[0].stack_key())
    names = len(modules[0].parameter_names)
    generator = torch.Generator().manual_seed(0)
    theta = 0.5 + torch.rand(len(modules), 3, 1, names, generator=generator, dtype=F64)
    if isinstance(modules[0], Categorical):
        theta = theta.round()
    x = torch.stack(
        [m.simulate(t[:, 0].expand(5, 3, names), generator)[:, 0][None] for m, t in zip(modules, theta, strict=True)]
    )
    if modules[0].allows_missing:
        x[0, 0, 0], x[1, 0, 1, 0] = math.nan, math.nan
    weights, buffers = torch.func.stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")

    def one(weights, buffers, x, theta):
        return torch.func.functional_call(base, (weights, buffers), (x, theta))

    def total(theta):
        return torch.func.vmap(one)(weights, buffers, x, theta)

    together = total(theta)
    alone = torch.stack([m(x[i], theta[i]) for i, m in enumerate(modules)])
    assert together.shape == (len(modules), 3, 5)
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)
    theta.requires_grad_()
    (score,) = torch.autograd.grad(total(theta).sum(), theta, create_graph=True)
    (second,) = torch.autograd.grad(score.sum(), theta) if score.requires_grad else (score,)
    assert bool(torch.isfinite(second).all())


def test_a_function_of_theta_inside_keeps_a_plugin_on_its_own():
    alone = {name for name, (modality, _) in CASES.items() if modality.stack_key() is None}
    assert alone == {
        "gaussian function",
        "gaussian function sd",
        "gaussian sd of theta",
        "gaussian covariance of theta",
        "gaussian network",
        "gaussian missing",
        "student function",
        "categorical logits",
    }


def test_plugins_that_differ_beside_their_tensors_have_different_stack_keys():
    keys = [
        Gaussian(parameter_names=("a",), sd=1.0).stack_key(),
        Gaussian(parameter_names=("a",), sd=1.0, event_shape=()).stack_key(),
        Gaussian(parameter_names=("a",), sd=1.0, missing=True).stack_key(),
        Gaussian(parameter_names=("a",), covariance=[[1.0]]).stack_key(),
        Constraint("a").stack_key(),
        Constraint("a", kind="lognormal").stack_key(),
        Constraint("a", kind="poisson").stack_key(),
        PoissonCounts(signal=[1.0], background=[1.0]).stack_key(),
        PoissonCounts(signal=[1.0], background=[1.0], normalisation={"mu": {"signal": (0.9, 1.1)}}).stack_key(),
        PoissonCounts(signal=[1.0], background=[1.0], shape={"mu": {"signal": ([0.9], [1.1])}}).stack_key(),
    ]
    assert len(set(keys)) == len(keys)


def test_a_tensor_that_was_passed_can_be_changed_without_changing_the_modality():
    sd = torch.tensor([1.0], dtype=F64)
    modality = Gaussian(parameter_names=("a",), sd=sd)
    before = modality(torch.zeros(1), torch.zeros(1)).item()
    sd.fill_(3.0)
    assert modality(torch.zeros(1), torch.zeros(1)).item() == before


# ---- closed derivatives

MORE = {
    "gaussian missing theta": Gaussian(parameter_names=NAMES, covariance=[[1.0, 0.5], [0.5, 2.0]], missing=True),
    "gaussian missing theta sd": Gaussian(parameter_names=NAMES, sd=[0.5, 2.0], missing=True),
    "student missing": StudentT(parameter_names=NAMES, scale=[0.5, 2.0], df=[1.0, 4.0], missing=True),
    "student scalar": StudentT(parameter_names=("a",), scale=0.5, df=2.0, event_shape=()),
    "poisson factors": PoissonCounts(background={"a": [5.0, 0.0], "b": [9.0, 3.0]}, scale={"k": "a", "l": "b"}),
    "poisson shape": PoissonCounts(
        background={"a": [5.0, 7.0], "b": [9.0, 3.0]},
        strength=None,
        scale={"k": "a"},
        shape={"h": {"b": ([8.0, 2.0], [10.0, 4.0])}, "j": {"b": ([9.5, 2.0], [8.5, 4.0])}},
    ),
    "poisson per bin": PoissonCounts(signal=[3.0, 2.0], background=[9.0, 4.0], per_bin={"background": ["g0", "g1"]}),
    "poisson triple": PoissonCounts(
        signal=[3.0, 2.0, 1.0],
        background=[9.0, 4.0, 2.0],
        scale={"k": ["signal", "background"], "l": "signal"},
        per_bin={"background": [["g0", "g1", "g2"], ["g1", "h", "h"]]},
    ),
    "poisson shapes": PoissonCounts(
        signal=[3.0, 2.0, 1.0],
        background={"a": [9.0, 4.0, 2.0], "b": [1.0, 8.0, 3.0]},
        scale={"k": "a"},
        shape={
            "u": {"signal": ([2.0, 2.0, 2.0], [5.0, 1.0, 1.0]), "a": ([8.0, 4.0, 2.0], [9.5, 4.5, 1.0])},
            "mu": {"b": ([1.0, 7.0, 3.0], [2.0, 9.0, 3.5])},
        },
        per_bin={"a": ["g0", "u", "mu"]},
    ),
    "poisson normalisations": PoissonCounts(
        background={"a": [9.0, 4.0], "b": [1.0, 8.0]},
        normalisation={"h": {"a": (0.8, 1.1), "b": (1.1, 0.9)}, "j": {"a": (0.5, 3.0)}},
    ),
    "poisson one name": PoissonCounts(background={"a": [5.0], "b": [9.0], "c": [2.0]}, scale={"k": ["a", "b"]}),
    "poisson many": PoissonCounts(
        background={f"s{i}": [1.0 + i + j for j in range(50)] for i in range(100)},
        scale={f"k{i}": f"s{i}" for i in range(100)},
    ),
}
CLOSED = {name: case[0] for name, case in CASES.items()} | MORE
CLOSED = {name: modality for name, modality in CLOSED.items() if modality.has_derivatives}


def test_these_modalities_write_their_derivatives_down():
    assert set(CLOSED) == {
        *MORE,
        "gaussian theta sd",
        "gaussian theta covariance",
        "gaussian scalar",
        "poisson",
        "poisson histfactory",
        "constraint normal",
        "constraint covariance",
        "constraint lognormal",
        "constraint poisson",
        "student theta",
    }


def terms(modality, count, n):
    """A term of ``count`` copies, their θ (count, 6, P) and data (count, 6, n, *event) with some gaps."""
    names, size = [f"p{i}" for i in range(count)], len(modality.parameter_names)
    generator = torch.Generator().manual_seed(0)
    theta = 0.4 + torch.rand(count, 6, size, generator=generator, dtype=F64)
    x = torch.stack([modality.simulate(t[:, None].expand(6, n, size), generator) for t in theta])
    if modality.allows_missing:
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.3, math.nan, x)
    space = ParameterSpace([Parameter(name) for name in modality.parameter_names])
    data = Observations(
        {k: v[0] for k, v in zip(names, x, strict=True)}, defaultdict(lambda: modality, dict.fromkeys(names, modality))
    )
    return Term(names, [copy.deepcopy(modality) for _ in names], space, data), theta, x


def assert_closed(term, x, theta, mask=None):
    closed = term._block_derivatives(x, theta, mask)
    term.closed = False
    automatic = term._block_derivatives(x, theta, mask)
    value = term.block_value(x, theta, mask)
    term.closed = True
    for found, expected in zip(closed, automatic, strict=True):
        assert bool(torch.isfinite(expected).all())
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13 * (1.0 + float(expected.abs().max())))
    torch.testing.assert_close(term.block_value(x, theta, mask), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", CLOSED)
def test_closed_derivatives_are_those_of_the_scalar(name, count, n):
    """For one data set and for one each, in a stack and alone, with entries missing and observations masked."""
    term, theta, x = terms(CLOSED[name], count, n)
    assert term.closed
    assert_closed(term, x[:, :1], theta)
    assert_closed(term, x, theta)
    mask = torch.rand(count, 6, n, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:, 1] = False
    x = torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - 3)), x, -math.inf)
    assert_closed(term, x, theta, mask)
    assert_closed(term, x[:, :1], theta, mask[:, :1])


def test_closed_derivatives_of_large_and_small_counts_keep_their_digits():
    """Rates from 1e-12 to 1e12; where n is near ν, what n − ν has lost is lost."""
    nu = torch.logspace(-12, 12, 25, dtype=F64)
    for n in (nu, 1.0 + nu.round(), nu + 3.0 * nu.sqrt(), torch.zeros_like(nu), 1e-3 * nu, 1e3 * nu):
        counts = PoissonCounts(signal=[1.0], strength="k")
        s, u, J = counts.derivatives(n[:, None], nu[:, None])
        assert torch.allclose(u[:, 0], (n - nu) / nu, rtol=1e-15, atol=0.0)
        assert torch.allclose(J[:, 0, 0], n / nu**2, rtol=1e-14, atol=0.0)
        value = counts(n[:, None], nu[:, None])
        assert bool(((s - value).abs() <= 1e-12 * (1.0 + value.abs()) + 1e-15 * (n - nu).abs()).all())


@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize(
    ("modality", "x", "theta"),
    [
        (PoissonCounts(signal=[5.0, 9.0], background=[5.0, 4.0]), [[3.0, 0.0]], [-1.0, -0.5, -0.4444444444444444, 0.0]),
        (PoissonCounts(signal=[5.0, 9.0]), [[0.0, 0.0], [0.0, 2.0]], [0.0, 1.0, -1.0, 1e-310]),
        (PoissonCounts(signal=[0.0, 9.0]), [[0.0, 0.0], [0.0, 2.0]], [0.0, 1.0, -1.0]),
        (Constraint("a", kind="poisson"), [[0.0], [3.0]], [-1.0, 0.0, 1e-200, 1.0]),
        (Constraint("a", kind="lognormal"), [[1.0], [3.0]], [-1.0, 0.0, 1.0]),
    ],
)
def test_where_theta_is_impossible_closed_derivatives_are_what_they_are_by_differentiation(modality, x, theta, stack):
    x = torch.tensor(x, dtype=F64).expand(stack, 1, -1, -1)
    theta = torch.tensor(theta, dtype=F64)[:, None].expand(stack, -1, 1)
    space = ParameterSpace([Parameter(modality.parameter_names[0])])
    names = [f"p{i}" for i in range(stack)]
    data = dict.fromkeys(names, x[0, 0])
    known = Observations(data, dict.fromkeys(names, modality), allow_identical=True)
    term = Term(names, [copy.deepcopy(modality) for _ in names], space, known)
    closed = term._block_derivatives(x, theta)
    term.closed = False
    automatic = term._block_derivatives(x, theta)
    for found, expected in zip(closed, automatic, strict=True):
        assert not bool(found.isnan().any())
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(closed[0] == -math.inf, automatic[0] == -math.inf)
    assert bool((closed[0] == -math.inf).any())


def test_they_say_truly_whether_they_are_concave():
    concave = {name for name, (modality, _) in CASES.items() if modality.concave}
    assert concave == {
        "gaussian theta sd",
        "gaussian theta covariance",
        "gaussian scalar",
        "poisson",
        "constraint normal",
        "constraint covariance",
        "constraint poisson",
    }
    bent = ["poisson triple", "poisson shapes", "poisson normalisations"]
    concave = [name for name in MORE if MORE[name].concave]
    assert concave == [name for name in MORE if name not in bent and not name.startswith("student")]
    a, b = {"a": [5.0], "b": [9.0]}, {"b": ([8.0], [10.0])}
    assert not PoissonCounts(background=a, shape={"h": {"b": ([8.0], [11.0])}}).concave
    assert not PoissonCounts(background=a, scale={"k": "b"}, shape={"h": b}).concave
    assert PoissonCounts(background=a, scale={"k": "a"}, shape={"h": b}).concave


@pytest.mark.parametrize("name", ["poisson histfactory", "poisson triple", "poisson shapes", "poisson normalisations"])
def test_closed_derivatives_at_kinks_at_zero_factors_and_far_off_are_those_of_the_scalar(name):
    """α = 0 has the upper branch's derivative, a factor of 0 no logarithm, and e^600 is where a rate stops growing."""
    modality = CLOSED[name]
    size, n = len(modality.parameter_names), 3
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(60, size, generator=generator, dtype=F64)
    theta[20:] = theta[20:].abs()
    theta[torch.rand(theta.shape, generator=generator) < 0.3] = 0.0
    theta[:4] *= 1e4
    x = torch.randint(0, 9, (60, n, *modality.event_shape), generator=generator).to(F64)
    x[40:] *= (modality.rate(theta) > 0)[40:, None]
    term, *_ = terms(modality, 1, 1)
    closed = term._block_derivatives(x[None], theta[None])
    term.closed = False
    automatic = term._block_derivatives(x[None], theta[None])
    assert torch.equal(closed[0] == -math.inf, automatic[0] == -math.inf)
    assert int(closed[0].isfinite().sum()) > 15
    for found, expected in zip(closed, automatic, strict=True):
        assert not bool(found.isnan().any())
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("missing", [False, True])
def test_closed_derivatives_of_all_but_degenerate_measurements_keep_their_digits(missing):
    """Correlations of 1 − 1e-11: an element of C⁻¹ is 1e11, and its rounding must not get into s."""
    r = 1.0 - 1e-11
    modality = Gaussian(parameter_names=NAMES, covariance=[[1.0, r], [r, 1.0]], missing=missing)
    term, theta, _ = terms(modality, 1, 1)
    x = theta[:, :, None] + torch.tensor([0.7, 0.7], dtype=F64)  # along the direction that is well measured
    found = term._block_derivatives(x, theta)
    assert float((found[0] - modality(x[0, :, 0], theta[0])).abs().max()) < 1e-3
    automatic = term._automatic(x, theta, None)
    for n in (1, 2):
        assert float((found[n] - automatic[n]).abs().max()) < 1e-5 * float(automatic[2].abs().max()) ** (0.5 * n)
