r"""Information-bottleneck objectives as data: an encoder graph, a decoder graph and weights are a loss.

.. math:: L = I_E - \beta I_D, \qquad I_G = \sum_{v \in G} w_v\, I(v; \mathrm{parents}_G(v))

The encoder graph G_E says which latent is made of which data, and its multi-information I_E is what is kept, to be made small. The
decoder graph G_D says what the latents must tell, and I_D is to be made large. Choosing the two graphs *is* choosing the method:

| method | encoder | decoder |
|---|---|---|
| ``beta-vae`` | X → Z | Z → X |
| ``dvib`` | X → Z | Z → Y |
| ``beta-dvcca`` | X → Z | Z → X, Z → Y |
| ``joint-beta-dvcca`` | (X, Y) → Z | Z → X, Z → Y |
| ``beta-dvcca-private`` | X → Z, X → W_X, Y → W_Y | (Z, W_X) → X, (Z, W_Y) → Y |
| ``dvsib`` | X → Z_X, Y → Z_Y | Z_X → Z_Y, Z_X → X, Z_Y → Y |
| ``dvsib-private`` | X → Z_X, Y → Z_Y, X → W_X, Y → W_Y | Z_X → Z_Y, (Z_X, W_X) → X, (Z_Y, W_Y) → Y |

References:
    | Abdelaleem, Nemenman, Martini (2025), Deep variational multivariate information bottleneck, J. Mach. Learn. Res. 26,
      https://arxiv.org/abs/2310.03311
    | Friedman, Mosenzon, Slonim, Tishby (2001), Multivariate information bottleneck, UAI, https://arxiv.org/abs/1301.2270
    | Higgins et al. (2017), β-VAE, ICLR; Wang, Yan, Lee, Livescu (2016), deep variational CCA, https://arxiv.org/abs/1610.03454
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from engine.learning.training import TrainingError

__all__ = ["METHODS", "Objective"]

#: A graph: node -> the nodes that it depends on.
Graph = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Objective:
    """An encoder graph, a decoder graph and their weights.

    The nodes of the encoder graph are the latents, and every other name is a kind of data. A data node of the decoder graph is
    decoded from its parents, a latent one is compared with them by a critic.

    Arguments:
        name: What messages call it.
        encoder: Latent -> the data that it is made of.
        decoder: Node -> the latents that must tell it.
        encoder_weights: Latent -> w, 1 where left out.
        decoder_weights: Node -> w, 1 where left out.

    Raises:
        TrainingError: for graphs that do not fit together, naming the node.

    Example:
        A latent that tells y more than x:

        >>> import torch
        >>> mine = Objective("mine", encoder={"Z": ["X"]}, decoder={"X": ["Z"], "Y": ["Z"]}, decoder_weights={"Y": 5.0})
        >>> print(mine)
        mine: I(Z; X) − β [I(X; Z) + 5 I(Y; Z)]
        >>> mine.latents, mine.data
        (('Z',), ('X', 'Y'))
        >>> float(mine.loss({"Z": torch.tensor(2.0)}, {"X": torch.tensor(1.0), "Y": torch.tensor(0.5)}, beta=2.0))
        -5.0
    """

    name: str
    encoder: Graph
    decoder: Graph
    encoder_weights: Mapping[str, float] = field(default_factory=dict)
    decoder_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for which in ("encoder", "decoder"):
            graph = {node: _parents(self.name, which, node, parents) for node, parents in getattr(self, which).items()}
            weights = dict(getattr(self, f"{which}_weights"))
            for node, w in weights.items():
                if node not in graph:
                    raise TrainingError(
                        f"{which}_weights of {self.name!r} must name nodes of its {which} graph, {', '.join(graph)}, got {node!r}"
                    )
                if not isinstance(w, int | float) or isinstance(w, bool) or not 0.0 <= w < math.inf:
                    raise TrainingError(
                        f"{which}_weights of {self.name!r} must be numbers >= 0, got {w!r} for {node!r}"
                    )
            if not graph:
                raise TrainingError(
                    f"{which} of {self.name!r} must have at least one node, got none; write {{'Z': ['X']}}"
                )
            object.__setattr__(self, which, MappingProxyType(graph))
            object.__setattr__(self, f"{which}_weights", MappingProxyType(weights))
        for node, parents in self.encoder.items():
            if made := [p for p in parents if p in self.encoder]:
                raise TrainingError(
                    f"encoder of {self.name!r} must make latents of data, got {node!r} made of {made[0]!r}, which is a latent itself"
                )
        for node, parents in self.decoder.items():
            if strange := [p for p in parents if p not in self.encoder or p == node]:
                raise TrainingError(
                    f"decoder of {self.name!r} must tell {node!r} from other latents of its encoder, {', '.join(self.encoder)}, "
                    f"got {strange[0]!r}; add it to the encoder, or correct the name"
                )

    @property
    def latents(self) -> tuple[str, ...]:
        """The nodes of the encoder graph."""
        return tuple(self.encoder)

    @property
    def data(self) -> tuple[str, ...]:
        """Every node that is no latent, in order of appearance."""
        named = [p for parents in self.encoder.values() for p in parents] + list(self.decoder)
        return tuple(dict.fromkeys(node for node in named if node not in self.encoder))

    def loss(self, encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], beta: float) -> Tensor:
        """I_E − β I_D of bounds on the informations, in nats.

        Arguments:
            encoder: Latent -> a bound from above on what it keeps.
            decoder: Node -> a bound from below on what is told of it, up to a constant.
            beta: β >= 0.

        Returns:
            A number, with its graph.

        Raises:
            TrainingError: for bounds of other nodes than those of the graphs.
        """
        for which, graph, given in (("encoder", self.encoder, encoder), ("decoder", self.decoder, decoder)):
            if set(given) != set(graph):
                raise TrainingError(
                    f"loss of {self.name!r} needs a bound for each of the {which}'s {', '.join(graph)}, got {', '.join(given) or 'none'}"
                )
        kept = [self.encoder_weights.get(node, 1.0) * encoder[node] for node in self.encoder]
        told = [self.decoder_weights.get(node, 1.0) * decoder[node] for node in self.decoder]
        total = kept[0] - beta * told[0]
        for more in kept[1:]:
            total = total + more
        for more in told[1:]:
            total = total - beta * more
        return total

    def __str__(self) -> str:
        return (
            f"{self.name}: {_sum(self.encoder, self.encoder_weights)} − β [{_sum(self.decoder, self.decoder_weights)}]"
        )


def _parents(name: str, which: str, node: str, parents: Sequence[str]) -> tuple[str, ...]:
    listed = tuple(parents) if not isinstance(parents, str) else ()
    if not listed or len(set(listed)) < len(listed):
        raise TrainingError(
            f"{which} of {name!r} must have a list of different parents for {node!r}, got {parents!r}; write ['X']"
        )
    return listed


def _sum(graph: Graph, weights: Mapping[str, float]) -> str:
    return " + ".join(
        f"{'' if weights.get(node, 1.0) == 1.0 else f'{weights[node]:g} '}I({node}; {', '.join(parents)})"
        for node, parents in graph.items()
    )


_BOTH = {"X": ["Z"], "Y": ["Z"]}
_TWO = {"Z_X": ["X"], "Z_Y": ["Y"]}
_PRIVATE = {"W_X": ["X"], "W_Y": ["Y"]}

#: Name -> objective: the methods of the table above, for data X and Y.
METHODS: Mapping[str, Objective] = MappingProxyType(
    {
        objective.name: objective
        for objective in (
            Objective("beta-vae", {"Z": ["X"]}, {"X": ["Z"]}),
            Objective("dvib", {"Z": ["X"]}, {"Y": ["Z"]}),
            Objective("beta-dvcca", {"Z": ["X"]}, _BOTH),
            Objective("joint-beta-dvcca", {"Z": ["X", "Y"]}, _BOTH),
            Objective("beta-dvcca-private", {"Z": ["X"], **_PRIVATE}, {"X": ["Z", "W_X"], "Y": ["Z", "W_Y"]}),
            Objective("dvsib", _TWO, {"Z_Y": ["Z_X"], "X": ["Z_X"], "Y": ["Z_Y"]}),
            Objective(
                "dvsib-private", {**_TWO, **_PRIVATE}, {"Z_Y": ["Z_X"], "X": ["Z_X", "W_X"], "Y": ["Z_Y", "W_Y"]}
            ),
        )
    }
)
