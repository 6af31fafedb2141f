"""Langfuse's client, made when other code first needs it: nothing that it would send is lost before."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import fresh
from loopback import LangfuseServer
from turntrace import SessionTracker
from turntrace.errors import ConfigurationError

OURS = ["conversation.turn", "session.end", "session.start"]
IS_ROOT = "langfuse.internal.is_app_root"


@pytest.fixture
def server() -> Iterator[LangfuseServer]:
    with LangfuseServer() as server:
        yield server


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db"


def run(script: str, url: str, server: LangfuseServer, **variables: str) -> list[str]:
    """Run a script in a process of its own, and return the lines that it wrote."""
    made = fresh.run(script, TURNTRACE_LEDGER_URL=url, **{**server.keys, **variables})
    return made.splitlines()


def names(server: LangfuseServer) -> list[str]:
    """Return the names of the spans that came, each of which came once."""
    arrived = sorted(span.name for span in server.spans())
    assert sum(request.spans for request in server.requests) == len(arrived)
    return arrived


def names_of_all(server: LangfuseServer) -> list[str]:
    return [span.name for span in server.spans()]


def roots(server: LangfuseServer) -> list[str]:
    return sorted(span.name for span in server.spans() if span.attributes.get(IS_ROOT))


CLIENTS = """
import sys
managers = sys.modules.get("langfuse._client.resource_manager")
print("clients:", 0 if managers is None else len(managers.LangfuseResourceManager._instances))
"""
TALKS = """
from turntrace import SessionTracker
tracker = SessionTracker()
with tracker.session(session_id="mine") as session:
    with session.conversation("c1").turn("Hello"):
        pass
tracker.flush()
"""


# --- when it is made --------------------------------------------------------------------------------------------------
def test_it_is_not_made_where_nobody_needs_it(server: LangfuseServer, url: str) -> None:
    loaded = 'print([name for name in ("langfuse", "google.protobuf") if name in sys.modules])\n'
    environment = fresh.environment(TURNTRACE_LEDGER_URL=url, **server.keys)
    command = [sys.executable, "-c", TALKS + CLIENTS + loaded]
    out = subprocess.run(command, check=True, timeout=fresh.PATIENCE_S, env=environment, capture_output=True)
    assert out.stdout.decode().splitlines() == ["clients: 0", "[]"]
    assert names(server) == roots(server) == OURS


@pytest.mark.parametrize(
    "needs_it",
    [
        "import langfuse",
        "import sys, types; sys.modules['opentelemetry.instrumentation'] = types.ModuleType('instrumentation')",
        pytest.param(
            "import fastapi",
            marks=pytest.mark.skipif(find_spec("fastapi.telemetry") is None, reason="this FastAPI makes no spans"),
        ),
        "from opentelemetry import trace\nfrom opentelemetry.sdk.trace import TracerProvider\n"
        "trace.set_tracer_provider(TracerProvider())",
    ],
    ids=["its SDK is imported", "the app instruments itself", "FastAPI makes spans", "the app has a provider"],
)
def test_it_is_made_at_once_where_the_app_is_known_to_need_it(server: LangfuseServer, url: str, needs_it: str) -> None:
    after_the_tracker = TALKS.replace("SessionTracker()\n", "SessionTracker()\n" + CLIENTS)
    assert run(f"{needs_it}\n{after_the_tracker}", url, server) == ["clients: 1"]
    assert names(server) == roots(server) == OURS


@pytest.mark.parametrize("is_proxy", [False, True], ids=["a tracer from after", "a tracer from before the tracker"])
def test_all_spans_of_other_code_arrive_from_the_first(server: LangfuseServer, url: str, is_proxy: bool) -> None:
    tracers = ["", "tracer = trace.get_tracer('opentelemetry.instrumentation.openai')"]
    before, after = tracers if not is_proxy else reversed(tracers)
    script = f"""
from opentelemetry import trace
from turntrace import SessionTracker
{before}
tracker = SessionTracker()
{after}
with tracer.start_as_current_span("nightly"):
    with tracer.start_as_current_span("call"):
        pass
with tracker.session(session_id="mine") as session:
    with session.conversation("c1").turn("Hello"):
        with tracer.start_as_current_span("in a turn"):
            pass
tracer.start_span("after").end()
tracker.flush()
"""
    assert run(script + CLIENTS, url, server) == ["clients: 1"]
    assert names(server) == sorted([*OURS, "nightly", "call", "in a turn", "after"])
    assert roots(server) == sorted([*OURS, "nightly", "after"])


def test_what_the_app_observes_arrives_when_it_imports_langfuse_later(server: LangfuseServer, url: str) -> None:
    script = """
from turntrace import SessionTracker
tracker = SessionTracker()
with tracker.session(session_id="mine") as session:
    with session.conversation("c1").turn("Hello"):
        pass
    from langfuse import get_client, observe

    @observe()
    def look_up():
        pass

    with session.conversation("c1").turn("And now?"):
        look_up()
    look_up()
get_client().flush()
"""
    assert run(script + CLIENTS + "tracker.flush()", url, server) == ["clients: 1"]
    assert names(server) == sorted([*OURS, "conversation.turn", "look_up", "look_up"])
    assert roots(server) == sorted([*OURS, "conversation.turn", "look_up"])
    inside = next(span for span in server.spans() if span.name == "look_up" and IS_ROOT not in span.attributes)
    assert inside.attributes["langfuse.observation.metadata.session.id"] == "mine"


def test_a_span_below_one_of_ours_that_ran_before_it_is_no_root(server: LangfuseServer, url: str) -> None:
    script = """
from opentelemetry import trace
from turntrace import SessionTracker
tracker = SessionTracker()
with tracker.session(session_id="mine") as session:
    with session.conversation("c1").turn("Hello"):
        print(f"trace_id={trace.get_current_span().get_span_context().trace_id:032x}"[:8])  # as for a line of a log
        with trace.get_tracer("opentelemetry.instrumentation.openai").start_as_current_span("call"):
            pass
tracker.flush()
"""
    assert run(script + CLIENTS, url, server) == ["trace_id", "clients: 1"]
    assert names(server) == sorted([*OURS, "call"])
    assert roots(server) == OURS


def test_what_nobody_flushes_is_not_lost_at_an_exit(server: LangfuseServer, url: str) -> None:
    script = """
from opentelemetry import trace
from turntrace import SessionTracker
tracker = SessionTracker()
tracker.start_session(session_id="mine").conversation("c1").start_turn("Hello").end()
trace.get_tracer("opentelemetry.instrumentation.openai").start_span("last").end()
"""
    environment = fresh.environment(TURNTRACE_LEDGER_URL=url, **server.keys)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=fresh.PATIENCE_S, env=environment)
    assert names(server) == sorted(["session.start", "conversation.turn", "last"])


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "later"])
def test_a_flush_of_the_client_alone_sends_all_that_has_ended(server: LangfuseServer, url: str, is_late: bool) -> None:
    script = """
import os
from langfuse import get_client, observe

@observe()
def request():
    with session.conversation("c1").turn("Hello"):
        pass

request()
get_client().flush()
os._exit(0)  # as a function that is frozen
"""
    tracks = """
from turntrace import SessionTracker
tracker = SessionTracker()
session = tracker.start_session(session_id="mine")
"""
    run(tracks + script if is_late else "import langfuse\n" + tracks + script, url, server)
    assert names(server) == sorted(["session.start", "conversation.turn", "request"])


# --- side by side -----------------------------------------------------------------------------------------------------
def test_of_threads_that_need_it_at_once_none_waits_for_ever_and_no_span_is_lost(
    server: LangfuseServer, url: str
) -> None:
    script = """
import importlib, threading
from opentelemetry import trace
from turntrace import SessionTracker
tracer = trace.get_tracer("opentelemetry.instrumentation.openai")
tracker = SessionTracker()
begun = threading.Barrier(9)

def imports():
    begun.wait()
    from langfuse import observe
    observe(name="observed")(lambda: None)()

def starts():
    begun.wait()
    with tracer.start_as_current_span("outer"):
        with trace.get_tracer("langsmith").start_as_current_span("inner"):
            pass

threads = [threading.Thread(target=each, daemon=True) for each in (imports, starts, starts) * 3]
for each in threads:
    each.start()
for each in threads:
    each.join(30)
print("waiting:", sum(each.is_alive() for each in threads))
tracker.flush()
"""
    assert run(script + CLIENTS, url, server) == ["waiting: 0", "clients: 1"]
    assert names(server) == ["inner"] * 6 + ["observed"] * 3 + ["outer"] * 6
    assert roots(server) == ["observed"] * 3 + ["outer"] * 6


@pytest.mark.parametrize("needs", ["import langfuse", 'tracer.start_span("other").end()'])
def test_it_can_be_made_in_a_loop_that_is_watched(server: LangfuseServer, url: str, needs: str) -> None:
    script = f"""
import asyncio
import sys
from types import ModuleType
from opentelemetry import trace
from turntrace import SessionTracker
sys.modules["blockbuster"] = ModuleType("blockbuster")  # by which langgraph dev watches loops
tracer = trace.get_tracer("opentelemetry.instrumentation.openai")
tracker = SessionTracker()

async def node():
    {needs}
    tracer.start_span("span").end()

asyncio.run(node())
tracker.flush()
"""
    assert run(script + CLIENTS, url, server) == ["clients: 1"]
    assert set(names(server)) >= {"span"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_that_is_forked_before_makes_one_of_its_own(server: LangfuseServer, url: str) -> None:
    script = """
import os
from opentelemetry import trace
from turntrace import SessionTracker
tracker = SessionTracker()
worker = os.fork()
if not worker:
    trace.get_tracer("opentelemetry.instrumentation.openai").start_span("child's").end()
    tracker.flush()
    os._exit(0)
print("child:", os.waitpid(worker, 0)[1])
"""
    assert run(script + CLIENTS, url, server) == ["child: 0", "clients: 0"]
    assert names(server) == ["child's"]


def test_a_second_tracker_waits_for_the_same_one(server: LangfuseServer, url: str) -> None:
    script = """
from opentelemetry import trace
from turntrace import SessionTracker
trackers = [SessionTracker(), SessionTracker()]
for number, tracker in enumerate(trackers):
    tracker.start_session(session_id=f"s{number}").conversation("c1").start_turn("Hello").end()
trace.get_tracer("opentelemetry.instrumentation.openai").start_span("other").end()
for tracker in trackers:
    tracker.flush()
"""
    assert run(script + CLIENTS, url, server) == ["clients: 1"]
    assert names(server) == sorted(["conversation.turn", "session.start"] * 2 + ["other"])


# --- in the midst of the app's import ---------------------------------------------------------------------------------
BLOCKBUSTER = """
import sys
from types import ModuleType
sys.modules["blockbuster"] = ModuleType("blockbuster")  # by which langgraph dev watches loops
"""
ASKS_WITHIN = """
import asyncio, threading, time
from opentelemetry import trace
from wrapt import register_post_import_hook
from turntrace import SessionTracker
tracker = SessionTracker()
within = threading.Event()

def ask(_):  # as an instrumentation does that another import brings
    within.set()
    time.sleep(0.2)
    trace.get_tracer("langsmith").start_span("within")

register_post_import_hook(ask, "langfuse.media")

def observes():
    from langfuse import observe
    observe(name="observed")(lambda: None)()

async def node():
    observes()

def starts():
    within.wait()
    trace.get_tracer("openinference").start_span("beside").end()

beside = threading.Thread(target=starts, daemon=True)
beside.start()
"""


@pytest.mark.parametrize("before", ["", BLOCKBUSTER], ids=["", "in a loop that is watched"])
def test_a_tracer_that_is_asked_for_within_the_import_is_given_and_nobody_waits_for_ever(
    server: LangfuseServer, url: str, before: str
) -> None:
    script = """
asyncio.run(node())
beside.join(30)
print("waiting:", beside.is_alive())
tracker.flush()
"""
    assert run(before + ASKS_WITHIN + script + CLIENTS, url, server) == ["waiting: False", "clients: 1"]
    assert names(server) == ["beside", "observed"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_that_is_forked_within_the_import_goes_on(server: LangfuseServer, url: str) -> None:
    script = """
import os
importing = threading.Thread(target=observes)
importing.start()
within.wait()
worker = os.fork()
if not worker:
    with tracker.session(session_id="the child's") as session:
        with session.conversation("c1").turn("Hello"):
            trace.get_tracer("openinference").start_span("in a turn").end()
    tracker.flush()
    os._exit(0)
importing.join()
beside.join()
print("child:", os.waitpid(worker, 0)[1])
tracker.flush()
"""
    assert run(ASKS_WITHIN + script + CLIENTS, url, server) == ["child: 0", "clients: 1"]
    assert names(server) == sorted([*OURS, "in a turn", "beside", "observed"])


def test_an_import_that_fails_once_is_made_up_for_by_the_next(server: LangfuseServer, url: str) -> None:
    script = """
import sys
from opentelemetry import trace
from turntrace import SessionTracker
class Away:
    def find_spec(self, name, path=None, target=None):
        if name == "langfuse":
            raise ImportError("it is being installed")
tracker = SessionTracker()
sys.meta_path.insert(0, Away())
trace.get_tracer("openinference").start_span("lost").end()
del sys.meta_path[0]
from langfuse import get_client
get_client()
with tracker.session(session_id="mine") as session:
    with session.conversation("c1").turn("Hello"):
        trace.get_tracer("openinference").start_span("in a turn").end()
trace.get_tracer("openinference").start_span("kept").end()
tracker.flush()
"""
    out = run(script + CLIENTS, url, server)
    assert [line for line in out if not line.startswith("turntrace:")] == ["clients: 1"]
    assert names(server) == sorted([*OURS, "in a turn", "kept"])


def test_where_the_apps_import_was_not_seen_the_client_that_it_makes_stays_the_only_one(
    server: LangfuseServer, url: str
) -> None:
    script = """
import sys
from turntrace import SessionTracker
import wrapt.importer
finders = [finder for finder in sys.meta_path if isinstance(finder, wrapt.importer.ImportHookFinder)]
tracker = SessionTracker()
sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, wrapt.importer.ImportHookFinder)]
from langfuse import get_client, observe
observe(name="observed")(lambda: None)()
with tracker.session(session_id="mine") as session:
    with session.conversation("c1").turn("Hello"):
        pass
get_client().flush()
tracker.flush()
from opentelemetry import trace
names = [type(each).__name__ for each in trace.get_tracer_provider()._active_span_processor._span_processors]
print(sorted(names))
"""
    assert run(script, url, server) == ["['LangfuseSpanProcessor', 'TurnSpanProcessor']"]
    assert {*names_of_all(server)} == {*OURS, "observed"}


# --- beside other things of the app's ---------------------------------------------------------------------------------
def test_a_turn_that_runs_when_it_comes_gets_nothing_of_another_request(server: LangfuseServer, url: str) -> None:
    script = """
import threading
from opentelemetry import baggage, context, trace
from turntrace import SessionTracker
tracker = SessionTracker()

def other():
    context.attach(baggage.set_baggage("langfuse_user_id", "somebody else"))
    trace.get_tracer("openinference").start_span("other").end()

with tracker.session(session_id="mine") as session:
    with session.conversation("c1").turn("Hello"):
        trace.get_current_span().get_span_context()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
tracker.flush()
"""
    assert run(script + CLIENTS, url, server) == ["clients: 1"]
    assert names(server) == sorted([*OURS, "other"])
    ours = [span for span in server.spans() if span.name != "other"]
    assert not any("somebody else" in str(span.attributes) for span in ours)


def test_a_turn_stands_below_a_request_of_another_provider_of_the_apps(server: LangfuseServer, url: str) -> None:
    script = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from turntrace import SessionTracker
tracker = SessionTracker()
session = tracker.start_session(session_id="mine")
with TracerProvider().get_tracer("server").start_as_current_span("GET /", kind=trace.SpanKind.SERVER) as request:
    with session.conversation("c1").turn("Hello"):
        pass
print(f"{request.get_span_context().trace_id:032x}")
tracker.flush()
"""
    [trace_id] = run(script, url, server)
    [turn] = [span for span in server.spans() if span.name == "conversation.turn"]
    assert turn.trace_id == trace_id
    assert turn.attributes[IS_ROOT] is True


def test_a_turn_below_a_request_is_a_root_where_it_goes_on_without_the_client(server: LangfuseServer, url: str) -> None:
    begins = """
import json, os
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
trace.set_tracer_provider(TracerProvider())
from turntrace import SessionTracker
tracker = SessionTracker()
with trace.get_tracer("server").start_as_current_span("POST /", kind=trace.SpanKind.SERVER):
    turn = tracker.start_session(session_id="mine").conversation("c1").start_turn("Hello")
    print(json.dumps(turn.carrier()))
tracker.flush()
os._exit(0)
"""
    environment = fresh.environment(TURNTRACE_LEDGER_URL=url, **server.keys)
    command = [sys.executable, "-c", begins]
    out = subprocess.run(command, check=True, timeout=fresh.PATIENCE_S, env=environment, stdout=subprocess.PIPE).stdout
    goes_on = f"""
from turntrace import SessionTracker
tracker = SessionTracker()
with tracker.resume_turn({json.loads(out)!r}):
    pass
tracker.flush()
"""
    assert run(goes_on + CLIENTS, url, server) == ["clients: 0"]
    [turn] = [span for span in server.spans() if span.name == "conversation.turn"]
    assert turn.parent_id
    assert turn.attributes[IS_ROOT] is True


def test_a_second_tracker_without_keys_loses_nothing(server: LangfuseServer, url: str) -> None:
    script = """
import os
from turntrace import SessionTracker
first = SessionTracker()
del os.environ["LANGFUSE_PUBLIC_KEY"]
second = SessionTracker()
second.start_session(session_id="second").conversation("c1").start_turn("Hello").end()
second.flush()
first.flush()
"""
    assert run(script + CLIENTS, url, server) == ["clients: 0"]
    assert names(server) == ["conversation.turn", "session.start"]


# --- what it is made of -----------------------------------------------------------------------------------------------
def test_it_is_made_of_what_was_read_when_the_tracker_was_made(server: LangfuseServer, url: str) -> None:
    script = """
import os
from opentelemetry import trace
from turntrace import SessionTracker
tracker = SessionTracker()
for name in list(os.environ):
    if name.startswith("LANGFUSE_"):
        del os.environ[name]
trace.get_tracer("opentelemetry.instrumentation.openai").start_span("other").end()
tracker.flush()
"""
    variables = {"LANGFUSE_TRACING_ENVIRONMENT": "staging", "LANGFUSE_RELEASE": "v1", "LANGFUSE_FLUSH_AT": "8"}
    made = "client = next(iter(managers.LangfuseResourceManager._instances.values()))\n"
    shows = "print(client.environment, client.release, client.flush_at, client.base_url)\n"
    assert run(script + CLIENTS + made + shows, url, server, **variables) == [
        "clients: 1",
        f"staging v1 8 {server.url}",
    ]
    assert names(server) == ["other"]


WRONG = {
    "LANGFUSE_FLUSH_AT": ("many", "0", "", "2049"),
    "LANGFUSE_FLUSH_INTERVAL": ("often", "0", ""),
    "LANGFUSE_MEDIA_UPLOAD_THREAD_COUNT": ("some",),
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_what_it_cannot_be_made_of_is_said_when_the_tracker_is_made(
    server: LangfuseServer, name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    SessionTracker("sqlite://").shutdown()  # without keys there is no client
    for key, value in server.keys.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigurationError, match=f"{name} is '{text}'. Allowed is a .*number.*: {name}="):
        SessionTracker("sqlite://")


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"OTEL_BSP_SCHEDULE_DELAY": "-1"}, "variables LANGFUSE_* and OTEL_BSP_* (ValueError)"),
        ({"BROKEN": "yes"}, "the package langfuse cannot be imported (SyntaxError)"),
    ],
    ids=["it is refused", "its package is broken"],
)
def test_where_it_cannot_be_made_the_app_goes_on_and_that_is_said_once(
    server: LangfuseServer, url: str, variables: dict[str, str], says: str
) -> None:
    script = """
import os, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "langfuse":
            raise SyntaxError("half of it was written")
if "BROKEN" in os.environ:
    sys.meta_path.insert(0, Broken())
from opentelemetry import trace
from turntrace import SessionTracker
tracker = SessionTracker()
with tracker.session(session_id="mine") as session:
    with session.conversation("c1").turn("Hello"):
        for name in ("a", "b"):
            trace.get_tracer(name).start_span(name).end()
tracker.flush()
"""
    out = run(script, url, server, **variables)
    assert [line for line in out if line.startswith("turntrace:")] == out
    assert len(out) == 1
    assert says in out[0]
    assert names(server) == sorted([*OURS, "a", "b"])
