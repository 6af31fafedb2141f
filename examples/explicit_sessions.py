"""Sessions by hand: the app knows when a sitting begins and ends, and what it is about.

Run it alone: ``python examples/explicit_sessions.py``. It needs no server and no keys.
"""

from langchain_core.messages import AIMessage
from langgraph.graph import START, StateGraph

from turntrace import ConversationState, SessionTracker, current_turn, track_graph


class State(ConversationState):
    """What the graph works on; the ids of session, conversation and turn come with `ConversationState`."""

    clause: int


def find_clause(state: State) -> dict:
    """Find the clause that the user asks for."""
    current_turn().set_intent("explain_clause")
    return {"clause": 4}


def explain(state: State) -> dict:
    """Explain it."""
    return {"messages": [AIMessage(f"Clause {state['clause']} says who pays. (This is turn {state['turn_number']}.)")]}


builder = StateGraph(State).add_node("find_clause", find_clause).add_node("explain", explain)
graph = track_graph(builder.add_edge(START, "find_clause").add_edge("find_clause", "explain")).compile()


def main() -> None:
    """Ask two questions in one sitting, and read its totals."""
    tracker = SessionTracker("sqlite://")
    with tracker.session(user_id="alice@example.com", channel="web", tier="premium") as session:
        conversation = session.conversation(topic="document_analysis")
        for text in ("What does clause 4 say?", "And who pays?"):
            with conversation.turn(text) as turn:
                result = graph.invoke(turn.input)  # no callback, no config: inside the block it joins the turn
            print(result["messages"][-1].content)

    summary = session.summary()
    print(f"{summary.total_turns} turns in {summary.duration_ms} ms, ended by {summary.end_reason}")


if __name__ == "__main__":
    main()
