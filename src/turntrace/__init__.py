"""Session, conversation and turn tracking for LangGraph agents in Langfuse."""

from turntrace.content import ContentPolicy
from turntrace.context import ContextTracker
from turntrace.decisions import PruningDecision
from turntrace.errors import TurntraceError
from turntrace.graph import ConversationState, SessionCallbackHandler, track_graph, track_node
from turntrace.lifecycle import Conversation, Session, SessionTracker, Turn, current_turn
from turntrace.records import SessionSummary

__all__ = [
    "ContentPolicy",
    "ContextTracker",
    "Conversation",
    "ConversationState",
    "PruningDecision",
    "Session",
    "SessionCallbackHandler",
    "SessionSummary",
    "SessionTracker",
    "Turn",
    "TurntraceError",
    "current_turn",
    "track_graph",
    "track_node",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("turntrace")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
