"""Tracked nodes: the ids come into the state, and nothing else of the graph changes."""

import asyncio
import copy
import dataclasses
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnableSequence
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.runtime import Runtime
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.types import CachePolicy, Command, Send, StreamWriter, interrupt
from pydantic import BaseModel

from apps import App, Builder, State, asks, config_of, new_thread, single
from turntrace import ConversationState, SessionCallbackHandler, TurntraceError, current_turn, track_graph, track_node
from turntrace import attributes as a
from turntrace.errors import ConfigurationError
from turntrace.graph.state import STATE_IDS
from turntrace.testing import Capture, assert_all_tagged, captured_spans, format_tree, span_tree


@pytest.fixture
def handler(capture: Capture) -> SessionCallbackHandler:
    return SessionCallbackHandler(capture.tracker())


@pytest.fixture
def run(handler: SessionCallbackHandler, capture: Capture) -> Callable[..., Any]:
    """Compile a builder, run it once, and return its state."""

    def invoke(builder: Builder, *, is_async: bool = False, thread: str | None = None, **compile: Any) -> Any:
        graph: Any = builder.compile(**{"checkpointer": InMemorySaver(), **compile})
        config = {**config_of(thread or new_thread(), user_id="ann"), "callbacks": [handler]}
        state = asyncio.run(graph.ainvoke(asks(), config)) if is_async else graph.invoke(asks(), config)
        assert_all_tagged(capture.spans())
        return state

    return invoke


def turns(capture: Capture) -> list[dict[str, Any]]:
    """Return the ids of the turns, as the state should have them."""
    return [
        {
            "session_id": span.attributes[a.SESSION_ID],
            "conversation_id": span.attributes[a.CONVERSATION_ID],
            "turn_id": span.attributes[a.TURN_ID],
            "turn_number": span.attributes[a.TURN_NUMBER],
        }
        for span in captured_spans(capture.spans())
        if span.name == a.SPAN_TURN
    ]


def ids_in(state: Any) -> dict[str, Any]:
    return {name: state[name] for name in STATE_IDS if state.get(name)}


# --- the ids in the state ---------------------------------------------------------------------------------------------
def test_every_node_sees_the_ids_and_the_state_has_them(run: Callable[..., Any], capture: Capture) -> None:
    seen: list[Any] = []
    builder: Builder = StateGraph(State)
    builder.add_node("first", lambda state: seen.append(dict(state)))
    builder.add_node("second", lambda state: seen.append(dict(state)))
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")

    state = run(track_graph(builder))

    (ids,) = turns(capture)
    assert ids_in(seen[0]) == ids_in(seen[1]) == ids_in(state) == ids


def test_each_turn_of_a_thread_has_ids_of_its_own(handler: SessionCallbackHandler, capture: Capture) -> None:
    graph: Any = track_graph(single(lambda state: None)).compile(checkpointer=InMemorySaver())
    config = {**config_of("c-1", user_id="ann"), "callbacks": [handler]}

    states = [graph.invoke(asks(), config) for _ in range(3)]

    assert [ids_in(state) for state in states] == turns(capture)
    assert [state["turn_number"] for state in states] == [1, 2, 3]
    assert len({state["session_id"] for state in states}) == 1
    checkpoints = [snapshot.values for snapshot in graph.get_state_history(config)]
    assert ids_in(checkpoints[0]) == ids_in(states[-1])


def test_first_nodes_side_by_side(run: Callable[..., Any], capture: Capture) -> None:
    builder: Builder = StateGraph(State)
    for name in ("left", "middle", "right"):
        builder.add_node(name, lambda state: {"found": ["one"]})
        builder.add_edge(START, name)

    state = run(track_graph(builder))

    assert ids_in(state) == turns(capture)[0]
    assert state["found"] == ["one"] * 3


@pytest.mark.parametrize(
    "update",
    [
        pytest.param(None, id="None"),
        pytest.param({}, id="empty"),
        pytest.param({"found": ["tea"]}, id="dict"),
        pytest.param(Command(update={"found": ["tea"]}), id="command"),
        pytest.param(Command(goto="last"), id="command-without-update"),
        pytest.param([Command(update={"found": ["tea"]}), {"found": ["milk"]}], id="list"),
        pytest.param(Command(update=[("found", ["tea"])]), id="command-of-pairs"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_whatever_a_node_returns(run: Callable[..., Any], capture: Capture, update: Any, is_async: bool) -> None:
    def build() -> Builder:
        def node(state: State) -> Any:
            return update

        async def anode(state: State) -> Any:
            return update

        builder: Builder = StateGraph(State)
        builder.add_node("work", anode if is_async else node, destinations=("last",))
        builder.add_node("last", lambda state: None)
        builder.add_edge(START, "work")
        return builder

    plain = run(build(), is_async=is_async)
    before = len(turns(capture))
    tracked = run(track_graph(build()), is_async=is_async)

    assert [message.content for message in tracked["messages"]] == [message.content for message in plain["messages"]]
    assert tracked.get("found") == plain.get("found")
    if not (isinstance(update, Command) and isinstance(update.update, list)):
        assert ids_in(tracked) == turns(capture)[before]


def test_what_a_node_returned_is_not_changed_in_place(run: Callable[..., Any]) -> None:
    constant = {"found": ["tea"]}
    run(track_graph(single(lambda state: constant)))
    assert constant == {"found": ["tea"]}


class Plain(TypedDict):
    """A schema without the fields."""

    messages: Annotated[list[BaseMessage], add_messages]


class Half(Plain):
    """A schema with some of the fields."""

    session_id: NotRequired[str]


@pytest.mark.parametrize("schema", [Plain, Half])
def test_a_schema_without_the_fields_is_left_alone(run: Callable[..., Any], schema: Any) -> None:
    state = run(track_graph(single(lambda state: {"messages": [AIMessage("5 euros")]}, schema=schema)))
    assert set(state) == {"messages"}


class OfTurns(BaseModel):
    """A pydantic state."""

    messages: Annotated[list[Any], add_messages]
    session_id: str | None = None
    conversation_id: str | None = None
    turn_id: str | None = None
    turn_number: int | None = None


@dataclasses.dataclass(frozen=True)
class OfFrozenTurns:
    """A state that is a dataclass."""

    messages: Annotated[list[Any], add_messages]
    session_id: str = ""
    conversation_id: str = ""
    turn_id: str = ""
    turn_number: int = 0


def test_a_pydantic_state(run: Callable[..., Any], capture: Capture) -> None:
    state = run(track_graph(single(lambda state: None, schema=OfTurns)))

    assert ids_in(state) == turns(capture)[0]


def test_a_dataclass_state(run: Callable[..., Any], capture: Capture) -> None:
    @dataclasses.dataclass
    class Data:
        messages: Annotated[list[Any], add_messages]
        session_id: str = ""
        conversation_id: str = ""
        turn_id: str = ""
        turn_number: int = 0

    state = run(track_graph(single(lambda state: {"messages": []}, schema=Data)))

    assert ids_in(state) == turns(capture)[0]


def look_at(seen: list[Any], kind: str) -> Any:
    """Return a first node of a kind that notes the number which it sees."""

    def see(state: Any) -> dict[str, Any]:
        seen.append(state["turn_number"] if isinstance(state, dict) else state.turn_number)
        return {}

    async def asee(state: Any) -> dict[str, Any]:
        return see(state)

    def sees(state: Any) -> Iterator[dict[str, Any]]:
        yield see(state)

    return {"function": see, "coroutine": asee, "generator": sees, "runnable": RunnableLambda(see, asee)}[kind]


@pytest.mark.parametrize("kind", ["function", "coroutine", "generator", "runnable"])
@pytest.mark.parametrize("schema", [State, OfTurns, OfFrozenTurns])
def test_the_first_node_sees_the_turn_that_runs_and_not_the_one_before(
    handler: SessionCallbackHandler, schema: Any, kind: str
) -> None:
    seen: list[Any] = []
    builder: Builder = single(look_at(seen, kind), schema=schema)
    graph: Any = track_graph(builder).compile(checkpointer=InMemorySaver())
    config = {**config_of("c-1", user_id="ann"), "callbacks": [handler]}
    for _ in range(3):
        asyncio.run(graph.ainvoke(asks(), config)) if kind == "coroutine" else graph.invoke(asks(), config)
    assert seen == [1, 2, 3]


def test_what_a_node_is_sent_instead_of_the_state_is_what_it_gets(run: Callable[..., Any]) -> None:
    got: list[Any] = []
    builder: Builder = StateGraph(State)
    builder.add_node("work", lambda state: got.append(state))
    pieces = [{"piece": 1}, "a text", 3, None, ["a", "list"], {"session_id": "its own", "turn_number": 7}]
    builder.add_conditional_edges(START, lambda state: [Send("work", piece) for piece in pieces], ["work"])
    run(track_graph(builder))
    assert sorted(got, key=repr) == sorted(pieces, key=repr)


def test_a_fan_out_by_send(run: Callable[..., Any], capture: Capture) -> None:
    state = run(track_graph(App().fan_out()))
    assert ids_in(state) == turns(capture)[0]
    assert sorted(state["found"]) == ["a", "b", "c"]


def test_a_send_from_the_start(run: Callable[..., Any], capture: Capture) -> None:
    builder: Builder = StateGraph(State)
    builder.add_node("work", lambda state: {"found": [state["piece"]]})
    builder.add_conditional_edges(START, lambda state: [Send("work", {"piece": p}) for p in "ab"], ["work"])

    state = run(track_graph(builder))

    assert ids_in(state) == turns(capture)[0]


def test_a_command_to_the_parent_is_left_for_the_parent(run: Callable[..., Any], capture: Capture) -> None:
    def leave(state: State) -> Any:
        return Command(graph=Command.PARENT, goto="after", update={"found": ["left"]})

    builder: Builder = StateGraph(State)
    builder.add_node("child", track_graph(single(leave, "leave")).compile(), destinations=("after",))
    builder.add_node("after", lambda state: {"found": ["after"]})
    builder.add_edge(START, "child")

    state = run(track_graph(builder))

    assert state["found"] == ["left", "after"]
    assert ids_in(state) == turns(capture)[0]
    assert all(a.ERROR_TYPE not in span.attributes for span in captured_spans(capture.spans()))


def test_ids_in_edges_and_in_the_state_of_subgraphs(run: Callable[..., Any], capture: Capture) -> None:
    seen: list[Any] = []
    child = track_graph(App().child())

    def route(state: State) -> str:
        seen.append(ids_in(state))
        return END

    builder: Builder = StateGraph(State)
    builder.add_node("child", child.compile(name="child"))
    builder.add_edge(START, "child")
    builder.add_conditional_edges("child", route, [END])

    state = run(track_graph(builder))

    assert [ids_in(state)] == seen == turns(capture)


def test_a_subgraph_does_not_give_back_the_ids_of_the_turn_before(
    handler: SessionCallbackHandler, capture: Capture
) -> None:
    child = single(lambda state: {"found": ["inner"]}, "inner").compile(name="child")
    graph: Any = track_graph(single(child, "child")).compile(checkpointer=InMemorySaver())
    config = {**config_of("c-1", user_id="ann"), "callbacks": [handler]}

    states = [graph.invoke(asks(), config) for _ in range(3)]

    assert [ids_in(state) for state in states] == turns(capture)


def test_without_a_turn_nothing_is_written(run: Callable[..., Any]) -> None:
    graph: Any = track_graph(App().tools()).compile(checkpointer=InMemorySaver())
    state = graph.invoke(asks(), config_of())
    assert ids_in(state) == {}
    assert len(state["messages"]) == 4


def test_the_apps_own_context_tokens_stand_on_the_nodes_span(run: Callable[..., Any], capture: Capture) -> None:
    state = run(track_graph(single(lambda state: {"context_tokens": 123})))

    assert state["context_tokens"] == 123
    on = {span.name: span.attributes.get("context.tokens") for span in captured_spans(capture.spans())}
    assert (on["work"], on["LangGraph"]) == (123, None)


# --- subgraphs are found as before ------------------------------------------------------------------------------------
def interrupting_child() -> Any:
    def ask(state: State) -> Any:
        return {"found": [interrupt("Which tea?")]}

    return single(ask, "ask").compile(name="child")


def as_node() -> Builder:
    return single(interrupting_child(), "child")


def inside_a_function() -> Builder:
    child = interrupting_child()

    def caller(state: State) -> Any:
        return {"found": child.invoke({"messages": state["messages"]})["found"]}

    return single(caller, "child")


@pytest.mark.parametrize("build", [as_node, inside_a_function])
@pytest.mark.parametrize("by", ["graph", "node", None])
def test_the_state_of_subgraphs_is_found(
    handler: SessionCallbackHandler, build: Callable[[], Builder], by: str | None
) -> None:
    builder = build()
    if by == "graph":
        builder = track_graph(builder)
    elif by == "node":
        spec = builder.nodes["child"]
        runnable: Any = spec.runnable
        builder = single(track_node(runnable if build is as_node else runnable.func, state_schema=State), "child")
    graph: Any = builder.compile(checkpointer=InMemorySaver())
    config = {**config_of("c-1"), "callbacks": [handler]}

    graph.invoke(asks(), config)

    (task,) = graph.get_state(config, subgraphs=True).tasks
    assert task.state is not None, "LangGraph does not find the subgraph any more"
    assert task.state.tasks[0].name == "ask"
    assert [name for name, _ in graph.get_subgraphs()] == ["child"]
    assert graph.invoke(Command(resume="green"), config)["found"] == ["green"]


@pytest.mark.parametrize("build", [App.fan_out, App.subgraph, App.nested, App.tools])
def test_the_drawing_is_the_same(build: Callable[[App], Builder]) -> None:
    plain: Any = build(App()).compile()
    tracked: Any = track_graph(build(App())).compile()
    assert tracked.get_graph(xray=True).draw_mermaid() == plain.get_graph(xray=True).draw_mermaid()
    assert tracked.get_input_jsonschema() == plain.get_input_jsonschema()
    assert tracked.get_output_jsonschema() == plain.get_output_jsonschema()


def test_a_copy_of_a_tracked_builder_can_be_built_on(run: Callable[..., Any]) -> None:
    copied: Any = copy.deepcopy(track_graph(single(lambda state: {"found": ["first"]}, "first")))
    copied.add_node("second", lambda state: {"found": ["second"]}).add_edge("first", "second")
    assert type(copied).__name__ == "StateGraph"
    assert run(copied)["found"] == ["first", "second"]


def test_streams_of_subgraphs_are_the_same(handler: SessionCallbackHandler) -> None:
    def parts(builder: Builder) -> list[Any]:
        graph: Any = builder.compile(checkpointer=InMemorySaver())
        config = {**config_of(), "callbacks": [handler]}
        stream = graph.stream(asks(), config, stream_mode="updates", subgraphs=True)
        return [(len(namespace), list(update)) for namespace, update in stream]

    assert parts(track_graph(App().subgraph())) == parts(App().subgraph())


# --- what track_node takes --------------------------------------------------------------------------------------------
def function(state: State) -> Any:
    return {"found": [current_turn().id]}


async def coroutine_function(state: State) -> Any:
    await asyncio.sleep(0)
    return {"found": [current_turn().id]}


def generator_function(state: State) -> Iterator[Any]:
    yield {"found": [current_turn().id]}


async def async_generator_function(state: State) -> AsyncIterator[Any]:
    await asyncio.sleep(0)
    yield {"found": [current_turn().id]}


class Agent:
    """An object that can be called."""

    def __call__(self, state: State) -> Any:
        return {"found": [current_turn().id]}

    def method(self, state: State) -> Any:
        return {"found": [current_turn().id]}


class AsyncAgent:
    """An object whose call is to be awaited."""

    async def __call__(self, state: State) -> Any:
        await asyncio.sleep(0)
        return {"found": [current_turn().id]}


NODES: dict[str, Any] = {
    "function": function,
    "coroutine_function": coroutine_function,
    "generator_function": generator_function,
    "async_generator_function": async_generator_function,
    "object": Agent(),
    "async_object": AsyncAgent(),
    "method": Agent().method,
    "partial": functools.partial(function),
    "lambda": lambda state: {"found": [current_turn().id]},
    "runnable_lambda": RunnableLambda(function),
    "async_runnable_lambda": RunnableLambda(function, coroutine_function),
    "sequence": RunnableSequence(RunnableLambda(lambda state: state), RunnableLambda(function)),
    "compiled_graph": single(function, "inner").compile(name="inner graph"),
}


@pytest.mark.parametrize("by", ["node", "graph"])
@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
def test_every_kind_of_node(run: Callable[..., Any], capture: Capture, node: Any, by: str) -> None:
    builder = single(track_node(node, state_schema=State)) if by == "node" else track_graph(single(node))

    state = run(builder, is_async=True)

    (ids,) = turns(capture)
    assert state["found"] == [ids["turn_id"]]
    assert ids_in(state) == ids
    (turn,) = [tree for tree in span_tree(capture.spans()) if tree.name == a.SPAN_TURN]
    assert [tree.name for tree in turn.children[0].children] == ["work"]


SYNC_NODES = {name: node for name, node in NODES.items() if "async" not in name and "coroutine" not in name}


@pytest.mark.parametrize("by", ["node", "graph"])
@pytest.mark.parametrize("node", SYNC_NODES.values(), ids=SYNC_NODES)
def test_every_kind_of_sync_node_run_sync(run: Callable[..., Any], capture: Capture, node: Any, by: str) -> None:
    builder = single(track_node(node, state_schema=State)) if by == "node" else track_graph(single(node))

    state = run(builder)

    (ids,) = turns(capture)
    assert state["found"] == [ids["turn_id"]]
    assert ids_in(state) == ids


@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
def test_a_node_can_be_added_without_a_name_as_before(node: Any) -> None:
    plain, tracked = StateGraph(State), StateGraph(State)
    plain.add_node(node)
    tracked.add_node(track_node(node, state_schema=State))
    assert list(tracked.nodes) == list(plain.nodes)


def test_the_schema_is_read_from_the_type_hint(run: Callable[..., Any], capture: Capture) -> None:
    state = run(single(track_node(function)))
    assert ids_in(state) == turns(capture)[0]


def test_a_node_of_another_schema_writes_nothing(run: Callable[..., Any]) -> None:
    def node(state: Plain) -> None:
        return None

    assert ids_in(run(single(track_node(node)))) == {}


def test_as_a_decorator(run: Callable[..., Any], capture: Capture) -> None:
    @track_node
    def work(state: State) -> None:
        """Do it."""

    @track_node(state_schema=State)
    def untyped(state):  # type: ignore[no-untyped-def]
        return None

    assert (work.__name__, work.__doc__) == ("work", "Do it.")
    run(single(work))
    run(single(untyped))
    assert len(turns(capture)) == 2


def test_tracking_twice_tracks_once(run: Callable[..., Any], capture: Capture) -> None:
    node = track_node(function)
    assert track_node(node) is node
    state = run(track_graph(track_graph(single(node))))
    assert state["found"] == [turns(capture)[0]["turn_id"]]


def test_a_tracked_node_can_be_called_alone(lenient: None) -> None:
    """As in the app's own unit tests, without any graph."""
    assert track_node(lambda state: {"found": ["tea"]}, state_schema=State)({}) == {"found": ["tea"]}
    assert asyncio.run(track_node(coroutine_function)({})) == {"found": [""]}
    assert track_node(RunnableLambda(function), state_schema=State).invoke({}) == {"found": [""]}


# --- LangGraph's injection --------------------------------------------------------------------------------------------
def injected(state: State, config: RunnableConfig, *, store: BaseStore, writer: StreamWriter) -> Any:
    store.put(("prices",), "tea", {"euros": 5})
    writer("looking")
    return {"found": [config["configurable"]["thread_id"]]}


async def ainjected(state: State, config: RunnableConfig, *, store: BaseStore, writer: StreamWriter) -> Any:
    await store.aput(("prices",), "tea", {"euros": 5})
    writer("looking")
    return {"found": [config["configurable"]["thread_id"]]}


def generating(state: State, config: RunnableConfig) -> Iterator[Any]:
    yield {"found": [config["configurable"]["thread_id"]]}


class Injected:
    """An object that can be called with what LangGraph injects."""

    def __call__(self, state: State, config: RunnableConfig, *, store: BaseStore, writer: StreamWriter) -> Any:
        return injected(state, config, store=store, writer=writer)


class AsyncInjected:
    """The same, to be awaited."""

    async def __call__(self, state: State, config: RunnableConfig, *, store: BaseStore, writer: StreamWriter) -> Any:
        return await ainjected(state, config, store=store, writer=writer)


@pytest.mark.parametrize("by", ["node", "graph", None])
@pytest.mark.parametrize("node", [injected, ainjected, Injected(), AsyncInjected()])
def test_config_store_and_writer_are_injected(handler: SessionCallbackHandler, node: Any, by: str | None) -> None:
    builder = single(track_node(node) if by == "node" else node)
    store = InMemoryStore()
    graph: Any = (track_graph(builder) if by == "graph" else builder).compile(store=store)
    config = {**config_of("c-1"), "callbacks": [handler]}

    async def main() -> list[Any]:
        return [part async for part in graph.astream(asks(), config, stream_mode=["custom", "values"])]

    parts = asyncio.run(main())

    assert ("custom", "looking") in parts
    assert parts[-1][1]["found"] == ["c-1"]
    item = store.get(("prices",), "tea")
    assert item is not None
    assert item.value == {"euros": 5}


@pytest.mark.parametrize("by", ["node", "graph", None])
def test_config_is_injected_into_generators(run: Callable[..., Any], by: str | None) -> None:
    builder = single(track_node(generating) if by == "node" else generating)
    state = run(track_graph(builder) if by == "graph" else builder, thread="c-1")
    assert state["found"] == ["c-1"]


@dataclasses.dataclass
class Shop:
    """The context of a run."""

    name: str


@pytest.mark.parametrize("by", ["node", "graph", None])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_the_runtime_is_injected(handler: SessionCallbackHandler, by: str | None, is_async: bool) -> None:
    def work(state: State, runtime: Runtime[Shop]) -> Any:
        runtime.stream_writer("looking")
        return {"found": [runtime.context.name]}

    async def awork(state: State, runtime: Runtime[Shop]) -> Any:
        return work(state, runtime)

    node: Any = awork if is_async else work
    builder: Builder = StateGraph(State, context_schema=Shop)
    builder.add_node("work", track_node(node) if by == "node" else node)
    builder.add_edge(START, "work")
    graph: Any = (track_graph(builder) if by == "graph" else builder).compile()

    state = asyncio.run(graph.ainvoke(asks(), {**config_of(), "callbacks": [handler]}, context=Shop("corner")))

    assert state["found"] == ["corner"]


def test_a_narrow_input_schema_is_kept(run: Callable[..., Any]) -> None:
    seen: list[Any] = []

    class Narrow(TypedDict):
        messages: list[Any]

    class ByObject:
        def __call__(self, state: Narrow) -> None:
            seen.append(set(state))

    def by_function(state: Narrow) -> None:
        seen.append(set(state))

    for node in (by_function, ByObject()):
        builder: Builder = StateGraph(State)
        builder.add_node("first", lambda state: {"found": ["tea"]})
        builder.add_node("second", track_node(node, state_schema=State))
        builder.add_edge(START, "first")
        builder.add_edge("first", "second")
        run(builder)

    assert seen == [{"messages"}, {"messages"}]


def test_the_destinations_of_a_node_are_kept() -> None:
    def by_function(state: State) -> Command[Literal["last"]]:
        return Command(goto="last")

    class ByObject:
        def __call__(self, state: State) -> Command[Literal["last"]]:
            return Command(goto="last")

    for node in (by_function, ByObject()):
        plain, tracked = StateGraph(State), StateGraph(State)
        plain.add_node("work", node)
        tracked.add_node("work", track_node(node))
        assert tracked.nodes["work"].ends == plain.nodes["work"].ends


@pytest.mark.parametrize("tracked", [False, True], ids=["plain", "tracked"])
@pytest.mark.parametrize("node", [function, RunnableLambda(function)])
def test_a_timeout_on_a_sync_node_is_refused_as_before(node: Any, tracked: bool) -> None:
    """LangGraph cannot stop a sync node, and says so when the graph is compiled."""
    if "timeout" not in inspect.signature(StateGraph.add_node).parameters:
        pytest.skip("this LangGraph knows no timeouts of nodes")
    builder: Builder = StateGraph(State)
    builder.add_node("work", node, timeout=1.0)
    builder.add_edge(START, "work")
    builder = track_graph(builder) if tracked else builder
    with pytest.raises(ValueError, match="async"):
        builder.compile()


@pytest.mark.parametrize("tracked", [False, True], ids=["plain", "tracked"])
def test_a_timeout_on_an_async_node_is_kept(tracked: bool) -> None:
    builder: Builder = StateGraph(State)
    builder.add_node("work", coroutine_function, timeout=1.0)
    builder.add_edge(START, "work")
    (track_graph(builder) if tracked else builder).compile()


def test_cache_retry_and_metadata_of_a_node_are_kept(run: Callable[..., Any], capture: Capture) -> None:
    calls: list[int] = []

    def work(state: State) -> Any:
        calls.append(1)
        return {"found": ["tea"]}

    builder: Builder = StateGraph(State)
    builder.add_node(
        "work", work, cache_policy=CachePolicy(key_func=lambda _: "same"), metadata={"team": "prices"}, defer=True
    )
    builder.add_edge(START, "work")
    graph = track_graph(builder)
    cache = InMemoryCache[Any]()

    first, second = run(graph, cache=cache), run(graph, cache=cache)

    assert len(calls) == 1
    assert first["found"] == second["found"] == ["tea"]
    assert graph.nodes["work"].metadata == {"team": "prices"}
    assert graph.nodes["work"].defer


def test_ids_are_those_of_the_turn_also_when_the_node_was_cached(run: Callable[..., Any], capture: Capture) -> None:
    builder: Builder = StateGraph(State)
    builder.add_node("cached", lambda state: {"found": ["tea"]}, cache_policy=CachePolicy(key_func=lambda _: "same"))
    builder.add_node("last", lambda state: None)
    builder.add_edge(START, "cached")
    builder.add_edge("cached", "last")
    graph = track_graph(builder)
    cache = InMemoryCache[Any]()

    states = [run(graph, cache=cache), run(graph, cache=cache)]

    assert [ids_in(state) for state in states] == turns(capture), "a later turn has the ids of the one that was cached"


# --- the same results -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("build", [App.tools, App.fan_out, App.subgraph, App.nested])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_graph_returns_what_it_returned(
    run: Callable[..., Any], build: Callable[[App], Builder], is_async: bool
) -> None:
    def told(state: Any) -> Any:
        found = sorted(state.get("found", []))
        return found, [(message.type, message.content) for message in state["messages"]]

    plain: Any = build(App(is_async=is_async)).compile()
    expected = asyncio.run(plain.ainvoke(asks(), config_of()))
    assert told(run(track_graph(build(App(is_async=is_async))), is_async=True)) == told(expected)


def test_a_node_of_a_graph_without_a_callback_is_in_the_turn_of_the_block(
    handler: SessionCallbackHandler, capture: Capture
) -> None:
    graph: Any = track_graph(single(function)).compile()
    with handler.tracker.session() as session, session.conversation("c-1").turn("Hi") as turn:
        state = graph.invoke(turn.input)

    assert state["found"] == [turn.id]
    assert ids_in(state) == {
        "session_id": session.id,
        "conversation_id": "c-1",
        "turn_id": turn.id,
        "turn_number": 1,
    }
    turn_tree = next(tree for tree in span_tree(capture.spans()) if tree.name == a.SPAN_TURN)
    assert format_tree([turn_tree]) == "conversation.turn\n  LangGraph\n    work"


def test_the_state_keeps_its_messages_and_its_reducers(run: Callable[..., Any]) -> None:
    class Mine(ConversationState):
        notes: Annotated[list[str], lambda before, now: before + now]

    def work(state: Mine) -> Any:
        return {"messages": [AIMessage("5 euros")], "notes": ["noted"]}

    state = run(track_graph(single(work, schema=Mine)))

    assert [type(message) for message in state["messages"]] == [HumanMessage, AIMessage]
    assert state["notes"] == ["noted"]


# --- what the caller gets wrong ---------------------------------------------------------------------------------------
def test_a_compiled_graph_is_refused_with_advice() -> None:
    with pytest.raises(ConfigurationError, match=r"track_graph\(builder\).*before.*compile") as caught:
        track_graph(single(function).compile())  # type: ignore[type-var]
    assert isinstance(caught.value, TurntraceError)


def test_an_empty_builder_is_refused_with_advice() -> None:
    with pytest.raises(ConfigurationError, match="add them first"):
        track_graph(StateGraph(State))


@pytest.mark.parametrize("wrong", ["graph", 42, object()])
def test_what_is_no_graph_is_refused_with_advice(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"got a {type(wrong).__name__}"):
        track_graph(wrong)


def test_what_cannot_be_a_node_is_refused_with_advice() -> None:
    with pytest.raises(ConfigurationError, match=r"got a str.*track_node\(agent\)"):
        track_node("agent")


def test_the_builder_comes_back() -> None:
    builder = single(function)
    assert track_graph(builder) is builder
