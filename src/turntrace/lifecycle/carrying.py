"""A turn as HTTP headers: W3C trace context and baggage."""

from collections.abc import Mapping
from typing import Final

from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

CARRIED: Final = ("traceparent", "baggage")
"""The headers by which a turn travels, in lower case."""

_TRACE: Final = TraceContextTextMapPropagator()
_BAGGAGE: Final = W3CBaggagePropagator()


def headers_of(context: Context) -> dict[str, str]:
    """Return the span and the baggage of a context as headers."""
    headers: dict[str, str] = {}
    _TRACE.inject(headers, context)
    _BAGGAGE.inject(headers, context)
    return headers


def context_in(headers: Mapping[str, str]) -> Context:
    """Return a context with the span and the baggage that headers tell."""
    return _BAGGAGE.extract(headers, _TRACE.extract(headers, Context()))
