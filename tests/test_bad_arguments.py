"""Whatever is passed to turntrace's own functions, or stands in the environment: it works, or says what is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage

from odd import BROKEN, PLANTED, NoEquals, NoText, steady, values
from turntrace import ContentPolicy, ContextTracker, SessionCallbackHandler, SessionTracker, track_graph, track_node
from turntrace import context as strategies
from turntrace.analytics import Filters, sessions_by
from turntrace.errors import ConfigurationError, TurntraceError

pytestmark = pytest.mark.usefixtures("lenient")

arguments = values.filter(lambda value: not isinstance(value, NoEquals)) | st.sampled_from(PLANTED + BROKEN)


HINTS = (
    *("Allowed", "Pass ", "pass ", "Set ", "set ", "Make one", "Give ", "should ", "It is ", " takes ", "stages are"),
    "in another ledger",
)
"""What says what is allowed, or what to do."""


def refused(call: Callable[[], Any]) -> str | None:
    """Call something; return why it refuses, after looking that this helps, or None where it works."""
    try:
        call()
    except TurntraceError as error:
        said = str(error)
        assert any(hint in said for hint in HINTS), said
        assert len(said) < 1500
        return said
    return None


# --- a tracker --------------------------------------------------------------------------------------------------------
SETTINGS = (
    *("ledger", "content", "idle_after", "user_hash_key", "channel", "tracer_provider", "outbox", "outbox_max_mb"),
    *("propagate", "journeys", "dropoff", "evaluators", "evaluator_timeout", "sweep_every", "classify", "clock", "ids"),
)


@steady(120)
@given(st.sampled_from(SETTINGS), arguments.filter(lambda value: value is not int))
@example("tracer_provider", "console")
@example("journeys", ["onboarding"])
@example("evaluators", len)
@example("clock", 5)
@example("propagate", "no")
@example("outbox", "false")
@example("content", "")
@example("user_hash_key", "\ud800" * 20)
@example("outbox_max_mb", 10**400)
@example("ledger", "http://[::1")
@example("ledger", "sqlite://host/file.db")
@example("ledger", "sqlite://?timeout=soon")
@example("ledger", "postgresql://127.0.0.1:port/db")
def test_a_tracker_works_or_says_what_is_wrong_with_an_argument(name: str, value: Any) -> None:
    def track() -> None:
        with SessionTracker(**{"ledger": "sqlite://", name: value}) as tracker:
            tracker.start_session(user_id="ann").conversation("c").start_turn("Hi").end()
            assert tracker.flush()
            (session,) = tracker.ledger.sessions()
            assert session.total_turns == 1

    refused(track)


@pytest.mark.parametrize("word", ["no", "false", 0, 1, [], "yes"])
@pytest.mark.parametrize("name", ["propagate", "outbox"])
def test_a_text_is_never_taken_for_a_yes(name: str, word: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is a .* Allowed are True and False"):
        SessionTracker("sqlite://", **{name: word})


def test_an_option_of_postgresqls_that_is_none_is_said_without_the_password() -> None:
    for option in ("connect_timeout=soon", "no_option=1"):
        with pytest.raises(TurntraceError) as told:
            SessionTracker(f"postgresql+psycopg://ann:secret@127.0.0.1:9/db?{option}")
        assert option.partition("=")[0] in str(told.value)
        assert "secret" not in str(told.value)


# --- what is called on it ---------------------------------------------------------------------------------------------
Call = Callable[[SessionTracker, Any], Any]


def turn_of(tracker: SessionTracker) -> Any:
    return tracker.start_session(user_id="ann").conversation("c").start_turn("Hi")


CALLS: dict[str, Call] = {
    "user_id": lambda tracker, value: tracker.start_session(user_id=value),
    "session_id": lambda tracker, value: tracker.start_session(session_id=value),
    "channel": lambda tracker, value: tracker.start_session(channel=value),
    "session_type": lambda tracker, value: tracker.start_session(session_type=value),
    "tier": lambda tracker, value: tracker.start_session(tier=value),
    "locale": lambda tracker, value: tracker.start_session(locale=value),
    "conversation": lambda tracker, value: tracker.start_session().conversation(value).start_turn("Hi").end(),
    "topic": lambda tracker, value: tracker.start_session().conversation(topic=value).start_turn("Hi").end(),
    "turn": lambda tracker, value: tracker.start_session().conversation().start_turn(value).end(),
    "role": lambda tracker, value: tracker.start_session().conversation().start_turn("Hi", role=value),
    "answer": lambda tracker, value: turn_of(tracker).set_answer(value),
    "end": lambda tracker, value: turn_of(tracker).end(value),
    "error": lambda tracker, value: turn_of(tracker).end(error=value),
    "feedback": lambda tracker, value: turn_of(tracker).feedback(value),
    "feedback's name": lambda tracker, value: turn_of(tracker).feedback(1, name=value),
    "feedback's turn": lambda tracker, value: tracker.feedback(1, turn_id=value),
    "feedback's session": lambda tracker, value: tracker.feedback(1, session_id=value),
    "journey": lambda tracker, value: turn_of(tracker).journey(value, ["a", "b"]).enter("a"),
    "stages": lambda tracker, value: turn_of(tracker).journey("way", value),
    "stage": lambda tracker, value: turn_of(tracker).journey("way", ["a", "b"]).enter(value),
    "reason": lambda tracker, value: tracker.start_session().end(value),
    "end_session": lambda tracker, value: tracker.end_session(value),
    "session_summary": lambda tracker, value: tracker.session_summary(value),
    "user_summary": lambda tracker, value: tracker.user_summary(value),
    "forget_user": lambda tracker, value: tracker.forget_user(value),
    "resume_turn": lambda tracker, value: tracker.resume_turn(value),
    "carrier": lambda tracker, value: tracker.resume_turn({"turntrace_turn_id": value}),
    "idle_after": lambda tracker, value: tracker.sweep(idle_after=value),
    "now": lambda tracker, value: tracker.sweep(now=value),
    "timeout": lambda tracker, value: tracker.flush(value),
    "handler": lambda _, value: SessionCallbackHandler(value),
    "messages_key": lambda tracker, value: SessionCallbackHandler(tracker, messages_key=value),
    "describe_input": lambda tracker, value: SessionCallbackHandler(tracker, describe_input=value),
    "policy": lambda _, value: ContentPolicy(value),
    "redact": lambda _, value: ContentPolicy("turn", redact=value),
    "track_graph": lambda _, value: track_graph(value),
    "track_node": lambda _, value: track_node(value),
    "node's journey": lambda _, value: track_node(lambda state: state, journey=value, stage="a"),
    "filters": lambda tracker, value: sessions_by(tracker.ledger, filters=Filters(channel=value, topic=value)),
    "since": lambda tracker, value: sessions_by(tracker.ledger, filters=Filters(since_ns=value)),
}


@steady(200)
@given(st.sampled_from(sorted(CALLS)), arguments)
@example("session_summary", "\ud800")
@example("session_summary", ["s"])
@example("carrier", "\udcff")
@example("carrier", NoText())
@example("resume_turn", {"turntrace_turn_id": "nobody's"})
@example("timeout", float("inf"))
@example("timeout", float("nan"))
@example("timeout", 10**400)
@example("now", 10**30)
@example("now", "today")
@example("handler", "tracker")
@example("filters", "\ud800")
@example("filters", "a\x00b")
@example("since", 10**30)
@example("since", "2026-11-25")
def test_a_call_works_or_says_what_is_wrong_and_nothing_is_lost(call: str, value: Any) -> None:
    with SessionTracker("sqlite://") as tracker:
        turn_of(tracker).end()
        refused(lambda: CALLS[call](tracker, value))
        turn_of(tracker).end()
        assert tracker.flush()
        assert sum(session.total_turns for session in tracker.ledger.sessions()) >= 2


# --- the context window -----------------------------------------------------------------------------------------------
IN_WINDOW: dict[str, Callable[[Any], Any]] = {
    "model": lambda value: ContextTracker(model=value),
    "limit": lambda value: ContextTracker("gpt-4o", limit=value),
    "threshold": lambda value: ContextTracker("gpt-4o", threshold=value),
    "reserve_output": lambda value: ContextTracker("gpt-4o", reserve_output=value),
    "strategy": lambda value: ContextTracker("gpt-4o", strategy=value),
    "counter": lambda value: ContextTracker("gpt-4o", counter=value),
    "keep_last": lambda value: ContextTracker("gpt-4o", limit=40, strategy=strategies.DropOldestTurns(value)),
    "n": lambda value: ContextTracker("gpt-4o", limit=40, strategy=strategies.KeepLast(value)),
    "keep": lambda value: ContextTracker("gpt-4o", limit=40, strategy=strategies.ClearToolResults(value)),
    "summarizer": lambda value: ContextTracker("gpt-4o", limit=40, strategy=strategies.Summarize(value)),
    "chain": lambda value: ContextTracker("gpt-4o", limit=40, strategy=strategies.Chain(value)),
}


@steady(80)
@given(st.sampled_from(sorted(IN_WINDOW)), arguments)
@example("limit", 10**400)
@example("threshold", 80)
def test_a_context_tracker_fits_or_says_what_is_wrong(argument: str, value: Any) -> None:
    def fit() -> None:
        window = IN_WINDOW[argument](value).fit([HumanMessage("Hi"), AIMessage("Hello"), HumanMessage("Bye")])
        assert window.messages[-1].content == "Bye"

    refused(fit)


# --- the environment --------------------------------------------------------------------------------------------------
def environment_text(text: str) -> str:
    """Return what Python makes of a variable with such bytes: no NUL, and what is not UTF-8 as half a surrogate."""
    return text.replace("\x00", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")


variables = st.sampled_from(
    ["LEDGER_URL", "USER_HASH_KEY", "CONTENT", "IDLE_AFTER", "CHANNEL", "OUTBOX_MAX_MB", "PROPAGATE"]
)
words = st.sampled_from(
    [
        *(
            "",
            " ",
            "-1",
            "0",
            "1e300",
            "nan",
            "inf",
            "true",
            "maybe",
            "9" * 5000,
            "\udcff",
            "http://[::1",
            "sqlite://x",
        ),
        *("sqlite:///:memory:", "postgresql://127.0.0.1:port/x", "mysql://x", "sqlite:////proc/none/x.db", *PLANTED),
    ]
)


@steady(80)
@given(variables, (words | st.text(max_size=20)).map(environment_text))
@example("USER_HASH_KEY", "")
@example("USER_HASH_KEY", "\udcff" * 20)
@example("CHANNEL", "\udcff")
def test_a_variable_of_turntraces_works_or_is_named(
    tmp_path_factory: pytest.TempPathFactory, name: str, text: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURNTRACE_LEDGER_URL", "sqlite://")
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp()))  # where the ledger is that nobody names
        patch.chdir(tmp_path_factory.getbasetemp())
        patch.setenv(f"TURNTRACE_{name}", text)

        def track() -> None:
            with SessionTracker() as tracker:
                turn_of(tracker).end()

        said = refused(track)
    if said is not None:
        hints = {"LEDGER_URL": "sqlite:///", "USER_HASH_KEY": "at least 16 are needed"}
        assert f"TURNTRACE_{name}" in said or hints.get(name, "no hint") in said
        assert "SecretStr" not in said


LANGFUSES: dict[str, tuple[str, ...]] = {
    "LANGFUSE_PUBLIC_KEY": ("\udcff", "pk-\u00e9", "pk\r\nX-Injected: 1", "x" * 10_000),
    "LANGFUSE_SECRET_KEY": ("\udcff", "sk-\u00e9", "sk\n", "x" * 10_000),
    "LANGFUSE_BASE_URL": ("http://[::1", "ftp://x", "http://localhost:port", "http://a..b", "file:///etc/passwd"),
    "LANGFUSE_TRACING_ENVIRONMENT": ("\udcff", "Not Allowed!", "x" * 10_000),
    "LANGFUSE_RELEASE": ("\udcff", "\x1b[31m"),
    "LANGFUSE_SAMPLE_RATE": ("nan", "2", "half"),
    "LANGFUSE_TIMEOUT": ("2.5", "1e300", "soon", "0"),
    "LANGFUSE_FLUSH_AT": ("0", "many"),
    "LANGFUSE_FLUSH_INTERVAL": ("0", "often"),
    "LANGFUSE_OTEL_TRACES_EXPORT_PATH": ("", "//", "http://[::1"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in LANGFUSES.items() for text in texts])
def test_a_variable_of_langfuses_works_or_is_named_and_all_is_kept(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known, value in (("PUBLIC_KEY", "pk-lf-x"), ("SECRET_KEY", "sk-lf-x"), ("BASE_URL", "http://127.0.0.1:9")):
        monkeypatch.setenv(f"LANGFUSE_{known}", value)
    monkeypatch.setenv(name, text)
    made: list[SessionTracker] = []
    said = refused(lambda: made.append(SessionTracker("sqlite://")))
    if said is not None:
        assert name in said
        return
    (tracker,) = made
    session = tracker.start_session(user_id="ann")
    session.conversation("c").start_turn("Hi").end()
    session.end()
    tracker.flush(5)
    assert [kept.total_turns for kept in tracker.ledger.sessions()] == [1]
    waiting = tracker.ledger.to_send.status()
    tracker.shutdown()
    assert waiting.spans.items == 3
