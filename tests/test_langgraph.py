"""What LangGraph can do beside a line of nodes: attempts, tasks, caches, fan-outs, graphs inside of nodes and tools."""

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import CachePolicy, Command, RetryPolicy, Send

from apps import App, Builder, FakeModel, State, asks, calls_a_tool_first, config_of, single
from turntrace import SessionCallbackHandler, track_graph
from turntrace import attributes as a
from turntrace.records import TurnSummary
from turntrace.testing import Capture, CapturedSpan, assert_all_tagged, captured_spans, format_tree, span_tree

FAST = RetryPolicy(initial_interval=0.001, jitter=False, max_attempts=3, retry_on=ValueError)
ASYNC = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
TRACKED = pytest.mark.parametrize("tracked", [False, True], ids=["callback", "tracked"])


class Runs:
    """Runs graphs in one tracker, and looks at what became of them."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.tracker = capture.tracker()
        self.handler = SessionCallbackHandler(self.tracker)

    def run(self, graph: Any, given: Any, *, is_async: bool = False, **config: Any) -> Any:
        called = {**config_of("c1", user_id="ann"), "callbacks": [self.handler], **config}
        return asyncio.run(graph.ainvoke(given, called)) if is_async else graph.invoke(given, called)

    def spans(self, name: str | None = None) -> list[CapturedSpan]:
        seen = sorted(captured_spans(self.capture.spans()), key=lambda span: span.start_ns)
        return [span for span in seen if name is None or span.name == name]

    def turns(self) -> list[TurnSummary]:
        self.tracker.flush()
        return [turn for each in self.tracker.ledger.sessions() for turn, _ in self.tracker.ledger.turns(each.id)]

    def tree(self, *, by_name: bool = False) -> str:
        """Return the tree of the only turn, after it was seen that all is tagged and nothing is open."""
        assert len(self.turns()) == 1
        spans = [span for span in self.spans() if a.TURN_ID in span.attributes]
        assert_all_tagged(spans)
        assert self.handler.open_runs == 0
        return format_tree(span_tree(spans, by_name=by_name)) + "\n"


@pytest.fixture
def runs(capture: Capture) -> Runs:
    return Runs(capture)


def fails_until(attempt: int) -> Callable[[], None]:
    """Return a function that fails until it is called so many times."""
    calls = iter(range(1, 1000))

    def call() -> None:
        if next(calls) < attempt:
            raise ValueError("not yet")

    return call


# --- attempts ---------------------------------------------------------------------------------------------------------
def attempts_of(spans: list[CapturedSpan]) -> list[tuple[Any, Any]]:
    return [(span.attributes.get(a.TURN_ATTEMPT), span.attributes.get(a.LANGFUSE_OBSERVATION_LEVEL)) for span in spans]


@ASYNC
@TRACKED
def test_a_node_that_is_tried_again_shows_its_attempts(runs: Runs, tracked: bool, is_async: bool) -> None:
    work = fails_until(3)

    def node(_state: State) -> dict[str, Any]:
        FakeModel().invoke("think")
        work()
        return {"messages": [("ai", "done")]}

    async def anode(state: State) -> dict[str, Any]:
        return node(state)

    builder: Builder = StateGraph(State)
    chosen: Any = anode if is_async else node
    builder.add_node("work", chosen, retry_policy=FAST)
    builder.add_edge(START, "work")
    runs.run((track_graph(builder) if tracked else builder).compile(), asks(), is_async=is_async)
    assert runs.tree() == dedent("""\
        conversation.turn
          LangGraph
            work
              gpt-4o-mini
            work
              gpt-4o-mini
            work
              gpt-4o-mini
        """)
    assert attempts_of(runs.spans("work")) == [(None, "WARNING"), (2, "WARNING"), (3, None)]
    [turn] = runs.turns()
    assert (turn.status, turn.error, turn.llm_calls, turn.agent_runs) == ("completed", None, 3, 1)


def test_a_node_that_fails_at_every_attempt_fails_the_turn_once(runs: Runs) -> None:
    builder: Builder = StateGraph(State)
    node: Any = RunnableLambda(lambda _state: fails_until(9)(), name="work")
    builder.add_node("work", node, retry_policy=FAST)
    builder.add_edge(START, "work")
    with pytest.raises(ValueError, match="not yet"):
        runs.run(builder.compile(), asks())
    assert attempts_of(runs.spans("work")) == [(None, "WARNING"), (2, "WARNING"), (3, "ERROR")]
    [turn] = runs.turns()
    assert (turn.status, turn.error) == ("failed", "ValueError")
    [session] = runs.tracker.ledger.sessions()
    assert (session.total_turns, session.failed_turns) == (1, 1)


def test_the_attempts_of_one_of_many_side_by_side_are_its_own(runs: Runs) -> None:
    work = {piece: fails_until(attempt) for piece, attempt in (("a", 1), ("b", 3), ("c", 2))}
    builder: Builder = StateGraph(State)
    node: Any = lambda state: work[state["piece"]]() or {"found": [state["piece"]]}  # noqa: E731
    builder.add_node("work", node, retry_policy=FAST)
    builder.add_conditional_edges(START, lambda _state: [Send("work", {"piece": piece}) for piece in work], ["work"])
    assert runs.run(builder.compile(), asks())["found"] == ["a", "b", "c"]
    assert sorted(str(each) for each, _ in attempts_of(runs.spans("work"))) == ["2", "2", "3", "None", "None", "None"]


def test_a_model_that_is_tried_again_and_one_that_stands_in(runs: Runs) -> None:
    calls = iter([False, False, True, True])

    def says(_messages: Any) -> str:
        if not next(calls):
            raise ValueError("busy")
        return "Five euros."

    tried = FakeModel(says=says).with_retry(wait_exponential_jitter=False, stop_after_attempt=3)
    backed = FakeModel(fails=ValueError("gone")).with_fallbacks([FakeModel(model_name="backup")])
    runs.run(single(lambda _state: {"messages": [tried.invoke("a"), backed.invoke("b")]}).compile(), asks())
    [turn] = runs.turns()
    assert (turn.status, turn.llm_calls, turn.input_tokens) == ("completed", 5, 200)
    levels = [(span.name, span.attributes.get(a.LANGFUSE_OBSERVATION_LEVEL)) for span in runs.spans()]
    calls_made = [each for each in levels if each[0] in ("gpt-4o-mini", "backup")]
    assert calls_made == [
        *[("gpt-4o-mini", "ERROR")] * 2,
        ("gpt-4o-mini", None),
        ("gpt-4o-mini", "ERROR"),
        ("backup", None),
    ]


# --- side by side, caches, nodes that wait ----------------------------------------------------------------------------
@ASYNC
@TRACKED
def test_a_fan_out_of_a_hundred(runs: Runs, tracked: bool, is_async: bool) -> None:
    async def anode(state: Any) -> dict[str, Any]:
        return {"found": [str(state["piece"])], "messages": [await FakeModel().ainvoke("count")]}

    def node(state: Any) -> dict[str, Any]:
        return {"found": [str(state["piece"])], "messages": [FakeModel().invoke("count")]}

    builder: Builder = StateGraph(State)
    chosen: Any = anode if is_async else node
    builder.add_node("work", chosen)
    sends = [Send("work", {"piece": number}) for number in range(100)]
    builder.add_conditional_edges(START, lambda _state: sends, ["work"])
    runs.run((track_graph(builder) if tracked else builder).compile(), asks(), is_async=is_async)
    [turn] = runs.turns()
    assert (turn.llm_calls, turn.input_tokens, turn.agent_runs) == (100, 10_000, 1)
    work = {span.span_id for span in runs.spans("work")}
    assert len(work) == 100
    assert sorted(span.parent_id or "" for span in runs.spans("gpt-4o-mini")) == sorted(work)
    runs.tree()


def test_what_runs_in_parallel_below_a_node_counts_once(runs: Runs) -> None:
    both = RunnableParallel(left=FakeModel(), right=FakeModel())
    runs.run(single(lambda _state: {"messages": [both.invoke("go")["left"]]}).compile(), asks())
    assert [turn.llm_calls for turn in runs.turns()] == [2]
    assert runs.tree().count("      gpt-4o-mini\n") == 2


def test_a_cached_node_runs_once_and_a_deferred_one_last(runs: Runs) -> None:
    builder: Builder = StateGraph(State)
    for name in ("a", "b", "c"):
        node: Any = RunnableLambda(lambda _state: {"messages": [FakeModel().invoke("x")]}, name=name)
        cached = CachePolicy(key_func=lambda _state: "same") if name == "b" else None
        builder.add_node(name, node, defer=name == "c", cache_policy=cached)
    for before, after in ((START, "a"), (START, "c"), ("a", "b"), ("b", "c")):
        builder.add_edge(before, after)
    graph = builder.compile(cache=InMemoryCache())
    for _ in range(2):
        runs.run(graph, asks())
    assert [turn.llm_calls for turn in runs.turns()] == [3, 2]
    assert [span.name for span in runs.spans() if span.attributes.get(a.TURN_STEP)] == ["a", "b", "c", "a", "c"]


# --- graphs inside of nodes and tools ---------------------------------------------------------------------------------
@ASYNC
@pytest.mark.parametrize("has_saver", [False, True], ids=["plain", "own-checkpointer"])
@pytest.mark.parametrize("where", ["node", "tool"])
def test_a_graph_that_is_run_without_the_config_stays_in_the_turn(
    runs: Runs, where: str, has_saver: bool, is_async: bool
) -> None:
    inner: Any = single(lambda _state: {"messages": [FakeModel().invoke("x")]}, "deep").compile(
        checkpointer=InMemorySaver() if has_saver else None, name="inner"
    )
    config: Any = {"configurable": {"thread_id": "inner"}} if has_saver else None

    @tool
    def price_of(item: str) -> str:
        """Look up the price of an item."""
        return str(inner.invoke(asks(item), config)["messages"][-1].content)

    async def aprice_of(item: str) -> str:
        return str((await inner.ainvoke(asks(item), config))["messages"][-1].content)

    if is_async:
        price_of.coroutine = aprice_of
    if where == "tool":
        call = calls_a_tool_first([HumanMessage("Tea?")])
        tools: Any = ToolNode([price_of])
        graph = single(tools, "tools").compile()
        given: Any = {"messages": [("user", "Tea?"), call]}
    else:

        async def anode(_state: State) -> dict[str, Any]:
            return {"messages": (await inner.ainvoke(asks(), config))["messages"][-1:]}

        sync: Any = lambda _state: {"messages": inner.invoke(asks(), config)["messages"][-1:]}  # noqa: E731
        graph = single(anode if is_async else sync, "caller").compile()
        given = asks()
    runs.run(graph, given, is_async=is_async)
    tree = runs.tree()
    assert "inner\n" in tree
    assert "deep\n" in tree
    [turn] = runs.turns()
    assert (turn.conversation_id, turn.llm_calls) == ("c1", 1)


@ASYNC
def test_subgraphs_in_subgraphs_and_a_command_to_the_parent(runs: Runs, is_async: bool) -> None:
    def jumps(_state: State) -> Command[Any]:
        return Command(goto="last", graph=Command.PARENT, update={"found": ["jumped"]})

    child = single(jumps, "jumps").compile(name="child")
    builder: Builder = StateGraph(State)
    builder.add_node("child", child, destinations=("last",))
    last: Any = RunnableLambda(lambda _state: {"found": ["last"]}, name="last")
    builder.add_node("last", last)
    builder.add_edge(START, "child")
    outer = single(track_graph(builder).compile(name="middle"), "middle").compile(checkpointer=InMemorySaver())
    assert runs.run(outer, asks(), is_async=is_async)["found"] == ["jumped", "last"]
    assert runs.tree() == dedent("""\
        conversation.turn
          LangGraph
            middle
              middle
                child
                  child
                    jumps
                last
        """)
    assert not any(a.ERROR_TYPE in span.attributes for span in runs.spans())


# --- the functional API -----------------------------------------------------------------------------------------------
def flow(is_async: bool) -> Any:
    fetch = fails_until(3)

    tasks: Any = task  # its types know no name beside a retry policy

    def _fetch(item: str) -> str:
        FakeModel().invoke(item)
        fetch()
        return item

    def _price(item: str) -> str:
        return f"5 euros for {item}"

    if is_async:

        async def afetch(item: str) -> str:
            return _fetch(item)

        async def aprice(item: str) -> str:
            return _price(item)

        fetches: Any = tasks(retry_policy=FAST, name="fetch")(afetch)
        price: Any = tasks(name="price")(aprice)

        @entrypoint(checkpointer=InMemorySaver())
        async def asell(items: list[str]) -> dict[str, Any]:
            fetched = await asyncio.gather(*[fetches(item) for item in items])
            return {"messages": [("ai", await price(str(fetched)))]}

        return asell
    fetches, price = tasks(retry_policy=FAST, name="fetch")(_fetch), tasks(name="price")(_price)

    @entrypoint(checkpointer=InMemorySaver())
    def sell(items: list[str]) -> dict[str, Any]:
        fetched = [future.result() for future in [fetches(item) for item in items]]
        return {"messages": [("ai", price(str(fetched)).result())]}

    return sell


@ASYNC
def test_tasks_are_steps_with_their_attempts(runs: Runs, is_async: bool) -> None:
    runs.run(flow(is_async), ["tea"], is_async=is_async)
    assert runs.tree().replace("asell", "sell") == dedent("""\
        conversation.turn
          LangGraph
            sell
              fetch
                gpt-4o-mini
              fetch
                gpt-4o-mini
              fetch
                gpt-4o-mini
              price
        """)
    assert attempts_of(runs.spans("fetch")) == [(None, "WARNING"), (2, "WARNING"), (3, None)]
    [turn] = runs.turns()
    assert (turn.status, turn.llm_calls, turn.output_length) == ("completed", 3, len("5 euros for ['tea']"))


def test_tasks_in_tasks_and_chains_inside_of_them(runs: Runs) -> None:
    @task
    def inner(item: str) -> str:
        chain: Any = RunnableLambda(lambda each: each) | FakeModel()
        return str(chain.invoke(item).content)

    @task
    def outer(item: str) -> str:
        return str(inner(item).result())

    @entrypoint()
    def sell(item: str) -> str:
        return str(outer(item).result())

    runs.run(sell, "tea")
    assert runs.tree() == dedent("""\
        conversation.turn
          LangGraph
            sell
              outer
                inner
                  gpt-4o-mini
        """)


# --- ids from other places than the metadata --------------------------------------------------------------------------
@dataclasses.dataclass
class Customer:
    user_id: str
    tier: str = "gold"


class Rude:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} for you")


@ASYNC
@pytest.mark.parametrize("where", ["context", "mapping", "configurable", "server"])
def test_who_it_is_may_stand_in_the_context_or_the_configurable(runs: Runs, where: str, is_async: bool) -> None:
    builder: Builder = StateGraph(State, context_schema=Customer)
    builder.add_node("work", App(is_async=is_async)._plain("work", lambda _state: {"found": ["x"]}))
    builder.add_edge(START, "work")
    graph: Any = track_graph(builder).compile().with_config(callbacks=[runs.handler])
    config: Any = {"configurable": {"thread_id": "c1"}}
    options: dict[str, Any] = {}
    if where == "context":
        options["context"] = Customer("zoe-42")
    elif where == "mapping":
        options["context"] = {"user_id": "zoe-42", "tier": "gold"}
    elif where == "configurable":
        config["configurable"] |= {"user_id": "zoe-42", "tier": "gold"}
    else:
        config["configurable"] |= {"langgraph_auth_user_id": "zoe-42", "user_id": "", "tier": "gold"}
    if is_async:
        asyncio.run(graph.ainvoke(asks(), config, **options))
    else:
        graph.invoke(asks(), config, **options)
        [*_] = graph.stream(asks(), config, **options)
    runs.tracker.flush()
    [session] = runs.tracker.ledger.sessions()
    assert (session.user_id, session.tier) == (runs.tracker.hash_user("zoe-42"), "gold")
    assert "zoe-42" not in str(runs.spans())


def test_the_metadata_has_the_last_word_and_nothing_stays(runs: Runs) -> None:
    graph: Any = track_graph(single(lambda _state: {"found": ["x"]})).compile()
    for user, metadata in (("bob", {"user_id": "zoe-42"}), ("bob", {}), (None, {})):
        config = {"configurable": {"thread_id": "c1", "user_id": user}, "metadata": metadata}
        graph.invoke(asks(), {**config, "callbacks": [runs.handler]})
    users = {turn.user_id for turn in runs.turns()}
    assert users == {runs.tracker.hash_user("zoe-42"), runs.tracker.hash_user("bob"), None}


@pytest.mark.usefixtures("lenient")
def test_a_context_that_cannot_be_read_breaks_nothing(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    builder: Builder = StateGraph(State)
    builder.add_node("work", App()._plain("work", lambda _state: {"found": ["x"]}))
    builder.add_edge(START, "work")
    graph: Any = track_graph(builder).compile()
    with caplog.at_level(logging.WARNING, "turntrace"):
        found = graph.invoke(asks(), {**config_of("c1"), "callbacks": [runs.handler]}, context=Rude())
    assert found["found"] == ["x"]
    assert "reading the ids in the context of a run" in caplog.text
    assert len(runs.turns()) == 1


def test_what_is_compiled_is_what_it_was(runs: Runs) -> None:
    builder = single(lambda _state: {"found": ["x"]})
    plain = builder.compile()
    tracked: Any = track_graph(track_graph(builder)).compile(name="sales")
    assert isinstance(tracked, type(plain))
    assert type(tracked).__name__ == "CompiledStateGraph"
    assert type(tracked.with_config(tags=["t"])) is type(tracked)
    assert tracked.name == "sales"
    assert tracked.get_graph().draw_mermaid().count("work") == plain.get_graph().draw_mermaid().count("work")
    config: Any = {"callbacks": [runs.handler], "configurable": {"thread_id": "c1", "user_id": "zoe-42"}}
    stream: Any = tracked.stream(asks(), config)
    next(stream)
    stream.close()
    assert runs.handler.open_runs == 0
