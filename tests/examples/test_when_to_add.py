"""The example of a sum that is wrong, and is made right."""

import sys

import pytest

from examples import when_to_add


def test_witnesses_that_know_nothing_alone_know_everything_together(capsys: pytest.CaptureFixture[str]) -> None:
    """The sum of two scalars that do not depend on θ is a coin: 0.5 to four standard errors of 4000 cases."""
    right, said, answers = when_to_add.witnesses(quick=True)
    assert abs(right["the sum"] - 0.5) < 4.0 * (0.25 / len(answers)) ** 0.5
    assert right["with the interaction"] >= 0.99
    assert said.shape == (len(answers), 2)
    assert "with the interaction is right in" in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_flags_the_sum_and_mends_it(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "w.png"
    monkeypatch.setattr(sys, "argv", ["when_to_add.py", "--quick", "--figure", str(picture)])
    when_to_add.main()
    printed = capsys.readouterr().out
    assert "dependent" in printed
    assert picture.stat().st_size > 10_000
    rows = {
        line[:28].strip(): line[28:].split()
        for line in printed.splitlines()
        if "±" in line and line.startswith("  the")
    }
    scatter, claimed = (float(v) for v in rows["the plain sum"][:2])
    assert scatter > 1.15 * claimed  # exactly 1.27; the standard error of 200 data sets is 0.05 of it
