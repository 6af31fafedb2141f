"""How an app uses turntrace, as type checkers see it: mypy by `make types`, pyright by `make types-elsewhere`.

Nothing here is run. What a checker says about this file, it would say about an app's.
"""

from typing import Any, assert_type

from langchain_core.messages import AIMessage, BaseMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph

from turntrace import (
    ContentPolicy,
    ContextTracker,
    Conversation,
    ConversationState,
    Journey,
    PruningDecision,
    Session,
    SessionCallbackHandler,
    SessionSummary,
    SessionTracker,
    Turn,
    UserSummary,
    current_turn,
    track_graph,
    track_node,
)
from turntrace.analytics import Filters, Totals, totals
from turntrace.context import Chain, ClearToolResults, DropOldestTurns
from turntrace.ledger import Ledger


class State(ConversationState):
    intent: str


def agent(state: State) -> dict[str, Any]:
    turn = current_turn()
    turn.set_intent("greet")
    assert_type(state["intent"], str)
    return {"messages": [AIMessage("Hi")], "intent": "greet"}


def app(tracker: SessionTracker) -> None:
    builder = StateGraph(State)
    builder.add_node("agent", track_node(agent))
    builder.add_edge(START, "agent")
    tracked = track_graph(builder)
    handler = SessionCallbackHandler(tracker, messages_key="messages", intent_key="intent")
    tracked.compile(checkpointer=InMemorySaver()).with_config(callbacks=[handler])


def by_hand() -> None:
    tracker = SessionTracker(
        "sqlite://",
        content=ContentPolicy("turn", redact=str.lower),
        idle_after=600,
        journeys={"help": ["asked", "done"]},
    )
    with tracker.session(user_id="ann", channel="web") as session:
        assert_type(session, Session)
        conversation = session.conversation("c-1", topic="help")
        assert_type(conversation, Conversation)
        with conversation.turn("Hi") as turn:
            assert_type(turn, Turn)
            assert_type(turn.number, int)
            turn.set_answer("Hello")
            turn.feedback(True)
        journey = session.journey("help")
        assert_type(journey, Journey)
        journey.enter("asked")
    assert_type(session.summary(), SessionSummary)
    assert_type(tracker.user_summary("ann"), UserSummary | None)
    assert_type(tracker.ledger, Ledger)
    assert_type(totals(tracker.ledger, Filters(channel="web", since="7d")), Totals)


async def by_hand_async(tracker: SessionTracker) -> None:
    async with tracker.session(user_id="ann") as session, session.conversation("c-1").turn("Hi") as turn:
        assert_type(session, Session)
        assert_type(turn, Turn)
    assert_type(await session.asummary(), SessionSummary)


def windows(messages: list[BaseMessage]) -> None:
    context = ContextTracker(model="gpt-4o", threshold=0.8, strategy=Chain(ClearToolResults(keep=3), DropOldestTurns()))
    window = context.fit(messages)
    assert_type(window.tokens, int)
    assert_type(window.decision, PruningDecision)
