"""The front door: what is appended is what answers, whatever order it came in."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import zarr
from torch.distributions import Categorical as Index
from torch.distributions import Normal, Uniform

from engine import (
    Ball,
    Linear,
    Modality,
    ModalityError,
    ObservationError,
    Parameter,
    ParameterError,
    PositiveSemidefinite,
    Registry,
    RegistryError,
    Simplex,
    TamperedError,
    UnknownPluginError,
)
from modalities import Categorical, Constraint, Gaussian, PoissonCounts, StudentT

X = {
    "counts": torch.tensor([[57.0, 49.0], [61.0, 44.0]]),
    "spectrum": torch.tensor([[1.1, 0.4], [0.8, 0.7], [1.3, 0.2]]),
    "tails": torch.tensor([[1.2], [0.7], [3.9], [1.1]]),
    "yes_no": torch.tensor([0, 1, 1, 0, 1]),
    "prior_study": torch.tensor([[0.9]]),
}


def five():
    """Five plugins of five classes over two parameters."""
    logits = torch.nn.Linear(1, 2).double()
    logits.load_state_dict({"weight": torch.tensor([[0.3], [1.1]]), "bias": torch.tensor([0.1, -0.2])})
    return {
        "counts": PoissonCounts(signal=[5.0, 9.0], background=[50.0, 40.0], strength="mu"),
        "spectrum": Gaussian(parameter_names=("mu", "nu"), covariance=[[1.0, 0.3], [0.3, 0.5]]),
        "tails": StudentT(parameter_names=("mu",), scale=0.8, df=4.0),
        "yes_no": Categorical(parameter_names=("nu",), logits=logits, categories=2),
        "prior_study": Constraint("nu", sd=0.5),
    }


PARAMETERS = [Parameter("mu", Uniform(0.0, 10.0), unit="pb"), Parameter("nu", Normal(0.0, 3.0))]


@pytest.fixture
def registry(tmp_path):
    made = Registry.create(tmp_path / "analysis", PARAMETERS)
    for name, modality in five().items():
        made.append(name, modality)
    return made


def test_all_120_orders_give_one_digest_and_the_same_bits(tmp_path):
    plugins, theta = five(), torch.tensor([[1.0, 0.3], [0.2, -0.4], [3.0, 1.0]], dtype=torch.float64)
    seen = set()
    for k, order in enumerate(itertools.permutations(plugins)):
        made = Registry.create(tmp_path / str(k), PARAMETERS)
        for name in order:
            made.append(name, plugins[name])
        at = made.evidence({name: X[name] for name in reversed(order)}).derivatives(theta)
        bits = tuple(t.numpy().tobytes() for t in (at.value, at.score, at.information))
        seen.add((made.digest, bits))
    assert len(seen) == 1


def test_reopening_gives_the_same_bits(registry):
    theta = torch.tensor([[1.0, 0.3]], dtype=torch.float64)
    again = Registry.open(registry.path)
    assert again.digest == registry.digest
    assert torch.equal(again.log_evidence(X, theta), registry.log_evidence(X, theta))
    assert again.estimate(X).to_json() == registry.estimate(X).to_json()


def test_the_sum_is_the_sum_of_the_plugins(registry):
    theta = torch.tensor([[1.0, 0.3], [0.2, -0.4]], dtype=torch.float64)
    total = registry.log_evidence(X, theta)
    parts = [registry.log_evidence({name: x}, theta) for name, x in X.items()]
    torch.testing.assert_close(total, torch.stack(parts).sum(0), rtol=1e-14, atol=0)
    with_prior = registry.log_evidence(X, theta, prior=True)
    torch.testing.assert_close(with_prior - total, registry.parameters.log_prior(theta), rtol=1e-12, atol=1e-12)


def test_a_missing_modality_is_left_out_and_said(registry):
    fit = registry.estimate({name: X[name] for name in ("counts", "spectrum")})
    assert fit.converged
    assert fit.provenance["left_out"] == ["tails", "yes_no", "prior_study"]
    assert "left out: tails, yes_no, prior_study" in str(fit)


def test_an_estimate_carries_digest_data_and_versions_through_json(registry):
    fit = registry.estimate(X)
    read = json.loads(fit.to_json())
    assert read["provenance"]["digest"] == registry.digest
    assert read["provenance"]["plugins"]["tails"] == registry.plugins["tails"].content
    assert set(read["provenance"]["versions"]) == {"python", "torch", "numpy", "scalar-evidence"}
    assert read["theta"] == fit.theta.tolist()
    assert read["parameters"]["mu"]["unit"] == "pb"


def test_observations_brought_along_are_used_where_a_query_gives_none(tmp_path):
    made = Registry.create(tmp_path / "w", PARAMETERS)
    for name, modality in five().items():
        made.append(name, modality, observations=X[name])
    made = Registry.open(made.path)
    assert made.estimate().to_json() == made.estimate(X).to_json()
    assert made.estimate(only="counts").theta[0] == made.estimate({"counts": X["counts"]}).theta[0]
    assert set(made.estimate(without=["counts", "tails"]).contributions) == {"spectrum", "yes_no", "prior_study"}
    with pytest.raises(UnknownPluginError, match="'cuonts'"):
        made.estimate(only="cuonts")


def test_without_data_of_its_own_a_registry_asks_for_some(registry):
    with pytest.raises(ObservationError, match="no plugin brought data"):
        registry.estimate()


def test_a_zarr_group_is_data(registry, tmp_path):
    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="w")
    for name, x in X.items():
        group.create_array(name, data=x.numpy())
    for data in (group, tmp_path / "x.zarr"):
        assert registry.estimate(data).to_json() == registry.estimate(X).to_json()
    assert registry.estimate(tmp_path / "x.zarr", only=["counts"]).provenance["left_out"][0] == "spectrum"


def test_the_same_data_brought_along_twice_is_refused_and_nothing_is_written(tmp_path):
    made = Registry.create(tmp_path / "w", PARAMETERS)
    made.append("counts", five()["counts"], observations=X["counts"])
    before = (made.path / "registry.toml").read_bytes()
    with pytest.raises(ObservationError, match=r"'again' .*same data|'counts' and 'again'|'again' and 'counts'"):
        made.append("again", five()["counts"], observations=X["counts"])
    assert (made.path / "registry.toml").read_bytes() == before
    assert sorted(p.name for p in (made.path / "plugins").iterdir()) == ["counts"]


def test_superseding_keeps_the_past(registry):
    old_digest, old = registry.digest, registry.estimate(X)
    registry.append("prior_study", Constraint("nu", sd=0.1), supersede=True)
    assert registry.digest != old_digest
    assert registry.estimate(X)["nu"].error < old["nu"].error
    for past in (registry.at(old_digest), Registry.open(registry.path).at(old_digest[:17])):
        assert past.estimate(X).to_json() == old.to_json()
        with pytest.raises(RegistryError, match="view of the past"):
            past.append("new", Constraint("nu"))
    assert [e.name for e in registry.history].count("prior_study") == 2
    registry.append("prior_study", Constraint("nu", sd=0.5), supersede=True)
    assert registry.digest == old_digest  # the same parameters and plugins are the same registry
    registry.verify()


def test_a_plugin_brings_parameters_along_and_must_agree(registry):
    registry.append("lens", Constraint("h"), parameters=[Parameter("h", unit="km")])
    assert registry.parameters.names == ("mu", "nu", "h")
    with pytest.raises(ParameterError, match=r"'h' has unit 'km' in .*lens.* and unit 'm' in"):
        registry.append("rule", Constraint("h"), parameters=[Parameter("h", unit="m")])
    with pytest.raises((RegistryError, ParameterError), match="'k'"):
        registry.append("stray", Constraint("k"))


def test_a_modality_that_takes_a_unit_for_granted_is_refused_another(tmp_path):
    made = Registry.create(tmp_path / "w", [Parameter("mu", unit="fb")])
    modality = Constraint("mu")
    modality.parameter_units = {"mu": "pb"}
    with pytest.raises(ParameterError, match="'pb'"):
        made.append("a", modality)


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", ".hidden", "a.b", "x" * 65, "naïve"])
def test_names_that_are_no_folder_names_are_refused(registry, name):
    with pytest.raises(RegistryError, match="name"):
        registry.append(name, Constraint("nu"))


def test_a_name_is_given_once(registry):
    with pytest.raises(RegistryError, match="supersede"):
        registry.append("counts", Constraint("nu"))


def test_only_modalities_are_plugins(registry):
    with pytest.raises(RegistryError, match="subclass Modality"):
        registry.append("net", torch.nn.Linear(2, 1))


class NeedsTwo(Modality):
    """Fails on its own data."""

    def __init__(self, parameter_names=("mu",)):
        super().__init__(parameter_names, ())

    def log_evidence(self, x, theta):
        raise ValueError("no such table")


def test_a_plugin_that_fails_on_its_own_data_is_not_written(registry):
    before = (registry.path / "registry.toml").read_bytes()
    with pytest.raises(ModalityError, match="'broken' raised ValueError in log_evidence: no such table"):
        registry.append("broken", NeedsTwo(), observations=torch.tensor([1.0]))
    assert (registry.path / "registry.toml").read_bytes() == before


def test_a_changed_weight_is_found_before_it_is_used(registry):
    victim = next(p for p in (registry.path / "plugins" / "yes_no").rglob("*") if p.is_file() and "c" in p.parts)
    data = bytearray(victim.read_bytes())
    data[0] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(TamperedError, match="'yes_no'"):
        Registry.open(registry.path).estimate(X)
    with pytest.raises(TamperedError, match="yes_no"):
        Registry.open(registry.path).verify()


def test_an_appended_modality_does_not_change_with_the_callers_copy(tmp_path):
    made = Registry.create(tmp_path / "w", [Parameter("mu")])
    modality = Constraint("mu", sd=1.0)
    made.append("a", modality)
    before = made.log_evidence({"a": [[0.0]]}, torch.tensor([[1.0]]))
    with torch.no_grad():
        for t in (*modality.buffers(), *modality.parameters()):
            t.mul_(2.0)
    assert torch.equal(before, made.log_evidence({"a": [[0.0]]}, torch.tensor([[1.0]])))


def test_a_discrete_theta_has_probabilities_and_no_gradient(tmp_path):
    made = Registry.create(tmp_path / "w", [Parameter("h", prior=Index(torch.tensor([0.5, 0.5])))])
    made.append("coin", Categorical(parameter_names=("h",), probabilities=[[0.5, 0.5], [0.9, 0.1]]))
    made = Registry.open(made.path)
    assert made.probabilities({"coin": [0, 0, 1]})[0] == pytest.approx(0.125 / (0.125 + 0.081))
    with pytest.raises(ParameterError, match="probabilities"):
        made.estimate({"coin": [0, 0, 1]})


def test_five_processes_append_at_once_and_nothing_is_lost(tmp_path):
    made = Registry.create(tmp_path / "w", PARAMETERS)
    script = """
import os, sys
from engine import Registry
from modalities import Gaussian
start, go = os.pipe()
children = []
for k in range(5):
    if (child := os.fork()) == 0:
        os.close(go)
        os.read(start, 1)  # returns when the parent closes its end: all begin at once
        Registry.open(sys.argv[1]).append(f"p{k}", Gaussian(parameter_names=("mu", "nu"), sd=1.0 + k))
        os._exit(0)
    children.append(child)
os.close(go)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script, str(made.path)], env=environment, check=True, timeout=120)
    together = Registry.open(made.path)
    together.verify()
    alone = Registry.create(tmp_path / "v", PARAMETERS)
    for k in range(5):
        alone.append(f"p{k}", Gaussian(parameter_names=("mu", "nu"), sd=1.0 + k))
    assert together.digest == alone.digest
    data = {f"p{k}": torch.tensor([[1.0 + k, 2.0]]) for k in range(5)}
    theta = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    a, b = (r.evidence(data).derivatives(theta) for r in (together, alone))
    assert torch.equal(a.value, b.value)
    assert torch.equal(a.score, b.score)
    assert torch.equal(a.information, b.information)


def test_comparing_hypotheses_through_the_registry(registry):
    result = registry.compare(X, {"nu": 0.0})
    fit, fixed = registry.estimate(X), registry.estimate(X, fixed={"nu": 0.0})
    assert result.log_ratio == pytest.approx(fit.log_evidence - fixed.log_evidence, rel=1e-9)


# -- constraints -----------------------------------------------------------------------------------------------


def test_constraints_come_with_the_workspace_with_a_plugin_or_alone(tmp_path):
    low, disc, half = Linear({"mu": 1}, lower=1), Ball(["mu", "nu"], 3), Linear({"mu": 1, "nu": 1}, upper=2)
    made = Registry.create(tmp_path / "w", PARAMETERS, [low])
    made.append("prior_study", Constraint("nu", sd=0.5), constraints=[disc])
    (entry,) = made.constrain(half, low)
    assert entry.constraint == half
    assert made.constrain(low) == ()
    assert made.parameters.constraints == (low, disc, half)
    assert Registry.open(made.path).parameters == made.parameters
    assert Registry.open(made.path).digest == made.digest


def test_each_answer_of_the_past_keeps_the_constraints_of_its_time(registry):
    digests, spaces = [registry.digest], [registry.parameters]
    for constraint in (Linear({"mu": 1, "nu": 1}, upper=2), Ball(["mu", "nu"], 3)):
        registry.constrain(constraint)
        digests.append(registry.digest)
        spaces.append(registry.parameters)
    assert len(set(digests)) == 3
    for digest, space in zip(digests, spaces, strict=True):
        past = Registry.open(registry.path).at(digest)
        assert past.parameters == space
        with pytest.raises(RegistryError, match="view of the past"):
            past.constrain(Linear({"mu": 1}, upper=9))
    theta = torch.tensor([[1.5, 1.0]], dtype=torch.float64)
    inside = [float(registry.at(d).log_evidence(X, theta, prior=True)[0]) > -math.inf for d in digests]
    assert inside == [True, False, False]


def test_a_query_evaluates_nothing_that_the_constraints_forbid_to_the_prior(registry):
    registry.constrain(Linear({"mu": 1, "nu": 1}, upper=2))
    theta = torch.tensor([[1.0, 0.9], [1.0, 1.1]], dtype=torch.float64)
    with_prior = registry.log_evidence(X, theta, prior=True)
    assert torch.isfinite(with_prior).tolist() == [True, False]
    assert bool(torch.isfinite(registry.log_evidence(X, theta)).all())


class Spread(Modality):
    """Points with an unknown covariance; it cannot be evaluated where that is none."""

    def __init__(self, parameter_names=("v", "c", "w")):
        super().__init__(parameter_names, (2,))

    def log_evidence(self, x, theta):
        v, c, w = theta.unbind(-1)
        matrix = torch.stack([torch.stack([v, c], -1), torch.stack([c, w], -1)], -2)
        return torch.distributions.MultivariateNormal(torch.zeros(2, dtype=theta.dtype), matrix).log_prob(x)


def test_a_plugin_is_tried_where_its_constraints_allow(tmp_path):
    parameters = [
        Parameter("v", Uniform(0.1, 2.0)),
        Parameter("c", Normal(5.0, 1.0)),
        Parameter("w", Uniform(0.1, 2.0)),
    ]
    data = torch.tensor([[0.3, 0.4], [1.0, -0.2], [-0.5, 0.1]])
    made = Registry.create(tmp_path / "w", parameters)
    with pytest.raises(ModalityError, match="'points' raised"):
        made.append("points", Spread(), observations=data)
    made.append("points", Spread(), constraints=[PositiveSemidefinite([["v", "c"], ["c", "w"]])], observations=data)
    assert float(made.log_evidence({"points": data}, made.parameters.interior[None])[0]) > -math.inf


def test_a_constraint_that_cannot_be_is_refused_with_its_plugin(registry):
    before = (registry.path / "registry.toml").read_bytes()
    for constraints in (
        [Linear({"mu": 1}, lower=11)],
        [Simplex(["mu", "pi"])],
        [Linear({"mu": 1}, upper=1, name="x"), Linear({"mu": 1}, upper=2, name="x")],
    ):
        for observations in (None, torch.tensor([[0.9]])):
            with pytest.raises(ParameterError):
                registry.append("more", Constraint("nu"), constraints=constraints, observations=observations)
        with pytest.raises(ParameterError):
            registry.constrain(*constraints)
    assert (registry.path / "registry.toml").read_bytes() == before
    assert "more" not in registry.plugins
