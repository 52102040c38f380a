r"""The sum :math:`S(\theta) = \sum_m \sum_i s_m(x_{mi}; \theta)`, with its score and information.

Value, score :math:`\nabla S` and observed information :math:`-\nabla^2 S` come from one pass: the scalar of each
plugin is differentiated with respect to the parameters it depends on, by reverse mode twice, and scattered
into θ's order. What must not matter does not:

- plugins are summed in the order of their names, so that every order of appending gives the same bits;
- observations are read in blocks whose length follows from their shape alone; block sums are added with the
  rounding error carried along (Neumaier 1974), so that permuted observations and other blocks agree to 1e-12;
- each plugin is evaluated in the dtype of its own weights, and everything from its scalar on is float64.

Plugins of one class and shape that allow it (:meth:`engine.modality.Modality.stack_key`) are evaluated in one
call by ``torch.func.stack_module_state`` and ``vmap``.

References:
    | Neumaier, Z. Angew. Math. Mech. 54 (1974) 39, compensated summation
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModalityError, ParameterError
from engine.modality import Modality
from engine.observations import Observations
from engine.parameters import ParameterSpace
from engine.terms import ELEMENTS, Term, gradient, observation_scores
from engine.threads import small_work

__all__ = ["Contribution", "Derivatives", "Evidence"]

_STACK_FROM = 8  # fewer plugins than this are quicker one by one than through vmap


@dataclass(frozen=True, eq=False)
class Derivatives:
    """S and what curvature needs, at K points.

    Attributes:
        value: S in nats, shape (K,).
        score: ∇S in nats per unit of θ, shape (K, P).
        information: −∇²S, the observed information, shape (K, P, P).
        resolution: The rounding error to expect in ``value``, in nats, shape (K,).

    Example:
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> modality = Gaussian(parameter_names=("mu",), sd=2.0)
        >>> evidence = Evidence(ParameterSpace([Parameter("mu")]), {"a": modality}, {"a": [[1.0], [3.0]]})
        >>> at = evidence.derivatives(torch.tensor([[0.0], [2.0]]))
        >>> at.score.tolist(), at.information.tolist()
        ([[1.0], [0.0]], [[[0.5]], [[0.5]]])
    """

    value: Tensor
    score: Tensor
    information: Tensor
    resolution: Tensor


@dataclass(frozen=True, eq=False)
class Contribution:
    """One plugin's part of the sum at one θ, in θ's full order.

    Attributes:
        log_evidence: The plugin's sum over its observations, in nats.
        score: Its gradient, shape (P,).
        information: Its observed information, shape (P, P).
        observations: How many observations it had; 0 for the prior.

    Example:
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> modality = Gaussian(parameter_names=("mu",), sd=2.0)
        >>> evidence = Evidence(ParameterSpace([Parameter("mu")]), {"a": modality}, {"a": [[1.0], [3.0]]})
        >>> part = evidence.contributions(torch.tensor([2.0]))["a"]
        >>> round(part.log_evidence, 6), part.observations  # −log(2π) − 2 log 2 − 1/4
        (-3.474171, 2)
    """

    log_evidence: float
    score: Tensor
    information: Tensor
    observations: int


class Evidence:
    """The sum of several plugins' scalars over one analysis's data, as a function of θ.

    Arguments:
        parameters: The space whose order θ follows.
        modalities: The plugins there are, by name.
        data: Observations by plugin name (any subset), or :class:`engine.observations.Observations`.
        prior: Whether to add the log prior density of ``parameters``, once.
        allow_identical: See :class:`engine.observations.Observations`.
        block: Observations evaluated together; leave it out, it is for tests of the sum itself.

    Raises:
        ModalityError: when a plugin names a parameter that is not there; and, while evaluating, when it
            raises, returns anything but one finite scalar (or −∞) for each pair, or loses its gradient.
        ObservationError, UnknownPluginError: see :class:`engine.observations.Observations`.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu")])
        >>> modality = Gaussian(parameter_names=("mu",), sd=2.0)
        >>> evidence = Evidence(space, {"a": modality}, {"a": [[1.0], [3.0]]})
        >>> at = evidence.derivatives(torch.tensor([[2.0]]))
        >>> at.score.tolist(), at.information.tolist()
        ([[0.0]], [[[0.5]]])
    """

    def __init__(
        self,
        parameters: ParameterSpace,
        modalities: Mapping[str, Modality],
        data: Any,
        *,
        prior: bool = False,
        allow_identical: bool = False,
        block: int | None = None,
    ) -> None:
        self.parameters = parameters
        self.prior = prior
        if not isinstance(data, Observations):
            data = Observations(data, modalities, allow_identical=allow_identical, block=block)
        self.observations: Observations = data
        self.names: tuple[str, ...] = tuple(sorted(data))
        self.modalities = {name: modalities[name] for name in self.names}
        for name, modality in self.modalities.items():
            if absent := [p for p in modality.parameter_names if p not in parameters]:
                raise ModalityError(
                    f"plugin '{name}' depends on the parameter '{absent[0]}', which is not among {', '.join(parameters.names)}"
                )
        self._terms = self._group(block)
        self._size = sum(n * modalities[name].event_shape.numel() for name, n in data.lengths.items())
        order = [name for term in self._terms for name in term.names]
        position = {name: i for i, name in enumerate(order)}
        self._sorted = None if order == sorted(order) else torch.tensor([position[name] for name in self.names])

    def only(self, names: Sequence[str]) -> Evidence:
        """The sum over some of the plugins, of the same data.

        Arguments:
            names: Which plugins; at least one.

        Raises:
            ObservationError: for a plugin that has no data here.
        """
        return Evidence(self.parameters, self.modalities, self.observations.only(names), prior=self.prior)

    def _group(self, block: int | None) -> list[Term]:
        groups: dict[Any, list[str]] = {}
        for name, modality in self.modalities.items():
            key: Any = name
            stack = modality.stack_key()
            if stack is not None and block is None and self.observations.lengths[name] <= 4096:
                tensors = [(k, t.shape, t.dtype) for k, t in (*modality.named_parameters(), *modality.named_buffers())]
                shape = (self.observations.lengths[name], *modality.event_shape)
                key = (type(modality), stack, repr(tensors), shape, len(modality.parameter_names))
            groups.setdefault(key, []).append(name)
        terms = []
        for names in groups.values():
            batches = [names] if len(names) >= _STACK_FROM else [[name] for name in names]
            terms += [Term(b, [self.modalities[n] for n in b], self.parameters, self.observations) for b in batches]
        return terms

    def value(self, theta: Tensor) -> Tensor:
        """S(θ) in nats. Differentiable where θ requires a gradient.

        Arguments:
            theta: K points, shape (K, P).

        Returns:
            Shape (K,), float64; −∞ where θ makes the data impossible.

        Raises:
            ParameterError: for a θ of another shape, NaN or infinite.
            ModalityError: when a plugin breaks its contract; the message names plugin, θ and observation.
        """
        theta = self._points(theta)
        keep = torch.is_grad_enabled() and theta.requires_grad
        with torch.set_grad_enabled(keep), small_work(self._size * len(theta)):
            total = self._add([term.value(theta) for term in self._terms], theta)
            return total + self.parameters.log_prior(theta) if self.prior else total

    def _points(self, theta: Tensor) -> Tensor:
        theta = self.parameters.check_theta(theta)
        if theta.dim() != 2:
            raise ParameterError(
                f"θ must have shape (K, {len(self.parameters)}), K points at once, got {tuple(theta.shape)}; add an axis: theta[None]"
            )
        return theta

    def _add(self, parts: list[Tensor], theta: Tensor) -> Tensor:
        """Σ over plugins in the order of their names: parts (G, K) of each term -> (K,)."""
        stacked = torch.cat(parts)
        total = (stacked if self._sorted is None else stacked[self._sorted]).sum(0)
        checked = total.detach()
        if not bool((checked < torch.inf).all()):  # false for NaN too
            for term, part in zip(self._terms, parts, strict=True):
                if not bool((part.detach() < torch.inf).all()):
                    term.refuse_bad(theta)
            raise ModalityError("the sum of the scalars is not a number: they overflow; check for values near 1e308")
        return total

    def derivatives(self, theta: Tensor) -> Derivatives:
        """S, ∇S, −∇²S and the resolution of S in one pass.

        Arguments:
            theta: K points, shape (K, P).

        Raises:
            ParameterError, ModalityError: as :meth:`value`; also for a derivative that is not finite where S is.
        """
        theta = self._points(theta).detach()
        K, P = theta.shape
        score = torch.zeros(K, P, dtype=torch.float64)
        information = torch.zeros(K, P * P, dtype=torch.float64)
        values, resolutions = [], []
        for term in self._terms:
            with small_work(self._size * K):
                value, local_score, local_information, resolution = term.derivatives(theta)
            values.append(value)
            resolutions.append(resolution)
            score.index_add_(1, term.index.reshape(-1), local_score.movedim(1, 0).reshape(K, -1))
            pairs = term.index[:, :, None] * P + term.index[:, None, :]
            information.index_add_(1, pairs.reshape(-1), local_information.movedim(1, 0).reshape(K, -1))
        total = self._add(values, theta)
        information = information.reshape(K, P, P)
        if self.prior:
            log_prior, prior_score, prior_information = self.prior_derivatives(theta)
            total, score, information = total + log_prior, score + prior_score, information + prior_information
        return Derivatives(total, score, information, torch.cat(resolutions).sum(0))

    def prior_derivatives(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log π(θ) in nats, its gradient and −∇² log π.

        Arguments:
            theta: K points, shape (K, P), float64.

        Returns:
            Shapes (K,), (K, P) and (K, P, P).
        """
        return prior_derivatives(self.parameters, theta)

    def contributions(self, theta: Tensor) -> dict[str, Contribution]:
        """Each plugin's part of S at one point.

        Arguments:
            theta: θ, shape (P,).

        Returns:
            Plugin -> its part; the prior's under ``"prior"`` where it is part of S.

        Raises:
            ParameterError: for a θ of another shape.
            ModalityError: for a plugin that raises, returns another shape or dtype, or loses its gradient.
        """
        theta = self.parameters.tensor(theta)[None]
        P = len(self.parameters)
        out: dict[str, Contribution] = {}
        for term in self._terms:
            value, score, information, _ = term.derivatives(theta)
            if not bool((value < torch.inf).all()):
                term.refuse_bad(theta)
            for g, name in enumerate(term.names):
                index = term.index[g]
                full_score, full = torch.zeros(P, dtype=torch.float64), torch.zeros(P, P, dtype=torch.float64)
                full_score[index] = score[g, 0]
                full[index[:, None], index] = information[g, 0]
                out[name] = Contribution(float(value[g, 0]), full_score, full, self.observations.lengths[name])
        out = {name: out[name] for name in self.names}
        if self.prior:
            value, score, information = self.prior_derivatives(theta)
            out["prior"] = Contribution(float(value[0]), score[0], information[0], 0)
        return out

    def refuse_random(self, theta: Tensor) -> None:
        """Compare each plugin's scalar with itself, asked again at one point.

        Arguments:
            theta: θ, shape (P,), where S is finite.

        Raises:
            ModalityError: for a plugin whose scalar is not the same twice.
        """
        theta = self.parameters.tensor(theta)[None]
        with torch.no_grad():
            for term in self._terms:
                term.refuse_random(theta)

    def check(self, theta: Tensor) -> list[str]:
        """Whether each plugin keeps its word where it matters: at an estimate.

        An observation alone must score as it does among the others, and the scalar must move as its derivatives
        say. A tenth of a standard error to either side, S must change by g h − ½ J h²; where the two sides differ from
        each other, there is a kink, at which the curvature depends on the side.

        Arguments:
            theta: θ̂, shape (P,).

        Returns:
            The parameters along which some plugin has a kink, at most once each.

        Raises:
            ModalityError: for a plugin whose scalar depends on what it is evaluated with, or is not what its
                derivatives are the derivatives of.
        """
        theta = self.parameters.tensor(theta)
        total = self.derivatives(theta[None]).information[0].diagonal()
        kinks: list[str] = []
        for name, modality in self.modalities.items():
            term = Term([name], [modality], self.parameters, self.observations)
            local = theta[term.index[0]]
            term.refuse_company(local)
            at = term.derivatives(theta[None])
            curvature = total[term.index[0]]
            step = 0.1 / curvature.clamp_min(1e-300).sqrt()
            part = 0.5 * curvature * step**2  # of S, so that a plugin that hardly matters hardly counts
            lower, upper = self.parameters.lower[term.index[0]], self.parameters.upper[term.index[0]]
            look = (lower <= local - step) & (local + step <= upper) & ~(at[3][0, 0] > 1e-3 * part)
            if not bool(look.any()):
                continue
            n = len(local)
            points = theta.repeat(2 * n, 1)
            points[torch.arange(2 * n), term.index[0].repeat(2)] += torch.cat([step, -step])
            points = torch.where(look.repeat(2)[:, None], points, theta)
            change = (self._part(term, points) - at[0][0, 0]).reshape(2, n)
            signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
            missing = change - signs * at[1][0, 0] * step + 0.5 * at[2][0, 0].diagonal() * step**2
            for j in look.nonzero()[:, 0].tolist():
                up, down = missing[:, j].tolist()
                parameter = modality.parameter_names[j]
                if not math.isfinite(up + down) or max(abs(up), abs(down)) < 0.15 * float(part[j]):
                    continue
                if abs(up - down) > 0.5 * (abs(up) + abs(down)):  # the sides differ
                    kinks += [] if parameter in kinks else [parameter]
                else:
                    raise ModalityError(
                        f"the scalar of plugin '{name}' and its derivatives disagree along '{parameter}' at {float(local[j]):.6g}: "
                        "a part of it is detached from θ, or a derivative is written wrongly; try engine.testing.check_modality"
                    )
        return kinks

    @staticmethod
    def _part(term: Term, theta: Tensor) -> Tensor:
        with torch.no_grad():
            return term.value(theta)[0]

    def scores(self, theta: Tensor) -> dict[str, Tensor]:
        """The score of every single observation at one point.

        Arguments:
            theta: θ, shape (P,).

        Returns:
            Plugin -> ∇s for each of its N observations, shape (N, P), float64.

        Raises:
            ParameterError: for a θ of another shape.
            ModalityError: for a plugin that raises, or returns another shape or dtype.
        """
        theta = self.parameters.tensor(theta)
        out: dict[str, Tensor] = {}
        for name, modality in self.modalities.items():
            term = Term([name], [modality], self.parameters, self.observations)
            rows = [observation_scores(term, x[0, 0], theta[term.index[0]]) for x in term.blocks()]
            local = torch.cat(rows)
            full = torch.zeros(len(local), len(self.parameters), dtype=torch.float64)
            full[:, term.index[0]] = local
            out[name] = full
        return out

    def score_noise(self, theta: Tensor) -> dict[str, Tensor]:
        """The covariance of the Monte Carlo error of the score at one point, of each plugin whose scalar is made of draws.

        Arguments:
            theta: θ, shape (P,).

        Returns:
            Plugin -> covariance of its part of ∇S, shape (P, P), float64; nothing for plugins without such an error.

        Raises:
            ParameterError: for a θ of another shape.
            ModalityError: for a plugin that returns another shape.
        """
        theta = self.parameters.tensor(theta)
        out: dict[str, Tensor] = {}
        for name, modality in self.modalities.items():
            if not modality.has_score_noise:
                continue
            index = torch.tensor(self.parameters.indices(modality.parameter_names))
            noise = modality.score_noise(self.observations[name], theta[index]).to(torch.float64)
            if noise.shape != (len(index), len(index)):
                raise ModalityError(
                    f"score_noise must have shape {(len(index), len(index))}, got {tuple(noise.shape)} from plugin '{name}'; "
                    "return the covariance of the whole score"
                )
            out[name] = torch.zeros(len(self.parameters), len(self.parameters), dtype=torch.float64)
            out[name][index[:, None], index] = noise
        return out

    def expected_information(
        self, theta: Tensor, *, names: Sequence[str] | None = None, simulations: int = 20_000, seed: int = 0
    ) -> dict[str, Tensor]:
        """Fisher's expected information of each plugin for its number of observations.

        The closed form where the modality has one; otherwise the covariance of the scores of simulated
        observations. The prior, which has no data, adds nothing here.

        Arguments:
            theta: θ, shape (P,).
            names: Plugins to look at; all by default.
            simulations: How many observations are simulated where there is no closed form.
            seed: Of the simulations.

        Returns:
            Plugin -> its information, shape (P, P), float64.

        Raises:
            ModalityError: for a plugin that has neither a closed form nor a simulator.
        """
        theta = self.parameters.tensor(theta)
        out: dict[str, Tensor] = {}
        for name in self.names if names is None else names:
            modality = self.modalities[name]
            term = Term([name], [modality], self.parameters, self.observations)
            local = theta[term.index[0]]
            masks = self._masks(name)
            if modality.has_expected_information:
                total = torch.zeros(len(local), len(local), dtype=torch.float64)
                for measured, count in masks:
                    given = {} if measured is None else {"measured": measured}
                    total += count * checked_information(name, modality, local.to(term.dtype), given)
            elif modality.has_simulator:
                total = torch.cov(self._simulated_scores(term, local, masks, simulations, seed).T).reshape(
                    len(local), -1
                )
                total = total * self.observations.lengths[name]
            else:
                raise ModalityError(
                    f"plugin '{name}' ({type(modality).__name__}) has neither expected_information nor simulate; "
                    "use the observed information, or write one of the two"
                )
            full = torch.zeros(len(self.parameters), len(self.parameters), dtype=torch.float64)
            full[term.index[0][:, None], term.index[0]] = total
            out[name] = full
        return out

    def _masks(self, name: str) -> list[tuple[Tensor | None, int]]:
        """Which entries were measured, each pattern once with its number of observations; None where all were."""
        count: Counter[bytes] = Counter()
        shape = self.modalities[name].event_shape
        if self.modalities[name].allows_missing:
            for x in self.observations.blocks(name):
                count.update(row.tobytes() for row in (~torch.isnan(x)).reshape(len(x), -1).numpy())
        if not count or all(all(key) for key in count):
            return [(None, self.observations.lengths[name])]
        return [(torch.tensor(list(key), dtype=torch.bool).reshape(shape), n) for key, n in sorted(count.items())]

    def _simulated_scores(
        self, term: Term, local: Tensor, masks: list[tuple[Tensor | None, int]], simulations: int, seed: int
    ) -> Tensor:
        """Scores (simulations, P_m) of observations simulated at local θ (P_m,), incomplete as the data are."""
        modality, generator = term.modality, torch.Generator().manual_seed(seed)
        step, rows = max(1, ELEMENTS // max(1, modality.event_shape.numel())), []
        for start in range(0, simulations, step):
            n = min(step, simulations - start)
            try:
                x = modality.simulate(local.to(term.dtype).expand(n, -1), generator)
                usable = x.shape == (n, *modality.event_shape) and bool(torch.isfinite(x).all())
            except Exception as error:
                raise ModalityError(f"{term.label} raised {type(error).__name__} in simulate: {error}") from error
            if not usable:
                raise ModalityError(
                    f"simulate must return finite values of shape {(n, *modality.event_shape)}, got {tuple(x.shape)} from {term.label}"
                )
            if masks[0][0] is not None:
                weights = torch.tensor([float(count) for _, count in masks])
                drawn = torch.multinomial(weights, n, replacement=True, generator=generator)
                x = torch.where(torch.stack([m for m, _ in masks if m is not None])[drawn], x, torch.nan)
            rows.append(observation_scores(term, x, local))
        return torch.cat(rows)


def checked_information(name: str, modality: Modality, theta: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The expected information of one observation at local θ (P_m,), refused where it is no such matrix."""
    try:
        one = modality.expected_information(theta, **given)
    except Exception as error:
        raise ModalityError(
            f"plugin '{name}' raised {type(error).__name__} in expected_information: {error}"
        ) from error
    P = len(theta)
    if not isinstance(one, Tensor) or one.shape != (P, P) or not bool(torch.isfinite(one).all()):
        seen = f"shape {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
        raise ModalityError(
            f"expected_information must be finite and of shape ({P}, {P}), got {seen} from plugin '{name}'"
        )
    return one.detach().to(torch.float64)


def prior_derivatives(space: ParameterSpace, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log π (K,) in nats, its gradient (K, P) and −∇² log π (K, P, P), at theta (K, P)."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = theta.detach().clone().requires_grad_()
        value = space.log_prior(leaf)
        score = gradient(value.sum(), leaf)
        rows = []
        for j in range(leaf.shape[-1]):
            column = score[:, j].sum()
            rows.append(-gradient(column, leaf, retain=True) if column.requires_grad else torch.zeros_like(leaf))
    return value.detach(), score.detach(), torch.stack([r.detach() for r in rows], -2)
