"""The support desk of `turntrace demo`: what it promises to show is there."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from turntrace import SessionTracker, analytics
from turntrace import attributes as a
from turntrace.boundary import strict
from turntrace.demo import support_desk
from turntrace.demo.desk_script import ANSWERS
from turntrace.records import Step, TurnSummary
from turntrace.summaries import SessionSummary
from turntrace.testing import Capture, CapturedSpan, assert_all_tagged, captured_spans


@pytest.fixture(scope="module")
def desk() -> Iterator[tuple[SessionTracker, list[CapturedSpan], list[str]]]:
    with strict(), Capture() as capture:
        tracker = capture.tracker()
        session_ids = support_desk.run(tracker)
        yield tracker, captured_spans(capture.spans()), session_ids


@pytest.fixture(scope="module")
def spans(desk: tuple[SessionTracker, list[CapturedSpan], list[str]]) -> list[CapturedSpan]:
    return desk[1]


@pytest.fixture(scope="module")
def sessions(desk: tuple[SessionTracker, list[CapturedSpan], list[str]]) -> list[SessionSummary]:
    tracker, _, session_ids = desk
    found = [tracker.session_summary(session_id) for session_id in session_ids]
    return [session for session in found if session is not None]


@pytest.fixture(scope="module")
def turns(desk: tuple[SessionTracker, list[CapturedSpan], list[str]]) -> list[tuple[TurnSummary, list[Step]]]:
    tracker, _, session_ids = desk
    return [turn for session_id in session_ids for turn in tracker.ledger.turns(session_id)]


def test_three_users_have_five_sessions_and_20_odd_turns(
    sessions: list[SessionSummary], turns: list[tuple[TurnSummary, list[Step]]]
) -> None:
    assert len({session.id for session in sessions}) == 5
    assert sorted(Counter(session.user_id for session in sessions).values()) == [1, 2, 2]
    assert 20 <= len(turns) == sum(session.total_turns for session in sessions) < 30
    assert {session.channel for session in sessions} == {"web", "mobile", "api"}
    assert {session.tier for session in sessions} == {"premium", "free", "enterprise"}
    assert {session.end_reason for session in sessions} == {"user_exit", "completed", "handoff", "inactive_timeout"}
    assert all(session.total_cost_usd > 0 and session.unpriced_calls == 0 for session in sessions)


def test_every_span_is_tagged(spans: list[CapturedSpan]) -> None:
    assert_all_tagged(spans)
    topics = {span.attributes.get(a.CONVERSATION_TOPIC) for span in spans if span.name == a.SPAN_TURN}
    assert topics == {"late_order", "shipping", "invoices", "account"}


def test_a_conversation_goes_on_in_the_next_session(
    sessions: list[SessionSummary], turns: list[tuple[TurnSummary, list[Step]]]
) -> None:
    first, second = ([t for t, _ in turns if t.session_id == session.id] for session in sessions[:2])
    assert {turn.conversation_id for turn in first} == {turn.conversation_id for turn in second}
    assert [turn.number for turn in first + second] == list(range(1, len(first + second) + 1))
    assert sessions[1].previous_id == sessions[0].id


def test_a_tool_fails_once_and_the_agent_survives_it(turns: list[tuple[TurnSummary, list[Step]]]) -> None:
    [(turn, steps)] = [(turn, steps) for turn, steps in turns if any(s.error and s.kind == "tool" for s in steps)]
    assert [(step.name, step.error) for step in steps if step.kind == "tool"] == [
        ("order_status", None),
        ("refund", None),  # it asks a person
        ("refund", "ConnectionError"),
        ("refund", None),
    ]
    assert (turn.status, turn.error, turn.output_type) == ("completed", None, "answer")


def test_a_person_approves_the_refund_within_its_turn(
    sessions: list[SessionSummary], turns: list[tuple[TurnSummary, list[Step]]], spans: list[CapturedSpan]
) -> None:
    [(turn, steps)] = [(turn, steps) for turn, steps in turns if turn.wait_ms]
    assert (turn.number, turn.intent, turn.status) == (5, "refund", "completed")
    assert len([step for step in steps if step.name == "support_desk"]) == 2
    assert sessions[support_desk.SHOWN].wait_ms == turn.wait_ms >= 1_000
    assert turn.ended_ns is not None
    assert turn.latency_ms is not None
    assert turn.latency_ms <= (turn.ended_ns - turn.started_ns) // 1_000_000 - turn.wait_ms + 1  # the work alone
    of_turn = [span for span in spans if span.attributes.get(a.TURN_ID) == turn.id]
    assert {span.trace_id for span in of_turn} == {turn.trace_id}
    assert len([span for span in of_turn if span.name == a.SPAN_TURN]) == 1


def test_the_window_fills_up_and_is_pruned(turns: list[tuple[TurnSummary, list[Step]]]) -> None:
    [longest, *others] = sorted(
        ([t for t, _ in turns if t.conversation_id == each] for each in {t.conversation_id for t, _ in turns}),
        key=lambda found: -len(found),
    )
    assert [turn.number for turn in longest if turn.prunings] == [6, 7, 8]
    assert all(turn.messages_pruned > 0 and turn.tokens_pruned > 0 for turn in longest[5:])
    assert all(turn.prunings == 0 for found in others for turn in found)
    fill = [turn.context_window_pct or 0.0 for turn in longest]
    assert 0.0 < fill[0] < fill[1] < fill[2] < fill[3] < fill[4] <= 0.8
    assert all(0.6 < share <= 0.8 for share in fill[5:])


def test_a_turn_fails_and_its_user_leaves(
    desk: tuple[SessionTracker, list[CapturedSpan], list[str]],
    sessions: list[SessionSummary],
    turns: list[tuple[TurnSummary, list[Step]]],
) -> None:
    [failed] = [turn for turn, _ in turns if turn.status != "completed"]
    assert (failed.status, failed.error, failed.output_type) == ("failed", "TimeoutError", "error")
    [left] = [session for session in sessions if session.dropoff]
    assert left.id == failed.session_id
    assert (left.last_turn, left.last_intent, left.last_action) == (failed.number, "account", "failed")
    by_action = analytics.dropoff_by_action(desk[0].ledger)
    assert {each.at: (each.ended, each.dropoffs) for each in by_action} == {"failed": (1, 1), "answered": (4, 0)}


def test_a_journey_is_converted_and_users_say_how_it_was(
    desk: tuple[SessionTracker, list[CapturedSpan], list[str]], sessions: list[SessionSummary]
) -> None:
    ledger = desk[0].ledger
    [funnel] = analytics.funnels(ledger)
    assert (funnel.name, funnel.begun, funnel.converted) == ("order_help", 2, 1)
    assert [(at.stage, at.entered) for at in funnel.stages] == [("asked", 2), ("looked_up", 2), ("refunded", 1)]
    assert [session.user_satisfaction for session in sessions] == [None, 1.0, 0.0, None, None]


def test_two_nodes_run_side_by_side(turns: list[tuple[TurnSummary, list[Step]]]) -> None:
    side_by_side = 0
    for _, steps in turns:
        [one], [other] = ([step for step in steps if step.name == name] for name in ("account", "knowledge"))
        assert one.parent_id == other.parent_id
        first, second = sorted((one, other), key=lambda step: step.start_ms)
        side_by_side += second.start_ms < first.start_ms + first.duration_ms
    assert side_by_side > len(turns) / 2  # on a busy machine a thread may come late


def test_the_model_streams(turns: list[tuple[TurnSummary, list[Step]]]) -> None:
    for turn, _ in turns:
        if turn.status == "completed":
            assert turn.time_to_first_token_ms is not None
            assert 0 < turn.time_to_first_token_ms < turn.latency_ms


def test_nothing_that_was_said_is_in_a_span(spans: list[CapturedSpan]) -> None:
    shown = repr([(span.name, span.attributes) for span in spans])
    said = [*ANSWERS, *(answer for answers in ANSWERS.values() for answer in answers if isinstance(answer, str))]
    assert [text for text in said if len(text) > 12 and text in shown] == []
    assert "example.com" not in shown


def test_it_runs_without_a_network_and_keeps_its_ledger_in_the_users_folder(tmp_path: Path) -> None:
    code = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
sys.argv = ["turntrace", "demo"]
from turntrace.cli.main import main
main()
"""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment = {**kept, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:AgentStatePydantic has been moved", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    [ledger] = tmp_path.rglob("ledger.db")
    assert str(ledger) in done.stdout
    assert "tool refund" in done.stdout
