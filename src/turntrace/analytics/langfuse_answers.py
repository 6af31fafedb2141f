"""What Langfuse's Metrics API answers, as frozen dataclasses, and what it cannot answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

WHY_NOT: Final[Mapping[str, str]] = {
    "funnels": "The Metrics API counts the events of a journey, not the users behind them, and knows no order of "
    "steps.",
    "outcomes": "What sessions of one outcome are like crosses several scores of a session; the Metrics API asks for "
    "one at a time.",
    "outcomes_by_intent": "Intents stand in the metadata of turns and outcomes in scores of sessions, which the "
    "Metrics API cannot join.",
    "retention": "It needs the first session of each user; the Metrics API names at most 1,000 users, and no "
    "first days.",
    "users": "Only users by cost, tokens or observations can be named (`users_by`); sessions and drop-offs of a user "
    "cannot be counted.",
    "window_by_turn": "The fill of the window stands in metadata, which the Metrics API can filter by, not measure.",
    "estimate_errors": "Our own counts stand in metadata, which the Metrics API can filter by, not measure.",
    "prunings": "The prunings of known strategies can be counted (`prunings_by`); the messages and tokens stand in "
    "metadata, which the Metrics API cannot sum.",
    "totals": "Different users and the sessions that are open cannot be counted, as it has no distinct counts; the "
    "sums by day, reason and model (`sessions_over_time`, `end_reasons`, `usage_by_model`) have the rest.",
    "context_tokens_by_turn": "What a window held stands in metadata, which the Metrics API can filter by, not "
    "measure.",
    "session_durations": "The Metrics API gives percentiles of the score `session.duration_ms`, not how many lie "
    "where.",
    "abandoned_turns": "How a turn ended stands in metadata, which cannot be a dimension; filter Langfuse's Tracing by "
    "`turn.status` in the metadata.",
    "slowest_turns": "The longest latency of a session can be asked for there; which turn it was stands in metadata, "
    "which cannot be a dimension.",
    "turn_errors": "Calls that failed can be counted there by their level; which turns failed, at which number and "
    "with which intent stands in metadata, which cannot be a dimension.",
    "sessions_with_errors": "The Metrics API orders sessions by a measure only; filter Langfuse's Tracing by level "
    "ERROR.",
    "users_that_begin": "Users can only be named by a measure, not by the beginning of their hash.",
    "choices": "Values in metadata cannot be a dimension, so those that there are cannot be listed.",
    "latency_by_turn, without waiting": "Langfuse's latency of a turn is from its start to its end, so the time that "
    "an interrupted turn waited for a person is in it.",
    "sessions_by, newest": "The Metrics API orders sessions by a measure only; ask the Sessions list of Langfuse.",
    "sessions_over_time, users": "Different users or sessions of a day cannot be counted; that a session began can.",
}
"""Questions of the ledger, or parts of them, that the Metrics API cannot answer, and why not."""


@dataclass(frozen=True, slots=True)
class Counted:
    """How many there are of something: of a day in UTC, a reason, a strategy."""

    of: str
    n: int


@dataclass(frozen=True, slots=True)
class LatencyOfDay:
    """How long turns that began on a day took, in milliseconds, with what was waited for a person.

    Attributes:
        day: The day, in UTC.
        n: How many turns.
        p50: About half of them took at most so long.
        p95: About 95 of 100 took at most so long.
        p99: About 99 of 100 took at most so long.
    """

    day: str
    n: int
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class CallsUsage:
    """Tokens and cost of calls of models that have something in common.

    Attributes:
        of: What they have in common: a day, a model, a tier; empty where that is not known.
        calls: How many calls.
        input_tokens: Tokens that models were given.
        output_tokens: Tokens that they answered.
        cost_usd: What they cost by Langfuse's price table, in US dollars.
    """

    of: str
    calls: int
    input_tokens: int
    output_tokens: int
    cost_usd: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A session or a user, by id, and what it was ordered by: milliseconds, turns, tokens or US dollars."""

    id: str
    value: float


@dataclass(frozen=True, slots=True)
class ScoreFigures:
    """A score of sessions that have ended.

    Attributes:
        n: How many sessions have it.
        mean: Its mean; None without any.
        p50: About half of them have at most so much.
        p95: About 95 of 100 have at most so much.
    """

    n: int
    mean: float | None
    p50: float | None
    p95: float | None
