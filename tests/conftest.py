"""What all tests share: errors of ours are raised, nothing leaks in from the machine, and nothing is left behind."""

import logging
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from langfuse import Langfuse
from langfuse._client.resource_manager import LangfuseResourceManager
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from turntrace import boundary
from turntrace.export.later import OwnProvider
from turntrace.testing import Capture, Clock, Ids

# A shell that runs the tests in the background has them ignore Ctrl-C, and so the processes that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


AIRLINE = Path(__file__).parents[1].parent / "shared" / "data" / "conversations" / "airline.jsonl"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write half a surrogate pair, which tests of bad input make and libraries log, so that a worker can tell it."""
    report = yield
    report.sections = [(name, _as_utf_8(text)) for name, text in report.sections]
    if report.failed:
        report.longrepr = _as_utf_8(whole) if "\\ud" in ascii(whole := str(report.longrepr)) else report.longrepr
    return report


def _as_utf_8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@pytest.fixture(scope="session")
def airline() -> Path:
    """Return the file of the 100 recorded conversations; without it a test is skipped, and in CI it fails."""
    if not AIRLINE.exists():
        reason = "the recorded conversations (../shared/data) are not on this machine"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return AIRLINE


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("TURNTRACE_", "LANGFUSE_", "OTEL_", "LANGSMITH_", "LANGCHAIN_")):
            monkeypatch.delenv(name)
    # No test reads or writes the ledger of whoever runs them.
    monkeypatch.setenv("TURNTRACE_LEDGER_URL", f"sqlite:///{tmp_path / 'default-ledger.db'}")


class _Errors(logging.Handler):
    """Keeps what turntrace logs as an error: its threads cannot raise into a test."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter().format(record))


@pytest.fixture(autouse=True)
def _strict(request: pytest.FixtureRequest) -> Iterator[None]:
    """Raise errors of ours, unless the test asks for the fixture `lenient`."""
    if "lenient" in request.fixturenames:
        yield
        return
    errors, logger = _Errors(), logging.getLogger("turntrace")
    logger.addHandler(errors)
    try:
        with boundary.strict():
            yield
    finally:
        logger.removeHandler(errors)
    assert not errors.lines, "turntrace logged an error in a thread of its own:\n" + "\n".join(errors.lines)


@pytest.fixture
def lenient(_clean_environment: None) -> Iterator[None]:
    """Catch and log errors of ours, as in production; what was counted before is forgotten."""
    boundary.failures.clear()
    yield
    boundary.failures.clear()


@pytest.fixture(autouse=True)
def _nothing_stays_current() -> Iterator[None]:
    yield
    left = trace.get_current_span()
    otel_context.attach(Context())  # for the tests after this one
    assert not left.get_span_context().is_valid, "the test left a span current"


@pytest.fixture
def capture() -> Iterator[Capture]:
    """Catch the spans of trackers made with ``capture.tracker()``."""
    with Capture() as catching:
        yield catching


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ids() -> Ids:
    return Ids()


@pytest.fixture
def langfuse_client(capture: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Langfuse:
    """Give the one Langfuse client of the process, on the capture's provider: ``@observe`` finds it by itself."""
    # Its two HTTP clients, which send nothing here, would read the certificates of the machine for 50 ms.
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    return Langfuse(
        public_key="pk-lf-test",
        secret_key="sk-lf-test",
        tracer_provider=capture.provider,
        span_exporter=InMemorySpanExporter(),
    )


@pytest.fixture(autouse=True)
def _what_langfuses_client_sets_for_the_process_is_taken_back() -> Iterator[None]:
    """Take back what a client with keys set: a provider, through which later tests would send, and handlers of logs."""
    handlers = list(logging.getLogger().handlers)
    yield
    provider = trace._TRACER_PROVIDER
    if provider is not None and not (isinstance(provider, OwnProvider) and not provider.has_keys):
        trace._TRACER_PROVIDER = None
        trace._TRACER_PROVIDER_SET_ONCE._done = False
    for handler in logging.getLogger().handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in handlers:
            logging.getLogger().removeHandler(handler)


@pytest.fixture(autouse=True)
def _no_client_is_left() -> Iterator[None]:
    """Forget the clients of Langfuse's that a test made: there is one for a key in a process."""
    yield
    LangfuseResourceManager.reset()
