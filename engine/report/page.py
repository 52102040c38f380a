"""A report as one HTML page that needs nothing else: no scripts, no network, no fonts.

Every number on it is an element with its value and its place in the embedded JSON (RFC 6901), so that the page cannot say
anything else. Names come from registries that anybody may have written: all text is escaped, and the page's own policy
lets nothing run or load.

References:
    | RFC 6901, JSON Pointer; W3C, Content Security Policy Level 3; WCAG 2.2
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EvidenceError
from engine.information.decomposition import UNITS
from engine.report.tables import rounded

if TYPE_CHECKING:
    from engine.report.contents import Picture

__all__ = ["ReportError", "page", "write"]

#: What a status means, for somebody who has not read the manual.
MEANINGS = {
    "converged": "the one maximum, inside its bounds",
    "at_bound": "a bound or another constraint holds the estimate",
    "not_identified": "the data say nothing about a direction in the parameters",
    "multimodal": "another maximum is nearly as high",
    "outside_domain": "a learned plugin is used outside of what it was trained on",
    "beyond_certificate": "more observations than the certificates of learned plugins carry",
    "uncertified": "nobody knows the bias of a learned plugin",
    "dependent": "parts that the sum takes for independent are not",
    "failed": "no answer was found",
    "unreliable": "a diagnostic of the sampler failed",
    "interrupted": "stopped before all draws were finished",
    "none": "there is no posterior",
}


class ReportError(EvidenceError, ValueError):
    """A report that cannot be written.

    Example:
        >>> issubclass(ReportError, ValueError)
        True
    """


def page(contents: Mapping[str, Any], pictures: Sequence[Picture] = ()) -> str:
    """The page of a report.

    Arguments:
        contents: What it says, as :class:`engine.report.contents.Report` has it.
        pictures: Its figures.

    Returns:
        HTML.

    Example:
        >>> from engine import Registry
        >>> from engine.report.contents import report
        >>> found = report(Registry.open("."), only="chronometers", fixed={"rd": 147.0, "M": 23.8}, figures=False)
        >>> contents = {**found.contents, "title": "</title><script>alert(1)</script>"}
        >>> "<script>alert" in page(contents), "&lt;script&gt;alert" in page(contents)
        (False, True)
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("engine.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [
        {
            "kind": {"corner": "corner", "curve": "curve"}.get(p.name.partition("-")[0], "wide"),
            "width": _width(p.svg),
            "caption": p.caption,
            "alt": p.alt,
            "source": "data:image/svg+xml;base64," + base64.b64encode(p.svg).decode(),
        }
        for p in pictures
    ]
    return environment.get_template("page.html").render(
        **contents,
        c=contents,
        pictures=shown,
        n=_Numbers(contents),
        meanings=MEANINGS,
        bits_of_a_nat=UNITS["bits"],
        doubts=_doubts(contents["inspection"]),
        json=_embedded(contents),
    )


def _doubts(inspection: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Why numbers of an inspection are not reliable: reason -> which are not."""
    if inspection is None:
        return {}
    worth = inspection["worth"]
    told = [(f"{name} alone", one) for name, one in worth["alone"].items()]
    told += [("all together", worth["total"])] if len(worth["alone"]) > 1 else []
    told += [(f"{name} beside the others", one) for name, one in worth["added"].items()]
    out: dict[str, list[str]] = {}
    for what, one in told:
        if not one["reliable"]:
            out.setdefault(one["reason"], []).append(what)
    return out


def _width(svg: bytes) -> int:
    """How wide to show a picture at most, in pixels: letters of 8 to 10 points come out as large as the text beside them."""
    found = re.search(rb'<svg[^>]*?\bwidth="([\d.]+)pt"', svg)
    return round(1.7 * float(found.group(1))) if found else 800


def _embedded(contents: Mapping[str, Any]) -> Any:
    """JSON for a script element that no text in it can end."""
    from markupsafe import Markup

    text = json.dumps(contents, allow_nan=False, ensure_ascii=False, indent=1)
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return Markup(text)


class _Numbers:
    """Numbers of the contents as elements that know where they are from."""

    def __init__(self, contents: Mapping[str, Any]) -> None:
        self.contents = contents

    def at(self, *path: str | int) -> Any:
        found: Any = self.contents
        for part in path:
            found = found[part]
        return found

    def _element(self, path: Sequence[str | int], text: str) -> Any:
        from markupsafe import Markup

        value = self.at(*path)
        pointer = "".join("/" + str(p).replace("~", "~0").replace("/", "~1") for p in path)
        if value is None:
            return Markup('<span class="none" data-path="{}">{}</span>').format(pointer, text or "—")
        return Markup('<data value="{}" data-path="{}">{}</data>').format(repr(value), pointer, text)

    def value(self, *path: str | int, error: float | None) -> Any:
        """A value, to the second digit of an error."""
        v = self.at(*path)
        known = error is not None and math.isfinite(error) and error > 0
        text = "" if v is None else rounded(v, error)[0] if known and error is not None else f"{v:.6g}"
        return self._element(path, text.replace("-", "−"))

    def error(self, *path: str | int, value: float | None, unknown: str = "—") -> Any:
        """An error, to its second digit."""
        e = self.at(*path)
        return self._element(path, unknown if e is None else rounded(0.0 if value is None else value, e)[1])

    def general(self, *path: str | int, digits: int = 3, unknown: str = "—") -> Any:
        """A number to so many digits; a whole one whole."""
        v = self.at(*path)
        text = unknown if v is None else str(v) if isinstance(v, int) else f"{v:.{digits}g}"
        return self._element(path, text)

    def places(self, *path: str | int, places: int = 2, unknown: str = "—", sign: bool = False) -> Any:
        """A number to so many places."""
        v = self.at(*path)
        text = unknown if v is None else f"{round(v, places) + 0.0:{'+' if sign else ''}.{places}f}"
        return self._element(path, text.replace("-", "−"))

    def percent(self, *path: str | int) -> Any:
        """A share in per cent."""
        v = self.at(*path)
        return self._element(path, "" if v is None else f"{100 * v:.1f} %".replace("-", "−"))


def write(path: str | PathLike[str], text: str) -> None:
    """Write a page, whole or not at all.

    Arguments:
        path: Where to; a file that is there is replaced.
        text: The page.

    Raises:
        ReportError: for a place that cannot be written; nothing is left half-written.

    Example:
        >>> write("/nowhere/report.html", "")
        Traceback (most recent call last):
        engine.report.page.ReportError: the report cannot be written to /nowhere/report.html: No such file or directory
    """
    target = Path(path)
    part = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        part = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        part.replace(target)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise ReportError(f"the report cannot be written to {target}: {error.strerror or error}") from error
