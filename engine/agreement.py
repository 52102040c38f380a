"""Whether what is appended agrees with what a ledger has: parameters, their constraints, a plugin's units.

One name has one meaning. What a ledger has already, with the same meaning, is left out of an append; another meaning
is refused with both owners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.constraints import SpaceConstraint
from engine.description import PluginInfo
from engine.entries import ConstraintEntry, Entry, ParameterEntry, PluginEntry, check_size
from engine.errors import ParameterError, RegistryError, TamperedError
from engine.parameter import Parameter
from engine.parameters import ParameterSpace

__all__ = ["check_plugin", "declared", "first_refused", "new_constraints", "united"]


def declared(entries: Sequence[Entry]) -> ParameterSpace:
    """The parameters of entries with their constraints.

    Arguments:
        entries: Of a ledger, in order.

    Raises:
        ParameterError: for constraints that leave no room.
        RegistryError: for more than fit into memory.

    Example:
        >>> from engine import Linear
        >>> declared([ParameterEntry(Parameter("a"), "", 0), ConstraintEntry(Linear({"a": 1}, upper=2), "", 0)])
        ParameterSpace(a, a ≤ 2)
    """
    parameters = [e.parameter for e in entries if isinstance(e, ParameterEntry)]
    constraints = [e.constraint for e in entries if isinstance(e, ConstraintEntry)]
    check_size(constraints, len(parameters))
    return ParameterSpace(parameters, constraints)


def first_refused(entries: Sequence[Entry], reason: str) -> TamperedError:
    """What to say of entries that make no parameter space: the first with which they do not, found by halving.

    Arguments:
        entries: Entries that :func:`declared` refuses.
        reason: Why it refuses all of them.

    Example:
        >>> from engine import Linear
        >>> entries = [ParameterEntry(Parameter("a", bounds=(0, 1)), "", 5)]
        >>> entries += [ConstraintEntry(Linear({"a": 1}, upper=u), "", 9 * n) for n, u in enumerate([0.5, -2, -3])]
        >>> str(first_refused(entries, "..."))
        "entry 3 (constraint 'a ≤ -2') of registry.toml, line 9, is not what an append writes: no θ satisfies ..."
    """
    good, bad = 0, len(entries)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            declared(entries[:middle])
            good = middle
        except (ParameterError, RegistryError) as error:
            bad, reason = middle, str(error)
    entry = entries[bad - 1]
    what = f"constraint '{entry.constraint.name}'" if isinstance(entry, ConstraintEntry) else "parameter"
    return TamperedError(
        f"entry {bad} ({what}) of registry.toml, line {entry.line}, is not what an append writes: {reason}; restore it "
        "from a copy"
    )


def united(entries: Sequence[Entry], brought: Mapping[str, Sequence[Parameter]]) -> tuple[Parameter, ...]:
    """The parameters of entries and those that are brought along.

    Arguments:
        entries: Of a ledger, in order.
        brought: Who declares -> what it declares.

    Raises:
        ParameterError: for one name with two meanings; the message has both owners.

    Example:
        >>> united([ParameterEntry(Parameter("a", unit="s"), "", 5)], {"lens": [Parameter("a", unit="m")]})
        Traceback (most recent call last):
        engine.errors.ParameterError: parameter 'a' has unit 's' in 'entry 1 of registry.toml' and unit 'm' in 'lens'; ...
    """
    plugins = {e.name: e for e in entries if isinstance(e, PluginEntry)}
    owners: dict[str, Sequence[Parameter]] = {}
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, ParameterEntry):
            users = [name for name, e in plugins.items() if entry.parameter.name in e.parameters]
            owner = f"entry {number} of registry.toml" + (f", used by {', '.join(users)}" if users else "")
            owners[owner] = [entry.parameter]
    return tuple(ParameterSpace.union({**owners, **brought}))


def new_constraints(entries: Sequence[Entry], constraints: Sequence[SpaceConstraint]) -> list[SpaceConstraint]:
    """Those constraints that entries do not have yet, under whatever name.

    Arguments:
        entries: Of a ledger, in order.
        constraints: What is appended.

    Raises:
        ParameterError: for a name that has another meaning, with both; for what is no constraint.

    Example:
        >>> from engine import Linear
        >>> there = [ConstraintEntry(Linear({"a": 1, "b": 1}, upper=1, name="sum"), "", 9)]
        >>> new_constraints(there, [Linear({"b": -1, "a": -1}, lower=-1), Linear({"a": 1}, lower=0)])
        [Linear(0 ≤ a)]
        >>> new_constraints(there, [Linear({"a": 1, "b": 1}, upper=2, name="sum")])
        Traceback (most recent call last):
        engine.errors.ParameterError: constraint 'sum' is a + b ≤ 1 in entry 1 of registry.toml and a + b ≤ 2 in this append; ...
    """
    owners = {
        e.constraint.name: (e.constraint, f"entry {number} of registry.toml")
        for number, e in enumerate(entries, 1)
        if isinstance(e, ConstraintEntry)
    }
    known = {c.meaning() for c, _ in owners.values()}
    fresh: list[SpaceConstraint] = []
    for constraint in constraints:
        if not isinstance(constraint, SpaceConstraint):
            raise ParameterError(
                f"a constraint is a Linear, Simplex, PositiveSemidefinite or Ball, got {type(constraint).__name__}"
            )
        if constraint.meaning() in known:
            continue
        other, owner = owners.setdefault(constraint.name, (constraint, "this append"))
        if other is not constraint:
            raise ParameterError(
                f"constraint '{constraint.name}' is {other} in {owner} and {constraint} in this append; one name has one "
                "meaning: give it a name of its own"
            )
        known.add(constraint.meaning())
        fresh.append(constraint)
    return fresh


def check_plugin(name: str, info: PluginInfo, space: ParameterSpace) -> None:
    """Refuse a plugin whose parameters are not declared, or in another unit.

    Arguments:
        name: The plugin's name.
        info: What its folder says.
        space: Every parameter that is declared.

    Raises:
        ParameterError: naming the parameter, and both units.

    Example:
        >>> import tempfile
        >>> from engine.description import describe
        >>> from engine.plugin import write_plugin
        >>> from modalities import Gaussian
        >>> folder = tempfile.mkdtemp() + "/length"
        >>> write_plugin(folder, Gaussian(parameter_names=("L",), sd=2.0))
        >>> check_plugin("length", describe(folder), ParameterSpace([Parameter("mu")]))
        Traceback (most recent call last):
        engine.errors.ParameterError: plugin 'length' depends on 'L', which nobody declares; there are mu. Append it with ...
    """
    for parameter in info.parameter_names:
        if parameter not in space:
            raise ParameterError(
                f"plugin '{name}' depends on '{parameter}', which nobody declares; there are {', '.join(space.names) or 'none'}. "
                f"Append it with parameters=[Parameter('{parameter}', ...)]"
            )
        unit = info.parameter_units.get(parameter, space[parameter].unit)
        if unit != space[parameter].unit:
            raise ParameterError(
                f"plugin '{name}' takes '{parameter}' in {unit!r}, but the registry declares it in {space[parameter].unit!r}; "
                "convert one of them, or give it a name of its own"
            )
