r"""θ̂ as a torch module: the argmax of the sum, with gradients to everything it depends on.

θ̂ is found without gradients (:mod:`engine.many`), and finished with one differentiable step,

.. math:: \hat\theta = \theta_0 + \arg\max_d\; g^\top d - \tfrac12 d^\top J d, \qquad
          g = \nabla_\theta S(\theta_0; w, x),\; J = -\nabla^2_\theta S(\theta_0),

over the feasible set about θ₀. At the maximum d = 0, so that J needs no gradient of its own, and what remains is the
implicit function theorem on the face that holds θ̂: exact for first derivatives with respect to the weights w, the data x
and the constraints' own numbers. Second derivatives would not be, and are refused. Where a multiplier is exactly 0, θ̂
has a kink: the derivative is that of the side on which the constraint lets go.

References:
    | Amos and Kolter (2017), OptNet, https://arxiv.org/abs/1703.00443
    | Agrawal et al. (2019), differentiable convex optimisation layers, https://arxiv.org/abs/1910.12430
    | Blondel et al. (2022), implicit differentiation, https://arxiv.org/abs/2105.15183
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from engine.argmax import argmax
from engine.datasets import DataSets, Part
from engine.ensemble import Ensemble
from engine.errors import EstimateError, ModalityError, ObservationError, ParameterError, UnknownPluginError
from engine.estimate import check, idle_components
from engine.faces import Face, face_at
from engine.limits import Limits, limited_starts
from engine.modality import Modality
from engine.observations import Source
from engine.parameters import ParameterSpace
from engine.result import Status
from engine.search import check_search, feasible, given_start, nearest, starting_points
from engine.terms import Term
from engine.verdict import Verdicts, settle

__all__ = ["EstimationLayer", "LayerEstimates"]

# Standard errors that the last step moves: more than the first, and it is taken again; more than the second, and there
# is no answer; more than the third, and it is not even taken again. With float32 plugins, rounding alone makes 1e-5.
_FAR = ((1e-10, 1e-5, 1e-2), (1e-4, 1e-3, 1e-2))
_AGAIN = 3  # times that it is taken again at most
_HOLDS = 1e-5  # standard errors by which a constraint must hold θ̂ back to count as holding it, as in a verdict
_LOOKED_AT = 3  # observations on which each plugin is seen to keep its word
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
        allow_identical: See :class:`engine.Observations`.

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
        polish: int = 4,
        seed: int = 0,
        failed: Literal["nan", "zero"] = "nan",
        allow_identical: bool = False,
    ) -> None:
        super().__init__()
        check(parameters, {}, "observed", screen, polish, ())
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
        self.prior, self.screen, self.polish, self.seed = prior, screen, polish, seed
        self.failed: Literal["nan", "zero"] = failed
        self.allow_identical = allow_identical
        self.modalities = nn.ModuleDict({_key(name): modality for name, modality in modalities.items()})
        self._names = {name: _key(name) for name in modalities}

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
        live = self._tensors(data)
        if not batched:
            if mask is not None:
                raise ObservationError("a mask needs batched=True; leave out what does not count")
            live = {name: x[None] for name, x in live.items()}
        theta = self.estimate(live, mask=mask, start=start, limits=limits).theta
        return theta if batched else theta[0]

    def estimate(
        self,
        data: Mapping[str, Any],
        *,
        mask: Mapping[str, Any] | None = None,
        start: Mapping[str, float] | Tensor | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> LayerEstimates:
        """θ̂ of B data sets with their statuses; ``data``, ``mask``, ``start`` and ``limits`` are those of a batched call."""
        graph = torch.is_grad_enabled()
        # what is made in inference mode cannot be differentiated by θ, which the search does; outside, gradients are on
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            return self._estimate(data, mask, start, limits)

    def _estimate(
        self,
        data: Mapping[str, Any],
        mask: Mapping[str, Any] | None,
        start: Mapping[str, float] | Tensor | None,
        limits: Mapping[str, Any] | None,
    ) -> LayerEstimates:
        modalities: dict[str, Modality] = {n: self.modalities[k] for n, k in self._names.items()}  # pyright: ignore
        live = self._tensors(data)
        if live and all(x.dim() > 0 and len(x) == 0 for x in live.values()):
            none = torch.zeros(0, len(self.space), dtype=torch.float64)
            return LayerEstimates(
                self._linked(none, list(live.values()), live), none[:, :, None] * none[:, None], [], []
            )
        plain = {n: x.detach() for n, x in live.items()}
        sets = DataSets(plain, modalities, mask=mask, allow_identical=self.allow_identical)
        part = sets.part(0, sets.count)
        objective = Ensemble(self.space, modalities, part, prior=self.prior)
        given = Limits(self.space, limits or {}, sets.count)
        found, possible = self._search(objective, given, start, part)
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
        coarse = objective.coarse
        at, J, face, own = theta[rows], found.information[rows], found.face.pick(rows), given.inside(rows)
        turn = 0
        while True:
            g = self._score(at, rows, modalities, live, part.mask)
            if turn == 0 and bool(_differs(g.detach(), found.score[rows], face.unit)):
                _refuse_change(modalities)
            g = _Once.apply(g) if g.requires_grad else g
            J, release = _convex(J, face)
            move, solved = argmax(J, g, own.about(at), failed=self.failed)
            move = move if release is None else (release @ move[:, :, None])[:, :, 0]
            moved = (move.detach() / face.unit).abs().amax(-1)
            again = solved & (moved > _FAR[coarse][0]) & (moved <= _FAR[coarse][2])
            if turn == _AGAIN or not bool(again.any()):
                break
            turn += 1
            # the search ended early: what J lacks, the derivative lacks
            near = torch.minimum(torch.maximum(at + move.detach(), own.lower.detach()), own.upper.detach())
            at = torch.where(again[:, None], near, at)
            there = objective.derivatives(at, rows)
            face = face_at(at, there.score, face.unit, given.detached().rows(rows), J, least=_HOLDS)
            J = there.information
        stayed = moved <= _FAR[coarse][1]  # false for NaN too
        for b in rows[~(solved & stayed)].tolist():
            status[b] = Status.FAILED
            reason[b] = "the last step does not confirm the maximum that was found; narrow the bounds, or give start="
            covariance[b] = torch.nan
        confirmed = (solved & stayed).nonzero()[:, 0]
        if not g.requires_grad and not any(t.requires_grad for t in given.numbers(rows)):
            move = move.detach()
        bounds = own.lower.detach().expand_as(at), own.upper.detach().expand_as(at)
        out = out.index_put((rows[confirmed],), _Within.apply(at + move, *bounds)[confirmed])  # type: ignore[index]
        return LayerEstimates(self._blank(out, live, given, rows[confirmed]), covariance, status, reason)

    def _tensors(self, data: Mapping[str, Any]) -> dict[str, Tensor]:
        """The data as tensors, with their graphs."""
        if not isinstance(data, Mapping):
            raise ObservationError(
                f"data maps plugin names to observations, got {type(data).__name__}; write {{'name': x}}"
            )
        out = {}
        for name, x in data.items():
            if name not in self._names:
                raise UnknownPluginError(f"no plugin {name!r}; there are {', '.join(sorted(self._names))}")
            if isinstance(x, list | tuple) and any(isinstance(v, Tensor) for v in x):
                parts = [torch.as_tensor(v) for v in x]
                if len({p.shape for p in parts}) > 1:
                    raise ObservationError(
                        f"data sets of a layer have equal shapes, got {', '.join(str(tuple(p.shape)) for p in parts)[:100]} "
                        f"of plugin '{name}'; pad them to one length and say with mask= what counts"
                    )
                x = torch.stack(parts)
            if not isinstance(x, Tensor):
                source = Source(name, x)
                if not source.shape:
                    raise ObservationError(f"data of plugin '{name}' must have shape (N, *event_shape), got one number")
                x = source.read(0, source.shape[0])
            elif not x.dim():
                raise ObservationError(f"data of plugin '{name}' must have shape (N, *event_shape), got one number")
            out[name] = x
        return out

    def _search(self, objective: Ensemble, given: Limits, start: Any, part: Part) -> tuple[Verdicts, Tensor]:
        """What the searches found, and for which data sets anything is possible."""
        space, count = self.space, objective.count
        check_search(self.screen, self.polish, start)
        inside, middle = feasible(space, {})
        self._steady(part, objective.modalities, given.spread(middle[None])[0, 0])
        heard = {p for m in objective.modalities.values() for p in m.parameter_names}
        idle = idle_components(space, heard, self.prior)
        n, kept = (min(self.screen, 16), 1) if objective.concave else (self.screen, self.polish)
        possible = torch.ones(count, dtype=torch.bool)
        if given.some:
            inside = given.detached()
            possible = nearest(inside, middle.expand(count, -1), space.scale)[1]
            starts = limited_starts(objective, given, middle, idle, start, screen=n, polish=kept, seed=self.seed)
        else:
            begin = None if start is None else given_start(space, start, inside, count)
            starts = starting_points(
                objective, inside, middle, idle, start=begin, screen=n, polish=kept, seed=self.seed
            )
        if bool(idle.any()) and len(starts.theta):
            lower, upper = inside.lower.clone(), inside.upper.clone()
            at = torch.minimum(torch.maximum(starts.theta[0], lower), upper)
            lower[..., idle] = upper[..., idle] = at[..., idle]
            inside = inside.within(lower, upper)
        return settle(objective, starts, inside, idle, {}, n), possible

    def _steady(self, part: Part, modalities: Mapping[str, Modality], at: Tensor) -> None:
        """Refuse plugins that score an observation differently the next time, or among others. ModalityError."""
        for name, modality in modalities.items():
            x, mask = part.x[name], part.mask[name]
            some = (x.reshape(-1, *modality.event_shape) if mask is None else x[mask])[:_LOOKED_AT]
            if not len(some):
                continue
            term = Term([name], [modality], self.space, {})  # pyright: ignore[reportArgumentType]
            local = at[term.index[0]][None, None, None]
            with torch.no_grad():
                first, again, alone = (
                    term.scalars(t[None, None].to(term.dtype), local)[0, 0].to(torch.float64)
                    for t in (some, some, some[:1])
                )
            for seen, how in ((again, "the next time"), (alone, "alone")):
                change = (seen - first[: len(seen)]).abs()
                digits = 1e-4 if term.dtype == torch.float32 else 1e-8
                if not bool((change > digits * (1.0 + seen.abs())).any()):
                    continue
                k = int(change.nan_to_num().argmax())
                raise ModalityError(
                    f"plugin '{name}' must score an observation by itself and always alike, got {float(first[k]):.9g} and "
                    f"{how} {float(seen[k]):.9g}{_culprits(modality)}; call layer.eval() first, or make it deterministic"
                )

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
        with torch.enable_grad():
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
        asked = any(t.requires_grad for t in (*live.values(), *self.parameters()))
        return score if asked else score.detach()

    def _blank(self, out: Tensor, live: Mapping[str, Tensor], given: Limits, fine: Tensor) -> Tensor:
        """The same, with NaN as the gradient of everything that a data set without an answer depends on."""
        if len(fine) == len(out) or not torch.is_grad_enabled():
            return out
        lost = torch.ones(len(out), dtype=torch.bool)
        lost[fine] = False
        own = [x[lost] for x in live.values()] + given.numbers(lost.nonzero()[:, 0])
        if self.failed == "zero":
            return self._linked(out, own, live)
        poison = torch.zeros(int(lost.sum()), dtype=torch.float64)
        for t in own:
            if t.requires_grad:
                poison = poison + t.to(torch.float64).nan_to_num().reshape(len(poison), -1).sum(-1)
        for w in self._weights(live):
            poison = poison + w.to(torch.float64).sum()
        if not poison.requires_grad:
            return out
        return out.index_put((lost,), (poison * torch.nan)[:, None].expand(-1, out.shape[1]))

    def _linked(self, out: Tensor, own: Sequence[Tensor], live: Mapping[str, Tensor]) -> Tensor:
        """The same, with a gradient of 0, instead of none, to what no answer depends on."""
        if out.requires_grad or not torch.is_grad_enabled():
            return out
        nothing = torch.cat([t.reshape(-1)[:0].to(torch.float64) for t in (*own, *self._weights(live))])
        return out.index_put((torch.zeros(0, dtype=torch.long),), nothing[:, None].expand(-1, out.shape[1]))

    def _weights(self, live: Mapping[str, Tensor]) -> list[Tensor]:
        """The weights that an estimate from these plugins depends on."""
        return [w for name in live for w in self.modalities[self._names[name]].parameters() if w.requires_grad]


class _Within(torch.autograd.Function):
    """θ̂ to the last bit within its bounds."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(theta, lower), upper)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cotangents[0], None, None


class _Once(torch.autograd.Function):
    """The score, through which first derivatives go and no others: beyond them, the last step's are not θ̂'s."""

    @staticmethod
    def forward(ctx: Any, score: Tensor) -> Tensor:
        out = score.clone()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Refusal.apply(cotangents[0], *ctx.saved_tensors)  # type: ignore[return-value]


class _Refusal(torch.autograd.Function):
    """The cotangent, tied to the score so that whoever differentiates a gradient of θ̂ again comes by here."""

    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, score: Tensor) -> Tensor:
        return cotangent.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise EstimateError(
            "a layer's θ̂ has first derivatives only, and was differentiated twice; write a penalty on the gradient with "
            "finite differences of θ̂, or leave out create_graph=True"
        )


def _key(name: str) -> str:
    """The name of a plugin's module: its own, but for dots and for names that a container of modules has for itself."""
    if name and "." not in name and not name.startswith("plugin:") and not hasattr(nn.ModuleDict(), name):
        return name
    return "plugin:" + name.replace(":", "::").replace(".", ":")


def _culprits(modality: Modality) -> str:
    """Its parts that are known to be random or to depend on the batch in training mode, in words."""
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    found = [
        f"{n or 'itself'} ({type(m).__name__})"
        for n, m in modality.named_modules()
        if isinstance(m, kinds) and m.training
    ]
    return f"; in training mode: {', '.join(found)}" if found else ""


def _refuse_change(modalities: Mapping[str, Modality]) -> NoReturn:
    raise ModalityError(
        "the score of the plugins must be the same when they are called again, and is not: something in them is "
        f"random or keeps state{''.join(_culprits(m) for m in modalities.values())}; call layer.eval() first"
    )


def _filled(x: Tensor, mask: Tensor) -> Tensor:
    """x (k, N, *event) with some observation that counts in the place of each that does not."""
    if not bool(mask.any()):
        return x
    spare = x.detach()[mask][0]
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - 2)), x, spare)


def _differs(score: Tensor, before: Tensor, unit: Tensor) -> Tensor:
    """Whether some score (k, P) is not what it was, beyond rounding, in standard errors."""
    return ((score - before) * unit).abs().gt(1e-3 * (1.0 + (before * unit).abs())).any()


def _convex(information: Tensor, face: Face) -> tuple[Tensor, Tensor | None]:
    """A positive definite J for the last step, and what makes its move that of −∇²S: a matrix (k, P, P), or None for 1.

    Curvature along the normals of the face is added as needed: nothing moves there. Along the tangent Z of a curved
    face, −∇²S need not be positive definite; its sum L with the curvature of the face is. There ρ is added to J, and
    1 + ρ Z (Z'LZ)⁻¹ Z' turns the step's derivative Z (Z'(L + ρ)Z)⁻¹ Z' into Z (Z'LZ)⁻¹ Z'.
    """
    unit = face.unit[:, :, None] * face.unit[:, None, :]
    scaled, tangent = information * unit, face.free
    eye = torch.eye(scaled.shape[-1], dtype=scaled.dtype)
    size = scaled.abs().amax((-2, -1))
    size = torch.where(size > 0, size, 1.0)  # S is linear here: what holds it is all there is

    def raised(base: Tensor) -> tuple[Tensor, Tensor]:
        out, bad = base, torch.ones(len(base), dtype=torch.bool)
        for factor in (0.0, 1.0, 1e1, 1e2, 1e4, 1e6):
            out = torch.where(bad[:, None, None], base + (factor * size)[:, None, None] * (eye - tangent), out)
            bad = torch.linalg.eigvalsh(out)[:, 0] <= 1e-9 * size
            if not bool(bad.any()):
                break
        return out, bad

    out, bad = raised(scaled)
    bent = bad & (face.curvature != 0).any(-1).any(-1)
    if not bool(bent.any()):
        return out / unit, None
    whole = tangent @ (scaled + face.curvature) @ tangent + eye - tangent
    values = torch.linalg.eigvalsh(whole)
    bent &= values[:, 0] > 1e-9 * values[:, -1]
    whole = torch.where(bent[:, None, None], whole, eye)
    least = torch.linalg.eigvalsh(tangent @ scaled @ tangent)[:, 0]
    more = torch.where(bent, 1e-3 * size - 2.0 * least.clamp_max(0.0), 0.0)[:, None, None]
    release = eye + more * (torch.linalg.inv(whole) - (eye - tangent)) @ tangent
    return raised(scaled + more * tangent)[0] / unit, release * face.unit[:, :, None] / face.unit[:, None, :]
