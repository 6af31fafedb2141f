"""Reading recorded conversations, and playing those that are unusual."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import BaseMessage

from turntrace.demo.player import Player
from turntrace.demo.recorded import stage_for
from turntrace.demo.recording import Transcript
from turntrace.demo.replay import Replay, Totals
from turntrace.demo.transcripts import find_sources, read_lines
from turntrace.errors import TranscriptError
from turntrace.records import Step, TurnSummary

Message = dict[str, Any]

SYSTEM: Message = {"role": "system", "content": "You help."}


def user(text: Any = "Where is it?", **more: Any) -> Message:
    return {"role": "user", "content": text, **more}


def assistant(text: Any = "On its way.", *calls: tuple[str, str, str], **more: Any) -> Message:
    message = {"role": "assistant", "content": text, **more}
    if calls:
        message["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, name, arguments in calls
        ]
    return message


def result(call_id: str, text: Any = "sent", **more: Any) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": text, **more}


def conversation(*messages: Any, **changed: Any) -> dict[str, Any]:
    return {
        "conversation_id": "c-1",
        "user_id": "alice@example.com",
        "topic": "orders",
        "model": "gpt-4o",
        "outcome": {"success": True},
        "messages": list(messages or (SYSTEM, user(), assistant())),
        **changed,
    }


class Played:
    """What a replay of some lines left behind."""

    def __init__(self, player: Player, totals: Totals, problems: list[str]) -> None:
        self.player = player
        self.totals = totals
        self.problems = problems

    def turns(self) -> list[tuple[TurnSummary, list[Step]]]:
        ledger = self.player.tracker.ledger
        return [turn for session in reversed(ledger.sessions()) for turn in ledger.turns(session.id)]


Play = Callable[..., Played]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "talks.jsonl"


@pytest.fixture
def play(file: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Play:
    """Replay lines (objects, or bytes as they are) into a ledger, which is the same for each call in a test."""

    def run(*lines: dict[str, Any] | bytes, **options: Any) -> Played:
        written = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        file.write_bytes(b"\n".join(written))
        player = Player(f"sqlite:///{tmp_path / 'ledger.db'}")
        request.addfinalizer(player.close)
        problems: list[str] = []
        replay = Replay(player, on_problem=lambda line, why: problems.append(f"{line.number}: {why}"), **options)
        return Played(player, replay.run(read_lines(find_sources([str(file)]))), problems)

    return run


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# --- lines that cannot be played --------------------------------------------------------------------------------------
def without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in conversation().items() if key not in names}


MALFORMED: dict[str, tuple[Any, str]] = {
    "no json": (b"secret words", "it is not JSON: Expecting value at column 1"),
    "cut off": (b'{"conversation_id": "secret', "it is not JSON: Unterminated string starting at column 21"),
    "list": (b"[1, 2]", "it is not a JSON object"),
    "string": (b'"secret"', "it is not a JSON object"),
    "nan": (b'{"user_id": NaN}', "it is not JSON: NaN is no number of JSON"),
    "infinity": (b'{"user_id": -Infinity}', "it is not JSON: -Infinity is no number of JSON"),
    "same key twice": (
        b'{"user_id": "a", "user_id": "b"}',
        "an object has the same key twice",
    ),
    "same key twice below": (b'{"outcome": {"success": true, "success": false}}', "an object has the same key twice"),
    "no utf-8": (b'{"user_id": "caf\xe9"}', "it is not UTF-8: byte 17 cannot be read"),
    "utf-16": ("{}".encode("utf-16"), "it is not UTF-8: byte 1 cannot be read"),
    "byte order mark": (b"\xef\xbb\xbf{}", "it begins with a byte order mark"),
    "nested too deeply": (b"[" * 100_000, "it is nested too deeply"),
    "two objects": (b"{} {}", "it is not JSON: Extra data at column 4"),
    "no conversation": (without("conversation_id"), "conversation_id is missing"),
    "no user": (without("user_id"), "user_id is missing"),
    "no model": (without("model"), "model is missing"),
    "no messages": (without("messages"), "messages is missing"),
    "conversation null": (conversation(conversation_id=None), "conversation_id is not a string"),
    "conversation number": (conversation(conversation_id=7), "conversation_id is not a string"),
    "conversation empty": (conversation(conversation_id=""), "conversation_id cannot be used: it is empty"),
    "conversation long": (conversation(conversation_id="x" * 201), "conversation_id cannot be used: it has 201 char"),
    "conversation not ascii": (conversation(conversation_id="c-\u00e9"), "its character 3 is U+00E9"),
    "user empty": (conversation(user_id=""), "user_id has 0 characters. Allowed are 1 to 200"),
    "user long": (conversation(user_id="x" * 201), "user_id has 201 characters"),
    "user object": (conversation(user_id={}), "user_id is not a string"),
    "topic long": (conversation(topic="x" * 201), "topic has 201 characters"),
    "success text": (conversation(outcome={"success": "yes"}), "outcome.success is not true or false"),
    "outcome text": (conversation(outcome="good"), "outcome is not an object"),
    "messages object": (conversation(messages={}), "messages is not a list"),
    "messages empty": (conversation(messages=[]), "it has no message of a user or an assistant"),
    "system only": (conversation(SYSTEM), "it has no message of a user or an assistant"),
    "message text": (conversation("secret"), "message 1: it is not a JSON object"),
    "no role": (conversation({"content": "secret"}), "message 1: role is missing"),
    "unknown role": (conversation(SYSTEM, {"role": "secret", "content": ""}), "message 2: its role is none of system"),
    "no content": (conversation({"role": "user"}), "message 1: its content is neither a string nor a list of parts"),
    "content number": (conversation(user(7)), "message 1: its content is neither"),
    "part text": (conversation(user(["secret"])), "message 1: its content is neither"),
    "part without text": (conversation(user([{"type": "text"}])), "message 1: its content is neither"),
    "assistant silent": (conversation(user(), assistant(None)), "message 2: it has neither content nor tool_calls"),
    "calls object": (conversation(user(), assistant(tool_calls={})), "message 2: tool_calls is not a list"),
    "call text": (conversation(user(), assistant(tool_calls=["x"])), "message 2: tool call 1: it is not a JSON object"),
    "call without id": (
        conversation(user(), assistant(tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])),
        "message 2: tool call 1: id is missing",
    ),
    "call without name": (
        conversation(user(), assistant(tool_calls=[{"id": "1", "function": {"arguments": "{}"}}])),
        "message 2: tool call 1: name is missing",
    ),
    "call id long": (
        conversation(user(), assistant(None, ("x" * 201, "f", "{}"))),
        "tool call 1: id has 201 characters",
    ),
    "arguments object": (
        conversation(user(), assistant(tool_calls=[{"id": "1", "function": {"name": "f", "arguments": {}}}])),
        "message 2: tool call 1: arguments is not a string",
    ),
    "same call twice": (
        conversation(user(), assistant(None, ("1", "f", "{}"), ("1", "f", "{}"))),
        "message 2: tool call 2: its id stands twice in one message",
    ),
    "result without call": (conversation(user(), result("1")), "message 2: it is the result of a tool, and no call"),
    "result before its call": (
        conversation(user(), result("1"), assistant(None, ("1", "f", "{}"))),
        "message 2: it is the result of a tool, and no call",
    ),
    "result twice": (
        conversation(user(), assistant(None, ("1", "f", "{}")), result("1"), result("1")),
        "message 4: it is the result of a tool, and no call",
    ),
    "result of nothing": (conversation(user(), {"role": "tool", "content": "x"}), "message 2: tool_call_id is missing"),
    "usage text": (conversation(user(), assistant(usage="many")), "message 2: usage is not an object"),
    "usage half": (conversation(user(), assistant(usage={"prompt_tokens": 1})), "usage.completion_tokens is missing"),
    "usage negative": (
        conversation(user(), assistant(usage={"prompt_tokens": -1, "completion_tokens": 1})),
        "message 2: usage.prompt_tokens is not a number of tokens",
    ),
    "usage true": (
        conversation(user(), assistant(usage={"prompt_tokens": True, "completion_tokens": 1})),
        "message 2: usage.prompt_tokens is not a whole number",
    ),
}


@pytest.mark.parametrize(("line", "why"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_is_named_and_never_shown(line: Any, why: str, file: Path) -> None:
    written = line if isinstance(line, bytes) else json.dumps(line).encode()
    file.write_bytes(b"\n" + written + b"\n\n")
    [found] = read_lines(find_sources([str(file)]))
    assert (found.source, found.number, found.transcript) == (str(file), 2, None)
    assert found.problem is not None
    assert why in found.problem
    assert "secret" not in found.problem
    assert "\n" not in found.problem


@pytest.mark.parametrize("line", [without("topic", "outcome"), conversation(topic=None, outcome={})])
def test_topic_and_outcome_need_not_be_known(play: Play, line: dict[str, Any]) -> None:
    played = play(line)
    assert (played.problems, played.totals.turns) == ([], 1)
    [session] = played.player.tracker.ledger.sessions()
    assert session.end_reason == "user_exit"


def test_nothing_of_the_good_lines_between_malformed_ones_is_lost(play: Play, is_async: bool) -> None:
    lines: list[Any] = []
    for name, (line, _) in MALFORMED.items():
        lines += [line] if len(lines) % 7 else [conversation(conversation_id=name), line]
    good = len(lines) - len(MALFORMED)
    played = play(*lines, is_async=is_async, concurrency=3)
    named = [int(problem.partition(":")[0]) for problem in played.problems]
    assert named == [number for number, line in enumerate(lines, start=1) if not is_good(line)]
    assert (played.totals.played, played.totals.sessions) == (good, good)
    assert played.totals.malformed == len(MALFORMED)
    assert played.totals.turns == good


def is_good(line: Any) -> bool:
    return isinstance(line, dict) and line.get("conversation_id") in MALFORMED


def test_empty_lines_and_other_ends_of_lines_are_fine(play: Play) -> None:
    line = json.dumps(conversation()).encode()
    played = play(b"", b"  \t", line + b"\r", b"", b"")
    assert played.problems == []
    assert played.totals.played == 1


def test_a_line_too_long_to_be_held_is_left_out(play: Play) -> None:
    megabyte = 1024 * 1024
    for length in (64 * megabyte, 130 * megabyte):
        played = play(conversation(conversation_id=f"c-{length}"), b"x" * length, conversation())
        assert played.problems == ["2: it is longer than 64 MB"]
        assert played.totals.conversations == 2


# --- finding the files ------------------------------------------------------------------------------------------------
def test_a_folder_stands_for_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json", "d.jsonl.txt"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "folder.jsonl").mkdir()
    names = [source.name for source in find_sources([str(tmp_path), str(tmp_path / "c.json"), "-"])]
    assert names == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), str(tmp_path / "c.json"), "<stdin>"]


def test_what_cannot_be_read_is_named_before_anything_is(tmp_path: Path) -> None:
    with pytest.raises(TranscriptError, match=r"The file .*missing\.jsonl cannot be read: No such file or directory"):
        find_sources([str(tmp_path / "missing.jsonl")])
    with pytest.raises(TranscriptError, match=r"The folder .* has no file \*\.jsonl"):
        find_sources([str(tmp_path)])
    with pytest.raises(TranscriptError, match=r"The standard input \(-\) can be read only once"):
        find_sources(["-", "-"])


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, json.dumps(conversation()).encode() + b"\nnonsense\n")
    os.close(write)
    lines = list(read_lines(find_sources([f"/dev/fd/{read}"])))
    os.close(read)
    assert [line.problem for line in lines] == [None, "it is not JSON: Expecting value at column 1"]


def test_a_file_that_goes_away_meanwhile_is_named_and_the_next_is_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(conversation(conversation_id=name)) + "\n")
    sources = find_sources([str(tmp_path)])
    (tmp_path / "a.jsonl").unlink()
    gone, line = read_lines(sources)
    assert (gone.number, gone.problem) == (1, "the file cannot be read on: No such file or directory")
    assert line.transcript is not None


# --- how an unusual conversation is played ----------------------------------------------------------------------------
def test_each_of_several_messages_in_a_row_is_a_turn(play: Play, is_async: bool) -> None:
    played = play(conversation(SYSTEM, user("One."), user("Two?"), assistant("Yes."), user("Bye")), is_async=is_async)
    found = [(t.number, t.role, t.input_length, t.output_length, t.llm_calls) for t, _ in played.turns()]
    assert found == [(1, "user", 4, None, 0), (2, "user", 4, 4, 1), (3, "user", 3, None, 0)]
    assert [turn.output_type for turn, _ in played.turns()] == [None, "answer", None]


def test_what_the_agent_says_first_is_a_turn_that_it_began(play: Play, is_async: bool) -> None:
    played = play(conversation(SYSTEM, assistant("Hello!"), user("Hi."), assistant("Well?")), is_async=is_async)
    found = [(t.number, t.role, t.input_length, t.output_length) for t, _ in played.turns()]
    assert found == [(1, "assistant", None, 6), (2, "user", 3, 5)]


def test_a_call_without_a_result_is_not_made(play: Play, is_async: bool) -> None:
    last = assistant(None, ("1", "find", "{}"), ("2", "sell", "{}"))
    played = play(conversation(user(), last, result("2")), is_async=is_async)
    [(turn, steps)] = played.turns()
    assert [step.name for step in steps if step.kind == "tool"] == ["sell"]
    assert (turn.status, turn.tool_calls, turn.llm_calls, turn.error) == ("completed", 1, 1, None)

    played = play(conversation(user(), assistant(None, ("1", "f", "{}")), conversation_id="c-2"), is_async=is_async)
    [*_, (turn, _)] = played.turns()
    assert (turn.status, turn.tool_calls, turn.llm_calls, turn.output_type) == ("completed", 0, 1, "tool_result")


def messages_of(transcript: Transcript) -> list[BaseMessage]:
    """Play a transcript, and return the messages that the graph has in the end."""
    stage = stage_for(transcript)
    config: Any = {"configurable": {"thread_id": "c"}}
    for exchange in transcript.exchanges:
        stage.graph.invoke(stage.script.begin(exchange), config)
    messages: list[BaseMessage] = stage.graph.get_state(config).values["messages"]
    return messages


def read(file: Path, *messages: Message, **changed: Any) -> Transcript:
    file.write_text(json.dumps(conversation(*messages, **changed)))
    [line] = read_lines(find_sources([str(file)]))
    assert line.problem is None
    assert line.transcript is not None
    return line.transcript


def test_results_in_another_order_come_back_to_their_calls(file: Path) -> None:
    calls = assistant(None, ("1", "find", "{}"), ("2", "find", "{}"), ("3", "sell", "{}"))
    said = messages_of(
        read(file, user(), calls, result("3", "three"), result("1", "one"), result("2", "two"), assistant())
    )
    results = [(message.tool_call_id, message.name, message.content) for message in said if message.type == "tool"]  # type: ignore[attr-defined]
    assert results == [("1", "find", "one"), ("2", "find", "two"), ("3", "sell", "three")]


def test_an_id_that_comes_again_has_its_own_result(file: Path) -> None:
    first, second = (assistant(None, ("1", "find", arguments)) for arguments in ('{"a": 1}', '{"a": 2}'))
    said = messages_of(read(file, user(), first, result("1", "one"), assistant(), user(), second, result("1", "two")))
    assert [message.content for message in said if message.type == "tool"] == ["one", "two"]


def test_a_result_that_comes_late_belongs_to_its_call(file: Path) -> None:
    call = assistant(None, ("1", "find", "{}"))
    said = messages_of(read(file, user("A"), call, user("B"), result("1", "late"), assistant("C")))
    assert [message.content for message in said] == ["A", "", "late", "B", "C"]


def test_several_replies_in_a_row_are_calls_of_the_model(file: Path, play: Play) -> None:
    messages = [user("A"), assistant("B"), assistant("C"), SYSTEM, user("D")]
    assert [message.content for message in messages_of(read(file, *messages))] == ["A", "B", "C", "You help.", "D"]
    played = play(conversation(*messages))
    assert [turn.llm_calls for turn, _ in played.turns()] == [2, 0]


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "not json",
        "[1]",
        '{"self": 1, "config": 2, "runtime": 3, "call_id": 4, "arguments": 5, "run_manager": 6}',
        '{"n": 123456789012345678901234567890}',
        '{"text": "\\ud800"}',
        '{"n": NaN}',
    ],
)
def test_any_arguments_reach_the_tool(arguments: str, play: Play, is_async: bool) -> None:
    lines = conversation(user(), assistant(None, ("1", "find", arguments)), result("1"), assistant())
    played = play(lines, is_async=is_async)
    assert played.problems == []
    [(turn, steps)] = played.turns()
    assert (turn.tool_calls, turn.llm_calls, turn.error) == (1, 2, None)
    assert [step.error for step in steps] == [None] * len(steps)


def test_half_a_surrogate_pair_and_a_nul_are_played(play: Play) -> None:
    played = play(conversation(user("a\ud83d b\x00"), assistant("\udc00"), topic="half \ud83d"))
    assert played.problems == []
    [(turn, _)] = played.turns()
    assert (turn.input_length, turn.output_length) == (5, 1)


def test_parts_are_read_and_attachments_counted(play: Play) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    played = play(conversation(user([{"type": "text", "text": "What is it?"}, picture]), assistant()))
    [(turn, _)] = played.turns()
    assert (turn.has_attachments, turn.input_length, turn.input_type) == (True, 11, "question")


def test_a_refusal_is_one(play: Play) -> None:
    played = play(conversation(user(), assistant(None, refusal="I can't help with that.")))
    [(turn, _)] = played.turns()
    assert (turn.output_type, turn.output_length) == ("refusal", 23)


def test_recorded_usage_goes_before_counting(play: Play) -> None:
    usage = {
        "prompt_tokens": 1000,
        "completion_tokens": 200,
        "prompt_tokens_details": {"cached_tokens": 400},
        "completion_tokens_details": {"reasoning_tokens": 50},
    }
    played = play(conversation(user(), assistant(usage=usage), user(), assistant()))
    (first, _), (second, _) = played.turns()
    assert (first.input_tokens, first.output_tokens) == (1000, 200)
    # gpt-4o: $2.50 a million tokens, $1.25 of cached ones, $10 of output
    assert first.cost_usd == pytest.approx((600 * 2.5 + 400 * 1.25 + 200 * 10) / 1e6)
    assert 0 < second.input_tokens < 100


def test_a_model_without_a_price_costs_nothing_and_is_counted(play: Play) -> None:
    played = play(conversation(user(), assistant(), model="our-own-model"))
    assert (played.totals.cost_usd, played.totals.unpriced_calls) == (0.0, 1)
    assert played.totals.input_tokens > 0


@pytest.mark.parametrize(
    ("messages", "success", "reason"),
    [
        ((user(), assistant()), True, "completed"),
        ((user(), assistant()), False, "user_exit"),
        ((user(), assistant(None, ("1", "transfer_to_human", "{}")), result("1")), True, "handoff"),
        ((user(), assistant(None, ("1", "transfer_to_human", "{}")), result("1")), False, "handoff"),
        (
            (user(), assistant(None, ("1", "transfer_to_x", "{}"), ("2", "f", "{}")), result("1"), result("2")),
            True,
            "completed",
        ),
    ],
)
def test_the_outcome_says_why_the_session_ended(
    messages: tuple[Message, ...], success: bool, reason: str, play: Play
) -> None:
    played = play(conversation(*messages, outcome={"success": success}))
    [session] = played.player.tracker.ledger.sessions()
    assert (session.end_reason, session.channel) == (reason, "replay")


# --- the same conversation again --------------------------------------------------------------------------------------
TALK = [SYSTEM, user("A"), assistant("B"), user("C"), assistant("D")]


def test_a_conversation_that_has_grown_goes_on(play: Play, is_async: bool) -> None:
    play(conversation(*TALK), is_async=is_async)
    grown = conversation(*TALK, user("E"), assistant("F"))
    played = play(grown, is_async=is_async)
    assert (played.totals.continued, played.totals.turns, played.totals.sessions) == (1, 3, 1)
    assert [turn.number for turn, _ in played.turns()] == [1, 2, 3]
    at_once = play({**grown, "conversation_id": "at once"}, is_async=is_async).turns()[3:]
    assert [t.input_tokens for t, _ in at_once] == [t.input_tokens for t, _ in played.turns()[:3]]

    older = play(conversation(*TALK))
    assert (older.totals.skipped, older.totals.turns) == (1, 4 - 1)


@pytest.mark.parametrize(
    "other",
    [
        conversation(*TALK, user_id="bob@example.com"),
        conversation(*TALK[:-1], assistant("d")),
        conversation(SYSTEM, user("a"), *TALK[2:]),
        conversation(*TALK, model="gpt-4o-mini"),
    ],
    ids=["user", "last reply", "first message", "model"],
)
def test_another_conversation_of_the_same_id_is_refused(other: dict[str, Any], play: Play) -> None:
    before = play(conversation(*TALK)).turns()
    for lines in ([other], [conversation(*TALK), other]):
        played = play(*lines, conversation(conversation_id="good"))
        [problem] = played.problems
        assert problem.startswith(f"{len(lines)}: its conversation_id is in the ledger already, with another user")
        assert played.totals.malformed == 1
        assert played.turns()[: len(before)] == before


def test_the_same_conversation_twice_at_once_is_played_once(play: Play, is_async: bool) -> None:
    lines = [conversation(*TALK) for _ in range(6)]
    played = play(*lines, concurrency=4, is_async=is_async)
    assert (played.totals.played, played.totals.skipped, played.totals.conversations) == (1, 5, 1)
    assert [turn.number for turn, _ in played.turns()] == [1, 2]


def test_ids_tell_nothing_to_who_has_not_the_key(play: Play, tmp_path: Path) -> None:
    ids = []
    for key in ("a key of sixteen bytes", "another key, long enough"):
        player = Player(f"sqlite:///{tmp_path / key[:7]}.db", user_hash_key=key)
        file = tmp_path / "one.jsonl"
        file.write_text(json.dumps(conversation()))
        Replay(player).run(read_lines(find_sources([str(file)])))
        [session] = player.tracker.ledger.sessions()
        [(turn, _)] = player.tracker.ledger.turns(session.id)
        ids += [session.id, turn.id]
        player.close()
    assert len(set(ids)) == 4
