"""What can be asked of the ledger."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from sqlalchemy import Connection, select

from turntrace.decisions import PruningDecision
from turntrace.ledger.engine import Database
from turntrace.ledger.journeys import journey_of, steps_in
from turntrace.ledger.rows import (
    decision_from,
    first_session,
    full_summary,
    plain_summary,
    running_turn,
    steps_from,
    turn_summary,
    user_summary,
)
from turntrace.ledger.shapes import INTERRUPTED, OPEN
from turntrace.ledger.tables import (
    are_steps_of_turn,
    decisions,
    feedback,
    open_turns,
    outbox,
    sessions,
    turn_steps,
    turns,
)
from turntrace.ledger.taking_up import newest_turn, turn_at
from turntrace.ledger.writing import owner_of
from turntrace.records import Step, TurnSummary
from turntrace.summaries import Feedback, JourneySummary, SessionSummary, StageEntered, UserSummary
from turntrace.waiting import OutboxItem

_SETTLE_S: Final = 30.0


class LedgerQuestions:
    """The part of the ledger that is asked.

    Attributes:
        settle: Called before a question is asked, with the seconds that it may take: writes down what still waits.
    """

    settle: Callable[[float], object] | None
    _database: Database

    @contextmanager
    def asking(self) -> Iterator[Connection]:
        """Give a connection for questions of one's own, once all that has ended is written down."""
        self.settled()
        with self._database.reading() as connection:
            yield connection

    def settled(self) -> None:
        """Write down what still waits."""
        if self.settle is not None:
            self.settle(_SETTLE_S)

    def session(self, session_id: str) -> SessionSummary | None:
        """Return what is known of a session, or None."""
        with self.asking() as connection:
            row = first_session(connection, sessions.c.id == session_id)
            return None if row is None else full_summary(connection, row)

    def sessions(
        self, *, limit: int = 50, ids: Sequence[str] | None = None, id_begins: str | None = None
    ) -> list[SessionSummary]:
        """Return the latest sessions, the newest first, without the figures of their users.

        Args:
            limit: How many at most.
            ids: Only those of these ids.
            id_begins: Only those whose id begins so.
        """
        query = select(sessions).order_by(sessions.c.started_ns.desc(), sessions.c.id).limit(limit)
        if ids is not None:
            query = query.where(sessions.c.id.in_(ids))
        if id_begins is not None:
            query = query.where(sessions.c.id.startswith(id_begins, autoescape=True))
        with self.asking() as connection:
            return [plain_summary(row) for row in connection.execute(query).mappings()]

    def turns(self, session_id: str) -> list[tuple[TurnSummary, list[Step]]]:
        """Return the turns of a session with their steps, in the order in which they began.

        Those that still run have the status ``open`` and no steps yet, but for what they did before they waited.
        """
        ended = select(turns, turn_steps.c.steps.label("known_steps")).where(turns.c.session_id == session_id)
        ended = ended.outerjoin_from(turns, turn_steps, are_steps_of_turn)
        running = select(open_turns).where(open_turns.c.session_id == session_id)
        with self.asking() as connection:
            rows = connection.execute(ended).mappings()
            found = [(turn_summary(row), steps_from(row["known_steps"] or row["steps"])) for row in rows]
            known = {turn.id: (turn, steps) for turn, steps in found}
            for row in connection.execute(running).mappings():
                turn, steps = known.get(row["id"], (running_turn(row), []))
                known[turn.id] = (replace(turn, status=OPEN), steps)
        return sorted(known.values(), key=lambda turn: (turn[0].started_ns, turn[0].conversation_id, turn[0].number))

    def decisions(self, session_id: str) -> list[tuple[str, PruningDecision]]:
        """Return the decisions about models' windows in a session, each with the id of its turn, in order.

        In ``dropped`` are the ids of the messages that a decision was the first to drop; ``messages_before`` and
        ``messages_after`` tell of all.
        """
        query = select(decisions).where(decisions.c.session_id == session_id).order_by(decisions.c.id)
        with self.asking() as connection:
            return [(row["turn_id"], decision_from(row)) for row in connection.execute(query).mappings()]

    def span_counts(self, session_id: str) -> dict[str, int]:
        """Return how many spans the traces of a session's turns that have ended have, by the ids of the turns."""
        query = select(turns.c.id, turns.c.spans).where(turns.c.session_id == session_id)
        with self.asking() as connection:
            return {row["id"]: row["spans"] for row in connection.execute(query).mappings()}

    def user(self, user_id: str) -> UserSummary | None:
        """Return what is known of a user over all sessions, or None.

        Args:
            user_id: Hash of the user's id.
        """
        with self.asking() as connection:
            return user_summary(connection, user_id)

    def journey(
        self, user_id: str | None, session_id: str, name: str, *, settled: bool = True
    ) -> JourneySummary | None:
        """Return where a journey of a user, or without one of a session, stands; None if it has not begun.

        Args:
            user_id: Hash of the user's id.
            session_id: The session.
            name: Name of the journey.
            settled: Whether to write down first what waits.
        """
        with self.asking() if settled else self._database.reading() as connection:
            return journey_of(connection, owner_of(user_id, session_id), name)

    def stages(self, session_id: str) -> list[StageEntered]:
        """Return the steps of journeys in a session, in order."""
        with self.asking() as connection:
            return steps_in(connection, session_id)

    def feedback(self, session_id: str) -> list[Feedback]:
        """Return the feedback on a session and on its turns, in the order in which it was given."""
        columns = feedback.c.turn_id, feedback.c.name, feedback.c.value, feedback.c.at_ns
        query = select(*columns).where(feedback.c.session_id == session_id).order_by(feedback.c.at_ns, feedback.c.id)
        with self.asking() as connection:
            return [Feedback(**row) for row in connection.execute(query).mappings()]

    def turn(self, turn_id: str) -> TurnSummary | None:
        """Return a turn that has ended, or one that runs (its status is ``open``); None when there is none."""
        with self.asking() as connection:
            row = connection.execute(select(turns).where(turns.c.id == turn_id)).mappings().first()
            ended = None if row is None else turn_summary(row)
            if ended is not None and ended.status != INTERRUPTED:
                return ended
            row = connection.execute(select(open_turns).where(open_turns.c.id == turn_id)).mappings().first()
            return ended if row is None else replace(ended or running_turn(row), status=OPEN)

    def forked_turn(self, conversation_id: str, at_ns: int | None) -> TurnSummary | None:
        """Return the turn of a conversation that is replayed, as far as it is written down; None where there is none.

        Args:
            conversation_id: The conversation.
            at_ns: The time of the checkpoint that is replayed, in nanoseconds since 1970; None for the newest.
        """
        with self._database.reading() as connection:
            if at_ns is None:
                return newest_turn(connection, conversation_id)
            return turn_at(connection, conversation_id, at_ns)

    def turn_numbers(self, conversation_id: str) -> list[int]:
        """Return the numbers of the turns of a conversation that have ended, in order."""
        query = select(turns.c.number).where(turns.c.conversation_id == conversation_id).order_by(turns.c.number)
        with self.asking() as connection:
            return list(connection.execute(query).scalars())

    def outbox(self, *, limit: int = 1000, after_id: int = 0) -> list[OutboxItem]:
        """Return what waits to be sent, the oldest first."""
        query = select(outbox).where(outbox.c.id > after_id).order_by(outbox.c.id).limit(limit)
        with self.asking() as connection:
            return [
                OutboxItem(row["id"], row["kind"], row["body"], row["items"], row["created_ns"])
                for row in connection.execute(query).mappings()
            ]
