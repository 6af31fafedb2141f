"""What jobs of the writer that make spans have in common."""

import time
from typing import TYPE_CHECKING, Any

from turntrace.content import to_json
from turntrace.export import EndedSpan, to_otlp
from turntrace.waiting import SPANS

if TYPE_CHECKING:
    from turntrace.ledger import LedgerWriter
    from turntrace.lifecycle.tracker import SessionTracker


class SpanJob:
    """A job whose spans go into the outbox in the transaction that writes its rows."""

    def __init__(self, tracker: "SessionTracker") -> None:
        self._tracker = tracker
        self._spans: list[EndedSpan] = []
        self._body = b""

    def prepare(self) -> None:
        """Do what needs no transaction."""

    def _keep(self, spans: list[EndedSpan]) -> None:
        self._spans.extend(spans)
        if self._spans and self._tracker.target.to_outbox:
            self._body = to_otlp(self._spans)

    def _put_spans(self, ledger: "LedgerWriter") -> None:
        if self._body:
            ledger.put(SPANS, self._body, items=len(self._spans), created_ns=time.time_ns())


def known_json(facts: Any) -> str:
    """Write facts as JSON, those that are not known left out."""
    return to_json({n: v for n, v in facts.items() if v is not None} if isinstance(facts, dict) else facts)
