"""θ̂ as a torch module: values against other solvers, gradients against differences of θ̂ solved for anew, bad input."""

import copy
import math
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
                "jac": lambda t, i=i: torch.func.jacrev(lambda t: self.sides(t, limits)[i])(
                    torch.from_numpy(t)
                ).numpy(),
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

    def errors(self, at, step=1e-3):
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


def nearly_in_row(side):
    """The same of a + 2 b ≤ limit."""
    free = boxed({}, ())
    theta = free.independent()[0]
    C = free.found()[0].covariance[0]
    way = tensor([1.0, 2.0, 0.0])
    upper = way @ theta + side * 1e-6 * (way @ C @ way).sqrt()
    limits = {"budget": {"upper": upper, "coefficients": tensor([1.0, 2.0])}}

    def sides(theta, limits):
        a, b = limits["budget"]["coefficients"]
        return (limits["budget"]["upper"] - a * theta[0] - b * theta[1])[None], theta[:0]

    space = space_of(NAMES, Linear({"a": 1, "b": 2}, upper=9.0, name="budget"))
    return Case(space, free.modalities, free.data, limits, sides, () if side > 0 else (0,))


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
    "a slack of 1e-6 in a row": (lambda: nearly_in_row(1.0), False),
    "a multiplier of 1e-6 in a row": (lambda: nearly_in_row(-1.0), True),
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


# Batches


class Pair(Modality):
    """a from x₀, b from x₁ with the weight x₂²; x₀ of a thousand or more is impossible. One weight is shared."""

    def __init__(self):
        super().__init__(parameter_names=("a", "b"), event_shape=(3,))
        self.gain = nn.Parameter(tensor(1.3))

    def log_evidence(self, x, theta):
        s = -0.5 * (theta[..., 0] - torch.sin(self.gain) * x[..., 0]) ** 2
        s = s - 0.5 * (x[..., 2] * (theta[..., 1] + 0.1 * theta[..., 0] - self.gain * x[..., 1])) ** 2
        return torch.where(x[..., 0] >= 1e3, -INF, s + 0.0 * theta[..., 0])


def some_sets(B=5, N=4):
    generator = torch.Generator().manual_seed(11)
    return torch.cat([torch.randn(B, N, 2, generator=generator), torch.ones(B, N, 1)], -1).double()


SPACES = {
    "bounds": ParameterSpace([Parameter("a", bounds=(-0.5, 3.0)), Parameter("b", bounds=(-3.0, 0.4))]),
    "rows": space_of(("a", "b"), Linear({"a": 1, "b": 1}, upper=0.5, name="budget")),
    "cones": space_of(("a", "b"), Ball(["a", "b"], radius=0.6, name="disc")),
}


@pytest.mark.parametrize("kind", SPACES)
def test_batch_is_its_single_data_sets(kind):
    modality = Pair()
    layer = EstimationLayer(SPACES[kind], {"pair": modality})
    x = some_sets().requires_grad_()
    upper = torch.linspace(-0.4, 2.0, 5, dtype=torch.float64, requires_grad=True)
    along = torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = layer({"pair": x}, batched=True, limits={"a": {"upper": upper}})
    together = torch.autograd.grad((whole * along).sum(), [x, upper, modality.gain])
    singles = [layer({"pair": x[b]}, limits={"a": {"upper": upper[b]}}) for b in range(5)]
    alone = torch.autograd.grad((torch.stack(singles) * along).sum(), [x, upper, modality.gain])
    tolerance = 1e-8 if kind == "cones" else 1e-12
    assert whole.shape == (5, 2)
    assert (torch.stack(singles) - whole).abs().max() < tolerance
    for a, b in zip(together, alone, strict=True):
        assert (a - b).abs().max() < tolerance * (1.0 + b.abs().max())
    assert (together[1] != 0).any() or kind == "cones"


def test_masked_observations_do_not_count():
    modality, x = Pair(), some_sets()
    layer = EstimationLayer(SPACES["bounds"], {"pair": modality})
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 1, 1]]).bool()
    filled = torch.where(mask[..., None], x, NAN).requires_grad_()
    theta = layer({"pair": filled}, batched=True, mask={"pair": mask})
    theta.sum().backward()
    gain, modality.gain.grad = modality.gain.grad, None
    short = [x[b][mask[b]].clone().requires_grad_() for b in range(5)]
    singles = [layer({"pair": s}) for s in short]
    torch.stack(singles).sum().backward()
    assert (theta - torch.stack(singles)).abs().max() < 1e-12
    assert (gain - modality.gain.grad).abs() < 1e-12
    assert (filled.grad[~mask] == 0).all()
    assert (filled.grad[mask] - torch.cat([s.grad for s in short])).abs().max() < 1e-12


def test_data_set_of_which_nothing_is_left_is_not_identified():
    layer = EstimationLayer(SPACES["bounds"], {"pair": Pair()})
    x, mask = some_sets(3), torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    fits = layer.estimate({"pair": x}, mask={"pair": mask})
    assert fits.status[1] == "not_identified"
    assert fits.theta[1].isnan().all()
    assert torch.isfinite(fits.theta[[0, 2]]).all()


BAD = {1: "impossible", 3: "unidentified", 4: "infeasible"}


def bad_rows():
    """Five good data sets among eight, and limits for each."""
    good = some_sets()
    x = good[[0, 0, 1, 0, 0, 2, 3, 4]].clone()
    x[1, 0, 0] = 2e3
    x[3, :, 2] = 0.0
    upper = torch.full((8,), 2.0, dtype=torch.float64)
    lower = torch.full((8,), -0.3, dtype=torch.float64)
    lower[4] = 2.5
    return good, x, lower, upper, [b for b in range(8) if b not in BAD]


@pytest.mark.parametrize("failed", ["nan", "zero"])
@pytest.mark.parametrize("kind", SPACES)
def test_bad_data_sets_disturb_no_others(kind, failed):
    good, x, lower, upper, fine = bad_rows()
    modality = Pair()
    layer = EstimationLayer(SPACES[kind], {"pair": modality}, failed=failed)
    inputs = [t.requires_grad_() for t in (x, lower, upper)]
    fits = layer.estimate({"pair": x}, limits={"a": {"lower": lower, "upper": upper}})
    kept = [good.requires_grad_(), lower.detach()[fine].requires_grad_(), upper.detach()[fine].requires_grad_()]
    clean = layer.estimate({"pair": kept[0]}, limits={"a": {"lower": kept[1], "upper": kept[2]}})

    assert fits.status[1] == "failed"
    assert "−∞" in fits.reason[1]
    assert fits.status[3] == "not_identified"
    assert "b" in fits.reason[3]
    assert fits.status[4] == "failed"
    assert "infeasible" in fits.reason[4]
    assert [fits.status[b] for b in fine] == clean.status
    tolerance = 1e-8 if kind == "cones" else 1e-12
    assert fits.theta[list(BAD)].isnan().all()
    assert fits.covariance[list(BAD)].isnan().all()
    assert (fits.theta[fine] - clean.theta).abs().max() < tolerance
    assert (fits.covariance[fine] - clean.covariance).abs().max() < tolerance

    fits.theta.nansum().backward()
    gain, modality.gain.grad = modality.gain.grad, None
    clean.theta.sum().backward()
    for given, alone in zip(inputs, kept, strict=True):
        assert (given.grad[fine] - alone.grad).abs().max() < tolerance
        lost = given.grad[list(BAD)]
        assert lost.isnan().all() if failed == "nan" else (lost == 0).all()
    if failed == "nan":
        assert gain.isnan()
    else:
        assert (gain - modality.gain.grad).abs() < tolerance


@pytest.mark.parametrize("failed", ["nan", "zero"])
def test_batch_without_any_answer_still_has_gradients(failed):
    modality = Pair()
    layer = EstimationLayer(SPACES["bounds"], {"pair": modality}, failed=failed)
    x = some_sets(2)
    x[:, 0, 0] = 2e3
    theta = layer({"pair": x.requires_grad_()}, batched=True)
    theta.sum().backward()
    assert theta.isnan().all()
    assert x.grad.isnan().all() if failed == "nan" else (x.grad == 0).all()
    assert modality.gain.grad.isnan() if failed == "nan" else modality.gain.grad == 0


def test_empty_batch_gives_an_empty_answer():
    modality = Pair()
    layer = EstimationLayer(SPACES["bounds"], {"pair": modality})
    theta = layer({"pair": torch.zeros(0, 4, 3)}, batched=True)
    fits = layer.estimate({"pair": torch.zeros(0, 4, 3)})
    assert theta.shape == (0, 2)
    assert theta.dtype == torch.float64
    assert (fits.covariance.shape, fits.status, fits.reason) == ((0, 2, 2), [], [])
    theta.sum().backward()  # as in a loop that trains
    assert modality.gain.grad == 0


def test_weights_of_plugins_without_data_have_no_gradient():
    used, other = Pair(), Pair()
    layer = EstimationLayer(SPACES["bounds"], {"used": used, "other": other})
    x = some_sets(2)
    x[1, 0, 0] = 2e3
    layer({"used": x}, batched=True).nansum().backward()
    assert used.gain.grad.isnan()
    assert other.gain.grad is None


# A good citizen of torch


def two_bounded(dtype=torch.float64):
    space = ParameterSpace([Parameter(n, bounds=(-2.0, 0.8)) for n in NAMES])
    return EstimationLayer(space, {"net": Network(CURVATURE, dtype=dtype)}, screen=256)


def many_sets(B=6):
    return torch.stack([observations(3, seed=s) for s in range(B)])


def test_global_state_of_torch_and_numpy_stays():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    for kind in SPACES:
        layer = EstimationLayer(SPACES[kind], {"pair": Pair()})
        x = some_sets(2).requires_grad_()
        layer({"pair": x}, batched=True, limits={"a": {"upper": 1.0}}).sum().backward()
    with pytest.raises(ModalityError):
        Raises.layer()({"x": torch.ones(1)})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert torch.is_grad_enabled()


def test_two_threads_give_the_same_bits():
    def answer():
        layer, x = two_bounded(), many_sets().requires_grad_()
        theta = layer({"net": x}, batched=True)
        return theta.detach(), *torch.autograd.grad(theta.sum(), [x, *layer.parameters()])

    threads = torch.get_num_threads()
    one = answer()
    try:
        torch.set_num_threads(2)
        two = answer()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_default_dtype_makes_no_difference():
    wanted = two_bounded()({"net": many_sets()}, batched=True, limits={"a": {"upper": 0.1}})
    try:
        torch.set_default_dtype(torch.float64)
        seen = two_bounded()({"net": many_sets()}, batched=True, limits={"a": {"upper": 0.1}})
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(seen, wanted)


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_give_the_same(mode, kind):
    layer = EstimationLayer(SPACES[kind], {"pair": Pair()})
    wanted = layer({"pair": some_sets(2)}, batched=True).detach()
    with mode():
        x = some_sets(2) + 0.0
        seen = layer({"pair": x}, batched=True, limits={"a": {"upper": torch.tensor(3.9)}})
        wide = layer({"pair": x}, batched=True)
    assert not seen.requires_grad
    assert not wide.requires_grad
    assert torch.equal(wide, wanted)
    later = layer({"pair": x}, batched=True)  # what was made in inference mode is data like any other
    later.sum().backward()
    assert torch.equal(later.detach(), wanted)


def test_float32_plugins_and_data_are_good_to_their_precision():
    wide, narrow = two_bounded(), two_bounded(torch.float32)
    x = many_sets().float()
    theta, coarse = wide({"net": x}, batched=True), narrow({"net": x.requires_grad_()}, batched=True)
    assert coarse.dtype == torch.float64
    assert (theta - coarse).abs().max() < 1e-5
    a = torch.autograd.grad(theta.sum(), list(wide.parameters()))
    *b, to_x = torch.autograd.grad(coarse.sum(), [*narrow.parameters(), x])
    assert to_x.dtype == torch.float32
    for wanted, seen in zip(a, b, strict=True):
        assert seen.dtype == torch.float32
        assert (seen - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_float32_plugin_with_many_observations_has_an_answer():
    """Where rounding of the score is 1e-5 standard errors, and more."""
    x = observations(3, N=20_000, seed=3)
    space = ParameterSpace([Parameter(n, bounds=(-4.0, 4.0)) for n in NAMES])
    networks = [Network(CURVATURE, seed=3, dtype=d) for d in (torch.float32, torch.float64)]
    coarse, fine = (
        EstimationLayer(space, {"net": n}, screen=0)({"net": x}, start=0.5 + torch.zeros(3)) for n in networks
    )
    assert (coarse - fine).abs().max() < 1e-5


def test_layer_is_a_module_like_any_other():
    first, second = Network(CURVATURE), Network(CURVATURE, seed=4)
    space = ParameterSpace([Parameter(n, bounds=(-2.0, 0.8)) for n in NAMES])
    layer = EstimationLayer(space, {"one": first, "two": second}, screen=64)
    assert {id(w) for w in layer.parameters()} == {id(w) for m in (first, second) for w in m.parameters()}
    data = {"one": many_sets(2), "two": many_sets(3)[1:]}
    theta = layer(data, batched=True).detach()

    twin = copy.deepcopy(layer)
    assert torch.equal(twin(data, batched=True), theta)
    with torch.no_grad():
        for w in twin.parameters():
            w.mul_(0.7)
    assert torch.equal(layer(data, batched=True), theta)  # weights of its own
    assert not torch.equal(twin(data, batched=True), theta)

    other = EstimationLayer(space, {"one": Network(CURVATURE, seed=8), "two": Network(CURVATURE, seed=9)}, screen=64)
    assert set(other.state_dict()) == {f"modalities.{n}.{k}" for n in ("one", "two") for k in first.state_dict()}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(data, batched=True), theta)


def test_plugin_may_be_called_what_modules_call_their_own():
    x = many_sets(1)[0]
    networks = {n: Network(CURVATURE, seed=i) for i, n in enumerate(("keys", "training", "a.b", "a:b", "plugin:a:b"))}
    space = space_of(NAMES)
    layer = EstimationLayer(space, networks, screen=64)
    plain = EstimationLayer(space, dict(zip("pqrst", networks.values(), strict=True)), screen=64)
    data = {name: x + i for i, name in enumerate(networks)}
    wanted = plain(dict(zip("pqrst", data.values(), strict=True)))
    assert (layer(data) - wanted).abs().max() < 1e-12
    assert len(layer.state_dict()) == 5 * len(networks["keys"].state_dict())


def test_training_through_the_layer_reduces_the_loss():
    space = ParameterSpace([Parameter("a", bounds=(-1.0, 1.0)), Parameter("b", bounds=(-1.0, 1.0))])
    modality = Pair()
    layer = EstimationLayer(space, {"pair": modality})
    x = some_sets(16)
    target = layer({"pair": x}, batched=True).detach()
    with torch.no_grad():
        modality.gain.fill_(0.9)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(16):
        optimiser.zero_grad()
        loss = (layer({"pair": x}, batched=True) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert abs(modality.gain.item() - 1.3) < 0.1


@pytest.mark.parametrize("kind", SPACES)
def test_second_derivatives_are_refused(kind):
    modality = Pair()
    theta = EstimationLayer(SPACES[kind], {"pair": modality})({"pair": some_sets(1)}, batched=True)
    (slope,) = torch.autograd.grad(theta.square().sum(), modality.gain, create_graph=True)
    with pytest.raises(EstimateError, match="first derivatives only"):
        torch.autograd.grad(slope.sum(), modality.gain, retain_graph=True)
    with pytest.raises(EstimateError, match="first derivatives only"):
        slope.backward()


class Powers(Modality):
    """θ̂ = (1/x, x³): S is not quadratic in x."""

    def __init__(self, parameter_names=("a", "b")):
        super().__init__(parameter_names=parameter_names, event_shape=())

    def log_evidence(self, x, theta):
        a, b = theta.unbind(-1)
        return a.log() - a * x - 0.5 * (b - x**3) ** 2


@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_along_the_data_are_refused_too(power):
    """Also those of a loss that is linear in θ̂, whose cotangents have no graph."""
    space = ParameterSpace([Parameter("a", bounds=(1e-3, 50.0)), Parameter("b", bounds=(-5.0, 5.0))])
    x = tensor([[0.8]]).requires_grad_()
    theta = EstimationLayer(space, {"m": Powers()})({"m": x}, batched=True)
    (slope,) = torch.autograd.grad((theta**power).sum(), x, create_graph=True)
    with pytest.raises(EstimateError, match="first derivatives only"):
        torch.autograd.grad(slope.sum(), x)


def test_what_requires_no_gradient_gives_none():
    layer = EstimationLayer(space_of("a"), {"g": Gaussian(parameter_names=("a",), sd=1.0)})
    assert not layer({"g": tensor([[0.2]])}).requires_grad


def test_counts_of_zero_are_held_by_the_bound():
    """S is linear in the strength there: no curvature, but nothing to doubt."""
    counts = PoissonCounts(signal=[5.0, 9.0], background=[0.5, 0.4], strength="mu")
    layer = EstimationLayer(ParameterSpace([Parameter("mu", bounds=(0.0, 10.0))]), {"n": counts})
    x = tensor([[[0.0, 0.0]], [[3.0, 5.0]]]).requires_grad_()
    found = layer.estimate({"n": x})
    assert [str(s) for s in found.status] == ["at_bound", "converged"]
    found.theta.sum().backward()
    assert found.theta[0].item() == 0.0
    assert bool((x.grad[0] == 0.0).all())
    assert bool((x.grad[1] > 0.0).all())


def test_layer_and_estimate_agree():
    network, x = Network(CURVATURE), observations(3)
    space = ParameterSpace([Parameter(n, Normal(0.0, 1.0), bounds=(-2.0, 0.8)) for n in NAMES])
    for prior in (False, True):
        fit = estimate(Evidence(space, {"net": network}, {"net": x}, prior=prior))
        fits = EstimationLayer(space, {"net": network}, prior=prior).estimate({"net": x[None]})
        assert (fits.theta[0] - fit.theta).abs().max() < 1e-10
        assert (fits.covariance[0] - fit.covariance).abs().max() < 1e-10
        assert fits.status[0] == fit.status


# Limits given at the call


class Waves(Modality):
    """cos 4θ, damped: seven maxima between −4 and 4, the highest near 0."""

    def __init__(self):
        super().__init__(parameter_names=("a",), event_shape=(1,))

    def log_evidence(self, x, theta):
        return 20.0 * torch.cos(4.0 * theta[..., 0]) - 2.0 * (theta[..., 0] - x[..., 0]) ** 2


@pytest.mark.parametrize(
    ("low", "high"), [(-4.0, 4.0), (1.0, 1.3), (-3.9, -0.6), (2.2, 40.0), (6.5, 9.0), (-40.0, -30.0), (0.0, 0.0)]
)
def test_global_maximum_is_found_inside_limits(low, high):
    layer = EstimationLayer(ParameterSpace([Parameter("a", bounds=(-4.0, 4.0))]), {"waves": Waves()})
    x = tensor([[[0.1]], [[0.2]]])
    grid = torch.linspace(low, high, 400_001, dtype=torch.float64)[:, None]
    lower, upper = tensor([low, -4.0]), tensor([high, 4.0])
    fits = layer.estimate({"waves": x}, limits={"a": {"lower": lower, "upper": upper}})
    S = Waves()(x[0], grid)
    assert (fits.theta[0] - grid[S.argmax()]).abs() < 1e-4
    assert float(Waves()(x[0], fits.theta[:1].detach())) >= float(S.max()) - 1e-9
    assert abs(fits.theta[1].item() - 0.0024) < 1e-2  # as without limits


def test_global_maximum_is_found_inside_a_narrower_simplex():
    """Of two peaks inside a row's limits, where the declared set has a third that is higher than both."""

    class Peaks(Modality):
        def __init__(self):
            super().__init__(parameter_names=("a", "b"), event_shape=(1,))

        def log_evidence(self, x, theta):
            peaks = [((3.0, 3.0), 60.0), ((-1.0, -2.0), 25.0), ((0.4, -1.0), 35.0)]
            s = [h * torch.exp(-3.0 * (theta - tensor(c)).square().sum(-1)) for c, h in peaks]
            return sum(s) + 0.0 * x[..., 0]

    space = space_of(("a", "b"), Linear({"a": 1, "b": 1}, upper=7.0, name="budget"))
    layer = EstimationLayer(space, {"peaks": Peaks()})
    theta = layer({"peaks": torch.zeros(1, 1)}, limits={"budget": {"upper": 0.0}})
    assert (theta - tensor([0.4, -1.0])).abs().max() < 1e-3


def test_limits_that_hold_a_component_share_its_derivative():
    lower, upper = tensor(0.3).requires_grad_(), tensor(0.3).requires_grad_()
    layer = EstimationLayer(SPACES["bounds"], {"pair": Pair()})
    theta = layer({"pair": some_sets(1)[0]}, limits={"a": {"lower": lower, "upper": upper}})
    theta.sum().backward()
    assert theta[0] == 0.3
    assert abs(lower.grad + upper.grad - 0.9) < 1e-12  # 1, and −0.1 of b
    assert lower.grad == upper.grad


def test_fractions_stay_fractions_whatever_bounds_are_given():
    space = ParameterSpace([Parameter(n) for n in "ab"], [Simplex(["a", "b"], name="mix")])
    limits = Limits(space, {"a": {"lower": tensor([-1.0, 0.2])}}, 2)
    assert limits.inside(torch.arange(2)).lower.tolist() == [[0.0, 0.0], [0.2, 0.0]]


def test_shared_limit_has_the_sum_of_gradients():
    x, modality = some_sets(), Pair()
    layer = EstimationLayer(SPACES["bounds"], {"pair": modality})
    each, shared = torch.full((5,), -0.4, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    a = layer({"pair": x}, batched=True, limits={"a": {"upper": each.requires_grad_()}})
    b = layer({"pair": x}, batched=True, limits={"a": {"upper": shared.requires_grad_()}})
    a.sum().backward()
    b.sum().backward()
    assert (a - b).abs().max() < 1e-12
    assert abs(each.grad.sum() - shared.grad) < 1e-12
    assert shared.grad > 1.0


# Input that cannot be used


def pair_layer(kind="rows", **options):
    return EstimationLayer(SPACES[kind], {"pair": Pair()}, **options)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"a": {"upper": NAN}}, "upper of 'a' must be a number, got NaN"),
        ({"a": {"upper": tensor([0.0, NAN])}}, r"got NaN at index \[1\]; use ±inf"),
        ({"a": {"upper": "low"}}, "must be a number or a tensor, got 'low'"),
        ({"a": {"upper": None}}, "must be a number or a tensor, got None"),
        ({"a": {"upper": torch.zeros(3)}}, r"must have shape \(\) or \(2,\), got \(3,\)"),
        ({"a": {"equal": 1.0}}, "'a' takes lower, upper, got 'equal'"),
        ({"a": 1.0}, "are written"),
        ({"c": {"upper": 1.0}}, "no parameter or constraint 'c'; there are a, b, budget"),
        ({"budget": {"lower": 1.0}}, "'budget' takes upper, coefficients, got 'lower': it was not declared"),
        ({"budget": {"coefficients": tensor([1.0, INF])}}, "must be finite, got inf"),
        ({"budget": {"coefficients": {"a": 1.0}}}, "must be a number or a tensor"),
        (3.0, "limits map names to their numbers"),
    ],
)
def test_limits_that_are_none_are_refused(limits, words):
    with pytest.raises(ParameterError, match=words):
        pair_layer()({"pair": some_sets(2)}, batched=True, limits=limits)


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("bounds", {"a": {"lower": 1.0, "upper": 0.9}}),
        ("bounds", {"a": {"upper": -INF}}),
        ("rows", {"a": {"lower": 1.0}, "b": {"lower": 1.0}}),
        ("rows", {"budget": {"upper": -INF}}),
        ("cones", {"disc": {"radius": -1.0}}),
        ("cones", {"disc": {"centre": tensor([9.0, 0.0])}}),
    ],
)
def test_limits_that_conflict_are_infeasible(kind, limits):
    fits = pair_layer(kind).estimate({"pair": some_sets(1)}, limits=limits)
    assert fits.status == ["failed"]
    assert "infeasible" in fits.reason[0]
    assert fits.theta.isnan().all()


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ({"other": torch.ones(1, 3)}, UnknownPluginError, "no plugin 'other'; there are pair"),
        ({}, ObservationError, "no data"),
        (torch.ones(1, 3), ObservationError, "data maps plugin names to observations, got Tensor"),
        ({"pair": torch.ones(0, 3)}, ObservationError, "0 observations"),
        ({"pair": torch.ones(4, 2)}, ObservationError, r"shape \(B, N, 3\), got \(1, 4, 2\)"),
        ({"pair": torch.ones(3)}, ObservationError, r"shape \(B, N, 3\)"),
        ({"pair": torch.tensor(1.0)}, ObservationError, "got one number"),
        ({"pair": torch.full((1, 3), NAN)}, ObservationError, "values must be finite, got nan"),
        ({"pair": torch.ones(1, 3).half()}, ObservationError, "float16"),
        ({"pair": "text"}, ObservationError, "data must be float32, float64 or integers"),
        ({"pair": [[1.0, 2.0, 3.0], [1.0]]}, ObservationError, "pad data sets to one length"),
        ({"pair": [torch.ones(2, 3), torch.ones(1, 3)]}, ObservationError, "pad them to one length"),
    ],
)
def test_data_that_are_none_are_refused(x, error, words):
    with pytest.raises(error, match=words):
        pair_layer()(x)


def test_batched_data_need_an_axis_for_observations():
    with pytest.raises(ObservationError, match="add an axis"):
        pair_layer()({"pair": torch.ones(4, 3)}, batched=True)
    with pytest.raises(ObservationError, match="a mask needs batched=True"):
        pair_layer()({"pair": torch.ones(4, 3)}, mask={"pair": torch.ones(4).bool()})
    with pytest.raises(ObservationError, match=r"boolean of shape .*\(2, 4\)"):
        pair_layer()({"pair": torch.ones(2, 4, 3)}, batched=True, mask={"pair": torch.ones(4).bool()})


def test_numbers_in_lists_keep_their_digits():
    layer = EstimationLayer(
        ParameterSpace([Parameter("a")]), {"g": Gaussian(parameter_names=("a",), sd=1.0, event_shape=(1,))}
    )
    assert layer({"g": [[0.1], [0.3]]}).item() == pytest.approx(0.2, abs=1e-15)
    assert layer({"g": np.array([[0.1], [0.3]])}).item() == pytest.approx(0.2, abs=1e-15)
    x = tensor(0.3).requires_grad_()
    layer({"g": [tensor([0.1]), x[None]]}).backward()
    assert x.grad == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: EstimationLayer(SPACES["bounds"], {}), ModalityError, "at least one modality"),
        (lambda: EstimationLayer(SPACES["bounds"], {"x": nn.Linear(1, 1)}), ModalityError, "got Linear as 'x'"),
        (lambda: EstimationLayer(space_of("a"), {"x": Pair()}), ModalityError, "'b', which is not among a"),
        (lambda: pair_layer(failed="none"), ParameterError, "must be 'nan' or 'zero'"),
        (lambda: pair_layer(polish=0), EstimateError, "polish=0"),
        (lambda: pair_layer(screen=-1), EstimateError, "screen=-1"),
        (lambda: pair_layer(screen=0)({"pair": some_sets(1)[0]}), EstimateError, "or a start given"),
    ],
)
def test_layer_that_makes_no_sense_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


class Raises(Modality):
    def __init__(self):
        super().__init__(parameter_names=("a",))

    def log_evidence(self, x, theta):
        raise KeyError("lookup")

    @classmethod
    def layer(cls):
        return EstimationLayer(space_of("a"), {"x": cls()})


class Wobbly(Raises):
    """−½ (θ − x)², and parts that are random or look at the whole batch."""

    def __init__(self, *parts):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), *parts, nn.Tanh(), nn.Linear(8, 1)).double()

    def log_evidence(self, x, theta):
        x, theta = torch.broadcast_tensors(x[..., None], theta)
        both = torch.cat([x, theta], -1)
        return 0.1 * self.net(both.reshape(-1, 2)).reshape(theta.shape[:-1]) - 0.5 * (theta - x)[..., 0] ** 2


class Mistaken(Raises):
    """Derivatives in closed form that are another function's."""

    def log_evidence(self, x, theta):
        return -0.5 * (theta[..., 0] - x) ** 2

    def derivatives(self, x, theta):
        left = theta[..., 0] - x
        return -0.5 * left**2, (0.2 - 2.0 * left)[..., None], torch.full_like(left, 2.0)[..., None, None]


class Kinked(Raises):
    """A network of ReLUs: no curvature anywhere."""

    def __init__(self):
        super().__init__()
        torch.nn.init.normal_(weight := torch.empty(16), generator=torch.Generator().manual_seed(0))
        self.knots, self.slopes = nn.Parameter(3.0 * weight.double()), nn.Parameter(-weight.double().abs())

    def log_evidence(self, x, theta):
        return (torch.relu((theta - x[..., None]).abs() - self.knots) * self.slopes).sum(-1)


def test_plugin_that_raises_is_named():
    with pytest.raises(ModalityError, match="plugin 'x' raised KeyError in log_evidence: 'lookup'"):
        Raises.layer()({"x": torch.ones(2)})


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (nn.Dropout(0.3), r"plugin 'x' .* in training mode: net.1 \(Dropout\); call layer.eval\(\)"),
        (nn.BatchNorm1d(8), r"plugin 'x'"),
    ],
)
def test_random_plugin_is_named(part, words):
    torch.manual_seed(0)
    layer = EstimationLayer(space_of("a"), {"x": Wobbly(part)})
    x = torch.tensor([0.3, 0.5, 1.1])
    with pytest.raises(ModalityError, match=words):
        layer({"x": x})
    assert torch.isfinite(layer.eval()({"x": x})).all()


def test_closed_form_of_another_function_is_named():
    layer = EstimationLayer(space_of("a"), {"x": Mistaken()})
    with pytest.raises(ModalityError, match=r"plugin 'x' .*derivatives\(\)"):
        layer({"x": torch.tensor([0.3, 0.5, 1.1])})


def test_plugin_without_curvature_has_no_answer():
    layer = EstimationLayer(space_of("a"), {"x": Kinked()})
    fits = layer.estimate({"x": observations(1, N=3)[:, 0].expand(2, 3)})
    assert {str(s) for s in fits.status} <= {"failed", "not_identified"}
    assert fits.theta.isnan().all()
    assert fits.covariance.isnan().all()


class Stubborn(Raises):
    """One that vmap does not take, although its stack_key says it does."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(tensor(scale))

    def stack_key(self):
        return "stubborn"

    def log_evidence(self, x, theta):
        scale = self.scale if self.scale.item() > 0 else -self.scale
        return -0.5 * ((theta[..., 0] - x) / scale) ** 2


def test_plugins_that_cannot_be_stacked_are_evaluated_one_by_one_and_say_so_once():
    """Seven are evaluated one by one anyway; of eight, one call by vmap would be made."""
    plugins = {f"p{i}": Stubborn(1.0 + i) for i in range(8)}
    data = {n: torch.tensor([0.1 * i, 0.3]) for i, n in enumerate(plugins)}
    layer = EstimationLayer(space_of("a"), plugins)
    weight = [(1.0 + i) ** -2 for i in range(7)]
    mean = sum(w * (0.1 * i + 0.3) / 2 for i, w in enumerate(weight)) / sum(weight)
    data.pop("p7")
    assert layer(data).item() == pytest.approx(mean, abs=1e-7)
    weight.append(8.0**-2)
    mean = (mean * sum(weight[:7]) + weight[7] * 0.5) / sum(weight)
    data |= {"p7": torch.tensor([0.7, 0.3])}
    with pytest.warns(UserWarning, match=r"'p0', .*'p7' cannot be evaluated together by torch.func.vmap"):
        assert layer(data).item() == pytest.approx(mean, abs=1e-7)
    assert layer(data).item() == pytest.approx(mean, abs=1e-7)  # and no second warning, which would be an error here
    fit = estimate(Evidence(layer.space, plugins, data))
    assert fit["a"].value == pytest.approx(mean, abs=1e-7)


def test_a_stacked_plugin_that_raises_is_named_alone():
    class Late(Stubborn):
        def log_evidence(self, x, theta):
            if bool((self.scale > 7.5).all()):
                raise RuntimeError("no calibration")
            return -0.5 * ((theta[..., 0] - x) / self.scale) ** 2

    plugins = {f"p{i}": Late(1.0 + i) for i in range(8)}
    data = {n: torch.tensor([0.1 * i, 0.3]) for i, n in enumerate(plugins)}
    with pytest.raises(ModalityError, match="'p7' raised RuntimeError in log_evidence: no calibration"):
        EstimationLayer(space_of("a"), plugins)(data)


def test_same_data_twice_are_refused_unless_allowed():
    x = torch.tensor([[0.3], [0.5]])
    plugins = {n: Gaussian(parameter_names=("a",), sd=1.0, event_shape=(1,)) for n in "pq"}
    space = space_of("a")
    with pytest.raises(ObservationError, match="allow_identical=True"):
        EstimationLayer(space, plugins)({"p": x, "q": x})
    assert EstimationLayer(space, plugins, allow_identical=True)({"p": x, "q": x}).item() == pytest.approx(0.4)


# Starts


def test_start_decides_which_maximum_without_screening():
    layer = EstimationLayer(ParameterSpace([Parameter("a", bounds=(-4.0, 4.0))]), {"waves": Waves()}, screen=0)
    x = tensor([[0.1]])
    tops = [layer({"waves": x}, start={"a": s}).item() for s in (0.2, 1.5, -1.4)]
    assert tops == pytest.approx([0.0, 1.5, -1.5], abs=0.1)
    many = layer({"waves": x.expand(3, 1, 1)}, batched=True, start=tensor([[0.2], [1.5], [-1.4]]))
    assert (many[:, 0] - tensor(tops)).abs().max() < 1e-12
    inside = layer({"waves": x}, start=tensor([3.0]), limits={"a": {"upper": 1.7}})
    assert inside.item() == pytest.approx(1.5, abs=0.1)
    beyond = layer({"waves": x}, start={"a": 4.6}, limits={"a": {"upper": 8.0}})  # outside of what was declared
    assert beyond.item() == pytest.approx(4.6, abs=0.2)


def test_start_is_one_of_those_that_are_polished():
    layer = EstimationLayer(
        ParameterSpace([Parameter("a", bounds=(-4.0, 4.0))]), {"waves": Waves()}, polish=1, screen=8
    )
    assert layer({"waves": tensor([[0.1]])}, start={"a": 1.5}).item() == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (torch.zeros(3), "shape"),
        ({"c": 0.0}, "no parameter 'c'"),
        ({"a": NAN}, "finite|number"),
        ({"a": 9.0}, "outside its bounds"),
    ],
)
def test_start_that_is_none_is_refused(start, words):
    with pytest.raises(ParameterError, match=words):
        pair_layer("bounds")({"pair": some_sets(1)[0]}, start=start)


def test_prior_draws_the_estimate_and_its_gradients():
    """Gaussian data and prior: θ̂ = (x̄ N/σ² + m/τ²) / (N/σ² + 1/τ²), and its derivative is 1/σ² over the same."""
    space = ParameterSpace([Parameter("a", Normal(1.0, 0.5))])
    layer = EstimationLayer(space, {"g": Gaussian(parameter_names=("a",), sd=2.0, event_shape=(1,))}, prior=True)
    x = tensor([[3.0], [5.0], [4.0]]).requires_grad_()
    theta = layer({"g": x})
    theta.backward()
    assert theta.item() == pytest.approx((12.0 / 4.0 + 1.0 / 0.25) / (0.75 + 4.0), abs=1e-12)
    assert (x.grad - 0.25 / 4.75).abs().max() < 1e-12
