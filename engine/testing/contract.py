"""What the engine takes for granted: shapes, values, batches, precision, state and randomness."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable

import torch
from torch import Tensor

from engine.errors import ContractError
from engine.modality import Modality
from engine.testing.case import Case
from engine.testing.report import Skip, show
from engine.testing.scoring import scalar
from engine.testing.state import global_state, same, tensors

__all__ = [
    "check_deterministic",
    "check_elements",
    "check_finite",
    "check_precision",
    "check_shape",
    "check_simulate",
    "check_state",
]

_PRECISIONS = (torch.float64, torch.float32)


def check_shape(case: Case) -> str:
    """Leading dimensions broadcast, and the scalar is float32 or float64."""
    x, theta, m = case.few, case.theta, case.native
    b, k = len(x), len(theta)
    shapes = []
    for xs, thetas, expected in (
        (x[None], theta[:, None], (k, b)),
        (x, theta[0], (b,)),
        (x[0], theta, (k,)),
        (x[0], theta[0], ()),
    ):
        with torch.no_grad():
            value = scalar(m, xs, thetas)
        if value.shape != expected:
            raise ContractError(
                f"log_evidence must broadcast leading dimensions: x {tuple(xs.shape)} with theta {tuple(thetas.shape)} "
                f"-> {expected}, got {tuple(value.shape)}; index theta as theta[..., j], sum over event dimensions only"
            )
        if value.dtype not in _PRECISIONS:
            raise ContractError(
                f"log_evidence must return float32 or float64, got {_name(value.dtype)}; "
                "evaluate in the dtype of theta, and keep weights out of half precision"
            )
        shapes.append(f"{expected}")
    return f"{', '.join(shapes)} as asked; {_name(m.dtype)}"


def check_finite(case: Case) -> str:
    """A number where θ allows x, −∞ where it does not, and never NaN."""
    impossible = 0
    for k, theta in enumerate(case.theta):
        with torch.no_grad():
            value = scalar(case.native, case.x, theta)
        own = torch.arange(len(case.x), device=value.device) // case.drawn_each == k  # the draws at this θ
        if case.x_given or value.shape != own.shape:
            bad = ~torch.isfinite(value)
        else:
            bad = torch.isnan(value) | (value == math.inf) | (~torch.isfinite(value) & own)
        if bool(bad.any()):
            i = int(bad.flatten().nonzero()[0, 0])
            raise ContractError(
                f"the scalar must be finite where θ allows x, −∞ where it does not and never NaN, "
                f"got {value.flatten()[i].item()} for observation {i} at theta[{k}] = {show(theta)}; "
                "look there for the log or root of a value <= 0"
            )
        impossible += int((value == -math.inf).sum())
    note = f", −∞ at {impossible} that θ makes impossible" if impossible else ""
    return f"finite for {len(case.x)} observations at {len(case.theta)} θ{note}"


def check_elements(case: Case) -> str:
    """The scalar of one (x, θ) is the same alone, in a batch and in a shuffled one."""
    x, theta, m = case.few, case.theta[:8], case.exact
    k, b = len(theta), len(x)
    with torch.no_grad():
        grid = scalar(m, x[None], theta[:, None]).flatten()
        single = torch.stack([scalar(m, xi, t).reshape(-1)[0] for t in theta for xi in x])
        flat_x, flat_theta = x.repeat(k, *[1] * len(case.event)), theta.repeat_interleave(b, 0)
        order = torch.randperm(k * b, generator=torch.Generator().manual_seed(case.seed)).to(x.device)
        shuffled = scalar(m, flat_x[order], flat_theta[order])
    for value, expected, what in ((grid, single, "alone"), (shuffled, single[order], "in a shuffled batch")):
        if value.shape != expected.shape:
            raise ContractError(
                f"a batch must have one value for each pair, got {value.numel()} for {expected.numel()}; "
                "sum over event dimensions only, .sum(-1) and not .sum()"
            )
        off = (value - expected).abs() > 1e-9 * (1 + expected.abs())
        off &= value != expected  # two −∞
        off |= torch.isnan(value) != torch.isnan(expected)
        if bool(off.any()):
            i = int(off.nonzero()[0, 0])
            raise ContractError(
                f"a pair's value must not depend on its batch, got {value[i].item():.12g} in a batch and "
                f"{expected[i].item():.12g} {what}; sum over event dimensions only, and use no statistics of the batch"
            )
    return f"{k * b} pairs score the same in a batch, shuffled and alone"


def check_precision(case: Case) -> str:
    """It works in float32 and in float64, and the two agree."""
    x, theta = case.few[None], case.theta[:, None]
    for dtype in _PRECISIONS:
        rule = f"it must work after .to(torch.{_name(dtype)})"
        try:
            with torch.no_grad():
                value = scalar(case.copy(dtype), x, theta)
        except Exception as error:
            raise ContractError(
                f"{rule}, got {type(error).__name__}: {textwrap.shorten(str(error), 200)}; "
                "register tensors as parameters or buffers, and create others in theta's dtype"
            ) from error
        if value.dtype not in _PRECISIONS or bool(torch.isnan(value).any()):
            seen = f"NaN in {value.dtype}" if value.is_floating_point() else f"{value.dtype}"
            raise ContractError(f"{rule}, got {seen}; is there a constant out of its range?")
    # The same rounded weights and inputs in both, so that only the arithmetic differs.
    rounded = x.float(), theta.float()
    with torch.no_grad():
        m = case.copy(torch.float32)
        low = scalar(m, *rounded).double()
        high = scalar(copy.deepcopy(m).to(torch.float64), *rounded).double()
    both = torch.isfinite(low) & torch.isfinite(high)
    error = torch.where(both, (low - high).abs(), 0.0)
    if bool((error > 1e-3 * (1 + high.abs())).any()):
        seen = f"float32 is off by up to {error.max().item():.2g} nats; the tolerance is 1e-3 (1 + |s|)"
        if case.native.dtype != torch.float64:
            raise ContractError(f"the scalar must be exact in its own dtype, but {seen}; use .to(torch.float64)")
        return f"works in both, but {seen}: keep it in float64"
    return f"works in both; float32 within {error.max().item():.1g} nats (tolerance 1e-3 (1 + |s|))"


def check_state(case: Case) -> str:
    """Using it changes neither the process's global state nor the modality."""
    calls: dict[str, Callable[[Modality], object]] = {}
    if case.given.has_simulator:
        calls["simulate"] = lambda m: m.simulate(case.theta.to(m.dtype), case.generator())
    calls["log_evidence"] = lambda m: scalar(m, case.few[None], case.theta[:, None])
    for name, call in calls.items():
        m, given = case.copy(), tensors(case.given)
        before = tensors(m)
        with global_state() as changed:
            call(m)
            if seen := changed():
                raise ContractError(
                    f"{name} must leave global state alone, but it changed {' and '.join(seen)}; "
                    "draw only from the generator passed to simulate, and set nothing global"
                )
        after = tensors(m)
        if not same(before, after):
            fields = ", ".join(key for key, value in after.items() if not same(value, before.get(key)))
            raise ContractError(
                f"{name} must not change the modality, but it changed {fields}; a plugin is fixed once it is registered"
            )
        if not same(given, tensors(case.given)):
            raise ContractError(
                f"a copy must be independent, but {name} on it changed the original; keep no state on the class"
            )
    return f"{' and '.join(calls)} changed neither global state nor the modality"


def check_deterministic(case: Case) -> str:
    """The same input gives the same bits."""
    m, x, theta = case.copy(), case.few[None], case.theta[:, None]
    with torch.no_grad():
        first, second = scalar(m, x, theta), scalar(m, x, theta)
        training = scalar(m.train(), x, theta)
    if not same(first, second):
        worst = (first.double() - second.double()).abs().max().item()
        raise ContractError(
            f"the same input must give the same bits, got values {worst:.3g} apart; "
            "log_evidence has no generator: use no random numbers, or fixed ones from its configuration"
        )
    if not same(first, training):
        return "bit-identical twice in evaluation mode; training mode differs (dropout?): call .eval() before use"
    return "bit-identical twice, and in training mode"


def check_simulate(case: Case) -> str:
    """Draws have the shape asked for, repeat with their seed alone, are independent and within support."""
    if not case.given.has_simulator:
        raise Skip("it does not simulate")
    m, k, n = case.native, len(case.theta), max(2, min(case.simulations, 1000))
    theta = case.theta.to(m.dtype)
    many = theta[:, None].expand(k, n, -1)
    with torch.no_grad():
        single = m.simulate(theta[0], case.generator())
        draws, again, other = (m.simulate(many, case.generator(seed)) for seed in (0, 0, 1))
    for value, lead in ((single, ()), (draws, (k, n))):
        if not isinstance(value, Tensor) or value.shape != (*lead, *case.event):
            seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ContractError(
                f"simulate must map theta {(*lead, len(case.names))} to {(*lead, *case.event)}, got {seen}; "
                "draw one observation for each θ, with shape theta.shape[:-1] + event_shape"
            )
    if not same(draws, again):
        raise ContractError("one seed must give the same draws, got others; draw only from the generator passed")
    if same(draws, other):
        raise ContractError("another seed must give other draws, got the same; draw from the generator passed")
    if bool((draws == draws[:, :1]).all()):
        raise ContractError("draws of one batch must be independent, got copies; draw noise with the whole batch shape")
    observed = [("observations must lie within", case.x)] if case.x_given else []
    for what, value in (("simulate must stay within", draws), *observed):
        inside = m.support.check(value)
        if m.allows_missing and inside.shape == value.shape:
            inside = inside | torch.isnan(value)
        if not bool(inside.all()):
            bad = value[~inside].flatten()[0].item()
            raise ContractError(f"{what} its support: {m.support_rule}, got {bad:g}; {m.support_advice}")
    return f"{n} draws at each θ within support; a seed repeats them, another does not"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
