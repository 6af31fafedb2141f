"""The exporter that Langfuse's client is given: what it would send goes into the outbox."""

from collections.abc import Callable, Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from turntrace.attributes import SCOPE_NAME, TURN_ID
from turntrace.boundary import caught
from turntrace.export.encode import to_otlp

Keep = Callable[[bytes, int], None]


class OutboxExporter(SpanExporter):
    """Puts the spans of others that ended outside of turns into the outbox (see `what_to_queue`).

    Attributes:
        keep: Puts spans into the outbox: their OTLP, and how many they are. Set by the tracker.
    """

    def __init__(self) -> None:
        self.keep: Keep | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Put spans into the outbox."""
        try:
            if self.keep is not None:
                self.keep(to_otlp(spans), len(spans))
                return SpanExportResult.SUCCESS
        except Exception as error:
            caught("putting spans of other code into the outbox", error)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Do nothing: the outbox stays."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Do nothing: what was exported is in the outbox."""
        return True


def what_to_queue() -> Callable[[ReadableSpan], bool]:
    """Return what tells Langfuse's client whether to queue a span: its own rule, and not if the span ended in a turn.

    Those of a turn go into the outbox with the turn, before its row says that it is finished. At a span's start, where
    the client asks too, to mark the first of its spans in a trace, they count as any other.
    """
    from langfuse.span_filter import is_default_export_span

    def is_to_be_queued(span: ReadableSpan) -> bool:
        return not (span.end_time is not None and _is_of_a_turn(span)) and is_default_export_span(span)

    return is_to_be_queued


def _is_of_a_turn(span: ReadableSpan) -> bool:
    scope = span.instrumentation_scope
    return (scope is not None and scope.name == SCOPE_NAME) or TURN_ID in (span.attributes or {})
