"""Spans to Langfuse."""

from turntrace.export.client import SpanTarget, ids_of, open_target
from turntrace.export.encode import from_otlp, to_otlp

__all__ = ["SpanTarget", "from_otlp", "ids_of", "open_target", "to_otlp"]
