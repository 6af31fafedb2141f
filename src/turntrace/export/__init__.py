"""Spans and scores to Langfuse."""

from turntrace.export.client import SpanTarget, ids_of, open_target
from turntrace.export.delivery import Delivered
from turntrace.export.encode import EndedSpan, from_otlp, to_otlp
from turntrace.export.scores import Score, read_score, scores_of, session_score, trace_score, write_score
from turntrace.export.sender import Pace, Sender, Sent
from turntrace.export.server import Answer, LangfuseServer, Outcome

__all__ = [
    "Answer",
    "Delivered",
    "EndedSpan",
    "LangfuseServer",
    "Outcome",
    "Pace",
    "Score",
    "Sender",
    "Sent",
    "SpanTarget",
    "from_otlp",
    "ids_of",
    "open_target",
    "read_score",
    "scores_of",
    "session_score",
    "to_otlp",
    "trace_score",
    "write_score",
]
