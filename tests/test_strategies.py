"""What goes when the messages are too many: what holds of every strategy over random histories, and of each alone."""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    messages_from_dict,
    messages_to_dict,
)
from langchain_core.messages.tool import invalid_tool_call, tool_call
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph.message import add_messages

from apps import FakeModel
from turntrace.context import (
    Chain,
    ClearToolResults,
    ContextTracker,
    DropOldestTurns,
    KeepLast,
    Overfull,
    Strategy,
    Summarize,
    Window,
    calibration,
    summarize,
)
from turntrace.context.overfull import is_summary
from turntrace.context.strategies import PLACEHOLDER
from turntrace.context.summarize import HEADING
from turntrace.errors import ConfigurationError, ContextError, ContextOverflowError

SAID = "They want tea."
PRIMING = 3
TOOL = {"type": "function", "function": {"name": "price_of", "description": "Tell the price.", "parameters": {}}}


def look(call_id: str) -> Any:
    return tool_call(name="price_of", args={"item": "tea"}, id=call_id)


def counter(messages: Sequence[BaseMessage]) -> int:
    return len(messages[0].text) // 4 + 4


SUMMARY_TOKENS = counter([HumanMessage(HEADING + SAID)])


# --- histories --------------------------------------------------------------------------------------------------------
TEXTS = st.one_of(st.sampled_from(["", "Hi", "x" * 400]), st.integers(0, 30).map(lambda n: "tea " * n))
RESULTS = st.sampled_from(["", "5 euros", "x" * 200, "y" * 300])
CONTENTS = st.one_of(
    TEXTS,
    TEXTS.map(lambda text: [{"type": "text", "text": text}]),
    TEXTS.map(lambda text: [text, {"type": "image_url", "image_url": {"url": "https://example.com/tea.png"}}]),
)
CALL_IDS = st.sampled_from(["c1", "c2", "c3"])  # few, so that they are reused
CALLS = st.lists(CALL_IDS, max_size=3).map(lambda ids: [look(each) for each in ids])
NO_CALLS: st.SearchStrategy[list[Any]] = st.just([])
PLAIN = st.one_of(
    st.builds(HumanMessage, CONTENTS),
    st.builds(AIMessage, CONTENTS),
    st.builds(AIMessage, CONTENTS, tool_calls=CALLS),
    st.builds(ToolMessage, CONTENTS, tool_call_id=CALL_IDS),
)
RARE = st.one_of(
    st.builds(SystemMessage, CONTENTS),
    st.builds(ChatMessage, CONTENTS, role=st.sampled_from(["user", "assistant", "developer", "critic"])),
    st.builds(
        AIMessage,
        CONTENTS,
        invalid_tool_calls=st.one_of(st.none(), CALL_IDS).map(
            lambda each: [invalid_tool_call(name="price_of", args="{", id=each, error=None)]
        ),
    ),
    st.builds(AIMessageChunk, CONTENTS),
    st.builds(FunctionMessage, TEXTS, name=st.just("old")),
    st.builds(HumanMessage, TEXTS, additional_kwargs=st.just({"lc_source": "summarization"})),
)


@st.composite
def exchanges(draw: st.DrawFn) -> list[BaseMessage]:
    """Draw a call of several tools, and their results in any order, perhaps before it or with others between."""
    ids = draw(st.lists(CALL_IDS, min_size=1, max_size=3, unique=True))
    call = AIMessage(draw(TEXTS), tool_calls=[look(each) for each in ids])
    results = [ToolMessage(draw(RESULTS), tool_call_id=each) for each in draw(st.permutations(ids))]
    messages: list[BaseMessage] = [call, *results]
    if draw(st.integers(0, 4)) == 0:
        messages = draw(st.permutations([*messages, HumanMessage(draw(TEXTS))]))
    return messages


@st.composite
def histories(draw: st.DrawFn, *, all_with_ids: bool = False) -> list[BaseMessage]:
    """Draw a history. The name of each message is its position, by which a test knows it again."""
    parts = draw(
        st.lists(
            st.one_of(PLAIN.map(lambda each: [each]), exchanges(), RARE.map(lambda each: [each])),
            max_size=12,
        )
    )
    some_without = not all_with_ids and draw(st.booleans())
    messages = [each for part in parts for each in part]
    for position, message in enumerate(messages):
        message.name = str(position)
        message.id = None if some_without and draw(st.booleans()) else f"m{position}"
    return messages


DROPPING: st.SearchStrategy[Strategy] = st.one_of(
    st.builds(DropOldestTurns, st.integers(1, 3)), st.builds(KeepLast, st.integers(0, 8))
)
CLEARING = st.builds(ClearToolResults, st.integers(0, 3))
SUMMARIZING = st.builds(
    Summarize,
    st.just(FakeModel(says=lambda _messages: SAID)),
    keep_last=st.integers(1, 3),
    summary_tokens=st.integers(SUMMARY_TOKENS, 60),
    piece_tokens=st.sampled_from([100, 8_000]),
)
ANY_BUT_CHAINS: st.SearchStrategy[Strategy] = st.one_of(DROPPING, CLEARING, SUMMARIZING)
CHAINS = st.lists(ANY_BUT_CHAINS, min_size=1, max_size=3).map(lambda each: Chain(*each))
ANY = st.one_of(ANY_BUT_CHAINS, CHAINS)
FITS = st.fixed_dictionaries(
    {
        "limit": st.integers(20, 700),
        "threshold": st.sampled_from([0.1, 0.5, 0.8, 0.99, 1.0]),
        "reserve_output": st.integers(0, 19),
    }
)
TOOLS = st.sampled_from([[], [TOOL]])

checked = settings(max_examples=200, deadline=None, derandomize=True)


def tracker_of(strategy: Strategy, fits: dict[str, Any]) -> ContextTracker:
    return ContextTracker("gpt-4o", strategy=strategy, counter=counter, **fits)


def fitted(tracker: ContextTracker, messages: list[BaseMessage], tools: list[Any]) -> Window | None:
    """Fit messages; None when what must stay does not fit."""
    with suppress(ContextOverflowError):
        return tracker.fit(messages, tools=tools)
    return None


# --- what must hold, said without the code that it is said of ---------------------------------------------------------
def role(message: BaseMessage) -> str:
    roles = {"ai": "assistant", "AIMessageChunk": "assistant", "human": "user"}
    return message.role if isinstance(message, ChatMessage) else roles.get(message.type, message.type)


def positions(messages: Sequence[BaseMessage]) -> list[int | None]:
    """Return where each message stood in its history; None for a summary."""
    return [None if message.name is None else int(message.name) for message in messages]


def must_stay(history: Sequence[BaseMessage]) -> set[int]:
    users = [at for at, message in enumerate(history) if role(message) == "user" and not is_summary(message)]
    return {at for at, message in enumerate(history) if role(message) in ("system", "developer")} | set(users[-1:])


def calls_of(message: BaseMessage) -> list[Any]:
    calls = [*message.tool_calls, *message.invalid_tool_calls] if isinstance(message, AIMessage) else []
    return [call["id"] for call in calls]


def call_of(history: Sequence[BaseMessage], at: int) -> int | None:
    """Return where the call of a result is: the last one before it, else the first after it."""
    result = history[at]
    assert isinstance(result, ToolMessage)
    before = [index for index in range(at) if result.tool_call_id in calls_of(history[index])]
    after = [index for index in range(at, len(history)) if result.tool_call_id in calls_of(history[index])]
    return before[-1] if before else after[0] if after else None


def least(tracker: ContextTracker, history: Sequence[BaseMessage], tools: list[Any]) -> int:
    """Return the tokens of what must stay."""
    return tracker.count([history[at] for at in sorted(must_stay(history))], tools=tools)


def new_tokens(history: Sequence[BaseMessage]) -> int:
    answers = [at for at, message in enumerate(history) if role(message) == "assistant"]
    return sum(counter([message]) for message in history[answers[-1] if answers else 0 :])


def assert_sound(history: list[BaseMessage], window: Window) -> None:
    """What must stay is there, calls and results are together, and the order is that of the history."""
    came_out = positions(window.messages)
    kept = [at for at in came_out if at is not None]
    assert kept == sorted(set(kept))
    assert must_stay(history) <= set(kept)
    for at in range(len(history)):
        if isinstance(history[at], ToolMessage) and (call := call_of(history, at)) is not None:
            assert (at in kept) == (call in kept), f"result {at} and its call {call}"
    for message, position in zip(window.messages, came_out, strict=True):
        if position is None:
            assert message.content == HEADING + SAID
            assert is_summary(message)
        elif message is not history[position]:
            cleared = history[position]
            assert isinstance(cleared, ToolMessage)
            assert message == cleared.model_copy(update={"content": PLACEHOLDER})
            assert counter([message]) < counter([cleared])


def assert_told(
    tracker: ContextTracker, fits: dict[str, Any], history: list[BaseMessage], tools: list[Any], window: Window
) -> None:
    """The decision says exactly what is different between the history and the window."""
    decision = window.decision
    before, most = tracker.count(history, tools=tools), fits["limit"] - fits["reserve_output"]
    over = "threshold" if before > most * fits["threshold"] + 1e-6 else None
    assert decision.trigger == ("limit" if before > most else over)
    assert decision.strategy == type(tracker.strategy).__name__
    assert (decision.tokenizer, decision.model, decision.limit) == ("custom", "gpt-4o", fits["limit"])
    assert decision.tokens_before == before
    assert decision.tokens_after == window.tokens == tracker.count(window.messages, tools=tools) <= most
    assert decision.new_tokens == new_tokens(history)
    assert (decision.messages_before, decision.messages_after) == (len(history), len(window.messages))
    came_out = positions(window.messages)
    put_in = {each.id: each for each, at in zip(window.messages, came_out, strict=True) if at is None}
    gone = [at for at in range(len(history)) if at not in came_out]
    named = [(history[at].id or f"#{at}", at) for at in gone]
    assert decision.dropped == tuple(name for name, _ in named if name not in put_in)
    replaced: list[str] = []
    added: list[str] = []
    for message, at in zip(window.messages, came_out, strict=True):
        if at is None:
            (replaced if message.id in [history[each].id for each in gone] else added).append(str(message.id))
        elif message is not history[at]:
            replaced.append(message.id or f"#{at}")
    assert decision.replaced == tuple(replaced)
    assert decision.added == tuple(added)
    assert decision.pruned == (list(map(id, window.messages)) != list(map(id, history)))
    assert decision.pruned or window.update == []


# --- the promises of every strategy -----------------------------------------------------------------------------------
@settings(checked, max_examples=600)
@given(history=histories(), strategy=ANY, fits=FITS, tools=TOOLS)
def test_what_comes_out_is_sound_and_the_decision_says_what_went(
    history: list[BaseMessage], strategy: Strategy, fits: dict[str, Any], tools: list[Any]
) -> None:
    tracker = tracker_of(strategy, fits)
    given_in = [message.model_copy(deep=True) for message in history]
    window = fitted(tracker, history, tools)
    assert history == given_in
    if window is not None:
        assert_sound(history, window)
        assert_told(tracker, fits, history, tools, window)


@settings(checked, max_examples=400)
@given(history=histories(), strategy=ANY, fits=FITS, tools=TOOLS)
def test_what_was_fitted_fits(
    history: list[BaseMessage], strategy: Strategy, fits: dict[str, Any], tools: list[Any]
) -> None:
    tracker = tracker_of(strategy, fits)
    if (window := fitted(tracker, history, tools)) is not None:
        again = tracker.fit(window.messages, tools=tools)
        assert list(map(id, again.messages)) == list(map(id, window.messages))
        assert not again.decision.pruned
        assert again.update == []
        assert again.tokens == window.tokens


@settings(checked, max_examples=300)
@given(history=histories(all_with_ids=True), strategy=ANY, fits=FITS)
def test_the_update_makes_a_state_that_is_the_window(
    history: list[BaseMessage], strategy: Strategy, fits: dict[str, Any]
) -> None:
    window = fitted(tracker_of(strategy, fits), history, [])
    if window is not None:
        state: Any = add_messages(list(history), list(window.update))  # type: ignore[arg-type]
        told = [(message.id, message.content, is_summary(message)) for message in state]
        assert told == [(message.id, message.content, is_summary(message)) for message in window.messages]


@settings(checked, max_examples=400)
@given(history=histories(), strategy=st.one_of(DROPPING, SUMMARIZING), fits=FITS, tools=TOOLS)
def test_messages_overflow_only_when_what_must_stay_does_not_fit(
    history: list[BaseMessage], strategy: Strategy, fits: dict[str, Any], tools: list[Any]
) -> None:
    tracker, most = tracker_of(strategy, fits), fits["limit"] - fits["reserve_output"]
    stays = least(tracker, history, tools)
    if stays <= most:
        assert tracker.fit(history, tools=tools).tokens <= most
        return
    with pytest.raises(ContextOverflowError) as raised:
        tracker.fit(history, tools=tools)
    assert (raised.value.tokens, raised.value.limit, raised.value.over_by) == (stays, most, stays - most)
    by_size = sorted(must_stay(history), key=lambda at: (-counter([history[at]]), at))
    assert raised.value.biggest == tuple((at, role(history[at]), counter([history[at]])) for at in by_size[:3])


@checked
@given(history=histories(), strategy=CLEARING, fits=FITS)
def test_clearing_results_overflows_only_when_all_but_old_results_are_too_many(
    history: list[BaseMessage], strategy: ClearToolResults, fits: dict[str, Any]
) -> None:
    tracker, most = tracker_of(strategy, fits), fits["limit"] - fits["reserve_output"]
    results = [at for at, message in enumerate(history) if isinstance(message, ToolMessage)]
    kept = int(repr(strategy).rpartition("=")[2].rstrip(")"))
    cleared = set(results[: len(results) - kept])
    placeholder = counter([HumanMessage(PLACEHOLDER)])
    sizes = [
        min(counter([message]), placeholder) if at in cleared else counter([message])
        for at, message in enumerate(history)
    ]
    if sum(sizes) + PRIMING > most:
        with pytest.raises(ContextOverflowError) as raised:
            tracker.fit(history)
        assert raised.value.tokens == sum(sizes) + PRIMING
        assert {at for at, _, _ in raised.value.biggest} <= set(range(len(history)))
    else:
        assert tracker.fit(history).tokens <= most


async def afitted(tracker: ContextTracker, messages: list[BaseMessage], tools: list[Any]) -> Window | None:
    with suppress(ContextOverflowError):
        return await tracker.afit(messages, tools=tools)
    return None


@settings(checked, max_examples=150)
@given(history=histories(all_with_ids=True), strategy=ANY, fits=FITS, tools=TOOLS)
def test_afit_gives_what_fit_gives(
    history: list[BaseMessage], strategy: Strategy, fits: dict[str, Any], tools: list[Any]
) -> None:
    tracker = tracker_of(strategy, fits)
    awaited = asyncio.run(afitted(tracker, history, tools))  # first, so that it is the one that waits for the model
    window = fitted(tracker, history, tools)
    if awaited is None or window is None:
        assert awaited is window
        return
    assert awaited.messages == window.messages
    assert awaited.update == window.update
    assert replace(awaited.decision, at_ns=0, duration_us=0) == replace(window.decision, at_ns=0, duration_us=0)


@settings(checked, max_examples=150)
@given(history=histories(), strategy=ANY, limit=st.integers(30, 400), share=st.sampled_from([0.5, 1.0]))
def test_the_promises_hold_of_what_tiktoken_counts(
    history: list[BaseMessage], strategy: Strategy, limit: int, share: float
) -> None:
    tracker = ContextTracker("gpt-4o", limit=limit, threshold=share, strategy=strategy)
    if (window := fitted(tracker, history, [TOOL])) is not None:
        assert window.tokens == tracker.count(window.messages, tools=[TOOL]) <= limit
        assert must_stay(history) <= set(positions(window.messages))
        again = tracker.fit(window.messages, tools=[TOOL])
        assert again.messages == window.messages
        assert not again.decision.pruned


@settings(checked, max_examples=150)
@given(history=histories(), strategy=ANY, limit=st.integers(30, 900), provided=st.integers(250, 4_000))
def test_the_promises_hold_of_estimates_that_a_provider_has_corrected(
    history: list[BaseMessage], strategy: Strategy, limit: int, provided: int
) -> None:
    tracker = ContextTracker("claude-sonnet-4", limit=limit, strategy=strategy)
    counted = tracker.count(history)
    calibration.learn("claude-sonnet-4", 1_000, provided)
    try:
        assert tracker.count(history) == -(-counted * provided // 1_000)
        if (window := fitted(tracker, history, [])) is not None:
            assert window.decision.tokens_before == tracker.count(history)
            assert window.tokens == tracker.count(window.messages) <= limit
            assert must_stay(history) <= set(positions(window.messages))
            again = tracker.fit(window.messages)
            assert again.messages == window.messages
            assert not again.decision.pruned
    finally:
        calibration.forget()


@checked
@given(history=histories(), repeats=st.lists(st.integers(0, 30), min_size=1, max_size=4), strategy=ANY, fits=FITS)
def test_one_object_may_stand_in_a_history_more_than_once(
    history: list[BaseMessage], repeats: list[int], strategy: Strategy, fits: dict[str, Any]
) -> None:
    for at in repeats:
        if history:
            history.append(history[at % len(history)])
    tracker = tracker_of(strategy, fits)
    if (window := fitted(tracker, history, [])) is not None:
        assert window.tokens == tracker.count(window.messages) <= fits["limit"] - fits["reserve_output"]
        assert {id(history[at]) for at in must_stay(history)} <= set(map(id, window.messages))
        assert tracker.fit(window.messages).messages == window.messages


# --- each strategy ----------------------------------------------------------------------------------------------------
def talk(script: str) -> list[BaseMessage]:
    """Write messages: their ids, which begin with s, h, a or t for who says them, and after a colon what is called."""
    messages: list[BaseMessage] = []
    for word in script.split():
        name, _, calls = word.partition(":")
        if name[0] == "a":
            said = [look(each) for each in calls.split(",") if each]
            messages.append(AIMessage(f"says {name}", tool_calls=said, id=name))
        elif name[0] == "t":
            messages.append(ToolMessage(f"says {name}", tool_call_id=calls, id=name))
        else:
            kind = SystemMessage if name[0] == "s" else HumanMessage
            messages.append(kind(f"says {name}", id=name))
    return messages


def tens(limit: int, strategy: Strategy | None = None, threshold: float = 1.0) -> ContextTracker:
    """Make a tracker to which every message has ten tokens, and the reply's priming has none."""
    return ContextTracker(
        "gpt-4o",
        limit=10 * limit + PRIMING,
        threshold=threshold,
        strategy=strategy,
        counter=lambda messages: 10,
    )


def left(messages: Sequence[BaseMessage]) -> str:
    return " ".join(str(message.id) for message in messages)


def kept(strategy: Strategy | None, script: str, *, fit: int, threshold: float = 1.0) -> str:
    """Return the ids of what a strategy leaves where as many messages fit."""
    return left(tens(fit, strategy, threshold).fit(talk(script)).messages)


@pytest.mark.parametrize(
    ("script", "fit", "expected"),
    [
        ("s h1 a1 h2 a2 h3 a3", 7, "s h1 a1 h2 a2 h3 a3"),
        ("s h1 a1 h2 a2 h3 a3", 6, "s h2 a2 h3 a3"),  # whole turns
        ("s h1 a1 h2 a2 h3 a3", 5, "s h2 a2 h3 a3"),
        ("s h1 a1 h2 a2 h3 a3", 4, "s h3 a3"),
        ("s h1 a1 h2 a2 h3 a3", 3, "s h3 a3"),
        ("s h1 a1 h2 a2 h3 a3", 2, "s h3"),  # and then message by message
        ("a0 h1 a1 h2", 3, "h1 a1 h2"),  # what stands before the first turn goes first
        ("h1 h2 h3 a3", 3, "h2 h3 a3"),  # each message of the user begins a turn
        ("a1 a2 a3 a4", 2, "a3 a4"),  # no turns: message by message
        ("h1 s1 a1 h2 s2 a2", 4, "s1 h2 s2 a2"),  # system messages stay, wherever they stand
        ("h1 a1:c t1:c h2 a2:c t2:c", 3, "h2 a2:c t2:c"),  # an id that is used again
        ("h1 a1:c,d t1:c h2 t2:d a2", 5, "h2 a2"),  # a late result goes with its call
        ("h1 t1:c h2 a2:c a3", 4, "h2 a3"),  # and a call with its early result
        ("h1 a1:c,d t1:d t2:c a2:c t3:c", 4, "h1 a2:c t3:c"),
        ("h1 a1:c,d t1:d t2:c a2:c t3:c", 2, "h1"),
        ("h1 t0:x a1 a2:y a3", 4, "h1 a1 a2:y a3"),  # orphans go on their own
        ("h1 t0:x a1 a2:y a3", 2, "h1 a3"),
    ],
)
def test_the_oldest_turns_go_first(script: str, fit: int, expected: str) -> None:
    assert kept(DropOldestTurns(), script, fit=fit) == " ".join(each.partition(":")[0] for each in expected.split())


def test_a_tracker_drops_the_oldest_turns_when_nothing_else_is_said() -> None:
    assert kept(None, "s h1 a1 h2 a2", fit=4) == "s h2 a2"


@pytest.mark.parametrize(
    ("keep_last", "fit", "expected"),
    [
        (1, 8, "h3 a3:c t3:c a4"),  # over the threshold, which is a half
        (2, 8, "h2 a2 h3 a3:c t3:c a4"),  # what is kept whole may be over it
        (3, 8, "h1 a1 h2 a2 h3 a3:c t3:c a4"),
        (5, 8, "h1 a1 h2 a2 h3 a3:c t3:c a4"),
        (2, 6, "h2 a2 h3 a3:c t3:c a4"),
        (2, 5, "a2 h3 a3:c t3:c a4"),  # but not over the limit
        (2, 3, "h3 a4"),
        (5, 3, "h3 a4"),
    ],
)
def test_the_newest_turns_are_kept_whole_as_long_as_they_fit(keep_last: int, fit: int, expected: str) -> None:
    script = "h1 a1 h2 a2 h3 a3:c t3:c a4"
    found = kept(DropOldestTurns(keep_last), script, fit=fit, threshold=0.5)
    assert found == expected.replace(":c", "")


@pytest.mark.parametrize(
    ("n", "fit", "expected"),
    [
        (4, 7, "s h3 a3:c t3:c a4"),
        (3, 7, "s h3 a3:c t3:c a4"),
        (2, 7, "s h3 a4"),  # the call's result would stand alone
        (1, 7, "s h3 a4"),
        (0, 7, "s h3"),
        (5, 7, "s a2 h3 a3:c t3:c a4"),
        (9, 7, "s h2 a2 h3 a3:c t3:c a4"),  # of the last messages only as many as fit
        (9, 4, "s h3 a4"),
        (9, 5, "s h3 a3:c t3:c a4"),
    ],
)
def test_the_last_messages_stay_with_the_system_and_the_users_newest(n: int, fit: int, expected: str) -> None:
    assert kept(KeepLast(n), "s h1 a1 h2 a2 h3 a3:c t3:c a4", fit=fit) == expected.replace(":c", "")


def test_a_call_goes_when_one_of_its_results_is_cut() -> None:
    assert kept(KeepLast(2), "h1 t1:c a1:c,d t2:d", fit=3) == "h1"


def test_what_was_summed_up_before_goes_last() -> None:
    history = talk("s h0 h1 a1 h2 a2")
    history[1].additional_kwargs["lc_source"] = "summarization"
    for strategy in (DropOldestTurns(), KeepLast(9)):
        assert left(tens(4, strategy).fit(history).messages) == "s h0 h2 a2"
        assert left(tens(3, strategy).fit(history).messages) == "s h0 h2"
        assert left(tens(2, strategy).fit(history).messages) == "s h2"


# --- clearing results -------------------------------------------------------------------------------------------------
def looked_up(*results: str, ids: bool = True) -> list[BaseMessage]:
    messages: list[BaseMessage] = [HumanMessage("What does it cost?", id="h" if ids else None)]
    for number, result in enumerate(results):
        messages.append(AIMessage("", tool_calls=[look(f"c{number}")], id=f"a{number}" if ids else None))
        messages.append(
            ToolMessage(
                result,
                tool_call_id=f"c{number}",
                id=f"t{number}" if ids else None,
                name="price_of",
                artifact={"number": number},
                status="error",
            )
        )
    return messages


LONG = "the price of tea " * 20


@pytest.mark.parametrize("ids", [True, False], ids=["with ids", "without"])
@pytest.mark.parametrize(("keep", "cleared"), [(0, [2, 4, 8]), (1, [2, 4]), (2, [2, 4]), (3, [2]), (4, []), (9, [])])
def test_old_results_are_cleared_unless_they_are_short(keep: int, cleared: list[int], ids: bool) -> None:
    history = looked_up(LONG, LONG, "5 euros", LONG, ids=ids)
    window = ContextTracker("gpt-4o", limit=500, threshold=0.5, strategy=ClearToolResults(keep)).fit(history)
    for at, (message, before) in enumerate(zip(window.messages, history, strict=True)):
        if at in cleared:
            assert message == before.model_copy(update={"content": "[cleared: an old result of a tool]"})
        else:
            assert message is before
    assert window.decision.replaced == tuple(f"t{at // 2 - 1}" if ids else f"#{at}" for at in cleared)
    assert window.decision.dropped == window.decision.added == ()
    assert window.decision.messages_pruned == len(cleared)
    assert left(window.update) == " ".join(str(window.messages[at].id) for at in cleared)


def test_the_placeholder_can_be_the_apps_own() -> None:
    strategy = ClearToolResults(0, placeholder="(gone)")
    window = ContextTracker("gpt-4o", limit=100, strategy=strategy).fit(looked_up(LONG))
    assert window.messages[-1].content == "(gone)"


def test_results_are_cleared_in_a_copy() -> None:
    history = looked_up(LONG)
    ContextTracker("gpt-4o", limit=100, strategy=ClearToolResults(0)).fit(history)
    assert history[-1].content == LONG


def test_results_stay_as_long_as_all_fits() -> None:
    history = looked_up(LONG)
    window = ContextTracker("gpt-4o", limit=500, strategy=ClearToolResults(0)).fit(history)
    assert window.messages == history
    assert window.decision.trigger is None


# --- chains -----------------------------------------------------------------------------------------------------------
class Drops:
    """Drops the messages of some ids, and keeps what it was given."""

    def __init__(self, *ids: str) -> None:
        self.ids = ids
        self.given: list[str] = []

    def __repr__(self) -> str:
        return f"Drops{self.ids}"

    def prune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        self.given.append(left(overfull.messages))
        return [message for message in overfull.messages if message.id not in self.ids]


class Waits(Drops):
    """Does so when it has waited."""

    def prune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        raise AssertionError("afit asks aprune")

    async def aprune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        await asyncio.sleep(0)
        return Drops.prune(self, overfull)


@pytest.mark.parametrize(
    ("fit", "given_to", "expected"),
    [
        (5, [[], [], []], "h1 a1 h2 a2 h3"),
        (4, [["h1 a1 h2 a2 h3"], [], []], "a1 h2 a2 h3"),
        (3, [["h1 a1 h2 a2 h3"], ["a1 h2 a2 h3"], []], "h2 a2 h3"),
        (2, [["h1 a1 h2 a2 h3"], ["a1 h2 a2 h3"], ["h2 a2 h3"]], "a2 h3"),
    ],
)
@pytest.mark.parametrize("kind", [Drops, Waits])
def test_a_chain_asks_the_next_strategy_only_when_the_messages_are_still_too_many(
    kind: type[Drops], fit: int, given_to: list[list[str]], expected: str
) -> None:
    links = kind("h1"), kind("a1"), kind("h2")
    tracker, history = tens(fit, Chain(links[0], Chain(links[1], links[2]))), talk("h1 a1 h2 a2 h3")
    window = tracker.fit(history) if kind is Drops else asyncio.run(tracker.afit(history))
    assert left(window.messages) == expected
    assert [link.given for link in links] == given_to
    assert window.decision.strategy == "Chain"


def test_a_chain_names_the_strategy_that_is_wrong() -> None:
    tracker = tens(2, Chain(ClearToolResults(), Drops("h2")))
    with pytest.raises(ContextError, match=r"Drops\('h2',\) is set aside for this call: it dropped message 2, a user"):
        tracker.fit(talk("h1 a1 h2 a2 a3"))


def test_results_are_cleared_before_turns_are_dropped() -> None:
    history = [*looked_up(LONG, LONG), *talk("h2")]
    chain = Chain(ClearToolResults(1), DropOldestTurns())
    assert ContextTracker("gpt-4o", limit=200, strategy=chain).fit(history).decision.replaced == ("t0",)
    window = ContextTracker("gpt-4o", limit=100, strategy=chain).fit(history)
    assert left(window.messages) == "h2"
    assert window.decision.dropped == ("h", "a0", "t0", "a1", "t1")
    assert window.decision.replaced == ()


# --- summing up -------------------------------------------------------------------------------------------------------
class Summaries:
    """A model for `Summarize` that numbers its summaries, and keeps what it was asked."""

    def __init__(self, says: str = "Summary {}.") -> None:
        self.asked: list[str] = []
        self._says = says
        self.model = FakeModel(says=self._answer)

    def _answer(self, messages: Sequence[BaseMessage]) -> str:
        self.asked.append(messages[-1].text)
        return self._says.format(len(self.asked))

    def take(self) -> list[str]:
        """Return what the model was asked since the last time: the summary so far, and the messages."""
        taken, self.asked[:] = [each.partition("summary so far:\n")[2] for each in self.asked], []
        return taken


def lines(*ids: str) -> str:
    who = {"h": "user", "a": "assistant", "t": "tool"}
    return "\n".join(f"{who[each[0]]}: says {each}" for each in ids)


def asking(before: str, *ids: str) -> str:
    return f"{before}\n\nThe messages since:\n{lines(*ids)}"


def turns(first: int, last: int) -> list[BaseMessage]:
    return talk(" ".join(f"h{number} a{number}" for number in range(first, last + 1)))


def test_the_oldest_turns_are_replaced_by_a_summary() -> None:
    summaries = Summaries()
    tracker = tens(10, Summarize(summaries.model, keep_last=2, summary_tokens=10))
    window = tracker.fit([*talk("s"), *turns(1, 5)])
    # Down to half of what there is room for: 1 system message, 1 summary, and 3 others would be 5.
    assert left(window.messages) == "s h1 h4 a4 h5 a5"
    assert window.messages[1].content == "Summary of the conversation so far:\nSummary 1."
    assert isinstance(window.messages[1], HumanMessage)
    assert summaries.take() == [asking("(none yet)", "h1", "a1", "h2", "a2", "h3", "a3")]
    decision = window.decision
    assert decision.dropped == ("a1", "h2", "a2", "h3", "a3")
    assert (decision.replaced, decision.added) == (("h1",), ())
    assert (decision.messages_before, decision.messages_after, decision.messages_pruned) == (11, 6, 6)


def test_the_model_is_not_asked_while_all_fits() -> None:
    summaries = Summaries()
    assert tens(10, Summarize(summaries.model)).fit(turns(1, 5)).update == []
    assert summaries.asked == []


@pytest.mark.parametrize("lasting", [True, False], ids=["in the state", "remembered"])
def test_a_summary_is_brought_up_to_date_only_when_more_must_go(lasting: bool) -> None:
    summaries = Summaries()
    tracker = tens(10, Summarize(summaries.model, keep_last=1, summary_tokens=10))
    state: Any = []
    seen = []
    for number in range(1, 13):
        state = add_messages(state, turns(number, number))  # type: ignore[arg-type]
        window = tracker.fit(state)
        if lasting:
            state = add_messages(state, list(window.update))  # type: ignore[arg-type]
            assert state == window.messages
        if asked := summaries.take():
            seen.append((number, asked, left(window.messages)))
        else:
            assert window.tokens <= tracker.limit
    assert seen == [
        (6, [asking("(none yet)", "h1", "a1", "h2", "a2", "h3", "a3", "h4", "a4")], "h1 h5 a5 h6 a6"),
        (9, [asking("Summary 1.", "h5", "a5", "h6", "a6", "h7", "a7")], "h1 h8 a8 h9 a9"),
        (12, [asking("Summary 1.", "h8", "a8", "h9", "a9", "h10", "a10")], "h1 h11 a11 h12 a12"),
    ]


def test_a_remembered_summary_is_put_in_again_as_it_was() -> None:
    summaries = Summaries()
    tracker = tens(10, Summarize(summaries.model, summary_tokens=10))
    first, second = tracker.fit(turns(1, 6)), tracker.fit(turns(1, 6))
    assert second.messages == first.messages
    assert second.update == first.update
    assert len(summaries.take()) == 1


def test_a_summary_is_not_given_to_another_conversation_whose_messages_have_the_same_ids() -> None:
    summaries = Summaries()
    tracker = tens(10, Summarize(summaries.model, summary_tokens=10))
    tracker.fit(turns(1, 6))
    others = [message.model_copy(update={"content": "of another user"}) for message in turns(1, 6)]
    assert tracker.fit(others).messages[0].content == HEADING + "Summary 2."
    assert len(summaries.take()) == 2


def test_messages_without_ids_are_summed_up_anew_each_time() -> None:
    summaries = Summaries()
    tracker = tens(10, Summarize(summaries.model, summary_tokens=10))
    for _ in range(2):
        history = [message.model_copy(update={"id": None}) for message in turns(1, 6)]
        window = tracker.fit(history)
        assert window.messages[0].id is not None
        assert window.decision.added == (window.messages[0].id,)
        assert window.decision.dropped[:2] == ("#0", "#1")
    assert len(summaries.take()) == 2


def test_the_summaries_that_were_made_first_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summarize, "_REMEMBERED", 2)
    summaries = Summaries()
    tracker = tens(10, Summarize(summaries.model, summary_tokens=10))
    for first in (1, 2, 3, 3, 2, 1):
        tracker.fit(turns(first, first + 5))
    assert len(summaries.take()) == 4  # three conversations, and the first of them anew


def test_the_users_newest_message_stays_when_later_ones_were_taken_back() -> None:
    summaries = Summaries()
    tracker = tens(10, Summarize(summaries.model, keep_last=1, summary_tokens=10))
    tracker.fit(turns(1, 6))
    summaries.take()
    taken_back = [*turns(1, 4), *talk("a5 a6 a7 a8 a9")]  # the fourth message of the user was summed up
    assert left(tracker.fit(taken_back).messages) == "h1 h4 a4 a5 a6 a7 a8 a9"
    assert summaries.take() == [asking("(none yet)", "h1", "a1", "h2", "a2", "h3", "a3")]


def test_a_result_that_comes_late_goes_with_its_call() -> None:
    summaries = Summaries()
    tracker = tens(8, Summarize(summaries.model, keep_last=1, summary_tokens=10))
    history = [*turns(1, 3), *talk("h4 a4:c h5 a5")]
    assert left(tracker.fit(history).messages) == "h1 h5 a5"
    assert left(tracker.fit([*history, *talk("t4:c")]).messages) == "h1 h5 a5"
    first, second = summaries.take()
    assert "tool: says t4" not in first
    assert "tool: says t4" in second


def test_of_one_endless_turn_all_that_goes_is_summed_up() -> None:
    summaries = Summaries()
    window = tens(6, Summarize(summaries.model, summary_tokens=10)).fit(talk("h1 a1 a2 a3 a4:c t4:c a5 a6 a7 a8"))
    assert left(window.messages) == "h1 a1 a5 a6 a7 a8"
    [asked] = summaries.take()
    assert [line.split()[2] for line in asked.partition("since:\n")[2].splitlines()] == ["a1", "a2", "a3", "a4", "t4"]


def test_a_long_summary_gives_way_to_a_shorter_one() -> None:
    summaries = Summaries()
    long = HumanMessage("x" * 100, id="h0", additional_kwargs={"lc_source": "summarization"})
    strategy = Summarize(summaries.model, keep_last=1, summary_tokens=50)
    window = letters(150, strategy).fit([long, *turns(1, 4)])
    assert left(window.messages) == "h0 h4 a4"
    assert window.messages[0].content == HEADING + "Summary 1."


def test_a_summary_of_langchains_middleware_is_taken_up() -> None:
    summaries = Summaries()
    theirs = HumanMessage("They are Ann.", id="h0", additional_kwargs={"lc_source": "summarization"})
    window = tens(6, Summarize(summaries.model, keep_last=1, summary_tokens=10)).fit([theirs, *turns(1, 4)])
    assert left(window.messages) == "h0 h4 a4"
    assert summaries.take() == [asking("They are Ann.", "h1", "a1", "h2", "a2", "h3", "a3")]


@pytest.mark.parametrize("through", ["a checkpoint", "dicts"])
def test_a_summary_is_known_again_from_storage(through: str) -> None:
    summaries = Summaries()
    tracker = tens(6, Summarize(summaries.model, keep_last=1, summary_tokens=10))
    stored: Any = tracker.fit(turns(1, 4)).messages
    summaries.take()
    if through == "dicts":
        stored = messages_from_dict(json.loads(json.dumps(messages_to_dict(stored))))
    else:
        serializer = JsonPlusSerializer()
        stored = serializer.loads_typed(serializer.dumps_typed(stored))
    window = ContextTracker(
        "gpt-4o", limit=63, threshold=1.0, strategy=Summarize(summaries.model, summary_tokens=10), counter=lambda _: 10
    ).fit([*stored, *turns(5, 7)])
    assert left(window.messages) == "h1 h6 a6 h7 a7"
    assert summaries.take()[0].startswith("Summary 1.")


def test_many_messages_are_summed_up_piece_by_piece() -> None:
    summaries = Summaries()
    strategy = Summarize(summaries.model, keep_last=1, summary_tokens=10, piece_tokens=100)
    history = turns(1, 13)
    window = tens(14, strategy).fit(history)
    assert window.messages[0].content == HEADING + "Summary 2."
    ids = [str(message.id) for message in history]
    assert summaries.take() == [asking("(none yet)", *ids[:10]), asking("Summary 1.", *ids[10:20])]


def test_what_is_asked_names_calls_and_cuts_what_is_endless() -> None:
    summaries = Summaries()
    history = [*talk("h1 a1:c"), ToolMessage("x" * 10_000 + "end", tool_call_id="c", id="t1"), *turns(2, 3)]
    history[0].content = [{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": {"url": "data:," + "y"}}]
    tens(4, Summarize(summaries.model, keep_last=1, summary_tokens=10, piece_tokens=100)).fit(history)
    [asked] = summaries.take()
    said = asked.partition("since:\n")[2].splitlines()
    assert said[0] == "user: Look"
    assert said[1] == 'assistant: says a1 [calls price_of with {"item":"tea"}]'
    assert said[2] == "tool: " + "x" * 200 + " [...] " + "x" * 97 + "end"


def test_the_prompt_can_be_the_apps_own() -> None:
    summaries = Summaries()
    prompt = "In {words} words, as {json: 1}: {summary} | {messages}"
    tens(4, Summarize(summaries.model, keep_last=1, summary_tokens=10, prompt=prompt)).fit(turns(1, 3))
    assert summaries.asked == [f"In 6 words, as {{json: 1}}: (none yet) | {lines('h1', 'a1', 'h2', 'a2')}"]


def test_what_was_said_is_not_taken_for_the_prompt() -> None:
    summaries = Summaries("They write {{messages}} and {{summary}}.")
    strategy = Summarize(summaries.model, keep_last=1, summary_tokens=10, piece_tokens=100)
    tens(14, strategy).fit(turns(1, 13))
    assert summaries.take()[1].startswith("They write {messages} and {summary}.\n\n")


def test_afit_awaits_the_model() -> None:
    class OnlyAsync(FakeModel):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("afit must not block")

    tracker = tens(6, Summarize(OnlyAsync(says=lambda _messages: SAID), keep_last=1, summary_tokens=10))
    assert asyncio.run(tracker.afit(turns(1, 4))).messages[0].content == HEADING + SAID


def test_one_strategy_sums_up_for_many_threads_at_once() -> None:
    strategy = Summarize(FakeModel(says=lambda _messages: SAID, delay=0.001), keep_last=1, summary_tokens=10)
    tracker = tens(6, strategy)

    def fit(number: int) -> str:
        return left(tracker.fit(turns(number % 4, number % 4 + 5)).messages)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fit, range(40)))
    assert found == [f"h{n % 4} h{n % 4 + 5} a{n % 4 + 5}" for n in range(40)]


# --- summing up that fails --------------------------------------------------------------------------------------------
def letters(limit: int, strategy: Strategy) -> ContextTracker:
    """Make a tracker to which every letter is a token, and the reply's priming is none."""
    return ContextTracker(
        "gpt-4o",
        limit=limit + PRIMING,
        threshold=1.0,
        strategy=strategy,
        counter=lambda messages: len(messages[0].text),
    )


def test_of_a_summary_that_is_longer_than_asked_for_more_turns_go() -> None:
    summaries = Summaries("x" * 40)
    strategy = Summarize(summaries.model, keep_last=2, summary_tokens=len(HEADING) + 10)
    window = letters(100, strategy).fit(turns(1, 9))
    assert left(window.messages) == "h1 a8 h9 a9"
    assert window.tokens == len(HEADING) + 40 + 3 * len("says h9") + PRIMING


FAILING = {
    "it cannot be reached": (FakeModel(fails=ConnectionError("secret")), "Summarize is set aside .* it raised Connect"),
    "it says nothing": (FakeModel(says=lambda _messages: " \n"), "got an empty summary"),
    "it says far too much": (FakeModel(says=lambda _messages: "x" * 99), r"too many.*summary_tokens=13[0-9]\)"),
}


@pytest.mark.parametrize(("model", "told"), FAILING.values(), ids=FAILING)
@pytest.mark.parametrize("is_async", [False, True], ids=["fit", "afit"])
@pytest.mark.usefixtures("lenient")
def test_the_oldest_turns_are_dropped_when_the_model_fails(
    model: FakeModel, told: str, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, history = letters(100, Summarize(model, summary_tokens=40)), turns(1, 9)
    for _ in range(2):
        window = asyncio.run(tracker.afit(history)) if is_async else tracker.fit(history)
        assert window.messages == history[4:]
        assert window.decision.dropped == ("h1", "a1", "h2", "a2")
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(told, record.getMessage())
    assert "DropOldestTurns did it instead" in record.getMessage()
    assert "secret" not in record.getMessage()


@pytest.mark.parametrize(("model", "told"), FAILING.values(), ids=FAILING)
def test_our_own_tests_see_the_model_fail(model: FakeModel, told: str) -> None:
    with pytest.raises(ContextError, match=told):
        letters(100, Summarize(model, summary_tokens=40)).fit(turns(1, 9))


def test_a_summary_that_did_not_fit_is_not_remembered() -> None:
    said = ["x" * 99, "short"]
    model = FakeModel(says=lambda _messages: said.pop(0))
    tracker = letters(100, Summarize(model, summary_tokens=45))
    with pytest.raises(ContextError, match="does not fit"):
        tracker.fit(turns(1, 9))
    assert tracker.fit(turns(1, 9)).messages[0].content == HEADING + "short"


def test_the_model_is_not_asked_where_there_is_no_room_for_a_summary() -> None:
    summaries = Summaries()
    window = tens(3, Summarize(summaries.model, summary_tokens=25)).fit(turns(1, 3))
    assert left(window.messages) == "a2 h3 a3"
    assert summaries.asked == []


# --- strategies that cannot be made -----------------------------------------------------------------------------------
MODEL = FakeModel()
IMPOSSIBLE: dict[str, tuple[Callable[[], Any], str]] = {
    "no turns": (lambda: DropOldestTurns(0), r"keep_last is 0\. .* at least 1: keep_last=3"),
    "half a turn": (lambda: DropOldestTurns(0.5), "keep_last is 0.5"),  # type: ignore[arg-type]
    "fewer than no messages": (lambda: KeepLast(-1), r"n is -1\. .* at least 0: n=3"),
    "True messages": (lambda: KeepLast(True), "n is True"),
    "a word": (lambda: KeepLast("3"), "n is '3'"),  # type: ignore[arg-type]
    "fewer than no results": (lambda: ClearToolResults(-1), "keep is -1"),
    "an empty placeholder": (lambda: ClearToolResults(placeholder=""), "not empty"),
    "no placeholder": (lambda: ClearToolResults(placeholder=None), "placeholder is None"),  # type: ignore[arg-type]
    "an empty chain": (Chain, r"Pass some: Chain\(ClearToolResults\(\), DropOldestTurns\(\)\)"),
    "a chain of a list": (lambda: Chain([KeepLast(1)]), "strategy is a list, which has no method prune"),  # type: ignore[arg-type]
    "a chain of classes": (
        lambda: Chain(DropOldestTurns),  # type: ignore[arg-type]
        r"the class DropOldestTurns\. Pass an object of it: strategy=DropOldestTurns\(\.\.\.\)",
    ),
    "the name of a model": (lambda: Summarize("gpt-4o-mini"), r"model is a str.*init_chat_model"),  # type: ignore[arg-type]
    "the class of a model": (lambda: Summarize(FakeModel), "model is the class FakeModel"),  # type: ignore[arg-type]
    "no place for the messages": (lambda: Summarize(MODEL, prompt="Sum {summary} up"), r"prompt lacks \{messages\}"),
    "no place for anything": (lambda: Summarize(MODEL, prompt="Sum up"), r"lacks \{summary\} and \{messages\}"),
    "a prompt that is none": (lambda: Summarize(MODEL, prompt=None), "prompt is None"),  # type: ignore[arg-type]
    "no tokens for the summary": (lambda: Summarize(MODEL, summary_tokens=0), "summary_tokens is 0"),
    "tiny pieces": (lambda: Summarize(MODEL, piece_tokens=99), "piece_tokens is 99.*at least 100"),
    "none of the newest turns": (lambda: Summarize(MODEL, keep_last=0), "keep_last is 0"),
}


@pytest.mark.parametrize(("make", "told"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_a_strategy_says_what_to_type(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        make()


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (DropOldestTurns(2), "DropOldestTurns(keep_last=2)"),
        (KeepLast(4), "KeepLast(4)"),
        (ClearToolResults(), "ClearToolResults(keep=3)"),
        (Chain(ClearToolResults(1), KeepLast(4)), "Chain(ClearToolResults(keep=1), KeepLast(4))"),
        (Summarize(MODEL), "Summarize(FakeModel, keep_last=2)"),
    ],
)
def test_a_strategy_says_what_it_is(strategy: Strategy, expected: str) -> None:
    assert repr(strategy) == expected
