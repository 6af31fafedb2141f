"""Prompts of Langfuse's: a call of a model is linked to the same prompt as by Langfuse's own handler."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
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
from turntrace.testing import Capture, CapturedSpan, captured_spans

Call = Runnable[Any, Any]
Calls = Callable[[str, Sequence[Call]], Any]  # a node of this name that makes these calls one by one
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
A, B = prompt("a", 1), prompt("b", 2)


# --- graphs, and what is linked in them -------------------------------------------------------------------------------
class Case(NamedTuple):
    """Nodes that come one after the other, each with its calls; the metadata of the whole config; what is linked."""

    nodes: Sequence[Sequence[Call]]
    links: Sequence[Link]
    metadata: Mapping[str, Any] = {}
    of_nodes: Mapping[str, Any] | None = None


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
    return model(name, fails=ValueError("no"))


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
    "a model of two": Case(
        [[template(A) | failing("one").with_fallbacks([model("two")])]], [("one", "a", 1), ("two", None, None)]
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


def sync_node(calls: Sequence[Call]) -> Callable[[Any], Any]:
    def node(_: State) -> Any:
        for call in calls:
            call.invoke("tea")

    return node


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


def built(case: Case, way: Way) -> Builder:
    builder: Builder = StateGraph(State)
    before = START
    for number, calls in enumerate(case.nodes):
        node: Any = way.node(calls)
        builder.add_node(f"node-{number}", node, metadata=None if case.of_nodes is None else {**case.of_nodes})
        builder.add_edge(before, f"node-{number}")
        before = f"node-{number}"
    return builder


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
    graph: Any = built(case, way).compile(checkpointer=InMemorySaver())

    ours, theirs = both.links(lambda handler: way.run(graph, {**config_of(**case.metadata), "callbacks": [handler]}))

    print(ours, theirs)
    assert ours == theirs
    assert ours == list(case.links)
