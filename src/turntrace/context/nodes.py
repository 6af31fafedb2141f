"""The ready-made ways to fit the messages of a graph: a node before the agent, the hook of ``create_react_agent``."""

from collections.abc import Mapping
from typing import Any

from langchain_core.runnables import Runnable, RunnableLambda

from turntrace.context.tracker import ContextTracker, Window
from turntrace.errors import ConfigurationError


def context_node(tracker: ContextTracker, *, messages_key: str = "messages") -> Runnable[Any, dict[str, Any]]:
    """Make a node to put before the agent: it fits the state's messages, and the pruning lasts.

    ::

        builder.add_node("context", context_node(ContextTracker(model="gpt-4o")))
        builder.add_edge("context", "agent")

    Args:
        tracker: What fits the messages.
        messages_key: Key of the state that holds them; its reducer must be LangGraph's ``add_messages``.

    Returns:
        A node for sync and async graphs: from the state to the messages to remove, and ``context_tokens``.
    """

    def update(window: Window) -> dict[str, Any]:
        told: dict[str, Any] = {"context_tokens": window.tokens}
        return {**told, messages_key: window.update} if window.update else told

    return _runnable(tracker, messages_key, update, "context_node")


def pre_model_hook(tracker: ContextTracker, *, messages_key: str = "messages") -> Runnable[Any, dict[str, Any]]:
    """Make the ``pre_model_hook`` of LangGraph's ``create_react_agent``: the model is given what fits.

    The state keeps all messages::

        create_react_agent(model, tools, pre_model_hook=pre_model_hook(ContextTracker(model="gpt-4o")))

    Args:
        tracker: What fits the messages.
        messages_key: Key of the state that holds them.
    """

    def update(window: Window) -> dict[str, Any]:
        return {"llm_input_messages": window.messages, "context_tokens": window.tokens}

    return _runnable(tracker, messages_key, update, "pre_model_hook")


def _runnable(tracker: Any, key: str, update: Any, name: str) -> Runnable[Any, dict[str, Any]]:
    if not isinstance(tracker, ContextTracker):
        raise ConfigurationError(
            f"{name} takes a ContextTracker and got a {type(tracker).__name__}: {name}(ContextTracker(model='gpt-4o'))."
        )

    def fit(state: Any) -> dict[str, Any]:
        told: dict[str, Any] = update(tracker.fit(_messages_of(state, key)))
        return told

    async def afit(state: Any) -> dict[str, Any]:
        told: dict[str, Any] = update(await tracker.afit(_messages_of(state, key)))
        return told

    return RunnableLambda(fit, afit, name=name)


def _messages_of(state: Any, key: str) -> Any:
    found = state.get(key) if isinstance(state, Mapping) else getattr(state, key, None)
    if found is None:
        raise ConfigurationError(
            f"The state has no {key!r} to fit. Allowed is a key with messages: messages_key='messages', say."
        )
    return found
