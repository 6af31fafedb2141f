"""Whatever is typed, replayed or comes with a request: a documented exit code, one line, a turn on record."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage

from apps import asks, single
from command_line import runner
from odd import BROKEN, PLANTED, steady, texts, values
from turntrace import SessionCallbackHandler, SessionTracker, track_graph
from turntrace import attributes as a
from turntrace.cli.main import app
from turntrace.demo.json_lines import value_of
from turntrace.demo.transcripts import Source, read_lines
from turntrace.errors import TranscriptError
from turntrace.testing import Capture, assert_all_tagged, outbox_spans

# --- what is typed ----------------------------------------------------------------------------------------------------
ABOUT = ("since", "until", "channel", "tier", "org", "topic", "model", "end-reason", "user", "user-id", "ledger")
WAYS: tuple[tuple[str, ...], ...] = (
    *((command, f"--{option}=") for command in ("sessions", "users", "funnel", "dropoff") for option in ABOUT),
    *(("sessions", "--json", "--limit="), ("users", "--csv", "--limit="), ("sessions", "--sort="), ("funnel", "")),
    *(
        ("show", ""),
        ("show", "c", "--turn="),
        ("show", "--brief", ""),
        ("show", "--json", ""),
        ("show", "--context", ""),
        ("sweep", "--idle-after="),
        ("replay", ""),
    ),
    *(("replay", "--context-limit="), ("replay", "-n"), ("doctor", "--verify="), ("doctor", "--ledger=")),
    *(("export", "--status", "--ledger="), ("export", "--ledger="), ("report", "--port="), ("", ""), ("demo", "")),
)
typed = (
    st.sampled_from(PLANTED + BROKEN)
    | st.sampled_from(["-1", "0", "1e300", "nan", "9" * 30, "9" * 5000, "--", "-", ".", "%", "_", "http://[::1"])
    | st.sampled_from(["0001-01-01T00:00+14:00", "9999-12-31T23:59-14:00", "2026-W01", "2026-11-25T99", "sqlite://h/x"])
    | st.text(max_size=8)
).map(lambda text: text.replace("\x00", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"))
"""What a shell can hand over: no NUL, and what is not UTF-8 as half a surrogate."""


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('typed') / 'ledger.db'}"
    with SessionTracker(url) as tracker:
        session = tracker.start_session(user_id="ann", channel="web")
        with session.conversation("c").turn("Hi") as turn:
            turn.journey("way", ["a", "b"]).enter("a")
        session.end()
    return url


@steady(100)
@given(st.sampled_from(WAYS), typed)
@example(("sessions", "--limit="), "9" * 30)
@example(("users", "--limit="), "9" * 30)
@example(("show", ""), "\udcff")
@example(("sessions", "--topic="), "\udcff")
@example(("users", "--user="), "\udcff")
@example(("doctor", "--ledger="), "postgresql://127.0.0.1:port/x")
def test_whatever_is_typed_ends_with_a_documented_code_and_one_line(
    ledger: str, tmp_path_factory: pytest.TempPathFactory, way: tuple[str, ...], text: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURNTRACE_LEDGER_URL", ledger)
        patch.chdir(tmp_path_factory.getbasetemp())  # what is typed may name a file
        ran = runner().invoke(app, [*way[:-1], way[-1] + text])

    assert ran.exit_code in (0, 1, 2), ran.exception
    assert "own:" not in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    if ran.exit_code == 2 and ran.stderr.startswith("turntrace: "):
        assert ran.stderr.count("\n") == 1
        assert ran.stderr[:-1].isprintable()


# --- what is replayed -------------------------------------------------------------------------------------------------
keys = (
    st.sampled_from(["conversation_id", "user_id", "topic", "model", "outcome", "messages", "role", "content"]) | texts
)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)
whole = st.fixed_dictionaries(
    {
        "conversation_id": st.just("c-1") | jsons,
        "user_id": st.just("ann") | jsons,
        "topic": st.just("orders") | jsons,
        "model": st.just("gpt-4o") | jsons,
        "outcome": st.just({"success": True}) | jsons,
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "assistant", "tool", "system"]) | jsons, "content": texts | jsons},
                optional={"tool_calls": jsons, "tool_call_id": jsons, "usage": jsons, "name": jsons},
            )
            | jsons,
            max_size=4,
        ),
    }
)
lines = (whole | jsons).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)


@steady(80)
@given(st.lists(lines, min_size=1, max_size=3), st.sampled_from([b"\n", b"\r\n"]))
@example([b"\xef\xbb\xbf{}", b'{"user_id": 1e999}', b'{"a": ' * 50_000], b"\r\n")
@example([b'{"user_id": ' + b"9" * 5000 + b"}", b'{"user_id": "\\ud800"}', b"\x00"], b"\n")
def test_each_line_of_a_file_is_a_transcript_or_says_why_not(
    tmp_path_factory: pytest.TempPathFactory, given_lines: list[bytes], end: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "talks.jsonl"
    file.write_bytes(end.join(given_lines))
    for line in read_lines([Source("talks", file, None)]):
        assert (line.transcript is None) is (line.problem is not None)
        if line.problem is not None:
            assert line.problem.isprintable()
            assert len(line.problem) < 500


@steady(20)
@given(whole)
def test_a_replay_of_anything_ends_and_counts_its_lines(tmp_path_factory: pytest.TempPathFactory, talk: Any) -> None:
    folder = tmp_path_factory.mktemp("replayed")
    (folder / "talks.jsonl").write_text(json.dumps(talk))
    ran = runner().invoke(app, ["replay", str(folder), "--ledger", f"sqlite:///{folder / 'ledger.db'}"])
    assert ran.exit_code in (0, 1, 2), ran.exception
    assert "own:" not in ran.stderr
    assert ran.stderr.replace("\n", "").isprintable()


@steady(100)
@given(st.binary(max_size=60))
def test_bytes_are_json_or_no_transcript(raw: bytes) -> None:
    why = ""
    try:
        value_of(raw)
    except TranscriptError as error:
        why = str(error)
    assert why.isprintable()


# --- what comes with a request ----------------------------------------------------------------------------------------
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TURN = {
    a.SESSION_ID: "s",
    a.TURN_ID: "0af7651916cd43dd8448eb211c80319c",
    a.CONVERSATION_ID: "c",
    a.TURN_NUMBER: "1",
    a.SESSION_CHANNEL: "web",
}


def baggage_of(**changed: str) -> str:
    return ",".join(f"{name}={value}" for name, value in (TURN | changed).items())


changes = st.dictionaries(
    st.sampled_from([*TURN, a.USER_ID, a.USER_TIER, a.USER_ORG_ID, a.CONVERSATION_TOPIC]),
    st.sampled_from(["", "0", "-1", "9" * 30, "9" * 5000, "%00", "%ff", "%ED%A0%80", "x" * 5000, "%1b[31m", "1_0"])
    | st.text(max_size=6),
    max_size=3,
)
carried = st.builds(lambda more: baggage_of(**more), changes) | texts | values


@steady(40)
@given(st.just(TRACE) | texts | values, carried)
@example(TRACE, baggage_of(**{a.TURN_NUMBER: "9" * 30}))
@example(TRACE, baggage_of(**{a.TURN_NUMBER: "-5"}))
@example(TRACE, baggage_of(**{a.SESSION_CHANNEL: "%ED%A0%80"}))
@example(TRACE, "\ud800")
@example("\ud800", baggage_of())
def test_whatever_headers_say_the_run_is_in_their_turn_or_in_one_of_its_own(trace: Any, baggage: Any) -> None:
    with Capture() as capture:
        tracker = capture.tracker(outbox=True, propagate=True)
        graph: Any = track_graph(single(lambda _: {"messages": [AIMessage("Done.")]})).compile()
        graph = graph.with_config(callbacks=[SessionCallbackHandler(tracker)])
        graph.invoke(asks(), {"metadata": {"traceparent": trace, "baggage": baggage}})
        assert tracker.flush()
        spans = [span for span in outbox_spans(tracker.ledger) if a.TURN_ID in span.attributes]

    assert [span.name for span in spans if span.name in ("LangGraph", "work")] == ["work", "LangGraph"]
    for span in spans:
        assert span.attributes[a.SESSION_ID]
        assert 1 <= span.attributes[a.TURN_NUMBER] < 2**31
    if a.SPAN_TURN in {span.name for span in spans}:
        assert_all_tagged(spans)
