"""Admission: which learned plugins enter the ledger, and what is on record of those that do."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import zarr
from torch.distributions import Uniform

from engine import ModalityError, Parameter, ParameterSpace, Registry, RegistryError, Status, TamperedError
from engine.admission import admit
from engine.certificate import Check, calibrate, certify
from modalities import Gaussian

sys.path.append(str(Path(__file__).parent / "certificate"))
from scored_laws import TRUE, WRONG, Quadratic, Shape, unit_normal

BOX = [Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-2.0, 2.0))]
LINE = [Parameter("a", Uniform(-1.0, 1.0))]
THETA = torch.tensor([0.3, -0.6]).double()


@pytest.fixture(scope="module")
def certificate():
    return certify(WRONG, prior=ParameterSpace(BOX), simulate=TRUE, simulations=1500, seed=1)


@pytest.fixture(scope="module")
def flipped():
    """A scalar with its sign flipped, and its certificate."""
    scalar = Shape("normal", -1.0)
    return scalar, certify(scalar, prior=ParameterSpace(LINE), simulate=unit_normal, simulations=2000, seed=1)


@pytest.fixture
def registry(tmp_path):
    return Registry.create(tmp_path / "r", BOX)


def data(n=20):
    return TRUE(THETA.expand(n, 2), torch.Generator().manual_seed(1))


def test_a_learned_plugin_without_a_certificate_enters_as_uncertified(registry):
    registry.append("w", WRONG)
    assert registry.certificate("w") is None
    again = Registry.open(registry.path, trust=True)
    assert again.certificate("w") is None
    for made in (registry, again):
        fit = made.estimate({"w": data()}, refine=False)
        assert fit.status is Status.UNCERTIFIED
        assert fit.trust["w"].verdict == "uncertified"


def test_a_plugin_that_was_not_learned_needs_none_and_is_not_asked(registry):
    registry.append("e", Gaussian(parameter_names=("a", "b"), sd=1.0))
    assert registry.certificate("e") is None
    fit = registry.estimate({"e": torch.zeros(3, 2) + torch.tensor([[0.1], [0.2], [0.3]])})
    assert fit.status is Status.CONVERGED
    assert admit("e", Gaussian(parameter_names=("a",), sd=1.0), None, registry.parameters, "") is None


def test_a_certificate_is_kept_with_the_plugin_for_every_view(registry, certificate):
    registry.append("w", WRONG, certificate=certificate)
    at = certificate.space.sample_prior(20, 1)
    for made in (registry, Registry.open(registry.path, trust=True), registry.at(registry.digest)):
        kept = made.certificate("w")
        assert torch.equal(kept.rate(at), certificate.rate(at))
        assert kept.checks == certificate.checks or repr(kept.checks) == repr(certificate.checks)
        fit = made.estimate({"w": data()}, refine=False)
        assert fit.trust["w"].budget == pytest.approx(certificate.n_max(0.3, fit.theta), rel=1e-9)


def test_a_certificate_of_another_scalar_is_refused_whatever_the_force(registry, certificate):
    other = Quadratic(WRONG.design * 1.01, WRONG.metric, WRONG.offset)
    for force in ("", "it is all we have"):
        with pytest.raises(ModalityError, match="plugin 'w' must have been made of this very Quadratic"):
            registry.append("w", other, certificate=certificate, force=force)
    assert not registry.plugins
    assert dataclasses.replace(certificate, subject="").subject == ""  # of an older one nobody knows
    registry.append("w", other, certificate=dataclasses.replace(certificate, subject=""))


def test_a_certificate_tells_calibrations_and_plain_settings_apart(registry):
    space = ParameterSpace(BOX)
    one, other = (calibrate(WRONG, prior=space, simulate=TRUE, simulations=2000, seed=k) for k in (1, 2))
    record = certify(one, prior=space, simulate=TRUE, simulations=1500, seed=3)
    with pytest.raises(ModalityError, match="plugin 'w' must have been made of this very Calibrated"):
        registry.append("w", other, certificate=record)
    registry.append("w", one, certificate=record)
    plain = certify(Shape(), prior=ParameterSpace(LINE), simulate=unit_normal, simulations=1500, seed=1)
    with pytest.raises(ModalityError, match="plugin 's' must have been made of this very Shape"):
        registry.append("s", Shape(shift=0.1), certificate=plain)


def test_a_scalar_whose_training_failed_is_refused(registry):
    scalar = Quadratic(WRONG.design, WRONG.metric, WRONG.offset)
    scalar.training_status = "failed"
    with pytest.raises(ModalityError, match="plugin 'w' fails admission: its training failed"):
        registry.append("w", scalar)
    registry.append("w", scalar, force="to look at it")
    assert "its training failed" in registry.estimate({"w": data()}, refine=False).trust["w"].reason


def test_a_failing_certificate_is_refused_with_what_failed(tmp_path, flipped):
    scalar, certificate = flipped
    made = Registry.create(tmp_path / "r", LINE)
    with pytest.raises(
        ModalityError, match=r"plugin 's' fails admission: second Bartlett identity: .* is its sign right\?"
    ):
        made.append("s", scalar, certificate=certificate)
    assert list(made.plugins) == []
    assert list(Registry.open(made.path).plugins) == []


def test_force_is_on_record_and_said_by_every_estimate(tmp_path, flipped):
    scalar, certificate = flipped
    made = Registry.create(tmp_path / "r", LINE)
    made.append("s", scalar, certificate=certificate, force="to see what it does")
    x = unit_normal(torch.zeros(5, 1).double(), torch.Generator().manual_seed(1))
    for view in (made, Registry.open(made.path, trust=True)):
        assert not view.certificate("s").passed
        fit = view.estimate({"s": x}, refine={"s": unit_normal}, simulations=2000)
        assert fit.trust["s"].verdict == "refined"  # whose calibration does not rest on the scalar being right
        raw = view.estimate({"s": x}, refine=False)
        assert not raw.converged
        assert raw.status is Status.MULTIMODAL  # its maxima are the bounds
        assert "admitted by force although: to see what it does (second Bartlett identity" in raw.reason


def test_force_without_a_failure_is_no_stain(registry, certificate):
    registry.append("w", WRONG, certificate=certificate, force="just in case")
    fit = registry.estimate({"w": data(2)}, refine=False)
    assert "force" not in fit.reason
    assert fit.trust["w"].verdict in ("certified", "beyond_certificate")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(registry, certificate, value):
    broken = Quadratic(WRONG.design, WRONG.metric, WRONG.offset)
    broken.offset[1] = value
    for settings in ({}, {"certificate": certificate}):
        with pytest.raises(
            ModalityError, match="plugin 'w' fails admission: weights that are not finite: offset; train it again"
        ):
            registry.append("w", broken, **settings)
    assert list(registry.plugins) == []
    admission = admit("w", broken, None, registry.parameters, "an experiment")
    assert admission.forced == "an experiment (weights that are not finite: offset; train it again)"


def test_a_certificate_of_other_parameters_is_refused_even_by_force(registry, certificate):
    swapped = Quadratic(WRONG.design, WRONG.metric, WRONG.offset, parameter_names=("b", "a"))
    for force in ("", "why not"):
        with pytest.raises(ModalityError, match=r"the certificate of plugin 'w' must be one of b, a, got one of a, b"):
            registry.append("w", swapped, certificate=certificate, force=force)


def test_what_is_no_certificate_is_refused(registry, certificate):
    for thing in ({"coverage": 0.68}, "passed", certificate.to_toml()):
        with pytest.raises(
            ModalityError, match=r"the certificate of plugin 'w' must be what engine.certificate.certify returns"
        ):
            registry.append("w", WRONG, certificate=thing)


def test_a_number_that_failed_without_words_is_shown_as_a_number(certificate):
    failing = dataclasses.replace(certificate, checks=(Check("mine", "failed", 1.25, 0.1, 1.0),))
    with pytest.raises(ModalityError, match=r"mine: 1.25 ± 0.1 where 1 is right"):
        admit("w", WRONG, failing, ParameterSpace(BOX), "")


def test_a_certificate_that_was_touched_is_found(registry, certificate):
    registry.append("w", WRONG, certificate=certificate)
    folder = registry.folder("w")
    arrays = zarr.open_group(folder / "weights.zarr", mode="r+")
    (key,) = [k for k, _ in _arrays(arrays) if k.startswith("certificate/") and "mean" in k and "coefficients" in k]
    arrays[key][...] = 0.0 * arrays[key][...]
    again = Registry.open(registry.path, trust=True)
    with pytest.raises(TamperedError, match="'w'"):
        again.certificate("w")
    with pytest.raises(TamperedError, match="'w'"):
        again.estimate({"w": data()}, refine=False)
    with pytest.raises(TamperedError, match="'w'"):
        again.verify()


def _arrays(group, prefix=""):
    for name, member in group.members():
        if isinstance(member, zarr.Group):
            yield from _arrays(member, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", member


def test_a_word_of_a_certificate_that_was_changed_is_found(registry, certificate):
    registry.append("w", WRONG, certificate=certificate, force="")
    path = registry.folder("w") / "plugin.toml"
    text = path.read_text(encoding="utf-8")
    assert '"noted"' in text
    path.write_text(text.replace('"noted"', '"passed"', 1), encoding="utf-8")
    with pytest.raises(TamperedError, match="'w'"):
        Registry.open(registry.path, trust=True).certificate("w")


def test_a_new_certificate_comes_with_a_new_plugin_and_the_past_keeps_its_own(registry, certificate):
    registry.append("w", WRONG)
    before = registry.digest
    registry.append("w", WRONG, supersede=True, certificate=certificate)
    assert registry.certificate("w") is not None
    past = registry.at(before)
    assert past.certificate("w") is None
    assert past.estimate({"w": data()}, refine=False).status is Status.UNCERTIFIED


def test_a_calibrated_plugin_with_its_certificate_goes_all_the_way(registry):
    space = ParameterSpace(BOX)
    calibrated = calibrate(WRONG, prior=space, simulate=TRUE, simulations=10_000, seed=1)
    certificate = certify(calibrated, prior=space, simulate=TRUE, simulations=10_000, seed=2)
    registry.append("w", calibrated, certificate=certificate)
    for made in (registry, Registry.open(registry.path, trust=True)):
        few, many = made.estimate({"w": data(2)}), made.estimate({"w": data(5000)})
        assert few.status is Status.CONVERGED
        assert few.trust["w"].verdict == "certified"
        assert few.refinement.kinds == {"w": "calibrated"}
        assert many.status is Status.BEYOND_CERTIFICATE
        assert many.trust["w"].bias > 0.3
        record = json.loads(many.to_json())
        assert record["trust"]["w"]["verdict"] == "beyond_certificate"
        assert record["refinement"]["kinds"] == {"w": "calibrated"}


def test_a_folder_whose_record_is_nonsense_is_refused_by_name(registry, certificate):
    from engine.admission import read_admission

    with pytest.raises(RegistryError, match=r"the certificate of plugin 'w' cannot be read: KeyError"):
        read_admission({"source": "simulations"}, "w")
    assert read_admission({"forced": "yes"}, "w").forced == "yes"
