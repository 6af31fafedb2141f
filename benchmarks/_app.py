"""The apps that the benchmarks run: route, agent, tools in a third of the turns, agent; and a fan-out of eight nodes.

A user's message has 40 words, an answer 150, a tool's result 300: about as many tokens.
"""

import operator
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import StructuredTool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Send

QUESTION, ANSWER, RESULT = "word " * 40, "word " * 150, "word " * 300
USAGE = {"input_tokens": 400, "output_tokens": 150, "total_tokens": 550}
TOOL_TURN = "look: "
FAN_OUT = 8


def look_up(query: str) -> str:
    """Look something up."""
    return RESULT


async def alook_up(query: str) -> str:
    """Look something up."""
    return RESULT


LOOK_UP = StructuredTool.from_function(look_up, coroutine=alook_up)


class ScriptedModel(BaseChatModel):
    """Asks for the tool when the user's message says so, then answers; where it is streamed, word for word."""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        return {"ls_provider": "openai", "ls_model_name": "gpt-4o", "ls_model_type": "chat"}

    def _answer(self, messages: list[BaseMessage]) -> AIMessage:
        last = messages[-1]
        if isinstance(last, HumanMessage) and str(last.content).startswith(TOOL_TURN):
            call = {"name": "look_up", "args": {"query": "a"}, "id": "call-1"}
            message = AIMessage(ANSWER, tool_calls=[call], usage_metadata=USAGE)
        else:
            message = AIMessage(ANSWER, usage_metadata=USAGE)
        message.response_metadata = {"model_name": "gpt-4o"}
        return message

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._answer(messages))])

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        return self._generate(messages)

    async def _astream(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        answer = self._answer(messages)
        for word in str(answer.content).split(" "):
            yield await self._said(AIMessageChunk(f"{word} "), run_manager)
        calls = [
            {"name": call["name"], "args": '{"query": "a"}', "id": call["id"], "index": 0} for call in answer.tool_calls
        ]
        last = {"usage_metadata": USAGE, "response_metadata": answer.response_metadata, "tool_call_chunks": calls}
        yield await self._said(AIMessageChunk("", **last), run_manager)

    async def _said(self, message: AIMessageChunk, run_manager: Any) -> ChatGenerationChunk:
        chunk = ChatGenerationChunk(message=message)
        if run_manager is not None:
            await run_manager.on_llm_new_token(str(message.content), chunk=chunk)
        return chunk


def build_app(
    saver: InMemorySaver | None = None, *, is_async: bool = False, fit: Callable[..., Any] | None = None
) -> Any:
    """Compile the app; its nodes are coroutines where an event loop runs it, and it fits its window by `fit`."""
    model = ScriptedModel()

    def route(state: MessagesState) -> dict[str, Any]:
        return {}

    def agent(state: MessagesState) -> dict[str, Any]:
        messages = state["messages"]
        return {"messages": [model.invoke(messages if fit is None else fit(messages).messages)]}

    async def aroute(state: MessagesState) -> dict[str, Any]:
        return {}

    async def aagent(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    def next_step(state: MessagesState) -> str:
        return "tools" if state["messages"][-1].tool_calls else END

    builder = StateGraph(MessagesState)
    builder.add_node("route", aroute if is_async else route)
    builder.add_node("agent", aagent if is_async else agent)
    builder.add_node("tools", ToolNode([LOOK_UP]))
    builder.add_edge(START, "route")
    builder.add_edge("route", "agent")
    builder.add_conditional_edges("agent", next_step, ["tools", END])
    builder.add_edge("tools", "agent")
    return builder.compile(checkpointer=saver or InMemorySaver())


class Answers(MessagesState):
    """The state of the app that fans out."""

    found: Annotated[list[str], operator.add]


def build_parallel_app(saver: InMemorySaver | None = None) -> Any:
    """Compile an app whose first node hands over to eight that run at the same time, each with a call of the model."""
    model = ScriptedModel()

    def worker(state: dict[str, Any]) -> dict[str, Any]:
        return {"found": [str(model.invoke(state["messages"]).content)[:20]]}

    def join(state: Answers) -> dict[str, Any]:
        return {"messages": [AIMessage(ANSWER)]}

    builder = StateGraph(Answers)
    builder.add_node("route", lambda state: {})
    builder.add_node("worker", worker)
    builder.add_node("join", join)
    builder.add_edge(START, "route")
    builder.add_conditional_edges(
        "route", lambda state: [Send("worker", {"messages": state["messages"]})] * FAN_OUT, ["worker"]
    )
    builder.add_edge("worker", "join")
    builder.add_edge("join", END)
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
