"""Estimators of sbi's as modalities: the same numbers as sbi's own, from a folder without pickle too."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, Uniform

from engine.errors import ModalityError, RegistryError, UntrustedError
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from engine.plugin import read_plugin, write_plugin
from modalities import SbiEstimator, from_sbi
from modalities._skeleton import build_network, describe_network

sbi = pytest.importorskip("sbi.neural_nets")
pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.filterwarnings("ignore::UserWarning:sbi")]
PRIOR = [Parameter("a", Uniform(0.0, 1.0)), Parameter("b", Normal(0.0, 2.0))]
THETA = torch.stack([torch.linspace(0.05, 0.95, 60), torch.linspace(-3.0, 3.0, 60)[torch.randperm(60)]], -1)
X = 5.0 + 3.0 * torch.randn(60, 3)
MIXED = torch.cat([X, torch.arange(60).remainder(3)[:, None].float()], -1)


def log_pi(theta):
    return Normal(0.0, 2.0).log_prob(theta[:, 1])


CASES = {
    **{name: ("likelihood", name, X) for name in ("maf", "nsf", "mdn", "zuko_maf", "zuko_nsf")},
    "mnle": ("likelihood", "mnle", MIXED),
    "resnet": ("ratio", "resnet", X),
    "mlp": ("ratio", "mlp", X),
    "npe": ("posterior", "maf", X),
    "npe mdn": ("posterior", "mdn", X),
}


def built(kind, name, x, **options):
    build = {"likelihood": sbi.likelihood_nn, "ratio": sbi.classifier_nn, "posterior": sbi.posterior_nn}[kind]
    if name in ("maf", "nsf"):
        options |= {"num_transforms": 2}
    estimator = build(name, hidden_features=10, **options)(THETA, x)
    with torch.no_grad():  # as far from its initial values as training would bring it
        for weight in estimator.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return estimator.eval()


@pytest.mark.parametrize("case", CASES)
def test_it_scores_as_sbi_does_before_and_after_a_folder(case, tmp_path):
    kind, name, x = CASES[case]
    estimator = built(kind, name, x)
    with torch.no_grad():
        if kind == "likelihood":
            expected = estimator.log_prob(x[None], condition=THETA)[0]
        elif kind == "ratio":
            expected = estimator.unnormalized_log_ratio(THETA, x)
        else:
            expected = estimator.log_prob(THETA[None], condition=x)[0] - log_pi(THETA)
        modality = from_sbi(estimator, PRIOR)
        assert (modality.kind, modality.normalised) == (kind, kind == "likelihood")
        torch.testing.assert_close(modality(x, THETA), expected, rtol=1e-6, atol=1e-6)
        write_plugin(tmp_path / "p", modality)
        again = read_plugin(tmp_path / "p")
        assert torch.equal(again(x, THETA), modality(x, THETA))
        grid = again(x[:4], THETA[:3, None])
        torch.testing.assert_close(grid[2, 1], modality(x[1], THETA[2]), rtol=1e-4, atol=1e-4)
    assert again.training_prior == ParameterSpace(PRIOR)


def test_a_posterior_in_unconstrained_coordinates_is_kept_too(tmp_path):
    """torch's own transforms are then part of the network."""
    box = Independent(Uniform(torch.tensor([-0.1, -4.0]), torch.tensor([1.1, 4.0])), 1)
    for name in ("zuko_maf", "mdn"):
        estimator = built("posterior", name, X, z_score_theta="transform_to_unconstrained", x_dist=box)
        import pyro.distributions  # noqa: F401  (which takes torch's own __getstate__ of transforms away)

        modality = from_sbi(estimator, box, ("a", "b"))
        with torch.no_grad():
            expected = estimator.log_prob(THETA[None], condition=X)[0] + math.log(1.2 * 8.0)
            torch.testing.assert_close(modality(X, THETA), expected, rtol=1e-5, atol=1e-5)
        write_plugin(tmp_path / name, modality)
        assert torch.equal(read_plugin(tmp_path / name)(X, THETA), modality(X, THETA))


@pytest.mark.parametrize("case", ["maf", "resnet", "npe"])
def test_no_rows_are_no_error(case):
    kind, name, x = CASES[case]
    modality = from_sbi(built(kind, name, x), PRIOR, kind=kind)
    assert modality(X[:0], THETA[:0]).shape == (0,)
    assert modality(X, THETA[:0, None]).shape == (0, 60)


def test_one_number_may_be_a_scalar_observation():
    estimator = built("likelihood", "mdn", X[:, :1])
    modality = from_sbi(estimator, PRIOR, event_shape=())
    assert torch.equal(modality(X[:, 0], THETA), estimator.log_prob(X[None, :, :1], condition=THETA)[0])


def test_it_is_a_copy_that_can_be_cast_and_does_not_follow_the_estimator():
    estimator = built("likelihood", "maf", X)
    modality = from_sbi(estimator, PRIOR)
    before = modality(X, THETA).detach()
    with torch.no_grad():
        for weight in estimator.parameters():
            weight.zero_()
    assert torch.equal(modality(X, THETA).detach(), before)
    exact = copy.deepcopy(modality).double()
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact(X.double(), THETA.double()).float(), before, rtol=1e-4, atol=1e-4)


def test_a_maf_is_smooth_and_a_resnet_classifier_has_no_second_derivative():
    for kind, name, zero in (("likelihood", "maf", False), ("ratio", "resnet", True)):
        modality = from_sbi(built(kind, name, X), PRIOR)
        theta = THETA.clone().requires_grad_()
        (score,) = torch.autograd.grad(modality(X, theta).sum(), theta, create_graph=True)
        (second,) = torch.autograd.grad(score[:, 0].sum(), theta)
        assert bool((score != 0).all())
        assert bool((second == 0).all()) == zero


def test_dropout_and_batch_norm_never_make_a_score_depend_on_its_batch():
    estimator = built("likelihood", "maf", X, use_batch_norm=True, dropout_probability=0.5)
    modality = from_sbi(estimator, PRIOR).train()
    assert torch.equal(modality(X, THETA), modality(X, THETA))
    torch.testing.assert_close(modality(X[:1], THETA[:1]), modality(X, THETA)[:1])


def test_a_prior_may_be_parameters_or_distributions_with_names():
    estimator = built("likelihood", "mdn", X)
    box = Independent(Uniform(torch.tensor([0.0, -3.0]), torch.tensor([1.0, 3.0])), 1)
    modality = from_sbi(estimator, box, ("a", "b"))
    assert modality.training_prior == ParameterSpace(
        [Parameter("a", Uniform(0.0, 1.0)), Parameter("b", Uniform(-3.0, 3.0))]
    )
    assert from_sbi(estimator, [Uniform(0.0, 1.0), Normal(0.0, 2.0)], ("a", "b")).training_prior == ParameterSpace(
        PRIOR
    )
    space = ParameterSpace([*PRIOR, Parameter("c")])
    assert from_sbi(estimator, space, ("a", "b")).parameter_names == ("a", "b")


def simulator(theta, generator=None):
    return theta.sum(-1, keepdim=True) + torch.randn(*theta.shape[:-1], 3, generator=generator)


def test_a_simulator_can_go_along():
    modality = from_sbi(built("likelihood", "mdn", X), PRIOR, simulator=simulator)
    assert modality.has_simulator
    assert modality.simulate(THETA, torch.Generator().manual_seed(0)).shape == (60, 3)
    assert not from_sbi(built("likelihood", "mdn", X), PRIOR).has_simulator


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return x + self.shift


def test_a_part_of_another_package_is_named():
    estimator = built("likelihood", "maf", X, embedding_net=Own())
    with pytest.raises(ModalityError, match=r"'net\._embedding_net\.1' is or names .*:Own, which is not among"):
        from_sbi(estimator, PRIOR)
    hooked = built("likelihood", "maf", X)
    hooked.net.register_forward_hook(lambda *_: None)
    with pytest.raises(ModalityError, match="'net' has hooks"):
        from_sbi(hooked, PRIOR)
    tampered = built("likelihood", "maf", X)
    tampered.net.helper = lambda x: x
    with pytest.raises(ModalityError, match=r"'net\.helper' is or names"):
        from_sbi(tampered, PRIOR)


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        (nn.Linear(2, 3), {}, "estimator must be what sbi's train.. returns, got Linear"),
        ("same", {}, "kind must be given where it cannot be told from the shapes"),
        ("likelihood", {"parameter_names": ("a",)}, "kind must be given|must have shape"),
        ("likelihood", {"kind": "ratio"}, "kind 'ratio' needs a RatioEstimator, got MixtureDensityEstimator"),
        ("likelihood", {"event_shape": (4,)}, "event_shape must have the entries of the estimator's x, .3,., got .4,."),
        ("likelihood", {"prior": MultivariateNormal(torch.zeros(2), torch.eye(2))}, "prior must have independent"),
        ("likelihood", {"prior": Uniform(torch.zeros(2), torch.ones(2))}, "parameter_names must name the 2 components"),
        ("likelihood", {"prior": "uniform"}, "prior must be a ParameterSpace, parameters or torch distributions"),
    ],
)
def test_bad_arguments_are_refused(estimator, options, message):
    if estimator == "likelihood":
        estimator = built("likelihood", "mdn", X)
    elif estimator == "same":
        estimator = built("likelihood", "mdn", X[:, :2])
    with pytest.raises(ModalityError, match=message):
        from_sbi(estimator, options.pop("prior", PRIOR), **options)


def described():
    return describe_network(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda s: s["nodes"][0].update({"class": "os:system"}),
            UntrustedError,
            "'os:system', which is not on the list",
        ),
        (
            lambda s: s["nodes"][0].update({"class": "torch.nn.utils:parametrize"}),
            RegistryError,
            "cannot be found|no class",
        ),
        (
            lambda s: s["nodes"][0].update({"class": "torch.nn.functional:relu"}),
            UntrustedError,
            "no nn.Module|no class",
        ),
        (lambda s: s["nodes"][0].update({"class": "torch.nn:Module.__init__"}), UntrustedError, "not on the list"),
        (lambda s: s["nodes"][1]["attributes"].update(__class__=1), UntrustedError, "plain name, got '__class__'"),
        (lambda s: s["nodes"][1]["attributes"].update(_forward_hooks={}), UntrustedError, "plain name"),
        (lambda s: s["nodes"][1]["attributes"].update(f={"named": "builtins:eval"}), UntrustedError, "'builtins:eval'"),
        (
            lambda s: s["nodes"][1]["attributes"].update(
                f={"object": "torch.distributions.transforms:wraps", "attributes": {}}
            ),
            (UntrustedError, RegistryError),
            "cannot be found|no class",
        ),
        (lambda s: s["nodes"][1]["attributes"].update(f={"call": 1}), RegistryError, "must be as it is written"),
        (lambda s: s["nodes"][1]["children"].update(back=0), RegistryError, "must be a tree"),
        (lambda s: s["nodes"][1]["children"].update(back=7), RegistryError, "must be a tree of .* got module 7"),
        (
            lambda s: s["nodes"][1]["parameters"].update(w={"shape": [2], "dtype": "nn"}),
            RegistryError,
            "torch's dtypes",
        ),
        (lambda s: s.pop("nodes"), RegistryError, "must be as describe_network writes it"),
    ],
)
def test_a_skeleton_that_was_tampered_with_is_refused_and_runs_nothing(change, error, message):
    skeleton = described()
    change(skeleton)
    with pytest.raises(error, match=message):
        build_network(skeleton)


def test_a_network_described_and_built_has_the_same_tied_modules():
    inner = nn.Linear(3, 3)
    network = nn.Sequential(inner, nn.Tanh(), inner)
    again = build_network(describe_network(network))
    assert again[0] is again[2]
    again.load_state_dict(network.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(again(x), network(x))


def test_a_posterior_needs_its_prior():
    with pytest.raises(ModalityError, match="only with the prior it was trained on"):
        SbiEstimator(("a",), (2,), network=described(), kind="posterior")


def test_the_modalities_are_imported_without_sbi_zuko_and_nflows():
    code = "import sys, modalities; sys.exit(any(name in sys.modules for name in ('sbi', 'zuko', 'nflows', 'pyro')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Maximum number of epochs:UserWarning")
def test_what_sbi_s_own_training_returns_becomes_a_modality(tmp_path):
    from sbi.inference import NLE, NPE, NRE

    prior = Independent(Uniform(torch.zeros(2), torch.ones(2)), 1)
    theta = prior.sample((500,))
    x = theta.repeat(1, 2) + 0.3 * torch.randn(500, 4)
    for number, method in enumerate((NLE, NRE, NPE)):
        inference = method(prior, show_progress_bars=False)
        estimator = inference.append_simulations(theta, x).train(max_num_epochs=3)
        modality = from_sbi(estimator, prior, ("a", "b"))
        write_plugin(tmp_path / f"{number}", modality)
        again = read_plugin(tmp_path / f"{number}")
        with torch.no_grad():
            if method is NRE:
                expected = estimator.unnormalized_log_ratio(theta, x)
            elif method is NLE:
                expected = estimator.log_prob(x[None], theta)[0]
            else:
                expected = estimator.log_prob(theta[None], x)[0]
            torch.testing.assert_close(again(x, theta), expected, rtol=1e-6, atol=1e-6)
