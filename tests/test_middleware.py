"""The middleware in agents made by langchain's create_agent: ids in the state, the model's window."""

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents import middleware as langchain_middleware
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.messages import BaseMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from apps import MODEL, FakeModel, asks, calls_a_tool_first, config_of
from turntrace import ContextTracker, SessionCallbackHandler
from turntrace import attributes as a
from turntrace.context import ContextOverflowError
from turntrace.errors import ConfigurationError
from turntrace.middleware import SessionMiddleware
from turntrace.testing import Capture, assert_all_tagged, captured_spans

TEXT = "word " * 40
PROMPT = "You sell tea. " * 10
HAS_UPDATES = hasattr(langchain_middleware, "ExtendedModelResponse")
needs_updates = pytest.mark.skipif(not HAS_UPDATES, reason="this langchain's middleware cannot update the state")


class ToolModel(FakeModel):
    """A fake model that takes tools, and keeps what it was given.

    Attributes:
        given: The messages of each call.
    """

    given: list[Any] = []  # noqa: RUF012  # a field of pydantic's, copied for each model

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Any:
        return self.bind(**kwargs)

    def _answer(self, messages: Sequence[BaseMessage]) -> Any:
        self.given.append(list(messages))
        return super()._answer(messages)


@tool
def price_of(item: str) -> str:
    """Look up the price of an item."""
    return f"5 euros for {item}"


def talk(agent: Any, capture: Capture, turns: int, *, is_async: bool = False) -> Any:
    config = {**config_of(user_id="ann"), "callbacks": [SessionCallbackHandler(capture.tracker())]}
    for _ in range(turns):
        result = asyncio.run(agent.ainvoke(asks(TEXT), config)) if is_async else agent.invoke(asks(TEXT), config)
    return result


def agent_of(model: FakeModel, *middleware: Any, prompt: str | None = PROMPT) -> Any:
    return create_agent(model, [price_of], system_prompt=prompt, middleware=middleware, checkpointer=InMemorySaver())


@pytest.mark.parametrize("is_async", [False, True])
def test_the_ids_of_the_turn_are_in_the_state(capture: Capture, is_async: bool) -> None:
    result = talk(agent_of(ToolModel(), SessionMiddleware()), capture, 2, is_async=is_async)
    roots = [span for span in captured_spans(capture.spans()) if span.name == a.SPAN_TURN]
    assert result["turn_number"] == 2
    assert result["turn_id"] == roots[-1].attributes[a.TURN_ID]
    assert result["session_id"] == roots[-1].attributes[a.SESSION_ID]
    assert result["conversation_id"] == roots[-1].attributes[a.CONVERSATION_ID]
    assert_all_tagged(capture.spans())


def test_without_the_callback_the_agent_works_as_before() -> None:
    agent = agent_of(ToolModel(), SessionMiddleware(ContextTracker(MODEL)))
    result = agent.invoke(asks(), config_of())
    assert result["messages"][-1].content == "It costs 5 euros."
    assert "turn_id" not in result or result["turn_id"] == ""


@pytest.mark.parametrize("is_async", [False, True])
def test_the_model_is_given_what_fits_and_the_state_keeps_all(capture: Capture, is_async: bool) -> None:
    context = ContextTracker(MODEL, limit=400, threshold=0.6)
    model = ToolModel(says=calls_a_tool_first)
    result = talk(agent_of(model, SessionMiddleware(context)), capture, 4, is_async=is_async)
    assert len(result["messages"]) == 16
    for given in model.given:
        assert given[0].content == PROMPT
        assert context.count(given, tools=[price_of]) <= 400 * 0.6
    events = [span for span in captured_spans(capture.spans()) if span.name == a.SPAN_PRUNE]
    whole = [2 + 4 * (number // 2) + 2 * (number % 2) for number in range(len(model.given))]
    assert len(events) == sum(len(given) < all_of_it for given, all_of_it in zip(model.given, whole, strict=True)) > 0
    generations = [span for span in captured_spans(capture.spans()) if span.name == MODEL]
    assert [span.attributes[a.CONVERSATION_MESSAGES_IN_CONTEXT] for span in generations] == [
        len(given) for given in model.given
    ]
    if HAS_UPDATES:
        assert result["context_tokens"] == context.count(model.given[-1], tools=[price_of])


@needs_updates
@pytest.mark.parametrize("is_async", [False, True])
def test_pruning_can_last(capture: Capture, is_async: bool) -> None:
    context = ContextTracker(MODEL, limit=400, threshold=0.6)
    model = ToolModel(says=calls_a_tool_first)
    result = talk(agent_of(model, SessionMiddleware(context, lasting=True)), capture, 4, is_async=is_async)
    assert [message.id for message in result["messages"][:-1]] == [message.id for message in model.given[-1][1:]]
    events = [span for span in captured_spans(capture.spans()) if span.name == a.SPAN_PRUNE]
    triggers = [span.attributes[a.CONTEXT_TRIGGER] for span in events]
    assert set(triggers) == {"threshold"}


def test_what_cannot_fit_is_an_error_of_the_agent(capture: Capture) -> None:
    agent = agent_of(ToolModel(), SessionMiddleware(ContextTracker(MODEL, limit=30)))
    with pytest.raises(ContextOverflowError, match=r"message 0 \(system"):
        talk(agent, capture, 1)


def summarizing(model: Any) -> Any:
    """Make LangChain's middleware that sums up from 8 messages on, and keeps 4."""
    kind: Any = SummarizationMiddleware
    if "trigger" in inspect.signature(kind).parameters:
        return kind(model, trigger=("messages", 8), keep=("messages", 4))
    return kind(model, max_tokens_before_summary=8, messages_to_keep=4, token_counter=len)  # as langchain 1.0 has it


@pytest.mark.parametrize("is_async", [False, True])
def test_langchains_summaries_are_on_record_as_pruning_by_other_code(capture: Capture, is_async: bool) -> None:
    summaries = summarizing(ToolModel(says=lambda _: "They asked for prices."))
    tracker = capture.tracker()
    agent = agent_of(ToolModel(says=calls_a_tool_first), summaries, SessionMiddleware(), prompt=None)
    config = {**config_of(user_id="ann"), "callbacks": [SessionCallbackHandler(tracker)]}
    for _ in range(4):
        result = asyncio.run(agent.ainvoke(asks(TEXT), config)) if is_async else agent.invoke(asks(TEXT), config)
    decisions = [decision for _, decision in tracker.ledger.decisions(result["session_id"])]
    assert decisions
    for decision in decisions:
        assert decision.trigger == "external"
        assert decision.strategy == "SummarizationMiddleware.before_model"
        # How many it keeps is another matter in each version; the summary comes in for those that went.
        assert decision.messages_before >= 8
        assert decision.messages_pruned == len(decision.dropped) > 0
        assert decision.messages_after == decision.messages_before - decision.messages_pruned + 1
    events = [span for span in captured_spans(capture.spans()) if span.name == a.SPAN_PRUNE]
    assert len(events) == len(decisions) == tracker.ledger.sessions()[0].prunings
    assert_all_tagged(capture.spans())


@pytest.mark.parametrize("given", ["gpt-4o", 8_000, FakeModel()])
def test_something_else_than_a_context_tracker_is_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"SessionMiddleware\(ContextTracker\(model='gpt-4o'\)\)"):
        SessionMiddleware(given)


@pytest.mark.skipif(HAS_UPDATES, reason="this langchain can do it")
def test_lasting_pruning_says_that_it_needs_a_newer_langchain() -> None:
    with pytest.raises(ConfigurationError, match="pip install -U langchain"):
        SessionMiddleware(lasting=True)
