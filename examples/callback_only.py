"""One callback, and nothing else: the graph stays as it is, and its sessions are tracked.

Run it alone: ``python examples/callback_only.py``. It needs no server and no keys.
"""

import asyncio

from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from turntrace import SessionCallbackHandler, SessionTracker

model = FakeListChatModel(responses=["Hello! How can I help?", "Your parcel arrives on Friday.", "You are welcome."])


async def agent(state: MessagesState) -> dict:
    """Answer with the model."""
    return {"messages": [await model.ainvoke(state["messages"])]}


async def main() -> None:
    """Let one user say three things, and look at the sitting."""
    tracker = SessionTracker("sqlite://")  # in memory, for the example; leave it out for a ledger that stays
    graph = (
        StateGraph(MessagesState)
        .add_node("agent", agent)
        .add_edge(START, "agent")
        .compile(checkpointer=InMemorySaver())
        .with_config(callbacks=[SessionCallbackHandler(tracker)])
    )
    config = {"configurable": {"thread_id": "parcel"}, "metadata": {"user_id": "ann@example.com", "channel": "web"}}
    for text in ("Hi", "Where is my parcel?", "Thanks!"):
        result = await graph.ainvoke({"messages": [("user", text)]}, config)
        print(f"user: {text}\nagent: {result['messages'][-1].content}")

    for session in tracker.ledger.sessions():
        print(f"\nsession {session.id} of user {str(session.user_id)[:12]}: {session.total_turns} turns")
        for turn, steps in tracker.ledger.turns(session.id):
            print(f"  turn {turn.number}: {turn.input_type} -> {turn.output_type}, {len(steps)} steps")


if __name__ == "__main__":
    asyncio.run(main())
