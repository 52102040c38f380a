"""What a training run was: its losses, how it ended, and whether that is a reason to go on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from engine.errors import EvidenceError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Training", "TrainingError"]

_TRAINING, _VALIDATION = "#0072B2", "#D55E00"  # told apart with every kind of colour vision (Okabe and Ito)


class TrainingError(EvidenceError, ValueError):
    """Settings, pairs or a folder that a training run cannot begin with.

    Example:
        >>> issubclass(TrainingError, ValueError)
        True
    """


@dataclass(frozen=True)
class Training:
    """The record of a training run.

    Attributes:
        status: ``"converged"``: the validation loss had flattened when the run ended. ``"unfinished"``: it was still
            falling when the epochs were over. ``"failed"``: the weights are the best there were, and not to be used.
        reason: Why, in words.
        losses: The mean training loss of each epoch, while the weights were changing.
        validation_losses: The mean loss of the held-out pairs after each epoch, of the running average of the weights.
        initial_loss: The same before the first epoch.
        best_epoch: After how many epochs the weights that were kept were found; 0 for those that it began with. They are
            the last ones, unless those were clearly worse than the best before; always averages over some steps.
        simulations: θ that were simulated or given, those left out among them.
        excluded: θ that were left out because something of theirs was NaN or infinite.
        held_out: θ that only the validation loss has seen.
        constant_features: Entries of x, or features of a frozen summary, that never change: flat indices.
        seconds: What simulating (or summarising) and training took, all calls together: ``"simulate"``, ``"train"``.
        unit: The unit of the losses.

    Example:
        >>> training = Training("converged", "no better in 2 epochs", (2.0, 1.5, 1.2, 1.1), (1.9, 1.6, 1.7, 1.8), 2.5, 2,
        ...                     10_000, 3, 1000, (), {"simulate": 0.1, "train": 8.2})
        >>> print(training)
        converged — no better in 2 epochs
        <BLANKLINE>
          validation loss   1.6000 nats after 2 of 4 epochs, from 2.5000
          training loss     1.5000 nats in that epoch
          simulations       10000, 3 of them left out as not finite, 1000 held out
          seconds           simulate 0.1, train 8.2
    """

    status: str
    reason: str
    losses: tuple[float, ...]
    validation_losses: tuple[float, ...]
    initial_loss: float
    best_epoch: int
    simulations: int
    excluded: int
    held_out: int
    constant_features: tuple[int, ...]
    seconds: Mapping[str, float] = field(compare=False)
    unit: str = "nats"

    @property
    def epochs(self) -> int:
        """How many epochs were trained."""
        return len(self.losses)

    @property
    def converged(self) -> bool:
        """Whether the validation loss had flattened, by early stopping or at the end of the epochs."""
        return self.status == "converged"

    @property
    def best_loss(self) -> float:
        """The validation loss of the weights that were kept."""
        return self.validation_losses[self.best_epoch - 1] if self.best_epoch else self.initial_loss

    def to_dict(self) -> dict[str, Any]:
        """Everything a machine would want, as plain values; infinite and undefined numbers are None."""
        return _plain({**asdict(self), "epochs": self.epochs, "converged": self.converged, "best_loss": self.best_loss})

    def __str__(self) -> str:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        from engine.report.tables import as_text

        table = Table(box=box.SIMPLE_HEAD, show_header=False)
        table.add_column()
        table.add_column()
        unit = f" {self.unit}" if self.unit else ""
        left_out = f", {self.excluded} of them left out as not finite" if self.excluded else ""
        at = f"after {self.best_epoch} of {self.epochs} epochs" if self.best_epoch else "before the first epoch"
        table.add_row("validation loss", f"{self.best_loss:.4f}{unit} {at}, from {self.initial_loss:.4f}")
        if self.best_epoch:
            table.add_row("training loss", f"{self.losses[self.best_epoch - 1]:.4f}{unit} in that epoch")
        table.add_row("simulations", f"{self.simulations}{left_out}, {self.held_out} held out")
        if self.constant_features:
            shown = ", ".join(map(str, self.constant_features[:10])) + (
                ", …" if len(self.constant_features) > 10 else ""
            )
            table.add_row("constant features", shown)
        table.add_row("seconds", ", ".join(f"{what} {value:.1f}" for what, value in self.seconds.items()))
        return as_text(Text(f"{self.status} — {self.reason}"), table)

    def figure(self, path: str | PathLike[str] | None = None) -> Figure:
        """The learning curves, drawn by matplotlib.

        Arguments:
            path: Where to write the picture, in the format of its suffix; nowhere by default.

        Returns:
            The figure, which belongs to no window and no global state.

        Raises:
            ImportError: where matplotlib is not installed; ``pip install scalar-evidence[figures]``.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise ImportError("figures need matplotlib: pip install 'scalar-evidence[figures]'") from error
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        epochs = range(1, self.epochs + 1)
        axes.plot(epochs, self.losses, "--", color=_TRAINING, lw=1.5, label="training, while the weights change")
        axes.plot(range(self.epochs + 1), (self.initial_loss, *self.validation_losses), "-", color=_VALIDATION, lw=1.8,
                  label="validation, of the running average")  # fmt: skip
        axes.plot([self.best_epoch], [self.best_loss], "o", color="black", ms=6, label="weights that were kept")
        low, high = self._window()
        axes.set_ylim(low, high)
        axes.set(xlabel="epoch", ylabel=f"loss ({self.unit})" if self.unit else "loss", title=self.status)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _window(self) -> tuple[float, float]:
        """The range of losses worth showing: the first epochs may be far above all the others."""
        later = sorted(v for v in (*self.losses[1:], *self.validation_losses[1:], self.best_loss) if math.isfinite(v))
        if not later:
            return 0.0, 1.0
        low, high = later[0], max(later[int(0.9 * (len(later) - 1))], later[0])
        room = 0.05 * (high - low) or 0.05 * abs(low) or 0.05
        return low - room, high + 2 * room


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
