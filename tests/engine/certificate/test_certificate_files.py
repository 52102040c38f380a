"""A certificate on disk is the same certificate."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, Uniform

from engine import Parameter, ParameterSpace
from engine.admission import Admission, read_admission
from engine.certificate import Certificate, Check, certify
from engine.errors import RegistryError
from engine.plugin import read_certificate, write_plugin

sys.path.append(str(Path(__file__).parent))
from scored_laws import TRUE, WRONG, Shape, unit_normal

SPACES = {
    "uniform": ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-2.0, 2.0), unit="m")]),
    "truncated": ParameterSpace(
        [Parameter("a", Normal(0.0, 0.5), bounds=(-1.0, 0.7)), Parameter("b", Normal(0.0, 1.0))]
    ),
}


def of(name, **source):
    return certify(WRONG, prior=SPACES[name], simulate=TRUE, simulations=1500, seed=3, **source)


def same(a, b):
    at = a.space.sample_prior(40, 1)
    assert a.space == b.space
    assert torch.equal(a.rate(at), b.rate(at))
    assert a.quantiles() == b.quantiles()
    assert (a.n_max(0.1, at[0]), a.limit(), a.summary()) == (b.n_max(0.1, at[0]), b.limit(), b.summary())
    assert torch.equal(a.information.at(at), b.information.at(at))
    for name in ("source", "simulations", "excluded", "seed", "calibrated", "curvature", "passed", "sandwich"):
        assert getattr(a, name) == getattr(b, name), name
    assert repr(a.checks) == repr(b.checks)
    assert repr((a.excess, a.excess_error)) == repr((b.excess, b.excess_error))
    x = TRUE(at, torch.Generator().manual_seed(1))
    assert torch.equal(a.domain.score(WRONG, x), b.domain.score(WRONG, x))
    assert a.domain.outside(WRONG, x, at[0]) == b.domain.outside(WRONG, x, at[0])
    assert str(a) == str(b)


@pytest.mark.parametrize("name", SPACES)
def test_a_certificate_goes_through_a_plugins_folder(tmp_path, name):
    certificate = of(name)
    write_plugin(tmp_path / "p", WRONG, certificate=certificate)
    same(certificate, Certificate.from_toml(read_certificate(tmp_path / "p")))
    write_plugin(tmp_path / "q", WRONG, certificate=Admission(certificate, "because"))
    again = read_admission(read_certificate(tmp_path / "q"), "q")
    same(certificate, again.certificate)
    assert again.forced == "because"


def test_numbers_that_are_none_survive(tmp_path):
    theta = SPACES["uniform"].sample_prior(1500, 1)
    x = TRUE(theta, torch.Generator().manual_seed(1))
    certificate = certify(WRONG, prior=SPACES["uniform"], pairs=(theta, x))
    assert math.isnan(certificate.excess)
    write_plugin(tmp_path / "p", WRONG, certificate=certificate)
    same(certificate, Certificate.from_toml(read_certificate(tmp_path / "p")))


def test_a_learned_plugin_without_a_certificate_has_an_empty_record(tmp_path):
    write_plugin(tmp_path / "p", WRONG, certificate=Admission(None, "trust me"))
    record = read_admission(read_certificate(tmp_path / "p"), "p")
    assert record.certificate is None
    assert record.forced == "trust me"


def test_a_table_that_no_certificate_wrote_is_refused_by_the_plugins_name():
    table = of("uniform").to_toml()
    for spoil in ({"parameters": []}, {"mean": {}}, {"checks": [{"nothing": 1}]}, {"domain": {"centre": 1}}):
        with pytest.raises(RegistryError, match="the certificate of plugin 'p' cannot be read"):
            read_admission({**table, **spoil}, "p")


def test_verdicts_decide_what_passed():
    def with_checks(*verdicts):
        certificate = of("uniform")
        object.__setattr__(certificate, "checks", tuple(Check(f"c{i}", v) for i, v in enumerate(verdicts)))
        return certificate

    assert with_checks("passed", "noted", "not checked").passed
    failing = with_checks("passed", "failed", "noted")
    assert not failing.passed
    assert [c.name for c in failing.failures] == ["c1"]


def test_the_summary_is_the_budget():
    certificate = certify(
        Shape("normal", 1.0, 0.1),
        prior=ParameterSpace([Parameter("a", Uniform(-1.0, 1.0))]),
        simulate=unit_normal,
        simulations=20_000,
        seed=1,
    )
    summary = certificate.summary()
    assert summary["kappa"] == 0.3
    assert (summary["n_max_05"], summary["n_max_50"], summary["n_max_95"]) == certificate.quantiles()
    # δ = −0.1 everywhere and K = 1: 0.09 / 0.01
    assert summary["n_max_50"] == pytest.approx(9.0, rel=0.35)
    assert summary["limit"] == certificate.limit() > 50.0
