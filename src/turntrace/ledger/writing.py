"""What ends: changes to the ledger within one transaction."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, select, update

from turntrace.decisions import PruningDecision
from turntrace.ledger.ends import (
    idle_sessions,
    last_turn_of,
    note_last_turn,
    put_feedback,
    stale_turns,
    waiting_turns,
)
from turntrace.ledger.journeys import enter_stage, unconverted_in
from turntrace.ledger.parts import put_together
from turntrace.ledger.rows import decision_values, first_session, full_summary, plain_summary, steps_text, turn_summary
from turntrace.ledger.shapes import ABANDONED, INTERRUPTED, StageWanted, TurnEnd, TurnWritten
from turntrace.ledger.statements import SESSION_SUMS, TURN_COLUMNS, Statements
from turntrace.ledger.tables import conversations, open_turns, outbox, sessions, turn_steps, turns
from turntrace.ledger.taking_up import newest_turn, written_turn
from turntrace.records import Step, TurnSummary, TurnTags
from turntrace.summaries import SessionSummary, StageEntered


class LedgerWriter:
    """Changes to the ledger within one transaction. Made by `Ledger.writing`.

    Attributes:
        put_bytes: How many bytes were put into the outbox.
        whole: The turn that was ended last, where another process did a part of it that its end did not know.
    """

    def __init__(self, connection: Connection, statements: Statements) -> None:
        self._connection = connection
        self._statements = statements
        self._cursor = connection.connection.cursor()
        self.put_bytes = 0
        self.whole: TurnSummary | None = None

    def put(self, kind: str, body: bytes, *, items: int, created_ns: int) -> None:
        """Put something into the outbox."""
        values = {"kind": kind, "body": body, "items": items, "created": created_ns}
        self._statements.put.run(self._cursor, values)
        self.put_bytes += len(body)

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

    def finish_turn(
        self,
        turn: TurnSummary,
        steps: Sequence[Step],
        *,
        spans: int,
        topic: str | None = None,
        before: TurnWritten | None = None,
    ) -> TurnEnd:
        """Write down how a turn ended, and add it to its session.

        Args:
            turn: The turn, with its end.
            steps: Its steps, for looking at.
            spans: How many spans its trace has.
            topic: What the conversation is about.
            before: The turn as it was written down when it had waited, for one that went on.

        Returns:
            Whether this was its end; a turn that had ended before is not changed (see `add_part`), but for one that a
            sweep closed as abandoned though it went on.
        """
        same = {"new_conversation_id": turn.conversation_id, "new_number": turn.number, "new_id": turn.id}
        closed = self._statements.close_turn.run(self._cursor, same).fetchall()
        was_open = len(closed) == 1
        self.whole = None
        if before is not None or not was_open or closed[0][0] is not None:
            written = self._take_back(turn.id, was_open=was_open)
            if written is None and not was_open:
                return TurnEnd.ENDED_BEFORE
            if written is not None:  # what ended late is added, as is all of a part that the turn does not know
                known = turn
                turn, steps = put_together(turn, steps, written, before)
                self.whole = turn if turn != known else None
                spans += written.spans - (0 if before is None else before.spans)
        late = json.loads(closed[0][0] or "{}") if was_open else {}
        return self._insert(turn, steps, spans, topic, late)

    def _insert(
        self, turn: TurnSummary, steps: Sequence[Step], spans: int, topic: str | None, late: Mapping[str, float]
    ) -> TurnEnd:
        values = {f"new_{name}": getattr(turn, name) for name in TURN_COLUMNS}
        values |= {"new_spans": spans, "topic": topic}
        values["new_failed"] = int(turn.status == "failed")
        for name, value in late.items():
            values[f"new_{name}"] += value
        statements, cursor = self._statements, self._cursor
        statements.insert_turn.run(cursor, values)
        self._put_steps(turn, steps)
        session = statements.add_to_session.run(cursor, values).fetchone()
        statements.upsert_conversation.run(cursor, values)
        ended_after_session = session is not None and session[0] is not None
        return TurnEnd.ENDED_AFTER_SESSION if ended_after_session else TurnEnd.ENDED

    def _put_steps(self, turn: TurnSummary, steps: Sequence[Step]) -> None:
        if steps:
            values = {"new_started_ns": turn.started_ns, "new_turn_id": turn.id, "new_steps": steps_text(steps)}
            self._statements.put_steps.run(self._cursor, values)

    def _take_back(self, turn_id: str, *, was_open: bool) -> TurnWritten | None:
        """Take back what was written of a turn that went on: it had waited, or a sweep had closed it as abandoned.

        Returns:
            What was written; None when there is nothing to take back.
        """
        written = written_turn(self._connection, turn_id)
        if written is None or not (was_open or written.turn.status in (ABANDONED, INTERRUPTED)):
            return None
        turn = written.turn
        same = turn_steps.c.started_ns == turn.started_ns, turn_steps.c.turn_id == turn.id
        self._connection.execute(delete(turn_steps).where(*same))
        self._connection.execute(delete(turns).where(turns.c.id == turn_id))
        less = {column: sessions.c[column] - getattr(turn, name) for column, name in SESSION_SUMS.items()}
        less["failed_turns"] = sessions.c.failed_turns - int(turn.status == "failed")
        for table, row_id, sums in ((sessions, turn.session_id, less), (conversations, turn.conversation_id, {})):
            once_less = update(table).where(table.c.id == row_id)
            self._connection.execute(once_less.values(total_turns=table.c.total_turns - 1, **sums))
        return written

    def add_part(
        self, part: TurnSummary, steps: Sequence[Step], *, spans: int, before: TurnWritten | None = None
    ) -> TurnWritten | None:
        """Add what another process did in a turn that has ended: one of two that went on with it was first.

        Args:
            part: The turn as that process knows it.
            steps: Its steps.
            spans: How many spans its trace has, the root left out.
            before: The turn as it was written down when it had waited.

        Returns:
            The turn as it is written down now; None when it is not.
        """
        written = written_turn(self._connection, part.id)
        if written is None:
            return None
        whole, all_steps = put_together(written.turn, written.steps, TurnWritten(part, tuple(steps), spans), before)
        spans += written.spans - (0 if before is None else before.spans)
        values = {name: getattr(whole, name) for name in TURN_COLUMNS}
        values |= {"spans": spans + written.roots}
        self._connection.execute(update(turns).where(turns.c.id == part.id).values(values))
        self._put_steps(whole, all_steps)
        more = {
            column: sessions.c[column] + (getattr(whole, name) - getattr(written.turn, name))
            for column, name in SESSION_SUMS.items()
        }
        self._connection.execute(update(sessions).where(sessions.c.id == whole.session_id).values(more))
        return TurnWritten(whole, tuple(all_steps), spans, written.roots)

    def has_later_turn(self, turn: TurnSummary) -> bool:
        """Tell whether a turn that came later in the same conversation has begun."""
        newest = newest_turn(self._connection, turn.conversation_id)
        return newest is not None and newest.number > turn.number

    def abandon_waiting(self, turn_id: str) -> bool:
        """Close a turn that waits, since nobody answers it, with its root span; tell whether it did wait."""
        waits = update(turns).where(turns.c.id == turn_id, turns.c.status == INTERRUPTED)
        closed = waits.values(status=ABANDONED, error=ABANDONED, spans=turns.c.spans + 1)
        return self._connection.execute(closed).rowcount == 1

    def add_to_turn(self, turn: TurnTags, late: Mapping[str, float]) -> TurnSummary | None:
        """Add what ended after its turn, or in it but in another process, to the turn and its session.

        Args:
            turn: The turn.
            late: The sums to add, by the names of `LATE_SUMS`.

        Returns:
            The turn with them; None while it runs, or where the ledger does not have it.
        """
        turn_id, session_id = turn.turn_id, turn.session_id
        same = open_turns.c.conversation_id == turn.conversation_id, open_turns.c.number == turn.number
        runs = select(open_turns.c.late).where(*same, open_turns.c.id == turn_id).with_for_update()
        row = self._connection.execute(runs).first()
        if row is not None:  # it is added when the turn ends
            noted = json.loads(row.late or "{}")
            text = json.dumps({name: noted.get(name, 0) + value for name, value in late.items()})
            self._connection.execute(update(open_turns).where(*same).values(late=text))
            return None
        to_turn = {name: turns.c[name] + value for name, value in late.items()}
        in_session = {name: "total_cost_usd" if name == "cost_usd" else name for name in late if name != "spans"}
        to_session = {column: sessions.c[column] + late[name] for name, column in in_session.items()}
        added = update(turns).where(turns.c.id == turn_id).values(to_turn).returning(turns)
        whole = self._connection.execute(added).mappings().first()
        if to_session:
            self._connection.execute(update(sessions).where(sessions.c.id == session_id).values(to_session))
        return None if whole is None else turn_summary(whole)

    def withdraw_open_turns(self, session_id: str) -> int:
        """Take back the turns of a session that have begun and not ended, as if they had not begun; return how many."""
        return self._connection.execute(delete(open_turns).where(open_turns.c.session_id == session_id)).rowcount

    def announced(self, session_id: str) -> bool:
        """Note that the start of a session has its span; tell whether it had none before."""
        noted = update(sessions).where(sessions.c.id == session_id, sessions.c.announced.is_(False))
        return self._connection.execute(noted.values(announced=True)).rowcount == 1

    def end_session(self, session_id: str, reason: str, ended_ns: int) -> SessionSummary | None:
        """End a session, and write into it what its last turn was.

        Returns:
            The session with its totals; None when it had ended before or does not exist.
        """
        ended = self._connection.execute(
            update(sessions)
            .where(sessions.c.id == session_id, sessions.c.ended_ns.is_(None))
            .values(ended_ns=ended_ns, end_reason=reason)
        )
        return self.ended_session(session_id) if ended.rowcount == 1 else None

    def ended_session(self, session_id: str) -> SessionSummary | None:
        """Return a session that has ended, with its totals as they are now; None when it has not."""
        row = first_session(self._connection, sessions.c.id == session_id, sessions.c.ended_ns.is_not(None))
        if row is None:
            return None
        note_last_turn(self._connection, session_id)
        row = first_session(self._connection, sessions.c.id == session_id)
        return None if row is None else full_summary(self._connection, row)

    def unconverted(self, session: SessionSummary) -> tuple[str, ...]:
        """Return the names of the journeys that a session took a step of and that are not converted."""
        return tuple(unconverted_in(self._connection, owner_of(session.user_id, session.id), session.id))

    def note_dropoff(self, session_id: str, detected: bool) -> None:
        """Write down whether a session ended as a drop-off."""
        self._connection.execute(update(sessions).where(sessions.c.id == session_id).values(dropoff=detected))

    def idle_sessions(self, silent_since_ns: int, limit: int) -> list[tuple[str, int]]:
        """Return sessions to be ended for their silence, with the time of their last activity."""
        return idle_sessions(self._connection, silent_since_ns, limit)

    def stale_turns(self, silent_since_ns: int, limit: int, *, after: str = "") -> list[RowMapping]:
        """Return turns to be closed because nobody will end them, each with what its session is."""
        return stale_turns(self._connection, silent_since_ns, limit, after=after)

    def waiting_turns(
        self,
        limit: int,
        *,
        silent_since_ns: int | None = None,
        session_id: str | None = None,
        turn_id: str | None = None,
    ) -> list[RowMapping]:
        """Return turns that wait, each with what its session is; see `turntrace.ledger.ends.waiting_turns`."""
        return waiting_turns(
            self._connection, limit, silent_since_ns=silent_since_ns, session_id=session_id, turn_id=turn_id
        )

    def written_turn(self, turn_id: str) -> TurnWritten | None:
        """Return a turn as it is written down, and let nobody else change it; None when it is not."""
        return written_turn(self._connection, turn_id)

    def enter_stage(self, user_id: str | None, step: StageWanted) -> StageEntered | None:
        """Enter a stage of a journey, or convert it; None when nothing changed by it."""
        number = step.turn_number
        if number is None:
            last = last_turn_of(self._connection, step.session_id)
            number = None if last is None else last["number"]
        return enter_stage(
            self._connection,
            owner_of(user_id, step.session_id),
            step.name,
            step.stages,
            step.stage,
            session_id=step.session_id,
            turn_number=number,
            at_ns=step.at_ns,
            converts=step.converts,
        )

    def put_feedback(self, row: Mapping[str, Any]) -> None:
        """Write down feedback; of the same name on the same subject the latest counts.

        Args:
            row: Its ``id``, ``session_id``, ``turn_id``, ``name``, ``value`` from 0 to 1, and ``at_ns``.
        """
        put_feedback(self._connection, row)

    def session(self, session_id: str) -> SessionSummary | None:
        """Return a session as it is now, without the figures of its user; None when there is none."""
        row = first_session(self._connection, sessions.c.id == session_id)
        return None if row is None else plain_summary(row)


def owner_of(user_id: str | None, session_id: str) -> str:
    """Return whose a journey is: the user's, or of a session whose user is unknown."""
    return user_id or f"session:{session_id}"
