"""How figures and texts are written in a terminal, and where. Text from outside is shown as text, never as codes."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final, Literal

from rich.console import Console
from rich.text import Text

SHORT_ID: Final = 8
_PATIENCE_S: Final = 0.5
"""How long work goes on before it is said that it does."""
_LEAST_SHARE: Final = 0.005


# --- where ------------------------------------------------------------------------------------------------------------
class _Terminal(Console):
    """A console that leaves it to the command what to do when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        """Raise what a plain ``print`` raises."""
        self.quiet = True
        raise BrokenPipeError


def stdout(*, width: int | None = None) -> Console:
    """Return the console for results."""
    return _Terminal(highlight=False, width=width)


def stderr() -> Console:
    """Return the console for what is no result: errors and progress."""
    return _Terminal(stderr=True, highlight=False)


def is_watched(console: Console) -> bool:
    """Tell whether somebody sees what moves: FORCE_COLOR asks for colours, not for a bar in a file."""
    return console.is_interactive and console.file.isatty()


def is_plain(console: Console) -> bool:
    """Tell whether only ASCII can be shown."""
    return not console.encoding.lower().startswith("utf")


def error(text: str) -> None:
    """Say in one line on stderr what went wrong."""
    stderr().print(Text(f"turntrace: {safe(' '.join(text.split()))}"), soft_wrap=True)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Say on stderr what goes on, where somebody watches and it takes a while."""
    console = stderr()
    if not is_watched(console):
        yield
        return
    status = console.status(text, spinner="line" if is_plain(console) else "dots")
    timer = threading.Timer(_PATIENCE_S, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.stop()


# --- texts and figures ------------------------------------------------------------------------------------------------
def safe(text: object) -> str:
    """Return a text with all that is not printable (control characters, changes of direction) written as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )


def duration(ms: float) -> str:
    """Write a time: ``350 ms``, ``1.2 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 04 h``."""
    if ms < 1_000:
        return f"{ms:.0f} ms"
    if ms < 59_950:  # which would be written as 60.0 s
        return f"{ms / 1_000:.1f} s"
    minutes, seconds = divmod(round(ms / 1_000), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24:02} h"


def money(usd: float, digits: int = 6) -> str:
    """Write a price: ``$12.34``, and below a dollar with so many digits."""
    if usd == 0 or usd >= 1:
        return f"${usd:,.2f}"
    return f"${usd:.{digits}f}" if usd >= 10.0**-digits else f"<${10.0**-digits:.{digits}f}"


def count(number: int, what: str) -> str:
    """Write how many there are: ``1 turn``, ``1,200 turns``."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def percent(share: float) -> str:
    """Write a share of 1: ``34%``; what is little and not nothing is ``<1%``."""
    return "<1%" if 0 < share < _LEAST_SHARE else f"{share:.0%}"


def clock(at_ns: int, form: Literal["day", "minute", "second", "time"] = "minute") -> str:
    """Write a time in UTC: ``2026-11-25 12:00``."""
    how = {"day": "%Y-%m-%d", "minute": "%Y-%m-%d %H:%M", "second": "%Y-%m-%d %H:%M:%S", "time": "%H:%M:%S"}[form]
    return datetime.fromtimestamp(at_ns // 1_000_000_000, UTC).strftime(how)


def short_clock(at_ns: int, now_ns: int) -> str:
    """Write a time in UTC as briefly as it can be told: ``19:04`` of today, ``11-29 19:04`` of this year, the day."""
    at, now = (datetime.fromtimestamp(ns // 1_000_000_000, UTC) for ns in (at_ns, now_ns))
    if at.year != now.year:
        return f"{at:%Y-%m-%d}"
    return f"{at:%H:%M}" if at.date() == now.date() else f"{at:%m-%d %H:%M}"


def bar(share: float, width: int, *, plain: bool, style: str = "cyan") -> Text:
    """Draw a share of 1."""
    filled = min(width, max(0, round(share * width)))
    full, empty = ("#", ".") if plain else ("\u2588", "\u2591")
    return Text.assemble((full * filled, style), (empty * (width - filled), "dim"))


def use_streams_that_cannot_fail() -> None:
    """Have characters that stdout and stderr cannot take written as escapes, instead of failing at them."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
