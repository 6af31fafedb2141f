"""The graphs that LangGraph's own server serves in the tests; it imports this file by itself."""

from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import START, StateGraph
from langgraph.types import interrupt

from apps import App, FakeModel, State
from turntrace import SessionCallbackHandler, SessionTracker, current_turn, track_graph

handler = SessionCallbackHandler(SessionTracker(propagate=True))


async def asks(state: State) -> dict[str, Any]:
    """Ask a person."""
    return {"messages": [AIMessage(f"You said {interrupt('Really?')}.")]}


async def greets(state: State, config: RunnableConfig) -> dict[str, Any]:
    """Answer, and tell the turn something."""
    current_turn().set_intent("greeting")
    current_turn().journey("shopping", ["came", "bought"]).enter("came")
    current_turn().feedback(1.0)
    return {"messages": [await FakeModel().ainvoke("hello", config)]}


def _single(node: Any) -> Any:
    builder: Any = StateGraph(State)
    builder.add_node("work", node)
    builder.add_edge(START, "work")
    return builder


waits = track_graph(_single(asks)).compile().with_config(callbacks=[handler])
greeter = track_graph(_single(greets)).compile().with_config(callbacks=[handler])
tools = track_graph(App(is_async=True).tools()).compile().with_config(callbacks=[handler])
untracked = App().tools().compile().with_config(callbacks=[handler])


def made_for_each_run(config: RunnableConfig) -> Any:
    """Build a graph with a tracker of its own, as a graph factory may."""
    return _single(greets).compile().with_config(callbacks=[SessionCallbackHandler(SessionTracker())])
