"""The report's page: the numbers of its JSON, nothing that runs or loads, and files that are whole or not there."""

import base64
import dataclasses
import itertools
import json
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch.distributions import Uniform

from engine import Parameter, Registry
from engine.cli import main
from engine.report.contents import report
from engine.report.page import ReportError, page, write
from engine.result import Status
from modalities import Gaussian


class Page(HTMLParser):
    """What a browser would make of it: elements, their attributes, and the text of each."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.ids, self.json, self.data = [], [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        self.open.append((tag, attributes))
        if "data-path" in attributes:
            self.data.append([attributes["data-path"], attributes.get("value"), ""])
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        if self.open and self.open[-1][0] == "script":
            self.json += text
        if self.open and "data-path" in self.open[-1][1]:
            self.data[-1][2] += text


def _at(contents, pointer):
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        contents = contents[int(part)] if isinstance(contents, list) else contents[part]
    return contents


@pytest.fixture(scope="module")
def html(small_report):
    return small_report.html()


def test_every_number_on_the_page_is_the_one_in_its_json(html, small_report):
    read = Page(html)
    contents = json.loads(read.json)
    assert contents == json.loads(json.dumps(small_report.contents))
    assert len(read.data) > 60
    for pointer, value, text in read.data:
        expected = _at(contents, pointer)
        if expected is None:
            assert value is None
            assert text in ("—", "∞", "−∞", "unknown")
            continue
        assert float(value) == expected
        shown = text.replace("−", "-").replace(" %", "e-2")
        if shown != "∞":
            digit = 10.0 ** -len(shown.partition("e")[0].partition(".")[2]) * (0.01 if shown.endswith("e-2") else 1)
            assert abs(float(shown) - expected) <= max(0.51 * digit, 0.006 * abs(expected)), (pointer, text)


def test_the_numbers_are_those_of_python(small_report, workspace):
    fit = Registry.open(workspace).estimate()
    found = small_report.contents
    assert found["estimate"]["theta"] == fit.theta.tolist()
    assert found["estimate"]["provenance"] == fit.provenance
    assert found["intervals"]["mu"]["low"] == pytest.approx(fit.interval("mu").low)
    assert found["shares"]["marginal"]["<b>x</b>"]["both"] == pytest.approx(
        Registry.open(workspace).shares().marginal["<b>x</b>"]["both"]
    )


def test_hostile_names_units_and_titles_do_nothing(html, hostile, small_report):
    contents = json.loads(json.dumps(small_report.contents).replace("both", "<img src=x onerror=alert(3)>"))
    for text in (html, page(contents, small_report.pictures)):
        read = Page(text)
        assert [a for t, a in read.elements if t == "script"] == [{"type": "application/json", "id": "report"}]
        assert not [a for _, a in read.elements if any(name.startswith("on") for name in a)]
        assert all(a["src"].startswith("data:image/svg+xml;base64,") for t, a in read.elements if t == "img")
        assert not {t for t, _ in read.elements} & {"iframe", "object", "embed", "b", "svg", "base", "form"}
        assert "default-src 'none'" in next(a["content"] for t, a in read.elements if "http-equiv" in a)
    assert hostile not in html
    assert json.loads(Page(html).json)["parameters"][0]["unit"] == hostile
    for picture in small_report.pictures:
        assert b"<script" not in picture.svg


def test_it_is_one_file_and_refers_to_nothing_outside(html):
    read = Page(html)
    targets = [a.get("href") or a.get("src") for _, a in read.elements if a.get("href") or a.get("src")]
    assert all(t.startswith(("#", "data:")) for t in targets)
    assert {t[1:] for t in targets if t.startswith("#")} <= set(read.ids)
    assert len(read.ids) == len(set(read.ids))
    for word in ("@import", "url(", "http://", "https://"):
        assert word not in html.partition("</style>")[0]


def test_tables_figures_and_language_can_be_read_by_everyone(html):
    read = Page(html)
    tags = [t for t, _ in read.elements]
    assert dict(read.elements)["html"]["lang"] == "en"
    assert [a["scope"] for t, a in read.elements if t == "th"]  # a KeyError for one without
    assert all(len(a["alt"]) > 80 for t, a in read.elements if t == "img")
    assert tags.count("figcaption") == tags.count("figure") == tags.count("img") >= 3
    levels = [int(t[1]) for t in tags if t in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for _, a in read.elements:
        if a.get("role") == "region":
            assert a["tabindex"] == "0"
            assert a.get("aria-label") or a["aria-labelledby"] in read.ids


def test_the_alternative_of_the_corner_plot_has_its_numbers(small_report):
    corner = small_report.pictures[0]
    assert base64.b64encode(corner.svg)
    found = small_report.contents["posterior"]["parameters"]["mu"]["quantiles"]
    assert f"mu {found['0.5']:.2f}" in corner.alt
    assert "Beside it, each alone: both and one." in corner.alt


def test_the_command_and_the_python_on_the_page_are_runnable(small_report, tmp_path, workspace):
    words = shlex.split(small_report.contents["command"])
    assert words[:4] == ["evidence", "report", "--workspace", str(workspace)]
    code = (
        small_report.contents["python"]
        + f"\nassert fit.theta.tolist() == {small_report.contents['estimate']['theta']}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_writes_the_page_and_its_json(workspace, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.html"
    words = ["evidence", "report", "-w", str(workspace), "-o", str(out), "-n", "100", "--only", "one", "-m", "laplace"]
    monkeypatch.setattr(sys, "argv", [*words, "-f", "<b>x</b>=0", "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    printed, err = capsys.readouterr()
    assert done.value.code == 0
    assert err == ""
    assert json.loads(printed) == json.loads(Page(out.read_text(encoding="utf-8")).json)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_an_unwritable_place_is_refused_and_nothing_is_left(tmp_path, workspace, monkeypatch, capsys):
    with pytest.raises(ReportError, match="cannot be written"):
        write(tmp_path / "nowhere" / "a.html", "")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ReportError, match="directory"):
        write(tmp_path / "folder.html", "")
    (tmp_path / "old.html").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ReportError, match="No space left"):
        write(tmp_path / "old.html", "new")
    assert (tmp_path / "old.html").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.html", "old.html"]
    monkeypatch.setattr(sys, "argv", ["evidence", "report", "-w", str(workspace), "-o", "/nowhere/report.html"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    assert "nothing can be written" in capsys.readouterr().err


def test_what_could_not_be_found_is_said_in_its_place(tmp_path, monkeypatch):
    registry = Registry.create(tmp_path / "flat", [Parameter("mu"), Parameter("nu")])
    registry.append("a", Gaussian(parameter_names=("mu",), sd=1.0), observations=[[1.0]])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = report(registry)
    assert not found.converged
    assert found.contents["estimate"]["status"] == "not_identified"
    assert found.contents["posterior"]["status"] == "none"
    text = found.html()
    assert "There is none:" in text
    assert "figures need matplotlib" in text
    assert "not identified" in text


def test_an_estimate_that_failed_is_said_first_and_has_no_numbers(small_report, workspace):
    fit = Registry.open(workspace).estimate()
    nothing = torch.full_like(fit.theta, torch.nan)
    failed = dataclasses.replace(
        fit, status=Status.FAILED, reason="no row ended at a maximum", theta=nothing, contributions={},
        covariance=nothing.expand(2, 2), information=nothing.expand(2, 2), log_evidence=float("nan"), trust={},
    )  # fmt: skip
    why = dict.fromkeys(("intervals", "tension", "shares", "posterior", "figures"), failed.reason)
    gone = {"intervals": None, "tension": None, "shares": None, "posterior": {"status": "none", "converged": False}}
    contents = {**small_report.contents, **gone, "estimate": failed.to_dict(), "missing": why}
    text = page(contents)
    main = text[text.index("<main") :]
    assert main.index("failed</strong>") < main.index("no row ended at a maximum") < main.index("Each plugin alone")
    assert ">nan<" not in text


def test_a_bound_and_a_held_parameter_are_said_in_the_table(tmp_path):
    registry = Registry.create(
        tmp_path / "edge", [Parameter("a", Uniform(0.0, 9.0)), Parameter("b", Uniform(0.0, 9.0))]
    )
    registry.append("x", Gaussian(parameter_names=("a", "b"), sd=1.0), observations=[[-1.0, 2.0]])
    found = report(registry, fixed={"b": 2.0}, draws=100, method="laplace", figures=False)
    text = found.html()
    assert found.contents["estimate"]["status"] == "at_bound"
    assert "at its lower bound" in text
    assert '<span class="soft">fixed</span>' in text


def test_simulators_that_were_given_reach_their_plugins_and_the_page_says_so(workspace):
    registry = Registry.open(workspace)
    draw = registry.modality("one").simulate
    found = report(registry, refine={"one": draw}, simulations=1000, draws=100, method="laplace", figures=False)
    assert set(found.contents["alone"]) == {"both", "one"}
    assert "refinement" in found.contents["alone"]["one"]
    assert "refinement" not in found.contents["alone"]["both"]
    assert found.contents["command"] == ""  # a function cannot be given to a command
    assert "refine=simulators" in found.contents["python"]
    assert "with the same simulators" in found.html()
