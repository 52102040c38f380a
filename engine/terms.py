r"""One plugin's part of the sum, evaluated and differentiated: Σ_i s(x_i; θ), its score and its information.

A term is one plugin, or several of one class and shape evaluated as one. Its derivatives are those that the
modality writes down (:meth:`engine.modality.Modality.derivatives`), or else those of its scalar by reverse mode
twice. Every rule of the contract that an evaluation can break is an error here that names the plugin.

A block of data is x (G, 1, B, *event), the same for every θ (G, K, P_m), or x (G, K, B, *event), one data set for each;
a mask, boolean and broadcasting to (G, K, B), says which observations count. What x holds at the others is never
looked at.

References:
    | Neumaier, Z. Angew. Math. Mech. 54 (1974) 39, compensated summation
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from engine.errors import EvidenceError, ModalityError
from engine.modality import Modality
from engine.observations import Observations
from engine.parameters import ParameterSpace

__all__: list[str] = []  # the sum's own machinery: see engine.evidence

_KEPT = 2**22  # numbers of one plugin's data that are kept ready between evaluations
# Entries of (θ, observation, event) evaluated together: a modality may need hundreds of numbers for each.
ELEMENTS = 2**18
_CACHED = 2**17  # the same for closed forms, whose few temporaries stay in the processor's cache: 1 MB each
_RESULTS = ("scalar", "score", "information")
_SAID: set[type] = set()  # classes of which it was said that they are evaluated one by one
_ALONE = 2**12  # entries of one plugin from which stacked ones are quicker one by one than through vmap


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
        self.closed = all(m.has_derivatives for m in modalities)
        self._x: Tensor | None = None
        self._ready: list[Tensor] | None = None
        self._filled: Any = WeakTensorKeyDictionary()  # x -> versions, mask, x without the entries that do not count
        self._prepared: Any = WeakTensorKeyDictionary()  # x -> version, what the plugins make of it
        if len(names) > 1:
            self._stack()

    def _one(self, x: Tensor, theta: Tensor) -> Any:
        result = self.modality(x[0], theta[0])
        return result[None] if isinstance(result, Tensor) else result

    def _stack(self) -> None:
        weights, buffers = torch.func.stack_module_state(self.modalities)  # pyright: ignore[reportArgumentType]
        base = copy.deepcopy(self.modality).to("meta")

        def call(weights: Any, buffers: Any, x: Tensor, theta: Tensor) -> Tensor:
            return torch.func.functional_call(base, (weights, buffers), (x, theta))

        def derive(state: Any, *args: Tensor) -> Any:
            found = torch.func.functional_call(closed, state, args)
            return tuple(_padded(value, 2, n) for n, value in enumerate(found))

        closed, state = _Closed(base), {f"base.{name}": t for name, t in (*weights.items(), *buffers.items())}
        self._call = self._together(lambda *args: torch.func.vmap(call)(weights, buffers, *args), self._each)
        self._derive = self._together(lambda *args: torch.func.vmap(derive)(state, *args), self._derive_each)
        self._x = torch.stack([self.data[name] for name in self.names])

    def _together(self, whole: Callable[..., Any], each: Callable[..., Any]) -> Callable[..., Any]:
        """A call of all plugins at once; where vmap cannot do that but each plugin can, one by one from then on."""
        broken = False

        def call(*args: Tensor) -> Any:
            nonlocal broken
            if broken:
                return each(*args)
            try:
                return whole(*args)
            except EvidenceError:
                raise
            except Exception as error:
                found = each(*args)  # what is wrong with a plugin itself is said here, by its name
                broken = True
                if type(self.modality) in _SAID:
                    return found
                _SAID.add(type(self.modality))
                why = str(error).strip().split("\n")[0]
                warnings.warn(
                    f"{self.label} cannot be evaluated together by torch.func.vmap ({why[:200]}), and are evaluated one by one, "
                    "which is slower; return None from stack_key() to say so",
                    UserWarning,
                    stacklevel=2,
                )
                return found

        return call

    def _each(self, x: Tensor, theta: Tensor) -> Tensor:
        return torch.stack([self._alone(g, "log_evidence", m, x[g], theta[g]) for g, m in enumerate(self.modalities)])

    def _derive_each(self, *args: Tensor) -> Any:
        found = [
            self._alone(g, "derivatives", m.derivatives, *(t[g] for t in args)) for g, m in enumerate(self.modalities)
        ]
        rows = [[_padded(value, 2, n) for n, value in enumerate(one)] for one in found]
        return tuple(torch.stack(torch.broadcast_tensors(*column)) for column in zip(*rows, strict=True))

    def _alone(self, g: int, method: str, call: Callable[..., Any], *args: Tensor) -> Any:
        try:
            return call(*args)
        except EvidenceError:
            raise
        except Exception as error:
            raise ModalityError(f"'{self.names[g]}' raised {type(error).__name__} in {method}: {error}") from error

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
        """s of shape (G, K, B) in the plugin's own dtype, from x (G, 1 or K, B, *event), θ (G, K, 1, P_m)."""
        s = self._guarded("log_evidence", x, lambda: self._call(x, theta.to(self.dtype)))
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

    def _guarded(self, method: str, x: Tensor, call: Callable[[], Any], label: str = "") -> Any:
        version, label = x._version, label or self.label
        try:
            result = call()
        except EvidenceError as error:
            raise type(error)(f"{label}: {error}") from error
        except (Exception, SystemExit, GeneratorExit) as error:
            raise ModalityError(f"{label} raised {type(error).__name__} in {method}: {error}") from error
        if x._version != version:
            raise ModalityError(f"{label} changed its data in place; {method} must leave x as it is")
        return result

    def refuse_bad(self, theta: Tensor) -> None:
        """Name the plugin, θ and observation whose scalar is NaN or +∞, at θ (K, P) where some sum was."""
        start, local = 0, theta.detach()[:, self.index].movedim(0, 1)
        for x in self.blocks():
            self.refuse_bad_block(x, local, start=start)
            start += x.shape[2]

    def refuse_bad_block(self, x: Tensor, local: Tensor, mask: Tensor | None = None, start: int = 0) -> None:
        """The same for one block at local θ (G, K, P_m), whose first observation has the number ``start``."""
        x, mask = self._counted(x, local, mask)
        for at in _steps(local.shape[1], self._chunk(x)):
            s = self.scalars(_rows(x, at), local[:, at, None].detach()).detach()
            bad = torch.isnan(s) | (s == torch.inf)
            bad = bad if mask is None else bad & mask[:, at]
            if bool(bad.any()):
                g, k, i = bad.nonzero()[0].tolist()
                names = self.modalities[g].parameter_names
                where = ", ".join(f"{p} = {v:.6g}" for p, v in zip(names, local[g, at][k].tolist(), strict=True))
                raise ModalityError(
                    f"log_evidence must be a number or −∞, got {s[g, k, i].item()} from plugin '{self.names[g]}' at {where}, "
                    f"observation {start + i}; return −∞ where θ is impossible, or narrow the parameter's bounds"
                )

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

    def refuse_random(self, theta: Tensor) -> None:
        """Compare the sum of scalars at one θ (1, P) with itself, asked again."""
        once, again = self.value(theta)[:, 0], self.value(theta)[:, 0]
        digits = 1e-5 if self.dtype == torch.float32 else 1e-9
        off = (once - again).abs() > digits * (1.0 + once.abs())  # −∞ twice is NaN, and no difference
        if bool(off.any()):
            g = int(off.nonzero()[0, 0])
            modality = self.modalities[g]
            local = theta[0, self.index[g]].tolist()
            where = ", ".join(f"{p} = {v:.6g}" for p, v in zip(modality.parameter_names, local, strict=True))
            raise ModalityError(
                f"the scalar of plugin '{self.names[g]}' must be the same for the same data and θ, got {float(once[g]):.9g} and "
                f"then {float(again[g]):.9g} at {where}; draw its random numbers from a generator of its own with a fixed seed, "
                "and put networks with dropout into eval()"
            )

    def value(self, theta: Tensor) -> Tensor:
        """Σ_i s (G, K) at θ (K, P)."""
        local = theta[:, self.index].movedim(0, 1)  # (G, K, P_m)
        total = _Sum()
        for x in self.blocks():
            total.add(self._scalar_sums(x, local, None))
        return total.result

    def block_value(self, x: Tensor, local: Tensor, mask: Tensor | None = None) -> Tensor:
        """Σ_i s (G, K) over one block, at local θ (G, K, P_m).

        By the closed form where what is kept of x makes that quicker than the scalar, and no gradient is asked for.
        """
        x, mask = self._counted(x, local, mask)
        if self.closed and not (torch.is_grad_enabled() and local.requires_grad) and self._prepare(x):
            return self._closed(x, local, mask)[0]
        return self._scalar_sums(x, local, mask)

    def _scalar_sums(self, x: Tensor, local: Tensor, mask: Tensor | None) -> Tensor:
        parts = []
        for at in _steps(local.shape[1], self._chunk(x)):
            s = self.scalars(_rows(x, at), local[:, at, None]).to(torch.float64)
            parts.append((s if mask is None else torch.where(mask[:, at], s, 0.0)).sum(-1))
        return _joined(parts, 1)

    def derivatives(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Σ_i s, ∇, −∇² and resolution: (G, K), (G, K, P_m), (G, K, P_m, P_m), (G, K), from θ (K, P)."""
        local = theta.detach()[:, self.index].movedim(0, 1)  # (G, K, P_m)
        sums = [_Sum() for _ in range(4)]
        for x in self.blocks():
            for total, part in zip(sums, self._block_derivatives(x, local), strict=True):
                total.add(part)
        value, score, information, resolution = (s.result for s in sums)
        return value, score, information, resolution

    def _block_derivatives(
        self, x: Tensor, local: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same over one block, at local θ (G, K, P_m)."""
        x, mask = self._counted(x, local, mask)
        if self.closed and not all(m._verified for m in self.modalities):
            self._verify(x, local)
        found = self._closed(x, local, mask) if self.closed else self._automatic(x, local, mask)
        value, score, information, resolution = found
        finite = torch.isfinite(value)  # the rest is −∞, or refused with the value
        for what, values in (("score", score), ("second derivative", information)):
            if math.isfinite(float(values.sum())):  # the usual case, quickly
                continue
            bad = torch.isnan(values) & finite.reshape(*finite.shape, *[1] * (values.dim() - 2))
            if bool(bad.any()):
                at = bad.nonzero()[0].tolist()
                point = ", ".join(f"{v:.6g}" for v in local[at[0], at[1]].tolist())
                advice = "a masked branch that divides by zero is the usual cause (mask its input, not its output)"
                advice = "correct its closed form in derivatives()" if self.closed else advice
                raise ModalityError(
                    f"the {what} of plugin '{self.names[at[0]]}' is {values[tuple(at)].item()} at θ = ({point}) although its "
                    f"scalar is finite; {advice}"
                )
        return value, score, information, resolution

    def _automatic(self, x: Tensor, local: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """By reverse mode twice: P_m + 1 passes backwards."""
        parts = []
        for at in _steps(local.shape[1], max(1, self._chunk(x) // 4)):
            here = None if mask is None else mask[:, at]
            with torch.inference_mode(False), torch.enable_grad():
                leaf = local[:, at].clone().requires_grad_()
                s = self.scalars(_rows(x, at), leaf[:, :, None])
                rounding = torch.finfo(s.dtype).eps
                s = s.to(torch.float64) if here is None else torch.where(here, s.to(torch.float64), 0.0)
                total = s.sum(-1)
                if not total.requires_grad:
                    raise ModalityError(
                        f"the scalar of {self.label} is detached from θ: it has no gradient; "
                        "keep to torch operations, without .detach(), .item() or .numpy() on the way"
                    )
                score = gradient(total.sum(), leaf)
                information = torch.zeros(*leaf.shape, leaf.shape[-1], dtype=torch.float64)
                if score.requires_grad:
                    for j in range(leaf.shape[-1]):
                        information[..., j, :] = -gradient(score[..., j].sum(), leaf, retain=True).detach()
            score = score.detach()
            if here is not None:  # a θ with no data gives no derivative, whatever was put in the data's place
                some = here.any(-1, keepdim=True)
                score, information = torch.where(some, score, 0.0), torch.where(some[..., None], information, 0.0)
            resolution = s.detach().abs().sum(-1) * rounding
            parts.append((total.detach(), score, 0.5 * (information + information.mT), resolution))
        return tuple(_joined(pieces, 1) for pieces in zip(*parts, strict=True))

    def _closed(self, x: Tensor, local: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """As the modality writes them down, in pieces that stay in the cache."""
        G, K, P = local.shape
        prepared, theta, size = self._prepare(x), local[:, :, None].to(self.dtype), x[0, 0].numel()
        sums = tuple(torch.empty(G, K, *event, dtype=torch.float64) for event in ((), (P,), (P, P), ()))
        if G > 1 and size * K < _ALONE:
            self._pieces(sums, self._derive, size * G, x, theta, mask, prepared, self.label)
        else:
            for g, (name, modality) in enumerate(zip(self.names, self.modalities, strict=True)):
                own, here, known = (t[g] for t in sums), None if mask is None else mask[g], [t[g] for t in prepared]
                self._pieces(tuple(own), modality.derivatives, size, x[g], theta[g], here, known, _label([name]))
        good = sums[0] < torch.inf  # false for NaN too
        if not bool(good.all()):
            self.refuse_bad_block(x, local, mask)
            name = self.names[int((~good).nonzero()[0, 0])]
            raise ModalityError(
                f"the closed scalar of plugin '{name}' is NaN or +∞ where log_evidence is not; correct derivatives()"
            )
        return sums

    def _verify(self, x: Tensor, local: Tensor) -> None:
        """Compare each closed form with differentiation once in its life, at up to two θ and two observations.

        Where a sign is wrong no maximum is found, and nothing else would say which plugin it is. In units of a standard
        error, so that rounding where a score is zero is not taken for a fault. Of other θ it says nothing: see
        :func:`engine.testing.check_modality` and :meth:`engine.evidence.Evidence.check`.
        """
        rows, few = sorted({0, local.shape[1] - 1}), sorted({0, x.shape[2] - 1})
        local, x = local[:, rows], (x[:, rows] if x.shape[1] > 1 else x)[:, :, few]
        found = self._closed(x, local, None)
        try:
            expected = self._automatic(x, local, None)
        except (ModalityError, RuntimeError):  # what cannot be differentiated is taken at its word
            expected = found
        judged = torch.isfinite(expected[0])
        unit = expected[1].abs() + expected[2].diagonal(dim1=-2, dim2=-1).abs().sqrt()
        unit = unit + 1e-7 * unit.amax(-1, keepdim=True)
        size = (1.0 + expected[0].abs(), unit, unit[..., :, None] * unit[..., None, :] + expected[2].abs())
        digits = 1e-3 if self.dtype == torch.float32 else 1e-6
        for n, what in enumerate(_RESULTS):
            off = ~((found[n] - expected[n]).abs() <= digits * size[n]) & expected[n].isfinite()
            off &= judged.reshape(*judged.shape, *[1] * n)
            if bool(off.any()):
                g, k, *entry = off.nonzero()[0].tolist()
                names = self.modalities[g].parameter_names
                of = f" for ({', '.join(names[j] for j in entry)})" if entry else ""
                where = ", ".join(f"{p} = {v:.6g}" for p, v in zip(names, local[g, k].tolist(), strict=True))
                got, wanted = (float(t[n][g, k][tuple(entry)]) for t in (found, expected))
                raise ModalityError(
                    f"the closed {what} of plugin '{self.names[g]}' must be that of its log_evidence, got {got:.9g}{of} at {where} "
                    f"where {'differentiation' if n else 'it'} gives {wanted:.9g}; correct derivatives(): "
                    "engine.testing.check_modality says more"
                )
        for modality, seen in zip(self.modalities, judged.any(-1).tolist(), strict=True):
            modality._verified = modality._verified or seen

    def _pieces(
        self,
        sums: tuple[Tensor, ...],
        call: Callable[..., Any],
        size: int,
        x: Tensor,
        theta: Tensor,
        mask: Tensor | None,
        known: list[Tensor],
        label: str,
    ) -> None:
        """Write sums over B, of shape (K, ...), from x (1 or K, B, *event) and θ (K, 1, P_m); or all with G in front."""
        dim, P = theta.dim() - 3, theta.shape[-1]  # that of K
        size = max(1, size, size // max(1, self.modality.event_shape.numel()) * P * P // 4)  # x, or what comes of it
        for at in _steps(theta.shape[dim], max(1, _CACHED // size)):
            part, *args = (_rows(t, at, dim) for t in (x, theta, *known))
            with torch.inference_mode(False), torch.no_grad():
                found = self._guarded("derivatives", x, lambda: call(part, *args), label)  # noqa: B023
            if not isinstance(found, tuple) or len(found) != 3:
                raise ModalityError(
                    f"derivatives must return the scalar, its score and its information, got {_what(found)} from {label}; "
                    "return three tensors"
                )
            batch, here = (*args[0].shape[:-2], x.shape[dim + 1]), None if mask is None else _rows(mask, at, dim)
            s, u, J = (_fitted(value, batch, (P,) * n, label) for n, value in enumerate(found))
            value, score, information, resolution = (_rows(t, at, dim) for t in sums)
            value.copy_(_over(s, batch, here))
            score.copy_(_over(u, batch, here))
            J = _over(J, batch, here)
            torch.add(J, J.mT, out=information).mul_(0.5)
            resolution.copy_(_over(s.abs(), batch, here)).mul_(torch.finfo(s.dtype).eps)

    def _counted(self, x: Tensor, local: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x with another observation that counts in the place of each that does not, and the mask in full."""
        if mask is None:
            return x, None
        full = mask.expand(len(x), local.shape[1], x.shape[2])
        kept, versions = self._filled.get(x), (x._version, mask._version)
        if kept is None or kept[0] is not mask or kept[1] != versions:
            with torch.inference_mode(False), torch.no_grad():
                kept = self._filled[x] = (mask, versions, _filled(x, full))
        filled: Tensor | None = kept[2]
        return x if filled is None else filled, full

    def _prepare(self, x: Tensor) -> list[Tensor]:
        """What the plugins keep of x (G, 1 or K, B, *event): tensors (G, 1 or K, B, ...), computed once."""
        if not self.modality.prepares:
            return []
        kept = self._prepared.get(x)
        if kept is None or kept[0] != x._version:
            with torch.inference_mode(False), torch.no_grad():
                made = [
                    self._guarded("prepare", x, lambda m=m, v=v: m.prepare(v))
                    for m, v in zip(self.modalities, x, strict=True)
                ]
            for name, tensors in zip(self.names, made, strict=True):
                if not isinstance(tensors, tuple) or any(t.shape[:2] != x.shape[1:3] for t in tensors):
                    raise ModalityError(
                        f"prepare must return a tuple of tensors, each with x's leading dimensions, got another from {_label([name])}; "
                        "keep one entry for each observation"
                    )
            kept = self._prepared[x] = (x._version, [torch.stack(tensors) for tensors in zip(*made, strict=True)])
        return kept[1]

    def pick(self, x: Tensor, items: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Data sets ``items`` of x (G, K, B, *event) and their mask, with what is kept of them, so that it is not made anew."""
        part, here = x[:, items], None if mask is None else mask.expand(x.shape[:3])[:, items]
        whole, filled = self._counted(x, x, mask)[0], part
        if here is not None:
            filled = part if whole is x else whole[:, items]
            self._filled[part] = (here, (part._version, here._version), None if whole is x else filled)
        if self.closed and (known := self._prepare(whole)):
            self._prepared[filled] = (filled._version, [t[:, items] for t in known])
        return part, here

    def pairs(self, x: Tensor, theta: Tensor) -> Tensor:
        """s of single pairs: x (B, *event), θ (B, P_m) -> (B,)."""
        return self.scalars(x[None, None], theta[None, None, :])[0, 0]

    @property
    def label(self) -> str:
        return _label(self.names)

    def _chunk(self, x: Tensor) -> int:
        return max(1, ELEMENTS // max(1, x[:, :1].numel()))


class _Closed(nn.Module):
    """A modality that is called for its derivatives, as ``functional_call`` can."""

    def __init__(self, base: Modality) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Tensor) -> Any:
        return self.base.derivatives(*args)


def _label(names: Sequence[str]) -> str:
    return f"plugin{'s' * (len(names) > 1)} {', '.join(repr(n) for n in names)}"


def _steps(n: int, step: int) -> list[slice]:
    return [slice(k, k + step) for k in range(0, max(n, 1), step)]


def _rows(x: Tensor, at: slice, dim: int = 1) -> Tensor:
    """The rows of θ's own data sets; a data set that all θ share as it is."""
    return (x[:, at] if dim else x[at]) if x.shape[dim] > 1 else x


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _padded(value: Tensor, batch: int, event: int) -> Tensor:
    """With all dimensions of the batch where it has none."""
    return value[(None,) * batch] if value.dim() == event else value


def _fitted(value: Any, batch: tuple[int, ...], event: tuple[int, ...], label: str) -> Tensor:
    """What a closed form returned, with the batch's number of dimensions; an error where it does not broadcast."""
    what, rank = _RESULTS[len(event)], len(batch) + len(event)
    if not isinstance(value, Tensor) or value.dtype not in (torch.float64, torch.float32):
        seen = value.dtype if isinstance(value, Tensor) else _what(value)
        raise ModalityError(
            f"derivatives must return float32 or float64 tensors, got {seen} as the {what} from {label}"
        )
    full = _padded(value, len(batch), len(event))
    if (
        full.dim() != rank
        or full.shape[len(batch) :] != event
        or any(n not in (1, m) for n, m in zip(full.shape, batch, strict=False))
    ):
        K, B = batch[-2:]
        seen = tuple(value.shape[len(batch) - 2 :])
        raise ModalityError(
            f"the {what} of derivatives must have a shape that broadcasts to {(K, B, *event)} for {K} θ and {B} observations, "
            f"got {seen} from {label}; return one for each (x, θ)"
        )
    return full


def _over(value: Tensor, batch: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """Σ over the last dimension of the batch, of the observations that count, in float64."""
    dim, event = len(batch) - 1, value.shape[len(batch) :]
    if value.shape[dim] == 1 or value.stride(dim) == 0:  # the same for every observation
        total = value.select(dim, 0).to(torch.float64)
        if mask is not None:
            count = mask.sum(dim).reshape(*batch[:-1], *[1] * len(event))
            total = torch.where(count > 0, total * count, 0.0)
        elif batch[dim] != 1:
            total = total * batch[dim]
    else:
        value = value.to(torch.float64)
        if mask is not None:
            value = torch.where(mask.reshape(*mask.shape, *[1] * len(event)), value, 0.0)
        total = value.sum(dim)
    return total.expand(*batch[:-1], *event)


def _filled(x: Tensor, mask: Tensor) -> Tensor | None:
    """x (G, 1 or K, B, *event) with, wherever one does not count, the first of its row that does; None where all do.

    Nothing is evaluated at what a mask hides: padding may be NaN, or outside the support, and a gradient of 0 times
    NaN is NaN. Rows in which none counts take the observation of another row.
    """
    if bool(mask.all()):
        return None
    some, first = mask.any(2), mask.to(torch.uint8).argmax(2)  # (G, K)
    fallback = some.to(torch.uint8).argmax(1)  # (G)
    g = torch.arange(len(x))
    k = torch.where(some, torch.arange(mask.shape[1]), fallback[:, None])  # (G, K)
    own = k if x.shape[1] > 1 else torch.zeros_like(k)
    fill = x[g[:, None], own, first.gather(1, k)]  # (G, K, *event)
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - 3)), x, fill[:, :, None])


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
