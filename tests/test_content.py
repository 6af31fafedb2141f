# ruff: noqa: RUF001 - the marks of other scripts and typographic apostrophes are what is tested
"""What may leave: the policy, the redactor, and the safe facts of a message."""

import json
import logging
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    HumanMessageChunk,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from turntrace.content import (
    WITHHELD,
    ContentPolicy,
    Message,
    classify_input,
    classify_output,
    last_message,
    read_message,
    to_json,
)
from turntrace.errors import ConfigurationError

steady = settings(deadline=None, derandomize=True)

TEXT = {"type": "text", "text": "Hello"}
IMAGE = {"type": "image", "base64": "aGVsbG8=", "mime_type": "image/png"}
IMAGE_URL = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "aGVsbG8=", "format": "wav"}}
FILE = {"type": "file", "file": {"file_id": "file-1"}}
DOCUMENT = {"type": "document", "source": {"type": "text", "data": "not the user's words"}}
VIDEO = {"type": "video", "url": "https://example.com/cat.mp4"}
THINKING = {"type": "thinking", "thinking": "hm"}
TOOL_CALL = {"name": "search", "args": {}, "id": "1", "type": "tool_call"}


# --- reading a message ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (HumanMessage("Hello"), Message("user", "Hello")),
        (AIMessage("Hello"), Message("assistant", "Hello")),
        (SystemMessage("Hello"), Message("system", "Hello")),
        (ToolMessage("Hello", tool_call_id="1"), Message("tool", "Hello")),
        (AIMessageChunk(content="Hello"), Message("assistant", "Hello")),
        (HumanMessageChunk(content="Hello"), Message("user", "Hello")),
        (ChatMessage(role="user", content="Hello"), Message("user", "Hello")),
        (ChatMessage(role="assistant", content="Hello"), Message("assistant", "Hello")),
        (RemoveMessage(id="1"), Message("remove", "")),
        (AIMessage("", tool_calls=[TOOL_CALL]), Message("assistant", "")),
        (HumanMessage([TEXT, IMAGE]), Message("user", "Hello", 1)),
        ({"role": "user", "content": "Hello"}, Message("user", "Hello")),
        ({"role": "human", "content": "Hello"}, Message("user", "Hello")),
        ({"type": "human", "content": "Hello"}, Message("user", "Hello")),
        ({"role": "assistant", "content": "Hello"}, Message("assistant", "Hello")),
        ({"type": "ai", "content": "Hello"}, Message("assistant", "Hello")),
        ({"role": "tool", "content": "Hello", "tool_call_id": "1"}, Message("tool", "Hello")),
        ({"role": "developer", "content": "Hello"}, Message("developer", "Hello")),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, Message("assistant", "")),
        ({"role": "user"}, Message("user", "")),
        (("user", "Hello"), Message("user", "Hello")),
        (["human", "Hello"], Message("user", "Hello")),
        (("ai", "Hello"), Message("assistant", "Hello")),
        (("user", [TEXT, AUDIO]), Message("user", "Hello", 1)),
        (("user", None), Message("user", "")),
        ("Hello", Message("user", "Hello")),
        ("", Message("user", "")),
    ],
    ids=repr,
)
def test_a_message_of_any_form_is_read(message: Any, expected: Message) -> None:
    assert read_message(message) == expected


@pytest.mark.parametrize(
    ("content", "text", "attachments"),
    [
        ([TEXT], "Hello", 0),
        ([TEXT, TEXT], "HelloHello", 0),
        (["Hello", TEXT], "HelloHello", 0),
        ([IMAGE], "", 1),
        ([TEXT, IMAGE_URL], "Hello", 1),
        ([TEXT, IMAGE, IMAGE_URL, AUDIO, FILE, DOCUMENT, VIDEO], "Hello", 6),
        ([THINKING, TEXT], "Hello", 0),
        ([{"type": "text", "text": None}, {"type": "text"}, {}, None, 3, TEXT], "Hello", 0),
        ([{"type": ["unhashable"], "text": "Hello"}], "Hello", 0),
        ((TEXT,), "Hello", 0),
        ([], "", 0),
        (None, "", 0),
        (7, "", 0),
        (b"Hello", "", 0),
    ],
    ids=repr,
)
def test_the_blocks_of_a_message_are_read(content: Any, text: str, attachments: int) -> None:
    assert read_message({"role": "user", "content": content}) == Message("user", text, attachments)


@pytest.mark.parametrize(
    "message", [None, 3, object(), [], (), {}, ("user",), (1, 2), {"role": 3}, {"content": "x"}, b"ab"]
)
def test_what_is_no_message_is_none(message: Any) -> None:
    assert read_message(message) is None


def test_the_keys_of_a_block_are_not_taken_for_text() -> None:
    read = read_message({"role": "user", "content": TEXT})
    assert read is not None
    assert read.text in ("", "Hello")


def test_content_that_can_be_read_only_once_is_left_to_the_app() -> None:
    stream = iter(["a", "b"])
    read_message({"role": "user", "content": stream})
    assert list(stream) == ["a", "b"]


rubbish = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.sampled_from(["role", "type", "content", "text"])), inner, max_size=4),
    ),
    max_leaves=12,
)
blocks = st.lists(st.fixed_dictionaries({"type": rubbish, "text": rubbish}), max_size=3)
messages = st.one_of(
    rubbish,
    st.builds(lambda role, content: {"role": role, "content": content}, st.text(), blocks),
    st.builds(lambda role, content: {"role": role, "content": content}, st.text(), rubbish),
    st.builds(lambda kind, content: kind(content=content), st.sampled_from([HumanMessage, AIMessage]), st.text()),
    st.tuples(st.text(), rubbish),
)


@steady
@given(messages)
def test_reading_never_fails(message: Any) -> None:
    read = read_message(message)
    if read is not None:
        assert isinstance(read.role, str)
        assert isinstance(read.text, str)
        assert read.attachments >= 0
        assert classify_input(read.text) in ("question", "command", "feedback", "statement")
    assert classify_output(message) in ("answer", "question", "refusal", "tool_result")
    last_message(message)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("user", "a"), ("ai", "b")], ("ai", "b")),
        ([("user", "a")], ("user", "a")),
        (("user", "a"), ("user", "a")),
        (["a", "b"], "b"),
        ("a", "a"),
        ({"role": "user", "content": "a"}, {"role": "user", "content": "a"}),
        ([], None),
        ((), None),
        (None, None),
        (3, None),
    ],
    ids=repr,
)
def test_the_last_message_is_found(messages: Any, expected: Any) -> None:
    assert last_message(messages) == expected


# --- what kind of message it is ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("What does clause 4 say?", "question"),
        ("what does clause 4 say", "question"),
        ("How long does shipping take", "question"),
        ("My flight is delayed. Is there another one?", "question"),
        ('Did he say "really?"', "question"),
        ("Is it open (today?)", "question"),
        ("Please cancel my order", "command"),
        ("Cancel my order.", "command"),
        ("can you cancel my order", "command"),
        ("I want to book a flight", "command"),
        ("I'd like to book a flight", "command"),
        ("  book the first one", "command"),
        ("Do not cancel it", "command"),
        ("Please add this line: x = 1;", "command"),
        ("Thanks, that helped", "feedback"),
        ("That's wrong.", "feedback"),
        ("No, that is not what I meant", "feedback"),
        ("perfect", "feedback"),
        ("Thanks! And how do I pay?", "question"),
        ("My order number is 4711", "statement"),
        ("Yes", "statement"),
        ("Bookkeeping is hard", "statement"),
        ("Isabel called", "statement"),
        ("42", "statement"),
        ("", "statement"),
        ("   ", "statement"),
        ("int x = 1;", "statement"),
        ("この料金はいくらですか？", "question"),
        ("كم السعر؟", "question"),
        ("Πόσο κοστίζει\u037e", "question"),
        ("Πόσο κοστίζει;", "question"),
        ("ዋጋው ስንት ነው፧", "question"),
        ("Ist das ein Fehler?", "question"),
        ("¿Cuánto cuesta?", "question"),
        ("Das ist gut", "statement"),
    ],
)
def test_the_kind_of_a_users_message(text: str, kind: str) -> None:
    assert classify_input(text) == kind


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (AIMessage("It is on page 3."), "answer"),
        (AIMessage("Which order do you mean?"), "question"),
        (AIMessage("Which one do you mean? **"), "question"),
        (AIMessage("I'm sorry, but I can't help with that."), "refusal"),
        (AIMessage("I’m sorry, but I can’t help with that."), "refusal"),
        (AIMessage("I can’t help with that."), "refusal"),
        (AIMessage("I cannot share that."), "refusal"),
        (AIMessage("Unfortunately, I am unable to do that. Anything else?"), "refusal"),
        (AIMessage("Sorry, I can't do that."), "refusal"),
        (AIMessage("", additional_kwargs={"refusal": "I can't"}), "refusal"),
        (AIMessage([{"type": "refusal", "refusal": "No."}]), "refusal"),
        (AIMessage("I can notify you when it ships."), "answer"),
        (AIMessage("Sorry it took so long. It is on page 3."), "answer"),
        (AIMessage("Sorry, it is sold out."), "answer"),
        (AIMessage("", tool_calls=[TOOL_CALL]), "tool_result"),
        (ToolMessage("42", tool_call_id="1"), "tool_result"),
        ({"role": "tool", "content": "42", "tool_call_id": "1"}, "tool_result"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_result"),
        ({"role": "assistant", "content": "It is on page 3."}, "answer"),
        ({"role": "assistant", "content": "Which order?"}, "question"),
        (("ai", "I cannot do that."), "refusal"),
        ("It is on page 3.", "answer"),
        ("どの注文ですか？", "question"),
        ("x = 1;", "answer"),
        (AIMessage([TEXT]), "answer"),
        (AIMessage(""), "answer"),
        (None, "answer"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_the_kind_of_an_answer(message: Any, kind: str) -> None:
    assert classify_output(message) == kind


def peak_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HUGE = "a b? " * 1_000_000
SPACES = " " * 5_000_000
QUOTES = '"' * 5_000_000


@pytest.mark.parametrize(
    "call",
    [
        lambda: classify_input(HUGE),
        lambda: classify_output(("ai", HUGE)),
        lambda: classify_output(HUGE),
        lambda: read_message(("user", HUGE)),
        lambda: read_message({"role": "user", "content": HUGE}),
        lambda: classify_input(SPACES),
        lambda: classify_input(QUOTES),
    ],
)
def test_a_huge_text_is_neither_copied_nor_searched_through(call: Callable[[], object]) -> None:
    call()  # what is cached by a first call is not meant
    assert peak_of(call) < 20_000


class CountingText(str):
    """A text that counts the characters that are cut out of it, and refuses to be walked through."""

    cut = 0

    def __getitem__(self, key: Any) -> str:
        part = str.__getitem__(self, key)
        CountingText.cut += len(part)
        return part

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a text was walked through")


def test_only_the_beginning_and_the_end_of_a_text_are_looked_at() -> None:
    CountingText.cut = 0
    assert classify_input(CountingText("x" * 1_000_000 + "?")) == "question"
    assert classify_output(("ai", CountingText("x" * 1_000_000 + "?"))) == "question"
    assert CountingText.cut < 2_000


# --- the policy -------------------------------------------------------------------------------------------------------
def test_by_default_no_content_is_recorded() -> None:
    assert ContentPolicy() == ContentPolicy("metadata")
    assert not ContentPolicy().records_turn
    assert not ContentPolicy().records_steps


@pytest.mark.parametrize(
    ("policy", "turn", "steps"),
    [
        (ContentPolicy("metadata"), False, False),
        (ContentPolicy("turn"), True, False),
        (ContentPolicy("full"), True, True),
    ],
)
def test_what_a_level_records(policy: ContentPolicy, turn: bool, steps: bool) -> None:
    assert (policy.records_turn, policy.records_steps) == (turn, steps)


@pytest.mark.parametrize("level", ["all", "", None, True, 3, "Turn"])
def test_an_unknown_level_is_refused_with_what_is_allowed(level: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Allowed are metadata, turn, full") as error:
        ContentPolicy(level)
    assert repr(level) in str(error.value)
    assert 'ContentPolicy("turn")' in str(error.value)


@pytest.mark.parametrize("redact", ["***", 3, ["a"]])
def test_a_redactor_that_cannot_be_called_is_refused(redact: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"redact is a {type(redact).__name__}, which cannot be called"):
        ContentPolicy("turn", redact=redact)


def test_the_redactor_sees_every_text() -> None:
    policy = ContentPolicy("turn", redact=lambda text: text.replace("alice", "[name]"))
    assert policy.clean("I am alice, alice") == "I am [name], [name]"
    assert ContentPolicy("turn").clean("I am alice") == "I am alice"


def test_the_redactor_sees_the_keys_and_the_numbers_of_what_a_tool_was_given() -> None:
    policy = ContentPolicy("full", redact=lambda text: text.replace("alice", "[name]").replace("4111", "[card]"))
    given = {"alice": [{"of alice": 4111}, 41110.5, 17, True, None, 0.25], (1, 2): "alice"}
    assert policy.clean_all(given) == {
        "[name]": [{"of [name]": "[card]"}, "[card]0.5", 17, True, None, 0.25],
        (1, 2): "[name]",
    }
    assert ContentPolicy("full").clean_all(given) == given


def test_what_a_redactor_that_fails_was_given_is_withheld(caplog: pytest.LogCaptureFixture) -> None:
    def broken(text: str) -> str:
        raise ValueError(f"cannot redact {text}")

    with caplog.at_level(logging.DEBUG, "turntrace"):
        assert ContentPolicy("turn", redact=broken).clean("secret") == WITHHELD
    assert "ValueError" in caplog.text
    assert "redact=" in caplog.text
    assert "secret" not in caplog.text


def test_a_redactor_that_keeps_failing_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def broken(text: str) -> str:
        raise LookupError(text)

    policy = ContentPolicy("turn", redact=broken)
    assert [policy.clean("a"), policy.clean("b"), policy.clean("c")] == [WITHHELD] * 3
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) <= 1


def test_a_redactor_that_returns_no_text_gives_one() -> None:
    policy = ContentPolicy("turn", redact=lambda text: None)  # type: ignore[arg-type, return-value]
    assert isinstance(policy.clean("secret"), str)
    assert "secret" not in policy.clean("secret")


# --- JSON -------------------------------------------------------------------------------------------------------------
def test_json_is_compact_and_keeps_scripts() -> None:
    assert to_json({"a": [1, None, "ü"], "b": {"c": True}}) == '{"a":[1,null,"ü"],"b":{"c":true}}'


class Secretive:
    def __repr__(self) -> str:
        return "secret"


def test_what_json_cannot_hold_is_written_as_the_name_of_its_type() -> None:
    assert json.loads(to_json({"a": Secretive(), "b": {1, 2}})) == {"a": "Secretive", "b": "set"}


def circular() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


@pytest.mark.parametrize(
    "value", [{(1, 2): "x"}, {Secretive(): 1}, circular(), {"a": circular()}], ids=["tuple", "object", "ring", "inner"]
)
def test_writing_json_never_fails(value: Any) -> None:
    # Tools return anything: the step of one whose result cannot be written would stay open.
    assert "secret" not in to_json(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_json_has_no_numbers_that_json_does_not_know(value: Any) -> None:
    json.loads(to_json(value), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_messages_are_never_written_into_json() -> None:
    assert "secret" not in to_json([HumanMessage("secret"), AIMessage("secret")])


def test_all_kinds_of_messages_of_langchain_have_a_role_that_openai_knows() -> None:
    known = {"user", "assistant", "system", "tool", "function", "developer", "remove"}
    kinds: list[BaseMessage] = [HumanMessage("x"), AIMessage("x"), SystemMessage("x"), AIMessageChunk(content="x")]
    assert {read.role for kind in kinds if (read := read_message(kind))} <= known
