"""The graphs of the soak, whose model counts what it was asked and said: what the ledger must come to know."""

import asyncio
import json
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call, tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import RetryPolicy, Send, interrupt
from opentelemetry import trace

from apps import Builder, FakeModel, Piece, State
from turntrace import SessionCallbackHandler, current_turn, track_graph

JOURNEY, STAGES = "onboarding", ("signup", "connect", "first_answer", "done")
MODEL_PRICE = (0.15e-6, 0.6e-6)
"""US dollars for a token that goes into gpt-4o-mini, and for one that comes out."""
_KEY = re.compile(r"\[k=([^\]]+)\]")
_FAST = RetryPolicy(initial_interval=0.001, jitter=False, max_attempts=3, retry_on=LookupError)
_DELAYS = {"slow": 0.02, "takes_long": 1.5, "hangs": 300.0, "sleeps": 8.0}


# --- what happened, as the app saw it ---------------------------------------------------------------------------------
@dataclass
class Tally:
    """What one run of a graph came to, counted in the app.

    Attributes:
        key: Stands in the text of the user, or of the person who answers.
        turn: Id of the turn, as `current_turn` says in its first node.
        number: Its number.
        session: Its session.
        calls: How often the model was called.
        input_tokens: What it was given, as it said.
        output_tokens: What it said.
        tools: How many calls of tools it asked for.
        tries: How often the node that fails at first was tried.
        started: Set when the model is called.
    """

    key: str
    turn: str = ""
    number: int = 0
    session: str = ""
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    tools: int = 0
    tries: int = 0
    started: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def see(self, turn: Any) -> None:
        """Note the turn."""
        self.turn, self.number, self.session = turn.id, turn.number, turn.conversation.session.id

    def words(self) -> dict[str, Any]:
        """Return what goes into the journal."""
        names = ("turn", "number", "session", "calls", "input_tokens", "output_tokens", "tools")
        return {name: getattr(self, name) for name in names}


class Tallies:
    """The tallies of the runs that go on in this process, by key."""

    def __init__(self) -> None:
        self._known: dict[str, Tally] = {}

    def new(self, key: str) -> Tally:
        """Begin one."""
        self._known[key] = Tally(key)
        return self._known[key]

    def drop(self, tally: Tally) -> None:
        """Forget one."""
        self._known.pop(tally.key, None)

    def of(self, messages: Sequence[Any]) -> Tally:
        """Return that of the run whose messages these are: the last key in them."""
        for message in reversed(messages):
            found = _KEY.findall(str(getattr(message, "content", message)))
            if found:
                return self._known.get(found[-1]) or Tally(found[-1])  # of one that is over: answered twice
        raise AssertionError(f"no key in {messages!r}")


TALLIES = Tallies()


def says(key: str, text: str = "Hi") -> str:
    """Return what a user says in a run."""
    return f"{text} [k={key}]"


# --- the model --------------------------------------------------------------------------------------------------------
class CountedModel(FakeModel):
    """A model that counts its calls and tokens, and asks for a tool where it is to."""

    asks_for_tool: bool = False

    def _answer(self, messages: Sequence[BaseMessage]) -> AIMessage:
        answer, tally = self._begun(messages)
        if self.fails is None:
            _count(tally, answer)
        return answer

    def _begun(self, messages: Sequence[BaseMessage]) -> tuple[AIMessage, Tally]:
        tally = TALLIES.of(messages)
        calls = []
        if self.asks_for_tool and not isinstance(messages[-1], ToolMessage):
            calls = [tool_call(name="price_of", args={"item": "tea"}, id=f"call-{len(messages)}")]
        with tally.lock:
            tally.calls += 1
            tally.tools += len(calls)
        given, said = random.randrange(50, 2_000), random.randrange(5, 200)
        usage: UsageMetadata = {"input_tokens": given, "output_tokens": said, "total_tokens": given + said}
        tally.started.set()
        return AIMessage("" if calls else "It costs 5 euros.", tool_calls=calls, usage_metadata=usage), tally

    def _chunks(self, messages: Sequence[BaseMessage]) -> Iterator[ChatGenerationChunk]:
        answer, tally = self._begun(messages)
        for number, word in enumerate(str(answer.content).split(" ")):
            yield ChatGenerationChunk(message=AIMessageChunk(content=word if number == 0 else f" {word}"))
            if self.fails is not None:
                raise self.fails
        calls = [
            tool_call_chunk(name=call["name"], args=json.dumps(call["args"]), id=call["id"], index=index)
            for index, call in enumerate(answer.tool_calls)
        ]
        _count(tally, answer)
        last = AIMessageChunk(
            content="", tool_call_chunks=calls, usage_metadata=answer.usage_metadata, chunk_position="last"
        )
        yield ChatGenerationChunk(message=last)


def _count(tally: Tally, answer: AIMessage) -> None:
    usage = answer.usage_metadata
    assert usage is not None
    with tally.lock:
        tally.input_tokens += usage["input_tokens"]
        tally.output_tokens += usage["output_tokens"]


# --- nodes ------------------------------------------------------------------------------------------------------------
def _prepare(state: State) -> dict[str, Any]:
    TALLIES.of(state["messages"]).see(current_turn())
    return {}


def _boom(_state: State) -> dict[str, Any]:
    raise ZeroDivisionError("a node fails")


def _ask(_state: State) -> dict[str, Any]:
    said = interrupt("Really?")
    TALLIES.of([said]).see(current_turn())
    return {"messages": [("ai", f"You said {said}.")]}


def _own(state: State) -> dict[str, Any]:
    """Make spans of the app's own, and tell the turn what only the app knows."""
    tracer = trace.get_tracer("the app")
    with tracer.start_as_current_span("outer"), tracer.start_as_current_span("inner"):
        pass
    current_turn().set_intent("price")
    return {}


def _pieces(state: State) -> list[Send]:
    return [Send("work", {"piece": piece, "messages": state["messages"]}) for piece in ("a", "b", "c")]


def _as_async(node: Callable[[Any], Any]) -> Callable[[Any], Any]:
    async def anode(state: State) -> Any:
        await asyncio.sleep(0)
        return node(state)

    return anode


class Graphs:
    """The graphs of one process, each sync and async.

    Args:
        handler: What listens to them.
        folder: Where the checkpoints are by which another process can answer.
    """

    def __init__(self, handler: SessionCallbackHandler, folder: Path) -> None:
        self._handler = handler
        self._built: dict[tuple[str, bool], Any] = {}
        self._path = str(folder / "checkpoints.db")
        connection = sqlite3.connect(self._path, timeout=60, check_same_thread=False)
        connection.execute("PRAGMA synchronous=OFF")
        self.saver = SqliteSaver(connection)
        self.saver.setup()
        self.asaver: AsyncSqliteSaver | None = None
        self._stack: Any = None

    async def open(self) -> None:
        """Open what belongs to an event loop."""
        self._stack = AsyncSqliteSaver.from_conn_string(self._path)
        self.asaver = await self._stack.__aenter__()
        await self.asaver.conn.execute("PRAGMA busy_timeout=60000")
        await self.asaver.conn.execute("PRAGMA synchronous=OFF")
        await self.asaver.setup()

    async def close(self) -> None:
        """Close the checkpoints."""
        await self._stack.__aexit__(None, None, None)
        self.saver.conn.close()

    def get(self, name: str, *, is_async: bool) -> Any:
        """Return a graph: every second one is tracked, the others have the callback alone."""
        known = self._built.get((name, is_async))
        if known is None:
            builder = _build(name, is_async)
            tracked = track_graph(builder) if name in TRACKED else builder
            saver: Any = InMemorySaver()
            if name == "asks":
                saver = self.asaver if is_async else self.saver
            known = tracked.compile(checkpointer=saver).with_config(callbacks=[self._handler])
            self._built[name, is_async] = known
        return known


TRACKED = {"tools", "asks", "retries", "own"}
"""Those of `track_graph`; the others have the callback alone."""


def _build(name: str, is_async: bool) -> Builder:
    model = CountedModel(delay=_DELAYS.get(name, 0.0), asks_for_tool=name in ("tools", "tool_fails"))
    failing = CountedModel(fails=ConnectionError("a model fails"))

    def node(function: Callable[[Any], Any]) -> Any:
        return _as_async(function) if is_async else function

    def agent_of(model: CountedModel) -> Any:
        def agent(state: State, config: RunnableConfig) -> Any:
            return {"messages": [model.invoke(state["messages"], config)]}

        async def aagent(state: State, config: RunnableConfig) -> Any:
            return {"messages": [await model.ainvoke(state["messages"], config)]}

        return aagent if is_async else agent

    def retried() -> Any:
        agent = agent_of(model)

        def fail(state: State) -> None:
            tally = TALLIES.of(state["messages"])
            tally.tries += 1
            if tally.tries % 3:
                raise LookupError("not yet")

        def work(state: State, config: RunnableConfig) -> Any:
            said = agent(state, config)
            fail(state)
            return said

        async def awork(state: State, config: RunnableConfig) -> Any:
            said = await agent(state, config)
            fail(state)
            return said

        return awork if is_async else work

    @tool
    def price_of(item: str) -> str:
        """Look up the price of an item."""
        if name == "tool_fails":
            raise KeyError(item)
        return f"5 euros for {item}"

    builder: Builder = StateGraph(State)
    builder.add_node("prepare", node(_prepare))
    builder.add_edge(START, "prepare")
    before = "prepare"

    def then(called: str, runs: Any, **options: Any) -> None:
        nonlocal before
        builder.add_node(called, runs, **options)
        builder.add_edge(before, called)
        before = called

    if name in ("tools", "tool_fails"):
        then("agent", agent_of(model))
        builder.add_node("tools", ToolNode([price_of], handle_tool_errors=False))
        builder.add_conditional_edges("agent", tools_condition)
        builder.add_edge("tools", "agent")
    elif name == "fan_out":
        schema: Any = Piece
        builder.add_node("work", agent_of(model), input_schema=schema)
        builder.add_conditional_edges("prepare", _pieces, ["work"])
        builder.add_node("join", agent_of(model))
        builder.add_edge("work", "join")
    elif name == "retries":
        then("work", retried(), retry_policy=_FAST)
    elif name == "node_fails":
        then("agent", agent_of(model))
        then("boom", node(_boom))
    elif name == "model_fails":
        then("agent", agent_of(failing))
    elif name == "asks":
        then("think", agent_of(model))
        then("ask", node(_ask))
        then("conclude", agent_of(model))
    elif name == "own":
        then("own", node(_own))
        then("agent", agent_of(model))
    else:
        assert name in _DELAYS, name
        then("agent", agent_of(model))
    return builder


def wait_for(event: threading.Event, patience_s: float = 60.0) -> None:
    """Wait until something was seen."""
    assert event.wait(patience_s), "the model was not called"


async def await_for(event: threading.Event, patience_s: float = 60.0) -> None:
    """Do what `wait_for` does on an event loop."""
    until = time.monotonic() + patience_s
    while not event.is_set():
        assert time.monotonic() < until, "the model was not called"
        await asyncio.sleep(0.005)
