"""Published combinations of measurements, as sums of scalars, give their closed forms and published numbers."""

import json
import math

import pytest
import scipy.stats
import torch
from torch.distributions import Normal

from engine import Evidence, Parameter, ParameterSpace
from engine.estimate import estimate
from modalities import Constraint, Gaussian

ONE_SIGMA = 0.682689492137086


@pytest.fixture(scope="module")
def cases(shared_data):
    return json.loads((shared_data / "combinations" / "references.json").read_text())["cases"]


def chi_square(fit, modalities, constrained):
    """−2 (S − its value at zero residuals), from each plugin's share."""
    total = 0.0
    for name, part in fit.contributions.items():
        sd = 1.0 if name in constrained else float(modalities[name].sd[0])
        total += -2.0 * part.log_evidence - math.log(2.0 * math.pi) - 2.0 * math.log(sd)
    return total


# ---- the mass of the top quark


def shifted(theta, shifts):
    """The mass plus every nuisance times the shift that one standard deviation of it causes."""
    return theta[..., :1] + (theta[..., 1:] * shifts).sum(-1, keepdim=True)


class TopMass:
    """Five measurements, conditionally independent given the mass and 26 shared unit-normal nuisances."""

    def __init__(self, case, only=""):
        inputs = case["inputs"]
        self.nuisances = [n["name"] for n in inputs["nuisances"]]
        self.parameters = ParameterSpace([Parameter("m_t", unit="GeV"), *(Parameter(n) for n in self.nuisances)])
        self.modalities, self.data = {}, {}
        for i, name in enumerate(inputs["names"]):
            if not name.startswith(only):
                continue
            felt = {n["name"]: n["shifts"][i] for n in inputs["nuisances"] if n["shifts"][i] != 0.0}
            self.modalities[name] = Gaussian(
                shifted,
                parameter_names=("m_t", *felt),
                sd=inputs["independent_sd"][i],
                inputs={"shifts": list(felt.values())},
                event_shape=(1,),
            )
            self.data[name] = [[inputs["values"][i]]]
        for nuisance in self.nuisances:
            self.modalities[f"{nuisance} = 0"] = Constraint(nuisance)
            self.data[f"{nuisance} = 0"] = [[0.0]]
        self.constraints = [f"{n} = 0" for n in self.nuisances]

    def fit(self, **options):
        return estimate(Evidence(self.parameters, self.modalities, self.data), **options)


def test_top_mass_from_shared_nuisances_is_the_closed_form_in_every_parameter(cases):
    case = cases["lhc_top_mass_7TeV"]
    combination, expected = TopMass(case), case["expected"]
    fit = combination.fit()
    assert fit.status == "converged"
    assert len(fit.theta) == 27
    assert fit["m_t"].value == pytest.approx(expected["m_t"], abs=1e-6 * expected["sd"])
    assert fit["m_t"].error == pytest.approx(expected["sd"], rel=1e-6)
    for nuisance in combination.nuisances:
        sd = expected["nuisance_sd"][nuisance]
        assert fit[nuisance].value == pytest.approx(expected["nuisance_best_fit"][nuisance], abs=1e-6 * sd), nuisance
        assert fit[nuisance].error == pytest.approx(sd, rel=1e-6), nuisance
    chi2 = chi_square(fit, combination.modalities, combination.constraints)
    assert chi2 == pytest.approx(expected["chi2"], abs=1e-6)


def test_top_mass_rounds_to_the_published_combination(cases):
    case = cases["lhc_top_mass_7TeV"]
    combination, published = TopMass(case), case["published"]
    fit = combination.fit()
    assert round(fit["m_t"].value, 2) == published["m_t"]
    assert round(fit["m_t"].error, 2) == published["sd"]
    chi2 = chi_square(fit, combination.modalities, combination.constraints)
    assert round(chi2, 1) == published["chi2"]
    assert round(float(scipy.stats.chi2.sf(chi2, 4)), 2) == published["p_value"]


@pytest.mark.parametrize("experiment", ["ATLAS", "CMS"])
def test_top_mass_of_one_experiment_is_its_closed_form(cases, experiment):
    case = cases["lhc_top_mass_7TeV"]
    combination, expected = TopMass(case, only=experiment), case["expected"]["subsets"][f"{experiment}_only"]
    fit = combination.fit()
    assert fit["m_t"].value == pytest.approx(expected["m_t"], abs=1e-6 * expected["sd"])
    assert fit["m_t"].error == pytest.approx(expected["sd"], rel=1e-6)
    chi2 = chi_square(fit, combination.modalities, combination.constraints)
    assert chi2 == pytest.approx(expected["chi2"], abs=1e-6)
    other = "CMS" if experiment == "ATLAS" else "ATLAS"
    silent = [n for n in combination.nuisances if n.endswith(other)]
    assert silent
    for nuisance in silent:  # only its own constraint speaks about it
        assert (fit[nuisance].value, fit[nuisance].error) == (
            pytest.approx(0.0, abs=1e-9),
            pytest.approx(1.0, rel=1e-9),
        )


def test_top_mass_weights_are_those_of_the_best_linear_unbiased_estimator(cases):
    case = cases["lhc_top_mass_7TeV"]
    base = TopMass(case).fit()["m_t"].value
    for i, name in enumerate(case["inputs"]["names"]):
        moved = TopMass(case)
        moved.data[name] = [[case["inputs"]["values"][i] + 1.0]]
        weight = moved.fit()["m_t"].value - base
        assert weight == pytest.approx(case["expected"]["blue_weights"][i], abs=2e-6), name


def test_top_mass_from_one_correlated_gaussian_is_that_from_shared_nuisances(cases):
    case = cases["lhc_top_mass_7TeV"]
    inputs, expected = case["inputs"], case["expected"]
    modality = Gaussian(
        lambda theta: theta.expand(*theta.shape[:-1], 5),
        parameter_names=("m_t",),
        covariance=inputs["total_cov"],
    )
    evidence = Evidence(ParameterSpace([Parameter("m_t")]), {"all": modality}, {"all": [inputs["values"]]})
    fit = estimate(evidence)
    assert fit["m_t"].value == pytest.approx(expected["m_t"], abs=1e-6 * expected["sd"])
    assert fit["m_t"].error == pytest.approx(expected["sd"], rel=1e-6)
    covariance = torch.tensor(inputs["total_cov"], dtype=torch.float64)
    at_zero_residual = -0.5 * torch.logdet(2.0 * math.pi * covariance)
    assert 2.0 * float(at_zero_residual - fit.log_evidence) == pytest.approx(expected["chi2"], abs=1e-6)


def test_top_mass_with_unit_normal_priors_instead_of_constraints_is_the_same_maximum(cases):
    case = cases["lhc_top_mass_7TeV"]
    combination, expected = TopMass(case), case["expected"]
    space = ParameterSpace([Parameter("m_t"), *(Parameter(n, prior=Normal(0.0, 1.0)) for n in combination.nuisances)])
    data = {n: x for n, x in combination.data.items() if n not in combination.constraints}
    fit = estimate(Evidence(space, combination.modalities, data, prior=True))
    assert fit.status == "converged"
    assert fit["m_t"].value == pytest.approx(expected["m_t"], abs=1e-6 * expected["sd"])
    assert fit["m_t"].error == pytest.approx(expected["sd"], rel=1e-6)


def test_top_mass_with_correlations_ignored_is_the_wrong_number(cases):
    case = cases["lhc_top_mass_7TeV"]
    inputs, wrong = case["inputs"], case["expected"]["wrong_if_correlations_ignored"]
    names = inputs["names"]
    modalities = {
        n: Gaussian(parameter_names=("m_t",), sd=math.sqrt(inputs["total_cov"][i][i])) for i, n in enumerate(names)
    }
    data = {n: [[inputs["values"][i]]] for i, n in enumerate(names)}
    # two of the five values happen to be 173.49; their errors differ, so nothing is refused
    fit = estimate(Evidence(ParameterSpace([Parameter("m_t")]), modalities, data))
    assert fit["m_t"].value == pytest.approx(wrong["m_t"], abs=1e-6 * wrong["sd"])
    assert fit["m_t"].error == pytest.approx(wrong["sd"], rel=1e-6)
    assert abs(fit["m_t"].value - case["expected"]["m_t"]) > 0.2
    assert fit["m_t"].error < 0.66 * case["expected"]["sd"]


# ---- thirteen trials of the BCG vaccine


def centre(theta, v):
    return theta[..., :1]


def spread(theta, v):
    return (v + (2.0 * theta[..., 1:]).exp()).sqrt()


class Trials:
    """y_i ~ N(mu, v_i + tau²), a plugin a trial."""

    def __init__(self, case):
        inputs = case["inputs"]
        self.parameters = ParameterSpace([Parameter("mu"), Parameter("log_tau", bounds=(-12.0, 5.0))])
        self.modalities, self.data = {}, {}
        for i, (y, v) in enumerate(zip(inputs["log_rr"], inputs["var"], strict=True)):
            self.modalities[f"trial {i}"] = Gaussian(
                centre, parameter_names=("mu", "log_tau"), sd=spread, inputs={"v": [v]}, event_shape=(1,)
            )
            self.data[f"trial {i}"] = [[y]]

    def evidence(self):
        return Evidence(self.parameters, self.modalities, self.data)


def test_bcg_inputs_are_the_log_risk_ratios_of_the_table(cases):
    inputs = cases["BCG_meta"]["inputs"]
    for (a, b, c, d), y, v in zip(inputs["table"], inputs["log_rr"], inputs["var"], strict=True):
        assert y == pytest.approx(math.log(a / (a + b)) - math.log(c / (c + d)), rel=1e-12)
        assert v == pytest.approx(1 / a - 1 / (a + b) + 1 / c - 1 / (c + d), rel=1e-12)


def test_bcg_random_effects_maximum_likelihood_is_the_reference(cases):
    case = cases["BCG_meta"]
    expected = case["expected"]["ML"]
    fit = estimate(Trials(case).evidence())
    assert fit.status == "converged"
    for name in ("mu", "log_tau"):
        sd = expected[f"hesse_sd_{name}"]
        assert fit[name].value == pytest.approx(expected[name], abs=1e-4 * sd)
        assert fit[name].error == pytest.approx(sd, rel=1e-4)
        low, high = fit.interval(name, level=ONE_SIGMA)
        down, up = expected[f"profile_dq1_{name}"]
        assert low - expected[name] == pytest.approx(down, abs=1e-3 * sd)
        assert high - expected[name] == pytest.approx(up, abs=1e-3 * sd)
    assert math.exp(2.0 * fit["log_tau"].value) == pytest.approx(expected["tau2"], rel=1e-4)


def test_bcg_profile_of_the_heterogeneity_is_lopsided(cases):
    case = cases["BCG_meta"]
    fit = estimate(Trials(case).evidence())
    low, high = fit.interval("log_tau", level=ONE_SIGMA)
    assert (high - fit["log_tau"].value) / (fit["log_tau"].value - low) == pytest.approx(
        0.2692952 / 0.2551512, rel=1e-4
    )


def test_bcg_without_heterogeneity_is_the_published_fixed_effect(cases):
    case = cases["BCG_meta"]
    expected, trials = case["expected"]["fixed_effect"], Trials(case)
    fit = estimate(trials.evidence(), fixed={"log_tau": -12.0})  # tau² = 4e-11
    assert fit["mu"].value == pytest.approx(expected["mu"], abs=1e-6)
    assert fit["mu"].error == pytest.approx(expected["se"], rel=1e-6)
    log_norm = -0.5 * sum(math.log(2.0 * math.pi * v) for v in case["inputs"]["var"])
    assert 2.0 * (log_norm - fit.log_evidence) == pytest.approx(expected["chi2"], abs=1e-4)
    assert round(fit["mu"].value, 4) == case["published"]["fixed_effect"]["mu"]
    assert round(fit["mu"].error, 4) == case["published"]["fixed_effect"]["se"]


def test_bcg_restricted_likelihood_is_the_published_one(cases):
    """REML adds −½ log Σ 1/(v_i + tau²), a scalar of log_tau alone: one more plugin."""
    case = cases["BCG_meta"]
    trials, expected = Trials(case), case["expected"]["REML_check"]
    variances = torch.tensor(case["inputs"]["var"], dtype=torch.float64)

    def restricted(theta):
        weight = (1.0 / (variances + (2.0 * theta[..., :1]).exp())).sum(-1, keepdim=True)
        return weight.sqrt()  # N(0 | 0, sd) is −½ log sd² plus a constant

    trials.modalities["restriction"] = Gaussian(
        lambda theta: 0.0 * theta, parameter_names=("log_tau",), sd=restricted, event_shape=(1,)
    )
    trials.data["restriction"] = [[0.0]]
    fit = estimate(trials.evidence())
    assert fit["mu"].value == pytest.approx(expected["mu"], abs=1e-6)
    assert math.exp(2.0 * fit["log_tau"].value) == pytest.approx(expected["tau2"], rel=1e-5)
    assert round(fit["mu"].value, 4) == case["published"]["REML"]["mu"]
    assert round(math.exp(2.0 * fit["log_tau"].value), 4) == case["published"]["REML"]["tau2"]
    held = estimate(trials.evidence(), fixed={"log_tau": fit["log_tau"].value})
    assert round(held["mu"].error, 4) == case["published"]["REML"]["se"]


# ---- the strong coupling


@pytest.mark.parametrize("which", ["without_lattice", "all_seven"])
def test_alpha_s_average_is_the_weighted_mean(cases, which):
    case = cases["alpha_s_PDG"]
    inputs, expected = case["inputs"], case["expected"][which]
    modalities = {
        n: Gaussian(parameter_names=("alpha_s",), sd=s) for n, s in zip(inputs["names"], inputs["sd"], strict=True)
    }
    data = {n: [[v]] for n, v in zip(inputs["names"], inputs["values"], strict=True)}
    if which == "without_lattice":
        del data["lattice FLAG"]
    fit = estimate(Evidence(ParameterSpace([Parameter("alpha_s")]), modalities, data))
    assert fit.status == "converged"
    assert len(fit.contributions) == expected["ndof"] + 1
    assert fit["alpha_s"].value == pytest.approx(expected["alpha_s"], abs=1e-6 * expected["sd"])
    assert fit["alpha_s"].error == pytest.approx(expected["sd"], rel=1e-6)
    assert chi_square(fit, modalities, ()) == pytest.approx(expected["chi2"], abs=1e-6)
    shares = [float(c.information[0, 0] / fit.information[0, 0]) for c in fit.contributions.values()]
    assert sum(shares) == pytest.approx(1.0, rel=1e-12)
    if which == "without_lattice":
        value, sd = case["published"]["without_lattice"]
        assert fit["alpha_s"].value == pytest.approx(value, abs=0.5e-4 + 1e-6)
        assert round(fit["alpha_s"].error, 4) == sd
