"""How figures and texts are written in the report: units, thousands separators, and texts from outside made visible."""

import html
import shlex
from datetime import UTC, datetime, timedelta
from typing import Final

_NS: Final = 1_000_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SHORT: Final = 26
_SHORT_ID: Final = 8


# --- figures ----------------------------------------------------------------------------------------------------------
def count(number: float) -> str:
    """Write a whole number: ``12,345``."""
    return f"{number:,.0f}"


def decimal(number: float) -> str:
    """Write a mean: ``3.4``, and large ones as whole numbers."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:,.1f}"


def money(usd: float) -> str:
    """Write a price: ``$12.34``, and below a dollar with as many digits as tell something."""
    if usd == 0 or usd >= 1:
        return f"${usd:,.2f}"
    return f"${usd:.4f}" if usd >= 0.0001 else "<$0.0001"


def duration(ms: float | None) -> str:
    """Write a time: ``350 ms``, ``1.2 s``, ``3 min 20 s``, ``2 h 05 min``, ``19 d 9 h``; a dash for None."""
    if ms is None:
        return NONE
    if ms < 1_000:
        return _unbroken(f"{ms:,.0f} ms")
    if ms < 59_950:  # which would be written as 60.0 s
        return _unbroken(f"{ms / 1_000:.1f} s")
    minutes, seconds = divmod(round(ms / 1_000), 60)
    if minutes < 60:
        return _unbroken(f"{minutes} min {seconds:02} s")
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return _unbroken(f"{hours} h {minutes:02} min")
    return _unbroken(f"{hours // 24:,} d {hours % 24} h")


def _unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def percent(share: float | None, digits: int = 0) -> str:
    """Write a share from 0 to 1: ``38%``; a dash for None."""
    return NONE if share is None else f"{100 * share:.{digits}f}%"


def between(bounds: tuple[float, float] | None) -> str:
    """Write the bounds of a rate: ``36-46%``; a dash for None."""
    return NONE if bounds is None else f"{100 * bounds[0]:.0f}\N{EN DASH}{100 * bounds[1]:.0f}%"


def times(number: int, one: str, many: str | None = None) -> str:
    """Write how many of something: ``1 session``, ``2,000 sessions``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def moment(at_ns: int) -> str:
    """Write a time, to the minute, in UTC."""
    return f"{_EPOCH + timedelta(seconds=at_ns // _NS):%Y-%m-%d %H:%M}"


def day_or_moment(at_ns: int) -> str:
    """Write a time in UTC, without the hour where it is midnight."""
    return moment(at_ns).removesuffix(" 00:00")


NONE: Final = "\N{EN DASH}"


# --- texts from outside -----------------------------------------------------------------------------------------------
def visible(text: object) -> str:
    """Return a text with all that is not printable (control characters, changes of direction) written as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )


def shortened(text: str, length: int = _SHORT) -> str:
    """Return a text with its middle left out where it is long."""
    if len(text) <= length:
        return text
    end = (length - 1) // 3
    return f"{text[: length - 1 - end]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def label(text: str, unknown: str = "not known", length: int = _SHORT) -> str:
    """Return a text for a chart, whose drawing reads some tags and entities of HTML; short."""
    return html.escape(shortened(visible(text), length), quote=False) if text else unknown


def beginning(an_id: str) -> str:
    """Return the beginning of an id that nobody chose, by which it is found; one that somebody chose is whole."""
    is_random = len(an_id) in (32, 64) and set(an_id) <= set("0123456789abcdef")
    return an_id[:_SHORT_ID] if is_random else an_id


def short_id(an_id: str) -> str:
    """Return the beginning of an id that nobody chose; one that somebody chose is shortened in its middle."""
    begins = beginning(an_id)
    return begins if begins != an_id else shortened(visible(an_id), 22)


def show_command(session_id: str) -> str:
    """Return what to type to see a session; the shell takes the id as it is."""
    dashes = "-- " if session_id.startswith("-") else ""
    return f"turntrace show {dashes}{shlex.quote(session_id)}"
