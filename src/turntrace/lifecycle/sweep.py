"""The sweep: ends sessions that have been silent too long, and closes turns that nobody will end."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from turntrace.boundary import never_breaks
from turntrace.errors import ConfigurationError, LedgerError
from turntrace.lifecycle.abandoning import abandon_running, abandon_waiting
from turntrace.lifecycle.session_jobs import INACTIVE_TIMEOUT, EndSession

if TYPE_CHECKING:
    from turntrace.lifecycle.tracker import SessionTracker

logger = logging.getLogger("turntrace")
R = TypeVar("R")

_BATCH: Final = 50
_TRIES: Final = 5
_LEAST_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did.

    Attributes:
        sessions: Sessions that it ended, with the reason ``inactive_timeout``.
        turns: Turns that it closed as ``abandoned``.
    """

    sessions: int = 0
    turns: int = 0


def sweep(tracker: "SessionTracker", now_ns: int, idle_ns: int) -> Swept:
    """End what has been silent too long, in batches of a transaction each.

    Args:
        tracker: The tracker.
        now_ns: The time, in nanoseconds since 1970.
        idle_ns: Silence after which a session has ended, in nanoseconds.
    """
    tracker.ledger.settled()  # what has ended is not to look as if it ran
    silent_since = now_ns - idle_ns
    closed, after = 0, ""
    while True:
        stale, some = _patiently(partial(_close_some, tracker, silent_since, after))
        closed += some
        if len(stale) < _BATCH:
            break
        after = stale[-1]["id"]
    while True:
        some = _patiently(partial(_close_waiting, tracker, silent_since))
        closed += some
        if some < _BATCH:
            break
    ended = 0
    while True:
        some = _patiently(partial(_end_some, tracker, silent_since, idle_ns))
        ended += some
        if some < _BATCH:
            return Swept(ended, closed)


def _close_some(tracker: "SessionTracker", silent_since: int, after: str) -> tuple[Sequence[Any], int]:
    """Close some turns that nobody will end, in a transaction; return those looked at and how many were closed."""
    with tracker.ledger.writing() as ledger:
        stale = ledger.stale_turns(silent_since, _BATCH, after=after)
        closed = [row for row in stale if not tracker.holds(row["id"]) and abandon_running(tracker, ledger, row)]
        for session_id in {row["session_id"] for row in closed}:
            EndSession(tracker, session_id).write(ledger)  # of one that had ended, the totals are sent again with these
        return stale, len(closed)


def _close_waiting(tracker: "SessionTracker", silent_since: int) -> int:
    """Close some turns that wait for a person who does not answer, in a transaction; return how many."""
    with tracker.ledger.writing() as ledger:
        rows = ledger.waiting_turns(_BATCH, silent_since_ns=silent_since)
        return sum(abandon_waiting(tracker, ledger, row) for row in rows)


def _end_some(tracker: "SessionTracker", silent_since: int, idle_ns: int) -> int:
    """End some sessions that have been silent too long, in a transaction; return how many."""
    with tracker.ledger.writing() as ledger:
        idle = ledger.idle_sessions(silent_since, _BATCH)
        for session_id, last_activity_ns in idle:
            # At the time when it had been silent for long enough, whoever finds out and when.
            EndSession(tracker, session_id, INACTIVE_TIMEOUT, last_activity_ns + idle_ns).write(ledger)
        return len(idle)


def _patiently(change: Callable[[], R]) -> R:
    """Make a change, again where the ledger was locked for too long: SQLite does not serve those who wait in turn."""
    for _ in range(_TRIES):
        try:
            return change()
        except LedgerError as error:
            logger.debug("turntrace: %s The sweep tries again.", error)
    return change()


class Sweeper:
    """The thread that sweeps every so often, for as long as its tracker is open.

    Args:
        tracker: The tracker.
        every_s: Seconds from one sweep to the next.

    Raises:
        ConfigurationError: If that is not a number of seconds, at least 1.
    """

    def __init__(self, tracker: "SessionTracker", every_s: float) -> None:
        if isinstance(every_s, bool) or not isinstance(every_s, int | float) or not _LEAST_S <= every_s <= 86_400:
            raise ConfigurationError(
                f"sweep_every is {every_s!r:.40}. Allowed is a number of seconds from 1 to a day: sweep_every=60."
            )
        self._tracker = tracker
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped."""
        return self._stopped.is_set()

    def start(self) -> None:
        """Start the thread."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="turntrace-sweeper", daemon=True)
        self._thread.start()

    def start_in_child(self) -> None:
        """Start the thread in a process that was forked, where the parent's does not exist."""
        if not self.is_stopped:
            self._stopped.set()  # for one of before gevent's patches
            self.start()

    def stop(self, timeout: float) -> None:
        """End the thread after the sweep that it is at."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._sweep()

    @never_breaks("sweeping idle sessions")
    def _sweep(self) -> None:
        self._tracker.sweep()
