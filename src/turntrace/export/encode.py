"""Spans as the bytes that an OTLP server takes.

Protobuf is loaded when it is needed, for spans of others and to read back: our own are written without it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opentelemetry.sdk.trace import ReadableSpan

from turntrace.export.written import WrittenSpan, to_request
from turntrace.forking import importing

if TYPE_CHECKING:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

EndedSpan = ReadableSpan | WrittenSpan
"""A span that has ended, to be written down."""


def to_otlp(spans: Sequence[EndedSpan]) -> bytes:
    """Return spans as an OTLP ``ExportTraceServiceRequest`` in protobuf."""
    others = [span for span in spans if isinstance(span, ReadableSpan)]
    ours = to_request(span for span in spans if isinstance(span, WrittenSpan))
    return _encoded(others) + ours if others else ours  # put together they are one


def _encoded(spans: Sequence[ReadableSpan]) -> bytes:
    with importing():
        from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    body: bytes = encode_spans(spans).SerializeToString()
    return body


def from_otlp(body: bytes) -> "ExportTraceServiceRequest":
    """Read back what `to_otlp` wrote.

    Raises:
        ValueError: If it is not OTLP.
    """
    with importing():
        from google.protobuf.message import DecodeError
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    request = ExportTraceServiceRequest()
    try:
        request.ParseFromString(body)
    except DecodeError as error:
        raise ValueError(f"it is not OTLP: {error}") from None
    return request


def halves(body: bytes) -> list[tuple[bytes, int]]:
    """Split what `to_otlp` wrote into two of as many spans each, with their numbers; one span is not split.

    Raises:
        ValueError: If it is not OTLP.
    """
    request = from_otlp(body)
    spans = [
        (resource, scope, span)
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    middle = len(spans) // 2
    return [(_request_of(part), len(part)) for part in (spans[:middle], spans[middle:]) if part]


def _request_of(spans: "Sequence[tuple[ResourceSpans, ScopeSpans, Span]]") -> bytes:
    request = from_otlp(b"")
    last: tuple[ResourceSpans, ScopeSpans] | None = None
    for resource, scope, span in spans:
        if last is None or last[0] is not resource:
            request.resource_spans.add(resource=resource.resource, schema_url=resource.schema_url)
        if last is None or last[1] is not scope:
            request.resource_spans[-1].scope_spans.add(scope=scope.scope, schema_url=scope.schema_url)
        request.resource_spans[-1].scope_spans[-1].spans.append(span)
        last = (resource, scope)
    body: bytes = request.SerializeToString()
    return body
