r"""How far an estimate can be trusted: what the certificates of its learned plugins say at θ̂.

With the score's bias :math:`g_m = N_m W_m \delta_m` and variance :math:`K_m` of every learned plugin at θ̂, all of them
together move the estimate by :math:`\kappa = \sqrt{g^\top K^{-1} g}` of its standard errors, :math:`g = \sum_m g_m` and
:math:`K = \sum_m K_m` over all plugins, exact ones too, of the parameters that are free. A raw scalar has W = 1; a
calibrated one the weights :math:`A^\top (K + N V)^{-1}` that its refined scalar gives its score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.certificate.calibration import Calibrated
from engine.certificate.certificate import KAPPA, Certificate
from engine.certificate.fields import pseudo_inverse
from engine.many import Estimates
from engine.modality import Modality
from engine.parameters import ParameterSpace
from engine.result import Estimate, Status

__all__ = ["Trust"]

#: (plugin, data set, most) -> its observations, in blocks
Blocks = Callable[[str, int, int], Iterator[Tensor]]
_LOOKED = 2000  # observations of one data set whose place in the domain is looked at


@dataclass(frozen=True)
class Trust:
    """What is known of one plugin's part in one estimate.

    Attributes:
        verdict: ``"exact"`` (written, not learned), ``"refined"`` (calibrated by simulations at θ̂), ``"certified"``,
            ``"uncertified"``, ``"beyond_certificate"`` or ``"outside_domain"``.
        observations: N.
        budget: How many it can carry at θ̂ before its bias passes κ = 0.3 standard errors; infinite for exact and
            refined ones, NaN without a certificate.
        bias: What its bias, or what is not known of it, may move this estimate by, in standard errors; NaN as above.
        reason: In words, where there is something to say.

    Example:
        >>> Trust("certified", 10, 40.0, 0.1).verdict
        'certified'
    """

    verdict: str
    observations: int
    budget: float = float("nan")
    bias: float = float("nan")
    reason: str = ""


@dataclass(frozen=True, eq=False)
class TrustedPlugin:
    """One plugin of a query.

    Attributes:
        modality: The plugin.
        certificate: What was found when it was admitted, if anything.
        kind: ``"raw"``, ``"calibrated"`` or ``"refined"``: how its scalar is used.
        counts: Its observations in each data set, (B,).
        forced: Why it was admitted although it failed; empty otherwise.
    """

    modality: Modality
    certificate: Certificate | None
    kind: str
    counts: Tensor
    forced: str = ""

    @property
    def usable(self) -> Certificate | None:
        """The certificate, where it is one of the scalar as it is used."""
        c = self.certificate
        return c if c is not None and (self.kind == "refined" or c.calibrated == (self.kind == "calibrated")) else None


def judged(fit: Estimate, plugins: Mapping[str, TrustedPlugin], blocks: Blocks, *, godambe: bool) -> Estimate:
    """An estimate with what its plugins' certificates say of it.

    Arguments:
        fit: The estimate.
        plugins: The plugins of the query.
        blocks: (plugin, data set, most) -> its observations.
        godambe: Whether to report the sandwich where a certificate says that J ≠ K.

    Returns:
        The estimate with its ``trust``, and the status that this makes of it.
    """
    if not any(p.modality.learned for p in plugins.values()):
        return fit
    if fit.status is Status.FAILED:
        return replace(fit, reason=fit.reason + _flat_advice(plugins))
    space, theta, information = fit.parameters, fit.theta[None], fit.information[None]
    for name in _without_curvature(plugins):
        information = information - fit.contributions[name].information
        information = information + expected_curvature(space, plugins[name], theta)
    if godambe and sandwich(plugins):
        fit = replace(fit, information=information[0])
        known = fit.sandwich(variability(space, theta, information, plugins)[0])
        fit = replace(fit, covariance=known.matrix, covariance_kind=known.kind)
    trusts, verdicts = assess(space, theta, information, plugins, blocks, fixed=tuple(fit.fixed))
    status, reason = _settled(fit.status, fit.reason, verdicts[0])
    return replace(fit, trust=trusts[0], status=status, reason=reason)


def judged_many(fits: Estimates, plugins: Mapping[str, TrustedPlugin], blocks: Blocks, *, godambe: bool) -> Estimates:
    """The same for many estimates, ``fits``; the other arguments as for :func:`judged`."""
    if not any(p.modality.learned for p in plugins.values()):
        return fits
    space = fits.parameters
    for b, status in enumerate(fits.status):
        if status is Status.FAILED:
            fits.reason[b] += _flat_advice(plugins)
    flat = _without_curvature(plugins)
    if flat and godambe:
        information = fits.information.clone()
        for b, status in enumerate(fits.status):
            if status is not Status.FAILED:
                information[b] -= sum(fits[b].contributions[name].information for name in flat)
        at = torch.where(torch.isfinite(fits.theta).all(-1)[:, None], fits.theta, space.interior)
        fits = replace(fits, information=information + sum(expected_curvature(space, plugins[n], at) for n in flat))
    if godambe and sandwich(plugins):
        usable = torch.tensor([s is not Status.FAILED for s in fits.status])
        K = variability(space, torch.where(usable[:, None], fits.theta, space.interior), fits.information, plugins)
        covariance = fits.covariance.clone()
        for b in usable.nonzero()[:, 0].tolist():
            if fits.status[b] is Status.CONVERGED and not fits.fixed and not space.constraints:
                inverse = torch.linalg.inv(fits.information[b])
                covariance[b] = inverse @ K[b] @ inverse
            else:
                covariance[b] = replace(fits[b], information=fits.information[b]).sandwich(K[b]).matrix
        fits = replace(fits, covariance=covariance, covariance_kind="godambe")
    trusts, verdicts = assess(space, fits.theta, fits.information, plugins, blocks, fixed=tuple(fits.fixed))
    both = [_settled(s, r, v) for s, r, v in zip(fits.status, fits.reason, verdicts, strict=True)]
    return replace(fits, trust=trusts, status=[s for s, _ in both], reason=[r for _, r in both])


def _without_curvature(plugins: Mapping[str, TrustedPlugin]) -> list[str]:
    """The raw learned plugins whose second derivatives are known to be no curvature, and whose J is known instead."""
    return [
        name
        for name, p in plugins.items()
        if p.kind == "raw" and p.usable is not None and not p.usable.curvature and p.usable.information is not None
    ]


def expected_curvature(space: ParameterSpace, plugin: TrustedPlugin, theta: Tensor) -> Tensor:
    """N J(θ) of one raw plugin from its certificate, (B, P, P), at theta (B, P).

    Arguments:
        space: θ.
        plugin: One with a certificate that has J.
        theta: θ̂, (B, P).
    """
    certificate = plugin.usable
    assert certificate is not None
    assert certificate.information is not None
    index, at = _local(space, plugin, theta)
    out = torch.zeros(len(theta), len(space), len(space), dtype=torch.float64)
    J = certificate.information.at(at).reshape(-1, len(index), len(index))
    out[:, index[:, None], index] = 0.5 * plugin.counts[:, None, None] * (J + J.mT)
    return out


def _flat_advice(plugins: Mapping[str, TrustedPlugin]) -> str:
    """What to do where a fit may have failed because a scalar's second derivatives are no curvature."""
    flat = [n for n, p in plugins.items() if p.kind == "raw" and p.usable is not None and not p.usable.curvature]
    unknown = [n for n, p in plugins.items() if p.kind == "raw" and p.modality.learned and p.certificate is None]
    if flat:
        names = ", ".join(f"'{n}'" for n in flat)
        return f". The second derivatives of {names} are no curvature (see its certificate): refine it, or calibrate it"
    if unknown:
        names = ", ".join(f"'{n}'" for n in unknown)
        return f". Nothing is known of {names}: if it is a network of ReLU, its curvature is zero; refine it, or calibrate it"
    return ""


def _settled(status: Status, reason: str, verdict: tuple[Status | None, str]) -> tuple[Status, str]:
    """The status that says most: what the maximum itself is, where that is no usable one; else what is known of it."""
    if verdict[0] is None:
        return status, f"{reason}; {verdict[1]}" if verdict[1] else reason
    usable = status in (Status.CONVERGED, Status.AT_BOUND)
    return (verdict[0] if usable else status), f"{verdict[1]}; {reason}" if usable else f"{reason}; {verdict[1]}"


def _local(space: ParameterSpace, plugin: TrustedPlugin, theta: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.tensor(space.indices(plugin.modality.parameter_names))
    return index, theta[:, index]


def variability(
    space: ParameterSpace, theta: Tensor, information: Tensor, plugins: Mapping[str, TrustedPlugin]
) -> Tensor:
    """K (B, P, P), the variance of the total score at theta (B, P): the information, with K for J where J ≠ K is known.

    Arguments:
        space: θ.
        theta: θ̂, (B, P).
        information: Observed, (B, P, P).
        plugins: The plugins of the query.
    """
    K = information.clone()
    for plugin in plugins.values():
        certificate = plugin.usable
        if certificate is None or plugin.kind != "raw" or certificate.information is None:
            continue
        index, at = _local(space, plugin, theta)
        P = len(index)
        J = certificate.information.at(at).reshape(-1, P, P)
        change = plugin.counts[:, None, None] * (certificate.variance.at(at) - 0.5 * (J + J.mT))
        K[:, index[:, None], index] += change
    K = K.nan_to_num()
    size = K.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    size = torch.where(size > 0, size, 1.0)
    outer = size[:, :, None] * size[:, None]
    values, vectors = torch.linalg.eigh(K / outer)  # in units of its own, so that a floor means the same for all
    floor = 1e-6 * values.abs().amax(-1, keepdim=True)
    return (vectors * values.clamp_min(0.0).maximum(floor)[:, None]) @ vectors.mT * outer


def sandwich(plugins: Mapping[str, TrustedPlugin]) -> bool:
    """Whether some raw learned plugin is known to have J ≠ K, or a J of its own, so that the honest covariance is Godambe's."""
    known = [p.usable for p in plugins.values() if p.kind == "raw" and p.usable is not None]
    return any(c.sandwich or not c.curvature for c in known)


def assess(
    space: ParameterSpace,
    theta: Tensor,
    information: Tensor,
    plugins: Mapping[str, TrustedPlugin],
    blocks: Blocks,
    *,
    fixed: Sequence[str] = (),
    kappa: float = KAPPA,
) -> tuple[list[dict[str, Trust]], list[tuple[Status | None, str]]]:
    """What the certificates say of B estimates.

    Arguments:
        space: θ.
        theta: θ̂, (B, P); rows with NaN are left alone.
        information: Observed, (B, P, P).
        plugins: The plugins of the query, learned or not.
        blocks: (plugin, data set, most) -> its observations.
        fixed: Parameters that were held: a bias along them moves nothing.
        kappa: The bias in standard errors that is too much.

    Returns:
        For each data set, plugin -> :class:`Trust`; and the status that they make of the estimate, None where they have
        nothing to say, with the reason in words.
    """
    B, P = theta.shape
    fine = torch.isfinite(theta).all(-1)
    at = torch.where(fine[:, None], theta, space.interior)
    K = variability(
        space, at, torch.where(fine[:, None, None], information, torch.eye(P, dtype=torch.float64)), plugins
    )
    free = torch.tensor([name not in fixed for name in space.names]).double()
    inverse = pseudo_inverse(K * free * free[:, None])
    total = torch.zeros(B, P, dtype=torch.float64)
    noise, extra, least = (torch.zeros(B, dtype=torch.float64) for _ in range(3))
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name, plugin in plugins.items():
        if not plugin.modality.learned or plugin.kind == "refined" or plugin.usable is None:
            continue
        g, own, more, floor, index = _bias(space, plugin, plugin.usable, at, inverse)
        total[:, index] += g
        noise, extra, least = noise + own, extra + more, least + floor
        alone = torch.einsum("na,nab,nb->n", g, inverse[:, index[:, None], index], g)
        parts[name] = _shift(alone, own, more, floor), kappa**2 / plugin.usable.rate(at[:, index])
    together = _shift(torch.einsum("na,nab,nb->n", total, inverse, total), noise, extra, least)
    trusts: list[dict[str, Trust]] = []
    verdicts: list[tuple[Status | None, str]] = []
    for b in range(B):
        if not bool(fine[b]):
            trusts.append({})
            verdicts.append((None, ""))
            continue
        found = {n: _one(space, n, p, b, at[b], parts.get(n), blocks) for n, p in plugins.items() if int(p.counts[b])}
        if float(together[b]) > kappa:
            found = {n: _beyond(t, parts, n, b, kappa) for n, t in found.items()}
        trusts.append(found)
        verdicts.append(_verdict(found, float(together[b]), kappa))
    return trusts, verdicts


def _shift(squared: Tensor, noise: Tensor, extra: Tensor, least: Tensor) -> Tensor:
    """κ (B,), as :meth:`engine.certificate.Certificate.rate` has it for one plugin."""
    return torch.maximum((squared - noise).clamp_min(0.0) + extra, least).sqrt()


def _bias(
    space: ParameterSpace, plugin: TrustedPlugin, certificate: Certificate, theta: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """g (B, P_m) of one plugin; what noise adds to gᵀK⁻¹g, what its field leaves out of it, and what its simulations
    cannot tell of it, (B,) each; and its columns."""
    index, at = _local(space, plugin, theta)
    N, P = plugin.counts.double()[:, None, None], len(index)
    K = certificate.variance.at(at)
    weight = torch.eye(P, dtype=torch.float64).expand(len(at), P, P)
    if plugin.kind == "calibrated" and isinstance(plugin.modality, Calibrated):
        _, A, own, V = plugin.modality.calibration.at(at)
        weight = A.mT @ torch.linalg.inv(own + N * V)
    weight = N * weight
    block = weight.mT @ inverse[:, index[:, None], index] @ weight

    def share(covariance: Tensor) -> Tensor:
        return (block @ covariance).diagonal(dim1=-2, dim2=-1).sum(-1)

    g = (weight @ certificate.mean.at(at)[..., None])[..., 0]
    noise, whole = share(certificate.mean.error(at)), share(K) / P
    return g, noise, certificate.beyond * whole, noise.maximum(certificate.unseen * whole), index


def _one(
    space: ParameterSpace,
    name: str,
    plugin: TrustedPlugin,
    b: int,
    theta: Tensor,
    part: tuple[Tensor, Tensor] | None,
    blocks: Blocks,
) -> Trust:
    n = int(plugin.counts[b])
    if not plugin.modality.learned:
        return Trust("exact", n, float("inf"), 0.0)
    bias, budget = (float("nan"), float("nan")) if part is None else (float(part[0][b]), float(part[1][b]))
    certificate = plugin.certificate
    trained = certificate.space if certificate is not None else getattr(plugin.modality, "training_prior", None)
    local = theta[space.indices(plugin.modality.parameter_names)]
    if trained is not None:
        edge = 1e-9 * trained.scale
        for p, v, low, high in zip(
            trained.names, local.tolist(), trained.lower - edge, trained.upper + edge, strict=True
        ):
            if not low <= v <= high:
                return Trust(
                    "outside_domain",
                    n,
                    budget,
                    bias,
                    f"'{p}' = {v:.6g} lies outside its training prior ({float(low):g}, {float(high):g})",
                )
    if certificate is not None and certificate.domain is not None:
        x = torch.cat(list(blocks(name, b, _LOOKED)))
        outside, why = certificate.domain.outside(plugin.modality, x, local)
        if outside:
            return Trust("outside_domain", n, budget, bias, why)
    by_force = f"it was admitted by force although: {plugin.forced}" if plugin.forced else ""
    if plugin.kind == "refined":
        return Trust("refined", n, float("inf"), 0.0, by_force)
    if plugin.usable is None:
        why = (
            "it has no certificate"
            if certificate is None
            else f"its certificate is not one of its {plugin.kind} scalar"
        )
        return Trust("uncertified", n, reason=f"{why}; {by_force}" if by_force else why)
    if plugin.forced:
        return Trust("uncertified", n, budget, bias, by_force)
    return Trust("certified", n, budget, bias)


def _beyond(trust: Trust, parts: Mapping[str, Any], name: str, b: int, kappa: float) -> Trust:
    """Marks the plugins whose own part is most of the bias, where all together are too much."""
    if trust.verdict != "certified":
        return trust
    worst = max(float(part[0][b]) for part in parts.values())
    if trust.bias < 0.5 * worst and trust.bias <= kappa:
        return trust
    why = f"{trust.observations} observations where it can carry {trust.budget:.3g}"
    return Trust("beyond_certificate", trust.observations, trust.budget, trust.bias, why)


def _verdict(found: Mapping[str, Trust], together: float, kappa: float) -> tuple[Status | None, str]:
    def those(verdict: str) -> list[str]:
        return [f"'{n}': {t.reason}" for n, t in found.items() if t.verdict == verdict]

    outside, uncertified = those("outside_domain"), those("uncertified")
    reasons = [f"outside the domain of {text}" for text in outside]
    if together > kappa:
        shares = sorted(((t.bias, n) for n, t in found.items() if t.bias == t.bias and t.bias > 0), reverse=True)
        first = f"; improve '{shares[0][1]}' first (κ = {shares[0][0]:.2g})" if len(shares) > 1 else ""
        each = ", ".join(those("beyond_certificate"))
        reasons.append(
            f"a bias of about {together:.2g} standard errors is to be expected (κ = {kappa:g})"
            f"{f': {each}' if each else ''}{first}; refine it by a simulator, or calibrate it with more simulations"
        )
    reasons += [f"nothing is known of the bias of {text}" for text in uncertified]
    if outside:
        return Status.OUTSIDE_DOMAIN, "; ".join(reasons)
    if together > kappa:
        return Status.BEYOND_CERTIFICATE, "; ".join(reasons)
    return (Status.UNCERTIFIED if uncertified else None), "; ".join(reasons)
