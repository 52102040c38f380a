r"""The iteration behind refined estimates: scores at a reference point, their law there, the maximum, a new reference.

A row is one search: a data set and where it starts. Rows whose references lie close to each other in their standard
errors share one, and its simulations.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.certificate.fields import pseudo_inverse
from engine.certificate.scores import score_rows
from engine.ensemble import Ensemble
from engine.errors import ModalityError
from engine.evidence import Derivatives, prior_derivatives
from engine.faces import convex_guess, face_at
from engine.feasible import FeasibleSet
from engine.modality import Modality
from engine.optimise import maximise
from engine.parameters import ParameterSpace
from engine.refinement.combination import Combination
from engine.refinement.law import Law, Laws, features, principal

__all__: list[str] = []  # the machinery of refinement

_WIDTH = 2.5  # of simulations around a reference, in standard errors
_FIRST = 0.3  # the first width, and
_MOST = 0.5  # the largest, in units of the parameter's scale
_HELD = 0.1  # the width along what is held, in the same units
_DONE = 0.6  # standard errors from a reference with simulations that need no new one
_SETTLED = 1.5  # the same after a few rounds, in which the noise of the simulations moves θ̂
_EXACT = 0.02  # standard errors, where the law is had at any θ
_ROUNDS = 25
_FEW = 20  # observations from which their second moments are looked at
_PUSH = 1e-5  # standard errors by which a constraint holds θ̂ back
_SHARE = 0.3  # standard errors within which rows share a reference


TENSORS = ("item", "theta", "covariance", "along", "noise", "done", "step", "rounds", "value")
TABLES = ("refined", "misfit", "simulations")


@dataclass(eq=False)
class Rows:
    """R searches.

    Attributes:
        item: The data set of each, shape (R,).
        theta: Where they are, (R, P).
        covariance: Of the maximum without its constraints, with the finite simulations in it, (R, P, P).
        along: The same along what holds θ̂, (R, P, P).
        noise: What the noise of simulated slopes adds to the information on average, (R, P, P).
        done: Which have settled, (R,).
        step: The last step in standard errors, (R,).
        rounds: How many it took, (R,).
        value: S̃ there in nats: exact plugins, refined ones and the prior where it takes part, (R,).
        refined: Plugin -> [L | z] of its refined scalar, (R, P_m, P_m + 1).
        misfit: Plugin -> −2 s̃, (R,).
        simulations: Plugin -> how many its last law took, (R,).
    """

    item: Tensor
    theta: Tensor
    covariance: Tensor
    along: Tensor
    noise: Tensor
    done: Tensor
    step: Tensor
    rounds: Tensor
    value: Tensor
    refined: dict[str, Tensor] = field(default_factory=dict)
    misfit: dict[str, Tensor] = field(default_factory=dict)
    simulations: dict[str, Tensor] = field(default_factory=dict)

    def pick(self, rows: Tensor) -> Rows:
        """Some of them, by their ``rows`` (k,)."""
        tables = [{n: t[rows] for n, t in getattr(self, what).items()} for what in TABLES]
        return Rows(*(getattr(self, n)[rows] for n in TENSORS), *tables)  # pyright: ignore[reportArgumentType]

    def replaced(self, rows: Tensor, other: Rows) -> Rows:
        """These searches with some, by their ``rows`` (k,), taken from ``other``, which has k."""
        order = torch.arange(len(self.item))
        order[rows] = len(order) + torch.arange(len(rows))
        return self.joined(other).pick(order)

    def joined(self, other: Rows) -> Rows:
        """These searches, then ``other``."""
        mine = (getattr(self, n) for n in TENSORS)
        parts = [torch.cat([a, getattr(other, n)]) for n, a in zip(TENSORS, mine, strict=True)]
        tables = [
            {n: torch.cat([t, getattr(other, what)[n]]) for n, t in getattr(self, what).items()} for what in TABLES
        ]
        return Rows(*parts, *tables)  # pyright: ignore[reportArgumentType]


class Solver:
    """S̃ of B data sets, and the searches for its maxima.

    Arguments:
        space: θ.
        inside: Where θ may be.
        idle: Components that nothing depends on, (P,), which stay where a search starts.
        learned: The plugins to refine, by name.
        laws: Where the law of each comes from.
        exact: The other plugins' sum; None where there is none.
        prior: Whether the log prior takes part.
        read: (plugin, data set) -> its observations, in blocks.
    """

    def __init__(
        self,
        space: ParameterSpace,
        inside: FeasibleSet,
        idle: Tensor,
        learned: Mapping[str, Modality],
        laws: Mapping[str, Laws],
        exact: Ensemble | None,
        prior: bool,
        read: Callable[[str, int], Iterator[Tensor]],
    ) -> None:
        self.space, self.inside, self.idle = space, inside, idle
        self.learned, self.laws, self.exact, self.prior, self.read = learned, laws, exact, prior, read
        self.held = (inside.lower >= inside.upper) | idle
        self.columns = {name: torch.tensor(space.indices(m.parameter_names)) for name, m in sorted(learned.items())}

    def run(
        self, item: Tensor, theta: Tensor, simulations: int, seed: tuple[int, ...], covariance: Tensor | None = None
    ) -> Rows:
        """Searches of data sets ``item`` (R,) from theta (R, P), until each has settled or given up.

        Arguments:
            item, theta: Where they start.
            simulations: For each law that is made by simulation.
            seed: Of the simulations; the same in every round, so that what they add moves as little as θ does.
            covariance: Of θ̂, as far as it is known, (R, P, P), for the width of the first simulations.
        """
        rows = self.blank(item, theta)
        if covariance is not None:
            rows.covariance = covariance.clone()
        damping = torch.ones(len(theta), dtype=torch.float64)
        for number in range(_ROUNDS):
            live = (~rows.done).nonzero()[:, 0]
            if not len(live):
                break
            self._round(rows, live, damping, number, simulations, seed)
        return rows

    def blank(self, item: Tensor, theta: Tensor) -> Rows:
        """Searches of data sets ``item`` (R,) that have not left theta (R, P)."""
        R = len(theta)
        nothing = torch.zeros(R, len(self.space), len(self.space), dtype=torch.float64)
        rows = Rows(
            item,
            theta.clone(),
            torch.diag((_FIRST / _WIDTH * self.space.scale) ** 2).repeat(R, 1, 1),
            nothing,
            nothing.clone(),
            torch.zeros(R, dtype=torch.bool),
            torch.full((R,), torch.inf, dtype=torch.float64),
            torch.zeros(R, dtype=torch.long),
            torch.full((R,), -torch.inf, dtype=torch.float64),
        )
        for name, index in self.columns.items():
            size = len(index)
            rows.refined[name] = torch.zeros(R, size, size + 1, dtype=torch.float64)
            rows.misfit[name] = torch.zeros(R, dtype=torch.float64)
            rows.simulations[name] = torch.zeros(R, dtype=torch.long)
        return rows

    def fit(self, rows: Rows, seed: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """How well the data look like data from each row's θ̂, by what the scores' root does not use; see ``features``.

        Returns:
            The log-likelihood of the means of these features, (R,), up to a constant of each data set; how badly they fit,
            about χ² (R,); and its degrees of freedom (R,), 0 for nothing to tell.
        """
        simulated = any(law.kind == "refined" for law in self.laws.values())
        told, total, dof = (torch.zeros(len(rows.item), dtype=torch.float64) for _ in range(3))
        for name, index in self.columns.items():
            laws, modality, stream = self.laws[name], self._raw(name), (*seed, _stream(name))
            for b in torch.unique(rows.item).tolist():
                own = ((rows.item == b) & rows.done).nonzero()[:, 0]
                x = torch.cat([*self.read(name, b), torch.zeros(0, *modality.event_shape, dtype=torch.float64)])
                if not len(own) or not len(x):
                    continue
                roots = rows.theta[own][:, index]
                if len(x) < _FEW:  # too few for the law of a mean, and too few for a bias to matter
                    told[own] += torch.stack([_total(modality, x, theta) for theta in roots])
                    continue
                expected = [laws.expected(theta, roots, stream) for theta in roots]
                told_by = laws.combination
                found = [_compared(modality, x, roots, k, told_by, *expected[k]) for k in range(len(own))]
                gaps, spreads = [f[0] for f in found], [f[1] for f in found]
                axes = _axes(torch.stack(spreads).mean(0))
                for r, gap, C in zip(own.tolist(), gaps, spreads, strict=True):
                    inner, away = axes.mT @ C @ axes, axes.mT @ gap
                    misfit = away @ pseudo_inverse(inner, 1e-9) @ away
                    told[r] -= 0.5 * misfit
                    if expected[0][1] is not None:  # the same features for all roots
                        told[r] -= 0.5 * torch.linalg.eigvalsh(inner).clamp_min(1e-9).log().sum()
                    if (
                        laws.kind == "refined" or not simulated
                    ):  # fields are not exact enough to stand beside simulations
                        total[r] += misfit
                        dof[r] += axes.shape[1]
        fitted = int((~self.held).sum()) if simulated else 0  # directions that θ̂ took
        return told, total, (dof - fitted).clamp_min(0.0)

    def _raw(self, name: str) -> Modality:
        return getattr(self.learned[name], "modality", self.learned[name])

    def _round(
        self, rows: Rows, live: Tensor, damping: Tensor, number: int, simulations: int, seed: tuple[int, ...]
    ) -> None:
        theta = rows.theta[live]
        spread = self._spread(rows.covariance[live], rows.step[live] if number else None)
        groups = (
            _cover(theta, spread, self.space.scale) if any(w.kind == "refined" for w in self.laws.values()) else None
        )
        stacks_L, stacks_z, simulated = [], [], torch.zeros(len(live), dtype=torch.bool)
        noise = torch.zeros(len(live), len(self.space), len(self.space), dtype=torch.float64)
        for name, index in self.columns.items():
            made, which = self._laws(name, theta, spread, groups, simulations, seed)
            reference = torch.stack([law.reference for law in made])[which]
            mean, count = self._means(name, rows.item[live], reference, [made[k].weights for k in which.tolist()])
            simulated |= (self.laws[name].kind == "refined") & (count > 0)
            pairs = [
                _refined(made[k], m, int(n), at)
                for k, m, n, at in zip(which.tolist(), mean, count, theta[:, index], strict=True)
            ]
            refined = torch.stack([pair[0] for pair in pairs])
            noise[:, index[:, None], index] += torch.stack([pair[1] for pair in pairs])
            rows.refined[name][live] = refined
            rows.simulations[name][live] = torch.tensor([made[k].simulations for k in which.tolist()])
            full = torch.zeros(len(live), len(index), len(self.space), dtype=torch.float64)
            full[:, :, index] = refined[..., :-1]
            stacks_L.append(full)
            stacks_z.append(refined[..., -1])
        L, z = torch.cat(stacks_L, 1), torch.cat(stacks_z, 1)
        top, at, value = self._maximum(L, z, rows.item[live], theta)
        information = at.information
        free = (~self.held).double()
        inverse = pseudo_inverse(information * free * free[:, None])
        error = inverse.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        step = top - theta
        size = torch.where(error > 0, step.abs() / error.clamp_min(1e-300), 0.0).amax(-1)
        # a search that goes back and forth goes half as far
        back = (size > 0.7 * rows.step[live]) & (number >= 3)
        damping[live] = torch.where(back, 0.7 * damping[live], damping[live])
        cut = (2.0 / _lengths(step, spread, self.space.scale).clamp_min(1e-300)).clamp(max=1.0)
        near = torch.where(simulated, _SETTLED if number >= 5 else _DONE if number >= 1 else 0.0, _EXACT)
        done = (cut >= 1.0) & (size <= near)
        part = torch.where(done, 1.0, cut * damping[live])
        rows.theta[live] = theta + part[:, None] * step
        rows.covariance[live], rows.noise[live] = inverse, noise
        rows.along[live] = self._along(top, at, error)
        rows.step[live], rows.value[live] = size, value
        rows.rounds[live] += 1
        rows.done[live] = done & torch.isfinite(value)
        for name, index in self.columns.items():
            own = rows.refined[name][live]
            r = own[..., -1] - (own[..., :-1] @ top[:, index][..., None])[..., 0]
            rows.misfit[name][live] = r.square().sum(-1)

    def _spread(self, covariance: Tensor, step: Tensor | None) -> Tensor:
        """How simulations are spread about references, (R, P, P): ``_WIDTH`` standard errors of θ̂, axis by axis.

        Not only component by component: what two components do together may be known far better than either.

        Arguments:
            covariance: Of θ̂, (R, P, P).
            step: How far the search has moved, in standard errors, (R,).
        """
        free, scale = (~self.held).double(), self.space.scale
        width, axes = principal(covariance * free * free[:, None], scale)
        known = width > 1e-7 * width.amax(-1, keepdim=True)  # what has no error is held, or nothing is known of it yet
        if step is not None:
            width = (
                width * torch.maximum(torch.tensor(_WIDTH), 1.5 * step.nan_to_num(posinf=10.0).clamp(max=10.0))[:, None]
            )
        else:
            width = width * _WIDTH
        width = torch.where(known, width.clamp(max=_MOST), _MOST)
        out = axes * scale[:, None]
        spread = (out * width.square()[:, None]) @ out.mT * free * free[:, None]
        return spread + torch.diag((1.0 - free) * (_HELD * scale) ** 2)

    def _laws(
        self, name: str, theta: Tensor, spread: Tensor, groups: Tensor | None, simulations: int, seed: tuple[int, ...]
    ) -> tuple[list[Law], Tensor]:
        """Laws, and which of them each row uses."""
        source, number, index = self.laws[name], _stream(name), self.columns[name]
        theta, spread = theta[:, index], spread[:, index[:, None], index]
        if source.kind != "refined" or groups is None:
            return source.laws(theta, spread, 0, seed), torch.arange(len(theta))
        heads, which = torch.unique(groups, return_inverse=True)
        size = (spread.diagonal(dim1=-2, dim2=-1) / self.space.scale[index] ** 2).sum(-1)
        widest = torch.stack([torch.where(groups == g, size, -1.0).argmax() for g in heads])
        return source.laws(theta[heads], spread[widest], simulations, (*seed, number)), which

    def _means(
        self, name: str, items: Tensor, reference: Tensor, weights: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """The mean score (R, P_m) of each row's data at its reference (R, P_m), or that of its combination with such weights,
        and how many observations they are."""
        total, count = torch.zeros_like(reference), torch.zeros(len(items), dtype=torch.long)
        waiting: list[tuple[int, Tensor]] = []

        def flush() -> None:
            if not waiting:
                return
            owner = torch.cat([torch.full((len(x),), r) for r, x in waiting])
            x = torch.cat([x for _, x in waiting])
            try:
                if weights[waiting[0][0]] is None:
                    u = score_rows(self._raw(name), x, reference[owner])
                else:
                    combination = self.laws[name].combination
                    assert combination is not None
                    u = combination.measured(x, reference[owner], weights[waiting[0][0]])
            except ModalityError as error:
                raise ModalityError(f"plugin '{name}': {error}") from error
            total.index_add_(0, owner, u)
            count.index_add_(0, owner, torch.ones_like(owner))
            waiting.clear()

        for r, b in enumerate(items.tolist()):
            if waiting and weights[r] is not weights[waiting[0][0]]:
                flush()
            for x in self.read(name, b):
                waiting.append((r, x))
                if sum(len(x) for _, x in waiting) >= 20_000:
                    flush()
        flush()
        return total / count.clamp_min(1)[:, None], count

    def _along(self, theta: Tensor, at: Derivatives, error: Tensor) -> Tensor:
        """The covariance (R, P, P) of maxima along the faces that hold them."""
        unit = torch.where(error > 0, error, self.space.scale)
        outer = unit[:, :, None] * unit[:, None]
        guess = convex_guess(at.information, at.score, unit) if self.inside.cones else None
        face = face_at(theta, at.score, unit, self.inside, guess, least=_PUSH)
        free = face.free * (~self.held).double() * (~self.held).double()[:, None]
        return pseudo_inverse(free @ (at.information * outer + face.curvature) @ free) * outer

    def _maximum(self, L: Tensor, z: Tensor, items: Tensor, start: Tensor) -> tuple[Tensor, Derivatives, Tensor]:
        """The maximum of S̃ that is reached from each start, its derivatives there, and S̃, −∞ where it was not reached."""
        precision, linear = L.mT @ L, (L.mT @ z[..., None])[..., 0]

        def S(theta: Tensor, rows: Tensor) -> Derivatives:
            r = z[rows] - (L[rows] @ theta[..., None])[..., 0]
            value = -0.5 * r.square().sum(-1)
            score = linear[rows] - (precision[rows] @ theta[..., None])[..., 0]
            information, resolution = precision[rows], 1e-16 * (1.0 + value.abs())
            if self.exact is not None:
                at = self.exact.derivatives(theta, items[rows])
                value, score, information = value + at.value, score + at.score, information + at.information
                resolution = resolution + at.resolution
            if self.prior:
                p = prior_derivatives(self.space, theta)
                value, score, information = value + p[0], score + p[1], information + p[2]
            return Derivatives(value, score, information, resolution)

        lower, upper = self.inside.lower.expand_as(start).clone(), self.inside.upper.expand_as(start).clone()
        lower[:, self.idle] = upper[:, self.idle] = start[:, self.idle]
        found = maximise(S, start, self.inside.within(lower, upper), self.space.scale, finish=1e-10)
        return found.theta, found.at, torch.where(found.converged, found.at.value, -torch.inf)


def _refined(law: Law, mean: Tensor, n: int, at: Tensor) -> tuple[Tensor, Tensor]:
    """[L | z] of a mean score of n observations, its law linearised at a θ (P,), and what noise adds to Lᵀ L (P, P);
    zero for no observations."""
    P = len(at)
    out, noise = torch.zeros(P, P + 1, dtype=torch.float64), torch.zeros(P, P, dtype=torch.float64)
    if n:
        m, slope, V = law.at(at)
        root = torch.linalg.cholesky(torch.linalg.inv(law.variance / n + V))
        out[:, :P] = root.mT @ slope
        out[:, P] = root.mT @ (mean - m + slope @ at)
        noise = law.slope_noise(at, root @ root.mT)
    return out, noise


def _total(modality: Modality, x: Tensor, theta: Tensor) -> Tensor:
    with torch.no_grad():
        return modality(x.to(modality.dtype), theta.to(modality.dtype)).double().sum()


def _compared(
    modality: Modality,
    x: Tensor,
    roots: Tensor,
    k: int,
    combination: Combination | None,
    mean: Tensor,
    C: Tensor | None,
    n: int,
) -> tuple[Tensor, Tensor]:
    """The mean of the data's features less that of root k's data, (F,), and the covariance of this, (F, F)."""
    f = features(modality, x, roots if C is not None else roots[k : k + 1], combination)
    C = torch.cov(f.T).reshape(f.shape[1], -1) if C is None else C
    return f.mean(0) - mean, C * (1.0 / len(x) + (1.0 / n if n else 0.0))


def _axes(C: Tensor) -> Tensor:
    """Columns (F, a) that bring a covariance (F, F) to 1, without directions in which there is next to none."""
    size = C.diagonal().clamp_min(1e-300).sqrt()
    variance, axes = torch.linalg.eigh(C / size / size[:, None])
    real = variance > 1e-6
    return axes[:, real] / size[:, None] / variance[real].sqrt()


def _stream(name: str) -> int:
    """A number of a plugin's own, so that its simulations do not depend on which others there are."""
    return zlib.crc32(name.encode())


def _cover(theta: Tensor, spread: Tensor, scale: Tensor) -> Tensor:
    """The row (R,) whose reference each row uses: the first one within its own share of a standard error."""
    head = torch.full((len(theta),), -1)
    width, axes = principal(spread, scale)
    for r in range(len(theta)):
        if head[r] >= 0:
            continue
        gap = (theta - theta[r]) / scale
        own = ((axes.mT @ gap[..., None])[..., 0].abs() / width.clamp_min(1e-300)).amax(-1)
        its = ((gap @ axes[r]).abs() / width[r].clamp_min(1e-300)).amax(-1)
        head[(torch.maximum(own, its) <= _SHARE / _WIDTH) & (head < 0)] = r
        head[r] = r
    return head


def _lengths(step: Tensor, spread: Tensor, scale: Tensor) -> Tensor:
    """How many widths of ``spread`` (R, P, P) each step (R, P) is long, by the longest of its parts along the axes, (R,)."""
    width, axes = principal(spread, scale)
    along = (axes.mT @ (step / scale)[..., None])[..., 0].abs()
    return (along / width.clamp_min(1e-300)).amax(-1)
