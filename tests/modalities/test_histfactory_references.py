"""Channels and constraint terms against pyhf 0.7.6, whose numbers are in the shared data."""

import json
import os
from pathlib import Path

import pytest
import torch

from modalities import Constraint, PoissonCounts

SHARED = Path(os.environ.get("EVIDENCE_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
FOLDER = SHARED / "histfactory"
CASES = ("1bin_shapesys", "2bin_2channel", "2bin_2channel_couplednorm", "docs_2bin_1channel")

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no reference data at {FOLDER}; set EVIDENCE_SHARED_DATA to its parent folder"
)


def plugins(workspace):
    """One channel a plugin, one constraint a nuisance, each with its data."""
    found, data = {}, {c["name"]: c["data"] for c in workspace["observations"]}
    for channel in workspace["channels"]:
        signal, background, scale, normalisation, per_bin = None, {}, {}, {}, {}
        for sample in channel["samples"]:
            name, nominal = sample["name"], torch.tensor(sample["data"], dtype=torch.float64)
            if name == "signal":
                signal = nominal
            else:
                background[name] = nominal
            for modifier in sample["modifiers"]:
                nuisance = modifier["name"]
                if modifier["type"] == "normsys":
                    ends = modifier["data"]
                    normalisation.setdefault(nuisance, {})[name] = (ends["lo"], ends["hi"])
                    found[nuisance], data[nuisance] = Constraint(nuisance), [0.0]
                elif modifier["type"] == "shapesys":
                    tau = (nominal / torch.tensor(modifier["data"], dtype=torch.float64)) ** 2
                    per_bin[name] = [f"{nuisance}[{i}]" for i in range(len(nominal))]
                    found[nuisance] = Constraint(per_bin[name], kind="poisson", scale=tau)
                    data[nuisance] = tau.tolist()
        found[channel["name"]] = PoissonCounts(
            signal, background, "mu", scale=scale, normalisation=normalisation, per_bin=per_bin
        )
    return found, {name: torch.tensor(x, dtype=torch.float64) for name, x in data.items()}


@pytest.mark.parametrize("at", ["at_init", "at_best_fit"])
@pytest.mark.parametrize("case", CASES)
def test_each_channel_and_the_constraints_have_the_log_density_of_pyhf(case, at):
    reference = json.loads((FOLDER / "references.json").read_text())["cases"][case]
    found, data = plugins(json.loads((FOLDER / f"{case}.json").read_text()))
    point = reference["best_fit"]
    if at == "at_init":
        point = {name: 0.0 if "norm" in name else 1.0 for name in point}
    ours = {}
    for name, modality in found.items():
        theta = torch.tensor([point[n] for n in modality.parameter_names], dtype=torch.float64)
        key = "constraints" if modality.auxiliary else name
        ours[key] = ours.get(key, 0.0) + modality(data[name], theta).item()
    expected = dict(reference["logpdf_split"][at])
    total = expected.pop("total")
    assert ours == pytest.approx(expected, abs=1e-6)
    assert sum(ours.values()) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_curvature_at_the_best_fit_gives_the_errors_of_pyhf(case):
    reference = json.loads((FOLDER / "references.json").read_text())["cases"][case]
    found, data = plugins(json.loads((FOLDER / f"{case}.json").read_text()))
    names = list(reference["best_fit"])

    def total(theta):
        columns = {m: [names.index(n) for n in modality.parameter_names] for m, modality in found.items()}
        return sum(modality(data[m], theta[columns[m]]) for m, modality in found.items())

    theta = torch.tensor(list(reference["best_fit"].values()), dtype=torch.float64)
    covariance = torch.linalg.inv(-torch.autograd.functional.hessian(total, theta))
    sd = covariance.diagonal().sqrt().tolist()
    assert dict(zip(names, sd, strict=True)) == pytest.approx(reference["hesse_sd"], rel=1e-3)
