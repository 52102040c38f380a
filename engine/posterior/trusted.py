"""What the certificates of learned plugins say of a posterior, as :mod:`engine.trust` says it of an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from engine.posterior.result import Posterior, PosteriorStatus
from engine.trust import Blocks, Trust, TrustedPlugin, assess

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

_OUTSIDE = 0.01  # of the posterior outside a training prior


def judged(post: Posterior, plugins: Mapping[str, TrustedPlugin], blocks: Blocks) -> Posterior:
    """A posterior with the verdict on every plugin, and the status that this makes of it.

    A bias is measured in standard deviations of this posterior, at its mean. The domain of a plugin that was trained on a
    prior is left where more than 1 % of the posterior lies outside.

    Arguments:
        post: The posterior.
        plugins: The plugins that took part.
        blocks: (plugin, data set, most) -> its observations.
    """
    if post.status is PosteriorStatus.FAILED or not any(p.modality.learned for p in plugins.values()):
        return post
    space = post.parameters
    mean = torch.tensor([post.mean[n] for n in space.names], dtype=torch.float64)
    free = torch.tensor([n not in post.fixed and post.sd[n] > 0 for n in space.names])
    size = torch.where(free, post.covariance.diagonal().clamp_min(1e-300).sqrt(), 1.0)
    scaled = torch.where(free[:, None] & free, post.covariance / (size[:, None] * size), 0.0)
    information = torch.linalg.pinv(scaled, rtol=1e-10, hermitian=True) / (size[:, None] * size)
    held = tuple(n for n, f in zip(space.names, free.tolist(), strict=True) if not f)
    trusts, verdicts = assess(space, mean[None], information[None], plugins, blocks, fixed=held)
    found, (verdict, words) = dict(trusts[0]), verdicts[0]
    weights = post.log_weights.exp()
    for name, plugin in plugins.items():
        share = _outside(post, plugin, weights)
        if share > _OUTSIDE and found[name].verdict != "outside_domain":
            why = f"{share:.0%} of the posterior lies outside its training prior"
            found[name] = Trust("outside_domain", found[name].observations, found[name].budget, found[name].bias, why)
            text = f"outside the domain of '{name}': {why}"
            verdict, words = PosteriorStatus.OUTSIDE_DOMAIN, f"{text}; {words}" if words else text
    status, reason = post._base or (post.status, post.reason)
    if verdict is not None and status is PosteriorStatus.CONVERGED:
        status, reason = PosteriorStatus(str(verdict)), f"{words}; {reason}"
    elif words:
        reason = f"{reason}; {words}"
    return replace(post, trust=found, status=status, reason=reason)


def _outside(post: Posterior, plugin: TrustedPlugin, weights: torch.Tensor) -> float:
    """The share of a posterior outside what a learned plugin was trained on."""
    certificate = plugin.certificate
    trained = certificate.space if certificate is not None else getattr(plugin.modality, "training_prior", None)
    if not plugin.modality.learned or trained is None:
        return 0.0
    local = post.points[:, post.parameters.indices(trained.names)]
    edge = 1e-9 * trained.scale
    return float(weights @ ((local < trained.lower - edge) | (local > trained.upper + edge)).any(-1).double())
