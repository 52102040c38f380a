"""How a modality's loss is called: with what, in which dtype, and which of its numbers training may change."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ModalityError
from engine.learning.learnable import Learnable
from engine.modality import Modality

__all__: list[str] = []

_ROWS = 256  # that a frozen summary is given at once


class Loss:
    """The loss of a modality, as a function of rows of what is kept of x and rows of θ.

    What is kept of x is x itself, or the features of a frozen summary.

    Raises:
        ModalityError: for anything that has no loss to train by, or no weights to train.
    """

    def __init__(self, modality: object) -> None:
        if not isinstance(modality, Modality):
            raise ModalityError(
                f"fit trains an engine.Modality, got {type(modality).__name__}; wrap the network in an "
                "engine.learning.Learnable, with evidence_of and loss_of"
            )
        self.modality, self.name = modality, type(modality).__name__
        loss = getattr(modality, "loss", None)
        if not callable(loss):
            raise ModalityError(
                f"fit needs a modality with a loss, got {self.name} without one; write loss(self, x, theta, generator=None), "
                "the mean over rows x (n, *event_shape) and theta (n, P_m), or derive it from engine.learning.Learnable"
            )
        self._loss: Callable[..., Any] = loss
        takes = inspect.signature(loss).parameters
        self._takes_generator = "generator" in takes
        self.frozen = bool(getattr(modality, "frozen_summary", False)) and "features" in takes
        self.unit = str(getattr(modality, "loss_unit", "nats"))
        self.weights = [w for w in modality.parameters() if w.requires_grad]
        if not self.weights:
            raise ModalityError(
                f"fit needs weights to train, got {self.name} with none that has requires_grad; "
                "switch it on for those that training may change"
            )
        self.device = self.weights[0].device
        self._dtype = modality.dtype
        learnable = [(name, m) for name, m in modality.named_modules() if isinstance(m, Learnable)]
        self.trains_summary = any(m.summary is not None and not m.frozen_summary for _, m in learnable)
        own = [w.dtype for w in modality.parameters() if w.is_floating_point()]
        self._rounds = self.trains_summary and set(own) == {torch.float32}  # a network sees x before it is standardised
        frozen = [(name, m.summary) for name, m in learnable if m.summary is not None and m.frozen_summary]
        self._left_alone = tuple(f"{name}.summary.".lstrip(".") for name, _ in frozen)
        self._frozen = [summary for _, summary in frozen]

    def keep(self, x: Tensor) -> Tensor:
        """What training needs of x (n, N, *event_shape): (n, N, *event_shape) or features (n, N, F)."""
        if self.frozen:
            return self.features(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return x.to(torch.float32) if self._rounds else x

    def features(self, x: Tensor) -> Tensor:
        """The raw features (n, F) of rows x, without a graph and with every layer in evaluation mode."""
        modality: Any = self.modality
        if not len(x):
            return torch.zeros(0, modality.features)
        with torch.no_grad(), _evaluating(modality):
            found = torch.cat([modality.raw_features(rows.to(self.device)) for rows in x.split(_ROWS)]).cpu()
        return found if found.dtype in (torch.float32, torch.float64) else found.to(torch.float32)

    def __call__(self, kept: Tensor, theta: Tensor, generator: torch.Generator) -> Tensor:
        """The mean loss of rows kept (n, ...) and theta (n, P_m): a number, with its graph to the weights."""
        kept, theta = kept.to(self.device), theta.to(self.device)
        options: dict[str, Any] = {"generator": generator} if self._takes_generator else {}
        if self.frozen:
            value = self._loss(None, theta, features=kept, **options)
        elif isinstance(self.modality, Learnable):  # standardises before it rounds
            value = self._loss(kept, theta, **options)
        else:
            value = self._loss(kept.to(self._dtype), theta.to(self._dtype), **options)
        if not isinstance(value, Tensor) or value.numel() != 1:
            seen = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ModalityError(f"loss of {self.name} must return one number, got {seen}; take the mean over rows")
        return value.reshape(())

    def generator(self, seed: int) -> torch.Generator:
        """A generator where the weights are."""
        return torch.Generator(device=self.device).manual_seed(seed)

    def train_mode(self) -> None:
        """Training mode for all but frozen summaries."""
        self.modality.train()
        for summary in self._frozen:
            summary.eval()

    def tensors(self) -> dict[str, Tensor]:
        """All weights and buffers by name, but those of frozen summaries: what training may change."""
        named = (*self.modality.named_parameters(), *self.modality.named_buffers())
        return {name: t for name, t in named if not name.startswith(self._left_alone)}

    def copies(self) -> dict[str, Tensor]:
        """Copies of :meth:`tensors` for :meth:`load`."""
        return {name: t.detach().clone() for name, t in self.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back the values of :meth:`copies`, in the dtypes that they had then."""
        for name, mine in self.tensors().items():
            mine.data = tensors[name].to(mine.device, copy=True)

    def redraw(self) -> None:
        """Draw the weights anew with torch's global generator, layer by layer.

        A module that has ``reset_parameters`` speaks for everything inside it. A part without trainable weights
        is left alone, and so is every weight with ``requires_grad`` off.
        """
        fixed = [(w, w.detach().clone()) for w in self.modality.parameters() if not w.requires_grad]
        with torch.no_grad():
            _redraw(self.modality)
            for weight, value in fixed:
                weight.copy_(value)


def _redraw(module: nn.Module) -> None:
    weights = list(module.parameters())
    if weights and not any(w.requires_grad for w in weights):
        return
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for child in module.children():
        _redraw(child)
    if isinstance(module, nn.MultiheadAttention):  # the one layer of torch that hides it
        module._reset_parameters()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each layer's own mode comes back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
