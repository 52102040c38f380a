r"""Training a joint plugin for what its parts tell only together: confidence that rests on one part alone is taken away.

With q(θ | x) ∝ π(θ) exp s(x; θ) over the hypotheses, or over θ drawn from the prior, and x̃_i a part i that was masked:

.. math:: L = E[-\log q(\theta \mid x)] + \lambda \sum_i E\, \mathrm{KL}(q(\cdot \mid \tilde x_i, x_{-i}) \,\|\, r_i)
          - \gamma \sum_i E\, \mathrm{JSD}(q(\cdot \mid x), q(\cdot \mid x_i', x_{-i}))

- *masked confidence* (λ): without part i the joint plugin may not be surer than the reference r_i. Without plugins that is the prior. It
  asks for silence even where the other parts do know something, so that the joint plugin unlearns true evidence. Where frozen plugins of
  single parts are at hand, r_i is the posterior from the sum of the others, :math:`r_i \propto \pi \exp \sum_{j \ne i} s_j(x_j; \theta)`,
  and what those know is allowed: a shortcut as well, where they have learned it too.
- *competition* (γ): x_i' is part i of another row. The Jensen–Shannon divergence says how much the prediction depends on part i; it is
  rewarded for every part, so that a part that is learned fast does not keep the others out.

Masks replace entries by normal noise with the mean and width that the entry has in training: ``"noise"`` all of a part, ``"random"`` a
share of them, drawn for each row between a half and all, ``"learned"`` each with a probability that is trained along: as few as leave no
more confidence than r_i has. Two things to know:

- The prediction pays for masks by being less sure: recalibrate afterwards (:func:`engine.learning.recalibration.recalibrate`).
- A network that is trained long enough learns to tell noise from data, and then trusts one part alone wherever the other looks real: a
  low learning rate and few epochs are part of the method. Parts that are exchanged between rows cannot be told from data, but are no masks
  where x_1 and x_2 are independent, as in XOR: the same inputs then come with the label and without.

References:
    | SynIB (2026), synergistic information bottleneck: the masked-confidence objective
    | Kontras, Chatzichristos, Blaschko, De Vos (2024), Multimodal fusion balancing through game-theoretic regularization,
      https://arxiv.org/abs/2411.07335: competition, of which the contrastive term is not taken over
    | Lin (1991), Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37, 145
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.learning.fitting import fit
from engine.learning.learnable import Learnable
from engine.learning.recalibration import own_hypothesis
from engine.learning.training import Training, TrainingError
from engine.modality import Modality
from engine.parameters import ParameterSpace

__all__ = ["MASKS", "fit_synergy", "jensen_shannon", "kullback_leibler"]

#: The masks by name; any other is ``mask(x_i, generator)``, rows (n, entries of the part) -> the same shape.
MASKS = ("noise", "random", "learned")
Mask = Callable[[Tensor, torch.Generator], Tensor]

_FIRST_GATE = 2.0  # the log odds of an entry to be masked that learning begins with
_SPARSITY = 0.01  # nats for a whole part that is masked: learned masks take what they need
_LEAST_SHARE = 0.5  # of the entries that a random mask replaces


def kullback_leibler(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of rows of normalised log probabilities, in nats; infinite where p has what q excludes.

    Arguments:
        log_p, log_q: Shape (*, K).

    Returns:
        Shape (*).

    Example:
        >>> p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
        >>> q = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
        >>> round(float(kullback_leibler(p, q)), 4)  # ½ log 2 + ½ log ⅔
        0.1438
    """
    there = log_p > -math.inf  # 0 log 0 is 0, and so is its gradient
    return (log_p.exp() * (torch.where(there, log_p, 0.0) - torch.where(there, log_q, 0.0))).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JSD(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q), in nats, between 0 and log 2.

    Arguments:
        log_p, log_q: Normalised, shape (*, K).

    Returns:
        Shape (*).

    Example:
        >>> p, q = torch.tensor([[0.99, 0.01], [0.01, 0.99]], dtype=torch.float64).log()
        >>> round(float(jensen_shannon(p, q)), 3), abs(float(jensen_shannon(p, p))) < 1e-12
        (0.637, True)
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (kullback_leibler(log_p, log_m) + kullback_leibler(log_q, log_m))


def fit_synergy(
    joint: Learnable,
    *,
    parts: Mapping[str, Sequence[int]],
    pairs: tuple[Tensor, Mapping[str, Tensor]],
    hypotheses: Tensor | None = None,
    prior: ParameterSpace | None = None,
    mask: str | Mask = "noise",
    weight: float = 1.0,
    reference: Mapping[str, Modality] | None = None,
    competition: float = 0.0,
    contrast: int = 10,
    seed: int = 0,
    **settings: Any,
) -> Training:
    """Train a joint plugin in place, from pairs of θ and observations of all its parts.

    Arguments:
        joint: What is trained: any learned modality of the parts' entries side by side, event_shape (entries of all,).
        parts: Part -> the shape of one observation of it, in the order in which they lie side by side.
        pairs: (theta, part -> x), shapes (n, P_m) and (n, *its shape); row i of all belongs together.
        hypotheses: All θ that are possible, shape (K, P_m); where left out, each θ is told from those of ``contrast`` other rows.
        prior: What θ was drawn from, for π; without it hypotheses count alike.
        mask: "noise", "random", "learned", or a function of (x_i, generator).
        weight: λ >= 0; 0 is cross-entropy alone.
        reference: Part -> its frozen plugin, for every part; without it r is the prior.
        competition: γ >= 0.
        contrast: How many other θ without hypotheses.
        seed: What everything random follows from.
        settings: Others of :func:`engine.learning.fit`.

    Returns:
        As :func:`engine.learning.fit`.

    Raises:
        TrainingError: for parts, pairs, a mask, weights or references that break a rule, naming the part. Others as
            :func:`engine.learning.fit`.

    Example:
        Two coins, of which only the sum is known (XOR):

        >>> from modalities import NeuralRatio
        >>> generator = torch.Generator().manual_seed(0)
        >>> bits = torch.randint(2, (600, 2), generator=generator).double()
        >>> x = {"a": bits[:, :1], "b": bits[:, 1:]}
        >>> y, both = (bits.sum(-1, keepdim=True) == 1).double(), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> joint = NeuralRatio(("y",), (2,), hidden=(16, 16))
        >>> training = fit_synergy(joint, parts={"a": (1,), "b": (1,)}, pairs=(y, x), hypotheses=both, weight=0.1,
        ...                        epochs=20, batch=60, learning_rate=0.01, progress=False)
        >>> seen = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> (joint(seen, both[1]) > joint(seen, both[0])).tolist()
        [False, True]
    """
    theta, data = pairs
    x = joined(parts, data)
    outer = _Masked(joint, parts, hypotheses, prior, mask, weight, reference, competition, contrast)
    if hypotheses is not None:
        own_hypothesis(theta, hypotheses)  # a θ that is none is said before training
    training = fit(outer, prior=prior, pairs=(theta, x), seed=seed, **settings)
    joint.training_prior, joint.training_status = outer.training_prior, outer.training_status
    return training


def joined(parts: Mapping[str, Sequence[int]], data: Mapping[str, Tensor]) -> Tensor:
    """Observations of the parts side by side, (n, entries of all)."""
    rows = []
    for name, shape in parts.items():
        x = data.get(name)
        if not isinstance(x, Tensor) or x.shape[1:] != torch.Size(shape):
            seen = "nothing" if x is None else f"{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TrainingError(
                f"observations of '{name}' must have shape (n, {', '.join(map(str, shape))}), got {seen}; pairs are (theta, "
                f"a mapping with {', '.join(parts)})"
            )
        rows.append(x.reshape(len(x), -1))
    if len({len(x) for x in rows}) > 1:
        raise TrainingError(
            f"observations must have as many rows for every part, got {[len(x) for x in rows]} of {', '.join(parts)}"
        )
    return torch.cat(rows, -1)


class _Masked(Learnable):
    """What trains a joint plugin: its loss with parts masked and exchanged."""

    noise_centre: Tensor
    noise_scale: Tensor

    def __init__(
        self,
        joint: Learnable,
        parts: Mapping[str, Sequence[int]],
        hypotheses: Tensor | None,
        prior: ParameterSpace | None,
        mask: str | Mask,
        weight: float,
        reference: Mapping[str, Modality] | None,
        competition: float,
        contrast: int,
    ) -> None:
        shapes = {name: torch.Size(shape) for name, shape in parts.items()}
        entries = sum(shape.numel() for shape in shapes.values())
        if len(shapes) < 2 or joint.event_shape != (entries,):
            raise TrainingError(
                f"a joint plugin must have at least two parts and their {entries} entries as its event_shape, got "
                f"{', '.join(shapes) or 'none'} and {tuple(joint.event_shape)}; correct parts or event_shape"
            )
        if not callable(mask) and mask not in MASKS:
            raise TrainingError(
                f"mask must be one of {', '.join(MASKS)}, or a function of (x_i, generator), got {mask!r}"
            )
        for name, value in (("weight", weight), ("competition", competition)):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value < math.inf:
                raise TrainingError(f"{name} must be a number >= 0, got {value!r}; 0 switches it off")
        if not isinstance(contrast, int) or contrast < 1:
            raise TrainingError(f"contrast must be a whole number >= 1, got {contrast!r}")
        names = joint.parameter_names
        if hypotheses is not None and (
            hypotheses.dim() != 2 or hypotheses.shape[1] != len(names) or len(hypotheses) < 2
        ):
            raise TrainingError(
                f"hypotheses must have shape (K, {len(names)}) with K >= 2, got {tuple(hypotheses.shape)}; a row is a θ"
            )
        if reference is not None and not isinstance(reference, Mapping):
            raise TrainingError(
                f"reference must be a mapping with the frozen plugin of each of {', '.join(shapes)}, got {type(reference).__name__}; leave "
                "it out for the prior"
            )
        if reference is not None and (unknown := [name for name in reference if name not in shapes]):
            raise TrainingError(f"reference has '{unknown[0]}', which is no part; there are {', '.join(shapes)}")
        for name, shape in shapes.items() if reference is not None else ():
            single = (reference or {}).get(name)
            if (
                not isinstance(single, Modality)
                or single.event_shape != shape
                or not set(single.parameter_names) <= set(names)
            ):
                seen = "none" if single is None else repr(single)[:100]
                if isinstance(single, Modality):
                    seen = f"one of {single.parameter_names} with {tuple(single.event_shape)}"
                raise TrainingError(
                    f"the reference of '{name}' must be a modality of {', '.join(names)} with event_shape {tuple(shape)}, got {seen}; pass "
                    "its frozen plugin, or leave reference out for the prior"
                )
        super().__init__(names, (entries,))
        self.joint = joint
        self.shapes, self.mask, self.weight = shapes, mask, float(weight)
        self.competition, self.contrast = float(competition), contrast
        self.reference = (
            None if reference is None else tuple(reference[name] for name in shapes)
        )  # no submodules: frozen
        self.sizes = [shape.numel() for shape in shapes.values()]
        self.register_buffer("noise_centre", torch.zeros(entries, dtype=torch.float64))
        self.register_buffer("noise_scale", torch.ones(entries, dtype=torch.float64))
        if mask == "learned" and weight:
            self.gates = nn.Parameter(torch.full((entries,), _FIRST_GATE))
        log_prior = None
        if hypotheses is not None:
            hypotheses = hypotheses.to(torch.float64)
            log_prior = torch.zeros(len(hypotheses), dtype=torch.float64)
            if prior is not None:
                log_prior = prior.only(names).log_prior(hypotheses)
            log_prior = log_prior.log_softmax(-1)
        self.hypotheses, self.log_prior = hypotheses, log_prior

    @property
    def dtype(self) -> torch.dtype:
        return self.joint.dtype

    def standardise(self, features: Tensor, theta: Tensor) -> None:
        x = features.reshape(len(features), -1).to(torch.float64)
        self.noise_centre.copy_(x.mean(0))
        self.noise_scale.copy_(x.std(0))
        with torch.no_grad():
            self.joint.standardise(self.joint.raw_features(features), theta)

    def loss(
        self, x: Tensor | None, theta: Tensor, generator: torch.Generator | None = None, features: Tensor | None = None
    ) -> Tensor:
        assert x is not None
        assert generator is not None
        candidates, own = self._candidates(theta, generator)
        log_q = self._log_q(self.joint(x[:, None], candidates))
        total = -log_q.gather(-1, own[:, None]).mean()
        penalty = getattr(self.joint.summary, "penalty", None)
        if penalty is not None and self.training:
            total = total + penalty()
        pieces = x.split(self.sizes, -1)
        for i in range(len(pieces)) if self.weight else ():
            masked, share = self._masked(i, pieces[i], generator)
            log_masked = self._log_q(self.joint(_with(pieces, i, masked)[:, None], candidates))
            log_r = self._log_reference(i, pieces, candidates, log_masked)
            total = total + self.weight * (kullback_leibler(log_masked, log_r).mean() + _SPARSITY * share)
        for i in range(len(pieces)) if self.competition else ():
            order = torch.randperm(len(x), generator=generator)
            exchanged = self._log_q(self.joint(_with(pieces, i, pieces[i][order])[:, None], candidates))
            total = total - self.competition * jensen_shannon(log_q, exchanged).mean()
        return total

    def _candidates(self, theta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """θ to choose from, (K, P) or (n, K, P), and which is each row's own, (n)."""
        if self.hypotheses is not None:
            return self.hypotheses, own_hypothesis(theta, self.hypotheses)
        n = len(theta)
        number = min(self.contrast, n - 1)
        order = torch.randperm(n, generator=generator)
        rows = torch.stack([order.roll(j) for j in range(number + 1)], 1)[order.argsort()]
        return theta[rows], torch.zeros(n, dtype=torch.int64)

    def _log_q(self, scores: Tensor) -> Tensor:
        return (scores if self.log_prior is None else scores + self.log_prior).log_softmax(-1)

    def _log_reference(self, i: int, pieces: Sequence[Tensor], candidates: Tensor, like: Tensor) -> Tensor:
        """log r_i, (n, K): the prior, or the posterior from the plugins of the other parts."""
        scores = torch.zeros_like(like)
        if self.reference is not None:
            with torch.no_grad():
                for j, (single, shape) in enumerate(zip(self.reference, self.shapes.values(), strict=True)):
                    if j != i:
                        at = candidates[..., [self.parameter_names.index(n) for n in single.parameter_names]]
                        scores = scores + single(pieces[j].reshape(-1, 1, *shape), at)
        return self._log_q(scores)

    def _masked(self, i: int, piece: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | float]:
        """Part i masked, and the mean probability of a learned mask."""
        if callable(self.mask):
            return self.mask(piece, generator), 0.0
        start = sum(self.sizes[:i])
        where = slice(start, start + self.sizes[i])
        noise = torch.randn(piece.shape, generator=generator, dtype=piece.dtype)
        noise = self.noise_centre[where].to(piece.dtype) + self.noise_scale[where].to(piece.dtype) * noise
        if self.mask == "noise":
            return noise, 0.0
        u = torch.rand(piece.shape, generator=generator, dtype=piece.dtype)
        if self.mask == "random":
            share = _LEAST_SHARE + (1.0 - _LEAST_SHARE) * torch.rand(
                len(piece), 1, generator=generator, dtype=piece.dtype
            )
            return torch.where(u < share, noise, piece), 0.0
        p = self.gates[where].sigmoid().to(piece.dtype)
        drawn = (u < p).to(piece.dtype) + p - p.detach()  # the draw, with the probability's gradient
        return drawn * noise + (1.0 - drawn) * piece, p.mean()


def _with(pieces: Sequence[Tensor], i: int, other: Tensor) -> Tensor:
    """The parts side by side, with another one in place of part i."""
    return torch.cat([other if j == i else piece for j, piece in enumerate(pieces)], -1)
