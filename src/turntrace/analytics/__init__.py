"""Questions to the ledger over many sessions: plain functions with typed answers, aggregated in SQL.

Each takes a `Ledger` and `Filters`; none changes anything. ::

    from turntrace.analytics import Filters, dropoff_by_turn, sessions_over_time
    from turntrace.ledger import Ledger

    ledger = Ledger("sqlite:///ledger.db")
    for day in sessions_over_time(ledger, Filters(channel="web")):
        print(day.day, day.sessions, day.users)
"""

from turntrace.analytics.asking import MOST_TURNS, ask_together
from turntrace.analytics.confidence import Rate, interval
from turntrace.analytics.endings import (
    Dropoffs,
    IntentOutcome,
    Outcome,
    dropoff_by_action,
    dropoff_by_intent,
    dropoff_by_reason,
    dropoff_by_turn,
    outcomes,
    outcomes_by_intent,
)
from turntrace.analytics.errors import (
    MOST_LOOKED_INTO,
    ErrorsAt,
    ErrorsAtStep,
    TurnErrors,
    sessions_with_errors,
    turn_errors,
)
from turntrace.analytics.exchanges import (
    EstimateError,
    LatencyOfTurn,
    Usage,
    by_model,
    estimate_errors,
    latency_by_turn,
    slow_above_ms,
    usage_by_channel,
    usage_by_day,
    usage_by_model,
    usage_by_tier,
)
from turntrace.analytics.filters import ALL, SATISFIED, UNSATISFIED_BELOW, Filters
from turntrace.analytics.funnels import Funnel, FunnelStage, funnel, funnels
from turntrace.analytics.returning import Cohort, UserFigures, retention, users
from turntrace.analytics.scales import (
    DURATION_EDGES_MS,
    ContextOfTurn,
    Lasted,
    context_tokens_by_turn,
    session_durations,
)
from turntrace.analytics.sittings import (
    ORDERS,
    DayOfSessions,
    Length,
    SessionLengths,
    SlowestTurn,
    abandoned_turns,
    session_lengths,
    sessions_by,
    sessions_over_time,
    slowest_turns,
)
from turntrace.analytics.times import day_of
from turntrace.analytics.totals import Choices, Totals, choices, totals, users_that_begin
from turntrace.analytics.windows import Prunings, WindowOfTurn, prunings, window_by_turn

__all__ = [
    "ALL",
    "DURATION_EDGES_MS",
    "MOST_LOOKED_INTO",
    "MOST_TURNS",
    "ORDERS",
    "SATISFIED",
    "UNSATISFIED_BELOW",
    "Choices",
    "Cohort",
    "ContextOfTurn",
    "DayOfSessions",
    "Dropoffs",
    "ErrorsAt",
    "ErrorsAtStep",
    "EstimateError",
    "Filters",
    "Funnel",
    "FunnelStage",
    "IntentOutcome",
    "Lasted",
    "LatencyOfTurn",
    "Length",
    "Outcome",
    "Prunings",
    "Rate",
    "SessionLengths",
    "SlowestTurn",
    "Totals",
    "TurnErrors",
    "Usage",
    "UserFigures",
    "WindowOfTurn",
    "abandoned_turns",
    "ask_together",
    "by_model",
    "choices",
    "context_tokens_by_turn",
    "day_of",
    "dropoff_by_action",
    "dropoff_by_intent",
    "dropoff_by_reason",
    "dropoff_by_turn",
    "estimate_errors",
    "funnel",
    "funnels",
    "interval",
    "latency_by_turn",
    "outcomes",
    "outcomes_by_intent",
    "prunings",
    "retention",
    "session_durations",
    "session_lengths",
    "sessions_by",
    "sessions_over_time",
    "sessions_with_errors",
    "slow_above_ms",
    "slowest_turns",
    "totals",
    "turn_errors",
    "usage_by_channel",
    "usage_by_day",
    "usage_by_model",
    "usage_by_tier",
    "users",
    "users_that_begin",
    "window_by_turn",
]
