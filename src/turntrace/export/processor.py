"""The span processor that brings spans of others into the turn, and hands over those that have ended."""

import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider

from turntrace.attributes import LANGFUSE_METADATA_PREFIX, SCOPE_NAME
from turntrace.boundary import caught
from turntrace.current import Scope, current_scope, turn_that_left
from turntrace.export.encode import EndedSpan

LANGFUSE_SDK = "langfuse-sdk"
"""The scope of the spans of Langfuse's own SDK."""

SERVING = (trace.SpanKind.SERVER, trace.SpanKind.CONSUMER)
"""Kinds of spans that stand for a request or a job."""


class CollectingTurn(Protocol):
    """A turn that takes the spans of others which ended in it."""

    @property
    def tags(self) -> Mapping[str, Any]:
        """What every span of the turn carries."""

    def collect(self, span: ReadableSpan) -> None:
        """Take a span that has ended."""


class TurnSpanProcessor(SpanProcessor):
    """Stamps the spans that other code starts inside a turn, and keeps count of those that ended.

    What a user's code, Langfuse's ``@observe`` or an instrumentation starts inside a node or a tool gets the ids of
    the turn at its start. On spans of Langfuse's own SDK they are also set as metadata, because its server drops
    unknown attributes there.

    Args:
        provider: The provider that it is added to.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = weakref.ref(provider)
        self._running: dict[int, CollectingTurn] = {}
        self._requests: dict[int, int] = {}
        self._captured = threading.local()
        self._flushers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._unknown: set[int] | None = None

    def flush_with(self, writer: Any) -> None:
        """Let a flush of the provider flush this writer too (by its methods ``write_down`` and ``send``)."""
        self._flushers.add(writer)

    def expect_client(self) -> None:
        """Remember which spans of ours run, for Langfuse's client, which is to come."""
        self._unknown = set()

    def introduce(self) -> None:
        """Tell Langfuse's client, which has come, which spans of ours run: what starts below them is no root."""
        unknown, self._unknown = self._unknown, None
        for client in filter(is_langfuses, listening_to(self._provider()) or ()):
            expected = getattr(client, "_span_export_expectation_by_id", None)
            if unknown and isinstance(expected, dict):
                expected.update({trace.format_span_id(span_id): True for span_id in [*unknown]})

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Stamp a span of others that starts inside a turn."""
        scope = span.instrumentation_scope
        if scope is not None and scope.name == SCOPE_NAME:
            if (unknown := self._unknown) is not None and span.context is not None:
                unknown.add(span.context.span_id)
            return
        try:
            if span.kind in SERVING and span.context is not None:
                self._requests[span.context.trace_id] = span.context.span_id
            turn = self._turn_of(parent_context)
            if turn is None:
                return
            span.set_attributes(turn.tags)
            if scope is not None and scope.name == LANGFUSE_SDK:
                span.set_attributes({LANGFUSE_METADATA_PREFIX + name: value for name, value in turn.tags.items()})
            context = span.get_span_context()
            if context is not None:
                self._running[context.span_id] = turn
        except Exception as error:
            caught("stamping a span of other code", error)

    def request_around(self, context: trace.SpanContext) -> int | None:
        """Return the id of the span of a request or a job that runs in the trace of a span, or None."""
        return self._requests.get(context.trace_id)

    def _turn_of(self, context: Context | None) -> Any:
        """Find the turn that runs in a context; in one that was made by hand, by the span that is current there."""
        running = current_scope(context)
        if running is None:
            span = trace.get_current_span(context)
            if not isinstance(span, Scope):
                return self._running.get(span.get_span_context().span_id)
            running = span.settled()
        return turn_that_left(context) if running is None else running.turn

    def on_end(self, span: ReadableSpan) -> None:
        """Hand a span that has ended to its turn, or to the block that captures."""
        scope = span.instrumentation_scope
        if scope is not None and scope.name == SCOPE_NAME:
            if (unknown := self._unknown) is not None and span.context is not None:
                unknown.discard(span.context.span_id)
            self.capture(span)
            return
        if span.context is not None and self._requests.get(span.context.trace_id) == span.context.span_id:
            del self._requests[span.context.trace_id]
        turn = self._running.pop(span.context.span_id, None) if self._running and span.context else None
        if turn is not None:
            try:
                turn.collect(span)
            except Exception as error:
                caught("collecting a span of other code", error)

    def capture(self, span: EndedSpan) -> None:
        """Hand a span of ours that has ended to the block that captures in this thread."""
        captured = getattr(self._captured, "spans", None)
        if captured is not None:
            captured.append(span)

    @contextmanager
    def capturing(self) -> Iterator[list[EndedSpan]]:
        """Capture the spans of ours that this thread ends in a block."""
        spans: list[EndedSpan] = []
        self._captured.spans = spans
        try:
            yield spans
        finally:
            self._captured.spans = None

    @contextmanager
    def flushed_by(self, writer: Any) -> Iterator[None]:
        """Leave a writer alone while it flushes the provider in this thread."""
        self._captured.flusher = writer
        try:
            yield
        finally:
            self._captured.flusher = None

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Write down what has ended, have the other processors flush what ended by it, and send all of it.

        Langfuse's client, which may come before this one or after it, puts what it flushes into the outbox.
        """
        if getattr(self._captured, "flushing", False):
            return True
        until = time.monotonic() + timeout_millis / 1000
        flushing = getattr(self._captured, "flusher", None)
        writers = [writer for writer in self._flushers if writer is not flushing]
        written = [writer.write_down(max(0.0, until - time.monotonic())) for writer in writers]
        provider = self._provider()
        if provider is not None and any(written):
            self._captured.flushing = True
            try:
                provider.force_flush(max(0, int((until - time.monotonic()) * 1000)))
            finally:
                self._captured.flushing = False
        for writer in writers:
            writer.send(max(0.0, until - time.monotonic()))
        return all(written)


def listening_to(provider: object) -> tuple[Any, ...] | None:
    """Return the processors of a provider, a tuple that is made anew when one is added; None where it is not told."""
    listening = getattr(getattr(provider, "_active_span_processor", None), "_span_processors", None)
    return listening if isinstance(listening, tuple) else None


def is_langfuses(processor: object) -> bool:
    """Tell whether a processor is that of Langfuse's client."""
    return type(processor).__module__.startswith("langfuse.")


_processors: "weakref.WeakKeyDictionary[TracerProvider, TurnSpanProcessor]" = weakref.WeakKeyDictionary()
_processors_lock = threading.Lock()


def processor_of(provider: TracerProvider) -> TurnSpanProcessor:
    """Return the processor of a provider; the first time it is made and added."""
    with _processors_lock:
        processor = _processors.get(provider)
        if processor is None:
            processor = _processors[provider] = TurnSpanProcessor(provider)
            provider.add_span_processor(processor)
        return processor
