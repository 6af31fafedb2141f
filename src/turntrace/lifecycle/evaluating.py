"""Evaluators: functions of the app's that give scores to sessions when they end."""

import asyncio
import inspect
import logging
import math
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from turntrace.boundary import caught
from turntrace.errors import ConfigurationError
from turntrace.export import session_score
from turntrace.forking import in_child
from turntrace.identity import check_text, safe_text
from turntrace.lifecycle.session_jobs import put_scores
from turntrace.summaries import SessionSummary

if TYPE_CHECKING:
    from turntrace.ledger import LedgerWriter
    from turntrace.lifecycle.tracker import SessionTracker

Scores: TypeAlias = Mapping[str, "str | bool | float"]
Evaluator: TypeAlias = Callable[[SessionSummary], "Scores | Awaitable[Scores]"]
"""From a session that has ended to named scores: bools, numbers, or words of a few."""

_POLL_S: Final = 0.01

logger = logging.getLogger("turntrace")


class Evaluators:
    """Runs evaluators on sessions that have ended, in threads of their own, each with a time limit.

    One that fails, gives no scores or takes too long is logged, and the others go on.

    Args:
        tracker: The tracker.
        evaluators: The functions, sync or async.
        limit_s: Seconds that one may take for a session.

    Raises:
        ConfigurationError: If one cannot be called, or the limit cannot be used.
    """

    def __init__(self, tracker: "SessionTracker", evaluators: Sequence[Evaluator], limit_s: float) -> None:
        given: Any = evaluators
        if callable(given) or not isinstance(given, Iterable):
            raise ConfigurationError(
                f"evaluators is a {type(given).__name__}. Allowed is a list of functions from a SessionSummary to "
                "scores: evaluators=[lambda session: {'long': session.total_turns > 20}]."
            )
        evaluators = tuple(evaluators)
        for evaluator in evaluators:
            if not callable(evaluator):
                raise ConfigurationError(
                    f"An evaluator is a {type(evaluator).__name__}, which cannot be called. Pass functions from a "
                    "SessionSummary to scores: evaluators=[lambda session: {'long': session.total_turns > 20}]."
                )
        if isinstance(limit_s, bool) or not isinstance(limit_s, int | float) or not 0 < limit_s <= 3600:
            raise ConfigurationError(
                f"evaluator_timeout is {limit_s!r:.40}. Allowed is a number of seconds, at most an hour: "
                "evaluator_timeout=10."
            )
        self._tracker = tracker
        self._evaluators = evaluators
        self._limit_s = limit_s
        self._begin_anew()
        in_child(self._begin_anew)

    def _begin_anew(self) -> None:
        """Begin without anything to do, as in a process that was forked: what waits there is the parent's."""
        self._waiting: queue.SimpleQueue[SessionSummary] = queue.SimpleQueue()
        self._undone = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def are_any(self) -> bool:
        """Whether there is an evaluator."""
        return bool(self._evaluators)

    def submit(self, session: SessionSummary) -> None:
        """Have a session evaluated soon."""
        if not self._evaluators:
            return
        with self._lock:
            self._undone += 1
            self._waiting.put(session)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="turntrace-evaluators", daemon=True)
                self._thread.start()

    def drain(self, timeout: float | None) -> bool:
        """Wait until all is evaluated that was submitted; tell whether it is."""
        until = None if timeout is None else time.monotonic() + timeout
        while self._undone:
            if until is not None and time.monotonic() > until:
                return False
            time.sleep(_POLL_S)
        return True

    def _run(self) -> None:
        while True:
            session = self._waiting.get()
            try:
                scores: dict[str, Any] = {}
                for evaluator in self._evaluators:
                    scores |= self._ask(evaluator, session)
                if scores:
                    self._tracker.submit(_PutScores(self._tracker, session.id, scores))
            finally:
                with self._lock:
                    self._undone -= 1

    def _ask(self, evaluator: Evaluator, session: SessionSummary) -> dict[str, Any]:
        """Ask one evaluator in a thread that is left behind when it takes too long."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def run() -> None:
            try:
                found: Any = evaluator(session)
                if inspect.isawaitable(found):
                    found = asyncio.run(_awaited(found, self._limit_s))
                answers.put(_checked(found))
            except BaseException as error:  # an exit would end this thread without a word
                answers.put(error)

        threading.Thread(target=run, name="turntrace-evaluator", daemon=True).start()
        name = getattr(evaluator, "__name__", type(evaluator).__name__)
        try:
            answer = answers.get(timeout=self._limit_s)
        except queue.Empty:
            answer = TimeoutError(f"it took more than {self._limit_s:g} s")
        if isinstance(answer, BaseException):
            try:
                caught(f"evaluating a session by {name} of evaluators=...", answer)
            except BaseException:
                logger.exception("turntrace: an evaluator failed")  # strict: the others go on all the same
            return {}
        found: dict[str, Any] = answer
        return found


async def _awaited(found: Awaitable[Any], limit_s: float) -> Any:
    return await asyncio.wait_for(found, limit_s)


def _checked(scores: Any) -> dict[str, Any]:
    if scores is None:
        return {}
    if not isinstance(scores, Mapping):
        raise ConfigurationError(
            f"It returned a {type(scores).__name__}. Allowed is a mapping from names to bools, numbers and words: "
            "{'resolved': True, 'effort': 0.3}."
        )
    found: dict[str, Any] = {}
    for name, value in scores.items():
        fits = isinstance(value, bool | str) or (isinstance(value, int | float) and math.isfinite(value))
        if not fits:
            what = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"  # a text may be a user's
            raise ConfigurationError(f"Its score {name!r} is {what}. Allowed are bools, finite numbers, and words.")
        found[check_text(name, "The name of a score")] = safe_text(value) if isinstance(value, str) else value
    return found


class _PutScores:
    """Puts scores of a session into the outbox."""

    def __init__(self, tracker: "SessionTracker", session_id: str, scores: Mapping[str, Any]) -> None:
        self._tracker = tracker
        self._scores = [session_score(session_id, name, value) for name, value in scores.items()]

    def prepare(self) -> None:
        """Do nothing: all is known."""

    def write(self, ledger: "LedgerWriter") -> None:
        """Put the scores into the outbox."""
        put_scores(self._tracker, ledger, self._scores)
