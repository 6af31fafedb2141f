"""What the rows of the ledger stand for."""

import json
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, case, func, select, update

from turntrace.decisions import PruningDecision
from turntrace.errors import IdentityError
from turntrace.identity import safe_text
from turntrace.ledger.journeys import hand_over, journeys_of
from turntrace.ledger.shapes import OPEN
from turntrace.ledger.tables import decisions, open_turns, sessions, turns
from turntrace.records import SessionFacts, Step, TurnSummary
from turntrace.summaries import SessionSummary, UserSummary

_DAY_NS: Final = 86_400 * 1_000_000_000


def first_session(connection: Connection, *conditions: Any) -> RowMapping | None:
    """Return the session that began last of those that meet all conditions, or None."""
    query = select(sessions).where(*conditions).order_by(sessions.c.started_ns.desc(), sessions.c.id.desc()).limit(1)
    return connection.execute(query).mappings().first()


def has_open_turn(connection: Connection, session_id: str, since_ns: int) -> bool:
    """Tell whether a turn of a session still runs that began then or later; that of a killed process never ends."""
    runs = open_turns.c.session_id == session_id, open_turns.c.started_ns >= since_ns
    return connection.execute(select(open_turns.c.id).where(*runs).limit(1)).first() is not None


def continue_session(connection: Connection, row: RowMapping, wanted: SessionFacts) -> SessionFacts:
    """Open a session again by its id; one of a user who was not known yet becomes that user's."""
    if row["user_id"] is not None and wanted.user_id not in (None, row["user_id"]):
        raise IdentityError(
            f"The session {wanted.id!r} is another user's. A session has one user: pass another session_id, or the "
            "user_id that it began with."
        )
    facts = session_facts(row)
    if row["ended_ns"] is not None or facts.user_id != wanted.user_id is not None:
        if facts.user_id is None and wanted.user_id is not None:
            hand_over(connection, f"session:{wanted.id}", wanted.user_id)  # what the user began unknown
        facts = replace(facts, user_id=facts.user_id or wanted.user_id)
        activity = max(row["last_activity_ns"], wanted.started_ns) if row["ended_ns"] else row["last_activity_ns"]
        connection.execute(
            update(sessions)
            .where(sessions.c.id == wanted.id)
            .values(ended_ns=None, end_reason=None, dropoff=None, last_activity_ns=activity, user_id=facts.user_id)
        )
    return facts


def session_facts(row: RowMapping) -> SessionFacts:
    """Read what was known of a session from its start."""
    return SessionFacts(**{name: row[name] for name in SessionFacts.__slots__})


_SUMMARY_COLUMNS: Final = tuple(name for name in SessionSummary.__slots__ if name in sessions.c)
_TURN_COLUMNS: Final = tuple(name for name in TurnSummary.__slots__ if name in turns.c)


def plain_summary(row: RowMapping) -> SessionSummary:
    """Read a session, without the figures of its user."""
    known = {name: row[name] for name in _SUMMARY_COLUMNS}
    if row["feedback_count"]:
        known["user_satisfaction"] = min(1.0, max(0.0, row["feedback_sum"] / row["feedback_count"]))
    return SessionSummary(**known, user_sessions_total=row["sessions_total"])


def full_summary(connection: Connection, row: RowMapping) -> SessionSummary:
    """Read a session, with the figures of its user as they were when it began."""
    summary = plain_summary(row)
    if row["user_id"] is None:
        return replace(summary, user_sessions_total=None)
    count, total_turns, first, last = connection.execute(
        select(
            func.count(),
            func.sum(sessions.c.total_turns),
            func.min(sessions.c.started_ns),
            func.max(sessions.c.started_ns),
        ).where(sessions.c.user_id == row["user_id"], sessions.c.started_ns <= row["started_ns"])
    ).one()
    return replace(
        summary,
        user_sessions_total=count,
        user_avg_session_length=float(total_turns) / count,
        user_retention_days=int(last - first) // _DAY_NS,
    )


def user_summary(connection: Connection, user_id: str) -> UserSummary | None:
    """Read what is known of a user over all sessions; None for a user without any."""
    of_user = sessions.c.user_id == user_id
    sums = {name: func.sum(sessions.c[name]).label(name) for name in _USER_SUMS}
    row = (
        connection.execute(
            select(
                func.count().label("sessions_total"),
                func.sum(case((sessions.c.ended_ns.is_(None), 1), else_=0)).label("open_sessions"),
                func.sum(case((sessions.c.dropoff.is_(True), 1), else_=0)).label("dropoffs"),
                func.min(sessions.c.started_ns).label("first_session_ns"),
                func.max(sessions.c.started_ns).label("latest_session_ns"),
                func.max(sessions.c.last_activity_ns).label("last_activity_ns"),
                func.sum(sessions.c.feedback_sum).label("feedback_sum"),
                func.sum(sessions.c.feedback_count).label("feedback_count"),
                func.sum(sessions.c.total_cost_usd).label("total_cost_usd"),
                *sums.values(),
            ).where(of_user)
        )
        .mappings()
        .one()
    )
    if not row["sessions_total"]:
        return None
    floats = ("total_cost_usd", "feedback_sum")
    known = {name: row[name] if name in floats else int(row[name]) for name in row}
    total, count = known.pop("feedback_sum"), known.pop("feedback_count")
    return UserSummary(
        user_id=user_id,
        **known,
        user_satisfaction=min(1.0, max(0.0, total / count)) if count else None,
        journeys=journeys_of(connection, user_id),
    )


_USER_SUMS: Final = (
    *("total_turns", "failed_turns", "input_tokens", "output_tokens", "unpriced_calls"),
    *("active_ms", "wait_ms", "prunings"),
)


def turn_summary(row: RowMapping) -> TurnSummary:
    """Read a turn."""
    return TurnSummary(**{name: row[name] for name in _TURN_COLUMNS})


_OPEN_COLUMNS: Final = tuple(name for name in TurnSummary.__slots__ if name in open_turns.c)


def running_turn(row: RowMapping) -> TurnSummary:
    """Read a turn that has begun and not ended."""
    return TurnSummary(**{name: row[name] for name in _OPEN_COLUMNS}, status=OPEN)


def open_row(turn: TurnSummary) -> dict[str, Any]:
    """Return the row of a turn that goes on."""
    return {name: getattr(turn, name) for name in _OPEN_COLUMNS}


_DECISION_COLUMNS: Final = tuple(name for name in PruningDecision.__slots__ if name in decisions.c)
_DECISION_LISTS: Final = ("dropped", "replaced", "added")


def decision_values(decision: PruningDecision, dropped: Sequence[str]) -> dict[str, Any]:
    """Return the columns of a decision, of whose dropped messages these are kept."""
    values = {name: getattr(decision, name) for name in _DECISION_COLUMNS}
    values |= {name: ids_text(values[name]) for name in _DECISION_LISTS}
    return values | {"dropped": ids_text(dropped)}


def ids_text(ids: Sequence[str]) -> str | None:
    """Write ids as the ledger keeps them."""
    return json.dumps([safe_text(each) for each in ids], separators=(",", ":")) if ids else None


def decision_from(row: RowMapping) -> PruningDecision:
    """Read a decision."""
    values = {name: row[name] for name in _DECISION_COLUMNS}
    return PruningDecision(**values | {name: tuple(json.loads(row[name] or "[]")) for name in _DECISION_LISTS})


_step_values: Final = attrgetter(*Step.__slots__)


def steps_text(steps: Sequence[Step]) -> str:
    """Write steps as the ledger keeps them."""
    return json.dumps([_step_values(step) for step in steps], separators=(",", ":"))


def steps_from(text: str | None) -> list[Step]:
    """Read back what `steps_text` wrote."""
    return [Step(*values) for values in json.loads(text)] if text else []
