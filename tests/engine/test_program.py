"""Batched quadratic programs: against Clarabel, closed forms and the optimality conditions themselves."""

import math
import warnings

import pytest
import torch
from scipy.optimize import linprog

from engine.active_set import Problem
from engine.central_path import follow, nearest
from engine.errors import ParameterError
from engine.feasible import FeasibleSet, MatrixCone, NormCone
from engine.implicit import respond
from engine.program import solve

INF = math.inf


def draws(seed):
    G = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=G, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=G, dtype=torch.float64)

    return normal, uniform


def curvatures(normal, K, P):
    B = normal(K, P, P)
    return B @ B.mT / P + 0.05 * torch.eye(P, dtype=torch.float64)


def linear_set(P, lower=-INF, upper=INF, A=None, b=None, C=None, d=None, cones=()):
    """Missing parts filled in."""
    none = torch.zeros(0, P, dtype=torch.float64)
    lower, upper = (torch.as_tensor(t, dtype=torch.float64) for t in (lower, upper))
    lower, upper = (t.expand(P) if not t.dim() else t for t in (lower, upper))
    parts = (none if A is None else A, none[:, 0] if b is None else b, none if C is None else C)
    return FeasibleSet(lower, upper, *parts, none[:, 0] if d is None else d, cones)


def problems(kind, K, P, seed=0):
    normal, uniform = draws(seed)
    J, g = curvatures(normal, K, P), 3.0 * normal(K, P)
    if kind == "box":
        return J, g, FeasibleSet.box(-uniform(K, P), uniform(K, P))
    if kind == "rows":  # several of them cut the unconstrained maximum off: most go through the interior point
        return J, g, linear_set(P, A=normal(K, 2 * P, P), b=uniform(K, 2 * P))
    if kind == "all":
        return (
            J,
            g,
            linear_set(P, -uniform(K, P), uniform(P), normal(P, P), uniform(K, P), normal(K, 1, P), uniform(1) * 0),
        )
    assert kind == "simplex"
    theta = -uniform(K, P).log()
    theta = theta / theta.sum(1, keepdim=True)
    one = torch.ones(1, P, dtype=torch.float64)
    return J, g, linear_set(P, 0.0, INF, C=one, d=one[:, 0]).about(theta)


def row(t, k, dim):
    return t[k] if t.dim() > dim else t


def by_clarabel(J, g, inside, k):
    import cvxpy as cp

    d = cp.Variable(g.shape[1])
    sides = []
    for sign, bound in ((1, row(inside.upper, k, 1)), (-1, row(inside.lower, k, 1))):
        there = torch.isfinite(bound)
        if there.any():
            sides.append(sign * d[there.nonzero()[:, 0].numpy()] <= sign * bound[there].numpy())
    if inside.A.shape[-2]:
        sides.append(row(inside.A, k, 2).numpy() @ d <= row(inside.b, k, 1).numpy())
    if inside.C.shape[-2]:
        sides.append(row(inside.C, k, 2).numpy() @ d == row(inside.d, k, 1).numpy())
    for cone in inside.cones:
        if isinstance(cone, MatrixCone):
            F = sum(cone.linear[:, :, j].numpy() * d[j] for j in range(g.shape[1]))
            sides.append(F + row(cone.constant, k, 2).numpy() >> 0)
        else:
            length = cp.norm(cone.linear.numpy() @ d + row(cone.constant, k, 1).numpy())
            sides.append(length <= cone.slope.numpy() @ d + row(cone.radius, k, 0).numpy())
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(d, cp.psd_wrap(J[k].numpy())) - g[k].numpy() @ d), sides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return problem.status, None if d.value is None else torch.as_tensor(d.value)


def conditions(J, g, inside, found):
    """The worst violation of the optimality conditions, computed from what came back alone."""
    d = found.move

    def times(matrix, vector):
        return torch.einsum("...ij,...j->...i", matrix, vector)

    force = found.upper - found.lower + times(inside.A.mT, found.inequalities) + times(inside.C.mT, found.equalities)
    slacks = [
        (d - inside.lower, found.lower),
        (inside.upper - d, found.upper),
        (inside.b - times(inside.A, d), found.inequalities),
    ]
    worst = [times(inside.C, d) - inside.d]
    for cone, Y in zip(inside.cones, found.cones, strict=True):
        if isinstance(cone, MatrixCone):
            force = force - torch.einsum("abp,kab->kp", cone.linear, Y)
            X = cone.matrix(d)
            worst += [X @ Y, torch.linalg.eigvalsh(X).clamp_max(0.0), torch.linalg.eigvalsh(Y).clamp_max(0.0)]
        else:
            force = force - Y[:, :1] * cone.slope - Y[:, 1:] @ cone.linear
            s = torch.cat([(d @ cone.slope + cone.radius)[:, None], d @ cone.linear.mT + cone.constant], 1)
            worst += [(s * Y).sum(-1), cone.slack(d).clamp_max(0.0), (Y[:, 0] - Y[:, 1:].norm(dim=-1)).clamp_max(0.0)]
    worst.append(g - times(J, d) - force)
    for slack, multiplier in slacks:
        assert (multiplier >= 0).all()
        worst += [slack.clamp_max(0.0), torch.where(multiplier > 0, slack * multiplier, 0.0)]
    return max(float(t.abs().max()) for t in worst if t.numel())


@pytest.mark.parametrize("kind", ["box", "rows", "all", "simplex"])
@pytest.mark.parametrize("P", [1, 2, 5, 12, 30])
def test_every_maximum_satisfies_the_optimality_conditions_to_rounding(kind, P):
    J, g, inside = problems(kind, 64, P, seed=P)
    found = solve(J, g, inside)
    assert found.solved.all()
    assert not found.infeasible.any()
    assert (found.residual < 1e-13).all()
    assert conditions(J, g, inside, found) < 1e-11


@pytest.mark.parametrize("kind", ["box", "rows", "all", "simplex"])
def test_maxima_are_those_that_clarabel_finds(kind):
    for P in (2, 6):
        J, g, inside = problems(kind, 8, P, seed=10 + P)
        found = solve(J, g, inside)
        for k in range(8):
            status, d = by_clarabel(J, g, inside, k)
            assert status in ("optimal", "optimal_inaccurate")
            assert torch.allclose(found.move[k], d, rtol=0, atol=2e-6)


def test_many_bounds_are_active_in_these_tests():
    found = solve(*problems("box", 64, 12))
    assert (found.active_lower | found.active_upper).double().mean() > 0.5
    assert not (found.active_lower & found.active_upper).any()


@pytest.mark.parametrize("excess", [1e-6, 1e-9, -1e-6, -1e-9, 0.0])
def test_a_tiny_multiplier_and_a_tiny_slack_are_told_apart(excess):
    one = torch.ones(1, 2).double()
    eye = torch.eye(2).double()[None]
    g = torch.tensor([[1.0 + excess, 0.25]], dtype=torch.float64)
    for inside in (
        FeasibleSet.box(-one, one),
        linear_set(2, A=torch.tensor([[2.0, 0.0]]).double(), b=2.0 * one[0, :1]),
    ):
        found = solve(eye, g, inside)
        assert found.solved.all()
        assert torch.allclose(found.move, g.clamp_max(1.0), rtol=0, atol=1e-15)
        active = torch.cat([found.active_upper, found.active_inequalities], 1).any()
        assert bool(active) == (excess > 0)
        multiplier = found.upper[0, 0] + 2.0 * found.inequalities.sum()
        assert abs(float(multiplier) - max(excess, 0.0)) < 1e-15


def test_a_vertex_may_have_more_constraints_than_components():
    normal, _ = draws(3)
    P, K = 3, 20
    A = normal(K, 4 * P, P)
    A = A * A[:, :, :1].sign()  # all point to +x: the origin is a vertex of {A d ≤ 0}
    J, weight = curvatures(normal, K, P), normal(K, 4 * P).abs()
    g = (A.mT @ weight[:, :, None])[:, :, 0]
    inside = linear_set(P, A=A, b=torch.zeros(4 * P).double())
    found = solve(J, g, inside)
    assert found.solved.all()
    assert found.move.abs().max() < 1e-13
    assert conditions(J, g, inside, found) < 1e-12


def test_redundant_rows_and_dependent_equalities_change_nothing():
    J, g, plain = problems("all", 40, 5, seed=4)
    twice = linear_set(
        5,
        plain.lower,
        plain.upper,
        torch.cat([plain.A, 3.0 * plain.A, torch.eye(5).double(), torch.zeros(1, 5).double()]),
        torch.cat([plain.b, 3.0 * plain.b, plain.upper.expand(40, 5), torch.zeros(40, 1).double()], 1),
        torch.cat([plain.C, -2.0 * plain.C, plain.C], 1),
        torch.zeros(3).double(),
    )
    one, other = solve(J, g, plain), solve(J, g, twice)
    assert one.solved.all()
    assert other.solved.all()
    assert torch.allclose(one.move, other.move, rtol=0, atol=1e-13)
    assert conditions(J, g, twice, other) < 1e-12


def test_a_set_without_an_interior_is_no_obstacle():
    normal, uniform = draws(5)
    K, P = 30, 4
    J, g, A, b = curvatures(normal, K, P), normal(K, P), normal(K, 1, P), uniform(K, 1)
    pair = linear_set(P, A=torch.cat([A, -A], 1), b=torch.cat([b, -b], 1))
    equal = solve(J, g, linear_set(P, C=A, d=b))
    found = solve(J, g, pair)
    assert found.solved.all()
    assert torch.allclose(found.move, equal.move, rtol=0, atol=1e-12)
    corner = linear_set(P, 0.0, INF, torch.ones(1, P).double(), torch.zeros(1).double())
    assert (solve(J, g, corner).move.abs() < 1e-14).all()


def test_equal_bounds_hold_a_component():
    J, g, inside = problems("all", 40, 6, seed=6)
    held = torch.arange(6) % 3 == 0
    value = torch.where(held, 0.01, inside.upper)
    inside = inside.within(torch.where(held, value, inside.lower), value.expand(40, 6))
    found = solve(J, g, inside)
    assert (found.move[found.solved][:, held] == 0.01).all()
    assert found.solved.sum() > 30
    assert (found.active_lower & found.active_upper)[found.solved][:, held].all()
    keep = found.solved
    good = solve(J[keep], g[keep], inside.rows(keep))
    assert conditions(J[keep], g[keep], inside.rows(keep), good) < 1e-12
    # everything held
    still = solve(J, g, FeasibleSet.box(g, g))
    assert (still.move == g).all()


def test_units_of_parameters_do_not_matter():
    J, g, inside = problems("all", 30, 5, seed=7)
    unit = torch.tensor([1e-9, 1e-3, 1.0, 1e4, 1e9]).double()
    scaled = linear_set(
        5, inside.lower * unit, inside.upper * unit, inside.A / unit, inside.b, 1e7 * inside.C / unit, inside.d
    )
    one, other = solve(J, g, inside), solve(J / unit / unit[:, None], g / unit, scaled)
    assert torch.allclose(one.move, other.move / unit, rtol=0, atol=1e-13)
    assert (one.active_lower == other.active_lower).all()
    assert torch.allclose(one.equalities, 1e7 * other.equalities, rtol=1e-9, atol=1e-12)


def test_narrow_and_wide_sets_and_strong_slopes_are_solved_as_well():
    normal, uniform = draws(8)
    K, P = 40, 5
    J, A = curvatures(normal, K, P), normal(K, P, P)
    narrow = linear_set(P, -1e-6 * uniform(K, P), 1e-6 * uniform(K, P), A, 1e-6 * uniform(K, P))
    found = solve(J, 1e6 * normal(K, P), narrow)
    assert found.solved.all()
    assert narrow.reach(torch.zeros(K, P).double(), found.move).min() > 1 - 1e-9
    wide = linear_set(P, -1e10 * uniform(K, P), 1e12 * uniform(K, P), A, 1e9 * uniform(K, P))
    g = normal(K, P)
    assert torch.allclose(solve(J, g, wide).move, torch.linalg.solve(J, g), rtol=0, atol=1e-11)


def test_an_ill_conditioned_curvature_is_solved_to_its_rounding():
    normal, uniform = draws(9)
    K, P = 40, 6
    Q = torch.linalg.qr(normal(K, P, P))[0]
    J = Q @ torch.diag(torch.logspace(0, -8, P, dtype=torch.float64)) @ Q.mT
    found = solve(J, normal(K, P), FeasibleSet.box(-uniform(K, P), uniform(K, P)))
    assert found.solved.all()
    assert (found.residual < 1e-13).all()


def test_infeasible_problems_are_recognised_and_agree_with_clarabel():
    normal, uniform = draws(11)
    K, P = 40, 4
    J, g = curvatures(normal, K, P), normal(K, P)
    inside = linear_set(P, -uniform(K, P), uniform(K, P), normal(K, 2 * P, P), uniform(K, 2 * P) - 0.5)
    found = solve(J, g, inside)
    assert (found.solved ^ found.infeasible).all()
    assert 5 < found.infeasible.sum() < 35
    assert found.move[found.infeasible].isnan().all()
    for k in range(0, K, 4):
        assert by_clarabel(J, g, inside, k)[0].startswith("infeasible") == bool(found.infeasible[k])


@pytest.mark.parametrize("P", [2, 3, 5])
@pytest.mark.parametrize(("m", "e"), [(0, 0), (0, 2), (3, 0), (8, 1), (8, 2)])
def test_small_integers_tie_in_every_way_and_none_is_lost(P, m, e):
    G = torch.Generator().manual_seed(100 * P + 10 * m + e)
    K = 300

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=G).double()

    B = integers(-1, 1, K, P, P)
    J, g = B @ B.mT + torch.eye(P).double(), integers(-3, 3, K, P)
    lower = torch.where(integers(0, 3, K, P) == 0, -INF, -integers(0, 2, K, P))
    upper = torch.where(integers(0, 3, K, P) == 0, INF, integers(0, 2, K, P))
    shift = integers(0, 1, K, 1)
    A, C = integers(-1, 1, K, m, P), integers(-1, 1, K, e, P)
    inside = FeasibleSet(lower, upper, A, integers(0, 2, K, m) - shift, C, shift * integers(0, 1, K, e))
    found = solve(J, g, inside)
    assert (found.solved ^ found.infeasible).all()
    keep = found.solved
    assert conditions(J[keep], g[keep], inside.rows(keep), solve(J[keep], g[keep], inside.rows(keep))) < 1e-11
    for k in found.infeasible.nonzero()[:8, 0].tolist():
        sides = {"A_ub": A[k].numpy(), "b_ub": inside.b[k].numpy()} if m else {}
        sides |= {"A_eq": C[k].numpy(), "b_eq": inside.d[k].numpy()} if e else {}
        ranges = list(zip(lower[k].tolist(), upper[k].tolist(), strict=True))
        assert linprog([0.0] * P, **sides, bounds=ranges).status == 2


def test_the_interior_point_and_the_distance_find_the_active_constraints_alone():
    J, g, inside = problems("all", 40, 6, seed=20)
    found = solve(J, g, inside)
    unit = J.diagonal(dim1=1, dim2=2).rsqrt()
    E = torch.cat([inside.A.expand(40, 6, 6), inside.C], 1) * unit[:, None, :]
    f, size = torch.cat([inside.b, inside.d.expand(40, 1)], 1), E.norm(dim=-1)
    scaled = J * unit[:, :, None] * unit[:, None, :]
    whitened = Problem(scaled, g * unit, inside.lower / unit, inside.upper / unit, E / size[:, :, None], f / size, 6)
    for method in (follow, nearest):
        low, high, on, _, infeasible = method(whitened)
        assert not infeasible.any()
        assert torch.equal(low, found.active_lower)
        assert torch.equal(high, found.active_upper)
        assert torch.equal(on[:, :6], found.active_inequalities)


@pytest.mark.parametrize(
    ("A", "b", "C", "d"),
    [
        ([[1.0, 0.0], [-1.0, 0.0]], [0.0, -0.1], [], []),
        ([], [], [[1.0, 1.0], [2.0, 2.0]], [1.0, 2.1]),
        ([[0.0, 0.0]], [-1.0], [], []),
        ([[1.0, 1.0]], [-0.1], [[1.0, 1.0]], [0.0]),
        ([[1.0, 1.0]], [-INF], [], []),
    ],
)
def test_plain_contradictions_are_infeasible(A, b, C, d):
    A, b, C, d = (torch.tensor(t).double() for t in (A, b, C, d))
    inside = linear_set(2, -9.0, 9.0, A.reshape(-1, 2), b, C.reshape(-1, 2), d)
    found = solve(torch.eye(2).double()[None], torch.ones(1, 2).double(), inside)
    assert found.infeasible.all()
    assert not found.solved.any()


@pytest.mark.parametrize("kind", ["box", "all", "cone"])
def test_bad_problems_do_not_spoil_their_neighbours(kind):
    J, g, inside = problems("all" if kind == "cone" else kind, 12, 4, seed=12)
    if kind == "cone":
        inside = linear_set(4, inside.lower, inside.upper, cones=(ball(4),))
    good = solve(J, g, inside)
    J, g, lower = J.clone(), g.clone(), inside.lower.clone()
    J[1, 0, 1], J[2], g[4, 3], g[5, 0], lower[7, 1], lower[8, 1] = torch.nan, -J[2], torch.nan, INF, 2.0, torch.nan
    J[10] = 0.0
    lower[11] = INF
    found = solve(J, g, inside.within(lower, inside.upper))
    bad = torch.tensor([1, 2, 4, 5, 7, 8, 10, 11])
    assert not found.solved[bad].any()
    assert found.move[bad].isnan().all()
    assert found.infeasible.nonzero()[:, 0].tolist() == [7, 11]
    rest = torch.tensor([0, 3, 6, 9])
    assert found.solved[rest].all()
    assert torch.allclose(found.move[rest], good.move[rest], rtol=0, atol=1e-13)


def ball(P):
    """‖d‖ ≤ 1/2."""
    zero = torch.zeros(P).double()
    return NormCone(torch.eye(P).double(), zero, zero, torch.tensor(0.5).double())


def matrices():
    """d = (a, b, c) as [[a, b], [b, c]] ⪰ 0."""
    F = torch.zeros(2, 2, 3).double()
    F[0, 0, 0] = F[0, 1, 1] = F[1, 0, 1] = F[1, 1, 2] = 1.0
    return MatrixCone(F, torch.zeros(2, 2).double())


def test_a_maximum_in_a_ball_is_the_radial_projection():
    normal, _ = draws(13)
    g = normal(10, 3) * torch.linspace(0.01, 3.0, 10).double()[:, None]
    found = solve(torch.eye(3).double().expand(10, 3, 3), g, linear_set(3, cones=(ball(3),)))
    length = g.norm(dim=1, keepdim=True)
    assert found.solved.all()
    assert torch.allclose(found.move, g * (0.5 / length).clamp_max(1.0), rtol=0, atol=1e-13)
    assert torch.allclose(found.cones[0][:, 0], (length - 0.5).clamp_min(0.0)[:, 0], rtol=0, atol=1e-12)


def test_the_nearest_positive_semidefinite_matrix_drops_negative_eigenvalues():
    normal, _ = draws(14)
    g = normal(20, 3)
    J = torch.diag(torch.tensor([1.0, 2.0, 1.0])).double().expand(20, 3, 3)  # the Frobenius norm
    given = torch.stack([g[:, :2], g[:, 1:]], 1)
    values, vectors = torch.linalg.eigh(given)
    nearest = (vectors * values.clamp_min(0.0)[:, None, :]) @ vectors.mT
    slope = g * torch.tensor([1.0, 2.0, 1.0])
    found = solve(J, slope, linear_set(3, cones=(matrices(),)))
    assert found.solved.all()
    assert torch.allclose(matrices().matrix(found.move), nearest, rtol=0, atol=1e-13)
    assert torch.allclose(found.cones[0], nearest - given, rtol=0, atol=1e-12)


def cone_problems(K, P, seed):
    normal, uniform = draws(seed)
    F, B = normal(3, 3, P), normal(K, 3, 3)
    matrix = MatrixCone(F + F.transpose(0, 1), B @ B.mT / 3 + 0.1 * torch.eye(3).double())
    norm = NormCone(normal(2, P), 0.1 * normal(K, 2), 0.3 * normal(P), 0.5 + uniform(K))
    inside = linear_set(
        P,
        -uniform(K, P),
        uniform(K, P),
        normal(2, P),
        uniform(K, 2),
        normal(1, P),
        torch.zeros(1).double(),
        (matrix, norm),
    )
    return curvatures(normal, K, P), 3.0 * normal(K, P), inside


def test_bounds_rows_matrices_and_norms_together():
    J, g, inside = cone_problems(12, 5, 15)
    found = solve(J, g, inside)
    assert found.solved.all()
    assert conditions(J, g, inside, found) < 1e-11
    for k in range(4):
        status, d = by_clarabel(J, g, inside, k)
        assert status in ("optimal", "optimal_inaccurate")
        assert torch.allclose(found.move[k], d, rtol=0, atol=1e-5)
    unit = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6]).double()
    matrix, norm = inside.cones
    scaled = FeasibleSet(
        inside.lower * unit,
        inside.upper * unit,
        inside.A / unit,
        inside.b,
        inside.C / unit,
        inside.d,
        (
            MatrixCone(matrix.linear / unit, matrix.constant),
            NormCone(norm.linear / unit, norm.constant, norm.slope / unit, norm.radius),
        ),
    )
    other = solve(J / unit / unit[:, None], g / unit, scaled)
    assert torch.allclose(found.move, other.move / unit, rtol=0, atol=1e-12)


def test_cones_with_held_components_and_without_a_feasible_point():
    J, g, inside = cone_problems(6, 4, 16)
    none = linear_set(4, inside.lower, inside.upper, cones=inside.cones)
    held = none.within(
        torch.where(torch.arange(4) == 2, 0.01, none.lower), torch.where(torch.arange(4) == 2, 0.01, none.upper)
    )
    found = solve(J, g, held)
    assert found.solved.all()
    assert (found.move[:, 2] == 0.01).all()
    assert conditions(J, g, held, found) < 1e-11
    far = linear_set(4, 3.0, 4.0, cones=(ball(4),))
    impossible = solve(J, g, far)
    assert impossible.infeasible.all()
    assert impossible.move.isnan().all()


def test_what_a_face_answers_is_the_derivative_of_the_maximum():
    J, g, inside = problems("all", 20, 5, seed=17)
    found = solve(J, g, inside)
    rows = torch.cat([inside.A.expand(20, -1, -1), inside.C], 1)
    on = torch.cat([found.active_inequalities, torch.ones(20, 1, dtype=torch.bool)], 1)
    normal, _ = draws(18)
    v, dg = normal(20, 5), normal(20, 5)
    u, w, t = respond(J, rows, found.active_lower | found.active_upper, on, v)
    left = (J @ u[:, :, None] + rows.mT @ w[:, :, None])[:, :, 0] + t
    assert torch.allclose(left, v, rtol=0, atol=1e-12)
    slope = (solve(J, g + 1e-6 * dg, inside).move - solve(J, g - 1e-6 * dg, inside).move) / 2e-6
    assert torch.allclose((v * slope).sum(1), (u * dg).sum(1), rtol=1e-6, atol=1e-8)


def test_no_problem_and_one_problem_are_batches_too():
    J, g, inside = problems("all", 3, 4)
    empty = solve(J[:0], g[:0], inside.rows(torch.zeros(3, dtype=torch.bool)))
    assert empty.move.shape == (0, 4)
    assert empty.solved.shape == (0,)
    assert torch.allclose(
        solve(J[:1], g[:1], inside.rows(torch.arange(1))).move, solve(J, g, inside).move[:1], atol=1e-14
    )


def test_shapes_that_do_not_fit_are_named():
    J, g, inside = problems("all", 3, 4)
    with pytest.raises(ParameterError, match=r"slope must have shape \(K, P\).*got \(4,\)"):
        solve(J[0], g[0], inside)
    with pytest.raises(ParameterError, match=r"b of the set must have shape \(4,\) or \(3, 4\), got \(2, 4\)"):
        solve(J, g, linear_set(4, A=inside.A, b=inside.b[:2]))
    with pytest.raises(ParameterError, match=r"lower of the set must have shape \(4,\) or \(3, 4\), got \(1,\)"):
        solve(J, g, FeasibleSet.box(g[0, :1], g))
    with pytest.raises(ParameterError, match=r"the linear part of cone 0 must have shape \(3, 4\), got \(3, 3\)"):
        solve(J, g, linear_set(4, cones=(ball(3),)))


def test_threads_change_no_bit_and_nothing_global_changes():
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    try:
        for kind in ("box", "all"):
            J, g, inside = problems(kind, 3000, 5, seed=19)
            moves = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                moves.append(solve(J, g, inside).move)
                assert torch.get_num_threads() == threads
            assert torch.equal(*moves)
    finally:
        torch.set_num_threads(before[0])
    assert torch.get_default_dtype() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
