"""How a command is run: its exit code, and what becomes of everything that goes wrong."""

import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand

from turntrace.cli import render
from turntrace.errors import TurntraceError

OK: Final = 0
NOT_WELL: Final = 1
CANNOT: Final = 2
INTERRUPTED: Final = 130
"""What a shell says of a program that Ctrl-C ended."""
NOBODY_READS: Final = 141
"""What a shell says of a program that wrote into a pipe which nobody read any more, as with ``| head``."""

EXIT_CODES: Final = """\
\b
Exit codes:
  0    done
  1    done, but something is not well: doctor found a problem, export left
       something waiting, replay met lines that it could not play
  2    could not be done; one line on stderr says why and what to do
  130  stopped by Ctrl-C
  141  whoever read the output went away, as with | head
"""

TRACEBACK: Final = "TURNTRACE_TRACEBACK"
"""The environment variable with which a mistake of turntrace's own shows where it was made."""

_ALIKE: Final = 0.7
LedgerOption = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        metavar="URL",
        help="The ledger, as sqlite:///path/to/file.db. Default: TURNTRACE_LEDGER_URL, else one in your data folder.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, with stable names and times in ISO 8601.")]
CsvOption = Annotated[
    bool, typer.Option("--csv", help="Write CSV (RFC 4180), with a header; no cell is run by a spreadsheet.")
]


class Command(TyperCommand):
    """A command whose mistakes of use are said plainly."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the arguments; of what is wrong with them, leave out what would mislead."""
        try:
            return super().make_context(*args, **kwargs)
        except Exception as error:
            _say_plainly(error)
            raise


def _say_plainly(error: Any) -> None:
    """Name only options that look like an unknown one, and none of pydantic's words."""
    if isinstance(getattr(error, "message", None), str):
        error.message = error.message.removeprefix("Value error, ")
    if getattr(error, "possibilities", None):
        alike = {each.lstrip("-"): each for each in error.possibilities}
        unknown = str(getattr(error, "option_name", "")).lstrip("-")
        error.possibilities = [alike[name] for name in get_close_matches(unknown, alike, cutoff=_ALIKE)]


def command(function: Callable[..., int]) -> Callable[..., None]:
    """Make a command of a function that returns an exit code: what goes wrong becomes one line, never a traceback."""

    @wraps(function)
    def run(**arguments: Any) -> None:
        render.use_streams_that_cannot_fail()
        try:
            code = _run(function, arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            _leave_the_pipe()
            code = NOBODY_READS
        raise typer.Exit(code)

    return run


def _run(function: Callable[..., int], arguments: dict[str, Any]) -> int:
    try:
        return function(**arguments)
    except TurntraceError as error:
        render.error(str(error))
    except KeyboardInterrupt as stop:
        render.error(str(stop) or "stopped")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        render.error(f"{where}{error.strerror or error}. Check the place, its rights and the room there.")
    except Exception as error:
        if _came_of_ctrl_c(error):
            render.error("stopped")
            return INTERRUPTED
        if os.environ.get(TRACEBACK):
            raise
        render.error(
            f"A mistake of turntrace's own: {type(error).__name__}: {error}. Please report it, with what "
            f"{TRACEBACK}=1 in the environment shows."
        )
    return CANNOT


def _came_of_ctrl_c(error: BaseException | None) -> bool:
    """Tell whether an error was raised on the way out of Ctrl-C, as by Python's own waiting, whose locks it leaves."""
    return isinstance(error, KeyboardInterrupt) or (error is not None and _came_of_ctrl_c(error.__context__))


def _leave_the_pipe() -> None:
    """Have what Python still writes at its end go nowhere, since it would say that it cannot."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return
