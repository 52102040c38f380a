"""Derivatives through cones: closed forms however strong the slope, and two differentiations of one problem."""

import math

import pytest
import torch

from engine.argmax import argmax
from engine.conic import project, solve_conic
from engine.convex_layers import project_by_iterations
from engine.feasible import FeasibleSet, MatrixCone, NormCone
from engine.standard_form import Standard


def normals(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cones_alone(P, *cones):
    none, inf = torch.zeros(0, P, dtype=torch.float64), torch.full((P,), math.inf, dtype=torch.float64)
    return FeasibleSet(-inf, inf, none, none[:, 0], none, none[:, 0], cones)


def ball(P, radius=0.5):
    zero = torch.zeros(P, dtype=torch.float64)
    return NormCone(torch.eye(P, dtype=torch.float64), zero, zero, torch.as_tensor(radius, dtype=torch.float64))


def symmetric(n):
    """d as the upper triangle of a matrix ⪰ 0, and the weights of the Frobenius norm."""
    a, b = torch.triu_indices(n, n)
    F = torch.zeros(n, n, len(a), dtype=torch.float64)
    F[a, b, torch.arange(len(a))] = F[b, a, torch.arange(len(a))] = 1.0
    return MatrixCone(F, torch.zeros(n, n, dtype=torch.float64)), torch.where(a == b, 1.0, 2.0).double()


def relative(got, wanted):
    return float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


@pytest.mark.parametrize("strength", [1.0, 30.0, 1e3, 1e5, 1e7])
def test_in_a_ball_a_slope_of_any_strength_has_the_radial_projection_s_derivative(strength):
    g, v = 3.0 * strength * normals(0, 6, 4), normals(1, 6, 4)
    leaf, radius = g.clone().requires_grad_(), torch.tensor(0.5).double().requires_grad_()
    move, solved = argmax(torch.eye(4).double().expand(6, 4, 4), leaf, cones_alone(4, ball(4, radius)))
    assert solved.all()
    (move * v).sum().backward()
    length = g.norm(dim=1, keepdim=True)
    n = g / length
    assert relative(leaf.grad, 0.5 / length * (v - n * (n * v).sum(1, keepdim=True))) < 1e-6
    assert torch.allclose(radius.grad, (n * v).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("strength", [1.0, 30.0, 1e3, 1e5, 1e7])
def test_the_nearest_positive_semidefinite_matrix_has_daleckii_and_krein_s_derivative_at_any_strength(strength):
    cone, weight = symmetric(3)
    # eigenvalues of size one, and negative ones of the strength: the slope pushes hard against the cone
    vectors = torch.linalg.qr(normals(2, 5, 3, 3))[0]
    values = torch.tensor([1.5, -1.0, -0.3]).double() * torch.tensor([1.0, strength, strength]).double()
    given = (vectors * values) @ vectors.mT
    a, b = torch.triu_indices(3, 3)
    leaf, v = given[:, a, b].clone().requires_grad_(), normals(3, 5, 6)
    move, solved = argmax(torch.diag(weight).expand(5, 6, 6), leaf * weight, cones_alone(6, cone))
    assert solved.all()
    (grad,) = torch.autograd.grad((move * v).sum(), leaf)
    up = values.clamp_min(0.0)
    quotient = (up[:, None] - up) / (values[:, None] - values + torch.eye(3).double()) + torch.diag((up > 0).double())
    H = torch.einsum("abp,kp->kab", cone.linear, v / weight)
    inner = vectors @ (quotient * (vectors.mT @ H @ vectors)) @ vectors.mT
    assert relative(grad, inner[:, a, b] * weight) < 1e-6


def mixed(K, P, seed, strength):
    """Bounds, rows, an equality, a norm and a matrix, all with an interior about 0."""
    F, B, eye = normals(seed, 3, 3, P), normals(seed + 1, K, 3, 3), torch.eye(3, dtype=torch.float64)
    matrix = MatrixCone(F + F.transpose(0, 1), B @ B.mT / 3 + 0.1 * eye)
    norm = NormCone(normals(seed + 2, 2, P), 0.1 * normals(seed + 3, K, 2), 0.3 * normals(seed + 4, P), 1.0 + eye[0, 0])
    lower, upper, b = -normals(seed + 5, K, P).abs(), normals(seed + 6, K, P).abs(), normals(seed + 7, K, 2).abs()
    A, C, B = normals(seed + 8, 2, P), normals(seed + 9, 1, P), normals(seed + 10, K, P, P)
    J = B @ B.mT / P + 0.1 * torch.eye(P, dtype=torch.float64)
    g = 3.0 * strength * normals(seed + 11, K, P)
    return J, g, FeasibleSet(lower, upper, A, b, C, torch.zeros(1, dtype=torch.float64), (norm, matrix))


@pytest.mark.parametrize("strength", [0.1, 1.0, 5.0])
def test_both_differentiations_agree_where_both_work(strength):
    J, g, inside = mixed(6, 5, 20, strength)
    _, y, lam = solve_conic(J, g, inside)
    form, v, gradients = Standard.of(J, g, inside), normals(40, 6, 5), []
    exact = [t.clone().requires_grad_() for t in (form.centre, form.G, form.h)]
    other = [t.clone().requires_grad_() for t in (form.centre, form.G, form.h)]
    parts = {n: getattr(form, n) for n in form.__dataclass_fields__}
    for leaves in (exact, other):
        made = Standard(**parts | dict(zip(("centre", "G", "h"), leaves, strict=True)))
        if leaves is exact:
            point = project(made, y, lam)
        else:
            point, reached = project_by_iterations(made)
            assert reached.all()
        gradients.append(torch.autograd.grad((point * v).sum(), leaves))
    for got, wanted in zip(*gradients, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-6)
    assert max(float(t.abs().max()) for t in gradients[0]) > 0.1


def test_every_maximum_under_a_strong_slope_has_a_derivative_that_differences_confirm():
    J, g, inside = mixed(6, 5, 60, 1e5)
    v, along = normals(80, 6, 5), normals(81, 6, 2)
    b = inside.b.clone().requires_grad_()
    rows = FeasibleSet(inside.lower, inside.upper, inside.A, b, inside.C, inside.d, inside.cones)
    move, solved = argmax(J, g.clone().requires_grad_(), rows)
    assert solved.all()
    (grad,) = torch.autograd.grad((move * v).sum(), b)

    def value(h):
        shifted = FeasibleSet(
            inside.lower, inside.upper, inside.A, inside.b + h * along, inside.C, inside.d, inside.cones
        )
        found = solve_conic(J, g, shifted)[0]
        return (found.move * v).sum(1)

    slope = (8.0 * (value(1e-4) - value(-1e-4)) - (value(2e-4) - value(-2e-4))) / 12e-4
    assert torch.allclose((grad * along).sum(1), slope, rtol=1e-5, atol=1e-6)
    assert grad.abs().max() > 0.01


def test_at_a_kink_the_cone_lets_go():
    # on the border, not pushed
    g = torch.tensor([[0.5, 0.0], [0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    form = Standard.of(torch.eye(2).double().expand(2, 2, 2), g, cones_alone(2, ball(2)))
    y = form.centre.detach()
    (grad,) = torch.autograd.grad(form.move(project(form, y, torch.zeros_like(form.h))).sum(), g)
    assert torch.allclose(grad, torch.ones(2, 2).double(), rtol=0, atol=1e-14)
