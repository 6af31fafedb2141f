"""Which sessions and turns a question is about."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, exists, select, true

from turntrace.errors import ConfigurationError
from turntrace.ledger.tables import conversations, sessions, turns

NS: Final = 1_000_000_000
DAY_NS: Final = 86_400 * NS
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_NS: Final = -(2**63)
_LAST_NS: Final = 2**63 - 1
"""What a database holds, which is until the year 2262."""


_TIMES: Final = ("since_ns", "until_ns")


def _is_kept(text: str) -> bool:
    """Tell whether a database can hold a text."""
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


@dataclass(frozen=True, slots=True)
class Filters:
    """Which sessions and turns a question is about.

    None leaves nothing out, and an empty text asks for those of which it is not known (a tier, an organisation, ...).
    A question about turns (latency, the window, what models used) counts the turns that meet `topic` and `model`
    themselves; one about sessions counts whole sessions that have at least one such turn.

    Attributes:
        since_ns: Sessions that began then or later, in nanoseconds since 1970.
        until_ns: Sessions that began before.
        channel: Their channel.
        tier: Their user's tier.
        org_id: Their user's organisation.
        topic: Turns of conversations about it, and sessions with such turns.
        model: Turns whose last call was of this model, and sessions with such turns.
        end_reason: Why they ended; ``open`` for those that have not.
        user_id: Hash of their user's id.

    Raises:
        ConfigurationError: If a value is of another type, or one that no database holds.
    """

    since_ns: int | None = None
    until_ns: int | None = None
    channel: str | None = None
    tier: str | None = None
    org_id: str | None = None
    topic: str | None = None
    model: str | None = None
    end_reason: str | None = None
    user_id: str | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is None:
                continue
            if name in _TIMES:
                if isinstance(value, bool) or not isinstance(value, int) or not _FIRST_NS <= value <= _LAST_NS:
                    raise ConfigurationError(
                        f"The filter {name} is {value!r:.40}. Allowed is a time in nanoseconds since 1970, as "
                        f'day_of("2026-11-25") returns it: Filters({name}=day_of("2026-11-25")).'
                    )
            elif not isinstance(value, str) or not _is_kept(value):
                shown = f"{value!r:.40}" if isinstance(value, str) else f"a {type(value).__name__}"
                raise ConfigurationError(
                    f"The filter {name} is {shown}. Allowed is a text without lone surrogates and U+0000: "
                    f'Filters({name}="...").'
                )

    def __str__(self) -> str:
        times = {"since_ns": "since", "until_ns": "until"}
        named = [(name, getattr(self, name)) for name in self.__slots__]
        words = [
            f"{times.get(name, name)} {_iso(value) if name in times else value or 'not known'}"
            for name, value in named
            if value is not None
        ]
        return ", ".join(words) or "everything on record"

    @property
    def of_some_turns(self) -> bool:
        """Whether they tell turns of one session apart."""
        return self.model is not None or self.topic is not None

    def of(self, **changed: Any) -> "Filters":
        """Return the same with other values."""
        return replace(self, **changed)


ALL: Final = Filters()
OPEN: Final = "open"


def day_of(text: str, name: str = "--since") -> int:
    """Read a day or a time in ISO 8601 (UTC where it says nothing else), in nanoseconds since 1970.

    A day stands for its beginning. What lies beyond the years that a database holds (1677 to 2262) is brought to their
    end.

    Args:
        text: The day or the time.
        name: What it was given as, for the message.

    Raises:
        ConfigurationError: If it is neither.
    """
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigurationError(
            f"{name} is {text!r:.40}. Allowed are a day and a time in ISO 8601: {name} 2026-11-25, "
            f"or {name} 2026-11-25T12:00."
        ) from None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return min(_LAST_NS, max(_FIRST_NS, (at - _EPOCH) // timedelta(microseconds=1) * 1000))


def iso_day(at_ns: int) -> str:
    """Return the day of a time, in UTC."""
    return (_EPOCH + timedelta(days=at_ns // DAY_NS)).date().isoformat()


def _iso(at_ns: int) -> str:
    """Return a time in UTC to the second, and of the beginning of a day only the day."""
    at = _EPOCH + timedelta(seconds=at_ns // NS)
    return iso_day(at_ns) if at_ns % DAY_NS == 0 else f"{at:%Y-%m-%dT%H:%M:%S}"


def of_sessions(filters: Filters) -> ColumnElement[bool]:
    """Return the condition on sessions."""
    conditions = _on_sessions(filters)
    if filters.of_some_turns:
        conditions.append(_with_turns(filters))
    return and_(true(), *conditions)


def _with_turns(filters: Filters) -> ColumnElement[bool]:
    """Return the condition on sessions that they have a turn of those.

    Of a topic there are few turns, and the index of conversations finds them; those of a model are sought by session.
    """
    if filters.topic is not None:
        return sessions.c.id.in_(select(turns.c.session_id).where(*_on_turns(filters)).correlate(None))
    return exists().where(turns.c.session_id == sessions.c.id, *_on_turns(filters)).correlate(sessions)


def of_turns(filters: Filters) -> ColumnElement[bool]:
    """Return the condition on turns."""
    on_sessions, conditions = _on_sessions(filters), _on_turns(filters)
    if on_sessions:
        conditions.append(turns.c.session_id.in_(select(sessions.c.id).where(*on_sessions)))
    return and_(true(), *conditions)


def of_turns_joined(filters: Filters) -> ColumnElement[bool]:
    """Return the condition on turns that are joined with their sessions."""
    return and_(true(), *_on_sessions(filters), *_on_turns(filters))


def on_turns(filters: Filters) -> ColumnElement[bool]:
    """Return the condition on turns of which the sessions are chosen already."""
    return and_(true(), *_on_turns(filters))


def in_sessions(filters: Filters, session_id: Any) -> ColumnElement[bool]:
    """Return the condition that a row with a session's id is one of the sessions."""
    if filters == ALL:
        return and_(true())
    return and_(session_id.in_(select(sessions.c.id).where(of_sessions(filters))))


def in_turns(filters: Filters, turn_id: Any, session_id: Any) -> ColumnElement[bool]:
    """Return the condition that a row with the ids of a turn and its session is about one of the turns."""
    if not filters.of_some_turns:
        return in_sessions(filters, session_id)
    return and_(turn_id.in_(select(turns.c.id).where(of_turns(filters))))


def _on_sessions(filters: Filters) -> list[Any]:
    names = ("channel", "tier", "org_id", "user_id")
    given = {name: value for name in names if (value := getattr(filters, name)) is not None}
    conditions: list[Any] = [_is(sessions.c[name], value) for name, value in given.items()]
    if filters.since_ns is not None:
        conditions.append(sessions.c.started_ns >= filters.since_ns)
    if filters.until_ns is not None:
        conditions.append(sessions.c.started_ns < filters.until_ns)
    if filters.end_reason == OPEN:
        conditions.append(sessions.c.ended_ns.is_(None))
    elif filters.end_reason is not None:
        conditions.append(sessions.c.end_reason == filters.end_reason)
    return conditions


def _is(column: Any, value: str) -> ColumnElement[bool]:
    is_it: ColumnElement[bool] = column == value if value else column.is_(None)
    return is_it


def _on_turns(filters: Filters) -> list[Any]:
    conditions: list[Any] = []
    if filters.model is not None:
        conditions.append(_is(turns.c.model, filters.model))
    if filters.topic is not None:
        about = select(conversations.c.id).where(_is(conversations.c.topic, filters.topic))
        conditions.append(turns.c.conversation_id.in_(about))
    return conditions
