"""The 100 recorded conversations, replayed: every figure is compared with the file's, counted here without our code."""

import gc
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import typer
from opentelemetry.sdk.trace import TracerProvider

from conftest import AIRLINE
from turntrace import attributes as a
from turntrace import boundary
from turntrace.cli.running import INTERRUPTED, OK, command
from turntrace.context import encoding
from turntrace.demo.player import Player
from turntrace.demo.recorded import stage_for
from turntrace.demo.replay import Replay, Totals
from turntrace.demo.transcripts import Line, find_sources, read_lines
from turntrace.ledger import Ledger
from turntrace.testing import CapturedSpan, assert_all_tagged, outbox_spans

KEY = "a key for hashing users in tests"
WINDOW = 12


pytestmark = pytest.mark.usefixtures("airline")


@dataclass
class Replayed:
    """A replay that has ended: its ledger, its totals and the lines that could not be played."""

    path: Path
    totals: Totals
    problems: list[str]

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.url)


def replayed(
    path: Path, lines: Iterable[Line], *, concurrency: int = 1, is_async: bool = False, **settings: Any
) -> Replayed:
    problems: list[str] = []
    with boundary.strict():
        settings = {"user_hash_key": KEY, "content": "metadata", **settings}
        player = Player(f"sqlite:///{path}", tracer_provider=TracerProvider(), outbox=True, **settings)
        replay = Replay(
            player,
            concurrency=concurrency,
            is_async=is_async,
            on_problem=lambda line, why: problems.append(f"{line.number}: {why}"),
        )
        try:
            totals = replay.run(lines)
        finally:
            player.close()
    return Replayed(path, totals, problems)


def all_lines() -> Iterator[Line]:
    return read_lines(find_sources([str(AIRLINE)]))


def interrupted_in_asyncio(at: int) -> Callable[..., Any]:
    """Return a trace function by which Ctrl-C comes as this thread calls the so-manieth function of asyncio."""
    calls = itertools.count()

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "asyncio" in frame.f_code.co_filename and next(calls) == at:
            raise KeyboardInterrupt

    return trace


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in AIRLINE.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    return replayed(tmp_path_factory.mktemp("replay") / "ledger.db", all_lines(), concurrency=2)


@pytest.fixture(scope="module")
def spans(played: Replayed) -> list[CapturedSpan]:
    return outbox_spans(played.ledger)


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as connection:
        return connection.execute(query).fetchall()


def count(recorded: list[dict[str, Any]], role: str) -> int:
    return sum(message["role"] == role for conversation in recorded for message in conversation["messages"])


# --- the figures ------------------------------------------------------------------------------------------------------
def test_the_totals_are_those_of_the_file(played: Replayed, recorded: list[dict[str, Any]]) -> None:
    totals = played.totals
    assert played.problems == []
    assert (totals.played, totals.continued, totals.skipped, totals.malformed) == (100, 0, 0, 0)
    assert totals.conversations == totals.sessions == len(recorded) == 100
    assert totals.turns == count(recorded, "user") == 757
    assert totals.llm_calls == count(recorded, "assistant") == 1229
    assert totals.tool_calls == count(recorded, "tool") == 572
    assert totals.messages == sum(len(conversation["messages"]) for conversation in recorded) == 2658


@cache
def tokens(text: str) -> int:
    return len(encoding("o200k_base").encode_ordinary(text))


def tokens_of(message: dict[str, Any]) -> int:
    """Count a message by the recipe of OpenAI's cookbook; the names and arguments of calls are what a call says."""
    counted = 3 + tokens(message["role"]) + tokens(message["content"] or "")
    if "name" in message:
        counted += 1 + tokens(message["name"])
    return counted + tokens_of_calls(message)


def tokens_of_calls(message: dict[str, Any]) -> int:
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return sum(tokens(function["name"]) + tokens(function["arguments"]) for function in functions)


def test_each_call_of_the_model_has_the_tokens_of_all_that_was_said_before(
    played: Replayed, recorded: list[dict[str, Any]]
) -> None:
    given = made = 0
    for conversation in recorded:
        history = 0
        for message in conversation["messages"]:
            if message["role"] == "assistant":
                given += history + 3
                made += tokens(message["content"] or "") + tokens_of_calls(message)
            history += tokens_of(message)
    assert (played.totals.input_tokens, played.totals.output_tokens) == (given, made)


def test_the_cost_is_that_of_gpt_4o(played: Replayed) -> None:
    # $2.50 and $10.00 a million tokens: https://openai.com/api/pricing
    expected = (played.totals.input_tokens * 2.5 + played.totals.output_tokens * 10) / 1e6
    assert played.totals.cost_usd == pytest.approx(expected)
    assert played.totals.unpriced_calls == 0


def test_each_conversation_is_one_session_with_a_turn_for_each_message_of_its_user(
    played: Replayed, recorded: list[dict[str, Any]]
) -> None:
    found = rows(played.path, "SELECT conversation_id, session_id, number FROM turntrace_turns ORDER BY 1, 3")
    expected = {
        conversation["conversation_id"]: sum(message["role"] == "user" for message in conversation["messages"])
        for conversation in recorded
    }
    sessions: dict[str, set[str]] = {}
    numbers: dict[str, list[int]] = {}
    for conversation_id, session_id, number in found:
        sessions.setdefault(conversation_id, set()).add(session_id)
        numbers.setdefault(conversation_id, []).append(number)
    assert {name: list(range(1, turns + 1)) for name, turns in expected.items()} == numbers
    assert all(len(ids) == 1 for ids in sessions.values())
    assert len({next(iter(ids)) for ids in sessions.values()}) == 100


def test_a_users_conversations_are_sessions_of_one_user(played: Replayed, recorded: list[dict[str, Any]]) -> None:
    expected = Counter(Counter(conversation["user_id"] for conversation in recorded).values())
    found = rows(played.path, "SELECT count(*) FROM turntrace_sessions GROUP BY user_id")
    assert Counter(sessions for (sessions,) in found) == expected


def test_each_session_says_why_it_ended(played: Replayed, recorded: list[dict[str, Any]]) -> None:
    def reason(conversation: dict[str, Any]) -> str:
        names = [c["function"]["name"] for m in conversation["messages"] for c in m.get("tool_calls") or []]
        if names and names[-1] == "transfer_to_human_agents":
            return "handoff"
        return "completed" if conversation["outcome"]["success"] else "user_exit"

    found = rows(played.path, "SELECT end_reason, count(*) FROM turntrace_sessions GROUP BY 1")
    assert dict(found) == Counter(reason(conversation) for conversation in recorded)


def test_a_last_message_without_a_reply_is_a_turn_without_output(
    played: Replayed, recorded: list[dict[str, Any]]
) -> None:
    silent = [c["conversation_id"] for c in recorded if c["messages"][-1]["role"] == "user"]
    condition = "output_length IS NULL AND output_type IS NULL AND llm_calls = 0 AND input_length > 0"
    found = rows(played.path, f"SELECT conversation_id FROM turntrace_turns WHERE {condition}")
    assert sorted(name for (name,) in found) == sorted(silent)


def test_lengths_are_those_of_what_was_said(played: Replayed, recorded: list[dict[str, Any]]) -> None:
    expected = Counter(
        len(message["content"]) for c in recorded for message in c["messages"] if message["role"] == "user"
    )
    assert Counter(length for (length,) in rows(played.path, "SELECT input_length FROM turntrace_turns")) == expected


# --- the spans --------------------------------------------------------------------------------------------------------
def test_every_span_is_tagged(spans: list[CapturedSpan]) -> None:
    assert_all_tagged(spans)


def test_the_spans_agree_with_the_ledger_on_every_total(played: Replayed, spans: list[CapturedSpan]) -> None:
    assert Counter(span.name for span in spans)[a.SPAN_TURN] == played.totals.turns
    for session in played.ledger.sessions(limit=1000):
        own = [span for span in spans if span.attributes[a.SESSION_ID] == session.id]
        kinds = Counter(span.attributes[a.LANGFUSE_OBSERVATION_TYPE] for span in own)
        assert (kinds["generation"], kinds["tool"]) == (session.llm_calls, session.tool_calls)
        for name, total in (
            (a.GEN_AI_INPUT_TOKENS, session.input_tokens),
            (a.GEN_AI_OUTPUT_TOKENS, session.output_tokens),
            (a.TURN_INPUT_TOKENS, session.input_tokens),
            (a.TURN_OUTPUT_TOKENS, session.output_tokens),
            (a.TURN_LLM_CALLS, session.llm_calls),
            (a.TURN_TOOL_CALLS, session.tool_calls),
            (a.TURN_LATENCY_MS, session.active_ms),
        ):
            assert sum(span.attributes.get(name, 0) for span in own) == total, name
        costs = [json.loads(span.attributes.get(a.LANGFUSE_COST_DETAILS, "{}")).get("total", 0) for span in own]
        assert sum(costs) == pytest.approx(session.total_cost_usd)
        assert sum(span.attributes.get(a.TURN_COST_USD, 0) for span in own) == pytest.approx(session.total_cost_usd)
        [begun] = [span for span in own if span.name == a.SPAN_SESSION_START]
        [ended] = [span for span in own if span.name == a.SPAN_SESSION_END]
        assert begun.attributes[a.SESSION_CHANNEL] == "replay"
        assert ended.attributes[a.SESSION_TOTAL_TURNS] == session.total_turns
        assert ended.attributes[a.SESSION_TOTAL_TOKENS] == session.total_tokens
        assert ended.attributes[a.SESSION_END_REASON] == session.end_reason


def test_the_spans_agree_with_the_ledger_on_every_turn(played: Replayed, spans: list[CapturedSpan]) -> None:
    columns = "id, trace_id, root_span_id, number, input_tokens, output_tokens, tool_calls, llm_calls, spans"
    roots = {span.attributes[a.TURN_ID]: span for span in spans if span.name == a.SPAN_TURN}
    in_trace = Counter(span.trace_id for span in spans)
    for turn_id, trace_id, span_id, *figures, span_count in rows(played.path, f"SELECT {columns} FROM turntrace_turns"):
        root = roots.pop(turn_id)
        assert (root.trace_id, root.span_id, in_trace[trace_id]) == (trace_id, span_id, span_count)
        names = (a.TURN_NUMBER, a.TURN_INPUT_TOKENS, a.TURN_OUTPUT_TOKENS, a.TURN_TOOL_CALLS, a.TURN_LLM_CALLS)
        assert [root.attributes[name] for name in names] == figures
    assert roots == {}


# --- nothing of what was said -----------------------------------------------------------------------------------------
def texts_of(recorded: list[dict[str, Any]]) -> Iterator[str]:
    for conversation in recorded:
        for message in conversation["messages"]:
            yield message["content"] or ""
            for call in message.get("tool_calls") or []:
                yield call["function"]["arguments"]


def windows_of(recorded: list[dict[str, Any]]) -> set[bytes]:
    """Cut every text into pieces of 12 bytes, its last ones too: any 23 bytes of it that stand anywhere hold one."""
    windows = set()
    for text in texts_of(recorded):
        raw = text.encode()
        starts = range(0, max(1, len(raw) - WINDOW + 1), WINDOW)
        windows |= {raw[start : start + WINDOW] for start in (*starts, max(0, len(raw) - WINDOW))}
    return {window for window in windows if len(window) == WINDOW}


def stored_bytes(replay: Replayed) -> Iterator[bytes]:
    """Give all that the replay left behind: the files of the ledger, and each cell of each table."""
    for file in replay.path.parent.iterdir():
        yield file.read_bytes()
    for (table,) in rows(replay.path, "SELECT name FROM sqlite_master WHERE type = 'table'"):
        for row in rows(replay.path, f"SELECT * FROM {table}"):
            yield b"\n".join(cell if isinstance(cell, bytes) else str(cell).encode() for cell in row)


def leaks(replay: Replayed, recorded: list[dict[str, Any]]) -> set[bytes]:
    windows = windows_of(recorded)
    users = {conversation["user_id"].encode() for conversation in recorded}
    tools = {c["function"]["name"] for conv in recorded for m in conv["messages"] for c in m.get("tool_calls") or []}
    found = set()
    for stored in stored_bytes(replay):
        found |= {user for user in users if user in stored}
        for name in tools:  # which a span may say, and which results and the system prompt say too
            stored = stored.replace(name.encode(), b"")
        found |= {piece for i in range(len(stored)) if (piece := stored[i : i + WINDOW]) in windows}
    return found


def test_nothing_that_was_said_and_no_user_is_stored(played: Replayed, recorded: list[dict[str, Any]]) -> None:
    assert len(windows_of(recorded)) > 20_000
    assert leaks(played, recorded) == set()


def test_the_search_finds_what_a_policy_lets_out(tmp_path: Path, recorded: list[dict[str, Any]]) -> None:
    line = next(all_lines())
    replay = replayed(tmp_path / "ledger.db", [line], content="full")
    assert len(leaks(replay, recorded[:1])) > 50


# --- again, otherwise, and interrupted --------------------------------------------------------------------------------
def content_of(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    tables = rows(path, "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'turntrace%'")
    return {table: rows(path, f"SELECT * FROM {table}") for (table,) in tables}


def test_a_second_replay_adds_nothing(played: Replayed) -> None:
    before = content_of(played.path)
    again = replayed(played.path, [*all_lines(), *all_lines()])
    assert (again.totals.played, again.totals.continued, again.totals.skipped) == (0, 0, 200)
    assert content_of(played.path) == before
    assert again.totals.cost_usd == pytest.approx(played.totals.cost_usd)  # the order of a sum is not the same
    assert replace(again.totals, played=100, skipped=0, cost_usd=played.totals.cost_usd) == played.totals


FIGURES = (
    "id, session_id, conversation_id, user_id, number, status, trace_id, role, input_length, "
    "output_length, input_type, output_type, has_attachments, agent_runs, tool_calls, llm_calls, input_tokens, "
    "output_tokens, cost_usd, unpriced_calls, model, error, spans"
)
"""All of a turn but its times and the ids of its spans."""


def turns_in(path: Path) -> list[tuple[Any, ...]]:
    return rows(path, f"SELECT {FIGURES} FROM turntrace_turns ORDER BY id")


def test_async_and_sync_come_to_the_same(played: Replayed, tmp_path: Path) -> None:
    other = replayed(tmp_path / "ledger.db", all_lines(), concurrency=8, is_async=True)
    assert other.totals.cost_usd == pytest.approx(played.totals.cost_usd)
    assert replace(other.totals, cost_usd=0) == replace(played.totals, cost_usd=0)
    assert turns_in(other.path) == turns_in(played.path)
    mine, theirs = (
        sorted((s.name, s.attributes[a.SESSION_ID], s.attributes.get(a.TURN_ID)) for s in outbox_spans(replay.ledger))
        for replay in (other, played)
    )
    assert mine == theirs


STOPPED = "turntrace: stopped; the same command goes on from here\n"
AS_MODULE = ("-m", "turntrace.cli.main", "replay")


def start(path: Path, *options: str, program: Sequence[str] = AS_MODULE) -> "subprocess.Popen[str]":
    environment = {**os.environ, "TURNTRACE_LEDGER_URL": f"sqlite:///{path}", "TURNTRACE_USER_HASH_KEY": KEY}
    command = [sys.executable, *program, str(AIRLINE), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_turns(path: Path, wanted: int) -> None:
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        if path.exists():
            with suppress(sqlite3.OperationalError):  # its tables are being made
                if rows(path, "SELECT count(*) FROM turntrace_turns")[0][0] >= wanted:
                    return
        time.sleep(0.05)
    pytest.fail("the replay does not get on")


def test_a_replay_that_was_killed_goes_on_where_it_stood(played: Replayed, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    process = start(path, "-n", "3")
    wait_for_turns(path, 40)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = list(all_lines())[:30]
    rest = replayed(path, lines)
    assert rest.problems == []
    assert rest.totals.played + rest.totals.continued + rest.totals.skipped == 30
    assert rest.totals.continued > 0
    ids = {line.transcript.conversation_id for line in lines if line.transcript}
    assert [turn for turn in turns_in(path) if turn[2] in ids] == [t for t in turns_in(played.path) if t[2] in ids]
    assert rows(path, "SELECT count(*) FROM turntrace_sessions WHERE ended_ns IS NULL")[0][0] <= 3
    of_turns = [span for span in outbox_spans(rest.ledger) if a.TURN_ID in span.attributes]
    assert_all_tagged(of_turns)
    assert Counter(span.name for span in of_turns)[a.SPAN_TURN] == len(turns_in(path))


@pytest.mark.parametrize("options", [("-n", "2"), ("--async", "-n", "2")], ids=["sync", "async"])
def test_ctrl_c_ends_a_replay_between_two_turns(options: tuple[str, ...], played: Replayed, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    process = start(path, *options)
    wait_for_turns(path, 20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", STOPPED)
    known = {turn[0]: turn for turn in turns_in(played.path)}
    found = turns_in(path)
    assert 20 <= len(found) < len(known)
    assert [known[turn[0]] for turn in found] == found
    assert rows(path, "SELECT count(*) FROM turntrace_open_turns") == [(0,)]


BADLY_TIMED = """
import signal, sys
from turntrace.cli.main import main

def is_waiting(frame):
    return frame is not None and (frame.f_code.co_qualname == "Replay._reap" or is_waiting(frame.f_back))

def at_the_end(frame, event, _):
    if event == "return" and is_waiting(frame):
        sys.settrace(None)
        signal.raise_signal(signal.SIGINT)
    return at_the_end

sys.settrace(lambda frame, *_: at_the_end if frame.f_code.co_qualname == PLACE else None)
sys.argv = ["turntrace", "replay", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("place", ["Condition._release_save", "_AcquireFutures.__enter__"])
@pytest.mark.parametrize("options", [("-n", "2"), ("--async", "-n", "2")], ids=["sync", "async"])
def test_ctrl_c_may_come_in_the_midst_of_waiting(place: str, options: tuple[str, ...], tmp_path: Path) -> None:
    """In these an exception leaves a lock held, or comes out as another one."""
    path = tmp_path / "ledger.db"
    with start(path, *options, program=["-c", BADLY_TIMED.replace("PLACE", repr(place))]) as process:
        try:
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, "", STOPPED)
    assert rows(path, "SELECT count(*) FROM turntrace_open_turns") == [(0,)]


def test_ctrl_c_that_comes_out_as_another_error_is_said_to_be_one() -> None:
    """So it does where Python's own waiting is interrupted before it waits."""

    def before_it_waits(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_name == "_release_save" and event == "return":
            sys.settrace(tracing)
            raise KeyboardInterrupt
        return before_it_waits

    @command
    def waits() -> int:
        sys.settrace(before_it_waits)
        threading.Event().wait(5)
        return OK

    tracing = sys.gettrace()
    try:
        with pytest.raises(typer.Exit) as done:
            waits()
    finally:
        sys.settrace(tracing)
    assert done.value.exit_code == INTERRUPTED


@pytest.mark.parametrize("at", [0, 2, 5])
def test_ctrl_c_as_a_conversation_is_begun_leaves_nothing_half_done(at: int, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    lines = list(all_lines())[:6]

    def interrupts() -> Iterator[Line]:
        for number, line in enumerate(lines):
            if number == 2:
                sys.settrace(interrupted_in_asyncio(at))
            yield line

    tracing = sys.gettrace()
    try:
        with pytest.raises(KeyboardInterrupt):
            replayed(path, interrupts(), concurrency=2, is_async=True)
    finally:
        sys.settrace(tracing)
    gc.collect()  # by which asyncio tells of what nobody waited for
    assert rows(path, "SELECT count(*) FROM turntrace_open_turns") == [(0,)]
    assert replayed(path, lines).totals.malformed == 0


# --- what is played ---------------------------------------------------------------------------------------------------
def test_the_graph_says_what_was_recorded_and_its_tools_return_it(recorded: list[dict[str, Any]]) -> None:
    """In 24 of the conversations an id of a call comes a second time, with another result."""
    reused = 0
    for line, conversation in zip(all_lines(), recorded, strict=True):
        ids = [call["id"] for message in conversation["messages"] for call in message.get("tool_calls") or []]
        if len(ids) == len(set(ids)):
            continue
        reused += 1
        assert line.transcript is not None
        stage = stage_for(line.transcript)
        config: Any = {"configurable": {"thread_id": "c"}, "recursion_limit": 100}
        for exchange in line.transcript.exchanges:
            stage.graph.invoke(stage.script.begin(exchange), config)
        said = [shown(message) for message in stage.graph.get_state(config).values["messages"]]
        assert said == [recorded_as(message) for message in conversation["messages"]]
    assert reused == 24


def shown(message: Any) -> tuple[Any, ...]:
    calls = [(call["id"], call["name"], call["args"]) for call in getattr(message, "tool_calls", [])]
    return message.type, message.content, calls, getattr(message, "tool_call_id", None)


def recorded_as(message: dict[str, Any]) -> tuple[Any, ...]:
    kinds = {"user": "human", "assistant": "ai"}
    calls = [
        (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls") or []
    ]
    return kinds.get(message["role"], message["role"]), message["content"] or "", calls, message.get("tool_call_id")


# --- fitted into a small window ---------------------------------------------------------------------------------------
SMALL = 4_000


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    path = tmp_path_factory.mktemp("fitted") / "ledger.db"
    return replayed(path, all_lines(), is_async=request.param, context_limit=SMALL)


def test_every_call_of_the_model_fits_into_a_small_window(fitted: Replayed, played: Replayed) -> None:
    assert fitted.problems == []
    assert fitted.totals.turns == played.totals.turns
    decided = rows(fitted.path, "SELECT tokens_before, tokens_after, trigger FROM turntrace_decisions")
    assert len(decided) == fitted.totals.llm_calls
    assert max(before for before, _, _ in decided) > SMALL >= max(after for _, after, _ in decided)
    assert {trigger for _, _, trigger in decided} == {None, "threshold", "limit"}
    # What the recorded model says it was given is counted by other code.
    provided = rows(fitted.path, "SELECT max(context_tokens), sum(input_tokens) FROM turntrace_turns")[0]
    assert provided[0] <= SMALL
    assert provided[1] < rows(played.path, "SELECT sum(input_tokens) FROM turntrace_turns")[0][0]


def test_prunings_are_spans_and_rows_and_their_sums_agree(fitted: Replayed) -> None:
    found = list(outbox_spans(fitted.ledger))
    assert_all_tagged(found)
    query = """SELECT turn_id, trigger, messages_pruned, tokens_before - tokens_after, tokens_after, new_tokens
        FROM turntrace_decisions WHERE messages_pruned > 0"""
    words = (
        *(a.TURN_ID, a.CONTEXT_TRIGGER, a.CONTEXT_MESSAGES_PRUNED, a.CONTEXT_TOKENS_PRUNED),
        *(a.CONTEXT_CURRENT_TOKENS, a.CONTEXT_NEW_TOKENS),
    )
    events = [span for span in found if span.name == a.SPAN_PRUNE]
    assert len(events) > 100
    assert Counter(tuple(span.attributes[word] for word in words) for span in events) == Counter(
        rows(fitted.path, query)
    )
    turns = {span.attributes[a.TURN_ID]: span.attributes for span in found if span.name == a.SPAN_TURN}
    columns = "id, context_tokens, context_messages, prunings > 0, messages_pruned, tokens_pruned"
    for turn_id, tokens, messages, pruned, left_out, tokens_out in rows(
        fitted.path, f"SELECT {columns} FROM turntrace_turns"
    ):
        root = turns[turn_id]
        assert root.get(a.CONVERSATION_CONTEXT_TOKENS) == tokens
        assert root.get(a.CONVERSATION_MESSAGES_IN_CONTEXT) == messages
        assert root.get(a.CONTEXT_PRUNED, False) == pruned
        assert (root.get(a.CONTEXT_MESSAGES_PRUNED, 0), root.get(a.CONTEXT_TOKENS_PRUNED, 0)) == (left_out, tokens_out)
    by_turn = rows(fitted.path, "SELECT session_id, sum(prunings) FROM turntrace_turns GROUP BY 1")
    assert dict(by_turn) == dict(rows(fitted.path, "SELECT id, prunings FROM turntrace_sessions"))


def test_our_count_is_near_what_the_recorded_model_counts(fitted: Replayed) -> None:
    generations = [span.attributes for span in outbox_spans(fitted.ledger) if span.name == "gpt-4o"]
    assert len(generations) == fitted.totals.llm_calls
    # They differ in calls of tools: the recording has their arguments as written, LangChain sends them as its own JSON.
    errors = [each[a.CONTEXT_ESTIMATE_ERROR_PCT] for each in generations]
    assert 0 < sum(errors) / len(errors) < 2
    assert 0 in errors
    assert all(each[a.CONTEXT_CURRENT_TOKENS] <= SMALL for each in generations)


def test_a_fitted_replay_stores_nothing_that_was_said(fitted: Replayed, recorded: list[dict[str, Any]]) -> None:
    assert leaks(fitted, recorded) == set()
