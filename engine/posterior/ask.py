"""A registry's posterior: its sum, with refined scalars where there are any, sampled and judged by its certificates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from engine.posterior.choose import check_request, no_posterior, posterior
from engine.posterior.mass import refuse_improper
from engine.posterior.result import Posterior, PosteriorStatus
from engine.posterior.trusted import judged
from engine.posterior.update import Source
from engine.refinement.estimate import refined_estimate
from engine.refinement.refine import Single, laws_of
from engine.result import Status
from engine.search import feasible, given_start

if TYPE_CHECKING:
    from engine.registry import Registry

__all__: list[str] = []  # what Registry.posterior does


def ask(
    registry: Registry,
    data: Any,
    only: str | Sequence[str] | None,
    without: str | Sequence[str] | None,
    settings: Mapping[str, Any],
) -> Posterior:
    """What :meth:`engine.Registry.posterior` says.

    Arguments:
        registry: The registry.
        data, only, without: As there.
        settings: Its other arguments, by name.
    """
    options = dict(settings)
    refine, simulations, given = (options.pop(k) for k in ("refine", "simulations", "start"))
    check_request(*(options[k] for k in ("method", "draws", "chains", "warmup", "seed")))
    evidence = registry.evidence(
        data, prior=True, only=only, without=without, allow_identical=options.pop("allow_identical")
    )
    space, observations = registry.parameters, evidence.observations
    fixed = {name: float(value) for name, value in (options.pop("fixed") or {}).items()}
    refuse_improper(space, fixed)
    start = None if given is None else given_start(space, given, feasible(space, fixed)[0], 1)
    provenance = registry._provenance(evidence.names, observations.hash)
    laws = laws_of(evidence.modalities, refine, space)
    summed, fit = evidence, None
    if laws:
        fit = refined_estimate(
            evidence,
            laws,
            start=start,
            fixed=fixed,
            simulations=simulations,
            seed=options["seed"],
            progress=options["progress"],
        )
        if fit.status is Status.FAILED or fit._evidence is None:
            return no_posterior(
                space,
                options["method"],
                options["draws"],
                fit.reason,
                fixed=fixed,
                refinement=fit.refinement,
                provenance=provenance,
                seed=options["seed"],
            )
        summed, start = fit._evidence, fit.theta
    post = posterior(summed, fixed=fixed, start=start, provenance=provenance, **options)
    if fit is not None and fit.refinement is not None:
        post = replace(post, refinement=fit.refinement)
        if fit.refinement.rival and post.status is PosteriorStatus.CONVERGED:
            point = ", ".join(f"{n} = {v:.5g}" for n, v in fit.refinement.rival.items())
            base = (
                PosteriorStatus.UNRELIABLE,
                f"another root of the refined scores fits about as well: {point}; {post.reason}",
            )
            post = replace(post, status=base[0], reason=base[1], _base=base)
    counts = {n: torch.tensor([k]) for n, k in observations.lengths.items()}
    post = judged(post, registry._trusted(evidence.modalities, laws, counts), Single(observations).blocks)
    source = Source(registry, summed.modalities, summed.observations, observations, laws, dict(settings))
    return replace(post, _source=source)
