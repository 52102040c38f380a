"""Four models of posteriordb as plugins: their log densities, and means and deviations of their reference draws."""

import json

import pyro
import pytest
import torch
from pyro.distributions import Bernoulli, Normal
from torch.distributions import Beta, HalfCauchy, HalfNormal, Uniform
from torch.distributions import Normal as NormalPrior

from engine import Linear, Parameter, Registry
from modalities import Gaussian, PyroModel

F64 = torch.float64
CASES = {
    "eight schools": "eight_schools-eight_schools_noncentered",
    "kids": "kidiq-kidscore_momiq",
    "earnings": "earnings-logearn_height",
    "mixture": "low_dim_gauss_mix-low_dim_gauss_mix",
}
CLUSTERS = ("mu[1]", "mu[2]", "sigma[1]", "sigma[2]", "theta")


@pytest.fixture(scope="module")
def posteriordb(shared_data):
    folder = shared_data / "posteriordb"
    if not (folder / "references.json").is_file():
        pytest.skip(f"no reference posteriors in {folder}; set EVIDENCE_SHARED_DATA to the folder that has them")
    references = json.loads((folder / "references.json").read_text())["cases"]
    return {
        name: (json.loads((folder / case / "data.json").read_text()), references[case]) for name, case in CASES.items()
    }


# ---- the models


def school(theta, x, sd):
    """The school's effect is a latent; not centred, so that τ → 0 is nothing special."""
    z = pyro.sample("z", Normal(0.0, 1.0))
    pyro.sample("y", Normal(theta["mu"] + theta["tau"] * z, sd), obs=x)


def excess(theta):
    return theta[..., :1] - theta[..., 1:2]


def spread(theta):
    return theta[..., 2:3]


def line(theta, predictor):
    return theta[..., :1] + theta[..., 1:2] * predictor


def noise(theta, predictor):
    return theta[..., 2:3] + 0.0 * predictor


def earners(theta, x, height):
    with pyro.plate("earners", len(height)):
        pyro.sample("y", Normal(theta["beta[1]"] + theta["beta[2]"] * height, theta["sigma"]), obs=x)


def cluster(theta, x):
    """Which of two the point belongs to is a latent, and summed."""
    second = pyro.sample("second", Bernoulli(1.0 - theta["theta"])) == 1.0
    centre = torch.where(second, theta["mu[2]"], theta["mu[1]"])
    width = torch.where(second, theta["sigma[2]"], theta["sigma[1]"])
    pyro.sample("y", Normal(centre, width), obs=x)


def schools_integrated(data, folder, **kwargs):
    parameters = [Parameter("mu", NormalPrior(0.0, 5.0)), Parameter("tau", HalfCauchy(5.0))]
    registry = Registry.create(folder / "schools", parameters=parameters)
    for j, sd in enumerate(data["sigma"]):
        registry.append(f"school_{j}", PyroModel(school, parameter_names=("mu", "tau"), inputs={"sd": sd}, **kwargs))
    return registry, {f"school_{j}": torch.tensor([y], dtype=F64) for j, y in enumerate(data["y"])}


def schools_explicit(data, folder):
    """The eight effects are parameters; that they are draws of N(μ, τ) is a plugin each, whose datum is 0."""
    effects = [f"theta[{j + 1}]" for j in range(8)]
    parameters = [Parameter(name, bounds=(-200.0, 200.0)) for name in effects]
    parameters += [Parameter("mu", NormalPrior(0.0, 5.0)), Parameter("tau", HalfCauchy(5.0))]
    registry = Registry.create(folder / "effects", parameters=parameters)
    observed = {}
    for j, name in enumerate(effects):
        registry.append(f"school_{j}", Gaussian(parameter_names=(name,), sd=data["sigma"][j], event_shape=()))
        drawn = Gaussian(excess, parameter_names=(name, "mu", "tau"), sd=spread, event_shape=())
        registry.append(f"effect_{j}", drawn)
        observed |= {f"school_{j}": torch.tensor([data["y"][j]]), f"effect_{j}": torch.zeros(1)}
    return registry, observed


def kids(data, folder):
    flat = {"beta[1]": Uniform(-100.0, 150.0), "beta[2]": Uniform(-2.0, 3.0), "sigma": HalfCauchy(2.5)}
    registry = Registry.create(folder / "kids", parameters=[Parameter(n, prior) for n, prior in flat.items()])
    inputs = {"predictor": data["mom_iq"]}
    kids = Gaussian(line, parameter_names=tuple(flat), sd=noise, inputs=inputs, event_shape=(data["N"],))
    registry.append("kids", kids)
    return registry, {"kids": torch.tensor([data["kid_score"]], dtype=F64)}


def earnings(data, folder):
    flat = {"beta[1]": Uniform(-10.0, 20.0), "beta[2]": Uniform(-0.2, 0.3), "sigma": Uniform(0.0, 10.0)}
    registry = Registry.create(folder / "earnings", parameters=[Parameter(n, prior) for n, prior in flat.items()])
    model = PyroModel(earners, parameter_names=tuple(flat), event_shape=(data["N"],), inputs={"height": data["height"]})
    registry.append("earners", model)
    return registry, {"earners": torch.tensor([data["earn"]], dtype=F64).log()}


def mixture(data, folder, ordered=True):
    priors = [NormalPrior(0.0, 2.0), NormalPrior(0.0, 2.0), HalfNormal(2.0), HalfNormal(2.0), Beta(5.0, 5.0)]
    registry = Registry.create(
        folder / "mixture",
        parameters=[Parameter(name, prior) for name, prior in zip(CLUSTERS, priors, strict=True)],
        constraints=[Linear({"mu[2]": 1, "mu[1]": -1}, lower=0.0)] if ordered else [],
    )
    registry.append("points", PyroModel(cluster, parameter_names=CLUSTERS))
    return registry, {"points": torch.tensor(data["y"], dtype=F64)}


# ---- log densities


@pytest.mark.parametrize(
    ("case", "build", "plugins", "prior"),
    [
        ("eight schools", schools_explicit, [f"school_{j}" for j in range(8)], True),
        ("kids", kids, ["kids"], True),
        ("earnings", earnings, ["earners"], False),
        ("mixture", mixture, ["points"], True),
    ],
)
def test_log_densities_are_those_of_the_references(posteriordb, tmp_path, case, build, plugins, prior):
    data, reference = posteriordb[case]
    registry, observed = build(data, tmp_path)
    names = registry.parameters.names
    points = torch.tensor([[p["point"][n] for n in names] for p in reference["logp_at_points"]], dtype=F64)
    for name in plugins:
        expected = [p["modules"][name] for p in reference["logp_at_points"]]
        found = registry.log_evidence({name: observed[name]}, points)
        assert found.tolist() == pytest.approx(expected, abs=1e-7, rel=1e-9)
    if prior:  # up to what a flat or an ordered prior is normalised by
        rest = registry.parameters.log_prior(points)
        if linked := {n: x for n, x in observed.items() if n not in plugins}:
            rest = rest + registry.log_evidence(linked, points)
        expected = torch.tensor([p["modules"]["prior"] for p in reference["logp_at_points"]], dtype=F64)
        assert (rest - rest[0]).tolist() == pytest.approx((expected - expected[0]).tolist(), abs=1e-6)


def test_the_schools_integrated_by_pyro_are_those_integrated_by_hand(posteriordb, tmp_path):
    """N(y | μ, √(τ² + σ²)): exactly by Laplace's approximation, within its error by importance sampling."""
    data, _ = posteriordb["eight schools"]
    theta = torch.tensor([[4.4, 3.6], [-1.0, 0.01], [8.0, 20.0]], dtype=F64)
    sd = (theta[:, 1:] ** 2 + torch.tensor(data["sigma"], dtype=F64) ** 2).sqrt()
    expected = torch.distributions.Normal(theta[:, :1], sd).log_prob(torch.tensor(data["y"], dtype=F64)).sum(-1)
    registry, observed = schools_integrated(data, tmp_path, latents="laplace")
    assert registry.log_evidence(observed, theta).tolist() == pytest.approx(expected.tolist(), abs=1e-8)
    registry, observed = schools_integrated(data, tmp_path / "drawn", samples=2000)
    errors = torch.stack([registry.modality(name).standard_error(x, theta) for name, x in observed.items()])
    gap = registry.log_evidence(observed, theta) - expected
    assert bool((gap.abs() < 4 * errors.square().sum(0).sqrt()).all())
    assert float(errors.max()) < 0.02


# ---- posteriors


def assert_agrees(mean, sd, reference, name):
    """Means within 0.1 and deviations within 5 % of the reference draws' deviation."""
    assert abs(float(mean) - reference["mean"][name]) < 0.1 * reference["sd"][name], name
    assert float(sd) == pytest.approx(reference["sd"][name], rel=0.05), name


def assert_posterior(post, reference, names=None):
    for name in names or post.parameters.names:
        assert_agrees(post.mean[name], post.sd[name], reference, name)


def ask(build, posteriordb, folder, case, method, draws=2000, **kwargs):
    data, reference = posteriordb[case]
    registry, observed = build(data, folder, **kwargs)
    return registry.posterior(observed, method=method, draws=draws, seed=0, progress=False), data, reference


@pytest.mark.parametrize(("case", "build"), [("kids", kids), ("earnings", earnings)])
def test_regressions_have_the_moments_of_the_reference_draws(posteriordb, tmp_path, case, build):
    post, _, reference = ask(build, posteriordb, tmp_path, case, "importance")
    assert post.status == "converged"
    assert_posterior(post, reference)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["laplace", "grid", "auto"])  # chains take ten minutes to know an sd to 5 %
@pytest.mark.parametrize(("case", "build"), [("kids", kids), ("earnings", earnings)])
def test_regressions_have_the_moments_of_the_reference_draws_by_every_method(
    posteriordb, tmp_path, case, build, method
):
    post, _, reference = ask(build, posteriordb, tmp_path, case, method, draws=1000)
    assert_posterior(post, reference)


def assert_schools(post, data, reference):
    """μ and τ, and of the effects what the law of total variance says: each is normal given μ and τ."""
    assert_posterior(post, reference)
    mu, tau = (torch.as_tensor(post.draws[name], dtype=F64).reshape(-1) for name in ("mu", "tau"))
    for j, (y, sd) in enumerate(zip(data["y"], data["sigma"], strict=True)):
        share = tau**2 / (tau**2 + sd**2)
        mean, variance = mu + share * (y - mu), share * sd**2
        assert_agrees(mean.mean(), (mean.var() + variance.mean()).sqrt(), reference, f"theta[{j + 1}]")


def test_eight_schools_with_their_effects_integrated_have_the_moments_of_the_reference_draws(posteriordb, tmp_path):
    post, data, reference = ask(
        schools_integrated, posteriordb, tmp_path, "eight schools", "grid", draws=4000, latents="laplace"
    )
    assert post.status == "converged"
    assert_schools(post, data, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "latents"), [("importance", "laplace"), ("importance", "importance")])
def test_eight_schools_have_the_moments_of_the_reference_draws_by_other_methods(posteriordb, tmp_path, method, latents):
    post, data, reference = ask(
        schools_integrated, posteriordb, tmp_path, "eight schools", method, latents=latents, samples=64
    )
    assert_schools(post, data, reference)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["importance", "laplace", "auto"])
def test_the_ordered_mixture_has_the_moments_of_the_reference_draws(posteriordb, tmp_path, method):
    post, _, reference = ask(mixture, posteriordb, tmp_path, "mixture", method, draws=1000)
    assert_posterior(post, reference)


@pytest.mark.slow
def test_the_mixture_without_an_order_has_both_of_its_modes(posteriordb, tmp_path):
    """Half of the mass each; put into order, its draws are those of the reference."""
    post, _, reference = ask(mixture, posteriordb, tmp_path, "mixture", "importance", ordered=False)
    draws = {name: torch.as_tensor(post.draws[name], dtype=F64).reshape(-1) for name in CLUSTERS}
    swapped = draws["mu[1]"] > draws["mu[2]"]
    assert float(swapped.to(F64).mean()) == pytest.approx(0.5, abs=0.06)
    theta = torch.where(swapped, 1.0 - draws["theta"], draws["theta"])
    assert_agrees(theta.mean(), theta.std(), reference, "theta")
    for kind in ("mu", "sigma"):
        first, second = draws[f"{kind}[1]"], draws[f"{kind}[2]"]
        for name, value in (
            (f"{kind}[1]", torch.where(swapped, second, first)),
            (f"{kind}[2]", torch.where(swapped, first, second)),
        ):
            assert_agrees(value.mean(), value.std(), reference, name)
