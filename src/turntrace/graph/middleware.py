"""The middleware for langchain's ``create_agent``: the state of a conversation, and its model's window."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NotRequired, TypeAlias

try:
    from langchain.agents import middleware as langchain_middleware
    from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
except ImportError as error:
    raise ImportError(
        "turntrace.middleware is for langchain's create_agent, and langchain is not installed. "
        "Install it: pip install 'turntrace[langchain]'."
    ) from error

from langchain_core.messages import BaseMessage, SystemMessage
from langgraph.types import Command

from turntrace.context import ContextTracker, Window
from turntrace.errors import ConfigurationError
from turntrace.graph.state import CONTEXT_FIELD, ids_of_turn, latest
from turntrace.lifecycle import current_turn

Request: TypeAlias = "ModelRequest[Any]"  # older versions of langchain cannot subscript it

# Newer versions of langchain take a state update beside the model's answer.
_Extended: Any = getattr(langchain_middleware, "ExtendedModelResponse", None)


class SessionState(AgentState[Any]):
    """State of an agent whose turns are tracked: langchain's own, with the fields of `turntrace.ConversationState`."""

    session_id: NotRequired[Annotated[str, latest]]
    conversation_id: NotRequired[Annotated[str, latest]]
    turn_id: NotRequired[Annotated[str, latest]]
    turn_number: NotRequired[Annotated[int, latest]]
    context_tokens: NotRequired[Annotated[int, latest]]


class SessionMiddleware(AgentMiddleware[SessionState, Any]):
    """Brings the ids of the turn into an agent's state, and fits what its model is given.

    ::

        agent = create_agent(
            model, tools, middleware=[SessionMiddleware(ContextTracker(model="gpt-4o"))], checkpointer=saver
        ).with_config(callbacks=[SessionCallbackHandler()])

    The callback tracks the turns; the middleware works without it, too, and then records nothing. The system prompt and
    the tools that the model is given are counted with the messages.

    Args:
        context: Fits the messages of each call of the model. Default: none; then only the ids are brought.
        lasting: Whether what is pruned is taken out of the state, too. Default: only what the model is given is pruned.

    Raises:
        ConfigurationError: If the context is none, or lasting pruning needs a newer langchain.
    """

    state_schema = SessionState

    def __init__(self, context: ContextTracker | None = None, *, lasting: bool = False) -> None:
        super().__init__()
        if context is not None and not isinstance(context, ContextTracker):
            raise ConfigurationError(
                f"SessionMiddleware takes a ContextTracker and got a {type(context).__name__}: "
                "SessionMiddleware(ContextTracker(model='gpt-4o'))."
            )
        if lasting and _Extended is None:
            raise ConfigurationError(
                "lasting=True needs a langchain whose middleware can update the state beside the model's answer. "
                "Upgrade it (pip install -U langchain), or leave lasting out."
            )
        self.context = context
        self.lasting = lasting

    def before_agent(self, state: SessionState, runtime: Any) -> dict[str, Any] | None:
        """Bring the ids of the turn into the state."""
        turn = current_turn()
        return ids_of_turn(turn) if turn and state.get("turn_id") != turn.id else None

    async def abefore_agent(self, state: SessionState, runtime: Any) -> dict[str, Any] | None:
        """Bring the ids of the turn into the state."""
        return self.before_agent(state, runtime)

    def wrap_model_call(self, request: Request, handler: Callable[[Request], Any]) -> Any:
        """Call the model with what fits into its window."""
        if self.context is None:
            return handler(request)
        window = self.context.fit(_messages_of(request), tools=request.tools)
        return self._answered(handler(_with_window(request, window)), window)

    async def awrap_model_call(self, request: Request, handler: Callable[[Request], Awaitable[Any]]) -> Any:
        """Call the model with what fits into its window."""
        if self.context is None:
            return await handler(request)
        window = await self.context.afit(_messages_of(request), tools=request.tools)
        return self._answered(await handler(_with_window(request, window)), window)

    def _answered(self, response: Any, window: Window) -> Any:
        if _Extended is None or not isinstance(response, ModelResponse):
            return response
        update: dict[str, Any] = {CONTEXT_FIELD: window.tokens}
        if self.lasting and window.update:
            update["messages"] = window.update
        return _Extended(model_response=response, command=Command(update=update))


def _system_of(request: Request) -> SystemMessage | None:
    message = getattr(request, "system_message", None)
    if message is None and request.system_prompt:
        message = SystemMessage(request.system_prompt)  # as langchain 1.0 has it
    return message


def _messages_of(request: Request) -> list[BaseMessage]:
    system = _system_of(request)
    return [*([] if system is None else [system]), *request.messages]


def _with_window(request: Request, window: Window) -> Request:
    if not window.decision.pruned:
        return request
    first = 0 if _system_of(request) is None else 1  # it stays, and stays first
    messages: Any = window.messages[first:]
    return request.override(messages=messages)
