"""Session, conversation and turn tracking for LangGraph agents in Langfuse."""

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


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("turntrace")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
