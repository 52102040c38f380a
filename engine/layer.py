r"""θ̂ as a torch module: the argmax of the sum, with gradients to everything it depends on.

θ̂ is found without gradients (:mod:`engine.many`), and finished with one differentiable step,

.. math:: \hat\theta = \theta_0 + \arg\max_d\; g^\top d - \tfrac12 d^\top J d, \qquad
          g = \nabla_\theta S(\theta_0; w, x),\; J = -\nabla^2_\theta S(\theta_0),

over the feasible set about θ₀. At the maximum d = 0, so that J needs no gradient of its own, and what remains is the
implicit function theorem on the face that holds θ̂: exact for first derivatives with respect to the weights w, the data x
and the constraints' own numbers. Second derivatives are not (the step is differentiated once). Where a
multiplier is exactly 0, θ̂ has a kink: the derivative is that of the side on which the constraint lets go.

References:
    | Amos and Kolter (2017), OptNet, https://arxiv.org/abs/1703.00443
    | Agrawal et al. (2019), differentiable convex optimisation layers, https://arxiv.org/abs/1910.12430
    | Blondel et al. (2022), implicit differentiation, https://arxiv.org/abs/2105.15183
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.argmax import argmax
from engine.datasets import DataSets, Part
from engine.ensemble import Ensemble
from engine.errors import ModalityError, ObservationError, ParameterError, UnknownPluginError
from engine.estimate import check, idle_components
from engine.faces import Face
from engine.feasible import FeasibleSet
from engine.limits import Limits
from engine.modality import Modality
from engine.observations import Source
from engine.parameters import ParameterSpace
from engine.result import Status
from engine.search import Starts, check_search, feasible, given_start, nearest, search, starting_points
from engine.terms import Term
from engine.verdict import Verdicts, judge

__all__ = ["EstimationLayer", "LayerEstimates"]

_MOVED = 1e-5  # standard errors that the last step may move: further, and the search had not ended
_MOVED_COARSE = 1e-3  # the same with float32 plugins, whose scores of many observations are not known better
_LOOKED_AT = 3  # observations on which each plugin is seen to keep its word
_TRIED = 4  # times as many starting points as are kept, where they must be moved into limits given at the call
_USABLE = (Status.CONVERGED, Status.AT_BOUND, Status.MULTIMODAL)


@dataclass(frozen=True, eq=False)
class LayerEstimates:
    """What a layer found for B data sets.

    Attributes:
        theta: θ̂, shape (B, P), float64, with gradients; NaN where there is none.
        covariance: Its covariance, shape (B, P, P), without gradients.
        status, reason: What each estimate is, and why; B of each.

    Example:
        >>> nothing = torch.zeros(0, 1)
        >>> LayerEstimates(nothing, nothing[:, None], [], []).status
        []
    """

    theta: Tensor
    covariance: Tensor
    status: list[Status]
    reason: list[str]


class EstimationLayer(nn.Module):
    """θ̂ of data sets, differentiable in the plugins' weights, the data and the constraints.

    Arguments:
        parameters: θ's components and constraints.
        modalities: Plugin name -> modality. They become submodules: their weights are the layer's.
        prior: False for maximum likelihood, True for the maximum a posteriori.
        screen, polish, seed: Of the search; see :func:`engine.many.estimate_many`. With a ``start`` at the call,
            ``screen=0`` takes that one alone.
        failed: The gradient of a data set that has no usable θ̂: ``"nan"``, so that it is noticed, or ``"zero"``.

    Raises:
        ParameterError: for a discrete parameter.
        ModalityError: when a plugin names a parameter that is not there; and, when called, when one breaks its
            contract or is random (dropout in training mode, say).

    Example:
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", bounds=(0.0, 2.5))])
        >>> layer = EstimationLayer(space, {"a": Gaussian(parameter_names=("mu",), sd=2.0)})
        >>> x = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]], requires_grad=True)
        >>> theta = layer({"a": x}, batched=True)
        >>> theta.sum().backward()
        >>> theta.tolist(), x.grad[..., 0].tolist()  # the mean; and the bound, which the data no longer move
        ([[2.0], [2.5]], [[0.5, 0.5], [0.0, 0.0]])
    """

    def __init__(
        self,
        parameters: ParameterSpace,
        modalities: Mapping[str, Modality],
        *,
        prior: bool = False,
        screen: int = 1024,
        polish: int = 8,
        seed: int = 0,
        failed: Literal["nan", "zero"] = "nan",
    ) -> None:
        super().__init__()
        check(parameters, {}, "observed", max(screen, 1), polish, None)
        if failed not in ("nan", "zero"):
            raise ParameterError(
                f"failed must be 'nan' or 'zero', got {failed!r}; 'nan' shows which data sets have no answer"
            )
        if not modalities:
            raise ModalityError("a layer needs at least one modality, got none; give {'name': modality}")
        for name, modality in modalities.items():
            if not isinstance(modality, Modality):
                raise ModalityError(f"a plugin is an engine.Modality, got {type(modality).__name__} as '{name}'")
            if absent := [p for p in modality.parameter_names if p not in parameters]:
                raise ModalityError(
                    f"plugin '{name}' depends on the parameter '{absent[0]}', which is not among {', '.join(parameters.names)}"
                )
        self.space = parameters
        self.prior, self.screen, self.polish, self.seed, self.failed = prior, screen, polish, seed, failed
        self.modalities = nn.ModuleDict(dict(modalities))

    def forward(
        self,
        data: Mapping[str, Any],
        *,
        batched: bool = False,
        mask: Mapping[str, Any] | None = None,
        start: Mapping[str, float] | Tensor | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """θ̂ with gradients.

        Arguments:
            data: plugin name -> (N, *event_shape), any subset of the plugins; with ``batched``, (B, N, *event_shape).
            batched: Whether the leading axis counts data sets.
            mask: With ``batched``: plugin name -> which observations count, boolean (B, N).
            start: One more starting point, (P,) or (B, P), or by name.
            limits: Constraint data in the place of what was declared, which may require gradients; see
                :class:`engine.limits.Limits`.

        Returns:
            Shape (P,), or (B, P) with ``batched``, float64; NaN for a data set that has no usable θ̂ (see
            :meth:`estimate` for the reason).

        Raises:
            ObservationError, UnknownPluginError, ParameterError, ModalityError: for input that cannot be used.
        """
        if not batched:
            if mask is not None:
                raise ObservationError("a mask needs batched=True; leave out what does not count")
            data = {name: torch.as_tensor(x)[None] for name, x in data.items()}
        theta = self.estimate(data, mask=mask, start=start, limits=limits).theta
        return theta if batched else theta[0]

    def estimate(
        self,
        data: Mapping[str, Any],
        *,
        mask: Mapping[str, Any] | None = None,
        start: Mapping[str, float] | Tensor | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> LayerEstimates:
        """θ̂ of B data sets with their statuses; the arguments are those of a batched call."""
        modalities: dict[str, Modality] = {name: self.modalities[name] for name in self.modalities}  # pyright: ignore
        live = {name: torch.as_tensor(x) for name, x in data.items()}
        if live and all(x.dim() > 0 and len(x) == 0 for x in live.values()):
            P = len(self.space)
            return LayerEstimates(torch.zeros(0, P).double(), torch.zeros(0, P, P).double(), [], [])
        sets = DataSets({n: x.detach() for n, x in live.items()}, modalities, mask=mask)
        part = sets.part(0, sets.count)
        objective = Ensemble(self.space, modalities, part, prior=self.prior)
        given = Limits(self.space, limits or {}, sets.count)
        found, possible = self._search(objective, given, start)
        theta = found.theta.nan_to_num()
        usable = torch.tensor([s in _USABLE for s in found.status]) & possible
        status, reason = list(found.status), list(found.reason)
        for b in (~possible).nonzero()[:, 0].tolist():
            status[b], reason[b] = Status.FAILED, "infeasible: nothing satisfies the bounds and constraints given"
        rows = usable.nonzero()[:, 0]
        out = torch.full_like(theta, torch.nan)
        covariance = torch.where(usable[:, None, None], found.covariance, torch.nan)
        if not len(rows):
            return LayerEstimates(self._blank(out, live, given, rows), covariance, status, reason)
        g = self._score(theta[rows], rows, modalities, live, part.mask)
        _same(g.detach(), found.score[rows], found.face.unit[rows])
        J = _convex(found.information[rows], found.face.pick(rows))
        inside = given.inside(rows).about(theta[rows])
        move, solved = argmax(J, g, inside, failed=self.failed)
        stayed = (move.detach() / found.face.unit[rows]).abs().amax(-1) <= _MOVED  # false for NaN too
        for b in rows[~(solved & stayed)].tolist():
            status[b] = Status.FAILED
            reason[b] = "the last step does not confirm the maximum that was found; narrow the bounds, or give start="
            covariance[b] = torch.nan
        confirmed = (solved & stayed).nonzero()[:, 0]
        out = out.index_put((rows[confirmed],), (theta[rows] + move)[confirmed])
        return LayerEstimates(self._blank(out, live, given, rows[confirmed]), covariance, status, reason)

    def _search(self, objective: Ensemble, given: Limits, start: Any) -> tuple[Verdicts, Tensor]:
        """What the searches found, and for which data sets anything is possible."""
        space, count = self.space, objective.count
        inside, middle = feasible(space, {})
        begin = None if start is None else given_start(space, start, inside, count)
        check(space, {}, "observed", self.screen, self.polish, start)
        heard = {p for m in objective.modalities.values() for p in m.parameter_names}
        idle = idle_components(space, heard, self.prior)
        n, kept = (min(self.screen, 16), 1) if objective.concave else (self.screen, self.polish)
        starts = starting_points(objective, inside, middle, idle, start=begin, screen=n, polish=kept, seed=self.seed)
        possible = torch.ones(count, dtype=torch.bool)
        if given.some:
            inside = given.detached()
            possible = nearest(inside, middle.expand(count, -1), space.scale)[1]
            moved, fine = nearest(inside.rows(starts.owner), starts.theta, space.scale)
            starts = Starts(moved[fine], starts.owner[fine])
        if bool(idle.any()) and len(starts.theta):
            lower, upper = inside.lower.clone(), inside.upper.clone()
            lower[..., idle] = upper[..., idle] = starts.theta[0, idle]
            inside = inside.within(lower, upper)
        solution = search(objective, starts, inside)
        return judge(objective, solution, starts, inside, idle, {}, n), possible

    def _score(
        self,
        theta: Tensor,
        rows: Tensor,
        modalities: Mapping[str, Modality],
        live: Mapping[str, Tensor],
        masks: Mapping[str, Tensor | None],
    ) -> Tensor:
        """∇S (k, P) at theta (k, P) of some data sets, with the graph to weights and data."""
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            leaf = theta.detach().clone().requires_grad_()
            total = self.space.log_prior(leaf) if self.prior else torch.zeros(len(leaf), dtype=torch.float64)
            for name in sorted(live):
                term = Term([name], [modalities[name]], self.space, {})  # pyright: ignore[reportArgumentType]
                x, mask = live[name][rows].to(term.dtype), masks[name]
                mask = None if mask is None else mask[rows]
                x = x if mask is None else _filled(x, mask)
                s = term.scalars(x[None], leaf[:, term.index[0]][None, :, None])[0].to(torch.float64)
                total = total + (s if mask is None else torch.where(mask, s, 0.0)).sum(-1)
            (score,) = torch.autograd.grad(total.sum(), leaf, create_graph=graph)
        return score

    def _blank(self, out: Tensor, live: Mapping[str, Tensor], given: Limits, fine: Tensor) -> Tensor:
        """The same, with NaN as the gradient of everything that a data set without an answer depends on."""
        if self.failed == "zero" or len(fine) == len(out) or not torch.is_grad_enabled():
            return out
        lost = torch.ones(len(out), dtype=torch.bool)
        lost[fine] = False
        poison = torch.zeros(int(lost.sum()), dtype=torch.float64)
        for x in live.values():
            if x.requires_grad:
                poison = poison + x[lost].reshape(len(poison), -1).to(torch.float64).sum(-1)
        inside = given.inside(lost.nonzero()[:, 0])
        for t in (inside.lower, inside.upper, inside.A, inside.b, inside.C, inside.d):
            if t.requires_grad:
                poison = poison + t.nan_to_num().reshape(len(poison), -1).sum(-1)
        for w in self.parameters():
            if w.requires_grad:
                poison = poison + w.to(torch.float64).sum()
        if not poison.requires_grad:
            return out
        return out.index_put((lost,), (poison * torch.nan)[:, None].expand(-1, out.shape[1]))


def _filled(x: Tensor, mask: Tensor) -> Tensor:
    """x (k, N, *event) with some observation that counts in the place of each that does not."""
    if not bool(mask.any()):
        return x
    spare = x.detach()[mask][0]
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - 2)), x, spare)


def _same(score: Tensor, before: Tensor, unit: Tensor) -> None:
    """Refuse plugins whose scalars change from call to call. ModalityError."""
    change = ((score - before) * unit).abs()
    if bool((change > 1e-3 * (1.0 + (before * unit).abs())).any()):
        raise ModalityError(
            "the score of the plugins is not the same when they are called again: something in them is random or keeps "
            "state, such as dropout or batch normalisation; call layer.eval() first"
        )


def _convex(information: Tensor, face: Face) -> Tensor:
    """−∇²S with curvature added along the normals of the face until it is positive definite. The last step and its
    derivatives do not change: along the normals nothing moves."""
    unit = face.unit[:, :, None] * face.unit[:, None, :]
    scaled = information * unit
    normal = torch.eye(scaled.shape[-1], dtype=scaled.dtype) - face.free
    size = scaled.abs().amax((-2, -1))
    out = scaled.clone()
    for factor in (1.0, 1e1, 1e2, 1e4, 1e6):
        bad = torch.linalg.eigvalsh(out)[:, 0] <= 1e-9 * size
        if not bool(bad.any()):
            break
        out = torch.where(bad[:, None, None], scaled + (factor * size)[:, None, None] * normal, out)
    return out / unit
