"""The statements that run at the beginning and the end of every turn, compiled once.

They are built by SQLAlchemy Core, so that they fit the database, and run on the driver (see `Prepared`).
"""

from typing import Any, Final

from sqlalchemy import BindParameter, bindparam, case, exists, func, insert, literal, or_, select, update
from sqlalchemy.engine import Dialect

from turntrace.ledger.engine import Prepared
from turntrace.ledger.schema import insert_for
from turntrace.ledger.tables import conversations, outbox, sessions, turns

OPEN: Final = "open"
"""Status of a turn that has begun and has not ended."""

TURN_RESULT: Final = (
    *("status", "ended_ns", "role", "input_length", "output_length", "input_type", "output_type", "has_attachments"),
    *("intent", "agent_runs", "tool_calls", "llm_calls", "input_tokens", "output_tokens", "cost_usd"),
    *("unpriced_calls", "latency_ms", "wait_ms", "time_to_first_token_ms", "model", "error"),
    *("trace_id", "root_span_id"),
)
"""Columns of a turn that are known at its end, named as the fields of `turntrace.records.TurnSummary`."""

_COUNTED: Final = (
    *("agent_runs", "tool_calls", "llm_calls", "input_tokens", "output_tokens", "cost_usd", "unpriced_calls"),
    *("latency_ms", "wait_ms", "spans"),
)


class Statements:
    """The compiled statements.

    Args:
        dialect: The dialect of the database.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.begin_turn = Prepared(_begin_turn(), dialect)
        self.put = Prepared(_put(), dialect)
        self.end_turn = Prepared(_end_turn(), dialect)
        self.add_to_session = Prepared(_add_to_session(), dialect)
        self.upsert_conversation = Prepared(_upsert_conversation(dialect.name), dialect)


def _begin_turn() -> Any:
    """One statement, so that it is whole by itself: the number, the row, and whether it may be."""
    number = (
        select(func.coalesce(func.max(turns.c.number), 0) + 1)
        .where(turns.c.conversation_id == bindparam("conversation"))
        .scalar_subquery()
    )
    still_runs = exists().where(turns.c.session_id == bindparam("session"), turns.c.status == OPEN)
    row = {
        "id": _parameter("turn_id", turns.c.id),
        "conversation_id": _parameter("conversation", turns.c.conversation_id),
        "session_id": sessions.c.id,
        "user_id": _parameter("user", turns.c.user_id),
        "number": number,
        "status": literal(OPEN),
        "started_ns": _parameter("now", turns.c.started_ns),
        "trace_id": _parameter("trace", turns.c.trace_id),
        "root_span_id": _parameter("root_span", turns.c.root_span_id),
        "role": _parameter("role", turns.c.role),
    }
    row |= {name: literal(0) for name in _COUNTED}
    may_begin = select(*row.values()).where(
        sessions.c.id == bindparam("session"),
        sessions.c.ended_ns.is_(None),
        or_(sessions.c.last_activity_ns >= bindparam("active_since"), still_runs),
    )
    return insert(turns).from_select(list(row), may_begin, include_defaults=False).returning(turns.c.number)


def _put() -> Any:
    named = {"kind": "kind", "body": "body", "items": "items", "created_ns": "created"}
    row = {column: _parameter(name, outbox.c[column]) for column, name in named.items()}
    return insert(outbox).values(row | {"attempts": 0, "next_try_ns": 0, "leased_until_ns": 0})


def _end_turn() -> Any:
    columns = (*TURN_RESULT, "steps", "spans")
    return (
        update(turns)
        .where(turns.c.id == bindparam("turn_id"), turns.c.ended_ns.is_(None))
        .values({name: _parameter(f"new_{name}", turns.c[name]) for name in columns})
    )


def _add_to_session() -> Any:
    sums = {name: name for name in ("llm_calls", "tool_calls", "input_tokens", "output_tokens", "unpriced_calls")}
    sums |= {"total_cost_usd": "cost_usd", "active_ms": "latency_ms", "wait_ms": "wait_ms", "failed_turns": "failed"}
    added = {column: sessions.c[column] + bindparam(f"new_{name}") for column, name in sums.items()}
    return (
        update(sessions)
        .where(sessions.c.id == bindparam("session"))
        .values(
            last_activity_ns=_later(sessions.c.last_activity_ns, bindparam("new_ended_ns")),
            total_turns=sessions.c.total_turns + 1,
            **added,
        )
    )


def _upsert_conversation(dialect: str) -> Any:
    upsert = insert_for(dialect, conversations).values(
        id=bindparam("conversation"),
        session_id=bindparam("session"),
        user_id=bindparam("user"),
        topic=bindparam("topic"),
        total_turns=1,
        started_ns=bindparam("started"),
        last_activity_ns=bindparam("new_ended_ns"),
    )
    return upsert.on_conflict_do_update(
        index_elements=[conversations.c.id],
        set_={
            "session_id": upsert.excluded.session_id,
            "topic": func.coalesce(upsert.excluded.topic, conversations.c.topic),
            "total_turns": conversations.c.total_turns + 1,
            "last_activity_ns": upsert.excluded.last_activity_ns,
        },
    )


def _parameter(name: str, column: Any) -> Any:
    return bindparam(name, type_=column.type)


def _later(column: Any, value: BindParameter[int]) -> Any:
    return case((column > value, column), else_=value)  # a clock that goes back does not take activity away
