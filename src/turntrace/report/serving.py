"""The report as a page on this machine, made anew whenever it is loaded."""

import logging
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import parse_qs, urlsplit

from turntrace.analytics import ALL, Filters
from turntrace.errors import ConfigurationError, IdentityError, TurntraceError
from turntrace.ledger import Ledger
from turntrace.report.collect import collect
from turntrace.report.filtering import filters_of, with_whole_user
from turntrace.report.langfuse import LangfusePlace
from turntrace.report.markup import element
from turntrace.report.page import policy, render
from turntrace.report.words import visible

logger = logging.getLogger("turntrace")

LOOPBACK: Final = "127.0.0.1"
REFRESH_S: Final = 30.0
_NAMES: Final = (LOOPBACK, "localhost")
_MOST_FIELDS: Final = 50


class ReportServer:
    """A server of the report, on this machine only.

    Args:
        ledger: The ledger.
        filters: What holds where the address says nothing else.
        port: Its port; 0 for one that is free.
        langfuse: Where sessions are in Langfuse; None for no links.
        refresh_s: Seconds after which the page loads itself again; 0 for never.
        clock: Gives the time in nanoseconds since 1970.

    Raises:
        ConfigurationError: If the port cannot be used, or plotly is not installed.
    """

    def __init__(
        self,
        ledger: Ledger,
        filters: Filters = ALL,
        *,
        port: int = 0,
        langfuse: LangfusePlace | None = None,
        refresh_s: float = REFRESH_S,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        policy(is_served=True)  # says that plotly is missing before anybody opens the page
        self._ledger = ledger
        self._filters = filters
        self._langfuse = langfuse
        self._refresh_s = refresh_s
        self._clock = clock
        self._making = threading.Lock()
        try:
            self._server = _Server((LOOPBACK, port), self.page)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ConfigurationError(
                f"The report cannot be served on port {port}: {why}. Pass another one, or 0 for one that is free."
            ) from error

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{LOOPBACK}:{self._server.server_address[1]}/"

    def page(self, query: str) -> str:
        """Return the page for a query string, with figures as they are now.

        Raises:
            ConfigurationError: If its filters cannot be used.
            IdentityError: If it names a user of whom nothing is on record.
            LedgerError: If the ledger cannot be read.
        """
        try:
            asked = parse_qs(query, keep_blank_values=True, max_num_fields=_MOST_FIELDS)
        except ValueError:
            raise ConfigurationError(f"The address has too many fields. Allowed are {_MOST_FIELDS}.") from None
        filters = filters_of(asked, self._filters)
        if "user" in asked:
            filters = with_whole_user(filters, self._ledger)
        with self._making:  # one page at a time: each asks in several threads
            report = collect(self._ledger, filters, now_ns=self._clock())
        return render(report, langfuse=self._langfuse, refresh_s=self._refresh_s)

    def run(self) -> None:
        """Serve until `stop` is called from another thread."""
        self._server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """Have `run` return."""
        self._server.shutdown()

    def close(self) -> None:
        """Give the port back."""
        self._server.server_close()


def serve(
    ledger: Ledger,
    filters: Filters = ALL,
    *,
    port: int = 0,
    on_ready: Callable[[ReportServer], None] = lambda server: None,
    langfuse: LangfusePlace | None = None,
    refresh_s: float = REFRESH_S,
    clock: Callable[[], int] = time.time_ns,
) -> None:
    """Serve the report on 127.0.0.1, until it is stopped or interrupted (Ctrl-C).

    Args:
        ledger: The ledger.
        filters: What holds where the address says nothing else.
        port: Its port; 0 for one that is free.
        on_ready: Is told the server once it answers: its ``url``, and ``stop()`` for another thread.
        langfuse: Where sessions are in Langfuse; None for no links.
        refresh_s: Seconds after which the page loads itself again; 0 for never.
        clock: Gives the time in nanoseconds since 1970.

    Raises:
        ConfigurationError: If the port cannot be used, or plotly is not installed.
    """
    server = ReportServer(ledger, filters, port=port, langfuse=langfuse, refresh_s=refresh_s, clock=clock)
    try:
        on_ready(server)
        server.run()
    finally:
        server.close()


class _Server(ThreadingHTTPServer):
    """A server whose clients may go away in the middle of an answer."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], page: Callable[[str], str]) -> None:
        self.page = page
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        logger.debug("turntrace: an answer of the report's server came to nothing", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "turntrace"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        self._answer(*self._found())

    def do_HEAD(self) -> None:
        self._answer(*self._found(), with_body=False)

    def _found(self) -> tuple[HTTPStatus, str]:
        host = urlsplit(f"//{self.headers.get('Host', LOOPBACK)}").hostname
        if host not in _NAMES:  # a page of another site that made its name mean this machine
            return HTTPStatus.MISDIRECTED_REQUEST, _words("This page is served on this machine only.")
        path, _, query = self.path.partition("?")
        if path != "/":
            return HTTPStatus.NOT_FOUND, _words("There is nothing at this address: the report is at /.")
        try:
            return HTTPStatus.OK, self.server.page(query)
        except (ConfigurationError, IdentityError) as error:
            return HTTPStatus.BAD_REQUEST, _words(str(error))
        except TurntraceError as error:
            logger.warning("turntrace: the report could not be made: %s", error)
            return HTTPStatus.INTERNAL_SERVER_ERROR, _words(str(error))

    def _answer(self, status: HTTPStatus, page: str, *, with_body: bool = True) -> None:
        body = page.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", policy(is_served=True) + "; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug("turntrace: the report's server: " + format, *args)


def _words(text: str) -> str:
    """Return a page that says one thing."""
    body = element("body", element("p", visible(text)), element("p", element("a", "The report", href="/")))
    head = element("head", element("meta", charset="utf-8"), element("title", "turntrace"))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
