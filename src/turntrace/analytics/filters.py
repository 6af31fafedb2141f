"""Which sessions and turns a question is about."""

from dataclasses import KW_ONLY, InitVar, dataclass, replace
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, exists, or_, select, true

from turntrace.analytics.times import FIRST_NS, LAST_NS, When, check_order, iso_moment, when
from turntrace.errors import ConfigurationError
from turntrace.ledger.tables import conversations, is_failing, open_turns, sessions, turns

_TIMES: Final = {"since_ns": "since", "until_ns": "until"}
_YES: Final = {"failed": "a failed turn", "unsatisfied": "feedback below 0.5"}
"""What is True or not asked for, and how it is said."""
SATISFIED: Final = 0.5
"""A mean of feedback from which on a user counts as satisfied, from 0 to 1."""
UNSATISFIED_BELOW: Final = SATISFIED - 1e-6
"""The same to compare with: sums of feedback are kept by adding and taking back, so a mean may be a little below."""
_OF_TURNS: Final = ("topic", "model", "conversation_id", "error", "failed")


def _is_kept(text: str) -> bool:
    """Tell whether a database can hold a text."""
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


@dataclass(frozen=True, slots=True)
class Filters:
    """Which sessions and turns a question is about.

    None leaves nothing out, and an empty text asks for those of which it is not known (a tier, an organisation, ...).
    A question about turns (latency, the window, what models used) counts the turns that meet `topic`, `model`,
    `conversation_id`, `error` and `failed` themselves; one about sessions counts whole sessions that have at least one
    turn that meets them all.

    Times may be said as `since` and `until`, too: a date, a datetime, a timedelta (so long ago), or a text, as
    ``2026-11-25``, ``2026-11-25T12:00``, ``14:05`` (of today), ``7d``, ``1h30m``, ``today`` or ``yesterday``, in UTC
    where it says nothing else.

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
        conversation_id: Turns of this conversation, and sessions with such turns.
        error: Turns that ended with an error of this class (empty: with none), and sessions with such turns.
        failed: True for turns that failed or were abandoned, and sessions with such turns.
        unsatisfied: True for sessions with feedback whose mean is below 0.5.

    Raises:
        ConfigurationError: If a value is of another type, or one that no database holds, or if no time is in the range.
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
    conversation_id: str | None = None
    error: str | None = None
    failed: bool | None = None
    unsatisfied: bool | None = None
    _: KW_ONLY
    since: InitVar[When | None] = None
    until: InitVar[When | None] = None

    def __post_init__(self, since: When | None, until: When | None) -> None:
        for name, said in (("since", since), ("until", until)):
            if said is not None:
                if getattr(self, f"{name}_ns") is not None:
                    raise ConfigurationError(f"{name} and {name}_ns say the same in two ways: pass one of them.")
                object.__setattr__(self, f"{name}_ns", when(said, name))
        for name in self.__slots__:
            _check(name, getattr(self, name))
        for name in _YES:
            object.__setattr__(self, name, getattr(self, name) or None)
        check_order(self.since_ns, self.until_ns)

    def __str__(self) -> str:
        named = [(name, getattr(self, name)) for name in self.__slots__]
        return ", ".join(_said(name, value) for name, value in named if value is not None) or "everything on record"

    @property
    def of_some_turns(self) -> bool:
        """Whether they tell turns of one session apart."""
        return any(getattr(self, name) is not None for name in _OF_TURNS)

    def of(self, **changed: Any) -> "Filters":
        """Return the same with other values."""
        taken_back = {f"{name}_ns": None for name in ("since", "until") if name in changed}
        return replace(self, **{**taken_back, **changed})


def _said(name: str, value: Any) -> str:
    if name in _YES:
        return _YES[name]
    return f"{_TIMES.get(name, name)} {iso_moment(value) if name in _TIMES else value or 'not known'}"


def _check(name: str, value: object) -> None:
    if value is None:
        return
    if name in _TIMES:
        said = _TIMES[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigurationError(
                f"{name} is {value!r:.40}. Allowed are nanoseconds since 1970, as an int. For days and times there is "
                f"{said}: {said}='2026-11-25', {said}='7d'."
            )
        if not FIRST_NS <= value <= LAST_NS:
            raise ConfigurationError(f"{name} is {value}. Allowed are nanoseconds from the years 1677 to 2262.")
    elif name in _YES:
        if not isinstance(value, bool):
            raise ConfigurationError(f"{name} is {value!r:.40}. Allowed are True, and False or None for any.")
    elif not isinstance(value, str):
        raise ConfigurationError(f"{name} is {value!r:.40}. Allowed are a text, as {name}='...', and None for any.")
    elif not _is_kept(value):
        raise ConfigurationError(f"{name} is {value!r:.40}. Allowed is a text without lone surrogates and U+0000.")


ALL: Final = Filters()
OPEN: Final = "open"
FAILED: Final = ("failed", "abandoned")
"""How turns end that did not come to their end."""


def checked(filters: Filters) -> Filters:
    """Return the filters, or say what was passed instead.

    Raises:
        ConfigurationError: If they are none.
    """
    if isinstance(filters, Filters):
        return filters
    raise ConfigurationError(
        f"The filters are a {type(filters).__name__}. Allowed are turntrace.analytics.Filters: pass "
        "Filters(channel='web', since='7d'), or nothing for everything on record."
    )


def of_sessions(filters: Filters) -> ColumnElement[bool]:
    """Return the condition on sessions."""
    conditions = _on_sessions(filters)
    if filters.of_some_turns:
        conditions.append(_with_turns(filters))
    return and_(true(), *conditions)


def _with_turns(filters: Filters) -> ColumnElement[bool]:
    """Return the condition on sessions that they have a turn of those.

    Of a topic and of a conversation there are few turns, and an index finds them; others are sought by session.
    """
    if filters.topic is not None or filters.conversation_id is not None:
        with_turns = select(turns.c.session_id).where(*_on_turns(filters)).correlate(None)
        if [name for name in _OF_TURNS if getattr(filters, name) is not None] != ["conversation_id"]:
            return sessions.c.id.in_(with_turns)
        # What a turn that still runs is like is not known yet, but for where it is.
        running = select(open_turns.c.session_id).where(open_turns.c.conversation_id == filters.conversation_id)
        return or_(sessions.c.id.in_(with_turns), sessions.c.id.in_(running.correlate(None)))
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
    if not checked(filters).of_some_turns:
        return in_sessions(filters, session_id)
    return and_(turn_id.in_(select(turns.c.id).where(of_turns(filters))))


def _on_sessions(filters: Filters) -> list[Any]:
    names = ("channel", "tier", "org_id", "user_id")
    checked(filters)
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
    if filters.unsatisfied:
        conditions.append(sessions.c.feedback_sum < sessions.c.feedback_count * UNSATISFIED_BELOW)  # 0 < 0 without any
    return conditions


def _is(column: Any, value: str) -> ColumnElement[bool]:
    is_it: ColumnElement[bool] = column == value if value else column.is_(None)
    return is_it


def _on_turns(filters: Filters) -> list[Any]:
    conditions: list[Any] = []
    checked(filters)
    if filters.model is not None:
        conditions.append(_is(turns.c.model, filters.model))
    if filters.conversation_id is not None:
        conditions.append(turns.c.conversation_id == filters.conversation_id)
    if filters.error is not None:
        conditions.append(_is(turns.c.error, filters.error))
    if filters.failed:
        conditions.append(is_failing)
    if filters.topic is not None:
        about = select(conversations.c.id).where(_is(conversations.c.topic, filters.topic))
        conditions.append(turns.c.conversation_id.in_(about))
    return conditions
