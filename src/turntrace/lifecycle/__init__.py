"""The life of sessions, conversations and turns."""

from turntrace.lifecycle.session import Conversation, Session
from turntrace.lifecycle.tracker import SessionTracker, default_tracker
from turntrace.lifecycle.turn import Turn, current_turn

__all__ = ["Conversation", "Session", "SessionTracker", "Turn", "current_turn", "default_tracker"]
