r"""Encoders, decoders and critics that the two graphs of an information-bottleneck objective ask for.

An encoder q(z | data) = N(μ, σ²) for each latent, a decoder for each data node that is told, a critic for each latent that another must
tell. :mod:`engine.learning.information_curve` trains them.

A trained encoder is a plugin's summary f(x): ``modalities.summaries.Bottleneck(model.encoders["Z"], features=k, beta=0.0)`` returns μ,
and with its weights frozen, ``summary.requires_grad_(False)``, the scalar ψ = g(f(x); θ) is learned on top of it.

References:
    | Abdelaleem, Nemenman, Martini (2025), https://arxiv.org/abs/2310.03311
    | Yu, Yu, Løkse, Jenssen, Principe (2024), https://arxiv.org/abs/2404.17951, with Cauchy–Schwarz divergences
    | Kingma and Welling (2014), https://arxiv.org/abs/1312.6114, draws with a gradient
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.information.estimators import ESTIMATORS
from engine.learning.bounds import (
    LIKELIHOODS,
    cauchy_schwarz_information,
    cauchy_schwarz_loss,
    divergence_from_normal,
)
from engine.learning.objectives import METHODS, Objective
from engine.learning.training import TrainingError

__all__ = ["InformationBottleneck"]

_CAUCHY_SCHWARZ = "cauchy-schwarz"
_LEAST_LOG_VARIANCE = -10.0  # of a decoder: data that it tells exactly would have an infinite density
_EMBEDDING = 32  # of a critic


class InformationBottleneck(nn.Module):
    """The networks of one objective.

    Arguments:
        objective: One of :data:`engine.learning.objectives.METHODS`, by name, or your own.
        entries: Data node -> how many numbers one observation of it has.
        latents: How many numbers each latent has; or latent -> how many.
        hidden: The widths of the hidden layers of encoders, decoders and critics.
        likelihood: "gaussian", "unit", "bernoulli", "categorical" (see :data:`engine.learning.bounds.LIKELIHOODS`) or
            "cauchy-schwarz", of all data that are decoded; or data node -> one of them.
        critic: "infonce", "dv", "nwj" or "smile": the bound between latents.
        compression: "kl", the divergence from a standard normal law, or "cauchy-schwarz".
        encoders: Latent -> a module of your own from x (n, *event_shape) to (n, 2 · latents), means and log variances; a network of
            the flattened data where left out.

    Raises:
        TrainingError: for arguments that break a rule above.

    Example:
        >>> model = InformationBottleneck("dvib", {"X": 6, "Y": 1}, latents=2, hidden=(8,))
        >>> model.encode("Z", {"X": torch.zeros(5, 3, 2)}).shape
        torch.Size([5, 2])
        >>> data = {"X": torch.zeros(5, 3, 2), "Y": torch.zeros(5)}
        >>> model.loss(data, beta=1.0, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([])
    """

    def __init__(
        self,
        objective: str | Objective,
        entries: Mapping[str, int],
        latents: int | Mapping[str, int],
        *,
        hidden: Sequence[int] = (64, 64),
        likelihood: str | Mapping[str, str] = "gaussian",
        critic: str = "infonce",
        compression: str = "kl",
        encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(objective, str) and objective not in METHODS:
            raise TrainingError(f"objective must be one of {', '.join(METHODS)}, or an Objective, got {objective!r}")
        self.objective = METHODS[objective] if isinstance(objective, str) else objective
        data, names = self.objective.data, self.objective.latents
        self.entries = {node: _count("entries", entries, node) for node in data}
        sizes = dict.fromkeys(names, latents) if isinstance(latents, int) else latents
        self.latents = {node: _count("latents", sizes, node) for node in names}
        told = [node for node in self.objective.decoder if node in self.entries]
        laws = dict.fromkeys(told, likelihood) if isinstance(likelihood, str) else dict(likelihood)
        for node in told:
            if laws.get(node) not in (*LIKELIHOODS, _CAUCHY_SCHWARZ):
                raise TrainingError(
                    f"likelihood of '{node}' must be one of {', '.join((*LIKELIHOODS, _CAUCHY_SCHWARZ))}, got {laws.get(node)!r}"
                )
        if critic not in ESTIMATORS or critic == "club":
            raise TrainingError(
                f"critic must be one of {', '.join(e for e in ESTIMATORS if e != 'club')}, got {critic!r}"
            )
        if compression not in ("kl", _CAUCHY_SCHWARZ):
            raise TrainingError(f"compression must be 'kl' or '{_CAUCHY_SCHWARZ}', got {compression!r}")
        self.likelihood, self.critic, self.compression = {n: laws[n] for n in told}, critic, compression
        own = dict(encoders or {})
        if strange := set(own) - set(names):
            raise TrainingError(
                f"encoders must be of {', '.join(names)}, got one of {min(strange)!r}; correct the name"
            )
        widths = {z: sum(self.entries[x] for x in parents) for z, parents in self.objective.encoder.items()}
        self.encoders = nn.ModuleDict(
            {z: own.get(z) or _network(widths[z], hidden, 2 * self.latents[z], flat=True) for z in names}
        )
        self.decoders, self.critics = nn.ModuleDict(), nn.ModuleDict()
        self.log_variances = nn.ParameterDict()
        for node, parents in self.objective.decoder.items():
            inputs = sum(self.latents[z] for z in parents)
            if node in self.entries:
                self.decoders[node] = _network(inputs, hidden, self.entries[node])
                self.log_variances[node] = nn.Parameter(torch.zeros(()))
            else:
                f, g = _network(inputs, hidden, _EMBEDDING), _network(self.latents[node], hidden, _EMBEDDING)
                self.critics[node] = nn.ModuleList([f, g])

    def encode(self, latent: str, data: Mapping[str, Tensor]) -> Tensor:
        """μ of a latent, shape (n, its size), from the data that it is made of: node -> (n, *event_shape)."""
        return self._law(latent, data)[0]

    def terms(
        self, data: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The bounds of the objective's terms, means over rows in nats, with their graph.

        Arguments:
            data: Data node -> (n, *event_shape), row i of all belongs together.
            generator: Of the draws of the latents.

        Returns:
            Latent -> a bound from above on what it keeps; node -> a bound from below on what is told of it, but for the entropy of data.
        """
        z, kept, told = {}, {}, {}
        for node in self.objective.latents:
            mean, log_variance = self._law(node, data)
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
            z[node] = mean + (0.5 * log_variance).exp() * noise
            if self.compression == "kl":
                kept[node] = divergence_from_normal(mean, log_variance).mean()
            else:
                kept[node] = cauchy_schwarz_information(self._made_of(node, data), z[node])
        for node, parents in self.objective.decoder.items():
            given = torch.cat([z[p] for p in parents], -1)
            if node in self.critics:
                told[node] = self._between(node, given, z[node])
            elif self.likelihood[node] == _CAUCHY_SCHWARZ:
                x = torch.cat([self._made_of(p, data) for p in parents], -1)
                told[node] = -cauchy_schwarz_loss(x, self._flat(node, data), self.decoders[node](given))
            else:
                law, log_variance = LIKELIHOODS[self.likelihood[node]], self.log_variances[node]
                limited = log_variance.clamp_min(_LEAST_LOG_VARIANCE)
                told[node] = law.log_prob(self.decoders[node](given), self._flat(node, data), limited).mean()
        return kept, told

    def loss(self, data: Mapping[str, Tensor], beta: float, generator: torch.Generator) -> Tensor:
        """I_E − beta I_D of rows of data, a number in nats, with draws from the generator and a graph to the weights."""
        return self.objective.loss(*self.terms(data, generator), beta)

    def baseline(self, data: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> dict[str, float]:
        """What the best decoders that look at no latent tell of ``held``, fitted to ``data``: decoded node -> nats."""
        found = {}
        for node, name in self.likelihood.items():
            target = self._flat(node, held)
            if name == _CAUCHY_SCHWARZ:
                mean = self._flat(node, data).mean(0).expand_as(target)
                x = torch.cat([self._made_of(p, held) for p in self.objective.decoder[node]], -1)
                found[node] = -float(cauchy_schwarz_loss(x, target, mean))
            else:
                outputs, log_variance = LIKELIHOODS[name].constant(self._flat(node, data))
                limited = log_variance.clamp_min(_LEAST_LOG_VARIANCE)
                found[node] = float(LIKELIHOODS[name].log_prob(outputs.expand_as(target), target, limited).mean())
        return found

    def _law(self, latent: str, data: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        parents = self.objective.encoder[latent]
        x = data[parents[0]] if len(parents) == 1 else self._made_of(latent, data)
        outputs, size = self.encoders[latent](x), self.latents[latent]
        if outputs.shape != (len(x), 2 * size):
            raise TrainingError(
                f"the encoder of '{latent}' must return shape (n, {2 * size}), means and log variances, got {tuple(outputs.shape)} "
                f"for n = {len(x)}; let it return twice as many numbers as the latent has"
            )
        mean, log_variance = outputs.chunk(2, -1)
        return mean, log_variance

    def _made_of(self, latent: str, data: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([self._flat(x, data) for x in self.objective.encoder[latent]], -1)

    def _flat(self, node: str, data: Mapping[str, Tensor]) -> Tensor:
        return data[node].reshape(len(data[node]), -1)

    def _between(self, node: str, given: Tensor, z: Tensor) -> Tensor:
        """A critic's bound on I(given; z): its value, and the gradient of what its estimator maximises."""
        f, g = self.critics[node]  # pyright: ignore[reportGeneralTypeIssues]
        scores = (f(given) @ g(z).mT)[None]
        estimator = ESTIMATORS[self.critic]
        objective, value = estimator.objective(scores, None)[0], estimator.value(scores, None)[0]
        return objective + (value - objective).detach()


def _network(inputs: int, hidden: Sequence[int], outputs: int, flat: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()] if flat else []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.SiLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def _count(what: str, given: Mapping[str, int], node: str) -> int:
    value = given.get(node) if isinstance(given, Mapping) else given
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TrainingError(
            f"{what} of '{node}' must be a whole number >= 1, got {value!r}; say how many numbers it has"
        )
    return value
