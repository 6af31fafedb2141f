"""Spans as the bytes that an OTLP server takes."""

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan


def to_otlp(spans: Sequence[ReadableSpan]) -> bytes:
    """Return spans as an OTLP ``ExportTraceServiceRequest`` in protobuf."""
    body: bytes = encode_spans(spans).SerializeToString()
    return body


def from_otlp(body: bytes) -> ExportTraceServiceRequest:
    """Read back what `to_otlp` wrote."""
    request = ExportTraceServiceRequest()
    request.ParseFromString(body)
    return request
