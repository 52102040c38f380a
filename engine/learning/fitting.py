"""Train a modality's scalar on simulations or labelled pairs: the front door."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ParameterError
from engine.learning import checkpoint
from engine.learning.batches import Batches, check_enough
from engine.learning.checkpoint import Finished, State, load_finished, load_state, save_finished, save_state
from engine.learning.folder import claim, describe, locked, refuse
from engine.learning.loss import Loss
from engine.learning.optimisation import Optimisation, Settings
from engine.learning.progress import progress_bar
from engine.learning.simulator import Purpose, Simulate, seeded
from engine.learning.sources import Given, Simulated, Source, subspace
from engine.learning.store import Pool, collect
from engine.learning.training import Training, TrainingError
from engine.modality import Modality
from engine.parameters import ParameterSpace
from engine.threads import small_work

__all__ = ["fit"]

_SAMPLE = 100_000  # rows that the standardisation is computed from, at most
_SAMPLE_OF_SUMMARY = 10_000  # the same where each row takes a call of a network
_SAMPLE_NUMBERS = 2**27
_KEPT_ROWS = 1000  # of the sample, with the trained weights


def fit(
    modality: Modality,
    *,
    prior: ParameterSpace | None = None,
    simulate: Simulate | None = None,
    simulations: int | None = None,
    pairs: Any = None,
    seed: int = 0,
    batch: int = 200,
    epochs: int = 100,
    learning_rate: float = 2e-3,
    validation: float = 0.1,
    patience: int = 30,
    initialise: bool = True,
    folder: str | PathLike[str] | None = None,
    memory: int = 2**30,
    progress: bool | None = None,
) -> Training:
    """Train a modality's scalar in place, from simulations or from labelled pairs.

    The modality ends in float64 and in evaluation mode, with ``training_prior`` set. Its weights are an average over the last
    steps, or the one that had the lowest loss on held-out θ where the last is clearly worse (see
    :mod:`engine.learning.optimisation`). It is trained in the dtype and on the device that its weights have; an
    exception leaves it as it was.

    One seed determines everything: the simulations, the weights that training begins with (every layer that has
    ``reset_parameters`` is drawn anew, but those of a frozen summary), the split, the batches and the loss's own
    randomness. The same seed gives the same bits on one machine's CPU; torch's global generator is left as it is.

    With a folder, simulations, features and checkpoints are kept there. After a crash or a kill at any moment the same call
    goes on and ends with the same bits as if nothing had happened; once it is finished, it returns at once. The simulator
    is known to the folder by its name alone: take a new folder after a change of it.

    Arguments:
        modality: What to train: a :class:`engine.learning.Learnable`, or any modality with a ``loss(x, theta)``, or
            ``loss(x, theta, generator)``, that returns the mean over rows.
        prior: Where θ is drawn from, with at least the modality's parameters; for pairs, where they were drawn from,
            if that is known.
        simulate: ``simulate(theta, generator)``, θ (n, P_m) -> x (n, *event_shape), or (n, N, *event_shape) for N exchangeable
            observations of each θ, which are N pairs. The modality's own simulator by default.
        simulations: How many θ to simulate at.
        pairs: (theta, x) instead of a simulator, shapes (n, P_m) and (n, *event_shape) or (n, N, *event_shape): tensors, numpy
            or zarr arrays; or a zarr group (or its path) with the arrays "theta" and "x". Rows with NaN are left out.
        seed: What all random numbers follow from.
        batch: Rows of a step; up to twice as many where they cannot be divided otherwise.
        epochs: How often to go through all pairs; the learning rate falls to 0 over them.
        learning_rate: Of AdamW at its highest.
        validation: The part of the θ to hold out, in (0, 1); never more than 131,072 rows.
        patience: Successive epochs with a validation loss clearly above its lowest value after which to stop.
        initialise: Whether to draw the layers' weights anew; False begins with those that the modality has, as a summary
            with weights from elsewhere needs.
        folder: Where to keep everything; new, or left by the same call.
        memory: Bytes. Pairs on disk, in the folder or in zarr arrays, that take more are read in blocks and shuffled on two
            levels: blocks among one another, and rows within several blocks. All others are in memory and shuffled whole.
        progress: Whether to show progress bars; by default on a terminal.

    Returns:
        :class:`engine.learning.Training`. Look at its ``status``; where it is ``"failed"``, there is a warning as well.

    Raises:
        ModalityError: for a modality that cannot be trained, or a simulator that breaks a rule.
        ObservationError, ParameterError: for pairs that break a rule, or a prior that lacks a parameter.
        TrainingError: for settings that are none, too few pairs, data that do not vary, and a folder of another run.

    Example:
        >>> from torch import nn
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter
        >>> from engine.learning import Learnable
        >>> class Line(Learnable):
        ...     def __init__(self, parameter_names=("t",), event_shape=(1,)):
        ...         super().__init__(parameter_names, event_shape)
        ...         self.mean, self.log_sd = nn.Linear(1, 1), nn.Parameter(torch.zeros(1))
        ...     def evidence_of(self, features, theta):
        ...         z = (features - self.mean(theta)) / self.log_sd.exp()
        ...         return (-0.5 * z.square() - self.log_sd).sum(-1)
        ...     def loss_of(self, features, theta, generator=None):
        ...         return -self.evidence_of(features, theta)
        >>> def simulate(theta, generator):
        ...     return 3.0 * theta + torch.randn(theta.shape, generator=generator)
        >>> line, prior = Line(), ParameterSpace([Parameter("t", Uniform(-1.0, 1.0))])
        >>> training = fit(line, prior=prior, simulate=simulate, simulations=10_000, epochs=20, learning_rate=0.02)
        >>> training.status
        'converged'
        >>> theta = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
        >>> line(torch.tensor([[2.0]]).double(), theta).backward()  # the score is 3 (x − 3 θ) = 1.5 there
        >>> round(theta.grad.item(), 1)
        1.5
    """
    loss = Loss(modality)
    settings = Settings(seed, batch, epochs, learning_rate, patience)
    _check(settings, validation, memory)
    source = _source(modality, prior, simulate, simulations, pairs, seed, validation)
    place = None if folder is None else Path(folder)
    with locked(place) if place else nullcontext(), _undone_on_error(loss), torch.enable_grad():
        before = loss.copies()
        if prior is not None or hasattr(modality, "training_prior"):  # which its standardise may need
            modality.training_prior = None if prior is None else subspace(prior, modality.parameter_names)  # pyright: ignore
        if initialise:
            with seeded(seed, Purpose.WEIGHTS):
                loss.redraw()
        training = None
        if place:
            choices = {**asdict(settings), "validation": validation, "initialise": initialise, "memory": memory}
            identity = {**choices, **source.identity(), **describe(modality), "prior": _text(prior, modality)}
            training = _finished(place, identity, loss, before)
        if training is None:
            pool = collect(source, loss, place / "pairs" if place else None, memory, progress)
            with small_work(batch * max(max(w.shape, default=1) for w in loss.weights)):
                training = _train(loss, source, pool, settings, validation, memory, place, progress)
        modality.to(torch.float64).eval()
        modality.training_status = training.status  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    if training.status == "failed":
        warnings.warn(f"training {loss.name} failed: {training.reason}", stacklevel=2)
    return training


def _train(
    loss: Loss,
    source: Source,
    pool: Pool,
    settings: Settings,
    validation: float,
    memory: int,
    folder: Path | None,
    progress: bool | None,
) -> Training:
    batches = Batches(pool, len(loss.modality.parameter_names), validation, settings.batch, memory, settings.seed)
    constant, features, theta = _standardise(loss, batches)
    run = Optimisation(loss, batches, settings, load_state(folder) if folder else None)
    ending, saved = None, time.monotonic()
    with progress_bar(progress, "training", settings.epochs) as update:
        while ending is None:
            ending = run.epoch(lambda done: update(done, _curves(run.state)))
            if folder and ending is None and time.monotonic() - saved >= checkpoint.EVERY:
                save_state(folder, run.snapshot())
                saved = time.monotonic()
    state = run.state
    loss.load(state.best)
    training = Training(
        status=ending.status,
        reason=ending.reason,
        losses=tuple(state.losses),
        validation_losses=tuple(state.validation),
        initial_loss=state.initial,
        best_epoch=state.best_epoch,
        simulations=source.count,
        excluded=pool.excluded,
        held_out=batches.held_out,
        constant_features=constant,
        seconds={"simulate": pool.seconds, "train": state.seconds},
        unit=loss.unit,
    )
    if folder:
        few = slice(None, _KEPT_ROWS)
        save_finished(folder, Finished(state.best, features[few].clone(), theta[few].clone(), asdict(training)))
    return training


def _finished(folder: Path, identity: dict[str, Any], loss: Loss, before: dict[str, Tensor]) -> Training | None:
    """What a run that has ended left in the folder; TrainingError where the folder belongs to another run."""
    differences, found = claim(folder, identity), load_finished(folder)
    if found is not None and set(differences) <= {"weights", "configuration"}:  # perhaps what was trained there itself
        same = before.keys() == found.weights.keys()
        same = same and all(torch.equal(before[name].double(), t.double()) for name, t in found.weights.items())
        differences = [] if same else differences
    if differences:
        refuse(folder, differences, identity)
    if found is None:
        return None
    _tell(loss, found.features, found.theta)
    loss.load(found.weights)
    record: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.record.items()}
    return Training(**record)


def _tell(loss: Loss, features: Tensor, theta: Tensor) -> None:
    """Have the modality standardise itself, where it can."""
    standardise = getattr(loss.modality, "standardise", None)
    if callable(standardise):
        standardise(features, theta)


def _standardise(loss: Loss, batches: Batches) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Give the modality the means and spreads of its training data.

    Returns:
        Which entries of what is kept are constant, and the features and θ that it was given.
    """
    modality = loss.modality
    numbers = batches.validation[0].kept[0].numel()
    most = min(_SAMPLE_OF_SUMMARY if loss.trains_summary else _SAMPLE, max(1000, _SAMPLE_NUMBERS // max(1, numbers)))
    kept, theta = batches.sample(most)
    for name, low, high in zip(modality.parameter_names, theta.amin(0).tolist(), theta.amax(0).tolist(), strict=True):
        if low == high:
            raise TrainingError(
                f"θ must vary in what a scalar is trained on, got {name} = {low:g} throughout; leave it out"
            )
    rows = kept.reshape(len(kept), -1)
    constant = (rows.amax(0) == rows.amin(0)).nonzero().flatten().tolist()
    if len(constant) == rows.shape[1]:
        what = "every feature of the frozen summary" if loss.frozen else "every entry of x"
        raise TrainingError(
            f"x must vary with θ, got a constant in {what} over {len(rows)} rows (feature 0 is always {rows[0, 0]:g}): the "
            "simulator does not depend on anything; look at what it returns"
        )
    features = loss.features(kept) if callable(getattr(modality, "raw_features", None)) and not loss.frozen else kept
    _tell(loss, features, theta)
    return tuple(constant), features, theta


def _source(
    modality: Modality,
    prior: ParameterSpace | None,
    simulate: Simulate | None,
    simulations: int | None,
    pairs: Any,
    seed: int,
    validation: float,
) -> Source:
    names, event = modality.parameter_names, modality.event_shape
    if prior is not None and not isinstance(prior, ParameterSpace):
        raise ParameterError(
            f"prior must be a ParameterSpace, got {type(prior).__name__}; write prior=ParameterSpace([...]), or a "
            "registry's .parameters"
        )
    if pairs is not None:
        if simulate is not None or simulations is not None:
            raise TrainingError(
                "fit takes pairs or a simulator, got both; leave out simulate and simulations, or pairs"
            )
        return Given(pairs, names, event, prior)
    if simulate is None and modality.has_simulator:
        simulate = modality.simulate
    if simulate is None or not callable(simulate):
        raise TrainingError(
            "fit needs data: a simulator or pairs, got neither; pass simulate=function(theta, generator) with simulations=, "
            "or pairs=(theta, x)"
        )
    if prior is None:
        raise TrainingError("simulations need a prior to draw θ from, got none; pass prior=registry.parameters")
    if not _whole(simulations) or simulations is None or simulations < 1:
        raise TrainingError(f"simulations must be a whole number >= 1, got {simulations!r}; 10_000 is a start")
    check_enough(simulations, max(1, round(validation * simulations)), len(names))
    name = type(modality).__name__
    label = "the simulator" if name.startswith("_") else f"the simulator of {name}"  # private: what trains another
    return Simulated(simulate, prior, names, event, simulations, seed, label)


def _check(settings: Settings, validation: float, memory: int) -> None:
    for name in ("batch", "epochs", "patience"):
        value = getattr(settings, name)
        if not _whole(value) or value < 1:
            raise TrainingError(f"{name} must be a whole number >= 1, got {value!r}")
    if not _whole(settings.seed):
        raise TrainingError(f"seed must be a whole number, got {settings.seed!r}")
    rate = settings.learning_rate
    if not isinstance(rate, int | float) or not 0.0 < rate < math.inf:
        raise TrainingError(f"learning_rate must be a number > 0, got {rate!r}; 2e-3 is the default")
    if not isinstance(validation, int | float) or not 0.0 < validation < 1.0:
        raise TrainingError(f"validation must lie between 0 and 1, got {validation!r}; 0.1 holds out a tenth of the θ")
    if not _whole(memory) or memory < 1:
        raise TrainingError(f"memory must be a number of bytes >= 1, got {memory!r}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(prior: ParameterSpace | None, modality: Modality) -> list[str]:
    if prior is None:
        return []
    return [*(repr(prior[name].to_toml()) for name in modality.parameter_names), *map(repr, prior.constraints)]


def _curves(state: State) -> str:
    if not state.losses:
        return f"validation {state.initial:.4f}"
    return f"training {state.losses[-1]:.4f}  validation {state.validation[-1]:.4f}  best {state.lowest:.4f}"


@contextmanager
def _undone_on_error(loss: Loss) -> Iterator[None]:
    """Put weights, buffers, modes, configuration and prior back where the block raises."""
    modality: Any = loss.modality
    tensors, modes = loss.copies(), [(m, m.training) for m in modality.modules()]
    known = modality.configuration
    prior = getattr(modality, "training_prior", None)
    try:
        yield
    except BaseException:
        loss.load(tensors)
        modality._configuration = known
        if hasattr(modality, "training_prior"):
            modality.training_prior = prior
        for module, training in modes:
            module.training = training
        raise
