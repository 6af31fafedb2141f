"""A Langfuse server over HTTP: what is sent to it, what it answers, and what can be read back."""

import base64
import gzip
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context

from turntrace.errors import DeliveryError
from turntrace.forking import importing
from turntrace.settings import LangfuseSettings

if TYPE_CHECKING:
    import httpx

_GZIP_LEVEL: Final = 1  # a tenth of the size for a sixth of the time of the highest
_WORDS_LENGTH: Final = 300
_OBSERVATIONS_A_PAGE: Final = 1000
_SCORES_A_PAGE: Final = 100
_SOME_REFUSED: Final = 207
"""Of scores sent as an array some were not taken; each by itself then says which and why."""
_NOT_INSTRUMENTED: Final = "suppress_instrumentation"
"""The key by which OpenTelemetry's instrumentations know that a request is not the app's."""


class Outcome(Enum):
    """What an answer means for what was sent."""

    ACCEPTED = "accepted"
    LATER = "later"
    TOO_LARGE = "too large"
    REFUSED = "refused"
    CLOSED = "closed"


_MEANINGS: Final = {408: Outcome.LATER, 413: Outcome.TOO_LARGE, 429: Outcome.LATER} | dict.fromkeys(
    (_SOME_REFUSED, 400, 422), Outcome.REFUSED
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request.

    Attributes:
        outcome: What it means.
        words: The status and what the server said, or why there is no answer.
        retry_after_s: Seconds that the server asks to wait; 0 when it says nothing.
    """

    outcome: Outcome
    words: str = ""
    retry_after_s: float = 0.0


class LangfuseServer:
    """A Langfuse server, as its keys and URL say. May be used by several threads.

    Args:
        settings: The settings of Langfuse's SDK; they must hold keys.
    """

    def __init__(self, settings: LangfuseSettings) -> None:
        secret = settings.secret_key.get_secret_value() if settings.secret_key is not None else ""
        keys = base64.b64encode(f"{settings.public_key}:{secret}".encode("utf-8", "replace")).decode("ascii")
        self.url = settings.server
        self.timeout_s = settings.timeout
        self._spans_url = f"{self.url}/{settings.otel_traces_export_path.lstrip('/')}"
        self._headers = {
            "Authorization": f"Basic {keys}",
            "x-langfuse-sdk-name": "turntrace",
            "x-langfuse-sdk-version": version("turntrace"),
            "x-langfuse-public-key": str(settings.public_key).encode("ascii", "replace").decode(),  # it takes no others
        }
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()

    # --- sending ------------------------------------------------------------------------------------------------------
    def post_spans(self, body: bytes) -> Answer:
        """Send spans.

        Args:
            body: An OTLP ``ExportTraceServiceRequest`` in protobuf.
        """
        headers = {
            "Content-Type": "application/x-protobuf",
            "Content-Encoding": "gzip",
            "x-langfuse-ingestion-version": "4",
        }
        return self._post(self._spans_url, gzip.compress(body, _GZIP_LEVEL, mtime=0), headers)

    def post_scores(self, body: bytes) -> Answer:
        """Send one score as a JSON object, or several as an array."""
        return self._post(f"{self.url}/api/public/scores", body, {"Content-Type": "application/json"})

    def _post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        try:
            response = self._request("POST", url, content=body, headers=headers)
        except _no_answer() as error:
            return Answer(Outcome.LATER, _shown(f"{type(error).__name__}: {error}"))
        return _read_answer(response)

    def _request(self, method: str, url: str, **request: Any) -> "httpx.Response":
        token = context.attach(context.set_value(_NOT_INSTRUMENTED, True))
        try:
            return self._open().request(method, url, **request)
        finally:
            context.detach(token)

    def _open(self) -> "httpx.Client":
        with self._lock:
            if self._client is None:
                with importing():  # the client imports what it needs, too
                    import httpx

                    self._client = httpx.Client(headers=self._headers, timeout=self.timeout_s)
            return self._client

    def close(self) -> None:
        """Close the connections; another request opens them again."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def after_fork(self) -> None:
        """Leave the connections to the process that was forked."""
        self._lock = threading.Lock()
        self._client = None

    # --- reading back -------------------------------------------------------------------------------------------------
    def health(self) -> tuple[str, float]:
        """Return the version of the server, and by how many seconds its clock is ahead of this machine's.

        Raises:
            DeliveryError: If there is no answer, or not that of a Langfuse.
        """
        before = time.time()
        response = self._get("/api/public/health", {})
        said = _time_of(response.headers.get("Date"))
        # Its clock is told in whole seconds: the middle of that second against the middle of the request.
        there = before if said is None else said + 0.5
        try:
            return _shown(str(response.json()["version"])), there - (before + time.time()) / 2
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DeliveryError(
                f"What answers at {self.url} is not a Langfuse. Set LANGFUSE_BASE_URL to its address, "
                f"as {self.url.split('//')[0]}//localhost:3000."
            ) from None

    def project(self) -> str:
        """Return the name of the project that the keys open.

        Raises:
            DeliveryError: If the keys open none, or there is no answer.
        """
        found = self._rows("/api/public/projects", {})
        return _shown(str(found[0].get("name") or found[0].get("id"))) if found else "without a name"

    def project_id(self) -> str | None:
        """Return the id of the project that the keys open, which stands in the address of its pages; None without one.

        Raises:
            DeliveryError: If the keys open none, or there is no answer.
        """
        found = self._rows("/api/public/projects", {})
        return str(found[0]["id"]) if found and found[0].get("id") else None

    def metrics(self, query: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows that ``GET /api/public/v2/metrics`` answers a query with.

        Args:
            query: The query, as Langfuse's API documents it.

        Raises:
            DeliveryError: If it is not answered.
        """
        return self._rows("/api/public/v2/metrics", {"query": json.dumps(query)})

    def observations(self, session_id: str) -> Iterator[dict[str, Any]]:
        """Give the observations of a session, as ``GET /api/public/v2/observations`` returns them.

        Raises:
            DeliveryError: If they cannot be read.
        """
        mine = [{"type": "string", "column": "sessionId", "operator": "=", "value": session_id}]
        fields = "core,basic,time,metadata,model,usage,metrics"
        asked = {"fields": fields, "filter": json.dumps(mine), "limit": _OBSERVATIONS_A_PAGE}
        return self._pages("/api/public/v2/observations", asked)

    def scores(self, *, session_id: str | None = None, trace_id: str | None = None) -> Iterator[dict[str, Any]]:
        """Give the scores of a session, or of a turn's trace, as ``GET /api/public/v3/scores`` returns them.

        Raises:
            DeliveryError: If they cannot be read.
        """
        subject = {"sessionId": session_id} if trace_id is None else {"traceId": trace_id}
        return self._pages(
            "/api/public/v3/scores", {**subject, "fields": "core,subject,details", "limit": _SCORES_A_PAGE}
        )

    def _pages(self, path: str, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        cursors: list[str] = []
        while True:
            page = self._json(path, {**asked, "cursor": cursors[-1]} if cursors else asked)
            yield from self._rows_in(page, path)
            meta = page.get("meta")
            cursor = meta.get("cursor") if isinstance(meta, dict) else None
            if not cursor:
                return
            if not isinstance(cursor, str) or cursor in cursors:
                raise DeliveryError(f"{self.url}{path} gives the same page again and again: is it a Langfuse?")
            cursors.append(cursor)

    def _rows(self, path: str, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
        return self._rows_in(self._json(path, asked), path)

    def _rows_in(self, page: Any, path: str) -> list[dict[str, Any]]:
        rows = page.get("data") if isinstance(page, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DeliveryError(f"{self.url}{path} does not answer as a Langfuse. Check LANGFUSE_BASE_URL.")
        return rows

    def _json(self, path: str, asked: Mapping[str, Any]) -> Any:
        try:
            return self._get(path, asked).json()
        except (ValueError, RecursionError):
            raise DeliveryError(f"{self.url}{path} does not answer in JSON: is it a Langfuse?") from None

    def _get(self, path: str, asked: Mapping[str, Any]) -> "httpx.Response":
        try:
            response = self._request("GET", f"{self.url}{path}", params=asked)
        except _no_answer() as error:
            raise DeliveryError(
                f"Langfuse at {self.url} cannot be reached ({type(error).__name__}: {_shown(str(error))}). "
                "Check LANGFUSE_BASE_URL and the network."
            ) from error
        answer = _read_answer(response)
        if answer.outcome is not Outcome.ACCEPTED:
            raise DeliveryError(f"Langfuse at {self.url} answers {path} with {answer.words}.")
        return response


def _no_answer() -> tuple[type[Exception], ...]:
    """Return the errors that mean that no answer came, or none that can be read."""
    import httpx

    # A name of a host that cannot be one (http://a..b) comes as an error of its encoding.
    return httpx.TransportError, httpx.InvalidURL, httpx.DecodingError, UnicodeError


def several(scores: Sequence[bytes]) -> bytes:
    """Return scores as one JSON array."""
    return b"[" + b",".join(scores) + b"]"


def _read_answer(response: "httpx.Response") -> Answer:
    status = response.status_code
    is_page = response.headers.get("Content-Type", "").lower().startswith("text/html")
    if response.is_success and status != _SOME_REFUSED and not is_page:
        return Answer(Outcome.ACCEPTED)
    if response.is_success and is_page:  # a portal's, or a sign-in's: nothing was taken
        return Answer(Outcome.CLOSED, f"{status} with a web page: this is not Langfuse's API")
    outcome = _MEANINGS.get(status, Outcome.LATER if status >= 500 else Outcome.CLOSED)
    words = _shown(f"{status}: {response.content[: 4 * _WORDS_LENGTH].decode('utf-8', 'replace')}")
    return Answer(outcome, words, _seconds(response.headers.get("Retry-After")))


def _shown(words: str) -> str:
    """Return what a stranger said as a log or a terminal can show it: in one line, without codes, not too long."""
    line = " ".join(words[: 4 * _WORDS_LENGTH].split())
    return "".join(each if each.isprintable() else "\ufffd" for each in line)[:_WORDS_LENGTH]


def _seconds(retry_after: str | None) -> float:
    """Read ``Retry-After``: seconds, or a date."""
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        until = _time_of(retry_after)
        return 0.0 if until is None else max(0.0, until - time.time())


def _time_of(date: str | None) -> float | None:
    """Return a date of HTTP in seconds since 1970, or None where it is none."""
    try:
        return None if date is None else parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        return None
