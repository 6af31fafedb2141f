"""Agents and teams of them: whose step it is, and who hands over to whom."""

import asyncio
from collections.abc import Callable, Sequence
from textwrap import dedent
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.tools import tool
from langgraph import prebuilt
from langgraph.checkpoint.memory import InMemorySaver
from langgraph_supervisor import create_supervisor
from langgraph_swarm import create_handoff_tool, create_swarm

from apps import asks, config_of
from test_middleware import ToolModel
from turntrace import SessionCallbackHandler
from turntrace import attributes as a
from turntrace.middleware import SessionMiddleware
from turntrace.testing import Capture, CapturedSpan, assert_all_tagged, captured_spans

create_react_agent: Any = prebuilt.create_react_agent
ASYNC = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
pytestmark = pytest.mark.filterwarnings("ignore:.*create_react_agent has been moved")


def calls(name: str) -> Callable[[Sequence[BaseMessage]], AIMessage | str]:
    """Return what a model says that calls a tool once, and then is done."""

    def says(messages: Sequence[BaseMessage]) -> AIMessage | str:
        if any(isinstance(message, ToolMessage) and message.name == name for message in messages):
            return "Done."
        return AIMessage("", tool_calls=[{"name": name, "args": {}, "id": f"call-{name}"}])

    return says


@tool
def price_of() -> str:
    """Look up the price."""
    return "5 euros"


def words(span: CapturedSpan) -> str:
    """Return what matters of a span: its name, whose it is, and to whom it hands over."""
    told = f"{span.name} [{span.attributes.get(a.GEN_AI_AGENT_NAME, '')}]"
    to = span.attributes.get(a.TURN_HANDOFF_TO)
    return told if to is None else f"{told} -> {to}"


def tree(capture: Capture) -> str:
    spans = sorted(captured_spans(capture.spans()), key=lambda span: span.start_ns)
    turn = [span for span in spans if a.TURN_ID in span.attributes]
    assert_all_tagged(turn)
    assert not any(a.ERROR_TYPE in span.attributes for span in turn)
    lines: list[str] = []

    def write(parent_id: str | None, depth: int) -> None:
        for span in turn:
            if span.parent_id == parent_id:
                lines.append("  " * depth + words(span))
                write(span.span_id, depth + 1)

    [root] = [span for span in turn if span.name == a.SPAN_TURN]
    write(root.span_id, 0)
    return "\n".join(lines) + "\n"


def run(graph: Any, capture: Capture, *, is_async: bool) -> SessionCallbackHandler:
    handler = SessionCallbackHandler(capture.tracker())
    config = {**config_of("c1", user_id="ann"), "callbacks": [handler]}
    if is_async:
        asyncio.run(graph.ainvoke(asks(), config))
    else:
        graph.invoke(asks(), config)
    assert handler.open_runs == 0
    return handler


@ASYNC
@pytest.mark.parametrize("made_by", ["create_agent", "create_agent with middleware", "create_react_agent"])
def test_an_agents_name_is_on_all_of_its_spans(made_by: str, is_async: bool, capture: Capture) -> None:
    model = ToolModel(says=calls("price_of"))
    agent: Any
    if made_by == "create_react_agent":
        agent = create_react_agent(model, [price_of], name="seller")
    else:
        middleware: list[Any] = [SessionMiddleware()] if "middleware" in made_by else []
        agent = create_agent(model, [price_of], name="seller", middleware=middleware)
    run(agent, capture, is_async=is_async)
    node = "agent" if made_by == "create_react_agent" else "model"
    shown = "\n".join(line for line in tree(capture).splitlines() if "SessionMiddleware" not in line) + "\n"
    assert shown == dedent(f"""\
        seller [seller]
          {node} [seller]
            gpt-4o-mini [seller]
          tools [seller]
            price_of [seller]
          {node} [seller]
            gpt-4o-mini [seller]
        """)


@ASYNC
def test_a_swarm_shows_who_hands_over_to_whom(is_async: bool, capture: Capture) -> None:
    alice = create_react_agent(
        ToolModel(says=calls("transfer_to_bob")), [create_handoff_tool(agent_name="bob")], name="alice"
    )
    bob = create_react_agent(ToolModel(says=lambda _messages: "I am Bob."), [price_of], name="bob")
    swarm = create_swarm([alice, bob], default_active_agent="alice").compile(checkpointer=InMemorySaver(), name="swarm")
    handler = run(swarm, capture, is_async=is_async)
    assert tree(capture) == dedent("""\
        swarm [swarm]
          alice [swarm]
            alice [alice]
              agent [alice]
                gpt-4o-mini [alice]
              tools [alice]
                transfer_to_bob [alice] -> bob
          bob [swarm]
            bob [bob]
              agent [bob]
                gpt-4o-mini [bob]
        """)
    [session] = handler.tracker.ledger.sessions()
    [(turn, _)] = handler.tracker.ledger.turns(session.id)
    assert (turn.status, turn.error, turn.tool_calls, turn.llm_calls) == ("completed", None, 1, 2)


@ASYNC
def test_a_supervisor_shows_whom_it_asks(is_async: bool, capture: Capture) -> None:
    pricer = create_react_agent(ToolModel(says=lambda _messages: "5 euros"), [price_of], name="pricer")
    supervisor: Any = create_supervisor([pricer], model=ToolModel(says=calls("transfer_to_pricer")))
    run(supervisor.compile(name="team"), capture, is_async=is_async)
    assert tree(capture) == dedent("""\
        team [team]
          supervisor [team]
            supervisor [supervisor]
              agent [supervisor]
                gpt-4o-mini [supervisor]
              tools [supervisor]
                transfer_to_pricer [supervisor] -> pricer
          pricer [team]
            pricer [pricer]
              agent [pricer]
                gpt-4o-mini [pricer]
          supervisor [team]
            supervisor [supervisor]
              agent [supervisor]
                gpt-4o-mini [supervisor]
        """)


@ASYNC
def test_an_agent_as_a_tool_is_below_the_call_of_it(is_async: bool, capture: Capture) -> None:
    pricer: Any = create_agent(ToolModel(says=lambda _messages: "5 euros"), [], name="pricer")

    @tool
    def ask_pricer() -> str:
        """Ask the one who knows the prices."""
        return str(pricer.invoke(asks())["messages"][-1].content)

    async def aask_pricer() -> str:
        return str((await pricer.ainvoke(asks()))["messages"][-1].content)

    if is_async:
        ask_pricer.coroutine = aask_pricer
    boss: Any = create_agent(ToolModel(says=calls("ask_pricer")), [ask_pricer], name="boss")
    run(boss, capture, is_async=is_async)
    assert dedent("""\
          tools [boss]
            ask_pricer [boss]
              pricer [pricer]
                model [pricer]
                  gpt-4o-mini [pricer]
        """) in dedent(tree(capture).replace("boss [boss]\n", "", 1))
