"""Scores as Langfuse takes them: one JSON object each, under an id that derives from what it is about.

Sending one again overwrites it. A score has exactly one subject: a session, or the trace of a turn.
"""

import json
from typing import Any, Final

from turntrace import attributes as a
from turntrace.content import to_json
from turntrace.identity import derived_id
from turntrace.summaries import SessionSummary

SCORE_PRUNINGS: Final = "context.prunings"
"""Name of the session score for how often something was pruned."""

Value = str | bool | int | float


Score = dict[str, Any]


def session_score(session_id: str, name: str, value: Value, *, comment: str | None = None) -> Score:
    """Return a score of a session.

    Args:
        session_id: The session.
        name: Name of the score, which is the name of its column in Langfuse's Sessions list.
        value: A bool, a number, or a word of a few.
        comment: What is to be said with it.
    """
    return _score({"sessionId": session_id}, session_id, name, value, comment)


def trace_score(trace_id: str, turn_id: str, name: str, value: Value, *, comment: str | None = None) -> Score:
    """Return a score of a turn's trace.

    Args:
        trace_id: Id of the trace, 32 hexadecimal digits.
        turn_id: The turn.
        name: Name of the score.
        value: A bool, a number, or a word of a few.
        comment: What is to be said with it.
    """
    return _score({"traceId": trace_id}, turn_id, name, value, comment)


def write_score(score: Score, *, environment: str | None = None) -> bytes:
    """Return a score as JSON.

    Args:
        score: The score.
        environment: The environment of the spans of its subject, as Langfuse calls it.
    """
    return to_json(score if environment is None else {**score, "environment": environment}).encode()


def read_score(body: bytes) -> Score:
    """Read back what `write_score` wrote."""
    score: Score = json.loads(body)
    return score


def _score(subject: dict[str, str], subject_id: str, name: str, value: Value, comment: str | None) -> Score:
    kind, given = "NUMERIC", value
    if isinstance(value, bool):
        kind, given = "BOOLEAN", int(value)  # it takes 0 and 1, not true
    elif isinstance(value, str):
        kind = "CATEGORICAL"
    body: Score = {"id": derived_id("score", subject_id, name), **subject, "name": name}
    body |= {"value": given, "dataType": kind}
    return body if comment is None else {**body, "comment": comment}


def scores_of(session: SessionSummary) -> dict[str, Value]:
    """Return what of an ended session is worth a column of Langfuse's Sessions list, by name."""
    known: dict[str, Value | None] = {
        a.SESSION_TOTAL_TURNS: session.total_turns,
        a.SESSION_TOTAL_TOKENS: session.total_tokens,
        a.SESSION_TOTAL_COST_USD: session.total_cost_usd,
        a.SESSION_DURATION_MS: session.duration_ms,
        a.SESSION_AVG_TURN_LATENCY_MS: session.avg_turn_latency_ms,
        a.SESSION_END_REASON: session.end_reason,
        a.SESSION_USER_SATISFACTION: session.user_satisfaction,
        a.DROPOFF_DETECTED: session.dropoff,
        a.DROPOFF_LAST_INTENT: session.last_intent,
        a.JOURNEY_STAGE: session.journey_stage,
        a.JOURNEY_CONVERTED: session.journey_converted,
        SCORE_PRUNINGS: session.prunings,
    }
    return {name: value for name, value in known.items() if value is not None}
