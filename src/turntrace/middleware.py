"""The middleware for langchain's ``create_agent`` (extra ``langchain``)."""

from turntrace.graph.middleware import SessionMiddleware, SessionState

__all__ = ["SessionMiddleware", "SessionState"]
