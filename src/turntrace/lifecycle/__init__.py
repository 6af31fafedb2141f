"""The life of sessions, conversations and turns."""

from turntrace.lifecycle.default import default_tracker
from turntrace.lifecycle.here import current_turn
from turntrace.lifecycle.journey import Journey
from turntrace.lifecycle.session import Conversation, Session
from turntrace.lifecycle.tracker import SessionTracker
from turntrace.lifecycle.turn import Turn

__all__ = ["Conversation", "Journey", "Session", "SessionTracker", "Turn", "current_turn", "default_tracker"]
