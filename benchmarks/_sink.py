"""A server on loopback that takes what every tracer sends, in a process of its own, and counts it when asked.

It stands for Langfuse, LangSmith, Opik and any OpenTelemetry backend. The first part of a path says whose it is. What
comes is put aside and is looked into when its figures are asked for, which no clock sees.
"""

import email
import gzip
import json
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx

SESSION = "session.id"
LANGSMITH_SESSION = ("session_id", "thread_id", "conversation_id")
"""The metadata by any of which LangSmith puts runs into a thread."""
MOST_WAITING = 64_000_000
INFO = {"version": "0.13.0", "instance_flags": {"zstd_compression_enabled": True}}
"""What LangSmith's client asks its server first."""


@dataclass
class Counts:
    """What came since it was last asked.

    Attributes:
        requests: How many requests.
        wire_bytes: Their bodies as they came, mostly compressed.
        bytes: Their bodies, unpacked.
        spans: The spans (runs, for LangSmith; traces and spans, for Opik).
        with_session: Those that carry their session.
    """

    requests: int = 0
    wire_bytes: int = 0
    bytes: int = 0
    spans: int = 0
    with_session: int = 0


class Sink:
    """The server, as a block: its process begins and ends with it."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._url = self._process.stdout.readline().strip()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def url(self, whose: str) -> str:
        """Return the address for someone's data."""
        return f"{self._url}/{whose}"

    def counts(self, whose: str) -> Counts:
        """Return what came from someone since the last time."""
        return Counts(**httpx.get(f"{self._url}/counts/{whose}", timeout=120).json())


# --- the process ------------------------------------------------------------------------------------------------------
Body = tuple[str, str, str, bytes]
_waiting: dict[str, list[Body]] = {}
_counted: dict[str, Counts] = {}
_lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        whose, _, path = self.path.strip("/").partition("/")
        if whose == "counts":
            self._answer(asdict(_take(path)))
        else:
            self._answer(INFO if path.startswith("info") else {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        whose, _, path = self.path.strip("/").partition("/")
        kind, encoding = self.headers.get("Content-Type", ""), self.headers.get("Content-Encoding", "")
        with _lock:
            waiting = _waiting.setdefault(whose, [])
            waiting.append((path, kind, encoding, body))
            if sum(len(each[3]) for each in waiting) > MOST_WAITING:
                _count(whose)
        self._answer({}, 202 if path.startswith("runs") else 200)

    def do_PATCH(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def _answer(self, said: Any, status: int = 200) -> None:
        content = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _take(whose: str) -> Counts:
    with _lock:
        _count(whose)
        return _counted.pop(whose, Counts())


def _count(whose: str) -> None:
    counts = _counted.setdefault(whose, Counts())
    for path, kind, encoding, body in _waiting.pop(whose, []):
        plain = _unpacked(body, encoding)
        carries = list(_carries_session(path, kind, plain))
        counts.requests += 1
        counts.wire_bytes += len(body)
        counts.bytes += len(plain)
        counts.spans += len(carries)
        counts.with_session += sum(carries)


def _unpacked(body: bytes, encoding: str) -> bytes:
    if encoding == "gzip":
        return gzip.decompress(body)
    if encoding == "deflate":
        return zlib.decompress(body)
    if encoding == "zstd":
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(body)
    return body


def _carries_session(path: str, kind: str, body: bytes) -> Iterator[bool]:
    """Yield for each span in a body whether it carries its session."""
    if kind.startswith("application/x-protobuf"):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    yield any(each.key == SESSION and each.value.string_value for each in span.attributes)
    elif path.startswith("runs/multipart"):
        yield from _langsmith_runs(kind, body)
    elif path.endswith(("traces/batch", "spans/batch")):  # Opik: the trace has the thread, its spans have not
        for each in next(iter(json.loads(body).values())):
            yield bool(each.get("thread_id"))


def _langsmith_runs(kind: str, body: bytes) -> Iterator[bool]:
    """Yield for each run that begins in a multipart body; what it is about comes in parts of its own."""
    runs: dict[str, bool] = {}
    message = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
    for part in message.get_payload():
        verb, run, *field = str(part.get_param("name", header="Content-Disposition")).split(".")
        if verb == "post":
            runs.setdefault(run, False)
            if field in ([], ["extra"]):
                said = json.loads(part.get_payload(decode=True))
                metadata = (said if field else said.get("extra") or {}).get("metadata") or {}
                runs[run] = runs[run] or any(metadata.get(name) for name in LANGSMITH_SESSION)
    yield from runs.values()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # until the benchmark is gone, however it went
