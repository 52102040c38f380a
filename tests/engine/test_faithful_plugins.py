"""Plugins that do not keep their word are named at the estimate, before a plausible number comes out."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributions import Beta, Gamma, Normal, Uniform

from engine import Evidence, Modality, ModalityError, Parameter, ParameterSpace, Registry
from engine.estimate import estimate
from examples.cosmology import build
from modalities import Constraint, Gaussian, PoissonCounts


class Scored(Modality):
    """−(x − a)²/2 as some function of it makes it."""

    def __init__(self, parameter_names=("a",), how=None):
        super().__init__(parameter_names=parameter_names, event_shape=())
        self.how = how

    def log_evidence(self, x, theta):
        return self.how(x, theta[..., 0])


def square(x, a):
    return -0.5 * (x - a) ** 2


def edits_x(x, a):
    return square(x.sub_(1.0), a)


def leaves(x, a):
    raise SystemExit(0)


FAITHLESS = {
    "edits its data": (edits_x, "changed its data in place"),
    "half detached": (lambda x, a: square(x, a) + square(x, a.detach()), "derivatives disagree along 'a'"),
    "summed and expanded": (lambda x, a: square(x, a).sum(-1, keepdim=True) + 0 * x, "alone and by"),
    "running sum": (lambda x, a: square(x, a).cumsum(-1), "alone and by"),
    "divided by the batch": (lambda x, a: square(x, a) / x.shape[-1], "alone and by"),
    "leaves the program": (leaves, "raised SystemExit"),
}


@pytest.mark.parametrize(("how", "words"), FAITHLESS.values(), ids=FAITHLESS)
def test_a_faithless_plugin_is_named(how, words):
    space = ParameterSpace([Parameter("a", Uniform(-5.0, 5.0))])
    with pytest.raises(ModalityError, match=words) as error:
        estimate(Evidence(space, {"cal": Scored(how=how)}, {"cal": [1.0, 2.0, 3.0]}))
    assert "'cal'" in str(error.value)


def test_a_faithful_plugin_is_left_in_peace():
    space = ParameterSpace([Parameter("a", Uniform(-5.0, 5.0))])
    fit = estimate(Evidence(space, {"cal": Scored(how=square)}, {"cal": [1.0, 2.0, 3.0]}))
    assert fit.converged
    assert fit["a"].error == pytest.approx(3**-0.5)


def test_at_a_kink_the_estimate_says_so_and_the_profile_takes_the_better_side():
    """A one-sided histosys on Asimov data; ends by scipy: minimise over α on either side, brentq in μ."""
    signal, background = [5.0, 10.0], [50.0, 60.0]
    space = ParameterSpace([Parameter("mu", Uniform(-10.0, 10.0)), Parameter("al", Normal(0.0, 1.0))])
    channel = PoissonCounts(
        signal=signal, background=background, shape={"al": {"background": (background, [60.0, 72.0])}}
    )
    data = {"channel": [[55.0, 70.0]], "aux": [[0.0]]}
    fit = estimate(Evidence(space, {"channel": channel, "aux": Constraint("al")}, data))
    assert "kink along 'al'" in fit.reason
    assert tuple(fit.interval("mu", level=0.682689492137)) == pytest.approx((-0.4430, 1.7519), abs=2e-4)


@pytest.mark.parametrize("polish", [1, 8])
def test_a_curved_ridge_is_not_identified_from_every_start(polish):
    """Baryon acoustic oscillations see H0 · rd only: no start may end with an error for either."""
    modality, x = build.probes()["bao"]
    evidence = Evidence(ParameterSpace(build.parameters()), {"bao": modality}, {"bao": x})
    for seed in range(12):
        fit = estimate(evidence, seed=seed, polish=polish)
        assert fit.status == "not_identified"
        assert (fit["H0"].error, fit["rd"].error, len(fit.null_directions)) == (math.inf, math.inf, 2)
        assert fit["Om"].error == pytest.approx(0.01455, rel=0.01)


@pytest.mark.parametrize(
    ("prior", "mode"), [(Beta(1.0, 3.0), 0.0), (Gamma(1.0, 2.0), 0.0), (Gamma(2.0, 3.0), 0.323293)]
)
def test_the_posterior_mode_under_beta_and_gamma_priors_is_found_at_the_bound_and_inside(prior, mode):
    """Mode of log N(0.3; m, 0.5) + log prior; inside for Gamma(2, 3): (0.3 − m)/0.25 + 1/m − 3 = 0."""
    space = ParameterSpace([Parameter("m", prior)])
    fit = estimate(Evidence(space, {"c": Constraint("m", sd=0.5)}, {"c": [[0.3]]}, prior=True))
    assert fit.converged
    assert fit["m"].value == pytest.approx(mode, abs=1e-6)
    assert fit.status == ("at_bound" if mode == 0.0 else "converged")
    assert "both count" in fit.reason


def test_a_flat_prior_and_an_error_of_1e9_have_a_profile_interval():
    space = ParameterSpace([Parameter("a")])
    fit = estimate(Evidence(space, {"g": Gaussian(parameter_names=("a",), sd=1e9)}, {"g": [[2e9]]}))
    assert tuple(fit.interval("a", level=0.682689492137)) == pytest.approx((1e9, 3e9), rel=1e-5)


def test_a_package_in_the_workspace_cannot_pass_for_an_installed_one(tmp_path):
    """With the workspace as current folder, its own ``modalities`` would be imported first."""
    registry = Registry.create(tmp_path / "w", [Parameter("a")])
    registry.append("c", Constraint("a"), observations=[[0.0]])
    (tmp_path / "w" / "modalities").mkdir()
    (tmp_path / "w" / "modalities" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    engine = Path(sys.modules["engine"].__file__).parents[1]
    script = f"import sys; sys.path.append({str(engine)!r})\nfrom engine import Registry\nRegistry.open('.').estimate()"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "w", capture_output=True, text=True, check=False
    )
    assert "UntrustedError" in done.stderr
    assert not (tmp_path / "ran").exists()
