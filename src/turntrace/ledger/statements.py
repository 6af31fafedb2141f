"""The statements that run at the beginning and the end of every turn, compiled once.

They are built by SQLAlchemy Core, so that they fit the database, and run on the driver (see `Prepared`).
"""

from typing import Any, Final

from sqlalchemy import (
    BindParameter,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.engine import Dialect

from turntrace.ledger.engine import Prepared
from turntrace.ledger.schema import insert_for
from turntrace.ledger.shapes import INTERRUPT, INTERRUPTED
from turntrace.ledger.tables import conversations, decisions, gates, open_turns, outbox, sessions, turn_steps, turns

TURN_COLUMNS: Final = tuple(column.name for column in turns.c if column.name not in ("spans", "steps"))
"""Columns of a turn that are named as the fields of `turntrace.records.TurnSummary`."""

_SAME_SUMS: Final = (
    "llm_calls",
    "tool_calls",
    "input_tokens",
    "output_tokens",
    "unpriced_calls",
    "prunings",
    "wait_ms",
)
SESSION_SUMS: Final = {name: name for name in _SAME_SUMS} | {"total_cost_usd": "cost_usd", "active_ms": "latency_ms"}
"""Columns of a session that are sums over its turns, and the columns of the turns that they are sums of."""


class Statements:
    """The compiled statements.

    Args:
        dialect: The dialect of the database.
    """

    def __init__(self, dialect: Dialect) -> None:
        is_sqlite = dialect.name == "sqlite"
        self.begin_turn = Prepared(_begin_turn() if is_sqlite else _begin_turn_at_gate(), dialect)
        self.put = Prepared(_put(), dialect)
        self.put_decision = Prepared(_put_decision(), dialect)
        self.close_turn = Prepared(_close_turn(), dialect)
        self.insert_turn = Prepared(_insert_turn(), dialect)
        self.put_steps = Prepared(_put_steps(dialect.name), dialect)
        self.add_to_session = Prepared(_add_to_session(), dialect)
        self.upsert_conversation = Prepared(_upsert_conversation(dialect.name), dialect)


def _begin_turn() -> Any:
    """One statement, so that it is whole by itself: the number, the row, and whether it may be."""
    latest = [
        select(func.max(table.c.number).label("number")).where(table.c.conversation_id == bindparam("conversation"))
        for table in (turns, open_turns)
    ]
    numbers = union_all(*latest).subquery()
    number = select(func.coalesce(func.max(numbers.c.number), 0) + 1).scalar_subquery()
    row = _open_turn(number, sessions.c.id)
    may_begin = select(*row.values()).where(*_may_begin())
    return insert(open_turns).from_select(list(row), may_begin).returning(open_turns.c.number, _waiting_before())


def _begin_turn_at_gate() -> Any:
    """The same where writers are side by side.

    The row of the session is changed, so that nobody ends it at the same time; then the one of the conversation's gate
    gives the number, which the next one in waits for. It begins where the turns that were ended before stand.
    """
    active = (
        update(sessions)
        .where(*_may_begin())
        .values(last_activity_ns=_later(sessions.c.last_activity_ns, _parameter("now", sessions.c.last_activity_ns)))
        .returning(sessions.c.id)
        .cte("active")
    )
    key = literal("number:") + _parameter("conversation", open_turns.c.conversation_id)
    known = select(func.max(turns.c.number)).where(turns.c.conversation_id == bindparam("conversation"))
    first = func.coalesce(known.scalar_subquery(), 0) + 1
    gate = insert_for("postgresql", gates).from_select(["key", "number"], select(key, first).select_from(active))
    numbered = (
        gate.on_conflict_do_update(index_elements=[gates.c.key], set_={"number": gates.c.number + 1})
        .returning(gates.c.number)
        .cte("numbered")
    )
    row = _open_turn(numbered.c.number, active.c.id)
    chosen = select(*row.values()).select_from(active.join(numbered, literal(True)))
    return insert(open_turns).from_select(list(row), chosen).returning(open_turns.c.number, _waiting_before())


def _waiting_before() -> Any:
    """The latest turn before the one that begins, where that waits for a person, who will not answer it any more."""
    before = turns.alias("before")
    waits = and_(before.c.status == literal(INTERRUPTED), before.c.output_type == literal(INTERRUPT))
    unanswered = case((waits, before.c.id))
    latest = select(unanswered).where(before.c.conversation_id == bindparam("conversation"))
    return latest.order_by(before.c.number.desc()).limit(1).scalar_subquery()


def _open_turn(number: Any, session_id: Any) -> dict[str, Any]:
    return {
        "conversation_id": _parameter("conversation", open_turns.c.conversation_id),
        "number": number,
        "id": _parameter("turn_id", open_turns.c.id),
        "session_id": session_id,
        "user_id": _parameter("user", open_turns.c.user_id),
        "role": _parameter("role", open_turns.c.role),
        "started_ns": _parameter("now", open_turns.c.started_ns),
        "trace_id": _parameter("trace", open_turns.c.trace_id),
        "root_span_id": _parameter("root_span", open_turns.c.root_span_id),
        "own": _parameter("own", open_turns.c.own),
    }


def _may_begin() -> tuple[Any, ...]:
    since = _parameter("active_since", open_turns.c.started_ns)  # before, its process was killed
    still_runs = exists().where(open_turns.c.session_id == bindparam("session"), open_turns.c.started_ns >= since)
    return (
        sessions.c.id == bindparam("session"),
        sessions.c.ended_ns.is_(None),
        or_(
            sessions.c.last_activity_ns >= _parameter("active_since", sessions.c.last_activity_ns),
            still_runs,
        ),
    )


def _put() -> Any:
    named = {"kind": "kind", "body": "body", "items": "items", "created_ns": "created"}
    row = {column: _parameter(name, outbox.c[column]) for column, name in named.items()}
    return insert(outbox).values(row)


def _put_decision() -> Any:
    return insert(decisions).values({c.name: _parameter(f"new_{c.name}", c) for c in decisions.c if c.name != "id"})


def _close_turn() -> Any:
    same = (
        open_turns.c.conversation_id == bindparam("new_conversation_id"),
        open_turns.c.number == bindparam("new_number"),
        open_turns.c.id == bindparam("new_id"),
    )
    return delete(open_turns).where(*same).returning(open_turns.c.late)


def _insert_turn() -> Any:
    columns = (turns.c[name] for name in (*TURN_COLUMNS, "spans"))
    return insert(turns).values({column.name: _parameter(f"new_{column.name}", column) for column in columns})


def _put_steps(dialect: str) -> Any:
    values: dict[str, Any] = {column.name: bindparam(f"new_{column.name}") for column in turn_steps.c}
    upsert = insert_for(dialect, turn_steps).values(values)
    return upsert.on_conflict_do_update(index_elements=turn_steps.primary_key.c, set_={"steps": upsert.excluded.steps})


def _add_to_session() -> Any:
    sums = {**SESSION_SUMS, "failed_turns": "failed"}
    added = {column: sessions.c[column] + bindparam(f"new_{name}") for column, name in sums.items()}
    return (
        update(sessions)
        .where(sessions.c.id == bindparam("new_session_id"))
        .values(
            last_activity_ns=_later(sessions.c.last_activity_ns, bindparam("new_ended_ns")),
            total_turns=sessions.c.total_turns + 1,
            **added,
        )
        .returning(sessions.c.ended_ns)
    )


def _upsert_conversation(dialect: str) -> Any:
    upsert = insert_for(dialect, conversations).values(
        id=bindparam("new_conversation_id"),
        session_id=bindparam("new_session_id"),
        user_id=bindparam("new_user_id"),
        topic=bindparam("topic"),
        total_turns=1,
        started_ns=bindparam("new_started_ns"),
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
