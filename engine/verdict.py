r"""What a maximum is worth: its covariance, what holds it, and the first fault that applies, for B data sets at once.

The order of faults, and what each is tested by, is in docs/architecture.md. Every test is a few evaluations of S
beside the maximum, in units of the standard errors that its curvature claims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import EstimateError
from engine.faces import Face, convex_guess, face_at
from engine.feasible import FeasibleSet
from engine.objective import Objective
from engine.optimise import Solution
from engine.parameters import ParameterSpace
from engine.profile import profile_at
from engine.result import Status, curvature_floor, direction_text
from engine.search import Starts, best_rows, search
from engine.uncertainty import covariance as covariance_of

__all__: list[str] = []  # the machinery of estimates: see engine.estimate

_COMPETING = 9.0  # a second maximum counts where 2 ΔS is below this (three standard errors)
_AGAIN = 3  # searches from higher points that the looks beside a maximum found
_PUSH = 1e-5  # standard errors that θ̂ would move without a bound; on a flat ridge, rounding alone would pass for less


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What the searches for B data sets found.

    Attributes:
        theta: θ̂, shape (B, P); NaN where a fit failed.
        log_evidence: S(θ̂), shape (B,).
        score, information: ∇S and −∇²S there, shapes (B, P) and (B, P, P).
        covariance: Of θ̂, the projected one, shape (B, P, P).
        edm, evaluations: Of the best search, shape (B,).
        status, reason: What each estimate is, and why; B of each.
        null: Directions without curvature, as name -> component.
        held: What holds θ̂: parameter -> "lower" or "upper", constraint -> the side that holds.
        alternatives: Other maxima nearly as high: (θ, S) each.
        rank: The smallest scaled eigenvalue of the information that counts as curvature, shape (B,).
        face: What holds the points.
        higher: Data sets in which S was seen to be higher elsewhere: b -> a point there, (P,).
    """

    theta: Tensor
    log_evidence: Tensor
    score: Tensor
    information: Tensor
    covariance: Tensor
    edm: Tensor
    evaluations: Tensor
    status: list[Status]
    reason: list[str]
    null: list[tuple[dict[str, float], ...]]
    held: list[dict[str, str]]
    alternatives: list[tuple[tuple[Tensor, float], ...]]
    rank: Tensor
    face: Face
    higher: dict[int, Tensor]


def settle(
    objective: Objective,
    starts: Starts,
    inside: FeasibleSet,
    idle: Tensor,
    fixed: Mapping[str, float],
    screened: int,
    *,
    shape: bool = True,
    finish: float = 0.0,
) -> Verdicts:
    """Search from the starts and classify what was found; search again from any higher point that this brought up.

    Arguments:
        objective: S of B data sets.
        starts: Where the searches begin.
        inside: The feasible set, with what is idle or fixed held.
        idle: Components that nothing depends on, (P,).
        fixed: Parameters that were held, by name.
        screened: How many points were tried before, for messages.
        shape: Whether to look at S a standard error away from each maximum.
        finish: See :func:`engine.optimise.maximise`.
    """
    solution = search(objective, starts, inside, finish)
    found = _Judge(objective, solution, starts, inside, idle, fixed, screened).run(shape)
    for _ in range(_AGAIN):
        if not found.higher:
            break
        more = Starts(torch.stack([*found.higher.values()]), torch.tensor([*found.higher]))
        solution = Solution.joined([solution, search(objective, more, inside, finish)])
        owner = torch.cat([starts.owner, more.owner])
        order = torch.argsort(owner, stable=True)
        starts = Starts(torch.cat([starts.theta, more.theta])[order], owner[order])
        solution = solution.pick(order)
        found = _Judge(objective, solution, starts, inside, idle, fixed, screened).run(shape)
    return found


class _Judge:
    def __init__(
        self,
        objective: Objective,
        solution: Solution,
        starts: Starts,
        inside: FeasibleSet,
        idle: Tensor,
        fixed: Mapping[str, float],
        screened: int,
    ) -> None:
        self.objective, self.solution, self.owner = objective, solution, starts.owner
        self.inside, self.idle, self.fixed, self.screened = inside, idle, fixed, screened
        self.space: ParameterSpace = objective.parameters
        self.B, self.P = objective.count, len(self.space)
        self.best, self.highest = best_rows(solution, starts.owner, self.B)
        self.searches = torch.bincount(starts.owner, minlength=self.B)
        self.reason = [""] * self.B
        self.status: list[Status] = [Status.FAILED] * self.B
        self.null: list[tuple[dict[str, float], ...]] = [()] * self.B
        self.others: list[tuple[tuple[Tensor, float], ...]] = [()] * self.B
        self.higher: dict[int, Tensor] = {}

    def run(self, shape: bool) -> Verdicts:
        """Fault by fault, the first that applies."""
        good = self._failures()
        rows = self.best.clamp_min(0)
        found = self.solution.pick(rows) if len(self.solution.theta) else self._blank()
        theta, at = found.theta.clone(), found.at
        unit = 1.0 / at.information.diagonal(dim1=-2, dim2=-1).abs().clamp_min(1e-300).sqrt()
        unit = torch.where(torch.isfinite(unit) & (unit < 1e140), unit, self.space.scale)
        anything = torch.minimum(torch.maximum(torch.zeros_like(theta), self.inside.lower), self.inside.upper)
        theta = torch.where(good[:, None], theta, anything)  # the row says NaN in the end
        score = torch.where(good[:, None], at.score, 0.0)
        J = torch.where(good[:, None, None], at.information, torch.eye(self.P, dtype=torch.float64))
        face = face_at(
            theta, score, unit, self.inside, convex_guess(J, score, unit) if self.inside.cones else None, least=_PUSH
        )
        self.face = face
        left = (face.free @ (score * unit)[..., None])[..., 0]
        left = torch.where(J.diagonal(dim1=-2, dim2=-1) == 0, 0.0, left).norm(dim=-1)
        # along a curved ridge, J holds the score that is left over
        rank = (3.0 * left).clamp_min(1e-5 if self.objective.coarse else 1e-10)
        some = good & torch.cat([face.lower, face.upper, face.rows, face.cones], 1).any(-1)
        held = [self._held(face, b) if some[b] else {} for b in range(self.B)]
        C = self._covariances(J, face, rank, theta, good, held)
        for b in good.nonzero()[:, 0].tolist():
            if self.status[b] is Status.FAILED:
                good[b] = False
        S = torch.where(good, at.value, torch.nan)
        self._alternatives(theta, S, C, good)
        plain = [
            b for b in good.nonzero()[:, 0].tolist() if self.status[b] not in (Status.NOT_IDENTIFIED, Status.MULTIMODAL)
        ]
        if shape and plain:
            self._shapes(torch.tensor(plain), theta, S, C)
        for b in plain:
            if self.status[b] is Status.NOT_IDENTIFIED:
                columns = self.space.indices(sorted({n for d in self.null[b] for n in d}))
                C[b, columns, :] = C[b, :, columns] = torch.nan
                C[b, columns, columns] = torch.inf
            elif held[b]:
                self.status[b], self.reason[b] = Status.AT_BOUND, f"held by {_words(self.space, held[b])}"
            else:
                self.status[b], self.reason[b] = Status.CONVERGED, self._praise(b)
        bad = ~good
        theta[bad], C[bad] = torch.nan, torch.nan
        J = torch.where(good[:, None, None], at.information, torch.nan)
        edm = torch.where(good, found.edm, torch.nan)
        spent = torch.where(good, found.iterations, 0)
        score = torch.where(good[:, None], at.score, torch.nan)
        return Verdicts(
            theta,
            S,
            score,
            J,
            C,
            edm,
            spent,
            self.status,
            self.reason,
            self.null,
            held,
            self.others,
            rank,
            face,
            self.higher,
        )

    def _blank(self) -> Solution:
        from engine.evidence import Derivatives

        B, P = self.B, self.P
        zero = torch.zeros(B, dtype=torch.float64)
        at = Derivatives(zero, torch.zeros(B, P).double(), torch.eye(P).double().repeat(B, 1, 1), zero)
        return Solution(torch.zeros(B, P).double(), at, zero, zero > 0, zero.long())

    def _praise(self, b: int) -> str:
        n = int(self.searches[b])
        from_ = f"from {n} start{'s' * (n > 1)}"
        if self.objective.concave:
            return f"the global maximum, because S is concave, {from_}"
        return f"one maximum inside the bounds, {from_}"

    def _failures(self) -> Tensor:
        """Which data sets have a maximum at all; the reasons of the others."""
        good = self.best >= 0
        value, slack = self.solution.at.value, 1e-3 + 4.0 * self.solution.at.resolution
        rows = self.best.clamp_min(0)
        higher = torch.zeros(self.B, dtype=torch.bool)
        if len(value):
            higher = good & (value[self.highest.clamp_min(0)] > value[rows] + slack[rows])
        for b in (~good | higher).nonzero()[:, 0].tolist():
            if int(self.highest[b]) < 0:
                tried = f"all {self.screened} points of the prior that were tried" if self.screened else "the start"
                self.reason[b] = f"S is −∞ at {tried}; check bounds and data"
                continue
            k = int(self.highest[b])
            theta = self.solution.theta[k]
            point = ", ".join(f"{n} = {v:.6g}" for n, v in zip(self.space.names, theta.tolist(), strict=True))
            if bool(higher[b]):
                self.reason[b] = f"S still rises without a maximum near {point}; narrow the bounds there"
                continue
            why = f"none of {int(self.searches[b])} starts reached a maximum; the best stopped at {point}, where "
            if self._at_wall(b, theta, self.solution.at.score[k]):
                why += "S still rises but is −∞ just beyond. Set a bound where θ becomes impossible"
            else:
                why += f"an increase of {float(self.solution.edm[k]):.2g} nats is still expected. Narrow the bounds, or give start="
            self.reason[b] = why
        return good & ~higher

    def _at_wall(self, b: int, theta: Tensor, score: Tensor) -> bool:
        """Whether S is −∞ a hundredth of a typical size up its own slope."""
        own, scale = self._own(b), self.space.scale
        lower, upper = own.lower, own.upper
        uphill = torch.where(upper > lower, score * scale, 0.0)
        step = 1e-2 * scale * uphill / uphill.norm().clamp_min(1e-300)
        step = step * own.reach(theta, step).clamp_max(1.0) if not own.is_box else step
        beyond = torch.minimum(torch.maximum(theta + step, lower), upper)
        return bool(torch.isinf(self.objective.value(beyond[None], torch.tensor([b])))[0])

    def _own(self, b: int) -> FeasibleSet:
        """The set of data set b, unbatched."""
        one = self.inside.rows(torch.tensor([b]))
        return self.inside if self.inside.lower.dim() == 1 else one.first()

    def _held(self, face: Face, b: int) -> dict[str, str]:
        """Parameters on an active bound, and constraints that are active, with the side."""
        names = self.space.names
        out = {
            names[i]: "lower" if bool(face.lower[b, i]) else "upper"
            for i in (face.lower[b] | face.upper[b]).nonzero()[:, 0].tolist()
            if names[i] not in self.fixed and not bool(self.idle[i])
        }
        for i in face.rows[b].nonzero()[:, 0].tolist():
            name, side = self.space.inequalities[i]
            out[name] = side
        for i in face.cones[b].nonzero()[:, 0].tolist():
            out[self.space.cones[i]] = "border"
        return out

    def _covariances(
        self, J: Tensor, face: Face, rank: Tensor, theta: Tensor, good: Tensor, held: Sequence[Mapping[str, str]]
    ) -> Tensor:
        """The projected covariances (B, P, P); sets what is not identified, and what is no maximum."""
        unit = face.unit
        closed = torch.eye(self.P, dtype=torch.float64) - face.free
        scaled = face.free @ (J * unit[:, :, None] * unit[:, None, :] + face.curvature) @ face.free
        values, vectors = torch.linalg.eigh(scaled + closed)
        inverse = (vectors / values[:, None]) @ vectors.mT - closed
        still = inverse.diagonal(dim1=-2, dim2=-1).abs() <= 1e-13  # held: what rounding leaves is no direction
        inverse = torch.where(still[:, :, None] | still[:, None, :], 0.0, inverse)
        C = inverse * unit[:, :, None] * unit[:, None, :]
        floor = curvature_floor(self.space, theta)
        alone = self.idle & ~torch.tensor([n in self.fixed for n in self.space.names])
        moving = (face.free.diagonal(dim1=-2, dim2=-1) > 1e-12) | alone
        deaf = (moving & (J.diagonal(dim1=-2, dim2=-1).abs() <= floor)).any(-1)
        plain = good & ~deaf & (values[:, 0] > torch.maximum(rank, torch.tensor(1e-7)) * values[:, -1].abs())
        for b in plain.nonzero()[:, 0].tolist():
            self.status[b] = Status.CONVERGED
        for b in (good & ~plain).nonzero()[:, 0].tolist():
            at_fixed = torch.tensor([n in held[b] or n in self.fixed for n in self.space.names])
            one = None if self.inside.is_box else face.pick(torch.tensor([b]))
            try:
                known = covariance_of(J[b], at_fixed, floor[b], kind="observed", rank=float(rank[b]), face=one)
            except EstimateError as error:
                self.reason[b] = str(error)
                continue
            self.status[b] = Status.CONVERGED
            self.null[b] = tuple(self._named(direction) for direction in known.null)
            if one is not None:
                self.null[b] += tuple({self.space.names[i]: 1.0} for i in alone.nonzero()[:, 0].tolist())
            if self.null[b]:
                self.status[b] = Status.NOT_IDENTIFIED
                self.reason[b] = f"the data say nothing about {'; '.join(direction_text(d) for d in self.null[b])}"
            C[b] = known.without(self.space.indices(sorted({n for d in self.null[b] for n in d}))).matrix
        return C

    def _named(self, direction: Tensor) -> dict[str, float]:
        return {n: float(v) for n, v in zip(self.space.names, direction.tolist(), strict=True) if v != 0.0}

    def _alternatives(self, theta: Tensor, S: Tensor, C: Tensor, good: Tensor) -> None:
        """Other maxima nearly as high, each once: apart in standard errors, with a valley in between."""
        if self.objective.concave or not len(self.owner):
            return
        own, solution = self.owner, self.solution
        gap = 2.0 * (S[own] - solution.at.value)
        sd = C.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        unit = torch.where(torch.isfinite(sd) & (sd > 0), sd, self.space.scale)
        apart = ((solution.theta - theta[own]) / unit[own]).abs().amax(-1) > 1e-4
        rows = good[own] & solution.converged & (gap <= _COMPETING) & apart & (torch.arange(len(own)) != self.best[own])
        for b in own[rows].unique().tolist():
            mine = (rows & (own == b)).nonzero()[:, 0]
            mine = mine[solution.at.value[mine].argsort(descending=True)]
            found = tuple(self._beyond_valleys(b, theta[b], mine.tolist()))
            if self.null[b]:  # the rest lie on the same ridge
                self.others[b] = tuple((t, v) for t, v in found if float(S[b]) - v > 1e-3)
            elif found:
                words = f"{len(found)} other {'maxima lie' if len(found) > 1 else 'maximum lies'}"
                self.status[b], self.others[b] = Status.MULTIMODAL, found
                self.reason[b] = f"{words} within 2ΔS = {_COMPETING:g} of this one"

    def _beyond_valleys(self, b: int, theta: Tensor, rows: Sequence[int]) -> list[tuple[Tensor, float]]:
        found: list[tuple[Tensor, float]] = []
        way = torch.linspace(0, 1, 33, dtype=torch.float64)[:, None]
        for k in rows:
            end = self.solution.theta[k]
            for other in [theta, *(t for t, _ in found)]:
                S = self.objective.value(other + way * (end - other), torch.full((33,), b))
                rim = torch.minimum(S[0], S[-1])
                if float(rim - S.min()) <= 1e-3 + 8.0 * float(self.solution.at.resolution[k]):
                    break
            else:
                found.append((end.clone(), float(self.solution.at.value[k])))
        return found

    def _shapes(self, rows: Tensor, theta: Tensor, top: Tensor, C: Tensor) -> None:
        """Directions that the curvature at θ̂ says nothing true about, with the reason.

        One standard error along each axis of the covariance, or as far as the constraints allow, S must have dropped by
        about ½ of the squared part. A hundred times less on one side is a maximum that lies at infinity; far more on
        both sides is a peak that is not parabolic, whose curvature is no measure of its width.
        """
        P, n = self.P, len(rows)
        at, sd = theta[rows], C[rows].diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        sd = torch.where(sd > 0, sd, 1.0)
        if self.inside.is_box:
            values, vectors = torch.linalg.eigh(C[rows] / (sd[:, :, None] * sd[:, None, :]))
            values = torch.where(values > 1e-12 * values[:, -1:], values, 0.0)
            axes = (vectors * values.clamp_min(0.0).sqrt()[:, None, :]).mT * sd[:, None, :]  # (n, P, P), a row each
        else:  # in the coordinates of the face, whose normals are exact there
            face, unit = self.face.pick(rows), self.face.unit[rows]
            values, vectors = torch.linalg.eigh(C[rows] / (unit[:, :, None] * unit[:, None, :]))
            along = ((face.free @ vectors) * vectors).sum(-2) > 0.5
            values = torch.where(along & (values > 1e-12 * values[:, -1:]), values, 0.0)
            axes = (vectors * values.clamp_min(0.0).sqrt()[:, None, :]).mT
            axes = (axes @ face.free) * unit[:, None, :]
        moves = torch.cat([axes, -axes], 1)  # (n, 2P, P)
        live = (moves != 0).any(-1)
        own = self.inside.rows(rows.repeat_interleave(2 * P))
        start = at.repeat_interleave(2 * P, 0)
        room = own.reach(start, moves.reshape(-1, P)).reshape(n, 2 * P)
        reach = room.clamp(0.0, 1.0)

        best = self.best.clamp_min(0)[rows]
        ceiling = top[rows] + 1e-3 + 16.0 * self.solution.at.resolution[best]

        def S(distance: Tensor, some: Tensor) -> Tensor:
            """S at a distance along some of the moves, a mask (n, 2P); shape (their number,)."""
            out = torch.zeros(n, 2 * P, dtype=torch.float64)
            for k in range(2 * P):  # one move at a time: every data set then takes part once, as it lies in memory
                use = some[:, k].nonzero()[:, 0]
                if not len(use):
                    continue
                sets = self.inside.rows(rows[use])
                end = at[use] + distance[use, k, None] * moves[use, k]
                end = torch.minimum(torch.maximum(end, sets.lower), sets.upper)
                out[use, k] = self.objective.value(end, rows[use])
                gain = out[use, k] - ceiling[use]
                for i in (gain > 0).nonzero()[:, 0].tolist():
                    ceiling[use[i]] = out[use[i], k]
                    self.higher[int(rows[use[i]])] = end[i]
            return out[some]

        expected = 0.5 * reach**2
        drop = torch.zeros_like(reach)
        first = live.clone()
        if self.objective.concave:  # it never levels off; what is steep on one side is looked at on the other
            first[:, P:] = False
        for some in (first, live & ~first):
            some = some if some is first else some & (drop > 25.0 * expected + 0.01)[:, :P].repeat(1, 2)
            if bool(some.any()):
                drop[some] = top[rows][:, None].expand_as(reach)[some] - S(reach, some)
        flat = (reach > 0.3) & (drop < 0.01 * expected) & first
        steep = drop > 25.0 * expected + 0.01
        slow = live & ~flat & (room >= 3.0) & (drop < 0.9 * expected)  # it may level off
        if not self.objective.concave and bool(slow.any()):
            far = top[rows][:, None].expand_as(reach)[slow] - S(room.clamp_max(3.0), slow)
            flat[slow] = far < 0.5
        steep = (steep[:, :P] & steep[:, P:]).repeat(1, 2)
        for i in ((flat | steep) & live).any(-1).nonzero()[:, 0].tolist():
            b, odd = int(rows[i]), []
            for k in (live[i] & (flat[i] | steep[i])).nonzero()[:, 0].tolist():
                move, other = moves[i, k], (k + P) % (2 * P)
                sharp = k < P and bool(steep[i, k])
                if sharp:  # across a curved valley, S falls as steeply although the valley's floor does not
                    column = int((move / sd[i]).abs().argmax())
                    ends = at[i, column] + move[column] * torch.stack([reach[i, k], -reach[i, other]])
                    sharp = self._profile_is_steep(b, at[i], column, ends, float(top[b]), expected[i, [k, other]])
                direction = self._named(torch.where((move / sd[i]).abs() < 1e-6, 0.0, move / move.norm()))
                if direction and bool(flat[i, k]):
                    odd.append((direction, f"S has no maximum: it never falls along {direction_text(direction)}"))
                elif direction and sharp:
                    why = "its curvature at the maximum is no measure of its width; use profile intervals"
                    odd.append((direction, f"S is not parabolic along {direction_text(direction)}: {why}"))
            if odd:
                self.status[b], self.reason[b] = Status.NOT_IDENTIFIED, "; ".join(why for _, why in odd)
                self.null[b] = tuple(direction for direction, _ in odd)

    def _profile_is_steep(self, b: int, theta: Tensor, column: int, ends: Tensor, top: float, expected: Tensor) -> bool:
        try:
            values = profile_at(self.objective, b, theta, [column], ends[:, None], self._own(b))
        except EstimateError:
            return False
        return bool((top - values > 25.0 * expected + 0.01).all())


def _words(space: ParameterSpace, held: Mapping[str, str]) -> str:
    """What holds an estimate, in words."""
    bounds = [f"the {side} bound of '{n}'" for n, side in held.items() if n in space]
    sides = {c.name: c for c in space.constraints}
    rows = [f"'{n}'" if n == str(sides[n]) else f"'{n}' ({sides[n]})" for n in held if n not in space]
    return ", ".join([*bounds, *rows])
