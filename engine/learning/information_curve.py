"""Bottlenecks trained on paired rows, and β swept through what they keep: the information curve.

References:
    | Tishby, Pereira, Bialek (1999), The information bottleneck method, https://arxiv.org/abs/physics/0004057, the curve
    | Chechik, Globerson, Tishby, Weiss (2005), Information bottleneck for Gaussian variables, J. Mach. Learn. Res. 6, 165
    | Loshchilov and Hutter (2019), https://arxiv.org/abs/1711.05101, AdamW
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.learning.bottleneck import InformationBottleneck
from engine.learning.progress import progress_bar
from engine.learning.simulator import Purpose, generator_of, seeded
from engine.learning.training import TrainingError
from engine.threads import small_work

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Kept", "Sweep", "fit_bottleneck", "sweep"]

_LARGEST_GRADIENT = 5.0
_WEIGHT_DECAY = 1e-4
_WARM_UP = 0.05


@dataclass(frozen=True)
class Kept:
    """What a trained bottleneck keeps and tells of rows it has not seen, in nats.

    Attributes:
        beta: β.
        encoder: Latent -> the bound from above on I(data; latent).
        decoder: Node -> what is told of it: a critic's bound from below, or how much more likely data are than under the best
            decoder that sees no latent.
        losses: The mean training loss of each epoch.

    Example:
        >>> kept = Kept(1.0, {"Z": 2.0}, {"X": 1.25, "Y": 0.5}, (3.0, 2.0))
        >>> kept.compression, kept.prediction
        (2.0, 1.75)
    """

    beta: float
    encoder: Mapping[str, float]
    decoder: Mapping[str, float]
    losses: tuple[float, ...]

    @property
    def compression(self) -> float:
        """I_E, the sum over latents with their weights left out."""
        return sum(self.encoder.values())

    @property
    def prediction(self) -> float:
        """I_D, likewise."""
        return sum(self.decoder.values())


def fit_bottleneck(
    model: InformationBottleneck,
    data: Mapping[str, Tensor],
    *,
    beta: float,
    epochs: int = 100,
    batch: int = 128,
    learning_rate: float = 2e-3,
    validation: float = 0.1,
    seed: int = 0,
    progress: bool | None = None,
) -> Kept:
    """Train a bottleneck in place on paired rows; it ends in evaluation mode.

    Arguments:
        model: Its weights are where training begins, in their own dtype.
        data: Data node -> (n, *event_shape), row i of all belongs together; standardise what is not a probability.
        beta: β > 0: how many nats of what is kept a nat of what is told is worth.
        epochs: How often to go through all rows; the learning rate rises over the first of them and falls to 0.
        batch: Rows of a step; more bound a critic less.
        learning_rate: Of AdamW at its highest.
        validation: The part of the rows that training does not see.
        seed: Of the split, the order and the draws.
        progress: Whether to show a bar; by default on a terminal.

    Returns:
        :class:`Kept`, of the rows held out.

    Raises:
        TrainingError: for data that break a rule or never change, naming the node, and a loss that is not finite.

    Example:
        >>> x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
        >>> with torch.random.fork_rng():
        ...     _ = torch.manual_seed(0)
        ...     model = InformationBottleneck("dvib", {"X": 3, "Y": 1}, latents=1, hidden=(16,))
        >>> kept = fit_bottleneck(model, {"X": x, "Y": x[:, :1]}, beta=10.0, epochs=40, batch=60, learning_rate=0.01,
        ...                       progress=False)
        >>> 0.5 < kept.decoder["Y"] < kept.encoder["Z"]  # what is told has to be kept
        True
    """
    _check_beta(beta)
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise TrainingError(f"epochs must be a whole number >= 1, got {epochs!r}; 100 is the default")
    rows, held = _checked(model, data, validation, seed)
    n = len(next(iter(rows.values())))
    if not 2 <= batch <= n:
        raise TrainingError(f"batch must lie between 2 and the {n} rows that are not held out, got {batch}")
    for node, x in rows.items():
        if bool((x == x[:1]).all()):
            raise TrainingError(
                f"data of '{node}' must vary, got the same row {n} times ({x[:1].flatten().tolist()!s:.60}): there is nothing to keep "
                "or to tell; look at where it comes from, or build the bottleneck without it"
            )
    generator = generator_of(seed, Purpose.LOSS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    steps, losses = epochs * (n // batch), []

    def rate(step: int) -> float:
        t = (step + 1) / steps
        return min(t / _WARM_UP, 1.0) * 0.5 * (1.0 + math.cos(math.pi * max(0.0, t - _WARM_UP) / (1.0 - _WARM_UP)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    model.train()
    widest = max(max(w.shape, default=1) for w in model.parameters())
    with progress_bar(progress, f"β = {beta:g}", epochs) as update, torch.enable_grad(), small_work(batch * widest):
        for epoch in range(epochs):
            total = 0.0
            order = torch.randperm(n, generator=generator)
            for some in order[: n // batch * batch].reshape(-1, batch):
                loss = model.loss({node: x[some] for node, x in rows.items()}, beta, generator)
                if not math.isfinite(float(loss.detach())):
                    raise TrainingError(
                        f"the loss of '{model.objective.name}' must be finite, got {float(loss.detach()):g} in epoch {epoch + 1}; "
                        "lower learning_rate, or standardise the data"
                    )
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
                optimiser.step()
                schedule.step()
                total += float(loss.detach())
            losses.append(total / (n // batch))
            update(epoch + 1, f"{losses[-1]:.4f}")
    model.eval()
    with torch.no_grad():
        kept, told = model.terms(held, generator_of(seed, Purpose.VALIDATION))
        base = model.baseline(rows, held)
    return Kept(
        beta,
        {node: float(v) for node, v in kept.items()},
        {node: float(v) - base.get(node, 0.0) for node, v in told.items()},
        tuple(losses),
    )


def _check_beta(beta: object) -> None:
    if not isinstance(beta, int | float) or isinstance(beta, bool) or not 0.0 < beta < math.inf:
        raise TrainingError(f"beta must be a number > 0, got {beta!r}; 1 is where both sides count alike")


def _checked(
    model: InformationBottleneck, data: Mapping[str, Tensor], validation: float, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows to train on, and rows held out, in the dtype of the weights."""
    if not 0.0 < validation < 1.0:
        raise TrainingError(
            f"validation must lie between 0 and 1, got {validation!r}; 0.1 holds out a tenth of the rows"
        )
    dtype = next(model.parameters()).dtype
    found, n = {}, 0
    for node, entries in model.entries.items():
        x = data.get(node)
        if not isinstance(x, Tensor) or x.dim() < 1 or x[:1].numel() != entries:
            seen = "nothing" if x is None else f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TrainingError(
                f"data of '{node}' must have {entries} entries a row, got {seen}; correct entries or data"
            )
        n = n or len(x)
        if len(x) != n:
            raise TrainingError(
                f"data must have as many rows for every node, got {len(x)} of '{node}' and {n} before it"
            )
        if not bool(torch.isfinite(x).all()):
            row = int((~torch.isfinite(x.reshape(n, -1)).all(-1)).nonzero()[0])
            raise TrainingError(f"data of '{node}' must be finite, got row {row} that is not; leave it out")
        found[node] = x.to(dtype)
    number = max(2, round(validation * n))
    if n - number < 2:
        raise TrainingError(f"at least 4 rows are needed, got {n}; 2 of them are held out")
    order = torch.randperm(n, generator=generator_of(seed, Purpose.SPLIT))
    return {v: x[order[number:]] for v, x in found.items()}, {v: x[order[:number]] for v, x in found.items()}


@dataclass(frozen=True)
class Sweep:
    """Trained bottlenecks for several β.

    Attributes:
        points: What each keeps and tells, in the order of β as given.
        models: The trained networks.

    Example:
        >>> Sweep((Kept(1.0, {"Z": 2.0}, {"Y": 0.5}, ()),), ()).points[0].beta
        1.0
    """

    points: tuple[Kept, ...]
    models: tuple[InformationBottleneck, ...]

    def figure(self, path: str | PathLike[str] | None = None) -> Figure:
        """What is told against what is kept; see :func:`engine.report.bottleneck.information_figure`, which takes the same path."""
        from engine.report.bottleneck import information_figure

        return information_figure(self.points, path)


def sweep(
    build: Callable[[], InformationBottleneck],
    data: Mapping[str, Tensor],
    betas: Sequence[float],
    *,
    seed: int = 0,
    **settings: float | bool | None,
) -> Sweep:
    """Train one bottleneck for each β, all from the same first weights.

    Arguments:
        build: Makes a new one.
        data: As :func:`fit_bottleneck` takes it.
        betas: Each > 0, at least one.
        seed: Of the weights, and of everything that :func:`fit_bottleneck` draws.
        settings: Others of :func:`fit_bottleneck`.

    Raises:
        TrainingError: for no β, or one that is none, before any training. Others as :func:`fit_bottleneck`.

    Example:
        >>> x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
        >>> def build():
        ...     return InformationBottleneck("beta-vae", {"X": 2}, latents=2, hidden=(16,))
        >>> found = sweep(build, {"X": x}, [0.1, 10.0], epochs=10, batch=30, progress=False)
        >>> found.points[0].compression < found.points[1].compression
        True
    """
    try:
        betas = tuple(betas)
    except TypeError:
        raise TrainingError(f"betas must be a sequence of β > 0, got {betas!r}; write [0.1, 1.0, 10.0]") from None
    if not betas:
        raise TrainingError("betas must hold at least one β > 0, got none; [0.1, 1.0, 10.0] is a start")
    for beta in betas:
        _check_beta(beta)
    points, models = [], []
    for beta in betas:
        with seeded(seed, Purpose.WEIGHTS):
            model = build()
        points.append(fit_bottleneck(model, data, beta=beta, seed=seed, **settings))  # pyright: ignore[reportArgumentType]
        models.append(model)
    return Sweep(tuple(points), tuple(models))
