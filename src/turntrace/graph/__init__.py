"""Everything that touches LangGraph and LangChain."""

from turntrace.graph.callback import SessionCallbackHandler
from turntrace.graph.nodes import track_graph, track_node
from turntrace.graph.state import ConversationState

__all__ = ["ConversationState", "SessionCallbackHandler", "track_graph", "track_node"]
