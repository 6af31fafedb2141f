"""Turns that wait, for a person or for another process: which they are, and how they go on."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, RowMapping, insert, select, update

from turntrace.ledger.rows import first_session, open_row, running_turn, session_facts, steps_from, turn_summary
from turntrace.ledger.shapes import COMPLETED, INTERRUPTED, OPEN, TurnTakenUp, TurnWritten
from turntrace.ledger.tables import open_turns, sessions, turn_steps, turns
from turntrace.records import TurnSummary


def newest_turn(connection: Connection, conversation_id: str) -> TurnSummary | None:
    """Return the turn of a conversation with the highest number, or None; one that runs has the status ``open``."""
    ended, running = _newest(connection, turns, conversation_id), _newest(connection, open_turns, conversation_id)
    if running is not None and (ended is None or running["number"] >= ended["number"]):
        return running_turn(running)
    return None if ended is None else turn_summary(ended)


def turn_at(connection: Connection, conversation_id: str, at_ns: int) -> TurnSummary | None:
    """Return the turn of a conversation that had begun last at a time, or None."""
    query = select(turns).where(turns.c.conversation_id == conversation_id, turns.c.started_ns <= at_ns)
    row = connection.execute(query.order_by(turns.c.number.desc()).limit(1)).mappings().first()
    return None if row is None else turn_summary(row)


def resume_newest(
    connection: Connection, conversation_id: str, may_resume: Callable[[TurnSummary], bool], now_ns: int
) -> TurnTakenUp | None:
    """Have the newest turn of a conversation go on, if it waits.

    Args:
        connection: A connection in a transaction that writes.
        conversation_id: The conversation.
        may_resume: Tells of the newest turn whether it is to go on: one that waits, or has the status ``open``
            because its process was killed before it could write down that it waits.
        now_ns: The time, in nanoseconds since 1970.

    Returns:
        The turn, which is written down as open again; None when it is not to go on.
    """
    newest = newest_turn(connection, conversation_id)
    if newest is None or not may_resume(newest):
        return None
    return _resumed(connection, newest, now_ns)


def resume_by_id(connection: Connection, turn_id: str, now_ns: int) -> TurnTakenUp | None:
    """Have a turn go on that was handed over, whatever became of it since; None when there is none of that id.

    One that waits, failed, or was abandoned is open again. One that is completed stays so, and one that runs, or whose
    process was killed, is open already: what ends last is added to it (see `LedgerWriter.add_part`).

    Args:
        connection: A connection in a transaction that writes.
        turn_id: The turn.
        now_ns: The time, in nanoseconds since 1970.
    """
    ended = connection.execute(select(turns).where(turns.c.id == turn_id).with_for_update()).mappings().first()
    running = connection.execute(select(open_turns).where(open_turns.c.id == turn_id)).mappings().first()
    if running is not None:
        return _resumed(connection, running_turn(running), now_ns)
    return None if ended is None else _resumed(connection, turn_summary(ended), now_ns)


def _resumed(connection: Connection, turn: TurnSummary, now_ns: int) -> TurnTakenUp | None:
    before = written_turn(connection, turn.id)
    session = first_session(connection, sessions.c.id == turn.session_id)
    if session is None:
        return None
    runs = select(open_turns.c.id).where(
        open_turns.c.conversation_id == turn.conversation_id, open_turns.c.number == turn.number
    )
    is_open = connection.execute(runs).first() is not None
    if turn.status not in (OPEN, COMPLETED):
        if is_open:  # somebody else was first
            return None
        # That something is noted in it tells its end that more may be written of the turn than that end knows.
        connection.execute(insert(open_turns).values(open_row(turn) | {"late": "{}"}))
    if turn.status != COMPLETED:  # it is activity, though the turn began long ago: the sweep is to leave both alone
        silent = sessions.c.id == turn.session_id, sessions.c.last_activity_ns < now_ns
        connection.execute(update(sessions).where(*silent).values(last_activity_ns=now_ns))
    known = turn if before is None else before.turn
    return TurnTakenUp(known, session_facts(session), before)


def written_turn(connection: Connection, turn_id: str) -> TurnWritten | None:
    """Return a turn as it is written down, and let nobody else change it; None when it is not."""
    row = connection.execute(select(turns).where(turns.c.id == turn_id).with_for_update()).mappings().first()
    if row is None:
        return None
    known = select(turn_steps.c.steps)
    same = turn_steps.c.started_ns == row["started_ns"], turn_steps.c.turn_id == turn_id
    text = connection.execute(known.where(*same)).scalar_one_or_none() or row["steps"]
    roots = int(row["status"] != INTERRUPTED and row["spans"] > 0)
    return TurnWritten(turn_summary(row), tuple(steps_from(text)), row["spans"] - roots, roots)


def _newest(connection: Connection, table: Any, conversation_id: str) -> RowMapping | None:
    query = select(table).where(table.c.conversation_id == conversation_id).order_by(table.c.number.desc()).limit(1)
    return connection.execute(query).mappings().first()
