"""Langfuse is away while 100 recorded conversations are replayed, and the process is killed three times."""

import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import fresh
from conftest import AIRLINE
from loopback import LangfuseServer
from turntrace.export import scores_of, session_score
from turntrace.identity import derived_id
from turntrace.ledger import Ledger

pytestmark = pytest.mark.usefixtures("airline")

KILLED_AT = (150, 330, 520)
TURNS, SESSIONS = 757, 100
PATIENCE_S = 100.0
WARM = 8
REPLAYS = """
import os, sys, time
from pathlib import Path
from turntrace.demo.player import Player
from turntrace.demo.replay import Replay
from turntrace.demo.transcripts import find_sources, read_lines

def memory_mb():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024

def note(line):
    global last
    now = time.perf_counter()
    if now - last > 0.03:  # those that the ledger had already are skipped in less
        print(os.getpid(), memory_mb(), now - last, file=samples, flush=True)
    last = now

with open(sys.argv[2], "a") as samples:
    player = Player(None)
    last = time.perf_counter()
    Replay(player, on_line=note).run(read_lines(find_sources([sys.argv[1]])))
    player.close()
"""


def turns_in(path: Path) -> int:
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(path)) as connection:
            return int(connection.execute("SELECT count(*) FROM turntrace_turns").fetchone()[0])
    except sqlite3.OperationalError:  # not made yet, or busy
        return 0


def start(environment: dict[str, str], samples: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", REPLAYS, str(AIRLINE), str(samples)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def expected(ledger: Ledger) -> tuple[dict[str, str], dict[str, Any]]:
    """Return what the ledger says must be there: the trace of each span by its id, and the scores by their ids."""
    spans: dict[str, str] = {}
    scores: dict[str, Any] = {}
    for session in ledger.sessions(limit=1000):
        for name in ("session.start", "session.end"):
            spans[derived_id(name, session.id, "span")[:16]] = derived_id(name, session.id)
        for turn, steps in ledger.turns(session.id):
            assert turn.root_span_id is not None
            assert turn.trace_id is not None
            spans |= dict.fromkeys([turn.root_span_id, *[step.span_id for step in steps]], turn.trace_id)
        whole = ledger.session(session.id)
        assert whole is not None
        for name, value in scores_of(whole).items():
            score = session_score(session.id, name, value)
            scores[score["id"]] = score["value"]
    return spans, scores


def test_an_outage_and_three_kills_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    server = LangfuseServer().start()
    server.stop()  # away, and its port refuses
    environment = fresh.environment(
        TURNTRACE_LEDGER_URL=f"sqlite:///{path}",
        TURNTRACE_USER_HASH_KEY="a key for hashing users in tests",
        LANGFUSE_TIMEOUT="1",
        **server.keys,
    )
    for at in KILLED_AT:
        process = start(environment, tmp_path / "samples")
        while turns_in(path) < at:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(environment, tmp_path / "samples")
    while turns_in(path) < 600:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    with server:  # it is back, while the last process still plays
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
        assert err.count("cannot take anything now") <= 1  # once, or the lease of the killed one outlasted the outage
        sent = subprocess.run(
            [sys.executable, "-m", "turntrace.cli.main", "export"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert sent.returncode == 0, sent.stdout + sent.stderr
    ledger = Ledger(f"sqlite:///{path}")
    assert ledger.to_send.status().is_empty
    assert ledger.to_send.status().refused == ()
    assert ledger.to_send.status().dropped == 0
    spans, scores = expected(ledger)
    ledger.close()
    arrived = {span.span_id: span.trace_id for span in server.spans()}
    assert {span_id for span_id, trace_id in spans.items() if arrived.get(span_id) != trace_id} == set()
    assert sum(span.name == "conversation.turn" for span in server.spans()) == TURNS
    assert sum(span.name == "session.end" for span in server.spans()) == SESSIONS
    assert {score_id: score["value"] for score_id, score in server.scores().items()} == scores
    assert_flat(tmp_path / "samples")


def assert_flat(samples: Path) -> None:
    """While the server was away nothing piled up in memory, and a conversation took no longer than before."""
    of_process: dict[str, list[tuple[float, float]]] = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        process, mb, seconds = line.split()
        of_process.setdefault(process, []).append((float(mb), float(seconds)))
    longest = max(of_process.values(), key=len)[WARM:]
    assert len(longest) >= 8
    memory = [each for each, _ in longest]
    assert memory[-1] - memory[0] < 25
    took = [each for _, each in longest]
    half = len(took) // 2
    assert statistics.median(took[half:]) < 4 * statistics.median(took[:half])
    print(f"memory {memory[0]:.0f} to {memory[-1]:.0f} MB; a conversation {1000 * statistics.median(took):.0f} ms")
