"""One run of a Pyro model: every latent is given its value, every site's log-density is kept.

The model is written for one observation. What runs it for many is ``torch.vmap`` around :meth:`Program.log_joint`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.poutine import block
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, biject_to

from engine.errors import ModalityError
from modalities._batched import Batched
from modalities._elimination import Factor, Variable, eliminate
from modalities._pyro_distributions import draw, family, middle, possible

__all__ = ["Latent", "Program", "Structure", "vectorised"]

_LOCK = threading.RLock()  # Pyro's stack of handlers is one for all threads
_SAME = "the sites of a model must be the same for every θ and x"


@dataclass(frozen=True)
class Latent:
    """A latent site: its name, family, shape, and where it is found.

    Attributes:
        name, family: Of the site and its distribution.
        shape: Of its value.
        free: Of its unconstrained value; None for a discrete one.
        start: Where its unconstrained entries begin among those of all; for a discrete one, its number.
        values: How many values a discrete one has; 0 for a continuous one.
    """

    name: str
    family: str
    shape: torch.Size
    free: torch.Size | None
    start: int
    values: int = 0


@dataclass(frozen=True)
class Structure:
    """What a model consists of, whatever its θ and x.

    Attributes:
        latents: By name, in the order of the run.
        nesting: How many dimensions its plates take.
        size: The number D of unconstrained entries of its continuous latents.
        observed: Names of its observed sites.
    """

    latents: Mapping[str, Latent]
    nesting: int
    size: int
    observed: tuple[str, ...]

    @property
    def continuous(self) -> tuple[str, ...]:
        """Names of the latents that an integral is over."""
        return tuple(s.name for s in self.latents.values() if s.free is not None)

    @property
    def discrete(self) -> tuple[str, ...]:
        """Names of the latents that are summed."""
        return tuple(s.name for s in self.latents.values() if s.free is None)


@dataclass
class _Seen:
    """One site of one run."""

    name: str
    fn: Any
    value: Tensor
    log_prob: Tensor
    plates: dict[str, tuple[int, int]]  # name -> dimension, size
    latent: bool


class Program:
    """A Pyro model with the names of its θ and its known inputs.

    Arguments:
        model: Called as ``model(theta, x, **inputs)`` with θ by name, for one observation.
        names: The components of θ.
        normalised: Whether factors and scales are refused.
    """

    def __init__(self, model: Callable[..., Any], names: tuple[str, ...], normalised: bool) -> None:
        self.model, self.names, self.normalised = model, names, normalised
        self.title = f"model '{getattr(model, '__name__', type(model).__name__)}'"

    def structure(self, theta: Tensor, x: Tensor, inputs: Mapping[str, Tensor]) -> Structure:
        """What the model consists of, from one run at θ (P_m,) and x (*event_shape).

        Raises:
            ModalityError: for a model that cannot be integrated; the message names the site.
        """
        latents: dict[str, Latent] = {}
        count = [0, 0]  # unconstrained entries, discrete latents

        def choose(msg: Any) -> Tensor:
            name, fn = msg["name"], msg["fn"]
            kind, support = family(fn), self._support(msg)
            if support.is_discrete:
                if not fn.has_enumerate_support:
                    raise ModalityError(
                        f"a discrete latent of {self.title} must have finitely many values, got '{name}' ~ {kind}, which "
                        "cannot be enumerated; sum it by hand (a negative binomial for Gamma and Poisson), or cut it off in a Categorical"
                    )
                values = fn.enumerate_support(expand=False)
                latents[name] = Latent(name, kind, fn.shape(), None, count[1], len(values))
                count[1] += 1
                return values[0].expand(fn.shape())
            free = middle(fn, support)
            value = biject_to(support)(free)
            latents[name] = Latent(name, kind, value.shape, free.shape, count[0])
            count[0] += free.numel()
            return value

        visit = self._run(theta, x, inputs, choose)
        observed = [s for s in visit.seen if not s.latent]
        if not observed:
            raise ModalityError(
                f"{self.title} must have an observed site, got {_listed(latents) or 'no site at all'}; pass the data to "
                "one of them, pyro.sample(..., obs=x)"
            )
        nesting = max(len(s.log_prob.shape) for s in visit.seen)
        for s in visit.seen if count[1] else ():
            stray = [i for i, n in enumerate(reversed(s.log_prob.shape), 1) if n > 1 and -i not in _dims(s)]
            if stray:
                raise ModalityError(
                    f"with discrete latents every dimension of a site must be an event or a plate, got shape "
                    f"{tuple(s.log_prob.shape)} of '{s.name}' in {self.title}, whose dimension {-stray[0]} is neither; "
                    "put it into a pyro.plate, or use .to_event()"
                )
        return Structure(latents, nesting, count[0], tuple(s.name for s in observed))

    def start(self, structure: Structure, theta: Tensor, x: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained latents (D,) in the middle of the prior at θ (P_m,)."""
        found: list[Tensor] = []

        def choose(msg: Any) -> Tensor:
            site, fn = self._known(structure, msg), msg["fn"]
            if site.free is None:
                return fn.enumerate_support(expand=False)[0].expand(site.shape)
            support = self._support(msg)
            free = middle(fn, support)
            found.append(free.reshape(-1))
            return biject_to(support)(free)

        self._run(theta, x, inputs, choose)
        return torch.cat(found)

    def log_joint(
        self,
        structure: Structure,
        theta: Tensor,
        x: Tensor,
        inputs: Mapping[str, Tensor],
        free: Tensor,
        quantiles: bool = False,
    ) -> Tensor:
        """log p(x, z | θ) + log |dz/du|, a scalar, summed over discrete latents.

        Arguments:
            structure: Of the model.
            theta, x: Of shape (P_m,) and event_shape.
            inputs: The model's known quantities.
            free: Unconstrained continuous latents u, shape (D,).
            quantiles: Whether ``free`` are quantiles of the latents' priors instead; log p(x | z, θ) is returned then.
        """
        slopes: list[Tensor] = []
        variables: list[Variable] = []

        def choose(msg: Any) -> Tensor:
            site, fn = self._known(structure, msg), msg["fn"]
            frames = [f for f in msg["cond_indep_stack"] if f.vectorized]
            if site.free is None:
                dim = -1 - structure.nesting - site.start
                variables.append(Variable(site.name, dim, frozenset(f.name for f in frames)))
                values = fn.enumerate_support(expand=False)
                return values.reshape(len(values), *[1] * (-1 - dim), *fn.event_shape)
            part = free[site.start : site.start + math.prod(site.free)]
            if quantiles:
                value = self._quantile(msg, part.reshape(site.shape))
            else:
                transform = biject_to(self._support(msg))
                u = part.reshape(site.free)
                value = transform(u)
                slopes.append(transform.log_abs_det_jacobian(u, value).sum())
            if value.shape != site.shape:
                raise ModalityError(
                    f"where a continuous latent can be must not depend on a discrete one, got '{site.name}' ~ {site.family} "
                    f"of shape {tuple(value.shape)} in {self.title}; scale it outside of its distribution"
                )
            return value

        visit = self._run(theta, x, inputs, choose)
        missing = structure.latents.keys() - {s.name for s in visit.seen if s.latent}
        if missing:
            raise ModalityError(
                f"{_SAME}, but {_listed(sorted(missing))} of {self.title} is missing in some; always sample it"
            )
        seen = [s for s in visit.seen if not (quantiles and s.latent and structure.latents[s.name].free is not None)]
        if variables:
            rank, dims = structure.nesting + len(structure.discrete), {}
            factors = []
            for s in seen:
                value = s.log_prob.reshape((1,) * (rank - s.log_prob.dim()) + s.log_prob.shape)
                sizes = list(value.shape)
                for name, (dim, size) in s.plates.items():
                    dims[name], sizes[dim] = dim, size
                factors.append(Factor(value.expand(sizes), frozenset(s.plates)))
            total = eliminate(factors, variables, dims)
        else:
            total = torch.stack([s.log_prob.sum() for s in seen]).sum()
        return total + torch.stack(slopes).sum() if slopes else total

    def site_log_probs(
        self, structure: Structure, theta: Tensor, x: Tensor, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The log-density of every site in the middle of the prior, for messages."""

        def choose(msg: Any) -> Tensor:
            site, fn = self._known(structure, msg), msg["fn"]
            if site.free is None:
                return fn.enumerate_support(expand=False)[0].expand(site.shape)
            support = self._support(msg)
            return biject_to(support)(middle(fn, support))

        return {s.name: s.log_prob for s in self._run(theta, x, inputs, choose).seen}

    def draw(self, theta: Tensor, x: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """One observation, from the run of a model whose observed sites are drawn too; x says its shape alone.

        Raises:
            ModalityError: where the model neither returns an observation nor has one observed site of its shape.
        """
        visit = self._run(theta, x, inputs, self._drawn, drawn=True)
        value = visit.result
        observed = [s for s in visit.seen if not s.latent]
        if value is None and len(observed) == 1:
            value = observed[0].value
        if not isinstance(value, Tensor) or value.shape != x.shape:
            seen = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            seen = f"{len(observed)} observed sites and nothing returned" if value is None else seen
            raise ModalityError(
                f"{self.title} must return an observation of shape {tuple(x.shape)} to be simulated, or observe one site of "
                f"that shape, got {seen}; return what its observed sites give, put together like x"
            )
        return value.to(torch.float64)

    def _drawn(self, msg: Any) -> Tensor:
        try:
            return draw(msg["fn"])
        except RuntimeError as error:
            raise ModalityError(
                f"site '{msg['name']}' ~ {family(msg['fn'])} of {self.title} cannot be drawn in a batch: "
                f"{_first_line(error)}; write it with other distributions, or pass a simulator of your own"
            ) from error

    def _run(
        self,
        theta: Tensor,
        x: Tensor,
        inputs: Mapping[str, Tensor],
        choose: Callable[[Any], Tensor],
        drawn: bool = False,
    ) -> _Visit:
        """One run, whose latents are chosen; what it raises names the site that it had come to."""
        visit = _Visit(self, choose, drawn)
        try:
            with _LOCK, block(), visit:
                visit.result = self.model(dict(zip(self.names, theta.unbind(-1), strict=True)), x, **inputs)
        except ModalityError:
            raise
        except Exception as error:
            after = f" after site '{visit.seen[-1].name}'" if visit.seen else ""
            at = f" at site '{visit.at}'" if visit.at else after
            text = str(error)
            if "vmap" in text and ("data-dependent" in text or ".item()" in text or "dynamic shape" in text):
                raise ModalityError(
                    f"{self.title} must not let Python look at values, since it runs for a batch of θ and x at once, got "
                    f"{_first_line(error)!r}{at}; replace if by torch.where, indexing by a mask by torch.where or poutine.mask"
                ) from error
            raise ModalityError(
                f"{self.title} must run for θ of {', '.join(self.names)}, each a number, and one observation x of shape "
                f"{tuple(x.shape)}, got {type(error).__name__}{at}: {_first_line(error)}; correct it there"
            ) from error
        return visit

    def _known(self, structure: Structure, msg: Any) -> Latent:
        site = structure.latents.get(msg["name"])
        if site is None:
            raise ModalityError(f"{_SAME}, but '{msg['name']}' of {self.title} is new in some; always sample it")
        return site

    def _support(self, msg: Any) -> Any:
        try:
            return msg["fn"].support
        except NotImplementedError as error:
            raise ModalityError(
                f"a latent must say what values it can have, got '{msg['name']}' ~ {family(msg['fn'])} of {self.title}, which "
                "has no support; write it with another distribution"
            ) from error

    def _quantile(self, msg: Any, q: Tensor) -> Tensor:
        fn = msg["fn"]
        while isinstance(fn, Independent):
            fn = fn.base_dist
        try:
            return fn.icdf(q)
        except NotImplementedError as error:
            raise ModalityError(
                f"a latent whose prior is the proposal must have quantiles, got '{msg['name']}' ~ {family(fn)} of {self.title}; "
                "use proposal='laplace'"
            ) from error


class _Visit(Messenger):
    """Pyro's handler for one run."""

    def __init__(self, program: Program, choose: Callable[[Any], Tensor], drawn: bool) -> None:
        super().__init__()
        self.program, self.choose, self.drawn = program, choose, drawn
        self.seen: list[_Seen] = []
        self.at: str | None = None
        self.result: Any = None

    def _pyro_param(self, msg: Any) -> None:
        raise ModalityError(
            f"a model must not have parameters of its own, which Pyro would keep for the whole process, got "
            f"pyro.param('{msg['name']}') in {self.program.title}; name it among parameter_names, or pass it through inputs"
        )

    def _pyro_sample(self, msg: Any) -> None:
        self.at = msg["name"]
        if type(msg["fn"]).__name__ == "_Subsample":
            self._refuse_subsampling(msg)
        elif any(s.name == msg["name"] for s in self.seen):
            raise ModalityError(
                f"a site must have a name of its own, got '{self.at}' twice in {self.program.title}; rename one"
            )
        elif _is_factor(msg) or msg["infer"].get("_deterministic"):
            return
        elif msg["is_observed"]:
            if self.drawn:
                msg["value"] = self.choose(msg)
        else:
            msg["value"], msg["done"] = self.choose(msg), True

    def _pyro_post_sample(self, msg: Any) -> None:
        self.at = None
        if type(msg["fn"]).__name__ == "_Subsample" or msg["infer"].get("_deterministic"):
            return
        scaled = not (isinstance(msg["scale"], int | float) and msg["scale"] == 1.0)
        if self.program.normalised and (scaled or _is_factor(msg)):
            what = "a factor" if _is_factor(msg) else "a scaled site"
            raise ModalityError(
                f"a normalised model is made of densities alone, got {what}, '{msg['name']}', in {self.program.title}; "
                "pass normalised=False, and no Bayes factor or test of fit will be taken from it"
            )
        fn, value = msg["fn"], msg["value"]
        log_prob = fn.log_prob(value)
        if not self.drawn:
            log_prob = torch.where(possible(fn, value, log_prob.dim()), log_prob, -math.inf)
        if msg["mask"] is not None:
            log_prob = torch.where(torch.as_tensor(msg["mask"]), log_prob, 0.0)
        if scaled:
            log_prob = log_prob * msg["scale"]
        plates = {f.name: (f.dim, f.size) for f in msg["cond_indep_stack"] if f.vectorized}
        latent = not msg["is_observed"]
        self.seen.append(_Seen(msg["name"], fn, value, log_prob, plates, latent))

    def _refuse_subsampling(self, msg: Any) -> None:
        fn, value = msg["fn"], msg["value"]
        size = fn.subsample_size if value is None else len(value)
        if size is not None and size < fn.size:
            raise ModalityError(
                f"a plate must not be subsampled, since the scalar must be the same each time, got {size} of {fn.size} in "
                f"plate '{msg['name']}' of {self.program.title}; leave subsample_size and subsample out"
            )


def vectorised(
    function: Callable[..., Tensor], in_dims: tuple[int | None, ...], *args: Tensor, random: bool = False
) -> Tensor:
    """``torch.vmap`` of a function that runs a model."""
    with Batched():
        return torch.vmap(function, in_dims, randomness="different" if random else "error")(*args)


def _is_factor(msg: Any) -> bool:
    return isinstance(msg["fn"], Unit)


def _dims(site: _Seen) -> set[int]:
    return {dim for dim, _ in site.plates.values()}


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n") or [""])[0][:300]
