"""Plugins over several others: taken where all parts are in the query, exact where s_12 is, against closed forms."""

import math

import pytest
import torch
import zarr
from torch.distributions import Normal

from engine import Evidence, Modality, Observations, Parameter, ParameterSpace, Registry
from engine.errors import EstimateError, ObservationError, RegistryError
from engine.estimate import estimate
from engine.information import dependence
from engine.tension import tension
from modalities import Gaussian, Interaction

RHO, SD = 0.8, (1.0, 2.0)


class Exact(Modality):
    """s of two normal parts around θ whose noise correlates by ρ."""

    def __init__(self, parts=("a", "b"), sd=SD, rho=RHO):
        super().__init__(parameter_names=("mu",), event_shape=(2,))
        self.parts, self.sd, self.rho = tuple(parts), sd, rho

    def log_evidence(self, x, theta):
        z = (x - theta) / torch.tensor(self.sd, dtype=x.dtype)
        joint = (z[..., 0] ** 2 - 2 * self.rho * z[..., 0] * z[..., 1] + z[..., 1] ** 2) / (1 - self.rho**2)
        return -0.5 * math.log(1 - self.rho**2) - 0.5 * joint + 0.5 * z.square().sum(-1)


SPACE = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
KINDS = {n: Gaussian(parameter_names=("mu",), sd=s) for n, s in zip("ab", SD, strict=True)}


def pairs(n, seed=0, theta=0.3):
    e = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    second = RHO * e[:, :1] + math.sqrt(1.0 - RHO**2) * e[:, 1:]
    return {"a": theta + SD[0] * e[:, :1], "b": theta + SD[1] * second}


def untrained(parts=("a", "b"), seed=1, shapes=None):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Interaction(parts, ("mu",), event_shapes=shapes or [(1,)] * len(parts), hidden=(8,)).double()


@pytest.fixture
def registry(tmp_path):
    out = Registry.create(tmp_path / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    for name, kind in KINDS.items():
        out.append(name, kind)
    out.append("c", Gaussian(parameter_names=("mu",), sd=0.5))
    out.append("s12", untrained())
    return out


THETA = torch.tensor([[0.1], [-0.7]], dtype=torch.float64)


def test_with_the_exact_interaction_the_sum_is_the_joint_density():
    data = pairs(5)
    evidence = Evidence(SPACE, {**KINDS, "s12": Exact()}, data)
    covariance = torch.tensor([[1.0, RHO * 2.0], [RHO * 2.0, 4.0]], dtype=torch.float64)
    joint = torch.distributions.MultivariateNormal(THETA[:, None].expand(2, 1, 2), covariance)
    expected = joint.log_prob(torch.cat([data["a"], data["b"]], -1)).sum(-1)
    torch.testing.assert_close(evidence.value(THETA), expected, rtol=1e-12, atol=1e-12)
    fit = estimate(evidence)
    w = torch.linalg.inv(covariance).sum(0)  # generalised least squares
    best = (torch.cat([data["a"], data["b"]], -1).mean(0) @ w) / w.sum()
    assert fit["mu"].value == pytest.approx(float(best), rel=1e-9)
    assert fit["mu"].error == pytest.approx(float((5 * w.sum()) ** -0.5), rel=1e-9) == pytest.approx(0.4, rel=1e-9)


def test_it_takes_part_exactly_where_all_of_its_parts_do(registry):
    data = pairs(5)
    s12 = registry.modality("s12").requires_grad_(False)
    alone = {n: registry.log_evidence({n: data[n]}, THETA) for n in "ab"}
    extra = s12(torch.cat([data["a"], data["b"]], -1)[:, None], THETA).sum(0)
    torch.testing.assert_close(registry.log_evidence(data, THETA), alone["a"] + alone["b"] + extra, rtol=1e-12, atol=0)
    assert float(extra.abs().min()) > 1e-3
    assert registry.evidence({**data, "c": [[0.3]]}).names == ("a", "b", "c", "s12")
    assert registry.evidence({"a": data["a"], "c": [[0.3]]}).names == ("a", "c")
    assert registry.evidence(data, without="s12").names == ("a", "b")
    assert registry.evidence(data, without="b").names == ("a",)
    assert registry.evidence({**data, "c": [[0.3]]}, only=["a", "b"]).names == ("a", "b", "s12")
    assert registry.evidence(data, only=["a", "b", "s12"]).names == ("a", "b", "s12")


def test_the_data_keep_their_hash_and_stay_where_they_are(registry, tmp_path):
    data = pairs(9000)
    with_it, without = registry.evidence(data).observations, registry.evidence(data, without="s12").observations
    assert with_it.hash == without.hash
    group = zarr.open_group(tmp_path / "data.zarr", mode="w")
    for name, x in data.items():
        group.create_array(name, data=x.numpy())
    stored = registry.evidence(tmp_path / "data.zarr").observations
    assert stored.hash == with_it.hash
    assert [len(block) for block in stored.blocks("s12")] == [4096, 4096, 808]
    assert torch.equal(stored["s12"], torch.cat([data["a"], data["b"]], -1))
    assert registry.estimate(data).provenance["data"] == with_it.hash


def test_it_comes_back_from_the_ledger(registry):
    registry.verify()
    again = Registry.open(registry.path)
    assert again.plugins["s12"].parts == ("a", "b")
    assert again.plugins["a"].parts == ()
    assert torch.equal(again.log_evidence(pairs(5), THETA), registry.log_evidence(pairs(5), THETA))
    before = (registry.path / "registry.toml").read_bytes()
    assert before.count(b"\nparts = ") == 1
    assert again.modality("s12").configuration["parts"] == ("a", "b")


@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        ({"a": pairs(5)["a"], "b": pairs(4)["b"]}, {}, "which must be as many, got {'a': 5, 'b': 4}"),
        ({**pairs(5), "s12": torch.zeros(5, 2)}, {}, "'s12' reads the observations of a and b"),
        (pairs(5), {"only": "s12"}, "'s12' takes part only where all of a, b do"),
    ],
)
def test_data_that_are_no_pairs_are_refused(registry, data, settings, said):
    with pytest.raises(ObservationError) as error:
        registry.evidence(data, **settings)
    assert said in str(error.value)
    if not settings and "s12" not in data:
        assert registry.evidence(data, without="s12").names == ("a", "b")


@pytest.mark.parametrize(
    ("name", "modality", "settings", "said"),
    [
        ("x", untrained(("a", "nobody")), {}, "different plugins that are registered"),
        ("x", untrained(("a", "s12"), shapes=[(1,), (2,)]), {}, "have data of their own"),
        ("x", untrained(("a", "c"), shapes=[(1,), (2,)]), {}, "has 2 numbers in all, got the event shape (3,)"),
        ("x", untrained(("a", "c")), {"observations": torch.zeros(3, 2)}, "it has none of its own"),
        ("x", untrained(("b", "a")), {}, "'s12' carries what a and b share already"),
        ("b", None, {"supersede": True}, "must keep their shape (1,), got (2,)"),
    ],
)
def test_an_interaction_that_fits_nowhere_is_refused(registry, name, modality, settings, said):
    modality = _wide() if modality is None else modality
    before = (registry.path / "registry.toml").read_bytes()
    with pytest.raises(RegistryError) as error:
        registry.append(name, modality, **settings)
    assert said in str(error.value)
    assert (registry.path / "registry.toml").read_bytes() == before


def _twice(theta):
    return theta.expand(*theta.shape[:-1], 2)


def _wide():
    return Gaussian(_twice, parameter_names=("mu",), sd=[1.0, 1.0])


def test_the_larger_of_two_interactions_counts_alone(registry):
    registry.append("s123", untrained(("a", "b", "c"), seed=2))
    data = {**pairs(4), "c": torch.randn(4, 1, generator=torch.Generator().manual_seed(0))}
    assert registry.evidence(data).names == ("a", "b", "c", "s123")
    assert registry.evidence(data, without="c").names == ("a", "b", "s12")
    assert registry.evidence(data, without="s123").names == ("a", "b", "c", "s12")


class Known(Modality):
    """The exact interaction of normal parts around θ with a covariance C."""

    def __init__(self, parts, C):
        super().__init__(parameter_names=("mu",), event_shape=(len(parts),))
        self.parts, self.C = tuple(parts), C

    def log_evidence(self, x, theta):
        z = x - theta
        joint = torch.distributions.MultivariateNormal(torch.zeros(len(self.C)).double(), self.C).log_prob(z)
        return joint - torch.distributions.Normal(0.0, self.C.diagonal().sqrt()).log_prob(z).sum(-1)


def three(C, n=6):
    kinds = {p: Gaussian(parameter_names=("mu",), sd=float(C[k, k].sqrt())) for k, p in enumerate("abc")}
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = 0.2 + z @ torch.linalg.cholesky(C).mT
    return kinds, {p: x[:, k : k + 1] for k, p in enumerate("abc")}, x


def tied(C, *parts):
    rows = [["abc".index(p) for p in ps] for ps in parts]
    return {f"s_{ps}": Known(ps, C[r][:, r]) for ps, r in zip(parts, rows, strict=True)}


def expected_of(C, x):
    joint = torch.distributions.MultivariateNormal(THETA[:, None].expand(2, 1, 3), C)
    return joint.log_prob(x).sum(-1)


COMMON = torch.eye(3, dtype=torch.float64) + 1.0  # one disturbance of all three
CHAIN = torch.tensor(
    [[1.0, 0.6, 0.36], [0.6, 1.0, 0.6], [0.36, 0.6, 1.0]], dtype=torch.float64
)  # a and c by way of b alone


def test_one_over_three_parts_makes_their_joint_density():
    kinds, data, x = three(COMMON)
    live = {**kinds, **tied(COMMON, "ab", "abc")}
    evidence = Evidence(SPACE, live, data)
    assert evidence.names == ("a", "b", "c", "s_abc")
    torch.testing.assert_close(evidence.value(THETA), expected_of(COMMON, x), rtol=1e-12, atol=1e-12)


def test_pairs_in_a_chain_make_the_joint_density_of_a_chain():
    kinds, data, x = three(CHAIN)
    evidence = Evidence(SPACE, {**kinds, **tied(CHAIN, "ab", "bc")}, data)
    torch.testing.assert_close(evidence.value(THETA), expected_of(CHAIN, x), rtol=1e-12, atol=1e-12)


def test_pairs_in_a_ring_are_refused_where_nothing_covers_them():
    """All three pairs would claim ½ a triple where the joint density has ¾ and the plain sum 3/2, and be no density."""
    kinds, data, _ = three(COMMON)
    ring = tied(COMMON, "ab", "bc", "ac")
    with pytest.raises(RegistryError, match="must form no ring, got 's_ab', 's_ac' and 's_bc' over 'a', 'b' and 'c'"):
        Evidence(SPACE, {**kinds, **ring}, data)
    covered = Evidence(SPACE, {**kinds, **ring, **tied(COMMON, "abc")}, data)
    assert covered.names == ("a", "b", "c", "s_abc")
    only_two = Evidence(SPACE, {**kinds, **ring}, {p: data[p] for p in "ac"})
    assert only_two.names == ("a", "c", "s_ac")


def test_a_ring_is_refused_when_it_would_be_closed_unless_it_is_covered(registry):
    registry.append("s23", untrained(("b", "c"), seed=2))
    before = registry.digest
    with pytest.raises(RegistryError, match=r"append one interaction over a, b, c instead"):
        registry.append("s13", untrained(("a", "c"), seed=3))
    assert registry.digest == before
    registry.append("s123", untrained(("a", "b", "c"), seed=4))
    registry.append("s13", untrained(("a", "c"), seed=3))
    data = {**pairs(4), "c": torch.randn(4, 1, generator=torch.Generator().manual_seed(0))}
    assert registry.evidence(data).names == ("a", "b", "c", "s123")
    assert registry.evidence({n: data[n] for n in "ac"}).names == ("a", "c", "s13")
    with pytest.raises(RegistryError, match="without='s23'"):
        registry.evidence(data, without="s123")
    assert registry.evidence(data, without=["s123", "s23"]).names == ("a", "b", "c", "s12", "s13")


def test_many_data_sets_are_as_one_by_one(registry):
    sets = [pairs(n, seed=n) for n in (3, 5, 4)]
    one = [registry.estimate(x) for x in sets]
    lists = registry.estimate_many({n: [x[n] for x in sets] for n in "ab"})
    padded = {n: torch.zeros(3, 5, 1, dtype=torch.float64) for n in "ab"}
    mask = torch.zeros(3, 5, dtype=torch.bool)
    for b, x in enumerate(sets):
        mask[b, : len(x["a"])] = True
        for n in "ab":
            padded[n][b, : len(x["a"])] = x[n]
    masked = registry.estimate_many(padded, mask={"a": mask, "b": mask})
    offsets = {n: [0, 3, 8, 12] for n in "ab"}
    flat = registry.estimate_many({n: torch.cat([x[n] for x in sets]) for n in "ab"}, offsets=offsets)
    for many in (lists, masked, flat):
        for b, fit in enumerate(one):
            assert float(many.theta[b, 0]) == pytest.approx(fit["mu"].value, rel=1e-7, abs=1e-9)
            assert float(many.information[b, 0, 0]) == pytest.approx(fit.information.item(), rel=1e-7)
    left_out = registry.estimate_many({n: [x[n] for x in sets] for n in "ab"}, without="s12")
    assert abs(float(left_out.theta[0, 0] - lists.theta[0, 0])) > 1e-6
    with pytest.raises(ObservationError, match="masks and offsets must be the same"):
        registry.estimate_many(padded, mask={"a": mask})
    with pytest.raises(ObservationError, match="must be as many"):
        registry.estimate_many({"a": [x["a"] for x in sets], "b": [x["b"][:2] for x in sets]})


def test_a_posterior_that_is_appended_to_takes_it_in_and_lets_it_go(registry):
    data = pairs(5)
    whole = registry.posterior(data, method="grid", draws=200)
    grown = registry.posterior({"a": data["a"]}, method="grid", draws=200).append({"b": data["b"]})
    assert grown.mean["mu"] == pytest.approx(whole.mean["mu"], abs=1e-6)
    assert "joins what depends on each other" in grown.reason
    assert grown.provenance == whole.provenance
    less = whole.without("b")
    assert less.mean["mu"] == pytest.approx(registry.posterior({"a": data["a"]}, method="grid").mean["mu"], abs=1e-3)
    assert set(less.provenance["plugins"]) == {"a"}


def test_an_interaction_that_is_appended_measures_nothing_anew(registry):
    found = registry.before_after("s12", pairs(20))
    assert found.shift is None
    assert "nothing was measured anew: s12" in found.reason
    assert found.parameters["mu"][0] != found.parameters["mu"][1]
    assert "nothing was measured anew" in str(found)
    assert registry.before_after(["b", "s12"], pairs(20)).shift is not None


def test_a_tension_takes_what_depends_as_one_part(registry):
    data = {**pairs(5), "c": [[0.4]]}
    found = tension(registry.estimate(data))
    assert found.parts == {"a + b": ("a", "b", "s12"), "c": ("c",)}
    grouped = tension(registry.estimate(data), {"both": ["a", "b"], "other": "c"})
    assert grouped.parts == {"both": ("a", "b", "s12"), "other": ("c",)}
    with pytest.raises(EstimateError, match="'a' and 'b' depend on each other"):
        tension(registry.estimate(data), {"one": ["a", "c"], "other": "b"})


def test_a_dependence_that_an_interaction_carries_is_not_held_against_the_sum():
    data = pairs(500)
    found = dependence(Evidence(SPACE, {**KINDS, "s12": Exact()}, data), torch.tensor([0.3]))
    assert found.pairs["a", "b"].p_value > 0.01
    assert found.pairs["a", "b"].beside == ("s12",)
    assert not found.dependent
    assert dependence(Evidence(SPACE, KINDS, data), torch.tensor([0.3])).dependent


def test_an_interaction_that_carries_too_little_is_found_out():
    """KL of the pairs from the sum with it: ½ [(2 − 2 · 0.5 · 0.8) / 0.75 − 2 + ln(0.75 / 0.36)] = 0.167 nats are left."""
    found = dependence(Evidence(SPACE, {**KINDS, "s12": Exact(rho=0.5)}, pairs(1000)), torch.tensor([0.3]))
    assert found.flagged == (("a", "b"),)
    assert 0.05 < found.pairs["a", "b"].information < 0.35
    assert "beside 's12', 0." in str(found)


def test_an_untrained_interaction_silences_nothing(registry):
    data = pairs(400)
    with_it = registry.estimate(data, dependence=True)
    without = registry.estimate(data, dependence=True, without="s12")
    assert with_it.dependence.dependent
    assert without.status == "dependent"
    assert with_it.covariance_kind == "godambe"
    assert with_it["mu"].error == pytest.approx(without["mu"].error, rel=0.2)


def test_the_ends_of_a_chain_are_tested_beside_what_lies_between():
    """a and c correlate by 0.64, all of it through b: s_ab + s_bc carries that, and s_ab alone does not."""
    e = torch.randn(3, 1000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    z = [e[0]]
    for k in (1, 2):
        z.append(RHO * z[-1] + math.sqrt(1 - RHO**2) * e[k])
    data = {n: x[:, None] for n, x in zip("abc", z, strict=True)}
    kinds = {n: Gaussian(parameter_names=("mu",), sd=1.0) for n in "abc"}
    chain = {"ab": Exact("ab", (1.0, 1.0)), "bc": Exact("bc", (1.0, 1.0))}
    assert not dependence(Evidence(SPACE, {**kinds, **chain}, data), torch.zeros(1)).dependent
    half = dependence(Evidence(SPACE, {**kinds, "ab": chain["ab"]}, data), torch.zeros(1))
    assert set(half.flagged) == {("a", "c"), ("b", "c")}


def test_joint_scores_with_the_exact_interaction_have_the_variance_of_their_curvature():
    """K of u_a + u_b + u_12 is J again: 1.25 a pair, where u_a + u_b has 2.05."""
    data, n = pairs(4000, theta=0.0), 4000
    scores = Evidence(SPACE, {**KINDS, "s12": Exact()}, data).scores(torch.zeros(1))
    total = torch.stack(list(scores.values())).sum(0)
    assert float(total.var()) == pytest.approx(1.25, rel=4 * math.sqrt(2 / n))


def test_a_layer_and_a_check_of_coverage_leave_it_out(registry):
    with pytest.raises(RegistryError, match="a layer takes no interactions"):
        registry.layer()
    assert registry.layer(without="s12")(pairs(5)).shape == (1,)
    assert registry.check_calibration(3, repetitions=20, draws=100, progress=False).observations == {
        "a": 3,
        "b": 3,
        "c": 3,
    }


def test_observations_by_hand_read_only_what_they_are_told():
    live = {**KINDS, "s12": Exact()}
    assert list(Observations(pairs(3), live)) == ["a", "b", "s12"]
    assert list(Observations(pairs(3), live, interactions={})) == ["a", "b"]
    assert list(Observations({"a": pairs(3)["a"]}, live)) == ["a"]
