"""Four HistFactory workspaces, one plugin a channel and one a nuisance, give pyhf's own numbers."""

import json
import math

import pytest
import torch
from scipy.stats import norm

from engine import Evidence, Parameter, ParameterSpace
from engine.estimate import estimate
from modalities import Constraint, PoissonCounts

CASES = ("1bin_shapesys", "2bin_2channel", "2bin_2channel_couplednorm", "docs_2bin_1channel")
PER_CHANNEL = ("2bin_2channel", "2bin_2channel_couplednorm")


class Workspace:
    """A HistFactory workspace as parameters, plugins (channels and constraints) and data by plugin name."""

    def __init__(self, document, channels=None, mu_bounds=(-10.0, 10.0)):
        poi = document["measurements"][0]["config"]["poi"]
        parameters = {poi: Parameter(poi, bounds=mu_bounds)}
        self.modalities, self.data, self.channels, self.constraints = {}, {}, [], []
        counts = {entry["name"]: entry["data"] for entry in document["observations"]}
        for channel in document["channels"]:
            name = channel["name"]
            if channels is not None and name not in channels:
                continue
            scale, normalisation, shape, per_bin, yields = {}, {}, {}, {}, {}
            for sample in channel["samples"]:
                yields[sample["name"]] = sample["data"]
                for modifier in sample["modifiers"]:
                    effect, kind, data = modifier["name"], modifier["type"], modifier["data"]
                    if kind == "normfactor":
                        scale.setdefault(effect, []).append(sample["name"])
                        parameters.setdefault(effect, Parameter(effect, bounds=(0.0, 10.0)))
                    elif kind == "normsys":
                        normalisation.setdefault(effect, {})[sample["name"]] = (data["lo"], data["hi"])
                        self._constrain(parameters, effect, bounds=(-5.0, 5.0), kind="normal", nominal=0.0)
                    elif kind == "histosys":
                        shape.setdefault(effect, {})[sample["name"]] = (data["lo_data"], data["hi_data"])
                        self._constrain(parameters, effect, bounds=(-5.0, 5.0), kind="normal", nominal=0.0)
                    elif kind == "shapesys":
                        names = [f"{effect}[{b}]" for b in range(len(data))]
                        per_bin.setdefault(sample["name"], []).append(names)
                        for gamma, nominal, sd in zip(names, sample["data"], data, strict=True):
                            tau = (nominal / sd) ** 2
                            self._constrain(parameters, gamma, bounds=(1e-10, 10.0), kind="poisson", nominal=tau)
                    else:
                        raise NotImplementedError(kind)
            self.modalities[name] = PoissonCounts(
                background=yields, strength=None, scale=scale, normalisation=normalisation, shape=shape, per_bin=per_bin
            )
            self.data[name] = torch.tensor([counts[name]], dtype=torch.float64)
            self.channels.append(name)
        self.parameters = ParameterSpace(parameters.values())

    def _constrain(self, parameters, name, *, bounds, kind, nominal):
        plugin = f"constraint of {name}"
        if plugin in self.modalities:  # shared by samples or channels: measured once
            return
        parameters[name] = Parameter(name, bounds=bounds)
        self.modalities[plugin] = Constraint(name, kind=kind, **({"scale": nominal} if kind == "poisson" else {}))
        self.data[plugin] = torch.tensor([[nominal]], dtype=torch.float64)
        self.constraints.append(plugin)

    def evidence(self, data=None):
        return Evidence(self.parameters, self.modalities, self.data if data is None else data)

    def fit(self, data=None, **options):
        return estimate(self.evidence(data), **options)

    def initial(self):
        start = dict.fromkeys(self.parameters.names, 1.0)
        return start | {n: 0.0 for n in start if self.parameters[n].bounds == (-5.0, 5.0)}


@pytest.fixture(scope="module")
def load(shared_data):
    folder = shared_data / "histfactory"
    references = json.loads((folder / "references.json").read_text())["cases"]

    def read(case, **options):
        return Workspace(json.loads((folder / f"{case}.json").read_text()), **options), references[case]

    return read


@pytest.mark.parametrize("case", CASES)
def test_best_fit_and_hesse_errors_of_every_parameter_are_those_of_pyhf(load, case):
    workspace, expected = load(case)
    assert len(workspace.parameters) == expected["npars"]
    fit = workspace.fit()
    assert fit.status == "converged"
    assert fit["mu"].value == pytest.approx(expected["mu_hat"], abs=0.01 * expected["mu_hesse_sd"])
    assert fit["mu"].error == pytest.approx(expected["mu_hesse_sd"], rel=0.02)
    assert set(expected["best_fit"]) == set(workspace.parameters.names)
    for name, value in expected["best_fit"].items():
        sd = expected["hesse_sd"][name]
        assert fit[name].value == pytest.approx(value, abs=1e-4 * sd), name
        assert fit[name].error == pytest.approx(sd, rel=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_twice_nll_has_the_normalisation_of_pyhf(load, case):
    workspace, expected = load(case)
    assert -2.0 * workspace.fit().log_evidence == pytest.approx(expected["twice_nll_min"], abs=1e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("point", ["at_init", "at_best_fit"])
def test_channels_and_constraints_split_the_log_density_as_pyhf_does(load, case, point):
    workspace, expected = load(case)
    split = expected["logpdf_split"][point]
    theta = workspace.parameters.tensor(workspace.initial() if point == "at_init" else expected["best_fit"])
    parts = {name: c.log_evidence for name, c in workspace.evidence().contributions(theta).items()}
    for channel in workspace.channels:
        assert parts[channel] == pytest.approx(split[channel], abs=1e-6)
    assert sum(parts[n] for n in workspace.constraints) == pytest.approx(split["constraints"], abs=1e-6)
    assert float(workspace.evidence().value(theta[None])) == pytest.approx(split["total"], abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_profile_intervals_end_where_pyhf_s_profile_crosses(load, case):
    workspace, expected = load(case)
    fit = workspace.fit()
    for level, key in ((0.6826894921, "mu_profile_dq_1"), (0.95, "mu_profile_dq_3.841")):
        ends = fit.interval("mu", level=level)
        assert ends == pytest.approx(tuple(expected[key]), abs=0.02 * expected["mu_hesse_sd"])
        assert ends.at_bound == ()


@pytest.mark.parametrize("case", CASES)
def test_profile_likelihood_ratio_at_fixed_mu_is_that_of_pyhf(load, case):
    workspace, expected = load(case)
    best = workspace.fit().log_evidence
    for mu, ratio in expected["profile_dq_at_mu"].items():
        held = workspace.fit(fixed={"mu": float(mu)})
        assert held["mu"].value == float(mu)
        assert held["mu"].error == 0.0
        assert 2.0 * (best - held.log_evidence) == pytest.approx(ratio, abs=1e-5)


@pytest.mark.parametrize("case", PER_CHANNEL)
def test_one_channel_alone_gives_pyhf_s_fit_of_that_channel(load, case):
    workspace, expected = load(case, channels=("signal",))
    expected, fit = expected["per_channel"]["signal_only"], workspace.fit()
    sd = expected["mu_hesse_sd"]
    assert fit["mu"].value == pytest.approx(expected["mu_hat"], abs=0.01 * sd)
    assert fit["mu"].error == pytest.approx(sd, rel=0.02)
    assert fit.interval("mu", level=0.6826894921) == pytest.approx(tuple(expected["mu_profile_dq_1"]), abs=0.02 * sd)
    assert fit.interval("mu", level=0.95) == pytest.approx(tuple(expected["mu_profile_dq_3.841"]), abs=0.02 * sd)
    assert -2.0 * fit.log_evidence == pytest.approx(expected["twice_nll_min"], abs=1e-3)


@pytest.mark.parametrize("case", PER_CHANNEL)
def test_leaving_a_channel_s_data_out_is_the_fit_without_that_channel(load, case):
    workspace, expected = load(case)
    alone, _ = load(case, channels=("signal",))
    kept = {n: x for n, x in workspace.data.items() if n in alone.data}
    fit = workspace.fit(kept)
    assert fit["mu"].value == pytest.approx(alone.fit()["mu"].value, abs=1e-6 * expected["mu_hesse_sd"])
    silent = set(workspace.parameters.names) - set(alone.parameters.names)
    assert {n for n in workspace.parameters.names if not fit[n].identified} == silent
    assert fit.status == ("not_identified" if silent else "converged")


def test_a_shared_constraint_counted_twice_gives_another_answer(load):
    workspace, expected = load("2bin_2channel_couplednorm")
    nuisance = "coupled_normsys"
    workspace.modalities["a second one"] = Constraint(nuisance)
    workspace.data["a second one"] = torch.tensor([[1e-12]], dtype=torch.float64)  # not bit for bit the first one's
    assert workspace.fit()[nuisance].error < 0.98 * expected["hesse_sd"][nuisance]


@pytest.mark.parametrize("case", CASES)
def test_cls_from_profile_ratios_and_asimov_data_is_the_published_value(load, case):
    """pyhf's own test suite has these CLs values; eqs. 62-66 of arXiv:1007.1727 lead to them."""
    workspace, expected = load(case, mu_bounds=(0.0, 10.0))

    def q_tilde(data):
        free, held = workspace.fit(data), workspace.fit(data, fixed={"mu": 1.0})
        return 0.0 if free["mu"].value > 1.0 else max(0.0, 2.0 * (free.log_evidence - held.log_evidence))

    null = workspace.fit(fixed={"mu": 0.0}).theta
    asimov = {}
    for name, modality in workspace.modalities.items():
        local = null[workspace.parameters.indices(modality.parameter_names)]
        if name in workspace.channels:
            asimov[name] = modality.rate(local)[None]
        else:
            asimov[name] = (local * modality.scale if modality.kind == "poisson" else local)[None]
    q, q_a = q_tilde(None), q_tilde(asimov)
    t = math.sqrt(q) - math.sqrt(q_a) if q <= q_a else (q - q_a) / (2.0 * math.sqrt(q_a))
    cls = norm.sf(t + math.sqrt(q_a)) / norm.sf(t)
    median = norm.sf(math.sqrt(q_a)) / norm.sf(0.0)
    assert cls == pytest.approx(expected["published_CLs_obs"], rel=1e-4)
    assert median == pytest.approx(expected["published_CLs_exp_median"], rel=1e-4)
