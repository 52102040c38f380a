import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from engine.errors import ModalityError
from modalities import Gaussian

F64 = torch.float64
COVARIANCE = np.array([[1.0, 0.3, 0.1], [0.3, 2.0, -0.4], [0.1, -0.4, 0.5]])
T = np.array([0.1, 0.7, 1.3])


def line(theta, t):
    return theta[..., :1] + theta[..., 1:2] * t


def test_a_full_covariance_gives_the_density_of_scipy():
    gaussian = Gaussian(line, parameter_names=("a", "b"), covariance=COVARIANCE, inputs={"t": T})
    x = np.random.default_rng(0).normal(size=(20, 3))
    ours = gaussian(torch.from_numpy(x), torch.tensor([0.5, -2.0])).numpy()
    theirs = stats.multivariate_normal(0.5 - 2.0 * T, COVARIANCE).logpdf(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_independent_errors_give_the_density_of_scipy():
    x = np.random.default_rng(0).normal(size=(20, 2))
    gaussian = Gaussian(parameter_names=("a", "b"), sd=[0.5, 2.0])
    ours = gaussian(torch.from_numpy(x), torch.tensor([0.5, -2.0])).numpy()
    np.testing.assert_allclose(ours, stats.norm([0.5, -2.0], [0.5, 2.0]).logpdf(x).sum(-1), rtol=1e-12)
    scalar = Gaussian(parameter_names=("a",), sd=0.5, event_shape=())
    ours = scalar(torch.from_numpy(x[:, 0]), torch.tensor([0.5])).numpy()
    np.testing.assert_allclose(ours, stats.norm(0.5, 0.5).logpdf(x[:, 0]), rtol=1e-12)


@pytest.mark.parametrize("kind", ["covariance", "sd", "covariance of theta", "sd of theta"])
def test_missing_entries_leave_the_marginal_density_of_the_others(kind):
    sd = np.sqrt(COVARIANCE.diagonal())
    errors = {
        "covariance": {"covariance": COVARIANCE},
        "sd": {"sd": sd},
        "covariance of theta": {
            "covariance": lambda theta, t: theta[..., 1, None, None] ** 2 / 4 * torch.from_numpy(COVARIANCE)
        },
        "sd of theta": {"sd": lambda theta, t: -theta[..., 1:2] / 2 * torch.from_numpy(sd)},
    }[kind]
    matrix = COVARIANCE if "covariance" in kind else np.diag(sd**2)
    gaussian = Gaussian(line, parameter_names=("a", "b"), inputs={"t": T}, missing=True, event_shape=(3,), **errors)
    x = np.random.default_rng(1).normal(size=(8, 3))
    for i in range(8):
        x[i, [j for j in range(3) if i >> j & 1]] = math.nan
    theta = torch.tensor([0.5, -2.0], dtype=F64).expand(2, 1, 2).clone().requires_grad_()
    ours = gaussian(torch.from_numpy(x)[None], theta)
    mean = 0.5 - 2.0 * T
    for i in range(8):
        seen = ~np.isnan(x[i])
        theirs = 0.0
        if seen.any():
            theirs = stats.multivariate_normal(mean[seen], matrix[np.ix_(seen, seen)]).logpdf(x[i, seen])
        np.testing.assert_allclose(ours[0, i].item(), theirs, rtol=1e-12)
    (score,) = torch.autograd.grad(ours.sum(), theta, create_graph=True)
    (second,) = torch.autograd.grad(score.sum(), theta)
    assert bool(torch.isfinite(score).all())
    assert bool(torch.isfinite(second).all())
    assert gaussian.allows_missing


def test_a_correlated_neighbour_matters_to_what_is_left_after_a_missing_entry():
    gaussian = Gaussian(parameter_names=("a", "b", "c"), covariance=COVARIANCE, missing=True)
    independent = Gaussian(parameter_names=("a", "b", "c"), sd=np.sqrt(COVARIANCE.diagonal()), missing=True)
    x = torch.tensor([0.3, math.nan, 1.0])
    assert abs(gaussian(x, torch.zeros(3)).item() - independent(x, torch.zeros(3)).item()) > 1e-3


def test_without_missing_a_nan_stays_nan_so_that_nobody_takes_it_for_data():
    gaussian = Gaussian(parameter_names=("a",), sd=1.0)
    assert not gaussian.allows_missing
    assert math.isnan(gaussian(torch.tensor([math.nan]), torch.zeros(1)).item())


def test_the_information_of_a_line_is_that_of_least_squares():
    gaussian = Gaussian(line, parameter_names=("a", "b"), covariance=COVARIANCE, inputs={"t": T})
    design = np.stack([np.ones(3), T], -1)
    expected = design.T @ np.linalg.solve(COVARIANCE, design)
    np.testing.assert_allclose(gaussian.expected_information(torch.zeros(2)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("diagonal", [True, False])
def test_errors_that_depend_on_theta_add_half_the_trace_to_the_information(diagonal):
    def sd(theta):
        return theta[..., 1:].exp().expand(*theta.shape[:-1], 4)

    def mean(theta):
        return theta[..., :1].expand(*theta.shape[:-1], 4)

    errors = {"sd": sd} if diagonal else {"covariance": lambda theta: torch.diag_embed(sd(theta).square())}
    gaussian = Gaussian(mean, parameter_names=("a", "log_sd"), event_shape=(4,), **errors)
    information = gaussian.expected_information(torch.tensor([1.0, 0.5]))
    # D values of N(a, e^l): D / σ² about a, 2 D about l = log σ, nothing between
    torch.testing.assert_close(information, torch.diag(torch.tensor([4.0 / math.exp(1.0), 8.0], dtype=F64)))
    x = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=F64)
    ours = gaussian(x, torch.tensor([1.0, 0.5], dtype=F64)).item()
    np.testing.assert_allclose(ours, stats.norm(1.0, math.exp(0.5)).logpdf(x).sum(), rtol=1e-12)


def test_a_theta_that_gives_no_covariance_is_impossible_and_spoils_no_gradient():
    for gaussian in (
        Gaussian(parameter_names=("a",), sd=lambda theta: theta),
        Gaussian(parameter_names=("a",), covariance=lambda theta: theta[..., None]),
        Gaussian(parameter_names=("a",), covariance=lambda theta: theta[..., None], missing=True),
    ):
        theta = torch.tensor([[1.0], [0.0], [-2.0]], dtype=F64, requires_grad=True)
        value = gaussian(torch.tensor([0.5]), theta)
        assert value[1:].tolist() == [-math.inf, -math.inf]
        (score,) = torch.autograd.grad(value.sum(), theta, create_graph=True)
        (second,) = torch.autograd.grad(score.sum(), theta)
        assert bool(torch.isfinite(score).all())
        assert bool(torch.isfinite(second).all())
        assert score[1:].abs().sum() == 0
        assert gaussian.expected_information(theta.detach()).isnan().flatten().tolist() == [False, True, True]
        with pytest.raises(ModalityError, match=r"to simulate, got one that is not at θ = \[0.0\]"):
            gaussian.simulate(theta.detach(), torch.Generator())


def test_a_mean_that_overflows_is_impossible():
    def mean(theta):
        return torch.cat([theta.exp(), theta], -1)

    gaussian = Gaussian(mean, parameter_names=("a",), covariance=[[1.0, 0.5], [0.5, 1.0]])
    assert gaussian(torch.zeros(2), torch.tensor([[0.0], [1e4]])).isfinite().tolist() == [True, False]
    assert gaussian(torch.zeros(2), torch.tensor([1e4])).item() == -math.inf


def test_a_function_that_returns_nan_is_not_taken_for_an_impossible_theta():
    nan = torch.tensor(math.nan, dtype=F64)
    for errors in ({"sd": lambda theta: theta * nan}, {"covariance": lambda theta: theta[..., None] * nan}):
        gaussian = Gaussian(parameter_names=("a",), **errors)
        assert math.isnan(gaussian(torch.zeros(1), torch.ones(1)).item())


def test_a_float32_network_is_called_in_its_dtype_and_scored_in_float64():
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((1, 3), 0.1))

        def forward(self, theta, t):
            seen.extend([theta.dtype, t.dtype])
            return theta @ self.weight + t

    gaussian = Gaussian(Net(), parameter_names=("a",), sd=0.5, inputs={"t": T}, event_shape=(3,))
    value = gaussian(torch.zeros(3, dtype=F64), torch.ones(1, dtype=F64))
    assert set(seen) == {torch.float32}
    assert value.dtype == F64 == gaussian.dtype
    assert [name for name, _ in gaussian.named_parameters()] == ["mean.function.weight"]
    np.testing.assert_allclose(value.item(), stats.norm(0.1 + T, 0.5).logpdf(0.0).sum(), rtol=1e-6)


def test_a_wide_matrix_of_simulations_has_the_covariance_it_was_given():
    gaussian = Gaussian(parameter_names=("a", "b", "c"), covariance=COVARIANCE)
    x = gaussian.simulate(torch.tensor([1.0, 2.0, 3.0]).expand(200_000, 3), torch.Generator().manual_seed(0))
    np.testing.assert_allclose(x.mean(0), [1.0, 2.0, 3.0], atol=5 * math.sqrt(2.0 / 200_000))
    np.testing.assert_allclose(np.cov(x.numpy().T), COVARIANCE, atol=5 * 2.0 * math.sqrt(2.0 / 200_000))


A = {"parameter_names": ("a", "b")}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({**A}, "exactly one of covariance and sd must be given, got neither"),
        ({**A, "sd": 1.0, "covariance": [[1.0]]}, "exactly one of covariance and sd must be given, got both"),
        ({**A, "sd": [1.0, -1.0]}, "sd must be > 0, got -1 at index 1"),
        ({**A, "sd": [1.0, math.nan]}, "sd must be finite, got nan at index 1"),
        ({**A, "sd": [1.0, 2.0, 3.0]}, r"sd must be one number or have shape \(2,\), got \(3,\)"),
        ({**A, "sd": {"x": 1.0}}, "sd must be a tensor or plain numbers, got dict"),
        ({**A, "covariance": [1.0, 2.0]}, r"covariance must have shape \(2, 2\), got \(2,\)"),
        ({**A, "covariance": [[1.0, 0.5], [0.4, 1.0]]}, r"minus its transpose must be 0, got 0.1 at index \(0, 1\)"),
        ({**A, "covariance": [[1.0, 2.0], [2.0, 1.0]]}, "positive definite, got a smallest eigenvalue of -1"),
        ({**A, "covariance": [[1.0, 0.0], [0.0, -1.0]]}, "covariance's diagonal must be > 0, got -1 at index 1"),
        ({**A, "sd": 1.0, "mean": "package.module:mean"}, "got the text 'package.module:mean'; pass the function"),
        ({**A, "covariance": "package:c"}, "covariance must be a function of θ, got the text 'package:c'; pass the"),
        ({**A, "sd": 1.0, "mean": torch.zeros(2)}, "mean must be a function of θ or an nn.Module, got Tensor"),
        ({**A, "sd": 1.0, "mean": line}, "event_shape must be given where the shape of sd does not"),
        ({**A, "sd": 1.0, "mean": line, "event_shape": (2, 2)}, r"event_shape must be \(\) or \(D,\), got \(2, 2\)"),
        ({**A, "sd": 1.0, "mean": line, "event_shape": 3}, r"event_shape must be \(\) or \(D,\), got 3; write \(3,\)"),
        ({**A, "sd": 1.0, "mean": line, "event_shape": (0,)}, "at least one entry, got 0"),
        ({**A, "sd": 1.0, "event_shape": (3,)}, "must match the 2 parameters where mean is None"),
        ({**A, "sd": 1.0, "event_shape": ()}, "must match the 2 parameters where mean is None"),
        ({**A, "sd": 1.0, "inputs": {"t": T}}, r"inputs \('t',\) need a function to go to"),
        ({**A, "sd": T, "mean": line, "inputs": {"t t": T}}, "Python identifiers, got 't t'"),
        ({**A, "sd": T, "mean": line, "inputs": [T]}, "inputs must map names to numbers, got list"),
        ({**A, "sd": T, "mean": line, "inputs": {"t": "z"}, "event_shape": (3,)}, r"inputs\['t'\] must be a tensor or"),
        ({"parameter_names": "ab", "sd": 1.0}, "got the text 'ab'"),
    ],
)  # fmt: skip
def test_an_argument_that_breaks_a_rule_is_named_with_the_value_seen(kwargs, message):
    with pytest.raises(ModalityError, match=message):
        Gaussian(**kwargs)


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (lambda theta: theta[..., :1], r"mean must return shape \(\*batch, 3\), which is \(5, 3\) .* got \(5, 1\)"),
        (lambda theta: theta[0, :1].expand(3), r"got \(3,\); index θ as theta\[..., i\]"),
        (lambda theta: 1.0, "mean must return a tensor, got float"),
        (lambda theta: theta[..., :1].expand(5, 3).half(), "mean must return float32 or float64, got torch.float16"),
    ],
)
def test_a_mean_that_returns_something_else_is_named(mean, message):
    gaussian = Gaussian(mean, parameter_names=("a", "b"), sd=[1.0, 1.0, 1.0])
    with pytest.raises(ModalityError, match=message):
        gaussian(torch.zeros(3), torch.zeros(5, 2))


def linear_pair(missing=False, **errors):
    """The same affine mean as an nn.Linear, which has a closed form, and as a function, which is differentiated."""
    g = torch.Generator().manual_seed(2)
    map_ = torch.nn.Linear(3, 5, dtype=torch.float64)
    with torch.no_grad():
        map_.weight.copy_(torch.randn(5, 3, generator=g, dtype=torch.float64))
        map_.bias.copy_(torch.randn(5, generator=g, dtype=torch.float64))
    names = ("a", "b", "c")
    closed = Gaussian(map_, parameter_names=names, event_shape=(5,), missing=missing, **errors)
    plain = Gaussian(lambda t: map_(t), parameter_names=names, event_shape=(5,), missing=missing, **errors)
    return closed, plain


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("errors", ["sd", "covariance"])
def test_a_linear_mean_has_the_derivatives_of_the_same_function(errors, missing):
    given = {"sd": [0.5, 1.0, 2.0, 0.1, 3.0]}
    if errors == "covariance":
        root = torch.randn(5, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        given = {"covariance": root @ root.mT + torch.eye(5)}
    closed, plain = linear_pair(missing, **given)
    assert closed.has_derivatives
    assert closed.concave
    assert not plain.has_derivatives
    x = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if missing:
        x[0, 0, 1] = x[2, 3, 4] = torch.nan
    theta = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    s, score, information = closed.derivatives(x, theta)
    leaf = theta.expand(4, 7, 3).clone().requires_grad_()
    value = plain(x, leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    rows = [torch.autograd.grad(gradient[..., j].sum(), leaf, retain_graph=True)[0] for j in range(3)]
    assert torch.allclose(s, value, rtol=1e-12)
    assert torch.allclose(score, gradient, rtol=1e-11, atol=1e-11)
    assert torch.allclose(information.expand(4, 7, 3, 3), -torch.stack(rows, -1), rtol=1e-11, atol=1e-11)
