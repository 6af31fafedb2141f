"""A support desk as an app with turntrace: three users, five sessions, sync and async.

Its graph has tools, a parallel step, a refund that a person must approve, and a small window for the model. It is what
`turntrace demo` runs, and an example to read. It needs no key, no server and no network.
"""

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any, Final, cast

from langchain_core.messages import SystemMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, interrupt

from turntrace.context import ContextTracker
from turntrace.demo.desk_model import DeskModel, count_tokens
from turntrace.demo.desk_script import INVOICES, LATE_ORDER, PASSWORD, REFUND, SHIPPING, Exchange
from turntrace.graph import ConversationState, SessionCallbackHandler, track_graph
from turntrace.identity import new_id
from turntrace.lifecycle import Session, SessionTracker, Turn, current_turn

SHOWN: Final = 1
"""Which of the sessions that `run` returns is the one to look at: with an approval, a failing tool, a pruning."""

JOURNEY: Final = "order_help"
"""The journey of a user with a question about an order, and its stages."""

STAGES: Final = ("asked", "looked_up", "refunded")

_LOOK_UP_S: Final = 0.02
_APPROVAL_S: Final = 1.2
"""How long the person thinks who is asked for a refund."""
_WINDOW_TOKENS: Final = 350
"""What the desk gives the model at most: so little that a conversation of eight turns has to be pruned."""
_INTENTS: Final = {"refund": "refund", "money": "refund", "order": "order", "ship": "shipping", "sign in": "account"}
_INSTRUCTIONS: Final = "You help the customers of a shop. Be brief, be friendly, and look things up before you answer."

Graph = CompiledStateGraph[Any, Any, Any, Any]


class DeskState(ConversationState):
    """State of the support desk: what turntrace adds, and two fields of its own."""

    account: str
    article: str


class Payments:
    """The payment service, which fails the first time that it is asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = 0

    def refund(self, order: str, amount: float) -> str:
        """Send money back.

        Raises:
            ConnectionError: The first time.
        """
        with self._lock:
            self._asked += 1
            first = self._asked == 1
        time.sleep(_LOOK_UP_S)
        if first:
            raise ConnectionError("the payment service did not answer")
        return f"sent {amount:.2f} back for order {order}"


def build(model: DeskModel, payments: Payments) -> Graph:
    """Build the graph: triage, then two look-ups side by side, then the agent with its tools."""
    approved: set[str] = set()

    @tool
    def order_status(order: str) -> str:
        """Tell where an order is."""
        time.sleep(_LOOK_UP_S)
        current_turn().journey(JOURNEY).enter("looked_up")
        return f"order {order} is on its way"

    @tool
    def refund(order: str, amount: float) -> str:
        """Send the money for an order back, once a person has approved it."""
        if order not in approved:
            if interrupt({"refund": amount, "order": order}) != "yes":
                return "not approved"
            approved.add(order)
        receipt = payments.refund(order, amount)
        current_turn().journey(JOURNEY).enter("refunded")
        return receipt

    builder = StateGraph(DeskState)
    builder.add_node("triage", _triage)
    builder.add_node("account", _account)
    builder.add_node("knowledge", _knowledge)
    builder.add_node("agent", _agent(model))
    builder.add_node("tools", ToolNode([order_status, refund], handle_tool_errors=True))
    builder.add_edge(START, "triage")
    builder.add_edge("triage", "account")
    builder.add_edge("triage", "knowledge")
    builder.add_edge(["account", "knowledge"], "agent")
    builder.add_conditional_edges("agent", tools_condition)
    builder.add_edge("tools", "agent")
    return track_graph(builder).compile(checkpointer=InMemorySaver(), name="support_desk")


def _triage(state: DeskState) -> dict[str, Any]:
    text = str(state["messages"][-1].content).lower()
    turn = current_turn()
    turn.set_intent(next((intent for word, intent in _INTENTS.items() if word in text), "other"))
    if "order" in text:
        turn.journey(JOURNEY, STAGES).enter("asked")
    return {}


def _account(state: DeskState) -> dict[str, Any]:
    time.sleep(_LOOK_UP_S)
    return {"account": "in good standing"}


def _knowledge(state: DeskState) -> dict[str, Any]:
    time.sleep(2 * _LOOK_UP_S)
    return {"article": "Refunds take two to three days."}


def _agent(model: DeskModel) -> RunnableLambda[Any, Any]:
    context = ContextTracker(model.model, limit=_WINDOW_TOKENS, counter=count_tokens)

    def prompt(state: DeskState) -> list[Any]:
        return [SystemMessage(f"{_INSTRUCTIONS} Account: {state['account']}. {state['article']}"), *state["messages"]]

    def agent(state: DeskState) -> dict[str, Any]:
        window = context.fit(prompt(state))
        return {"messages": [model.invoke(window.messages)]}

    async def aagent(state: DeskState) -> dict[str, Any]:
        window = await context.afit(prompt(state))
        return {"messages": [await model.ainvoke(window.messages)]}

    return RunnableLambda(agent, aagent, name="agent")


def run(tracker: SessionTracker) -> list[str]:
    """Run the support desk for three users.

    Args:
        tracker: What tracks it.

    Returns:
        The ids of its five sessions; the second goes on with the conversation of the first.
    """
    graph = build(DeskModel(), Payments())
    alice = "alice@demo.example"

    with tracker.session(user_id=alice, channel="web", tier="premium", locale="en-GB") as first:
        late_order = first.conversation(topic="late_order").id
        _talk(graph, first, late_order, LATE_ORDER)

    second = tracker.start_session(user_id=alice, channel="mobile", tier="premium", locale="en-GB")
    _talk(graph, second, late_order, REFUND)
    second.journey(JOURNEY).convert()
    second.feedback(True)
    second.end("completed")

    others = asyncio.run(_others(graph, tracker))
    tracker.flush()
    return [first.id, second.id, *others]


def _talk(graph: Graph, session: Session, conversation_id: str, script: Sequence[Exchange]) -> None:
    conversation = session.conversation(conversation_id, topic="late_order")
    for said, _ in script:
        with conversation.turn(said) as turn:
            _stream(graph, turn, turn.input)
        if graph.get_state(cast(Any, turn.config)).next:  # it waits for a person, who comes a little later
            time.sleep(_APPROVAL_S)
            with conversation.resume_turn() as turn:
                _stream(graph, turn, Command(resume="yes"))


def _stream(graph: Graph, turn: Turn, given: Any) -> None:
    for _ in graph.stream(given, cast(Any, turn.config), stream_mode="messages"):
        pass  # an app would show each token here


async def _others(graph: Graph, tracker: SessionTracker) -> list[str]:
    """Serve two more users at the same time, in one event loop."""
    bob = "bob@demo.example"
    shipping, invoices, password = await asyncio.gather(
        _atalk(graph, tracker, SHIPPING, user_id=bob, channel="web", tier="free"),
        _by_callback(graph, tracker, INVOICES, user_id="carol@demo.example", channel="api", tier="enterprise"),
        _atalk(graph, tracker, PASSWORD, user_id=bob, channel="mobile", tier="free"),
    )
    return [shipping, invoices, password]


async def _atalk(graph: Graph, tracker: SessionTracker, script: Sequence[Exchange], **user: Any) -> str:
    topic = "account" if script is PASSWORD else "shipping"
    session = await tracker.astart_session(**user)
    conversation = session.conversation(topic=topic)
    try:
        for said, _ in script:
            async with conversation.turn(said) as turn:
                await graph.ainvoke(turn.input, cast(Any, turn.config))
    except TimeoutError:  # the provider's: the turn has failed, and the user says nothing more
        session.end("inactive_timeout")  # a demo does not wait for the half hour after which the silence ends it
    else:
        session.feedback(False, comment="not answered")
        session.end()
    return session.id


async def _by_callback(graph: Graph, tracker: SessionTracker, script: Sequence[Exchange], **user: Any) -> str:
    """Talk with nothing but the callback: it finds the session of the user, or begins one."""
    config: Any = {
        "configurable": {"thread_id": new_id()},
        "metadata": {"org_id": "initech", "topic": "invoices", **user},
        "callbacks": [SessionCallbackHandler(tracker)],
    }
    state: dict[str, Any] = {}
    for said, _ in script:
        state = await graph.ainvoke({"messages": [("user", said)]}, config)
    session_id = str(state["session_id"])
    tracker.end_session(session_id, "handoff")
    return session_id
