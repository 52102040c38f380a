r"""What holds for every true log-likelihood, tested with data that the modality simulates.

With the score :math:`u = \nabla_\theta s(x; \theta)` and x drawn at θ, Bartlett's identities are

.. math:: E[u] = 0, \qquad E[u u^T + \nabla_\theta u] = 0

The first alone passes with the sign of s flipped, or with a factor in front of it; the second does not. The
expected information is :math:`E[u u^T]`.

References:
    | Bartlett (1953), Approximate confidence intervals, Biometrika 40, 12
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.errors import ContractError
from engine.testing.case import Case
from engine.testing.draws import Draws, vech
from engine.testing.hotelling import mean_is_zero
from engine.testing.report import Skip, show

__all__ = ["check_first", "check_information", "check_second"]

# What a run of the battery on a correct modality may fail by chance, shared by three checks at every θ.
_FALSE_ALARM = 1e-6
# Below this many draws the law of a mean is not known well enough for limits so far out.
_FEWEST = 1000


def check_first(case: Case) -> str:
    """E[u] = 0."""
    return _test(
        case,
        "E[u] must be 0 where the data are drawn at θ",
        [(draws.u, draws.floor) for draws in _draws(case, first=True)],
        case.names,
        lambda k: (
            "a rate or mean that log_evidence and simulate compute differently, or a term in θ that is missing "
            "(a normalisation) or too many (a prior)"
        ),
    )


def check_second(case: Case) -> str:
    """E[u uᵀ + ∇u] = 0."""
    found = _draws(case)
    diagonal = vech(torch.eye(len(case.names))) > 0

    def advice(k: int) -> str:
        squares, curvature = (value.mean(0)[diagonal] for value in (found[k].outer, -found[k].curvature))
        live = squares > 0
        if not bool((curvature[live].abs() > 1e-6 * squares[live]).any()):
            return "its second derivative is zero where its score varies: not smooth enough (|x|, ReLU), or detached"
        ratio = (squares[live] / curvature[live]).median().item()
        seen = f"E[u uᵀ] is {ratio:.3g} times −E[∇u]"
        if ratio < 0:
            return f"{seen}: the sign of the scalar is flipped"
        return (
            f"{seen}: a factor of that size in front of the scalar (−2 log L, a sum where a mean was meant), "
            "or a simulator whose noise is not the one that log_evidence assumes"
        )

    tests = [(draws.outer + draws.curvature, draws.floor2) for draws in found]
    rule = "E[u uᵀ + ∇u] must be 0 where the data are drawn at θ"
    return _test(case, rule, tests, _pairs(case.names), advice)


def check_information(case: Case) -> str:
    """The closed form of the expected information is a covariance, that of the score."""
    if not case.given.has_expected_information:
        raise Skip("no closed form")
    p = len(case.names)
    with torch.no_grad():
        information = case.exact.expected_information(case.theta)
        single = case.exact.expected_information(case.theta[0])
    for value, expected in ((information, (len(case.theta), p, p)), (single, (p, p))):
        if value.shape != expected:
            raise ContractError(
                f"expected_information must map (*batch, {p}) to {expected}, got {tuple(value.shape)}; keep the batch"
            )
    if not bool(torch.isfinite(information).all()):
        raise ContractError("the expected information must be finite, got NaN or infinity; choose θ inside the bounds")
    for k, matrix in enumerate(information):
        skew = (matrix - matrix.T).abs().max().item()
        if skew > 1e-9 * matrix.abs().max().item():
            seen = f"entries {skew:.3g} apart at theta[{k}]"
            raise ContractError(f"the expected information must be symmetric, got {seen}; it is E[u uᵀ]")
        eigenvalues = torch.linalg.eigvalsh(matrix * case.scale[:, None] * case.scale)
        if eigenvalues[0] < -1e-9 * eigenvalues.abs().max():
            raise ContractError(
                f"the expected information must have no eigenvalue < 0, got {eigenvalues[0].item():.3g} at theta[{k}] "
                "(in units of θ); it is E[u uᵀ], minus the mean Hessian"
            )
    if not case.given.has_simulator:
        return "symmetric, no negative eigenvalue; not compared with scores, since it does not simulate"
    return _test(
        case,
        "expected_information must be E[u uᵀ] at data drawn at θ",
        [(draws.outer - vech(information[k]), draws.floor2) for k, draws in enumerate(_draws(case))],
        _pairs(case.names),
        lambda k: "recompute the closed form for one observation, in the order of parameter_names",
    )


def _draws(case: Case, first: bool = False) -> list[Draws]:
    """The draws at each θ; only the first check fails where there should be some, the others refer to it."""
    if not case.given.has_simulator:
        raise Skip("it does not simulate")
    if case.simulations < _FEWEST:
        raise Skip(f"needs at least {_FEWEST} simulations, got {case.simulations}")
    if isinstance(case.draws, Exception):
        raise case.draws if first else Skip("no scores at simulated data; see the first Bartlett identity")
    return case.draws


def _pairs(names: Sequence[str]) -> list[str]:
    """What the entries of vech() stand for."""
    return [f"{row}, {column}" for i, row in enumerate(names) for column in names[: i + 1]]


def _test(
    case: Case, rule: str, tests: list[tuple[Tensor, Tensor]], labels: Sequence[str], advice: Callable[[int], str]
) -> str:
    """Test that a mean over simulated data is zero at every θ, and say by how far it is not.

    Arguments:
        case: Its draws must be there.
        rule: What is tested, for messages.
        tests: For each θ, the values (n, D) and the size (D,) below which they are rounding.
        labels: A name for each of the D components.
        advice: The next step for a failure at theta[k].
    """
    alpha = _FALSE_ALARM / (3 * len(tests))
    results, reasons = [], []
    for k, (draws, (values, floor)) in enumerate(zip(_draws(case), tests, strict=True)):
        if not bool((draws.u.abs() > draws.floor).any()):
            reasons.append(f"the score is zero at theta[{k}]")
        elif not draws.vary:
            reasons.append(f"all draws at theta[{k}] are the same")
        elif (result := mean_is_zero(values, floor, alpha)) is None:
            reasons.append(f"rare draws dominate at theta[{k}]: use more simulations, or another θ")
        else:
            results.append((k, result))
    if not results:
        raise Skip("; ".join(reasons))
    k, worst = max(results, key=lambda item: item[1].errors / item[1].limit if item[1].limit else math.inf)
    if not worst.errors <= worst.limit:
        amount = f"{worst.errors:.3g} standard errors (limit {worst.limit:.3g})"
        if math.isinf(worst.errors):
            amount = "one value ≠ 0 at every draw (a term in θ alone, or events too rare to be drawn)"
        raise ContractError(
            f"{rule}, got {amount} at theta[{k}] = {show(case.theta[k])}, most of it in ({labels[worst.worst]}); "
            f"{advice(k)}"
        )
    seen = f"{worst.errors:.2f} standard errors at worst (limit {worst.limit:.2f})"
    return "; ".join([f"{seen}, {case.simulations} draws at each θ", *reasons])
