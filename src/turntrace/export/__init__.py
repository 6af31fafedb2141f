"""Spans and scores to Langfuse."""

from turntrace.export.client import SpanTarget, ids_of, open_target
from turntrace.export.encode import from_otlp, to_otlp
from turntrace.export.scores import SCORE_KIND, scores_of, session_score, trace_score

__all__ = [
    "SCORE_KIND",
    "SpanTarget",
    "from_otlp",
    "ids_of",
    "open_target",
    "scores_of",
    "session_score",
    "to_otlp",
    "trace_score",
]
