"""An inspection is what its four parts are when asked one by one."""

import dataclasses

import pytest
import torch
from torch.distributions import Normal

from engine import Parameter, Registry
from engine.certificate import certify
from engine.errors import ObservationError, PosteriorError, UnknownPluginError
from engine.information import Inspection, Worth, Worths, dependence, inspect, interactions, worth
from modalities import Gaussian

QUICK = {"simulations": 500, "seed": 3, "progress": False}


class Learned(Gaussian):
    learned = True


@pytest.fixture
def registry(tmp_path):
    """Two plugins whose noises have a correlation of 0.8, and one with few observations."""
    made = Registry.create(tmp_path / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    e = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    made.append("a", Gaussian(parameter_names=("mu",), sd=1.0), observations=e[:, :1])
    made.append("b", Gaussian(parameter_names=("mu",), sd=2.0), observations=1.6 * e[:, :1] + 1.2 * e[:, 1:2])
    made.append("c", Gaussian(parameter_names=("mu",), sd=1.0), observations=e[:9, 2:])
    return made


def test_it_is_what_its_parts_are_alone(registry):
    found = inspect(registry, without="c", observations=2, independent=True, dependence=True, **QUICK)
    asked = {"without": "c", "observations": 2, **QUICK}
    tested = dependence(registry.estimate(only=["a", "b"], seed=3), seed=3)
    alone = inspect(registry, without="c", observations=2, independent=True, **QUICK)
    assert found.to_dict() == alone.beside(tested).to_dict()
    assert alone.to_dict() == {
        "worth": worth(registry, **asked).to_dict(),
        "interactions": interactions(registry, independent=True, **asked).to_dict()["pairs"],
        "carried": {},
        "dependence": None,
        "certificates": {"a": None, "b": None},
    }
    assert found.observations == {"a": 2, "b": 2}
    assert not found.trusted  # a and b depend on each other


def test_numbers_of_parts_that_were_simulated_as_if_independent_are_doubted_where_they_are_not(registry):
    found = inspect(registry, without="c", independent=True, dependence=True, **QUICK)
    reason = (
        "simulated as if 'a' and 'b' were independent given θ, which a test of dependence denies: give simulated pairs"
    )
    doubted = [found.worths.total, *found.worths.added.values(), found.pairs.pairs["a", "b"]]
    assert [one.reason for one in doubted] == [reason] * 4
    assert not any(one.reliable for one in doubted)
    assert all(one.reliable for one in found.worths.alone.values())
    apart = inspect(registry, without="c", dependence=True, **QUICK)
    assert apart.pairs.reliable  # redundancy and what is unique need the plugins alone
    assert not apart.worths.total.reliable


def test_plugins_that_are_independent_and_reliable_are_trusted(tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    e = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    for k, name in enumerate("ab"):
        registry.append(name, Gaussian(parameter_names=("mu",), sd=1.0), observations=e[:, k : k + 1])
    found = inspect(registry, dependence=True, **QUICK)
    assert not found.dependence.dependent
    assert found.trusted
    doubtful = dataclasses.replace(found.worths.total, reliable=False, reason="saturated")
    assert not dataclasses.replace(found, worths=dataclasses.replace(found.worths, total=doubtful)).trusted


def test_a_single_plugin_has_no_pairs(registry):
    found = inspect(registry, only="a", **QUICK)
    assert found.pairs is None
    assert found.to_dict()["interactions"] == []
    assert found.to_dict()["dependence"] is None
    assert str(found) == str(found.worths)


def test_certificates_say_how_many_observations_a_learned_plugin_carries(registry):
    wrong = Learned(parameter_names=("mu",), sd=1.1)
    simulate = Gaussian(parameter_names=("mu",), sd=1.0).simulate
    certificate = certify(wrong, prior=registry.parameters, simulate=simulate, simulations=2000, progress=False)
    registry.append("wrong", wrong, certificate=certificate, force="it is a test")
    registry.append("unknown", Learned(parameter_names=("mu",), sd=1.0))
    found = inspect(registry, only=["wrong", "unknown"], simulations=100, progress=False)
    assert found.to_dict()["certificates"] == {
        "wrong": {"verdict": "certified", "carries": pytest.approx(certificate.n_max(0.3))},
        "unknown": {"verdict": "uncertified", "carries": None},
    }


def test_what_cannot_be_inspected_is_refused(registry, tmp_path):
    with pytest.raises(ObservationError, match="two plugins with as many observations, at least 10"):
        inspect(registry, without="b", dependence=True, **QUICK)
    with pytest.raises(UnknownPluginError, match="no plugin 'd'; there are a, b, c"):
        inspect(registry, only="d", **QUICK)
    with pytest.raises(ValueError, match="independent is True or False, got 'no'"):
        inspect(registry, independent="no", **QUICK)
    flat = Registry.create(tmp_path / "flat", [Parameter("mu")])
    flat.append("a", Gaussian(parameter_names=("mu",), sd=1.0))
    with pytest.raises(PosteriorError, match="'mu' with a flat one"):
        inspect(flat, **QUICK)


def test_infinities_are_none_for_machines():
    bad = Worth("a", float("-inf"), float("nan"), float("nan"), 1, False, "impossible")
    told = Inspection(Worths({"a": bad}, bad, {}, False, 500), None, None, {"a": None}).to_dict()
    assert told["worth"]["alone"]["a"]["information"] is None
    assert told["worth"]["total"]["bits"] is None


def test_simulated_pairs_need_no_data(tmp_path):
    def together(theta, generator):
        e = torch.randn(len(theta), 2, generator=generator, dtype=torch.float64)
        return {"a": theta + e[:, :1], "b": theta + 1.6 * e[:, :1] + 1.2 * e[:, 1:]}

    registry = Registry.create(tmp_path / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    for name, sd in (("a", 1.0), ("b", 2.0)):
        registry.append(name, Gaussian(parameter_names=("mu",), sd=sd))
    found = inspect(registry, pairs=together, dependence=True, **QUICK)
    assert found.worths.paired
    assert found.dependence.flagged == (("a", "b"),)
    assert found.dependence.theta.tolist() == [0.0]
    assert not found.worths.total.reliable  # their sum is too sure
    with pytest.raises(ObservationError, match="no plugin brought data along"):
        inspect(registry, dependence=True, **QUICK)
