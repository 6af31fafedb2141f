"""All figures of the report, asked of the ledger."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from turntrace import analytics
from turntrace.analytics import ALL, UNSATISFIED_BELOW, Filters
from turntrace.ledger import Ledger
from turntrace.summaries import SessionSummary

_MOST_AT_ONCE: Final = 4
"""As many questions read all turns and take about the same time; an app's pool of connections is not used up by it."""
_SHOWN: Final = 10
_LATEST: Final = 15
_NEARLY_EMPTY: Final = 0.02
"""Shares of windows, which are in thousandths, say too little below it."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the report shows.

    Attributes:
        at_ns: When it was asked, in nanoseconds since 1970.
        filters: Which sessions and turns it is about.
        totals: What they add up to.
        choices: What the filters can be set to.
        days: The days on which sessions began.
        lengths: How long sessions are.
        durations: How long sessions last, from milliseconds to a day.
        latency: How long turns take, for all and by their number.
        errors: Turns that failed or were abandoned.
        usage_by_day: Tokens and cost by day.
        usage_by_model: The same by model.
        usage_by_tier: The same by the users' tier.
        usage_by_channel: The same by channel.
        funnels: The journeys.
        dropoff_by_turn: Drop-offs by the number of the session's last turn.
        dropoff_by_intent: The same by what the user wanted last.
        dropoff_by_action: The same by what the agent did last.
        dropoff_by_reason: The same by why the session ended.
        outcomes: What sessions of each outcome are like.
        outcomes_by_intent: How sessions came out, by what users wanted.
        retention: Weekly cohorts of users.
        windows: How full the models' windows were, by the number of the turn.
        context_tokens: The same in tokens, where windows are nearly empty; else nothing.
        prunings: What was pruned by which strategy.
        estimate_errors: How good our counts of tokens are, by model.
        failing: The sessions with failed turns that began last.
        unsatisfied: The sessions with the lowest mean of feedback, below that of satisfied users.
        latest: The sessions that began last.
        slowest: Those with the longest mean latency of a turn.
        dearest: Those that cost most.
        longest: Those with the longest time from the first to the last activity.
    """

    at_ns: int
    filters: Filters
    totals: analytics.Totals
    choices: analytics.Choices
    days: Sequence[analytics.DayOfSessions]
    lengths: analytics.SessionLengths
    durations: Sequence[analytics.Lasted]
    latency: Sequence[analytics.LatencyOfTurn]
    errors: analytics.TurnErrors
    usage_by_day: Sequence[analytics.Usage]
    usage_by_model: Sequence[analytics.Usage]
    usage_by_tier: Sequence[analytics.Usage]
    usage_by_channel: Sequence[analytics.Usage]
    funnels: Sequence[analytics.Funnel]
    dropoff_by_turn: Sequence[analytics.Dropoffs]
    dropoff_by_intent: Sequence[analytics.Dropoffs]
    dropoff_by_action: Sequence[analytics.Dropoffs]
    dropoff_by_reason: Sequence[analytics.Dropoffs]
    outcomes: Sequence[analytics.Outcome]
    outcomes_by_intent: Sequence[analytics.IntentOutcome]
    retention: Sequence[analytics.Cohort]
    windows: Sequence[analytics.WindowOfTurn]
    context_tokens: Sequence[analytics.ContextOfTurn]
    prunings: Sequence[analytics.Prunings]
    estimate_errors: Sequence[analytics.EstimateError]
    failing: Sequence[SessionSummary]
    unsatisfied: Sequence[SessionSummary]
    latest: Sequence[SessionSummary]
    slowest: Sequence[SessionSummary]
    dearest: Sequence[SessionSummary]
    longest: Sequence[SessionSummary]

    @property
    def is_empty(self) -> bool:
        """Whether there is no session that it is about."""
        return self.totals.sessions == 0


def at_once() -> int:
    """Return how many questions are asked at a time: as many as there are processors, but at least two."""
    # Those that this process may use; macOS and Windows do not tell them apart.
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(known, _MOST_AT_ONCE))


def collect(ledger: Ledger, filters: Filters = ALL, *, now_ns: int) -> Report:
    """Ask the ledger for all that the report shows: on as many processors as there are, on at most four.

    Args:
        ledger: The ledger.
        filters: Which sessions and turns it is about.
        now_ns: The time, in nanoseconds since 1970.

    Raises:
        LedgerError: If the ledger cannot be read.
    """
    ledger.settled()  # once, instead of at the first question of each thread
    questions = {name: partial(question, ledger, filters) for name, question in _QUESTIONS.items()}
    answers: dict[str, Any] = analytics.ask_together(questions, threads=at_once())
    usage, errors = answers.pop("by_model")
    of_model = {"usage_by_model": usage, "estimate_errors": errors}
    windows: Sequence[analytics.WindowOfTurn] = answers["windows"]
    is_nearly_empty = windows and max(each.p99 for each in windows) < _NEARLY_EMPTY
    tokens = analytics.context_tokens_by_turn(ledger, filters) if is_nearly_empty else []
    return Report(at_ns=now_ns, filters=filters, context_tokens=tokens, **of_model, **answers)


def _sessions(by: Any, limit: int) -> Callable[[Ledger, Filters], Any]:
    return lambda ledger, filters: analytics.sessions_by(ledger, by, filters, limit=limit)


def _unsatisfied(ledger: Ledger, filters: Filters) -> list[SessionSummary]:
    found = analytics.sessions_by(ledger, "least satisfied", filters, limit=_SHOWN)
    rated = [(session, session.user_satisfaction) for session in found]
    return [session for session, mean in rated if mean is not None and mean < UNSATISFIED_BELOW]


# Those that read all turns come first: they take the longest.
_QUESTIONS: Final[Mapping[str, Callable[[Ledger, Filters], Any]]] = {
    "latency": analytics.latency_by_turn,
    "errors": analytics.turn_errors,
    "windows": analytics.window_by_turn,
    "outcomes_by_intent": analytics.outcomes_by_intent,
    "by_model": analytics.by_model,
    "choices": lambda ledger, _: analytics.choices(ledger),
    "funnels": analytics.funnels,
    "prunings": analytics.prunings,
    "retention": analytics.retention,
    "lengths": analytics.session_lengths,
    "durations": analytics.session_durations,
    "days": analytics.sessions_over_time,
    "usage_by_day": analytics.usage_by_day,
    "usage_by_tier": analytics.usage_by_tier,
    "usage_by_channel": analytics.usage_by_channel,
    "dropoff_by_turn": analytics.dropoff_by_turn,
    "dropoff_by_intent": analytics.dropoff_by_intent,
    "dropoff_by_action": analytics.dropoff_by_action,
    "dropoff_by_reason": analytics.dropoff_by_reason,
    "outcomes": analytics.outcomes,
    "totals": analytics.totals,
    "failing": analytics.sessions_with_errors,
    "unsatisfied": _unsatisfied,
    "latest": _sessions("newest", _LATEST),
    "slowest": _sessions("slowest", _SHOWN),
    "dearest": _sessions("dearest", _SHOWN),
    "longest": _sessions("longest", _SHOWN),
}
