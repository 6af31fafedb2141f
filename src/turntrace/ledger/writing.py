"""What ends: changes to the ledger within one transaction."""

from collections.abc import Mapping, Sequence
from enum import IntEnum

from sqlalchemy import Connection, delete, update

from turntrace.decisions import PruningDecision
from turntrace.ledger.rows import decision_values, first_session, full_summary, steps_text
from turntrace.ledger.statements import TURN_COLUMNS, Statements
from turntrace.ledger.tables import open_turns, outbox, sessions, turns
from turntrace.records import SessionSummary, Step, TurnSummary, TurnTags


class TurnEnd(IntEnum):
    """What came of ending a turn; it is true when the turn ended by it."""

    ENDED_BEFORE = 0
    ENDED = 1
    ENDED_AFTER_SESSION = 2


class LedgerWriter:
    """Changes to the ledger within one transaction. Made by `Ledger.writing`."""

    def __init__(self, connection: Connection, statements: Statements) -> None:
        self._connection = connection
        self._statements = statements
        self._cursor = connection.connection.cursor()

    def put(self, kind: str, body: bytes, *, items: int, created_ns: int) -> None:
        """Put something into the outbox."""
        values = {"kind": kind, "body": body, "items": items, "created": created_ns}
        self._statements.put.run(self._cursor, values)

    def remove(self, item_id: int) -> None:
        """Take something out of the outbox."""
        self._connection.execute(delete(outbox).where(outbox.c.id == item_id))

    def put_decision(self, decision: PruningDecision, dropped: Sequence[str], turn: TurnTags) -> None:
        """Write down a decision about a model's window.

        Args:
            decision: The decision.
            dropped: Ids of the messages that it was the first to drop.
            turn: The turn in which it was made.
        """
        values = decision_values(decision, dropped) | {
            "turn_id": turn.turn_id,
            "session_id": turn.session_id,
            "conversation_id": turn.conversation_id,
            "turn_number": turn.number,
        }
        self._statements.put_decision.run(self._cursor, {f"new_{name}": value for name, value in values.items()})

    def finish_turn(self, turn: TurnSummary, steps: Sequence[Step], *, spans: int, topic: str | None = None) -> TurnEnd:
        """Write down how a turn ended, and add it to its session.

        Args:
            turn: The turn, with its end.
            steps: Its steps, for looking at.
            spans: How many spans its trace has.
            topic: What the conversation is about.

        Returns:
            Whether this was its end; a turn that had ended before is not changed.
        """
        values = {f"new_{name}": getattr(turn, name) for name in TURN_COLUMNS}
        values |= {"new_steps": steps_text(steps), "new_spans": spans, "topic": topic}
        values["new_failed"] = int(turn.status == "failed")
        statements, cursor = self._statements, self._cursor
        if statements.close_turn.run(cursor, values).rowcount != 1:
            return TurnEnd.ENDED_BEFORE
        statements.insert_turn.run(cursor, values)
        session = statements.add_to_session.run(cursor, values).fetchone()
        statements.upsert_conversation.run(cursor, values)
        ended_after_session = session is not None and session[0] is not None
        return TurnEnd.ENDED_AFTER_SESSION if ended_after_session else TurnEnd.ENDED

    def add_to_turn(self, turn_id: str, session_id: str, late: Mapping[str, float]) -> None:
        """Add what ended after its turn to the turn and its session.

        Args:
            turn_id: The turn.
            session_id: Its session.
            late: The sums to add, by the names of `LATE_SUMS`.
        """
        to_turn = {name: turns.c[name] + value for name, value in late.items()}
        in_session = {name: "total_cost_usd" if name == "cost_usd" else name for name in late if name != "spans"}
        to_session = {column: sessions.c[column] + late[name] for name, column in in_session.items()}
        self._connection.execute(update(turns).where(turns.c.id == turn_id).values(to_turn))
        self._connection.execute(update(sessions).where(sessions.c.id == session_id).values(to_session))

    def ended_session(self, session_id: str) -> SessionSummary | None:
        """Return a session that has ended, with its totals as they are now; None when it has not."""
        row = first_session(self._connection, sessions.c.id == session_id, sessions.c.ended_ns.is_not(None))
        return None if row is None else full_summary(self._connection, row)

    def withdraw_open_turns(self, session_id: str) -> int:
        """Take back the turns of a session that have begun and not ended, as if they had not begun; return how many."""
        return self._connection.execute(delete(open_turns).where(open_turns.c.session_id == session_id)).rowcount

    def announced(self, session_id: str) -> bool:
        """Note that the start of a session has its span; tell whether it had none before."""
        noted = update(sessions).where(sessions.c.id == session_id, sessions.c.announced.is_(False))
        return self._connection.execute(noted.values(announced=True)).rowcount == 1

    def end_session(self, session_id: str, reason: str, ended_ns: int) -> SessionSummary | None:
        """End a session.

        Returns:
            The session with its totals; None when it had ended before or does not exist.
        """
        ended = self._connection.execute(
            update(sessions)
            .where(sessions.c.id == session_id, sessions.c.ended_ns.is_(None))
            .values(ended_ns=ended_ns, end_reason=reason)
        )
        if ended.rowcount != 1:
            return None
        row = first_session(self._connection, sessions.c.id == session_id)
        return None if row is None else full_summary(self._connection, row)
