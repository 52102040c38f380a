"""Posteriors of three cosmological probes and all their sums against importance sampling by other code (480,000 draws).

The tolerances are those of ``references.json``: means to 0.08 standard deviations, standard deviations to 5 %, quantiles to
0.12 standard deviations, the log marginal likelihood over the prior box to 0.1.
"""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path

import pytest
import scipy.stats
import torch
from torch import Tensor

from engine import Evidence, Parameter, ParameterSpace, Posterior
from engine.posterior import posterior
from examples.cosmology import build, compress_supernovae, tables
from examples.cosmology.flat_lcdm import bao_ratios_hrd
from modalities import Gaussian

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("EVIDENCE_SHARED_DATA") or ROOT.parent / "shared" / "data") / "cosmology"
pytestmark = pytest.mark.skipif(
    not (SHARED / "references.json").exists(),
    reason=f"no reference data at {SHARED}; set EVIDENCE_SHARED_DATA to the folder that has cosmology/",
)
CASES = ("D1_SN", "D2_BAO", "D3_CC", "D4_SN_BAO", "D5_BAO_CC", "D6_SN_CC", "D7_SN_BAO_CC")
NORMAL = scipy.stats.norm()
FRACTIONS = (0.025, 0.16, 0.5, 0.84, 0.975)


@cache
def case(name: str) -> dict:
    return json.loads((SHARED / "references.json").read_text())["cases"][name]


@cache
def probe(name: str, hrd: bool) -> tuple[Gaussian, Tensor]:
    """One probe on the full data, by its name in the references, with its observation."""
    if name == "pan":
        z_cmb, z_hel, magnitude, scatter = compress_supernovae.read_pantheon(SHARED / "data")
        return build.supernovae(z_cmb, z_hel, scatter), magnitude
    if name == "cc31":
        z, rate, sd = tables.chronometer_table()
        return build.chronometers(z, sd), rate
    z, kind, ratio, scatter = tables.bao_table()
    if not hrd:
        return build.bao(z, kind, scatter), ratio
    inputs = {"z": z, "kind": kind}
    return Gaussian(bao_ratios_hrd, parameter_names=("Om", "hrd"), covariance=scatter, inputs=inputs), ratio


def evidence_of(name: str) -> Evidence:
    bounds = case(name)["prior_bounds"]
    space = ParameterSpace(Parameter(p, bounds=tuple(bounds[p])) for p in case(name)["params"])
    parts = {part: probe(part, "hrd" in case(name)["params"]) for part in case(name)["data"]}
    return Evidence(
        space, {k: m for k, (m, _) in parts.items()}, {k: x[None] for k, (_, x) in parts.items()}, prior=True
    )


def constant(evidence: Evidence, name: str) -> float:
    """Σ log normalisations of the Gaussians, which the reference's exp(−χ²/2) leaves out."""
    best = torch.tensor([[case(name)["best_fit"][p] for p in case(name)["params"]]], dtype=torch.float64)
    return float(evidence.value(best)[0]) + 0.5 * case(name)["chi2_min"]


def compare(post: Posterior, evidence: Evidence, name: str) -> dict[str, float]:
    """The largest deviations, in units of the tolerances."""
    expected = case(name)["posterior_importance_sampling"]
    worst = {"mean": 0.0, "sd": 0.0, "quantile": 0.0}
    for p, sd in expected["sd"].items():
        worst["mean"] = max(worst["mean"], abs(post.mean[p] - expected["mean"][p]) / (0.08 * sd))
        worst["sd"] = max(worst["sd"], abs(post.sd[p] / sd - 1.0) / 0.05)
        for q, value in zip(FRACTIONS, expected["q025_q16_q50_q84_q975"][p], strict=True):
            room = 0.12
            if (
                post.method == "nuts"
            ):  # 4000 autocorrelated draws: and three standard errors of the quantile of a Gaussian
                n = min(post.diagnostics["ess_bulk"], post.diagnostics["ess_tail"])
                room += 3.0 * math.sqrt(q * (1.0 - q) / n) / NORMAL.pdf(NORMAL.ppf(q))
            worst["quantile"] = max(worst["quantile"], float(abs(post.quantile(p, q) - value) / (room * sd)))
    found = post.log_marginal_likelihood.value - constant(evidence, name)
    worst["log_marginal"] = abs(found - expected["log_evidence_flat_prior"]) / 0.1
    return worst


@pytest.mark.parametrize(
    "method", ["laplace", "importance", "grid", "auto", pytest.param("nuts", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", CASES)
def test_posterior_is_that_of_the_reference(name: str, method: str) -> None:
    evidence = evidence_of(name)
    if method == "grid" and len(evidence.parameters) > 3:
        pytest.skip("four parameters: a grid does not claim to apply")
    post = posterior(evidence, method=method, draws=4000 if method == "nuts" else 1000, seed=0)
    if method == "laplace" and post.status == "unreliable":
        assert name in ("D3_CC", "D5_BAO_CC", "D7_SN_BAO_CC")  # the most skewed of them, and it says so
        return
    assert post.status == "converged", post.reason
    worst = compare(post, evidence, name)
    print(name, method, post.method, {k: round(v, 3) for k, v in worst.items()})
    assert max(worst.values()) < 1.0, worst


def test_a_sum_counted_twice_is_not_that_of_the_reference() -> None:
    """The comparison above would see a factor of two: the errors shrink by √2."""
    evidence = evidence_of("D1_SN")
    twice = Evidence(
        evidence.parameters,
        {"pan": evidence.modalities["pan"], "again": evidence.modalities["pan"]},
        {"pan": evidence.observations["pan"], "again": evidence.observations["pan"]},
        prior=True,
        allow_identical=True,
    )
    post = posterior(twice, method="importance", draws=1000, seed=0)
    assert max(compare(post, evidence, "D1_SN").values()) > 5.0
