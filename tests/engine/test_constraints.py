"""What ties parameters together: refused where it conflicts, kept where it holds, drawn from as closed forms say."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributions as td

from engine import Ball, Linear, Parameter, ParameterError, ParameterSpace, PositiveSemidefinite, Registry, Simplex
from engine.constraints import constraint_from_toml
from engine.feasible import FeasibleSet, MatrixCone, NormCone
from engine.files import inline, parse_toml
from engine.prior_sampling import _Law


def flat(*names):
    return [Parameter(name) for name in names]


def uniform(*names, low=0.0, high=1.0):
    return [Parameter(name, td.Uniform(low, high)) for name in names]


def normal(*names, loc=0.0, scale=1.0):
    return [Parameter(name, td.Normal(loc, scale)) for name in names]


ALL = [
    Linear({"a": 1, "b": 2}, upper=3),
    Linear({"a": 1, "b": -1}, lower=-0.5, upper=0.5, name="near"),
    Linear({"a": 0.1, "c": -3}, equal=0.25),
    Simplex(["a", "b", "c"], total=2, name="parts"),
    PositiveSemidefinite([["a", "c"], ["c", "b"]]),
    PositiveSemidefinite([["a", None, "d"], [None, "b", None], ["d", None, "c"]], name="covariance"),
    Ball(["a", "b"], 1.5),
    Ball(["a", "b", "c"], 2, centre=[1, 0, -0.5], name="near a point"),
]

VARIANCES = PositiveSemidefinite([["v", "c"], ["c", "w"]])

#: Sets of every kind, alone and together, with what their volume is taken up by.
SPACES = {
    "half-plane": ParameterSpace(uniform("a", "b"), [Linear({"a": 1, "b": 1}, upper=1)]),
    "band": ParameterSpace(normal("a", "b", scale=10.0), [Linear({"a": 1, "b": -1}, lower=-0.1, upper=0.1)]),
    "order": ParameterSpace(
        uniform(*"abcde"), [Linear({x: 1, y: -1}, upper=0) for x, y in itertools.pairwise("abcde")]
    ),
    "plane": ParameterSpace(normal("a", "b", "c", loc=1.0), [Linear({"a": 1, "b": 1, "c": 1}, equal=1)]),
    "fractions": ParameterSpace(flat("a", "b", "c"), [Simplex(["a", "b", "c"], 2.0)]),
    "fractions of two kinds": ParameterSpace(
        flat(*"abcd"), [Simplex(["a", "b"]), Simplex(["c", "d"], 3.0), Linear({"a": 1, "c": 1}, upper=2)]
    ),
    "covariance": ParameterSpace([*uniform("v", "w", high=3.0), *flat("c")], [VARIANCES]),
    "scaled covariance": ParameterSpace(
        [Parameter("v", td.HalfNormal(1e3)), Parameter("c", td.Normal(0.0, 1.0)), Parameter("w", td.HalfNormal(1e-3))],
        [VARIANCES],
    ),
    "disc": ParameterSpace(flat("S", "C"), [Ball(["S", "C"])]),
    "far ball": ParameterSpace(normal("a", "b", "c"), [Ball(["a", "b", "c"], 2.0, [3.0, 0.0, 0.0])]),
    "everything": ParameterSpace(
        [*uniform("v", "w", high=2.0), *normal("c"), *flat("f", "g", "free"), *uniform("p")],
        [
            VARIANCES,
            Simplex(["f", "g"]),
            Ball(["v", "p"], 1.2),
            Linear({"c": 1, "f": 1}, equal=0.6),
            Linear({"v": 1, "g": -1}, lower=-1, upper=0.7),
        ],
    ),
}

# -- declaration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Linear({}, upper=1), "at least 1"),
        (lambda: Linear({"a": 0.0}, upper=1), "not all zero"),
        (lambda: Linear({"a": math.nan}, upper=1), "coefficient of 'a' must be a number, got NaN"),
        (lambda: Linear({"a": math.inf}, upper=1), "finite"),
        (lambda: Linear({"a": "1"}, upper=1), "coefficient of 'a' must be a number, got '1'"),
        (lambda: Linear({"a": 10**400}, upper=1), "coefficient of 'a' must be a number"),
        (lambda: Linear({"a": torch.ones(2)}, upper=1), "coefficient of 'a' must be a number"),
        (lambda: Linear({1: 1.0}, upper=1), "names of parameters"),
        (lambda: Linear(["a", "b"], upper=1), "must map parameters to numbers"),
        (lambda: Linear({"a": 1}), "needs a finite limit"),
        (lambda: Linear({"a": 1}, upper=math.inf), "needs a finite limit"),
        (lambda: Linear({"a": 1}, lower=math.nan), "lower must be a number, got NaN"),
        (lambda: Linear({"a": 1}, lower=True), "lower must be a number, got True"),
        (lambda: Linear({"a": 1}, lower=2, upper=1), r"lower ≤ upper, got \(2, 1\)"),
        (lambda: Linear({"a": 1}, lower=math.inf, upper=math.inf), "lower ≤ upper"),
        (lambda: Linear({"a": 1}, upper=1, equal=1), "give equal= alone"),
        (lambda: Linear({"a": 1}, upper=1, name=""), "name is printable"),
        (lambda: Linear({"a": 1}, upper=1, name='a"'), "name is printable"),
        (lambda: Linear({"a": 1}, upper=1, name="a\n"), "name is printable"),
        (lambda: Linear({"a": 1}, upper=1, name=3), "name is printable"),
        (lambda: Simplex("abc"), "names of parameters in a sequence, got 'abc'"),
        (lambda: Simplex(3), "names of parameters in a sequence, got 3"),
        (lambda: Simplex(["a"]), "at least 2"),
        (lambda: Simplex(["a", "a"]), "each once"),
        (lambda: Simplex(["a", "b"], total=0), "positive and finite, got 0"),
        (lambda: Simplex(["a", "b"], total=math.inf), "positive and finite"),
        (lambda: PositiveSemidefinite([["a"]]), "n ≥ 2 rows"),
        (lambda: PositiveSemidefinite([["a", "b"], ["b"]]), "n ≥ 2 rows"),
        (
            lambda: PositiveSemidefinite([["a", "b"], ["c", "d"]]),
            r"must be symmetric, got 'c' at \(1, 0\) and 'b' at \(0, 1\)",
        ),
        (lambda: PositiveSemidefinite([["a", "b"], ["b", "a"]]), r"got 'a' at \(1, 1\) again"),
        (lambda: PositiveSemidefinite([["a", "b"], ["b", None]]), "diagonal must be parameters"),
        (lambda: PositiveSemidefinite([["a", 1], [1, "b"]]), "parameter of its own, got 1"),
        (lambda: Ball(["a"]), "at least 2"),
        (lambda: Ball(["a", "b"], radius=-1), "positive and finite, got -1"),
        (lambda: Ball(["a", "b"], radius=math.nan), "radius of a ball must be a number, got NaN"),
        (lambda: Ball(["a", "b"], centre=[0]), "finite value for each of a, b"),
        (lambda: Ball(["a", "b"], centre=[0, math.inf]), "finite value for each of a, b"),
    ],
)
def test_what_is_no_constraint_is_refused_with_the_rule(make, words):
    with pytest.raises(ParameterError, match=words):
        make()


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        ([Linear({"a": 1, "z": 1}, upper=1)], "'a \\+ z ≤ 1' ties 'z', which nobody declares; there are a, b, c, h"),
        ([Linear({"a": 1, "h": 1}, upper=1, name="both")], "'both' ties 'h', which is discrete"),
        ([Ball(["a", "b"]), Linear({"a": 1}, upper=1), Ball(["b", "a"], name="a ≤ 1")], "'a ≤ 1' is declared 2 times"),
    ],
)
def test_a_space_refuses_constraints_of_what_it_does_not_have(constraints, words):
    with pytest.raises(ParameterError, match=words):
        ParameterSpace([*flat("a", "b", "c"), Parameter("h", td.Categorical(torch.ones(2)))], constraints)


@pytest.mark.parametrize("constraint", ALL, ids=str)
def test_a_constraint_survives_toml(constraint):
    block = parse_toml("\n".join(inline({k: v})[1:-1] for k, v in constraint.to_toml().items()).encode(), "a block")
    read = constraint_from_toml(block)
    assert read == constraint
    assert hash(read) == hash(constraint)
    assert read.meaning() == constraint.meaning()
    assert str(read) == str(constraint)


def test_the_meaning_of_a_constraint_is_not_its_name_nor_the_order_of_its_parts():
    alike = [
        (Linear({"a": 1, "b": -2}, upper=3, name="x"), Linear({"b": 2, "a": -1}, lower=-3)),
        (Linear({"a": 1, "b": 1}, equal=0.0), Linear({"b": -1, "a": -1}, equal=-0.0, name="balance")),
        (Linear({"a": 1}, lower=-1, upper=2), Linear({"a": -1, "b": 0}, lower=-2, upper=1)),
        (Simplex(["a", "b", "c"]), Simplex(["c", "a", "b"], 1)),
        (Ball(["a", "b"], 1, [0, 2]), Ball(["b", "a"], 1, [2, -0.0])),
        (PositiveSemidefinite([["a", "c"], ["c", "b"]]), PositiveSemidefinite([["b", "c"], ["c", "a"]])),
        (
            PositiveSemidefinite([["a", "c", None], ["c", "b", "e"], [None, "e", "d"]]),
            PositiveSemidefinite([["d", None, "e"], [None, "a", "c"], ["e", "c", "b"]]),
        ),
    ]
    for one, other in alike:
        assert one.meaning() == other.meaning()
        assert one != other
    every = [c for pair in alike for c in pair] + ALL
    assert len({c.meaning() for c in every}) == len(alike) + len(ALL) - 1  # one of ALL is a pair's
    assert Linear({"a": 1}, upper=1).meaning() != Linear({"a": -1}, upper=1).meaning()
    assert Linear({"a": 1}, upper=1).meaning() != Linear({"a": 1}, lower=1).meaning()
    assert Ball(["a", "b"], 1, [0, 2]).meaning() != Ball(["a", "b"], 1, [2, 0]).meaning()


def test_formulas_that_are_names_tell_numbers_apart():
    assert Linear({"a": 1}, upper=1.0000001).name == "a ≤ 1.0000001"
    assert Linear({"a": 1 / 3}, upper=1).name == "0.3333333333333333 a ≤ 1"
    assert Ball(["a", "b"], 0.1 + 0.2).name == "‖(a, b)‖ ≤ 0.30000000000000004"


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({}, "kind of a constraint is one of linear, simplex, positive_semidefinite, ball, got None"),
        ({"kind": ["linear"]}, "kind of a constraint"),
        ({"kind": "cone"}, "got 'cone'"),
        ({"kind": "linear", "upper": 1.0}, "missing \\['coefficients'\\]"),
        ({"kind": "ball", "parameters": ["a", "b"], "weight": 1}, "unknown fields \\['weight'\\]"),
        ({"kind": "linear", "coefficients": 3, "upper": 1.0}, "must map"),
        ({"kind": "linear", "coefficients": {"a": [1]}, "upper": 1.0}, "must be a number"),
        ({"kind": "linear", "coefficients": {"a": 1}, "upper": {}}, "must be a number"),
        ({"kind": "simplex", "parameters": 3}, "names of parameters"),
        ({"kind": "positive_semidefinite", "matrix": 3}, "rows of names"),
        ({"kind": "positive_semidefinite", "matrix": [[["a"], "c"], ["c", "b"]]}, "parameter of its own"),
        ({"kind": "ball", "parameters": ["a", "b"], "centre": 3.0}, "a value for each"),
    ],
)
def test_a_block_that_is_no_constraint_is_refused(block, words):
    with pytest.raises(ParameterError, match=words):
        constraint_from_toml(block)


# -- conflicts -----------------------------------------------------------------------------------------------


def refusal(parameters, constraints):
    with pytest.raises(ParameterError) as caught:
        ParameterSpace(parameters, constraints)
    return str(caught.value)


def test_two_that_conflict_are_named_alone():
    extra = [Linear({"c": 1, "d": 1}, equal=1), Linear({"a": 1, "c": 1}, lower=-5), Ball(["c", "d"], 9)]
    low, high = Linear({"a": 1, "b": 1}, upper=1, name="low"), Linear({"a": 2, "b": 2}, lower=3, name="high")
    message = refusal(flat(*"abcd"), [extra[0], low, extra[1], high, extra[2]])
    assert message == "no θ satisfies these together: 'low' (a + b ≤ 1), 'high' (3 ≤ 2 a + 2 b); relax one of them"


def test_three_that_conflict_only_together_are_all_named():
    three = [Linear({"a": 1, "b": 1}, upper=1), Linear({"a": 1}, lower=1), Linear({"b": 1}, lower=0.5)]
    others = [Linear({"a": 1, "b": -1}, upper=9), Simplex(["c", "d"]), Linear({"c": 1, "a": 1}, lower=-3)]
    message = refusal(flat(*"abcd"), [others[0], three[0], others[1], three[1], others[2], three[2]])
    assert message.startswith("no θ satisfies these together: 'a + b ≤ 1', '1 ≤ a', '0.5 ≤ b'; relax")
    for left_out in three:  # irreducible: any two of them agree
        ParameterSpace(flat(*"abcd"), [*others, *(c for c in three if c is not left_out)])


@pytest.mark.parametrize(
    ("parameters", "constraints", "words"),
    [
        (
            uniform("a", "b"),
            [Linear({"a": 1, "b": 1}, lower=3)],
            "'3 ≤ a + b', the bounds (0, 1) of 'a', the bounds (0, 1) of 'b'",
        ),
        (
            [*flat("a", "c"), *uniform("b", low=2.0, high=3.0)],
            [Simplex(["a", "b"]), Linear({"c": 1}, upper=1)],
            "'a + b = 1, each ≥ 0', the bounds (2, 3) of 'b'",
        ),
        (
            [Parameter("v", bounds=(0, 1)), Parameter("w", bounds=(0, 4)), *flat("c")],
            [VARIANCES, Linear({"c": 1}, lower=2.1)],
            "'[v c; c w] ⪰ 0', '2.1 ≤ c', the bounds (0, 1) of 'v', the bounds (0, 4) of 'w'",
        ),
        (flat("a", "b"), [Ball(["a", "b"]), Linear({"a": 1, "b": 1}, lower=1.5)], "'‖(a, b)‖ ≤ 1', '1.5 ≤ a + b'"),
        (
            uniform("a", "b", low=0.8),
            [Ball(["a", "b"])],
            "'‖(a, b)‖ ≤ 1', the bounds (0.8, 1) of 'a', the bounds (0.8, 1) of 'b'",
        ),
        (
            flat("a", "b", "c"),
            [Ball(["a", "b"]), Ball(["b", "c"]), Linear({"a": 1, "b": 1, "c": -1}, equal=4)],
            "'‖(a, b)‖ ≤ 1', '‖(b, c)‖ ≤ 1', 'a + b − c = 4'",
        ),
        (
            flat("a", "b"),
            [Linear({"a": 1, "b": 1}, equal=1), Linear({"a": 1, "b": 1}, equal=2)],
            "'a + b = 1', 'a + b = 2'",
        ),
        (
            flat(*"abcd"),
            [Simplex(["a", "b"]), Simplex(["c", "d"]), Linear(dict.fromkeys("abcd", 1), equal=3)],
            "'a + b = 1, each ≥ 0', 'c + d = 1, each ≥ 0', 'a + b + c + d = 3'",
        ),
    ],
)
def test_conflicts_with_bounds_and_between_kinds_are_named(parameters, constraints, words):
    assert refusal(parameters, constraints) == f"no θ satisfies these together: {words}; relax one of them"


@pytest.mark.parametrize(
    ("parameters", "constraints"),
    [
        (flat("a", "b"), [Linear({"a": 1, "b": 1}, upper=1), Linear({"a": 1, "b": 1}, lower=1)]),
        (flat("a", "b"), [Ball(["a", "b"]), Linear({"a": 1, "b": 1}, lower=2**0.5)]),
        (uniform("a", "b"), [Linear({"a": 1, "b": 1}, upper=0)]),
    ],
)
def test_a_set_without_room_says_that_and_how_to_write_an_equality(parameters, constraints):
    message = refusal(parameters, constraints)
    assert "leave θ no room to move in" in message
    assert "write an equality as equal=" in message


def test_a_conflict_among_many_is_found_in_few_tries():
    """A chain of 60 differences of at least 1 does not fit into 50."""
    names = [f"p{n}" for n in range(61)]
    chain = [Linear({a: -1, b: 1}, lower=1) for a, b in itertools.pairwise(names)]
    aside = [Linear({f"q{n}": 1, "p0": 1}, lower=-99) for n in range(60)]
    span = Linear({"p0": -1, "p9": 1}, upper=8, name="span")
    message = refusal(flat(*names, *(f"q{n}" for n in range(60))), [*aside[:30], *chain, *aside[30:], span])
    assert message.count("−p") == 10
    assert "'span'" in message
    assert "q" not in message.replace("equality", "").replace("equal=", "")


# -- the set -------------------------------------------------------------------------------------------------


def asked(constraint, theta):
    """What a constraint asks, written down again: > 0 strictly inside; equalities give −|distance|."""
    if isinstance(constraint, Linear):
        total = sum(c * theta[n] for n, c in constraint.coefficients.items())
        if constraint.lower == constraint.upper:
            return -abs(total - constraint.upper)
        return min(total - constraint.lower, constraint.upper - total)
    if isinstance(constraint, Simplex):
        values = [theta[n] for n in constraint.parameters]
        return min(min(values), -abs(sum(values) - constraint.total))
    if isinstance(constraint, Ball):
        return constraint.radius - math.dist([theta[n] for n in constraint.parameters], constraint.centre)
    matrix = [[0.0 if n is None else theta[n] for n in row] for row in constraint.matrix]
    return np.linalg.eigvalsh(np.array(matrix))[0]


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_contains_says_what_each_constraint_asks(space):
    rng = np.random.default_rng(0)
    points = space.spread(rng.uniform(size=(200, len(space))))
    points = torch.cat([points, points + torch.from_numpy(rng.normal(size=points.shape)) * space.scale])
    found = space.contains(points, tolerance=1e-9).tolist()
    for point, inside in zip(points.tolist(), found, strict=True):
        theta = dict(zip(space.names, point, strict=True))
        slack = 1e-9 * float(space.scale.max())
        holds = all(asked(c, theta) >= -slack for c in space.constraints)
        bounds = all(p.bounds[0] - slack <= theta[p.name] <= p.bounds[1] + slack for p in space)
        assert inside == (holds and bounds)
    assert 200 <= sum(found) < 400
    assert torch.equal(torch.isfinite(space.log_prior(points)), torch.tensor(found))


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_interior_point_has_room_in_every_direction(space):
    assert space.contains(space.interior, tolerance=1e-13)
    C = space.feasible.C * space.scale
    free = torch.eye(len(space), dtype=torch.float64) - torch.linalg.pinv(C) @ C
    for direction in [*free, *-free]:
        assert space.contains(space.interior + 0.003 * space.scale * direction, tolerance=1e-12)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_spread_points_are_inside_and_fill_the_set(space):
    rng = np.random.default_rng(1)
    theta = space.spread(rng.uniform(size=(2000, len(space))))
    inside = space.feasible
    assert bool(((theta >= inside.lower - 1e-12 * space.scale) & (theta <= inside.upper + 1e-12 * space.scale)).all())
    assert bool(space.contains(theta, tolerance=1e-12).all())
    residual = (theta @ inside.C.mT - inside.d).abs()
    assert bool((residual <= 1e-12 * (inside.C.abs() @ space.scale)).all())
    drawn = space.sample_prior(2000, seed=1)
    low, high = drawn.quantile(0.1, dim=0), drawn.quantile(0.9, dim=0)
    for outer in (theta < low, theta > high):  # some are where a tenth of the prior lies
        assert bool((outer.double().mean(0) > 0.001).all())
    middle = ((theta > low) & (theta < high)).double().mean(0)
    assert bool((middle > 0.2).all())


def kinds():
    """FeasibleSets of every kind with random directions that no equality forbids."""
    box = FeasibleSet.box(torch.tensor([-1.0, -math.inf, 0.0]).double(), torch.tensor([2.0, 1.0, math.inf]).double())
    A, b = torch.tensor([[1.0, 1.0, 0.5], [-1.0, 2.0, 0.0]]).double(), torch.tensor([2.0, 1.5]).double()
    F = torch.zeros(2, 2, 3, dtype=torch.float64)
    F[0, 0, 0] = F[1, 1, 2] = F[0, 1, 1] = F[1, 0, 1] = 1.0
    matrix = MatrixCone(F, torch.eye(2, dtype=torch.float64))
    eye = torch.eye(3, dtype=torch.float64)
    ball = NormCone(eye, -torch.tensor([0.3, 0.0, 0.5]).double(), torch.zeros(3).double(), torch.tensor(1.2).double())
    slanted = NormCone(
        eye[:2], torch.zeros(2).double(), torch.tensor([0.2, 0.0, 0.9]).double(), torch.tensor(0.5).double()
    )
    none, nothing = torch.zeros(0, 3).double(), torch.zeros(0).double()
    everywhere = FeasibleSet.box(torch.full((3,), -math.inf).double(), torch.full((3,), math.inf).double())

    def made(box=everywhere, rows=(none, nothing), cones=()):
        return FeasibleSet(box.lower, box.upper, *rows, none, nothing, cones)

    return {
        "box": made(box),
        "rows": made(rows=(A, b)),
        "matrix cone": made(cones=(matrix,)),
        "ball": made(cones=(ball,)),
        "slanted norm cone": made(cones=(slanted,)),
        "all": made(box, (A, b), (matrix, ball, slanted)),
    }


@pytest.mark.parametrize("name", kinds())
def test_reach_is_how_far_one_can_go(name):
    inside = kinds()[name]
    rng = np.random.default_rng(2)

    def slack(theta):
        parts = [theta - inside.lower, inside.upper - theta, inside.b - theta @ inside.A.mT]
        parts += [c.slack(theta)[..., None] for c in inside.cones]
        return torch.cat(parts, -1).amin(-1)

    theta = torch.from_numpy(rng.normal(size=(4000, 3)))
    theta = theta[slack(theta) > 0][:300]
    assert len(theta) > 100
    move = torch.from_numpy(rng.normal(size=theta.shape))
    move[::7, 0] = 0.0
    reach = inside.reach(theta, move)
    ends = torch.isfinite(reach)
    assert bool(ends.any())
    far = torch.where(ends, reach, 1e6)
    for part in (0.0, 0.3, 0.999999):
        assert bool((slack(theta + (part * far)[:, None] * move) > -1e-9 * (1 + far)).all())
    beyond = (theta + (far * 1.00001 + 1e-9)[:, None] * move)[ends]
    assert bool((slack(beyond) < 0).all())
    # against a search by halving for the first point outside
    low, high = torch.zeros(len(theta)).double(), torch.full((len(theta),), 1e4).double()
    for _ in range(80):
        middle = 0.5 * (low + high)
        fine = slack(theta + middle[:, None] * move) >= 0
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    near = ends & (reach < 1e3)
    torch.testing.assert_close(reach[near], low[near], rtol=1e-7, atol=1e-9)
    assert bool((low[~ends] > 9999.0).all())


def test_reach_from_the_border_is_nothing_or_all_the_way():
    inside = SPACES["disc"].feasible
    border = torch.tensor([[1.0, 0.0]] * 3).double()
    moves = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).double()
    assert inside.reach(border, moves).tolist() == pytest.approx([0.0, 0.0, 2.0], abs=1e-7)
    corner = torch.tensor([[0.0, 1.0]] * 2).double()
    along = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()
    assert SPACES["half-plane"].feasible.reach(corner, along).tolist() == [1.0, 0.0]


# -- draws from the prior --------------------------------------------------------------------------------------


def both(space, n=20_000):
    """Exact draws where there are such, and draws by walking."""
    exact, walked = space.sample_prior(n, seed=4), _Law(space).walked(n // 5, torch.Generator().manual_seed(5))
    for theta in (exact, walked):
        assert bool(space.contains(theta, tolerance=1e-12).all())
        assert theta.dtype == torch.float64
    return exact, walked


def fits(values, law, level=1e-4):
    return scipy.stats.kstest(values.numpy(), law).pvalue > level


def within(values, mean, errors=4.0):
    """Whether a mean is the expected one, to so many standard errors."""
    return abs(float(values.mean()) - mean) < errors * float(values.std()) / math.sqrt(len(values))


def test_uniform_priors_below_a_line_have_the_triangles_moments():
    """a, b uniform on a + b ≤ 1: density 2, E a = 1/3, E a² = 1/6, E ab = 1/12."""
    for theta in both(SPACES["half-plane"]):
        a, b = theta.T
        assert within(a, 1 / 3)
        assert within(b, 1 / 3)
        assert within(a * a, 1 / 6)
        assert within(a * b, 1 / 12)
        assert fits(a, lambda x: 1 - (1 - x) ** 2)


@pytest.mark.parametrize("prior", [None, td.Uniform(0.0, 1.0)])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_fractions_are_dirichlet(n, prior):
    """Each fraction of a uniform law on the simplex is Beta(1, n − 1), and cov = −1 / (n² (n + 1))."""
    names = [f"f{i}" for i in range(n)]
    for theta in both(ParameterSpace([Parameter(name, prior) for name in names], [Simplex(names)])):
        for j in range(n):
            assert fits(theta[:, j], scipy.stats.beta(1, n - 1).cdf)
        assert within(theta[:, 0] * theta[:, 1], 1 / n**2 - 1 / (n**2 * (n + 1)))


def test_fractions_with_limits_are_the_uniform_law_between_them():
    """On the triangle, f ≤ 1/2 each leaves the middle quarter: by symmetry E f = 1/3; the density of f rises to 1/2."""
    names = ["f", "g", "h"]
    space = ParameterSpace(uniform(*names, high=0.5), [Simplex(names)])
    for theta in both(space):
        assert within(theta[:, 0], 1 / 3)
        assert fits(theta[:, 0], lambda x: np.clip(x * 2, 0, 1) ** 2)


def test_normals_with_a_given_sum_are_the_conditional_normal():
    """x ~ N(m, V) given 1'x = t: mean m + V1 (t − 1'm) / 1'V1, covariance V − V11'V / 1'V1."""
    m, sd = torch.tensor([1.0, 3.0, -2.0]).double(), torch.tensor([2.0, 1.0, 0.1]).double()
    parameters = [Parameter(n, td.Normal(a, b)) for n, a, b in zip("abc", m, sd, strict=True)]
    V = torch.diag(sd**2)
    v = V.sum(-1)
    mean, covariance = m + v * (0.0 - m.sum()) / v.sum(), V - torch.outer(v, v) / v.sum()
    for theta in both(ParameterSpace(parameters, [Linear({"a": 1, "b": 1, "c": 1}, equal=0)])):
        for j in range(3):
            assert fits(theta[:, j], scipy.stats.norm(float(mean[j]), float(covariance[j, j]) ** 0.5).cdf)
            for k in range(j):
                assert within((theta[:, j] - mean[j]) * (theta[:, k] - mean[k]), float(covariance[j, k]))


def test_two_normals_that_cancel():
    """a ~ N(1, 1), b ~ N(3, 2²), a + b = 0: a ~ N(v (1 − 3/4), v) with 1/v = 1 + 1/4."""
    parameters = [Parameter("a", td.Normal(1.0, 1.0)), Parameter("b", td.Normal(3.0, 2.0))]
    for theta in both(ParameterSpace(parameters, [Linear({"a": 1, "b": 1}, equal=0)])):
        assert fits(theta[:, 0], scipy.stats.norm(0.8 * 0.25, 0.8**0.5).cdf)
        torch.testing.assert_close(theta[:, 1], -theta[:, 0], rtol=1e-12, atol=1e-12)


def test_a_normal_far_in_its_tail_is_the_truncated_normal():
    """a + b ≥ 30 of two unit normals: (a + b)/√2 is a normal beyond 21 σ, and a − b stays a normal."""
    theta = ParameterSpace(normal("a", "b"), [Linear({"a": 1, "b": 1}, lower=30)]).sample_prior(4000, seed=1)
    assert fits(theta.sum(-1) / 2**0.5, scipy.stats.truncnorm(30 / 2**0.5, math.inf).cdf)
    assert fits((theta[:, 0] - theta[:, 1]) / 2**0.5, scipy.stats.norm.cdf)


@pytest.mark.parametrize("radius", [1.0, 1000.0])
def test_flat_priors_in_a_ball_fill_it_evenly(radius):
    """In three dimensions (r / R)³ is uniform, and each direction cosine as well."""
    space = ParameterSpace(flat("a", "b", "c"), [Ball(["a", "b", "c"], radius, [1.0, 2.0, 3.0])])
    for theta in both(space):
        away = theta - torch.tensor([1.0, 2.0, 3.0]).double()
        assert fits((away.norm(dim=-1) / radius) ** 3, "uniform")
        for j in range(3):
            assert fits(0.5 + 0.5 * away[:, j] / away.norm(dim=-1), "uniform")


def test_normal_priors_in_a_disc_have_a_truncated_rayleigh_radius():
    for theta in both(ParameterSpace(normal("a", "b"), [Ball(["a", "b"], 1.5)])):
        assert fits(theta.norm(dim=-1), lambda r: -np.expm1(-(r**2) / 2) / -math.expm1(-(1.5**2) / 2))


def test_a_covariance_under_uniform_priors_has_its_law():
    """v, w ~ U(0, 1) and |c| ≤ √(vw) flat: the density of v is ∝ √v, and c / √(vw) is uniform."""
    space = ParameterSpace([*uniform("v", "w"), *flat("c")], [VARIANCES])
    for theta in both(space):
        v, w, c = theta.T
        assert fits(v, lambda x: x**1.5)
        assert fits(0.5 + 0.5 * c / (v * w).sqrt(), "uniform")


@pytest.mark.parametrize("n", [4, 8])
def test_uniforms_in_order_are_order_statistics(n):
    """The j-th of n uniforms is Beta(j, n + 1 − j); 1/8! of the prior lies inside, so these walk."""
    names = [f"p{i}" for i in range(n)]
    space = ParameterSpace(uniform(*names), [Linear({a: 1, b: -1}, upper=0) for a, b in itertools.pairwise(names)])
    theta = space.sample_prior(4000, seed=2)
    for j in range(n):
        assert fits(theta[:, j], scipy.stats.beta(j + 1, n - j).cdf)


def test_walks_agree_with_rejection_for_priors_of_every_tail():
    parameters = [
        Parameter("a", td.Gamma(2.0, 1.0)),
        Parameter("b", td.Cauchy(0.0, 1.0)),
        Parameter("c", td.Beta(0.5, 0.5)),
    ]
    constraints = [Linear({"a": 1, "b": 1, "c": 1}, upper=2), Linear({"a": 1, "b": -1}, lower=0)]
    exact, walked = both(ParameterSpace(parameters, constraints))
    for j in range(3):
        assert scipy.stats.ks_2samp(exact[:, j].numpy(), walked[:, j].numpy()).pvalue > 1e-4


def test_two_exponentials_with_a_given_sum_share_it_evenly():
    parameters = [Parameter("a", td.Exponential(1.0)), Parameter("b", td.Exponential(1.0))]
    theta = ParameterSpace(parameters, [Linear({"a": 1, "b": 1}, equal=3)]).sample_prior(4000, seed=3)
    assert fits(theta[:, 0] / 3, "uniform")


def test_cauchys_that_cancel_have_a_student_tail():
    """Two unit Cauchys at x and −x: density ∝ (1 + x²)⁻², a Student law of 3 degrees, x √3."""
    theta = ParameterSpace(
        [Parameter("a", td.Cauchy(0.0, 1.0)), Parameter("b", td.Cauchy(0.0, 1.0))], [Linear({"a": 1, "b": 1}, equal=0)]
    ).sample_prior(4000, seed=3)
    assert fits(theta[:, 0] * 3**0.5, scipy.stats.t(3).cdf)


def test_a_flat_prior_that_a_constraint_limits_is_constant_and_another_one_spreads():
    band = [Linear({"a": 1, "b": -1}, lower=-1, upper=1)]
    limited = ParameterSpace([*flat("a"), *normal("b", scale=20.0)], band).sample_prior(4000, seed=6)
    assert fits(limited[:, 1], scipy.stats.norm(0, 20).cdf)  # as if a were not there
    assert fits(0.5 + 0.5 * (limited[:, 0] - limited[:, 1]), "uniform")
    half = ParameterSpace(flat("a", "b"), [Linear({"a": 1, "b": 1}, lower=0)])
    for theta in both(half):  # logistic, as without constraints: P(a ≤ x) = 2 ∫ f(a) F(a) da = F(x)²
        assert fits(theta[:, 0], lambda x: scipy.stats.logistic.cdf(x) ** 2)


def test_parameters_that_nothing_joins_keep_their_own_law():
    space = ParameterSpace(
        [*normal("x"), *uniform("a", "b"), Parameter("h", td.Categorical(torch.tensor([0.2, 0.8]))), *flat("f", "g")],
        [Linear({"a": 1, "b": 1}, upper=1), Simplex(["f", "g"])],
    )
    theta = space.sample_prior(20_000, seed=7)
    x, a, b, h, f, _ = theta.T
    assert fits(x, scipy.stats.norm.cdf)
    assert fits(a, lambda v: 1 - (1 - v) ** 2)
    assert fits(f, "uniform")
    assert within(h, 0.8)
    assert within(a * f, 1 / 6)
    assert within(b * x, 0.0)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_draws_follow_from_their_seed_and_are_inside(space):
    state = torch.random.get_rng_state()
    draws = space.sample_prior(50, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(draws, space.sample_prior(50, seed=1))
    assert not torch.equal(draws, space.sample_prior(50, seed=2))
    assert bool(space.contains(draws, tolerance=1e-12).all())
    assert bool(torch.isfinite(space.log_prior(draws)).all())
    assert draws.unique(dim=0).shape == (50, len(space))
    assert space.sample_prior(0, seed=1).shape == (0, len(space))
    assert space.sample_prior(1, seed=1).shape == (1, len(space))


def test_equalities_that_leave_a_point_give_it():
    space = ParameterSpace(uniform("a", "b"), [Linear({"a": 1, "b": 1}, equal=1), Linear({"a": 1, "b": -1}, equal=0.5)])
    torch.testing.assert_close(space.sample_prior(3), torch.tensor([[0.75, 0.25]] * 3).double())


# -- unconstrained coordinates ---------------------------------------------------------------------------------

OPEN = {
    "two fractions": ParameterSpace(flat("a", "b"), [Simplex(["a", "b"])]),
    "fractions": ParameterSpace([*flat("f", "x", "g"), *uniform("h")], [Simplex(["g", "f", "h"], 2.0)]),
    "fractions of two kinds": ParameterSpace(flat(*"abcde"), [Simplex(["a", "c"]), Simplex(["b", "d", "e"], 3.0)]),
    "covariance": ParameterSpace(
        [Parameter("v", td.HalfNormal(1e4)), *normal("x", "c"), Parameter("w", bounds=(0, math.inf))], [VARIANCES]
    ),
    "larger covariance": ParameterSpace(
        flat(*"abcdef"), [PositiveSemidefinite([["a", "b", "c"], ["b", "d", "e"], ["c", "e", "f"]])]
    ),
    "left to the prior": ParameterSpace(
        [*uniform("v", "w", high=3.0), *flat("c", "x", "y")],
        [VARIANCES, Ball(["x", "y"]), Linear({"v": 1, "x": 1}, upper=2)],
    ),
    "all": ParameterSpace(
        [
            *flat("p", "q", "c", "r"),
            Parameter("v", td.HalfNormal(0.1)),
            Parameter("w", td.HalfNormal(3.0)),
            *normal("x"),
        ],
        [Simplex(["r", "p", "q"]), VARIANCES, Linear({"p": 1, "x": 1}, upper=3)],
    ),
}


@pytest.mark.parametrize("space", OPEN.values(), ids=OPEN)
def test_unconstrained_coordinates_go_there_and_back_with_the_right_volume(space):
    theta = space.sample_prior(20, seed=1)
    z = space.to_unconstrained(theta)
    dropped = [space.index(c.parameters[-1]) for c in space.constraints if isinstance(c, Simplex)]
    kept = [j for j in range(len(space)) if j not in dropped]
    assert z.shape == (20, len(kept))
    assert bool(torch.isfinite(z).all())
    torch.testing.assert_close(space.to_natural(z), theta, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(space.to_natural(z[None, :, None])[0, :, 0], space.to_natural(z))
    volume = space.log_abs_det_jacobian(z)
    assert volume.shape == (20,)
    for point, found in zip(z, volume, strict=True):
        jacobian = torch.autograd.functional.jacobian(space.to_natural, point)[kept]
        assert float(found) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-8)


@pytest.mark.parametrize("space", [space for name, space in OPEN.items() if name != "left to the prior"])
def test_any_numbers_are_a_point_inside(space):
    dropped = sum(isinstance(c, Simplex) for c in space.constraints)
    z = 3.0 * torch.randn(500, len(space) - dropped, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = space.to_natural(z)
    kept = [c for c in space.constraints if not isinstance(c, Linear)]
    for point in theta.tolist():
        values = dict(zip(space.names, point, strict=True))
        assert all(asked(c, values) > -1e-9 * max(1.0, *map(abs, point)) for c in kept)


def test_equal_fractions_are_at_the_origin():
    names = list("abcde")
    space = ParameterSpace(flat(*names), [Simplex(names, 10)])
    torch.testing.assert_close(space.to_natural(torch.zeros(4).double()), torch.full((5,), 2.0).double())
    far = space.to_natural(torch.tensor([800.0, -800.0, 0.0, 0.0]).double())
    assert float(far.sum()) == pytest.approx(10.0)
    assert bool(torch.isfinite(space.log_abs_det_jacobian(torch.full((4,), 800.0).double())))


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        ([Linear({"a": 1, "b": 1}, equal=1, name="sum")], "'sum' is an equality, which leaves θ no unconstrained form"),
        ([Simplex(["a", "b"]), Simplex(["b", "c"], name="other")], "'other' is an equality"),
        ([Simplex(["a", "b"]), Linear({"a": 1, "c": 1}, equal=1)], "'a . c = 1' is an equality"),
    ],
)
def test_equalities_have_no_unconstrained_coordinates(constraints, words):
    space = ParameterSpace(flat("a", "b", "c"), constraints)
    for ask in (space.to_natural, space.to_unconstrained, space.log_abs_det_jacobian):
        with pytest.raises(ParameterError, match=words):
            ask(torch.zeros(2, 3).double())


def test_the_density_of_coordinates_integrates_to_the_priors_mass():
    """Two uniform fractions: p(z) = |df/dz| is a density."""
    space = ParameterSpace(uniform("f", "g"), [Simplex(["f", "g"])])
    z = torch.linspace(-40, 40, 20_001).double()[:, None]
    density = (space.log_prior(space.to_natural(z)) + space.log_abs_det_jacobian(z)).exp()
    assert float(torch.trapezoid(density, z[:, 0])) == pytest.approx(1.0, abs=1e-9)


# -- in the registry -------------------------------------------------------------------------------------------


def test_a_registry_keeps_every_kind(tmp_path):
    parameters = [*uniform("a", "b", "c", low=-3.0, high=3.0), *flat("d", "e", "f")]
    constraints = [
        Linear({"a": 1, "b": 2}, upper=3),
        Linear({"a": 0.1, "c": -3}, equal=0.25, name="tie; \\ é"),
        Simplex(["d", "e"], name="parts"),
        PositiveSemidefinite([["a", "f", None], ["f", "b", "c"], [None, "c", "d"]]),
        Ball(["a", "b", "c"], 2, centre=[1, 0, -0.5]),
    ]
    made = Registry.create(tmp_path / "w", parameters, constraints)
    assert made.parameters == ParameterSpace(parameters, constraints)
    read = Registry.open(tmp_path / "w")
    assert read.parameters == made.parameters
    assert read.digest == made.digest
    assert torch.equal(read.parameters.interior, made.parameters.interior)
    assert made.verify().constraints == 5


def test_constraints_in_any_order_and_under_any_name_have_one_digest(tmp_path):
    first = [Linear({"a": 1, "b": 1}, upper=1, name="sum"), Ball(["a", "c"]), Simplex(["d", "e"])]
    again = [Linear({"b": -1, "a": -1}, lower=-1), Ball(["c", "a"], name="disc"), Simplex(["e", "d"], name="parts")]
    seen = set()
    for k, order in enumerate(itertools.permutations(range(3))):
        for n, written in enumerate((first, again)):
            registry = Registry.create(tmp_path / f"{k}.{n}", flat(*"abcde"))
            for i in order:
                registry.constrain(written[i])
            seen.add(registry.digest)
            if k == n == 0:
                whole = Registry.create(tmp_path / "whole", flat(*"abcde"), first)
                assert whole.digest == registry.digest
    assert len(seen) == 1
    others = [
        [],
        first[:2],
        [*first[:2], Simplex(["d", "e"], 2.0)],
        [Linear({"a": 1, "b": 1}, upper=2), *first[1:]],
        [Linear({"a": 1, "b": 1}, lower=1), *first[1:]],
    ]
    for k, constraints in enumerate(others):
        seen.add(Registry.create(tmp_path / f"other{k}", flat(*"abcde"), constraints).digest)
    assert len(seen) == 1 + len(others)


def test_without_constraints_the_digest_is_what_it_was(tmp_path):
    import hashlib

    registry = Registry.create(tmp_path / "w", [Parameter("mu", td.Uniform(0.0, 1.0), unit="pb", label=r"\mu")])
    prior = {"distribution": "Uniform", "high": 1.0, "low": 0.0}
    table = {"mu": {"bounds": [0.0, 1.0], "name": "mu", "prior": prior, "unit": "pb"}}
    text = json.dumps([table, {}], sort_keys=True, separators=(",", ":"))
    assert registry.digest == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
