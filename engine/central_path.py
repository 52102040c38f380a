r"""Which constraints of a quadratic program are active, from far away: two guesses for :mod:`engine.active_set`.

The central path :math:`s_i \lambda_i = \mu` of slacks and multipliers is followed to :math:`\mu \to 0` by predictor and
corrector steps, from a start that need not be feasible (Mehrotra 1992); at its end the larger one of each pair tells.
Multipliers that combine the left-hand sides to nothing and the right-hand sides to less prove that there is no
feasible point (Farkas). For the few problems that are too degenerate, in coordinates where J is the identity, the
maximum is the nearest point of a polyhedron: least squares with multipliers ≥ 0 (Lawson and Hanson).

References:
    | Mehrotra, SIAM J. Optim. 2 (1992) 575; Nocedal & Wright (2006), section 16.6
    | Lawson & Hanson (1974), Solving Least Squares Problems, chapter 23
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.active_set import Problem, times

__all__ = ["follow", "nearest"]

_TURNS = 60  # of the path; it ends after some twenty


def follow(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Follow the central path to its end.

    Arguments:
        p: K problems with at least one bound or row each.

    Returns:
        Which lower bounds, upper bounds (K, P) and rows (K, q) are active, the rows' multipliers (K, q), and which
        problems have no feasible point (K,).

    Example:
        >>> J, g = torch.eye(2).double()[None], torch.tensor([[3.0, 1.0]]).double()
        >>> p = Problem(J, g, -g, torch.full_like(g, 2.0), J[:, :0], g[:, :0], 0)
        >>> follow(p)[1].tolist()
        [[True, False]]
    """
    K, P = p.g.shape
    path = _Path.of(p)
    active = torch.zeros_like(path.has)
    lam = torch.zeros_like(p.f)
    infeasible = torch.zeros(K, dtype=torch.bool)
    for turn in range(_TURNS):
        before = path.s, path.lam, path.nu
        gap, off, impossible = path.step()
        done = (gap <= 1e-10) & (off <= 1e-8)
        broken = ~torch.isfinite(path.z).all(-1) | ~torch.isfinite(path.lam).all(-1)
        end = done | broken | (impossible & ~done) | (turn == _TURNS - 1)
        if not bool(end.any()):
            continue
        s, y, nu = (t[end] for t in before)
        rows, has = path.index[end], path.has[end]
        active[rows] = has & (y > s * path.strength[end])
        # without an interior multipliers run away: no start for anything
        moderate = torch.cat([y, nu], 1).abs().amax(-1, keepdim=True) <= 1e4 * path.strength[end]
        lam[rows] = torch.where(moderate, torch.cat([y[:, 2 * P :], nu], 1) * path.scale[end], 0.0)
        infeasible[rows] = (impossible & ~done)[end]
        if bool(end.all()):
            break
        path = path.keep(~end)
    fixed = p.low == p.high
    low = active[:, :P] | fixed
    on = torch.cat([active[:, 2 * P :], torch.ones(K, p.f.shape[1] - p.m, dtype=torch.bool)], 1)
    return low, active[:, P : 2 * P] & ~low, on, lam, infeasible


def nearest(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same of each problem on its own, as the distance of a point from a polyhedron.

    It comes to least squares with multipliers ≥ 0, in a finite number of steps and however degenerate: the active
    constraints that it finds do not depend on each other.

    Arguments:
        p: K problems.

    Returns:
        As :func:`follow` does, with multipliers of 0.

    Example:
        >>> J, g = torch.eye(2).double()[None], torch.tensor([[3.0, 1.0]]).double()
        >>> p = Problem(J, g, -g, torch.full_like(g, 2.0), J[:, :0], g[:, :0], 0)
        >>> nearest(p)[1].tolist()
        [[True, False]]
    """
    import numpy as np
    from scipy.optimize import nnls

    K, P = p.g.shape
    equal = np.arange(p.f.shape[1]) >= p.m
    low, high = torch.zeros(2, K, P, dtype=torch.bool)
    on, infeasible = torch.as_tensor(equal).repeat(K, 1), torch.zeros(K, dtype=torch.bool)
    eye = np.eye(P)
    for k in range(K):
        E, f = p.E[k].numpy(), p.f[k].numpy()
        root = np.linalg.cholesky(p.J[k].numpy())
        sides = np.concatenate([-p.low[k].numpy(), p.high[k].numpy(), f, -f[equal]])
        there = np.isfinite(sides).nonzero()[0]
        rows = np.linalg.solve(root, np.concatenate([-eye, eye, E, -E[equal]])[there].T).T
        short = sides[there] - rows @ np.linalg.solve(root, p.g[k].numpy())
        size = np.linalg.norm(rows, axis=1)
        size = np.where(size > 1e-14, size, 1.0)
        short = short / size
        short = short / max(-short.min(), 1e-300)
        target = np.append(np.zeros(P), -1.0)
        try:
            push, distance = nnls(np.append((rows / size[:, None]).T, short[None], 0), target, maxiter=30 * len(there))
        except RuntimeError:
            continue
        infeasible[k] = bool(distance < 1e-9)
        held = torch.zeros(len(sides), dtype=torch.bool)
        held[there[push > 0]] = True
        on[k] |= held[2 * P : 2 * P + len(f)]
        low[k], high[k] = held[:P], held[P : 2 * P]
    low |= p.low == p.high
    return low, high & ~low, on, torch.zeros_like(p.f), infeasible


@dataclass(eq=False)
class _Path:
    """A search along the central path: held components at zero, moves scaled to size one, G z + s = h, C z = d."""

    index: Tensor
    J: Tensor
    g: Tensor
    A: Tensor
    C: Tensor
    h: Tensor
    d: Tensor
    has: Tensor  # finite sides: lower bounds, upper bounds, inequalities
    free: Tensor
    scale: Tensor
    strength: Tensor  # of the multipliers
    z: Tensor
    s: Tensor
    lam: Tensor
    nu: Tensor

    @staticmethod
    def of(p: Problem) -> _Path:
        K = len(p.g)
        fixed = p.low == p.high
        free = (~fixed).to(p.J.dtype)
        pinned = torch.where(fixed, p.low, 0.0)
        g = (p.g - times(p.J, pinned)) * free
        f = p.f - times(p.E, pinned)
        E = p.E * free[:, None, :]
        J = p.J * free[:, :, None] * free[:, None, :] + torch.diag_embed(1.0 - free)
        z = torch.cholesky_solve(g[:, :, None], torch.linalg.cholesky_ex(J)[0])[:, :, 0] * free
        z = torch.where(fixed, 0.0, torch.minimum(torch.maximum(z, p.low), p.high))
        excess = times(E, z) - f
        excess = torch.cat([excess[:, : p.m].clamp_min(0.0), excess[:, p.m :].abs(), z.abs()], 1).amax(-1, keepdim=True)
        scale = torch.where(excess > 1e-290, excess, 1.0)
        z, g, f = z / scale, g / scale, f / scale
        h = torch.cat([-p.low / scale, p.high / scale, f[:, : p.m]], 1)
        has = torch.isfinite(h) & ~torch.cat([fixed, fixed, fixed.new_zeros(K, p.m)], 1)
        h = torch.where(has, h, 0.0)
        strength = (g - times(J, z)).abs().amax(-1, keepdim=True).clamp_min(1.0)
        A, C, d = E[:, : p.m], E[:, p.m :], f[:, p.m :]
        slack = h - torch.cat([-z, z, times(A, z)], 1)
        s = torch.where(has, slack.clamp_min(1.0), 1.0)
        lam = torch.where(has, strength, 0.0)
        rows = torch.arange(K)
        return _Path(rows, J, g, A, C, h, d, has, free, scale, strength, z, s, lam, torch.zeros_like(d))

    def keep(self, rows: Tensor) -> _Path:
        return _Path(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))

    def onto(self, z: Tensor) -> Tensor:
        """G z."""
        return torch.cat([-z, z, times(self.A, z)], 1)

    def back(self, y: Tensor, nu: Tensor) -> Tensor:
        """G'y + C'nu, of the free components."""
        P = self.g.shape[1]
        return self.free * (y[:, P : 2 * P] - y[:, :P] + times(self.A.mT, y[:, 2 * P :]) + times(self.C.mT, nu))

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """One predictor-corrector step, and of where it started: the gap, the infeasibility, whether none is feasible."""
        P, has, s, lam = self.g.shape[1], self.has, self.s, self.lam
        back = self.back(lam, self.nu)
        dual = (self.g - times(self.J, self.z)) * self.free - back
        primal = torch.where(has, self.h - self.onto(self.z) - s, 0.0)
        equal = self.d - times(self.C, self.z)
        count = has.sum(-1).clamp_min(1)
        gap = (s * lam).sum(-1) / count
        off = torch.cat([primal, equal, dual / torch.maximum(lam.amax(-1, keepdim=True), self.strength)], 1)
        # Farkas: multipliers that combine the left-hand sides to nearly nothing and the right-hand sides to less
        total = lam.sum(-1) + self.nu.abs().sum(-1)
        deficit = -((lam * self.h).sum(-1) + (self.nu * self.d).sum(-1))
        impossible = (deficit > 1e-9 * total) & (deficit > 1e7 * back.abs().sum(-1))

        weight = torch.where(has, lam / s, 0.0)
        H = self.J + torch.diag_embed(weight[:, :P] + weight[:, P : 2 * P])
        if self.A.shape[1]:
            H = H + self.A.mT @ (weight[:, 2 * P :, None] * self.A)
        factor = torch.linalg.cholesky_ex(H)[0]
        across = torch.cholesky_solve(self.C.mT, factor)
        schur = self.C @ across
        ridge = 1e-12 * schur.diagonal(dim1=-2, dim2=-1) + 1e-300
        root = torch.linalg.cholesky_ex(schur + torch.diag_embed(ridge))[0]

        def direction(aim: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            right = dual - self.back(aim / s - weight * primal, torch.zeros_like(self.nu))
            dz = torch.cholesky_solve(right[:, :, None], factor)
            dnu = torch.cholesky_solve(self.C @ dz - equal[:, :, None], root)
            dz = (dz - across @ dnu)[:, :, 0]
            ds = torch.where(has, primal - self.onto(dz), 0.0)
            return dz, dnu[:, :, 0], ds, torch.where(has, (aim - lam * ds) / s, 0.0)

        def longest(ds: Tensor, dlam: Tensor) -> Tensor:
            ratio = torch.maximum(-ds / s, torch.where(has, -dlam / lam, 0.0)).amax(-1, keepdim=True)
            return 1.0 / ratio.clamp_min(1e-300)

        dz, dnu, ds, dlam = direction(-s * lam)
        reach = longest(ds, dlam).clamp_max(1.0)
        ahead = ((s + reach * ds) * (lam + reach * dlam) * has).sum(-1) / count
        centre = (ahead / gap.clamp_min(1e-300)).clamp(0.0, 1.0) ** 3
        dz, dnu, ds, dlam = direction(torch.where(has, (centre * gap)[:, None] - s * lam - ds * dlam, 0.0))
        reach = (0.995 * longest(ds, dlam)).clamp_max(1.0)
        self.z, self.nu = self.z + reach * dz, self.nu + reach * dnu
        self.s, self.lam = s + reach * ds, lam + reach * dlam
        return gap / self.strength[:, 0], off.abs().amax(-1), impossible
