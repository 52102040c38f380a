r"""Certifying a learned scalar from held-out simulations: Bartlett's identities, the budget, coverage, the domain.

A true log-likelihood has :math:`\delta = E[u] = 0` and :math:`J = -E[\nabla u] = \mathrm{Var}\,u = K` at every θ (Bartlett, Biometrika
40 (1953) 12). Simulations are made at points of the prior, many at each: the means at the points say what a smooth field
leaves out, which a field fitted to the same simulations cannot.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from engine.certificate.basis import degrees
from engine.certificate.calibration import Calibrated, fit_law, own_simulator
from engine.certificate.certificate import Certificate, Check
from engine.certificate.coverage import posterior_ranks
from engine.certificate.domain import Domain
from engine.certificate.draws import least_simulations, simulate_blocks, spread_theta
from engine.certificate.fields import MeanField, VarianceField, fit_mean
from engine.certificate.scores import information_rows, score_rows
from engine.certificate.subject import subject_of
from engine.errors import ModalityError
from engine.learning.simulator import Simulate
from engine.modality import Modality
from engine.parameters import ParameterSpace
from engine.report.progress import progress_bar

__all__ = ["certify"]

_EACH = 200  # simulations at one point, where there are enough
_POINTS = 512
_SLOPES = 20_000  # simulations from which J is measured
_STEP = 0.02  # the step of its differences, in units of the parameter's scale
_RANKS = 300  # pairs whose posteriors are ranked
_DRAWS = 4000  # draws of the prior that they rest on
_EFFECTIVE = 50  # of which this many must count
_MATERIAL = 0.1  # the distance of ranks from uniform from which a scalar is refused


def certify(
    modality: Modality,
    *,
    prior: ParameterSpace,
    simulate: Simulate | None = None,
    pairs: tuple[Any, Any] | None = None,
    simulations: int = 100_000,
    seed: int = 0,
    progress: bool | None = None,
) -> Certificate:
    """What a scalar may be trusted for, from simulations, or labelled pairs, that it was not trained on.

    Arguments:
        modality: The learned one, calibrated or not.
        prior: Has the modality's parameters, each with a prior: where the certificate holds.
        simulate: ``simulate(theta, generator)``, θ (n, P) -> x (n, *event_shape); the modality's own by default. Of an
            interaction, one that returns its parts by name.
        pairs: Or else (theta (n, P), x (n, *event_shape)), drawn from the prior and held out from training. What one
            observation at each θ cannot tell is said to be not checked.
        simulations: How many; n of them certify about κ² n / (10 P) observations, κ² n / P at most.
        seed: Of the simulations.
        progress: Whether to show a bar; by default, on a terminal.

    Returns:
        The certificate; :attr:`Certificate.passed` says whether anything failed.

    Raises:
        ModalityError: for a simulator that fails (:func:`engine.learning.simulator.draw`), a scalar without a finite
            score, or too few simulations or pairs.
        ParameterError: for a parameter that has no continuous prior.

    Example:
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Uniform(-1.0, 1.0))])
        >>> exact = Gaussian(parameter_names=("mu",), sd=1.0)
        >>> certificate = certify(exact, prior=space, simulations=20_000, seed=1)
        >>> certificate.passed, certificate.n_max(kappa=0.3) > 50
        (True, True)
    """
    modality = modality.eval()
    if modality.parts and pairs is not None:
        raise ModalityError(
            "an interaction is certified by a simulator, which redraws its parts at the same θ, got pairs"
        )
    space = prior.only(modality.parameter_names)
    P = len(space)
    least = least_simulations(P)
    if pairs is not None:
        if simulate is not None:
            raise ModalityError("certify takes a simulator or pairs, got both; leave one out")
        theta, x, excluded = checked_pairs(modality, space, pairs)
        order = torch.randperm(len(theta), generator=torch.Generator().manual_seed(seed))  # a file may be sorted by θ
        theta, x, each = theta[order], x[order], 1
    else:
        simulate = own_simulator(modality, simulate)
        simulate = _together(modality, simulate) if modality.parts else simulate
        if simulations < least:
            raise ModalityError(f"certifying {P} parameters takes at least {least} simulations, got {simulations}")
        points = max(1, min(_POINTS, simulations // _EACH))
        each = simulations // points
        theta, x, excluded = _simulated(modality, simulate, space, points, each, seed, progress)
    if len(theta) < least:
        raise ModalityError(f"certifying {P} parameters takes at least {least} pairs, got {len(theta)}; hold out more")
    point = torch.arange(len(theta)) if each == 1 else torch.unique(theta, dim=0, return_inverse=True)[1]
    u = score_rows(modality, x, theta) if not isinstance(modality, Calibrated) else modality.calibrated_score(x, theta)
    groups = int(point.max()) + 1
    tried = None if each == 1 else degrees(P, max(1, groups // 3))
    mean, variance = fit_law(space, theta, u, tried)
    excess, error, first = _first_identity(mean, variance, theta, u, point, each)
    checks = [first]
    information, curvature, more = _slopes(modality, space, variance, theta, x, point, u - mean.at(theta))
    if modality.parts:  # its J and K are no information of their own: only with its parts does it make a likelihood
        information, more = None, [c for c in more if c.name != "second Bartlett identity"]
    checks += more
    fresh = pairs is not None
    if simulate is not None and not isinstance(modality, Calibrated):
        drawn = spread_theta(space, 5000, seed, 7, edges=False)
        parts = [part for _, part in simulate_blocks(simulate, drawn, seed, (8,), tuple(modality.event_shape))]
        at, observed = torch.cat([p.theta for p in parts]), torch.cat([p.x for p in parts])
    else:
        at, observed = (theta, x) if fresh else (theta[:0], x[:0])
    if modality.parts:
        checks.append(_redrawn(modality, theta, x, point))
    elif not isinstance(modality, Calibrated):
        checks += [_normalisation(modality, at, observed, seed), *_coverage(modality, space, at, observed, seed)]
    else:
        told = "a calibrated scalar holds around an estimate and has no posterior of its own; certify the raw one for these"
        checks += [Check(name, "not checked", note=told) for name in ("normalisation", "coverage by SBC and TARP")]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    domain = Domain.of(modality, observed if len(observed) else x[order])
    domain = domain.along(modality, space, theta[:_SLOPES], x[:_SLOPES])
    return Certificate(
        space=space,
        source="simulations" if pairs is None else "pairs",
        simulations=len(theta),
        excluded=excluded,
        seed=seed,
        calibrated=isinstance(modality, Calibrated),
        mean=mean,
        variance=variance,
        information=information,
        excess=excess,
        excess_error=error,
        curvature=curvature,
        checks=tuple(checks),
        domain=domain,
        subject=subject_of(modality),
    )


def checked_pairs(modality: Modality, space: ParameterSpace, pairs: tuple[Any, Any]) -> tuple[Tensor, Tensor, int]:
    """θ (n, P) and x (n, *event_shape), float64, and how many rows were left out because they are not finite.

    Arguments:
        modality: Whose pairs they are.
        space: Its parameters: θ must lie in their bounds.
        pairs: (theta, x).

    Raises:
        ModalityError: for other shapes, or θ outside the prior, naming the first row.
    """
    theta, x = (torch.as_tensor(part).detach().to(torch.float64) for part in pairs)
    theta = theta[:, None] if theta.dim() == 1 and len(space) == 1 else theta
    if theta.shape != (len(x), len(space)) or tuple(x.shape[1:]) != tuple(modality.event_shape):
        raise ModalityError(
            f"pairs must be theta (n, {len(space)}) and x (n, {', '.join(map(str, modality.event_shape))}), "
            f"got {tuple(theta.shape)} and {tuple(x.shape)}"
        )
    good = torch.isfinite(theta).all(-1) & torch.isfinite(x.reshape(len(x), -1)).all(-1)
    theta, x, lost = theta[good], x[good], int((~good).sum())
    outside = ~((theta >= space.lower) & (theta <= space.upper)).all(-1)
    if bool(outside.any()):
        i = int(outside.nonzero()[0, 0])
        raise ModalityError(
            f"θ of pairs must lie inside the prior, got {theta[i].tolist()} in row {i} and {int(outside.sum())} such rows; "
            "widen the prior, or leave them out"
        )
    return theta, x, lost


def _simulated(
    modality: Modality,
    simulate: Simulate,
    space: ParameterSpace,
    points: int,
    each: int,
    seed: int,
    progress: bool | None,
) -> tuple[Tensor, Tensor, int]:
    theta = spread_theta(space, points, seed, 5).repeat(each, 1)  # every block has all the points it can
    kept, x, lost = [], [], 0
    with progress_bar("certifying", len(theta), progress) as tick:
        for start, draws in simulate_blocks(simulate, theta, seed, (6,), tuple(modality.event_shape), tick):
            kept.append(start + draws.rows)
            x.append(draws.x)
            lost += draws.excluded
    return theta[torch.cat(kept)], torch.cat(x), lost


def _first_identity(
    mean: MeanField, variance: VarianceField, theta: Tensor, u: Tensor, point: Tensor, each: int
) -> tuple[float, float, Check]:
    """What δᵀK⁻¹δ is beyond the field, its error, and the test of E[u] = 0 at every point."""
    P = u.shape[1]
    if each == 1:
        c, covariance = mean.coefficients.reshape(-1), mean.covariance
        assert covariance is not None
        chi2 = float(c @ torch.linalg.lstsq(covariance, c[:, None], driver="gelsd").solution[:, 0])
        p = float(stats.chi2.sf(chi2, len(c)))
        unseen = "what the field leaves out was not checked: it takes several x at each θ"
        note = f"χ² = {chi2:.4g} for {len(c)} coefficients, p = {p:.2g}; {unseen}"
        return (
            math.nan,
            math.nan,
            Check("first Bartlett identity", _verdict(p), chi2 / len(c), math.sqrt(2 / len(c)), 1.0, note),
        )
    groups = int(point.max()) + 1
    count = torch.zeros(groups, dtype=torch.float64).index_add_(0, point, torch.ones(len(u), dtype=torch.float64))
    at = torch.zeros(groups, theta.shape[1], dtype=torch.float64).index_copy_(0, point, theta)
    total = torch.zeros(groups, P, dtype=torch.float64).index_add_(0, point, u) / count[:, None]
    root = variance.root(at)

    def squares(v: Tensor) -> Tensor:
        return (root.mT @ v[..., None])[..., 0].square().sum(-1)

    fitted = mean.coefficients.numel() / len(u)
    beyond = squares(total - mean.at(at)) - P / count
    excess = float(beyond.mean()) + fitted
    error = float((2.0 * P / count**2).sum().sqrt() / groups)
    chi2 = float((squares(total) * count).sum())
    p = float(stats.chi2.sf(chi2, groups * P))
    note = f"E[u] = 0 at {groups} points: χ² = {chi2:.4g} for {groups * P} degrees of freedom, p = {p:.2g}"
    rms = float((squares(total) - P / count).mean())
    return excess, error, Check("first Bartlett identity", _verdict(p), rms, error, 0.0, note)


def _verdict(p: float) -> str:
    return "passed" if p > 1e-3 else "noted"


def _slopes(
    modality: Modality,
    space: ParameterSpace,
    variance: VarianceField,
    theta: Tensor,
    x: Tensor,
    point: Tensor,
    residual: Tensor,
) -> tuple[MeanField, bool, list[Check]]:
    """J(θ) from differences of scores at the same x, and whether second derivatives agree with it and with K."""
    inner = modality.modality if isinstance(modality, Calibrated) else modality
    P, n = len(space), len(theta)
    whitened = (variance.root(theta).mT @ residual[..., None])[..., 0].square().sum(-1) / P
    noise = float(whitened.std()) / math.sqrt(n)  # of K itself
    theta, x, point = theta[:_SLOPES], x[:_SLOPES], point[:_SLOPES]  # every point comes in every block
    columns = []
    for j in range(P):
        h = _STEP * space.scale[j]
        up, down = theta.clone(), theta.clone()
        up[:, j] = (up[:, j] + h).clamp(max=float(space.upper[j]))
        down[:, j] = (down[:, j] - h).clamp(min=float(space.lower[j]))
        columns.append(-(score_rows(inner, x, up) - score_rows(inner, x, down)) / (up - down)[:, j, None])
    J = torch.stack(columns, -1)
    tried = degrees(P, max(1, min(len(theta) // 100, (int(point.max()) + 1) // 3)))[:7]
    field = fit_mean(space, theta, J.reshape(-1, P * P), tried=tried)
    root = variance.root(theta)
    curved = information_rows(inner, x[:2000], theta[:2000])[1]
    gap = (root.mT @ (0.5 * (J + J.mT)) @ root)[:2000] - root[:2000].mT @ curved @ root[:2000]
    mean, error = gap.mean(0), gap.std(0) / math.sqrt(len(gap))
    worst = float(mean.abs().max())
    if float(curved.abs().max()) == 0.0:
        note = "second derivatives of the scalar are all zero, as those of ReLU networks are: they are no information"
        curvature = Check("curvature", "noted", 0.0, 0.0, 1.0, note)
    else:
        sharp = bool((mean.abs() > 5.0 * error + 0.1).any())
        note = "second derivatives jump, and miss what lies between: they are no information" if sharp else ""
        curvature = Check("curvature", "noted" if sharp else "passed", worst, float(error.max()), 0.0, note)
    checks = [curvature]
    if not isinstance(modality, Calibrated):
        share = (root.mT @ J @ root).diagonal(dim1=-2, dim2=-1).mean(-1)  # tr(K⁻¹J) / P for each simulation
        ratio, error = _by_point(share, point)
        error = math.hypot(error, ratio * noise)
        if ratio + 4.0 * error < 0.0:
            note = "the scalar curves upward where it should have its maximum: is its sign right?"
            checks.append(Check("second Bartlett identity", "failed", ratio, error, 1.0, note))
        else:
            coarse = 4.0 * math.sqrt(2.0 * len(variance.basis) / n)  # of the eigenvalues of K at a point
            off = (abs(ratio - 1.0) > 3.0 * error and abs(ratio - 1.0) > 0.02) or (
                _anisotropy(field, variance, theta) > 0.1 + coarse
            )
            note = "tr(K⁻¹J)/P: J and K differ, estimates use Godambe's covariance" if off else "tr(K⁻¹J)/P"
            wrong = not 0.2 < ratio < 5.0 and abs(ratio - 1.0) > 5.0 * error
            verdict = "failed" if wrong else "noted" if off else "passed"
            checks.append(Check("second Bartlett identity", verdict, ratio, error, 1.0, note))
    return field, curvature.verdict == "passed", checks


def _anisotropy(field: MeanField, variance: VarianceField, theta: Tensor) -> float:
    """The median over points of the largest |eigenvalue − 1| of K^(−½) J K^(−½)."""
    at = theta[:: max(1, len(theta) // 200)]
    P = theta.shape[1]
    J, root = field.at(at).reshape(-1, P, P), variance.root(at)
    return float((torch.linalg.eigvalsh(root.mT @ (0.5 * (J + J.mT)) @ root) - 1.0).abs().max(-1).values.median())


def _by_point(values: Tensor, point: Tensor) -> tuple[float, float]:
    """The mean over simulations and its error, from the spread between points."""
    groups = int(point.max()) + 1
    count = torch.zeros(groups, dtype=torch.float64).index_add_(0, point, torch.ones(len(values), dtype=torch.float64))
    means = torch.zeros(groups, dtype=torch.float64).index_add_(0, point, values)[count > 0] / count[count > 0]
    return float(means.mean()), float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.inf


def _normalisation(modality: Modality, theta: Tensor, x: Tensor, seed: int) -> Check:
    """The mean of e^s over independent pairs, where the scalar is a log-ratio."""
    name = "normalisation"
    if modality.normalised:
        return Check(name, "passed", note="a density by construction")
    if not getattr(modality, "is_ratio", False):
        return Check(name, "not checked", note="the scalar is neither a density nor a ratio: a constant of x is free")
    other = theta[torch.randperm(len(theta), generator=torch.Generator().manual_seed(seed))]
    with torch.no_grad():
        e = modality(x.to(modality.dtype), other.to(modality.dtype)).double().exp()
    value, error = float(e.mean()), float(e.std() / math.sqrt(len(e)))
    off = abs(value - 1.0) > 4.0 * error and abs(value - 1.0) > 0.05
    return Check(name, "noted" if off else "passed", value, error, 1.0, "the mean of exp(s) over p(x) p(θ)")


def _together(modality: Any, simulate: Simulate) -> Simulate:
    """A simulator of an interaction's parts, by name, as one of what it reads."""

    def joined(theta: Tensor, generator: torch.Generator) -> Tensor:
        found = simulate(theta, generator)
        return found if isinstance(found, Tensor) else modality.joined(found)

    return joined


def _redrawn(modality: Any, theta: Tensor, x: Tensor, point: Tensor) -> Check:
    """The mean of e^s over parts of different units at the same θ: 1 for the true interaction, at every θ."""
    order = torch.argsort(point, stable=True)
    same = torch.bincount(point)[point[order]]  # simulations at each one's θ
    start = torch.cat([same.new_zeros(1), torch.bincount(point).cumsum(0)[:-1]])[point[order]]
    place = torch.arange(len(order)) - start
    draws = [x[order[start + (place + k) % same]] for k in range(len(modality.parts))]
    with torch.no_grad():
        e = modality(modality.redrawn(*draws), theta[order]).double().exp()
    value, error = float(e.mean()), float(e.std() / math.sqrt(len(e)))
    off = abs(value - 1.0) > 4.0 * error and abs(value - 1.0) > 0.05
    return Check(
        "normalisation", "noted" if off else "passed", value, error, 1.0, "the mean of exp(s) over redrawn parts"
    )


def _coverage(modality: Modality, space: ParameterSpace, theta: Tensor, x: Tensor, seed: int) -> list[Check]:
    draws = space.sample_prior(_DRAWS, int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed))))
    fractions, effective = posterior_ranks(modality, x[:_RANKS], theta[:_RANKS], draws, seed)
    names = [f"SBC of {name}" for name in space.names] + ["expected coverage (TARP)"]
    if float(effective.median()) < _EFFECTIVE:
        note = f"posteriors of one observation rest on {float(effective.median()):.0f} of {_DRAWS} draws of the prior: too few to rank"
        return [Check("coverage", "not checked", note=note)]
    found = [stats.kstest(fractions[:, j].numpy(), "uniform") for j in range(fractions.shape[1])]
    worst = len(found) * min(test.pvalue for test in found)
    checks = []
    for name, test in zip(names, found, strict=True):
        bad = test.pvalue < 1e-3 / len(found)
        verdict = "failed" if bad and test.statistic > _MATERIAL else "noted" if bad else "passed"
        note = f"distance of {len(fractions)} ranks from uniform, p = {test.pvalue:.2g}" + (
            f" (of all: {worst:.2g})" if bad else ""
        )
        checks.append(Check(name, verdict, float(test.statistic), 0.6 / math.sqrt(len(fractions)), 0.0, note))
    return checks
