"""Other tracers, where they are installed: `make bench` has them in an environment of its own (group `bench`)."""

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from _sink import Sink
from langchain_core.callbacks import BaseCallbackHandler


class Peer(NamedTuple):
    """Another tracer: its handler, what sends what it holds, and whose it is at the sink."""

    name: str
    handler: BaseCallbackHandler
    drain: Callable[[], Any]
    at_sink: str


def provider_to(url: str) -> Any:
    """Return a plain OpenTelemetry provider, with OpenTelemetry's own exporter and batches."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{url}/v1/traces")))
    return provider


def openinference(sink: Sink) -> Peer:
    """OpenInference's tracer for LangChain on a plain OpenTelemetry provider."""
    from openinference.instrumentation.langchain import LangChainInstrumentor

    # Of a long history it has more attributes than a span takes, and each too many is a line of the log.
    logging.getLogger("opentelemetry.attributes").setLevel(logging.ERROR)
    provider = provider_to(sink.url("openinference"))
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument(tracer_provider=provider, separate_trace_from_runtime_context=True)
    tracer = instrumentor._tracer  # it would hear every graph of the process; here it is to hear its own only
    instrumentor.uninstrument()
    return Peer("OpenInference's LangChain tracer", tracer, provider.force_flush, "openinference")


def langsmith(sink: Sink) -> Peer:
    """LangSmith's tracer."""
    from langchain_core.tracers.langchain import LangChainTracer
    from langsmith import Client

    client = Client(api_url=sink.url("langsmith"), api_key="lsv2_none")
    return Peer("LangSmith's tracer", LangChainTracer(client=client), client.flush, "langsmith")


def opik(sink: Sink) -> Peer:
    """Opik's tracer, as with a server of one's own: without an account; what it reports of itself is off."""
    os.environ |= {
        "OPIK_URL_OVERRIDE": f"{sink.url('opik')}/",
        "OPIK_SENTRY_ENABLE": "false",
        "OPIK_ANALYTICS_ENABLE": "false",
        "LITELLM_LOCAL_MODEL_COST_MAP": "true",
    }
    from opik.integrations.langchain import OpikTracer

    tracer = OpikTracer()
    return Peer("Opik's tracer", tracer, tracer.flush, "opik")


def found(sink: Sink) -> tuple[list[Peer], list[str]]:
    """Return those that are installed, and why others are not there."""
    peers, missing = [], []
    for make in (openinference, langsmith, opik):
        try:
            peers.append(make(sink))
        except ImportError as error:
            missing.append(f"{make.__name__} is left out: {error}.")
    return peers, missing
