"""Session, conversation and turn tracking for LangGraph agents in Langfuse."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turntrace.content import ContentPolicy
    from turntrace.context import ContextTracker
    from turntrace.decisions import PruningDecision
    from turntrace.errors import TurntraceError
    from turntrace.graph import ConversationState, SessionCallbackHandler, track_graph, track_node
    from turntrace.lifecycle import Conversation, Journey, Session, SessionTracker, Turn, current_turn
    from turntrace.summaries import SessionSummary, UserSummary

__all__ = [
    "ContentPolicy",
    "ContextTracker",
    "Conversation",
    "ConversationState",
    "Journey",
    "PruningDecision",
    "Session",
    "SessionCallbackHandler",
    "SessionSummary",
    "SessionTracker",
    "Turn",
    "TurntraceError",
    "UserSummary",
    "current_turn",
    "track_graph",
    "track_node",
]

_PLACES = ("content", "context", "decisions", "errors", "lifecycle", "summaries", "graph")
_ROOMS = (*_PLACES, "analytics", "attributes", "export", "identity", "ledger", "records", "settings")


def __getattr__(name: str) -> Any:
    """Load what is asked for: the command line, which asks for none of it, does without LangGraph."""
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("turntrace")
    if name in _ROOMS:
        return import_module(f"turntrace.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("turntrace.graph")  # whoever has a tracker is to have its callback
    for place in _PLACES:
        module = import_module(f"turntrace.{place}")
        globals().update({each: getattr(module, each) for each in __all__ if hasattr(module, each)})
    return globals()[name]


def __dir__() -> list[str]:
    return [*(name for name in globals() if name.startswith("__")), *__all__, "__version__"]
