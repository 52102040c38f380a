r"""Posteriors with more or less data, from the draws that are there: :math:`w_i \to w_i \, e^{\pm s(x; \theta_i)}`.

The sum makes it exact: a new plugin multiplies the posterior by exp of its own scalar, whatever else is in it. Only that
scalar is evaluated, at the draws that are there, so that the cost does not depend on the other plugins. The weights'
k̂ says whether the old draws still cover the new posterior; above 0.7 it is computed anew.

The marginal likelihood follows too: log p(x, x') = log p(x) + log E[exp s(x')] over the old posterior.

References:
    | Vehtari et al., J. Mach. Learn. Res. 25 (2024) 72, k̂
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import PosteriorError, UnknownPluginError
from engine.evidence import Evidence
from engine.joining import partners
from engine.modality import Modality
from engine.observations import Observations, refuse_identical
from engine.posterior.diagnostics import K_HAT, smoothed
from engine.posterior.marginal import MarginalLikelihood
from engine.posterior.result import Posterior, PosteriorStatus
from engine.posterior.trusted import judged
from engine.posterior.weighted import effective, normalise, resample
from engine.refinement.law import Laws
from engine.refinement.refine import Single, laws_of

if TYPE_CHECKING:
    from engine.registry import Registry

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

_LOOKED = 512  # points of the prior at which a part that goes is looked at, and as many of the draws
_ESS = 100.0  # a mean to a tenth of a standard deviation


@dataclass(frozen=True, eq=False)
class Source:
    """Where a posterior came from, so that it can be asked for again with other data.

    Attributes:
        registry: Whose plugins took part.
        modalities, used: The scalars and data that were summed: refined ones where there are any.
        observations: The data as they were given.
        laws: The plugins that were refined or calibrated.
        settings: Of :meth:`engine.Registry.posterior`.
    """

    registry: Registry
    modalities: Mapping[str, Modality]
    used: Observations
    observations: Observations
    laws: Mapping[str, Laws]
    settings: Mapping[str, Any]


def appended(post: Posterior, data: Mapping[str, Any], registry: Registry | None, recompute: bool | None) -> Posterior:
    """What :meth:`engine.Posterior.append` says. Arguments as there."""
    source = _source(post)
    registry = source.registry if registry is None else registry
    if not isinstance(data, Mapping) or not data:
        raise PosteriorError(f"give what to append as {{'plugin': observations}}, got {data!r:.100}")
    if again := sorted(set(data) & set(source.observations)):
        raise PosteriorError(
            f"'{again[0]}' took part already, and would be counted twice; take it out first: post.without('{again[0]}')"
        )
    if unknown := sorted(set(data) - set(registry.plugins)):
        raise UnknownPluginError(
            f"no plugin '{unknown[0]}' in this posterior's registry; append it there first, or pass registry="
        )
    fresh = {name: registry.modality(name) for name in data}
    new = Observations(data, fresh)
    observations = _joined(source.observations, new)
    if not source.settings["allow_identical"]:
        everyone = {**{n: source.registry.modality(n) for n in source.observations}, **fresh}
        refuse_identical(observations.hashes, observations._constant, everyone)
    joining = _joining(registry, observations, source.observations)
    if joining:
        modalities = {n: registry.modality(n) for n in joining}
        kept = {n: registry.plugins[n].parts for n in source.observations if registry.plugins[n].parts}
        larger = {n: p for n, p in kept.items() if not any(set(p) < set(q) for q in joining.values())}
        observations = observations.with_interactions(
            {**larger, **joining}, {**fresh, **source.modalities, **modalities}
        )
    refine = source.settings["refine"]
    if isinstance(refine, Mapping):
        refine = {n: f for n, f in refine.items() if n in fresh} or None
    laws = laws_of(fresh, refine, registry.parameters)
    why = "that was asked for" if recompute else _other_parameters(post, registry)
    if joining and not why:
        why = f"'{next(iter(joining))}' joins what depends on each other"
    if laws and not why:
        why = f"'{next(iter(laws))}' is calibrated around the estimate, together with the others"
    if why:
        return _again(registry, observations, source.settings, why)
    names = ", ".join(f"'{n}'" for n in data)
    part = Evidence(registry.parameters, fresh, new)
    part.refuse_random(post.points[int(post.log_weights.argmax())])
    out = _weighted(post, part, 1.0, recompute, f"re-weighted by {names}")
    if isinstance(out, str):
        return _again(registry, observations, source.settings, out)
    modalities = {**source.modalities, **fresh}
    known = replace(
        source, registry=registry, modalities=modalities, used=_joined(source.used, new), observations=observations
    )
    return _finished(out, known, tuple(fresh))


def removed(post: Posterior, names: Sequence[str], recompute: bool | None) -> Posterior:
    """What :meth:`engine.Posterior.without` says. Arguments as there."""
    source = _source(post)
    for name in names:
        if name not in source.observations:
            raise PosteriorError(f"'{name}' took no part; there are {', '.join(sorted(source.observations))}")
    tied = {n: source.modalities[n].parts for n in source.observations if n in source.modalities}
    names = [*names, *(n for n, parts in tied.items() if n not in names and set(parts) & set(names))]
    if not names or set(names) == set(source.observations):
        raise PosteriorError(f"some plugins must go and some must stay, got {', '.join(names) or 'none'} to go")
    observations = _less(source.observations, names)
    if recompute:
        return _again(source.registry, observations, source.settings, "that was asked for")
    gone = {n: source.modalities[n] for n in names}
    kept = [n for n in source.used if n not in names]
    part = Evidence(post.parameters, gone, _less(source.used, kept))
    listed = ", ".join(f"'{n}'" for n in names)
    why = "" if recompute is False else _blind(post, part)
    out = why or _weighted(post, part, -1.0, recompute, f"re-weighted without {listed}")
    if isinstance(out, str):
        return _again(source.registry, observations, source.settings, out)
    known = replace(
        source,
        modalities={n: source.modalities[n] for n in kept},
        used=_less(source.used, names),
        observations=observations,
        laws={n: law for n, law in source.laws.items() if n not in names},
    )
    return _finished(out, known, ())


def _weighted(post: Posterior, part: Evidence, sign: float, recompute: bool | None, how: str) -> Posterior | str:
    """The posterior with one more part in its weights, or why it must be computed anew."""
    exact = post._marginal is not None and post._marginal.method == "exact"
    if post._pool is None:
        points, smooth = post.points, post.log_weights
        raw = smooth if post._raw is None else post._raw
    else:
        points = post._pool
        smooth = raw = torch.full((len(points),), -math.log(len(points)), dtype=torch.float64)
    change = sign * _scalars(part, points)
    if not bool(torch.isfinite(raw + change).any()):
        return "its draws make the new data impossible"
    weights, k_hat = (normalise(raw + change), -math.inf) if exact else smoothed(raw + change)
    if k_hat > K_HAT and recompute is None:
        return f"its draws do not cover the new posterior (k̂ = {k_hat:.2f} where {K_HAT} passes)"
    moved = torch.logsumexp(smooth + change, 0) - torch.logsumexp(smooth, 0)
    efficiency = min(1.0, post.diagnostics.get("ess_bulk", len(points)) / len(points))  # of chains
    marginal = post._marginal
    if marginal is not None:
        spread = ((change - moved).exp() - 1.0).square() @ normalise(smooth).exp()
        noise = 0.0 if exact else math.sqrt(float(spread) / (efficiency * effective(smooth)))
        marginal = MarginalLikelihood(marginal.value + float(moved), math.hypot(marginal.error, noise), marginal.method)
    keep = ("r_hat", "ess_bulk", "divergences", "acceptance", "edge")
    diagnostics: dict[str, Any] = {k: v for k, v in post.diagnostics.items() if k in keep}
    diagnostics |= {
        "k_hat": k_hat,
        "ess": efficiency * effective(weights),
        "points": len(points),
        "evaluations": len(points),
        "updates": [*post.diagnostics.get("updates", ()), how],
    }
    status, reason = post._base or (post.status, post.reason)
    made = post._made or (status, reason)  # by the sampler: later steps are listed among the diagnostics
    said = "exactly" if exact else f"k̂ = {k_hat:.2f}, {diagnostics['ess']:.0f} effective draws"
    updates: list[str] = diagnostics["updates"]
    steps = next((i for i, step in enumerate(reversed(updates)) if step.startswith("computed anew")), len(updates))
    reason = f"{how} ({said}); {'' if steps == 1 else f'step {steps} from what was sampled: '}{made[1]}"
    if status is not made[0]:
        reason = f"an earlier step left too few draws, or did not cover; {reason}"
    if k_hat > K_HAT:
        status = PosteriorStatus.UNRELIABLE
        reason = f"its draws do not cover the new posterior: k̂ = {k_hat:.2f} where {K_HAT} passes; {reason}"
    elif not exact and diagnostics["ess"] < _ESS and status is PosteriorStatus.CONVERGED:
        status = PosteriorStatus.UNRELIABLE
        reason = f"{diagnostics['ess']:.0f} effective draws are left where {_ESS:.0f} pass (recompute=True); {reason}"
    generator = torch.Generator().manual_seed((post.seed * 1_000_003 + len(updates)) % (2**63 - 1))
    return replace(
        post,
        status=status,
        reason=reason,
        theta=points[resample(weights, len(post.theta), generator)],
        points=points,
        log_weights=weights,
        diagnostics=diagnostics,
        chains=1,
        trust={},
        _marginal=marginal,
        _raw=normalise(raw + change),
        _pool=None,
        _base=(status, reason),
        _made=made,
    )


def _blind(post: Posterior, part: Evidence) -> str:
    """Why draws cannot say what was there before a part came; empty where they can.

    A grid ends where its posterior did, and no draws lie where the part is impossible.
    """
    if post._marginal is not None and post._marginal.method == "exact":
        return ""
    if post.method == "grid":
        return "a grid ends where its posterior did"
    space = post.parameters
    some = torch.cat([post.points[:_LOOKED], space.sample_prior(_LOOKED, post.seed)])
    some[:, [space.index(n) for n in post.fixed]] = torch.tensor(list(post.fixed.values()), dtype=torch.float64)
    if bool((_scalars(part, some) == -math.inf).any()):
        return f"draws never were where {', '.join(repr(n) for n in part.modalities)} is impossible"
    return ""


def _scalars(part: Evidence, points: torch.Tensor) -> torch.Tensor:
    """The scalars of a few plugins at points (M, P), in pieces: (M,)."""
    sizes = [math.prod(part.modalities[n].event_shape) * k for n, k in part.observations.lengths.items()]
    step = max(16, min(8192, 2**22 // max(1, *sizes)))
    with torch.no_grad():
        return torch.cat([part.value(each) for each in points.split(step)])


def _finished(post: Posterior, source: Source, fresh: Sequence[str]) -> Posterior:
    """With what certificates say of it now, and where it came from. Only fresh data are looked at again."""
    registry, observations = source.registry, source.observations
    modalities = {n: registry.modality(n) for n in observations}
    if any(m.learned for m in modalities.values()):
        counts = {n: torch.tensor([k]) for n, k in observations.lengths.items()}
        plugins = registry._trusted(modalities, source.laws, counts)
        plugins = {
            n: p if n in fresh or p.certificate is None else replace(p, certificate=replace(p.certificate, domain=None))
            for n, p in plugins.items()
        }
        post = judged(post, plugins, Single(observations).blocks)
    return replace(
        post,
        provenance=registry._provenance(tuple(sorted(observations)), observations.hash),
        unnormalised=tuple(n for n in sorted(source.modalities) if not source.modalities[n].normalised),
        _source=source,
    )


def _joining(registry: Registry, now: Observations, before: Observations) -> dict[str, tuple[str, ...]]:
    """The interactions that take part with these data and could not with fewer."""
    parts = {n: e.parts for n, e in registry.plugins.items()}
    could = partners(parts, before)
    return {n: p for n, p in partners(parts, now).items() if n not in could and n not in before}


def _again(registry: Registry, observations: Observations, settings: Mapping[str, Any], why: str) -> Posterior:
    settings = dict(settings)
    if isinstance(settings["refine"], Mapping):
        settings["refine"] = {n: f for n, f in settings["refine"].items() if n in observations} or None
    post = registry.posterior(observations, **settings)
    updates = [*post.diagnostics.get("updates", ()), f"computed anew because {why}"]
    diagnostics = {**post.diagnostics, "updates": updates}
    return replace(post, reason=f"computed anew because {why}; {post.reason}", diagnostics=diagnostics)


def _source(post: Posterior) -> Source:
    if post.status is PosteriorStatus.FAILED:
        raise PosteriorError(f"a posterior that failed has no draws to re-weight: {post.reason}")
    if post._source is None:
        raise PosteriorError(
            "this posterior does not know its plugins and data; ask registry.posterior(data), whose answers do"
        )
    return post._source


def _other_parameters(post: Posterior, registry: Registry) -> str:
    """Why draws of a posterior are none in a registry's parameters; empty where they are."""
    space = registry.parameters
    if space == post.parameters:
        return ""
    for p in post.parameters:
        if p.name not in space or space[p.name] != p:
            raise PosteriorError(
                f"the registry declares '{p.name}' otherwise than this posterior knows it; ask the registry for a posterior"
            )
    more = [n for n in space.names if n not in post.parameters]
    return (
        f"there are parameters that it knows nothing of ({', '.join(more)})" if more else "other constraints hold now"
    )


def _joined(a: Observations, b: Observations) -> Observations:
    """The data of both, which were checked when they came."""
    out = copy.copy(a)
    out._sources, out.hashes = {**a._sources, **b._sources}, {**a.hashes, **b.hashes}
    out._constant = {**a._constant, **b._constant}
    out._given = (*a._given, *b._given)
    return out


def _less(a: Observations, names: Sequence[str]) -> Observations:
    """The data of all but some plugins."""
    out = copy.copy(a)
    out._sources = {n: s for n, s in a._sources.items() if n not in names}
    out.hashes = {n: h for n, h in a.hashes.items() if n not in names}
    out._constant = {n: c for n, c in a._constant.items() if n not in names}
    out._given = tuple(n for n in a._given if n not in names)
    return out
