"""The ledger: sessions, conversations, turns and the outbox, and who may change them when.

It is the authority for turn numbers, for the life of a session and for totals. What begins (a session, a turn) is
written in the app's own thread, since the app needs the number; what ends is written by one background thread, in
transactions that hold the spans and the row together.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, RowMapping, insert, select, union_all
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError, ProgrammingError

from turntrace.identity import new_hash_key
from turntrace.ledger import schema, taking_up
from turntrace.ledger.engine import Database
from turntrace.ledger.erasing import Erased, erase_waiting, forget, forget_ended
from turntrace.ledger.outbox import StoredOutbox
from turntrace.ledger.questions import LedgerQuestions
from turntrace.ledger.rows import continue_session, first_session, has_open_turn, session_facts
from turntrace.ledger.shapes import SessionOpened, TurnBegun, TurnTakenUp
from turntrace.ledger.statements import Statements
from turntrace.ledger.tables import gates, open_turns, sessions, turns
from turntrace.ledger.writing import LedgerWriter
from turntrace.records import SessionFacts, TurnSummary

_HASH_KEY: Final = "user_hash_key"
_SETTLE_S: Final = 30.0
_TRIES: Final = 20
_AGAIN_S: Final = 0.05
T = TypeVar("T")


class Ledger(LedgerQuestions):
    """Sessions, conversations, turns and the outbox in a database.

    Args:
        engine_or_url: A SQLAlchemy URL such as ``sqlite:////var/lib/app/turntrace.db`` (``sqlite://`` for one in
            memory), or an engine of the app's, which then stays the app's to close, and to dispose of in a process
            that was forked.
        only_reads: Whether nothing is to be written: then it needs no rights to, unless an older turntrace made it.

    Attributes:
        settle: Called before a question is asked, with the seconds that it may take: writes down what still waits.
        to_send: The outbox.

    Raises:
        ConfigurationError: If the URL cannot be used.
        LedgerError: If the database cannot be opened, or was written by a newer turntrace.
    """

    def __init__(self, engine_or_url: Engine | str | URL, *, only_reads: bool = False) -> None:
        self.settle: Callable[[float], object] | None = None
        self._hash_key: bytes | None = None
        self._database = Database(engine_or_url, self._begin_anew)
        try:
            if not (only_reads and self._is_current()):
                self._side_by_side(schema.prepare)
        except BaseException:
            self.close()
            raise
        self._statements = Statements(self._database.dialect)
        self.to_send = StoredOutbox(self._database)

    @property
    def url(self) -> str:
        """Where the ledger is, without a password."""
        return self._database.engine.url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def _is_current(self) -> bool:
        with self._database.reading() as connection:
            return schema.is_current(connection)

    def _side_by_side(self, change: Callable[[Connection], T]) -> T:
        """Make a change in a transaction; again where another writer was first to make the same."""
        for is_last in (*[False] * _TRIES, True):
            try:
                with self._database.writing() as connection:
                    return change(connection)
            except (IntegrityError, ProgrammingError):
                if is_last or self._database.is_sqlite:
                    raise
                time.sleep(_AGAIN_S)
        raise AssertionError("unreachable")

    def _meet(self, connection: Connection, key: str) -> None:
        """Wait for other writers who would do the same; on SQLite they wait already."""
        if not self._database.is_sqlite:
            gate = schema.insert_for(connection.dialect.name, gates).values(key=key, number=0)
            connection.execute(gate.on_conflict_do_update(index_elements=[gates.c.key], set_={"number": 0}))

    def hash_key(self) -> bytes:
        """Return the key for hashing users: random, made once and kept in the ledger."""
        with self._database.reading() as connection:
            known = schema.noted(connection, _HASH_KEY)
        if known is None:
            with self._database.writing() as connection:
                known = schema.remembered(connection, _HASH_KEY, lambda: new_hash_key().hex())
        self._hash_key = bytes.fromhex(known)
        return self._hash_key

    def _begin_anew(self, connection: Connection) -> None:
        """Make a ledger of a file that took the place of the one that was there; users keep their hashes."""
        schema.prepare(connection)
        if self._hash_key is not None:
            key = self._hash_key.hex()
            schema.remembered(connection, _HASH_KEY, lambda: key)

    # --- what begins --------------------------------------------------------------------------------------------------
    def open_session(
        self, wanted: SessionFacts, *, idle_ns: int, given_id: bool, conversation_id: str | None = None
    ) -> SessionOpened:
        """Begin a session, or continue the one that is open.

        Args:
            wanted: The session as it would begin now.
            idle_ns: Silence after which an open session is continued no more, in nanoseconds.
            given_id: Whether the app chose the id: then the session of that id is continued, whatever its age, and one
                that had ended is open again. Otherwise the open session of the user and channel is continued, or
                without a user that of the conversation.
            conversation_id: The conversation, for a session without a user.

        Raises:
            IdentityError: If the session of a given id is another user's.
        """

        def open_one(connection: Connection) -> SessionOpened:
            if wanted.user_id is not None or conversation_id is not None:
                self._meet(connection, f"session:{wanted.user_id or conversation_id}")
            if given_id:
                row = first_session(connection, sessions.c.id == wanted.id)
                if row is not None:
                    return SessionOpened(continue_session(connection, row, wanted), False, row["announced"])
            else:
                row = self._open_session_of(connection, wanted, conversation_id)
                since_ns = wanted.started_ns - idle_ns
                if row is not None and (
                    row["last_activity_ns"] >= since_ns or has_open_turn(connection, row["id"], since_ns)
                ):
                    return SessionOpened(session_facts(row), False, row["announced"])
            if given_id or row is None:
                return SessionOpened(self._begin_session(connection, wanted), is_new=True)
            return SessionOpened(
                self._begin_session(connection, wanted),
                is_new=True,
                expired_id=str(row["id"]),
                expired_activity_ns=row["last_activity_ns"],
            )

        return self._side_by_side(open_one)

    def _open_session_of(
        self, connection: Connection, wanted: SessionFacts, conversation_id: str | None
    ) -> RowMapping | None:
        if wanted.user_id is not None:
            return first_session(
                connection,
                sessions.c.user_id == wanted.user_id,
                sessions.c.channel == wanted.channel,
                sessions.c.ended_ns.is_(None),
            )
        if conversation_id is not None:
            latest = union_all(
                *(
                    select(table.c.session_id, table.c.number).where(table.c.conversation_id == conversation_id)
                    for table in (turns, open_turns)
                )
            ).subquery()
            last = select(latest.c.session_id).order_by(latest.c.number.desc()).limit(1)
            return first_session(
                connection,
                sessions.c.id == last.scalar_subquery(),
                sessions.c.user_id.is_(None),
                sessions.c.ended_ns.is_(None),
            )
        return None

    def _begin_session(self, connection: Connection, wanted: SessionFacts) -> SessionFacts:
        begun = replace(wanted, sessions_total=1)
        if wanted.user_id is not None and (last := first_session(connection, sessions.c.user_id == wanted.user_id)):
            begun = replace(begun, previous_id=last["id"], sessions_total=last["sessions_total"] + 1)
        connection.execute(
            insert(sessions).values(
                id=begun.id,
                user_id=begun.user_id,
                channel=begun.channel,
                type=begun.type,
                tier=begun.tier,
                org_id=begun.org_id,
                locale=begun.locale,
                client_version=begun.client_version,
                previous_id=begun.previous_id,
                sessions_total=begun.sessions_total,
                started_ns=begun.started_ns,
                last_activity_ns=begun.started_ns,
            )
        )
        return begun

    def begin_turn(
        self,
        turn_id: str,
        *,
        session_id: str,
        conversation_id: str,
        user_id: str | None,
        role: str,
        started_ns: int,
        active_since_ns: int,
        trace_id: str,
        root_span_id: str,
        own: str | None = None,
    ) -> TurnBegun | None:
        """Give a turn its number and write it down as open.

        Args:
            turn_id: Id of the turn.
            session_id: The session that it falls into.
            conversation_id: The conversation whose number it gets.
            user_id: Hash of the user's id.
            role: ``user``, or ``assistant`` when the agent began the exchange.
            started_ns: When it begins, in nanoseconds since 1970.
            active_since_ns: The session must have been active since then or have a turn that still runs, else it is
                not continued.
            trace_id: Id of its trace, 32 hexadecimal digits.
            root_span_id: Id of its root span, 16 hexadecimal digits.
            own: What it begins with that its session does not tell, as `turntrace.ledger.own_text` writes it.

        Returns:
            Its number and what it meets; None when the session has ended or has been silent for too long, and nothing
            was written.
        """
        values: dict[str, Any] = {
            "turn_id": turn_id,
            "session": session_id,
            "conversation": conversation_id,
            "user": user_id,
            "role": role,
            "now": started_ns,
            "active_since": active_since_ns,
            "trace": trace_id,
            "root_span": root_span_id,
            "own": own,
        }
        row = self._database.run_fast(self._statements.begin_turn, values)
        return None if row is None else TurnBegun(int(row[0]), row[1])

    def resume_newest(
        self, conversation_id: str, may_resume: Callable[[TurnSummary], bool], *, now_ns: int
    ) -> TurnTakenUp | None:
        """Have the newest turn of a conversation go on, if it waits; see `turntrace.ledger.taking_up.resume_newest`."""
        with self._database.writing(many_rows=True) as connection:
            return taking_up.resume_newest(connection, conversation_id, may_resume, now_ns)

    def resume_turn(self, turn_id: str, *, now_ns: int) -> TurnTakenUp | None:
        """Have a turn go on that was handed over; see `turntrace.ledger.taking_up.resume_by_id`."""
        with self._database.writing(many_rows=True) as connection:
            return taking_up.resume_by_id(connection, turn_id, now_ns)

    # --- what ends ----------------------------------------------------------------------------------------------------
    @contextmanager
    def writing(self) -> Iterator[LedgerWriter]:
        """Give a writer whose changes are all made at the end of the block, or none of them."""
        with self._database.writing(many_rows=True) as connection:
            writer = LedgerWriter(connection, self._statements)
            yield writer
        self.to_send.note_growth(writer.put_bytes)

    # --- erasing ------------------------------------------------------------------------------------------------------
    def forget_user(self, user_id: str) -> Erased:
        """Erase a user: sessions, conversations, turns, decisions, journeys and feedback.

        Args:
            user_id: Hash of the user's id.
        """
        with self._database.erasing() as connection:
            return forget(connection, user_id)

    def forget_ended(self, before_ns: int, most: int) -> list[str]:
        """Erase sessions that ended before a time, the oldest first; see `turntrace.ledger.erasing.forget_ended`."""
        with self._database.erasing() as connection:
            return forget_ended(connection, before_ns, most)

    def erase_waiting(self, user_id: str, erased: Erased) -> int:
        """Take what is a user's out of the outbox; return how many spans and scores that were.

        Args:
            user_id: Hash of the user's id.
            erased: What was erased of the user before.
        """
        with self._database.erasing() as connection:
            return erase_waiting(connection, user_id, erased)

    def scrub(self) -> None:
        """Leave no bytes of what was erased in SQLite's files; what cannot be done is logged."""
        self._database.scrub()
