"""θ̂ as a torch module: values against other solvers, gradients against differences of θ̂ solved for anew, bad input."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.distributions import Normal

from engine import Ball, EstimationLayer, Linear, Parameter, ParameterSpace, PositiveSemidefinite, Simplex
from engine.errors import EstimateError, ModalityError, ObservationError, ParameterError, UnknownPluginError
from engine.estimate import estimate
from engine.evidence import Evidence
from engine.limits import Limits
from engine.modality import Modality
from modalities import Gaussian, PoissonCounts

NAMES = ("a", "b", "c")
NAN, INF = math.nan, math.inf


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


class Network(Modality):
    """x'θ − ½ θ'Qθ and a small network of both: smooth, and not concave."""

    def __init__(self, curvature, parameter_names=NAMES, size=0.5, seed=0, dtype=torch.float64):
        P = len(parameter_names)
        super().__init__(parameter_names=parameter_names, event_shape=(P,))
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))

        self.register_buffer("curvature", torch.as_tensor(curvature, dtype=torch.float64).to(dtype))
        self.inner, self.shift, self.middle = draw(6, 2 * P), draw(6), draw(6, 6)
        self.outer = nn.Parameter(size * draw(6).detach())

    def log_evidence(self, x, theta):
        x, theta = torch.broadcast_tensors(x, theta)
        hidden = torch.tanh(torch.cat([x, theta], -1) @ self.inner.mT + self.shift)
        net = nn.functional.silu(hidden @ self.middle.mT) @ self.outer
        return (x * theta).sum(-1) - 0.5 * ((theta @ self.curvature) * theta).sum(-1) + net


@dataclass
class Case:
    """One estimate, and what another solver needs: ``sides`` gives what is >= 0 and what is 0, ``active`` what holds."""

    space: ParameterSpace
    modalities: dict[str, Modality]
    data: dict[str, Tensor]
    limits: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sides: Callable[[Tensor, Mapping[str, Any]], tuple[Tensor, Tensor]] = lambda theta, limits: (theta[:0], theta[:0])
    active: tuple[int, ...] = ()
    prior: bool = False
    start: tuple[float, ...] | None = None

    def inputs(self):
        """Everything θ̂ depends on, by name."""
        out = {f"w {n} {k}": w.detach().clone() for n, m in self.modalities.items() for k, w in m.named_parameters()}
        out |= {f"x {n}": x.clone() for n, x in self.data.items()}
        return out | {f"l {n} {k}": v.clone() for n, f in self.limits.items() for k, v in f.items()}

    def nested(self, inputs):
        out: dict[str, dict[str, Tensor]] = {}
        for key, value in inputs.items():
            if key[0] == "l":
                out.setdefault(key.split(" ")[1], {})[key.split(" ")[2]] = value
        return out

    def total(self, theta, inputs):
        """S, without the engine."""
        S = torch.zeros((), dtype=torch.float64)
        for name, modality in self.modalities.items():
            weights = {k: inputs[f"w {name} {k}"] for k, _ in modality.named_parameters()}
            own = theta[self.space.indices(modality.parameter_names)]
            S = S + torch.func.functional_call(modality, weights, (inputs[f"x {name}"], own)).sum()
        if self.prior:
            S = S + sum(p.prior.log_prob(theta[i]) for i, p in enumerate(self.space) if p.prior is not None)
        return S

    def score(self, theta, inputs):
        return torch.func.grad(self.total)(theta, inputs)

    def information(self, theta, inputs):
        return -torch.func.jacrev(self.score)(theta, inputs)

    def solve(self, inputs, theta):
        """θ̂ and the multipliers on the face given, by Newton's method on the Karush-Kuhn-Tucker conditions."""
        limits, P = self.nested(inputs), len(theta)

        def holds(theta):
            unequal, equal = self.sides(theta, limits)
            return torch.cat([unequal[list(self.active)], equal])

        def conditions(z):
            pull = torch.func.vjp(holds, z[:P])[1](z[P:])[0]
            return torch.cat([self.score(z[:P], inputs) + pull, holds(z[:P])])

        normals = torch.func.jacrev(holds)(theta)
        z = torch.cat([theta, -torch.linalg.pinv(normals.mT) @ self.score(theta, inputs)])
        for _ in range(30):
            step = torch.linalg.solve(torch.func.jacrev(conditions)(z), conditions(z))
            z = z - step
            if step.abs().max() <= 4e-15 * (1.0 + z.abs().max()):
                break
        return z[:P], z[P:]

    def independent(self):
        """θ̂ of scipy's SLSQP, polished by Newton's method on the face given, and seen to be a maximum."""
        inputs, lower, upper = self.inputs(), self.space.lower, self.space.upper
        limits = self.nested(inputs)
        for name, given in limits.items():
            if name in self.space:
                i = self.space.index(name)
                lower, upper = lower.clone(), upper.clone()
                lower[i], upper[i] = given.get("lower", lower[i]), given.get("upper", upper[i])
        constraints = [
            {
                "type": kind,
                "fun": lambda t, i=i: self.sides(torch.from_numpy(t), limits)[i].numpy(),
                "jac": lambda t, i=i: torch.func.jacrev(lambda t: self.sides(t, limits)[i])(torch.from_numpy(t)).numpy(),
            }
            for i, kind in enumerate(("ineq", "eq"))
            if self.sides(self.space.interior, limits)[i].numel()
        ]
        begin = self.space.interior if self.start is None else tensor(self.start)
        found = minimize(
            lambda t: -float(self.total(torch.from_numpy(t), inputs)),
            begin.clamp(lower, upper).numpy(),
            jac=lambda t: -self.score(torch.from_numpy(t), inputs).numpy(),
            bounds=list(zip(lower.tolist(), upper.tolist(), strict=True)),
            constraints=constraints,
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 300},
        )
        theta, multipliers = self.solve(inputs, torch.from_numpy(found.x))
        assert float((theta - torch.from_numpy(found.x)).abs().max()) < 1e-4
        slack = self.sides(theta, limits)[0]
        assert (slack >= -1e-14).all()
        assert (multipliers[: len(self.active)] > 0).all()
        return theta, multipliers

    @cache  # noqa: B019
    def found(self):
        """The layer's estimate, and its gradients along one direction of θ̂, by name."""
        leaves = {k: v.requires_grad_() for k, v in self.inputs().items() if k[0] != "w"}
        data = {n: leaves[f"x {n}"][None] for n in self.data}
        fits = EstimationLayer(self.space, self.modalities, prior=self.prior).estimate(data, limits=self.nested(leaves))
        weights = {f"w {n} {k}": w for n, m in self.modalities.items() for k, w in m.named_parameters()}
        every = {**weights, **leaves}
        along = along_theta(len(self.space))
        gradients = torch.autograd.grad((fits.theta[0] * along).sum(), list(every.values()), allow_unused=True)
        return fits, {
            k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(every.items(), gradients, strict=True)
        }

    def errors(self, at, step=3e-3):
        """Of the gradients, relative, against Richardson's extrapolation of central differences; and of the naive ones.

        The naive ones are those of the implicit function theorem without constraints.
        """
        inputs, gradients = self.inputs(), self.found()[1]
        generator = torch.Generator().manual_seed(0)
        J = self.information(at, inputs)
        along, out, naive = along_theta(len(at)), {}, {}
        for key, value in inputs.items():
            way = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            way = way / way.norm()

            def solved(h, key=key, value=value, way=way):
                return self.solve(inputs | {key: value + h * way}, at)[0]

            coarse, fine = ((solved(h) - solved(-h)) / (2 * h) for h in (step, step / 2))
            slope = (4 * fine - coarse) / 3
            got = (gradients[key] * way).sum()
            off, size = float((got - slope @ along).abs()), float(slope.norm())
            if key[0] in "wx":

                def score(h, key=key, value=value, way=way):
                    return self.score(at, inputs | {key: value + h * way})

                free = torch.linalg.solve(J, torch.func.jacrev(score)(tensor(0.0)))
                naive[key] = float((free - slope).norm() / free.norm())
            if size > 1e-9:
                out[key] = off / size
            else:  # nothing there moves θ̂, and rounding is all that differences see
                assert off < 1e-11, key
        return out, naive

    def __hash__(self):
        return id(self)


def along_theta(P):
    way = torch.randn(P, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return way / way.norm()


def observations(P, shift=0.0, N=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, P, generator=generator, dtype=torch.float64) + 1.0 + torch.as_tensor(shift)


def space_of(names, *constraints, bounds=(-4.0, 4.0)):
    return ParameterSpace([Parameter(n, bounds=bounds) for n in names], list(constraints))


CURVATURE = tensor([[1.0, 0.3, 0.2], [0.3, 1.0, -0.3], [0.2, -0.3, 1.0]])


def bounds_of(space):
    def sides(theta, limits):
        out = []
        for name, given in limits.items():
            i = space.index(name)
            out += [theta[i] - given["lower"]] if "lower" in given else []
            out += [given["upper"] - theta[i]] if "upper" in given else []
        return torch.stack(out) if out else theta[:0], theta[:0]

    return sides


def boxed(limits, active, curvature=CURVATURE, **options):
    space = space_of(NAMES)
    network = Network(curvature)
    return Case(space, {"net": network}, {"net": observations(3)}, limits, bounds_of(space), active, **options)


def nearly(side):
    """A bound a millionth of a standard error above the free maximum of a, or below it."""
    free = boxed({}, ())
    theta = free.independent()[0]
    sd = free.found()[0].covariance[0, 0, 0].sqrt()
    return boxed({"a": {"upper": theta[0] + side * 1e-6 * sd}}, () if side > 0 else (0,))


def simplex(shift, active):
    names = ("a", "b", "c", "d")
    space = ParameterSpace([Parameter(n) for n in names], [Simplex(names, name="mixture")])
    data = {"net": observations(4, tensor(shift))}
    total = {"mixture": {"total": tensor(1.0)}}
    network = Network(torch.eye(4) + 0.3, names)
    return Case(
        space,
        {"net": network},
        data,
        total,
        lambda theta, limits: (theta, (theta.sum() - limits["mixture"]["total"])[None]),
        active,
    )


def rows(shift, active):
    names = ("a", "b", "c", "d")
    constraints = [
        Linear({"a": 1, "b": 2}, upper=1.0, name="budget"),
        Linear({"b": 1, "c": -1}, lower=-0.5, upper=2.0, name="band"),
        Linear({"a": 1, "d": 1, "c": 0.5}, equal=1.2, name="sum"),
    ]
    limits = {
        "budget": {"upper": tensor(1.0), "coefficients": tensor([1.0, 2.0])},
        "band": {"lower": tensor(-0.5), "upper": tensor(2.0), "coefficients": tensor([1.0, -1.0])},
        "sum": {"equal": tensor(1.2), "coefficients": tensor([1.0, 1.0, 0.5])},
        "d": {"upper": tensor(0.2)},
    }

    def sides(theta, limits):
        budget, band, total = (limits[n]["coefficients"] for n in ("budget", "band", "sum"))
        between = band[0] * theta[1] + band[1] * theta[2]
        unequal = [
            limits["budget"]["upper"] - budget[0] * theta[0] - budget[1] * theta[1],
            between - limits["band"]["lower"],
            limits["band"]["upper"] - between,
            limits["d"]["upper"] - theta[3],
        ]
        equal = total[0] * theta[0] + total[1] * theta[3] + total[2] * theta[2] - limits["sum"]["equal"]
        return torch.stack(unequal), equal[None]

    network = Network(torch.eye(4) + 0.3, names)
    space = space_of(names, *constraints)
    return Case(space, {"net": network}, {"net": observations(4, tensor(shift))}, limits, sides, active)


def in_ball(push, bend):
    limits = {"disc": {"radius": tensor(1.0), "centre": tensor([0.1, -0.1])}}

    def sides(theta, limits):
        r, centre = limits["disc"]["radius"], limits["disc"]["centre"]
        return (r**2 - (theta[:2] - centre).square().sum())[None], theta[:0]

    space = space_of(NAMES, Ball(["a", "b"], name="disc"))
    network = Network(CURVATURE - torch.diag(tensor([bend, bend, 0.0])))
    data = {"net": observations(3, tensor([push, push, 0.0]))}
    return Case(space, {"net": network}, data, limits, sides, (0,), start=(0.6, 0.6, 0.5))


def in_matrices():
    """[[a, b], [b, c]] ⪰ 0, where it has rank one."""

    def sides(theta, limits):
        return torch.stack([theta[0] * theta[2] - theta[1] ** 2, theta[0], theta[2]]), theta[:0]

    space = space_of(NAMES, PositiveSemidefinite([["a", "b"], ["b", "c"]]))
    data = {"net": observations(3, tensor([0.0, 2.0, -1.0]))}
    return Case(space, {"net": Network(torch.eye(3))}, data, {}, sides, (0,), start=(1.0, 0.5, 1.0))


def with_prior():
    space = ParameterSpace([Parameter(n, Normal(0.5 * i, 0.4), bounds=(-3.0, 3.0)) for i, n in enumerate(NAMES)])
    limits = {"b": {"upper": tensor(0.3)}}
    data = {"net": observations(3)}
    return Case(space, {"net": Network(CURVATURE)}, data, limits, bounds_of(space), (0,), prior=True)


SADDLE = CURVATURE - torch.diag(tensor([7.0, 0.0, 0.0])) + tensor([[0.0, 0.6, 0.8], [0.6, 0.0, 0.0], [0.8, 0.0, 0.0]])
CASES: dict[str, tuple[Callable[[], Case], bool]] = {  # and whether constraints matter
    "no bound": (lambda: boxed({}, ()), False),
    "one bound": (lambda: boxed({"a": {"upper": tensor(-0.2)}}, (0,)), True),
    "two bounds": (lambda: boxed({"a": {"upper": tensor(-0.6)}, "c": {"lower": tensor(2.0)}}, (0, 1)), True),
    "an indefinite Hessian": (lambda: boxed({"a": {"upper": tensor(1.0), "lower": tensor(0.2)}}, (1,), SADDLE), True),
    "a slack of 1e-6": (lambda: nearly(1.0), False),
    "a multiplier of 1e-6": (lambda: nearly(-1.0), True),
    "two fractions of zero": (lambda: simplex([0.0, 0.0, 0.0, 0.0], (0, 2)), True),
    "a vertex of the simplex": (lambda: simplex([4.0, 0.0, -1.0, -1.0], (1, 2, 3)), True),
    "one inequality and one equality": (lambda: rows([0.0, -4.0, 0.0, -3.0], (1,)), True),
    "three inequalities and one equality": (lambda: rows([0.0, 0.0, 0.0, 0.0], (0, 1, 3)), True),
    "a prior and a bound": (with_prior, True),
    "a ball": (lambda: in_ball(3.0, 0.0), True),
    "a ball where S is convex": (lambda: in_ball(3.0, 2.0), True),
    "a matrix of rank one": (in_matrices, True),
}
CONIC = ("a ball", "a ball where S is convex", "a matrix of rank one")


@pytest.mark.parametrize("name", CASES)
def test_estimate_and_gradients_are_exact(name):
    """To 1e-8 standard errors and 1e-7 (1e-6 with cones); without the constraint the gradients are off by over 0.05."""
    case, bites = CASES[name][0](), CASES[name][1]
    theta, _ = case.independent()
    unit = case.information(theta, case.inputs()).diagonal().abs().rsqrt()
    off = float(((case.found()[0].theta[0].detach() - theta) / unit).abs().max())
    errors, naive = case.errors(theta)
    print(f"{name}: θ̂ {off:.1e}, gradients {max(errors.values()):.1e}, naive {min(naive.values()):.2f}")
    assert off < 1e-8
    assert max(errors.values()) < (1e-6 if name in CONIC else 1e-7)
    assert not bites or min(naive.values()) > 0.05


def test_cases_are_what_their_names_say():
    saddle, slack, multiplier = (CASES[n][0]() for n in list(CASES)[3:6])
    theta, multipliers = saddle.independent()
    values = torch.linalg.eigvalsh(saddle.information(theta, saddle.inputs()))
    assert values[0] < -10.0
    assert torch.linalg.eigvalsh(saddle.information(theta, saddle.inputs())[1:, 1:])[0] > 1.0
    theta, _ = slack.independent()
    sd = slack.found()[0].covariance[0, 0, 0].sqrt()
    assert 0.99e-6 < float((slack.limits["a"]["upper"] - theta[0]) / sd) < 1.01e-6
    _, multipliers = multiplier.independent()
    assert 0.5e-6 < float(multipliers[0] * sd) < 2e-6
    convex = CASES["a ball where S is convex"][0]()
    theta, _ = convex.independent()
    values = torch.linalg.eigvalsh(convex.information(theta, convex.inputs()))
    assert values[1] < -1.0  # so that the tangent of the ball has one, too


class Matrix(Modality):
    """A measured symmetric matrix, a constant offset: −½ ‖M(θ) − X − B‖² of the entries on and below the diagonal."""

    def __init__(self, size=3):
        names = tuple(f"m{i}{j}" for i in range(size) for j in range(i + 1))
        super().__init__(parameter_names=names, event_shape=(len(names),))
        self.offset = nn.Parameter(0.1 * torch.arange(len(names), dtype=torch.float64))
        twice = [1.0 if i == j else 2.0 for i in range(size) for j in range(i + 1)]
        self.register_buffer("weight", tensor(twice))

    def log_evidence(self, x, theta):
        return -0.5 * (self.weight * (theta - x - self.offset) ** 2).sum(-1)


@pytest.mark.parametrize("rank", [1, 2])
def test_covariance_matrix_of_lower_rank_is_the_projection(rank):
    """Of a measured matrix: its negative eigenvalues cut off (Higham 1988). Gradients against differences of that."""
    modality, spread = Matrix(), torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    axes = torch.linalg.qr(spread)[0]
    X = (axes * tensor([2.0, 1.0, -0.7] if rank == 2 else [2.0, -0.4, -1.1])) @ axes.mT
    i, j = torch.tril_indices(3, 3)
    names = [[f"m{max(i, j)}{min(i, j)}" for j in range(3)] for i in range(3)]
    space = ParameterSpace([Parameter(n) for n in modality.parameter_names], [PositiveSemidefinite(names)])
    x = (X[i, j] - modality.offset.detach()).requires_grad_()

    def projected(x, offset):
        M = torch.zeros(3, 3, dtype=torch.float64)
        M[i, j] = M[j, i] = x + offset
        values, vectors = torch.linalg.eigh(M)
        return ((vectors * values.clamp_min(0.0)) @ vectors.mT)[i, j]

    theta = EstimationLayer(space, {"cov": modality})({"cov": x[None]})
    along = along_theta(6)
    to_x, to_offset = torch.autograd.grad((theta * along).sum(), [x, modality.offset])
    with torch.no_grad():
        assert (theta - projected(x, modality.offset)).abs().max() < 1e-8
        h, differences = 1e-3, []
        for k in range(6):
            way = torch.eye(6, dtype=torch.float64)[k]
            a, b = (
                (projected(x + s * way, modality.offset) - projected(x - s * way, modality.offset)) @ along / (2 * s)
                for s in (h, h / 2)
            )
            differences.append((4 * b - a) / 3)
    slope = torch.stack(differences)
    assert (to_x - slope).norm() < 1e-6 * slope.norm()
    assert (to_offset - slope).norm() < 1e-6 * slope.norm()
    assert (along - slope).norm() > 0.05 * slope.norm()  # without the constraint


def test_concave_evidence_in_a_ball_is_the_nearest_point():
    x = tensor([[3.0, 4.0], [0.3, 0.4]]).requires_grad_()
    space = space_of(("a", "b"), Ball(["a", "b"], radius=2.0, name="disc"))
    radius = tensor([2.0, 2.0]).requires_grad_()
    layer = EstimationLayer(space, {"g": Gaussian(parameter_names=("a", "b"), sd=1.0, event_shape=(2,))})
    theta = layer({"g": x[:, None]}, batched=True, limits={"disc": {"radius": radius}})
    assert (theta - tensor([[1.2, 1.6], [0.3, 0.4]])).abs().max() < 1e-9
    (theta @ tensor([1.0, 0.0])).sum().backward()
    # of 2 x / |x|: 2 (1 − x x'/|x|²) / |x| and x / |x|; inside, 1 and 0
    assert (x.grad - tensor([[0.256, -0.192], [1.0, 0.0]])).abs().max() < 1e-6
    assert (radius.grad - tensor([0.6, 0.0])).abs().max() < 1e-6
