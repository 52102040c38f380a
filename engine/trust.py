r"""How far an estimate can be trusted: what the certificates of its learned plugins say at θ̂.

With the score's bias :math:`g_m = N_m W_m \delta_m` and variance :math:`K_m` of every learned plugin at θ̂, all of them
together move the estimate by :math:`\kappa = \sqrt{g^\top K^{-1} g}` of its standard errors, :math:`g = \sum_m g_m` and
:math:`K = \sum_m K_m` over all plugins, exact ones too. A raw scalar has W = 1; a calibrated one the weights
:math:`A^\top K^{-1}` that its refined scalar gives its score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.certificate.calibration import Calibrated
from engine.certificate.certificate import KAPPA, Certificate
from engine.many import Estimates
from engine.modality import Modality
from engine.parameters import ParameterSpace
from engine.result import Estimate, Status

__all__ = ["Trust", "TrustedPlugin", "assess", "judged", "judged_many", "sandwich", "variability"]

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
    if fit.status is Status.FAILED or not any(p.modality.learned for p in plugins.values()):
        return fit
    space, theta, information = fit.parameters, fit.theta[None], fit.information[None]
    if godambe and sandwich(plugins):
        known = fit.sandwich(variability(space, theta, information, plugins)[0])
        fit = replace(fit, covariance=known.matrix, covariance_kind=known.kind)
    trusts, verdicts = assess(space, theta, information, plugins, blocks)
    status, reason = _settled(fit.status, fit.reason, verdicts[0])
    return replace(fit, trust=trusts[0], status=status, reason=reason)


def judged_many(fits: Estimates, plugins: Mapping[str, TrustedPlugin], blocks: Blocks, *, godambe: bool) -> Estimates:
    """The same for many estimates, ``fits``; the other arguments as for :func:`judged`."""
    if not any(p.modality.learned for p in plugins.values()):
        return fits
    space = fits.parameters
    if godambe and sandwich(plugins):
        usable = torch.tensor([s is not Status.FAILED for s in fits.status])
        K = variability(space, torch.where(usable[:, None], fits.theta, space.interior), fits.information, plugins)
        covariance = fits.covariance.clone()
        for b in usable.nonzero()[:, 0].tolist():
            if fits.status[b] is Status.CONVERGED:
                inverse = torch.linalg.inv(fits.information[b])
                covariance[b] = inverse @ K[b] @ inverse
            else:
                covariance[b] = fits[b].sandwich(K[b]).matrix
        fits = replace(fits, covariance=covariance, covariance_kind="godambe")
    trusts, verdicts = assess(space, fits.theta, fits.information, plugins, blocks)
    both = [_settled(s, r, v) for s, r, v in zip(fits.status, fits.reason, verdicts, strict=True)]
    return replace(fits, trust=trusts, status=[s for s, _ in both], reason=[r for _, r in both])


def _settled(status: Status, reason: str, verdict: tuple[Status | None, str]) -> tuple[Status, str]:
    """The status that says most: what the maximum itself is, where that is no usable one; else what is known of it."""
    if verdict[0] is None:
        return status, reason
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
    values, vectors = torch.linalg.eigh(K.nan_to_num())
    floor = 1e-6 * values.abs().amax(-1, keepdim=True)
    return (vectors * values.clamp_min(0.0).maximum(floor)[:, None]) @ vectors.mT


def sandwich(plugins: Mapping[str, TrustedPlugin]) -> bool:
    """Whether some raw learned plugin is known to have J ≠ K, so that the honest covariance is Godambe's."""
    return any(p.kind == "raw" and p.usable is not None and p.usable.sandwich for p in plugins.values())


def assess(
    space: ParameterSpace,
    theta: Tensor,
    information: Tensor,
    plugins: Mapping[str, TrustedPlugin],
    blocks: Blocks,
    *,
    kappa: float = KAPPA,
) -> tuple[list[dict[str, Trust]], list[tuple[Status | None, str]]]:
    """What the certificates say of B estimates.

    Arguments:
        space: θ.
        theta: θ̂, (B, P); rows with NaN are left alone.
        information: Observed, (B, P, P).
        plugins: The plugins of the query, learned or not.
        blocks: (plugin, data set, most) -> its observations.
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
    inverse = torch.linalg.pinv(K, hermitian=True)
    total, noise = torch.zeros(B, P, dtype=torch.float64), torch.zeros(B, dtype=torch.float64)
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name, plugin in plugins.items():
        if not plugin.modality.learned or plugin.kind == "refined" or plugin.usable is None:
            continue
        g, own, index = _bias(space, plugin, plugin.usable, at, inverse)
        total[:, index] += g
        noise += own
        block = inverse[:, index[:, None], index]
        alone = torch.einsum("na,nab,nb->n", g, block, g) - own
        local = at[:, index]
        parts[name] = torch.maximum(alone, own).clamp_min(0.0).sqrt(), kappa**2 / plugin.usable.rate(local)
    together = torch.einsum("na,nab,nb->n", total, inverse, total) - noise
    together = torch.maximum(together, noise).clamp_min(0.0).sqrt()
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


def _bias(
    space: ParameterSpace, plugin: TrustedPlugin, certificate: Certificate, theta: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """g (B, P_m) of one plugin, what noise adds to gᵀK⁻¹g (B,), and its columns."""
    index, at = _local(space, plugin, theta)
    N, P = plugin.counts.double()[:, None], len(index)
    delta, V = certificate.mean.at(at), certificate.mean.error(at)
    K = certificate.variance.at(at)
    weight = torch.eye(P, dtype=torch.float64).expand(len(at), P, P)
    if plugin.kind == "calibrated" and isinstance(plugin.modality, Calibrated):
        _, A, own, _ = plugin.modality.calibration.at(at)
        weight = A.mT @ torch.linalg.inv(own)
    block = inverse[:, index[:, None], index]
    g = N * (weight @ delta[..., None])[..., 0]
    spread = N[..., None] ** 2 * weight @ V @ weight.mT
    beyond = certificate.excess if certificate.excess > 2.0 * certificate.excess_error else 0.0
    extra = beyond * N[:, 0] ** 2 * (block @ weight @ K @ weight.mT).diagonal(dim1=-2, dim2=-1).sum(-1) / P
    own = (block @ spread).diagonal(dim1=-2, dim2=-1).sum(-1)
    return g, torch.maximum(own, extra), index


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
        outside, why = certificate.domain.outside(plugin.modality, x)
        if outside:
            return Trust("outside_domain", n, budget, bias, why)
    if plugin.kind == "refined":
        return Trust("refined", n, float("inf"), 0.0)
    if plugin.usable is None:
        why = (
            "it has no certificate"
            if certificate is None
            else f"its certificate is not one of its {plugin.kind} scalar"
        )
        return Trust("uncertified", n, reason=why)
    if plugin.forced:
        return Trust("uncertified", n, budget, bias, f"it was admitted by force although: {plugin.forced}")
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
    reasons: Sequence[str] = ()
    status = None
    if outside:
        status, reasons = Status.OUTSIDE_DOMAIN, [f"outside the domain of {text}" for text in outside]
    elif together > kappa:
        shares = sorted(((t.bias, n) for n, t in found.items() if t.bias == t.bias and t.bias > 0), reverse=True)
        first = f"; improve '{shares[0][1]}' first (κ = {shares[0][0]:.2g})" if len(shares) > 1 else ""
        each = ", ".join(those("beyond_certificate"))
        status = Status.BEYOND_CERTIFICATE
        reasons = [
            f"a bias of up to {together:.2g} standard errors cannot be excluded (κ = {kappa:g}): {each}{first}; "
            "refine it by a simulator, or calibrate it with more simulations"
        ]
    elif uncertified:
        status, reasons = Status.UNCERTIFIED, [f"nothing is known of the bias of {text}" for text in uncertified]
    return status, "; ".join(reasons)
