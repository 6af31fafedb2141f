"""The exporter that Langfuse's client is given: what it would send goes into the outbox."""

from collections.abc import Callable, Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from turntrace.attributes import SCOPE_NAME, TURN_ID
from turntrace.boundary import caught
from turntrace.export.encode import to_otlp

Keep = Callable[[bytes, int], None]


class OutboxExporter(SpanExporter):
    """Puts the spans of others that ended outside of turns into the outbox.

    Those of a turn go there with the turn, before its row says that it is finished, and are passed over here.

    Attributes:
        keep: Puts spans into the outbox: their OTLP, and how many they are. Set by the tracker.
    """

    def __init__(self) -> None:
        self.keep: Keep | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Put spans into the outbox."""
        others = [span for span in spans if not _is_of_a_turn(span)]
        if not others:
            return SpanExportResult.SUCCESS
        try:
            if self.keep is not None:
                self.keep(to_otlp(others), len(others))
                return SpanExportResult.SUCCESS
        except Exception as error:
            caught("putting spans of other code into the outbox", error)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Do nothing: the outbox stays."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Do nothing: what was exported is in the outbox."""
        return True


def _is_of_a_turn(span: ReadableSpan) -> bool:
    scope = span.instrumentation_scope
    return (scope is not None and scope.name == SCOPE_NAME) or TURN_ID in (span.attributes or {})
