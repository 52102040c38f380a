r"""What the sum misses where kinds of data depend on each other given θ, learned from pairs.

.. math:: s_{12}(x_1, x_2; \theta) = \log \frac{p(x_1, x_2 \mid \theta)}{p(x_1 \mid \theta)\, p(x_2 \mid \theta)}

is the pointwise mutual information given θ. Added to :math:`s_1 + s_2` it makes the joint log-likelihood; the mean of it over
pairs is :math:`I(x_1; x_2 \mid \theta)`, what adding alone loses. A network h tells pairs from such whose parts were redrawn
*at the same θ*: L = −½ log σ(h) of pairs − ½ log σ(−h) of redrawn ones is least at h = s_12, whatever the plugins of the
single parts are like. The identity :math:`E_{x_1 \mid \theta} E_{x_2 \mid \theta}\, e^{s_{12}} = 1` tests it, for every θ.

Its certificate (:func:`engine.certificate.certify`) tests E ∇s = 0 and the normalisation, and says for how many pairs the bias that it
brings stays small. Both hold for s = 0 as well: whether it says enough is not among that. Its own curvature is no information, and may
be negative.

For three parts and more it is :math:`\log p(x_1, \dots, x_k \mid \theta) - \sum_m \log p(x_m \mid \theta)`, all of what they share,
which by inclusion and exclusion holds what any two of them share already: the largest interaction of a query counts alone.

References:
    | Church and Hanks, Comput. Linguist. 16 (1990) 22, pointwise mutual information
    | Cranmer, Pavez, Louppe (2015), https://arxiv.org/abs/1506.02169, density ratios by classification
    | Watanabe, IBM J. Res. Dev. 4 (1960) 66, total correlation
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from engine.errors import ModalityError, ParameterError
from engine.joining import normalised
from engine.learning import Learnable, Training, TrainingError, fit
from engine.learning.simulator import asked, generator_of
from engine.parameters import ParameterSpace
from engine.posterior.mass import refuse_improper
from modalities._networks import Pairwise, activation_of, check_hidden, mlp

__all__ = ["Interaction", "InteractionCheck", "fit_interaction"]

#: ``simulate(theta, generator)``: θ (n, P_m) -> part -> (n, *event_shape), both parts of row i from one unit.
PairSimulator = Callable[[Tensor, torch.Generator], Mapping[str, Tensor]]

_LEAST = 100  # θ to train on, and pairs of a check


class Interaction(Pairwise):
    """A learned s_12 over two plugins or more, which has no data of its own: it reads theirs.

    A registry uses it where all of its parts are in the query. It is trained by :func:`fit_interaction`, which says how much that takes.
    Whether it says too much, :meth:`check` and :func:`engine.certificate.certify` show; whether it says enough, a test of
    :func:`engine.information.dependence` with simulated pairs, of what is left beside it.

    Arguments:
        parts: The plugins, by name, at least two.
        parameter_names: The components of θ that the dependence varies with.
        event_shapes: The shape of one observation of each part, in their order.
        hidden: The widths of the hidden layers, at least one.
        activation: "silu", "tanh", "softplus", "gelu" or "mish".

    Raises:
        ModalityError: for fewer than two parts, a part twice, or shapes that are none.

    Example:
        >>> s12 = Interaction(("track", "shower"), ("energy",), event_shapes=((2,), ()), hidden=(16,))
        >>> s12.parts, s12.event_shape
        (('track', 'shower'), torch.Size([3]))
        >>> x = s12.joined({"track": torch.rand(5, 2), "shower": torch.rand(5)})
        >>> s12(x, torch.rand(4, 1, 1)).shape
        torch.Size([4, 5])
    """

    parts: tuple[str, ...]

    def __init__(
        self,
        parts: Sequence[str],
        parameter_names: Sequence[str],
        event_shapes: Sequence[Sequence[int]],
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
    ) -> None:
        if isinstance(parts, str) or len(parts) < 2 or len(set(parts)) < len(parts):
            raise ModalityError(f"an interaction needs the names of at least two different plugins, got {parts!r}")
        flat = isinstance(event_shapes, str) or any(not isinstance(shape, Sequence) for shape in event_shapes)
        shapes = [] if flat else [torch.Size(int(n) for n in shape) for shape in event_shapes]
        if len(shapes) != len(parts) or any(shape.numel() < 1 for shape in shapes):
            raise ModalityError(
                f"event_shapes must hold the shape of one observation of each of {', '.join(parts)}, got {list(event_shapes)}; write () "
                "for a number, (2,) for two"
            )
        super().__init__(parameter_names, (sum(shape.numel() for shape in shapes),))
        widths = check_hidden("hidden", hidden)
        if not widths:
            raise ModalityError("hidden must have at least one layer, got (); write (64, 64)")
        self.parts = tuple(parts)
        self.event_shapes = tuple(shapes)
        self.of_features = nn.Linear(self.features, widths[0])
        self.of_theta = nn.Linear(len(self.parameter_names), widths[0], bias=False)
        self.network = nn.Sequential(activation_of(activation)(), *mlp(widths[0], widths[1:], 1, activation))

    def evidence_of(self, features: Tensor, theta: Tensor) -> Tensor:
        """h of standardised features (*batch, F) and θ (*batch, P_m), which broadcast."""
        return self.network(self.of_features(features) + self.of_theta(theta))[..., 0]

    def loss_of(self, features: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """None: pairs alone do not say what is redrawn at the same θ; see :func:`fit_interaction`, for which it takes the same arguments:
        features (n, F), theta (n, P_m) and generator."""
        raise ModalityError(
            "an interaction is trained against parts that are redrawn at the same θ; call "
            "modalities.interaction.fit_interaction(interaction, prior=..., simulate=..., simulations=...)"
        )

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Observations of the parts side by side, as :meth:`log_evidence` takes them.

        Arguments:
            parts: Part -> (*batch, *event_shape).

        Returns:
            Shape (*batch, entries of all).

        Raises:
            ModalityError: for a part that is missing, is no tensor, or has another shape or other rows; the message names it.
        """
        if not isinstance(parts, Mapping):
            seen = f"a tensor of shape {tuple(parts.shape)}" if isinstance(parts, Tensor) else type(parts).__name__
            raise ModalityError(
                f"observations of an interaction come by part, a mapping with {', '.join(self.parts)}, got {seen}; a simulator of "
                f"pairs returns {{'{self.parts[0]}': ..., '{self.parts[1]}': ...}}"
            )
        rows: list[Tensor] = []
        for name, shape in zip(self.parts, self.event_shapes, strict=True):
            x = parts.get(name)
            lead = x.dim() - len(shape) if isinstance(x, Tensor) else -1
            if not isinstance(x, Tensor) or lead < 0 or x.shape[lead:] != shape:
                seen = "nothing" if x is None else f"{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ModalityError(
                    f"observations of '{name}' must have shape (*batch, {', '.join(map(str, shape))}), got {seen}; a simulator of pairs "
                    f"returns a mapping with {', '.join(self.parts)}"
                )
            if rows and x.shape[:lead] != rows[0].shape[:-1]:
                raise ModalityError(
                    f"observations of '{name}' must have as many rows as those of '{self.parts[0]}', {tuple(rows[0].shape[:-1])}, got "
                    f"{tuple(x.shape[:lead])}; row i of all parts belongs to one unit"
                )
            rows.append(x.reshape(*x.shape[:lead], -1))
        return torch.cat(rows, -1)

    def _drawn(self, simulate: PairSimulator, theta: Tensor, generator: torch.Generator) -> Tensor:
        """Units that a simulator of pairs makes, their parts side by side.

        Arguments:
            simulate: As for :func:`fit_interaction`.
            theta: Shape (n, P_m).
            generator: Its source of randomness.

        Returns:
            Shape (n, entries of all).

        Raises:
            ModalityError: for a simulator that raises, or does not return one row of every part for each θ.
        """
        label = f"the simulator of {' and '.join(map(repr, self.parts))}"
        x = self.joined(asked(simulate, theta, generator, label))
        if x.shape[:-1] != theta.shape[:1]:
            raise ModalityError(
                f"{label} must return one row of '{self.parts[0]}' and every other part for each of {len(theta)} θ, got "
                f"{tuple(x.shape[:-1])}; row i belongs to θ i"
            )
        return x

    def redrawn(self, first: Tensor, *others: Tensor) -> Tensor:
        """Rows whose parts come from different draws at the same θ: the first part of ``first``, the second of the next …

        Arguments:
            first, others: Joined observations (n, entries of all), one draw for each part; the last serves for those left.
        """
        draws = [first, *others]
        sizes = [shape.numel() for shape in self.event_shapes]
        pieces = [draw.split(sizes, -1) for draw in draws]
        return torch.cat([pieces[min(k, len(draws) - 1)][k] for k in range(len(sizes))], -1)

    def check(
        self, simulate: PairSimulator, theta: Tensor, simulations: int = 10_000, *, seed: int = 0
    ) -> InteractionCheck:
        """Whether e^{s} is normalised over parts redrawn at one θ, and how many nats a pair it carries.

        Arguments:
            simulate: As for :func:`fit_interaction`.
            theta: θ, values of ``parameter_names``, shape (P_m,), or by name.
            simulations: How many pairs, at least 100.
            seed: Of the simulations; take another one than for training.

        Returns:
            :class:`InteractionCheck`; look at ``normalised``.

        Raises:
            ParameterError: for a θ of another shape, or one that is not finite.
            ModalityError: for fewer simulations, and a simulator that fails, or does not return finite parts; the message names them.

        Example:
            >>> s12 = Interaction(("a", "b"), ("mu",), event_shapes=((), ()))
            >>> def apart(theta, generator):
            ...     return {n: theta[:, 0] + torch.randn(len(theta), generator=generator) for n in "ab"}
            >>> s12.check(apart, torch.zeros(1), 1000).normalisation_error < 0.1
            True
        """
        at = self._one_theta(theta)
        if not isinstance(simulations, int) or isinstance(simulations, bool) or simulations < _LEAST:
            raise ModalityError(f"a check takes at least {_LEAST} simulations, got {simulations!r}; 10_000 are usual")
        at = at.expand(simulations, -1)
        draws = [self._drawn(simulate, at, generator_of(seed, k)).to(torch.float64) for k in range(len(self.parts))]
        lost = sum(int((~torch.isfinite(x).all(-1)).sum()) for x in draws)
        if lost:
            raise ModalityError(
                f"the simulator of {' and '.join(map(repr, self.parts))} must return finite values, got {lost} of "
                f"{simulations * len(draws)} units that are not, at θ = {at[0].tolist()}; mend it, or check another θ"
            )
        with torch.no_grad():
            own = self(draws[0], at.to(torch.float64)).to(torch.float64)
            apart = self(self.redrawn(*draws), at.to(torch.float64)).to(torch.float64).exp()
        root = math.sqrt(simulations)
        return InteractionCheck(
            float(own.mean()), float(own.std()) / root, float(apart.mean()), float(apart.std()) / root, simulations
        )

    def _one_theta(self, theta: Any) -> Tensor:
        """θ of shape (1, P_m). ParameterError where it is none."""
        P = len(self.parameter_names)
        if isinstance(theta, Mapping):
            if missing := [n for n in self.parameter_names if n not in theta]:
                raise ParameterError(
                    f"theta must have a value of '{missing[0]}', got some of {', '.join(map(str, theta)) or 'none'}"
                )
            theta = [theta[n] for n in self.parameter_names]
        try:
            at = torch.as_tensor(theta)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ParameterError(
                f"theta must be one finite θ, the values of {', '.join(self.parameter_names)}, got {theta!r:.60}; check one θ at a time"
            ) from error
        if at.dim() > 2 or at.numel() != P or not bool(torch.isfinite(at).all()):
            seen = f"{at.tolist()}" if at.numel() == P else f"shape {tuple(at.shape)}"
            raise ParameterError(
                f"theta must be one finite θ, the values of {', '.join(self.parameter_names)} with shape ({P},), got {seen}; "
                "check one θ at a time"
            )
        return (at if at.is_floating_point() else at.to(torch.float64)).reshape(1, -1)


@dataclass(frozen=True)
class InteractionCheck:
    """What simulated pairs at one θ say of an interaction.

    Attributes:
        information: The mean of s over pairs, about I(x_1; x_2 | θ) in nats.
        information_error: Its standard error.
        normalisation: The mean of e^s over parts redrawn at the same θ; 1 for the true s.
        normalisation_error: Its standard error.
        simulations: How many pairs.

    Example:
        >>> print(InteractionCheck(0.511, 0.004, 0.998, 0.006, 10_000))
        0.511 ± 0.004 nats a pair, normalisation 0.998 ± 0.006, from 10000 pairs
        >>> print(InteractionCheck(0.311, 0.004, 0.898, 0.006, 10_000))
        0.311 ± 0.004 nats a pair, normalisation 0.898 ± 0.006, from 10000 pairs; not normalised: train it longer or with more simulations
    """

    information: float
    information_error: float
    normalisation: float
    normalisation_error: float
    simulations: int

    @property
    def normalised(self) -> bool:
        """Whether the normalisation is 1 within 4 of its errors and 0.02. Enough training brings it there; so does none, where s = 0, and
        any that says too little: test what is left with :func:`engine.information.dependence`."""
        return normalised(self.normalisation, self.normalisation_error)

    def __str__(self) -> str:
        doubt = "" if self.normalised else "; not normalised: train it longer or with more simulations"
        return (
            f"{self.information:.3f} ± {self.information_error:.3f} nats a pair, normalisation {self.normalisation:.3f} ± "
            f"{self.normalisation_error:.3f}, from {self.simulations} pairs{doubt}"
        )


class _Redrawn(Learnable):
    """What trains an interaction: rows of k joined draws at one θ, of which the first is a unit and all together are redrawn."""

    def __init__(self, interaction: Interaction) -> None:
        k, entries = len(interaction.parts), interaction.event_shape.numel()
        super().__init__(interaction.parameter_names, (k, entries))
        self.interaction = interaction

    @property
    def dtype(self) -> torch.dtype:
        return self.interaction.dtype

    def standard_features(self, raw: Tensor) -> Tensor:
        k, entries = self.event_shape
        return self.interaction.standard_features(raw.reshape(-1, k, entries)).flatten(1)

    def standard_theta(self, theta: Tensor) -> Tensor:
        return self.interaction.standard_theta(theta)

    def standardise(self, features: Tensor, theta: Tensor) -> None:
        self.interaction.standardise(features.reshape(-1, self.event_shape[1]), theta)

    def loss_of(self, features: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        draws = features.reshape(-1, *self.event_shape).unbind(1)
        loss = torch.zeros(len(theta), dtype=features.dtype)
        turns = len(draws)
        for j in range(turns):  # every draw is a unit once, and every part of it is redrawn once
            rolled = [draws[(j + i) % turns] for i in range(turns)]
            loss = loss + softplus(-self.interaction.evidence_of(rolled[0], theta))
            loss = loss + softplus(self.interaction.evidence_of(self.interaction.redrawn(*rolled), theta))
        return 0.5 * loss / turns


def fit_interaction(
    interaction: Interaction,
    *,
    prior: ParameterSpace,
    simulate: PairSimulator,
    simulations: int,
    seed: int = 0,
    **settings: Any,
) -> Training:
    """Train an interaction in place, from a simulator of pairs.

    How much training it takes depends on the data. For two numbers, 6,000 θ and 12 epochs leave the information within 0.05 nats and
    the normalisation within 0.06; 50,000 and 40 leave both within 0.02. Look at both sides afterwards:

    - :meth:`Interaction.check` at several θ of the prior should find a normalisation of 1 within its error (``normalised``). One that says
      nothing, as before training, is normalised too: ``information`` should be what :func:`engine.information.dependence` finds in pairs.
    - :func:`engine.certificate.certify` with the same simulator says for how many pairs its mean score leaves θ̂ nearly unbiased,
      ``n_max()`` of the certificate, and notes a normalisation that is off. It does not see one that says too little.

    Arguments:
        interaction: What is trained.
        prior: Has its parameters, each with a proper prior.
        simulate: ``simulate(theta, generator)``: θ (n, P_m) in the order of its ``parameter_names`` -> part -> (n, *event_shape),
            all parts of row i from one unit. It is called once for each part at every θ.
        simulations: How many θ, at least 100.
        seed: What everything random follows from.
        settings: Others of :func:`engine.learning.fit`.

    Returns:
        As :func:`engine.learning.fit`.

    Raises:
        PosteriorError: for a parameter with an improper prior.
        TrainingError: for fewer simulations, or no simulator.
        ModalityError: for a simulator that fails, or does not return the parts; the message names the part. Others as
            :func:`engine.learning.fit`.

    Example:
        >>> from torch.distributions import Normal
        >>> from engine import Parameter
        >>> space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
        >>> def pairs(theta, generator):
        ...     shared = theta[:, 0] + torch.randn(len(theta), generator=generator)
        ...     return {n: shared + torch.randn(len(theta), generator=generator) for n in "ab"}
        >>> s12 = Interaction(("a", "b"), ("mu",), event_shapes=((), ()), hidden=(16,))
        >>> training = fit_interaction(s12, prior=space, simulate=pairs, simulations=500, epochs=2, progress=False)
        >>> s12.training_prior.names
        ('mu',)
    """
    k = len(interaction.parts)
    if not callable(simulate):
        raise TrainingError(
            f"an interaction needs a simulator of pairs, got {type(simulate).__name__}; pass simulate=function(theta, generator) that "
            f"returns {', '.join(interaction.parts)} by name"
        )
    if isinstance(simulations, int) and simulations < _LEAST:
        raise TrainingError(
            f"an interaction takes at least {_LEAST} simulations, got {simulations!r}; 10_000 are a start, 50_000 are better"
        )
    if isinstance(prior, ParameterSpace):
        others = {n: 0.0 for n in prior.names if n not in interaction.parameter_names}
        refuse_improper(prior, others, "an interaction")

    def draws(theta: Tensor, generator: torch.Generator) -> Tensor:
        return torch.stack([interaction._drawn(simulate, theta, generator) for _ in range(k)], 1)

    outer = _Redrawn(interaction)
    training = fit(outer, prior=prior, simulate=draws, simulations=simulations, seed=seed, **settings)
    interaction.training_prior, interaction.training_status = outer.training_prior, outer.training_status
    return training
