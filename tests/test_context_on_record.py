"""What models were given and what was pruned is on record: on spans, in the ledger, in the state."""

import asyncio
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, RemoveMessage, SystemMessage
from langchain_core.messages.utils import trim_messages
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import REMOVE_ALL_MESSAGES
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, Send, interrupt

from apps import MODEL, USAGE, FakeModel, State, asks, config_of, new_thread, single
from turntrace import ContextTracker, PruningDecision, SessionCallbackHandler, SessionTracker, track_graph
from turntrace import attributes as a
from turntrace.context import KeepLast, calibration, context_node
from turntrace.lifecycle.windows import Windows
from turntrace.testing import Capture, CapturedSpan, assert_all_tagged, captured_spans

WORDS = "word " * 60
LIMIT = 300


@pytest.fixture
def context() -> ContextTracker:
    return ContextTracker(MODEL, limit=LIMIT, threshold=0.5)


@pytest.fixture(autouse=True)
def _no_calibration() -> None:
    calibration.forget()


def spans_named(capture: Capture, name: str) -> list[CapturedSpan]:
    return [span for span in captured_spans(capture.spans()) if span.name == name]


def context_of(span: CapturedSpan) -> dict[str, Any]:
    beginnings = ("context.", "conversation.context", "conversation.messages")
    return {name: value for name, value in span.attributes.items() if name.startswith(beginnings)}


def decisions_of(tracker: SessionTracker) -> list[PruningDecision]:
    [session] = tracker.ledger.sessions()
    return [decision for _, decision in tracker.ledger.decisions(session.id)]


def talk(graph: Any, tracker: SessionTracker, turns: int, *, is_async: bool = False, text: str = WORDS) -> Any:
    """Say the same in so many turns of one conversation, and return what the last one gave back."""
    config = {**config_of(user_id="ann"), "callbacks": [SessionCallbackHandler(tracker)]}
    result = None
    for _ in range(turns):
        result = asyncio.run(graph.ainvoke(asks(text), config)) if is_async else graph.invoke(asks(text), config)
    return result


# --- everywhere without plumbing --------------------------------------------------------------------------------------
def fits_in_a_node(context: ContextTracker) -> Any:
    def work(state: State) -> Any:
        return {"messages": [FakeModel().invoke(context.fit(state["messages"]).messages)]}

    return work


def fits_in_an_async_node(context: ContextTracker) -> Any:
    async def work(state: State) -> Any:
        window = await context.afit(state["messages"])
        return {"messages": [await FakeModel().ainvoke(window.messages)]}

    return work


def fits_in_a_plain_function(context: ContextTracker) -> Any:
    def given(messages: Any) -> Any:
        return context.fit(messages).messages

    def work(state: State) -> Any:
        return {"messages": [FakeModel().invoke(given(state["messages"]))]}

    return work


def fits_in_a_thread(context: ContextTracker) -> Any:
    async def work(state: State) -> Any:
        window = await asyncio.to_thread(context.fit, state["messages"])
        return {"messages": [await FakeModel().ainvoke(window.messages)]}

    return work


@pytest.mark.parametrize("is_tracked", [False, True], ids=["callback", "tracked"])
@pytest.mark.parametrize("make", [fits_in_a_node, fits_in_an_async_node, fits_in_a_plain_function, fits_in_a_thread])
def test_a_decision_is_on_spans_in_the_ledger_and_in_the_state(
    capture: Capture, context: ContextTracker, make: Any, is_tracked: bool
) -> None:
    tracker = capture.tracker()
    builder = single(make(context))
    graph = (track_graph(builder) if is_tracked else builder).compile(checkpointer=InMemorySaver())
    result = talk(graph, tracker, 3, is_async="async" in make.__name__ or "thread" in make.__name__)

    decided = decisions_of(tracker)
    assert [(each.trigger, each.messages_before, each.messages_after) for each in decided] == [
        (None, 1, 1),
        (None, 3, 3),
        ("threshold", 5, 3),
    ]
    last = decided[-1]
    assert (last.strategy, last.tokenizer, last.model, last.limit) == ("DropOldestTurns", "o200k_base", MODEL, LIMIT)
    assert last.tokens_before is not None
    assert last.tokens_after is not None
    assert last.tokens_before > LIMIT * 0.5 >= last.tokens_after
    assert len(last.dropped) == 2

    assert_all_tagged(capture.spans())
    [event] = spans_named(capture, a.SPAN_PRUNE)
    [node] = [s for s in spans_named(capture, "work") if s.span_id == event.parent_id]
    assert node.attributes["turn.number"] == 3
    assert event.attributes["langfuse.observation.type"] == "event"
    assert context_of(event) == {
        "context.trigger": "threshold",
        "context.strategy": "DropOldestTurns",
        "context.tokenizer": "o200k_base",
        "context.limit": LIMIT,
        "context.current_tokens": last.tokens_after,
        "context.new_tokens": last.new_tokens,
        "context.pruned": True,
        "context.messages_pruned": 2,
        "context.tokens_pruned": last.tokens_before - last.tokens_after,
    }
    generation = spans_named(capture, MODEL)[-1]
    error = round((last.tokens_after - USAGE["input_tokens"]) / USAGE["input_tokens"] * 100, 2)
    assert context_of(generation) == {
        "conversation.messages_in_context": 3,
        "conversation.context_tokens": USAGE["input_tokens"],
        "conversation.context_window_pct": USAGE["input_tokens"] / LIMIT,
        "context.limit": LIMIT,
        "context.current_tokens": last.tokens_after,
        "context.new_tokens": last.new_tokens,
        "context.pruned": True,
        "context.estimate_error_pct": error,
    }
    turn = spans_named(capture, a.SPAN_TURN)[-1]
    assert context_of(turn) == {
        "conversation.messages_in_context": 3,
        "conversation.context_tokens": USAGE["input_tokens"],
        "conversation.context_window_pct": USAGE["input_tokens"] / LIMIT,
        "context.pruned": True,
        "context.messages_pruned": 2,
        "context.tokens_pruned": last.tokens_before - last.tokens_after,
    }
    [session] = tracker.ledger.sessions()
    assert session.prunings == 1
    row = tracker.ledger.turns(session.id)[-1][0]
    assert (row.prunings, row.messages_pruned, row.tokens_pruned) == (1, 2, last.tokens_before - last.tokens_after)
    assert (row.context_tokens, row.context_messages, row.context_limit) == (USAGE["input_tokens"], 3, LIMIT)
    assert result.get("context_tokens") == (last.tokens_after if is_tracked else 0)
    if is_tracked:
        assert node.attributes["context.tokens"] == last.tokens_after


def test_what_the_node_says_itself_goes_before_what_was_fitted(capture: Capture, context: ContextTracker) -> None:
    def work(state: State) -> Any:
        context.fit(state["messages"])
        return {"context_tokens": 7}

    tracker = capture.tracker()
    result = talk(track_graph(single(work)).compile(), tracker, 1)
    assert result["context_tokens"] == 7
    [node] = spans_named(capture, "work")
    assert node.attributes["context.tokens"] == 7


def test_fitting_in_a_tool_is_on_record(capture: Capture, context: ContextTracker) -> None:
    @tool
    def look_up(item: str) -> str:
        """Look something up."""
        context.fit([HumanMessage(WORDS) for _ in range(5)])
        return item

    def agent(_: State) -> Any:
        call = {"name": "look_up", "args": {"item": "tea"}, "id": "call-1"}
        return {"messages": [AIMessage("", tool_calls=[call])]}

    builder: Any = StateGraph(State)
    builder.add_node("agent", agent).add_node("tools", ToolNode([look_up]))
    tracker = capture.tracker()
    talk(builder.add_edge(START, "agent").add_edge("agent", "tools").compile(), tracker, 1)
    [event] = spans_named(capture, a.SPAN_PRUNE)
    assert [span.span_id for span in spans_named(capture, "look_up")] == [event.parent_id]
    assert decisions_of(tracker)[0].dropped == ("#0", "#1", "#2")


@pytest.mark.parametrize("is_async", [False, True])
def test_fitting_in_a_turns_block_without_a_graph_is_on_record(
    capture: Capture, context: ContextTracker, is_async: bool
) -> None:
    tracker = capture.tracker()
    history = [HumanMessage(WORDS, id=f"m-{number}") for number in range(4)]

    async def run() -> None:
        async with tracker.session() as session, session.conversation("c").turn("Hello"):
            await FakeModel().ainvoke((await context.afit(history)).messages)

    if is_async:
        asyncio.run(run())
    else:
        with tracker.session() as session, session.conversation("c").turn("Hello"):
            FakeModel().invoke(context.fit(history).messages)
    [decision] = decisions_of(tracker)
    assert decision.dropped == ("m-0", "m-1")
    [event], [root], [generation] = (spans_named(capture, name) for name in (a.SPAN_PRUNE, a.SPAN_TURN, MODEL))
    assert event.parent_id == root.span_id
    assert generation.attributes["context.current_tokens"] == decision.tokens_after
    assert_all_tagged(capture.spans())


def test_outside_of_any_turn_fitting_works_and_records_nothing(capture: Capture, context: ContextTracker) -> None:
    tracker = capture.tracker()
    assert context.fit([HumanMessage(WORDS) for _ in range(5)]).decision.pruned
    assert tracker.ledger.sessions() == []


def test_windows_that_do_not_fit_are_on_record_before_the_error(capture: Capture) -> None:
    context = ContextTracker(MODEL, limit=20)

    def work(state: State) -> Any:
        context.fit(state["messages"])

    tracker = capture.tracker()
    with pytest.raises(ValueError, match="message 0"):
        talk(single(work).compile(), tracker, 1)
    [decision] = decisions_of(tracker)
    assert decision.trigger == "limit"
    assert decision.tokens_after is not None
    assert decision.tokens_after > 20


# --- what a model was given -------------------------------------------------------------------------------------------
def agent_of(model: FakeModel) -> Any:
    def agent(state: State) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    return agent


def test_without_a_tracker_the_provider_counts_and_the_limit_is_the_models(capture: Capture) -> None:
    tracker = capture.tracker()
    talk(single(agent_of(FakeModel())).compile(checkpointer=InMemorySaver()), tracker, 2)
    generation, turn = spans_named(capture, MODEL)[-1], spans_named(capture, a.SPAN_TURN)[-1]
    expected = {
        "conversation.messages_in_context": 3,
        "conversation.context_tokens": USAGE["input_tokens"],
        "conversation.context_window_pct": USAGE["input_tokens"] / 128_000,
    }
    assert context_of(generation) == expected | {
        "context.limit": 128_000,
        "context.current_tokens": USAGE["input_tokens"],
    }
    assert context_of(turn) == expected | {
        "context.pruned": False,
        "context.messages_pruned": 0,
        "context.tokens_pruned": 0,
    }


def test_of_a_model_without_usage_and_of_unknown_size_the_messages_are_known(capture: Capture) -> None:
    model = FakeModel(model_name="home-made", provider=None, usage=None)
    tracker = capture.tracker()
    talk(single(agent_of(model)).compile(), tracker, 1)
    [generation] = spans_named(capture, "home-made")
    assert context_of(generation) == {"conversation.messages_in_context": 1}


def test_a_turn_has_its_fullest_call(capture: Capture) -> None:
    def call(tokens: int, messages: int) -> None:
        usage: Any = {"input_tokens": tokens, "output_tokens": 1, "total_tokens": tokens + 1}
        FakeModel(usage=usage).invoke([HumanMessage("Hi") for _ in range(messages)])

    def work(_: State) -> Any:
        call(500, 2)
        call(900, 4)
        call(700, 3)

    tracker = capture.tracker()
    talk(single(work).compile(), tracker, 1)
    [turn] = spans_named(capture, a.SPAN_TURN)
    assert turn.attributes["conversation.context_tokens"] == 900
    assert turn.attributes["conversation.messages_in_context"] == 4


def test_what_is_put_before_the_window_is_counted_with_it(capture: Capture, context: ContextTracker) -> None:
    prompt = SystemMessage("You sell tea. " * 5)

    def work(state: State) -> Any:
        window = context.fit(state["messages"])
        return {"messages": [FakeModel().invoke([prompt, *window.messages])]}

    tracker = capture.tracker()
    talk(single(work).compile(), tracker, 1)
    [generation], [decision] = spans_named(capture, MODEL), decisions_of(tracker)
    extra = context.count([prompt]) - context.count([])
    assert decision.tokens_after is not None
    assert generation.attributes["context.current_tokens"] == decision.tokens_after + extra


def test_tools_that_the_model_is_given_are_counted(capture: Capture, context: ContextTracker) -> None:
    schema = {"type": "function", "function": {"name": "look_up", "description": "Look.", "parameters": {}}}

    def work(state: State) -> Any:
        window = context.fit(state["messages"])
        return {"messages": [FakeModel().bind(tools=[schema]).invoke(window.messages)]}

    tracker = capture.tracker()
    talk(single(work).compile(), tracker, 1, text="Hi")
    [generation], [decision] = spans_named(capture, MODEL), decisions_of(tracker)
    extra = context.count([], tools=[schema]) - context.count([])
    assert decision.tokens_after is not None
    assert generation.attributes["context.current_tokens"] == decision.tokens_after + extra


def test_another_models_call_is_not_held_against_the_window(capture: Capture, context: ContextTracker) -> None:
    def work(state: State) -> Any:
        window = context.fit(state["messages"])
        FakeModel(model_name="gpt-4o").invoke([HumanMessage("Which topic is it?")])
        return {"messages": [FakeModel().invoke(window.messages)]}

    tracker = capture.tracker()
    talk(single(work).compile(), tracker, 1)
    [other], [own] = spans_named(capture, "gpt-4o"), spans_named(capture, MODEL)
    assert other.attributes["context.limit"] == 128_000
    assert "context.estimate_error_pct" not in other.attributes
    assert own.attributes["context.limit"] == LIMIT


def test_agents_side_by_side_have_their_own_windows(capture: Capture) -> None:
    contexts = {name: ContextTracker(MODEL, limit=limit) for name, limit in (("left", 400), ("right", 4_000))}

    def agent(name: str) -> Any:
        def work(state: State) -> Any:
            return {"messages": [FakeModel().invoke(contexts[name].fit(state["messages"]).messages)]}

        return work

    builder: Any = StateGraph(State)
    for name in contexts:
        builder.add_node(name, agent(name)).add_edge(START, name).add_edge(name, END)
    tracker = capture.tracker()
    talk(builder.compile(), tracker, 1)
    nodes = {span.span_id: span.name for span in captured_spans(capture.spans())}
    limits = {nodes[span.parent_id or ""]: span.attributes["context.limit"] for span in spans_named(capture, MODEL)}
    assert limits == {"left": 400, "right": 4_000}


def test_the_providers_counts_correct_the_estimates_of_a_model_that_tiktoken_does_not_know(capture: Capture) -> None:
    context = ContextTracker("home-made", limit=10_000)
    before = context.count([HumanMessage(WORDS)])
    usage: Any = {"input_tokens": before * 2, "output_tokens": 1, "total_tokens": before * 2 + 1}
    model = FakeModel(model_name="home-made", provider=None, usage=usage)

    def work(state: State) -> Any:
        return {"messages": [model.invoke(context.fit(state["messages"]).messages)]}

    tracker = capture.tracker()
    graph = single(work).compile()
    talk(graph, tracker, 1)
    tracker.flush()
    assert context.count([HumanMessage(WORDS)]) == before * 2
    talk(graph, tracker, 1)
    errors = [span.attributes["context.estimate_error_pct"] for span in spans_named(capture, "home-made")]
    assert errors == [-50.0, 0.0]
    assert [each.tokenizer for each in decisions_of(tracker)] == ["o200k_base~estimate"] * 2


# --- sums -------------------------------------------------------------------------------------------------------------
def test_messages_that_every_call_of_a_turn_leaves_out_count_once(capture: Capture, context: ContextTracker) -> None:
    history = [HumanMessage(WORDS, id=f"m-{number}") for number in range(6)]

    def work(_: State) -> Any:
        context.fit(history)
        context.fit([*history, HumanMessage(WORDS, id="m-6")])

    tracker = capture.tracker()
    talk(single(work).compile(), tracker, 1)
    first, second = decisions_of(tracker)
    assert (first.messages_pruned, second.messages_pruned) == (4, 5)
    assert first.dropped == ("m-0", "m-1", "m-2", "m-3")
    assert second.dropped == ("m-4",)  # the row names what it was the first to drop
    [session] = tracker.ledger.sessions()
    turn = tracker.ledger.turns(session.id)[0][0]
    assert (turn.prunings, turn.messages_pruned, turn.tokens_pruned) == (2, 5, second.tokens_pruned)


def test_messages_that_are_pruned_for_good_add_up(capture: Capture, context: ContextTracker) -> None:
    tracker = capture.tracker()
    builder: Any = StateGraph(State).add_node("context", context_node(context)).add_node("agent", agent_of(FakeModel()))
    builder.add_edge(START, "context").add_edge("context", "agent")
    result = talk(track_graph(builder).compile(checkpointer=InMemorySaver()), tracker, 5)
    assert len(result["messages"]) < 10
    decided = decisions_of(tracker)
    dropped = [each for decision in decided for each in decision.dropped]
    assert len(dropped) == len(set(dropped)) == 10 - len(result["messages"])
    assert {each.trigger for each in decided} == {None, "threshold"}  # nothing looks pruned by other code


def test_the_ledger_names_no_more_than_ids(capture: Capture, context: ContextTracker) -> None:
    tracker = capture.tracker()
    talk(single(fits_in_a_node(context)).compile(checkpointer=InMemorySaver()), tracker, 4, text=f"secret-word {WORDS}")
    everything = repr(decisions_of(tracker)) + repr([span.attributes for span in captured_spans(capture.spans())])
    assert "secret-word" not in everything


# --- pruned by other code ---------------------------------------------------------------------------------------------
def external(tracker: SessionTracker) -> list[PruningDecision]:
    return [decision for decision in decisions_of(tracker) if decision.trigger == "external"]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_removal_from_the_state_is_noticed_at_the_next_node(capture: Capture, is_async: bool) -> None:
    def forget(state: State) -> Any:
        return {"messages": [RemoveMessage(id=str(message.id)) for message in state["messages"][:-2]]}

    async def aforget(state: State) -> Any:
        return forget(state)

    builder: Any = StateGraph(State)
    builder.add_node("forget", aforget if is_async else forget).add_node("agent", agent_of(FakeModel()))
    graph = builder.add_edge(START, "forget").add_edge("forget", "agent").compile(checkpointer=InMemorySaver())
    tracker = capture.tracker()
    talk(graph, tracker, 3, is_async=is_async)
    found = external(tracker)
    assert [(each.strategy, each.messages_before, each.messages_after, each.messages_pruned) for each in found] == [
        ("forget", 3, 2, 1),
        ("forget", 4, 2, 2),
    ]
    events = spans_named(capture, a.SPAN_PRUNE)
    assert [span.attributes["context.trigger"] for span in events] == ["external"] * 2
    agents = {span.span_id: span.attributes["turn.number"] for span in spans_named(capture, "agent")}
    assert [agents[span.parent_id or ""] for span in events] == [2, 3]
    assert_all_tagged(capture.spans())


def test_an_update_of_the_state_between_turns_is_noticed_in_the_next(capture: Capture) -> None:
    tracker, saver = capture.tracker(), InMemorySaver()
    graph: Any = single(agent_of(FakeModel())).compile(checkpointer=saver)
    thread = new_thread()
    config = {**config_of(thread), "callbacks": [SessionCallbackHandler(tracker)]}
    graph.invoke(asks(), config)
    first = graph.get_state(config).values["messages"][0].id
    graph.update_state({"configurable": {"thread_id": thread}}, {"messages": [RemoveMessage(id=first)]})
    graph.invoke(asks(), config)
    [decision] = external(tracker)
    assert decision.dropped == (first,)
    assert decision.strategy is None  # nobody saw who did it


def test_a_state_that_is_cleared_within_a_run_is_noticed(capture: Capture) -> None:
    def clear(_: State) -> Any:
        return {"messages": [RemoveMessage(id=REMOVE_ALL_MESSAGES), HumanMessage("Start again.")]}

    builder: Any = StateGraph(State)
    builder.add_node("clear", clear).add_node("agent", agent_of(FakeModel()))
    graph = builder.add_edge(START, "clear").add_edge("clear", "agent").compile(checkpointer=InMemorySaver())
    tracker = capture.tracker()
    talk(graph, tracker, 1)
    [decision] = external(tracker)
    assert (decision.strategy, decision.messages_before, decision.messages_after) == ("clear", 1, 1)


def test_trimming_what_the_model_is_given_is_noticed_at_its_call(capture: Capture) -> None:
    def agent(state: State) -> Any:
        given = trim_messages(state["messages"], max_tokens=3, token_counter=len, strategy="last")
        return {"messages": [FakeModel().invoke(given)]}

    tracker = capture.tracker()
    talk(single(agent, name="agent").compile(checkpointer=InMemorySaver()), tracker, 4)
    found = external(tracker)
    assert [(each.strategy, each.messages_pruned, each.tokens_after, each.tokenizer) for each in found] == [
        ("agent", 2, USAGE["input_tokens"], "provider"),
        ("agent", 2, USAGE["input_tokens"], "provider"),
    ]


@pytest.mark.parametrize("first", [(), (SystemMessage("Be kind."),)], ids=["as it is", "after a system message"])
def test_what_is_gone_is_named_where_a_turn_begins_with_a_history(capture: Capture, first: tuple[Any, ...]) -> None:
    """The nodes of the first turn that is seen find the same messages, of which a model is sent some or all."""
    kept = [slice(None), slice(2, None), slice(-3, None)]

    def agent(state: State) -> Any:
        seen = [[*first, *state["messages"][part]] for part in kept[:2]] if is_first else [state["messages"][kept[2]]]
        return {"messages": [FakeModel().invoke(given) for given in seen][-1:]}

    tracker, thread = capture.tracker(), new_thread()
    graph: Any = single(agent).compile(checkpointer=InMemorySaver())
    config = {**config_of(thread), "callbacks": [SessionCallbackHandler(tracker)]}
    before = [HumanMessage(f"Message {number}.", id=f"m{number}") for number in range(8)]
    graph.update_state({"configurable": {"thread_id": thread}}, {"messages": before})
    is_first = True
    graph.invoke(asks(), config)
    is_first = False
    graph.invoke(asks(), config)
    assert [each.dropped for each in external(tracker)] == [("m0", "m1"), tuple(f"m{at}" for at in range(2, 8))]


@pytest.mark.parametrize(
    "lasting", [pytest.param(True, id="state"), pytest.param(False, id="only what the model is given")]
)
def test_our_own_pruning_is_never_taken_for_that_of_others(
    capture: Capture, context: ContextTracker, lasting: bool
) -> None:
    def agent(state: State) -> Any:
        window = context.fit(state["messages"])
        answer = FakeModel().invoke(window.messages)
        return {"messages": [*(window.update if lasting else ()), answer]}

    tracker = capture.tracker()
    talk(single(agent).compile(checkpointer=InMemorySaver()), tracker, 6)
    assert external(tracker) == []
    assert sum(each.pruned for each in decisions_of(tracker)) == 4


def test_other_lists_of_messages_are_not_the_conversation(capture: Capture) -> None:
    """A call that gets the newest message only, a list made anew each time, workers that are sent their own."""

    def router(state: State) -> Any:
        FakeModel().invoke(state["messages"][-1:])
        FakeModel().invoke([HumanMessage("Which topic?")])

    def plan(state: State) -> Any:
        return [Send("work", {"messages": state["messages"][-1:]}) for _ in range(2)]

    builder: Any = StateGraph(State)
    builder.add_node("router", router).add_node("work", lambda state: None).add_node("agent", agent_of(FakeModel()))
    builder.add_edge(START, "router").add_conditional_edges("router", plan, ["work"]).add_edge("work", "agent")
    tracker = capture.tracker()
    talk(builder.compile(checkpointer=InMemorySaver()), tracker, 4)
    assert decisions_of(tracker) == []


def test_a_client_that_sends_its_history_anew_each_time_prunes_nothing(capture: Capture) -> None:
    tracker = capture.tracker()
    graph: Any = single(agent_of(FakeModel())).compile()
    config = {**config_of(), "callbacks": [SessionCallbackHandler(tracker)]}
    for length in (3, 5, 2):
        graph.invoke({"messages": [("user", f"Line {number}") for number in range(length)]}, config)
    assert decisions_of(tracker) == []


def test_subgraphs_with_messages_of_their_own_are_told_apart(capture: Capture) -> None:
    child: Any = single(agent_of(FakeModel()), name="expert").compile()

    def first(state: State) -> Any:
        child.invoke({"messages": [HumanMessage("One.", id="one")]})
        child.invoke({"messages": [HumanMessage("Two.", id="two")]})

    builder: Any = StateGraph(State).add_node("first", first).add_node("agent", agent_of(FakeModel()))
    tracker = capture.tracker()
    graph = builder.add_edge(START, "first").add_edge("first", "agent").compile(checkpointer=InMemorySaver())
    talk(graph, tracker, 3)
    assert decisions_of(tracker) == []


def test_what_is_known_of_conversations_is_bounded() -> None:
    windows = Windows(most=1_000)

    class Talk:
        """Stands for a turn of a conversation: only ids are asked for."""

        def __init__(self, number: int) -> None:
            self.id, self.forked_from = f"turn-{number}", None
            self.conversation = type("Conversation", (), {"id": f"c-{number}"})()

    from turntrace.lifecycle.steps import Glimpse, OpenStep, TurnAccount

    for number in range(500):
        turn: Any = Talk(number)
        step: Any = OpenStep(lambda *_: None, None, "agent", "chain", 1)  # type: ignore[arg-type]
        messages = [HumanMessage("Hi", id=f"m-{number}-{index}") for index in range(20)]
        windows.decisions(turn, [Glimpse(messages, step, "agent:1", False, 1)], TurnAccount())
    assert windows.size == 1_000


def test_a_strategy_of_few_messages_keeps_its_word_in_a_real_graph(capture: Capture) -> None:
    context = ContextTracker(MODEL, limit=LIMIT, threshold=0.5, strategy=KeepLast(1))
    tracker = capture.tracker()
    talk(single(fits_in_a_node(context)).compile(checkpointer=InMemorySaver()), tracker, 4)
    assert [each.messages_after for each in decisions_of(tracker)] == [1, 3, 1, 1]


def test_messages_that_cannot_be_looked_at_do_not_cost_the_turn(
    capture: Capture, lenient: None, caplog: pytest.LogCaptureFixture
) -> None:
    class Strange:
        """Stands in a state where a message should."""

        type = "human"

        @property
        def id(self) -> str:
            raise RuntimeError("no id today")

    tracker = capture.tracker()
    with tracker.session() as session, session.conversation("c").turn("Hello") as turn:
        step = turn.open_step("agent", "chain")
        turn.note_state(step, [Strange()], "agent:1")
        turn.close_step(step)
    [(row, steps)] = tracker.ledger.turns(session.id)
    assert (row.status, [each.name for each in steps]) == ("completed", ["agent"])
    assert [record.message for record in caplog.records if "working out what was pruned" in record.message]


def test_a_call_of_the_newest_message_only_does_not_hide_a_later_removal(capture: Capture) -> None:
    def router(state: State) -> Any:
        FakeModel().invoke(state["messages"][-1:])

    def forget(state: State) -> Any:
        old = state["messages"][:-1] if len(state["messages"]) > 4 else ()
        return {"messages": [RemoveMessage(id=str(message.id)) for message in old]}

    builder: Any = StateGraph(State)
    builder.add_node("router", router).add_node("forget", forget).add_node("agent", agent_of(FakeModel()))
    builder.add_edge(START, "router").add_edge("router", "forget").add_edge("forget", "agent")
    tracker = capture.tracker()
    talk(builder.compile(checkpointer=InMemorySaver()), tracker, 3)
    [decision] = external(tracker)
    assert (decision.strategy, decision.messages_pruned) == ("forget", 4)


def test_a_run_from_an_older_checkpoint_prunes_nothing(capture: Capture) -> None:
    """As where a user edits a message of theirs, and is answered anew."""
    tracker = capture.tracker()
    graph: Any = single(agent_of(FakeModel())).compile(checkpointer=InMemorySaver())
    config = {**config_of(), "callbacks": [SessionCallbackHandler(tracker)]}
    for _ in range(3):
        graph.invoke(asks(), config)
    [_, second, _] = [each for each in graph.get_state_history(config) if each.next == (START,)]
    edited = {**second.config, "callbacks": config["callbacks"]}
    assert len(graph.invoke(asks("Edited."), edited)["messages"]) == 4
    assert decisions_of(tracker) == []
    newest = graph.get_state(config).values["messages"]
    graph.update_state(config, {"messages": [RemoveMessage(id=newest[0].id)]})
    graph.invoke(asks(), config)
    [decision] = external(tracker)  # what is pruned afterwards is seen
    assert decision.dropped == (newest[0].id,)


def test_what_is_shown_beside_a_question_is_not_pruned(capture: Capture) -> None:
    """What a node wrote that ran beside the question is given back, and is in the state only once that is answered."""

    def ask(_: State) -> Any:
        return {"messages": [AIMessage(interrupt("Really?"))]}

    builder: Any = StateGraph(State)
    builder.add_node("ask", ask).add_node("beside", agent_of(FakeModel())).add_node("agent", agent_of(FakeModel()))
    builder.add_edge(START, "ask").add_edge(START, "beside")
    tracker = capture.tracker()
    graph = builder.add_edge(["ask", "beside"], "agent").compile(checkpointer=InMemorySaver())
    config = {**config_of(), "callbacks": [SessionCallbackHandler(tracker)]}
    assert len(graph.invoke(asks(), config)["messages"]) == 2
    assert len(graph.invoke(Command(resume="Yes."), config)["messages"]) == 4
    assert decisions_of(tracker) == []


def test_a_call_of_the_newest_message_beside_one_with_the_history_prunes_nothing(capture: Capture) -> None:
    def agent(state: State) -> Any:
        answer = FakeModel().invoke(state["messages"])
        FakeModel().invoke(state["messages"][-1:])  # a guard
        return {"messages": [answer]}

    tracker = capture.tracker()
    talk(single(agent).compile(checkpointer=InMemorySaver()), tracker, 3)
    assert decisions_of(tracker) == []
