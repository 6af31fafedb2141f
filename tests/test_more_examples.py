"""The longer examples run alone, too, as a user would run them, and say what they promise."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import postgres
from turntrace import SessionTracker

EXAMPLES = Path(__file__).parent.parent / "examples"
MORE = ("agent_with_middleware.py", "backfill.py", "journeys.py", "workers_on_postgresql.py")
"""The examples that are run here; `test_examples` runs the others."""


def run(name: str, folder: Path, *, ledger: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Run an example in a process and a folder of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:AgentStatePydantic has been moved", str(EXAMPLES / name)],
        env={**os.environ, "TURNTRACE_LEDGER_URL": ledger or f"sqlite:///{folder / 'ledger.db'}"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def output_of(name: str, folder: Path, *, ledger: str | None = None) -> str:
    """Return what an example prints."""
    done = run(name, folder, ledger=ledger)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(folder.iterdir()) in ([], [folder / "ledger.db"])  # nothing is left lying about
    return done.stdout


def test_the_examples_are_there() -> None:
    assert all((EXAMPLES / name).is_file() for name in MORE)


def test_an_agent_with_middleware(tmp_path: Path) -> None:
    assert output_of("agent_with_middleware.py", tmp_path) == (
        "turn 6: Here you are: kettles costs 5 euros.\n"
        "the state still has all 24 messages\n"
        "\n"
        "turn 1: 1 tool call, 2 model calls, 179 of 500 tokens, 36%, nothing pruned\n"
        "turn 2: 1 tool call, 2 model calls, 317 of 500 tokens, 63%, nothing pruned\n"
        "turn 3: 1 tool call, 2 model calls, 343 of 500 tokens, 69%, 2 messages pruned\n"
        "turn 4: 1 tool call, 2 model calls, 356 of 500 tokens, 71%, 3 messages pruned\n"
        "turn 5: 1 tool call, 2 model calls, 381 of 500 tokens, 76%, 7 messages pruned\n"
        "turn 6: 1 tool call, 2 model calls, 381 of 500 tokens, 76%, 11 messages pruned\n"
        "threshold: 452 -> 298 tokens\n"
        "threshold: 477 -> 323 tokens\n"
        "limit: 586 -> 356 tokens\n"
        "limit: 611 -> 381 tokens\n"
        "limit: 722 -> 355 tokens\n"
        "limit: 748 -> 381 tokens\n"
        "limit: 861 -> 356 tokens\n"
        "in all: 7 prunings\n"
    )


def test_journeys(tmp_path: Path) -> None:
    assert output_of("journeys.py", tmp_path) == (
        "the sweep ended 5 sessions\n"
        "\n"
        "onboarding: 3 of 5 users arrived, 60%\n"
        "  1. signup        ##### 5 users\n"
        "  2. connect       ###   3 users\n"
        "  3. first_answer  ###   3 users\n"
        "\n"
        "dropped off after turn (of those who ended there)\n"
        "  1: 1 of 1\n"
        "  2: 2 of 2\n"
        "  3: 0 of 3\n"
        "dropped off when the agent had last\n"
        "  asked_question: 3 of 3\n"
        "  answered: 0 of 3\n"
        "\n"
        "sessions by their outcome\n"
        "  successful: n = 3, 2.3 turns, satisfaction 100%\n"
        "  unsuccessful: n = 3, 1.7 turns, satisfaction 0%\n"
    )


def test_backfill(tmp_path: Path) -> None:
    assert output_of("backfill.py", tmp_path) == (
        "the first time 3 turns came in, the second time 0\n"
        "2025-03-03: sessions 2, turns 2, tokens 216\n"
        "2025-03-05: sessions 1, turns 1, tokens 115\n"
        "\n"
        "session f301700b, ended by inactive_timeout, a drop-off: the agent had asked\n"
        "  turn 1 of parcel: question, 5 s\n"
        "    generation gpt-4o-mini, tool find, generation gpt-4o-mini\n"
        "\n"
        "session 774db428, ended by inactive_timeout, no drop-off\n"
        "  turn 1 of invoice: command, 1 s\n"
        "    generation gpt-4o-mini\n"
        "\n"
        "session bd3c3a1f, ended by inactive_timeout, no drop-off\n"
        "  turn 2 of parcel: statement, 4 s\n"
        "    generation gpt-4o-mini\n"
    )


def test_what_is_backfilled_may_grow(tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "backfill.py"))
    path, whole = tmp_path / "transcripts.jsonl", example["TRANSCRIPTS"]

    def bring(transcripts: list[dict[str, Any]]) -> Any:
        path.write_text("\n".join(map(json.dumps, transcripts)), encoding="utf-8")
        return example["backfill"](path, tracker)

    with SessionTracker("sqlite://", idle_after=example["IDLE_S"], clock=example["clock"]) as tracker:
        assert bring([{**whole[0], "messages": whole[0]["messages"][:4]}]) == 1
        assert bring(whole) == 2
        assert bring(list(reversed(whole))) == 0
        sessions = tracker.ledger.sessions()
        assert [session.end_reason for session in sessions] == ["inactive_timeout"] * 3
        assert [session.total_turns for session in sessions] == [1, 1, 1]
        assert [session.active_ms for session in reversed(sessions)] == [5000, 1000, 4000]
        idle_ns = tracker.idle_ns
        assert {(session.ended_ns or 0) - session.last_activity_ns for session in sessions} == {idle_ns}


def test_workers_on_postgresql(tmp_path: Path) -> None:
    with postgres.server() as server:
        url = postgres.new_schema(server)
        assert output_of("workers_on_postgresql.py", tmp_path, ledger=url) == (
            "4 workers, each 5 turns with 3 users: [0, 0, 0, 0]\n"
            "the first sweep ends 3 sessions, the second 0\n"
            "ann: 1 session, turns 1 to 20, ended by inactive_timeout\n"
            "bob: 1 session, turns 1 to 20, ended by inactive_timeout\n"
            "cyd: 1 session, turns 1 to 20, ended by inactive_timeout\n"
        )


def test_workers_without_postgresql_say_what_to_set(tmp_path: Path) -> None:
    done = run("workers_on_postgresql.py", tmp_path)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("Set TURNTRACE_LEDGER_URL to a PostgreSQL database")
