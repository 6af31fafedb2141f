"""What the ledger says of sessions at their end, what has been silent too long, and feedback."""

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, exists, select, text, update

from turntrace.ledger.schema import insert_for
from turntrace.ledger.shapes import INTERRUPT, INTERRUPTED
from turntrace.ledger.tables import feedback, open_turns, sessions, turns

_ACTIONS: Final[Mapping[str, str]] = {"failed": "failed", "abandoned": "failed", "interrupted": "interrupted"}
_ANSWERS: Final[Mapping[str | None, str]] = {"question": "asked_question", "tool_result": "called_tool"}


def last_turn_of(connection: Connection, session_id: str) -> RowMapping | None:
    """Return the turn of a session that began last of those that have ended, or None."""
    query = (
        select(turns.c.number, turns.c.intent, turns.c.status, turns.c.output_type, turns.c.ended_ns)
        .where(turns.c.session_id == session_id)
        .order_by(turns.c.started_ns.desc(), turns.c.number.desc())
        .limit(1)
    )
    return connection.execute(query).mappings().first()


def action_of(turn: RowMapping) -> str:
    """Say what the agent did last in a turn: ``asked_question``, ``answered``, ``called_tool``, ``failed``, ..."""
    if turn["output_type"] == INTERRUPT:  # also when nobody answered it
        return "interrupted"
    return _ACTIONS.get(turn["status"]) or _ANSWERS.get(turn["output_type"], "answered")


def note_last_turn(connection: Connection, session_id: str) -> None:
    """Write into a session what its last turn was."""
    turn = last_turn_of(connection, session_id)
    if turn is not None:
        values = {
            "last_turn": turn["number"],
            "last_intent": turn["intent"],
            "last_action": action_of(turn),
            "last_turn_ns": turn["ended_ns"],
        }
        connection.execute(update(sessions).where(sessions.c.id == session_id).values(values))


def idle_sessions(connection: Connection, silent_since_ns: int, limit: int) -> list[tuple[str, int]]:
    """Return sessions that are open, have no turn that runs, and were silent since then, with their last activity.

    Those that another worker is about to end are left to it.
    """
    runs = exists().where(open_turns.c.session_id == sessions.c.id)
    query = (
        select(sessions.c.id, sessions.c.last_activity_ns)
        .where(sessions.c.ended_ns.is_(None), sessions.c.last_activity_ns < silent_since_ns, ~runs)
        .order_by(sessions.c.last_activity_ns)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [(row.id, row.last_activity_ns) for row in connection.execute(query)]


def stale_turns(connection: Connection, silent_since_ns: int, limit: int, *, after: str = "") -> list[RowMapping]:
    """Return turns that have not ended and whose session was silent since then, each with what its session is.

    Args:
        connection: A connection in a transaction.
        silent_since_ns: In nanoseconds since 1970.
        limit: How many at most.
        after: Only those of greater ids, which is the order.
    """
    query = (
        select(open_turns, *_of_session())
        .join(sessions, sessions.c.id == open_turns.c.session_id)
        .where(open_turns.c.started_ns < silent_since_ns, sessions.c.last_activity_ns < silent_since_ns)
        .where(open_turns.c.id > after)
        .order_by(open_turns.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True, of=open_turns)
    )
    return list(connection.execute(query).mappings())


def waiting_turns(
    connection: Connection,
    limit: int,
    *,
    silent_since_ns: int | None = None,
    session_id: str | None = None,
    turn_id: str | None = None,
) -> list[RowMapping]:
    """Return turns that wait and do not run, each with what its session is.

    Args:
        connection: A connection in a transaction.
        limit: How many at most.
        silent_since_ns: Only those whose session was silent since then, in nanoseconds since 1970.
        session_id: Only those of this session.
        turn_id: Only this one.
    """
    same = open_turns.c.conversation_id == turns.c.conversation_id, open_turns.c.number == turns.c.number
    query = (
        select(turns, *_of_session())
        .join(sessions, sessions.c.id == turns.c.session_id)
        .where(turns.c.status == text(f"'{INTERRUPTED}'"), ~exists().where(*same))
        .limit(limit)
        .with_for_update(skip_locked=True, of=turns)
    )
    if silent_since_ns is not None:
        query = query.where(sessions.c.last_activity_ns < silent_since_ns, turns.c.ended_ns < silent_since_ns)
    if session_id is not None:
        query = query.where(turns.c.session_id == session_id)
    if turn_id is not None:
        query = query.where(turns.c.id == turn_id)
    return list(connection.execute(query).mappings())


def _of_session() -> list[Any]:
    names = ("channel", "type", "tier", "org_id", "locale", "client_version", "last_activity_ns")
    return [sessions.c[name].label(f"session_{name}") for name in names]


def put_feedback(connection: Connection, row: Mapping[str, Any]) -> None:
    """Write down feedback; of the same name on the same subject the latest counts."""
    before = connection.execute(
        select(feedback.c.value).where(feedback.c.id == row["id"]).with_for_update()
    ).scalar_one_or_none()
    put = insert_for(connection.dialect.name, feedback).values(row)
    put = put.on_conflict_do_update(
        index_elements=[feedback.c.id], set_={"value": put.excluded.value, "at_ns": put.excluded.at_ns}
    )
    connection.execute(put)
    connection.execute(
        update(sessions)
        .where(sessions.c.id == row["session_id"])
        .values(
            feedback_sum=sessions.c.feedback_sum + (row["value"] - (before or 0.0)),
            feedback_count=sessions.c.feedback_count + int(before is None),
        )
    )
