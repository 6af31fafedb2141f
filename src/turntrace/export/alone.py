"""Whether turntrace alone listens to the spans of a provider, so that they can be written down whole."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.sampling import DEFAULT_ON

from turntrace.attributes import LANGFUSE_IS_APP_ROOT, AttributeValue
from turntrace.export.processor import TurnSpanProcessor
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
        self._found: tuple[Any, bool, bool] = (None, False, False)

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
        marked = {**attributes, LANGFUSE_IS_APP_ROOT: True} if self._who_listens()[2] else attributes
        return WrittenSpan(self._around, name, context, None, marked, start_ns, self._processor.capture)

    def _writes(self, attributes: Mapping[str, AttributeValue]) -> bool:
        return len(attributes) < self._most_attributes and self._who_listens()[1]

    def _who_listens(self) -> tuple[Any, bool, bool]:
        """Return the processors, whether we are alone, and whether Langfuse's client listens too."""
        listening = getattr(getattr(self._provider, "_active_span_processor", None), "_span_processors", None)
        found = self._found
        if listening is not found[0]:  # a tuple that is made anew when one is added
            others = [each for each in listening or (None,) if not isinstance(each, TurnSpanProcessor)]
            is_langfuses = len(others) == 1 and type(others[0]).__module__.startswith("langfuse.")
            is_langfuses = is_langfuses and self._with_langfuses
            is_alone = isinstance(listening, tuple) and (not others or is_langfuses)
            found = self._found = (listening, is_alone, is_langfuses)  # at once, for threads side by side
        return found


def _most_attributes(provider: TracerProvider) -> int:
    """Return how many attributes a span may have for its limits and its sampler to be none; 0 where it is not known."""
    limits = getattr(provider, "_span_limits", None)
    if provider.sampler is not DEFAULT_ON or not isinstance(limits, SpanLimits):
        return 0
    if any(getattr(limits, name, 0) is not None for name in _UNLIMITED):
        return 0
    most = limits.max_span_attributes
    return 2**31 if most is None else most
