"""How sessions end: where users drop off, and what tells successful sessions from others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, case, exists, func, literal, or_, select

from turntrace.analytics.asking import count_if, in_bytes, mean_satisfaction, rows_of, turn_number
from turntrace.analytics.confidence import Rate, interval
from turntrace.analytics.filters import ALL, UNSATISFIED_BELOW, Filters, of_sessions, on_turns
from turntrace.ledger import Ledger
from turntrace.ledger.tables import journeys, sessions, turns

SUCCESSFUL: Final = "successful"
UNSUCCESSFUL: Final = "unsuccessful"
UNKNOWN: Final = "unknown"


@dataclass(frozen=True, slots=True)
class Dropoffs:
    """Sessions that ended at the same point, and how many of them as a drop-off.

    Attributes:
        at: The point: a turn's number, an intent, what the agent did last; empty where that is not known.
        ended: Sessions that ended there.
        dropoffs: Those of them that ended as a drop-off.
    """

    at: str
    ended: int
    dropoffs: int

    @property
    def rate(self) -> float:
        """Drop-offs among those that ended there, from 0 to 1."""
        return self.dropoffs / self.ended if self.ended else 0.0

    @property
    def interval(self) -> tuple[float, float] | None:
        """Bounds between which the rate lies with 95 % confidence, from 0 to 1; None without any session."""
        return interval(self.dropoffs, self.ended)


def dropoff_by_turn(ledger: Ledger, filters: Filters = ALL) -> list[Dropoffs]:
    """Return the drop-offs by the number of the session's last turn in its conversation, in order.

    Those after `MOST_TURNS` are one, which stands under the number after it; sessions without a turn come last.
    """
    found = _dropoffs(ledger, filters, turn_number(sessions.c.last_turn))
    return sorted(found, key=lambda each: (not each.at, int(each.at or 0)))


def dropoff_by_intent(ledger: Ledger, filters: Filters = ALL) -> list[Dropoffs]:
    """Return the drop-offs by what the user wanted last, the most frequent first."""
    return sorted(_dropoffs(ledger, filters, sessions.c.last_intent), key=lambda each: (-each.dropoffs, each.at))


def dropoff_by_action(ledger: Ledger, filters: Filters = ALL) -> list[Dropoffs]:
    """Return the drop-offs by what the agent did last, the most frequent first."""
    return sorted(_dropoffs(ledger, filters, sessions.c.last_action), key=lambda each: (-each.dropoffs, each.at))


def dropoff_by_reason(ledger: Ledger, filters: Filters = ALL) -> list[Dropoffs]:
    """Return the drop-offs by why the session ended, the most frequent reason first."""
    return sorted(_dropoffs(ledger, filters, sessions.c.end_reason), key=lambda each: (-each.ended, each.at))


def _dropoffs(ledger: Ledger, filters: Filters, at: Any) -> list[Dropoffs]:
    dropped = count_if(sessions.c.dropoff.is_(True)).label("dropoffs")
    query = select(at.label("at"), func.count().label("ended"), dropped)
    query = query.where(of_sessions(filters), sessions.c.ended_ns.is_not(None)).group_by(at)
    return [
        Dropoffs("" if row.at is None else str(row.at), row.ended, int(row.dropoffs)) for row in rows_of(ledger, query)
    ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Sessions with the same outcome, and what they are like.

    Attributes:
        outcome: ``successful``, ``unsuccessful`` or ``unknown`` (see `outcome_of`).
        n: How many sessions.
        turns: Mean number of turns.
        minutes: Mean minutes from the first to the last activity.
        latency_ms: Mean latency of their turns, in milliseconds; None without any turn.
        tokens: Mean tokens.
        cost_usd: Mean cost, in US dollars.
        with_errors: Sessions with a turn that failed.
        with_prunings: Sessions in which something was pruned from a model's window.
        with_feedback: Sessions with feedback.
        satisfaction: Mean of the feedback on those, from 0 to 1; None without any. Where there is feedback it is what
            the outcome was told by, so it does not explain it.

    All sessions count in the means, and in what is counted, once.
    """

    outcome: str
    n: int
    turns: float
    minutes: float
    latency_ms: float | None
    tokens: float
    cost_usd: float
    with_errors: int
    with_prunings: int
    with_feedback: int
    satisfaction: float | None

    @property
    def errors(self) -> Rate:
        """Sessions with a turn that failed, among all of this outcome."""
        return Rate(self.with_errors, self.n)

    @property
    def pruned(self) -> Rate:
        """Sessions in which something was pruned, among all of this outcome."""
        return Rate(self.with_prunings, self.n)

    @property
    def rated(self) -> Rate:
        """Sessions with feedback, among all of this outcome."""
        return Rate(self.with_feedback, self.n)


def outcome_of() -> ColumnElement[str]:
    """Return the outcome of a session, by the first of these that is known; that of an open one is not.

    - what users thought of it: a mean of at least 0.5 is success, less is not;
    - the journey that it took the last step of: converted in it is success;
    - why it ended: ``completed`` is success, ``error`` is not;
    - a drop-off is not success.
    """
    satisfied = sessions.c.feedback_sum >= UNSATISFIED_BELOW * sessions.c.feedback_count
    return case(
        (sessions.c.ended_ns.is_(None), UNKNOWN),
        (sessions.c.feedback_count > 0, case((satisfied, SUCCESSFUL), else_=UNSUCCESSFUL)),
        (and_(sessions.c.journey_converted.is_(True), _converted_in_it()), SUCCESSFUL),
        (sessions.c.end_reason == "completed", SUCCESSFUL),
        (or_(sessions.c.end_reason == "error", sessions.c.dropoff.is_(True)), UNSUCCESSFUL),
        else_=UNKNOWN,
    )


def _converted_in_it() -> ColumnElement[bool]:
    """Return the condition that the session's journey was not converted before it began.

    The journey is the user's, or that of a session whose user is unknown (see `turntrace.ledger.writing.owner_of`).
    """
    owner = func.coalesce(sessions.c.user_id, literal("session:") + sessions.c.id)
    of_it = journeys.c.owner == owner, journeys.c.name == sessions.c.journey_name
    return exists().where(*of_it, journeys.c.converted_ns >= sessions.c.started_ns).correlate(sessions)


def outcomes(ledger: Ledger, filters: Filters = ALL) -> list[Outcome]:
    """Return what sessions of each outcome are like: the successful ones, the others, and those that nobody knows.

    An outcome of which there is no session is left out. What differs between two of them is no cause by that.
    """
    s = sessions.c
    outcome = outcome_of()
    query = (
        select(
            outcome.label("outcome"),
            func.count().label("n"),
            func.sum(s.total_turns).label("turns"),
            func.sum((s.last_activity_ns - s.started_ns) // 1_000_000).label("ms"),
            func.sum(s.active_ms).label("active_ms"),
            func.sum(s.input_tokens + s.output_tokens).label("tokens"),
            func.sum(s.total_cost_usd).label("cost"),
            count_if(s.failed_turns > 0).label("with_errors"),
            count_if(s.prunings > 0).label("with_prunings"),
            count_if(s.feedback_count > 0).label("with_feedback"),
            func.sum(s.feedback_sum).label("feedback_sum"),
            func.sum(s.feedback_count).label("feedback_count"),
        )
        .where(of_sessions(filters))
        .group_by(outcome)
    )
    found = {row.outcome: row for row in rows_of(ledger, query)}
    return [_outcome(found[name]) for name in (SUCCESSFUL, UNSUCCESSFUL, UNKNOWN) if name in found]


def _outcome(row: Any) -> Outcome:
    turns_of, n = int(row.turns), int(row.n)
    return Outcome(
        outcome=row.outcome,
        n=n,
        turns=turns_of / n,
        minutes=float(row.ms) / n / 60_000,
        latency_ms=float(row.active_ms) / turns_of if turns_of else None,
        tokens=float(row.tokens) / n,
        cost_usd=float(row.cost) / n,
        with_errors=int(row.with_errors),
        with_prunings=int(row.with_prunings),
        with_feedback=int(row.with_feedback),
        satisfaction=mean_satisfaction(row),
    )


@dataclass(frozen=True, slots=True)
class IntentOutcome:
    """Sessions in which users wanted the same, and how they came out.

    Attributes:
        intent: What they wanted, in any of the turns.
        successful: Sessions that were successful.
        unsuccessful: Sessions that were not.
        unknown: Sessions of which nobody knows.
    """

    intent: str
    successful: int
    unsuccessful: int
    unknown: int

    @property
    def n(self) -> int:
        """Sessions whose outcome is known."""
        return self.successful + self.unsuccessful

    @property
    def rate(self) -> float | None:
        """Successful ones among those whose outcome is known, from 0 to 1; None without any."""
        return self.successful / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Bounds between which the rate lies with 95 % confidence, from 0 to 1; None without any session."""
        return interval(self.successful, self.n)


def outcomes_by_intent(ledger: Ledger, filters: Filters = ALL, *, limit: int = 30) -> Sequence[IntentOutcome]:
    """Return how sessions came out by what users wanted in them, the most frequent intents first.

    A session in which a user wanted several things counts once for each.

    Args:
        ledger: The ledger.
        filters: Which sessions, and which of their turns.
        limit: How many intents at most.
    """
    # Sessions get numbers, which are told apart and sorted in a fraction of the time that their ids take.
    # SQLite would look up the session of each turn; by an id that no index has, it looks up the turns of each session.
    outcome, number = outcome_of().label("outcome"), func.row_number().over().label("number")
    known = select(sessions.c.id, outcome, number).where(of_sessions(filters)).cte("known").prefix_with("MATERIALIZED")
    times = func.count(known.c.number.distinct()).label("times")
    query = (
        select(turns.c.intent, known.c.outcome, times)
        .select_from(known.join(turns, turns.c.session_id == known.c.id.concat("")))
        .where(turns.c.intent.is_not(None), on_turns(filters))
        .group_by(turns.c.intent, known.c.outcome)
    )
    counted = query.subquery()
    counts = [
        func.sum(case((counted.c.outcome == name, counted.c.times), else_=0)).label(name)
        for name in (SUCCESSFUL, UNSUCCESSFUL, UNKNOWN)
    ]
    by_intent = select(counted.c.intent, *counts).group_by(counted.c.intent)
    ordered = by_intent.order_by(func.sum(counted.c.times).desc(), in_bytes(counted.c.intent)).limit(limit)
    return [
        IntentOutcome(row.intent, int(row.successful), int(row.unsuccessful), int(row.unknown))
        for row in rows_of(ledger, ordered)
    ]
