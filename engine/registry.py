r"""The front door: a workspace whose ledger only grows, and every question that its sum can answer.

A workspace is a folder with ``registry.toml`` (see :mod:`engine.ledger`) and ``plugins/`` (see
:mod:`engine.plugin`). A :class:`Registry` is a view of it as it was when opened or last appended to.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from engine.admission import Admission, admit, read_admission
from engine.agreement import new_constraints, united
from engine.certificate.certificate import Certificate
from engine.checks import CalibrationCheck, PredictiveCheck, check_calibration, check_predictions
from engine.constraints import SpaceConstraint
from engine.datasets import DataSets
from engine.errors import ObservationError, RegistryError, UnknownPluginError
from engine.estimate import estimate
from engine.evidence import Evidence
from engine.hypotheses import Comparison, compare, probabilities
from engine.information.dependence import Dependence, Pairs, with_dependence
from engine.joining import join_data_sets, partners, refuse_bad_parts
from engine.layer import EstimationLayer
from engine.learning.simulator import Simulate
from engine.ledger import ConstraintEntry, Ledger, PluginEntry, Verification
from engine.many import Estimates, estimate_many
from engine.modality import Modality
from engine.observations import Observations, refuse_nameless
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from engine.plugin import describe, read_certificate, read_observations, read_plugin, write_plugin
from engine.posterior.marginal import BayesFactor, bayes_factor, refuse_unnormalised
from engine.posterior.result import Posterior
from engine.refinement.estimate import refined_estimate, refined_estimates
from engine.refinement.law import Laws
from engine.refinement.refine import Sets, Single, laws_of
from engine.result import Estimate
from engine.shares import Shares, shares
from engine.shifts import BeforeAfter, before_after
from engine.tension import Groups, Tension, chosen, tension
from engine.trust import TrustedPlugin, judged, judged_many

__all__ = ["Registry"]

Names = str | Sequence[str]


class Registry:
    """An append-only registry of parameters, what constrains them, and plugins; see :meth:`create` and :meth:`open`.

    Arguments:
        ledger: What ``registry.toml`` says.
        trust: As for :meth:`open`.
        read_only: Whether nothing may be appended.

    Example:
        >>> import tempfile, torch
        >>> from torch.distributions import Uniform
        >>> from modalities import PoissonCounts
        >>> folder = tempfile.mkdtemp() + "/my-analysis"
        >>> registry = Registry.create(folder, parameters=[Parameter("mu", prior=Uniform(0.0, 10.0))])
        >>> counts = PoissonCounts(signal=torch.tensor([5.0, 9.0]), background=torch.tensor([50.0, 40.0]), strength="mu")
        >>> registry.append("tracker", counts).name
        'tracker'
        >>> fit = Registry.open(folder).estimate({"tracker": torch.tensor([[57.0, 49.0]])})
        >>> fit.status, round(fit["mu"].value, 3), round(fit["mu"].error, 3)
        (<Status.CONVERGED: 'converged'>, 1.087, 0.696)
    """

    def __init__(self, ledger: Ledger, *, trust: bool = False, read_only: bool = False) -> None:
        self._ledger = ledger
        self._trust = trust
        self._read_only = read_only
        self._live: dict[str, Modality] = {}  # by content, so that a superseded plugin keeps its own
        self._certificates: dict[str, Admission | None] = {}
        self._checked: set[str] = set()

    # -- the ledger ---------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | PathLike[str],
        parameters: Sequence[Parameter] = (),
        constraints: Sequence[SpaceConstraint] = (),
    ) -> Registry:
        """A new workspace with its first parameters.

        Arguments:
            path: Its folder; it is made where it is not there.
            parameters: θ's components, in order; more can come with plugins.
            constraints: What several of them must satisfy together (:class:`engine.Linear`, :class:`engine.Simplex`,
                :class:`engine.PositiveSemidefinite`, :class:`engine.Ball`); more can come later.

        Raises:
            RegistryError: where there is a registry already.
            ParameterError: for a parameter declared twice, or constraints that conflict.
        """
        return cls(Ledger.create(Path(path), list(parameters), list(constraints)))

    @classmethod
    def open(cls, path: str | PathLike[str] = ".", *, trust: bool = False) -> Registry:
        """The workspace in a folder. Checks the ledger's chain of seals; runs no plugin code.

        Arguments:
            path: The folder that has ``registry.toml``.
            trust: Whether plugins may import modules that no installed package declares, and run Python
                files that they bring along. Read those first.

        Raises:
            RegistryError: where there is no registry, or it cannot be read.
            TamperedError: naming the entry that is not what was written.
        """
        return cls(Ledger.open(Path(path)), trust=trust)

    @property
    def path(self) -> Path:
        """The workspace's folder."""
        return self._ledger.path

    @property
    def parameters(self) -> ParameterSpace:
        """θ's components, in the order that every (..., P) follows, with their ``constraints``."""
        return self._ledger.parameters

    @property
    def plugins(self) -> Mapping[str, PluginEntry]:
        """What the ledger knows of each plugin in force, by name, in order of entry."""
        return MappingProxyType(self._ledger.plugins)

    @property
    def history(self) -> tuple[PluginEntry, ...]:
        """Every plugin ever appended, superseded ones too, in order of entry."""
        return tuple(self._ledger.history)

    @property
    def digest(self) -> str:
        """SHA-256 of the parameters, what constrains them and the plugins in force, whatever order they came in."""
        return self._ledger.digest

    def append(
        self,
        name: str,
        modality: Modality,
        *,
        parameters: Sequence[Parameter] = (),
        constraints: Sequence[SpaceConstraint] = (),
        observations: Any = None,
        supersede: bool = False,
        code: str | PathLike[str] | None = None,
        certificate: Certificate | None = None,
        force: str = "",
    ) -> PluginEntry:
        """Register a modality under a name, for good; nothing already there is touched.

        Arguments:
            name: Letters, digits, ``-`` and ``_``; new, unless ``supersede``.
            modality: The instance; its configuration and weights are written to ``plugins/``.
            parameters: Parameters that the plugin brings along. One that is there already must agree.
            constraints: What parameters must satisfy together from now on, in every query of this registry; see
                :meth:`constrain`.
            observations: The plugin's own data, shape (N, *event_shape), used by queries that give no data at all.
            supersede: Put it in the place of the plugin of this name, which stays in the history.
            code: A Python file that defines the modality's class, to be shipped in the plugin's folder. It
                is run by nobody who does not say ``trust=True``.
            certificate: What :func:`engine.certificate.certify` found of a learned modality. Without one the plugin is
                uncertified, and every estimate says so.
            force: Why a plugin that fails admission is registered all the same; it is on record, and every estimate
                says it.

        Returns:
            The ledger's entry.

        Raises:
            RegistryError: for a name that is taken or not allowed, or parameters that nobody declared.
            ParameterError: when a parameter's unit, bounds or prior, or a constraint, disagree with what is declared.
            ModalityError: when the modality cannot be written down and built again, fails on its data, or is learned and
                fails admission (:mod:`engine.admission`).
            ObservationError: for data that break a rule, or are another plugin's data.
        """
        if self._read_only:
            raise RegistryError(
                "this is a view of the past, made by registry.at(): append to Registry.open(path) instead"
            )
        if not isinstance(modality, Modality):
            raise RegistryError(f"a plugin is an engine.Modality, got {type(modality).__name__}; subclass Modality")
        modality = copy.deepcopy(modality).eval()
        refuse_bad_parts(
            name, modality, observations, self.plugins, lambda p: describe(self._folder(self._entry(p))).event_shape
        )
        admission = admit(name, modality, certificate, self.parameters, force)
        stored = None
        if observations is not None:
            stored = Observations({name: observations}, {name: modality})[name]
            self._try(name, modality, parameters, constraints, stored)
        source = None if code is None else Path(code)

        def write(folder: Path) -> None:
            write_plugin(
                folder, modality, parameters=parameters, observations=stored, code=source, certificate=admission
            )

        self._ledger = self._ledger.append(list(parameters), (name, write), supersede, list(constraints))
        entry = self._ledger.plugins[name]
        self._live[entry.content] = modality
        return entry

    def constrain(self, *constraints: SpaceConstraint) -> tuple[ConstraintEntry, ...]:
        """Have parameters satisfy something together, for good: constraints are never removed.

        Arguments:
            constraints: Of parameters that are declared. One that is there already, with the same meaning under
                whatever name, is left out.

        Returns:
            The ledger's new entries.

        Raises:
            ParameterError: for a parameter that nobody declared or that is discrete, a name that has another meaning,
                or constraints that leave θ no room: the message names those that conflict.
            RegistryError: for a view of the past.

        Example:
            >>> import tempfile
            >>> from engine import Linear
            >>> registry = Registry.create(tempfile.mkdtemp(), [Parameter("a"), Parameter("b")])
            >>> [entry.constraint for entry in registry.constrain(Linear({"a": 1, "b": 1}, equal=0))]
            [Linear(a + b = 0)]
            >>> registry.constrain(Linear({"a": 1}, lower=1), Linear({"b": 1}, lower=1))
            Traceback (most recent call last):
            engine.errors.ParameterError: no θ satisfies these together: 'a + b = 0', '1 ≤ a', '1 ≤ b'; relax one of them
        """
        before = len(self._ledger.entries)
        self._ledger = self._ledger.append(constraints=constraints)
        new, asked = self._ledger.entries[before:], {c.meaning() for c in constraints}
        return tuple(e for e in new if isinstance(e, ConstraintEntry) and e.constraint.meaning() in asked)

    def _try(
        self,
        name: str,
        modality: Modality,
        parameters: Sequence[Parameter],
        constraints: Sequence[SpaceConstraint],
        x: Tensor,
    ) -> None:
        """Score the plugin's own data once before anything is written, beside the data already here."""
        others = {n: self.plugins[n] for n in self.observed if n != name}
        Observations(
            {**{n: self.observed[n] for n in others}, name: x},
            {**{n: self.modality(n) for n in others}, name: modality},
        )
        together = united(self._ledger.entries, {f"the append of '{name}'": parameters})
        fresh = new_constraints(self._ledger.entries, constraints)
        space = ParameterSpace(together, [*self.parameters.constraints, *fresh])
        if all(p in space for p in modality.parameter_names) and not any(space.discrete):
            Evidence(space, {name: modality}, {name: x}).derivatives(space.interior[None])

    def verify(self) -> Verification:
        """Check every byte: the chain of seals, and every plugin's folder against its entry.

        Returns:
            How many parameters, plugins, superseded plugins and files were checked.

        Raises:
            TamperedError: naming the entry, and the file, that is not what was written.
        """
        return self._ledger.verify()

    def at(self, digest: str) -> Registry:
        """The registry as it was when it had a digest, to ask but not to append to.

        Arguments:
            digest: "sha256:...", or at least 8 of its hexadecimal digits.

        Raises:
            RegistryError: when it never had; the message lists the digests it had.
        """
        past = Registry(self._ledger.at(digest), trust=self._trust, read_only=True)
        past._live = self._live
        return past

    def modality(self, name: str) -> Modality:
        """The live module of a plugin, in evaluation mode.

        Arguments:
            name: A plugin in force.

        Raises:
            UnknownPluginError: for a name that is not there.
            UntrustedError: when its class would run code that nobody said to trust.
            TamperedError: when its folder is not what was written.
        """
        entry = self._entry(name)
        if entry.content not in self._live:
            self._live[entry.content] = read_plugin(self._folder(entry), trust=self._trust, check=False)
        return self._live[entry.content]

    def chosen(self, only: Names | None = None, without: Names | None = None) -> list[str]:
        """The plugins in force that a question is about, by name.

        Arguments:
            only, without: Names of plugins to keep or to leave out; all that are in force by default.

        Raises:
            UnknownPluginError: for a name that is not there.
        """
        keep, drop = list(self.plugins) if only is None else _names(only), _names(without or ())
        for name in (*keep, *drop):
            self._entry(name)
        return [name for name in keep if name not in drop]

    def _entry(self, name: str) -> PluginEntry:
        if name not in self.plugins:
            raise UnknownPluginError(f"no plugin '{name}'; there are {', '.join(self.plugins) or 'none'}")
        return self.plugins[name]

    def _folder(self, entry: PluginEntry) -> Path:
        """A plugin's folder, every byte checked against the ledger once for this view."""
        if entry.content not in self._checked:
            self._ledger.check(entry)
            self._checked.add(entry.content)
        return self._ledger.folder_of(entry)

    def folder(self, name: str) -> Path:
        """Where a plugin in force is kept; checked against the ledger.

        Arguments:
            name: A plugin in force.

        Raises:
            UnknownPluginError: for a name that is not there.
            TamperedError: when the folder is not what was written.
        """
        return self._folder(self._entry(name))

    def certificate(self, name: str) -> Certificate | None:
        """What was found of a learned plugin when it was admitted; None where there is no certificate.

        Arguments:
            name: A plugin in force.

        Raises:
            UnknownPluginError: for a name that is not there.
            TamperedError: when the folder is not what was written.
        """
        entry = self._entry(name)
        if entry.content not in self._certificates:
            found = read_certificate(self._folder(entry))
            self._certificates[entry.content] = None if found is None else read_admission(found, name)
        found = self._certificates[entry.content]
        return None if found is None else found.certificate

    def _forced(self, name: str) -> str:
        found = self._certificates.get(self._entry(name).content)
        return "" if found is None else found.forced

    @property
    def observed(self) -> Mapping[str, Tensor]:
        """The data that plugins brought along, by name: (N, *event_shape), float64."""
        out: dict[str, Tensor] = {}
        for name, entry in self.plugins.items():
            if (x := read_observations(self._folder(entry))) is not None:
                out[name] = x
        return out

    # -- the sum and its answers --------------------------------------------------------------------------

    def evidence(
        self,
        data: Any = None,
        *,
        prior: bool = False,
        only: Names | None = None,
        without: Names | None = None,
        allow_identical: bool = False,
    ) -> Evidence:
        """The sum over this data as a function of θ.

        Arguments:
            data: plugin name -> (N, *event_shape), any subset of the plugins (or a zarr group, or its
                path); None takes the data that plugins brought along.
            prior: Whether to add the log prior, once.
            only, without: Names of plugins to keep or to leave out. An interaction takes part where all of its parts do, unless
                it is left out by name.
            allow_identical: Take equal data of two plugins as two measurements that agree.

        Raises:
            ObservationError, UnknownPluginError, ModalityError, UntrustedError: as each part says.
        """
        kept = self.observed if data is None else data
        if data is None and not kept:
            raise ObservationError("no plugin brought data along; give data={'plugin': observations}")
        refuse_nameless(kept)
        live = _Modalities(self)
        kept, joining = self._select(kept, only, without)
        if not isinstance(kept, Observations):
            kept = Observations(kept, live, allow_identical=allow_identical, interactions=joining)
        return Evidence(self.parameters, live, kept, prior=prior)

    def _select(self, data: Any, only: Names | None, without: Names | None) -> tuple[Any, dict[str, tuple[str, ...]]]:
        """The data of the plugins that a query keeps, and the interactions that come with them."""
        keep, drop = None if only is None else _names(only), [] if without is None else _names(without)
        for name in (*(keep or ()), *drop):
            self._entry(name)
        if isinstance(data, Observations) and keep is None and not drop:
            return data, {}
        if isinstance(data, str | PathLike):
            import zarr

            data = zarr.open_group(data, mode="r")
        if not isinstance(data, Mapping):
            data = dict(data.members()) if hasattr(data, "members") else dict(data)
        tied = {n: e.parts for n, e in self.plugins.items() if e.parts}
        if isinstance(data, Observations):
            data = {n: x for n, x in data.items() if n not in tied}
        if given := sorted(set(tied) & set(data)):
            raise ObservationError(
                f"plugin '{given[0]}' reads the observations of {' and '.join(tied[given[0]])}, got others; leave its name out"
            )
        for name in (*(keep or ()), *drop):
            if name not in data and name not in tied:
                raise ObservationError(
                    f"plugin '{name}' has no data here; there is data for {', '.join(data) or 'none'}"
                )
        kept = {n: x for n, x in data.items() if (keep is None or n in keep) and n not in drop}
        joining = partners({n: p for n, p in tied.items() if n not in drop}, kept)
        if lost := [n for n in keep or () if n in tied and n not in joining]:
            raise ObservationError(
                f"plugin '{lost[0]}' takes part only where all of {', '.join(tied[lost[0]])} do; ask for these as well"
            )
        return kept, joining

    def log_evidence(self, data: Any, theta: Tensor, *, prior: bool = False) -> Tensor:
        """S(θ) in nats. Differentiable where θ requires a gradient.

        Arguments:
            data: See :meth:`evidence`.
            theta: K points, shape (K, P).
            prior: Whether to add the log prior, once.

        Returns:
            Shape (K,), float64; −∞ where θ makes the data impossible.

        Raises:
            ParameterError: for a θ of another shape, NaN or infinite. Others as :meth:`evidence`.
        """
        return self.evidence(data, prior=prior).value(theta)

    def estimate(
        self,
        data: Any = None,
        *,
        prior: bool = False,
        only: Names | None = None,
        without: Names | None = None,
        refine: bool | Mapping[str, Simulate] | None = None,
        simulations: int = 20_000,
        dependence: bool | Dependence | Pairs = False,
        covariance: str = "auto",
        start: Mapping[str, float] | Tensor | None = None,
        fixed: Mapping[str, float] | None = None,
        screen: int = 1024,
        polish: int = 24,
        seed: int = 0,
        allow_identical: bool = False,
        progress: bool | None = None,
    ) -> Estimate:
        """θ̂ with its uncertainty and status, from any subset of the plugins.

        Arguments:
            data, only, without, allow_identical: See :meth:`evidence`.
            prior: False for maximum likelihood, True for the maximum a posteriori.
            refine: Learned scalars that are replaced by calibrated ones around θ̂ (:mod:`engine.refinement`): by default
                those that came with a simulator or are calibrated; True demands it of every learned one; a mapping
                gives simulators ``simulator(theta, generator)`` by name; False takes all as they are.
            simulations: For each refined plugin and reference point.
            dependence: True says that observation i of every plugin belongs to one unit, and tests whether the plugins are
                independent given θ, as their sum takes for granted (:func:`engine.information.dependence`). Simulated pairs, or a
                function that simulates them, are tested instead where the data are few; what was found before is used as it is.
            covariance: ``"observed"``, ``"expected"`` or ``"godambe"``; ``"auto"`` is the observed one, or Godambe's where
                a certificate says that a scalar's curvature is not the variance of its score, or plugins depend on each other.
            start, fixed, screen, polish, seed: See :func:`engine.estimate.estimate`.
            progress: Whether to show how many simulations a refinement has made; by default, on a terminal.

        Returns:
            An :class:`engine.Estimate`. Look at its ``status``: a fit that fails says so there.

        Raises:
            ObservationError, UnknownPluginError, ParameterError, ModalityError, UntrustedError: for input
            that cannot be used; the message names the plugin.
        """
        evidence = self.evidence(data, prior=prior, only=only, without=without, allow_identical=allow_identical)
        kind, provenance = _kind(covariance), self._provenance(evidence.names, evidence.observations.hash)
        settings: dict[str, Any] = {"start": start, "fixed": fixed, "covariance": kind, "seed": seed}
        laws = laws_of(evidence.modalities, refine, self.parameters)
        if laws:
            settings |= {"simulations": simulations, "provenance": provenance, "progress": progress}
            fit = refined_estimate(evidence, laws, **settings)
        else:
            fit = estimate(evidence, screen=screen, polish=polish, provenance=provenance, **settings)
        counts = {n: torch.tensor([k]) for n, k in evidence.observations.lengths.items()}
        plugins = self._trusted(evidence.modalities, laws, counts)
        fit = judged(fit, plugins, Single(evidence.observations).blocks, godambe=covariance == "auto")
        if dependence is not False:
            fit = with_dependence(fit, evidence, dependence, godambe=covariance == "auto", seed=seed)
        return fit

    def _trusted(
        self, modalities: Mapping[str, Modality], laws: Mapping[str, Laws], counts: Mapping[str, Tensor]
    ) -> dict[str, TrustedPlugin]:
        out = {}
        for name, modality in modalities.items():
            kind = laws[name].kind if name in laws else "raw"
            certificate = self.certificate(name) if modality.learned else None
            out[name] = TrustedPlugin(modality, certificate, kind, counts[name], self._forced(name))
        return out

    def estimate_many(
        self,
        data: Any,
        *,
        mask: Mapping[str, Any] | None = None,
        offsets: Mapping[str, Any] | None = None,
        prior: bool = False,
        only: Names | None = None,
        without: Names | None = None,
        refine: bool | Mapping[str, Simulate] | None = None,
        simulations: int = 20_000,
        covariance: str = "auto",
        start: Mapping[str, float] | Tensor | None = None,
        fixed: Mapping[str, float] | None = None,
        screen: int = 1024,
        polish: int = 8,
        shape: bool = True,
        seed: int = 0,
        allow_identical: bool = False,
        progress: bool | None = None,
        folder: str | PathLike[str] | None = None,
    ) -> Estimates:
        """θ̂ of B data sets at once, with their uncertainties and statuses.

        Arguments:
            data: plugin name -> (B, N, *event_shape), any subset of the plugins, or a sequence of B arrays
                (N_b, *event_shape) (or a zarr group, or its path).
            mask, offsets: For unequal numbers of observations; see :class:`engine.datasets.DataSets`.
            prior: False for maximum likelihood, True for the maximum a posteriori.
            only, without: Names of plugins to keep or to leave out.
            refine, simulations, covariance: As for :meth:`estimate`; data sets whose θ̂ lie close share simulations.
            folder: Where refined data sets are kept, a chunk at a time, so that the same call goes on there after a stop.
            start, fixed, screen, polish, shape, seed, allow_identical, progress: See :func:`engine.many.estimate_many`.

        Returns:
            :class:`engine.Estimates`. Look at each ``status``: a data set whose fit fails does not disturb the others.

        Raises:
            ObservationError, UnknownPluginError, ParameterError, ModalityError, UntrustedError: for input
            that cannot be used; the message names the plugin and the data set.
        """
        data, joining = self._select(data, only, without)
        data, mask, offsets = join_data_sets(data, joining, mask, offsets)
        sets = DataSets(data, _Modalities(self), mask=mask, offsets=offsets, allow_identical=allow_identical)
        modalities = {name: self.modality(name) for name in sets.names}
        settings: dict[str, Any] = {
            "prior": prior,
            "start": start,
            "fixed": fixed,
            "covariance": _kind(covariance),
            "shape": shape,
            "seed": seed,
            "provenance": self._provenance(sets.names, sets.hash),
            "progress": progress,
        }
        laws = laws_of(modalities, refine, self.parameters)
        if laws:
            fits = refined_estimates(
                self.parameters, modalities, sets, laws, simulations=simulations, folder=folder, **settings
            )
        else:
            fits = estimate_many(self.parameters, modalities, sets, screen=screen, polish=polish, **settings)
        plugins = self._trusted(modalities, laws, {name: sets.lengths(name) for name in sets.names})
        return judged_many(fits, plugins, Sets(sets).blocks, godambe=covariance == "auto")

    def layer(
        self,
        *,
        prior: bool = False,
        only: Names | None = None,
        without: Names | None = None,
        screen: int = 1024,
        polish: int = 8,
        seed: int = 0,
        failed: Literal["nan", "zero"] = "nan",
    ) -> EstimationLayer:
        """θ̂ as a torch module, of copies of the plugins: what is trained through it is not what is registered.

        Arguments:
            prior, screen, polish, seed, failed: See :class:`engine.EstimationLayer`.
            only, without: Names of plugins to keep or to leave out.

        Raises:
            UnknownPluginError, UntrustedError: for plugins that are not there, or cannot be loaded.
        """
        keep, drop = self.chosen(only, without), _names(without or ())
        tied = partners({n: e.parts for n, e in self.plugins.items() if n not in drop}, keep)
        if tied := list(tied):
            raise RegistryError(
                f"a layer takes no interactions, such as '{tied[0]}'; leave it out with without='{tied[0]}'"
            )
        modalities = {n: copy.deepcopy(self.modality(n)) for n in keep if not self.plugins[n].parts}
        return EstimationLayer(
            self.parameters, modalities, prior=prior, screen=screen, polish=polish, seed=seed, failed=failed
        )

    def posterior(
        self,
        data: Any = None,
        *,
        method: str = "auto",
        draws: int = 1000,
        seed: int = 0,
        only: Names | None = None,
        without: Names | None = None,
        fixed: Mapping[str, float] | None = None,
        refine: bool | Mapping[str, Simulate] | None = None,
        simulations: int = 20_000,
        start: Mapping[str, float] | Tensor | None = None,
        chains: int = 4,
        warmup: int = 300,
        screen: int = 1024,
        allow_identical: bool = False,
        progress: bool | None = None,
    ) -> Posterior:
        """π(θ | data) ∝ exp S(θ) π(θ), from any subset of the plugins.

        Arguments:
            data, only, without, allow_identical: See :meth:`evidence`.
            method: ``"laplace"``, ``"importance"``, ``"grid"``, ``"nuts"``, or ``"auto"``, the cheapest whose own diagnostics
                pass; see :func:`engine.posterior.posterior`.
            draws: How many draws of equal weight.
            seed: What everything random follows from.
            fixed: Parameters to hold, by name.
            refine, simulations: As for :meth:`estimate`; scalars are calibrated around the maximum a posteriori.
            start: One more point where a maximum may be, by name or in order.
            chains, warmup: Of NUTS.
            screen: How many points of the prior are tried to find the maxima.
            progress: Whether to show how far it is; by default, on a terminal.

        Returns:
            A :class:`engine.Posterior`. Look at its ``status``: a posterior whose diagnostics fail says so there, and so does
            one that rests on learned plugins beyond what they can carry.

        Raises:
            PosteriorError: for no draws, an unknown method, an improper prior, a grid of more than three parameters, or a
                discrete parameter under NUTS. Others as :meth:`estimate`.

        Example:
            >>> import tempfile
            >>> from torch.distributions import Gamma
            >>> from modalities import PoissonCounts
            >>> registry = Registry.create(tempfile.mkdtemp() + "/decays", [Parameter("rate", Gamma(2.0, 1.0))])
            >>> for name in ("first", "second"):
            ...     entry = registry.append(name, PoissonCounts(signal=[1.0], strength="rate"))
            >>> post = registry.posterior({"first": [[4.0]]}, method="grid")
            >>> round(post.mean["rate"], 2), round(post.append({"second": [[5.0]]}).mean["rate"], 1)  # Gamma(6, 2), Gamma(11, 3)
            (3.0, 3.7)
        """
        from engine.posterior.ask import ask

        settings: dict[str, Any] = {
            "method": method,
            "draws": draws,
            "seed": seed,
            "fixed": fixed,
            "refine": refine,
            "simulations": simulations,
            "start": start,
            "chains": chains,
            "warmup": warmup,
            "screen": screen,
            "allow_identical": allow_identical,
            "progress": progress,
        }
        return ask(self, data, only, without, settings)

    def bayes_factor(
        self,
        data: Any,
        first: Mapping[str, float],
        second: Mapping[str, float] | None = None,
        *,
        only: Names | None = None,
        without: Names | None = None,
        method: str = "auto",
        draws: int = 1000,
        seed: int = 0,
        allow_identical: bool = False,
    ) -> BayesFactor:
        """p(data | first) / p(data | second), each hypothesis with the values it fixes and the priors of the others.

        Arguments:
            data, only, without, allow_identical: See :meth:`evidence`.
            first: The values that the first hypothesis fixes, by name.
            second: The same of the second; None leaves everything free.
            method, draws, seed: As for :meth:`posterior`.

        Raises:
            PosteriorError: naming a plugin whose scalar is not log p(x | θ) with all its constants. Others as
                :meth:`posterior`.
        """
        options: dict[str, Any] = {
            "only": only,
            "without": without,
            "allow_identical": allow_identical,
            "refine": False,
        }
        options |= {"method": method, "draws": draws, "seed": seed}
        evidence = self.evidence(data, only=only, without=without, allow_identical=allow_identical)
        refuse_unnormalised([n for n, m in evidence.modalities.items() if not m.normalised])
        return bayes_factor(*(self.posterior(data, fixed=fixed, **options) for fixed in (first, second)))

    def check_calibration(
        self,
        observations: Mapping[str, int] | int | None = None,
        *,
        only: Names | None = None,
        without: Names | None = None,
        simulate: Mapping[str, Simulate] | None = None,
        refine: bool | Mapping[str, Simulate] | None = False,
        simulations: int = 20_000,
        repetitions: int = 1000,
        draws: int = 1000,
        level: float = 0.01,
        seed: int = 0,
        progress: bool | None = None,
    ) -> CalibrationCheck:
        """Whether the sum's posteriors cover: simulation-based calibration, TARP and expected coverage.

        Plugins are simulated independently, so that interactions take no part.

        Arguments:
            observations: How many observations of each plugin a data set has, by name or for all; by default as many as
                the plugins brought along, or one.
            only, without: Names of plugins to keep or to leave out.
            simulate: Plugin -> its simulator, where the modality has none of its own.
            refine, simulations: As for :meth:`estimate`; by default scalars are taken as they are.
            repetitions, draws, level, seed, progress: See :func:`engine.checks.check_calibration`.

        Raises:
            PosteriorError: for an improper prior, or a plugin that cannot simulate. Others as :meth:`estimate`.
        """
        names = [n for n in self.chosen(only, without) if not self.plugins[n].parts]
        if isinstance(observations, Mapping):
            for name in observations:
                self._entry(name)
            counts = {n: int(k) for n, k in observations.items() if n in names}
        else:
            own = {n: len(x) for n, x in self.observed.items()}
            counts = {n: own.get(n, 1) if observations is None else int(observations) for n in names}
        modalities = {n: self.modality(n) for n in counts}
        return check_calibration(
            self.parameters,
            modalities,
            counts,
            simulate=simulate,
            refine_by=refine,
            simulations=simulations,
            repetitions=repetitions,
            draws=draws,
            level=level,
            seed=seed,
            progress=progress,
        )

    def check_predictions(
        self,
        posterior: Posterior,
        data: Any = None,
        *,
        only: Names | None = None,
        without: Names | None = None,
        simulate: Mapping[str, Simulate] | None = None,
        seed: int = 0,
        allow_identical: bool = False,
    ) -> PredictiveCheck:
        """Whether data simulated from a posterior look like the data, plugin by plugin.

        Arguments:
            posterior: What :meth:`posterior` said of the data; its draws are used.
            data, only, without, allow_identical: The data to compare with; see :meth:`evidence`.
            simulate, seed: See :func:`engine.checks.check_predictions`.

        Raises:
            PosteriorError: for a posterior that failed, or where no plugin can simulate. Others as :meth:`estimate`.
        """
        evidence = self.evidence(data, only=only, without=without, allow_identical=allow_identical)
        return check_predictions(
            self.parameters, evidence.modalities, evidence.observations, posterior.theta, simulate=simulate, seed=seed
        )

    def compare(
        self,
        data: Any,
        null: Mapping[str, float],
        alternative: Mapping[str, float] | None = None,
        *,
        only: Names | None = None,
        without: Names | None = None,
        seed: int = 0,
        allow_identical: bool = False,
    ) -> Comparison:
        """S(alternative) − S(null) with its likelihood-ratio p-value; see :func:`engine.hypotheses.compare`.

        Arguments:
            data, only, without, allow_identical: See :meth:`evidence`.
            null: The values that the null fixes, by name.
            alternative: The values that the alternative fixes; None leaves everything free.
            seed: Of starting points and simulations.

        Raises:
            EstimateError: when one of the fits fails. Others as :meth:`estimate`.
        """
        evidence = self.evidence(data, only=only, without=without, allow_identical=allow_identical)
        return compare(evidence, null, alternative, seed=seed)

    def probabilities(
        self,
        data: Any,
        hypotheses: Any = None,
        weights: Sequence[float] | Tensor | None = None,
        *,
        only: Names | None = None,
        without: Names | None = None,
        allow_identical: bool = False,
    ) -> dict[Any, float]:
        """Posterior probabilities of a discrete θ or of given points; see :func:`engine.hypotheses.probabilities`.

        Arguments:
            data, only, without, allow_identical: See :meth:`evidence`.
            hypotheses: Points θ by name, in a sequence, or as a tensor (H, P); None takes every value of a θ that is
                all discrete.
            weights: Their prior weights, H numbers >= 0; equal by default, or the prior's for a discrete θ.

        Returns:
            Hypothesis -> probability, by name, position or index.

        Raises:
            EstimateError: when every hypothesis makes the data impossible. Others as :meth:`estimate`.
        """
        evidence = self.evidence(data, only=only, without=without, allow_identical=allow_identical)
        return probabilities(evidence, hypotheses, weights)

    def tension(
        self,
        data: Any = None,
        *,
        groups: Groups | None = None,
        only: Names | None = None,
        without: Names | None = None,
        pairs: bool | None = None,
        toys: int = 0,
        level: float = 0.05,
        refine: bool | Mapping[str, Simulate] | None = None,
        simulations: int = 20_000,
        fixed: Mapping[str, float] | None = None,
        seed: int = 0,
        allow_identical: bool = False,
        progress: bool | None = None,
    ) -> Tension:
        """Whether the plugins agree with each other, and which of them does not; see :func:`engine.tension.tension`.

        Arguments:
            data, only, without, allow_identical: See :meth:`evidence`.
            groups: Plugins to be compared as one, by the name of the part or in a sequence; those in none are left out. By
                default every plugin is a part.
            pairs, toys, level: See :func:`engine.tension.tension`.
            refine, simulations, fixed, seed, progress: As for :meth:`estimate`.

        Returns:
            :class:`engine.Tension`: Δχ² of combination with its p-value, the same two by two, and the pull of every part on
            the estimate of the others. Look at ``trusted``: ``faults`` says why p-values cannot be.

        Raises:
            EstimateError: for groups that share a plugin, or name one that is left out. Others as :meth:`estimate`.
        """
        if groups is not None and only is None:
            only = chosen(groups)
        settings: dict[str, Any] = {"only": only, "without": without, "refine": refine, "simulations": simulations}
        settings |= {"fixed": fixed, "seed": seed, "allow_identical": allow_identical, "progress": progress}
        fit = self.estimate(data, **settings)
        return tension(fit, groups, pairs=pairs, toys=toys, level=level, seed=seed)

    def shares(self, data: Any = None, **settings: Any) -> Shares:
        """What every plugin tells of every parameter, and of the directions in θ; see :func:`engine.shares.shares`.

        Arguments:
            data: See :meth:`evidence`.
            settings: As for :meth:`estimate`.

        Returns:
            :class:`engine.Shares`.

        Raises:
            EstimateError: where the fit fails. Others as :meth:`estimate`.
        """
        return shares(self.estimate(data, **settings))

    def before_after(self, added: Names, data: Any = None, **settings: Any) -> BeforeAfter:
        """What plugins did to the estimate: without and with them; see :func:`engine.shifts.before_after`.

        Arguments:
            added: The plugins that came; others of the data were there before.
            data: See :meth:`evidence`.
            settings: As for :meth:`estimate`.

        Returns:
            :class:`engine.BeforeAfter`: both estimates, and the shift with its p-value.

        Raises:
            ObservationError: where there is no data of theirs, or none of any other. Others as :meth:`estimate`.
        """
        before = self.estimate(data, without=added, **settings)
        return before_after(before, self.estimate(data, **settings))

    def _provenance(self, names: Sequence[str], data: str) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "data": data,
            "plugins": {name: self.plugins[name].content for name in names},
            "left_out": [name for name in self.plugins if name not in names],
            "versions": {
                **{p: metadata.version(p) for p in ("scalar-evidence", "torch", "numpy")},
                "python": platform.python_version(),
            },
        }

    def __repr__(self) -> str:
        return f"Registry({str(self.path)!r}, parameters={list(self.parameters.names)}, plugins={list(self.plugins)})"


class _Modalities(Mapping[str, Modality]):
    """The live plugins by name, each read when it is first asked for."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __getitem__(self, name: str) -> Modality:
        return self._registry.modality(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry.plugins)

    def __len__(self) -> int:
        return len(self._registry.plugins)


def _kind(covariance: str) -> str:
    return "observed" if covariance == "auto" else covariance


def _names(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
