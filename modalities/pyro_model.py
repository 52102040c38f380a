r"""A Pyro model with its latents integrated out, :math:`s(x; \theta) = \log \int p(x, z \mid \theta)\, dz`.

Discrete latents are summed exactly, plate by plate. Over continuous ones the integral is Laplace's approximation or an
importance sum around their mode (see :mod:`modalities._latents`), a smooth and deterministic function of θ either way;
the Monte Carlo error of the second is told by :meth:`PyroModel.standard_error`, and what it does to an estimate by
:attr:`engine.result.Estimate.monte_carlo_covariance`.

References:
    | Bingham et al. (2019), Pyro: Deep universal probabilistic programming, JMLR 20, 28
    | https://arxiv.org/abs/1810.09538
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.errors import ModalityError
from engine.modality import Modality
from modalities import _latents
from modalities._predictor import check_function, check_names
from modalities._tensors import Exact, Numbers, float64, own_generator

if TYPE_CHECKING:
    from modalities._pyro_sites import Program, Structure

__all__ = ["PyroModel"]

_LATENTS = ("auto", "enumerate", "importance", "laplace")
_PROPOSALS = ("laplace", "prior")
_CHUNK = 2**20  # log-densities evaluated together
_GRAPH = 2**17  # the same where each is differentiated twice


class PyroModel(Exact, Modality):
    """Evidence from a Pyro model: its latent variables are integrated out, θ and x are its arguments.

    The model is a function ``model(theta, x, **inputs)`` of *one* observation: ``theta`` maps each name to a number (a
    tensor without dimensions), ``x`` has shape ``event_shape``, and what it observes it takes from x with ``obs=``. θ is
    no sample site: its prior is the registry's. A batch of θ and x is ``torch.vmap``'s business, so that Python must not
    look at their values (no ``if x > 0``). Within the model numbers are float64. Plates are for parts of one
    observation, without subsampling.

    Arguments:
        model: The function; one of an importable module, where the plugin is to be written to a folder.
        parameter_names: The components of θ, the keys of ``theta``.
        event_shape: The shape of one observation.
        inputs: Known quantities that the model takes as keywords, name -> numbers.
        latents: How latents go: ``"enumerate"`` (all are discrete, and summed), ``"importance"`` or ``"laplace"`` (the
            continuous ones are integrated so, the discrete ones are summed within), ``"auto"``: importance where any
            is continuous. A model without continuous latents is exact with each of them.
        samples: n of importance sampling, for each (x, θ); the standard error falls as its root.
        proposal: Where draws of the latents come from: ``"laplace"`` (Student's t with four degrees of freedom around
            their mode at this x and θ) or ``"prior"`` (by quantiles; for latents with several modes, which need more draws).
        seed: Of the draws. Another seed shows the Monte Carlo error.
        normalised: Whether s is log p(x | θ) with all constants; a model with ``pyro.factor`` or scales needs False.

    Where θ makes a distribution's parameters impossible, or x lies outside of its support, the evidence is −∞.

    Raises:
        ModalityError: for arguments that break a rule above; when evaluated, for a model that cannot be integrated,
            naming its site.

    Example:
        >>> import pyro
        >>> from pyro.distributions import Bernoulli, Normal
        >>> def two_peaks(theta, x):
        ...     right = pyro.sample("right", Bernoulli(theta["fraction"]))
        ...     pyro.sample("x", Normal(4.0 * right, 1.0), obs=x)
        >>> peaks = PyroModel(two_peaks, parameter_names=("fraction",))
        >>> [round(s, 6) for s in peaks(torch.tensor([0.0, 4.0]), torch.tensor([0.25])).tolist()]
        [-1.206509, -2.304227]
        >>> def school(theta, x, sd):
        ...     effect = pyro.sample("effect", Normal(theta["mu"], theta["tau"]))
        ...     pyro.sample("x", Normal(effect, sd), obs=x)
        >>> exact = torch.distributions.Normal(4.0, 5.0).log_prob(torch.tensor(9.0))  # √(3² + 4²)
        >>> one = PyroModel(school, parameter_names=("mu", "tau"), inputs={"sd": 4.0}, samples=1000)
        >>> x, theta = torch.tensor(9.0), torch.tensor([4.0, 3.0])
        >>> error = one.standard_error(x, theta)
        >>> bool(error < 0.02), bool((one(x, theta) - exact).abs() < 3 * error)
        (True, True)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        parameter_names: Sequence[str],
        event_shape: Sequence[int] = (),
        inputs: Mapping[str, Numbers] | None = None,
        latents: str = "auto",
        samples: int = 256,
        proposal: str = "laplace",
        seed: int = 0,
        normalised: bool = True,
    ) -> None:
        super().__init__(parameter_names=parameter_names, event_shape=event_shape)
        check_function("model", model)
        if model is None or isinstance(model, nn.Module | type):
            seen = "None" if model is None else type(model).__name__
            raise ModalityError(f"model must be a function of theta and x, got {seen}; write its forward as a function")
        for name, value, known in (("latents", latents, _LATENTS), ("proposal", proposal, _PROPOSALS)):
            if value not in known:
                raise ModalityError(f"{name} must be one of {', '.join(known)}, got {value!r}; see PyroModel")
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 2:
            raise ModalityError(f"samples must be a number >= 2, got {samples!r}; 256 is the default")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ModalityError(f"seed must be a number >= 0 below 2**63, got {seed!r}; 0 is the default")
        self.model, self.latents, self.samples, self.proposal, self.seed = model, latents, samples, proposal, seed
        self.normalised = normalised and latents != "laplace"
        self._densities = normalised
        self.input_names = check_names(inputs)
        for key, value in (inputs or {}).items():
            self.register_buffer(f"input_{key}", float64(f"inputs[{key!r}]", value), persistent=False)
        self._structure: Structure | None = None

    @property
    def dtype(self) -> torch.dtype:
        """float64."""
        return torch.float64

    @property
    def _program(self) -> Program:
        from modalities._pyro_sites import Program  # Pyro is loaded by those who use it

        return Program(self.model, self.parameter_names, self._densities)

    @property
    def _inputs(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"input_{name}") for name in self.input_names}

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """s(x; θ) in nats: x (*batch, *event_shape), θ (*batch, P_m) -> (*batch).

        Raises:
            ModalityError: for a model that cannot be integrated, or whose log-density is NaN; the message names the site.
        """
        batch, x, theta = self._flat(x, theta)
        if not len(x):
            return theta.sum() * 0.0 + torch.zeros(batch, dtype=torch.float64)
        graph = torch.is_grad_enabled() and (theta.requires_grad or x.requires_grad)
        step = self._rows_at_once(x, theta, graph)
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            parts = [self._rows(a, t, graph)[0] for a, t in zip(x.split(step), theta.split(step), strict=True)]
            return torch.cat(parts).reshape(batch)

    def standard_error(self, x: Tensor, theta: Tensor) -> Tensor:
        """The Monte Carlo standard error of s in nats: x (*batch, *event_shape), θ (*batch, P_m) -> (*batch).

        Zero where nothing is drawn. Of the error of Laplace's approximation it says nothing.
        """
        batch, x, theta = self._flat(x, theta)
        if not len(x):
            return torch.zeros(batch, dtype=torch.float64)
        step = self._rows_at_once(x, theta, False)
        with torch.inference_mode(False), torch.no_grad():
            parts = [self._rows(a, t, False)[1] for a, t in zip(x.split(step), theta.split(step), strict=True)]
        return torch.cat(parts).reshape(batch)

    def score_noise(self, x: Tensor, theta: Tensor) -> Tensor:
        """The Monte Carlo covariance of Σᵢ ∇s(xᵢ; θ) at one θ: x (N, *event_shape), θ (P_m,) -> (P_m, P_m).

        Equal observations have the same draws, so that their errors add before they are squared.
        """
        P = len(self.parameter_names)
        total = torch.zeros(P, P, dtype=torch.float64)
        if not len(x):
            return total
        rows, counts = torch.unique(x.to(torch.float64).reshape(len(x), -1), dim=0, return_counts=True)
        _, rows, points = self._flat(rows.reshape(len(rows), *self.event_shape), theta)
        if not self._draws(self._known_structure(rows, points)):
            return total
        step = self._rows_at_once(rows, points, True)
        for a, t, m in zip(rows.split(step), points.split(step), counts.split(step), strict=True):
            slopes, log_w = self._slopes(a, t)
            noise = _latents.log_mean_score_variance(slopes, log_w)
            total = total + (m.to(torch.float64).square()[:, None, None] * noise).sum(0)
        return total

    def derivatives(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s (*batch), ∇s (*batch, P_m) and −∇²s (*batch, P_m, P_m) by differentiation, so many rows at a time as memory takes."""
        batch, x, theta = self._flat(x.detach(), theta.detach())
        P, found = theta.shape[-1], []
        step = self._rows_at_once(x, theta, True) if len(x) else 1
        for a, t in zip(x.split(step), theta.split(step), strict=True) if len(x) else ():
            with torch.inference_mode(False), torch.enable_grad():
                leaf = t.clone().requires_grad_()
                s = self._rows(a.clone(), leaf, True)[0]
                u = _slope(s, leaf)
                J = -torch.stack([_slope(u[:, j], leaf, last=j == P - 1) for j in range(P)], -2)
            found.append((s.detach(), u.detach(), J.detach()))
        if not found:
            return tuple(torch.zeros(*batch, *(P,) * n, dtype=torch.float64) for n in range(3))  # pyright: ignore[reportReturnType]
        s, u, J = (torch.cat(parts) for parts in zip(*found, strict=True))
        return s.reshape(batch), u.reshape(*batch, P), J.reshape(*batch, P, P)

    @torch.no_grad()
    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One observation for each θ: (*batch, P_m) -> (*batch, *event_shape).

        It is what the model returns, or else the value of its one observed site; a model that observes several sites
        must return them put together like x. The model is run with an x of zeros, in whose place each observed site
        is drawn.

        Raises:
            ModalityError: where it does neither, or a distribution cannot be drawn in a batch.
        """
        from modalities._pyro_distributions import seeded
        from modalities._pyro_sites import vectorised

        batch = theta.shape[:-1]
        rows = theta.to(torch.float64).reshape(-1, theta.shape[-1])
        if not len(rows):
            return torch.zeros(*batch, *self.event_shape, dtype=torch.float64)
        seed = int(torch.randint(2**62, (), generator=own_generator(generator)))
        program, inputs = self._program, self._inputs
        blank = torch.zeros(self.event_shape, dtype=torch.float64)
        with seeded(seed):
            x = vectorised(lambda t: program.draw(t, blank, inputs), (0,), rows, random=True)
        return x.reshape(batch + self.event_shape)

    def _flat(self, x: Tensor, theta: Tensor) -> tuple[torch.Size, Tensor, Tensor]:
        """The batch, x (R, *event_shape) and θ (R, P_m), float64."""
        x, theta = (_usable(t.to(torch.float64)) for t in (x, theta))
        batch = torch.broadcast_shapes(x.shape[: x.dim() - len(self.event_shape)], theta.shape[:-1])
        rows = x.expand(batch + self.event_shape).reshape(batch.numel(), *self.event_shape)
        return batch, rows, theta.expand(batch + theta.shape[-1:]).reshape(batch.numel(), theta.shape[-1])

    def _known_structure(self, x: Tensor, theta: Tensor) -> Structure:
        """What the model consists of, found once."""
        if self._structure is None:
            from modalities._batched import Batched

            with Batched(), torch.no_grad():
                found = self._program.structure(theta[0].detach(), x[0].detach(), self._inputs)
            if self.latents == "enumerate" and found.continuous:
                site = found.latents[found.continuous[0]]
                raise ModalityError(
                    f"latents='enumerate' needs latents with finitely many values, got '{site.name}' ~ {site.family} in "
                    f"{self._program.title}; use latents='importance' or 'laplace'"
                )
            self._structure = found
        return self._structure

    def _draws(self, structure: Structure) -> bool:
        return bool(structure.size) and self.latents != "laplace"

    def _rows_at_once(self, x: Tensor, theta: Tensor, graph: bool) -> int:
        structure = self._known_structure(x, theta)
        each = max(1, math.prod(self.event_shape)) * (1 + structure.size)
        return max(1, (_GRAPH if graph else _CHUNK) // (each * (self.samples if self._draws(structure) else 1)))

    def _rows(self, x: Tensor, theta: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
        """s (R) and its Monte Carlo error (R) at x (R, *event_shape) and θ (R, P_m)."""
        structure = self._known_structure(x, theta)
        exact = torch.zeros(len(x), dtype=torch.float64)
        if not structure.size:
            value, error = self._joint(structure, x, theta)(exact[:, None, None][..., :0])[:, 0], exact
        elif self.latents == "laplace":
            f = self._joint(structure, x, theta)
            still = self._joint(structure, x.detach(), theta.detach())
            value, found = _latents.laplace(f, still, self._start(structure, x, theta), graph)
            lost = ~found & value.detach().isfinite()
            if bool(lost.any()):
                raise ModalityError(
                    f"Laplace's approximation needs a maximum of the latents, got none for {', '.join(structure.continuous)} of "
                    f"{self._program.title} at {self._where(theta[lost][0])}; use latents='importance', or give them proper priors"
                )
            error = exact
        else:
            value, error = _latents.log_mean(self._log_weights(structure, x, theta, graph))
        if bool(value.isnan().any()):
            self._explain(structure, x[value.isnan()][0].detach(), theta[value.isnan()][0].detach())
        return value, error

    def _log_weights(self, structure: Structure, x: Tensor, theta: Tensor, graph: bool) -> Tensor:
        """log w (R, n) of the draws of the latents."""
        key = _latents.keys(x.reshape(len(x), -1), self.seed)
        if self.proposal == "prior":
            size = sum(math.prod(site.shape) for site in structure.latents.values() if site.free is not None)
            if size != structure.size:
                raise ModalityError(
                    f"proposal='prior' needs latents with quantiles, got one with a constraint between its entries in "
                    f"{self._program.title}; use proposal='laplace'"
                )
            quantiles = _latents.uniforms(key, (self.samples, size))
            return self._joint(structure, x, theta, quantiles=True)(quantiles)
        numbers = _latents.uniforms(key, (self.samples, structure.size + 2))
        f = self._joint(structure, x, theta)
        still = self._joint(structure, x.detach(), theta.detach())
        return _latents.student_t_weights(f, still, self._start(structure, x, theta), numbers, graph)

    def _slopes(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """∂ log w / ∂θ (R, n, P_m) and log w (R, n): the transpose of a backward pass is a forward one."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = theta.detach().clone().requires_grad_()
            log_w = self._log_weights(self._known_structure(x, theta), x.detach().clone(), leaf, True)
            ones = torch.ones_like(log_w, requires_grad=True)
            pulled = _slope(log_w * ones, leaf)
            slopes = [_slope(pulled[:, j], ones) for j in range(theta.shape[-1])]
        return torch.stack(slopes, -1).detach(), log_w.detach()

    def _joint(self, structure: Structure, x: Tensor, theta: Tensor, quantiles: bool = False) -> _latents.Integrand:
        """u (R, n, D) -> log p(x, z(u) | θ) + log |dz/du|, (R, n)."""
        from modalities._pyro_sites import vectorised

        program, inputs = self._program, self._inputs

        def one(t: Tensor, a: Tensor, u: Tensor) -> Tensor:
            return program.log_joint(structure, t, a, inputs, u, quantiles)

        return lambda u: vectorised(torch.vmap(one, (None, None, 0)), (0, 0, 0), theta, x, u)

    def _start(self, structure: Structure, x: Tensor, theta: Tensor) -> Tensor:
        """Where the search for the latents' mode begins, (R, D)."""
        from modalities._pyro_sites import vectorised

        program, inputs = self._program, self._inputs
        with torch.no_grad():
            return vectorised(lambda t, a: program.start(structure, t, a, inputs), (0, 0), theta.detach(), x.detach())

    def _where(self, theta: Tensor) -> str:
        return ", ".join(f"{n} = {v:.6g}" for n, v in zip(self.parameter_names, theta.tolist(), strict=True))

    def _explain(self, structure: Structure, x: Tensor, theta: Tensor) -> None:
        """Say which site's log-density is NaN."""
        from modalities._batched import Batched

        with Batched(), torch.no_grad():
            sites = self._program.site_log_probs(structure, theta, x, self._inputs)
        bad = [name for name, value in sites.items() if bool(value.isnan().any())]
        at = (
            f"at site '{bad[0]}'"
            if bad
            else f"where its latents ({', '.join(structure.latents)}) are far from their middle"
        )
        raise ModalityError(
            f"the log-density must be a number or −∞, got nan {at} of {self._program.title} at {self._where(theta)}; look for "
            "the log or root of a negative number there"
        )


def _usable(tensor: Tensor) -> Tensor:
    """The same outside of inference mode, whose tensors take no part in a backward pass."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _slope(values: Tensor, leaf: Tensor, last: bool = False) -> Tensor:
    """The gradient of a sum; zero where it does not depend on the leaf."""
    if not values.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(values.sum(), leaf, create_graph=not last, retain_graph=not last, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found
