"""What has arrived in Langfuse, read back by its public API: on loopback, and the same from a real one (`live`)."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import fresh
from loopback import LangfuseServer as Loopback
from turntrace.export import LangfuseServer, scores_of, session_score
from turntrace.ledger import Ledger
from turntrace.settings import LangfuseSettings

# Read when the tests are collected: no test sees the variables of whoever runs them.
GIVEN = {name: value for name, value in os.environ.items() if name.startswith("LANGFUSE_")}
IS_LIVE = os.environ.get("TURNTRACE_LIVE") == "1"
PATIENCE_S = 60.0
ROOTS = {"conversation.turn", "session.start", "session.end"}


@dataclass
class Place:
    """A Langfuse, and how to ask it."""

    variables: dict[str, str]
    server: LangfuseServer

    def observations(self, session_id: str, count: int) -> list[dict[str, Any]]:
        """Wait until so many observations of a session are there, and return them."""
        return self._wait(lambda: list(self.server.observations(session_id)), count)

    def scores(self, session_id: str, count: int) -> list[dict[str, Any]]:
        """Wait until so many scores of a session are there, and return them."""
        return self._wait(lambda: list(self.server.scores(session_id=session_id)), count)

    def _wait(self, ask: Callable[[], list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
        give_up = time.monotonic() + PATIENCE_S
        while len(found := ask()) < count and time.monotonic() < give_up:
            time.sleep(0.2)
        return found


def place_of(variables: dict[str, str]) -> Place:
    words: Any = {name.removeprefix("LANGFUSE_").lower(): value for name, value in variables.items()}
    return Place(variables, LangfuseServer(LangfuseSettings(**words)))


@pytest.fixture(params=["loopback", pytest.param("real", marks=pytest.mark.live)])
def langfuse(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "real":
        if not (IS_LIVE and {"LANGFUSE_BASE_URL", "LANGFUSE_PUBLIC_KEY", "LANGFUSE_SECRET_KEY"} <= set(GIVEN)):
            pytest.skip("no real Langfuse: make test-live with LANGFUSE_BASE_URL and its keys set")
        place = place_of(GIVEN)
        yield place
        place.server.close()
        return
    with Loopback() as server:
        place = place_of(server.keys)
        yield place
        place.server.close()


def turntrace(url: str, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "turntrace.cli.main", *arguments],
        env=fresh.environment(TURNTRACE_LEDGER_URL=url, **variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ms_of(time_text: str) -> float:
    return datetime.fromisoformat(time_text.replace("Z", "+00:00")).timestamp() * 1000


def assert_arrived(ledger: Ledger, langfuse: Place) -> int:
    """Compare every session of a ledger with what Langfuse shows of it; return how many observations there are."""
    total = 0
    for session in ledger.sessions():
        turns = ledger.turns(session.id)
        steps = {step.span_id for _, steps in turns for step in steps}
        roots = {turn.root_span_id: turn for turn, _ in turns}
        found = {each["id"]: each for each in langfuse.observations(session.id, len(steps) + len(roots) + 2)}
        assert steps | set(roots) <= set(found)
        assert [found[root]["name"] for root in roots] == ["conversation.turn"] * len(roots)
        for root, turn in roots.items():
            assert root is not None
            assert ms_of(found[root]["startTime"]) == pytest.approx(turn.started_ns / 1e6, abs=1.0)
            assert found[root]["traceId"] == turn.trace_id
        for each in found.values():
            assert (each["sessionId"], each["userId"]) == (session.id, session.user_id)
        tokens = [sum(each[side] for each in found.values()) for side in ("inputUsage", "outputUsage")]
        assert tokens == [session.input_tokens, session.output_tokens]
        ends = [each for each in found.values() if each["name"] == "session.end"]
        if session.ended_ns is not None:
            assert len(ends) == 1
            assert ms_of(ends[0]["endTime"]) == pytest.approx(session.ended_ns / 1e6, abs=1.0)
            whole = ledger.session(session.id)
            assert whole is not None
            wanted = {session_score(session.id, name, value)["id"]: value for name, value in scores_of(whole).items()}
            scores = {each["id"]: each["value"] for each in langfuse.scores(session.id, len(wanted))}
            assert {name: scores.get(name) for name in wanted} == pytest.approx(wanted)
        total += len(found)
    return total


def test_a_demo_without_keys_arrives_by_an_export_with_its_original_times(langfuse: Place, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    said = turntrace(url, "demo")
    assert "turntrace export" in said
    assert "spans that wait" in turntrace(url, "export", "--status")
    time.sleep(1.5)  # so that the time of the sending is not that of the turns
    said = turntrace(url, "export", **langfuse.variables)
    assert "Nothing waits." in said
    ledger = Ledger(url)
    assert assert_arrived(ledger, langfuse) > 40
    assert ledger.to_send.status().is_empty
    ledger.close()


def test_with_keys_a_demo_arrives_by_itself(langfuse: Place, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    turntrace(url, "demo", **langfuse.variables, LANGFUSE_TRACING_ENVIRONMENT="staging")
    ledger = Ledger(url)
    assert assert_arrived(ledger, langfuse) > 40
    assert ledger.to_send.status().is_empty
    session = ledger.sessions()[0]
    found = langfuse.observations(session.id, 1)
    assert {each["environment"] for each in found} == {"staging"}
    assert {each["environment"] for each in langfuse.scores(session.id, 1)} == {"staging"}
    ledger.close()


def test_the_session_page_shows_one_card_a_turn_between_the_start_and_the_end(langfuse: Place, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    turntrace(url, "demo", **langfuse.variables)
    ledger = Ledger(url)
    for session in ledger.sessions():
        fields = {"fields": "core,basic,time,io", "limit": 1000}
        mine = [{"type": "string", "column": "sessionId", "operator": "=", "value": session.id}]
        langfuse.observations(session.id, session.total_turns + 2)
        page = langfuse.server._json("/api/public/v2/observations", fields | {"filter": json.dumps(mine)})
        cards = [each for each in page["data"] if each["input"] and each["output"]]
        assert [each["name"] for each in sorted(cards, key=lambda each: (each["startTime"], each["name"]))] == sorted(
            ["session.start", *["conversation.turn"] * session.total_turns, "session.end"],
            key=["session.start", "conversation.turn", "session.end"].index,
        )
    ledger.close()


def test_observations_are_found_by_the_ids_on_them(langfuse: Place, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    turntrace(url, "demo", **langfuse.variables)
    ledger = Ledger(url)
    session = max(ledger.sessions(), key=lambda each: each.total_turns)
    turn, steps = ledger.turns(session.id)[1]
    langfuse.observations(session.id, session.total_turns + 2)
    by_turn = [
        {"type": "string", "column": "sessionId", "operator": "=", "value": session.id},
        {"type": "stringObject", "column": "metadata", "key": "attributes.turn.id", "operator": "=", "value": turn.id},
    ]
    asked = {"fields": "core,basic,metadata", "limit": 1000, "filter": json.dumps(by_turn)}
    found = langfuse.server._json("/api/public/v2/observations", asked)["data"]
    assert {each["id"] for each in found} == {turn.root_span_id, *(step.span_id for step in steps)}
    ledger.close()
