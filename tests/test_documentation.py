"""Every public name explains itself, and what the documents show runs and leads somewhere."""

import importlib
import inspect
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").rglob("README.md"))]
INSIDE = "engine.testing."  # the battery is public through its package alone

FENCE = re.compile(r"^([ \t]*)```(\w*)[^\n]*\n(.*?)^\1```[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(
    r"""\]\(<?([^()\s<>]+)>?(?:\s+"[^"]*")?\)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=["']([^"']+)["']""", re.MULTILINE
)
HEADING = re.compile(r"^#+ +(.*?) *#* *$", re.MULTILINE)


def _modules():
    for package in ("engine", "modalities"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            private = any(part.startswith("_") for part in name.split("."))
            if not private and not name.startswith(INSIDE):
                yield name


def _public():
    """(name, object, module) of every name in an ``__all__``, each object where it is defined."""
    found = {}
    for name in _modules():
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            own = inspect.isclass(value) or inspect.isfunction(value)
            key = id(value) if own else f"{name}.{public}"
            if key not in found or getattr(value, "__module__", "") == name:
                found[key] = pytest.param(value, module, public, id=f"{name}.{public}")
    return sorted(found.values(), key=lambda param: str(param.id))


def _arguments(function):
    names = list(inspect.signature(function).parameters)
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def _unlisted(function, text):
    """The arguments that have no line such as "low, high: ..."."""
    return [name for name in _arguments(function) if not re.search(rf"^ +(\w+, )*{name}(, \w+)*: ", text, re.MULTILINE)]


def _unmentioned(function, text):
    text = text.replace("θ", "theta ")
    return [name for name in _arguments(function) if not re.search(rf"\b{name}\b", text)]


def _methods(cls):
    """The public methods and properties that a class defines itself, with what documents them."""
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function):
            inherited = [vars(base)[name].__doc__ for base in cls.__mro__[1:] if name in vars(base)]
            yield name, function, [function.__doc__ or "", *(text or "" for text in inherited)]


@pytest.mark.parametrize(("value", "module", "name"), _public())
def test_a_public_name_says_what_it_is_with_an_example_that_runs(value, module, name):
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        source = inspect.getsource(module)
        assert re.search(rf"^#: .*\n(?:#.*\n)*{name}\b", source, re.MULTILINE), f"{name} needs a comment '#: ...'"
        return
    text = value.__doc__ or ""
    assert text.strip()
    assert ">>> " in text, "an example is missing"
    if inspect.isfunction(value):
        assert not _unlisted(value, text)
        return
    for constructor in (vars(value).get("__init__"), vars(value).get("__new__")):
        if getattr(constructor, "__module__", None) == value.__module__:  # its own, or that of a dataclass
            assert set(_unlisted(constructor, text)) <= {"args", "kwargs"}
    for method, function, texts in _methods(value):
        assert texts[0].strip(), f"{method} needs a docstring"
        assert not _unmentioned(function, " ".join(texts)), method


def test_the_public_names_are_found():
    found = {param.id for param in _public()}
    assert {"engine.registry.Registry", "engine.errors.EvidenceError", "modalities.gaussian.Gaussian"} <= found
    assert len(found) > 80


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A copy of the repository's own workspace as the current directory."""
    shutil.copy(ROOT / "registry.toml", tmp_path)
    shutil.copytree(ROOT / "plugins", tmp_path / "plugins")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_python_of_a_document_runs_as_it_is_written(document):
    text, namespace = document.read_text(encoding="utf-8"), {"__name__": "__main__"}
    for fence in FENCE.finditer(text):
        if fence[2] in ("python", "py"):
            indent, before = fence[1], text.count("\n", 0, fence.start(3))
            lines = [line.removeprefix(indent) for line in fence[3].splitlines()]
            exec(compile("\n" * before + "\n".join(lines), str(document), "exec"), namespace)


def test_the_readme_shows_python():
    assert any(fence[2] == "python" for fence in FENCE.finditer(DOCUMENTS[0].read_text(encoding="utf-8")))


def _anchors(text):
    """What GitHub calls the headings: lower case, blanks as hyphens, without other punctuation."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


@pytest.mark.parametrize("document", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_links_to_is_there(document):
    prose = FENCE.sub("", document.read_text(encoding="utf-8"))
    broken = []
    for target in filter(None, (a or b or c for a, b, c in LINK.findall(re.sub(r"`[^`\n]*`", "", prose)))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        there = file.exists() and ROOT in (file, *file.parents)
        if there and anchor and file.suffix == ".md":
            there = anchor in _anchors(file.read_text(encoding="utf-8"))
        if not there:
            broken.append(target)
    assert not broken
