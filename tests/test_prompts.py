"""Prompts of Langfuse's: a call of a model is linked to the same prompt as by Langfuse's own handler."""

import asyncio
import contextvars
import gc
import random
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock
from uuid import UUID

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langfuse import Langfuse
from langfuse.api import Prompt_Text
from langfuse.langchain import CallbackHandler
from langfuse.model import TextPromptClient
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph

from apps import Builder, FakeModel, State, asks, config_of
from turntrace import SessionCallbackHandler
from turntrace import attributes as a
from turntrace.graph.tree import Run
from turntrace.testing import Capture, CapturedSpan, captured_spans

Call = Runnable[Any, Any]
Link = tuple[str, str | None, int | None]  # a model, and the name and version of the prompt it is linked to


# --- prompts, templates and models ------------------------------------------------------------------------------------
def prompt(name: str = "greeting", version: int = 3, *, is_fallback: bool = False) -> TextPromptClient:
    found = Prompt_Text(name=name, version=version, prompt="{{text}}", config={}, labels=[], tags=[])
    return TextPromptClient(found, is_fallback=is_fallback)


def names(linked: Any) -> dict[str, Any]:
    return {"langfuse_prompt": linked}


def template(linked: Any = None) -> Call:
    made = ChatPromptTemplate.from_messages([("user", "{text}")])
    made.metadata = None if linked is None else names(linked)
    return made


def model(name: str = "one", **settings: Any) -> FakeModel:
    return FakeModel(model_name=name, **settings)


text: Call = RunnableLambda(lambda message: message.content)
ASKING: Call = RunnableLambda(lambda _: asks())
A, B = prompt("a", 1), prompt("b", 2)


# --- graphs, and what is linked in them -------------------------------------------------------------------------------
class Case(NamedTuple):
    """A graph of nodes that come one after the other.

    Attributes:
        nodes: The calls of each node.
        links: What is linked; None where LangChain has other runs when it streams.
        metadata: That of the whole config.
        of_nodes: That of each node.
    """

    nodes: Sequence[Sequence[Call]]
    links: Sequence[Link] | None
    metadata: Mapping[str, Any] = {}
    of_nodes: Mapping[str, Any] | None = None


def sync_node(calls: Sequence[Call]) -> Callable[[Any], Any]:
    def node(_: State) -> Any:
        for call in calls:
            call.invoke("tea")

    return node


def built(nodes: Sequence[Sequence[Call]], node: Any, metadata: Mapping[str, Any] | None = None) -> Builder:
    builder: Builder = StateGraph(State)
    before = START
    for number, calls in enumerate(nodes):
        name = f"node-{number}"
        builder.add_node(name, node(calls), metadata=None if metadata is None else {**metadata})
        builder.add_edge(before, name)
        before = name
    return builder


def inside(call: Call) -> Call:
    """Make a call in a function, which is a run of its own around it."""

    def function(given: Any) -> Any:
        return call.invoke(given)

    async def afunction(given: Any) -> Any:
        return await call.ainvoke(given)

    return RunnableLambda(function, afunction)


def in_a_tool(call: Call) -> Call:
    @tool
    def asking(question: str) -> str:
        """Ask a model."""
        return str(call.invoke(question))

    async def aasking(question: str) -> str:
        return str(await call.ainvoke(question))

    asking.coroutine = aasking
    return RunnableLambda(lambda _: {"question": "tea"}) | asking


def failing(name: str) -> FakeModel:
    def says(_messages: Any) -> str:
        raise ValueError("no")

    return model(name, says=says)


def subgraph(*nodes: Sequence[Call]) -> Call:
    return ASKING | built(nodes, sync_node).compile()


CASES: dict[str, Case] = {
    "a chain": Case([[template(A) | model()]], [("one", "a", 1)]),
    "a chain as a whole": Case([[(template() | model()).with_config(metadata=names(A))]], [("one", "a", 1)]),
    "a chain as a whole is also for the next call in its node": Case(
        [[(template() | model()).with_config(metadata=names(A)), model("two"), model("three")], [model("four")]],
        [("one", "a", 1), ("two", "a", 1), ("three", None, None), ("four", None, None)],
    ),
    "a template before a chain as a whole": Case(
        [[(template(B) | model()).with_config(metadata=names(A))]], [("one", "b", 2)]
    ),
    "a template that is called alone": Case(
        [[template(A), model(), model("two")]], [("one", "a", 1), ("two", None, None)]
    ),
    "a template in the node before": Case([[template(A)], [model()]], [("one", None, None)]),
    "the call of a model": Case([[model().with_config(metadata=names(A))]], [("one", None, None)]),
    "the call of a model in a chain": Case(
        [[template() | model().with_config(metadata=names(A))]], [("one", None, None)]
    ),
    "two chains in one node": Case(
        [[template(A) | model(), template(B) | model("two"), template() | model("three")]],
        [("one", "a", 1), ("two", "b", 2), ("three", None, None)],
    ),
    "two nodes": Case([[template(A) | model()], [template(B) | model()]], [("one", "a", 1), ("one", "b", 2)]),
    "two nodes, one without": Case(
        [[template(A) | model()], [template() | model()]], [("one", "a", 1), ("one", None, None)]
    ),
    "two calls after one template": Case(
        [[template(A) | model() | text | model("two")]], [("one", "a", 1), ("two", None, None)]
    ),
    "two templates before one call": Case(
        [[template(A) | (lambda _: "tea") | template(B) | model()]], [("one", "b", 2)]
    ),
    "two templates for two calls": Case(
        [[template(A) | model() | text | template(B) | model("two")]], [("one", "a", 1), ("two", "b", 2)]
    ),
    "a call in a function": Case([[template(A) | inside(model())]], [("one", "a", 1)]),
    "calls in a function": Case(
        [[template(A) | inside(model() | text | model("two") | text | model("three"))]],
        [("one", "a", 1), ("two", "a", 1), ("three", "a", 1)],
    ),
    "a chain in a function in a chain": Case(
        [[template(A) | inside(RunnableLambda(str) | template(B) | model())]],
        [("one", "b", 2)],
    ),
    "a template in a function": Case([[inside(template(A)) | model()]], [("one", None, None)]),
    "a call in a tool": Case([[template(A) | in_a_tool(model())]], [("one", "a", 1)]),
    "a chain in a tool": Case(
        [[in_a_tool(template(A) | model()), model("two")]], [("one", "a", 1), ("two", None, None)]
    ),
    "a model of two": Case([[template(A) | failing("one").with_fallbacks([model("two")])]], None),
    "a subgraph": Case(
        [[subgraph([template(A) | model()], [model("two")]), model("three")]],
        [("one", "a", 1), ("two", None, None), ("three", None, None)],
    ),
    "a subgraph after a template": Case(
        [[template(A) | subgraph([template(B) | model()], [model("two")])]], [("one", "b", 2), ("two", "a", 1)]
    ),
    "an agent": Case([[template(A), ASKING | create_agent(model(), [])]], [("one", "a", 1)]),
    "the config of an agent": Case(
        [[(ASKING | create_agent(model(), [])).with_config(metadata=names(A)), model("two"), model("three")]],
        [("one", "a", 1), ("two", "a", 1), ("three", None, None)],
    ),
    "a fallback prompt": Case([[template(prompt("c", is_fallback=True)) | model()]], [("one", None, None)]),
    "a fallback prompt takes the place of another": Case(
        [[template(A), template(prompt("c", is_fallback=True)), model(), model("two")]],
        [("one", None, None), ("two", None, None)],
    ),
    "the whole config": Case(
        [[model(), model("two")], [template() | model("three")], [template(B) | model("four"), model("five")]],
        [("one", "a", 1), ("two", None, None), ("three", "a", 1), ("four", "b", 2), ("five", "a", 1)],
        metadata=names(A),
    ),
    "the whole config, and a node that calls no model": Case(
        [[], [model(), model("two")]], [("one", "a", 1), ("two", None, None)], metadata=names(A)
    ),
    "every node": Case([[model()], [], [model("two")]], [("one", "a", 1), ("two", "a", 1)], of_nodes=names(A)),
}


class Way(NamedTuple):
    """How a node calls, and how the graph is run."""

    node: Callable[[Sequence[Call]], Callable[[Any], Any]]
    run: Callable[[Any, Any], Any]


def async_node(calls: Sequence[Call]) -> Callable[[Any], Any]:
    async def node(_: State) -> Any:
        for call in calls:
            await call.ainvoke("tea")

    return node


def streaming_node(calls: Sequence[Call]) -> Callable[[Any], Any]:
    async def node(_: State) -> Any:
        for call in calls:
            async for _part in call.astream("tea"):
                pass

    return node


async def streamed(graph: Any, config: Any) -> None:
    async for _ in graph.astream(asks(), config, stream_mode="messages"):
        pass


WAYS = {
    "invoke": Way(sync_node, lambda graph, config: graph.invoke(asks(), config)),
    "ainvoke": Way(async_node, lambda graph, config: asyncio.run(graph.ainvoke(asks(), config))),
    "astream": Way(streaming_node, lambda graph, config: asyncio.run(streamed(graph, config))),
}


def links_of(spans: Sequence[CapturedSpan], scope: str) -> list[Link]:
    """Return what calls of models are linked to, in the order in which they began."""
    calls = [
        span
        for span in sorted(spans, key=lambda span: span.start_ns)
        if span.scope == scope and span.attributes.get(a.LANGFUSE_OBSERVATION_TYPE) == "generation"
    ]
    model_of = a.GEN_AI_REQUEST_MODEL if scope == a.SCOPE_NAME else "langfuse.observation.model.name"
    return [
        (
            str(span.attributes[model_of]),
            span.attributes.get(a.LANGFUSE_PROMPT_NAME),
            span.attributes.get(a.LANGFUSE_PROMPT_VERSION),
        )
        for span in calls
    ]


class Both:
    """Our handler and that of Langfuse, each to be given to a run of its own."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.ours = SessionCallbackHandler(capture.tracker())
        self.theirs = CallbackHandler()

    def links(self, run: Callable[[Any], Any]) -> tuple[list[Link], list[Link]]:
        """Run with each handler, and return what is linked by ours and by theirs."""
        self._capture.clear()
        run(self.ours)
        ours = links_of(captured_spans(self._capture.spans()), a.SCOPE_NAME)
        assert self.ours.open_runs == 0
        run(self.theirs)
        return ours, links_of(captured_spans(self._capture.spans()), "langfuse-sdk")


@pytest.fixture
def both(capture: Capture, langfuse_client: Langfuse) -> Both:
    return Both(capture)


def test_the_names_are_those_of_langfuse() -> None:
    from langfuse import LangfuseOtelSpanAttributes as Theirs

    assert (a.LANGFUSE_PROMPT_NAME, a.LANGFUSE_PROMPT_VERSION) == (
        Theirs.OBSERVATION_PROMPT_NAME,
        Theirs.OBSERVATION_PROMPT_VERSION,
    )


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_calls_are_linked_as_by_langfuses_own_handler(case: Case, way: Way, both: Both) -> None:
    graph: Any = built(case.nodes, way.node, case.of_nodes).compile(checkpointer=InMemorySaver())

    ours, theirs = both.links(lambda handler: way.run(graph, {**config_of(**case.metadata), "callbacks": [handler]}))

    assert ours == theirs
    assert ours == (theirs if case.links is None else list(case.links))
    assert ours


def test_the_next_turn_is_not_linked(both: Both) -> None:
    chain = (template() | model()).with_config(metadata=names(A))
    with_it: Any = built([[chain]], sync_node).compile(checkpointer=InMemorySaver())
    without: Any = built([[model("two")]], sync_node).compile(checkpointer=InMemorySaver())

    def run(handler: Any) -> None:
        config = {**config_of(), "callbacks": [handler]}
        with_it.invoke(asks(), config)
        without.invoke(asks(), config)

    assert both.links(run) == ([("one", "a", 1), ("two", None, None)],) * 2


def test_chains_side_by_side_are_linked_each_to_its_own(both: Both) -> None:
    chains = {f"m-{number}": template(prompt(f"p-{number}", number)) | model(f"m-{number}") for number in range(1, 9)}
    graph: Any = built([[RunnableParallel(chains)]], sync_node).compile()

    ours, theirs = both.links(lambda handler: graph.invoke(asks(), {"callbacks": [handler]}))

    assert sorted(ours) == sorted(theirs) == [(f"m-{number}", f"p-{number}", number) for number in range(1, 9)]


def test_turns_at_once_are_linked_each_to_its_own(both: Both) -> None:
    def answer(state: State) -> Any:
        number = int(state["messages"][-1].text)
        (template(prompt(f"p-{number}", number)) | model(f"m-{number}", delay=0.01)).invoke("tea")

    graph: Any = built([[]], lambda _: answer).compile()

    def run(handler: Any) -> None:
        graph.batch([asks(str(number)) for number in range(1, 9)], {"callbacks": [handler]})

    ours, theirs = both.links(run)
    assert sorted(ours) == sorted(theirs) == [(f"m-{number}", f"p-{number}", number) for number in range(1, 9)]


def test_of_calls_that_begin_at_once_each_prompt_is_for_one(both: Both) -> None:
    calls = RunnableParallel({name: model(name, delay=0.01) for name in ("one", "two", "three")})
    graph: Any = built([[template(A) | calls]], sync_node).compile()

    ours, _ = both.links(lambda handler: graph.invoke(asks(), {"callbacks": [handler]}))

    assert sorted(str(name) for _, name, _ in ours) == ["None", "a", "a"]  # beside the calls, and around them


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_call_that_fails_is_linked(way: Way, both: Both) -> None:
    graph: Any = built([[template(A) | failing("one")]], way.node).compile()

    def run(handler: Any) -> None:
        with pytest.raises(ValueError, match="no"):
            way.run(graph, {"callbacks": [handler]})

    assert both.links(run) == ([("one", "a", 1)],) * 2


def test_a_call_whose_stream_is_left_is_linked(both: Both) -> None:
    graph: Any = built([[template(A) | model(delay=0.01)]], sync_node).compile()

    def run(handler: Any) -> None:
        for _ in graph.stream(asks(), {"callbacks": [handler]}, stream_mode="messages"):
            break

    ours, _ = both.links(run)
    assert ours == [("one", "a", 1)]


# --- whatever stands in the metadata ----------------------------------------------------------------------------------
class Exploding:
    @property
    def name(self) -> str:
        raise RuntimeError("no name")


class ExplodingTruth:
    def __bool__(self) -> bool:
        raise RuntimeError("neither")


NONE_OF_LANGFUSE = {
    "an object": object(),
    "a text": "greeting",
    "a number": 7,
    "a dict": {"name": "greeting", "version": 3},
    "nothing": "",
    "a name that is none": SimpleNamespace(name=7, version=3),
    "an empty name": SimpleNamespace(name="", version=3),
    "a name that cannot be sent": SimpleNamespace(name="\ud800", version=3),
    "a version that is none": SimpleNamespace(name="greeting", version="3"),
    "a version of truth": SimpleNamespace(name="greeting", version=True),
    "a version that cannot be sent": SimpleNamespace(name="greeting", version=2**70),
    "a mock": MagicMock(),
    "an error": Exploding(),
    "an error in its truth": ExplodingTruth(),
}


@pytest.mark.parametrize("given", NONE_OF_LANGFUSE.values(), ids=NONE_OF_LANGFUSE.keys())
def test_what_is_no_prompt_is_let_be(given: Any, capture: Capture) -> None:
    handler = SessionCallbackHandler(capture.tracker())
    graph: Any = built([[template(given) | model()]], sync_node).compile()

    graph.invoke(asks(), {"callbacks": [handler]})

    assert links_of(captured_spans(capture.spans()), a.SCOPE_NAME) == [("one", None, None)]


def test_nothing_is_kept_when_a_turn_has_ended(capture: Capture) -> None:
    tracker = capture.tracker()
    graph: Any = built(CASES["the whole config"].nodes, sync_node).compile()

    graph.invoke(asks(), {"metadata": names(A), "callbacks": [SessionCallbackHandler(tracker)]})
    capture.spans()
    gc.collect()

    assert [run for run in gc.get_objects() if isinstance(run, Run) and run.root.turn.tracker is tracker] == []


# --- any tree of runs -------------------------------------------------------------------------------------------------
def tell(handler: BaseCallbackHandler, seed: int, top: UUID | None) -> None:
    """Tell a handler of runs below each other, which end in any order; the same for the same seed."""
    chance = random.Random(seed)

    def new() -> UUID:
        return UUID(int=chance.getrandbits(128), version=4)

    root, calls = new(), 0
    handler.on_chain_start({}, {}, run_id=root, parent_run_id=top, name="graph", metadata=some_metadata(chance))
    parents: dict[UUID, UUID | None] = {root: top}
    kinds = {root: "chain"}
    while parents:
        may_end = [run for run in parents if run != root] or [root]
        if calls < 25 and chance.random() < 0.6:
            above = chance.choice([run for run in parents if kinds[run] != "llm"])
            run, kind = new(), chance.choice(["chain", "chain", "chain", "llm", "llm", "tool", "retriever"])
            parents[run], kinds[run] = above, kind
            told: dict[str, Any] = {"run_id": run, "parent_run_id": above, "metadata": some_metadata(chance)}
            if kind == "chain":
                handler.on_chain_start({}, {}, name="chain", tags=chance.choice([None, ["graph:step:1"]]), **told)
            elif kind == "llm":
                told["metadata"]["ls_model_name"] = f"m-{calls}"
                if chance.random() < 0.5:
                    handler.on_llm_start({}, ["tea"], name="model", invocation_params={}, **told)
                else:
                    handler.on_chat_model_start({}, [[HumanMessage("tea")]], name="model", invocation_params={}, **told)
            elif kind == "tool":
                handler.on_tool_start({}, "tea", name="tool", **told)
            else:
                handler.on_retriever_start({}, "tea", name="retriever", **told)
            calls += 1
        elif root not in may_end or calls >= 25:
            run = chance.choice(may_end)
            ended: dict[str, Any] = {"run_id": run, "parent_run_id": parents.pop(run)}
            if kinds[run] == "chain" and chance.random() < 0.8:
                handler.on_chain_end({}, **ended)
            elif kinds[run] == "chain":
                handler.on_chain_error(ValueError("no"), **ended)
            elif kinds[run] == "llm":
                answer = LLMResult(generations=[[ChatGeneration(message=AIMessage("5 euros"))]])
                handler.on_llm_end(answer, **ended)
            elif kinds[run] == "tool":
                handler.on_tool_end("5 euros", **ended)
            else:
                handler.on_retriever_end([], **ended)


def some_metadata(chance: random.Random) -> dict[str, Any]:
    number = chance.randrange(8)
    return names(prompt(f"p-{number}", number, is_fallback=number == 0)) if number < 4 else {}


@pytest.mark.parametrize("is_known", [True, False])
def test_any_tree_of_runs_is_linked_as_by_langfuses_own_handler(is_known: bool, both: Both) -> None:
    linked = 0
    for seed in range(40):
        top = None if is_known else UUID(int=seed + 1, version=4)

        def run(handler: BaseCallbackHandler, seed: int = seed, top: UUID | None = top) -> None:
            contextvars.copy_context().run(tell, handler, seed, top)

        ours, theirs = both.links(run)
        assert ours == theirs, seed
        linked += sum(name is not None for _, name, _ in ours)
    assert linked > 50
