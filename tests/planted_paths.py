"""Every path by which what an app handles could leave it: small apps whose every text is a secret of `planted`.

`PATHS` is the list of what is searched. Each path says which of its secrets a policy lets out: ``turn`` those of the
first list, ``full`` those of both; ``metadata`` none at all, and no policy one that is in neither.
"""

import asyncio
import contextvars
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Annotated, Any, NotRequired

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_tool_call
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.messages.tool import tool_call, tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import InjectedState, ToolNode, tools_condition
from langgraph.types import Command, RetryPolicy, interrupt

from apps import FakeModel, asks, for_events, new_thread, single
from planted import Secrets, every_text
from turntrace import (
    ContentPolicy,
    ContextTracker,
    ConversationState,
    SessionCallbackHandler,
    SessionTracker,
    current_turn,
    track_graph,
    track_node,
)
from turntrace.context import (
    Chain,
    ClearToolResults,
    ContextOverflowError,
    DropOldestTurns,
    KeepLast,
    Summarize,
    context_node,
)
from turntrace.demo.player import Player
from turntrace.demo.replay import Replay
from turntrace.demo.transcripts import find_sources, read_lines
from turntrace.middleware import SessionMiddleware
from turntrace.testing import Capture

MODEL = "gpt-4o-mini"


class Life:
    """A process that uses turntrace: its trackers, its secrets, and what it was told.

    Attributes:
        secrets: What is planted.
        policy: What of it may leave.
        url: The ledger of all its trackers.
        told: What turntrace gave back to the app, or printed.
    """

    def __init__(self, secrets: Secrets, policy: ContentPolicy, capture: Capture, folder: File) -> None:
        self.secrets = secrets
        self.policy = policy
        self.folder = folder
        self.url = f"sqlite:///{folder / 'ledger.db'}"
        self.capture = capture
        self.told: list[str] = []

    def tracker(self, **settings: Any) -> SessionTracker:
        """Make a tracker on the ledger."""
        settings = {"outbox": True, "content": self.policy, "user_hash_key": self.secrets["hash key"], **settings}
        return self.capture.tracker(self.url, **settings)

    def config(self, thread: str | None = None, **configurable: Any) -> dict[str, Any]:
        """Return a config whose every part that nobody asked for is a secret."""
        s = self.secrets
        return {
            "configurable": {"thread_id": thread or new_thread(), "api_token": s["configurable"], **configurable},
            "metadata": {"user_id": s["user"], "channel": "web", "note": s["metadata"], s["metadata key"]: 1},
            "tags": [s["tag"]],
        }

    def tell(self, *values: Any) -> None:
        """Keep what turntrace gave to the app."""
        self.told += [every_text(value) for value in values]

    def is_known(self, *about: Any) -> None:
        """Keep what turntrace says of sessions and users when it is asked."""
        for tracker in about:
            tracker.flush()
            self.tell(tracker, tracker.user_summary(self.secrets["user"]))
            for session in tracker.ledger.sessions():
                self.tell(session, *tracker.ledger.turns(session.id))


@dataclass(frozen=True)
class Path:
    """A path, and which of its secrets may leave.

    Attributes:
        run: Goes it.
        turn: The secrets that ``turn`` lets out: what the user said, what was answered, comments on it.
        full: Those that ``full`` lets out beside them: what each step added.
    """

    run: Callable[[Life], Any]
    turn: frozenset[str] = frozenset()
    full: frozenset[str] = frozenset()


PATHS: dict[str, Path] = {}


def path(name: str, *, turn: Iterable[str] = (), full: Iterable[str] = ()) -> Callable[..., Any]:
    """Put a function on the list."""

    def put(run: Callable[[Life], Any]) -> Callable[[Life], Any]:
        PATHS[name] = Path(run, frozenset(turn), frozenset(full))
        return run

    return put


# --- an app whose every text is a secret ------------------------------------------------------------------------------
class State(ConversationState):
    """State with a field of the app's own."""

    note: NotRequired[str]


class Model(FakeModel):
    """A fake model that takes tools and streams their arguments."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind(**kwargs)

    def _chunks(self, messages: Any) -> Any:
        answer = self._answer(messages)
        yield ChatGenerationChunk(message=AIMessageChunk(content=answer.content))
        if self.fails is not None:
            raise self.fails
        calls = [
            tool_call_chunk(name=each["name"], args=json.dumps(each["args"]), id=each["id"], index=index)
            for index, each in enumerate(answer.tool_calls)
        ]
        last = AIMessageChunk(content="", tool_call_chunks=calls, usage_metadata=self.usage, chunk_position="last")
        yield ChatGenerationChunk(message=last)


def model_of(s: Secrets, *, calls: bool = True, **changed: Any) -> Model:
    """Return a model that calls two tools and then answers; what else it says is nobody's business."""

    def says(messages: Any) -> AIMessage:
        if not calls or isinstance(messages[-1], ToolMessage):
            return AIMessage(
                s["answer"],
                response_metadata={"raw": s["response metadata"]},
                additional_kwargs={"reasoning": s["reasoning"]},
            )
        number = len(messages)
        arguments = {"what": s["argument"], "by": {s["argument key"]: 1}}
        return AIMessage(
            s["thought"],
            tool_calls=[
                tool_call(name="look_up", args=arguments, id=f"a{number}"),
                tool_call(name="break_down", args={"why": s["argument"]}, id=f"b{number}"),
            ],
        )

    return Model(says=says, **changed)


def tools_of(s: Secrets, *, has_state: bool = True) -> list[Any]:
    """Return two tools: one that is given the state, if asked for, and leaves an artifact, and one that fails."""

    def look_up(what: str, by: dict[str, int], state: Annotated[dict[str, Any], InjectedState]) -> Any:
        """Look something up."""
        return s["result"], {"raw": s["artifact"]}

    def look_up_alone(what: str, by: dict[str, int]) -> Any:
        """Look something up."""
        return s["result"], {"raw": s["artifact"]}

    @tool
    def break_down(why: str) -> str:
        """Fail."""
        raise ValueError(s["tool error"]) from LookupError(s["cause"])

    looks: Any = tool("look_up", response_format="content_and_artifact")(look_up if has_state else look_up_alone)
    return [looks, break_down]


def agent_of(life: Life, *, is_async: bool = False, **changed: Any) -> Any:
    """Build an agent with two tools."""
    s, model = life.secrets, model_of(life.secrets, **changed)

    def agent(state: State, config: RunnableConfig) -> Any:
        prompt = SystemMessage(s["system prompt"])
        return {"messages": [model.invoke([prompt, *state["messages"]], config)], "note": s["state"]}

    async def aagent(state: State, config: RunnableConfig) -> Any:
        prompt = SystemMessage(s["system prompt"])
        return {"messages": [await model.ainvoke([prompt, *state["messages"]], config)], "note": s["state"]}

    builder: Any = StateGraph(State)
    builder.add_node("agent", aagent if is_async else agent)
    builder.add_node("tools", ToolNode(tools_of(s), handle_tool_errors=True))
    builder.add_edge(START, "agent").add_conditional_edges("agent", tools_condition).add_edge("tools", "agent")
    return builder


def given(life: Life) -> dict[str, Any]:
    """Return an input with a history."""
    s = life.secrets
    history = [("user", s["history"]), ("ai", s["history"]), ("user", s["question"])]
    return {"messages": history, "note": s["state"]}


STEPS = ("thought", "argument", "argument key", "result", "tool error")


# --- the ways to run a graph ------------------------------------------------------------------------------------------
async def _drained(parts: AsyncIterator[Any]) -> None:
    async for _ in parts:
        pass


def _run(way: str, graph: Any, inputs: Any, config: Any, handler: Any) -> None:
    if way == "invoke":
        graph.invoke(inputs, config)
    elif way == "stream":
        list(graph.stream(inputs, config, stream_mode=["values", "updates", "messages", "debug"]))
    elif way == "ainvoke":
        asyncio.run(graph.ainvoke(inputs, config))
    elif way == "astream":
        asyncio.run(_drained(graph.astream(inputs, config, stream_mode=["values", "updates", "messages", "debug"])))
    else:
        config = {**config, **for_events(handler)}
        asyncio.run(_drained(graph.astream_events(inputs, config, version="v2")))


WAYS = ("invoke", "stream", "ainvoke", "astream", "astream_events")


def _callback_only(way: str) -> None:
    @path(f"callback only, {way}", turn=("question", "answer"), full=STEPS)
    def run(life: Life) -> None:
        handler = SessionCallbackHandler(life.tracker())
        builder = agent_of(life, is_async=way.startswith("a"))
        graph = builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=[handler])
        _run(way, graph, given(life), life.config(), handler)
        life.is_known(handler.tracker)


def _track_graph(way: str) -> None:
    @path(f"track_graph, {way}", turn=("question", "answer"), full=STEPS)
    def run(life: Life) -> None:
        handler = SessionCallbackHandler(life.tracker())
        builder = track_graph(agent_of(life, is_async=way.startswith("a")))
        graph = builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=[handler])
        _run(way, graph, given(life), life.config(), handler)


for _way in WAYS:
    _callback_only(_way)
for _way in ("invoke", "astream"):
    _track_graph(_way)


@path("blocks of a session and a turn", turn=("question", "answer"), full=STEPS)
def _blocks(life: Life) -> None:
    tracker, s = life.tracker(), life.secrets
    graph = agent_of(life).compile(checkpointer=InMemorySaver())
    with tracker.session(user_id=s["user"], channel="web") as session:
        conversation = session.conversation(topic="billing")
        with conversation.turn(s["question"]) as turn:
            graph.invoke({**turn.input, "note": s["state"]}, turn.config)
            life.tell(current_turn(), turn.config)
        with conversation.turn(s["question"]):
            agent_of(life).compile().invoke(given(life))  # without callback and config
        life.tell(tracker, session, conversation, turn, turn.tags)
    life.is_known(tracker)


@path("blocks, async", turn=("question", "answer"), full=STEPS)
def _async_blocks(life: Life) -> None:
    tracker, s = life.tracker(), life.secrets
    graph = agent_of(life, is_async=True).compile(checkpointer=InMemorySaver())

    async def talk() -> None:
        async with tracker.session(user_id=s["user"]) as session, session.conversation("c").turn(s["question"]) as turn:
            await graph.ainvoke({**turn.input, "note": s["state"]}, turn.config)

    asyncio.run(talk())


@path("no graph: set_answer, steps by hand", turn=("question", "answer"), full=("node error",))
def _by_hand(life: Life) -> None:
    tracker, s = life.tracker(), life.secrets
    with tracker.session(user_id=s["user"]) as session:
        with session.conversation("c").turn(HumanMessage(s["question"], name="x")) as turn:
            turn.close_step(turn.open_step("agent", "chain"), error=LookupError(s["node error"]))
            turn.set_answer({"role": "assistant", "content": s["answer"], "hidden": s["reasoning"]})
        with suppress(LookupError), session.conversation("c").turn(s["question"]):
            raise LookupError(s["error of a block"])


@path("a subgraph, streamed with subgraphs=True", turn=("question", "answer"), full=STEPS)
def _subgraph(life: Life) -> None:
    handler = SessionCallbackHandler(life.tracker())
    builder: Any = StateGraph(State)
    builder.add_node("child", agent_of(life).compile()).add_edge(START, "child")
    graph = builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=[handler])
    list(graph.stream(given(life), life.config(), subgraphs=True))


@path("the functional API", turn=("question",))
def _functional(life: Life) -> None:
    s = life.secrets

    @task
    def work(what: str) -> str:
        return s["result"]

    @entrypoint(checkpointer=InMemorySaver())
    def flow(inputs: Any) -> dict[str, Any]:
        return {"messages": [("user", work(s["argument"]).result())]}

    handler = SessionCallbackHandler(life.tracker())
    config: Any = {**life.config(), "callbacks": [handler]}
    flow.invoke(given(life), config)


@path("a retriever, and a tool that is called by hand", turn=("question",), full=("argument", "result"))
def _retriever(life: Life) -> None:
    s = life.secrets

    class Shelf(BaseRetriever):
        def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
            return [Document(s["document"], metadata={"of": s["document"]})]

    @tool
    def find(what: str) -> dict[str, str]:
        """Find something."""
        return {"found": s["result"]}

    def work(state: State) -> None:
        Shelf().invoke(s["query"])
        find.invoke({"what": s["argument"]})

    handler = SessionCallbackHandler(life.tracker())
    graph: Any = single(work, schema=State).compile()
    graph.invoke(given(life), {**life.config(), "callbacks": [handler]})


# --- what is neither question nor answer ------------------------------------------------------------------------------
@path("instructions and results where question and answer are looked for")
def _not_said(life: Life) -> None:
    """An agent that begins by its instructions alone; a graph that ends with some, or waits at the result of a tool."""
    s = life.secrets
    handler = SessionCallbackHandler(life.tracker())
    config = {"callbacks": [handler]}
    ends: Any = single(lambda _: {"messages": [SystemMessage(s["system prompt"])]}, schema=State).compile()
    ends.invoke({"messages": [("system", s["system prompt"])]}, {**life.config(), **config})
    ends.invoke({"messages": [{"role": "developer", "content": s["system prompt"]}]}, {**life.config(), **config})
    call = AIMessage("", tool_calls=[tool_call(name="look", args={}, id="1")])
    looks: Any = single(lambda _: {"messages": [call, ToolMessage(s["result"], tool_call_id="1")]}, schema=State)
    looks.add_node("agent", lambda _: None).add_edge("work", "agent")
    looks = looks.compile(checkpointer=InMemorySaver(), interrupt_before=["agent"])
    if hasattr(handler, "on_resume"):  # langgraph before 1.1.7 does not tell that it waits
        looks.invoke({"messages": []}, {**life.config(), **config})
    with handler.tracker.session() as session, session.conversation("c").turn(SystemMessage(s["system prompt"])):
        pass


# --- errors -----------------------------------------------------------------------------------------------------------
@path("a node that fails", turn=("question",), full=("node error",))
def _node_fails(life: Life) -> None:
    s = life.secrets

    def work(state: State) -> None:
        raise LookupError(s["node error"]) from ValueError(s["cause"])

    handler = SessionCallbackHandler(life.tracker())
    graph: Any = single(work, schema=State).compile()
    for run in (
        graph.invoke,
        lambda *given: asyncio.run(graph.ainvoke(*given)),
        lambda *given: list(graph.stream(*given)),
    ):
        with suppress(LookupError):
            run(given(life), {**life.config(), "callbacks": [handler]})
    life.is_known(handler.tracker)


@path("a model that fails, whole and streamed", turn=("question",), full=("model error",))
def _model_fails(life: Life) -> None:
    handler = SessionCallbackHandler(life.tracker())
    error = ConnectionError(life.secrets["model error"])
    for is_async in (False, True):
        graph = agent_of(life, fails=error, is_async=is_async).compile()
        for way in ("ainvoke", "astream") if is_async else ("invoke", "stream"):
            with suppress(ConnectionError):
                _run(way, graph, given(life), {**life.config(), "callbacks": [handler]}, handler)


@path("a node that is tried again", turn=("question", "answer"), full=("node error",))
def _retries(life: Life) -> None:
    s, tries = life.secrets, iter(range(3))

    def work(state: State) -> Any:
        if next(tries) < 2:
            raise ConnectionError(s["node error"])
        return {"messages": [AIMessage(s["answer"])]}

    builder: Any = StateGraph(State)
    policy = RetryPolicy(initial_interval=0.001, jitter=False, max_attempts=3, retry_on=ConnectionError)
    builder.add_node("work", work, retry_policy=policy).add_edge(START, "work")
    handler = SessionCallbackHandler(life.tracker())
    builder.compile().invoke(given(life), {**life.config(), "callbacks": [handler]})


@path("a stream that is left", turn=("question",), full=("thought", "argument", "argument key"))
def _left(life: Life) -> None:
    handler = SessionCallbackHandler(life.tracker())
    graph = agent_of(life).compile()
    parts = graph.stream(given(life), {**life.config(), "callbacks": [handler]})
    next(parts)
    parts.close()


# --- a person answers -------------------------------------------------------------------------------------------------
@path("an interrupt and its answer, here and by another process", turn=("question", "answer"))
def _interrupt(life: Life) -> None:
    s = life.secrets

    def ask(state: State) -> Any:
        interrupt({"may I": s["interrupt"]})
        return {"messages": [AIMessage(s["answer"])], "note": s["state"]}

    saver = InMemorySaver()
    thread = life.config()
    for answers_elsewhere in (False, True):
        handler = SessionCallbackHandler(life.tracker())
        graph: Any = single(ask, schema=State).compile(checkpointer=saver)
        graph.invoke(given(life), {**thread, "callbacks": [handler]})
        if answers_elsewhere:
            handler.tracker.flush()
            handler = SessionCallbackHandler(life.tracker())
        graph.invoke(Command(resume=s["resume"], update={"note": s["state"]}), {**thread, "callbacks": [handler]})
        handler.tracker.flush()


@path("interrupts that nobody answers", turn=("question",))
def _unanswered(life: Life) -> None:
    s = life.secrets
    tracker = life.tracker()
    handler = SessionCallbackHandler(tracker)
    graph: Any = single(lambda state: interrupt(s["interrupt"]), schema=State).compile(checkpointer=InMemorySaver())
    thread = life.config()
    for _ in range(2):
        graph.invoke(given(life), {**thread, "callbacks": [handler]})
    tracker.flush()
    life.tell(tracker.sweep(now=tracker.clock() + 10**15))


@path("a run from an older checkpoint", turn=("question", "answer"), full=STEPS)
def _fork(life: Life) -> None:
    handler = SessionCallbackHandler(life.tracker())
    graph = agent_of(life).compile(checkpointer=InMemorySaver()).with_config(callbacks=[handler])
    thread = life.config()
    graph.invoke(given(life), thread)
    older = list(graph.get_state_history(thread))[2]
    checkpoint = older.config["configurable"]["checkpoint_id"]
    graph.invoke(None, life.config(thread["configurable"]["thread_id"], checkpoint_id=checkpoint))


# --- the context window -----------------------------------------------------------------------------------------------
def long_talk(life: Life) -> list[Any]:
    """Return a history that is to be pruned, with instructions, calls of tools and their results."""
    s = life.secrets
    messages: list[Any] = [SystemMessage(s["system prompt"], id="s")]
    for number in range(4):
        call = tool_call(name="look_up", args={"what": s["old argument"]}, id=f"c{number}")
        messages += [
            HumanMessage(s["history"] * 8, id=f"u{number}"),
            AIMessage("", tool_calls=[call], id=f"a{number}"),
            ToolMessage(s["old result"] * 20, tool_call_id=f"c{number}", id=f"t{number}"),
            AIMessage(s["history"] * 8, id=f"r{number}"),
        ]
    return [*messages, HumanMessage(s["question"], id="q")]


def fits(life: Life, strategy: Any, handler: SessionCallbackHandler, *, is_async: bool) -> None:
    """Have an agent's node fit what its model is given."""
    s = life.secrets
    context = ContextTracker(MODEL, limit=3000, threshold=0.9, strategy=strategy)
    model = model_of(s, calls=False)

    def agent(state: State, config: RunnableConfig) -> Any:
        window = context.fit(state["messages"])
        life.tell(window.decision)
        return {"messages": [model.invoke(window.messages, config), *window.update], "context_tokens": window.tokens}

    async def aagent(state: State, config: RunnableConfig) -> Any:
        window = await context.afit(state["messages"])
        return {"messages": [await model.ainvoke(window.messages, config)]}

    graph: Any = track_graph(single(aagent if is_async else agent, schema=State)).compile()
    inputs, config = {"messages": long_talk(life)}, {**life.config(), "callbacks": [handler]}
    asyncio.run(graph.ainvoke(inputs, config)) if is_async else graph.invoke(inputs, config)
    life.tell(context, strategy)


class Failing:
    """A strategy of the app's that fails."""

    def __init__(self, words: str) -> None:
        self._words = words

    def prune(self, overfull: Any) -> Any:
        raise LookupError(self._words) from ValueError(self._words)


STRATEGIES: dict[str, Callable[[Secrets], Any]] = {
    "DropOldestTurns": lambda s: DropOldestTurns(),
    "KeepLast": lambda s: KeepLast(3),
    "ClearToolResults": lambda s: Chain(ClearToolResults(keep=0), DropOldestTurns()),
    "a strategy that fails": lambda s: Failing(s["strategy error"]),
    "Summarize with a model that fails": lambda s: Summarize(summing(s, fails=LookupError(s["model error"]))),
    "Summarize": lambda s: Summarize(summing(s)),
}


def summing(s: Secrets, **changed: Any) -> BaseChatModel:
    """Return a model that sums up."""
    return Model(says=lambda _: AIMessage(s["summary"]), **changed)


def _prunes(name: str, strategy: Callable[[Secrets], Any]) -> None:
    added = {"Summarize": ["summary"], "Summarize with a model that fails": ["model error"]}.get(name, [])

    @path(f"pruning by {name}", turn=("question", "answer"), full=added)
    def run(life: Life) -> None:
        handler = SessionCallbackHandler(life.tracker())
        for is_async in (False, True):
            fits(life, strategy(life.secrets), handler, is_async=is_async)
        life.is_known(handler.tracker)


for _name, _strategy in STRATEGIES.items():
    _prunes(_name, _strategy)


@path("pruning by other code: trim_messages, RemoveMessage, a context node", turn=("question", "answer"))
def _external(life: Life) -> None:
    model = model_of(life.secrets, calls=False)
    context = ContextTracker(MODEL, limit=3000, threshold=0.9)

    def forget(state: State) -> Any:
        return {"messages": [RemoveMessage(id="u0"), RemoveMessage(id="r0")]}

    def agent(state: State, config: RunnableConfig) -> Any:
        model.invoke(state["messages"], config)
        kept = trim_messages(state["messages"], max_tokens=6, token_counter=len, strategy="last")
        return {"messages": [model.invoke(kept, config)]}

    builder: Any = single(forget, "forget", schema=State)
    builder.add_node("context", context_node(context)).add_node("agent", agent)
    builder.add_edge("forget", "context").add_edge("context", "agent")
    handler = SessionCallbackHandler(life.tracker())
    builder.compile().invoke({"messages": long_talk(life)}, {**life.config(), "callbacks": [handler]})
    life.is_known(handler.tracker)


@path("messages that do not fit whatever is pruned", turn=("question",))
def _overflow(life: Life) -> None:
    s = life.secrets

    def agent(state: State) -> Any:
        try:
            return context.fit(state["messages"]).update
        except ContextOverflowError as error:
            life.tell(error, error.biggest)
            raise

    context = ContextTracker(MODEL, limit=20)
    handler = SessionCallbackHandler(life.tracker())
    graph: Any = single(agent, schema=State).compile()
    inputs = {"messages": [*long_talk(life)[:-1], HumanMessage(s["question"])]}
    with suppress(ContextOverflowError):
        graph.invoke(inputs, {**life.config(), "callbacks": [handler]})


@path("create_agent with SessionMiddleware", turn=("question", "answer"), full=STEPS)
def _middleware(life: Life) -> None:
    s = life.secrets

    @wrap_tool_call
    def forgiving(request: Any, handler: Any) -> Any:
        try:
            return handler(request)
        except ValueError:
            return ToolMessage("It failed.", tool_call_id=request.tool_call["id"])

    middleware: Any = [SessionMiddleware(ContextTracker(MODEL)), forgiving]
    handler = SessionCallbackHandler(life.tracker())
    # langgraph before 1.1.7, at the latest, does not inject the state into a tool whose call is wrapped
    tools = tools_of(s, has_state=hasattr(handler, "on_resume"))
    agent: Any = create_agent(model_of(s), tools, system_prompt=s["system prompt"], middleware=middleware)
    agent.invoke({"messages": given(life)["messages"]}, {**life.config(), "callbacks": [handler]})


# --- functions of the app's -------------------------------------------------------------------------------------------
def failing(words: str) -> Callable[..., Any]:
    """Return a function that fails."""

    def fail(*_: Any) -> Any:
        raise LookupError(words) from ValueError(words)

    return fail


@path("evaluators: right, failing, async, and with scores that are none", turn=("question",))
def _evaluators(life: Life) -> None:
    s = life.secrets

    async def afails(_: Any) -> Any:
        raise LookupError(s["evaluator error"])

    def about(session: Any) -> Any:
        life.tell(session)
        return {"good": True, "effort": 0.3, "kind": "short"}

    evaluators = [
        about,
        afails,
        failing(s["evaluator error"]),
        lambda _: {"kind": [s["score"]]},
        lambda _: {"kind": {s["score"]: 1}},
        lambda _: {s["score"] * 10: 1},
        lambda _: s["score"],
    ]
    tracker = life.tracker(evaluators=evaluators)
    with tracker.session(user_id=s["user"]) as session, session.conversation("c").turn(s["question"]):
        pass
    tracker.flush()


@path("classify, dropoff, describe_input and describe_output that fail", full=("answer", *STEPS))
def _user_functions(life: Life) -> None:
    s = life.secrets
    tracker = life.tracker(
        classify=lambda text: failing(s["classifier error"] + text)(), dropoff=failing(s["rule error"])
    )
    handler = SessionCallbackHandler(
        tracker,
        describe_input=lambda given: failing(str(given))(),
        describe_output=lambda given: failing(str(given))(),
    )
    graph = agent_of(life).compile(checkpointer=InMemorySaver())
    graph.invoke(given(life), {**life.config(), "callbacks": [handler]})
    with tracker.session(user_id=s["user"]) as session:
        session.conversation("c").start_turn(["nothing"]).end()


@path("describe_input and describe_output", turn=("question", "answer"))
def _described(life: Life) -> None:
    s = life.secrets
    handler = SessionCallbackHandler(
        life.tracker(), describe_input=lambda given: s["question"], describe_output=lambda state: s["answer"]
    )
    graph: Any = single(lambda state: {"note": s["state"]}, schema=State).compile()
    graph.invoke({"note": s["state"], "messages": []}, {**life.config(), "callbacks": [handler]})


@path("a state whose messages fail when they are read", turn=("question",))
def _odd_state(life: Life) -> None:
    s = life.secrets

    class Odd(str):
        def __str__(self) -> str:
            raise LookupError(s["state"])

        __repr__ = __len__ = __str__  # type: ignore[assignment]

    handler = SessionCallbackHandler(life.tracker())
    config = life.config()
    config["metadata"] = {"user_id": {"name": s["user"]}, "topic": {1: 2}}  # no id: the user is not known
    graph: Any = single(lambda state: None, schema=State).compile()
    graph.invoke(given(life), {**config, "callbacks": [handler]})
    config["metadata"] = {"user_id": Odd(s["user"])}
    with suppress(LookupError):
        graph.invoke(given(life), {**config, "callbacks": [handler]})


# --- what a user thinks of it -----------------------------------------------------------------------------------------
@path("feedback with comments on a turn, a session and by id", turn=("question", "comment"))
def _feedback(life: Life) -> None:
    tracker, s = life.tracker(), life.secrets
    with tracker.session(user_id=s["user"]) as session:
        with session.conversation("c").turn(s["question"]) as turn:
            turn.feedback(True, comment=s["comment"])
        session.feedback(0.5, comment=s["comment"])
    tracker.flush()
    tracker.feedback(False, turn_id=turn.id, name="later", comment=s["comment"])


@path("journeys and intents, which are recorded as they are said", turn=("question",))
def _journeys(life: Life) -> None:
    s = life.secrets
    tracker = life.tracker(journeys={"onboarding": ["signup", "done"]})
    with tracker.session(user_id=s["user"]) as session, session.conversation("c").turn(s["question"]) as turn:
        turn.journey("onboarding").enter("signup")
        turn.set_intent("connect")
    life.tell(session.journey("onboarding"))
    life.is_known(tracker)


# --- between processes ------------------------------------------------------------------------------------------------
@path("a worker takes a turn up: turn.carrier()", turn=("question", "answer"), full=STEPS)
def _carrier(life: Life) -> None:
    s = life.secrets
    one, other = life.tracker(), life.tracker()
    turn = one.start_session(user_id=s["user"]).conversation("c-44").start_turn(s["question"])
    carrier = turn.carrier()
    life.tell(carrier, turn)
    graph = agent_of(life).compile()
    with other.resume_turn(carrier) as resumed:
        graph.invoke(given(life), resumed.config)
    life.tell(resumed)


@path("a turn travels: headers and baggage with propagate=True", turn=("question", "answer"), full=STEPS)
def _travels(life: Life) -> None:
    s = life.secrets
    one, other = (life.tracker(propagate=True) for _ in range(2))
    graph = agent_of(life).compile(checkpointer=InMemorySaver())
    handler = SessionCallbackHandler(other)

    def work(state: State) -> None:
        turn = current_turn()
        life.tell(turn.headers(), turn.config, turn.tags)
        # What the other server runs: it is asked with what the user said.
        config = life.config()
        config["metadata"] |= turn.headers()
        asyncio.run(_elsewhere(lambda: graph.invoke(given(life), {**config, "callbacks": [handler]})))

    calling: Any = track_graph(single(work, schema=State)).compile()
    session = one.start_session(user_id=s["user"], tier="premium")
    with session.conversation("c", topic="billing").turn(s["question"]) as turn:
        calling.invoke(turn.input, turn.config)
        turn.set_answer(s["answer"])


async def _elsewhere(call: Callable[[], Any]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, contextvars.Context().run, call)


@path("ids in a run's context and configurable, with tracked nodes", turn=("question",))
def _context(life: Life) -> None:
    s = life.secrets

    @dataclass
    class Who:
        user_id: str
        password: str = field(default="")

    builder: Any = StateGraph(State, context_schema=Who)
    builder.add_node("work", track_node(lambda state: {"note": s["state"]}, state_schema=State)).add_edge(START, "work")
    handler = SessionCallbackHandler(life.tracker())
    graph = track_graph(builder).compile(checkpointer=InMemorySaver()).with_config(callbacks=[handler])
    config = life.config()
    del config["metadata"]["user_id"]
    found = graph.invoke(given(life), config, context=Who(s["user"], s["password"]))
    life.tell({name: found[name] for name in ("session_id", "conversation_id", "turn_id", "turn_number")})
    graph.invoke(asks(s["question"]), life.config(user_id=s["user"], langgraph_auth_user_id=s["user"]))


# --- the replay of transcripts ----------------------------------------------------------------------------------------
def transcript_of(s: Secrets, file: File) -> File:
    """Write a file of two recorded conversations, and of lines that are malformed in many ways."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    called = {
        "id": "c1",
        "type": "function",
        "function": {"name": "look_up", "arguments": json.dumps({"what": s["argument"]})},
    }
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": s["system prompt"]},
        {"role": "user", "content": s["question"]},
        {"role": "assistant", "content": s["thought"], "tool_calls": [called], "usage": usage},
        {"role": "tool", "tool_call_id": "c1", "content": s["result"]},
        {"role": "assistant", "content": s["answer"], "usage": usage},
    ]
    talk = {
        "conversation_id": "t-1",
        "user_id": s["user"],
        "topic": "orders",
        "model": MODEL,
        "outcome": {"success": True, "why": s["metadata"]},
        "messages": messages,
        "note": s["metadata"],
    }
    wrong: list[Any] = [
        s["history"],
        [s["history"]],
        {**talk, "conversation_id": f"☂{s['history']}"},  # an id is printable ASCII, as a secret is by chance
        {**talk, "model": [s["history"]]},
        {**talk, "messages": {"role": s["history"]}},
        {**talk, "messages": [{"role": s["history"], "content": s["history"]}]},
        {**talk, "messages": [{"role": "tool", "tool_call_id": s["history"], "content": s["history"]}]},
        {**talk, "outcome": {"success": s["history"]}},
        {**talk, "messages": [{"role": "user", "content": "Another: " + s["history"]}]},  # of a known id
    ]
    lines = [
        json.dumps(talk),
        *map(json.dumps, wrong),
        json.dumps(talk)[:-40],
        f'{{"a": {s["history"]}',
        json.dumps({**talk, "conversation_id": "t-2"}),
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@path(
    "the replay of transcripts, good lines and malformed ones",
    turn=("question", "answer"),
    full=("thought", "argument", "result"),
)
def _replay(life: Life) -> None:
    s = life.secrets
    player = Player(
        life.url,
        content=life.policy,
        tracer_provider=life.capture.provider,
        outbox=True,
        user_hash_key=s["hash key"],
    )
    file = transcript_of(s, life.folder / "talks.jsonl")
    played = Replay(player, on_problem=lambda line, why: life.tell(line.number, why))
    life.tell(played.run(read_lines(find_sources([str(file)]))))
    player.close()
    file.unlink()
