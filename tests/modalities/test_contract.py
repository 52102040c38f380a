"""Each modality passes the battery that is shipped for others, written to a plugin's folder and read back included."""

import functools
import math

import pytest
import torch
from torch import nn

from engine.testing import check_modality
from examples.cosmology import flat_lcdm
from modalities import Categorical, Constraint, Gaussian, PoissonCounts, StudentT

NAMES = ("a", "b")
T = [0.1, 0.7, 1.3]
Z = [0.1, 0.5, 1.2]
SD = [0.5, 2.0]
COVARIANCE = [[1.0, 0.3, 0.1], [0.3, 2.0, -0.4], [0.1, -0.4, 0.5]]
PLANE = [[0.3, -1.0], [1.2, 0.8]]
RATES = [[2.0, 0.7], [0.8, 1.4]]
COSMOLOGIES = [[0.3, 70.0], [0.25, 68.0]]
GAPS = [[73.0, math.nan, 125.0], [math.nan, 90.0, math.nan], [71.0, 93.0, 130.0]]


def curve(theta, t):
    return theta[..., :1] * torch.exp(-theta[..., 1:2] * t)


def noise(theta, t):
    return 0.3 + theta[..., 1:2].square() * (1.0 + t)


def correlated(theta, t):
    d = noise(theta, t)
    return torch.diag_embed(d) + 0.2 * d[..., :, None] * d[..., None, :]


def odds(theta, t):
    return theta[..., :1] * t + (theta[..., 1:2] * t).sin()


def network(outputs=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs))


def cosmology(**errors):
    return Gaussian(flat_lcdm.expansion_rate, parameter_names=("matter", "hubble"), inputs={"z": Z}, **errors)


# name -> (modality, θ), or (modality, θ, x) where the data have gaps that simulated ones have not
CASES = {
    "gaussian": (Gaussian(parameter_names=NAMES, sd=SD), PLANE),
    "gaussian scalar": (Gaussian(parameter_names=("a",), sd=0.5, event_shape=()), [[0.3], [-2.0]]),
    "gaussian importable mean": (cosmology(covariance=COVARIANCE), COSMOLOGIES),
    "gaussian tensors": (
        Gaussian(curve, parameter_names=NAMES, sd=torch.tensor([0.3, 0.4, 0.5]), inputs={"t": torch.tensor(T)}),
        RATES,
    ),
    "gaussian network": (Gaussian(network(), parameter_names=NAMES, sd=[0.1, 0.2, 0.3]), PLANE),
    "gaussian network float64": (Gaussian(network().double(), parameter_names=NAMES, sd=[0.1, 0.2, 0.3]), PLANE),
    "gaussian sd of theta": (
        Gaussian(curve, parameter_names=NAMES, sd=noise, inputs={"t": T}, event_shape=(3,)),
        RATES,
    ),
    "gaussian covariance of theta": (
        Gaussian(curve, parameter_names=NAMES, covariance=correlated, inputs={"t": T}, event_shape=(3,)),
        RATES,
    ),
    "gaussian missing": (cosmology(sd=[3.0, 5.0, 9.0], missing=True), COSMOLOGIES, GAPS),
    "gaussian missing correlated": (cosmology(covariance=COVARIANCE, missing=True), COSMOLOGIES, GAPS),
    "poisson": (PoissonCounts(signal=[5.0, 9.0], background=[50.0, 40.0]), [[1.3], [0.4]]),
    "poisson control region": (PoissonCounts(background=[80.0, 20.0], scale={"k": "background"}), [[1.3], [0.4]]),
    "poisson histfactory": (
        PoissonCounts(
            signal=[5.0, 9.0],
            background={"top": [50.0, 40.0], "qcd": [10.0, 20.0]},
            scale={"k": ["top"]},
            normalisation={"lumi": {"signal": (0.9, 1.2), "top": (0.8, 1.1)}},
            shape={"jes": {"qcd": ([8.0, 21.0], [13.0, 18.0])}, "lumi": {"top": ([49.0, 40.0], [51.0, 42.0])}},
            per_bin={"qcd": ["g0", "g1"]},
        ),
        [[1.2, 0.9, 0.4, -0.6, 1.1, 0.8], [0.7, 1.1, -0.3, 0.5, 0.9, 1.2]],
    ),
    "constraint standard": (Constraint("alpha"), [[0.3], [-1.0]]),
    "constraint normal": (Constraint(NAMES, sd=SD), PLANE),
    "constraint correlated": (Constraint(NAMES, covariance=[[1.0, 0.6], [0.6, 2.0]]), PLANE),
    "constraint lognormal": (Constraint(NAMES, kind="lognormal", sd=0.2), RATES),
    "constraint poisson": (Constraint(NAMES, kind="poisson", scale=[50.0, 7.0]), RATES),
    "student": (StudentT(parameter_names=NAMES, scale=SD, df=3.0), PLANE),
    "student function": (
        StudentT(curve, parameter_names=NAMES, scale=0.3, df=[2.0, 5.0, 30.0], inputs={"t": T}),
        RATES,
    ),
    "student missing": (
        StudentT(parameter_names=NAMES, scale=SD, df=1.0, missing=True),
        PLANE,
        [[0.5, math.nan], [math.nan, math.nan], [0.1, -0.2]],
    ),
    "categorical logits": (Categorical(odds, parameter_names=NAMES, inputs={"t": T}, categories=3), RATES),
    "categorical network": (Categorical(network(4), parameter_names=NAMES, categories=4), PLANE),
    "categorical table": (
        Categorical(parameter_names=("h",), probabilities=[[0.9, 0.1, 0.0], [0.25, 0.5, 0.25]]),
        [[0.0], [1.0]],
    ),
}


@functools.cache
def report(name):
    return check_modality(*CASES[name], save=True, raises=False)


@pytest.mark.parametrize("name", CASES)
def test_it_passes_every_check_in_its_own_precision_and_comes_back_from_its_folder(name):
    modality, checks = CASES[name][0], report(name).checks
    unsaid = [] if modality.has_derivatives else ["closed form"]
    unsaid += [] if modality.concave else ["concave"]
    if name == "categorical table":
        unsaid = ["score", "hessian", *unsaid, *(check.name for check in checks[-3:])]
    others = [check for check in checks if check.name != "precision"]
    assert [check for check in others if check.passed is False] == []
    assert [check.name for check in others if check.passed is None] == unsaid


@pytest.mark.parametrize("name", CASES)
def test_it_works_after_a_change_of_precision(name):
    assert report(name)["precision"].passed, report(name)["precision"].detail
