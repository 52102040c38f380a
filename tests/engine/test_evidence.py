"""The sum: its value, score and information are the closed forms, and what must not matter does not."""

import itertools
import math

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from torch.distributions import Normal, Uniform

from engine import Evidence, Modality, ModalityError, Parameter, ParameterError, ParameterSpace
from engine.estimate import estimate
from modalities import Categorical, Constraint, Gaussian, PoissonCounts, StudentT


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(theta):
    return torch.stack([0.0 * theta[..., 0], theta[..., 0], theta[..., 1] - theta[..., 0]], -1)


def curve(theta, t):
    return theta[..., :1] * torch.exp(-theta[..., 1:] * t)


SPACE = ParameterSpace(
    [
        Parameter("mu", bounds=(-3.0, 9.0)),
        Parameter("b", prior=Normal(0.0, 2.0)),
        Parameter("c", prior=Uniform(-4.0, 4.0)),
    ]
)


def five():
    """Five plugins of five classes, each about one or two of three parameters, and their data."""
    modalities = {
        "counts": PoissonCounts(
            signal=[5.0, 9.0], background=[50.0, 40.0], normalisation={"b": {"background": (0.9, 1.1)}}
        ),
        "values": Gaussian(curve, parameter_names=("mu", "c"), sd=0.5, inputs={"t": [0.1, 0.2, 0.3]}, event_shape=(3,)),
        "robust": StudentT(parameter_names=("c",), scale=1.5, df=3.0),
        "labels": Categorical(logits, parameter_names=("b", "mu"), categories=3),
        "aux": Constraint("b", sd=0.7),
    }
    data = {
        "counts": torch.poisson(torch.full((700, 2), 55.0), generator=torch.Generator().manual_seed(1)),
        "values": 1.0 + normals(90, 3, seed=2),
        "robust": normals(400, 1, seed=3),
        "labels": torch.randint(0, 3, (333,), generator=torch.Generator().manual_seed(4)),
        "aux": [[0.2]],
    }
    return modalities, data


THETA = torch.tensor([[0.7, 0.3, -0.2], [1.9, -0.8, 1.1], [0.1, 1.4, 0.6]], dtype=torch.float64)


# ---- closed forms


def test_value_score_and_information_of_a_gaussian_are_the_closed_forms():
    C = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)
    x = normals(30, 2, seed=5)
    space = ParameterSpace([Parameter("a"), Parameter("b")])
    evidence = Evidence(space, {"m": Gaussian(parameter_names=("a", "b"), covariance=C)}, {"m": x})
    at = evidence.derivatives(THETA[:, :2])
    inverse = torch.linalg.inv(C)
    residual = x - THETA[:, None, :2]
    chi2 = torch.einsum("kni,ij,knj->k", residual, inverse, residual)
    value = -0.5 * chi2 - 15 * torch.logdet(2 * math.pi * C)
    assert torch.allclose(at.value, value, rtol=1e-13)
    assert torch.allclose(at.score, residual.sum(1) @ inverse, rtol=1e-12)
    assert torch.allclose(at.information, (30 * inverse).expand(3, 2, 2), rtol=1e-12)
    assert torch.allclose(evidence.value(THETA[:, :2]), value, rtol=1e-13)


def test_value_score_and_information_of_counts_are_the_closed_forms():
    s, b = torch.tensor([5.0, 9.0], dtype=torch.float64), torch.tensor([50.0, 40.0], dtype=torch.float64)
    n = torch.tensor([[57.0, 49.0], [44.0, 0.0]], dtype=torch.float64)
    evidence = Evidence(ParameterSpace([Parameter("mu")]), {"m": PoissonCounts(signal=s, background=b)}, {"m": n})
    mu = torch.tensor([[0.0], [1.5], [-2.0]], dtype=torch.float64)
    at, rate = evidence.derivatives(mu), mu * s + b
    total = n.sum(0)
    value = (total * rate.log() - 2 * rate).sum(-1) - torch.lgamma(n + 1).sum()
    assert torch.allclose(at.value, value, rtol=1e-12)
    assert torch.allclose(at.score[:, 0], (total * s / rate - 2 * s).sum(-1), rtol=1e-12)
    assert torch.allclose(at.information[:, 0, 0], (total * s**2 / rate**2).sum(-1), rtol=1e-12)


def direct(modalities, data, theta, prior):
    """S at one θ (3,), plugin by plugin, with none of the engine's machinery."""
    total = torch.zeros((), dtype=torch.float64)
    for name, modality in modalities.items():
        local = theta[[SPACE.names.index(p) for p in modality.parameter_names]]
        total = total + modality.log_evidence(torch.as_tensor(data[name], dtype=torch.float64), local).sum()
    if prior:
        total = total - 0.5 * (theta[1] / 2.0) ** 2 - math.log(2.0 * math.sqrt(2.0 * math.pi)) - math.log(8.0)
    return total


@pytest.mark.parametrize("prior", [False, True])
def test_derivatives_of_five_plugins_are_those_of_torch_func(prior):
    modalities, data = five()
    evidence = Evidence(SPACE, modalities, data, prior=prior)
    at = evidence.derivatives(THETA)
    for k, theta in enumerate(THETA):

        def S(t):
            return direct(modalities, data, t, prior)

        assert float(at.value[k]) == pytest.approx(float(S(theta)), rel=1e-13)
        gradient, hessian = torch.func.grad(S)(theta), torch.func.jacrev(torch.func.jacrev(S))(theta)
        assert torch.allclose(at.score[k], gradient, rtol=1e-11, atol=1e-9)
        assert torch.allclose(at.information[k], -hessian, rtol=1e-11, atol=1e-9)
    assert torch.equal(at.information, at.information.mT)
    assert torch.allclose(evidence.value(THETA), at.value, rtol=1e-14)


def test_a_theta_that_requires_a_gradient_gets_the_score_and_the_hessian():
    modalities, data = five()
    evidence = Evidence(SPACE, modalities, data, prior=True)
    at = evidence.derivatives(THETA)
    leaf = THETA.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(evidence.value(leaf).sum(), leaf, create_graph=True)
    assert torch.allclose(gradient, at.score, rtol=1e-12)
    (row,) = torch.autograd.grad(gradient[:, 0].sum(), leaf)
    assert torch.allclose(-row, at.information[:, 0], rtol=1e-11, atol=1e-9)
    assert not evidence.value(THETA).requires_grad
    with torch.no_grad():
        assert not evidence.value(leaf).requires_grad
    assert not evidence.derivatives(leaf).value.requires_grad


def test_values_at_many_theta_are_those_at_each():
    modalities, data = five()
    evidence = Evidence(SPACE, modalities, data)
    many = SPACE.sample_prior(50, seed=9).clamp(-2.9, 3.9)
    together, at = evidence.value(many), evidence.derivatives(many)
    for k in (0, 17, 49):
        one = evidence.derivatives(many[k : k + 1])
        assert float(evidence.value(many[k : k + 1])) == pytest.approx(float(together[k]), rel=1e-13)
        assert torch.allclose(one.score[0], at.score[k], rtol=1e-12, atol=1e-10)
        assert torch.allclose(one.information[0], at.information[k], rtol=1e-12, atol=1e-10)


# ---- parameters by name


def test_a_plugin_reads_its_own_parameters_by_name_whatever_the_order_of_the_space():
    """x ~ N(2 p + 5 q, 1): score (2, 5) r and information (2, 5)ᵀ(2, 5), put where p and q are."""
    modality = Gaussian(
        lambda t: 2.0 * t[..., :1] + 5.0 * t[..., 1:], parameter_names=("p", "q"), sd=1.0, event_shape=(1,)
    )
    values, weight = {"p": 0.3, "q": -1.0, "r": 7.0, "s": 2.0}, {"p": 2.0, "q": 5.0, "r": 0.0, "s": 0.0}
    for order in itertools.permutations("pqrs"):
        space = ParameterSpace([Parameter(n) for n in order])
        at = Evidence(space, {"m": modality}, {"m": [[1.0]]}).derivatives(space.tensor(values)[None])
        residual = 1.0 - (0.6 - 5.0)
        row = torch.tensor([weight[n] for n in order], dtype=torch.float64)
        assert torch.allclose(at.score[0], row * residual, rtol=1e-13)
        assert torch.allclose(at.information[0], row[:, None] * row, rtol=1e-13)


def test_two_plugins_over_permuted_parameters_add_in_the_right_places():
    first = Gaussian(parameter_names=("a", "b"), covariance=[[2.0, 0.5], [0.5, 1.0]])
    second = Gaussian(parameter_names=("c", "a"), covariance=[[1.0, -0.3], [-0.3, 4.0]])
    space = ParameterSpace([Parameter(n) for n in "abc"])
    at = Evidence(space, {"one": first, "two": second}, {"one": [[0.0, 1.0]], "two": [[2.0, 3.0]]}).derivatives(
        torch.zeros(1, 3)
    )
    J1, J2 = (torch.linalg.inv(m.covariance) for m in (first, second))
    J = torch.zeros(3, 3, dtype=torch.float64)
    J[:2, :2] += J1
    J[torch.tensor([[2], [0]]), torch.tensor([2, 0])] += J2
    score = torch.zeros(3, dtype=torch.float64)
    score[:2] += J1 @ torch.tensor([0.0, 1.0], dtype=torch.float64)
    score[[2, 0]] += J2 @ torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert torch.allclose(at.information[0], J, rtol=1e-13)
    assert torch.allclose(at.score[0], score, rtol=1e-13)


def test_stacked_plugins_may_each_have_other_parameters():
    names = [(f"p{i}", f"p{(i + 3) % 12}") for i in range(12)]
    space = ParameterSpace([Parameter(f"p{i}") for i in range(12)])
    modalities = {
        f"m{i}": Gaussian(parameter_names=pair, covariance=[[1.0 + i, 0.2], [0.2, 1.0]]) for i, pair in enumerate(names)
    }
    data = {f"m{i}": [[float(i), -1.0]] for i in range(12)}
    theta = normals(1, 12, seed=6)
    at = Evidence(space, modalities, data).derivatives(theta)
    score, J = torch.zeros(12, dtype=torch.float64), torch.zeros(12, 12, dtype=torch.float64)
    for i, (m, pair) in enumerate(zip(modalities.values(), names, strict=True)):
        index = torch.tensor(space.indices(pair))
        inverse = torch.linalg.inv(m.covariance)
        score[index] += inverse @ (torch.tensor([float(i), -1.0], dtype=torch.float64) - theta[0, index])
        J[index[:, None], index] += inverse
    assert torch.allclose(at.score[0], score, rtol=1e-12)
    assert torch.allclose(at.information[0], J, rtol=1e-12)


def test_a_plugin_over_an_unknown_parameter_is_refused_by_name():
    with pytest.raises(ModalityError, match=r"plugin 'm' depends on the parameter 'z'.*a, b"):
        Evidence(
            ParameterSpace([Parameter("a"), Parameter("b")]),
            {"m": Gaussian(parameter_names=("z",), sd=1.0)},
            {"m": [[0.0]]},
        )


def test_a_theta_of_another_shape_or_with_nan_is_refused():
    evidence = Evidence(
        ParameterSpace([Parameter("a")]), {"m": Gaussian(parameter_names=("a",), sd=1.0)}, {"m": [[0.0]]}
    )
    with pytest.raises(ParameterError, match=r"shape \(\*, 1\)"):
        evidence.value(torch.zeros(4, 2))
    with pytest.raises(ParameterError, match="finite, got nan for 'a'"):
        evidence.value(torch.tensor([[math.nan]]))


@pytest.mark.parametrize("method", ["value", "derivatives"])
def test_a_theta_without_its_leading_axis_is_refused_by_every_method(method):
    space = ParameterSpace([Parameter("a")])
    evidence = Evidence(space, {"m": Gaussian(parameter_names=("a",), sd=1.0)}, {"m": [[0.0]]})
    with pytest.raises((ParameterError, ModalityError), match="shape"):
        getattr(evidence, method)(torch.zeros(1))


# ---- what must not matter


def test_every_order_of_five_plugins_gives_the_same_bits():
    modalities, data = five()
    reference = None
    for order in itertools.permutations(modalities):
        evidence = Evidence(SPACE, {n: modalities[n] for n in order}, {n: data[n] for n in reversed(order)}, prior=True)
        at = evidence.derivatives(THETA)
        found = torch.cat([evidence.value(THETA), at.value, at.score.reshape(-1), at.information.reshape(-1)])
        reference = found if reference is None else reference
        assert torch.equal(found, reference), order


def test_every_order_of_appending_gives_the_same_estimate_to_the_bit():
    modalities, data = five()
    fits = []
    for order in list(itertools.permutations(modalities))[::40]:
        fits.append(
            estimate(Evidence(SPACE, {n: modalities[n] for n in order}, {n: data[n] for n in order}, prior=True))
        )
    for fit in fits[1:]:
        assert torch.equal(fit.theta, fits[0].theta)
        assert torch.equal(fit.covariance, fits[0].covariance)


def close(a, b, rtol=1e-12):
    """Equal to 1e-12 of the sizes that were added up."""
    for x, y in ((a.value, b.value), (a.score, b.score), (a.information, b.information)):
        assert (x - y).abs().max() <= rtol * torch.maximum(x.abs().max(), y.abs().max())


def test_permuted_observations_and_other_blocks_agree_to_1e_12():
    modalities, data = five()
    reference = Evidence(SPACE, modalities, data).derivatives(THETA)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        shuffled = {
            n: torch.as_tensor(x, dtype=torch.float64)[torch.randperm(len(x), generator=generator)]
            for n, x in data.items()
        }
        close(Evidence(SPACE, modalities, shuffled).derivatives(THETA), reference)
    for block in (1, 7, 64, 350, 10_000):
        evidence = Evidence(SPACE, modalities, data, block=block)
        close(evidence.derivatives(THETA), reference)
        assert torch.allclose(evidence.value(THETA), reference.value, rtol=1e-12)


@pytest.fixture(scope="module")
def many():
    """1e5 observations of a line with heavy tails."""
    modality = StudentT(
        lambda t, z: t[..., :1] + t[..., 1:] * z,
        parameter_names=("b", "c"),
        scale=0.3,
        df=4.0,
        inputs={"z": [0.0, 1.0]},
        event_shape=(2,),
    )
    return modality, normals(100_000, 2, seed=8) + 1e3


def test_a_hundred_thousand_observations_agree_over_orders_blocks_and_stores(many, tmp_path):
    modality, x = many
    theta = torch.tensor([[0.0, 999.0, 1.5]], dtype=torch.float64)
    reference = Evidence(SPACE, {"m": modality}, {"m": x}).derivatives(theta)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(9))]
    close(Evidence(SPACE, {"m": modality}, {"m": shuffled}).derivatives(theta), reference)
    for block in (333, 100_000):
        close(Evidence(SPACE, {"m": modality}, {"m": x}, block=block).derivatives(theta), reference)
    group = zarr.open_group(tmp_path / "data.zarr", mode="w")
    group.create_array("m", data=x.numpy(), chunks=(7_001, 2))
    for stored in (group, tmp_path / "data.zarr", {"m": group["m"]}):
        evidence = Evidence(SPACE, {"m": modality}, stored)
        at = evidence.derivatives(theta)
        assert torch.equal(at.value, reference.value)
        assert torch.equal(at.score, reference.score)
        assert torch.equal(at.information, reference.information)
        assert evidence.observations.lengths == {"m": 100_000}


def test_the_sum_of_a_hundred_thousand_terms_is_exact_to_its_last_digits(many):
    """math.fsum of the very same scalars is the correctly rounded sum."""
    modality, x = many
    theta = torch.tensor([[0.0, 999.0, 1.5]], dtype=torch.float64)
    exact = math.fsum(modality(x, theta[:, 1:]).tolist())
    assert float(Evidence(SPACE, {"m": modality}, {"m": x}).value(theta)) == pytest.approx(exact, rel=2e-15)


def test_small_contributions_beside_a_huge_one_are_not_lost():
    """1 nat at a time beside ±1e16: a plain running sum in blocks loses them all."""

    class Plain(Modality):
        def __init__(self):
            super().__init__(parameter_names=("b",), event_shape=())

        def log_evidence(self, x, theta):
            return x + 0.0 * theta[..., 0]

    x = torch.cat([torch.tensor([1e16]), torch.ones(1000), torch.tensor([-1e16])]).double()
    evidence = Evidence(SPACE, {"m": Plain()}, {"m": x}, block=1)
    assert float(evidence.value(THETA[:1])) == 1000.0


def test_changing_the_caller_s_array_afterwards_changes_nothing():
    """The hash that an estimate carries must be that of the data it was made from."""
    for x in (torch.ones(3, 1, dtype=torch.float64), np.ones((3, 1)), torch.ones(3, 1)):
        evidence = Evidence(SPACE, {"m": Gaussian(parameter_names=("b",), sd=1.0)}, {"m": x})
        before = evidence.value(THETA)
        x += 1.0
        assert torch.equal(evidence.value(THETA), before)


@pytest.mark.parametrize("n", [8, 20])
def test_stacked_plugins_are_those_evaluated_one_by_one(n):
    """At least eight of one class and shape go through vmap; block= keeps them apart."""
    families = {
        "gauss": lambda i: Gaussian(parameter_names=("mu", "c"), covariance=[[1.0 + i, 0.3], [0.3, 2.0]]),
        "counts": lambda i: PoissonCounts(
            signal=[5.0 + i, 2.0], background=[40.0, 30.0], normalisation={"b": {"background": (0.8, 1.1 + 0.01 * i)}}
        ),
        "t": lambda i: StudentT(parameter_names=("c",), scale=1.0 + 0.1 * i, df=3.0 + i),
        "aux": lambda i: Constraint(("b", "c"), sd=[1.0 + i, 2.0]),
    }
    sizes = {"gauss": 2, "counts": 2, "t": 1, "aux": 2}
    modalities = {f"{f} {i:02}": make(i) for f, make in families.items() for i in range(n)}
    data = {}
    for k, name in enumerate(modalities):
        x = normals(5 if "aux" not in name else 1, sizes[name.split()[0]], seed=100 + k)
        data[name] = (50 + 5 * x).round().clamp_min(0) if "counts" in name else x
    stacked, single = Evidence(SPACE, modalities, data), Evidence(SPACE, modalities, data, block=4096)
    assert len(stacked._terms) < len(single._terms)
    close(stacked.derivatives(THETA), single.derivatives(THETA), rtol=1e-13)
    assert torch.allclose(stacked.value(THETA), single.value(THETA), rtol=1e-13)
    one, two = (e.contributions(THETA[0]) for e in (stacked, single))
    for name in modalities:
        assert one[name].log_evidence == pytest.approx(two[name].log_evidence, rel=1e-12)
        assert torch.allclose(one[name].information, two[name].information, rtol=1e-12, atol=1e-14)


def test_stacked_plugins_give_the_same_bits_in_every_order():
    modalities = {f"t{i}": StudentT(parameter_names=("c",), scale=1.0 + 0.1 * i, df=3.0 + i) for i in range(12)}
    data = {n: normals(6, 1, seed=i) for i, n in enumerate(modalities)}
    reference = Evidence(SPACE, modalities, data).derivatives(THETA)
    order = np.random.default_rng(0)
    for _ in range(10):
        names = order.permutation(list(modalities)).tolist()
        at = Evidence(SPACE, {n: modalities[n] for n in names}, {n: data[n] for n in names}).derivatives(THETA)
        assert torch.equal(at.value, reference.value)
        assert torch.equal(at.score, reference.score)
        assert torch.equal(at.information, reference.information)


class Network(Modality):
    """A small smooth network of (x, θ), as a learned scalar is."""

    def __init__(self, width=64):
        super().__init__(parameter_names=("b", "c"), event_shape=(16,))
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(18, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def log_evidence(self, x, theta):
        batch = torch.broadcast_shapes(x.shape[:-1], theta.shape[:-1])
        joined = torch.cat([x.expand(*batch, 16), theta.expand(*batch, 2)], -1)
        return self.layers(joined)[..., 0]


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        return Network()


def test_one_thread_and_two_give_the_same_bits(network, many):
    modality, x = many
    modalities, data = five()
    modalities |= {
        "network": network,
        "many": modality,
        "wide": Gaussian(
            lambda t: t.sin().expand(*t.shape[:-1], 512), parameter_names=("c",), sd=1.0, event_shape=(512,)
        ),
    }
    data |= {"network": normals(6_000, 16, seed=11), "many": x[:20_000], "wide": normals(3_000, 512, seed=12)}
    evidence = Evidence(SPACE, modalities, data)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for theta in (THETA, THETA[:1]):
                at = evidence.derivatives(theta)
                found.append(
                    torch.cat([evidence.value(theta), at.value, at.score.reshape(-1), at.information.reshape(-1)])
                )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


# ---- float32


def test_a_float32_network_is_evaluated_in_float32_and_summed_in_float64(network):
    x = normals(5_000, 16, seed=13)
    evidence = Evidence(SPACE, {"network": network}, {"network": x})
    seen = []
    network.layers.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    at = evidence.derivatives(THETA)
    assert set(seen) == {torch.float32}
    assert at.value.dtype == at.score.dtype == at.information.dtype == torch.float64
    exact = math.fsum(network(x.float(), THETA[0, 1:].float()).double().tolist())
    assert float(evidence.value(THETA[:1])) == pytest.approx(exact, rel=1e-7)
    # the same weights in float64 say how far float32 is off: 1e-5 of the sizes that were added
    wide = Network().double()
    wide.load_state_dict({k: v.double() for k, v in network.state_dict().items()})
    reference = Evidence(SPACE, {"network": wide}, {"network": x}).derivatives(THETA)
    close(at, reference, rtol=1e-5)
    assert float((at.value - reference.value).abs().max()) < 1e3 * float(at.resolution.max())


def test_the_same_float32_bits_come_from_other_blocks_to_1e_6(network):
    x = normals(5_000, 16, seed=13)
    reference = Evidence(SPACE, {"network": network}, {"network": x}).derivatives(THETA)
    close(Evidence(SPACE, {"network": network}, {"network": x}, block=97).derivatives(THETA), reference, rtol=1e-6)


# ---- −∞


def test_an_impossible_theta_gives_minus_infinity_and_leaves_the_others_alone():
    modalities, data = five()
    evidence = Evidence(SPACE, modalities, data)
    bad = torch.tensor([[-8.0, 0.0, 0.0]], dtype=torch.float64)  # a negative rate
    theta = torch.cat([THETA, bad])
    at = evidence.derivatives(theta)
    assert at.value[3] == -math.inf
    assert evidence.value(theta)[3] == -math.inf
    reference = evidence.derivatives(THETA)
    assert torch.equal(at.value[:3], reference.value)
    assert torch.equal(at.score[:3], reference.score)


def test_one_impossible_observation_in_any_block_makes_the_sum_minus_infinity():
    """Compensated sums must not turn ∞ − ∞ into NaN."""
    modality = PoissonCounts(signal=[1.0], background=[0.0])
    x = torch.zeros(50, 1)
    for place in (0, 25, 49):
        y = x.clone()
        y[place] = 3.0
        y[(place + 10) % 50] = 2.0
        for block in (1, 10, None):
            evidence = Evidence(
                ParameterSpace([Parameter("mu", bounds=(0.0, 9.0))]), {"m": modality}, {"m": y}, block=block
            )
            assert evidence.value(torch.tensor([[0.0]])).tolist() == [-math.inf]
            assert evidence.derivatives(torch.tensor([[0.0]])).value.tolist() == [-math.inf]


def test_outside_a_bound_the_prior_is_minus_infinity():
    modalities, data = five()
    theta = torch.tensor([[0.7, 0.3, 4.5]], dtype=torch.float64)
    assert Evidence(SPACE, modalities, data, prior=True).value(theta).tolist() == [-math.inf]
    assert math.isfinite(float(Evidence(SPACE, modalities, data).value(theta)))


# ---- parts


@pytest.mark.parametrize("prior", [False, True])
def test_contributions_add_up_to_the_sum(prior):
    modalities, data = five()
    evidence = Evidence(SPACE, modalities, data, prior=prior)
    parts, at = evidence.contributions(THETA[0]), evidence.derivatives(THETA[:1])
    assert set(parts) == {*modalities, *(["prior"] if prior else [])}
    assert math.fsum(p.log_evidence for p in parts.values()) == pytest.approx(float(at.value), rel=1e-13)
    assert torch.allclose(torch.stack([p.score for p in parts.values()]).sum(0), at.score[0], rtol=1e-12)
    assert torch.allclose(torch.stack([p.information for p in parts.values()]).sum(0), at.information[0], rtol=1e-12)
    assert parts["labels"].observations == 333
    assert parts["aux"].information[0].tolist() == [0.0, 0.0, 0.0]  # it says nothing about mu
    assert float(parts["aux"].information[1, 1]) == pytest.approx(0.7**-2, rel=1e-12)
    for name, modality in modalities.items():
        alone = Evidence(SPACE, {name: modality}, {name: data[name]}).derivatives(THETA[:1])
        assert parts[name].log_evidence == pytest.approx(float(alone.value), rel=1e-14)


def test_scores_of_single_observations_add_up_to_the_score():
    modalities, data = five()
    evidence = Evidence(SPACE, modalities, data)
    scores = evidence.scores(THETA[0])
    assert {n: tuple(u.shape) for n, u in scores.items()} == {n: (len(data[n]), 3) for n in modalities}
    total = torch.stack([u.sum(0) for u in scores.values()]).sum(0)
    assert torch.allclose(total, evidence.derivatives(THETA[:1]).score[0], rtol=1e-11)
    assert torch.allclose(
        scores["aux"], torch.tensor([[0.0, (0.2 - 0.3) / 0.49, 0.0]], dtype=torch.float64), rtol=1e-12
    )


# ---- torch's own state


def test_nothing_global_is_changed(network, many):
    modality, x = many
    modalities, data = five()
    modalities |= {"network": network, "many": modality, "simulated": Simulated()}
    data |= {"network": normals(50, 16, seed=11), "many": x[:5000], "simulated": normals(20, seed=14)}
    state = torch.random.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002 (the global state is the point)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    fit = estimate(Evidence(SPACE, modalities, data, prior=True))
    assert fit.converged
    fit.intervals(["b"])
    Evidence(SPACE, {"s": Simulated()}, {"s": normals(20, seed=14)}).expected_information(THETA[0])
    SPACE.sample_prior(10)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in network.parameters())
    assert all(p.requires_grad for p in network.parameters())


class Simulated(Modality):
    """x ~ N(tanh b + c, 1), with a simulator that uses the generator it is given."""

    def __init__(self):
        super().__init__(parameter_names=("b", "c"), event_shape=())

    def log_evidence(self, x, theta):
        return -0.5 * (x - torch.tanh(theta[..., 0]) - theta[..., 1]) ** 2

    def simulate(self, theta, generator=None):
        mean = torch.tanh(theta[..., 0]) + theta[..., 1]
        return mean + torch.randn(mean.shape, generator=generator, dtype=mean.dtype)


def test_the_thread_count_is_restored_after_an_error():
    def broken(theta):
        raise RuntimeError("off")

    evidence = Evidence(
        SPACE, {"m": Gaussian(broken, parameter_names=("b",), sd=1.0, event_shape=(1,))}, {"m": [[0.0]]}
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ModalityError):
            evidence.derivatives(THETA)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_derivatives_and_estimates_are_the_same_where_the_caller_switched_gradients_off(context):
    modalities, data = five()
    evidence = Evidence(SPACE, modalities, data, prior=True)
    reference, fit = evidence.derivatives(THETA), estimate(evidence)
    with context():
        at, again = evidence.derivatives(THETA), estimate(evidence)
        assert not torch.is_grad_enabled()
    assert torch.equal(at.score, reference.score)
    assert torch.equal(at.information, reference.information)
    assert torch.equal(again.theta, fit.theta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_dtype_of_the_caller_changes_nothing(dtype):
    modalities, data = five()
    reference = estimate(Evidence(SPACE, modalities, data, prior=True))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        modalities, data = five()
        data = {n: torch.as_tensor(x, dtype=torch.float64) for n, x in data.items()}
        fit = estimate(Evidence(SPACE, modalities, data, prior=True))
    finally:
        torch.set_default_dtype(before)
    assert fit.theta.dtype == torch.float64
    assert torch.allclose(fit.theta, reference.theta, rtol=1e-9)
