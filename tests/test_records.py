"""The records render themselves: what is set, under the right names, and nothing else."""

import dataclasses
import re
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turntrace import attributes as a
from turntrace import records
from turntrace.records import (
    LLMCall,
    Record,
    SessionFacts,
    Step,
    TurnRequest,
    TurnSummary,
    TurnTags,
    Usage,
    elapsed_ms,
    iso_time,
)
from turntrace.summaries import SessionSummary

steady = settings(deadline=None, derandomize=True)
NOON = 1_767_268_800_000_000_000  # 2026-01-01T12:00:00Z
SECOND = 1_000_000_000


def test_a_time_is_written_in_utc_with_microseconds() -> None:
    assert iso_time(NOON + 1_234_567) == "2026-01-01T12:00:00.001234+00:00"
    assert iso_time(NOON) == "2026-01-01T12:00:00.000000+00:00"
    assert iso_time(0) == "1970-01-01T00:00:00.000000+00:00"


@steady
@given(st.integers(min_value=0, max_value=4_102_444_800 * SECOND))
def test_a_written_time_can_be_read_back_to_the_microsecond(ns: int) -> None:
    read = datetime.fromisoformat(iso_time(ns))
    assert read.utcoffset() == UTC.utcoffset(None)
    since = read - datetime(1970, 1, 1, tzinfo=UTC)
    assert (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds == ns // 1000


@steady
@given(st.lists(st.integers(min_value=0, max_value=4_102_444_800 * SECOND), min_size=2))
def test_written_times_sort_as_the_times_do(times: list[int]) -> None:
    microseconds = sorted(ns // 1000 for ns in times)
    assert sorted(iso_time(us * 1000) for us in microseconds) == [iso_time(us * 1000) for us in microseconds]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 0, 0),
        (NOON, NOON + 999_999, 0),
        (NOON, NOON + 1_000_000, 1),
        (NOON, NOON + 90 * SECOND, 90_000),
        (NOON, NOON - 1, 0),
        (NOON, 0, 0),
    ],
)
def test_elapsed_time_is_in_whole_milliseconds_and_never_negative(start: int, end: int, expected: int) -> None:
    assert elapsed_ms(start, end) == expected


def test_a_session_at_its_start() -> None:
    facts = SessionFacts(
        id="s1",
        user_id="u" * 64,
        channel="web",
        type="chat",
        tier="premium",
        org_id="org1",
        locale="de-AT",
        client_version="1.2",
        previous_id="s0",
        sessions_total=2,
        started_ns=NOON + 5_000,
    )
    assert facts.attributes() == {
        "session.id": "s1",
        "user.id": "u" * 64,
        "session.channel": "web",
        "session.type": "chat",
        "user.tier": "premium",
        "user.org_id": "org1",
        "session.locale": "de-AT",
        "session.client_version": "1.2",
        "session.previous_id": "s0",
        "user.sessions_total": 2,
        "session.start_time": "2026-01-01T12:00:00.000005+00:00",
    }


def test_a_session_of_which_little_is_known() -> None:
    assert SessionFacts(id="s1", started_ns=NOON + 5_000).attributes() == {
        "session.id": "s1",
        "session.start_time": "2026-01-01T12:00:00.000005+00:00",
    }


def test_the_tags_of_a_turn_stand_under_all_their_names() -> None:
    tags = TurnTags(
        session_id="s1",
        turn_id="t1",
        conversation_id="c1",
        number=3,
        user_id="u1",
        channel="web",
        tier="premium",
        org_id="org1",
        topic="billing",
    )
    assert tags.attributes() == {
        "session.id": "s1",
        "turn.id": "t1",
        "conversation.id": "c1",
        "gen_ai.conversation.id": "c1",
        "turn.number": 3,
        "conversation.turn_number": 3,
        "user.id": "u1",
        "session.channel": "web",
        "user.tier": "premium",
        "user.org_id": "org1",
        "conversation.topic": "billing",
    }
    assert set(tags.attributes()) == set(a.EVERY_SPAN)


def test_the_tags_of_a_turn_of_an_unknown_user() -> None:
    tags = TurnTags(session_id="s1", turn_id="t1", conversation_id="c1", number=1)
    assert set(tags.attributes()) == set(a.REQUIRED_ON_EVERY_SPAN)


def test_a_call_of_a_model_with_all_kinds_of_tokens() -> None:
    call = LLMCall(
        model="gpt-4o",
        provider="openai",
        usage=Usage(100, 20, cache_read_tokens=60, cache_creation_tokens=10, reasoning_tokens=5),
    )
    assert call.attributes() == {
        "gen_ai.response.model": "gpt-4o",
        "gen_ai.provider.name": "openai",
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 60,
        "gen_ai.usage.cache_creation.input_tokens": 10,
        "gen_ai.usage.reasoning.output_tokens": 5,
    }


def test_a_call_leaves_out_kinds_of_tokens_that_do_not_occur() -> None:
    assert LLMCall(usage=Usage(7, 0)).attributes() == {"gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 0}
    assert LLMCall(model="m").attributes() == {"gen_ai.response.model": "m"}
    assert LLMCall().attributes() == {}


def test_a_turn_at_its_end() -> None:
    turn = TurnSummary(
        id="t1",
        session_id="s1",
        conversation_id="c1",
        user_id="u1",
        number=4,
        started_ns=NOON,
        ended_ns=NOON + SECOND,
        status="completed",
        role="user",
        input_length=12,
        output_length=34,
        input_type="question",
        output_type="answer",
        has_attachments=False,
        intent="cancel",
        agent_runs=1,
        tool_calls=2,
        llm_calls=3,
        input_tokens=100,
        output_tokens=20,
        cost_usd=0.5,
        unpriced_calls=1,
        latency_ms=1000,
        wait_ms=7,
        time_to_first_token_ms=80,
        model="gpt-4o",
        error=None,
        trace_id="f" * 32,
        root_span_id="f" * 16,
    )
    assert turn.attributes() == {
        "conversation.session_id": "s1",
        "conversation.total_turns": 4,
        "turn.status": "completed",
        "turn.role": "user",
        "turn.input_length": 12,
        "turn.output_length": 34,
        "turn.input_type": "question",
        "turn.output_type": "answer",
        "turn.has_attachments": False,
        "turn.intent": "cancel",
        "turn.agent_runs": 1,
        "turn.tool_calls": 2,
        "turn.llm_calls": 3,
        "turn.input_tokens": 100,
        "turn.output_tokens": 20,
        "turn.cost_usd": 0.5,
        "turn.latency_ms": 1000,
        "turn.wait_ms": 7,
        "turn.time_to_first_token_ms": 80,
    }


def test_a_turn_without_input_and_output_has_its_counts() -> None:
    assert TurnSummary(id="t1", session_id="s1", number=1, status="failed").attributes() == {
        "conversation.session_id": "s1",
        "conversation.total_turns": 1,
        "turn.status": "failed",
        "turn.agent_runs": 0,
        "turn.tool_calls": 0,
        "turn.llm_calls": 0,
        "turn.input_tokens": 0,
        "turn.output_tokens": 0,
        "turn.cost_usd": 0.0,
        "turn.latency_ms": 0,
        "turn.wait_ms": 0,
    }


def ended_session() -> SessionSummary:
    return SessionSummary(
        id="s1",
        user_id="u1",
        channel="web",
        started_ns=NOON,
        last_activity_ns=NOON + 60 * SECOND,
        ended_ns=NOON + 90 * SECOND,
        end_reason="completed",
        total_turns=4,
        input_tokens=100,
        output_tokens=60,
        total_cost_usd=0.25,
        active_ms=10_000,
        wait_ms=500,
        user_sessions_total=3,
        user_avg_session_length=2.5,
        user_retention_days=12,
    )


def test_a_session_at_its_end() -> None:
    assert ended_session().attributes() == {
        "session.start_time": "2026-01-01T12:00:00.000000+00:00",
        "session.end_time": "2026-01-01T12:01:30.000000+00:00",
        "session.end_reason": "completed",
        "session.duration_ms": 60_000,
        "session.active_ms": 10_000,
        "session.wait_ms": 500,
        "session.total_turns": 4,
        "session.total_tokens": 160,
        "session.total_cost_usd": 0.25,
        "session.avg_turn_latency_ms": 2500.0,
        "session.avg_turn_tokens": 40.0,
        "session.inactive_timeout": False,
        "session.idle_time_ms": 30_000,
        "user.sessions_total": 3,
        "user.avg_session_length": 2.5,
        "user.retention_days": 12,
    }


def test_a_session_that_silence_ended_says_so() -> None:
    ended = dataclasses.replace(ended_session(), end_reason="inactive_timeout")
    assert ended.attributes()["session.inactive_timeout"] is True


def test_a_session_without_turns_has_no_means() -> None:
    empty = SessionSummary(id="s1", started_ns=NOON, last_activity_ns=NOON, ended_ns=NOON, end_reason="user_exit")
    assert empty.avg_turn_latency_ms is None
    assert empty.avg_turn_tokens is None
    assert not {"session.avg_turn_latency_ms", "session.avg_turn_tokens"} & set(empty.attributes())


def test_an_open_session_says_nothing_of_an_end() -> None:
    opened = dataclasses.replace(ended_session(), ended_ns=None, end_reason=None)
    assert not {
        "session.end_time",
        "session.end_reason",
        "session.inactive_timeout",
        "session.idle_time_ms",
    } & set(opened.attributes())


def test_a_session_whose_clock_went_back_has_no_negative_times() -> None:
    ended = dataclasses.replace(ended_session(), last_activity_ns=NOON - SECOND, ended_ns=NOON - 2 * SECOND)
    assert ended.attributes()["session.duration_ms"] == 0
    assert ended.attributes()["session.idle_time_ms"] == 0


RECORDS = [
    kind
    for kind in vars(records).values()
    if isinstance(kind, type) and issubclass(kind, Record) and kind is not Record
]
FILLED: dict[str, object] = {"usage": Usage(1, 2, 3, 4, 5)}


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_a_record_renders_only_names_that_exist_and_leaves_out_what_is_unset(kind: type[Record]) -> None:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    numbers = {field.name for field in fields if re.search("int|float", str(field.type))}
    full = kind(**{field.name: FILLED.get(field.name, 1 if field.name in numbers else "x") for field in fields})
    assert set(full.attributes()) <= set(a.ATTRIBUTES)
    empty = kind(**{field.name: 0 if field.name in numbers and field.default == 0 else None for field in fields})
    assert None not in empty.attributes().values()


@pytest.mark.parametrize("kind", [*RECORDS, Usage, Step, TurnRequest], ids=lambda kind: kind.__name__)
def test_a_record_is_frozen_and_has_slots(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__slots__" in vars(kind)
