"""Other tracers beside Langfuse's, where they are installed: `pip install --group bench`."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from langchain_core.callbacks import BaseCallbackHandler
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

SINK = """
import http.server, sys
class Sink(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(202)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    do_GET = do_POST = do_PATCH = answer
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sink)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


class Peer(NamedTuple):
    """Another tracer: its handler, and what sends what it holds."""

    name: str
    handler: BaseCallbackHandler
    drain: Callable[[], Any]


def openinference(exporter: SpanExporter) -> Peer | None:
    """OpenInference's tracer for LangChain on a plain OpenTelemetry provider."""
    try:
        from openinference.instrumentation.langchain import LangChainInstrumentor
    except ImportError:
        return None
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument(tracer_provider=provider, separate_trace_from_runtime_context=True)
    tracer = instrumentor._tracer  # it would hear every graph of the process; here it is to hear its own only
    instrumentor.uninstrument()
    return Peer("OpenInference's LangChain tracer", tracer, provider.force_flush)


@contextmanager
def langsmith() -> Iterator[Peer | None]:
    """LangSmith's tracer, to a sink on loopback in a process of its own."""
    try:
        from langchain_core.tracers.langchain import LangChainTracer
        from langsmith import Client
    except ImportError:
        yield None
        return
    with subprocess.Popen([sys.executable, "-c", SINK], stdout=subprocess.PIPE, text=True) as sink:
        try:
            assert sink.stdout is not None
            client = Client(api_url=f"http://127.0.0.1:{sink.stdout.readline().strip()}", api_key="lsv2_none")
            yield Peer("LangSmith's tracer", LangChainTracer(client=client), client.flush)
        finally:
            sink.kill()
