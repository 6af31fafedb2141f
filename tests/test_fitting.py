"""Fitting messages into a model's window: limits, decisions, updates, what is refused, and the nodes of a graph."""

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import (
    AIMessage,
    AnyMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.tool import tool_call
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.message import add_messages
from pydantic import BaseModel

from apps import FakeModel, State, config_of
from turntrace import ContextTracker, PruningDecision
from turntrace.context import (
    ClearToolResults,
    DropOldestTurns,
    KeepLast,
    Overfull,
    Strategy,
    Summarize,
    calibration,
    context_node,
    pre_model_hook,
)
from turntrace.errors import ConfigurationError, ContextError, ContextOverflowError

PRIMING = 3
TOOL = {"type": "function", "function": {"name": "price_of", "description": "Tell the price.", "parameters": {}}}


@pytest.fixture(autouse=True)
def _no_calibration() -> Iterator[None]:
    calibration.forget()
    yield
    calibration.forget()


def letters(messages: Sequence[BaseMessage]) -> int:
    """Count each letter as a token."""
    return len(messages[0].text)


def tracker_of(limit: int, strategy: Any = None, **arguments: Any) -> ContextTracker:
    """Make a tracker to which each letter is a token, with room for as many of them."""
    return ContextTracker(
        "gpt-4o", limit=limit + PRIMING, strategy=strategy, counter=letters, **{"threshold": 1.0, **arguments}
    )


def history() -> list[BaseMessage]:
    """Return six messages of ten letters each."""
    return [
        SystemMessage("You help. ", id="s"),
        HumanMessage("Tea price?", id="h1"),
        AIMessage("I look up:", tool_calls=[tool_call(name="price_of", args={}, id="c")], id="a1"),
        ToolMessage("It is 5 eu", tool_call_id="c", id="t1"),
        HumanMessage("Thank you!", id="h2"),
        AIMessage("You're wel", id="a2"),
    ]


def ids(messages: Sequence[Any]) -> list[Any]:
    return [message.id for message in messages]


# --- the tracker's arguments ------------------------------------------------------------------------------------------
def test_the_limit_is_the_models_window_unless_another_is_said() -> None:
    assert ContextTracker("gpt-4o").limit == 128_000
    assert ContextTracker("gpt-4o", limit=1_000).limit == 1_000
    assert ContextTracker("no-such-model", limit=1_000).limit == 1_000


def test_of_an_unknown_model_the_limit_must_be_said() -> None:
    told = (
        r"model 'no-such-model' is not known.*ContextTracker\(model='no-such-model', limit=128_000\), or pass the name"
    )
    with pytest.raises(ConfigurationError, match=told):
        ContextTracker("no-such-model")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"threshold": 80}, r"threshold is 80\. Allowed is a share over 0 and at most 1: threshold=0\.8\."),
        ({"threshold": 2.5}, r"threshold=0\.025"),
        ({"threshold": 0}, "threshold is 0"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": True}, "threshold is True"),
        ({"threshold": "0.8"}, "threshold is '0.8'"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": None}, "threshold is None"),
        ({"limit": 0}, "limit is 0.*at least 1: limit=4000"),
        ({"limit": -1}, "limit is -1"),
        ({"limit": 1e5}, "limit is 100000.0"),
        ({"limit": True}, "limit is True"),
        ({"limit": "128k"}, "limit is '128k'"),
        ({"reserve_output": -1}, "reserve_output is -1"),
        ({"reserve_output": None}, "reserve_output is None"),
        ({"limit": 100, "reserve_output": 100}, "reserve_output is 100 of a limit of 100 tokens.*reserve_output=1000"),
        ({"model": None}, r"model is a NoneType.*ContextTracker\(model='gpt-4o'\)"),
        ({"model": ""}, "model is empty"),
        ({"model": "x" * 201}, "model has 201 characters"),
        ({"counter": 5}, "counter is a int, which cannot be called"),
    ],
)
def test_an_argument_that_cannot_be_used_says_what_to_type(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        ContextTracker(**{"model": "gpt-4o", **arguments})


class WithoutPrune:
    def aprune(self, overfull: Overfull) -> list[BaseMessage]:
        raise AssertionError("not asked")


class PrunesAsync:
    async def prune(self, overfull: Overfull) -> list[BaseMessage]:
        raise AssertionError("not asked")


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        (KeepLast, r"strategy is the class KeepLast\. Pass an object of it: strategy=KeepLast\(\.\.\.\)"),
        (WithoutPrune(), r"strategy is a WithoutPrune, which has no method prune\. Pass DropOldestTurns\(\), say"),
        ("drop_oldest", "strategy is a str, which has no method prune"),
        (lambda overfull: overfull.messages, "strategy is a function, which has no method prune"),
        (PrunesAsync(), r"PrunesAsync\.prune is async\. Name it aprune, which afit awaits, and add a prune for fit"),
    ],
)
def test_what_is_no_strategy_is_refused_when_the_tracker_is_made(strategy: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        tracker_of(100, strategy)


# --- when it prunes, and what it says of it ---------------------------------------------------------------------------
def test_what_fits_comes_out_as_it_went_in() -> None:
    given, before = history(), time.time_ns()
    window = tracker_of(60).fit(given)
    assert window.messages == given
    assert window.messages is not given
    assert (window.tokens, window.update) == (60 + PRIMING, [])
    decision = window.decision
    assert before <= decision.at_ns <= time.time_ns()
    assert decision.duration_us >= 0
    assert decision == PruningDecision(
        at_ns=decision.at_ns,
        trigger=None,
        strategy="DropOldestTurns",
        tokenizer="custom",
        model="gpt-4o",
        limit=60 + PRIMING,
        tokens_before=60 + PRIMING,
        tokens_after=60 + PRIMING,
        new_tokens=10,
        messages_before=6,
        messages_after=6,
        duration_us=decision.duration_us,
    )
    assert not decision.pruned


def test_what_was_pruned_is_told() -> None:
    window = tracker_of(50).fit(history())
    assert ids(window.messages) == ["s", "h2", "a2"]
    decision = window.decision
    assert (decision.trigger, decision.dropped) == ("limit", ("h1", "a1", "t1"))
    assert (decision.tokens_before, decision.tokens_after, decision.tokens_pruned) == (63, 33, 30)
    assert (decision.messages_before, decision.messages_after, decision.messages_pruned) == (6, 3, 3)
    assert window.update == [RemoveMessage(id="h1"), RemoveMessage(id="a1"), RemoveMessage(id="t1")]


@pytest.mark.parametrize(
    ("arguments", "trigger"),
    [
        ({"limit": 60}, None),
        ({"limit": 59}, "limit"),
        ({"limit": 123, "threshold": 0.5}, None),  # 63 of 126
        ({"limit": 121, "threshold": 0.5}, "threshold"),  # of 124
        ({"limit": 87, "threshold": 0.7}, None),  # of 90, by a float that is a little less than 63
        ({"limit": 80, "reserve_output": 20}, None),
        ({"limit": 80, "reserve_output": 21}, "limit"),
        ({"limit": 140, "reserve_output": 18, "threshold": 0.5}, "threshold"),
        ({"limit": 60, "threshold": 1e-9}, "threshold"),
    ],
)
def test_it_prunes_over_the_threshold_of_what_is_left_for_the_messages(
    arguments: dict[str, Any], trigger: str | None
) -> None:
    assert tracker_of(**arguments).fit(history()).decision.trigger == trigger


def test_tools_take_their_part() -> None:
    tracker = tracker_of(60)
    size = tracker.count([], tools=[TOOL]) - PRIMING
    assert size > 10
    assert tracker.fit(history(), tools=[TOOL]).decision.dropped == ("h1", "a1", "t1")
    assert tracker_of(60 + size).fit(history(), tools=[TOOL]).tokens == 60 + size + PRIMING


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([], 10),  # the answer
        ([HumanMessage("And?")], 14),
        ([ChatMessage(content="Aha", role="assistant"), HumanMessage("And?")], 7),
        ([AIMessage("Wait"), ToolMessage("12", tool_call_id="c"), ToolMessage("3", tool_call_id="d")], 7),
    ],
)
def test_new_tokens_are_those_since_the_models_last_call(after: list[BaseMessage], expected: int) -> None:
    assert tracker_of(100).fit([*history(), *after]).decision.new_tokens == expected


def test_without_an_answer_all_tokens_are_new() -> None:
    assert tracker_of(100).fit(history()[:2]).decision.new_tokens == 20


def test_no_messages_are_a_window_without_messages() -> None:
    nothing: list[Sequence[Any]] = [[], ()]
    for messages in nothing:
        window = tracker_of(10).fit(messages)
        assert (window.messages, window.tokens, window.update) == ([], PRIMING, [])
        assert window.decision.messages_before == window.decision.new_tokens == 0


def test_messages_may_have_any_form_that_langgraph_takes() -> None:
    window = tracker_of(30).fit(
        [
            ("system", "You help."),
            {"role": "user", "content": "Hello there"},
            {"role": "assistant", "content": "Hello"},
            ("user", "Tea?"),
            "Coffee?",
        ]
    )
    assert [(message.type, message.content) for message in window.messages] == [
        ("system", "You help."),
        ("human", "Tea?"),
        ("human", "Coffee?"),
    ]
    assert window.decision.dropped == ("#1", "#2")
    assert window.update == []  # what is no message of a state cannot be taken out of it


# --- messages that cannot be fitted -----------------------------------------------------------------------------------
@pytest.mark.parametrize("is_async", [False, True], ids=["fit", "afit"])
def test_what_cannot_fit_says_by_how_much_and_names_the_biggest(is_async: bool) -> None:
    big = [
        SystemMessage("s" * 40),
        *history()[1:4],
        HumanMessage("h" * 300),
        AIMessage("a"),
        SystemMessage("t" * 2_000),
    ]
    tracker = tracker_of(200, reserve_output=100)
    with pytest.raises(ContextOverflowError) as raised:
        asyncio.run(tracker.afit(big)) if is_async else tracker.fit(big)
    error = raised.value
    assert (error.tokens, error.limit, error.over_by) == (2_343, 103, 2_240)
    assert error.biggest == ((6, "system", 2_000), (4, "user", 300), (0, "system", 40))
    assert str(error) == (
        "The messages have 2,343 tokens after DropOldestTurns(keep_last=1) and 103 fit: 2,240 too many. The biggest: "
        "message 6 (system, 2,000), message 4 (user, 300), message 0 (system, 40). Shorten what goes into them, use a "
        "strategy that drops more, or a model with a larger window (limit=...)."
    )


def test_a_message_that_was_replaced_is_named_by_its_position() -> None:
    messages = [*history()[:3], ToolMessage("t" * 900, tool_call_id="c", id="t1"), HumanMessage("h" * 20)]
    tracker = tracker_of(50, ClearToolResults(0))
    with pytest.raises(ContextOverflowError) as raised:
        tracker.fit(messages)
    assert raised.value.biggest[0] == (3, "tool", len("[cleared: an old result of a tool]"))


def test_tools_alone_can_be_too_big() -> None:
    with pytest.raises(ContextOverflowError, match=r"The biggest: none; the tools alone are too big"):
        tracker_of(5).fit([], tools=[TOOL])


def test_a_message_of_five_megabytes_goes_or_is_named() -> None:
    huge = "The price of tea. " * 300_000
    tracker = ContextTracker("gpt-4o")
    assert tracker.fit([HumanMessage(huge), AIMessage("No."), HumanMessage("Sorry")]).messages[-1].content == "Sorry"
    with pytest.raises(ContextOverflowError, match=r"message 1 \(user, 1,[0-9]{3},[0-9]{3}\)"):
        tracker.fit([SystemMessage("You help."), HumanMessage(huge)])


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (None, r"messages is a NoneType\. Allowed is a list of messages: pass state\['messages'\]"),
        ("Hello", "messages is a str"),
        (HumanMessage("Hello"), r"messages is a HumanMessage.*or \[message\] for one"),
        ({"role": "user", "content": "Hello"}, "messages is a dict"),
        ({"messages": []}, "messages is a dict"),
        (5, "messages is a int"),
        ([HumanMessage("Hello"), None], "Message 1 cannot be read: it is a NoneType"),
        ([{"role": "king", "content": "Hello"}], "Message 0 cannot be read: it is a mapping with the role 'king'"),
        ([("king", "Hello")], "Message 0 cannot be read: it is a tuple"),
        ([{"role": "user"}], "Message 0 cannot be read"),
        ([5], "Message 0 cannot be read: it is a int"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True], ids=["fit", "afit"])
def test_what_is_no_list_of_messages_is_refused(messages: Any, told: str, is_async: bool) -> None:
    tracker = tracker_of(100)
    with pytest.raises(ContextError, match=told):
        asyncio.run(tracker.afit(messages)) if is_async else tracker.fit(messages)


# --- strategies of the app's own --------------------------------------------------------------------------------------
class Prunes:
    """A strategy by a function."""

    def __init__(self, prune: Callable[[Overfull], Any]) -> None:
        self._prune = prune

    def __repr__(self) -> str:
        return "Prunes()"

    def prune(self, overfull: Overfull) -> Any:
        """Return whatever the function says."""
        return self._prune(overfull)


class PrunesLater(Prunes):
    """The same when it has waited."""

    async def aprune(self, overfull: Overfull) -> Any:
        await asyncio.sleep(0)
        return self._prune(overfull)


def but(*left_out: str) -> Callable[[Overfull], list[BaseMessage]]:
    return lambda overfull: [message for message in overfull.messages if message.id not in left_out]


def with_instead(name: str, message: BaseMessage) -> Callable[[Overfull], list[BaseMessage]]:
    """Put a message in place of another, and leave the user's first one out."""
    return lambda overfull: [message if each.id == name else each for each in overfull.messages if each.id != "h1"]


def raising(overfull: Overfull) -> Any:
    raise LookupError("a secret of the user")


def cutting_off(overfull: Overfull) -> Any:
    del overfull.messages[1]  # type: ignore[attr-defined]
    return overfull.messages


RUBBISH: dict[str, tuple[Callable[[Overfull], Any], str]] = {
    "None": (lambda _: None, "it returned a NoneType where a list of messages is needed"),
    "a text": (lambda _: "h1", "it returned a str where a list of messages is needed"),
    "an empty text": (lambda _: "", "it returned a str where"),
    "a number": (lambda _: 5, "it returned a int where"),
    "a set": (lambda overfull: set(map(id, overfull.messages)), "it returned a set where"),
    "an iterator": (lambda overfull: iter(overfull.messages), "it returned a tuple_iterator where"),
    "numbers": (lambda _: [0, 1, 2], "it returned a list that has a int among its messages"),
    "ids": (lambda overfull: ids(overfull.messages), "it returned a list that has a str among its messages"),
    "a None among them": (lambda overfull: [*overfull.messages, None], "has a NoneType among its messages"),
    "nothing": (lambda _: [], "it dropped message [04], a .* message that must stay"),
    "another order": (lambda overfull: overfull.messages[::-1], "it changed the order of the messages"),
    "one twice": (lambda overfull: [*overfull.messages, overfull.messages[-1]], "or has one twice"),
    "a copy beside one": (
        lambda overfull: [*overfull.messages, overfull.messages[-1].model_copy()],
        "changed the order of the messages, or has one twice",
    ),
    "no system message": (but("s"), "it dropped message 0, a system message that must stay"),
    "no message of the user": (but("h2"), "it dropped message 4, a user message that must stay"),
    "a result without its call": (but("a1"), "it separated the call of tools in message 2 from its results"),
    "a call without its result": (but("t1"), "it separated the call of tools in message 2 from its results"),
    "another role": (with_instead("s", HumanMessage("You help.", id="s")), "it dropped message 0, a system message"),
    "a result made a text": (with_instead("t1", AIMessage("It is 5", id="t1")), "it separated the call of tools"),
    "a result of another call": (
        with_instead("t1", ToolMessage("5", tool_call_id="d", id="t1")),
        "it separated the call of tools in message 2",
    ),
    "a call made a text": (with_instead("a1", AIMessage("I look", id="a1")), "it separated the call of tools"),
    "a list that it changed": (cutting_off, "it raised (TypeError|AttributeError)"),
    "an error": (raising, "Prunes.* is set aside for this call: it raised LookupError"),
}


@pytest.mark.parametrize(("prune", "told"), RUBBISH.values(), ids=RUBBISH)
@pytest.mark.parametrize("kind", [Prunes, PrunesLater], ids=["fit", "afit"])
@pytest.mark.usefixtures("lenient")
def test_a_strategy_that_is_wrong_is_set_aside_with_one_warning(
    prune: Callable[[Overfull], Any], told: str, kind: type[Prunes], caplog: pytest.LogCaptureFixture
) -> None:
    tracker, given = tracker_of(50, kind(prune)), history()
    for _ in range(2):
        window = tracker.fit(given) if kind is Prunes else asyncio.run(tracker.afit(given))
        assert ids(window.messages) == ["s", "h2", "a2"]
        assert window.decision.dropped == ("h1", "a1", "t1")
        assert window.update == tracker_of(50).fit(history()).update
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(told, record.getMessage())
    assert "DropOldestTurns did it instead" in record.getMessage()
    assert "secret" not in record.getMessage()


@pytest.mark.parametrize(("prune", "told"), RUBBISH.values(), ids=RUBBISH)
def test_our_own_tests_see_a_strategy_that_is_wrong(prune: Callable[[Overfull], Any], told: str) -> None:
    with pytest.raises(ContextError, match=told):
        tracker_of(50, Prunes(prune)).fit(history())


def test_what_a_strategy_raised_is_its_errors_cause() -> None:
    with pytest.raises(ContextError) as raised:
        tracker_of(50, Prunes(raising)).fit(history())
    assert isinstance(raised.value.__cause__, LookupError)


@pytest.mark.usefixtures("lenient")
def test_a_strategy_that_leaves_too_much_overflows() -> None:
    with pytest.raises(ContextOverflowError, match=r"63 tokens after Prunes\(\) and 53 fit: 10 too many"):
        tracker_of(50, Prunes(lambda overfull: overfull.messages)).fit(history())


def test_a_strategy_may_return_what_it_was_given() -> None:
    window = tracker_of(60, Prunes(lambda overfull: overfull.messages), threshold=0.5).fit(history())
    assert window.messages == history()
    assert window.decision.trigger == "threshold"
    assert not window.decision.pruned


def test_a_strategy_is_told_what_there_is_room_for() -> None:
    seen: list[Overfull] = []

    def prune(overfull: Overfull) -> Any:
        seen.append(overfull)
        return overfull.messages

    tracker_of(80, Prunes(prune), threshold=0.5, reserve_output=3).fit(history())
    [overfull] = seen
    assert list(overfull.messages) == history()
    assert list(overfull.tokens) == [10] * 6
    assert (overfull.total, overfull.target, overfull.most) == (60, 40 - PRIMING, 80 - PRIMING)
    assert overfull.count(HumanMessage("Hello")) == 5
    assert overfull.together(2) == overfull.together(3) == [2, 3]
    assert overfull.together(1) == (1,)
    assert (overfull.pinned, overfull.turn_starts, overfull.summaries) == ({0, 4}, [1, 4], [])


def test_a_message_may_be_replaced_by_a_shorter_one() -> None:
    short = HumanMessage("Thanks", id="h2")
    window = tracker_of(50, Prunes(with_instead("h2", short))).fit(history())
    assert ids(window.messages) == ["s", "a1", "t1", "h2", "a2"]
    assert (window.decision.dropped, window.decision.replaced) == (("h1",), ("h2",))
    assert window.tokens == 46 + PRIMING
    assert window.update == [RemoveMessage(id="h1"), short]


def test_a_call_and_its_results_may_become_one_message() -> None:
    note = AIMessage("5 euros", id="a1")
    window = tracker_of(
        55, Prunes(lambda overfull: [note if each.id == "a1" else each for each in but("t1")(overfull)])
    ).fit(history())
    assert window.decision.dropped == ("t1",)
    assert window.decision.replaced == ("a1",)
    state: Any = add_messages(history(), list(window.update))  # type: ignore[arg-type]
    assert state == window.messages


def test_a_message_may_be_added() -> None:
    note = HumanMessage("Note", id="n")
    window = tracker_of(55, Prunes(lambda overfull: [*but("h1")(overfull), note])).fit(history())
    assert (window.decision.dropped, window.decision.added) == (("h1",), ("n",))
    assert window.tokens == 54 + PRIMING
    state: Any = add_messages(history(), list(window.update))  # type: ignore[arg-type]
    assert state == window.messages


@pytest.mark.parametrize("message", [HumanMessage("Note"), AIMessage("Note")])
def test_without_ids_what_is_new_is_told_from_what_is_replaced(message: BaseMessage) -> None:
    nameless = [
        HumanMessage("Tea price?"),
        HumanMessage("Tea price!"),
        AIMessage("5 euros"),
        HumanMessage("Thank you!"),
    ]
    window = tracker_of(40, Prunes(lambda overfull: [*overfull.messages[1:], message]), threshold=0.5).fit(nameless)
    assert (window.decision.dropped, window.decision.replaced, window.decision.added) == (("#0",), (), ("#3",))
    replacing = tracker_of(40, Prunes(lambda overfull: [message, *overfull.messages[2:]]), threshold=0.5).fit(nameless)
    is_like = message.type == "human"
    assert replacing.decision.dropped == (("#0",) if is_like else ("#0", "#1"))
    assert replacing.decision.replaced == (("#1",) if is_like else ())
    assert replacing.decision.added == (() if is_like else ("#0",))


def test_a_message_that_is_added_without_an_id_is_told_by_its_position() -> None:
    window = tracker_of(55, Prunes(lambda overfull: [*but("h1")(overfull), HumanMessage("Note")])).fit(history())
    assert window.decision.added == ("#5",)


@pytest.mark.parametrize("kind", [Prunes, PrunesLater])
def test_afit_asks_strategies_that_wait_and_those_that_do_not(kind: type[Prunes]) -> None:
    window = asyncio.run(tracker_of(50, kind(but("h1"))).afit(history()))
    assert window.decision.dropped == ("h1",)
    assert window.decision.strategy == kind.__name__


def test_fit_asks_a_strategy_that_could_wait() -> None:
    assert tracker_of(50, PrunesLater(but("h1"))).fit(history()).decision.dropped == ("h1",)


@pytest.mark.usefixtures("lenient")
def test_an_afit_that_is_cancelled_stays_cancelled() -> None:
    class Forever(Prunes):
        async def aprune(self, overfull: Overfull) -> Any:
            await asyncio.Event().wait()

    async def cancel() -> None:
        task = asyncio.create_task(tracker_of(50, Forever(but("h1"))).afit(history()))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())


def test_one_tracker_serves_many_threads() -> None:
    tracker = ContextTracker("gpt-4o", limit=200, threshold=0.5)

    def fit(number: int) -> list[Any]:
        messages = [HumanMessage(f"Question {n} " * 5, id=f"{number}-{n}") for n in range(number % 7 + 8)]
        return ids(tracker.fit(messages).messages)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fit, range(200)))
    assert found == [fit(number) for number in range(200)]
    assert all(each[-1] == f"{number}-{number % 7 + 7}" for number, each in enumerate(found))


# --- estimates --------------------------------------------------------------------------------------------------------
def test_estimates_are_corrected_by_what_the_provider_counts() -> None:
    messages = [HumanMessage("What does tea cost? " * 20), AIMessage("5 euros"), HumanMessage("Thanks")]
    tracker = ContextTracker("claude-sonnet-4", limit=150)
    counted = tracker.count(messages)
    assert tracker.tokenizer == "o200k_base~estimate"
    assert tracker.fit(messages).decision.trigger is None
    tracker.calibrate(counted, counted * 2)
    assert tracker.count(messages) == counted * 2
    window = tracker.fit(messages)
    assert window.decision.trigger == "limit"
    assert window.decision.tokens_before == counted * 2
    assert window.messages == messages[1:] if window.messages[0] is messages[1] else messages[2:]
    assert window.tokens == tracker.count(window.messages)


def test_a_corrected_count_is_rounded_up_but_not_by_what_a_float_lacks() -> None:
    messages = [HumanMessage("tea" + " tea" * 42)]
    tracker = ContextTracker("claude-sonnet-4", limit=55, threshold=1.0)
    assert tracker.count(messages) == 50
    tracker.calibrate(50, 55)
    assert tracker.count(messages) == 55  # 50 * 1.1 is a little more
    assert tracker.fit(messages).decision.trigger is None
    assert tracker.count([]) == 4  # 3.3


def test_counts_of_models_that_tiktoken_knows_are_not_corrected() -> None:
    tracker = ContextTracker("gpt-4o")
    counted = tracker.count(history())
    tracker.calibrate(counted, counted * 2)
    assert tracker.count(history()) == counted
    assert calibration.factor_of("gpt-4o") == 1.0


def test_an_overflow_is_told_in_corrected_tokens() -> None:
    calibration.learn("claude-sonnet-4", 100, 200)
    tracker = ContextTracker("claude-sonnet-4", limit=50)
    size = tracker.count([HumanMessage("tea " * 100)]) - 2 * PRIMING
    with pytest.raises(ContextOverflowError) as raised:
        tracker.fit([HumanMessage("tea " * 100)])
    assert raised.value.biggest == ((0, "user", size),)


# --- nodes of a graph -------------------------------------------------------------------------------------------------
class PlainState(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


class ModelState(BaseModel):
    messages: Annotated[list[AnyMessage], add_messages] = []
    context_tokens: int = 0


@dataclass
class DataState:
    messages: Annotated[list[AnyMessage], add_messages]
    context_tokens: int = 0


def graph_of(schema: Any, node: Any, saw: list[list[str]]) -> Any:
    """Build a graph of a node and an agent that notes what it was given."""
    get: Any = attrgetter("messages") if schema in (ModelState, DataState) else lambda state: state["messages"]

    def agent(state: Any) -> Any:
        given = state.get("llm_input_messages") if isinstance(state, dict) else None
        saw.append([message.text for message in given or get(state)])
        return {"messages": [AIMessage(f"Answer {len(saw)}")]}

    builder: Any = StateGraph(schema)
    builder.add_node("context", node)
    builder.add_node("agent", agent)
    builder.add_edge(START, "context")
    builder.add_edge("context", "agent")
    return builder.compile(checkpointer=InMemorySaver())


def say(graph: Any, text: str, config: Any, *, is_async: bool) -> Any:
    said = {"messages": [("user", text)]}
    return asyncio.run(graph.ainvoke(said, config)) if is_async else graph.invoke(said, config)


@pytest.mark.parametrize("is_async", [False, True], ids=["invoke", "ainvoke"])
@pytest.mark.parametrize("schema", [State, MessagesState, PlainState, ModelState, DataState])
def test_the_pruning_of_a_context_node_lasts(schema: Any, is_async: bool) -> None:
    saw: list[list[str]] = []
    graph = graph_of(schema, context_node(tracker_of(40)), saw)
    config = config_of()
    for number in range(1, 5):
        state = say(graph, f"Question {number}", config, is_async=is_async)
    texts = [message.text for message in graph.get_state(config).values["messages"]]
    assert saw[0] == ["Question 1"]
    assert saw[-1] == ["Question 3", "Answer 3", "Question 4"]
    assert texts == [message.text for message in state["messages"]] == [*saw[-1], "Answer 4"]
    if schema in (State, ModelState, DataState):
        assert state["context_tokens"] == 10 + 8 + 10 + PRIMING


@pytest.mark.parametrize("is_async", [False, True], ids=["invoke", "ainvoke"])
def test_a_summary_lasts_in_the_state(is_async: bool) -> None:
    asked: list[str] = []

    def sum_up(messages: Sequence[BaseMessage]) -> str:
        asked.append(messages[-1].text.partition("since:\n")[2])
        return f"Sum {len(asked)}"

    saw: list[list[str]] = []
    strategy = Summarize(FakeModel(says=sum_up), keep_last=1, summary_tokens=45)
    graph, config = graph_of(State, context_node(tracker_of(90, strategy)), saw), config_of()
    for number in range(1, 10):
        say(graph, f"Question {number}", config, is_async=is_async)
    assert asked == [
        "\n".join(f"user: Question {number}\nassistant: Answer {number}" for number in numbers)
        for numbers in (range(1, 6), range(6, 9))
    ]
    assert saw[-2][:2] == ["Summary of the conversation so far:\nSum 1", "Question 6"]
    assert saw[-1] == ["Summary of the conversation so far:\nSum 2", "Question 9"]
    assert len(graph.get_state(config).values["messages"]) == 3


def test_a_summary_is_not_streamed_to_the_user() -> None:
    strategy = Summarize(FakeModel(says=lambda _messages: "A secret summary"), keep_last=1, summary_tokens=10)
    tracker = ContextTracker("gpt-4o", limit=50, threshold=1.0, strategy=strategy, counter=lambda _messages: 10)
    graph: Any = StateGraph(State)
    graph.add_node("context", context_node(tracker))
    graph.add_node("agent", lambda state: {"messages": [FakeModel().invoke(state["messages"])]})
    graph.add_edge(START, "context")
    graph.add_edge("context", "agent")
    streamed, state = [], {}
    for mode, told in graph.compile().stream({"messages": history()}, stream_mode=["messages", "values"]):
        if mode == "values":
            state = told
        elif told[0].type == "AIMessageChunk":
            streamed.append(told[0].text)
    assert any("A secret summary" in message.text for message in state["messages"])
    assert "".join(streamed) == "It costs 5 euros."


@pytest.mark.parametrize("is_async", [False, True], ids=["invoke", "ainvoke"])
def test_the_pre_model_hook_prunes_what_the_model_is_given_and_not_the_state(is_async: bool) -> None:
    class HookState(State):
        llm_input_messages: list[AnyMessage]

    saw: list[list[str]] = []
    graph, config = graph_of(HookState, pre_model_hook(tracker_of(40)), saw), config_of()
    for number in range(1, 5):
        state = say(graph, f"Question {number}", config, is_async=is_async)
    assert saw[-1] == ["Question 3", "Answer 3", "Question 4"]
    assert len(state["messages"]) == 8
    assert state["context_tokens"] == 10 + 8 + 10 + PRIMING


@pytest.mark.filterwarnings("ignore:create_react_agent has been moved")
def test_the_pre_model_hook_is_that_of_create_react_agent() -> None:
    from langgraph.prebuilt import create_react_agent

    saw: list[list[str]] = []

    def answer(messages: Sequence[BaseMessage]) -> str:
        saw.append([message.text for message in messages])
        return f"Answer {len(saw)}"

    hook = pre_model_hook(tracker_of(40))
    agent = create_react_agent(FakeModel(says=answer), [], pre_model_hook=hook, checkpointer=InMemorySaver())
    config = config_of()
    for number in range(1, 5):
        state = say(agent, f"Question {number}", config, is_async=False)
    assert saw[-1] == ["Question 3", "Answer 3", "Question 4"]
    assert len(state["messages"]) == 8


@pytest.mark.parametrize("make", [context_node, pre_model_hook])
def test_the_messages_may_stand_under_another_key(make: Any) -> None:
    node = make(tracker_of(50), messages_key="chat")
    told = node.invoke({"messages": None, "chat": history()})
    assert told["context_tokens"] == 30 + PRIMING
    assert len(told.get("chat") or told["llm_input_messages"]) == 3


def test_a_context_node_that_prunes_nothing_leaves_the_messages_alone() -> None:
    assert context_node(tracker_of(60)).invoke({"messages": history()}) == {"context_tokens": 60 + PRIMING}


@pytest.mark.parametrize("make", [context_node, pre_model_hook])
@pytest.mark.parametrize(
    "state", [{"chat": []}, {}, {"messages": None}, ModelState.model_construct(messages=None), None]
)
def test_a_state_without_messages_says_what_to_type(make: Any, state: Any) -> None:
    node = make(tracker_of(50))
    told = r"The state has no 'messages' to fit\. .*messages_key='messages'"
    with pytest.raises(ConfigurationError, match=told):
        node.invoke(state)
    with pytest.raises(ConfigurationError, match=told):
        asyncio.run(node.ainvoke(state))


@pytest.mark.parametrize(("make", "name"), [(context_node, "context_node"), (pre_model_hook, "pre_model_hook")])
@pytest.mark.parametrize("tracker", [None, "gpt-4o", ContextTracker, DropOldestTurns()], ids=repr)
def test_a_node_takes_a_tracker(make: Any, name: str, tracker: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name} takes a ContextTracker.*{name}\(ContextTracker\(model="):
        make(tracker)


def test_an_overflow_in_a_node_reaches_the_app() -> None:
    graph = graph_of(State, context_node(tracker_of(5)), [])
    with pytest.raises(ContextOverflowError, match=r"message 0 \(user, 10\)"):
        say(graph, "Question 1", config_of(), is_async=False)


def test_a_tracker_says_what_it_is() -> None:
    assert repr(tracker_of(5)) == "ContextTracker('gpt-4o', limit=8, strategy=DropOldestTurns(keep_last=1))"
    strategy: Strategy = KeepLast(2)
    assert tracker_of(5, strategy).strategy is strategy


def test_dropped_messages_without_an_id_are_named_by_their_place() -> None:
    said = "word " * 50
    history = [
        HumanMessage(said, id=""),
        AIMessage(said),
        HumanMessage(said, id="x"),
        AIMessage("b"),
        HumanMessage("Hi"),
    ]
    assert ContextTracker("gpt-4o", limit=60).fit(history).decision.dropped == ("#0", "#1", "x", "#3")
