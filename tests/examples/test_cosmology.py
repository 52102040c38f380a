"""Flat ΛCDM from three probes, against answers found with other tools (iminuit, explicit profiles) on the full data."""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path

import pytest
import scipy.integrate
import torch
from torch import Tensor

from engine import Estimate, Evidence, Parameter, ParameterSpace, Registry
from engine.estimate import estimate
from engine.tension import tension
from engine.uncertainty import covariance
from examples.cosmology import build, compress_supernovae, tables
from examples.cosmology.contours import draw
from examples.cosmology.flat_lcdm import (
    SPEED_OF_LIGHT,
    bao_ratios,
    bao_ratios_hrd,
    comoving_integral,
    expansion_rate,
    supernova_magnitudes,
)
from modalities import Gaussian

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("EVIDENCE_SHARED_DATA") or ROOT.parent / "shared" / "data") / "cosmology"
needs_shared = pytest.mark.skipif(
    not (SHARED / "references.json").exists(),
    reason=f"no reference data at {SHARED}; set EVIDENCE_SHARED_DATA to the folder that has cosmology/",
)
CASES = ("D1_SN", "D2_BAO", "D3_CC", "D4_SN_BAO", "D5_BAO_CC", "D6_SN_CC", "D7_SN_BAO_CC")
JOINT = "D7_SN_BAO_CC"
ONE_SIGMA, NINETY_FIVE = math.erf(math.sqrt(0.5)), 0.95


@cache
def references() -> dict:
    return json.loads((SHARED / "references.json").read_text())


def case(name: str) -> dict:
    return references()["cases"][name]


@cache
def probe(name: str, hrd: bool = False) -> tuple[Gaussian, Tensor]:
    """One probe on the full data, by its name in the references, with its observation (D,)."""
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


def parts(name: str) -> dict[str, tuple[Gaussian, Tensor]]:
    return {part: probe(part, hrd="hrd" in case(name)["params"]) for part in case(name)["data"]}


def evidence_of(chosen: dict[str, tuple[Gaussian, Tensor]], space: ParameterSpace) -> Evidence:
    return Evidence(space, {k: m for k, (m, _) in chosen.items()}, {k: x[None] for k, (_, x) in chosen.items()})


def space_of(name: str) -> ParameterSpace:
    bounds = case(name)["prior_bounds"]
    return ParameterSpace(Parameter(p, bounds=tuple(bounds[p])) for p in case(name)["params"])


@cache
def fitted(name: str) -> Estimate:
    fit = estimate(evidence_of(parts(name), space_of(name)))
    assert fit.converged
    return fit


def chi_squares(name: str, theta: dict[str, float]) -> dict[str, float]:
    """χ² of each part: twice what its evidence loses to data that the model fits exactly."""
    out = {}
    for part, (modality, x) in parts(name).items():
        local = torch.tensor([theta[p] for p in modality.parameter_names], dtype=torch.float64)
        out[part] = 2.0 * float(modality(modality.mean(local), local) - modality(x, local))
    return out


def by_name(fit: Estimate) -> dict[str, float]:
    return dict(zip(fit.parameters.names, fit.theta.tolist(), strict=True))


@needs_shared
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("point", ["P1", "P2"])
def test_chi_square_at_a_point_is_that_of_the_reference_code(name: str, point: str) -> None:
    expected = case(name)["chi2_at_points"][point]
    found = chi_squares(name, expected["point"])
    assert sum(found.values()) == pytest.approx(expected["chi2"], abs=0.01)
    assert found == pytest.approx(expected["split"], abs=0.01)


@needs_shared
@pytest.mark.parametrize("name", CASES)
def test_best_fit_is_that_of_minuit(name: str) -> None:
    expected, fit = case(name), fitted(name)
    for p in expected["params"]:
        assert fit[p].value == pytest.approx(expected["best_fit"][p], abs=0.05 * expected["observed_fisher_sd"][p])
    found = chi_squares(name, by_name(fit))
    assert sum(found.values()) == pytest.approx(expected["chi2_min"], abs=0.01)
    assert found == pytest.approx(expected["chi2_split"], abs=0.01)


@needs_shared
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["observed", "expected"])
def test_errors_and_correlations_are_those_of_the_exact_fisher_matrix(name: str, kind: str) -> None:
    expected, found = case(name), fitted(name).uncertainty(kind)
    for p, sd in zip(expected["params"], found.sd.tolist(), strict=True):
        assert sd == pytest.approx(expected[f"{kind}_fisher_sd"][p], rel=0.02)
    correlation = found.matrix / (found.sd[:, None] * found.sd)
    reference = torch.tensor(expected[f"{kind}_fisher_corr"], dtype=torch.float64)
    torch.testing.assert_close(correlation, reference, atol=0.02, rtol=0.0)


@needs_shared
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("key", "level", "share"), [("1", ONE_SIGMA, 0.03), ("3.841", NINETY_FIVE, 0.05)])
def test_profile_intervals_end_where_explicit_profiles_cross(name: str, key: str, level: float, share: float) -> None:
    expected, found = case(name), fitted(name).intervals(level=level)
    for p in expected["params"]:
        low, high = (expected["best_fit"][p] + d for d in expected[f"profile_dchi2_{key}"][p])
        tolerance = share * expected["observed_fisher_sd"][p]
        assert found[p].low == pytest.approx(low, abs=tolerance)
        assert found[p].high == pytest.approx(high, abs=tolerance)


@needs_shared
@pytest.mark.parametrize("name", ["D4_SN_BAO", "D5_BAO_CC", "D6_SN_CC", JOINT])
def test_tension_between_probes_is_what_the_joint_fit_loses(name: str) -> None:
    expected = references()["tension_delta_chi2"][name]
    joint, *separate = (sum(chi_squares(n, by_name(fitted(n))).values()) for n in (name, *expected["parts"]))
    assert joint - sum(separate) == pytest.approx(expected["delta_chi2"], abs=0.01)


@needs_shared
@pytest.mark.parametrize("name", ["D4_SN_BAO", "D5_BAO_CC", "D6_SN_CC", JOINT])
def test_tension_has_the_delta_chi_square_of_the_references_and_the_degrees_of_freedom_of_what_is_shared(
    name: str,
) -> None:
    expected = references()["tension_delta_chi2"][name]
    found = tension(fitted(name))
    assert found.test.delta_chi2 == pytest.approx(expected["delta_chi2"], abs=1e-4)  # 0.01 was asked for
    assert found.test.dof == len(expected["parts"]) - 1  # Om, which each sees
    assert found.trusted
    assert not found.significant
    for pair in found.pairs.values():  # in so mild a disagreement, the shift is the same number
        assert list(pair.shift.parameters) == ["Om"]
        assert pair.shift.chi2 == pytest.approx(pair.delta_chi2, rel=0.3)


@needs_shared
def test_expected_information_of_the_probes_adds_up_to_the_joint_one() -> None:
    reference = references()["fisher_additivity"][JOINT]
    evidence = evidence_of(parts(JOINT), space_of(JOINT))
    found = evidence.expected_information(evidence.parameters.tensor(reference["theta"]))
    total = torch.tensor(reference["total"], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(list(found.values())).sum(0), total, rtol=1e-6, atol=0.0)
    for part, module in reference["modules"].items():
        expected = torch.tensor(module["expected_fisher"], dtype=torch.float64)
        torch.testing.assert_close(found[part], expected, rtol=1e-6, atol=0.0)


@needs_shared
@pytest.mark.parametrize("part", ["pan", "desi_dr1", "cc31"])
def test_the_information_of_one_probe_has_the_flat_directions_of_the_reference(part: str) -> None:
    reference = references()["fisher_additivity"][JOINT]
    evidence = evidence_of({part: probe(part)}, space_of(JOINT))
    information = evidence.expected_information(evidence.parameters.tensor(reference["theta"]))[part]
    free = torch.zeros(4, dtype=torch.bool)
    found = covariance(information, free, torch.zeros(4, dtype=torch.float64), kind="expected").null
    expected = reference["modules"][part]["null_directions"]
    assert len(found) == 4 - reference["modules"][part]["rank"]
    torch.testing.assert_close(projector(found), projector(expected), atol=1e-6, rtol=0.0)


def projector(directions: Tensor | list[list[float]]) -> Tensor:
    """Onto the span of n directions (n, P): what does not depend on the basis chosen, (P, P)."""
    basis, _ = torch.linalg.qr(torch.as_tensor(directions, dtype=torch.float64).mT)
    return basis @ basis.mT


@needs_shared
@pytest.mark.parametrize(
    ("part", "alone", "known"),
    [("pan", "D1_SN", ("Om", "M")), ("desi_dr1", "D2_BAO", ("Om",)), ("cc31", "D3_CC", ("Om", "H0"))],
)
def test_one_probe_alone_fixes_what_it_can_and_names_the_rest(part: str, alone: str, known: tuple[str, ...]) -> None:
    fit = estimate(evidence_of({part: probe(part)}, space_of(JOINT)))
    assert fit.status == "not_identified"
    assert len(fit.null_directions) == 2
    for p in fit.parameters.names:
        assert fit[p].identified == (p in known)
        if p not in known:
            assert fit[p].error == math.inf
    for p in known:
        assert fit[p].value == pytest.approx(case(alone)["best_fit"][p], abs=0.05 * fit[p].error)
        assert fit[p].error == pytest.approx(case(alone)["observed_fisher_sd"][p], rel=0.02)
    directions = [[d.get(p, 0.0) for p in fit.parameters.names] for d in fit.null_directions]
    if part == "desi_dr1":  # along H0 r_d = constant, and M
        H0, rd = fit["H0"].value, fit["rd"].value
        expected = [[0.0, -H0 / math.hypot(H0, rd), rd / math.hypot(H0, rd), 0.0], [0.0, 0.0, 0.0, 1.0]]
    else:
        expected = references()["fisher_additivity"][JOINT]["modules"][part]["null_directions"]
    torch.testing.assert_close(projector(directions), projector(expected), atol=1e-6, rtol=0.0)


@needs_shared
def test_the_order_of_probes_changes_no_bit() -> None:
    forward = parts(JOINT)
    backward = dict(reversed(forward.items()))
    theta = space_of(JOINT).sample_prior(100, seed=1)
    first, second = (evidence_of(chosen, space_of(JOINT)) for chosen in (forward, backward))
    assert torch.equal(first.value(theta), second.value(theta))
    assert torch.equal(estimate(first).theta, estimate(second).theta)


# Best fit and observed Fisher errors of the three full releases together, case D7 of the references used above
# (iminuit with a Newton polish; the likelihood checked against cobaya's classes).
FULL_RELEASE = {
    "Om": (0.29573956, 0.01186855),
    "H0": (69.236864, 1.683047),
    "rd": (147.014879, 3.451708),
    "M": (23.80719116, 0.00681886),
}


def test_the_workspace_with_compressed_supernovae_gives_the_answer_of_the_full_release(tmp_path: Path) -> None:
    build.build(tmp_path / "workspace")
    fit = Registry.open(tmp_path / "workspace").estimate()
    assert fit.status == "converged"
    assert list(fit.contributions) == ["bao", "chronometers", "supernovae"]
    for p, (value, error) in FULL_RELEASE.items():
        assert fit[p].value == pytest.approx(value, abs=0.1 * error)
        assert fit[p].error == pytest.approx(error, rel=0.02)


def test_building_refuses_to_touch_a_workspace_that_exists(tmp_path: Path) -> None:
    build.main([str(tmp_path)])
    before = (tmp_path / "registry.toml").read_bytes()
    with pytest.raises(SystemExit, match="only ever grows"):
        build.main([str(tmp_path)])
    assert (tmp_path / "registry.toml").read_bytes() == before


def test_the_profile_on_the_plane_is_that_of_the_intervals() -> None:
    space, probes = ParameterSpace(build.parameters()), build.probes()
    sums = Evidence(space, {k: m for k, (m, _) in probes.items()}, {k: x for k, (_, x) in probes.items()})
    fit = estimate(sums)
    low, high = fit.interval("Om", level=NINETY_FIVE)
    # the smallest D along H0, at each end of the interval of Om, is the threshold of the interval
    hubble = fit["H0"].value + torch.linspace(-3.0, 3.0, 121, dtype=torch.float64)
    matter, hubble = torch.cartesian_prod(double(low, fit["Om"].value, high), hubble).unbind(-1)
    smallest = fit.profile({"Om": matter, "H0": hubble}).reshape(3, -1).amin(-1)
    assert smallest.tolist() == pytest.approx([3.841, 0.0, 3.841], abs=0.001)


def test_the_figure_is_drawn_with_the_numbers_of_the_fit(tmp_path: Path) -> None:
    registry = build.build(tmp_path / "workspace")
    sums = {name: registry.evidence(only=name) for name in registry.plugins} | {"all": registry.evidence()}
    figure = draw(sums, points=9)
    figure.savefig(tmp_path / "figure.png", dpi=50)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert any("0.296 \\pm 0.012" in text and "69.2 \\pm 1.7" in text for text in texts)


@needs_shared
def test_the_committed_compression_is_what_its_script_makes() -> None:
    bins = compress_supernovae.read_pantheon(SHARED / "data")
    modality, magnitude = build.probes()["supernovae"]
    nodes, expected, scatter = compress_supernovae.compress(*bins)
    torch.testing.assert_close(magnitude[0], expected, atol=1e-8, rtol=0.0)
    torch.testing.assert_close(modality.get_buffer("covariance"), scatter, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(modality.configuration["inputs"]["z_cmb"], nodes)


@pytest.mark.parametrize("matter", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("z", [0.014, 0.5, 2.33])
def test_distances_are_the_integral_that_quad_finds(matter: float, z: float) -> None:
    def rate(t: float) -> float:
        return math.sqrt(matter * (1 + t) ** 3 + 1 - matter)

    integral = scipy.integrate.quad(lambda t: 1 / rate(t), 0, z, epsabs=1e-13, epsrel=1e-13)[0]
    at = torch.tensor([z], dtype=torch.float64)
    magnitude = supernova_magnitudes(double(matter, 23.8), z_cmb=at, z_hel=at + 0.01)
    assert magnitude.item() == pytest.approx(5 * math.log10((1.01 + z) * integral) + 23.8, abs=1e-11)
    assert expansion_rate(double(matter, 70.0), z=at).item() == pytest.approx(70 * rate(z), rel=1e-13)
    across, along = (SPEED_OF_LIGHT / 70 * d for d in (integral, 1 / rate(z)))
    ratios = bao_ratios(double(matter, 70.0, 147.0), z=at.expand(3), kind=double(0, 1, 2))
    assert ratios.tolist() == pytest.approx([d / 147 for d in (across, along, (z * across**2 * along) ** (1 / 3))])
    torch.testing.assert_close(bao_ratios_hrd(double(matter, 102.9), z=at.expand(3), kind=double(0, 1, 2)), ratios)


def test_distances_have_the_closed_forms_of_de_sitter_and_of_matter_alone() -> None:
    z = double(0.01, 0.5, 1.0, 3.0)
    torch.testing.assert_close(comoving_integral(double(1.0), z), 2 - 2 / (1 + z).sqrt(), rtol=1e-13, atol=0.0)
    torch.testing.assert_close(comoving_integral(double(0.0), z), z, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("name", ["supernovae", "bao", "chronometers"])
def test_predictions_broadcast_and_differentiate_twice(name: str) -> None:
    modality, x = build.probes()[name]
    assert isinstance(modality, Gaussian)
    space = ParameterSpace(build.parameters())
    theta = space.sample_prior(6, seed=2)[:, space.indices(modality.parameter_names)]
    together = modality.mean(theta.reshape(2, 3, -1))
    assert together.shape == (2, 3, x.shape[-1])
    torch.testing.assert_close(together.reshape(6, -1), torch.stack([modality.mean(t) for t in theta]))
    some = theta[:1].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(modality.mean, some)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
