r"""Text that people write for the command line: parameters, constraints, a plugin to append, data to score.

A parameter is one line, ``H0 [km/s/Mpc] = Uniform(40, 100)``, and so is a linear constraint, ``a + 2 b <= 3``.
A plugin is a TOML file::

    factory = "modalities:PoissonCounts"     # or the name of an installed entry point
    [configuration]
    signal = [5.0, 9.0]
    background = { file = "background.npy" } # .npy, .csv or .txt, beside the TOML file
    [observations]                           # optional: the plugin's own data, (N, *event_shape)
    x = [[57, 49]]
    [[parameter]]                            # optional: parameters it brings along
    name = "mu"
    prior = { distribution = "Uniform", low = 0.0, high = 10.0 }
    [[constraint]]                           # optional: what parameters must satisfy together
    kind = "linear"                          # or simplex, positive_semidefinite, ball
    coefficients = { mu = 1.0, nu = -1.0 }
    lower = 0.0
    [training]                               # of a learned plugin: see engine.learning.job

Paths are relative to the TOML file; ``..`` and absolute ones lead elsewhere, as the file is its reader's own. A list of
numbers is an array, but whole numbers for an argument that takes such (``hidden: Sequence[int]``) stay whole.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributions as td

from engine.admission import read_admission
from engine.certificate.certificate import Certificate
from engine.constraints import Linear, SpaceConstraint, constraint_from_toml
from engine.errors import EvidenceError, ModalityError, ParameterError, RegistryError, UntrustedError
from engine.factories import resolve
from engine.files import parse_toml, read_bytes
from engine.learning.simulator import seeded
from engine.modality import Modality
from engine.parameter import Parameter
from engine.plugin import describe, read_certificate, read_observations, read_plugin
from engine.priors import FAMILIES

__all__ = [
    "PluginSpecification",
    "parse_constraint",
    "parse_parameter",
    "read_constraints",
    "read_data",
    "read_parameters",
    "read_specification",
    "read_table",
]

_LINE = re.compile(
    r"\s*(?P<name>[^\s\[\]=]+(?:\[\w+\])?)\s*(?:\[(?P<unit>[^\[\]]*)\]\s*)?(?:=\s*(?P<family>\w+)\s*\((?P<arguments>[^()]*)\)\s*)?"
)
_COMPARISON = re.compile(r"<=|>=|==|[=≤≥]")
_SIGNS = {"<=": "≤", ">=": "≥", "==": "="}
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NAME = r"[^\W0-9][^\s+\-−*<>=≤≥]*"
_FIELDS = {"factory", "configuration", "observations", "parameter", "constraint", "training"}
_WHOLE = re.compile(r"\b(?:Sequence|Iterable|list|List|tuple|Tuple)\[int\b")


@dataclass(frozen=True)
class PluginSpecification:
    """A modality to append, with what it brings along.

    Attributes:
        modality: The modality.
        parameters: Declarations of parameters that it depends on.
        observations: Its own data, shape (N, *event_shape); None where it has none.
        constraints: What parameters must satisfy together.
        certificate: What was found of a learned one, where it comes from a plugin's folder.
        training: The table ``[training]`` of one that is yet to be trained; None where there is none.

    Example:
        >>> from modalities import Gaussian
        >>> plugin = PluginSpecification(Gaussian(parameter_names=("L",), sd=2.0), (Parameter("L"),), observations=None)
        >>> plugin.modality.parameter_names
        ('L',)
    """

    modality: Modality
    parameters: tuple[Parameter, ...]
    observations: Any
    constraints: tuple[SpaceConstraint, ...] = ()
    certificate: Certificate | None = None
    training: Mapping[str, Any] | None = None


def parse_parameter(text: str) -> Parameter:
    """One parameter from a line such as ``mu = Uniform(0, 10)`` or ``H0 [km/s/Mpc] = Normal(70, 10)``.

    Arguments:
        text: The name, then a unit in brackets and a prior where there are such.

    Raises:
        ParameterError: showing the form it takes.

    Example:
        >>> parse_parameter("H0 [km/s/Mpc] = Uniform(40, 100)")
        Parameter('H0', prior=Uniform(40, 100), unit='km/s/Mpc', bounds=(40, 100))
    """
    match = _LINE.fullmatch(text)
    if match is None:
        raise ParameterError(f"a parameter is written 'name [unit] = Uniform(low, high)', got {text!r}")
    family = match["family"]
    prior = None
    if family is not None:
        if family not in FAMILIES:
            raise ParameterError(f"a prior is one of {', '.join(sorted(FAMILIES))}, got {family!r} in {text!r}")
        names = FAMILIES[family][0]
        try:
            values = [float(v) for v in match["arguments"].split(",")]
            if len(values) != len(names):
                raise ParameterError(
                    f"{family} takes ({', '.join(names)}), got ({match['arguments'].strip()}) in {text!r}"
                )
            tensors = (torch.tensor(v, dtype=torch.float64) for v in values)
            prior = getattr(td, family)(*tensors, validate_args=True)  # whatever torch's default is
        except ParameterError:
            raise
        except ValueError as error:
            raise ParameterError(
                f"{family} takes numbers ({', '.join(names)}), got ({match['arguments']}): {error}"
            ) from error
    return Parameter(match["name"], prior=prior, unit=(match["unit"] or "").strip())


def parse_constraint(text: str, names: Iterable[str] = ()) -> Linear:
    """One linear constraint from a line such as ``a + 2 b <= 3``, ``a - b = 0`` or ``0 <= a + b <= 1``.

    Arguments:
        text: Terms such as ``a``, ``2 a`` or ``2*a`` on either side of ``<=``, ``>=`` or ``=`` (or ≤ and ≥).
        names: Parameters that there are, needed where one has a sign in its name, such as ``x-y``.

    Raises:
        ParameterError: showing the forms it takes.

    Example:
        >>> parse_constraint("a + 2 b <= 3"), parse_constraint("0 <= 2*a - b <= 1"), parse_constraint("a >= b + 1")
        (Linear(a + 2 b ≤ 3), Linear(0 ≤ 2 a − b ≤ 1), Linear(1 ≤ a − b))
    """
    form = f"a constraint is written 'a + 2 b <= 3', '0 <= a - b <= 1' or 'a = b', got {text!r}"
    name = "|".join([*(re.escape(n) for n in sorted(names, key=len, reverse=True)), _NAME])
    name = rf"(?:{name})(?=[\s+\-−*<>=≤≥]|$)"
    term = re.compile(rf"\s*([+\-−]?)\s*(?:({name})|({_NUMBER})(?:\s*\*?\s*({name}))?)\s*")
    sides = [_terms(side, term, form) for side in _COMPARISON.split(text)]
    signs: list[str] = [_SIGNS.get(str(sign), str(sign)) for sign in _COMPARISON.findall(text)]
    if len(sides) == 3 and signs[0] == signs[1] != "=" and not sides[0][0] and sides[1][0] and not sides[2][0]:
        (_, low), (names_, offset), (_, high) = sides if signs[0] == "≤" else sides[::-1]
        return Linear(names_, low - offset, high - offset)
    if len(sides) != 2 or not (sides[0][0] or sides[1][0]):
        raise ParameterError(form)
    if not sides[0][0]:  # 1 ≤ a is a ≥ 1
        sides, signs = sides[::-1], [{"≤": "≥", "≥": "≤"}.get(signs[0], "=")]
    (left, constant), (right, bound) = sides
    coefficients = left | {n: left.get(n, 0.0) - value for n, value in right.items()}
    limit = bound - constant
    if signs[0] == "=":
        return Linear(coefficients, equal=limit)
    return Linear(coefficients, upper=limit) if signs[0] == "≤" else Linear(coefficients, lower=limit)


def _terms(side: str, term: re.Pattern[str], form: str) -> tuple[dict[str, float], float]:
    """The coefficients and the constant of one side."""
    coefficients: dict[str, float] = {}
    constant, at = 0.0, 0
    while at < len(side) or not at:
        match = term.match(side, at)
        if match is None or (at and not match[1]):
            raise ParameterError(form)
        value = (-1.0 if match[1] in ("-", "−") else 1.0) * float(match[3] or 1.0)
        if name := match[2] or match[4]:
            coefficients[name] = coefficients.get(name, 0.0) + value
        else:
            constant += value
        at = match.end()
    return coefficients, constant


def read_table(path: Path, limit: int = 2**24) -> dict[str, Any]:
    r"""A TOML file as plain values.

    Arguments:
        path: The file.
        limit: The most bytes that it may have.

    Raises:
        RegistryError: for a file that cannot be read, is larger, or is no TOML.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "a.toml")
        >>> _ = file.write_text("a = 1")
        >>> read_table(file)
        {'a': 1}
    """
    try:
        return parse_toml(read_bytes(path, limit), str(path))
    except OSError as error:
        raise RegistryError(f"{path} cannot be read: {error}") from error


def read_parameters(path: Path) -> list[Parameter]:
    r"""The ``[[parameter]]`` blocks of a TOML file.

    Arguments:
        path: The file.

    Raises:
        RegistryError: for a file that cannot be read, or that has other fields than a specification.
        ParameterError: for a block that is no parameter.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "parameters.toml")
        >>> _ = file.write_text('[[parameter]]\nname = "L"\nunit = "mm"\n')
        >>> read_parameters(file)
        [Parameter('L', prior=None, unit='mm', bounds=(-inf, inf))]
    """
    return [Parameter.from_toml(block) for block in _blocks(read_table(path), "parameter", path)]


def read_constraints(path: Path) -> list[SpaceConstraint]:
    r"""The ``[[constraint]]`` blocks of a TOML file.

    Arguments:
        path: The file.

    Raises:
        RegistryError: for a file that cannot be read, or that has other fields than a specification.
        ParameterError: for a block that is no constraint.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "parameters.toml")
        >>> _ = file.write_text('[[constraint]]\nkind = "ball"\nparameters = ["S", "C"]\n')
        >>> read_constraints(file)
        [Ball(‖(S, C)‖ ≤ 1)]
    """
    return [constraint_from_toml(block) for block in _blocks(read_table(path), "constraint", path)]


def _blocks(table: Mapping[str, Any], kind: str, path: Path) -> list[dict[str, Any]]:
    if unknown := set(table) - _FIELDS:
        raise RegistryError(f"{path} has unknown fields {sorted(unknown)}; it takes {', '.join(sorted(_FIELDS))}")
    blocks = table.get(kind, [])
    if not isinstance(blocks, list) or not all(isinstance(b, dict) for b in blocks):
        raise ParameterError(f"{path}: a {kind} is written as a [[{kind}]] block")
    return blocks


def read_specification(path: Path, *, trust: bool = False) -> PluginSpecification:
    r"""A plugin from a TOML file, or from another workspace's plugin folder.

    Arguments:
        path: The file or the folder.
        trust: Whether to run code that no installed package declares.

    Raises:
        RegistryError: for a file that cannot be read or has unknown fields.
        ParameterError: for a parameter or a constraint that is none.
        ModalityError: when the configuration does not build the modality.
        UntrustedError: when it names code that no installed package declares.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "tracker.toml")
        >>> lines = ['factory = "modalities:PoissonCounts"', "configuration = {signal = [5, 9], background = [50, 40]}"]
        >>> _ = file.write_text("\n".join(lines))
        >>> read_specification(file).modality.rate(torch.tensor([1.0])).tolist()
        [55.0, 49.0]
    """
    if path.is_dir():
        declared, found = describe(path).parameters, read_certificate(path)
        certificate = None if found is None else read_admission(found, path.name).certificate
        modality = read_plugin(path, trust=trust)
        return PluginSpecification(modality, tuple(declared), read_observations(path), certificate=certificate)
    table = read_table(path)
    parameters = tuple(Parameter.from_toml(b) for b in _blocks(table, "parameter", path))
    constraints = tuple(constraint_from_toml(b) for b in _blocks(table, "constraint", path))
    for name in ("configuration", "observations", "training"):
        if not isinstance(table.get(name, {}), Mapping):
            raise RegistryError(f"{path}: '{name}' is written as a table, [{name}], got {table[name]!r:.100}")
    if not isinstance(table.get("factory"), str):
        raise RegistryError(f'{path} needs factory = "package.module:Class", got {table.get("factory")!r}')
    with naming(path):
        factory: Callable[..., Any] = resolve(table["factory"], "modality", trust=trust)
        whole = _takes_whole_numbers(factory)
        configuration = {
            name: value if name in whole and _all_whole(value) else _value(value, path.parent, trust)
            for name, value in table.get("configuration", {}).items()
        }
        try:
            with seeded(0):  # initial weights, if any, are the same at every reading
                modality = factory(**configuration)
        except EvidenceError:
            raise
        except Exception as error:
            raise ModalityError(f"{table['factory']} cannot be built from the configuration: {error}") from error
        x = table.get("observations", {}).get("x")
        observations = None if x is None else _value(x, path.parent, trust)
    return PluginSpecification(modality, parameters, observations, constraints, training=table.get("training"))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What is refused in the block is said to be of this file."""
    try:
        yield
    except UntrustedError as error:
        raise UntrustedError(f"{path}: {error}") from error
    except ModalityError as error:
        raise ModalityError(f"{path}: {error}") from error


def _takes_whole_numbers(factory: Callable[..., Any]) -> set[str]:
    """The arguments of a factory that take a sequence of whole numbers, such as sizes; annotations may be text."""
    parameters = inspect.signature(factory).parameters.values()
    return {p.name for p in parameters if _WHOLE.search(str(p.annotation))}


def _all_whole(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int for v in value)


def _value(value: Any, folder: Path, trust: bool) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"file"}:
            return torch.from_numpy(_array(folder / str(value["file"])))
        if set(value) == {"function"}:
            return resolve(str(value["function"]), "function", trust=trust)
        return {k: _value(v, folder, trust) for k, v in value.items()}
    if isinstance(value, list) and _numeric(value):
        try:
            return torch.tensor(value, dtype=torch.float64)
        except ValueError as error:
            raise ModalityError(f"a list of numbers must be rectangular: {error}") from error
    return [_value(v, folder, trust) for v in value] if isinstance(value, list) else value


def _numeric(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) > 0 and all(_numeric(v) for v in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _array(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False).astype(np.float64)
        return np.loadtxt(path, delimiter="," if path.suffix == ".csv" else None, ndmin=1)
    except (OSError, ValueError) as error:
        raise RegistryError(f"{path} cannot be read as an array of numbers: {error}") from error


def read_data(path: Path) -> Any:
    """Observations by plugin name, from a zarr group, an ``.npz`` file or a TOML file of nested lists.

    Arguments:
        path: The file or the group's folder.

    Returns:
        Plugin -> observations (N, *event_shape), as zarr arrays, arrays or tensors.

    Raises:
        RegistryError: for anything else, or a file that cannot be read.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "data.toml")
        >>> _ = file.write_text("tracker = [[57, 49]]")
        >>> read_data(file)
        {'tracker': tensor([[57., 49.]], dtype=torch.float64)}
    """
    if not path.exists():
        raise RegistryError(f"no data at {path}; give a zarr group, an .npz file or a .toml file")
    if path.is_dir():
        import zarr

        try:
            return dict(zarr.open_group(path, mode="r").members())
        except Exception as error:
            raise RegistryError(f"{path} cannot be read as a zarr group: {error}") from error
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError) as error:
            raise RegistryError(
                f"{path} cannot be read: {error}; object arrays are not, because they hold code"
            ) from error
    if path.suffix == ".toml":
        return {name: _value(value, path.parent, False) for name, value in read_table(path).items()}
    raise RegistryError(f"data is a zarr group, an .npz file or a .toml file, got {path}")
