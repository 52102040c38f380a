r"""Posterior predictive checks, plugin by plugin: whether data simulated at draws of the posterior look like the data.

At each draw θ of the posterior the plugin's scalar of the data, Σ_i s(x_i; θ), is compared with that of as many simulated
observations at the same θ: the discrepancy of Gelman, Meng and Stern with −2 s for χ². The share of draws in which simulated
data are less likely than the data is near ½ where the plugin describes them, and near 0 or 1 where it does not: 0 says that the data
scatter more than the plugin believes, 1 that they scatter less. The p-values of such checks are conservative.

References:
    | Gelman, Meng and Stern (1996), Posterior predictive assessment of model fitness via realized discrepancies, Stat. Sinica 6, 733
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import PosteriorError
from engine.learning.simulator import Simulate, draw, generator_of
from engine.modality import Modality
from engine.observations import Observations
from engine.parameters import ParameterSpace

__all__ = ["PredictiveCheck", "check_predictions"]

_NUMBERS = 2**22  # of simulated data at a time


@dataclass(frozen=True, eq=False)
class PredictiveCheck:
    """How the data of each plugin compare with data simulated from the posterior.

    Attributes:
        observed: Plugin -> Σ s of the data at each draw, shape (draws,), in nats.
        simulated: Plugin -> the same of simulated data, shape (draws,).
        skipped: Plugins that cannot simulate.
        draws: How many.
        seed: Of the simulations.

    Example:
        >>> zero, more = torch.zeros(4), torch.tensor([-1.0, -2.0, -3.0, 1.0])
        >>> found = PredictiveCheck({"a": zero}, {"a": more}, (), draws=4, seed=0)
        >>> found.shares["a"], found.p_values["a"]
        (0.75, 0.5)
    """

    observed: Mapping[str, Tensor]
    simulated: Mapping[str, Tensor]
    skipped: tuple[str, ...]
    draws: int
    seed: int

    @property
    def shares(self) -> dict[str, float]:
        """Plugin -> the share of draws in which simulated data are less likely than the data; near ½ for a right plugin."""
        out = {}
        for name, s in self.observed.items():
            r = self.simulated[name]
            out[name] = float(((r < s).double() + 0.5 * (r == s).double()).mean())
        return out

    @property
    def p_values(self) -> dict[str, float]:
        """Plugin -> the two-sided posterior predictive p-value, 2 min(share, 1 − share)."""
        return {name: 2.0 * min(share, 1.0 - share) for name, share in self.shares.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {
            "shares": self.shares,
            "p_values": self.p_values,
            "skipped": list(self.skipped),
            "draws": self.draws,
            "seed": self.seed,
        }

    def __str__(self) -> str:
        width = max([len("plugin"), *map(len, self.observed), *map(len, self.skipped)])
        lines = [
            f"posterior predictive checks, {self.draws} draws",
            f"  {'plugin':{width}s}   less likely than the data   two-sided p",
        ]
        p = self.p_values
        lines += [f"  {n:{width}s}   {share:25.1%}   {p[n]:11.3g}" for n, share in self.shares.items()]
        lines += [f"  {n:{width}s}   cannot simulate its data" for n in self.skipped]
        return "\n".join(lines)


def check_predictions(
    parameters: ParameterSpace,
    modalities: Mapping[str, Modality],
    observations: Observations,
    theta: Tensor,
    *,
    simulate: Mapping[str, Simulate] | None = None,
    seed: int = 0,
) -> PredictiveCheck:
    """Compare the data of every plugin with data simulated at draws of a posterior.

    Arguments:
        parameters: θ.
        modalities: The plugins, by name.
        observations: The data.
        theta: Draws of equal weight, shape (n, P).
        simulate: Plugin -> its simulator; by default the modality's own.
        seed: Of the simulations.

    Raises:
        PosteriorError: where the draws are not finite, or no plugin can simulate.
        ModalityError: where a simulator or a scalar fails; the message names the plugin.

    Example:
        >>> from torch.distributions import Normal
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
        >>> modalities = {"a": Gaussian(parameter_names=("mu",), sd=1.0)}
        >>> wide = Observations({"a": 5.0 * torch.randn(30, 1, generator=torch.Generator().manual_seed(0))}, modalities)
        >>> check_predictions(space, modalities, wide, torch.zeros(200, 1).double()).shares["a"]  # they scatter more
        0.0
    """
    if not len(theta) or not bool(torch.isfinite(theta).all()):
        raise PosteriorError(
            "predictions are of finite draws of a posterior, and one that failed has none; see its reason"
        )
    given = dict(simulate or {})
    observed, simulated, skipped = {}, {}, []
    for name in sorted(observations.lengths):
        modality, N = modalities[name], observations.lengths[name]
        if name not in given and not modality.has_simulator:
            skipped.append(name)
            continue
        source, shape = given.get(name, modality.simulate), tuple(modality.event_shape)
        own = theta[:, parameters.indices(modality.parameter_names)]
        observed[name] = sum(_scalars(modality, x, own) for x in observations.blocks(name))
        step = max(1, _NUMBERS // max(1, N * max(1, modality.event_shape.numel())))
        parts = []
        for k, some in enumerate(own.split(step)):
            generator = generator_of(seed, zlib.crc32(name.encode()), k)
            at = some.repeat_interleave(N, 0)
            found = draw(source, at, generator, shape, f"the simulator of plugin '{name}'")
            if found.excluded:
                raise PosteriorError(
                    f"the simulator of plugin '{name}' returned {found.excluded} of {len(at)} observations that are not finite; "
                    "mend it before its data are compared"
                )
            with torch.no_grad():
                s = modality(found.x.to(modality.dtype), at.to(modality.dtype)).double()
            parts.append(s.reshape(len(some), N).sum(-1))
        simulated[name] = torch.cat(parts)
    if not observed:
        raise PosteriorError(
            f"no plugin can simulate its data ({', '.join(skipped)}); pass simulate={{'name': simulator}} for one of them"
        )
    return PredictiveCheck(observed, simulated, tuple(skipped), len(theta), seed)


def _scalars(modality: Modality, x: Tensor, theta: Tensor) -> Tensor:
    """Σ_i s(x_i; θ) of one block of observations (N, *event) at every θ (n, P_m) -> (n,)."""
    step = max(1, _NUMBERS // max(1, x.numel()))
    with torch.no_grad():
        parts = [
            modality(x[None].to(modality.dtype), some[:, None].to(modality.dtype)).double().sum(-1)
            for some in theta.split(step)
        ]
    return torch.cat(parts)
