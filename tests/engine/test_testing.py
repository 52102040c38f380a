"""The battery passes correct modalities and fails each faulty one at the check that is meant to catch it."""

import math
import random
import re

import numpy as np
import pytest
import torch
from torch import nn

from engine.errors import ContractError, ObservationError, ParameterError
from engine.modality import Modality
from engine.testing import Check, Report, check_modality
from engine.testing.case import Case
from engine.testing.hotelling import mean_is_zero

THETA = [[0.7, 1.3], [-0.4, 0.8], [1.5, -0.6]]
IDENTITIES = ("first Bartlett identity", "second Bartlett identity")


class Curved(Modality):
    """x ~ N(m(θ), sd²) in three dimensions, with m nonlinear in both components."""

    def __init__(self, sd, parameter_names=("a", "b")):
        super().__init__(parameter_names=parameter_names, event_shape=(3,))
        self.register_buffer("sd", torch.as_tensor(sd, dtype=torch.float64))

    def mean(self, theta):
        a, b = theta[..., 0], theta[..., 1]
        return torch.stack([a + 0.3 * b**2, torch.sin(b) + a, (0.3 * a).exp() * b], -1)

    def log_evidence(self, x, theta):
        return -0.5 * (((x - self.mean(theta)) / self.sd) ** 2).sum(-1)

    def simulate(self, theta, generator=None):
        mean = self.mean(theta)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + self.sd * noise

    def expected_information(self, theta):
        flat = theta.reshape(-1, 2)
        jacobian = torch.func.vmap(torch.func.jacrev(self.mean))(flat) / self.sd[:, None]
        return (jacobian.mT @ jacobian).reshape(*theta.shape[:-1], 2, 2)


class Counts(Modality):
    """n ~ Poisson(strength · signal + background)."""

    def __init__(self, signal=(5.0, 9.0, 0.5), background=(50.0, 4.0, 0.2), parameter_names=("strength",)):
        super().__init__(parameter_names=parameter_names, event_shape=(3,))
        self.register_buffer("signal", torch.as_tensor(signal, dtype=torch.float64))
        self.register_buffer("background", torch.as_tensor(background, dtype=torch.float64))

    def rate(self, theta):
        return theta * self.signal + self.background

    def log_evidence(self, x, theta):
        rate = self.rate(theta)
        return (x.xlogy(rate) - rate - torch.lgamma(x + 1)).sum(-1)

    def simulate(self, theta, generator=None):
        return torch.poisson(self.rate(theta), generator=generator)

    def expected_information(self, theta):
        return (self.signal**2 / self.rate(theta)).sum(-1)[..., None, None]


def curved(cls=Curved, **settings):
    return cls(sd=[0.5, 1.0, 2.0], **settings)


def check(modality, theta=None, **options):
    theta = (THETA if isinstance(modality, Curved) else [[0.5], [2.0]]) if theta is None else theta
    return check_modality(modality, theta, **{"save": False, "raises": False, "simulations": 4000, **options})


def failed(report):
    return [found.name for found in report.failures]


# ---- correct modalities


@pytest.mark.parametrize("modality", [curved(), Counts()], ids=["curved", "counts"])
def test_a_correct_modality_passes_every_check(modality):
    report = check(modality, simulations=20_000, raises=True)
    assert report.passed
    unsaid = ["closed form", "concave", "save and load"]
    assert [found.name for found in report.checks if found.passed is None] == unsaid


@pytest.mark.parametrize("modality", [curved(), Counts()], ids=["curved", "counts"])
def test_a_correct_modality_passes_in_float32(modality):
    modality = modality.to(torch.float32)
    report = check(modality)
    assert failed(report) == []
    assert modality.dtype == torch.float32


@pytest.mark.parametrize("modality", [curved(), Counts()], ids=["curved", "counts"])
def test_a_correct_modality_passes_with_thirty_seeds(modality):
    for seed in range(30):
        report = check(modality, simulations=1000, seed=seed)
        assert failed(report) == [], seed


def test_false_alarms_stay_below_their_nominal_rate_where_scores_are_skewed():
    # At a limit of 1 in 1000, so that 400 tests can tell; rare counts have the longest tails.
    alarms, judged = 0, 0
    for seed in range(400):
        case = Case(Counts(background=(0.3, 0.02, 0.01)), [0.02], None, 1000, seed)
        (draws,) = case.draws
        for values, floor in ((draws.u, draws.floor), (draws.outer + draws.curvature, draws.floor2)):
            if (result := mean_is_zero(values, floor, alpha=1e-3)) is not None:
                judged += 1
                alarms += result.errors > result.limit
    assert judged >= 300
    assert alarms <= 4  # P(> 4) is below 1e-3 for a mean of 0.8


class Degenerate(Curved):
    """Only a + b is identified: the covariance of the score is singular."""

    def mean(self, theta):
        total = theta.sum(-1)
        return torch.stack([total, total**2, total.sin()], -1)


class Partial(Curved):
    """One of the named parameters has no influence."""

    def mean(self, theta):
        return theta[..., :1] * theta.new_tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize("cls", [Degenerate, Partial])
def test_unidentified_directions_are_no_failure(cls):
    report = check(curved(cls))
    assert failed(report) == []
    assert all(report[name].passed for name in IDENTITIES)


class Choice(Modality):
    """A discrete parameter: the index of one of three hypotheses."""

    def __init__(self, parameter_names=("hypothesis",)):
        super().__init__(parameter_names=parameter_names)
        self.register_buffer("means", torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64))

    def log_evidence(self, x, theta):
        return -0.5 * (x - self.means[theta[..., 0].long()]) ** 2

    def simulate(self, theta, generator=None):
        mean = self.means[theta[..., 0].long()]
        return mean + torch.randn(mean.shape, generator=generator, dtype=mean.dtype)


def test_a_discrete_parameter_skips_what_needs_derivatives():
    report = check(Choice(), [[0.0], [1.0], [2.0]])
    assert failed(report) == []
    assert all(report[name].passed is None for name in ("score", "hessian", *IDENTITIES))


class Interval(Modality):
    """x uniform on (0, width): −∞ where θ makes x impossible, score not of mean zero (the support moves)."""

    def __init__(self, parameter_names=("width",)):
        super().__init__(parameter_names=parameter_names)

    def log_evidence(self, x, theta):
        width = theta[..., 0]
        return torch.where(x < width, -width.log(), -math.inf)

    def simulate(self, theta, generator=None):
        width = theta[..., 0]
        return width * torch.rand(width.shape, generator=generator, dtype=width.dtype)


def test_minus_infinity_is_a_value_and_a_moving_support_breaks_the_identities():
    report = check(Interval(), [[1.0], [3.0]])
    assert report["finite"].passed
    assert "−∞ at" in report["finite"].detail
    assert failed(report) == list(IDENTITIES)


class Linear(Modality):
    """A score that does not depend on θ: its Hessian is zero, rightly."""

    def __init__(self, parameter_names=("slope",)):
        super().__init__(parameter_names=parameter_names)

    def log_evidence(self, x, theta):
        return x * theta[..., 0]


def test_a_linear_scalar_is_fine_without_a_simulator():
    report = check(Linear(), [[0.5], [2.0]], x=[0.3, -1.0])
    assert failed(report) == []
    assert "linear" in report["hessian"].detail
    assert all(report[name].passed is None for name in IDENTITIES)


# ---- faulty modalities, and the check that catches each


class Flipped(Curved):
    def log_evidence(self, x, theta):
        return -super().log_evidence(x, theta)


def test_a_flipped_sign_passes_the_first_identity_and_fails_the_second():
    report = check(curved(Flipped))
    assert report["first Bartlett identity"].passed
    assert failed(report) == ["second Bartlett identity"]
    assert "sign" in report["second Bartlett identity"].detail


class Doubled(Curved):
    def log_evidence(self, x, theta):
        return 2 * super().log_evidence(x, theta)


def test_a_factor_two_fails_the_second_identity_and_the_information():
    report = check(curved(Doubled))
    assert report["first Bartlett identity"].passed
    assert failed(report) == ["second Bartlett identity", "expected information"]
    ratio = report["second Bartlett identity"].detail.split("E[u uᵀ] is ")[1].split()[0]
    assert float(ratio) == pytest.approx(2, abs=0.2)


class WrongRate(Counts):
    def log_evidence(self, x, theta):
        rate = theta * self.signal * 1.1 + self.background
        return (x.xlogy(rate) - rate).sum(-1)


def test_a_wrong_rate_fails_the_first_identity():
    assert "first Bartlett identity" in failed(check(WrongRate(), simulations=20_000))


class WrongSimulator(Curved):
    def simulate(self, theta, generator=None):
        mean = self.mean(theta)
        return mean + 1.2 * self.sd * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)


def test_a_simulator_with_too_much_noise_fails_the_second_identity():
    report = check(curved(WrongSimulator))
    assert report["first Bartlett identity"].passed
    assert failed(report) == ["second Bartlett identity", "expected information"]


class SummedBatch(Curved):
    def log_evidence(self, x, theta):
        return super().log_evidence(x, theta).sum()


class SpreadSum(Curved):
    def log_evidence(self, x, theta):
        value = super().log_evidence(x, theta)
        return value.sum().expand(value.shape)


def test_a_summed_batch_fails_as_shape_or_as_values():
    assert failed(check(curved(SummedBatch)))[:2] == ["shape", "elements"]
    report = check(curved(SpreadSum))
    assert report["shape"].passed
    assert "elements" in failed(report)


class Detached(Curved):
    def mean(self, theta):
        return super().mean(theta.detach())


class HalfDetached(Curved):
    def mean(self, theta):
        return super().mean(torch.stack([theta[..., 0], theta[..., 1].detach()], -1))


class NoCurvature(Curved):
    def log_evidence(self, x, theta):
        value = super().log_evidence(x, theta)
        if not value.requires_grad:
            return value
        (u,) = torch.autograd.grad(value.sum(), theta, create_graph=True)
        return value.detach() + ((theta - theta.detach()) * u.detach()).sum(-1)


@pytest.mark.parametrize("cls", [Detached, HalfDetached])
def test_a_detached_scalar_fails_the_score(cls):
    report = check(curved(cls))
    assert failed(report)[0] == "score"
    assert "where finite differences give" in report["score"].detail


def test_a_detached_score_fails_the_hessian():
    report = check(curved(NoCurvature))
    assert failed(report)[0] == "hessian"
    assert report["score"].passed


class GlobalNoise(Curved):
    def log_evidence(self, x, theta):
        value = super().log_evidence(x, theta)
        return value + 1e-3 * torch.randn(value.shape)


class GlobalDraws(Curved):
    def simulate(self, theta, generator=None):
        return self.mean(theta) + self.sd * torch.randn(3, dtype=theta.dtype)


class NumpyDraws(Curved):
    def simulate(self, theta, generator=None):
        mean = self.mean(theta)
        noise = torch.from_numpy(np.random.standard_normal(mean.shape))  # noqa: NPY002
        return mean + self.sd * noise


class Default(Curved):
    def log_evidence(self, x, theta):
        torch.set_default_dtype(torch.float64)
        return super().log_evidence(x, theta)


@pytest.mark.parametrize(
    ("cls", "seen"),
    [
        (GlobalNoise, "torch's global random"),
        (GlobalDraws, "torch's"),
        (NumpyDraws, "numpy's"),
        (Default, "default dtype"),
    ],
)
def test_global_state_is_found_changed_and_put_back(cls, seen):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_default_dtype()  # noqa: NPY002
    report = check(curved(cls))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_default_dtype()  # noqa: NPY002
    assert "state" in failed(report)
    assert seen in report["state"].detail
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_random_values_and_ignored_generators_are_found():
    assert "deterministic" in failed(check(curved(GlobalNoise)))
    assert "simulate" in failed(check(curved(GlobalDraws)))


class Counting(Curved):
    def __init__(self, sd, parameter_names=("a", "b")):
        super().__init__(sd, parameter_names)
        self.register_buffer("calls", torch.zeros(()))

    def log_evidence(self, x, theta):
        self.calls += 1
        return super().log_evidence(x, theta)


def test_a_state_that_changes_is_found_and_the_modality_passed_in_is_left_alone():
    modality = curved(Counting)
    report = check(modality)
    assert failed(report) == ["state"]
    assert "calls" in report["state"].detail
    assert modality.calls == 0


class HalfPrecision(Curved):
    def log_evidence(self, x, theta):
        return super().log_evidence(x, theta).half()


class HalfWeights(Curved):
    def __init__(self, sd, parameter_names=("a", "b")):
        super().__init__(sd, parameter_names)
        self.half()


@pytest.mark.parametrize("cls", [HalfPrecision, HalfWeights])
def test_half_precision_fails_the_shape_check(cls):
    report = check(curved(cls))
    assert "shape" in failed(report)
    assert "got float16" in report["shape"].detail


class BatchNormed(Curved):
    def log_evidence(self, x, theta):
        return super().log_evidence(x - 0.01 * x.mean(tuple(range(x.dim() - 1)), keepdim=True), theta)


def test_statistics_of_the_batch_fail_the_elements():
    assert "elements" in failed(check(curved(BatchNormed)))


class Dropout(Curved):
    def __init__(self, sd, parameter_names=("a", "b")):
        super().__init__(sd, parameter_names)
        self.drop = nn.Dropout(0.5)

    def log_evidence(self, x, theta):
        return super().log_evidence(self.drop(x), theta)


def test_dropout_is_off_in_evaluation_mode_and_said_to_matter_in_training():
    report = check(curved(Dropout))
    assert failed(report) == []
    assert "training mode differs" in report["deterministic"].detail


class NotANumber(Counts):
    def log_evidence(self, x, theta):
        return (x * self.rate(theta - 1).log() - self.rate(theta - 1)).sum(-1)


def test_nan_fails_and_is_located():
    report = check(NotANumber(background=(0.1, 0.1, 0.1)), [[2.0], [0.5]])
    assert "finite" in failed(report)
    assert "theta[1] = [0.5]" in report["finite"].detail


class Raising(Curved):
    def log_evidence(self, x, theta):
        raise RuntimeError("no such table")


def test_an_exception_is_a_failure_of_each_check_it_stops_and_no_other():
    report = check(curved(Raising))
    assert {"shape", "finite", "elements", "precision", "first Bartlett identity"} <= set(failed(report))
    assert report["simulate"].passed
    assert "RuntimeError at test_testing.py:" in report["shape"].detail
    assert "no such table" in report["shape"].detail


class RaisingSimulator(Curved):
    def simulate(self, theta, generator=None):
        raise RuntimeError("no licence")


def test_a_simulator_that_raises_is_named_and_observations_make_up_for_it():
    report = check(curved(RaisingSimulator))
    assert report["shape"].passed is None
    assert "simulate" in failed(report)
    report = check(curved(RaisingSimulator), x=torch.zeros(1, 3))
    assert report["shape"].passed
    assert set(failed(report)) == {"state", "simulate", "first Bartlett identity"}


class PlainTensor(Curved):
    def __init__(self, sd, parameter_names=("a", "b")):
        super().__init__(sd, parameter_names)
        self.rotation = torch.eye(3, dtype=torch.float64)

    def log_evidence(self, x, theta):
        return super().log_evidence(x @ self.rotation, theta)


def test_a_tensor_that_does_not_follow_its_module_fails_the_precision():
    assert failed(check(curved(PlainTensor))) == ["precision"]


class SharedNoise(Curved):
    def simulate(self, theta, generator=None):
        return self.mean(theta) + self.sd * torch.randn(3, generator=generator, dtype=theta.dtype)


class OutOfSupport(Counts):
    support = torch.distributions.constraints.nonnegative
    support_rule = "counts must be >= 0"

    def simulate(self, theta, generator=None):
        return super().simulate(theta, generator) - 1.0


def test_copied_or_impossible_draws_fail_the_simulator():
    assert "copies" in check(curved(SharedNoise))["simulate"].detail
    assert "counts must be >= 0, got -1" in check(OutOfSupport())["simulate"].detail


class Tilted(Curved):
    """A prior on θ in the evidence: not of the data, and the same at every draw."""

    def mean(self, theta):
        return super().mean(torch.stack([theta[..., 0], torch.zeros_like(theta[..., 0])], -1))

    def log_evidence(self, x, theta):
        return super().log_evidence(x, theta) - 0.5 * theta[..., 1] ** 2


def test_a_prior_among_the_evidence_fails_the_first_identity():
    report = check(curved(Tilted))
    assert "first Bartlett identity" in failed(report)
    assert "(b)" in report["first Bartlett identity"].detail


class Kinked(Modality):
    """A Laplace density: its second derivative misses the kink that carries all the information."""

    def __init__(self, parameter_names=("centre",)):
        super().__init__(parameter_names=parameter_names)

    def log_evidence(self, x, theta):
        return -(x - theta[..., 0]).abs()

    def simulate(self, theta, generator=None):
        u = torch.rand(theta.shape[:-1], generator=generator, dtype=theta.dtype) - 0.5
        return theta[..., 0] - u.sign() * torch.log1p(-2 * u.abs())


def test_a_hessian_that_misses_a_kink_fails_the_second_identity():
    report = check(Kinked(), [[0.3], [2.0]])
    assert failed(report) == ["second Bartlett identity"]
    assert "not smooth enough" in report["second Bartlett identity"].detail


class WrongInformation(Curved):
    def expected_information(self, theta):
        return super().expected_information(theta) * theta.new_tensor([[1.0, 0.8], [0.8, 1.0]])


class Asymmetric(Curved):
    def expected_information(self, theta):
        return super().expected_information(theta) + theta.new_tensor([[0.0, 0.1], [0.0, 0.0]])


def test_a_wrong_expected_information_is_found():
    report = check(curved(WrongInformation), simulations=20_000)
    assert failed(report) == ["expected information"]
    assert "(b, a)" in report["expected information"].detail
    assert "symmetric" in check(curved(Asymmetric))["expected information"].detail


class Positional(Curved):
    def __init__(self, *sd):
        super().__init__(sd)


def test_settings_that_are_not_recorded_are_found():
    modality = curved()
    modality.sd = modality.sd * 2
    assert failed(check(modality)) == []  # a buffer is state
    modality = curved()
    modality.mean = lambda theta: 2 * Curved.mean(modality, theta)
    modality.expected_information = lambda theta: 4 * Curved.expected_information(modality, theta)
    assert "configuration" in failed(check(modality))
    assert "*sd" in check(Positional(0.5, 1.0, 2.0))["configuration"].detail


class Unsaved(Curved):
    """Its scalar depends on an attribute that is set after it was built."""

    gain = 1.0

    def log_evidence(self, x, theta):
        return super().log_evidence(x, theta) + (self.gain - 1.0) * theta[..., 0]


def test_an_unsaved_argument_fails_where_the_plugin_is_read_back():
    assert check(curved(), save=True)["save and load"].passed
    modality = curved(Unsaved)
    modality.gain = 1.25
    report = check(modality, save=True)
    assert failed(report)[:2] == ["configuration", "save and load"]
    assert "must be an argument of __init__" in report["save and load"].detail


def test_a_refusal_to_write_is_reported_in_its_own_words():
    class Local(Curved):
        pass

    report = check(curved(Local), save=True)
    assert failed(report) == ["save and load"]
    assert report["save and load"].detail.startswith("a class or function must be defined at the top of an importable")


def test_float32_weights_come_back_from_the_folder():
    report = check(Counts().to(torch.float32), save=True)
    assert report["save and load"].passed


# ---- closed derivatives and claims of concavity


class Closed(Curved):
    """Curved with its derivatives, which ``change`` may spoil; what of them depends on x alone is prepared."""

    change = None

    def prepare(self, x):
        return (x / self.sd**2,)

    def derivatives(self, x, theta, scaled=None):
        a, b = theta[..., 0], theta[..., 1]
        one, zero, e = torch.ones_like(a), torch.zeros_like(a), (0.3 * a).exp()
        slope = torch.stack(
            [torch.stack([one, 0.6 * b], -1), torch.stack([one, b.cos()], -1), torch.stack([0.3 * b * e, e], -1)], -2
        )
        aa = torch.stack([zero, zero, 0.09 * b * e], -1)
        ab = torch.stack([zero, zero, 0.3 * e], -1)
        bb = torch.stack([0.6 * one, -b.sin(), zero], -1)
        w = (x / self.sd**2 if scaled is None else scaled) - self.mean(theta) / self.sd**2
        bend = torch.stack([(w * v).sum(-1) for v in (aa, ab, ab, bb)], -1).unflatten(-1, (2, 2))
        fisher = slope.mT @ (slope / self.sd[:, None] ** 2)
        found = self.log_evidence(x, theta), (w[..., None, :] @ slope)[..., 0, :], fisher - bend
        return found if self.change is None else self.change(*found, fisher)


def spoilt(change, cls=Closed):
    modality = curved(type("Spoilt", (cls,), {"change": staticmethod(change)}))
    return check(modality, simulations=0)


def test_a_correct_closed_form_passes_with_what_it_prepares():
    report = check(curved(Closed), save=True, raises=True)
    assert report["closed form"].passed
    assert "at 18 pairs, with prepare too" in report["closed form"].detail


SPOILT = {
    "sign": (lambda s, u, J, fisher: (s, -u, J), "the closed score.*-1 times that"),
    "factor 2": (lambda s, u, J, fisher: (s, 2.0 * u, J), "the closed score.*2 times that"),
    "no bend": (lambda s, u, J, fisher: (s, u, fisher.expand_as(J)), "the closed information"),
    "Hessian": (lambda s, u, J, fisher: (s, u, -J), "the closed information.*-1 times that"),
    "value": (lambda s, u, J, fisher: (s + 1.0, u, J), "the closed scalar must be that of log_evidence"),
    "NaN": (lambda s, u, J, fisher: (s, u, J * math.nan), "the closed information.*got nan"),
    "first score for all": (lambda s, u, J, fisher: (s, u.reshape(-1, 2)[0].expand_as(u), J), "the closed score"),
    "swapped axes": (lambda s, u, J, fisher: (s, u.transpose(0, -1), J), "must broadcast to"),
    "diagonal": (lambda s, u, J, fisher: (s, u, J.diagonal(dim1=-2, dim2=-1)), "the closed information must broadcast"),
    "summed": (lambda s, u, J, fisher: (s.sum(-1), u, J), "the closed scalar must broadcast"),
    "half": (lambda s, u, J, fisher: (s, u.half(), J), "must return float32 or float64, got torch.float16"),
    "a pair": (lambda s, u, J, fisher: (s, u), "must return three tensors"),
}


@pytest.mark.parametrize(("change", "words"), SPOILT.values(), ids=SPOILT)
def test_a_wrong_closed_form_fails_its_check_alone(change, words):
    report = spoilt(change)
    assert failed(report) == ["closed form"]
    assert re.search(words, report["closed form"].detail), report["closed form"].detail


class Forgetful(Closed):
    def prepare(self, x):
        return (1.01 * super().prepare(x)[0],)


class Averaged(Closed):
    def prepare(self, x):
        return ((x / self.sd**2).mean((0, 1)),)


class Looking(Closed):
    def stack_key(self):
        return "looking"

    def derivatives(self, x, theta, scaled=None):
        return super().derivatives(x, theta) if bool((theta > -99.0).all()) else None


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Forgetful, "must be the same after prepare"),
        (Averaged, "prepare must return a tuple of tensors"),
        (Looking, "under torch.func.vmap"),
    ],
)
def test_a_closed_form_must_not_depend_on_how_it_is_called(cls, words):
    report = check(curved(cls), simulations=0)
    assert failed(report) == ["closed form"]
    assert words in report["closed form"].detail


class Rescored(Closed):
    def log_evidence(self, x, theta):
        return super().log_evidence(x, theta) - theta[..., 0] ** 2


def test_a_closed_form_of_another_scalar_is_not_judged_because_it_is_not_used():
    report = check(curved(Rescored), simulations=0)
    assert report["closed form"].passed is None
    assert "log_evidence is differentiated" in report["closed form"].detail


class Line(Curved):
    """Linear in θ: concave."""

    concave = True

    def mean(self, theta):
        a, b = theta[..., 0], theta[..., 1]
        return torch.stack([a + b, a - 2.0 * b, 3.0 * b], -1)


class Bent(Curved):
    concave = True


class Convex(Line):
    concave = True

    def log_evidence(self, x, theta):
        return -super().log_evidence(x, theta)


class Saddle(Line):
    concave = True

    def log_evidence(self, x, theta):
        return super().log_evidence(x, theta) + 3.5 * theta[..., 0] ** 2


class Island(Line):
    """Concave on two islands, impossible in between: two maxima."""

    concave = True

    def log_evidence(self, x, theta):
        return torch.where(theta[..., 0].abs() < 0.3, -math.inf, super().log_evidence(x, theta))


class HeavyTails(Line):
    concave = True

    def log_evidence(self, x, theta):
        return -2.0 * torch.log1p(((x - self.mean(theta)) / self.sd) ** 2).sum(-1)


def test_a_true_claim_of_concavity_passes():
    report = check(curved(Line), simulations=0)
    assert report["concave"].passed
    assert "no negative eigenvalue" in report["concave"].detail
    assert check(Counts(), simulations=0)["concave"].passed is None


@pytest.mark.parametrize("cls", [Bent, Convex, Saddle, Island, HeavyTails])
def test_a_false_claim_of_concavity_fails(cls):
    for seed in range(5):
        report = check(curved(cls), simulations=0, seed=seed)
        assert failed(report) == ["concave"]
        assert "leave concave False" in report["concave"].detail


class Spiked(Modality):
    """Its chords are fine, its second derivative is not: the eigenvalue tells."""

    concave = True

    def __init__(self, parameter_names=("a",)):
        super().__init__(parameter_names=parameter_names)

    def log_evidence(self, x, theta):
        a = theta[..., 0]
        return -((x - a) ** 2) + 1e-9 * torch.cos(1e5 * a)


def test_a_negative_eigenvalue_is_found_where_chords_are_too_coarse():
    report = check(Spiked(), [[0.5], [2.0]], x=[0.3, -1.0], simulations=0)
    assert "no eigenvalue < 0" in report["concave"].detail


# ---- the report and the arguments


def test_a_failure_raises_an_error_that_lists_every_failing_check():
    with pytest.raises(ContractError) as caught:
        check(curved(Doubled), raises=True)
    message = str(caught.value)
    assert message.startswith("Doubled breaks the contract in 2 of 16 checks:")
    assert "- second Bartlett identity: E[u uᵀ + ∇u] must be 0" in message
    assert "- expected information: " in message
    assert isinstance(caught.value, AssertionError)


def test_a_report_prints_one_row_for_each_check():
    report = Report("Thing", (Check("shape", True, "fine"), Check("save and load", None, "not asked for")))
    assert str(report).splitlines() == [
        "Thing: 1 passed, 0 failed, 1 skipped",
        "  passed   shape          fine",
        "  skipped  save and load  not asked for",
    ]
    with pytest.raises(KeyError, match="no check 'shapes'; there are shape, save and load"):
        report["shapes"]


def test_arguments_of_the_wrong_shape_are_refused():
    with pytest.raises(ParameterError, match=r"theta must have shape \(K, 2\).*got \(3,\)"):
        check(curved(), [1.0, 2.0, 3.0])
    with pytest.raises(ParameterError, match="theta must be finite"):
        check(curved(), [1.0, math.nan])
    with pytest.raises(ObservationError, match=r"x must have shape.*got \(3,\)"):
        check(curved(), x=torch.zeros(3))
    with pytest.raises(ObservationError, match="x is needed where a modality does not simulate"):
        check(Linear(), [1.0])


def test_few_simulations_skip_the_identities():
    report = check(curved(), simulations=500)
    assert failed(report) == []
    assert all(report[name].passed is None for name in IDENTITIES)


def test_one_point_and_one_observation_are_enough():
    report = check(curved(), THETA[0], x=torch.zeros(1, 3), simulations=1000)
    assert failed(report) == []
    assert "elements" in failed(check(curved(SpreadSum), THETA[0], x=torch.zeros(1, 3), simulations=0))
