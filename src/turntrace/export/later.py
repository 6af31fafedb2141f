"""Langfuse's client, made when other code first needs it: it takes megabytes, and a tenth of a second.

What it is for are spans of other code that end outside of turns, and what the app asks of it by ``get_client()``. Both
can be seen coming: such a span needs a tracer, which the provider gives, and the app has to import ``langfuse``. The
client is made before either goes on, so it hears of each span from its start.
"""

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.util.types import Attributes

from turntrace.attributes import SCOPE_NAME
from turntrace.boundary import caught, never_breaks, off_watched_loop
from turntrace.errors import ConfigurationError
from turntrace.export.exporter import OutboxExporter
from turntrace.export.processor import LANGFUSE_SDK
from turntrace.forking import importing, in_child, lock_of
from turntrace.settings import LangfuseSettings

logger = logging.getLogger("turntrace")

_SDK: Final = "langfuse"
_MAKING: Final = "making Langfuse's client"
_SIGNS: Final = (_SDK, "opentelemetry.instrumentation", "fastapi.telemetry")
"""Modules by which an app is known to need the client: it is not to be made in the midst of its first request."""


class ClientToCome:
    """Makes Langfuse's client, once.

    Two may ask at the same time: a thread that imports ``langfuse`` has that module's lock, and then waits for ours. So
    whoever asks imports first, and takes ours after it; where that import is under way already, it is waited for
    without holding anything of ours.

    Args:
        exporter: By which it will send.
        settings: What it will be made of.
        make: Makes it of Langfuse's SDK.
    """

    def __init__(
        self, exporter: OutboxExporter, settings: LangfuseSettings, make: Callable[[ModuleType], object]
    ) -> None:
        self.exporter = exporter
        self.settings = settings
        self._make = make
        self._lock = lock_of(self)
        self._here = threading.local()
        self._is_over = False
        self._is_given_up = False
        in_child(self._after_fork)

    @property
    def is_over(self) -> bool:
        """Whether it was made, or cannot be made of the settings."""
        return self._is_over

    def make_on_import(self) -> None:
        """Have it made as soon as the app has imported ``langfuse``, before anyone can make another one of it."""
        with importing():
            from wrapt import register_post_import_hook
        weak = weakref.ref(self)

        @never_breaks(_MAKING)  # nor the import
        def imported(sdk: ModuleType) -> None:
            to_come = weak()
            if to_come is not None and hasattr(sdk, "Langfuse"):
                off_watched_loop(lambda: to_come._make_of(sdk))  # in that thread the import would wait for itself

        register_post_import_hook(imported, _SDK)
        if _SDK in sys.modules:  # another thread is at it, and may be past its end
            self.make()

    @never_breaks(_MAKING)
    def make(self) -> None:
        """Make it now, if that was not done before; return when it listens, or cannot."""
        if self._is_over or self._is_given_up or getattr(self._here, "is_busy", False):
            return
        if not _is_being_imported():
            off_watched_loop(self._import_and_make)
        elif not _is_being_imported(import_module(_SDK)):  # else it is this thread that imports it, and makes it then
            off_watched_loop(lambda: self._make_of(sys.modules[_SDK]))

    def give_up(self) -> None:
        """Leave it to the app, which makes one itself."""
        if not (self._is_over or getattr(self._here, "is_busy", False)):
            self._is_over = True

    def _import_and_make(self) -> None:
        with self._busy(), importing():
            try:
                sdk = import_module(_SDK)
            except Exception as error:  # a broken installation: the app, which does without it, goes on
                self._is_given_up = True
                logger.warning(
                    "turntrace: the package langfuse cannot be imported (%s): spans of other code outside of turns "
                    "are not sent. Install it anew: pip install --force-reinstall langfuse",
                    type(error).__name__,
                )
                return
        self._make_of(sdk)  # unless the import did

    def _make_of(self, sdk: ModuleType) -> None:
        with self._busy(), self._lock:
            if self._is_over:
                return
            try:
                self._make(sdk)
            except ConfigurationError as error:
                logger.warning("turntrace: %s Spans of other code outside of turns are not sent.", error)
            except Exception as error:
                caught(_MAKING, error)
            self._is_over = True

    def _after_fork(self) -> None:
        if _is_being_imported():  # by a thread that is not in this process: it never ends
            self._is_given_up = True

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Do without the client in this thread, which is making it."""
        before, self._here.is_busy = getattr(self._here, "is_busy", False), True
        try:
            yield
        finally:
            self._here.is_busy = before


def _is_being_imported(sdk: ModuleType | None = None) -> bool:
    """Tell whether a thread is importing Langfuse's SDK; of the SDK that an import gave, whether that is this one."""
    spec = getattr(sdk or sys.modules.get(_SDK), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


class OwnProvider(TracerProvider):
    """A provider of ours, for an app that has none.

    Args:
        settings: The environment, the release and the sample rate, as Langfuse's client would set them.

    Attributes:
        client_to_come: Langfuse's client, where there were keys and nobody needed it yet.
        has_keys: Whether a client of Langfuse's listens or is to come. Else only what is turntrace's is sent.
    """

    def __init__(self, settings: LangfuseSettings) -> None:
        words = {"langfuse.environment": settings.tracing_environment, "langfuse.release": settings.known_release}
        super().__init__(
            resource=Resource.create({name: value for name, value in words.items() if value is not None}),
            sampler=TraceIdRatioBased(settings.sample_rate) if settings.sample_rate < 1 else None,
        )
        self.client_to_come: ClientToCome | None = None
        self.has_keys = False

    @property
    def waits_for_client(self) -> bool:
        """Whether Langfuse's client is still to come."""
        return self.client_to_come is not None and not self.client_to_come.is_over

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> trace.Tracer:
        """Return a tracer; where it is another's than ours, Langfuse's client listens before."""
        if self.client_to_come is not None and instrumenting_module_name == LANGFUSE_SDK:
            self.client_to_come.give_up()  # the app makes one, of an import that began before ours could be seen
        elif self.client_to_come is not None and instrumenting_module_name != SCOPE_NAME:
            self.client_to_come.make()
        return super().get_tracer(instrumenting_module_name, instrumenting_library_version, schema_url, attributes)


def is_needed_at_once(provider: Any) -> bool:
    """Tell whether Langfuse's client is not to wait: the app uses its SDK, instruments itself, or has a provider."""
    return not isinstance(provider, trace.ProxyTracerProvider) or any(name in sys.modules for name in _SIGNS)
