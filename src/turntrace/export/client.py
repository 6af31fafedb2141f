"""Where spans go: to Langfuse through its client, to a provider of the app's, or into the outbox."""

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

from turntrace.attributes import LANGFUSE_IS_APP_ROOT, SCOPE_NAME, AttributeValue
from turntrace.boundary import caught
from turntrace.current import Scope
from turntrace.errors import ConfigurationError
from turntrace.export.alone import Alone
from turntrace.export.encode import EndedSpan
from turntrace.export.exporter import OutboxExporter, what_to_queue
from turntrace.export.later import ClientToCome, OwnProvider, is_needed_at_once
from turntrace.export.processor import SERVING, TurnSpanProcessor, processor_of
from turntrace.export.server import LangfuseServer
from turntrace.settings import LangfuseClientSettings, LangfuseSettings, read_client_settings, read_langfuse_settings

logger = logging.getLogger("turntrace")

_said: set[str] = set()
_lock = threading.Lock()
_EMPTY = Context()
_REQUESTS_REMEMBERED = 10_000


class _Ids(RandomIdGenerator):
    """Gives a span the ids that were asked for, else those of the provider's own generator."""

    def __init__(self, others: IdGenerator) -> None:
        self._others = others
        self._wanted = threading.local()

    def next_ids(self, trace_id: int, span_id: int) -> None:
        self._wanted.ids = (trace_id, span_id)

    def generate_trace_id(self) -> int:
        ids: tuple[int, int] | None = getattr(self._wanted, "ids", None)
        return self._others.generate_trace_id() if ids is None else ids[0]

    def generate_span_id(self) -> int:
        ids: tuple[int, int] | None = getattr(self._wanted, "ids", None)
        if ids is None:
            return self._others.generate_span_id()
        self._wanted.ids = None
        return ids[1]


class SpanTarget:
    """Starts spans, and says whether those that have ended are to be put into the outbox.

    Args:
        provider: The provider to start spans on.
        to_outbox: Whether the outbox is what keeps and sends them.
        takes_scores: Whether there is a Langfuse to take scores, though spans go another way.
        environment: What Langfuse calls the environment of what is tracked.
        exporter: The exporter by which Langfuse's client sends, where it is ours.
        server: The server to send to, where there are keys.
    """

    def __init__(
        self,
        provider: trace.TracerProvider,
        *,
        to_outbox: bool,
        takes_scores: bool = False,
        environment: str | None = None,
        exporter: OutboxExporter | None = None,
        server: LangfuseServer | None = None,
    ) -> None:
        self.provider = provider
        self.environment = environment
        self.exporter = exporter
        self.server = server
        self.to_outbox = to_outbox
        self.takes_scores = to_outbox or takes_scores
        self._tracer = provider.get_tracer(SCOPE_NAME)
        self._ids: _Ids | None = None
        self.processor: TurnSpanProcessor | None = None
        if isinstance(provider, TracerProvider):
            self.processor = processor_of(provider)
        self._requests: OrderedDict[int, None] = OrderedDict()
        if isinstance(self._tracer, SdkTracer):  # the tracer of our name is ours, perhaps of several trackers
            own = self._tracer.id_generator
            self._ids = self._tracer.id_generator = own if isinstance(own, _Ids) else _Ids(own)
        self._alone: Alone | None = None
        if to_outbox and self._ids is not None and self.processor is not None and isinstance(provider, TracerProvider):
            self._alone = Alone(provider, self.processor, with_langfuses=exporter is not None)

    @property
    def chooses_ids(self) -> bool:
        """Whether the ids of spans can be chosen, so that a span can be started again by another process."""
        return self._ids is not None

    def start(
        self,
        name: str,
        *,
        attributes: Mapping[str, AttributeValue],
        start_ns: int,
        parent: Context | trace.Span,
        has_ended: bool = False,
        span_id: int | None = None,
    ) -> trace.Span:
        """Start a span.

        Args:
            name: Its name.
            attributes: Its attributes at the start, where filters of processors look.
            start_ns: When it starts, in nanoseconds since 1970.
            parent: Its parent, or the context whose current span that is.
            has_ended: Whether what it stands for has ended, so that nobody asks for it between its start and its end.
            span_id: Id of a span that was sent before, which this one overwrites, where we send it; None for a new one.
        """
        above = (trace.get_current_span(parent) if isinstance(parent, Context) else parent).get_span_context()
        if has_ended and self._alone is not None and self._ids is not None:
            new_id = self._ids.generate_span_id if span_id is None else lambda: span_id
            written = self._alone.span(name, attributes, start_ns, above, new_id)
            if written is not None:
                return written
        if span_id is not None:
            return trace.NonRecordingSpan(above)
        try:
            context = parent if isinstance(parent, Context) else trace.set_span_in_context(parent, _EMPTY)
            return self._tracer.start_span(name, context=context, attributes=attributes, start_time=start_ns)
        except Exception as error:  # of a span processor of the app's: the step goes on without its span
            caught("starting a span: a span processor of the app raised an error", error)
            return trace.NonRecordingSpan(above)

    def start_root(
        self,
        name: str,
        *,
        attributes: Mapping[str, AttributeValue],
        start_ns: int,
        ids: tuple[int, int],
        below: trace.Span | None = None,
        linked: trace.SpanContext | None = None,
        has_ended: bool = False,
    ) -> trace.Span:
        """Start the root of a trace, or what stands below the span of a request.

        Args:
            name: Its name.
            attributes: Its attributes at the start.
            start_ns: When it starts, in nanoseconds since 1970.
            ids: The ids of its trace and of the span, where the provider lets us choose them.
            below: The span of the request that the turn serves, which is its parent then (see `claim_request`).
            linked: The span of other code that was current: it is linked, not the parent, so that a turn stays one
                trace.
            has_ended: Whether what it stands for has ended.
        """
        if self.exporter is not None and (below is None or _waits_for_client(self.provider)):
            # As Langfuse's client does it; a span of ours that is written down whole it does not hear of.
            attributes = {**attributes, LANGFUSE_IS_APP_ROOT: True}
        is_top = below is None and linked is None
        if has_ended and is_top and self._alone is not None:
            written = self._alone.root(name, attributes, start_ns, ids)
            if written is not None:
                return written
        parent = _EMPTY
        links: tuple[trace.Link, ...] = ()
        if below is not None:
            parent = trace.set_span_in_context(below, _EMPTY)
        elif linked is not None:
            links = (trace.Link(linked),)
        if self._ids is not None:
            self._ids.next_ids(*ids)
        try:
            return self._tracer.start_span(
                name, context=parent, attributes=attributes, start_time=start_ns, links=links
            )
        except Exception as error:  # of a span processor of the app's: the turn goes on without its spans
            caught("starting a span: a span processor of the app raised an error", error)
            return trace.NonRecordingSpan(trace.SpanContext(*ids, is_remote=False))

    def claim_request(self, span: trace.Span) -> bool:
        """Tell whether a turn is to stand below a span: one that serves a request or a job, or is inside of one.

        Such spans are of the kinds SERVER and CONSUMER. The first turn of a request stands in its trace; a second one
        has a trace of its own, since a turn is one trace. On a provider of ours, which sends what is turntrace's only,
        a turn would stand below nothing.
        """
        context = span.get_span_context()
        if not context.is_valid or (isinstance(self.provider, OwnProvider) and not self.provider.has_keys):
            return False
        serving: int | None = context.span_id if getattr(span, "kind", None) in SERVING else None
        if serving is None and self.processor is not None and not isinstance(span, Scope):
            serving = self.processor.request_around(context)
        if serving is None:
            return False
        with _lock:
            if serving in self._requests:
                return False
            self._requests[serving] = None
            if len(self._requests) > _REQUESTS_REMEMBERED:
                self._requests.popitem(last=False)
        return True

    @contextmanager
    def capturing(self) -> Iterator[list[EndedSpan]]:
        """Capture the spans of ours that this thread ends in a block; none where the provider tells nobody."""
        if self.processor is None:
            yield []
        else:
            with self.processor.capturing() as spans:
                yield spans

    @contextmanager
    def flushed_by(self, writer: Any) -> Iterator[None]:
        """Have a flush of the provider in this thread leave a writer alone, which is flushing it."""
        if self.processor is None:
            yield
        else:
            with self.processor.flushed_by(writer):
                yield

    def is_sampled(self, trace_id: str) -> bool:
        """Tell whether the spans of a trace are recorded, as Langfuse's client decides it for the trace's scores.

        Args:
            trace_id: Id of the trace, 32 hexadecimal digits.
        """
        sampler = getattr(self.provider, "sampler", None)
        if not trace_id or not isinstance(sampler, TraceIdRatioBased):
            return True
        return sampler.should_sample(None, int(trace_id, 16), "score").decision is Decision.RECORD_AND_SAMPLE

    def flush(self, timeout: float | None = None) -> None:
        """Have the provider send what it holds.

        Args:
            timeout: Seconds that it may take; None leaves it to the provider.
        """
        force_flush = getattr(self.provider, "force_flush", None)
        if force_flush is not None:
            force_flush(*(() if timeout is None else (max(0, int(timeout * 1000)),)))


def open_target(provider: trace.TracerProvider | None = None, *, outbox: bool | None = None) -> SpanTarget:
    """Find out where spans go.

    With ``LANGFUSE_PUBLIC_KEY`` and ``LANGFUSE_SECRET_KEY`` a client of Langfuse's listens to the provider that the
    app gives, to the one that is set for the process, or to a new one (there as soon as other code needs it, see
    `turntrace.export.later`), and what it would send goes through the outbox. A client that the app had made before
    sends by itself. Without keys, spans go to a provider of the app's, and where there is none they wait in the outbox.

    Args:
        provider: The app's own provider.
        outbox: Whether to put spans into the outbox; by default only when nothing else takes them.
    """
    settings = read_langfuse_settings()
    if not settings.tracing_enabled:
        return SpanTarget(trace.NoOpTracerProvider(), to_outbox=False)
    known: dict[str, Any] = {"environment": settings.tracing_environment}
    if settings.has_keys:
        used, exporter = _with_langfuse(read_client_settings(), provider)
        to_outbox = exporter is not None if outbox is None else outbox
        known |= {"exporter": exporter, "server": LangfuseServer(settings)}
        return SpanTarget(used, to_outbox=to_outbox, takes_scores=True, **known)
    found = provider or _global_provider(settings)
    to_outbox = isinstance(found, OwnProvider) if outbox is None else outbox
    target = SpanTarget(found, to_outbox=to_outbox, **known)
    if not target.to_outbox and provider is None:
        _say_once("the tracer provider of this process is the app's own", found)
    return target


def _waits_for_client(provider: trace.TracerProvider) -> bool:
    return isinstance(provider, OwnProvider) and provider.waits_for_client


def _global_provider(settings: LangfuseSettings) -> trace.TracerProvider:
    """Return the provider of the process; where there is none, one of ours, with keys with Langfuse's client to come.

    As Langfuse's client does: what the app starts on the global provider is to fall into the turn too.
    """
    with _lock:
        found = trace.get_tracer_provider()
        if not isinstance(found, trace.ProxyTracerProvider):
            return found
        own = OwnProvider(settings)
        if isinstance(settings, LangfuseClientSettings):
            own.has_keys, exporter = True, OutboxExporter()
            own.client_to_come = ClientToCome(exporter, settings, lambda sdk: _join(own, exporter, settings, sdk))
            processor_of(own).expect_client()
        trace.set_tracer_provider(own)
    if own.client_to_come is not None:
        own.client_to_come.make_on_import()
    return own


def _join(own: OwnProvider, exporter: OutboxExporter, settings: LangfuseClientSettings, sdk: ModuleType) -> None:
    """Have Langfuse's client listen to a provider of ours, on which spans of ours may run."""
    _exporter_of(_client_of(sdk, settings, own, exporter), own)
    processor_of(own).introduce()


def _with_langfuse(
    settings: LangfuseClientSettings, provider: trace.TracerProvider | None
) -> tuple[trace.TracerProvider, OutboxExporter | None]:
    """Have Langfuse's client listen; return the provider, and the exporter where the client sends by ours."""
    found = provider or trace.get_tracer_provider()
    if not is_needed_at_once(found):
        found = _global_provider(settings)
    to_come = found.client_to_come if isinstance(found, OwnProvider) and found.waits_for_client else None
    if to_come is not None:
        if to_come.settings.public_key == settings.public_key:
            return found, to_come.exporter
        to_come.make()
    import langfuse  # half a second, which only those with keys are to wait for

    is_new = isinstance(found, trace.ProxyTracerProvider)
    if not is_new and not isinstance(found, TracerProvider):
        _say_once("the tracer provider is not one of the OpenTelemetry SDK, so Langfuse's client cannot listen", found)
        return found, None
    # Without a provider the client makes one, with the environment, release and sample rate as it reads them.
    given = found if isinstance(found, TracerProvider) else None
    client = _client_of(langfuse, settings, given, OutboxExporter())
    # A client that the app had made before keeps its provider and exporter, and names them nowhere else.
    used: trace.TracerProvider = provider or _listening(client) or trace.get_tracer_provider()
    return used, _exporter_of(client, used)


def _client_of(
    sdk: ModuleType, settings: LangfuseClientSettings, provider: TracerProvider | None, exporter: OutboxExporter
) -> Any:
    """Make Langfuse's client of what was read from the environment when the tracker was made."""
    secret = settings.secret_key
    try:
        return sdk.Langfuse(
            public_key=settings.public_key,
            secret_key=None if secret is None else secret.get_secret_value(),
            base_url=settings.server,
            environment=settings.tracing_environment,
            release=settings.release,
            sample_rate=settings.sample_rate,
            timeout=math.ceil(settings.timeout),  # it takes whole seconds
            flush_at=settings.flush_at,
            flush_interval=settings.flush_interval,
            tracer_provider=provider,
            span_exporter=exporter,
            should_export_span=what_to_queue(),
        )
    except (ValueError, TypeError) as error:  # without its text, which may hold a key
        raise ConfigurationError(
            "Langfuse's client cannot be made of the environment variables LANGFUSE_* and OTEL_BSP_* "
            f"({type(error).__name__}). Compare them with the documentation of its SDK, and set or unset them."
        ) from None


def _listening(client: Any) -> TracerProvider | None:
    return getattr(getattr(client, "_resources", None), "tracer_provider", None)


def _exporter_of(client: Any, used: trace.TracerProvider) -> OutboxExporter | None:
    """Return the exporter of a client where it is ours; where it is not, say what that means."""
    if _listening(client) is not used:
        _say_once("Langfuse's client was made before, and listens to another provider than the tracker's", used)
        return None
    exporter = getattr(getattr(client, "_resources", None), "span_exporter", None)
    if not isinstance(exporter, OutboxExporter):
        _say_once("Langfuse's client was made before the tracker", used)
        return None
    if isinstance(used, OwnProvider):
        used.has_keys = True
    return exporter


def _say_once(why: str, provider: trace.TracerProvider) -> None:
    with _lock:
        if why in _said:
            return
        _said.add(why)
    logger.warning(
        "turntrace: %s (%s): spans go where it sends them, and what it loses in an outage is lost. "
        "SessionTracker(outbox=True) keeps them in the outbox too.",
        why,
        type(provider).__name__,
    )


def ids_of(span: trace.Span) -> tuple[str, str]:
    """Return the ids of a span's trace and of the span, in hexadecimal."""
    context: Any = span.get_span_context()
    return trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
