r"""One plugin's part of the sum, evaluated and differentiated: Σ_i s(x_i; θ), its score and its information.

A term is one plugin, or several of one class and shape evaluated as one. Every rule of the contract that an
evaluation can break is an error here that names the plugin.

References:
    | Neumaier, Z. Angew. Math. Mech. 54 (1974) 39, compensated summation
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.errors import EvidenceError, ModalityError
from engine.modality import Modality
from engine.observations import Observations
from engine.parameters import ParameterSpace

__all__: list[str] = []  # the sum's own machinery: see engine.evidence

_KEPT = 2**22  # numbers of one plugin's data that are kept ready between evaluations
# Entries of (θ, observation, event) evaluated together: a modality may need hundreds of numbers for each.
ELEMENTS = 2**18


class _Sum:
    """A running sum of equal tensors that carries its own rounding error."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.carried: Tensor | None = None

    def add(self, term: Tensor) -> None:
        if self.total is None:
            self.total = term
            return
        new = self.total + term
        larger, smaller = (
            torch.where(self.total.abs() >= term.abs(), self.total, term),
            torch.where(self.total.abs() >= term.abs(), term, self.total),
        )
        lost = torch.where(torch.isfinite(new), (larger - new) + smaller, 0.0)  # −∞ stays −∞
        self.total, self.carried = new, lost if self.carried is None else self.carried + lost

    @property
    def result(self) -> Tensor:
        assert self.total is not None
        return self.total if self.carried is None else self.total + self.carried


class Term:
    """One plugin, or several of one shape evaluated as one: G scalars at once."""

    def __init__(self, names: list[str], modalities: list[Modality], space: ParameterSpace, data: Observations) -> None:
        self.names = names
        self.modality = modalities[0]
        self.dtype = self.modality.dtype
        self.modalities = modalities
        self.data = data
        self.index = torch.tensor([space.indices(m.parameter_names) for m in modalities])  # (G, P_m)
        self._call: Callable[[Tensor, Tensor], Any] = self._one
        self._x: Tensor | None = None
        self._ready: list[Tensor] | None = None
        if len(names) > 1:
            state = torch.func.stack_module_state(modalities)  # pyright: ignore[reportArgumentType]
            base = copy.deepcopy(self.modality).to("meta")

            def call(parameters: Any, buffers: Any, x: Tensor, theta: Tensor) -> Tensor:
                return torch.func.functional_call(base, (parameters, buffers), (x, theta))

            self._call = lambda x, theta: torch.func.vmap(call)(*state, x, theta)
            self._x = torch.stack([data[name] for name in names])

    def _one(self, x: Tensor, theta: Tensor) -> Any:
        result = self.modality(x[0], theta[0])
        return result[None] if isinstance(result, Tensor) else result

    def blocks(self) -> Any:
        """The data (G, 1, B, *event) in the plugin's dtype, ready to broadcast against θ; kept where it is small."""
        if self._ready is None:
            if self._x is not None:
                blocks = [self._x[:, None].to(self.dtype)]
            else:
                blocks = (block[None, None].to(self.dtype) for block in self.data.blocks(self.names[0]))
            if self._x is None and self.data.lengths[self.names[0]] * self.modality.event_shape.numel() > _KEPT:
                return blocks
            with torch.inference_mode(False):
                self._ready = list(blocks)
        return self._ready

    def scalars(self, x: Tensor, theta: Tensor) -> Tensor:
        """s of shape (G, K, B) in the plugin's own dtype, from x (G, 1, B, *event), θ (G, K, 1, P_m)."""
        version = x._version
        try:
            s = self._call(x, theta.to(self.dtype))
        except EvidenceError as error:
            raise type(error)(f"{self.label}: {error}") from error
        except (Exception, SystemExit, GeneratorExit) as error:
            raise ModalityError(f"{self.label} raised {type(error).__name__} in log_evidence: {error}") from error
        if x._version != version:
            raise ModalityError(f"{self.label} changed its data in place; log_evidence must leave x as it is")
        if not isinstance(s, Tensor):
            raise ModalityError(f"log_evidence must return a torch.Tensor, got {_what(s)} from {self.label}")
        if s.shape != (expected := (x.shape[0], theta.shape[1], x.shape[2])):
            raise ModalityError(
                f"log_evidence must return one scalar for each (x, θ), here of shape {expected[1:]} for x "
                f"{tuple(x.shape[1:])} and θ {(*theta.shape[1:],)}, got {tuple(s.shape[1:])} from {self.label}; "
                "sum over the event's axes only"
            )
        if s.dtype is not torch.float64 and s.dtype is not torch.float32:
            raise ModalityError(
                f"log_evidence must return float32 or float64, got {s.dtype} from {self.label}; "
                "sums of it would lose the digits that matter"
            )
        return s

    def refuse_bad(self, theta: Tensor) -> None:
        """Name the plugin, θ and observation whose scalar is NaN or +∞, at θ (K, P) where some sum was."""
        start = 0
        for x in self.blocks():
            local = theta.detach()[:, self.index].movedim(0, 1)[:, :, None]
            for k in range(0, len(theta), step := self._chunk(x)):
                part = local[:, k : k + step]
                s = self.scalars(x, part).detach()
                bad = torch.isnan(s) | (s == torch.inf)
                if bool(bad.any()):
                    g, at, i = bad.nonzero()[0].tolist()
                    names = self.modalities[g].parameter_names
                    where = ", ".join(f"{p} = {v:.6g}" for p, v in zip(names, part[g, at, 0].tolist(), strict=True))
                    raise ModalityError(
                        f"log_evidence must be a number or −∞, got {s[g, at, i].item()} from plugin '{self.names[g]}' at {where}, "
                        f"observation {start + i}; return −∞ where θ is impossible, or narrow the parameter's bounds"
                    )
            start += x.shape[2]

    def refuse_company(self, local: Tensor) -> None:
        """Compare up to three observations scored alone with the same among the others, at one local θ (P_m,)."""
        x = next(iter(self.blocks()))
        if x.shape[2] < 2:
            return
        with torch.no_grad():
            together = self.scalars(x, local[None, None, None])[0, 0].to(torch.float64)
            for i in sorted({0, x.shape[2] // 2, x.shape[2] - 1}):
                alone = float(self.scalars(x[:, :, i : i + 1], local[None, None, None])[0, 0, 0])
                seen = float(together[i])
                digits = 1e-4 if self.dtype == torch.float32 else 1e-8
                if math.isfinite(alone) and abs(alone - seen) > digits * (1.0 + abs(alone)):
                    raise ModalityError(
                        f"{self.label} scores observation {i} by {alone:.9g} alone and by {seen:.9g} among {x.shape[2]}; "
                        "each (x, θ) must be scored by itself: no sums, means or normalisation over the batch"
                    )

    def value(self, theta: Tensor) -> Tensor:
        """Σ_i s (G, K) at θ (K, P)."""
        local = theta[:, self.index].movedim(0, 1)[:, :, None]  # (G, K, 1, P_m)
        total = _Sum()
        for x in self.blocks():
            step = self._chunk(x)
            if len(theta) <= step:
                total.add(self.scalars(x, local).to(torch.float64).sum(-1))
            else:
                parts = [self.scalars(x, part).to(torch.float64).sum(-1) for part in local.split(step, dim=1)]
                total.add(torch.cat(parts, 1))
        return total.result

    def derivatives(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Σ_i s, ∇, −∇² and resolution: (G, K), (G, K, P_m), (G, K, P_m, P_m), (G, K), from θ (K, P)."""
        local = theta.detach()[:, self.index].movedim(0, 1)  # (G, K, P_m)
        sums = [_Sum() for _ in range(4)]
        for x in self.blocks():
            step = max(1, self._chunk(x) // 4)
            parts = [self._block_derivatives(x, part) for part in local.split(step, dim=1)]
            for total, pieces in zip(sums, zip(*parts, strict=True), strict=True):
                total.add(torch.cat(pieces, 1))
        value, score, information, resolution = (s.result for s in sums)
        return value, score, information, resolution

    def _block_derivatives(self, x: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = local.clone().requires_grad_()
            s = self.scalars(x, leaf[:, :, None])
            total = s.to(torch.float64).sum(-1)
            if not total.requires_grad:
                raise ModalityError(
                    f"the scalar of {self.label} is detached from θ: it has no gradient; "
                    "keep to torch operations, without .detach(), .item() or .numpy() on the way"
                )
            finite = torch.isfinite(total.detach())  # the rest is −∞, or refused with the value
            score = gradient(total.sum(), leaf)
            information = torch.zeros(*leaf.shape, leaf.shape[-1], dtype=torch.float64)
            if score.requires_grad:
                for j in range(leaf.shape[-1]):
                    information[..., j, :] = -gradient(score[..., j].sum(), leaf, retain=True).detach()
        information = 0.5 * (information + information.mT)
        score = score.detach()
        for what, values in (("score", score), ("second derivative", information)):
            bad = torch.isnan(values) & finite.reshape(*finite.shape, *[1] * (values.dim() - 2))
            if bool(bad.any()):
                at = bad.nonzero()[0].tolist()
                point = ", ".join(f"{v:.6g}" for v in local[at[0], at[1]].tolist())
                raise ModalityError(
                    f"the {what} of plugin '{self.names[at[0]]}' is {values[tuple(at)].item()} at θ = ({point}) although its "
                    "scalar is finite; a masked branch that divides by zero is the usual cause (mask its input, not its output)"
                )
        resolution = s.detach().to(torch.float64).abs().sum(-1) * torch.finfo(s.dtype).eps
        return total.detach(), score, information, resolution

    def pairs(self, x: Tensor, theta: Tensor) -> Tensor:
        """s of single pairs: x (B, *event), θ (B, P_m) -> (B,)."""
        return self.scalars(x[None, None], theta[None, None, :])[0, 0]

    @property
    def label(self) -> str:
        return f"plugin{'s' * (len(self.names) > 1)} {', '.join(repr(n) for n in self.names)}"

    def _chunk(self, x: Tensor) -> int:
        return max(1, ELEMENTS // max(1, x.numel()))


def gradient(scalar: Tensor, leaf: Tensor, retain: bool = False) -> Tensor:
    (gradient,) = torch.autograd.grad(scalar, leaf, create_graph=not retain, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient


def _what(value: Any) -> str:
    if value is None:
        return "None (is a return missing?)"
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else f" {value!r:.40}"
    return f"{type(value).__module__}.{type(value).__name__}{shape}"


def observation_scores(term: Term, x: Tensor, local: Tensor) -> Tensor:
    """∇_θ s of single observations x (B, *event) at one local θ (P_m,): (B, P_m)."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = local.detach().expand(x.shape[0], -1).clone().requires_grad_()
        s = term.pairs(x, leaf)
        return gradient(s.to(torch.float64).sum(), leaf, retain=True).detach()
