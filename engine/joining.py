r"""Plugins over several others: which of them a query uses, and the observations that they read.

A modality with :attr:`engine.modality.Modality.parts` scores observation i of several plugins together: an interaction,
which carries what their sum misses where they depend on each other given θ. It has no data of its own. It takes part where all of
its parts do, and reads their observations joined entry by entry. One over more plugins carries what one over fewer of
them does, so that of two that contain each other the larger counts alone.

Interactions that share one plugin each are exact where their parts form a tree, and what is apart in it is independent given what lies
between: :math:`p(x_1, x_2, x_3) = p(x_1, x_2)\, p(x_2, x_3) / p(x_2)`. A ring of them, such as all three pairs of three plugins
(Kirkwood's superposition), counts what all share more than once and is no density.

References:
    | Kirkwood, J. Chem. Phys. 3 (1935) 300, superposition
    | Lauritzen, Graphical Models (1996), section 3.1, decomposable models
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.errors import ObservationError, RegistryError

if TYPE_CHECKING:
    from engine.entries import PluginEntry
    from engine.modality import Modality

__all__: list[str] = []  # what sums do with interactions


def partners(
    parts: Mapping[str, Sequence[str]], names: Iterable[str], appended: str = ""
) -> dict[str, tuple[str, ...]]:
    """The interactions that a query uses, with their parts.

    Arguments:
        parts: Interaction -> its parts.
        names: The plugins of the query.
        appended: The interaction that is about to be appended, where one is.

    Raises:
        RegistryError: for interactions in a ring.

    Example:
        >>> pairs = {"ab": ("a", "b"), "bc": ("b", "c")}
        >>> partners(pairs, ["a", "b"]), partners({**pairs, "abc": ("a", "b", "c")}, "abc")
        ({'ab': ('a', 'b')}, {'abc': ('a', 'b', 'c')})
    """
    here = set(names)
    found = {n: tuple(p) for n, p in parts.items() if p and set(p) <= here}
    found = largest(found)
    if ring := in_ring(found):
        over = sorted({p for n in ring for p in found[n]})
        other = "" if appended else f", or leave one out with without='{ring[-1]}'"
        raise RegistryError(
            f"interactions of one query must form no ring, got {_listed(ring)} over {_listed(over)}: what all share would count more "
            f"than once; append one interaction over {', '.join(over)}{' instead' if appended else ''}{other}"
        )
    return found


def largest(found: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The interactions, by their parts, that no other one contains."""
    return {n: p for n, p in found.items() if not any(set(p) < set(q) for q in found.values())}


def in_ring(found: Mapping[str, Sequence[str]]) -> list[str]:
    """The interactions of the first component that is no tree, where an edge joins each to each of its parts; sorted, or none."""
    component = {part: {part} for parts in found.values() for part in parts}
    for name in sorted(found):
        meeting = [component[part] for part in found[name]]
        whole = set().union(*meeting)
        if len({id(c) for c in meeting}) < len(meeting):
            return [n for n in sorted(found) if n <= name and set(found[n]) <= whole]
        for part in whole:
            component[part] = whole
    return []


def normalised(mean: float, error: float) -> bool:
    """Whether the mean of e^s over redrawn parts is 1 within 4 of its errors and 0.02.

    Example:
        >>> normalised(0.998, 0.006), normalised(1.2, 0.01)
        (True, False)
    """
    return abs(mean - 1.0) <= 4.0 * error + 0.02


def connected(groups: Iterable[Iterable[str]]) -> list[set[str]]:
    """Sets that overlap, joined, in the order in which their first ones come.

    Example:
        >>> [sorted(one) for one in connected([("a", "b"), ("c", "d"), ("b", "e")])]
        [['a', 'b', 'e'], ['c', 'd']]
    """
    out: list[set[str]] = []
    for group in groups:
        meeting = [one for one in out if one & set(group)]
        whole = set(group).union(*meeting)
        first = out.index(meeting[0]) if meeting else len(out)
        out = [*out[:first], whole, *(one for one in out[first:] if one not in meeting)]
    return out


def _listed(names: Sequence[str]) -> str:
    quoted = [f"'{n}'" for n in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]])


def refuse_bad_parts(
    name: str,
    modality: Modality,
    observations: Any,
    entries: Mapping[str, PluginEntry],
    shape_of: Callable[[str], Sequence[int]],
) -> None:
    """Refuse to register an interaction of plugins that are not there, have other data, or are covered by another one already.

    Arguments:
        name, modality, observations: What is to be appended.
        entries: The plugins in force.
        shape_of: A plugin in force -> its event shape.

    Raises:
        RegistryError: naming the interaction and its parts.
    """
    parts = tuple(modality.parts)
    if not parts:
        if tied := [n for n, e in entries.items() if n != name and name in e.parts and name in entries]:
            size = shape_of(name)
            if tuple(modality.event_shape) != size:
                raise RegistryError(
                    f"'{tied[0]}' reads the observations of '{name}', which must keep their shape {size}, got "
                    f"{tuple(modality.event_shape)}; append it under another name"
                )
        return
    if observations is not None:
        raise RegistryError(f"'{name}' reads the observations of {', '.join(parts)}: it has none of its own")
    inner = [p for p in parts if p not in entries or entries[p].parts]
    if inner or name in parts or len(set(parts)) < 2 or len(set(parts)) < len(parts):
        raise RegistryError(
            f"an interaction joins different plugins that are registered and have data of their own, got {parts}; there are "
            f"{', '.join(n for n, e in entries.items() if not e.parts) or 'none'}"
        )
    numbers = sum(math.prod(shape_of(p)) for p in parts)
    if tuple(modality.event_shape) != (numbers,):
        raise RegistryError(
            f"one observation of {' and '.join(parts)} has {numbers} numbers in all, got the event shape "
            f"{tuple(modality.event_shape)} of '{name}'; give event_shapes in the order of the parts"
        )
    for other, entry in entries.items():
        both = set(entry.parts) & set(parts)
        nested = set(entry.parts) < set(parts) or set(parts) < set(entry.parts)
        if other != name and len(both) > 1 and not nested:
            raise RegistryError(
                f"'{other}' carries what {' and '.join(sorted(both))} share already, which would count twice; supersede it, or "
                f"append one interaction over {', '.join(sorted({*entry.parts, *parts}))}"
            )
    tied = {n: e.parts for n, e in entries.items() if e.parts and n != name}
    partners({**tied, name: parts}, entries, name)  # refuses a ring


class JoinedSource:
    """The observations of several plugins as one row of numbers each, read where they lie.

    Arguments:
        name: The interaction.
        sources: Part -> its source, in order.

    Raises:
        ObservationError: for parts with unequal numbers of observations.
    """

    def __init__(self, name: str, sources: Mapping[str, Any]) -> None:
        lengths = {part: source.shape[0] for part, source in sources.items()}
        refuse_unequal(name, lengths)
        self.name, self._sources = name, list(sources.values())
        width = sum(torch.Size(source.shape[1:]).numel() for source in self._sources)
        self.shape = (next(iter(lengths.values())), width)

    def read(self, start: int, stop: int) -> Tensor:
        return joined([source.read(start, stop) for source in self._sources], 1)


def joined(parts: Sequence[Tensor], lead: int) -> Tensor:
    """Observations (*lead, *event) of several plugins side by side, (*lead, entries of all).

    Arguments:
        parts: One tensor for each plugin.
        lead: How many leading dimensions count observations and data sets.

    Example:
        >>> joined([torch.ones(3, 2), torch.zeros(3)], 1).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    """
    return torch.cat([x.reshape(*x.shape[:lead], -1) for x in parts], -1)


def refuse_unequal(name: str, lengths: Mapping[str, Any]) -> None:
    """ObservationError where the parts of an interaction have other numbers of observations."""
    if len(set(lengths.values())) > 1:
        raise ObservationError(
            f"plugin '{name}' scores observation i of {' and '.join(map(repr, lengths))} together, which must be as many, got "
            f"{dict(lengths)}; give the pairs, or leave it out with without='{name}'"
        )


def check_named(what: str, given: Any, named: Mapping[str, Any]) -> None:
    """Refuse masks or offsets that do not go by the names of plugins that there is data for. ObservationError.

    Arguments:
        what: "mask" or "offsets".
        given: Them; None where there are none.
        named: The data.

    Example:
        >>> check_named("mask", [True], {"a": [[1.0]]})
        Traceback (most recent call last):
        engine.errors.ObservationError: mask must be a mapping from plugins to boolean (B, N), for some of 'a', got list; write
        mask={'a': ...}
    """
    names = [f"'{n}'" for n in sorted(named)]
    if given is None:
        return
    if not isinstance(given, Mapping):
        form = "boolean (B, N)" if what == "mask" else "integers (B + 1,)"
        seen = f" of shape {tuple(given.shape)}" if hasattr(given, "shape") else ""
        raise ObservationError(
            f"{what} must be a mapping from plugins to {form}, for some of {', '.join(names)}, got {type(given).__name__}{seen}; write "
            f"{what}={{{names[0]}: ...}}"
        )
    if extra := sorted(set(given) - set(named), key=str):
        raise ObservationError(
            f"{what} of '{extra[0]}' was given, but there is no data of that plugin; {what} takes the names of the data: {', '.join(names)}"
        )


def join_data_sets(
    data: Mapping[str, Any],
    found: Mapping[str, Sequence[str]],
    mask: Mapping[str, Any] | None,
    offsets: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Data sets, masks and offsets with those of the interactions; zarr arrays that they read are taken into memory.

    Arguments:
        data, mask, offsets: As for :class:`engine.datasets.DataSets`.
        found: Interaction -> its parts, which there is data for.
    """
    for what, given in (("mask", mask), ("offsets", offsets)):
        check_named(what, given, data)
    data, mask, offsets = dict(data), dict(mask or {}), dict(offsets or {})
    for name, parts in found.items():
        for kind in (mask, offsets):
            given = [kind.get(p) for p in parts]
            if any(g is not None for g in given):
                same = all(g is not None and torch.equal(torch.as_tensor(g), torch.as_tensor(given[0])) for g in given)
                if not same:
                    raise ObservationError(
                        f"plugin '{name}' scores {' and '.join(map(repr, parts))} together: their masks and offsets must be the "
                        f"same; give the pairs, or leave it out with without='{name}'"
                    )
                kind[name] = given[0]
        lead = 1 if name in offsets else 2
        values = [data[p] for p in parts]
        if lead == 2 and any(isinstance(v, list | tuple) and not _number(v) for v in values):
            sets = [[torch.as_tensor(one) for one in v] for v in values]
            for b, row in enumerate(zip(*sets, strict=False)):
                refuse_unequal(name, {f"{p}, data set {b}": len(x) for p, x in zip(parts, row, strict=True)})
            data[name] = [joined(row, 1) for row in zip(*sets, strict=False)]
            continue
        tensors = [v if isinstance(v, Tensor) else torch.as_tensor(v[:] if hasattr(v, "shape") else v) for v in values]
        refuse_unequal(name, {p: tuple(x.shape[:lead]) for p, x in zip(parts, tensors, strict=True)})
        data[name] = joined(tensors, lead)
    return data, mask, offsets


def _number(value: Any) -> bool:
    """Whether nested lists hold numbers throughout, rather than arrays."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, int | float)
