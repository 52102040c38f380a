"""The differentiable maximum: gradients against finite differences, closed forms and another differentiation."""

import math
import threading
import warnings

import pytest
import torch

from engine.argmax import argmax
from engine.errors import ParameterError
from engine.feasible import FeasibleSet, MatrixCone, NormCone
from engine.program import solve
from engine.standard_form import Standard

INF = math.inf
FIELDS = ("lower", "upper", "A", "b", "C", "d")


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def draws(seed):
    G = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=G, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=G, dtype=torch.float64)

    return normal, uniform


def feasible(P, lower=-INF, upper=INF, A=None, b=None, C=None, d=None, cones=()):
    none = torch.zeros(0, P, dtype=torch.float64)
    lower, upper = (torch.as_tensor(t, dtype=torch.float64) for t in (lower, upper))
    lower, upper = (t.expand(P) if not t.dim() else t for t in (lower, upper))
    parts = (none if A is None else A, none[:, 0] if b is None else b, none if C is None else C)
    return FeasibleSet(lower, upper, *parts, none[:, 0] if d is None else d, cones)


def problems(kind, K, P, seed=0):
    normal, uniform = draws(seed)
    B = normal(K, P, P)
    J, g = B @ B.mT / P + 0.1 * torch.eye(P, dtype=torch.float64), 2.0 * normal(K, P)
    if kind == "free":
        return J, g, feasible(P)
    if kind == "box":
        return J, g, feasible(P, -uniform(K, P), uniform(P))
    if kind == "linear":
        return (
            J,
            g,
            feasible(P, -uniform(P), uniform(K, P), normal(3, P), uniform(K, 3), normal(K, 1, P), tensor([0.0])),
        )
    if kind == "simplex":
        theta = -uniform(K, P).log()
        theta = theta / theta.sum(1, keepdim=True)
        one = torch.ones(1, P, dtype=torch.float64)
        return J, g, feasible(P, 0.0, INF, C=one, d=one[:, 0]).about(theta)
    F, B = normal(3, 3, P), normal(K, 3, 3)
    matrix = MatrixCone(F + F.transpose(0, 1), B @ B.mT / 3 + 0.1 * torch.eye(3).double())
    norm = NormCone(normal(2, P), 0.1 * normal(K, 2), 0.3 * normal(P), 0.5 + uniform(K))
    if kind == "matrix":
        return J, g, feasible(P, cones=(matrix,))
    if kind == "norm":
        return J, g, feasible(P, cones=(norm,))
    assert kind == "cones"
    inside = feasible(P, -uniform(K, P), uniform(K, P), normal(2, P), uniform(K, 2), normal(1, P), tensor([0.0]))
    return J, g, FeasibleSet(*(getattr(inside, n) for n in FIELDS), (norm, matrix))


def flat(J, g, inside):
    """Everything a problem is made of, by name."""
    parts = {"J": J, "g": g, **{n: getattr(inside, n) for n in FIELDS}}
    for i, cone in enumerate(inside.cones):
        parts |= {f"cone {i} {n}": t for n, t in vars(cone).items()}
    return parts


def built(parts, like):
    cones = [type(cone)(**{n: parts[f"cone {i} {n}"] for n in vars(cone)}) for i, cone in enumerate(like.cones)]
    return parts["J"], parts["g"], FeasibleSet(*(parts[n] for n in FIELDS), tuple(cones))


def worst_error(J, g, inside, seed=0, step=1e-4):
    """The largest relative error of derivatives along a random direction of each part, against Richardson's finite differences."""
    normal, _ = draws(seed)
    parts, v = flat(J, g, inside), normal(*g.shape)
    leaves = {n: t.clone().requires_grad_() for n, t in parts.items()}
    move, solved = argmax(*built(leaves, inside))
    assert solved.all()
    (move * v).sum().backward()
    worst = 0.0
    for name, t in parts.items():
        if not t.numel():
            continue
        along = torch.where(torch.isfinite(t), normal(*t.shape), 0.0)
        if name == "J":
            along = along + along.mT
        elif name.endswith("linear") and t.dim() == 3:
            along = along + along.transpose(0, 1)
        elif name.endswith("constant") and t.dim() == 3:
            along = along + along.mT

        def value(h, name=name, t=t, along=along):
            return (solve(*built(parts | {name: t + h * along}, inside)).move * v).sum()

        a, b = ((value(h) - value(-h)) / (2 * h) for h in (step, step / 2))
        slope = (4 * b - a) / 3
        given = leaves[name].grad
        got = torch.zeros(()) if given is None else (torch.where(torch.isfinite(t), given, 0.0) * along).sum()
        worst = max(worst, float((got - slope).abs() / (slope.abs() + along.norm() * 1e-2)))
    return worst


@pytest.mark.parametrize("kind", ["free", "box", "linear", "simplex"])
@pytest.mark.parametrize("P", [2, 5, 12])
def test_gradients_to_everything_agree_with_finite_differences(kind, P):
    J, g, inside = problems(kind, 5, P, seed=P)
    assert worst_error(J, g, inside) < 1e-7
    if kind != "free" and P > 2:
        found = solve(J, g, inside)
        assert (found.active_lower | found.active_upper).any(1).all()


@pytest.mark.parametrize("kind", ["matrix", "norm", "cones"])
def test_gradients_with_cones_agree_with_finite_differences(kind):
    J, g, inside = problems(kind, 4, 4, seed=1)
    found = solve(J, g, inside)
    assert all((Y.flatten(1).norm(dim=1) > 1e-3).any() for Y in found.cones)
    assert worst_error(J, g, inside, step=1e-3) < 1e-6


@pytest.mark.parametrize("near", [1e-6, -1e-6])
@pytest.mark.parametrize("as_row", [False, True])
def test_a_multiplier_or_slack_of_1e_6_is_enough_for_the_right_derivative(near, as_row):
    J = tensor([[[2.0, 0.5], [0.5, 1.0]]]).requires_grad_()
    top = tensor([[1.0, 0.3]])
    g = (J.detach() @ top[:, :, None])[:, :, 0].clone()
    g[0, 0] += near
    g.requires_grad_()
    inside = feasible(2, A=tensor([[1.0, 0.0]]), b=tensor([1.0])) if as_row else feasible(2, -INF, tensor([1.0, INF]))
    move, _ = argmax(J, g, inside)
    for i in range(2):
        (grad,) = torch.autograd.grad(move[0, i], g, retain_graph=True)
        free = torch.linalg.inv(J.detach())[0, i]
        expected = tensor([0.0, float(i)]) if near > 0 else free
        assert torch.allclose(grad[0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("as_row", [False, True])
def test_at_a_multiplier_of_zero_the_constraint_lets_go(as_row):
    g = tensor([[1.0, 0.3]]).requires_grad_()
    inside = feasible(2, A=tensor([[1.0, 0.0]]), b=tensor([1.0])) if as_row else feasible(2, -INF, tensor([1.0, INF]))
    move, _ = argmax(torch.eye(2).double()[None], g, inside)
    move.sum().backward()
    assert torch.allclose(g.grad, torch.ones(1, 2).double(), rtol=0, atol=1e-14)


def test_the_derivative_in_a_ball_is_that_of_the_radial_projection():
    normal, _ = draws(2)
    g = (3.0 * normal(4, 3)).requires_grad_()
    radius = tensor(0.5).requires_grad_()
    zero = torch.zeros(3).double()
    inside = feasible(3, cones=(NormCone(torch.eye(3).double(), zero, zero, radius),))
    v = normal(4, 3)
    move, _ = argmax(torch.eye(3).double().expand(4, 3, 3), g, inside)
    (move * v).sum().backward()
    n = g.detach() / g.detach().norm(dim=1, keepdim=True)
    tangent = v - n * (n * v).sum(1, keepdim=True)
    assert torch.allclose(g.grad, 0.5 / g.detach().norm(dim=1, keepdim=True) * tangent, rtol=0, atol=1e-8)
    assert torch.allclose(radius.grad, (n * v).sum(), rtol=0, atol=1e-8)


def test_the_derivative_of_the_nearest_positive_semidefinite_matrix_is_daleckii_and_kreins():
    normal, _ = draws(3)
    weight = tensor([1.0, 2.0, 1.0])
    F = torch.zeros(2, 2, 3).double()
    F[0, 0, 0] = F[0, 1, 1] = F[1, 0, 1] = F[1, 1, 2] = 1.0
    inside = feasible(3, cones=(MatrixCone(F, torch.zeros(2, 2).double()),))
    given = tensor([[1.0, 0.7, -0.5], [0.2, -1.0, 0.9]]).requires_grad_()
    v = normal(2, 3)
    move, _ = argmax(torch.diag(weight).expand(2, 3, 3), given * weight, inside)
    (grad,) = torch.autograd.grad((move * v).sum(), given)
    values, vectors = torch.linalg.eigh(torch.einsum("abp,kp->kab", F, given.detach()))
    low, high = values[:, 0], values[:, 1]
    assert (low < 0).all()
    assert (high > 0).all()
    mixed = high / (high - low)
    quotient = torch.stack([torch.stack([0.0 * mixed, mixed], 1), torch.stack([mixed, 0.0 * mixed + 1.0], 1)], 1)
    H = torch.einsum("abp,kp->kab", F, v / weight)
    inner = vectors @ (quotient * (vectors.mT @ H @ vectors)) @ vectors.mT
    assert torch.allclose(grad, torch.stack([inner[:, 0, 0], 2 * inner[:, 0, 1], inner[:, 1, 1]], 1), rtol=0, atol=1e-8)


def test_conic_gradients_agree_with_implicit_differentiation_of_the_optimality_conditions():
    J, g, inside = problems("cones", 4, 5, seed=4)
    normal, _ = draws(5)
    v = normal(4, 5)
    g.requires_grad_()
    (grad,) = torch.autograd.grad((argmax(J, g, inside)[0] * v).sum(), g)
    form = Standard.of(J, g, inside)
    found = solve(J, g.detach(), inside)
    # multipliers and slacks of the standard form; the Newton matrix of (y − c + G'λ, s ∘ λ), transposed
    first = torch.cat([found.equalities, found.lower, found.upper, found.inequalities], 1)
    matrix = found.cones[1]
    a, b = torch.tensor([0, 0, 1, 0, 1, 2]), torch.tensor([0, 1, 1, 2, 2, 2])
    triangle = matrix[:, a, b] * torch.where(a == b, 1.0, 2.0).double().sqrt()
    lam = torch.cat([first, found.cones[0], triangle], 1) / (form.weight * form.scale).detach()
    G, h = form.G.detach(), form.h.detach()
    z = (found.move - form.pinned.detach()) / form.unit
    y = (form.root.detach().mT @ z[:, :, None])[:, :, 0] / form.scale
    s = h - (G @ y[:, :, None])[:, :, 0]
    top = torch.cat([torch.eye(5).double().expand(4, 5, 5), G.mT], 2)
    bottom = torch.cat([-form.times(lam, dual=True) @ G, form.times(s, dual=False)], 2)
    moved = torch.autograd.grad((form.move(y_leaf := y.clone().requires_grad_()) * v).sum(), y_leaf)[0]
    right = torch.cat([moved, torch.zeros_like(lam)], 1)
    answer = torch.linalg.solve(torch.cat([top, bottom], 1).mT, right[:, :, None])[:, :5, 0]
    (expected,) = torch.autograd.grad((form.centre * answer).sum(), g)
    assert torch.allclose(grad, expected, rtol=1e-6, atol=1e-8)


def test_linear_gradients_agree_with_diffcp():
    import cvxpy as cp
    from cvxpylayers.torch.cvxpylayer import CvxpyLayer

    K, P = 4, 4
    J, g, inside = problems("linear", K, P, seed=6)
    normal, _ = draws(7)
    v = normal(K, P)
    d, root, slope = cp.Variable(P), cp.Parameter((P, P)), cp.Parameter(P)
    lower, upper, A, b, C = (
        cp.Parameter(P),
        cp.Parameter(P),
        cp.Parameter((3, P)),
        cp.Parameter(3),
        cp.Parameter((1, P)),
    )
    goal = cp.Minimize(0.5 * cp.sum_squares(root @ d) - slope @ d)
    sides = [d >= lower, d <= upper, A @ d <= b, C @ d == 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = CvxpyLayer(cp.Problem(goal, sides), [root, slope, lower, upper, A, b, C], [d])
        leaves = [t.clone().requires_grad_() for t in (J, g, inside.lower, inside.upper, inside.A, inside.b, inside.C)]
        factor = torch.linalg.cholesky(leaves[0]).mT
        (move,) = layer(factor, *leaves[1:], solver_args={"solve_method": "SCS", "eps": 1e-11, "mode": "dense"})
        expected = torch.autograd.grad((move * v).sum(), leaves)
    J, g, *rest = leaves
    ours, _ = argmax(J, g, FeasibleSet(*rest, torch.zeros(1).double()))
    assert torch.allclose(ours, move, rtol=0, atol=1e-7)
    for got, wanted in zip(torch.autograd.grad((ours * v).sum(), leaves), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["free", "box", "linear", "cones"])
def test_a_failed_problem_is_nan_and_its_neighbours_have_their_gradients(kind):
    J, g, inside = problems(kind, 6, 4, seed=8)
    v = draws(9)[0](6, 4)
    good = torch.tensor([0, 2, 5])

    def gradients(J, g, inside, **options):
        leaves = {n: t.clone().requires_grad_() for n, t in flat(J, g, inside).items()}
        move, solved = argmax(*built(leaves, inside), **options)
        torch.where(solved[:, None], move * v[: len(move)], 0.0).sum().backward()
        return leaves, move, solved

    clean, clean_move, _ = gradients(J, g, inside)
    J, g, lower = J.clone(), g.clone(), inside.lower.expand(6, 4).clone()
    J[1], g[3, 2], lower[4, 0] = -J[1], torch.nan, INF
    bad = inside.within(lower, inside.upper)
    for failed in ("nan", "zero"):
        leaves, move, solved = gradients(J, g, bad, failed=failed)
        assert solved.tolist() == [True, False, True, False, False, True]
        assert move[~solved].isnan().all()
        assert torch.allclose(move[good], clean_move[good], rtol=0, atol=1e-13)
        for name in ("J", "g"):
            assert torch.allclose(leaves[name].grad[good], clean[name].grad[good], rtol=1e-6, atol=1e-8)
            lost = leaves[name].grad[~solved]
            assert lost.isnan().all() if failed == "nan" else (lost == 0).all()
        for name, leaf in leaves.items():
            shared = name in ("A", "upper") and leaf.dim() == (1 if name == "upper" else 2)
            if leaf.grad is not None and shared and leaf.numel():  # one value for the whole batch
                assert leaf.grad.isnan().all() == (failed == "nan")
            if leaf.grad is not None and failed == "zero":
                assert torch.isfinite(leaf.grad).all()


def test_infeasible_problems_in_a_batch_are_reported():
    J, g, inside = problems("linear", 4, 4, seed=10)
    b = inside.b.clone()
    inside = feasible(4, inside.lower, inside.upper, torch.ones(3, 4).double(), b, inside.C, inside.d)
    b[2] = -100.0
    g.requires_grad_()
    move, solved = argmax(J, g, inside, failed="zero")
    assert solved.tolist() == [True, True, False, True]
    move[solved].sum().backward()
    assert (g.grad[2] == 0).all()
    assert (g.grad[[0, 1, 3]] != 0).any(1).all()


def test_tiny_cotangents_are_not_lost():
    for kind in ("box", "linear", "cones"):
        J, g, inside = problems(kind, 3, 4, seed=11)
        v = draws(12)[0](3, 4)
        g.requires_grad_()
        move = argmax(J, g, inside)[0]
        (big,) = torch.autograd.grad((move * v).sum(), g, retain_graph=True)
        (small,) = torch.autograd.grad((move * v * 1e-14).sum(), g)
        assert torch.allclose(small * 1e14, big, rtol=1e-6, atol=1e-9)
        assert big.abs().max() > 0.01


def test_equal_bounds_share_their_derivative():
    low = tensor([[-1.0, 0.2]]).requires_grad_()
    high = tensor([[1.0, 0.2]]).requires_grad_()
    J = tensor([[[1.0, 0.5], [0.5, 1.0]]])
    move, _ = argmax(J, tensor([[0.3, 0.0]]), FeasibleSet.box(low, high))
    move.sum().backward()
    assert torch.allclose(low.grad, tensor([[0.0, 0.25]]))  # ½ (1 − J₁₂/J₁₁)
    assert torch.equal(low.grad, high.grad)


def test_redundant_rows_share_one_derivative():
    normal, _ = draws(13)
    J, g, inside = problems("linear", 3, 4, seed=13)
    v = normal(3, 4)
    totals = []
    for copies in (1, 3):
        b = inside.b.repeat(1, copies).requires_grad_()
        slope = g.clone().requires_grad_()
        rows = feasible(4, inside.lower, inside.upper, inside.A.repeat(copies, 1), b, inside.C, inside.d)
        move, solved = argmax(J, slope, rows)
        assert solved.all()
        (move * v).sum().backward()
        totals.append((b.grad.reshape(3, copies, 3).sum(1), slope.grad))
    assert torch.allclose(totals[0][0], totals[1][0], rtol=0, atol=1e-12)
    assert torch.allclose(totals[0][1], totals[1][1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["free", "box", "linear", "cones"])
def test_batches_of_none_and_of_one(kind):
    J, g, inside = problems(kind, 3, 4, seed=14)
    slope = g[:0].clone().requires_grad_()
    move, solved = argmax(J[:0], slope, inside.rows(torch.zeros(3, dtype=torch.bool)))
    assert move.shape == (0, 4)
    assert solved.shape == (0,)
    move.sum().backward()
    whole = g.clone().requires_grad_()
    argmax(J, whole, inside)[0].sum().backward()
    one = g[:1].clone().requires_grad_()
    move, _ = argmax(J[:1], one, inside.rows(torch.arange(1)))
    move.sum().backward()
    assert torch.allclose(one.grad, whole.grad[:1], rtol=1e-7, atol=1e-9)


def test_an_asymmetric_curvature_counts_by_its_symmetric_part():
    J, g, inside = problems("box", 3, 4, seed=15)
    skew = draws(16)[0](3, 4, 4)
    lopsided = (J + skew - skew.mT).requires_grad_()
    even = J.clone().requires_grad_()
    one, two = argmax(lopsided, g, inside)[0], argmax(even, g, inside)[0]
    assert torch.allclose(one, two, rtol=0, atol=1e-13)
    one.sum().backward()
    two.sum().backward()
    assert torch.allclose(lopsided.grad, even.grad, rtol=0, atol=1e-12)


def test_two_threads_at_once_get_the_same_bits():
    tasks = [problems(kind, 20, 4, seed=17) for kind in ("box", "linear", "simplex", "linear")]

    def gradient(task):
        J, g, inside = task
        slope = g.clone().requires_grad_()
        move, _ = argmax(J, slope, inside)
        move.sum().backward()
        return move.detach(), slope.grad

    alone = [gradient(task) for task in tasks]
    results: dict[int, list] = {}

    def work(name):
        results[name] = [gradient(task) for _ in range(3) for task in tasks]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in results.values():
        for i, (move, grad) in enumerate(got):
            assert torch.equal(move, alone[i % 4][0])
            assert torch.equal(grad, alone[i % 4][1])


def test_nothing_global_changes_and_thread_counts_change_no_bit():
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    filters = list(warnings.filters)
    try:
        for kind in ("box", "linear", "cones"):
            J, g, inside = problems(kind, 3 if kind == "cones" else 300, 4, seed=18)
            keep = solve(J, g, inside).solved
            J, g, inside = J[keep], g[keep].requires_grad_(), inside.rows(keep)
            both = []
            for count in (1, 2):
                torch.set_num_threads(count)
                move, _ = argmax(J, g, inside)
                both.append((move.detach(), torch.autograd.grad(move.sum(), g)[0]))
                assert torch.get_num_threads() == count
            assert torch.equal(both[0][0], both[1][0])
            assert torch.equal(both[0][1], both[1][1])
    finally:
        torch.set_num_threads(before[0])
    assert torch.get_default_dtype() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert warnings.filters == filters


def test_misuse_is_named():
    J, g, inside = problems("box", 2, 3)
    with pytest.raises(ParameterError, match=r"failed must be 'nan' or 'zero', got 'skip'"):
        argmax(J, g, inside, failed="skip")
    with pytest.raises(ParameterError, match=r"slope must have shape \(K, P\) and curvature"):
        argmax(J[0], g, inside)
