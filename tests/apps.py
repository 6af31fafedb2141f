"""The graphs that the tests run, and the models in them. Only the models are fake."""

import asyncio
import itertools
import operator
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import cache
from typing import Annotated, Any, NotRequired, Protocol

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, BaseCallbackHandler, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langfuse import observe
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Send
from opentelemetry.trace import Tracer

from turntrace import ConversationState

MODEL = "gpt-4o-mini"
USAGE: UsageMetadata = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}


# --- models -----------------------------------------------------------------------------------------------------------
class FakeModel(BaseChatModel):
    """A chat model that says what it is told to, word for word when it streams.

    Attributes:
        says: Its answer to any messages: a text or a message.
        usage: The tokens it reports, None for none.
        delay: Seconds before each answer and each word.
        fails: Raised instead of an answer; when it streams, after the first word.
        started: Set when it was called.
    """

    says: Callable[[Sequence[BaseMessage]], AIMessage | str] = lambda _messages: "It costs 5 euros."
    model_name: str = MODEL
    provider: str | None = "openai"
    usage: Any = USAGE
    llm_output: dict[str, Any] | None = None
    delay: float = 0.0
    fails: Exception | None = None
    started: threading.Event | None = None

    @property
    def _llm_type(self) -> str:
        return "fake"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(ls_model_type="chat", ls_model_name=self.model_name)
        if self.provider is not None:
            params["ls_provider"] = self.provider
        return params

    def _answer(self, messages: Sequence[BaseMessage]) -> AIMessage:
        if self.started is not None:
            self.started.set()
        said = self.says(messages)
        answer = AIMessage(said) if isinstance(said, str) else said
        return answer.model_copy(update={"usage_metadata": self.usage})

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        answer = self._answer(messages)
        time.sleep(self.delay)
        if self.fails is not None:
            raise self.fails
        return ChatResult(generations=[ChatGeneration(message=answer)], llm_output=self.llm_output)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        answer = self._answer(messages)
        await asyncio.sleep(self.delay)
        if self.fails is not None:
            raise self.fails
        return ChatResult(generations=[ChatGeneration(message=answer)], llm_output=self.llm_output)

    def _chunks(self, messages: Sequence[BaseMessage]) -> Iterator[ChatGenerationChunk]:
        answer = self._answer(messages)
        words = str(answer.content).split(" ")
        for number, word in enumerate(words):
            text = word if number == 0 else f" {word}"
            yield ChatGenerationChunk(message=AIMessageChunk(content=text))
            if self.fails is not None:
                raise self.fails
        calls = [
            tool_call_chunk(name=call["name"], args='{"item": "tea"}', id=call["id"], index=index)
            for index, call in enumerate(answer.tool_calls)
        ]
        last = AIMessageChunk(content="", tool_call_chunks=calls, usage_metadata=self.usage, chunk_position="last")
        yield ChatGenerationChunk(message=last)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self._chunks(messages):
            time.sleep(self.delay)
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._chunks(messages):
            await asyncio.sleep(self.delay)
            if run_manager is not None:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk


def calls_a_tool_first(messages: Sequence[BaseMessage]) -> AIMessage:
    """Say what a model says that looks a price up once for each message of the user, and then answers."""
    if isinstance(messages[-1], ToolMessage):
        return AIMessage(f"The price is {messages[-1].content}.")
    return AIMessage("", tool_calls=[tool_call(name="price_of", args={"item": "tea"}, id=f"call-{len(messages)}")])


# --- spans that the app's own code makes ------------------------------------------------------------------------------
class OwnSpans(Protocol):
    """Makes spans of the app's own, in whatever is current."""

    def __call__(self, name: str) -> None: ...


def no_spans(name: str) -> None:
    """Make none."""


@observe(name="observed")
def _observed(tracer: Tracer, name: str) -> None:
    with tracer.start_as_current_span(f"{name}.inside"):
        pass


def own_spans(tracer: Tracer) -> OwnSpans:
    """Make a span by a plain OpenTelemetry tracer, one by Langfuse's ``@observe`` below it, and one below that."""

    def make(name: str) -> None:
        with tracer.start_as_current_span(f"{name}.plain"):
            _observed(tracer, name)

    return make


# --- graphs -----------------------------------------------------------------------------------------------------------
class State(ConversationState):
    """State of the apps here: with a field of their own."""

    found: NotRequired[Annotated[list[str], operator.add]]


class Piece(State):
    """What `Send` hands to one of several workers."""

    piece: str


Builder = StateGraph[Any, Any, Any, Any]


class App:
    """Builders of graphs whose nodes are all sync or all async.

    Args:
        is_async: Which of the two.
        spans: What its nodes call to make spans of their own.
        model: The model of its agents.
    """

    def __init__(self, *, is_async: bool = False, spans: OwnSpans = no_spans, model: FakeModel | None = None) -> None:
        self._is_async = is_async
        self._spans = spans
        self._model = model or FakeModel()

    def _node(self, function: Callable[..., Any], afunction: Callable[..., Any]) -> Callable[..., Any]:
        return afunction if self._is_async else function

    def _plain(self, name: str, update: Callable[[Any], Any]) -> Callable[..., Any]:
        def node(state: State) -> Any:
            self._spans(name)
            return update(state)

        async def anode(state: State) -> Any:
            await asyncio.sleep(0)
            self._spans(name)
            return update(state)

        return self._node(node, anode)

    def _agent(self, name: str) -> Callable[..., Any]:
        def agent(state: State, config: RunnableConfig) -> Any:
            self._spans(name)
            return {"messages": [self._model.invoke(state["messages"], config)]}

        async def aagent(state: State, config: RunnableConfig) -> Any:
            self._spans(name)
            return {"messages": [await self._model.ainvoke(state["messages"], config)]}

        return self._node(agent, aagent)

    def tools(self) -> Builder:
        """Build: prepare, agent, a tool, agent."""

        @tool
        def price_of(item: str) -> str:
            """Look up the price of an item."""
            self._spans("tool")
            return f"5 euros for {item}"

        async def aprice_of(item: str) -> str:
            await asyncio.sleep(0)
            self._spans("tool")
            return f"5 euros for {item}"

        if self._is_async:
            price_of.coroutine = aprice_of
        self._model = self._model.model_copy(update={"says": calls_a_tool_first})
        builder: Builder = StateGraph(State)
        builder.add_node("prepare", self._plain("prepare", lambda _state: {"found": ["prepared"]}))
        builder.add_node("agent", self._agent("agent"))
        builder.add_node("tools", ToolNode([price_of]))
        builder.add_edge(START, "prepare")
        builder.add_edge("prepare", "agent")
        builder.add_conditional_edges("agent", tools_condition)
        builder.add_edge("tools", "agent")
        return builder

    def fan_out(self) -> Builder:
        """Build: plan, three workers by `Send`, join."""

        def plan(_state: State) -> list[Send]:
            return [Send("work", {"piece": piece}) for piece in ("a", "b", "c")]

        builder: Builder = StateGraph(State)
        builder.add_node("plan", self._plain("plan", lambda _state: None))
        builder.add_node("work", self._plain("work", lambda state: {"found": [state["piece"]]}))
        builder.add_node("join", self._agent("join"))
        builder.add_edge(START, "plan")
        builder.add_conditional_edges("plan", plan, ["work"])
        builder.add_edge("work", "join")
        builder.add_edge("join", END)
        return builder

    def child(self) -> Builder:
        """Build what stands below `subgraph` and `nested`: inner, expert."""
        builder: Builder = StateGraph(State)
        builder.add_node("inner", self._plain("inner", lambda _state: {"found": ["inner"]}))
        builder.add_node("expert", self._agent("expert"))
        builder.add_edge(START, "inner")
        builder.add_edge("inner", "expert")
        return builder

    def subgraph(self, child: Builder | None = None) -> Builder:
        """Build: first, and a compiled graph as the node ``child``."""
        compiled = (child or self.child()).compile(name="child")
        builder: Builder = StateGraph(State)
        builder.add_node("first", self._plain("first", lambda _state: {"found": ["first"]}))
        builder.add_node("child", compiled)
        builder.add_edge(START, "first")
        builder.add_edge("first", "child")
        return builder

    def nested(self, child: Builder | None = None) -> Builder:
        """Build: first, and a node that runs a compiled graph itself."""
        compiled = (child or self.child()).compile(name="child")

        def caller(state: State) -> Any:
            self._spans("caller")
            return {"messages": compiled.invoke({"messages": state["messages"]})["messages"][-1:]}

        async def acaller(state: State) -> Any:
            self._spans("caller")
            return {"messages": (await compiled.ainvoke({"messages": state["messages"]}))["messages"][-1:]}

        builder: Builder = StateGraph(State)
        builder.add_node("first", self._plain("first", lambda _state: {"found": ["first"]}))
        builder.add_node("caller", self._node(caller, acaller))
        builder.add_edge(START, "first")
        builder.add_edge("first", "caller")
        return builder


_threads = itertools.count(1)


def new_thread() -> str:
    """Return a thread id that no other test has."""
    return f"thread-{next(_threads)}"


def asks(text: str = "What does tea cost?") -> dict[str, Any]:
    """Return the input of a graph: what the user says."""
    return {"messages": [("user", text)]}


def line(*nodes: tuple[str, Any]) -> Builder:
    """Return a graph whose nodes run one after the other."""
    builder: Builder = StateGraph(State)
    before = START
    for name, node in nodes:
        builder.add_node(name, node)
        builder.add_edge(before, name)
        before = name
    return builder


def single(node: Any, name: str = "work", schema: Any = State) -> Builder:
    """Build a graph of one node."""
    builder: Builder = StateGraph(schema)
    builder.add_node(name, node)
    builder.add_edge(START, name)
    return builder


def config_of(thread: str | None = None, **metadata: Any) -> dict[str, Any]:
    """Return a config with a thread, and what the metadata is to say."""
    return {"configurable": {"thread_id": thread or new_thread()}, "metadata": metadata}


class _Heard(BaseCallbackHandler):
    def __init__(self) -> None:
        self.starts = 0

    def on_chain_start(self, *_: Any, **__: Any) -> None:
        self.starts += 1


@cache
def events_reach_bound_callbacks() -> bool:
    """Tell whether this LangGraph calls handlers of ``with_config`` in ``astream_events``; older ones forget them."""
    heard = _Heard()
    graph: Any = single(lambda state: None).compile().with_config(callbacks=[heard])

    async def run() -> None:
        async for _ in graph.astream_events(asks(), version="v2"):
            pass

    asyncio.run(run())
    return heard.starts > 0


def for_events(handler: BaseCallbackHandler) -> dict[str, Any]:
    """Return what the config of ``astream_events`` needs beside the handler that the graph has by ``with_config``."""
    return {} if events_reach_bound_callbacks() else {"callbacks": [handler]}
