"""Langfuse's client, made when the first of the app's code needs it: it takes megabytes and a tenth of a second."""

import logging
import sys
import threading
import weakref
from importlib import import_module
from types import ModuleType
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span, TracerProvider

from turntrace.boundary import caught, off_watched_loop
from turntrace.errors import ConfigurationError
from turntrace.export.exporter import OutboxExporter, what_to_queue
from turntrace.export.processor import TurnSpanProcessor, processor_of
from turntrace.forking import importing

logger = logging.getLogger("turntrace")

_SDK: Final = "langfuse"
_lock = threading.Lock()
own_providers: "weakref.WeakSet[TracerProvider]" = weakref.WeakSet()
"""Providers of ours to which no client of Langfuse's listens: they send what is turntrace's only."""
_to_come: "weakref.WeakKeyDictionary[TracerProvider, OutboxExporter]" = weakref.WeakKeyDictionary()


def make_client(provider: TracerProvider | None, exporter: OutboxExporter, sdk: ModuleType | None = None) -> Any:
    """Make Langfuse's client, which listens to a provider and sends by our exporter.

    Args:
        provider: The provider; without one the client makes it.
        exporter: The exporter. A client that was made before keeps its own.
        sdk: Langfuse's SDK, where it is at hand.

    Raises:
        ConfigurationError: If it cannot be made of the environment variables.
    """
    client = (sdk or import_module(_SDK)).Langfuse
    try:
        return client(tracer_provider=provider, span_exporter=exporter, should_export_span=what_to_queue())
    except (ValueError, TypeError) as error:  # without its text, which may hold a key
        raise ConfigurationError(
            f"Langfuse's client cannot be made of the environment variables LANGFUSE_* ({type(error).__name__}). It "
            "takes whole numbers of seconds as LANGFUSE_TIMEOUT=5, numbers above 0 as LANGFUSE_FLUSH_AT=512 and "
            "LANGFUSE_FLUSH_INTERVAL=5: set or unset them."
        ) from None


def can_be_made_later(provider: trace.TracerProvider) -> bool:
    """Tell whether nobody needs the client yet: the app has neither Langfuse's SDK nor listeners to its spans."""
    if _SDK in sys.modules:
        return False
    listening = _listening(provider)
    is_alone = listening is not None and all(isinstance(each, TurnSpanProcessor) for each in listening)
    return is_alone or isinstance(provider, trace.ProxyTracerProvider)


def when_needed(provider: TracerProvider) -> OutboxExporter:
    """Have the client made when the app imports Langfuse's SDK, or when the first span of others starts outside a turn.

    Args:
        provider: A provider to which nobody of the app's listens yet.

    Returns:
        The exporter that the client will send by.
    """
    with importing():
        from wrapt import register_post_import_hook
    with _lock:
        known = _to_come.get(provider)
        if known is None:
            exporter = _to_come[provider] = OutboxExporter()
    if known is not None:
        return known
    weak = weakref.ref(provider)
    processor_of(provider).before_others = _meet
    register_post_import_hook(lambda sdk: _made_for(weak(), sdk), _SDK)
    return exporter


def _made_for(provider: TracerProvider | None, sdk: ModuleType) -> None:
    """Make the client, once. Called within the import of the SDK, before anyone can make a client of it.

    Another thread may do it (see `off_watched_loop`), which must not wait for that import: it is given the SDK.
    """
    if provider is None:
        return
    with _lock:
        exporter = _to_come.pop(provider, None)
    if exporter is None:
        return
    processor_of(provider).before_others = None
    try:
        off_watched_loop(lambda: make_client(provider, exporter, sdk))
    except ConfigurationError as error:
        logger.warning("turntrace: %s Until then spans outside of turns are not sent.", error)
    except Exception as error:  # the app's import goes on
        caught("making Langfuse's client", error)
    else:
        own_providers.discard(provider)


def _meet(provider: TracerProvider, span: Span, parent_context: Context | None) -> None:
    """Have the client listen from this span on, which starts."""
    before = _listening(provider) or ()
    _made_for(provider, off_watched_loop(_imported))
    for processor in (_listening(provider) or ())[len(before) :]:
        processor.on_start(span, parent_context)  # the provider tells it of the next ones


def _imported() -> ModuleType:
    """Import the SDK, by which the client is made, unless that was begun before."""
    with importing():
        return import_module(_SDK)


def _listening(provider: object) -> tuple[Any, ...] | None:
    """Return who listens to a provider; None where that cannot be told."""
    listening = getattr(getattr(provider, "_active_span_processor", None), "_span_processors", None)
    return listening if isinstance(listening, tuple) else None
