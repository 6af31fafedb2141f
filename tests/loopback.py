"""A server on loopback that speaks what Langfuse speaks, and can be told to fail.

It answers as a real server 4.16 was recorded to, and keeps what it is sent. ``python tests/loopback.py`` serves
in a process of its own, prints its URL and goes on until it is killed.
"""

import argparse
import base64
import gzip
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from google.protobuf.message import DecodeError

from loopback_answers import NO_JSON, NOT_HERE, WRONG_KEYS, BadRequestError, job_of
from loopback_store import Span, Store, decode

PUBLIC_KEY, SECRET_KEY = "pk-lf-test", "sk-lf-test"
OTHER_PUBLIC_KEY = "pk-lf-other"
"""Another key of the same project: Langfuse's client is one for a key in a process."""
_KEYS = {
    "Basic " + base64.b64encode(f"{public}:{SECRET_KEY}".encode()).decode() for public in (PUBLIC_KEY, OTHER_PUBLIC_KEY)
}
VERSION = "4.16.0"
OTLP, SCORES = "/api/public/otel/v1/traces", "/api/public/scores"
Answer = tuple[int, Any]

_used: set[int] = set()
"""The ports of servers that were, which no other one gets: what a client found out of a server, it knows by its URL."""


@dataclass(frozen=True)
class Failure:
    """A way to fail.

    Attributes:
        kind: ``status``; ``timeout``: no answer; ``reset``: the connection is cut while the request is read; ``half``:
            it is cut in the middle of the answer; ``lost``: the request is taken and what it brings is stored, then the
            connection is cut before the answer, so that the client cannot know that it arrived.
        status: The status to answer with.
        body: What to say.
        headers: Headers of the answer.
    """

    kind: str
    status: int = 500
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request that came, and the status that it was answered with; 0 when it was not."""

    at: float
    method: str
    path: str
    status: int
    headers: dict[str, str]
    size: int
    spans: int = 0


class LangfuseServer:
    """The server.

    Args:
        port: Its port; 0 for a free one, which it keeps when it is stopped and started again.
        score_arrays: Whether it takes scores as an array, as SDK 5 sends them and 4.16 does not (F10).
        version: The version that it says it has.

    Attributes:
        requests: What came, in order.
        refuses: Answers 400 to spans of which it is true of one.
        max_bytes: Answers 413 to larger requests, uncompressed.
        clock_skew_s: By how much its clock is ahead.
        in_flight_max: How many requests with spans were there at the same time, at most.
    """

    public_key, secret_key = PUBLIC_KEY, SECRET_KEY

    def __init__(self, port: int = 0, *, score_arrays: bool = False, version: str = VERSION) -> None:
        self._port = port
        self.score_arrays = score_arrays
        self.version = version
        self.store = Store()
        self.requests: list[Request] = []
        self.refuses: Callable[[Span], bool] | None = None
        self.max_bytes = 1 << 60
        self.clock_skew_s = 0.0
        self.in_flight = self.in_flight_max = 0
        self._failures: list[tuple[Failure, str | None, int]] = []
        self._held = threading.Event()
        self._lock = threading.Lock()
        self._http: _Http | None = None

    # --- its life -----------------------------------------------------------------------------------------------------
    def start(self) -> Self:
        """Serve, on the port that it had."""
        self._held.clear()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _Http(("127.0.0.1", self._port), handler)
        while self._port == 0 and self._http.server_address[1] in _used:
            self._http.server_close()
            self._http = _Http(("127.0.0.1", 0), handler)
        self._port = self._http.server_address[1]
        _used.add(self._port)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Serve no more: connections are refused. What it was sent it keeps."""
        self._held.set()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http.cut()
            self._http = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def keys(self) -> dict[str, str]:
        """The variables by which an app finds it."""
        return {
            "LANGFUSE_PUBLIC_KEY": PUBLIC_KEY,
            "LANGFUSE_SECRET_KEY": SECRET_KEY,
            "LANGFUSE_BASE_URL": self.url,
        }

    # --- failing ------------------------------------------------------------------------------------------------------
    def fail(self, failure: Failure, *, times: int = 1 << 30, path: str | None = None) -> None:
        """Fail so many times, at requests whose path holds a text."""
        with self._lock:
            self._failures.append((failure, path, times))

    def recover(self) -> None:
        """Fail no more."""
        with self._lock:
            self._failures.clear()
        self._held.set()

    def next_failure(self, path: str) -> Failure | None:
        """Return how to fail at a request, or None."""
        with self._lock:
            for number, (failure, part, times) in enumerate(self._failures):
                if part is None or part in path:
                    self._failures[number : number + 1] = [(failure, part, times - 1)] if times > 1 else []
                    return failure
        return None

    def hold(self) -> None:
        """Wait until it recovers or stops."""
        self._held.clear()
        self._held.wait(60)

    # --- what came ----------------------------------------------------------------------------------------------------
    def spans(self) -> list[Span]:
        """Return the spans, each once, as it came last."""
        return self.store.spans()

    def scores(self) -> dict[str, dict[str, Any]]:
        """Return the scores by id, each as it came last."""
        return dict(self.store.scores)

    def note(self, request: Request) -> None:
        """Note a request."""
        with self._lock:
            self.requests.append(request)

    def count(self, change: int) -> None:
        """Note that a request with spans began or ended."""
        with self._lock:
            self.in_flight += change
            self.in_flight_max = max(self.in_flight_max, self.in_flight)


class _Http(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that goes is none of ours."""

    def cut(self) -> None:
        """Cut the connections that are open."""
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class _Handler(BaseHTTPRequestHandler):
    owner: LangfuseServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *_args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Take spans or scores."""
        at = time.time()
        path = urlsplit(self.path).path
        is_otlp = path == OTLP
        if is_otlp:
            self.owner.count(+1)
        try:
            failure = self.owner.next_failure(path)
            length = int(self.headers.get("Content-Length", 0))
            if failure is not None and failure.kind == "reset":
                self.rfile.read(min(length, 10))
                self._note(at, 0, length)
                self._reset()
                return
            body = self.rfile.read(length)
            if failure is not None and failure.kind != "lost":
                self._fail(failure, at, length)
                return
            answer, spans = self._take_spans(body) if is_otlp else (self._take_scores(path, body), 0)
            if failure is not None:
                self._note(at, 0, length, spans)
                self._reset()
                return
            self._note(at, answer[0], length, spans)
            self._answer(*answer)
        finally:
            if is_otlp:
                self.owner.count(-1)

    def do_GET(self) -> None:
        """Answer what is asked."""
        at = time.time()
        path = urlsplit(self.path).path
        failure = self.owner.next_failure(path)
        if failure is not None:
            self._fail(failure, at, 0)
            return
        answer = self._asked(path, {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()})
        self._note(at, answer[0], 0)
        self._answer(*answer)

    # --- failing ------------------------------------------------------------------------------------------------------
    def _fail(self, failure: Failure, at: float, length: int) -> None:
        if failure.kind == "timeout":
            self._note(at, 0, length)
            self.owner.hold()
            self._reset()
            return
        self._note(at, failure.status if failure.kind == "status" else 0, length)
        if failure.kind == "lost":
            self._reset()
            return
        if failure.kind == "half":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{")
            self._reset()
            return
        self._answer(failure.status, failure.body, failure.headers)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    # --- answers ------------------------------------------------------------------------------------------------------
    def _note(self, at: float, status: int, size: int, spans: int = 0) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.owner.note(Request(at, self.command, self.path, status, headers, size, spans))

    def date_time_string(self, timestamp: float | None = None) -> str:
        """Return the time of the server's clock."""
        return formatdate((timestamp or time.time()) + self.owner.clock_skew_s, usegmt=True)

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        kind = {} if body == NO_JSON else {"Content-Type": "application/json; charset=utf-8"}
        for name, value in (kind | {"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _refused(self) -> Answer | None:
        given = self.headers.get("Authorization")
        if given is None:
            return 401, {"message": "No authorization header"}
        return None if given in _KEYS else (401, WRONG_KEYS)

    def _take_spans(self, body: bytes) -> tuple[Answer, int]:
        refused = self._refused()
        if refused is not None:
            return refused, 0
        kind = self.headers.get("Content-Type", "").partition(";")[0]
        if kind == "application/json":
            return (200, {}), 0
        if kind != "application/x-protobuf":
            return (400, {"error": "Invalid content type"}), 0
        try:
            plain = _plain(body, self.headers.get("Content-Encoding", ""))
        except (OSError, EOFError, zlib.error):
            return (400, {"error": "Failed to decompress request body"}), 0
        if len(plain) > self.owner.max_bytes:
            return (413, {"message": "Payload Too Large"}), 0
        if self.owner.refuses is not None and any(map(self.owner.refuses, decode(plain))):
            return (400, {"error": "Failed to parse OTel Protobuf Trace"}), 0
        try:
            count = self.owner.store.put_spans(plain)
        except DecodeError:
            return (400, {"error": "Failed to parse OTel Protobuf Trace"}), 0
        return (200, self._job() if count else {}), count

    def _job(self) -> dict[str, Any]:
        headers = {name.lower(): value for name, value in self.headers.items()}
        public_key = base64.b64decode(headers["authorization"].removeprefix("Basic ")).decode().partition(":")[0]
        return job_of(len(self.owner.requests) + 1, public_key, headers)

    def _take_scores(self, path: str, body: bytes) -> Answer:
        refused = self._refused()
        if refused is not None:
            return refused
        if path != SCORES:
            return 404, {"message": "Not Found"}
        try:
            given = json.loads(body, parse_constant=_no_number)
        except ValueError:
            return 400, NO_JSON
        try:
            return 200, self.owner.store.take_scores(given, arrays=self.owner.score_arrays)
        except BadRequestError as error:
            return 400, error.body

    def _asked(self, path: str, asked: dict[str, str]) -> Answer:
        if path in ("/api/public/health", "/api/public/ready"):
            return 200, {"status": "OK", "version": self.owner.version}
        if path == "/count":  # for benchmarks
            return 200, {"spans": len(self.owner.spans())}
        refused = self._refused()
        if refused is not None:
            return refused
        if path == "/api/public/projects":
            project = {"id": "local-project", "name": "Local Project", "metadata": {}}
            return 200, {"data": [{**project, "organization": {"id": "local-org", "name": "Local Org"}}]}
        reads = {
            "/api/public/v2/observations": self.owner.store.observations,
            "/api/public/v3/scores": self.owner.store.read_scores,
        }
        if path not in reads:
            return 404, NOT_HERE
        try:
            return 200, reads[path](asked)
        except BadRequestError as error:
            return 400, error.body


def _plain(body: bytes, encoding: str) -> bytes:
    if encoding == "gzip":
        return gzip.decompress(body)
    return zlib.decompress(body) if encoding == "deflate" else body


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    with LangfuseServer(parser.parse_args().port) as running:
        print(running.url, flush=True)
        threading.Event().wait()
