"""The quadratic evidence: its formula, what its loss converges to, its sum, its precision and its rules."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import Normal, Uniform

from engine.errors import ModalityError
from engine.estimate import Status, estimate
from engine.evidence import Evidence
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from engine.registry import Registry
from engine.testing import check_modality
from modalities import Quadratic

F64 = torch.float64
NAMES = ("a", "b", "c")
# A linear problem: x = Aθ + noise of covariance Σ, θ ~ N(centre, scale²).
A = torch.tensor([[1.0, 0.5], [-0.3, 1.2], [0.8, 0.1]], dtype=F64)
NOISE = torch.tensor([[0.8, 0.2, 0.0], [0.2, 0.5, -0.1], [0.0, -0.1, 1.1]], dtype=F64)
CENTRE, SCALE = torch.tensor([0.4, -1.0], dtype=F64), torch.tensor([1.5, 0.7], dtype=F64)
SOLVED = torch.linalg.solve(NOISE, A).mT  # A'Σ⁻¹
FISHER = SOLVED @ A
POSTERIOR = torch.linalg.inv(FISHER + torch.diag(SCALE**-2))
# name -> options of the head
HEADS = {
    "full": {},
    "constant": {"constant": True},
    "diagonal": {"diagonal": True},
    "diagonal constant": {"diagonal": True, "constant": True},
    "rank 1": {"rank": 1},
    "rank 2 constant": {"rank": 2, "constant": True},
}


def network(inputs=4, dtype=F64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 8), nn.SiLU(), nn.Linear(8, 5)).to(dtype)


def randomised(modality, seed=0, size=1.0):
    """Weights of the head drawn at random, as training would leave none of them at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (modality.weight, modality.bias, *([] if modality.factor is None else [modality.factor])):
            weight.copy_(size * torch.randn(weight.shape, generator=generator, dtype=F64))
    return modality.eval()


def three(dtype=F64, seed=0, **options):
    return randomised(
        Quadratic(
            network(dtype=dtype), NAMES, (4,), **{"centre": [1.0, -2.0, 0.5], "scale": [2.0, 0.5, 1.0], **options}
        ),
        seed,
    )


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def by_autograd(modality, x, theta):
    theta = theta.clone().requires_grad_()
    value = modality(x, theta)
    (score,) = torch.autograd.grad(value.sum(), theta, create_graph=True)
    rows = [torch.autograd.grad(score[..., j].sum(), theta, retain_graph=True)[0] for j in range(theta.shape[-1])]
    return value.detach(), score.detach(), -torch.stack(rows, -2)


def train(modality, *data, steps=8):
    optimiser = torch.optim.LBFGS(
        modality.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = modality.loss(*data)
        loss.backward()
        return loss

    for _ in range(steps):
        optimiser.step(closure)
    return modality.loss(*data).item()


def linear(n=60, seed=0):
    """x of the linear problem, and for each x points θ that have the exact mean and covariance of its posterior.

    The loss is quadratic in θ, so that its average over these points is the one over all θ there are.
    """
    x = draws(n, 3, seed=seed) @ torch.linalg.cholesky(A @ torch.diag(SCALE**2) @ A.mT + NOISE).mT + A @ CENTRE
    mean = (x @ SOLVED.mT + CENTRE / SCALE**2) @ POSTERIOR
    steps = math.sqrt(2.0) * torch.linalg.cholesky(POSTERIOR).mT
    points = mean[:, None] + torch.cat([steps, -steps])
    return x.repeat_interleave(4, 0), points.reshape(-1, 2)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_the_scalar_is_the_formula_written_out(options):
    modality = three(**options)
    x, theta = draws(5, 4), draws(5, 3, seed=1)
    eta, precision = modality.natural(x)
    assert eta.shape == (5, 3)
    assert precision.shape == (5, 3, 3)
    d = theta - torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    expected = torch.stack([e @ v - 0.5 * v @ p @ v for e, v, p in zip(eta, d, precision, strict=True)])
    torch.testing.assert_close(modality(x, theta), expected, rtol=1e-12, atol=1e-12)
    assert modality(x, modality.centre).abs().max() == 0


def test_the_head_is_a_linear_layer_with_a_cholesky_factor():
    modality = Quadratic(nn.Identity(), ("a", "b"), (1,), centre=[0.0, 3.0], scale=[1.0, 2.0])
    raw = torch.tensor([0.3, -0.4, 1.2, -0.7, 0.9], dtype=F64)  # η, then L's diagonal, then what is below it
    with torch.no_grad():
        modality.weight[:, 0] = raw
    x = torch.tensor([2.0], dtype=F64)
    factor = np.array([[np.logaddexp(0, 2.4), 0.0], [1.8, np.logaddexp(0, -1.4)]])
    eta, precision = modality.natural(x)
    step = np.array([1.0, 2.0])
    np.testing.assert_allclose(eta.detach().numpy(), [0.6, -0.4], rtol=1e-14)
    np.testing.assert_allclose(precision.detach().numpy(), factor @ factor.T / np.outer(step, step), rtol=1e-14)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_it_is_concave_for_random_weights_and_any_x(options, size):
    for seed in range(20):
        modality = randomised(three(**options), seed, size)
        precision = modality.natural(100.0 * draws(50, 4, seed=seed))[1]
        values = torch.linalg.eigvalsh(precision)
        assert bool((values[..., 0] >= -1e-12 * values[..., -1]).all())
        if "rank" in options:
            assert bool((values[..., : 3 - options["rank"]].abs() <= 1e-12 * values[..., -1:]).all())
    assert modality.concave


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_the_closed_derivatives_are_those_of_autograd(options, dtype):
    modality = three(dtype, **options)
    x, theta = draws(1, 6, 4), draws(5, 1, 3, seed=1).expand(5, 6, 3)
    expected = by_autograd(modality, x, theta)
    for found in (modality.derivatives(x, theta), modality.derivatives(x, theta, *modality.prepare(x))):
        assert [t.shape for t in found] == [(5, 6), (5, 6, 3), (1, 6, 3, 3)]
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
    eta, precision = modality.natural(x[0])
    _, score, information = modality.derivatives(x[0], modality.centre)
    torch.testing.assert_close(score, eta, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(information, precision, rtol=1e-14, atol=1e-14)


def test_a_rank_below_full_says_nothing_about_the_other_directions():
    modality = three(rank=2, constant=True)
    x, theta = draws(5, 4), draws(5, 3, seed=1)
    _, precision = modality.natural(x)
    silent = torch.linalg.eigh(precision[0])[1][:, 0]
    torch.testing.assert_close(modality(x, theta + 7.0 * silent), modality(x, theta), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"constant": True}], ids=["function of x", "constant"])
def test_the_loss_converges_to_the_exact_natural_parameters_of_a_linear_problem(options):
    modality = Quadratic(nn.Identity(), ("a", "b"), (3,), centre=CENTRE, scale=SCALE, **options)
    x, theta = linear()
    loss = train(modality, x, theta)
    seen = draws(50, 3, seed=5)
    eta, precision = (t.detach() for t in modality.natural(seen))
    torch.testing.assert_close(eta, (seen - A @ CENTRE) @ SOLVED.mT, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(precision, FISHER.expand(50, 2, 2), rtol=1e-6, atol=1e-6)
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * POSTERIOR).item()
    assert loss == pytest.approx(entropy, abs=1e-9)  # in nats, in the units of θ
    information = (0.5 * math.log(2 * math.pi * math.e) + SCALE.log()).sum().item() - loss
    assert information == pytest.approx(-0.5 * torch.logdet(POSTERIOR / SCALE[:, None] / SCALE).item(), abs=1e-9)


def test_fifty_observations_add_up_to_the_exact_maximum_likelihood_fit():
    modality = Quadratic(nn.Identity(), ("a", "b"), (3,), centre=CENTRE, scale=SCALE, constant=True)
    train(modality, *linear())
    x = torch.tensor([0.9, -0.6], dtype=F64) @ A.mT + draws(50, 3, seed=8) @ torch.linalg.cholesky(NOISE).mT
    space = ParameterSpace([Parameter("a", prior=Normal(0.4, 1.5)), Parameter("b", prior=Normal(-1.0, 0.7))])
    fit = estimate(Evidence(space, {"linear": modality.eval()}, {"linear": x}))
    exact = torch.linalg.solve(FISHER, SOLVED @ x.mean(0))
    assert fit.status is Status.CONVERGED
    torch.testing.assert_close(fit.theta, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fit.information, 50 * FISHER, rtol=1e-6, atol=1e-6)
    eta, precision = (t.detach().sum(0) for t in modality.natural(x))
    torch.testing.assert_close(CENTRE + torch.linalg.solve(precision, eta), fit.theta, rtol=1e-9, atol=1e-9)


def test_the_loss_is_the_density_of_the_normal_posterior():
    modality = three()
    x, theta = draws(5, 4), draws(5, 3, seed=1)
    eta, precision = (t.detach().numpy() for t in modality.natural(x))
    expected = []
    for e, p, point in zip(eta, precision, theta.numpy(), strict=True):
        covariance = np.linalg.inv(p + np.diag([0.25, 4.0, 1.0]))
        mean = np.array([1.0, -2.0, 0.5]) + covariance @ e
        expected.append(-stats.multivariate_normal(mean, covariance).logpdf(point))
    np.testing.assert_allclose(modality.loss(x, theta).item(), np.mean(expected), rtol=1e-12)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0], dtype=F64)
    np.testing.assert_allclose(
        modality.loss(x, theta, weights).item(), np.average(expected, weights=weights.numpy()), rtol=1e-12
    )


@pytest.mark.parametrize("options", [{}, {"constant": True}, {"rank": 1}], ids=["full", "constant", "rank 1"])
def test_the_loss_of_a_set_is_that_of_its_added_evidence(options):
    modality = three(**options)
    x, theta = draws(6, 7, 4), draws(6, 3, seed=1)
    eta, precision = (t.detach().numpy().sum(1) for t in modality.natural(x))
    expected = 0.0
    for e, p, point in zip(eta, precision, theta.numpy(), strict=True):
        covariance = np.linalg.inv(p + np.diag([0.25, 4.0, 1.0]))
        mean = np.array([1.0, -2.0, 0.5]) + covariance @ e
        expected -= stats.multivariate_normal(mean, covariance).logpdf(point) / 6
    np.testing.assert_allclose(modality.loss(x, theta).item(), expected, rtol=1e-11)


def test_simulations_from_a_uniform_prior_need_weights():
    theta = torch.linspace(-6.0, 6.0, 601, dtype=F64)[:, None]
    noise = torch.from_numpy(stats.norm.ppf((np.arange(40) + 0.5) / 40))
    x = (theta + 0.8 * noise / noise.std(correction=0))[..., None]
    points, x = theta[:, None].expand(601, 40, 1), x.reshape(601, 40, 1)
    weights = Normal(0.0, 1.0).log_prob(points[..., 0]).exp()
    precisions = []
    for given in ((weights,), ()):
        modality = Quadratic(nn.Identity(), ("a",), (1,), constant=True)
        train(modality, x, points, *given)
        precisions.append(modality.natural(torch.zeros(1))[1].item())
    exact = 1.0 / 0.64
    assert precisions[0] == pytest.approx(exact, rel=1e-3)
    assert abs(precisions[1] - exact) > 0.5  # the evidence of each observation has taken up half of t² and more


def test_precision_that_depends_on_x_is_learned_where_the_data_bring_their_own_errors():
    sd = torch.tensor([0.3, 0.6, 1.0, 2.0], dtype=F64)[:, None].expand(4, 30).reshape(-1)
    value = (1 + sd.square()).sqrt() * draws(120)
    mean, spread = value / (1 + sd.square()), sd / (1 + sd.square()).sqrt()
    theta = torch.cat([mean + spread, mean - spread])[:, None]
    feature = torch.stack([value / sd.square(), 1 / sd + torch.log(-torch.expm1(-1 / sd))], -1)  # L's inverse softplus
    modality = Quadratic(nn.Identity(), ("a",), (2,))
    train(modality, feature.repeat(2, 1), theta)
    eta, precision = (t.detach()[..., 0] for t in modality.natural(feature))
    torch.testing.assert_close(eta, value / sd.square(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(precision[..., 0], sd**-2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_parameters_of_any_size_give_the_same_fit_in_their_own_units(size):
    reference = three(centre=[1.0, -2.0, 0.5], scale=[2.0, 0.5, 1.0])
    modality = three(centre=[size, -2.0 * size, 0.5 * size], scale=[2.0 * size, 0.5 * size, size])
    x, theta = draws(40, 4), draws(40, 3, seed=1)
    torch.testing.assert_close(modality(x, size * theta), reference(x, theta), rtol=1e-12, atol=1e-12)
    (value, score, information), expected = modality.derivatives(x, size * theta), reference.derivatives(x, theta)
    torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(score * size, expected[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(information * size**2, expected[2], rtol=1e-12, atol=1e-12)
    shift = 3 * math.log(size)  # the density of θ in larger units is smaller
    torch.testing.assert_close(modality.loss(x, size * theta), reference.loss(x, theta) + shift, rtol=1e-12, atol=1e-10)
    bounds = [(-50.0, 50.0)] * 3
    spaces = [ParameterSpace([Parameter(n, prior=Uniform(k * a, k * b)) for n, (a, b) in zip(NAMES, bounds, strict=True)])
              for k in (size, 1.0)]  # fmt: skip
    ours, theirs = (
        estimate(Evidence(space, {"q": m}, {"q": x}), screen=64)
        for space, m in zip(spaces, (modality, reference), strict=True)
    )
    assert ours.status is theirs.status is Status.CONVERGED
    torch.testing.assert_close(ours.theta / size, theirs.theta, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.information * size**2, theirs.information, rtol=1e-6, atol=1e-6)


def test_a_centre_far_larger_than_the_scale_keeps_its_digits():
    far = three(centre=1e9, scale=1.0)
    near = three(centre=0.0, scale=1.0)
    x, t = draws(5, 4), torch.tensor([0.5, -0.25, 2.0], dtype=F64)  # exact in float64 beside 1e9
    assert torch.equal(far(x, 1e9 + t), near(x, t))
    assert torch.equal(far.natural(x)[0], near.natural(x)[0])


def test_an_encoder_in_float32_gives_a_float64_scalar_that_does_not_depend_on_the_batch():
    modality = three(torch.float32)
    assert modality.encoder[0].weight.dtype == torch.float32
    assert modality.dtype == F64
    x, theta = draws(1000, 4), draws(3, seed=1)
    together = modality(x, theta)
    assert together.dtype == F64
    alone = torch.stack([modality(row, theta) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    wide = copy.deepcopy(modality)
    wide.encoder.double()
    assert torch.equal(together, wide(x, theta))
    fit = estimate(
        Evidence(ParameterSpace([Parameter(n, prior=Uniform(-50.0, 50.0)) for n in NAMES]), {"q": modality}, {"q": x})
    )
    assert fit.status is Status.CONVERGED
    eta, precision = (t.detach().sum(0) for t in modality.natural(x))
    torch.testing.assert_close(fit.theta, modality.centre + torch.linalg.solve(precision, eta), rtol=1e-9, atol=1e-9)


def test_the_loss_runs_the_encoder_in_its_own_dtype_and_trains_all_of_it():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(x.dtype)
            return super().forward(x)

    modality = randomised(Quadratic(Spy(4, 5), NAMES, (4,)))
    seen.clear()
    loss = modality.loss(draws(8, 4), draws(8, 3))
    modality(draws(8, 4), draws(8, 3))
    assert seen == [torch.float32, F64]
    assert loss.dtype == F64
    loss.backward()
    assert all(w.grad is not None and bool((w.grad != 0).any()) for w in modality.parameters())


def test_gradients_reach_every_weight_through_the_scalar_too():
    modality = three(torch.float32, constant=True)
    modality(draws(8, 4), draws(8, 3, seed=1)).sum().backward()
    assert all(w.grad is not None and bool((w.grad != 0).any()) for w in modality.parameters())


def test_leading_dimensions_broadcast_and_an_encoder_may_want_images():
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Flatten())
    modality = randomised(Quadratic(encoder, ("a", "b"), (1, 5, 5)))
    x, theta = draws(4, 1, 5, 5), draws(3, 1, 2, seed=1)
    grid = modality(x[None], theta)
    assert grid.shape == (3, 4)
    torch.testing.assert_close(grid[2, 1], modality(x[1], theta[2, 0]), rtol=1e-12, atol=1e-12)
    assert modality.features == 18
    scalar = randomised(Quadratic(nn.Linear(1, 4), ("a",)))
    assert scalar(draws(6), draws(6, 1)).shape == (6,)
    assert scalar.loss(draws(6), draws(6, 1)).shape == ()
    assert scalar.loss(draws(6, 9), draws(6, 1)).shape == ()


def test_building_one_draws_no_random_numbers_and_leaves_the_encoder_alone():
    encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.SiLU())
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    state = torch.random.get_rng_state()
    modality = Quadratic(encoder, NAMES, (4,))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())
    assert encoder.training
    eta, precision = modality.eval().natural(draws(4))
    assert eta.abs().max() == 0
    torch.testing.assert_close(precision, math.log(2) ** 2 * torch.eye(3, dtype=F64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_it_passes_the_battery(options, dtype):
    theta = [[0.3, -1.0, 0.7], [2.0, -2.5, -0.4]]
    report = check_modality(three(dtype, **options), theta, draws(6, 4))
    assert [check.name for check in report.checks if check.passed is None] == [
        "simulate",
        "first Bartlett identity",
        "second Bartlett identity",
        "expected information",
    ]


@pytest.mark.parametrize("options", [{}, {"rank": 1, "constant": True}], ids=["full", "rank 1 constant"])
def test_a_workspace_gives_it_back_bit_for_bit(tmp_path, options):
    modality = three(torch.float32, **options)
    registry = Registry.create(tmp_path / "w", parameters=[Parameter(n, prior=Normal(0.0, 3.0)) for n in NAMES])
    registry.append("pictures", modality)
    again = Registry.open(tmp_path / "w").modality("pictures")
    assert isinstance(again, Quadratic)
    assert again.encoder[0].weight.dtype == torch.float32
    x, theta = draws(7, 4), draws(7, 3, seed=1)
    assert torch.equal(again(x, theta), modality(x, theta))
    fit = Registry.open(tmp_path / "w").estimate({"pictures": x})
    eta, precision = (t.detach().sum(0) for t in modality.natural(x))
    if options:
        assert fit.status is Status.NOT_IDENTIFIED
    else:
        torch.testing.assert_close(
            fit.theta, modality.centre + torch.linalg.solve(precision, eta), rtol=1e-8, atol=1e-8
        )


def test_plugins_of_one_structure_are_evaluated_together_as_each_alone():
    modalities = {f"q{i}": three(torch.float32, seed=i) for i in range(9)}
    assert len({m.stack_key() for m in modalities.values()}) == 1
    data = {name: draws(11, 4, seed=20 + i) for i, name in enumerate(modalities)}
    space = ParameterSpace([Parameter(n) for n in NAMES])
    theta = draws(5, 3)
    together = Evidence(space, modalities, data)
    alone = [Evidence(space, {name: m}, {name: data[name]}) for name, m in modalities.items()]
    torch.testing.assert_close(together.value(theta), sum(e.value(theta) for e in alone), rtol=1e-12, atol=1e-12)
    at, each = together.derivatives(theta), [e.derivatives(theta) for e in alone]
    torch.testing.assert_close(at.score, sum(e.score for e in each), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at.information, sum(e.information for e in each), rtol=1e-12, atol=1e-12)


def test_what_differs_in_structure_or_is_not_known_to_is_evaluated_apart():
    class Own(nn.Linear):
        pass

    tanh = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))
    known = [three(**options) for options in HEADS.values()] + [Quadratic(tanh, NAMES, (4,)).eval()]
    assert len({m.stack_key() for m in known}) == len(known)
    assert Quadratic(Own(4, 5), NAMES, (4,)).stack_key() is None
    assert Quadratic(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), NAMES, (4,)).stack_key() is None


class Branch(nn.Module):
    """Looks at the values of x."""

    def forward(self, x):
        return x[:, :2] if float(x.sum()) > 0 else x[:, 2:]


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"encoder": lambda x: x}, "encoder must be an nn.Module, got function; wrap it in one"),
        (
            {"encoder": nn.Linear(3, 5)},
            r"encoder must map x of shape \(n, 4\) to features \(n, F\), got RuntimeError: .*; correct",
        ),
        (
            {"encoder": Branch()},
            r"got RuntimeError: .* register its tensors .* or pass features=F where it needs values",
        ),
        (
            {"encoder": nn.Unflatten(1, (2, 2))},
            r"features of shape \(n, F\) .*, got \(2, 2, 2\) of torch.float64 .*; end it",
        ),
        ({"encoder": Pair(4, 5)}, r"features of shape \(n, F\) .*, got tuple for n = 2; end it"),
        ({"features": 0}, "features must be a whole number >= 1, got 0; leave it out"),
        ({"features": 2.0}, "features must be a whole number >= 1, got 2.0; leave it out"),
        ({"rank": 4}, "rank must be a whole number from 1 to 3, got 4; leave it out"),
        ({"rank": True}, "rank must be a whole number from 1 to 3, got True"),
        ({"rank": 2, "diagonal": True}, "rank must be left out with diagonal, got 2; choose one"),
        ({"centre": [0.0, 1.0]}, r"centre must be one number or have shape \(3,\), got \(2,\); give one value"),
        ({"centre": [0.0, math.nan, 1.0]}, "centre must be finite, got nan at index 1; repair"),
        ({"centre": "prior"}, "centre must be a tensor or plain numbers, got 'prior'"),
        ({"scale": [1.0, 2.0]}, r"scale must be one number or have shape \(3,\), got \(2,\); give one value"),
        ({"scale": [1.0, -2.0, 1.0]}, "scale must be > 0, got -2 at index 1; give a positive value"),
    ],
)
def test_an_argument_that_breaks_a_rule_is_named_with_the_value_seen(kwargs, message):
    with pytest.raises(ModalityError, match=message):
        Quadratic(**{"encoder": network(), "parameter_names": NAMES, "event_shape": (4,), **kwargs})


def test_an_encoder_that_breaks_its_word_about_features_is_named():
    modality = Quadratic(network(), NAMES, (4,), features=6)
    with pytest.raises(
        ModalityError, match=r"features of shape \(n, 6\) .*, got \(2, 5\) of torch.float64 for n = 2; end"
    ):
        modality(draws(2, 4), draws(3))
    looks = Quadratic(Branch(), NAMES, (4,), features=2)  # no trial call, no trouble
    assert looks(draws(2, 4), draws(3)).shape == (2,)


def test_data_and_theta_that_do_not_belong_together_are_refused():
    modality = three()
    with pytest.raises(ModalityError, match=r"x must have shape .* event_shape \(4,\), got \(2, 3\); keep the event"):
        modality(draws(2, 3), draws(3))
    with pytest.raises(ModalityError, match=r"theta must have shape .* got \(5, 3\) and \(6, 4\); give one θ"):
        modality.loss(draws(6, 4), draws(5, 3))
    with pytest.raises(ModalityError, match=r"theta must have shape \(\*batch, 3\) .* got \(6, 2\) and \(6, 4\)"):
        modality.loss(draws(6, 4), draws(6, 2))
    with pytest.raises(ModalityError, match=r"weights must have shape \(6,\), got \(6, 1\); give one for each θ"):
        modality.loss(draws(6, 4), draws(6, 3), torch.ones(6, 1))
