"""What begins while the ledger is away: it begins all the same, and is written down when the ledger is back."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from turntrace.errors import LedgerError, StateError
from turntrace.ledger import TurnBegun

if TYPE_CHECKING:
    from turntrace.ledger import LedgerWriter
    from turntrace.lifecycle.session import Session
    from turntrace.lifecycle.tracker import SessionTracker
    from turntrace.lifecycle.turn import Turn


class BeginSessionLate:
    """Writes down a session that began while the ledger was away."""

    def __init__(self, tracker: "SessionTracker", session: "Session") -> None:
        self._tracker = tracker
        self._session = session

    def prepare(self) -> None:
        """Write it down in a transaction of its own, before anything that falls into it."""
        self._tracker.open_again(self._session)

    def write(self, ledger: "LedgerWriter") -> None:
        """Nothing is left to be written."""


class BeginTurnLate:
    """Writes down that a turn began while the ledger was away, and gives it its number.

    Args:
        turn: The turn; its number is a guess so far.
        begin: Writes that it began; returns None when its session is not there, or has ended.
        begun: Called with what the ledger gave.
    """

    def __init__(
        self, turn: "Turn", begin: Callable[[], TurnBegun | None], begun: Callable[[TurnBegun], object]
    ) -> None:
        self._turn = turn
        self._begin = begin
        self._begun = begun

    def prepare(self) -> None:
        """Write it down in a transaction of its own, before the spans of the turn are made, which carry its number."""
        tracker = self._turn.tracker
        try:
            self._write_down()
        except LedgerError:
            raise  # it is tried again
        except BaseException:
            tracker.began_late(self._turn)
            raise
        tracker.began_late(self._turn)

    def _write_down(self) -> None:
        found = self._begin()
        if found is None:
            self._turn.tracker.open_again(self._turn.conversation.session)
            found = self._begin()
        if found is None:
            session_id = self._turn.conversation.session.id
            raise StateError(f"The session {session_id!r} is ended again and again while a turn begins.")
        self._turn.renumber(found.number)
        self._begun(found)

    def write(self, ledger: "LedgerWriter") -> None:
        """Nothing is left to be written."""
