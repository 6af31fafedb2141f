"""Where spans go: into the outbox, to a provider of the app's, or to Langfuse by its client and over HTTP."""

import base64
import gzip
import json
import logging
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from langfuse._utils.environment import common_release_envs
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Status
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import fresh
from turntrace import SessionTracker
from turntrace import attributes as a
from turntrace.export import SpanTarget, from_otlp, ids_of, open_target, to_otlp
from turntrace.ledger import Ledger
from turntrace.settings import RELEASES
from turntrace.testing import CapturedSpan, Clock, assert_all_tagged, captured_spans, decoded_spans, outbox_spans

SECOND = 1_000_000_000
NAMES = ["session.start", "conversation.turn", "session.end"]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db"


@dataclass
class Request:
    """A request that came in, with its body unpacked."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """A server on loopback that takes OTLP as Langfuse's does, and keeps what came."""

    url: str = ""
    status: int = 200
    requests: list[Request] = field(default_factory=list)

    def traces(self) -> list[Request]:
        return [request for request in self.requests if request.path == "/api/public/otel/v1/traces"]

    def spans(self) -> list[CapturedSpan]:
        return [span for request in self.traces() for span in decoded_spans(request.body)]

    def resources(self) -> list[ResourceSpans]:
        return [each for request in self.traces() for each in from_otlp(request.body).resource_spans]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            if headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            made.requests.append(Request(self.path, headers, body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(made.status)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST  # noqa: N815 - the name is http.server's

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    http.shutdown()
    thread.join()
    http.server_close()


def run(script: str, url: str, **variables: str) -> str:
    """Run a script in a process of its own: OpenTelemetry's provider and Langfuse's client are one for a process."""
    return fresh.run(script, TURNTRACE_LEDGER_URL=url, **variables)


def keys(server: Server) -> dict[str, str]:
    return {"LANGFUSE_PUBLIC_KEY": "pk-lf-1", "LANGFUSE_SECRET_KEY": "sk-lf-2", "LANGFUSE_BASE_URL": server.url}


PLAYS = """
from opentelemetry import trace
from turntrace import SessionTracker
tracker = SessionTracker()
with tracker.session(user_id="alice", session_id="mine") as session:
    with session.conversation("c1").turn("Hello") as turn:
        turn.close_step(turn.open_step("agent", "chain"))
        with trace.get_tracer("app").start_as_current_span("work"):
            pass
"""
PLAYS_AND_FLUSHES = PLAYS + "tracker.flush()\n"


def resource_of(spans: ResourceSpans) -> dict[str, Any]:
    return {pair.key: pair.value.string_value for pair in spans.resource.attributes}


def in_ledger(url: str) -> tuple[int, list[str]]:
    """Return how many turns of the session "mine" the ledger has, and the names of the spans in its outbox."""
    ledger = Ledger(url)
    session = ledger.session("mine")
    assert session is not None
    assert session.end_reason == "user_exit"
    names = [span.name for span in outbox_spans(ledger)]
    ledger.close()
    return session.total_turns, names


# --- into the outbox --------------------------------------------------------------------------------------------------
def test_without_keys_and_provider_spans_wait_in_the_outbox(url: str) -> None:
    run(PLAYS_AND_FLUSHES, url, LANGFUSE_TRACING_ENVIRONMENT="staging", LANGFUSE_RELEASE="v1.2")
    turns, names = in_ledger(url)
    assert turns == 1
    assert sorted(names) == sorted([*NAMES, "agent", "work"])
    ledger = Ledger(url)
    assert_all_tagged(outbox_spans(ledger))
    for item in (each for each in ledger.outbox() if each.kind == "spans"):
        for spans in from_otlp(item.body).resource_spans:
            resource = resource_of(spans)
            assert resource["langfuse.environment"] == "staging"
            assert resource["langfuse.release"] == "v1.2"
            assert resource["telemetry.sdk.language"] == "python"
    ledger.close()


def test_what_waits_is_otlp_with_the_times_and_ids_of_the_spans(clock: Clock) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    tracker = SessionTracker("sqlite://", tracer_provider=provider, outbox=True, clock=clock)
    start = clock.now_ns
    with tracker.session(session_id="mine") as session:
        clock.advance(seconds=1)
        with session.conversation("c1").turn("Hello") as turn:
            clock.advance(ns=1)
            step = turn.open_step("agent", "chain")
            clock.advance(seconds=2)
            turn.close_step(step, error=LookupError("secret"))
            clock.advance(seconds=3)
    tracker.flush()
    spans: dict[str, Any] = {}
    for item in (each for each in tracker.ledger.outbox() if each.kind == "spans"):
        decoded = [
            (scope, span)
            for each in from_otlp(item.body).resource_spans
            for scope in each.scope_spans
            for span in scope.spans
        ]
        assert item.items == len(decoded)
        for scope, span in decoded:
            assert scope.scope.name == "turntrace"
            spans[span.name] = span
    root, agent = spans["conversation.turn"], spans["agent"]
    assert (root.start_time_unix_nano - start, root.end_time_unix_nano - start) == (SECOND, 6 * SECOND + 1)
    assert (agent.start_time_unix_nano - start, agent.end_time_unix_nano - start) == (SECOND + 1, 3 * SECOND + 1)
    assert root.trace_id.hex() == agent.trace_id.hex() == turn.id
    assert agent.parent_span_id == root.span_id
    assert root.parent_span_id == b""
    assert agent.status.code == Status.STATUS_CODE_ERROR
    assert agent.status.message == "LookupError"
    assert root.status.code == Status.STATUS_CODE_UNSET
    assert spans["session.start"].start_time_unix_nano == start
    assert b"secret" not in b"".join(item.body for item in tracker.ledger.outbox())
    provider.shutdown()


def test_spans_survive_otlp_and_back() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("app")
    with tracer.start_as_current_span("above", attributes={"s": "ü", "i": 2**40, "f": 0.5, "b": True, "l": ["x", "y"]}):
        tracer.start_span("below").end()
    spans = exporter.get_finished_spans()
    expected = sorted(captured_spans(spans), key=lambda span: span.name)
    assert sorted(decoded_spans(to_otlp(spans)), key=lambda span: span.name) == expected
    assert decoded_spans(to_otlp([])) == []
    provider.shutdown()


# --- to a provider of the app's ---------------------------------------------------------------------------------------
@contextmanager
def providing(*processors: SpanProcessor) -> Iterator[TracerProvider]:
    provider = TracerProvider(shutdown_on_exit=False)
    for processor in processors:
        provider.add_span_processor(processor)
    yield provider
    provider.shutdown()


def play(tracker: SessionTracker) -> None:
    with tracker.session(session_id="mine") as session, session.conversation("c1").turn("Hello"):
        pass


def test_with_a_provider_of_the_apps_spans_go_there_and_not_into_the_outbox() -> None:
    exporter = InMemorySpanExporter()
    with providing(SimpleSpanProcessor(exporter)) as provider:
        tracker = SessionTracker("sqlite://", tracer_provider=provider)
        play(tracker)
        tracker.flush()
        assert sorted(span.name for span in exporter.get_finished_spans()) == sorted(NAMES)
        assert [item for item in tracker.ledger.outbox() if item.kind == "spans"] == []


def test_spans_go_to_both_where_that_is_wanted() -> None:
    exporter = InMemorySpanExporter()
    with providing(SimpleSpanProcessor(exporter)) as provider:
        tracker = SessionTracker("sqlite://", tracer_provider=provider, outbox=True)
        play(tracker)
        tracker.flush()
        assert sorted(span.name for span in exporter.get_finished_spans()) == sorted(NAMES)
        assert sorted(span.name for span in outbox_spans(tracker.ledger)) == sorted(NAMES)


def test_a_provider_that_is_set_for_the_process_is_used(url: str) -> None:
    out = run(
        """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
"""
        + PLAYS
        + """
tracker.flush()
print(sorted(span.name for span in exporter.get_finished_spans()), trace.get_tracer_provider() is provider)
""",
        url,
    )
    assert out.splitlines()[-1] == f"{sorted([*NAMES, 'agent', 'work'])} True"
    assert out.count("spans go where it sends them") == 1  # what is not durable then is said, once
    assert in_ledger(url) == (1, [])


def slowly(text: str) -> str:
    time.sleep(0.1)  # so that the thread that writes is still at it when the flush is called
    return "statement"


def test_a_flush_of_the_provider_alone_exports_the_last_turn() -> None:
    # As a serverless app does before it is frozen, with a provider that was there before the tracker.
    exporter = InMemorySpanExporter()
    batches = BatchSpanProcessor(exporter, schedule_delay_millis=600_000)
    with providing(batches) as provider:
        tracker = SessionTracker("sqlite://", tracer_provider=provider, classify=slowly)
        play(tracker)
        assert provider.force_flush()
        assert sorted(span.name for span in exporter.get_finished_spans()) == sorted(NAMES)


def test_a_flush_of_the_tracker_flushes_the_provider() -> None:
    exporter = InMemorySpanExporter()
    with providing(BatchSpanProcessor(exporter, schedule_delay_millis=600_000)) as provider:
        tracker = SessionTracker("sqlite://", tracer_provider=provider)
        play(tracker)
        assert tracker.flush()
        assert sorted(span.name for span in exporter.get_finished_spans()) == sorted(NAMES)


def test_trackers_share_a_provider() -> None:
    exporter = InMemorySpanExporter()
    with providing(SimpleSpanProcessor(exporter)) as provider:
        trackers = [SessionTracker("sqlite://", tracer_provider=provider) for _ in range(3)]
        for n, tracker in enumerate(trackers):
            with tracker.session(session_id=f"s{n}") as session, session.conversation("c").turn("Hello") as turn:
                assert ids_of(turn.root.span)[0] == turn.id
            tracker.flush()
        sessions = [span.attributes[a.SESSION_ID] for span in captured_spans(exporter.get_finished_spans())]
        assert sessions == [f"s{n}" for n in range(3) for _ in NAMES]


def test_any_number_of_trackers_may_have_used_a_provider() -> None:
    # As in an app that makes one for each request, or in a test suite.
    with providing() as provider:
        for _ in range(1_500):
            target = SpanTarget(provider, to_outbox=False)
        span = target.start_root("x", attributes={}, start_ns=1, ids=(1, 2))
        assert ids_of(span) == (f"{1:032x}", f"{2:016x}")
        below = target.start("y", attributes={}, start_ns=1, parent=trace.set_span_in_context(span))
        assert ids_of(below)[0] == f"{1:032x}"
        assert ids_of(provider.get_tracer("app").start_span("z"))[0] != f"{1:032x}"


def test_only_the_span_that_is_asked_for_gets_the_ids() -> None:
    with providing() as provider:
        target = SpanTarget(provider, to_outbox=False)
        roots = [target.start_root("x", attributes={}, start_ns=1, ids=(n, n)) for n in (1, 2)]
        below = target.start("y", attributes={}, start_ns=1, parent=trace.set_span_in_context(roots[0]))
        assert [ids_of(root)[0] for root in roots] == [f"{1:032x}", f"{2:032x}"]
        assert ids_of(below)[0] == f"{1:032x}"
        assert ids_of(below)[1] not in (f"{1:016x}", f"{2:016x}")


class Broken(SpanProcessor):
    def on_end(self, span: ReadableSpan) -> None:
        raise LookupError("secret")


def test_a_processor_of_the_apps_that_fails_does_not_lose_the_turn(lenient: None) -> None:
    with providing(Broken()) as provider:
        tracker = SessionTracker("sqlite://", tracer_provider=provider)
        play(tracker)
        assert tracker.flush(5)
        session = tracker.ledger.session("mine")
        assert session is not None
        assert (session.total_turns, session.end_reason) == (1, "user_exit")


# --- where there is nothing to export ---------------------------------------------------------------------------------
def assert_turn_is_kept(tracker: SessionTracker) -> None:
    with tracker.session(session_id="mine") as session, session.conversation("c1").turn("Hello") as turn:
        turn.close_step(turn.open_step("agent", "chain"))
    summary = session.summary()
    assert (summary.total_turns, summary.end_reason) == (1, "user_exit")
    [(kept, steps)] = tracker.ledger.turns("mine")
    assert (kept.number, kept.status, kept.input_length) == (1, "completed", 5)
    assert [step.name for step in steps] == ["agent"]
    assert [item for item in tracker.ledger.outbox() if item.kind == "spans"] == []
    assert kept.trace_id is None or int(kept.trace_id, 16) != 0, "this is the id of no trace"


def test_where_tracing_is_off_the_turn_is_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGFUSE_TRACING_ENABLED", "false")
    assert_turn_is_kept(SessionTracker("sqlite://"))


def test_where_tracing_is_off_nothing_goes_to_a_provider_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGFUSE_TRACING_ENABLED", "false")
    exporter = InMemorySpanExporter()
    with providing(SimpleSpanProcessor(exporter)) as provider:
        assert_turn_is_kept(SessionTracker("sqlite://", tracer_provider=provider))
        assert exporter.get_finished_spans() == ()


def test_where_opentelemetry_is_off_the_turn_is_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with providing() as provider:
        assert_turn_is_kept(SessionTracker("sqlite://", tracer_provider=provider, outbox=True))


def test_with_a_provider_that_makes_no_spans_the_turn_is_in_the_ledger() -> None:
    assert_turn_is_kept(SessionTracker("sqlite://", tracer_provider=trace.NoOpTracerProvider()))
    assert_turn_is_kept(SessionTracker("sqlite://", tracer_provider=trace.NoOpTracerProvider(), outbox=True))


def test_what_is_not_sampled_is_in_the_ledger_and_not_in_the_outbox(url: str) -> None:
    out = run(PLAYS + "print(session.summary().total_turns)", url, LANGFUSE_SAMPLE_RATE="0")
    assert out.strip() == "1"
    assert in_ledger(url) == (1, [])


def test_the_row_of_a_turn_that_is_not_sampled_counts_no_spans(url: str, tmp_path: Path) -> None:
    run(PLAYS_AND_FLUSHES, url, LANGFUSE_SAMPLE_RATE="0")
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        assert connection.execute("SELECT spans FROM turntrace_turns").fetchall() == [(0,)]


def test_a_sample_is_of_whole_turns(url: str) -> None:
    script = """
from turntrace import SessionTracker
tracker = SessionTracker()
with tracker.session(session_id="mine") as session:
    for _ in range(60):
        with session.conversation("c1").turn("Hello") as turn:
            turn.close_step(turn.open_step("agent", "chain"))
"""
    run(script + "tracker.flush()", url, LANGFUSE_SAMPLE_RATE="0.5")
    turns, names = in_ledger(url)
    assert turns == 60
    assert 0 < names.count("conversation.turn") == names.count("agent") < 60


# --- to Langfuse ------------------------------------------------------------------------------------------------------
def test_with_keys_spans_go_to_langfuse_through_its_client(server: Server, url: str) -> None:
    run(
        PLAYS_AND_FLUSHES,
        url,
        **keys(server),
        LANGFUSE_TRACING_ENVIRONMENT="staging",
        LANGFUSE_RELEASE="v1.2",
    )
    spans = server.spans()
    ours = [span for span in spans if span.scope == "turntrace"]
    assert sorted(span.name for span in ours) == sorted([*NAMES, "agent"])
    assert_all_tagged(ours)
    [turn] = [span for span in ours if span.name == "conversation.turn"]
    assert turn.attributes["session.id"] == "mine"
    assert turn.attributes["turn.number"] == 1
    assert turn.trace_id == turn.attributes["turn.id"]
    secret = base64.b64encode(b"pk-lf-1:sk-lf-2").decode()
    for request in server.traces():
        assert request.headers["authorization"] == f"Basic {secret}"
        assert request.headers["content-type"] == "application/x-protobuf"
        assert request.headers["x-langfuse-ingestion-version"] == "4"
        assert request.headers["content-encoding"] == "gzip"
        assert b"alice" not in request.body
    for resource in server.resources():
        assert resource_of(resource)["langfuse.environment"] == "staging"
        assert resource_of(resource)["langfuse.release"] == "v1.2"
    assert in_ledger(url) == (1, [])


def test_with_keys_nothing_is_lost_at_an_exit_without_a_flush(server: Server, url: str) -> None:
    subprocess.run(
        [sys.executable, "-c", PLAYS],
        check=True,
        timeout=fresh.PATIENCE_S,
        env=fresh.environment(TURNTRACE_LEDGER_URL=url, **keys(server)),
    )
    assert sorted(span.name for span in server.spans() if span.scope == "turntrace") == sorted([*NAMES, "agent"])
    assert in_ledger(url) == (1, [])


@pytest.mark.parametrize("is_heard", [False, True], ids=["alone", "with a processor of the app's"])
def test_roots_are_marked_as_langfuses_sdk_marks_them(server: Server, url: str, is_heard: bool) -> None:
    hears = "from opentelemetry.sdk.trace import SpanProcessor\ntrace.get_tracer_provider().add_span_processor("
    listener = f"{hears}SpanProcessor())\n" if is_heard else ""
    run(PLAYS.replace("with tracker", f"{listener}with tracker", 1) + "tracker.flush()\n", url, **keys(server))
    marked = {span.name for span in server.spans() if span.attributes.get("langfuse.internal.is_app_root")}
    assert marked == {"session.start", "conversation.turn", "session.end"}


def test_a_flush_of_langfuses_client_alone_sends_the_last_turn(server: Server, url: str) -> None:
    slowly = PLAYS.replace("SessionTracker()", "SessionTracker(classify=lambda text: time.sleep(0.3) or 'question')")
    run("import time\n" + slowly + "from langfuse import get_client\nget_client().flush()", url, **keys(server))
    assert sorted(span.name for span in server.spans() if span.scope == "turntrace") == sorted([*NAMES, "agent"])


def test_spans_of_langfuses_own_sdk_come_beside_ours(server: Server, url: str) -> None:
    script = """
from langfuse import observe
from turntrace import SessionTracker
tracker = SessionTracker()

@observe()
def look_up():
    pass

with tracker.session(session_id="mine") as session:
    with session.conversation("c1").turn("Hello") as turn:
        look_up()
tracker.flush()
"""
    run(script, url, **keys(server))
    spans = {span.name: span for span in server.spans()}
    assert set(spans) == {*NAMES, "look_up"}
    assert spans["look_up"].parent_id == spans["conversation.turn"].span_id
    assert_all_tagged(spans.values())


def test_a_client_of_langfuse_that_the_app_has_made_is_used(server: Server, url: str) -> None:
    run("from langfuse import Langfuse\nLangfuse()\n" + PLAYS_AND_FLUSHES, url, **keys(server))
    names = [span.name for span in server.spans() if span.scope == "turntrace"]
    assert sorted(names) == sorted([*NAMES, "agent"])  # each once


def test_the_provider_of_the_apps_client_of_langfuse_is_used(server: Server, url: str) -> None:
    # Langfuse's client is one for a key: that of the app counts, with the provider that the app gave it.
    before = """
from langfuse import Langfuse
from opentelemetry.sdk.trace import TracerProvider
Langfuse(tracer_provider=TracerProvider())
"""
    run(before + PLAYS_AND_FLUSHES, url, **keys(server))
    assert sorted(span.name for span in server.spans() if span.scope == "turntrace") == sorted([*NAMES, "agent"])


def test_with_keys_and_a_provider_of_another_kind_it_is_said_where_spans_go(server: Server, url: str) -> None:
    before = "from opentelemetry import trace\ntrace.set_tracer_provider(trace.NoOpTracerProvider())\n"
    out = run(before + PLAYS_AND_FLUSHES, url, **keys(server))
    assert "NoOpTracerProvider" in out
    assert server.spans() == []
    assert in_ledger(url) == (1, [])


def test_with_keys_and_tracing_off_nothing_is_sent(server: Server, url: str) -> None:
    run(PLAYS_AND_FLUSHES, url, **keys(server), LANGFUSE_TRACING_ENABLED="false")
    assert server.spans() == []
    assert in_ledger(url) == (1, [])


def test_with_keys_and_a_sample_of_nothing_nothing_is_sent(server: Server, url: str) -> None:
    run(PLAYS_AND_FLUSHES, url, **keys(server), LANGFUSE_SAMPLE_RATE="0")
    assert [span for span in server.spans() if span.scope == "turntrace"] == []
    assert in_ledger(url) == (1, [])


def test_a_server_that_refuses_the_keys_does_not_break_the_app_and_loses_nothing(server: Server, url: str) -> None:
    server.status = 401
    out = run(PLAYS_AND_FLUSHES, url, **keys(server))
    assert server.traces()
    turns, names = in_ledger(url)
    assert (turns, sorted(names)) == (1, sorted([*NAMES, "agent", "work"]))
    assert out.count("does not let us in") == 1


def test_with_one_key_only_spans_wait_in_the_outbox(server: Server, url: str) -> None:
    run(PLAYS_AND_FLUSHES, url, LANGFUSE_PUBLIC_KEY="pk-lf-1", LANGFUSE_BASE_URL=server.url)
    assert sorted(in_ledger(url)[1]) == sorted([*NAMES, "agent", "work"])
    assert server.requests == []


def test_a_client_that_the_app_made_before_sends_by_itself_and_that_is_said_once(server: Server, url: str) -> None:
    before = "from langfuse import Langfuse\nLangfuse()\n"
    out = run(before + PLAYS_AND_FLUSHES + "SessionTracker()\n", url, **keys(server))
    assert out.count("made before the tracker") == 1
    assert "SessionTracker(outbox=True)" in out
    assert sorted(span.name for span in server.spans() if span.scope == "turntrace") == sorted([*NAMES, "agent"])
    assert in_ledger(url) == (1, [])


def test_spans_of_others_outside_of_turns_go_through_the_outbox_too(server: Server, url: str) -> None:
    server.status = 503
    script = """
from langfuse import get_client, observe
from turntrace import SessionTracker
tracker = SessionTracker()

@observe()
def nightly():
    pass

nightly()
with tracker.session(session_id="mine") as session:
    with session.conversation("c1").turn("Hello"):
        pass
get_client().flush()
"""
    run(script, url, **keys(server))
    turns, names = in_ledger(url)
    assert (turns, sorted(names)) == (1, sorted([*NAMES, "nightly"]))


def test_a_second_tracker_of_a_process_is_as_durable(server: Server, url: str, tmp_path: Path) -> None:
    server.status = 503
    other = f"sqlite:///{tmp_path}/other.db"
    run(
        f"from turntrace import SessionTracker\nSessionTracker({other!r}).shutdown()\n" + PLAYS_AND_FLUSHES,
        url,
        **keys(server),
    )
    assert sorted(in_ledger(url)[1]) == sorted([*NAMES, "agent", "work"])


def test_a_worker_that_is_forked_sends_what_it_tracks(server: Server, url: str) -> None:
    script = """
import os
from turntrace import SessionTracker
tracker = SessionTracker()  # as gunicorn --preload does it, before it forks its workers

def talk(name):
    with tracker.session(session_id=name) as session:
        with session.conversation(name).turn("Hello"):
            pass
    tracker.flush()

talk("mine")
workers = []
for number in range(3):
    pid = os.fork()
    if pid == 0:
        talk(f"worker-{number}")
        os._exit(0)
    workers.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in workers] == [0, 0, 0]
talk("again")
while tracker.ledger.to_send.waits():  # a worker may have exited while it sent what another had written
    time.sleep(0.1)
"""
    run("import time\n" + script, url, **keys(server), LANGFUSE_TIMEOUT="1")
    sessions = [span.attributes["session.id"] for span in server.spans() if span.name == "conversation.turn"]
    assert sorted(sessions) == ["again", "mine", "worker-0", "worker-1", "worker-2"]


def test_no_score_is_sent_of_a_turn_that_is_not_sampled(server: Server, url: str) -> None:
    script = """
from turntrace import SessionTracker
tracker = SessionTracker()
with tracker.session(session_id="mine") as session:
    with session.conversation("c1").turn("Hello") as turn:
        pass
    turn.feedback(True)
tracker.flush()
"""
    run(script, url, **keys(server), LANGFUSE_SAMPLE_RATE="0", LANGFUSE_TRACING_ENVIRONMENT="staging")
    scores = [json.loads(request.body) for request in server.requests if request.path == "/api/public/scores"]
    scores = [score for body in scores for score in (body if isinstance(body, list) else [body])]
    assert {score["name"] for score in scores} >= {"session.total_turns", "session.user_satisfaction"}
    assert all("traceId" not in score for score in scores)
    assert {score["environment"] for score in scores} == {"staging"}


def test_without_keys_the_release_is_that_of_the_platform_as_langfuses_client_reads_it(url: str) -> None:
    run(PLAYS_AND_FLUSHES, url, GIT_COMMIT="abc", GITHUB_SHA="def")
    bodies = [item.body for item in Ledger(url).outbox() if item.kind == "spans"]
    releases = {resource_of(each)["langfuse.release"] for body in bodies for each in from_otlp(body).resource_spans}
    assert releases == {"abc"}
    assert list(RELEASES) == common_release_envs


# --- what finds the place ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("outbox", "to_outbox"), [(None, False), (True, True), (False, False)])
def test_a_provider_that_is_given_is_asked_first(outbox: bool | None, to_outbox: bool) -> None:
    with providing() as provider:
        target = open_target(provider, outbox=outbox)
        assert target.provider is provider
        assert target.to_outbox is to_outbox


def test_a_provider_gets_one_processor_for_all_trackers() -> None:
    with providing() as provider:
        targets = [open_target(provider) for _ in range(3)]
        assert targets[0].processor is not None
        assert {id(target.processor) for target in targets} == {id(targets[0].processor)}


def test_nothing_is_logged_where_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "turntrace"), providing() as provider:
        tracker = SessionTracker("sqlite://", tracer_provider=provider, outbox=True)
        play(tracker)
        tracker.shutdown()
    assert caplog.records == []
