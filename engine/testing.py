r"""The battery that a modality passes before it is summed; shipped, so that a plugin's author runs the same one.

A sum of scalars forgives nothing: a summed batch, a detached gradient or a missing factor two in one term
biases every estimate without a message. :func:`check_modality` tests what the contract says. Where the modality
simulates, it tests Bartlett's identities too: with the score :math:`u = \nabla_\theta s(x; \theta)` and x drawn at θ,

.. math:: E[u] = 0, \qquad E[u u^T + \nabla_\theta u] = 0

hold for every true log-likelihood. The first alone passes with the sign of s flipped, or with a factor in front
of it; the second does not. Each mean is compared with zero by Hotelling's T², reported as its square root in
standard errors, corrected for skewness towards fewer alarms. The limits are set so that a correct modality is
failed less than once in 100,000 runs.

References:
    | Bartlett (1953), Approximate confidence intervals, Biometrika 40, 12
    | Hotelling (1931), The generalization of Student's ratio, https://doi.org/10.1214/aoms/1177732979
    | Hall (1992), On the removal of skewness by transformation, JRSS B 54, 221
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from engine.errors import ContractError, EvidenceError, ObservationError, ParameterError
from engine.modality import Modality

__all__ = ["Check", "Report", "check_modality"]

#: What a run of the battery on a correct modality may fail by chance, shared by all its tests of a mean.
FALSE_ALARM = 1e-6
#: Tests of a mean: two identities and the expected information, each at every θ.
_TESTS = 3
#: Below this many draws the law of a mean is not known well enough for limits so far out.
_FEWEST = 1000


@dataclass(frozen=True)
class Check:
    """What one check found.

    Arguments:
        name: The check, as ``report[name]`` finds it.
        passed: Whether the modality passed; None where the check does not apply or could not judge.
        detail: What was seen; for a failure the rule, the value seen and the next step.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Report:
    """What the battery found; prints as a table.

    Arguments:
        modality: The class that was checked.
        checks: One :class:`Check` each, in the order they ran.
    """

    modality: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}; there are {', '.join(check.name for check in self.checks)}")

    def __str__(self) -> str:
        words = {True: "passed", False: "FAILED", None: "skipped"}
        found = [check.passed for check in self.checks]
        counts = ", ".join(f"{found.count(value)} {word.lower()}" for value, word in words.items())
        wide = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{self.modality}: {counts}"]
        for check in self.checks:
            head = f"  {words[check.passed]:<7}  {check.name:<{wide}}  "
            lines += textwrap.wrap(head + check.detail, 110, subsequent_indent=" " * len(head), drop_whitespace=True)
        return "\n".join(lines)


def check_modality(
    modality: Modality,
    theta: Tensor | Sequence[Any],
    x: Tensor | Sequence[Any] | None = None,
    *,
    simulations: int = 20_000,
    seed: int = 0,
    save: bool = True,
    raises: bool = True,
) -> Report:
    """Run the contract battery on a modality; neither it nor any global state is changed.

    Arguments:
        modality: What to check; copies of it are evaluated, in evaluation mode.
        theta: A few valid parameter points inside the bounds, shape (K, P_m) or (P_m,). One at which the
            components differ in value says more than one at the origin, and the identities are judged only where
            events are frequent enough to be drawn.
        x: Observations with a finite scalar at every one of these θ, shape (N, *event_shape); simulated
            where left out.
        simulations: Draws for each θ in the tests of Bartlett's identities, which need at least 1000.
        seed: The seed of every draw.
        save: Whether to write the plugin to a temporary folder and read it back, running its own code.
        raises: Whether to raise when a check fails.

    Returns:
        The report; one check's failure does not stop the others.

    Raises:
        ContractError: for at least one failure, with ``raises``; its message lists all of them.
        ParameterError: when ``theta`` is not finite or not of that shape.
        ObservationError: when ``x`` is not of that shape, or is left out and the modality does not simulate.

    Example:
        >>> class Exponential(Modality):
        ...     def __init__(self, parameter_names=("rate",)):
        ...         super().__init__(parameter_names=parameter_names)
        ...     def log_evidence(self, x, theta):
        ...         return theta[..., 0].log() - theta[..., 0] * x
        ...     def simulate(self, theta, generator=None):
        ...         return -torch.rand(theta.shape[:-1], generator=generator, dtype=theta.dtype).log() / theta[..., 0]
        >>> report = check_modality(Exponential(), [[0.5], [2.0]], save=False)
        >>> report.passed, report["score"].detail
        (True, 'autograd agrees with finite differences at 8 points')
        >>> class Flipped(Exponential):
        ...     def log_evidence(self, x, theta):
        ...         return -super().log_evidence(x, theta)
        >>> report = check_modality(Flipped(), [[0.5], [2.0]], save=False, raises=False)
        >>> print(report["second Bartlett identity"].detail)
        E[u uᵀ + ∇u] must be 0 where the data are drawn at θ, got ... the sign of the scalar is flipped
    """
    case = _Case(modality, theta, x, simulations, seed)
    checks = []
    for name, check in _CHECKS.items():
        if name == "save and load" and not save:
            checks.append(Check(name, None, "not asked for"))
            continue
        with _global_state():  # what one check leaves behind is not the next one's
            checks.append(_run(name, check, case))
    report = Report(type(modality).__name__, tuple(checks))
    if raises and not report.passed:
        lines = [f"{report.modality} breaks the contract in {len(report.failures)} of {len(checks)} checks:"]
        raise ContractError("\n".join(lines + [f"- {check.name}: {check.detail}" for check in report.failures]))
    return report


class _Skip(Exception):  # noqa: N818  (it is no error)
    """Why a check does not apply."""


def _run(name: str, check: Callable[[_Case], str], case: _Case) -> Check:
    try:
        return Check(name, True, check(case))
    except _Skip as reason:
        return Check(name, None, str(reason))
    except EvidenceError as error:
        return Check(name, False, str(error))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        text = textwrap.shorten(str(error), 400)
        return Check(name, False, f"must not raise, got {type(error).__name__} at {where}: {text}; fix it there")


class _Case:
    """One modality with the points to check it at, and what several checks need of it."""

    def __init__(self, modality: Modality, theta: Any, x: Any, simulations: int, seed: int) -> None:
        if not isinstance(modality, Modality):
            seen = type(modality).__name__
            raise ContractError(
                f"a modality must be an instance of engine.Modality, got {seen}; subclass it and build one"
            )
        self.given, self.names, self.event = modality, modality.parameter_names, modality.event_shape
        self.simulations, self.seed = simulations, seed
        theta = torch.as_tensor(theta).detach().to(torch.float64)
        self.theta = theta[None] if theta.dim() == 1 else theta
        if self.theta.dim() != 2 or self.theta.shape[-1] != len(self.names) or not len(self.theta):
            raise ParameterError(
                f"theta must have shape (K, {len(self.names)}), one column for each of {', '.join(self.names)}; "
                f"got {tuple(theta.shape)}"
            )
        if not bool(torch.isfinite(self.theta).all()):
            raise ParameterError(f"theta must be finite, got {self.theta.tolist()}; choose points inside the bounds")
        first = next((t for t in (*modality.parameters(), *modality.buffers())), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.theta = self.theta.to(self.device)
        #: a typical size of each component, for steps; from its values, or 1 where they are 0
        size = torch.maximum(self.theta.abs().amax(0), self.theta.amax(0) - self.theta.amin(0))
        self.scale = torch.where(size > 0, size, 1.0)
        self.x_given = x is not None
        if x is not None:
            x = torch.as_tensor(x).detach().to(self.device, torch.float64)
            if x.shape[1:] != self.event or x.dim() != 1 + len(self.event) or not len(x):
                raise ObservationError(
                    f"x must have shape (N, *event_shape) with event_shape {tuple(self.event)}, got {tuple(x.shape)}; "
                    "add a leading dimension to a single observation"
                )
            self.x = x
        elif not modality.has_simulator:
            raise ObservationError(
                f"x is needed where a modality does not simulate, got none for {type(modality).__name__}; "
                "pass a few observations of shape (N, *event_shape)"
            )

    def copy(self, dtype: torch.dtype | None = None) -> Modality:
        """A copy in evaluation mode, in its own dtype or another."""
        modality = copy.deepcopy(self.given)
        return (modality if dtype is None else modality.to(dtype)).eval()

    @cached_property
    def native(self) -> Modality:
        """A copy as the engine would evaluate it."""
        return self.copy()

    @cached_property
    def exact(self) -> Modality:
        """A copy in float64, where comparisons can be tight."""
        return self.copy(torch.float64)

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed + seed)

    @cached_property
    def x(self) -> Tensor:
        """Observations: those given, or four drawn at each θ."""
        try:
            with torch.no_grad():
                x = self.exact.simulate(self.theta.repeat_interleave(4, 0), self.generator())
            if x.shape != (4 * len(self.theta), *self.event):
                raise _Skip(f"no observations: simulate returned shape {tuple(x.shape)}")
        except _Skip:
            raise
        except Exception as error:
            raise _Skip(f"no observations: simulate raised {type(error).__name__}") from error
        return x.to(torch.float64)

    @cached_property
    def few(self) -> Tensor:
        """Three to eight observations, one repeated where there are fewer."""
        x = self.x[:: -(-len(self.x) // 8)]
        return x if len(x) >= 3 else x[torch.arange(3) % len(x)]

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Some (x, θ) with a finite scalar, x (n, *event_shape) and θ (n, P_m)."""
        k, b = len(self.theta), len(self.few)
        n = torch.arange(k * b)
        x, theta = self.few[(n % k + n // k) % b], self.theta[n % k]  # every θ first, each with another x
        with torch.no_grad():
            finite = torch.isfinite(_scalar(self.exact, x, theta))
        return x[finite][:8], theta[finite][:8]

    @cached_property
    def draws(self) -> list[_Draws] | Exception:
        """Scores and curvatures at simulated data, for each θ; or why there are none."""
        try:
            return [_simulated_scores(self, theta, k) for k, theta in enumerate(self.theta)]
        except Exception as error:
            return error

    @property
    def alpha(self) -> float:
        return FALSE_ALARM / (_TESTS * len(self.theta))


@contextmanager
def _global_state() -> Iterator[Callable[[], list[str]]]:
    """What of the process's state has changed since entry, as a function; put back at the end."""

    def look() -> dict[str, Any]:
        return {
            "torch's default dtype": torch.get_default_dtype(),
            "torch's number of threads": torch.get_num_threads(),
            "torch's gradient mode": torch.is_grad_enabled(),
            "torch's global random state": torch.get_rng_state(),
            "numpy's global random state": np.random.get_state(legacy=True),  # noqa: NPY002
            "python's global random state": random.getstate(),
        }

    before = look()

    def changed() -> list[str]:
        return [name for name, value in look().items() if not _same(value, before[name])]

    try:
        yield changed
    finally:
        default, threads, grad, rng, numpy_rng, python_rng = before.values()
        torch.set_default_dtype(default)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        torch.set_rng_state(rng)
        np.random.set_state(numpy_rng)  # noqa: NPY002
        random.setstate(python_rng)


def _same(a: Any, b: Any) -> bool:
    """Bit for bit, through tensors, arrays and containers; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return bool(torch.equal(a, b)) or bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _state(modality: Modality) -> dict[str, Any]:
    return {name: t.detach().clone() for name, t in modality.state_dict().items() if isinstance(t, Tensor)}


def _scalar(modality: Modality, x: Tensor, theta: Tensor) -> Tensor:
    """The scalar as the engine asks for it: both arguments in the modality's dtype."""
    value = modality.log_evidence(x.to(modality.dtype), theta.to(modality.dtype))
    if not isinstance(value, Tensor):
        seen = type(value).__name__
        raise ContractError(f"log_evidence must return a Tensor, got {seen}; return one scalar for each (x, θ)")
    return value


def _elements(modality: Modality, x: Tensor, theta: Tensor) -> Tensor:
    """The scalar of matched pairs, with the shape checked: (n, *event_shape), (n, P_m) -> (n)."""
    value = _scalar(modality, x, theta)
    if value.shape != theta.shape[:1]:
        raise _Skip(f"log_evidence returns shape {tuple(value.shape)} for {len(theta)} pairs; see the check of shapes")
    return value


def _score(modality: Modality, x: Tensor, theta: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
    """The scalar (n) and its score (n, P_m); zero where no gradient reaches θ."""
    value = _elements(modality, x, theta)
    if not value.requires_grad:
        return value, torch.zeros_like(theta)
    (u,) = torch.autograd.grad(value.sum(), theta, create_graph=graph, allow_unused=True)
    return value, torch.zeros_like(theta) if u is None else u


def _curvature(u: Tensor, theta: Tensor) -> Tensor:
    """∇u of shape (n, P_m, P_m), by a second pass backwards through the score."""
    rows = []
    for j in range(theta.shape[-1]):
        row = None
        if u.requires_grad:
            (row,) = torch.autograd.grad(u[:, j].sum(), theta, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(theta) if row is None else row)
    return torch.stack(rows, -2).detach()


# ---- the contract: shapes, values, batches


def _check_shape(case: _Case) -> str:
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
            value = _scalar(m, xs, thetas)
        if value.shape != expected:
            raise ContractError(
                f"log_evidence must broadcast leading dimensions: x {tuple(xs.shape)} with theta {tuple(thetas.shape)} "
                f"-> {expected}, got {tuple(value.shape)}; index theta as theta[..., j], sum over event dimensions only"
            )
        if value.dtype not in (torch.float32, torch.float64):
            raise ContractError(
                f"log_evidence must return float32 or float64, got {str(value.dtype).removeprefix('torch.')}; "
                "evaluate in the dtype of theta, and keep weights out of half precision"
            )
        shapes.append(f"{expected}")
    return f"{', '.join(shapes)} as asked; {str(m.dtype).removeprefix('torch.')}"


def _check_finite(case: _Case) -> str:
    impossible = 0
    for k, theta in enumerate(case.theta):
        with torch.no_grad():
            value = _scalar(case.native, case.x, theta)
        bad = torch.isnan(value) | (value == math.inf)
        own = torch.arange(len(case.x)) // 4 == k  # the draws at this θ
        if case.x_given or value.shape != own.shape:
            bad |= ~torch.isfinite(value)
        else:
            bad |= ~torch.isfinite(value) & own.to(value.device)
        if bool(bad.any()):
            i = int(bad.flatten().nonzero()[0, 0])
            raise ContractError(
                f"the scalar must be finite where θ allows x, −∞ where it does not and never NaN, "
                f"got {value.flatten()[i].item()} for observation {i} at theta[{k}] = {_show(theta)}; "
                "look there for the log or root of a value <= 0"
            )
        impossible += int((value == -math.inf).sum())
    note = f", −∞ at {impossible} that θ makes impossible" if impossible else ""
    return f"finite for {len(case.x)} observations at {len(case.theta)} θ{note}"


def _check_elements(case: _Case) -> str:
    x, theta, m = case.few, case.theta[:8], case.exact
    k, b = len(theta), len(x)
    with torch.no_grad():
        grid = _scalar(m, x[None], theta[:, None])
        single = torch.stack([_scalar(m, xi, t).reshape(-1)[0] for t in theta for xi in x]).reshape(k, b)
        flat_x, flat_theta = x.repeat(k, *[1] * len(case.event)), theta.repeat_interleave(b, 0)
        order = torch.randperm(k * b, generator=torch.Generator().manual_seed(case.seed)).to(x.device)
        shuffled = _scalar(m, flat_x[order], flat_theta[order])
    for value, expected, what in (
        (grid.flatten(), single.flatten(), "alone"),
        (shuffled.flatten(), single.flatten()[order], "in a shuffled batch"),
    ):
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


# ---- derivatives


def _differences(f: Callable[[Tensor], Tensor], theta: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of f, (n·P, P) -> (n·P, q), along each component of θ (n, P), by central differences.

    A ladder of steps, each a quarter of the last, and one step of Richardson's extrapolation; each
    derivative is taken where its error is smallest. Steps that leave the domain are passed over.

    Returns:
        The derivatives (n, P, q), their errors (n, P, q), and whether f is constant on either side (P).
    """
    n, p = theta.shape
    slopes: list[Tensor | None] = []
    errors: list[Tensor | None] = []
    sides: list[tuple[Tensor, Tensor] | None] = []
    failure: Exception | None = None
    for level in range(9):
        h = 0.1 * 4.0**-level * scale
        up, down = (theta[:, None] + sign * torch.diag(h) for sign in (1, -1))
        try:
            f_up, f_down = (f(t.reshape(n * p, p)).reshape(n, p, -1).detach() for t in (up, down))
        except _Skip:
            raise
        except Exception as error:  # outside the domain, or broken: the smallest step tells
            failure = error
            for ladder in (slopes, errors, sides):
                ladder.append(None)
            continue
        width = (up - down).diagonal(dim1=-2, dim2=-1)[..., None]
        size = torch.maximum(f_up.abs(), f_down.abs()).double()
        slopes.append((f_up.double() - f_down.double()) / width)
        errors.append(16 * torch.finfo(f_up.dtype).eps * size / width)
        sides.append((f_up, f_down))
    best = torch.full_like(theta[:, :, None], math.nan, dtype=torch.float64)
    err = torch.full_like(best, math.inf)
    for coarse, fine, rounding in zip(slopes, slopes[1:], errors[1:], strict=False):
        if coarse is not None and fine is not None and rounding is not None:
            error = ((fine - coarse).abs() + rounding).nan_to_num(math.inf, math.inf)
            best, err = torch.where(error < err, (16 * fine - coarse) / 15, best), torch.minimum(error, err)
    if all(slope is None for slope in slopes):
        raise failure or _Skip("no step stays in the domain")
    middle = [side for side in sides[3:6] if side is not None]
    constant = torch.ones(p, dtype=torch.bool, device=theta.device)
    for a, b in pairwise(middle):
        for side in (0, 1):
            constant &= (a[side] == b[side]).all(-1).all(0)
    return best.nan_to_num(), err, constant & (len(middle) > 1)


def _compare(case: _Case, found: Tensor, slope: Tensor, error: Tensor, theta: Tensor, what: str, next_step: str) -> int:
    """The number of points at which derivatives (n, P, q) agree, or the failure that names the first that does not."""
    large = torch.maximum(found.abs(), slope.abs())
    off = ~((found - slope).abs() <= 1e-5 * large + 3 * error)
    if bool(off.any()):
        i, j, q = off.nonzero()[0].tolist()
        name = case.names[j] if found.shape[-1] == 1 else f"{case.names[q]}, {case.names[j]}"
        raise ContractError(
            f"{what} must be the derivative, got {found[i, j, q].item():.8g} for ({name}) at θ = {_show(theta[i])} "
            f"where finite differences give {slope[i, j, q].item():.8g}; {next_step}"
        )
    judged = (error <= 0.01 * large.amax(0)) | (large.amax(0) == 0)
    return int(judged.flatten(1).any(-1).sum())


def _check_score(case: _Case) -> str:
    x, theta = case.pairs
    if not len(x):
        raise _Skip("no pair of x and θ has a finite scalar")
    points = theta.clone().requires_grad_(True)
    _, u = _score(case.exact, x, points)
    if not bool(torch.isfinite(u).all()):
        i = int((~torch.isfinite(u)).nonzero()[0, 0])
        raise ContractError(
            f"the score must be finite, got {_show(u[i])} at θ = {_show(theta[i])}; "
            "a masked branch of torch.where still has a gradient: make its argument safe first"
        )
    many = x.repeat_interleave(theta.shape[-1], 0)
    with torch.no_grad():
        slope, error, constant = _differences(lambda t: _elements(case.exact, many, t), theta, case.scale)
    constant &= (u == 0).all(0)
    if bool(constant.all()):
        raise _Skip("the scalar does not change near these θ: discrete, or independent of them; choose other points")
    live = ~constant
    slope, error = slope * live[:, None], error.where(live[:, None], 0.0)
    next_step = "compute with torch, without detach, item, numpy or no_grad"
    judged = _compare(case, u[..., None], slope, error, theta, "the autograd score", next_step)
    if not judged:
        raise _Skip("finite differences are too noisy to judge; a large constant in the scalar may be why")
    flat = [name for name, c in zip(case.names, constant.tolist(), strict=True) if c]
    note = f"; the scalar does not change with {', '.join(flat)}" if flat else ""
    return f"autograd agrees with finite differences at {judged} points{note}"


def _check_hessian(case: _Case) -> str:
    x, theta = case.pairs
    if not len(x):
        raise _Skip("no pair of x and θ has a finite scalar")
    points = theta.clone().requires_grad_(True)
    _, u = _score(case.exact, x, points, graph=True)
    if not bool((u != 0).any()):
        raise _Skip("the score is zero everywhere")
    hessian = _curvature(u, points)
    if not bool(torch.isfinite(hessian).all()):
        i = int((~torch.isfinite(hessian)).nonzero()[0, 0])
        raise ContractError(
            f"second derivatives must be finite, got {_show(hessian[i].flatten())} at θ = {_show(theta[i])}; "
            "look for a root or a norm at zero"
        )
    many = x.repeat_interleave(theta.shape[-1], 0)
    hessian = hessian.transpose(-1, -2)  # (n, along, of), as the differences are
    slope, error, constant = _differences(
        lambda t: _score(case.exact, many, t.clone().requires_grad_(True))[1], theta, case.scale
    )
    live = ~(constant & (hessian == 0).all(-1).all(0))[:, None]
    slope, error = slope * live, error.where(live, 0.0)
    next_step = "attach the score to θ too: a custom backward must be differentiable, and nothing in it detached"
    judged = _compare(case, hessian, slope, error, theta, "the second derivative by double backward", next_step)
    if not judged:
        raise _Skip("finite differences are too noisy to judge; a large constant in the scalar may be why")
    linear = " (all zero: the scalar is linear in θ)" if not bool((hessian != 0).any()) else ""
    return f"double backward agrees with differences of the score at {judged} points{linear}"


# ---- precision, state, randomness


def _check_precision(case: _Case) -> str:
    x, theta = case.few[None], case.theta[:, None]
    rounded = x.float(), theta.float()
    values = {}
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        m = case.copy(dtype)
        try:
            with torch.no_grad():
                values[dtype] = _scalar(m, x, theta)
        except Exception as error:
            raise ContractError(
                f"it must work after .to(torch.{name}), got {type(error).__name__}: "
                f"{textwrap.shorten(str(error), 200)}; register tensors as parameters or buffers, "
                "and create others in theta's dtype"
            ) from error
        value = values[dtype]
        if value.dtype not in (torch.float32, torch.float64) or bool(torch.isnan(value).any()):
            seen = f"NaN in {value.dtype}" if value.is_floating_point() else f"{value.dtype}"
            raise ContractError(
                f"it must work after .to(torch.{name}), got {seen}; is there a constant out of its range?"
            )
    # The same rounded weights and inputs in both, so that only the arithmetic differs.
    with torch.no_grad():
        m = case.copy(torch.float32)
        low = _scalar(m, *rounded).double()
        high = _scalar(copy.deepcopy(m).to(torch.float64), *rounded).double()
    both = torch.isfinite(low) & torch.isfinite(high)
    error = torch.where(both, (low - high).abs(), 0.0)
    if bool((error > 1e-3 * (1 + high.abs())).any()):
        seen = f"float32 is off by up to {error.max().item():.2g} nats; the tolerance is 1e-3 (1 + |s|)"
        if case.native.dtype != torch.float64:
            raise ContractError(f"the scalar must be exact in its own dtype, but {seen}; use .to(torch.float64)")
        return f"works in both, but {seen}: keep it in float64"
    return f"works in both; float32 within {error.max().item():.1g} nats (tolerance 1e-3 (1 + |s|))"


def _check_state(case: _Case) -> str:
    calls: list[tuple[str, Callable[[Modality], object]]] = []
    x_error: _Skip | None = None
    try:
        x = case.few
        calls.append(("log_evidence", lambda m: _scalar(m, x[None], case.theta[:, None])))
    except _Skip as reason:
        x_error = reason
    if case.given.has_simulator:
        calls.append(("simulate", lambda m: m.simulate(case.theta.to(m.dtype), case.generator())))
    given = _state(case.given)
    for name, call in calls:
        m = case.copy()
        before = _state(m)
        with _global_state() as changed:
            call(m)
            if seen := changed():
                raise ContractError(
                    f"{name} must leave global state alone, but it changed {' and '.join(seen)}; "
                    "draw only from the generator passed to simulate, and set nothing global"
                )
        if not _same(before, _state(m)):
            fields = ", ".join(key for key, value in _state(m).items() if not _same(value, before.get(key)))
            raise ContractError(
                f"{name} must not change the modality, but it changed {fields}; a plugin is fixed once it is registered"
            )
    if not _same(given, _state(case.given)):
        raise ContractError("a copy must be independent, but using it changed the original; keep no state on the class")
    if x_error is not None:
        raise x_error
    return f"{' and '.join(name for name, _ in calls)} changed neither global state nor the modality"


def _check_deterministic(case: _Case) -> str:
    m, (x, theta) = case.copy(), (case.few[None], case.theta[:, None])
    with torch.no_grad():
        first, second = _scalar(m, x, theta), _scalar(m, x, theta)
        m.train()
        training = _scalar(m, x, theta)
    if not _same(first, second):
        worst = (first.double() - second.double()).abs().max().item()
        raise ContractError(
            f"the same input must give the same bits, got values {worst:.3g} apart; "
            "log_evidence has no generator: use no random numbers, or fixed ones from its configuration"
        )
    if not _same(first, training):
        return "bit-identical twice in evaluation mode; training mode differs (dropout?): call .eval() before use"
    return "bit-identical twice, and in training mode"


def _check_simulate(case: _Case) -> str:
    if not case.given.has_simulator:
        raise _Skip("it does not simulate")
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
    if not _same(draws, again):
        raise ContractError(
            "one seed must give the same draws, got others; draw only from the generator that is passed"
        )
    if _same(draws, other):
        raise ContractError("another seed must give other draws, got the same; draw from the generator that is passed")
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


# ---- what a plugin's folder keeps


def _same_scalar(case: _Case, other: Modality, how: str) -> None:
    with torch.no_grad():
        expected = _scalar(case.native, case.few[None], case.theta[:, None])
        found = _scalar(other.eval(), case.few[None], case.theta[:, None])
    if not _same(expected, found):
        apart = (expected.double() - found.double()).abs().max().item() if expected.shape == found.shape else math.nan
        raise ContractError(
            f"the modality {how} must score the same bits, got values {apart:.3g} apart; what the scalar depends on "
            "must be an argument of __init__ or a registered parameter or buffer, not an attribute set later"
        )


def _check_configuration(case: _Case) -> str:
    configuration = copy.deepcopy(case.given.configuration)
    if positional := [name for name in configuration if name.startswith("*")]:
        raise ContractError(
            f"every argument of __init__ must have a name, got {positional[0]}; take a sequence instead"
        )
    try:
        fresh = type(case.given)(**configuration)
        fresh.load_state_dict(_state(case.given), assign=True)
    except Exception as error:
        raise ContractError(
            f"its configuration and state must build it again, got {type(error).__name__}: "
            f"{textwrap.shorten(str(error), 300)}; take everything that shapes it as arguments of __init__"
        ) from error
    _same_scalar(case, fresh, "built again from its configuration and state")
    return f"{', '.join(configuration) or 'no arguments'} and the state build it again, bit for bit"


def _check_save(case: _Case) -> str:
    from engine.plugin import read_plugin, write_plugin  # here, so that the battery loads without the ledger

    with tempfile.TemporaryDirectory() as folder:
        write_plugin(Path(folder) / "plugin", case.copy())
        loaded = read_plugin(Path(folder) / "plugin", trust=True)
        if set(loaded.configuration) != set(case.given.configuration):
            raise ContractError(
                f"the configuration must survive saving, got {sorted(loaded.configuration)} for "
                f"{sorted(case.given.configuration)}; take every setting as an argument of __init__"
            )
        _same_scalar(case, loaded, "read back from its folder")
    return "the folder gives back the same scalar, bit for bit"


# ---- identities of a log-likelihood


@dataclass(frozen=True)
class _Draws:
    """At n draws: scores (n, P), the vectorised u uᵀ and ∇u (n, D), and sizes below which they are rounding."""

    u: Tensor
    outer: Tensor
    curvature: Tensor
    floor: Tensor
    floor2: Tensor
    vary: bool


def _simulated_scores(case: _Case, theta: Tensor, k: int) -> _Draws:
    n, m, p = case.simulations, case.exact, len(case.names)
    generator = case.generator(2 + k)
    lower = torch.tril_indices(p, p, device=case.device)
    size = min(4096, max(16, 2_000_000 // max(case.event.numel(), p * p, 1)))
    u, outer, curvature, largest, first, vary = [], [], [], 0.0, None, False
    for start in range(0, n, size):
        points = theta.expand(min(size, n - start), p)
        with torch.no_grad():
            x = m.simulate(points, generator).to(torch.float64)
        first = x[:1] if first is None else first
        vary = vary or not _same(x, first.expand_as(x))
        points = points.clone().requires_grad_(True)
        s, score = _score(m, x, points, graph=True)
        bad = ~(torch.isfinite(s) & torch.isfinite(score).all(-1))
        if bool(bad.any()):
            i = int(bad.nonzero()[0, 0])
            raise ContractError(
                f"scalar and score must be finite at simulated data, got {s[i].item():g} and "
                f"{_show(score[i].detach())} at theta[{k}] = {_show(theta)} for draw {start + i}; "
                "log_evidence may exclude what simulate draws"
            )
        hessian = _curvature(score, points)
        score = score.detach()
        largest = max(largest, s.detach().abs().max().item())
        u.append(score)
        outer.append((score[:, :, None] * score[:, None, :])[:, lower[0], lower[1]])
        curvature.append(hessian[:, lower[0], lower[1]])
    floor = 1e-10 * (1 + largest) / case.scale
    floor2 = (1e-10 * (1 + largest) / (case.scale[:, None] * case.scale))[lower[0], lower[1]]
    return _Draws(torch.cat(u), torch.cat(outer), torch.cat(curvature), floor, floor2, vary)


@dataclass(frozen=True)
class _Mean:
    """Hotelling's T for E[y] = 0 in standard errors, its limit, and the component furthest from zero."""

    errors: float
    limit: float
    worst: int


def _mean_is_zero(y: Tensor, floor: Tensor, alpha: float) -> _Mean | None:
    """Test E[y] = 0 for independent rows y (n, D); None where rare draws dominate and the test cannot judge.

    Directions without variance are left out of T and must have no mean. The worst direction's skewness g enters
    by Hall's transformation, towards fewer alarms only: rare large draws on the far side of zero may be missing.
    """
    n = len(y)
    index = (y.abs().amax(0) > floor).nonzero()[:, 0]
    y = y[:, index].to(torch.float64)
    mean, sd = y.mean(0), y.std(0)
    still = sd <= 1e-9 * y.square().mean(0).sqrt()
    if bool(still.any()):
        return _Mean(math.inf, 0.0, int(index[int(still.nonzero()[0, 0])]))
    # Where one value is much the most frequent (no counts), u uᵀ needs two of the rare events at once, and n draws
    # must hold enough of those: 15 of them where (number of the others)² / 2n >= 15.
    ordered = y.float().sort(0).values
    others = torch.stack([n - torch.unique_consecutive(column, return_counts=True)[1].max() for column in ordered.T])
    if not bool((frequent := others**2 >= 30 * n).any()):
        return None
    index, y, mean, sd = index[frequent], y[:, frequent], mean[frequent], sd[frequent]
    worst = int(index[int((mean.abs() / sd).argmax())])
    z = y / sd
    most = max(4, n // 250)
    if z.shape[1] > most:  # too many for one T: fixed random combinations of them
        mix = torch.randn(z.shape[1], most, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
        z = z @ mix.to(z.device)
        z = z / z.std(0)
    mean = z.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(z.T).reshape(z.shape[1], -1))
    along = vectors.T @ mean
    keep = eigenvalues > 1e-8 * eigenvalues[-1]
    if bool((along[~keep].abs() > 10 * (1e-8 * eigenvalues[-1] / n).sqrt() + 1e-6).any()):
        return _Mean(math.inf, 0.0, worst)
    weights = along[keep] / eigenvalues[keep]
    d = int(keep.sum())
    t = math.sqrt(n * float((along[keep] * weights).sum()))
    limit = math.sqrt(d * (n - 1) / (n - d) * scipy.stats.f.isf(alpha, d, n - d))
    if t > 0:
        line = (z - mean) @ (vectors[:, keep] @ weights)
        g = float((line**3).mean() / line.square().mean() ** 1.5) / math.sqrt(n)
        if abs(g) > 0.3:
            return None
        t = min(t, t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 6)
    return _Mean(t, limit, worst)


def _identity(
    case: _Case,
    values: Callable[[_Draws, int], tuple[Tensor, Tensor]],
    rule: str,
    label: Callable[[int], str],
    advice: Callable[[_Draws], str],
) -> str:
    """Test that a mean over simulated data is zero at every θ, and say by how far it is not."""
    if not case.given.has_simulator:
        raise _Skip("it does not simulate")
    if case.simulations < _FEWEST:
        raise _Skip(f"needs at least {_FEWEST} simulations, got {case.simulations}")
    if isinstance(case.draws, Exception):
        raise case.draws
    results, reasons = [], []
    for k, draws in enumerate(case.draws):
        if not bool((draws.u.abs() > draws.floor).any()):
            reasons.append(f"the score is zero at theta[{k}]")
        elif not draws.vary:
            reasons.append(f"all draws at theta[{k}] are the same")
        elif (result := _mean_is_zero(*values(draws, k), case.alpha)) is None:
            reasons.append(f"rare draws dominate at theta[{k}]: use more simulations, or another θ")
        else:
            results.append((k, result))
    if not results:
        raise _Skip("; ".join(reasons))
    k, worst = max(results, key=lambda item: item[1].errors / item[1].limit if item[1].limit else math.inf)
    if not worst.errors <= worst.limit:
        amount = f"{worst.errors:.3g} standard errors (limit {worst.limit:.3g})"
        if math.isinf(worst.errors):
            amount = "one value ≠ 0 at every draw (a term in θ alone, or events too rare to be drawn)"
        raise ContractError(
            f"{rule}, got {amount} at theta[{k}] = {_show(case.theta[k])}, most of it in ({label(worst.worst)}); "
            f"{advice(case.draws[k])}"
        )
    note = f"; {'; '.join(reasons)}" if reasons else ""
    seen = f"{worst.errors:.2f} standard errors at worst (limit {worst.limit:.2f})"
    return f"{seen}, {case.simulations} draws at each θ{note}"


def _pair_label(case: _Case) -> Callable[[int], str]:
    lower = torch.tril_indices(len(case.names), len(case.names)).T.tolist()
    return lambda d: ", ".join(case.names[j] for j in lower[d])


def _check_first(case: _Case) -> str:
    return _identity(
        case,
        lambda draws, k: (draws.u, draws.floor),
        "E[u] must be 0 where the data are drawn at θ",
        lambda j: case.names[j],
        lambda draws: (
            "a rate or mean that log_evidence and simulate compute differently, a term in θ that is missing "
            "(a normalisation) or too many (a prior); for a learned scalar see engine.certificate"
        ),
    )


def _after_first(case: _Case) -> None:
    if case.given.has_simulator and case.simulations >= _FEWEST and isinstance(case.draws, Exception):
        raise _Skip("no scores at simulated data; see the first Bartlett identity")


def _check_second(case: _Case) -> str:
    _after_first(case)
    p = len(case.names)
    diagonal = [j * (j + 3) // 2 for j in range(p)]

    def advice(draws: _Draws) -> str:
        k_jj, j_jj = draws.outer.mean(0)[diagonal], -draws.curvature.mean(0)[diagonal]
        live = k_jj > 0
        if not bool((j_jj[live].abs() > 1e-6 * k_jj[live]).any()):
            return "its second derivative is zero where its score varies: not smooth enough (|x|, ReLU), or detached"
        ratio = (k_jj[live] / j_jj[live]).median().item()
        seen = f"E[u uᵀ] is {ratio:.3g} times −E[∇u]"
        if ratio < 0:
            return f"{seen}: the sign of the scalar is flipped"
        return (
            f"{seen}: a factor of that size in front of the scalar (−2 log L, a sum where a mean was meant), "
            "or a simulator whose noise is not the one that log_evidence assumes"
        )

    return _identity(
        case,
        lambda draws, k: (draws.outer + draws.curvature, draws.floor2),
        "E[u uᵀ + ∇u] must be 0 where the data are drawn at θ",
        _pair_label(case),
        advice,
    )


def _check_information(case: _Case) -> str:
    if not case.given.has_expected_information:
        raise _Skip("no closed form")
    p = len(case.names)
    with torch.no_grad():
        information = case.exact.expected_information(case.theta)
        single = case.exact.expected_information(case.theta[0])
    for value, expected in ((information, (len(case.theta), p, p)), (single, (p, p))):
        if value.shape != expected:
            raise ContractError(
                f"expected_information must map (*batch, {p}) to {expected}, got {tuple(value.shape)}; keep the batch"
            )
    if not bool(torch.isfinite(information).all()):
        raise ContractError("the expected information must be finite, got NaN or infinity; choose θ inside the bounds")
    for k, matrix in enumerate(information):
        skew = (matrix - matrix.T).abs().max().item()
        if skew > 1e-9 * matrix.abs().max().item():
            seen = f"entries {skew:.3g} apart at theta[{k}]"
            raise ContractError(f"the expected information must be symmetric, got {seen}; it is E[u uᵀ]")
        unit = matrix * case.scale[:, None] * case.scale
        eigenvalues = torch.linalg.eigvalsh(unit)
        if eigenvalues[0] < -1e-9 * eigenvalues.abs().max():
            raise ContractError(
                f"the expected information must have no eigenvalue < 0, got {eigenvalues[0].item():.3g} at theta[{k}] "
                "(in units of θ); it is E[u uᵀ], minus the mean Hessian"
            )
    if not case.given.has_simulator:
        return "symmetric, no negative eigenvalue; not compared with scores, since it does not simulate"
    _after_first(case)
    lower = torch.tril_indices(p, p, device=case.device)
    return _identity(
        case,
        lambda draws, k: (draws.outer - information[k][lower[0], lower[1]], draws.floor2),
        "expected_information must be E[u uᵀ] at data drawn at θ",
        _pair_label(case),
        lambda draws: "recompute the closed form for one observation, in the order of parameter_names",
    )


def _show(values: Tensor) -> str:
    return "[" + ", ".join(f"{v:.6g}" for v in values.flatten().tolist()) + "]"


_CHECKS: dict[str, Callable[[_Case], str]] = {
    "shape": _check_shape,
    "finite": _check_finite,
    "elements": _check_elements,
    "score": _check_score,
    "hessian": _check_hessian,
    "precision": _check_precision,
    "state": _check_state,
    "deterministic": _check_deterministic,
    "simulate": _check_simulate,
    "configuration": _check_configuration,
    "save and load": _check_save,
    "first Bartlett identity": _check_first,
    "second Bartlett identity": _check_second,
    "expected information": _check_information,
}
