"""Days and times, as people say them, to nanoseconds since 1970."""

import re
import time
from datetime import UTC, date, datetime, timedelta, tzinfo
from datetime import time as time_of_day
from typing import Final

from turntrace.errors import ConfigurationError

When = date | timedelta | str
"""A day, a time, how long ago, or one of these as text: ``2026-11-25``, ``2026-11-25T12:00``, ``14:05``, ``7d``."""

NS: Final = 1_000_000_000
DAY_NS: Final = 86_400 * NS
FIRST_NS: Final = -(2**63)
LAST_NS: Final = 2**63 - 1
"""What a database holds, which is from the year 1677 until the year 2262."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_AGO_PART: Final = re.compile(rf"(\d{{1,9}})\s*([{''.join(_SECONDS)}])\s*", re.ASCII | re.IGNORECASE)
_AGO: Final = re.compile(rf"(?:{_AGO_PART.pattern})+", re.ASCII | re.IGNORECASE)
_CLOCK: Final = re.compile(r"\d{1,2}:\d\d(:\d\d)?(Z|[+-]\d\d:\d\d)?", re.ASCII | re.IGNORECASE)
_DAYS_AGO: Final = {"today": 0, "yesterday": 1}


def day_of(text: str, name: str = "--since") -> int:
    """Read a day or a time in ISO 8601 (UTC where it says nothing else), in nanoseconds since 1970.

    A day stands for its beginning, and so do ``today`` and ``yesterday``; ``14:05`` is a time of today; ``7d``, ``2h``,
    ``90m`` and ``1h30m`` are so long ago. What lies beyond the years that a database holds (1677 to 2262) is brought to
    their end.

    Args:
        text: The day or the time.
        name: What it was given as, for the message.

    Raises:
        ConfigurationError: If it is neither, or a time of today that lies ahead.
    """
    said = text.strip()
    if said.lower() in _DAYS_AGO:
        return (time.time_ns() // DAY_NS - _DAYS_AGO[said.lower()]) * DAY_NS
    if _AGO.fullmatch(said):
        seconds = sum(int(number) * _SECONDS[unit.lower()] for number, unit in _AGO_PART.findall(said))
        return _held(time.time_ns() - seconds * NS)
    try:
        at = _of_today(said) if _CLOCK.fullmatch(said) else datetime.fromisoformat(said)
    except ValueError as error:
        why = f": {error}" if re.match(r"\d{4}-?\d\d-?\d\d|\d+:", said) and "isoformat" not in str(error) else ""
        raise ConfigurationError(
            f"{name} is {text!r:.40}{why}. Allowed are a day and a time in ISO 8601, a time of today, how long ago, "
            f"today and yesterday: {_as(name, '2026-11-25')}, {_as(name, '2026-11-25T12:00')}, {_as(name, '14:05')}, "
            f"{_as(name, '7d')}, {_as(name, '2h')} or {_as(name, '1h30m')}."
        ) from None
    if _CLOCK.fullmatch(said):
        _check_not_ahead(at, said, name)
    return _time_of(at)


def seconds_of(text: str, name: str) -> float:
    """Read how long something takes: a number of seconds, or ``90s``, ``30m``, ``2h``, ``1h30m``.

    Args:
        text: How long.
        name: What it was given as, for the message.

    Raises:
        ConfigurationError: If it is neither.
    """
    said = text.strip()
    if _AGO.fullmatch(said):
        return float(sum(int(number) * _SECONDS[unit.lower()] for number, unit in _AGO_PART.findall(said)))
    try:
        return float(said)
    except ValueError:
        raise ConfigurationError(
            f"{name} is {text!r:.40}. Allowed are seconds, minutes, hours and days: {_as(name, '1800')}, "
            f"{_as(name, '30m')}, {_as(name, '2h')} or {_as(name, '1h30m')}."
        ) from None


def _of_today(said: str) -> datetime:
    """Return a time of today, in UTC where it has no zone.

    Raises:
        ValueError: If there is no such time.
    """
    clock = time_of_day.fromisoformat(said if said[1] != ":" else f"0{said}")
    zone = clock.tzinfo or UTC
    return datetime.combine(_now(zone).date(), clock, zone)


def _check_not_ahead(at: datetime, said: str, name: str) -> None:
    now = _now(at.tzinfo)
    if at > now:
        zone = "UTC" if at.tzinfo is UTC else "there"
        example = (at - timedelta(days=1)).isoformat(timespec="minutes").removesuffix("+00:00")
        raise ConfigurationError(
            f"{name} is {said!r}, a time of today that lies ahead: it is {now:%H:%M} {zone}. Say the day too, as by "
            f"{_as(name, example)}."
        )


def _now(zone: tzinfo | None) -> datetime:
    return (_EPOCH + timedelta(seconds=time.time_ns() / NS)).astimezone(zone)


def check_order(since_ns: int | None, until_ns: int | None, since: str = "since", until: str = "until") -> None:
    """Refuse a time range that nothing can be in.

    Args:
        since_ns: Its beginning, in nanoseconds since 1970; None for none.
        until_ns: The first moment after it; None for none.
        since: What the beginning was given as, for the message.
        until: What the end was given as.

    Raises:
        ConfigurationError: If it ends before it begins, or at once.
    """
    if since_ns is None or until_ns is None or since_ns < until_ns:
        return
    raise ConfigurationError(
        f"{until} is {iso_moment(until_ns)} and {since} is {iso_moment(since_ns)}: nothing lies between. {until} is to "
        f"be later than {since}; it is the first moment that does not count."
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
