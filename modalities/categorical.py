r"""One category out of C, :math:`x \sim \mathrm{Categorical}(p(\theta))`.

A table of probabilities answers "which hypothesis": θ is the index of its row. Logits answer "which value
of θ", through :math:`p = \mathrm{softmax}(\ell(\theta))`, with expected information
:math:`J^T (\mathrm{diag}(p) - p p^T) J` where :math:`J = \partial\ell / \partial\theta`.

References:
    | Agresti (2013), Categorical Data Analysis, 3rd edition, Wiley, sections 1.2 and 8.1
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from engine.errors import ModalityError
from engine.modality import Modality
from modalities._predictor import Function, Predictor, jacobian
from modalities._tensors import Exact, Numbers, float64, own_generator, require

__all__ = ["Categorical"]


class Categorical(Exact, Modality):
    """Evidence from one category, an index 0 ... C − 1, about a hypothesis or about continuous θ.

    Arguments:
        logits: A function or ``nn.Module`` called as ``logits(theta, **inputs)`` with θ of shape
            (*batch, P_m), returning unnormalised log-probabilities (*batch, C).
        parameter_names: The components of θ; one discrete parameter with a table.
        probabilities: Instead of ``logits``, a table (H, C) whose row h is p(x | h); rows add up to 1
            within 1e-6 (and are then normalised). θ is the row, and anything that is no row gives −∞.
        inputs: Known quantities that ``logits`` needs, name -> numbers.
        categories: C, needed with ``logits``.

    Raises:
        ModalityError: for arguments that break a rule above; when evaluated, for logits of another shape.

    Example:
        >>> particle = Categorical(parameter_names=("kind",), probabilities=[[0.9, 0.1], [0.25, 0.75]])
        >>> [round(p, 9) for p in particle(torch.tensor(1), torch.tensor([[0.0], [1.0], [2.0]])).exp().tolist()]
        [0.1, 0.75, 0.0]
    """

    normalised = True
    support_advice = "number the categories from 0, and leave out entries of any other"

    logits: Predictor
    probabilities: Tensor
    log_probabilities: Tensor

    def __init__(
        self,
        logits: Function | None = None,
        *,
        parameter_names: Sequence[str],
        probabilities: Numbers | None = None,
        inputs: Mapping[str, Numbers] | None = None,
        categories: int | None = None,
    ) -> None:
        super().__init__(parameter_names=parameter_names)
        if (logits is None) == (probabilities is None):
            given = "neither" if logits is None else "both"
            raise ModalityError(
                f"exactly one of logits and probabilities must be given, got {given}; a table is for hypotheses"
            )
        if probabilities is not None:
            table = self._check_table(probabilities, inputs)
            columns = table.shape[1]
            if categories not in (None, columns):
                raise ModalityError(
                    f"categories must be the {columns} columns of the table, got {categories}; leave it out"
                )
            categories = columns
            self.register_buffer("probabilities", table, persistent=False)
            self.register_buffer("log_probabilities", table.log(), persistent=False)
        elif not isinstance(categories, int) or categories < 1:
            raise ModalityError(
                f"categories must be a whole number >= 1 with logits, got {categories!r}; give the number of logits"
            )
        else:
            self.logits = Predictor("logits", logits, (categories,), inputs)
        self._table, self.categories = probabilities is not None, categories
        self.support = constraints.integer_interval(0, categories - 1)
        self.support_rule = f"a category must be a whole number from 0 to {categories - 1}"

    def _check_table(self, probabilities: Numbers, inputs: Mapping[str, Numbers] | None) -> Tensor:
        if len(self.parameter_names) != 1:
            raise ModalityError(
                f"parameter_names must hold one discrete parameter with probabilities, got {self.parameter_names}; "
                "number the combinations of hypotheses"
            )
        if inputs:
            raise ModalityError(f"inputs {tuple(inputs)} need a function to go to, got a table; drop them")
        table = float64("probabilities", probabilities, (None, None), "one row per hypothesis, one column per category")
        require("probabilities", table, table >= 0, ">= 0", "repair that entry")
        total = table.sum(-1)
        require(
            "each row's sum of probabilities", total, (total - 1).abs() <= 1e-6, "1 within 1e-6", "normalise that row"
        )
        return table / total[:, None]

    @property
    def dtype(self) -> torch.dtype:
        """float64, whatever the dtype of logits with weights."""
        return torch.float64

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """log p(x | θ) in nats: x (*batch), θ (*batch, P_m) -> (*batch)."""
        known = (x >= 0) & (x < self.categories) & (x == x.floor())
        index = torch.where(known, x, 0).long()
        if self._table:
            row, exists = self._row(theta)
            # The zero below keeps the graph: the score with respect to a hypothesis is 0, not an error.
            value = self.log_probabilities[row[..., None], index[..., None]][..., 0]
            return torch.where(known & exists, value + 0.0 * theta[..., 0].to(torch.float64), -math.inf)
        log_p = self.logits(theta).log_softmax(-1)
        batch = torch.broadcast_shapes(index.shape, log_p.shape[:-1])
        value = log_p.expand(*batch, self.categories).gather(-1, index.expand(batch)[..., None])[..., 0]
        return torch.where(known, value, -math.inf)

    def _row(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The row of the table for each θ, and whether there is one."""
        h = theta[..., 0]
        exists = (h >= 0) & (h < self.probabilities.shape[0]) & (h == h.floor())
        return torch.where(exists, h, 0.0).long(), exists

    @torch.no_grad()
    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One category for each θ, as float64: (*batch, P_m) -> (*batch).

        Raises:
            ModalityError: where θ is no row of the table.
        """
        if self._table:
            row, exists = self._row(theta)
            rule = f"a whole number from 0 to {self.probabilities.shape[0] - 1}"
            require(self.parameter_names[0], theta[..., 0], exists, rule, "name a row of the table")
            p = self.probabilities[row]
        else:
            p = self.logits(theta).softmax(-1)
        drawn = torch.multinomial(p.reshape(-1, self.categories), 1, generator=own_generator(generator))
        return drawn.reshape(p.shape[:-1]).to(torch.float64)

    def expected_information(self, theta: Tensor) -> Tensor:
        """Jᵀ (diag(p) − p pᵀ) J: (*batch, P_m) -> (*batch, P_m, P_m); 0 for a table, as its score is."""
        if self._table:
            return torch.zeros(*theta.shape, 1, dtype=torch.float64, device=theta.device)
        slope, p = jacobian(self.logits, theta), self.logits(theta).softmax(-1)[..., None]
        centred = slope - (p * slope).sum(-2, keepdim=True)
        return centred.mT @ (p * centred)

    def stack_key(self) -> Hashable | None:
        """One key for all tables, which are tensors alone; None with a function of θ."""
        return "table" if self._table else None
