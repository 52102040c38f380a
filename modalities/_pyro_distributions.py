"""What a distribution of Pyro is asked: where it is possible, what lies in its middle, a draw that works in a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from pyro.distributions import Beta, BetaBinomial, Dirichlet, Gamma, MaskedDistribution, Multinomial
from torch import Tensor
from torch.distributions import Independent, biject_to, constraints
from torch.distributions.utils import lazy_property

__all__ = ["draw", "family", "middle", "possible", "seeded"]


def family(fn: Any) -> str:
    """The name of a distribution's family, whatever is wrapped around it."""
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def possible(fn: Any, value: Tensor, rank: int) -> Tensor:
    """Where the parameters of a distribution and its value are possible, broadcasting to its log-density of that rank.

    NaN counts as possible: it is no choice of θ but a mistake, and must not be taken for −∞.
    """
    mask = None
    while isinstance(fn, MaskedDistribution):
        mask = torch.as_tensor(fn._mask) if mask is None else mask & fn._mask
        fn = fn.base_dist
    ok = _valid(fn)
    with suppress(NotImplementedError):
        inside = _kept(fn.support, value)
        while inside.dim() > rank:  # a support that leaves the event's dimensions out
            inside = inside.all(-1)
        ok = ok & inside
    return ok if mask is None else ok | ~mask


def _kept(constraint: Any, value: Tensor) -> Tensor:
    """Where a value keeps a constraint, or is NaN."""
    kept, unknown = constraint.check(value), value.isnan()
    while unknown.dim() > kept.dim():
        unknown = unknown.any(-1)
    return kept | unknown


def _valid(fn: Any) -> Tensor:
    """Where the parameters of a distribution keep their constraints, broadcasting to its batch."""
    ok = torch.ones((), dtype=torch.bool)
    for name, constraint in getattr(fn, "arg_constraints", {}).items():
        lazy = name not in fn.__dict__ and isinstance(getattr(type(fn), name, None), lazy_property)
        if not lazy and not constraints.is_dependent(constraint):
            kept = _kept(constraint, getattr(fn, name))
            # a wrapper may keep its parameters in the shape that they had before it was expanded
            ok = ok & (kept.all() if kept.dim() > len(fn.batch_shape) else kept)
    base = getattr(fn, "base_dist", None)
    if base is not None:
        inner, extra = _valid(base), len(base.batch_shape) - len(fn.batch_shape)
        if extra > 0:
            inner = inner.expand(base.batch_shape).flatten(-extra).all(-1)
        ok = ok & inner
    return ok


def middle(fn: Any, support: Any) -> Tensor:
    """An unconstrained value in the middle of a distribution: its mean where it has one."""
    transform = biject_to(support)
    shape = torch.Size(transform.inverse_shape(fn.shape()))
    zero = torch.zeros(shape, dtype=torch.float64)
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError):
        return zero
    free = transform.inv(mean.expand(fn.shape()))
    return torch.where(free.isfinite(), free, zero)


def draw(fn: Any) -> Tensor:
    """A draw that works in a batch, also of distributions whose own sampler does not."""
    if isinstance(fn, MaskedDistribution | Independent):
        return draw(fn.base_dist)
    if isinstance(fn, Dirichlet):
        return _simplex(fn.concentration)
    if isinstance(fn, Beta):
        return _simplex(fn._dirichlet.concentration)[..., 0]
    if isinstance(fn, BetaBinomial):
        return torch.binomial(
            *torch.broadcast_tensors(torch.as_tensor(fn.total_count, dtype=torch.float64), draw(fn._beta))
        )
    if isinstance(fn, Multinomial):
        each = fn._categorical.sample(torch.Size((fn.total_count,)))
        return (each[..., None] == torch.arange(fn.event_shape[-1])).to(torch.float64).sum(0)
    return fn.sample()


def _simplex(concentration: Tensor) -> Tensor:
    gamma = Gamma(concentration, torch.ones_like(concentration)).sample()
    return gamma / gamma.sum(-1, keepdim=True)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's own generator on the CPU at a seed, and put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
