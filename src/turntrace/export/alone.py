"""Whether turntrace alone listens to the spans of a provider, so that they can be written down whole."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.sampling import DEFAULT_ON

from turntrace.attributes import AttributeValue
from turntrace.export.processor import TurnSpanProcessor, is_langfuses, listening_to
from turntrace.export.written import Around, WrittenSpan

_SAMPLED: Final = trace.TraceFlags(trace.TraceFlags.SAMPLED)
_UNLIMITED: Final = ("max_attribute_length", "max_span_attribute_length")


class Alone:
    """Makes spans that are written down whole, as long as nobody else listens to their provider.

    Those who listen are a detail of the SDK's: where it does not tell them, or another sampler or other limits are
    set, spans are made by the SDK.

    Args:
        provider: The provider whose spans the outbox keeps and sends.
        processor: Ours, which is handed the spans.
        with_langfuses: Whether Langfuse's client may listen too: it sends by our exporter, and leaves what is in a turn
            to us.
    """

    def __init__(self, provider: TracerProvider, processor: TurnSpanProcessor, *, with_langfuses: bool) -> None:
        self._provider = provider
        self._processor = processor
        self._with_langfuses = with_langfuses
        self._around = Around.of(provider.resource)
        self._most_attributes = _most_attributes(provider)
        self._found: tuple[tuple[Any, ...] | None, bool] = (None, False)

    def span(
        self,
        name: str,
        attributes: Mapping[str, AttributeValue],
        start_ns: int,
        above: trace.SpanContext,
        new_id: Callable[[], int],
    ) -> WrittenSpan | None:
        """Return a span below another one, or None where the SDK is to make it.

        Args:
            name: Its name.
            attributes: Its attributes.
            start_ns: When it started, in nanoseconds since 1970.
            above: The ids of its parent.
            new_id: Makes its id.
        """
        if not self._writes(attributes) or not above.is_valid or not above.trace_flags.sampled or above.trace_state:
            return None
        context = trace.SpanContext(above.trace_id, new_id(), is_remote=False, trace_flags=_SAMPLED)
        return WrittenSpan(self._around, name, context, above, attributes, start_ns, self._processor.capture)

    def root(
        self, name: str, attributes: Mapping[str, AttributeValue], start_ns: int, ids: tuple[int, int]
    ) -> WrittenSpan | None:
        """Return the root of a trace, or None where the SDK is to make it.

        Args:
            name: Its name.
            attributes: Its attributes.
            start_ns: When it started, in nanoseconds since 1970.
            ids: The ids of its trace and of the span.
        """
        if not self._writes(attributes):
            return None
        context = trace.SpanContext(*ids, is_remote=False, trace_flags=_SAMPLED)
        return WrittenSpan(self._around, name, context, None, attributes, start_ns, self._processor.capture)

    def _writes(self, attributes: Mapping[str, AttributeValue]) -> bool:
        return len(attributes) < self._most_attributes and self._is_alone()

    def _is_alone(self) -> bool:
        listening, is_alone = self._found
        now = listening_to(self._provider)
        if now is None or now is not listening:
            others = [each for each in now or (None,) if not isinstance(each, TurnSpanProcessor)]
            is_alone = not others or (self._with_langfuses and len(others) == 1 and is_langfuses(others[0]))
            self._found = (now, is_alone)  # at once, for threads side by side
        return is_alone


def _most_attributes(provider: TracerProvider) -> int:
    """Return how many attributes a span may have for its limits and its sampler to be none; 0 where it is not known."""
    limits = getattr(provider, "_span_limits", None)
    if provider.sampler is not DEFAULT_ON or not isinstance(limits, SpanLimits):
        return 0
    if any(getattr(limits, name, 0) is not None for name in _UNLIMITED):
        return 0
    most = limits.max_span_attributes
    return 2**31 if most is None else most
