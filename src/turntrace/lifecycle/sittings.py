"""Which session a turn falls into: sessions are opened, remembered, and waited for when their end was said."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from turntrace.boundary import caught
from turntrace.errors import IdentityError, LedgerError
from turntrace.forking import lock_of
from turntrace.identity import derived_id
from turntrace.ledger import SessionOpened
from turntrace.lifecycle.late import BeginSessionLate
from turntrace.lifecycle.session import Session
from turntrace.lifecycle.session_jobs import INACTIVE_TIMEOUT, AnnounceSession, EndSession
from turntrace.lifecycle.writer import Writer
from turntrace.records import SessionFacts, TurnRequest

if TYPE_CHECKING:
    from turntrace.lifecycle.tracker import SessionTracker

_REMEMBERED: Final = 2_000
"""Sessions that a process has at hand; of others it asks the ledger."""
_USED_REMEMBERED: Final = 10_000
_ENDS_S: Final = 5.0
_MANY_ENDING: Final = 64


class Sittings:
    """The sessions of a tracker, as this process knows them; the ledger has the last word.

    Args:
        tracker: The tracker.
        writer: What writes down beginnings and ends.
    """

    def __init__(self, tracker: "SessionTracker", writer: Writer) -> None:
        self._tracker = tracker
        self._writer = writer
        self._known: OrderedDict[Hashable, Session] = OrderedDict()
        self._announced: OrderedDict[str, None] = OrderedDict()
        self._used: OrderedDict[str, None] = OrderedDict()
        self._ending: set[str] = set()
        self._written: tuple[threading.Event, set[str]] | None = None
        self._lock = lock_of(self)
        self._opening = lock_of(self, "_opening")

    def open(self, wanted: SessionFacts, *, given_id: bool, conversation_id: str | None = None) -> Session:
        """Begin or continue a session, as `turntrace.ledger.Ledger.open_session` says.

        While the ledger is away it begins all the same, and is written down when the ledger is back.
        """
        if not self._writer.is_ledger_away:
            try:
                return self._open(wanted, given_id=given_id, conversation_id=conversation_id)
            except LedgerError as error:
                self._writer.note_away(error)
        session = Session(self._tracker, replace(wanted, sessions_total=1))
        self._writer.submit(BeginSessionLate(self._tracker, session))
        with self._lock:
            self._note_used(session.id)
        return session

    def open_again(self, session: Session) -> None:
        """Have the ledger hold a session open that this process has: one that ended, or began while it was away.

        Raises:
            LedgerError: If the ledger cannot be written.
        """
        self._open(session.facts, given_id=True)

    def _open(self, wanted: SessionFacts, *, given_id: bool, conversation_id: str | None = None) -> Session:
        self.wait_for_end(wanted.id if given_id else None)
        opened = self._tracker.ledger.open_session(
            wanted, idle_ns=self._tracker.idle_ns, given_id=given_id, conversation_id=conversation_id
        )
        if opened.expired_id is not None:
            self._writer.submit(self._expired(opened))
        if not opened.is_announced and self._first_said(opened.session.id):
            self._writer.submit(AnnounceSession(self._tracker, opened.session))
        with self._lock:
            self._note_used(opened.session.id)
        return Session(self._tracker, opened.session)

    def went_on(self, session: Session) -> None:
        """Note that a turn of a session went on in this process."""
        with self._lock:
            self._note_used(session.id)

    def _note_used(self, session_id: str) -> None:
        self._used[session_id] = None
        if len(self._used) > _USED_REMEMBERED:
            self._used.popitem(last=False)

    def _expired(self, opened: SessionOpened) -> EndSession:
        # At the time when it had been silent for long enough, as the sweep has it.
        ended_ns = opened.expired_activity_ns + self._tracker.idle_ns
        return EndSession(self._tracker, str(opened.expired_id), INACTIVE_TIMEOUT, ended_ns)

    def _first_said(self, session_id: str) -> bool:
        """Tell whether the start of a session was not said by this process yet, and note that it is now."""
        with self._lock:
            if session_id in self._announced:
                return False
            self._announced[session_id] = None
            if len(self._announced) > _REMEMBERED:
                self._announced.popitem(last=False)
        return True

    def known(self, key: Hashable) -> Session | None:
        """Return the session that runs of this key fell into last, or None."""
        return None if key is None else self._known.get(key)

    def open_for_run(self, key: Hashable, wanted: SessionFacts, request: TurnRequest, tried: Session | None) -> Session:
        """Open the session of a run that stands alone, and remember it under the key of such runs.

        Args:
            key: The key.
            wanted: The session to begin where none is open.
            request: What the run says about itself.
            tried: The one that was known by the key, and that no turn could begin in.
        """
        if key is None or wanted.user_id is not None or request.session_id is not None:
            return self._open_for_run(key, wanted, request)
        # A session without a user is found by its turns, and those of runs that begin at once are not there yet.
        with self._opening:
            known = self._known.get(key)
            return self._open_for_run(key, wanted, request) if known is None or known is tried else known

    def _open_for_run(self, key: Hashable, wanted: SessionFacts, request: TurnRequest) -> Session:
        given = request.session_id is not None
        try:
            session = self.open(wanted, given_id=given, conversation_id=request.conversation_id)
        except IdentityError as error:
            # Two users under one session id: their turns are kept apart, and none is lost.
            caught("opening the session that a run names", error)
            own = derived_id("session", wanted.id, wanted.user_id or "")
            session = self.open(replace(wanted, id=own), given_id=True)
        if key is not None:
            with self._lock:
                self._known[key] = session
                self._known.move_to_end(key)
                if len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
        return session

    def end(self, session_id: str, reason: str) -> None:
        """Have a session ended, and let nothing fall into it from now on."""
        with self._lock:
            self._ending.add(session_id)
            for key in [key for key, session in self._known.items() if session.id == session_id]:
                del self._known[key]
        if not self._writer.submit(EndSession(self._tracker, session_id, reason, self._tracker.clock())):
            with self._lock:
                self._ending.discard(session_id)
        self._forget_ended()

    def _forget_ended(self) -> None:
        """Forget that the end was said of sessions whose end is written, some at a time."""
        with self._lock:
            if self._written is not None and self._written[0].is_set():
                self._ending -= self._written[1]
                self._written = None
            if self._written is None and len(self._ending) >= _MANY_ENDING:
                self._written = (self._writer.mark(), set(self._ending))

    def forget(self, session_ids: Collection[str]) -> None:
        """Forget sessions, as those that were erased."""
        gone = set(session_ids)
        with self._lock:
            for key in [key for key, session in self._known.items() if session.id in gone]:
                del self._known[key]
            for session_id in gone:
                self._used.pop(session_id, None)

    def used(self) -> list[str]:
        """Return the ids of the sessions that this process opened; those opened longest ago may be missing."""
        with self._lock:
            return list(self._used)

    def wait_for_end(self, session_id: str | None) -> None:
        """Wait until a session whose end was said is ended, or with None until all such are."""
        if self._writer.is_ledger_away:
            return
        if self._ending if session_id is None else session_id in self._ending:
            with self._lock:
                said = set(self._ending)
            self._writer.drain(_ENDS_S)
            with self._lock:
                self._ending -= said


def key_of_run(request: TurnRequest, user_id: str | None, channel: str) -> Hashable:
    """Return what runs of the same sitting have in common, or None when nothing ties a run to others."""
    if request.session_id is not None:
        return ("session", request.session_id, user_id)
    if user_id is not None:
        return ("user", user_id, channel)
    return None if request.conversation_id is None else ("conversation", request.conversation_id)
