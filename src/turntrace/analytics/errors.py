"""Turns that failed or were abandoned: when, with what, in which turn, at which step."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, func, select

from turntrace.analytics.asking import checked_ledger, day, in_bytes, turn_number
from turntrace.analytics.confidence import Rate
from turntrace.analytics.filters import ALL, Filters, of_sessions, of_turns, of_turns_joined
from turntrace.analytics.times import DAY_NS, iso_day
from turntrace.ledger import Ledger
from turntrace.ledger.rows import plain_summary, steps_from
from turntrace.ledger.shapes import ABANDONED
from turntrace.ledger.tables import are_steps_of_turn, is_failing, sessions, turn_steps, turns
from turntrace.records import Step
from turntrace.summaries import SessionSummary

FAILED: Final = "failed"
MOST_LOOKED_INTO: Final = 1_000
"""Turns whose steps are looked into, the latest ones: the steps are a text, which SQL cannot count cheaply."""


@dataclass(frozen=True, slots=True)
class ErrorsAt:
    """Turns that have something in common, and how many of them failed or were abandoned.

    Attributes:
        at: What they have in common: a day, an intent, their number; empty where that is not known.
        turns: How many turns.
        failed: Those of them that an error ended.
        abandoned: Those that nobody ended: their process died, the caller went away, or nobody answered.
    """

    at: str
    turns: int
    failed: int
    abandoned: int

    @property
    def times(self) -> int:
        """Those that failed or were abandoned."""
        return self.failed + self.abandoned

    @property
    def rate(self) -> Rate:
        """Those that failed or were abandoned, among all."""
        return Rate(self.times, self.turns)


@dataclass(frozen=True, slots=True)
class ErrorsAtStep:
    """The innermost step that an error ended, or that was abandoned, in turns that failed or were abandoned.

    Attributes:
        name: Name of the tool, the model, the node or the graph.
        kind: ``tool``, ``generation``, ``chain`` (a node), ``agent`` (a graph) or ``retriever``.
        turns: In how many turns.
        error: The most frequent class of error at it.
    """

    name: str
    kind: str
    turns: int
    error: str


@dataclass(frozen=True, slots=True)
class TurnErrors:
    """Turns that failed or were abandoned.

    A turn that an error of a node or a tool did not end, as it was tried again, has not failed.

    Attributes:
        by_day: By the day in UTC on which the session began, in order; days without any turn are left out.
        by_turn: By the number of the turn in its conversation, in order; those after `MOST_TURNS` are one.
        by_intent: By what the user wanted, the most errors first.
        by_class: By the class of the error, the most frequent first; each is of all turns.
        by_step: By the innermost step that ended so, the most frequent first.
        looked_into: Of how many turns that is: the latest ones that failed or were abandoned.
    """

    by_day: Sequence[ErrorsAt] = field(default_factory=list)
    by_turn: Sequence[ErrorsAt] = field(default_factory=list)
    by_intent: Sequence[ErrorsAt] = field(default_factory=list)
    by_class: Sequence[ErrorsAt] = field(default_factory=list)
    by_step: Sequence[ErrorsAtStep] = field(default_factory=list)
    looked_into: int = 0

    @property
    def all(self) -> ErrorsAt:
        """All turns together."""
        return _summed("", self.by_turn)


def turn_errors(ledger: Ledger, filters: Filters = ALL) -> TurnErrors:
    """Return the turns that failed or were abandoned: by day, number, intent, class of the error, and step.

    Rates are of all turns that are on record, also of those that wait for a person.
    """
    with checked_ledger(ledger).asking() as connection:  # one for all: what is told of the same turns agrees
        counts = _by_intent_and_number(connection, filters)
        by_day, by_class = _by_day_and_class(connection, filters, sum(each.turns for each in counts))
        by_step, looked_into = _by_step(connection, filters)
    return TurnErrors(
        by_day=by_day,
        by_turn=sorted(_grouped(counts, lambda each: str(each.number)), key=lambda each: int(each.at)),
        by_intent=_most_errors(_grouped(counts, lambda each: each.intent or "")),
        by_class=by_class,
        by_step=by_step,
        looked_into=looked_into,
    )


def sessions_with_errors(ledger: Ledger, filters: Filters = ALL, *, limit: int = 10) -> list[SessionSummary]:
    """Return the sessions in which a turn failed, those that began last first, without the figures of their users.

    Args:
        ledger: The ledger.
        filters: Which sessions.
        limit: How many at most.
    """
    query = select(sessions).where(of_sessions(filters), sessions.c.failed_turns > 0)
    ordered = query.order_by(sessions.c.started_ns.desc(), in_bytes(sessions.c.id)).limit(limit)
    with checked_ledger(ledger).asking() as connection:
        return [plain_summary(row) for row in connection.execute(ordered).mappings().all()]


class _Counted(NamedTuple):
    """Turns of one number with one intent."""

    number: int
    intent: str | None
    turns: int
    failed: int
    abandoned: int


def _by_intent_and_number(connection: Connection, filters: Filters) -> list[_Counted]:
    """Return both in one pass over the turns, and one over those that failed or were abandoned.

    The number comes first, and nothing is read with it that is not needed: SQLite sorts by a text, and more columns, in
    up to twice the time.
    """
    number, times = turn_number(turns.c.number).label("number"), func.count().label("times")
    every = select(number, turns.c.intent, times).where(of_turns(filters)).group_by(number, turns.c.intent)
    which = number, turns.c.intent, turns.c.status
    lost = select(*which, times).where(of_turns(filters), is_failing).group_by(*which)
    lost_at = {(row.number, row.intent, row.status): int(row.times) for row in connection.execute(lost)}
    return [
        _Counted(*at, row.times, *(lost_at.get((*at, status), 0) for status in (FAILED, ABANDONED)))
        for row in connection.execute(every)
        for at in [(int(row.number), row.intent)]
    ]


def _grouped(counts: Iterable[_Counted], by: Callable[[_Counted], str]) -> list[ErrorsAt]:
    found: dict[str, list[_Counted]] = {}
    for each in counts:
        found.setdefault(by(each), []).append(each)
    return [_summed(at, of_it) for at, of_it in found.items()]


def _summed(at: str, counts: Sequence[Any]) -> ErrorsAt:
    return ErrorsAt(at, *(sum(getattr(each, name) for each in counts) for name in ("turns", "failed", "abandoned")))


def _most_errors(found: Iterable[ErrorsAt]) -> list[ErrorsAt]:
    return sorted(found, key=lambda each: (-each.times, -each.turns, each.at))


def _by_day_and_class(connection: Connection, filters: Filters, of: int) -> tuple[list[ErrorsAt], list[ErrorsAt]]:
    on = day(sessions.c.started_ns)
    joined = turns.join(sessions, sessions.c.id == turns.c.session_id)
    columns = on.label("day"), turns.c.status, turns.c.error, func.count().label("times")
    query = select(*columns).select_from(joined).where(of_turns_joined(filters), is_failing)
    rows = connection.execute(query.group_by(on, turns.c.status, turns.c.error))
    if filters.of_some_turns:
        every = select(on.label("day"), func.count().label("turns")).select_from(joined).where(of_turns_joined(filters))
    else:  # sessions have summed them up
        every = select(on.label("day"), func.sum(sessions.c.total_turns).label("turns")).where(of_sessions(filters))
    turns_on = {row.day: int(row.turns) for row in connection.execute(every.group_by(on))}
    days: Counter[tuple[int, str]] = Counter()
    classes: Counter[tuple[str, str]] = Counter()
    for row in rows:
        days[row.day, row.status] += row.times
        classes[row.error or "", row.status] += row.times
    by_day = [
        ErrorsAt(iso_day(each * DAY_NS), turns_on[each], days[each, FAILED], days[each, ABANDONED])
        for each in sorted(turns_on)
        if turns_on[each]
    ]
    names = {name for name, _ in classes}
    by_class = [ErrorsAt(name, of, classes[name, FAILED], classes[name, ABANDONED]) for name in names]
    return by_day, _most_errors(by_class)


def _by_step(connection: Connection, filters: Filters) -> tuple[list[ErrorsAtStep], int]:
    failing = select(turns.c.id, turns.c.started_ns).where(of_turns(filters), is_failing)
    # The steps of no others are read.
    latest = failing.order_by(turns.c.started_ns.desc(), in_bytes(turns.c.id)).limit(MOST_LOOKED_INTO).subquery()
    known = select(func.coalesce(turn_steps.c.steps, turns.c.steps).label("steps"))
    known = known.select_from(latest.join(turns, turns.c.id == latest.c.id))
    rows = connection.execute(known.outerjoin(turn_steps, are_steps_of_turn)).all()
    at: Counter[tuple[str, str]] = Counter()
    errors: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        ended = {(step.kind, step.name): step.error or "" for step in _innermost(steps_from(row.steps))}
        at.update(ended.keys())
        for key, error in ended.items():
            errors.setdefault(key, Counter())[error] += 1
    found = [
        ErrorsAtStep(name, kind, times, min(errors[kind, name].items(), key=lambda each: (-each[1], each[0]))[0])
        for (kind, name), times in at.items()
    ]
    return sorted(found, key=lambda each: (-each.turns, each.kind, each.name)), len(rows)


def _innermost(steps: Sequence[Step]) -> list[Step]:
    """Return the steps that ended with an error, below which no other did: there it arose."""
    ended = [step for step in steps if step.error]
    above = {step.parent_id for step in ended}
    return [step for step in ended if step.span_id not in above]
