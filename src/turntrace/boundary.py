"""Where turntrace meets the app: an error of ours is caught, logged once a kind with what to do, and counted.

In our own tests `strict` makes it be raised instead, so that tracking never hides a bug from them.
"""

import asyncio
import contextvars
import logging
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from turntrace.errors import TurntraceError
from turntrace.forking import lock_of

logger = logging.getLogger("turntrace")

P = ParamSpec("P")
R = TypeVar("R")

failures: Counter[str] = Counter()
"""How often each kind of error was caught in this process, by what was being done."""

_strict = False
_lock = lock_of(sys.modules[__name__])


def is_strict() -> bool:
    """Tell whether errors of ours are raised instead of caught."""
    return _strict


@contextmanager
def strict() -> Iterator[None]:
    """Raise errors of ours for the time of a block, as turntrace's own tests do."""
    global _strict
    before, _strict = _strict, True
    try:
        yield
    finally:
        _strict = before


def never_breaks(doing: str, *, exits: bool = False) -> Callable[[Callable[P, R]], Callable[P, R | None]]:
    """Make a function that the app's run goes through keep its errors to itself.

    Args:
        doing: What the function does, for the log: "reading the start of a run".
        exits: Whether a `SystemExit` is an error too: so it is in a thread of turntrace's own, which would end without
            a word.

    Returns:
        A decorator; the function it makes returns None when it failed.
    """
    kept = (Exception, SystemExit) if exits else (Exception,)

    def decorate(function: Callable[P, R]) -> Callable[P, R | None]:
        @wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
            try:
                return function(*args, **kwargs)
            except kept as error:
                caught(doing, error)
                return None

        return guarded

    return decorate


def caught(doing: str, error: BaseException) -> None:
    """Count an error of ours and log it, the first time with what to do; raise it when `strict` says so."""
    if _strict:
        raise error
    doing, name = one_line(doing), one_line(type(error).__name__)
    kind = f"{doing}: {name}"
    with _lock:
        failures[kind] += 1
        first = failures[kind] == 1
    if not first:
        logger.debug("turntrace: %s failed again (%s)", doing, name)
    elif isinstance(error, TurntraceError):
        logger.warning("turntrace: %s failed; the app goes on. %s", doing, one_line(str(error)))
    else:
        # Only the class: the text of an unexpected error may hold what a user wrote.
        # What is done by an argument of the app's, as "classifying by classify=...", fails in a function of the app's.
        whose = "look at that function" if "=..." in doing else "please report it"
        logger.warning(
            "turntrace: %s failed with %s; the app goes on, this part is not tracked. It is logged once: "
            "run with logging at DEBUG for its traceback, and %s.",
            doing,
            name,
            whose,
        )
        logger.debug("turntrace: %s failed:\n%s", doing, traceback_of(error))


def traceback_of(error: BaseException) -> str:
    """Return the traceback of an error and of those it came from, with their classes and never their texts."""
    parts: list[str] = []
    seen: list[BaseException] = []
    above: BaseException | None = error
    while above is not None and above not in seen:
        seen.append(above)
        parts.insert(0, "".join([*traceback.format_tb(above.__traceback__), one_line(type(above).__name__)]))
        above = above.__cause__ or (None if above.__suppress_context__ else above.__context__)
    return "\n".join(parts)


def one_line(text: str) -> str:
    """Return a text as a log can hold it: what would break the line or change a terminal is replaced."""
    return text if text.isprintable() else "".join(each if each.isprintable() else "\ufffd" for each in text)


def off_watched_loop(function: Callable[[], R]) -> R:
    """Call a function that asks the ledger; where this thread's event loop is watched for blocking calls, in another.

    ``langgraph dev`` has such calls raise an error (with ``blockbuster``). They take a fraction of a millisecond, which
    is less than a thread costs, so everywhere else the function is simply called.
    """
    if "blockbuster" not in sys.modules:
        return function()
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    context = contextvars.copy_context()
    done: Future[R] = Future()

    def run() -> None:
        try:
            done.set_result(context.run(function))
        except BaseException as error:  # it is raised where the function was called
            done.set_exception(error)

    threading.Thread(target=run, name="turntrace-off-loop", daemon=True).start()
    return done.result()
