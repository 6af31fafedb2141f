"""Having what was written sent: the sender of a tracker, and the bound of what may wait."""

import logging
import time
from typing import TYPE_CHECKING, Final

from turntrace.boundary import caught
from turntrace.errors import LedgerError
from turntrace.export import Pace, Sender, SpanTarget
from turntrace.lifecycle.writer import Writer, time_left
from turntrace.waiting import SPANS

if TYPE_CHECKING:
    from turntrace.ledger import Ledger, LedgerWriter

logger = logging.getLogger("turntrace")

MB: Final = 1_000_000


class Sending:
    """Sends what is in the outbox of a ledger, where there is a Langfuse, and keeps it within its bound.

    Args:
        ledger: The ledger.
        target: Where spans go.
        max_bytes: How many bytes may wait.
        pace: How long the sender waits for what.
    """

    def __init__(self, ledger: "Ledger", target: SpanTarget, max_bytes: int, pace: Pace | None) -> None:
        self._ledger = ledger
        self._target = target
        self._max_bytes = max_bytes
        self._is_stopped = False
        self.writer = writer = Writer(ledger, self._written)
        self.sender: Sender | None = None
        if target.server is not None:
            self.sender = Sender(ledger.to_send, target.server, pace, lambda: writer.is_ledger_away)
        if target.exporter is not None:
            target.exporter.keep = self._keep
        if target.processor is not None:
            target.processor.flush_with(self)
        if self.sender is not None:
            self.sender.start()  # what an earlier process left behind goes first

    def _written(self) -> None:
        """Keep the outbox within its bound and have it sent. Called by the writer after it has written."""
        dropped = self._ledger.to_send.trim(self._max_bytes)
        if dropped.items:
            logger.warning(
                "turntrace: the outbox is full (%s MB, outbox_max_mb): the oldest %s spans and scores were dropped.",
                f"{self._max_bytes / MB:g}",
                f"{dropped.items:,}",
            )
        if self.sender is not None and not self._is_stopped:
            self.sender.wake()

    def _keep(self, body: bytes, spans: int) -> None:
        """Put spans that ended outside of turns into the outbox. Called in a thread of OpenTelemetry's."""
        job = _KeepSpans(body, spans)
        try:
            with self._ledger.writing() as ledger:
                job.write(ledger)
        except LedgerError:
            self.writer.submit(job)  # which tries for as long as it takes
        else:
            self._written()

    def write_down(self, timeout: float | None) -> bool:
        """Write down what has ended.

        Args:
            timeout: Seconds after which it is not waited for longer; None for as long as it takes.

        Returns:
            Whether all is written.
        """
        return self.writer.drain(timeout)

    def send(self, timeout: float | None) -> None:
        """Send what waits, unless Langfuse takes nothing now.

        Args:
            timeout: Seconds after which it is not waited for longer; None for as long as it takes.
        """
        if self.sender is not None and not self._is_stopped:
            try:
                self.sender.drain(timeout)
            except LedgerError as error:
                if self.writer.is_ledger_away:
                    logger.debug("turntrace: %s It is sent later.", error)
                else:
                    caught("sending what waits in the outbox", error)
            except Exception as error:
                caught("sending what waits in the outbox", error)

    def flush(self, timeout: float | None) -> bool:
        """Write down what has ended and what the provider holds back, and send it; tell whether all is written."""
        left = time_left(timeout)
        written = self.writer.drain(left())
        with self._target.flushed_by(self):
            self._target.flush(left())
        written = self.writer.drain(left()) and written  # also what was submitted meanwhile
        self.send(left())
        return written

    def stop(self, timeout: float) -> None:
        """End the threads; what is written after it, a later process sends."""
        self._is_stopped = True
        left = time_left(timeout)
        self.writer.stop(left())
        if self.sender is not None:
            self.sender.stop(left() or 0.0)


class _KeepSpans:
    """Puts spans of others into the outbox."""

    def __init__(self, body: bytes, spans: int) -> None:
        self._body = body
        self._spans = spans
        self._at_ns = time.time_ns()

    def prepare(self) -> None:
        """Do nothing: all is known."""

    def write(self, ledger: "LedgerWriter") -> None:
        """Put them there."""
        ledger.put(SPANS, self._body, items=self._spans, created_ns=self._at_ns)
