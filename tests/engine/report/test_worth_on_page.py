"""What plugins are worth, on the report's page: the numbers of the inspection, and bad news where there is some."""

import dataclasses
import functools
import json
import math
import re

import pytest
import torch
from torch.distributions import Normal, Uniform

from engine import Parameter, Registry
from engine.errors import ObservationError
from engine.information import Decomposition, Dependence, Inspection, Interactions, PairTest, Worth, Worths, inspect
from engine.information.interactions import Carried
from engine.report.contents import report
from engine.report.page import ReportError, page
from modalities import Gaussian

QUICK = {"draws": 100, "method": "laplace", "figures": False}
BAD = '<strong class="status bad">{}</strong>'


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Two plugins whose noises have a correlation of 0.8, and one with few observations."""
    made = Registry.create(tmp_path_factory.mktemp("worth") / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    e = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    made.append("a", Gaussian(parameter_names=("mu",), sd=1.0), observations=e[:, :1])
    made.append("b", Gaussian(parameter_names=("mu",), sd=2.0), observations=1.6 * e[:, :1] + 1.2 * e[:, 1:2])
    made.append("c", Gaussian(parameter_names=("mu",), sd=1.0), observations=e[:5, 2:])
    return made


@pytest.fixture(scope="module")
def paired(registry):
    return report(registry, without="c", inspect=True, dependence=True, **QUICK)


@pytest.fixture
def quick(monkeypatch):
    """Inspections of few simulations."""
    monkeypatch.setattr("engine.report.contents.inspect_of", functools.partial(inspect, simulations=200))


def _shown(text):
    """Place in the inspection -> what the page writes there."""
    return dict(re.findall(r'<data value="[^"]*" data-path="/inspection/([^"]*)">([^<]*)</data>', text))


def _section(text):
    return re.search(r'<section aria-labelledby="worth">.*?</section>', text, re.DOTALL).group()


def test_the_page_has_the_numbers_of_the_inspection(paired):
    told, shown = paired.contents["inspection"], _shown(paired.html())
    for name, truth in (("a", 0.3466), ("b", 0.1116)):
        one, added = told["worth"]["alone"][name], told["worth"]["added"][name]
        assert one["information"] == pytest.approx(truth, abs=4 * one["error"])
        assert float(shown[f"worth/alone/{name}/information"]) == pytest.approx(one["information"], abs=1e-3)
        assert float(shown[f"worth/alone/{name}/error"]) == pytest.approx(one["error"], abs=1e-3)
        assert float(shown[f"worth/alone/{name}/bits"]) == pytest.approx(one["bits"], abs=1e-3)
        assert float(shown[f"worth/added/{name}/information"]) == pytest.approx(added["information"], abs=1e-3)
    assert float(shown["worth/total/information"]) == pytest.approx(0.4055, abs=0.05)
    pair = told["interactions"][0]
    for what in ("redundancy", "unique1", "unique2"):
        assert float(shown[f"interactions/0/{what}"]) == pytest.approx(pair[what], abs=1e-3)
    assert paired.html().count(">unknown</span>") == 2  # synergy, and what the sum misses
    assert shown["dependence/pairs/0/adjusted_p_value"] == "0.0005"
    assert shown["dependence/pairs/0/units"] == "60"


def test_dependent_plugins_are_bad_news_at_once_and_in_their_table(paired, registry):
    fit = registry.estimate(only=["a", "b"], dependence=True)
    assert paired.contents["inspection"]["dependence"] == fit.dependence.to_dict()
    assert (paired.dependent, paired.converged) == (True, False)
    text = paired.html()
    assert text.index(BAD.format("plugins depend on each other")) < text.index('id="worth"')
    assert BAD.format("depend") in _section(text)
    assert "from the scores of both together" in _section(text)
    assert paired.contents["estimate"]["status"] == "dependent"
    assert paired.contents["estimate"]["covariance_kind"] == "godambe"


def test_the_command_and_the_python_inspect_again(paired):
    assert {"--inspect", "--paired"} <= set(paired.contents["command"].split())
    names = {}
    exec(paired.contents["python"], names)
    assert names["inspection"].to_dict() == paired.contents["inspection"]


def test_equal_numbers_are_not_paired_unless_somebody_says_so(registry, quick):
    found = report(registry, only=["a", "b"], inspect=True, **QUICK)
    assert found.contents["inspection"]["dependence"] is None
    assert "for one unit" in found.contents["missing"]["test of dependence"]
    assert "Not tested is whether plugins depend on each other: it takes" in found.html()
    assert (found.dependent, found.converged) == (False, True)
    assert "dependence" not in found.contents["python"]


def test_without_an_inspection_the_estimate_tells_the_dependence(registry):
    found = report(registry, only=["a", "b"], dependence=True, **QUICK)
    assert (found.dependent, found.converged) == (True, False)
    assert BAD.format("plugins depend on each other") in found.html()


def test_a_test_that_finds_nothing_is_told(tmp_path):
    made = Registry.create(tmp_path / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    e = torch.randn(60, 2, generator=torch.Generator().manual_seed(2))
    for k, name in enumerate("ab"):
        made.append(name, Gaussian(parameter_names=("mu",), sd=1.0), observations=e[:, k : k + 1])
    found = report(made, dependence=True, **QUICK)
    assert (found.dependent, found.converged) == (False, True)
    assert 'Independence: <strong class="status good">no dependence found</strong>' in found.html()
    assert "Independence: " not in report(made, **QUICK).html()


def test_plugins_that_cannot_be_paired_are_refused(registry):
    with pytest.raises(ObservationError, match="two plugins with as many observations"):
        report(registry, only=["a", "c"], dependence=True, **QUICK)


def test_an_improper_prior_gives_the_reason_and_the_report_is_written(evidence, tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("mu", Uniform(-9.0, 9.0)), Parameter("nu")])
    registry.append("a", Gaussian(parameter_names=("mu",), sd=1.0), observations=[[1.0]])
    registry.append("b", Gaussian(parameter_names=("nu",), sd=1.0), observations=[[2.0]])
    out = tmp_path / "report.html"
    status, printed, _ = evidence("report", "-w", registry.path, "-o", out, "--inspect")
    assert status == 1  # there is no posterior either
    assert "no inspection: " in printed
    text = out.read_text(encoding="utf-8")
    contents = json.loads(re.search(r'id="report">(.*?)</script>', text, re.DOTALL).group(1))
    assert contents["inspection"] is None
    assert "'nu' with a flat one" in contents["missing"]["inspection"]
    assert "No answer: " in _section(text)
    assert "inspect(" not in contents["python"]


def test_nothing_is_said_of_worth_where_nobody_asked(registry):
    found = report(registry, only="a", **QUICK)
    assert found.contents["inspection"] is None
    assert "#worth" not in found.html()
    assert "--inspect" not in found.contents["command"]


def test_the_command_says_that_plugins_depend_and_draws_their_worth(evidence, registry, quick, tmp_path):
    out = tmp_path / "report.html"
    words = ("-m", "laplace", "-n", 100, "--without", "c", "--inspect", "--paired", "-o", out)
    status, printed, err = evidence("report", "-w", registry.path, *words)
    assert status == 1, err
    assert printed.strip().endswith("estimate dependent, posterior converged, plugins depend on each other")
    assert "Bars of the information about the parameters, in nats. a: alone 0.3" in out.read_text(encoding="utf-8")


def test_what_is_no_inspection_is_refused(registry):
    with pytest.raises(ReportError, match="inspect is True, False or an Inspection, got 'yes'"):
        report(registry, inspect="yes")


def _given(reliable=True):
    """Two plugins whose interaction is registered; the second tells nothing where it is not reliable."""
    fine = Worth("a", 0.35, 0.01, 0.35, 5, True, "")
    other = fine if reliable else Worth("b", -math.inf, math.nan, math.nan, 2, False, "3 % are called impossible")
    words = {} if reliable else {"reliable": False, "reason": "b: 3 % are called impossible"}
    pair = Decomposition(0.1, 0.25, -1e-9, 0.02, 0.35, 0.1, 0.4, 0.0, errors={"synergy": 0.004}, **words)
    carried = {"a-with-b": Carried(("a", "b"), 0.511, 0.012, normalisation=1.2, normalisation_error=0.01)}
    test = PairTest(("a", "b"), 100, 5.0, 4, 0.3, 0.3, 0.0, 0.06, ("a-with-b",))
    between = Dependence({("a", "b"): test}, torch.zeros(1), ("a", "b"), torch.zeros(2, 2, 1, 1), 0.05, False)
    certificates = {"a": {"verdict": "certified", "carries": 321.4}, "b": {"verdict": "uncertified", "carries": None}}
    worths = Worths({"a": fine, "b": other}, fine, {"a": fine, "b": other}, False, 500)
    return Inspection(
        worths, Interactions({("a", "b"): pair}, {("a", "b"): "a-with-b"}, carried), between, certificates
    )


def _page(paired, given):
    alone = {k: v for k, v in paired.contents["estimate"].items() if k != "dependence"} | {"reason": ""}
    return page({**paired.contents, "estimate": alone, "inspection": given.to_dict(), "inspected": given.observations})


def test_a_pair_that_an_interaction_carries_is_good_news(paired):
    text = _page(paired, _given())
    assert "plugins depend on each other" not in text
    assert '<strong class="status good">no dependence found</strong>' in _section(text)
    assert _shown(text)["carried/a-with-b/information"] == "0.511"
    assert "not normalised, E e^s is 1.200 ± 0.010" in text
    assert '<td class="left">a-with-b</td>' in _section(text)
    shown = _shown(text)
    assert shown["interactions/0/synergy"] == "0.020"
    assert shown["interactions/0/errors/synergy"] == "0.004"
    assert shown["interactions/0/unique2"] == "0.000"
    assert shown["interactions/0/conditional_information"] == "0.000"
    assert ">unknown<" not in text


def test_that_scores_alone_were_compared_is_told(paired):
    given = _given()
    tests = {
        pair: dataclasses.replace(t, beside=(), common="an entry that both carry")
        for pair, t in given.dependence.pairs.items()
    }
    text = _page(paired, dataclasses.replace(given, dependence=dataclasses.replace(given.dependence, pairs=tests)))
    assert '<td class="left">scores alone, as of an entry that both carry</td>' in _section(text)


def test_what_is_not_reliable_has_its_reason_and_certificates_their_numbers(paired):
    text = _section(_page(paired, _given(reliable=False)))
    assert text.count(BAD.format("not reliable")) == 4  # its row, the reasons, the pair, and the interaction
    assert "<strong>a and b</strong>: b: 3 % are called impossible" in text
    assert "<strong>b alone, b beside the others</strong>: 3 % are called impossible" in text
    assert "nan" not in text
    assert 'data-path="/inspection/certificates/a/carries">321</data>' in text
    assert BAD.format("uncertified") in text
    assert "a set of observations" in text


def test_an_inspection_that_was_given_is_shown_as_it_is(registry):
    found = report(registry, without="c", inspect=_given(), **QUICK)
    assert found.contents["inspection"] == _given().to_dict()
    assert "--inspect" not in found.contents["command"]
    assert "observations={'a': 5, 'b': 5}, simulations=500)  # or the one that was given" in found.contents["python"]
