"""Days and times, as people say them, to nanoseconds since 1970."""

import re
import time
from datetime import UTC, date, datetime, timedelta
from typing import Final

from turntrace.errors import ConfigurationError

When = date | timedelta | str
"""A day, a time, how long ago, or one of these as text: ``2026-11-25``, ``2026-11-25T12:00``, ``7d``, ``yesterday``."""

NS: Final = 1_000_000_000
DAY_NS: Final = 86_400 * NS
FIRST_NS: Final = -(2**63)
LAST_NS: Final = 2**63 - 1
"""What a database holds, which is from the year 1677 until the year 2262."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_AGO: Final = re.compile(rf"(\d{{1,9}})\s*([{''.join(_SECONDS)}])", re.ASCII | re.IGNORECASE)
_DAYS_AGO: Final = {"today": 0, "yesterday": 1}


def day_of(text: str, name: str = "--since") -> int:
    """Read a day or a time in ISO 8601 (UTC where it says nothing else), in nanoseconds since 1970.

    A day stands for its beginning, and so do ``today`` and ``yesterday``; ``7d``, ``2h`` and ``90m`` are so long ago.
    What lies beyond the years that a database holds (1677 to 2262) is brought to their end.

    Args:
        text: The day or the time.
        name: What it was given as, for the message.

    Raises:
        ConfigurationError: If it is neither.
    """
    said = text.strip()
    if said.lower() in _DAYS_AGO:
        return (time.time_ns() // DAY_NS - _DAYS_AGO[said.lower()]) * DAY_NS
    if ago := _AGO.fullmatch(said):
        return _held(time.time_ns() - int(ago[1]) * _SECONDS[ago[2].lower()] * NS)
    try:
        return _time_of(datetime.fromisoformat(said))
    except ValueError as error:
        why = f": {error}" if re.match(r"\d{4}-?\d\d-?\d\d", said) and "isoformat" not in str(error) else ""
    raise ConfigurationError(
        f"{name} is {text!r:.40}{why}. Allowed are a day and a time in ISO 8601, how long ago, today and yesterday: "
        f"{_as(name, '2026-11-25')}, {_as(name, '2026-11-25T12:00')}, {_as(name, '7d')}, {_as(name, '2h')} or "
        f"{_as(name, '90m')}."
    )


def when(value: When, name: str) -> int:
    """Return a day, a time or how long ago in nanoseconds since 1970, as `day_of` reads texts.

    Args:
        value: The day, the time (UTC where it has no zone), how long ago, or a text.
        name: What it was given as, for the message.

    Raises:
        ConfigurationError: If it is none of these.
    """
    if isinstance(value, str):
        return day_of(value, name)
    if isinstance(value, timedelta):
        return _held(time.time_ns() - value // timedelta(microseconds=1) * 1000)
    if isinstance(value, datetime):
        return _time_of(value)
    if isinstance(value, date):
        return _time_of(datetime(value.year, value.month, value.day))
    raise ConfigurationError(
        f"{name} is {value!r:.40}, of type {type(value).__name__}. Allowed are a date, a datetime, a timedelta "
        f"(so long ago) and a text: {name}='2026-11-25', {name}='7d'. For nanoseconds since 1970 there is {name}_ns."
    )


def iso_day(at_ns: int) -> str:
    """Return the day of a time, in UTC."""
    return (_EPOCH + timedelta(days=at_ns // DAY_NS)).date().isoformat()


def iso_moment(at_ns: int) -> str:
    """Return a time in UTC to the second, and of the beginning of a day only the day."""
    at = _EPOCH + timedelta(seconds=at_ns // NS)
    return iso_day(at_ns) if at_ns % DAY_NS == 0 else f"{at:%Y-%m-%dT%H:%M:%S}"


def _time_of(at: datetime) -> int:
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return _held((at - _EPOCH) // timedelta(microseconds=1) * 1000)


def _held(at_ns: int) -> int:
    return min(LAST_NS, max(FIRST_NS, at_ns))


def _as(name: str, value: str) -> str:
    """Return how a value is given: as an option of a command, or as an argument."""
    return f"{name} {value}" if name.startswith("-") else f"{name}={value!r}"
