"""What a modality says of its scalar, against the scalar: its closed derivatives, and that it is concave."""

from __future__ import annotations

import textwrap
from typing import Any

import torch
from torch import Tensor

from engine.errors import ContractError
from engine.modality import Modality
from engine.testing.case import Case
from engine.testing.report import Skip, show
from engine.testing.scoring import curvature, scalar

__all__ = ["check_closed", "check_concave"]

_WHAT = ("scalar", "score", "information")
# Steps between pairs of points in units of θ: a scalar may bend the wrong way near its maximum or far from it.
_REACH = (-2.0, 1.0)


def check_closed(case: Case) -> str:
    """The closed derivatives are those of log_evidence, in every shape, with what was prepared and under vmap."""
    if not case.given.has_derivatives:
        raise Skip("no closed form is used: log_evidence is differentiated")
    x, theta, P = case.few, case.theta[:8], len(case.names)
    k, b = len(theta), len(x)
    expected = _automatic(case.exact, x, theta)
    grid = (x[None], theta[:, None])
    for xs, thetas, at in (
        (*grid, (slice(None), slice(None))),
        (x, theta[0], (0, slice(None))),
        (x[0], theta, (slice(None), 0)),
        (x[0], theta[0], (0, 0)),
    ):
        found = _closed(case.exact, xs, thetas)
        batch = expected[0][at].shape
        for n, value in enumerate(found):
            full, points = _broadcast(value, (*batch, *(P,) * n), n), thetas.expand(*batch, P)
            _compare(case, full, expected[n][at], torch.isfinite(expected[0][at]), points)
    native = _closed(case.native, *grid)
    for n, value in enumerate(native):
        _broadcast(value, (k, b, *(P,) * n), n)
    notes = []
    if case.given.prepares:
        _unchanged(case, found=_closed(case.exact, *grid, prepared=True), how="after prepare(x)")
        notes.append("prepare")
    if case.given.stack_key() is not None:
        try:
            rows = torch.func.vmap(
                lambda t: tuple(v[None] if v.dim() == n else v for n, v in enumerate(_closed(case.exact, x, t)))
            )(theta)
        except RuntimeError as error:
            raise ContractError(
                "derivatives must work under torch.func.vmap where stack_key is not None, got "
                f"{textwrap.shorten(str(error), 200)}; avoid branches that look at values, or return None"
            ) from error
        _unchanged(case, found=rows, how="under vmap")
        notes.append("vmap")
    also = f", with {' and '.join(notes)} too" if notes else ""
    return f"scalar, score and information agree with differentiation at {k * b} pairs{also}"


def _automatic(modality: Modality, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, ∇s and −∇²s of a grid, by differentiation: (k, b), (k, b, P) and (k, b, P, P)."""
    points = theta[:, None].expand(-1, len(x), -1).clone().requires_grad_(True)
    value = scalar(modality, x[None], points)
    if value.shape != points.shape[:2] or not value.requires_grad:
        raise Skip("the scalar has no derivatives to compare with; see the checks of shape and score")
    (score,) = torch.autograd.grad(value.sum(), points, create_graph=True, allow_unused=True)
    score = torch.zeros_like(points) if score is None else score
    flat = [-row for row in _rows(score, points)]
    return value.detach(), score.detach(), torch.stack(flat, -2)


def _rows(score: Tensor, points: Tensor) -> list[Tensor]:
    rows = []
    for j in range(points.shape[-1]):
        row = None
        if score.requires_grad:
            (row,) = torch.autograd.grad(score[..., j].sum(), points, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(points) if row is None else row.detach())
    return rows


def _closed(modality: Modality, x: Tensor, theta: Tensor, prepared: bool = False) -> tuple[Any, ...]:
    x, theta = x.to(modality.dtype), theta.to(modality.dtype)
    known = modality.prepare(x) if prepared else ()
    if not isinstance(known, tuple) or any(
        t.shape[: x.dim() - len(modality.event_shape)] != x.shape[:2] for t in known
    ):
        seen = [tuple(t.shape) for t in known] if isinstance(known, tuple) else type(known).__name__
        raise ContractError(
            f"prepare must return a tuple of tensors that begin with x's leading dimensions {tuple(x.shape[:2])}, got {seen}; "
            "keep one entry for each observation"
        )
    with torch.no_grad():
        found = modality.derivatives(x, theta, *known)
    if not isinstance(found, tuple) or len(found) != 3 or not all(isinstance(value, Tensor) for value in found):
        seen = type(found).__name__ if not isinstance(found, tuple) else [type(value).__name__ for value in found]
        raise ContractError(f"derivatives must return three tensors, got {seen}; return scalar, score and information")
    return found


def _broadcast(value: Tensor, shape: tuple[int, ...], n: int) -> Tensor:
    """A closed form's result in full; the batch may be left out, or have size 1 in any of its dimensions."""
    if value.dtype not in (torch.float32, torch.float64):
        raise ContractError(
            f"derivatives must return float32 or float64, got {value.dtype} as the {_WHAT[n]}; widen it"
        )
    event = value.shape[value.dim() - n :] if n else value.shape[:0]
    padded = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    fits = value.dim() in (n, len(shape)) and event == shape[len(shape) - n :]
    if not fits or any(size not in (1, wanted) for size, wanted in zip(padded, shape, strict=True)):
        raise ContractError(
            f"the closed {_WHAT[n]} must broadcast to {shape}, got {tuple(value.shape)}; return one for each (x, θ)"
        )
    return value.to(torch.float64).expand(shape)


def _unchanged(case: Case, found: tuple[Any, ...], how: str) -> None:
    """The same results on the grid in another way."""
    x, theta, P = case.few, case.theta[:8], len(case.names)
    shape = (len(theta), len(x))
    for n, (value, plain) in enumerate(zip(found, _closed(case.exact, x[None], theta[:, None]), strict=True)):
        value, plain = (_broadcast(v, (*shape, *(P,) * n), n) for v in (value, plain))
        off = (value - plain).abs() > 1e-9 * (1 + plain.abs())
        off |= torch.isnan(value) != torch.isnan(plain)
        if bool((off & (value != plain)).any()):
            raise ContractError(
                f"the closed {_WHAT[n]} must be the same {how}, got values {(value - plain).abs().max().item():.3g} apart; "
                "it must depend on x and θ alone"
            )


def _compare(case: Case, found: Tensor, expected: Tensor, finite: Tensor, points: Tensor) -> None:
    """Compare a closed form (*batch, ...) with what differentiation gives, wherever the scalar is finite."""
    n = found.dim() - finite.dim()
    if n == 0:
        off = ((found - expected).abs() > 1e-9 * (1 + expected.abs())) & (found != expected)
        off |= torch.isnan(found) != torch.isnan(expected)
    else:
        known = finite.reshape((*finite.shape, *(1,) * n))
        largest = torch.where(known, expected, 0.0).abs().reshape((-1, *found.shape[finite.dim() :])).amax(0)
        unit = case.scale if n == 1 else case.scale[:, None] * case.scale
        off = ~((found - expected).abs() <= 1e-6 * largest + 1e-9 / unit) & known
    if not bool(off.any()):
        return
    where = off.nonzero()[0].tolist()
    got, wanted = found[tuple(where)].item(), expected[tuple(where)].item()
    entry = where[finite.dim() :]
    of = f" for ({', '.join(case.names[j] for j in entry)})" if entry else ""
    ratio = got / wanted if wanted else float("nan")
    seen = f", {ratio:.4g} times that" if n and 1e-6 < abs(ratio) < 1e6 else ""
    raise ContractError(
        f"the closed {_WHAT[n]} must be that of log_evidence, got {got:.10g}{of} at θ = {show(points[tuple(where[: finite.dim()])])} "
        f"where {'differentiation' if n else 'it'} gives {wanted:.10g}{seen}; correct derivatives(), or leave it out"
    )


def check_concave(case: Case) -> str:
    """Where it is claimed: s lies above its chords, and its information has no negative eigenvalue."""
    if not case.given.concave:
        raise Skip("not claimed")
    x, m = case.few, case.exact
    n = max(16, min(256, 100_000 // max(1, case.event.numel())))
    generator = case.generator(1)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": case.device}
    reach = 10.0 ** (_REACH[0] + (_REACH[1] - _REACH[0]) * torch.rand(2, n, 1, **options))
    start = case.theta[torch.arange(n, device=case.device) % len(case.theta)]
    a, b = start + reach * case.scale * torch.randn(2, n, len(case.names), **options)
    a = torch.where((torch.arange(n, device=case.device) % 2 == 0)[:, None], start, a)
    with torch.no_grad():
        low, high, middle = (scalar(m, x[None], t[:, None]) for t in (a, b, 0.5 * (a + b)))
    chord = 0.5 * (low + high)
    slack = 1e-9 * (1 + low.abs() + high.abs())
    judged = torch.isfinite(low) & torch.isfinite(high)
    bad = judged & ~(middle >= chord - slack)
    if bool(bad.any()):
        i, j = bad.nonzero()[0].tolist()
        raise ContractError(
            f"a scalar that is called concave must be at least its chord, got {middle[i, j].item():.9g} halfway between "
            f"θ = {show(a[i])} and {show(b[i])} where the chord is {chord[i, j].item():.9g}; leave concave False"
        )
    points = torch.cat([case.theta, a[1::2][:32]])
    points = points[:, None].expand(-1, len(x), -1).reshape(-1, len(case.names)).clone().requires_grad_(True)
    value = scalar(m, x.repeat(len(points) // len(x), *(1,) * len(case.event)), points)
    finite = torch.isfinite(value.detach())
    if not bool(judged.any() | finite.any()):
        raise Skip("no pair of θ near these points has a finite scalar")
    if value.requires_grad:
        (score,) = torch.autograd.grad(value.sum(), points, create_graph=True)
        information = -curvature(score, points)[finite] * case.scale[:, None] * case.scale
        information = information[information.isfinite().all(-1).all(-1)]
        eigenvalues = torch.linalg.eigvalsh(0.5 * (information + information.mT))
        least = eigenvalues[:, 0] + 1e-8 * eigenvalues.abs().amax(-1) + 1e-9
        if bool((least < 0).any()):
            i = int(least.argmin())
            raise ContractError(
                "the information of a scalar that is called concave must have no eigenvalue < 0, got "
                f"{eigenvalues[i, 0].item():.3g} (in units of θ) at θ = {show(points[finite][i].detach())}; leave concave False"
            )
    return f"at least its chord between {int(judged.sum())} pairs of θ; no negative eigenvalue at {int(finite.sum())} points"
