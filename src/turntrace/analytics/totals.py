"""What sessions add up to, and what the filters can be set to."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from sqlalchemy import func, select

from turntrace.analytics.asking import count_if, in_bytes, mean_satisfaction, rows_of
from turntrace.analytics.filters import ALL, Filters, of_sessions
from turntrace.ledger import Ledger
from turntrace.ledger.tables import conversations, sessions, turns

_MOST_CHOICES: Final = 200


@dataclass(frozen=True, slots=True)
class Totals:
    """What the sessions add up to.

    Attributes:
        sessions: How many sessions.
        open: Those of them that have not ended.
        users: How many known users they are of.
        turns: Their turns.
        failed_turns: Turns that ended with an error.
        input_tokens: Tokens that models were given.
        output_tokens: Tokens that they answered.
        cost_usd: What they cost, in US dollars.
        unpriced_calls: Calls of models whose price is not known: they are not in the cost.
        dropoffs: Sessions that ended as a drop-off.
        with_feedback: Sessions with feedback.
        satisfaction: Mean of the feedback, from 0 to 1; None without any.
        first_ns: When the first session began, in nanoseconds since 1970; None without any.
        last_ns: When the last activity was.
    """

    sessions: int
    open: int
    users: int
    turns: int
    failed_turns: int
    input_tokens: int
    output_tokens: int
    cost_usd: float
    unpriced_calls: int
    dropoffs: int
    with_feedback: int
    satisfaction: float | None
    first_ns: int | None
    last_ns: int | None

    @property
    def tokens(self) -> int:
        """Tokens that models were given and answered."""
        return self.input_tokens + self.output_tokens

    @property
    def ended(self) -> int:
        """Sessions that have ended."""
        return self.sessions - self.open

    @property
    def dropoff_rate(self) -> float | None:
        """Drop-offs among the sessions that have ended, from 0 to 1; None without any."""
        return self.dropoffs / self.ended if self.ended else None


def totals(ledger: Ledger, filters: Filters = ALL) -> Totals:
    """Return what the sessions add up to."""
    s = sessions.c
    whole = {
        "sessions": func.count(),
        "open": count_if(s.ended_ns.is_(None)),
        "users": func.count(s.user_id.distinct()),
        "turns": func.sum(s.total_turns),
        "failed_turns": func.sum(s.failed_turns),
        "input_tokens": func.sum(s.input_tokens),
        "output_tokens": func.sum(s.output_tokens),
        "unpriced_calls": func.sum(s.unpriced_calls),
        "dropoffs": count_if(s.dropoff.is_(True)),
        "with_feedback": count_if(s.feedback_count > 0),
    }
    others = {
        "cost": func.sum(s.total_cost_usd),
        "feedback_sum": func.sum(s.feedback_sum),
        "feedback_count": func.sum(s.feedback_count),
        "first_ns": func.min(s.started_ns),
        "last_ns": func.max(s.last_activity_ns),
    }
    columns = [column.label(name) for name, column in (whole | others).items()]
    [row] = rows_of(ledger, select(*columns).where(of_sessions(filters)))
    return Totals(
        **{name: int(getattr(row, name) or 0) for name in whole},
        cost_usd=float(row.cost or 0.0),
        satisfaction=mean_satisfaction(row),
        first_ns=row.first_ns,
        last_ns=row.last_ns,
    )


@dataclass(frozen=True, slots=True)
class Choices:
    """What of each kind is on record, whatever the filters: the first 200, in order."""

    channel: Sequence[str]
    tier: Sequence[str]
    org_id: Sequence[str]
    topic: Sequence[str]
    model: Sequence[str]
    end_reason: Sequence[str]


_COLUMNS: Final[dict[str, Any]] = {
    "channel": sessions.c.channel,
    "tier": sessions.c.tier,
    "org_id": sessions.c.org_id,
    "topic": conversations.c.topic,
    "model": turns.c.model,
    "end_reason": sessions.c.end_reason,
    "error": turns.c.error,
}


def choices(ledger: Ledger) -> Choices:
    """Return what the filters can be set to."""
    return Choices(**{each.name: values_of(ledger, each.name) for each in fields(Choices)})


def values_of(ledger: Ledger, name: str, *, limit: int = _MOST_CHOICES) -> list[str]:
    """Return what a filter can be set to, in order.

    Args:
        ledger: The ledger.
        name: The filter, as `Filters` has it.
        limit: How many values at most.
    """
    column = _COLUMNS[name]
    found = select(column.label("value")).where(column.is_not(None)).distinct().subquery()  # before they are sorted
    query = select(found.c.value).order_by(in_bytes(found.c.value)).limit(limit)
    return [str(row.value) for row in rows_of(ledger, query)]


def users_that_begin(ledger: Ledger, begins: str) -> list[str]:
    """Return the hashes of users that begin so, in order: two at most, since any more say no more than that.

    Args:
        ledger: The ledger.
        begins: The beginning of a hash; what no hash can hold finds nothing.
    """
    if not (begins.isascii() and begins.isprintable()):
        return []
    query = select(sessions.c.user_id).where(sessions.c.user_id.startswith(begins, autoescape=True)).distinct()
    with ledger.asking() as connection:
        return [str(each) for each in connection.execute(query.order_by(sessions.c.user_id).limit(2)).scalars()]
