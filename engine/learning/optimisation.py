r"""The training loop: AdamW, a learning rate that rises and falls once, early stopping, averaged weights.

.. math:: \eta(t) = \eta_0 \min(t / w, 1)\; \tfrac12 (1 + \cos(\pi\, \max(0, t - w) / (1 - w))), \qquad w = 0.05

with t the part of all epochs that is done. Everything after a checkpoint is a function of the checkpoint, the settings
and the data, so that a run that was killed ends with the same bits.

What is validated and kept is a running average of the weights, over the last 3 % of all steps: single steps move about
an optimum, and so would the scores. The lowest of many validation losses is low by luck, too: it picks weights that suit
the held-out rows, whose scores are off by what a tenth of the data cannot tell. So the last average is kept, unless its
loss is above the lowest by more than one standard error of the difference, over held-out batches. Likewise training
stops early when the validation loss has been above its lowest value by that much for a while, and not on a plateau.

References:
    | Loshchilov and Hutter (2019), Decoupled weight decay regularization, https://arxiv.org/abs/1711.05101
    | Loshchilov and Hutter (2017), SGDR, https://arxiv.org/abs/1608.03983: the cosine
    | Polyak and Juditsky (1992), Acceleration of stochastic approximation by averaging, SIAM J. Control Optim. 30, 838
    | Breiman, Friedman, Olshen, Stone (1984), Classification and regression trees, section 3.4.3: one standard error
    | Pascanu, Mikolov, Bengio (2013), On the difficulty of training recurrent neural networks: clipped gradients
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.errors import ModalityError
from engine.learning.batches import Batch, Batches
from engine.learning.checkpoint import State
from engine.learning.loss import Loss
from engine.learning.simulator import Purpose, seed_of, seeded

__all__: list[str] = []

_WARM_UP = 0.05
_WEIGHT_DECAY = 0.01
_LARGEST_GRADIENT = 5.0
_AVERAGED = 0.03  # of all steps: the memory of the average
_CLEAR = 1.0  # standard errors
_FLAT = 0.1  # of the whole fall of the validation loss: what the second half of the epochs may bring at most


@dataclass(frozen=True)
class Settings:
    """How to train; the arguments of :func:`engine.learning.fit` of these names."""

    seed: int
    batch: int
    epochs: int
    learning_rate: float
    patience: int


@dataclass(frozen=True)
class Ending:
    """How a run ended: a status of :class:`engine.learning.Training`, and why."""

    status: str
    reason: str


class Optimisation:
    """A run of training, one epoch at a time.

    Arguments:
        loss: What to minimise; its modality's weights are changed.
        batches: The pairs.
        settings: How.
        state: Where an earlier run was left; a new one begins with the weights as they are.
    """

    def __init__(self, loss: Loss, batches: Batches, settings: Settings, state: State | None = None) -> None:
        self.loss, self.batches, self.settings = loss, batches, settings
        matrices = [w for w in loss.weights if w.dim() > 1]
        vectors = [w for w in loss.weights if w.dim() <= 1]  # biases and scales, which decay would pull off
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self._optimiser = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=settings.learning_rate,
            weight_decay=_WEIGHT_DECAY,
            fused=loss.device.type in ("cpu", "cuda"),
        )
        self._memory = max(1.0, _AVERAGED * settings.epochs * batches.steps)
        if state is None:
            begun, parts = loss.copies(), self._validate()
            self.state = State(
                weights=begun, average=loss.copies(), best=begun, parts=parts, initial=float(parts.mean())
            )
        else:
            self.state = state
            loss.load(state.weights)
            self._load(state.optimiser)

    def epoch(self, watch: Callable[[float], None] = lambda epochs: None) -> Ending | None:
        """Train for one epoch.

        Arguments:
            watch: Called after each batch with how many epochs are done, a fraction.

        Returns:
            How the run has ended; None where it should go on.
        """
        state, settings, started = self.state, self.settings, time.perf_counter()
        if not math.isfinite(state.initial):
            return Ending("failed", f"the validation loss is {state.initial:g} before training; look at x and the loss")
        number, total, before = state.epoch, 0.0, 0.0
        self.loss.train_mode()
        with seeded(settings.seed, Purpose.LAYERS, number):
            generator = self.loss.generator(seed_of(settings.seed, Purpose.LOSS, number))
            for k, batch in enumerate(self.batches.epoch(number)):
                self._set_rate((number + 0.5 * (before + batch.done)) / settings.epochs)
                value, slope = self._step(batch, generator)
                if not math.isfinite(value) or not math.isfinite(slope):
                    what = (
                        f"training loss became {value:g}" if not math.isfinite(value) else f"gradient became {slope:g}"
                    )
                    return Ending(
                        "failed",
                        f"the {what} in epoch {number + 1}, batch {k + 1}; lower learning_rate "
                        f"({settings.learning_rate:g}), or look for extreme values in x",
                    )
                total, before = total + value * (batch.done - before), batch.done
                watch(number + batch.done)
        state.losses.append(total)
        weights = self.loss.copies()
        self.loss.load(state.average)
        parts = self._validate()
        self.loss.load(weights)
        state.validation.append(float(parts.mean()))
        if state.validation[-1] < state.lowest:
            best = {name: t.clone() for name, t in state.average.items()}
            state.best, state.parts, state.best_epoch = best, parts, state.epoch
        state.worse = state.worse + 1 if _clearly_above(parts, state.parts) else 0
        state.seconds += time.perf_counter() - started
        return self._ending()

    def snapshot(self) -> State:
        """The state with the weights and the optimiser's moments as they are now."""
        self.state.weights = self.loss.copies()
        self.state.optimiser = {
            f"{i}/{name}": value.detach().clone()
            for i, moments in self._optimiser.state_dict()["state"].items()
            for name, value in moments.items()
        }
        return self.state

    def _ending(self) -> Ending | None:
        state, settings = self.state, self.settings
        unit = f" {self.loss.unit}" if self.loss.unit else ""
        if not math.isfinite(state.validation[-1]):
            return Ending(
                "failed",
                f"the validation loss became {state.validation[-1]:g} in epoch {state.epoch}; lower learning_rate "
                f"({settings.learning_rate:g}), or look for extreme values in x",
            )
        waited = state.worse >= settings.patience
        if not waited and state.epoch < settings.epochs:
            return None
        if not state.best_epoch:
            return Ending(
                "failed",
                f"the validation loss never fell below the {state.initial:.6g}{unit} it began with in {state.epoch} epochs; "
                "see whether x depends on θ, whether there are enough pairs, and lower learning_rate "
                f"({settings.learning_rate:g})",
            )
        if waited:
            return Ending(
                "converged", f"the validation loss was clearly above its lowest value for {settings.patience} epochs"
            )
        half = state.validation[: state.epoch // 2]
        late, whole = min(half, default=state.initial) - state.lowest, state.initial - state.lowest
        brought = (
            f"the second half of {state.epoch} epochs lowered the validation loss by {late:.3g} of {whole:.3g}{unit}"
        )
        if not state.worse:  # then the lowest may be luck, and the last weights are those that came to rest
            state.best, state.best_epoch = state.average, state.epoch
        if late <= _FLAT * whole:
            return Ending("converged", brought)
        return Ending("unfinished", f"{brought}, so that it was still falling; give more epochs")

    def _step(self, batch: Batch, generator: torch.Generator) -> tuple[float, float]:
        """One step; its loss and the size of its gradient, of which both must be finite for the weights to change."""
        self._optimiser.zero_grad()
        loss = self.loss(batch.kept, batch.theta, generator)
        if not loss.requires_grad:
            raise ModalityError(
                f"loss of {self.loss.name} must keep its graph to the weights, got a number without one; "
                "compute it without .item(), .detach() and torch.no_grad()"
            )
        loss.backward()
        slope = float(nn.utils.clip_grad_norm_(self.loss.weights, _LARGEST_GRADIENT))
        value = float(loss.detach())
        if math.isfinite(value) and math.isfinite(slope):
            self._optimiser.step()
            self._average()
        return value, slope

    @torch.no_grad()
    def _average(self) -> None:
        self.state.steps += 1
        share = max(1.0 / self._memory, 1.0 / (1.0 + 0.1 * self.state.steps))  # a shorter memory while it has little
        for name, now in self.loss.tensors().items():
            kept = self.state.average[name]
            if kept.is_floating_point():
                kept.lerp_(now, share)
            else:
                kept.copy_(now)

    def _validate(self) -> Tensor:
        """The loss of each held-out batch; with gradients, as a loss may differentiate within."""
        self.loss.modality.eval()
        with seeded(self.settings.seed, Purpose.VALIDATION):
            generator = self.loss.generator(seed_of(self.settings.seed, Purpose.VALIDATION))
            found = [self.loss(b.kept, b.theta, generator).detach().cpu() for b in self.batches.validation]
        return torch.stack(found).to(torch.float64)

    def _set_rate(self, t: float) -> None:
        cosine = 0.5 * (1.0 + math.cos(math.pi * max(0.0, t - _WARM_UP) / (1.0 - _WARM_UP)))
        for group in self._optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * min(t / _WARM_UP, 1.0) * cosine

    def _load(self, moments: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": state, "param_groups": groups})


def _clearly_above(parts: Tensor, lowest: Tensor) -> bool:
    """Whether losses of batches are above others of the same batches by more than chance would have it."""
    excess = parts - lowest
    error = float(excess.std()) / math.sqrt(len(excess)) if len(excess) > 1 else 0.0
    return float(excess.mean()) > _CLEAR * error
