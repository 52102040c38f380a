"""What tests of the engine share."""

import sys

import pytest


@pytest.fixture
def evidence(monkeypatch, capsys):
    """Run the command in this process: (exit status, stdout, stderr)."""

    from engine.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evidence", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        return done.value.code or 0, out, err

    return run
