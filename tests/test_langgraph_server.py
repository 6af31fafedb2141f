"""LangGraph's own server (``langgraph dev``) with graphs that have the handler in their config."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from langgraph.pregel.remote import RemoteGraph
from langgraph_sdk import get_sync_client

from apps import asks, config_of, single
from turntrace import SessionCallbackHandler, SessionTracker, track_graph
from turntrace import attributes as a
from turntrace.ledger import Ledger
from turntrace.records import TurnSummary
from turntrace.testing import CapturedSpan, assert_all_tagged, outbox_spans

if find_spec("langgraph_api") is None:
    pytest.skip("LangGraph's server is not installed here: make test-server", allow_module_level=True)

TESTS = Path(__file__).parent
GRAPHS = ("waits", "greeter", "tools", "untracked", "made_for_each_run")
PATIENCE_S = 60.0


class Server:
    """The server in a process of its own: no network, no keys, and blocking calls in its loop raise an error."""

    def __init__(self, folder: Path) -> None:
        self.ledger_url = f"sqlite:///{folder / 'ledger.db'}"
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        graphs = {name: f"{TESTS / 'server_app.py'}:{name}" for name in GRAPHS}
        told = {"dependencies": [str(TESTS)], "graphs": graphs}
        (folder / "langgraph.json").write_text(json.dumps(told), encoding="utf-8")
        self.log = folder / "log"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("LANG", "OTEL_"))},
            **{"TURNTRACE_LEDGER_URL": self.ledger_url, "PYTHONPATH": str(TESTS)},
            **{"LANGGRAPH_DISABLE_FILE_PERSISTENCE": "true", "LANGSMITH_TRACING": "false"},
        }
        command = [sys.executable, "-m", "langgraph_cli", "dev", "--no-browser", "--no-reload", "--port", str(port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        ends = time.monotonic() + PATIENCE_S
        while not self.is_up():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < ends, self.said()
            time.sleep(0.2)

    def is_up(self) -> bool:
        try:
            return self.http.get("/ok").is_success
        except httpx.TransportError:
            return False

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def thread(self) -> str:
        return str(self.http.post("/threads", json={}).json()["thread_id"])

    def run(self, thread: str, graph: str, way: str = "wait", **asked: Any) -> Any:
        given = {"assistant_id": graph, "metadata": {"user_id": "zoe-42"}, **asked}
        answer = self.http.post(f"/threads/{thread}/runs/{way}", json=given)
        assert answer.is_success, answer.text
        return answer

    def turns(self, thread: str) -> list[TurnSummary]:
        """Return the turns of a thread, when all that ended is written."""
        ends = time.monotonic() + 10
        while True:
            with closing(Ledger(self.ledger_url)) as ledger:
                seen = [turn for session in ledger.sessions() for turn, _ in ledger.turns(session.id)]
            found = [turn for turn in seen if turn.conversation_id == thread]
            if (found and all(turn.status != "open" for turn in found)) or time.monotonic() > ends:
                return found
            time.sleep(0.05)

    def spans(self, thread: str) -> list[CapturedSpan]:
        with closing(Ledger(self.ledger_url)) as ledger:
            seen = list({span.span_id: span for span in outbox_spans(ledger)}.values())
        return [span for span in seen if span.attributes.get(a.CONVERSATION_ID) == thread]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    running.process.terminate()
    running.process.wait(20)
    running.http.close()


HELLO = {"messages": [{"role": "user", "content": "What does tea cost?"}]}


@pytest.mark.parametrize("way", ["wait", "stream"])
@pytest.mark.parametrize("graph", ["greeter", "tools", "untracked"])
def test_each_run_is_a_turn_of_its_thread(graph: str, way: str, server: Server) -> None:
    thread = server.thread()
    for _ in range(2):
        server.run(thread, graph, way, input=HELLO)
    turns = server.turns(thread)
    assert [(turn.number, turn.status, turn.error) for turn in turns] == [
        (1, "completed", None),
        (2, "completed", None),
    ]
    assert {turn.input_length for turn in turns} == {len("What does tea cost?")}
    assert all(turn.llm_calls > 0 for turn in turns)
    spans = server.spans(thread)
    assert_all_tagged(spans)
    assert {span.attributes[a.TURN_ID] for span in spans} == {turn.id for turn in turns}
    assert len({turn.session_id for turn in turns}) == 1


def test_what_a_node_tells_its_turn_is_known(server: Server) -> None:
    thread = server.thread()
    server.run(thread, "greeter", input=HELLO)
    [turn] = server.turns(thread)
    assert turn.intent == "greeting"
    with closing(Ledger(server.ledger_url)) as ledger:
        assert [each.value for each in ledger.feedback(turn.session_id) if each.turn_id == turn.id] == [1.0]
        assert [each.stage for each in ledger.stages(turn.session_id)][:1] == ["came"]


def test_a_command_that_resumes_goes_on_with_the_turn(server: Server) -> None:
    thread = server.thread()
    server.run(thread, "waits", input=HELLO)
    assert [turn.status for turn in server.turns(thread)] == ["interrupted"]
    server.run(thread, "waits", command={"resume": "yes"})
    [turn] = server.turns(thread)
    assert (turn.status, turn.agent_runs) == ("completed", 2)
    assert {span.trace_id for span in server.spans(thread)} == {turn.trace_id}


def test_a_tracker_made_for_each_run_breaks_nothing(server: Server) -> None:
    thread = server.thread()
    answer = server.run(thread, "made_for_each_run", input=HELLO)
    assert "5 euros" in answer.text
    assert [turn.status for turn in server.turns(thread)] == ["completed"]


def test_a_remote_graph_is_in_the_turn_that_asks_it(server: Server, tmp_path: Path) -> None:
    own = SessionTracker(f"sqlite:///{tmp_path / 'own.db'}", propagate=True)
    with own as tracker, get_sync_client(url=server.url) as client:
        remote = RemoteGraph("greeter", sync_client=client, name="greeter")
        graph: Any = track_graph(single(remote, "greeter")).compile()
        thread = server.thread()
        config = {**config_of(thread, user_id="zoe-42"), "callbacks": [SessionCallbackHandler(tracker)]}
        assert "5 euros" in str(graph.invoke(asks(), config)["messages"][-1])
        tracker.flush()
        here = outbox_spans(tracker.ledger)
        [session] = tracker.ledger.sessions()
        [(turn, _)] = tracker.ledger.turns(session.id)
    ends = time.monotonic() + 10
    while not (there := server.spans(thread)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert_all_tagged([span for span in here if a.TURN_ID in span.attributes] + there)
    assert {span.trace_id for span in there} == {turn.trace_id}
    assert {span.attributes[a.TURN_ID] for span in there} == {turn.id}
    assert "gpt-4o-mini" in {span.name for span in there}
    [caller] = [span for span in here if span.name == "greeter"]
    assert caller.span_id in {span.parent_id for span in there}


def test_nothing_was_caught_or_blocked(server: Server) -> None:
    said = server.said()
    assert "BlockingError" not in said
    assert "turntrace:" not in said
