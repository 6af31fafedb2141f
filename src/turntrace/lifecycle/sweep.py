"""The sweep: ends sessions that have been silent too long, and closes turns that nobody will end."""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from turntrace import attributes as a
from turntrace.boundary import never_breaks
from turntrace.errors import ConfigurationError, LedgerError
from turntrace.ledger import LedgerWriter
from turntrace.lifecycle.ending import Failure, end_span, words_of
from turntrace.lifecycle.session_jobs import EndSession, SpanJob, known_json
from turntrace.lifecycle.turn import root_attributes
from turntrace.records import SessionFacts, TurnRequest, TurnSummary, TurnTags

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
        return stale, sum(_AbandonTurn(tracker, row).close(ledger) for row in stale if not tracker.holds(row["id"]))


def _end_some(tracker: "SessionTracker", silent_since: int, idle_ns: int) -> int:
    """End some sessions that have been silent too long, in a transaction; return how many."""
    with tracker.ledger.writing() as ledger:
        idle = ledger.idle_sessions(silent_since, _BATCH)
        for session_id, last_activity_ns in idle:
            # At the time when it had been silent for long enough, whoever finds out and when.
            EndSession(tracker, session_id, "inactive_timeout", last_activity_ns + idle_ns).write(ledger)
        return len(idle)


def _patiently(change: Callable[[], R]) -> R:
    """Make a change, again where the ledger was locked for too long: SQLite does not serve those who wait in turn."""
    for _ in range(_TRIES):
        try:
            return change()
        except LedgerError as error:
            logger.debug("turntrace: %s The sweep tries again.", error)
    return change()


class _AbandonTurn(SpanJob):
    """Closes a turn whose process died, with the span that its trace lacks: the root."""

    def __init__(self, tracker: "SessionTracker", row: Any) -> None:
        super().__init__(tracker)
        self._row = row

    def close(self, ledger: LedgerWriter) -> int:
        """Write its row and its span; tell how many turns were closed by it: one or none."""
        row = self._row
        facts = {name: row[f"session_{name}"] for name in ("channel", "type", "tier", "org_id", "locale")}
        facts["client_version"] = row["session_client_version"]
        session = SessionFacts(id=row["session_id"], user_id=row["user_id"], **facts)
        summary = TurnSummary(
            id=row["id"],
            session_id=row["session_id"],
            conversation_id=row["conversation_id"],
            user_id=row["user_id"],
            number=row["number"],
            started_ns=row["started_ns"],
            ended_ns=row["started_ns"],  # nobody saw its end
            status="abandoned",
            role=row["role"],
            error="abandoned",
            trace_id=row["trace_id"],
            root_span_id=row["root_span_id"],
        )
        self._keep(self._root(session, summary))
        self._put_spans(ledger)
        return bool(ledger.finish_turn(summary, [], spans=len(self._spans)))

    def _root(self, session: SessionFacts, turn: TurnSummary) -> Any:
        tags = TurnTags(
            session_id=session.id,
            turn_id=turn.id,
            conversation_id=turn.conversation_id,
            number=turn.number,
            user_id=session.user_id,
            channel=session.channel,
            tier=session.tier,
            org_id=session.org_id,
            topic=self._row["topic"],
        )
        failure = Failure("abandoned", None, failed=False)
        shown = {
            a.LANGFUSE_OBSERVATION_INPUT: known_json({"turn": turn.number}),
            a.LANGFUSE_OBSERVATION_OUTPUT: known_json({"status": turn.status}),
        }
        attributes = root_attributes(tags, session, TurnRequest()) | turn.attributes() | shown | words_of(failure)
        ids = (int(str(turn.trace_id), 16), int(str(turn.root_span_id), 16))
        with self._tracker.target.capturing() as ended:
            span = self._tracker.target.start_root(
                a.SPAN_TURN, attributes=attributes, start_ns=turn.started_ns, ids=ids
            )
            end_span(span, turn.ended_ns, failure)
        return ended


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
        """Start the thread, as in a process that was forked, too."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="turntrace-sweeper", daemon=True)
        self._thread.start()

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


def restart_after_fork(sweeper: Sweeper) -> None:
    """Start a sweeper again in a process that is forked, where its thread does not exist."""
    weak = weakref.ref(sweeper)

    def restart() -> None:
        alive = weak()
        if alive is not None and not alive.is_stopped:
            alive.start()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=restart)
