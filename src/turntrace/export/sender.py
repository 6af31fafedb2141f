"""The sender: takes what waits in the outbox to Langfuse, oldest first, for as long as it takes."""

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from turntrace.boundary import caught
from turntrace.errors import LedgerError
from turntrace.export.delivery import MAX_REQUEST_BYTES, Delivered, deliver
from turntrace.export.server import Answer, LangfuseServer, Outcome
from turntrace.forking import in_child
from turntrace.waiting import SPANS, Outbox

logger = logging.getLogger("turntrace")

_MAX_ROWS: Final = 512
_LOOK_S: Final = 30.0
"""How often a sender looks whether another process left something behind."""
_BUSY_S: Final = 1.0
_HELD_S: Final = 10.0
"""How long a sender that cannot send keeps others from trying."""
_MAX_RETRY_AFTER_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a sender waits, in seconds.

    Attributes:
        linger_s: For more to come, before it sends.
        first_s: After the first failure; each further one doubles it.
        most_s: At most.
        closed_s: After the keys or the address were not right; each further one doubles it.
        closed_most_s: At most then.
        ledger_s: After the outbox could not be read.
    """

    linger_s: float = 0.5
    first_s: float = 0.5
    most_s: float = 60.0
    closed_s: float = 15.0
    closed_most_s: float = 300.0
    ledger_s: float = 5.0

    def delay(self, failures: int, answer: Answer) -> float:
        """Return how long to wait: longer each time, and not all processes the same."""
        first, most = self.first_s, self.most_s
        if answer.outcome is Outcome.CLOSED:
            first, most = self.closed_s, self.closed_most_s
        waited = min(most, first * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)
        return max(waited, min(answer.retry_after_s, _MAX_RETRY_AFTER_S))


_TIME_IS_UP: Final = Answer(Outcome.LATER, "the time is up")


@dataclass(frozen=True, slots=True)
class Sent:
    """What came of sending what waits.

    Attributes:
        items: How many spans and scores the server took.
        refused: How many were set apart, since it would not.
        stopped_by: The answer because of which the rest waits.
        busy_s: More than 0 when another process is sending: until when it must have said that it lives.
    """

    items: int = 0
    refused: int = 0
    stopped_by: Answer | None = None
    busy_s: float = 0.0

    @property
    def is_all(self) -> bool:
        """Whether nothing was left."""
        return self.stopped_by is None and self.busy_s == 0


class Sender:
    """Sends what waits in an outbox, in a thread of its own or when asked.

    Args:
        outbox: What to send from.
        server: Where to.
        pace: How long it waits for what.
        is_said: Tells whether somebody else has said already that the ledger is away.
    """

    def __init__(
        self,
        outbox: Outbox,
        server: LangfuseServer,
        pace: Pace | None = None,
        is_said: Callable[[], bool] = lambda: False,
    ) -> None:
        self._is_said = is_said
        self._waits_for_ledger = False
        self._outbox = outbox
        self.server = server
        self._pace = pace or Pace()
        self._lease_s = 5.0 + 3 * server.timeout_s
        self._failures = 0
        self._failing: Answer | None = None
        self._reset()
        in_child(self._after_fork)

    def _reset(self) -> None:
        self._owner = uuid.uuid4().hex
        self._sending = threading.Lock()
        self._start_lock = threading.Lock()
        self._woken = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._leased_until = 0.0

    def _after_fork(self) -> None:
        # The thread, the locks and the connections are the parent's.
        was_stopped = self._stopped.is_set()
        self._reset()
        if was_stopped:
            self._stopped.set()
        self.server.after_fork()

    @property
    def failing(self) -> Answer | None:
        """The answer because of which nothing can be sent now, or None."""
        return self._failing

    def start(self) -> None:
        """Start the thread, if it does not run."""
        with self._start_lock:
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._run, name="turntrace-sender", daemon=True)
                self._thread.start()

    def wake(self) -> None:
        """Say that something was put into the outbox; returns at once."""
        self._woken.set()
        if self._thread is None:
            self.start()

    def stop(self, timeout: float) -> None:
        """End the thread after the request that it is at."""
        self._stopped.set()
        self._woken.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        with suppress(LedgerError):
            self._outbox.release(self._owner)
        self.server.close()

    def drain(self, timeout: float | None) -> bool:
        """Send what waits now, unless the server takes nothing; tell whether all was sent.

        Args:
            timeout: Seconds after which to begin no further request; None for as long as it takes.
        """
        if self._failing is not None:
            return False
        if timeout is None:
            return self.send_waiting().is_all
        until = time.monotonic() + timeout
        if timeout >= self.server.timeout_s:
            return self.send_waiting(until=until).is_all
        # One request may take longer than that: it goes on in a thread, and nobody waits for it.
        sent: Future[Sent] = Future()

        def send() -> None:
            try:
                sent.set_result(self.send_waiting(until=until))
            except BaseException as error:
                sent.set_exception(error)

        try:
            threading.Thread(target=send, name="turntrace-flush", daemon=True).start()
        except RuntimeError:  # no new threads while the interpreter exits
            send()
        try:
            return sent.result(timeout).is_all
        except TimeoutError:
            return False

    # --- sending ------------------------------------------------------------------------------------------------------
    def send_waiting(self, *, until: float | None = None, on_sent: Callable[[Delivered], object] | None = None) -> Sent:
        """Send all that waits, batch after batch, until nothing is left or the server takes nothing.

        Args:
            until: By `time.monotonic`: when to begin no further batch.
            on_sent: Called after each batch, with what became of it.

        Raises:
            LedgerError: If the outbox cannot be read or written.
        """
        if not self._sending.acquire(timeout=-1 if until is None else max(0.0, until - time.monotonic())):
            return Sent(stopped_by=_TIME_IS_UP)
        try:
            return self._send_batches(until, on_sent)
        finally:
            self._sending.release()

    def _send_batches(self, until: float | None, on_sent: Callable[[Delivered], object] | None) -> Sent:
        items = refused = 0
        scores_stopped_by: Answer | None = None
        while True:
            if until is not None and time.monotonic() >= until:
                return Sent(items, refused, _TIME_IS_UP)
            claim = self._outbox.claim(
                self._owner,
                lease_s=self._lease_s,
                max_rows=_MAX_ROWS,
                max_bytes=MAX_REQUEST_BYTES,
                kind=None if scores_stopped_by is None else SPANS,
            )
            if not claim.items:
                return Sent(items, refused, scores_stopped_by, claim.busy_s)
            self._leased_until = time.monotonic() + self._lease_s
            done = deliver(self.server, claim.items, self._is_still_ours)
            is_over = claim.is_all
            if done.stopped_by is None:
                done.stopped_by = scores_stopped_by
            elif done.spans_are_done and scores_stopped_by is None:
                scores_stopped_by = done.stopped_by  # the spans behind these scores need not wait for them
            else:
                is_over = True
            holds = 0.0 if is_over and done.stopped_by is None else self._lease_s
            self._outbox.settle(self._owner, done.sent, done.refused, lease_s=holds)
            items, refused = items + done.items, refused + len(done.refused)
            self._note(done)
            if on_sent is not None:
                on_sent(done)
            if is_over and done.stopped_by is not None:
                return Sent(items, refused, done.stopped_by)
            # Else once more: who saw that this process sends, and left it what it had just put there, may be gone.

    def _is_still_ours(self) -> bool:
        """Go on holding the lease in a delivery of many requests; tell whether nobody else has it."""
        if self._leased_until - time.monotonic() > self._lease_s / 2:
            return True
        if not self._outbox.renew(self._owner, lease_s=self._lease_s):
            return False
        self._leased_until = time.monotonic() + self._lease_s
        return True

    def _note(self, done: Delivered) -> None:
        for refusal in done.refused:
            logger.warning(
                "turntrace: Langfuse refused %s (%s). It is set apart: see turntrace export --status.",
                "a score" if refusal.item.kind == "score" else "a span",
                refusal.why,
            )
        answer, before = done.stopped_by, self._failing
        if answer is None:
            if before is not None:
                logger.warning("turntrace: Langfuse at %s takes what is sent again.", self.server.url)
            self._failures, self._failing = 0, None
            return
        self._failures = 1 if done.items else self._failures + 1
        self._failing = answer
        if before is not None and before.outcome is answer.outcome:
            return
        if answer.outcome is Outcome.CLOSED:
            logger.error(
                "turntrace: Langfuse at %s does not let us in (%s). Nothing is lost: what is tracked waits in the "
                "ledger until LANGFUSE_PUBLIC_KEY, LANGFUSE_SECRET_KEY and LANGFUSE_BASE_URL are right "
                "(turntrace doctor).",
                self.server.url,
                answer.words,
            )
        else:
            logger.warning(
                "turntrace: Langfuse at %s cannot take anything now (%s). What is tracked waits in the ledger and is "
                "sent when it can.",
                self.server.url,
                answer.words,
            )

    # --- the thread ---------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        wait_s = 0.0  # what an earlier process left behind goes first
        while not self._stopped.is_set():
            if self._woken.wait(wait_s):
                self._stopped.wait(self._pace.linger_s)  # a moment for more to come
            if self._stopped.is_set():
                break
            self._woken.clear()
            wait_s = self._send_and_wait()

    def _send_and_wait(self) -> float:
        """Send what waits; return for how long there is nothing to do, unless it is woken."""
        try:
            sent = self.send_waiting()
        except LedgerError as error:
            level = logging.DEBUG if self._waits_for_ledger or self._is_said() else logging.WARNING
            logger.log(level, "turntrace: %s Sending waits for it.", error)
            self._waits_for_ledger = True
            self._stopped.wait(self._pace.ledger_s)
            return 0.0
        except Exception as error:
            _caught(error)
            self._rest(self._pace.most_s)
            return _LOOK_S
        self._waits_for_ledger = False
        if sent.stopped_by is not None:
            self._rest(self._pace.delay(max(self._failures, 1), sent.stopped_by))
            return 0.0
        if sent.busy_s > 0:
            return min(sent.busy_s, _BUSY_S)
        return _LOOK_S

    def _rest(self, seconds: float) -> None:
        """Wait; at first holding the lease, so that not every process asks a server that does not answer."""
        held_s = min(seconds, _HELD_S)
        until = time.monotonic() + held_s
        while (left := until - time.monotonic()) > 0:
            if self._stopped.wait(min(left, self._lease_s / 3)):
                return
            with suppress(LedgerError):  # then the next try says so
                self._outbox.renew(self._owner, lease_s=self._lease_s)
        if seconds > held_s:  # what stops this process, as its keys or its network, is not to stop others
            with suppress(LedgerError):
                self._outbox.release(self._owner)
            self._stopped.wait(max(2 * _BUSY_S, seconds - held_s))


def _caught(error: Exception) -> None:
    try:
        caught("sending to Langfuse", error)
    except Exception:
        logger.exception("turntrace: sending failed")  # strict: this thread must go on all the same
