"""The graph that plays a recorded conversation: a model and tools that return what was recorded."""

from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage, ToolCall
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import BaseTool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Send
from pydantic import BaseModel
from tiktoken.model import encoding_name_for_model

from turntrace.context import ContextTracker, encoding_for_model
from turntrace.demo.json_lines import arguments_of
from turntrace.demo.recording import Content, Exchange, RecordedReply, Transcript
from turntrace.demo.tokens import TokenCount
from turntrace.graph import ConversationState, track_graph


class Script:
    """Where the play of a recorded conversation stands: which reply comes next, which results its calls have."""

    def __init__(self) -> None:
        self._exchange = Exchange()
        self._next = 0

    def begin(self, exchange: Exchange) -> dict[str, Any]:
        """Begin an exchange, and return the input for the graph."""
        self._exchange, self._next = exchange, 0
        return {"messages": exchange.input}

    @property
    def has_reply(self) -> bool:
        """Whether the exchange has another reply."""
        return self._next < len(self._exchange.replies)

    def reply(self) -> RecordedReply:
        """Return the next reply."""
        self._next += 1
        return self._exchange.replies[self._next - 1]

    def result(self, call_id: str) -> Content | None:
        """Return the result of a call of the latest reply; None when the recording has none."""
        calls = self._exchange.replies[self._next - 1].calls
        return next(call.result for call in calls if call.id == call_id)


class RecordedModel(BaseChatModel):
    """A chat model that answers what was recorded.

    Attributes:
        model: Name of the model that was recorded.
        script: Where the play stands.
        count: Counts tokens where the recording has none.
    """

    model: str
    script: Any
    count: Any

    @property
    def _llm_type(self) -> str:
        return "recorded"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params.pop("ls_provider", None)  # else it would be made of the name of this class
        return LangSmithParams(ls_provider="openai", **params) if _is_of_openai(self.model) else params

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        given = self.count.of_prompt(messages)
        reply = self.script.reply()
        message = _message(reply, reply.usage or _usage(given, self.count.of_reply(reply)))
        message.response_metadata["model_name"] = self.model
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._generate(messages, stop, None, **kwargs)


class _Call(BaseModel):
    """What a recorded tool is given: the arguments in one, since their names could be any."""

    call_id: str
    arguments: dict[str, Any]


class RecordedTool(BaseTool):
    """A tool that returns what was recorded for the call of that id.

    Attributes:
        script: Where the play stands.
    """

    description: str = "Returns what was recorded."
    args_schema: Any = _Call
    script: Any

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the tool for a call of a model."""
        return super().invoke(_with_id(input), config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the tool for a call of a model, in an event loop."""
        return await super().ainvoke(_with_id(input), config, **kwargs)

    def _run(self, call_id: str, arguments: dict[str, Any]) -> Content | None:
        result: Content | None = self.script.result(call_id)
        return result

    async def _arun(self, call_id: str, arguments: dict[str, Any]) -> Content | None:
        return self._run(call_id, arguments)


class ReplayState(ConversationState):
    """State of the graph that plays a recording."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a conversation is played on.

    Attributes:
        script: Where the play stands.
        graph: The graph, compiled, with a checkpointer of its own.
    """

    script: Script
    graph: CompiledStateGraph[Any, Any, Any, Any]


def stage_for(transcript: Transcript, context: ContextTracker | None = None) -> Stage:
    """Build the graph for a recorded conversation. Calls of tools whose results the recording lacks are not made.

    Args:
        transcript: The conversation.
        context: Fits what the model is given; without it the model is given the whole history, as it was recorded.
    """
    script = Script()
    model = RecordedModel(model=transcript.model, script=script, count=TokenCount(encoding_for_model(transcript.model)))
    tools = [RecordedTool(name=name, script=script) for name in dict.fromkeys(call.name for call in transcript.calls)]

    def agent(state: ReplayState) -> dict[str, Any]:
        given = state["messages"] if context is None else context.fit(state["messages"]).messages
        return _update(model.invoke(given))

    async def aagent(state: ReplayState) -> dict[str, Any]:
        given = state["messages"] if context is None else (await context.afit(state["messages"])).messages
        return _update(await model.ainvoke(given))

    def after_agent(state: ReplayState) -> str | Send:
        calls = state["messages"][-1].tool_calls  # type: ignore[union-attr]
        answered = [call for call in calls if script.result(str(call["id"])) is not None]
        if answered:
            return "tools" if len(answered) == len(calls) else Send("tools", answered)
        return more(state)

    def more(_: ReplayState) -> str:
        return "agent" if script.has_reply else END

    builder = StateGraph(ReplayState)
    builder.add_node("agent", RunnableLambda(agent, aagent, name="agent"))
    builder.add_conditional_edges(START, more, ["agent", END])
    builder.add_node("tools", ToolNode(tools))
    builder.add_conditional_edges("agent", after_agent, ["tools", "agent", END])
    builder.add_conditional_edges("tools", more, ["agent", END])
    return Stage(script=script, graph=track_graph(builder).compile(checkpointer=InMemorySaver()))


def _message(reply: RecordedReply, usage: UsageMetadata) -> AIMessage:
    asked = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in reply.calls
    ]
    extra: dict[str, Any] = {"tool_calls": asked} if asked else {}  # as written, for counting
    if reply.refusal:
        extra["refusal"] = reply.content
    return AIMessage(
        content=reply.content,
        name=reply.name,
        additional_kwargs=extra,
        tool_calls=[ToolCall(name=c.name, args=arguments_of(c.arguments), id=c.id) for c in reply.calls],
        usage_metadata=usage,
    )


def _usage(given: int, made: int) -> UsageMetadata:
    return UsageMetadata(input_tokens=given, output_tokens=made, total_tokens=given + made)


def _update(reply: BaseMessage) -> dict[str, Any]:
    tokens = reply.usage_metadata["input_tokens"] if isinstance(reply, AIMessage) and reply.usage_metadata else 0
    return {"messages": [reply], "context_tokens": tokens}


def _with_id(call: Any) -> Any:
    return {**call, "args": {"call_id": call["id"], "arguments": call["args"]}}


def _is_of_openai(model: str) -> bool:
    try:
        encoding_name_for_model(model)
    except KeyError:
        return False
    return True
