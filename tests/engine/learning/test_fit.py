"""What fit learns, what it keeps of it, and what it leaves alone."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Normal, Uniform

from engine import Modality, ModalityError, Parameter, ParameterError, ParameterSpace, Simplex
from engine.learning import Learnable, TrainingError, fit
from modalities import Quadratic

QUICK = {"simulations": 300, "epochs": 3, "progress": False}


def test_a_linear_gaussian_is_trained_to_least_squares(straight, simulate, prior, matrix):
    theta = prior.sample_prior(10_000, seed=1)
    x = simulate(theta, torch.Generator().manual_seed(2))
    modality = straight()
    training = fit(modality, prior=prior, pairs=(theta, x), epochs=25, learning_rate=0.02)
    assert training.status == "converged"
    assert modality.dtype == torch.float64
    design = torch.cat([theta, torch.ones(len(theta), 1)], 1)
    exact = torch.linalg.lstsq(design, x).solution
    slope = (modality.feature_scale[:, None] * modality.mean.weight / modality.theta_scale).detach()
    sd = (modality.feature_scale * modality.log_sd.exp()).detach()
    error = 0.5 / math.sqrt(10_000 / 3)  # of a slope, as θ has the variance 1/3; a tenth is held out
    assert (slope - exact[:2].mT).abs().max() < 1.5 * error
    assert (slope - matrix).abs().max() < 4 * error
    assert (sd - 0.5).abs().max() < 4 * 0.5 / math.sqrt(20_000)
    # the loss itself: the entropy of ε / 2, in units of the features' scales, without (log 2π) / 2 for each
    assert training.best_loss == pytest.approx(float((0.5 - (modality.feature_scale / 0.5).log()).sum()), abs=0.1)


def test_a_quadratic_is_trained_to_the_natural_parameters_of_the_posterior():
    prior = ParameterSpace([Parameter("H0", Normal(70.0, 5.0))])

    def simulate(theta, generator):
        return (theta - 70.0) / 2.0 + torch.randn(theta.shape, generator=generator, dtype=theta.dtype)

    quadratic = Quadratic(nn.Identity(), ("H0",), (1,), centre=70.0, scale=5.0, constant=True)
    training = fit(quadratic, prior=prior, simulate=simulate, simulations=10_000, epochs=30, learning_rate=0.1)
    eta, precision = quadratic.natural(torch.tensor([3.0], dtype=torch.float64))
    assert training.converged
    assert eta.item() == pytest.approx(1.5, abs=0.05)
    assert precision.item() == pytest.approx(0.25, abs=0.02)
    assert training.unit == "nats"
    assert quadratic.training_prior == prior


def test_weights_of_two_dtypes_are_trained_together(simulate, prior, weights):
    quadratic = Quadratic(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), ("a", "b"), (3,), scale=0.5)
    before = weights(quadratic)
    fit(quadratic, prior=prior, simulate=simulate, initialise=False, **QUICK)
    after = weights(quadratic)
    assert {before[name].dtype for name in before} == {torch.float32, torch.float64}
    assert {after[name].dtype for name in after} == {torch.float64}
    assert not any(torch.equal(before[name].double(), after[name]) for name in before)


def test_one_seed_determines_every_bit_whatever_the_weights_before(straight, simulate, prior, weights, same_bits):
    def trained(seed, before):
        torch.manual_seed(before)
        modality = straight(dropout=0.2)
        training = fit(modality, prior=prior, simulate=simulate, seed=seed, **QUICK)
        return weights(modality), training

    first, training = trained(0, before=1)
    again, same = trained(0, before=2)
    assert same_bits(first, again)
    assert training == same
    assert not same_bits(first, trained(1, before=1)[0])


def test_nothing_global_is_touched(straight, prior):
    def global_noise(theta, generator):
        return torch.randn(len(theta), 3)

    torch.manual_seed(5)
    expected = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    found = []
    for _ in range(2):
        modality = straight(dropout=0.5)
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is nothing to learn in noise
            training = fit(modality, prior=prior, simulate=global_noise, **QUICK)
        assert torch.equal(torch.get_rng_state(), expected[0])
        found.append(training)
    assert found[0] == found[1]  # though simulator and dropout draw from torch's global generator
    now = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    assert now == expected[1:]


def test_it_trains_inside_no_grad(straight, simulate, prior):
    with torch.no_grad():
        assert fit(straight(), prior=prior, simulate=simulate, **QUICK).epochs == 3


def test_the_modality_ends_in_float64_and_evaluation_with_its_part_of_the_prior(straight, simulate, prior):
    larger = ParameterSpace([Parameter("c"), *prior, Parameter("d", Uniform(0.0, 1.0))])
    modality = straight(("b", "a"))
    fit(modality, prior=larger, simulate=lambda theta, g: simulate(theta.flip(-1), g), **QUICK)
    assert {t.dtype for t in modality.state_dict().values()} == {torch.float64}
    assert not any(m.training for m in modality.modules())
    assert modality.training_prior == ParameterSpace([prior["b"], prior["a"]])


def test_theta_is_drawn_under_the_constraints_that_tie_it_to_others(straight):
    names = ("a", "b", "c")
    prior = ParameterSpace([Parameter(n) for n in (*names, "free")], [Simplex(names)])
    seen = []

    def simulate(theta, generator):
        seen.append(theta)
        return theta.repeat(1, 2)[:, :3] + 0.1 * torch.randn(len(theta), 3, generator=generator)

    modality = straight(("a", "b"))
    fit(modality, prior=prior, simulate=simulate, **QUICK)
    theta = torch.cat(seen)
    assert theta.shape == (300, 2)
    assert bool((theta.sum(-1) <= 1.0).all())
    assert theta.mean(0).tolist() == pytest.approx([1 / 3, 1 / 3], abs=0.05)
    assert not modality.training_prior.constraints  # 'c' is no parameter of the modality


class Tuned(Learnable):
    """With a summary to be tuned, one layer of it fixed, and an initial scale that no layer knows."""

    def __init__(self, parameter_names=("a", "b"), event_shape=(3,)):
        summary = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        super().__init__(parameter_names, event_shape, summary=summary)
        summary[0].requires_grad_(False)
        self.heads = nn.MultiheadAttention(4, 2)
        self.own = nn.Parameter(torch.tensor(3.0))

    def evidence_of(self, features, theta):
        rows = self.heads(*[torch.cat([features, theta], -1)[None]] * 3)[0][0]
        return (self.own * rows).sum(-1)

    def loss_of(self, features, theta, generator=None):
        return self.evidence_of(features, theta).square()


def test_layers_are_drawn_anew_but_not_what_is_fixed_nor_what_no_layer_draws(simulate, prior, weights):
    begun = []

    class Watched(Tuned):
        def standardise(self, features, theta):
            begun.append(weights(self))
            super().standardise(features, theta)

    modality = Watched()
    given = weights(modality)
    fit(modality, prior=prior, simulate=simulate, **QUICK)
    changed = {name for name, value in given.items() if not torch.equal(value, begun[0][name])}
    assert changed == {"summary.2.weight", "summary.2.bias", "heads.in_proj_weight", "heads.out_proj.weight"}
    assert torch.equal(modality.summary[0].weight, given["summary.0.weight"].double())
    modality = Watched()
    given = weights(modality)
    fit(modality, prior=prior, simulate=simulate, initialise=False, **QUICK)
    assert all(torch.equal(given[name], begun[1][name]) for name in given)


def test_dates_with_errors_of_a_millionth_of_a_millionth_are_learned(prior):
    prior = ParameterSpace([Parameter("t", bounds=(2_460_000.0, 2_460_000.01))])

    def simulate(theta, generator):
        return theta + 0.001 * torch.randn(theta.shape, generator=generator, dtype=torch.float64)

    class Date(Learnable):
        def __init__(self, parameter_names=("t",), event_shape=(1,)):
            super().__init__(parameter_names, event_shape)
            self.mean, self.log_sd = nn.Linear(1, 1), nn.Parameter(torch.zeros(1))

        def evidence_of(self, features, theta):
            return (-0.5 * ((features - self.mean(theta)) * (-self.log_sd).exp()).square() - self.log_sd).sum(-1)

        def loss_of(self, features, theta, generator=None):
            return -self.evidence_of(features, theta)

    date = Date()
    fit(date, prior=prior, simulate=simulate, simulations=4000, epochs=20, learning_rate=0.02)
    sd = (date.feature_scale * date.log_sd.exp()).item()
    assert sd == pytest.approx(0.001, rel=0.05)


def test_sets_are_pairs_with_one_theta_that_are_held_out_together(straight, simulate, prior):
    seen = {True: [], False: []}

    class Watching(straight):
        def loss(self, x, theta, generator=None, features=None):
            assert x.shape[1:] == (3,)
            seen[self.training].append(theta.clone())
            return super().loss(x, theta, generator, features)

    training = fit(Watching(), prior=prior, simulate=lambda t, g: simulate(t[:, None].expand(-1, 4, -1), g), **QUICK)
    held_out = {tuple(row) for theta in seen[False] for row in theta.tolist()}
    trained = {tuple(row) for theta in seen[True] for row in theta.tolist()}
    assert (len(held_out), len(trained)) == (30, 270)
    assert training.held_out == 30
    assert training.simulations == 300
    assert not held_out & trained
    assert sum(map(len, seen[True])) == 3 * 4 * 270  # each row once an epoch


def test_sets_carry_the_information_of_their_rows(straight, simulate, prior, matrix):
    modality = straight()
    options = {"simulations": 2000, "epochs": 25, "learning_rate": 0.02}
    fit(modality, prior=prior, simulate=lambda t, g: simulate(t[:, None].expand(-1, 5, -1), g), **options)
    slope = (modality.feature_scale[:, None] * modality.mean.weight / modality.theta_scale).detach()
    assert (slope - matrix).abs().max() < 4 * 0.5 / math.sqrt(0.9 * 10_000 / 3)


def test_a_simulator_that_changes_the_size_of_its_sets_is_named(straight, prior):
    calls = iter((4, 5))

    def simulate(theta, generator):
        return torch.randn(len(theta), next(calls), 3, generator=generator)

    with pytest.raises(ModalityError, match="same number of observations"):
        fit(straight(), prior=prior, simulate=simulate, simulations=1500, epochs=2)


def test_the_loss_gets_a_generator_that_belongs_to_the_epoch(straight, simulate, prior):
    draws = []

    class Drawing(straight):
        def loss_of(self, features, theta, generator=None):
            draws.append((self.training, torch.rand(1, generator=generator).item()))
            return super().loss_of(features, theta)

    fit(Drawing(), prior=prior, simulate=simulate, batch=270, **QUICK)
    training = [value for trains, value in draws if trains]
    validation = [value for trains, value in draws if not trains]
    assert len(set(training)) == 3
    assert len(set(validation)) == len(validation) // 4
    assert validation == validation[: len(validation) // 4] * 4  # the same before training and after each epoch


def test_overfitting_stops_the_run_and_the_best_weights_come_back(prior, simulate, weights):
    class Wide(Learnable):
        def __init__(self, parameter_names=("a", "b"), event_shape=(3,)):
            super().__init__(parameter_names, event_shape)
            self.net = nn.Sequential(nn.Linear(2, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 6))

        def evidence_of(self, features, theta):
            mean, log_sd = self.net(theta).chunk(2, -1)
            return (-0.5 * ((features - mean) * (-log_sd).exp()).square() - log_sd).sum(-1)

        def loss_of(self, features, theta, generator=None):
            return -self.evidence_of(features, theta)

    modality = Wide()
    training = fit(modality, prior=prior, simulate=simulate, simulations=200, batch=10, validation=0.4, patience=5)
    assert training.status == "converged"
    assert training.epochs < 100
    assert training.best_epoch <= training.epochs - 5
    assert training.best_loss == min(training.validation_losses)
    assert training.losses[-1] < training.losses[training.best_epoch - 1] - 0.05


def test_too_few_epochs_leave_it_unfinished(straight, simulate, prior):
    training = fit(straight(), prior=prior, simulate=simulate, simulations=1000, epochs=5)
    assert training.status == "unfinished"
    assert not training.converged
    assert "more epochs" in training.reason


def test_a_run_that_diverges_is_failed_and_ends_with_the_best_weights(straight, simulate, prior, weights):
    class Bursting(straight):
        calls = 0

        def loss_of(self, features, theta, generator=None):
            self.calls += self.training
            value = super().loss_of(features, theta)
            return value * math.nan if self.calls == 8 else value

    modality = Bursting()
    with pytest.warns(UserWarning, match=r"Bursting failed.*nan in epoch 3, batch 2"):
        training = fit(modality, prior=prior, simulate=simulate, batch=90, **QUICK)
    assert training.status == "failed"
    assert training.epochs == 2
    assert all(bool(torch.isfinite(t).all()) for t in weights(modality).values())
    reference = straight()
    fit(reference, prior=prior, simulate=simulate, batch=90, **{**QUICK, "epochs": 3})
    assert training.best_loss == min((training.initial_loss, *training.validation_losses))


def test_an_infinite_gradient_does_not_reach_the_weights(straight, simulate, prior, weights):
    class Steep(straight):
        def loss_of(self, features, theta, generator=None):
            zero = (self.log_sd - self.log_sd.detach()).sum()
            return super().loss_of(features, theta) + zero.abs().sqrt()

    modality = Steep()
    with pytest.warns(UserWarning, match="gradient became nan in epoch 1, batch 1"):
        training = fit(modality, prior=prior, simulate=simulate, **QUICK)
    assert training.best_epoch == 0
    assert all(bool(torch.isfinite(t).all()) for t in weights(modality).values())


def test_a_loss_that_is_infinite_before_training_is_failed(straight, simulate, prior):
    class Infinite(straight):
        def loss_of(self, features, theta, generator=None):
            return super().loss_of(features, theta) + math.inf

    with pytest.warns(UserWarning, match="inf before training"):
        assert fit(Infinite(), prior=prior, simulate=simulate, **QUICK).epochs == 0


def test_a_loss_that_never_falls_is_failed_and_the_weights_are_those_it_began_with(straight, simulate, prior, weights):
    class Backwards(straight):
        def loss_of(self, features, theta, generator=None):
            return super().loss_of(features, theta) * (-1.0 if self.training else 1.0)

    modality = Backwards()
    given = weights(modality)
    with pytest.warns(UserWarning, match="never fell below"):
        training = fit(
            modality, prior=prior, simulate=simulate, initialise=False, patience=2, **{**QUICK, "epochs": 20}
        )
    assert (training.best_epoch, training.epochs) == (0, 2)
    assert training.best_loss == training.initial_loss
    assert all(torch.equal(given[name], weights(modality)[name].float()) for name in ("mean.weight", "log_sd"))


@pytest.mark.parametrize("trouble", [ValueError("no convergence"), KeyboardInterrupt()])
def test_an_exception_leaves_the_modality_as_it_was(straight, simulate, prior, weights, same_bits, trouble):
    class Troubled(straight):
        calls = 0

        def loss_of(self, features, theta, generator=None):
            self.calls += 1
            if self.calls == 20:
                raise trouble
            return super().loss_of(features, theta)

    modality = Troubled()
    given = weights(modality)
    with pytest.raises(type(trouble)):
        fit(modality, prior=prior, simulate=simulate, **QUICK)
    assert same_bits(weights(modality), given)
    assert modality.training
    assert modality.training_prior is None


def test_a_simulator_that_raises_is_named_with_theta(straight, prior):
    def simulate(theta, generator):
        raise RuntimeError("no convergence")

    with pytest.raises(
        ModalityError, match=r"simulator of Straight raised RuntimeError: no convergence, for 300 θ, the first"
    ) as caught:
        fit(straight(), prior=prior, simulate=simulate, **QUICK)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_error_of_the_engine_comes_through_a_simulator_unchanged(straight, prior):
    def simulate(theta, generator):
        raise ParameterError("this detector has no such angle")

    with pytest.raises(ParameterError, match=r"^this detector has no such angle$"):
        fit(straight(), prior=prior, simulate=simulate, **QUICK)


def test_a_simulator_may_work_in_place(straight, simulate, prior):
    def spoiling(theta, generator):
        x = simulate(theta, generator)
        theta.zero_()
        return x

    assert fit(straight(), prior=prior, simulate=spoiling, **QUICK).epochs == 3


def test_simulations_that_are_not_finite_are_counted(straight, simulate, prior):
    def simulator(theta, generator):
        return torch.where(theta[:, :1] > 0.5, math.nan, simulate(theta, generator))

    training = fit(straight(), prior=prior, simulate=simulator, **QUICK)
    assert 50 < training.excluded < 100  # a quarter of 300
    assert training.simulations == 300


def test_the_simulator_that_a_modality_comes_with_is_used(simulate, prior, straight):
    class Knowing(straight):
        def simulate(self, theta, generator=None):
            return simulate(theta, generator)

    assert fit(Knowing(), prior=prior, **QUICK).simulations == 300


class Bare(Modality):
    def __init__(self, parameter_names=("a",)):
        super().__init__(parameter_names, (3,))
        self.weight = nn.Parameter(torch.ones(1, 3))

    def log_evidence(self, x, theta):
        return (x * theta * self.weight).sum(-1)


class Detached(Bare):
    def loss(self, x, theta):
        return self.log_evidence(x, theta).mean().detach()


class Rows(Bare):
    def loss(self, x, theta):
        return self.log_evidence(x, theta)


class Fixed(Rows):
    def __init__(self, parameter_names=("a",)):
        super().__init__(parameter_names)
        self.weight.requires_grad_(False)


def test_any_modality_with_a_loss_is_trained_in_its_own_dtype(simulate, prior):
    seen = set()

    class Scale(Bare):
        def loss(self, x, theta):
            seen.add((x.dtype, theta.dtype))
            return (x - theta * self.weight).square().mean()

    modality = Scale()
    fit(modality, prior=prior, simulate=lambda t, g: t + torch.randn(len(t), 3, generator=g), **QUICK)
    assert seen == {(torch.float32, torch.float32)}
    assert modality.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("modality", "words"),
    [
        (nn.Linear(1, 1), ["engine.Modality", "Linear", "Learnable"]),
        (Bare(), ["Bare", "loss(self, x, theta, generator=None)"]),
        (Fixed(), ["requires_grad", "Fixed"]),
        (Detached(), ["graph", "Detached", ".detach()"]),
        (Rows(), ["one number", "Rows", "(3", "mean"]),
    ],
    ids=["no modality", "no loss", "no weights", "no graph", "no number"],
)
def test_what_cannot_be_trained_is_told_what_to_write(modality, words, simulate, prior):
    def simulator(theta, generator):
        return theta + torch.randn(len(theta), 3, generator=generator)

    with pytest.raises(ModalityError) as error:
        fit(modality, prior=prior, simulate=simulator, **QUICK)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, ["batch", "0"]),
        ({"epochs": 1.5}, ["epochs", "1.5"]),
        ({"patience": True}, ["patience", "True"]),
        ({"seed": "a"}, ["seed", "'a'"]),
        ({"learning_rate": 0.0}, ["learning_rate", "> 0"]),
        ({"learning_rate": math.nan}, ["learning_rate", "nan"]),
        ({"validation": 1.0}, ["validation", "between 0 and 1"]),
        ({"memory": 0}, ["memory", "bytes"]),
        ({"simulations": None}, ["simulations", "10_000"]),
        ({"simulations": 3}, ["parameters (2)", "3 in all", "more simulations"]),
        ({"simulate": None}, ["simulator or pairs", "neither"]),
        ({"prior": None}, ["prior", "registry.parameters"]),
        ({"pairs": (torch.zeros(3, 2), torch.zeros(3, 3))}, ["pairs or a simulator", "both"]),
    ],
)
def test_settings_that_are_none_are_refused(straight, simulate, prior, options, words):
    with pytest.raises(TrainingError) as error:
        fit(straight(), **{"prior": prior, "simulate": simulate, "simulations": 100, **options})
    for word in words:
        assert word in str(error.value)


def test_a_prior_must_be_one_and_have_the_parameters(straight, simulate, prior):
    with pytest.raises(ParameterError, match="'c'"):
        fit(straight(("a", "c")), prior=prior, simulate=simulate, simulations=100)
    with pytest.raises(ParameterError, match="ParameterSpace, got list"):
        fit(straight(), prior=list(prior), simulate=simulate, simulations=100)


def test_x_that_never_changes_is_refused(straight, prior):
    with pytest.raises(TrainingError, match=r"feature 0 is always 2\).*does not depend on anything"):
        fit(straight(), prior=prior, simulate=lambda t, g: torch.full((len(t), 3), 2.0), **QUICK)


def test_constant_features_are_reported_and_do_no_harm(straight, simulate, prior):
    def simulator(theta, generator):
        x = simulate(theta, generator)
        x[:, 1] = 0.1  # whose mean over many rows is not 0.1 to the last bit
        return x

    modality = straight()
    training = fit(modality, prior=prior, simulate=simulator, **QUICK)
    assert training.constant_features == (1,)
    assert modality.feature_scale[1] == 1.0
    assert modality.feature_scale[0] != 1.0
