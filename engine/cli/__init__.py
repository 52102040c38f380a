"""The ``evidence`` command: the registry's questions from a shell.

Exit status 0 means an answer that can be trusted, 1 a fit that cannot, 2 wrong usage or input.
"""

from __future__ import annotations

import os
import sys
from zipfile import BadZipFile

import typer

from engine.cli import answers, checks, forecast, inspect, ledger, posterior, report, tension, training
from engine.cli.console import refuse

__all__ = ["app", "main"]

#: The command with its subcommands, for ``typer.testing.CliRunner`` and the like.
app = typer.Typer(
    name="evidence",
    help="Sum one log-evidence per kind of data, and estimate the parameters they share.",
    epilog="Exit status: 0 an answer that can be trusted, 1 a fit that cannot, 2 wrong usage or input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for name, command in {
    "init": ledger.init,
    "list": ledger.list_,
    "show": ledger.show_,
    "verify": ledger.verify,
    "append": ledger.append,
    "train": training.train,
    "estimate": answers.estimate,
    "posterior": posterior.posterior,
    "tension": tension.tension,
    "forecast": forecast.forecast,
    "report": report.report,
    "check": checks.check,
    "inspect": inspect.inspect,
}.items():
    app.command(name)(command)


def main() -> None:
    """Run the command, turning what the engine refuses into a message and exit status 2.

    Raises:
        SystemExit: always, with the exit status.

    Example:
        >>> from unittest.mock import patch
        >>> with patch("sys.argv", ["evidence", "verify", "--workspace", "/nowhere"]):
        ...     main()
        Traceback (most recent call last):
        SystemExit: 2
    """
    from engine.errors import EvidenceError, UntrustedError

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow small algebra a hundredfold
    try:
        app()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except UntrustedError as error:
        refuse(f"{error} (on the command line, --trust)")
    except EvidenceError as error:
        refuse(str(error))
    except (OSError, ValueError, MemoryError, BadZipFile) as error:
        refuse(f"{type(error).__name__}: {error}")
