"""Samples and modifiers of a HistFactory channel, as tensors over (parameters, samples, bins)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import ModalityError
from modalities._tensors import Numbers, float64, require

__all__ = ["Channel", "Layout", "affine_rate", "compile_channel", "layout"]


class Channel(NamedTuple):
    """A channel of S samples in B bins that depends on P_m parameters."""

    names: tuple[str, ...]  #: the parameters, in the order of first mention
    nominal: Tensor  #: yields (S, B)
    columns: Tensor  #: (factors, S, B), which column of (θ, 1) multiplies a bin; the last is the 1
    log_factors: tuple[Tensor, Tensor] | None  #: log hi and log lo of normalisations, each (P_m, S)
    shifts: tuple[Tensor, Tensor] | None  #: hi − y and y − lo of shapes, each (P_m, S, B)


def compile_channel(
    signal: Numbers | None,
    background: Numbers | Mapping[str, Numbers] | None,
    strength: str | None,
    scale: Mapping[str, str | Sequence[str]],
    normalisation: Mapping[str, Mapping[str, Sequence[float]]],
    shape: Mapping[str, Mapping[str, Sequence[Numbers]]],
    per_bin: Mapping[str, Sequence[str] | Sequence[Sequence[str]]],
) -> Channel:
    """The tensors of a channel; the arguments are those of :class:`~modalities.PoissonCounts`.

    Raises:
        ModalityError: naming the argument, the sample and the rule it breaks.
    """
    for argument, value in {"scale": scale, "normalisation": normalisation, "shape": shape, "per_bin": per_bin}.items():
        if not isinstance(value, Mapping):
            raise ModalityError(f"{argument} must be a mapping, got {type(value).__name__}; write {{name: ...}}")
    yields = _yields(signal, background)
    samples, nominal = list(yields), torch.stack(list(yields.values()))
    bins = nominal.shape[1]
    uniform = [("signal", strength)] if signal is not None and strength is not None else []
    uniform += [(s, name) for name, of in scale.items() for s in ([of] if isinstance(of, str) else of)]
    for sample, name in uniform:
        _known(f"scale[{name!r}]", sample, samples)
        if uniform.count((sample, name)) > 1:
            raise ModalityError(
                f"a factor multiplies a sample once, got {name!r} on {sample!r} twice; drop one of them"
            )
    rows = [(sample, [name] * bins) for sample, name in uniform]
    rows += [(sample, row) for sample, given in per_bin.items() for row in _bin_rows(sample, given, samples, bins)]
    order = [*(name for _, name in uniform), *normalisation, *shape, *(name for _, row in rows for name in row)]
    names = tuple(dict.fromkeys(order))
    if not names:
        raise ModalityError(
            "at least one parameter must be named, got none; name a strength of the signal, a scale, normalisation, "
            "shape or per_bin"
        )
    column = {name: i for i, name in enumerate(names)}
    factors = [[[column[n] for n in row] for s, row in rows if s == sample] for sample in samples]
    depth = max(map(len, factors))
    padded = [own + [[len(names)] * bins] * (depth - len(own)) for own in factors]
    columns = torch.tensor(padded, dtype=torch.int64).reshape(len(samples), depth, bins).transpose(0, 1).contiguous()

    log_hi, log_lo = nominal.new_zeros(2, len(names), len(samples))
    for where, name, sample, low, high in _pairs("normalisation", normalisation, samples):
        ends = float64(where, [low, high], (2,))
        require(where, ends, ends > 0, "> 0", "interpolation code 1 needs positive factors; a shift belongs in shape")
        log_lo[column[name], samples.index(sample)], log_hi[column[name], samples.index(sample)] = ends.log()
    up, down = nominal.new_zeros(2, len(names), len(samples), bins)
    for where, name, sample, low, high in _pairs("shape", shape, samples):
        at = column[name], samples.index(sample)
        up[at] = float64(where + " hi", high, (bins,), "give one yield a bin") - nominal[at[1]]
        down[at] = nominal[at[1]] - float64(where + " lo", low, (bins,), "give one yield a bin")
    return Channel(names, nominal, columns, (log_hi, log_lo) if normalisation else None, (up, down) if shape else None)


class Layout(NamedTuple):
    """What the derivatives of a channel's rate depend on beside its tensors."""

    normalised: bool  #: whether there are normalisations
    flat: tuple[bool, ...]  #: for each row of columns, whether it is the same in all bins of a sample
    shaped: tuple[int, ...]  #: the parameters that have shapes


def layout(channel: Channel) -> Layout:
    """The layout of a channel.

    Example:
        >>> layout(compile_channel([5.0, 9.0], None, "mu", {}, {}, {"h": {"signal": ([4.0, 9.0], [6.0, 9.0])}}, {}))
        Layout(normalised=False, flat=(True,), shaped=(1,))
    """
    flat = tuple(bool((column == column[:, :1]).all()) for column in channel.columns)
    moved = torch.zeros(len(channel.names), dtype=torch.bool)
    for shift in channel.shifts or ():
        moved |= (shift != 0).flatten(1).any(-1)
    return Layout(channel.log_factors is not None, flat, tuple(moved.nonzero()[:, 0].tolist()))


def affine_rate(channel: Channel) -> tuple[Tensor, Tensor] | None:
    """Offset (B,) and slope (P_m, B) of a rate that is offset + θ · slope; None for a rate that is not.

    It is not where factors multiply each other or a shape, where a normalisation is exponential in θ, and where a
    shape's two sides differ, by more than rounding.
    """
    if channel.log_factors is not None:
        return None
    factors = channel.columns < len(channel.names)  # (factors, S, B)
    free = factors.sum(0) > 0
    if bool((factors.sum(0) > 1).any()):
        return None
    slope = channel.nominal.new_zeros(len(channel.names) + 1, channel.nominal.shape[1])
    for column, factor in zip(channel.columns, factors, strict=True):
        slope.scatter_add_(0, torch.where(factor, column, len(channel.names)), channel.nominal * factor)
    if channel.shifts is not None:
        up, down = channel.shifts
        moved = (up != 0) | (down != 0)
        if bool(((up - down).abs() > 1e-15 * channel.nominal.abs()).any()) or bool((moved & free).any()):
            return None
        slope[:-1] += up.sum(1)
    return (channel.nominal * ~free).sum(0), slope[:-1]


def _yields(signal: Numbers | None, background: Numbers | Mapping[str, Numbers] | None) -> dict[str, Tensor]:
    """Nominal yields (bins,) by sample."""
    given: dict[str, Numbers] = {} if signal is None else {"signal": signal}
    if isinstance(background, Mapping):
        if "signal" in given and "signal" in background:
            raise ModalityError("background must not name a sample 'signal' beside the signal, got both; rename it")
        given |= background
    elif background is not None:
        given["background"] = background
    if not given:
        raise ModalityError("signal or background must be given, got neither; pass expected events per bin")
    named = {s: s if s == "signal" or not isinstance(background, Mapping) else f"background[{s!r}]" for s in given}
    first = float64(next(iter(named.values())), next(iter(given.values())), (None,), "give the events of each bin")
    shape, advice = first.shape, "all samples have the same bins"
    return {sample: float64(named[sample], value, shape, advice) for sample, value in given.items()}


def _bin_rows(
    sample: str, given: Sequence[str] | Sequence[Sequence[str]], samples: Sequence[str], bins: int
) -> list[list[str]]:
    """The factors of one sample, each as one name a bin."""
    _known("per_bin", sample, samples)
    one = isinstance(given, str) or all(isinstance(name, str) for name in given)
    rows: list[Any] = [given] if one else list(given)
    for row in rows:
        if isinstance(row, str) or len(row) != bins:
            seen = repr(row) if isinstance(row, str) else f"{len(row)} names"
            raise ModalityError(
                f"per_bin[{sample!r}] must name one parameter for each of {bins} bins, got {seen}; list them"
            )
    return [list(row) for row in rows]


def _pairs(
    argument: str, given: Mapping[str, Mapping[str, Sequence[Any]]], samples: Sequence[str]
) -> Iterable[tuple[str, str, str, Any, Any]]:
    """(where, nuisance, sample, lo, hi) for every entry of ``normalisation`` or ``shape``."""
    for name, effects in given.items():
        if not isinstance(effects, Mapping):
            raise ModalityError(
                f"{argument}[{name!r}] must map samples to (lo, hi), got {type(effects).__name__}; "
                "write {sample: (lo, hi)}"
            )
        for sample, ends in effects.items():
            where = f"{argument}[{name!r}][{sample!r}]"
            _known(f"{argument}[{name!r}]", sample, samples)
            if not isinstance(ends, Sequence | Tensor) or len(ends) != 2:
                raise ModalityError(f"{where} must be (lo, hi), got {ends!r}; give its values at α = −1 and α = +1")
            yield where, name, sample, ends[0], ends[1]


def _known(where: str, sample: str, samples: Sequence[str]) -> None:
    if sample not in samples:
        raise ModalityError(
            f"{where} must name a sample of {', '.join(samples)}, got {sample!r}; add its yields or correct it"
        )
