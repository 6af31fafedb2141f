"""The app that the benchmarks run: route, agent, tools in a third of the turns, agent.

A user's message has 40 words, an answer 150, a tool's result 300: about as many tokens.
"""

from collections.abc import Iterator
from typing import Any

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

QUESTION, ANSWER, RESULT = "word " * 40, "word " * 150, "word " * 300
USAGE = {"input_tokens": 400, "output_tokens": 150, "total_tokens": 550}
TOOL_TURN = "look: "


@tool
def look_up(query: str) -> str:
    """Look something up."""
    return RESULT


class ScriptedModel(BaseChatModel):
    """Asks for the tool when the user's message says so, then answers."""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        return {"ls_provider": "openai", "ls_model_name": "gpt-4o", "ls_model_type": "chat"}

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        last = messages[-1]
        if isinstance(last, HumanMessage) and str(last.content).startswith(TOOL_TURN):
            call = {"name": "look_up", "args": {"query": "a"}, "id": "call-1"}
            message = AIMessage(ANSWER, tool_calls=[call], usage_metadata=USAGE)
        else:
            message = AIMessage(ANSWER, usage_metadata=USAGE)
        message.response_metadata = {"model_name": "gpt-4o"}
        return ChatResult(generations=[ChatGeneration(message=message)])


def build_app(saver: InMemorySaver | None = None) -> Any:
    """Compile the app."""
    model = ScriptedModel()

    def route(state: MessagesState) -> dict[str, Any]:
        return {}

    def agent(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    def next_step(state: MessagesState) -> str:
        return "tools" if state["messages"][-1].tool_calls else END

    builder = StateGraph(MessagesState)
    builder.add_node("route", route)
    builder.add_node("agent", agent)
    builder.add_node("tools", ToolNode([look_up]))
    builder.add_edge(START, "route")
    builder.add_edge("route", "agent")
    builder.add_conditional_edges("agent", next_step, ["tools", END])
    builder.add_edge("tools", "agent")
    return builder.compile(checkpointer=saver or InMemorySaver())


def question(number: int) -> str:
    """Return what the user says in the turn of this number: every third calls the tool."""
    return (TOOL_TURN if number % 3 == 0 else "") + QUESTION


def history(turns: int, system_words: int = 0) -> Iterator[BaseMessage]:
    """Yield a system prompt of so many words, if any, and the messages of the turns before."""
    if system_words:
        yield SystemMessage("word " * system_words)
    for number in range(1, turns + 1):
        yield HumanMessage(question(number))
        if number % 3 == 0:
            call = {"name": "look_up", "args": {"query": "a"}, "id": f"call-{number}"}
            yield AIMessage(ANSWER, tool_calls=[call])
            yield ToolMessage(RESULT, tool_call_id=f"call-{number}")
        yield AIMessage(ANSWER)
