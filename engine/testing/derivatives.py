"""The score and the Hessian that autograd gives, against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from engine.errors import ContractError
from engine.testing.case import Case
from engine.testing.report import Skip, show
from engine.testing.scoring import curvature, paired_scalar, score

__all__ = ["check_hessian", "check_score"]


def check_score(case: Case) -> str:
    """The gradient by autograd is the derivative of the scalar."""
    x, theta = case.pairs
    points = theta.clone().requires_grad_(True)
    _, u = score(case.exact, x, points)
    if not bool(torch.isfinite(u).all()):
        i = int((~torch.isfinite(u)).nonzero()[0, 0])
        raise ContractError(
            f"the score must be finite, got {show(u[i])} at θ = {show(theta[i])}; "
            "a masked branch of torch.where still has a gradient: make its argument safe first"
        )
    many = x.repeat_interleave(theta.shape[-1], 0)
    with torch.no_grad():
        slope, error, constant = _differences(lambda t: paired_scalar(case.exact, many, t), theta, case.scale)
    constant &= (u == 0).all(0)
    if bool(constant.all()):
        raise Skip("the scalar does not change near these θ: discrete, or independent of them; choose other points")
    live = ~constant[:, None]
    next_step = "compute with torch, without detach, item, numpy or no_grad"
    judged = _compare(case, u[..., None], slope * live, error.where(live, 0.0), "the autograd score", next_step)
    flat = [name for name, c in zip(case.names, constant.tolist(), strict=True) if c]
    note = f"; the scalar does not change with {', '.join(flat)}" if flat else ""
    return f"autograd agrees with finite differences at {judged} points{note}"


def check_hessian(case: Case) -> str:
    """The second derivatives by double backward are the derivatives of the score."""
    x, theta = case.pairs
    points = theta.clone().requires_grad_(True)
    _, u = score(case.exact, x, points, graph=True)
    if not bool((u != 0).any()):
        raise Skip("the score is zero everywhere")
    hessian = curvature(u, points)
    if not bool(torch.isfinite(hessian).all()):
        i = int((~torch.isfinite(hessian)).nonzero()[0, 0])
        raise ContractError(
            f"second derivatives must be finite, got {show(hessian[i])} at θ = {show(theta[i])}; "
            "look for a root or a norm at zero"
        )
    many = x.repeat_interleave(theta.shape[-1], 0)
    hessian = hessian.transpose(-1, -2)  # (n, along, of), as the differences are
    slope, error, constant = _differences(
        lambda t: score(case.exact, many, t.clone().requires_grad_(True))[1], theta, case.scale
    )
    live = ~(constant & (hessian == 0).all(-1).all(0))[:, None]
    what = "the second derivative by double backward"
    next_step = "attach the score to θ too: a custom backward must be differentiable, and nothing in it detached"
    judged = _compare(case, hessian, slope * live, error.where(live, 0.0), what, next_step)
    linear = " (all zero: the scalar is linear in θ)" if not bool((hessian != 0).any()) else ""
    return f"double backward agrees with differences of the score at {judged} points{linear}"


def _differences(f: Callable[[Tensor], Tensor], theta: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of f, (n·P, P) -> (n·P, q), along each component of θ (n, P), by central differences.

    A ladder of steps, each a quarter of the last, and one step of Richardson's extrapolation; each
    derivative is taken where its error is smallest. Steps that leave the domain are passed over.

    Returns:
        The derivatives (n, P, q), their errors (n, P, q), and whether f is constant on either side (P).
    """
    n, p = theta.shape
    best = torch.full_like(theta[:, :, None], math.nan, dtype=torch.float64)
    err = torch.full_like(best, math.inf)
    middle: list[tuple[Tensor, Tensor]] = []
    slope, worked, failure = None, False, None
    for level in range(9):
        coarse, slope = slope, None
        h = 0.1 * 4.0**-level * scale
        up, down = (theta[:, None] + sign * torch.diag(h) for sign in (1, -1))
        try:
            f_up, f_down = (f(t.reshape(n * p, p)).reshape(n, p, -1).detach() for t in (up, down))
        except Skip:
            raise
        except Exception as error:  # outside the domain, or broken: the smallest step tells
            failure = error
            continue
        worked = True
        width = (up - down).diagonal(dim1=-2, dim2=-1)[..., None]
        slope = (f_up.double() - f_down.double()) / width
        if coarse is not None:
            rounding = 16 * torch.finfo(f_up.dtype).eps * torch.maximum(f_up.abs(), f_down.abs()).double() / width
            error = ((slope - coarse).abs() + rounding).nan_to_num(math.inf, math.inf)
            best, err = torch.where(error < err, (16 * slope - coarse) / 15, best), torch.minimum(error, err)
        if 3 <= level < 6:
            middle.append((f_up, f_down))
    if failure is not None and not worked:
        raise failure
    constant = torch.full_like(theta[0], len(middle) > 1, dtype=torch.bool)
    for one, two in pairwise(middle):
        for a, b in zip(one, two, strict=True):
            constant &= (a == b).all(-1).all(0)
    return best.nan_to_num(), err, constant


def _compare(case: Case, found: Tensor, slope: Tensor, error: Tensor, what: str, next_step: str) -> int:
    """The number of points at which derivatives (n, P, q) agree, or the failure that names the first that does not."""
    _, theta = case.pairs
    large = torch.maximum(found.abs(), slope.abs())
    off = ~((found - slope).abs() <= 1e-5 * large + 3 * error)
    if bool(off.any()):
        i, j, q = off.nonzero()[0].tolist()
        name = case.names[j] if found.shape[-1] == 1 else f"{case.names[q]}, {case.names[j]}"
        raise ContractError(
            f"{what} must be the derivative, got {found[i, j, q].item():.8g} for ({name}) at θ = {show(theta[i])} "
            f"where finite differences give {slope[i, j, q].item():.8g}; {next_step}"
        )
    judged = (error <= 0.01 * large.amax(0)) | (large.amax(0) == 0)
    if not bool(judged.any()):
        raise Skip("finite differences are too noisy to judge; a large constant in the scalar may be why")
    return int(judged.flatten(1).any(-1).sum())
