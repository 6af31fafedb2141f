"""The same questions where the ledger is not at hand, asked of Langfuse's Metrics API v2 (Langfuse 4.16).

It counts observations and scores, by what they have as columns: a day, a name, a model, a session. What turntrace says
in metadata (a turn's number, a tier, a channel) can filter there, but not group; so what is told apart by it takes one
request for each value, and the values must be known. What it cannot answer at all is in `WHY_NOT`. ::

    from turntrace.analytics.langfuse import LangfuseMetrics
    from turntrace.export import LangfuseServer
    from turntrace.settings import read_langfuse_settings

    metrics = LangfuseMetrics(LangfuseServer(read_langfuse_settings()))
    for day in metrics.sessions_over_time():
        print(day.of, day.n)

Its quantiles are estimates of the database below Langfuse (ClickHouse), its costs those of Langfuse's price table.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from turntrace import attributes as a
from turntrace.analytics.confidence import Rate
from turntrace.analytics.endings import Dropoffs
from turntrace.analytics.exchanges import LatencyOfTurn
from turntrace.analytics.filters import ALL, Filters
from turntrace.analytics.langfuse_answers import WHY_NOT, CallsUsage, Counted, LatencyOfDay, Measured, ScoreFigures
from turntrace.analytics.times import DAY_NS, NS
from turntrace.errors import ConfigurationError, DeliveryError
from turntrace.export import LangfuseServer

__all__ = [
    "ACTIONS",
    "FIRST_TURNS",
    "WHY_NOT",
    "CallsUsage",
    "Counted",
    "LangfuseMetrics",
    "LatencyOfDay",
    "Measured",
    "ScoreFigures",
]

FIRST_TURNS: Final = tuple(range(1, 11))
ACTIONS: Final = ("answered", "asked_question", "called_tool", "failed", "interrupted")
_MOST_ROWS: Final = 1000
_WITHOUT_SINCE_NS: Final = 30 * DAY_NS
_METADATA: Final = {
    "channel": a.SESSION_CHANNEL,
    "tier": a.USER_TIER,
    "org_id": a.USER_ORG_ID,
    "topic": a.CONVERSATION_TOPIC,
}
_BY_SCORE: Final = {
    "longest": a.SESSION_DURATION_MS,
    "most turns": a.SESSION_TOTAL_TURNS,
    "slowest": a.SESSION_AVG_TURN_LATENCY_MS,
}
_BY_MEASURE: Final = {"dearest": "totalCost", "most tokens": "totalTokens"}

Query = dict[str, Any]
Row = Mapping[str, Any]


class LangfuseMetrics:
    """Asks Langfuse's Metrics API.

    Filters that a question cannot be asked with are refused: observations know a time range, a channel, a tier, an
    organisation, a topic and a user; calls of models also their model; scores only a time range. Where the time range
    has no beginning it is 30 days.

    Args:
        server: The server.
        clock: Returns the time in nanoseconds since 1970.

    Every question raises `DeliveryError` if Langfuse does not answer it, and `ConfigurationError` for such a filter.
    """

    def __init__(self, server: LangfuseServer, *, clock: Callable[[], int] = time.time_ns) -> None:
        self._server = server
        self._clock = clock

    # --- sessions -----------------------------------------------------------------------------------------------------
    def sessions_over_time(self, filters: Filters = ALL) -> list[Counted]:
        """Return how many sessions began on each day, in order; days without any are left out."""
        rows = self._observations(filters, ["count_count"], _named(a.SPAN_SESSION_START), by_day=True)
        return [Counted(_day(row), _whole(row, "count_count")) for row in rows if _whole(row, "count_count")]

    def session_score(self, name: str, filters: Filters = ALL) -> ScoreFigures:
        """Return the figures of a score of sessions, as ``session.user_satisfaction`` or ``session.total_turns``."""
        measures = ["count_count", "avg_value", "p50_value", "p95_value"]
        row = next(iter(self._scores("scores-numeric", filters, measures, name)), {})
        return ScoreFigures(_whole(row, "count_count"), *(_number(row, measure) for measure in measures[1:]))

    def session_lengths(self, filters: Filters = ALL) -> tuple[ScoreFigures, ScoreFigures]:
        """Return how long sessions that have ended were: in turns, and in milliseconds."""
        return self.session_score(a.SESSION_TOTAL_TURNS, filters), self.session_score(a.SESSION_DURATION_MS, filters)

    def satisfaction(self, filters: Filters = ALL) -> ScoreFigures:
        """Return what users thought of sessions, from 0 to 1."""
        return self.session_score(a.SESSION_USER_SATISFACTION, filters)

    def end_reasons(self, filters: Filters = ALL) -> list[Counted]:
        """Return why sessions ended, the most frequent reason first."""
        return self._words(a.SESSION_END_REASON, filters)

    def sessions_by(self, by: str, filters: Filters = ALL, *, limit: int = 10) -> list[Measured]:
        """Return the sessions that come first in an order.

        Args:
            by: ``dearest`` and ``most tokens`` of all, ``longest``, ``most turns`` and ``slowest`` of those that ended.
            filters: Which sessions.
            limit: How many at most.
        """
        if by in _BY_MEASURE:
            return self._first_by("sessionId", _BY_MEASURE[by], filters, limit)
        if by not in _BY_SCORE:
            known = ", ".join((*_BY_MEASURE, *_BY_SCORE))
            raise ConfigurationError(f"The order of sessions is {by!r:.40}. Allowed of Langfuse are: {known}.")
        rows = self._scores(
            "scores-numeric", filters, ["max_value"], _BY_SCORE[by], **_first("sessionId", "max_value", limit)
        )
        return _measured(rows, "sessionId", "max_value", limit)

    def users_by(self, by: str = "dearest", filters: Filters = ALL, *, limit: int = 10) -> list[Measured]:
        """Return the users, by their hashes, who come first in an order: ``dearest`` or ``most tokens``."""
        if by not in _BY_MEASURE:
            raise ConfigurationError(f"The order of users is {by!r:.40}. Allowed are: {', '.join(_BY_MEASURE)}.")
        return self._first_by("userId", _BY_MEASURE[by], filters, limit)

    # --- drop-off -----------------------------------------------------------------------------------------------------
    def dropoff_rate(self, filters: Filters = ALL) -> Rate:
        """Return how many of the sessions that ended did so as a drop-off."""
        measures = ["count_count", "avg_value"]
        row = next(iter(self._scores("scores-boolean", filters, measures, a.DROPOFF_DETECTED)), {})
        n = _whole(row, "count_count")
        return Rate(round((_number(row, "avg_value") or 0.0) * n), n)

    def dropoff_by_turn(self, filters: Filters = ALL, *, numbers: Iterable[int] = FIRST_TURNS) -> list[Dropoffs]:
        """Return the drop-offs by the number of the last turn, of these numbers; two requests each."""
        return self._dropoffs(a.DROPOFF_LAST_TURN, map(str, numbers), filters)

    def dropoff_by_intent(self, filters: Filters = ALL, *, intents: Iterable[str] | None = None) -> list[Dropoffs]:
        """Return the drop-offs by the last intent, the most frequent first; two requests each.

        Args:
            filters: Which sessions.
            intents: The intents. Default: those that sessions of the time range ended with.
        """
        if intents is None:
            range_only = Filters(since_ns=filters.since_ns, until_ns=filters.until_ns)
            intents = [each.of for each in self._words(a.DROPOFF_LAST_INTENT, range_only)]
        found = self._dropoffs(a.DROPOFF_LAST_INTENT, intents, filters)
        return sorted(found, key=lambda each: (-each.dropoffs, each.at))

    def dropoff_by_action(self, filters: Filters = ALL, *, actions: Iterable[str] = ACTIONS) -> list[Dropoffs]:
        """Return the drop-offs by what the agent did last, the most frequent first; two requests each."""
        found = self._dropoffs(a.DROPOFF_AGENT_LAST_ACTION, actions, filters)
        return sorted(found, key=lambda each: (-each.dropoffs, each.at))

    # --- turns and calls of models ------------------------------------------------------------------------------------
    def latency_by_day(self, filters: Filters = ALL) -> list[LatencyOfDay]:
        """Return how long turns took by the day on which they began, in order; days without any are left out."""
        rows = self._observations(filters, _LATENCY, _named(a.SPAN_TURN), by_day=True)
        return [LatencyOfDay(_day(row), *_latency(row)) for row in rows if _whole(row, "count_count")]

    def latency_by_turn(self, filters: Filters = ALL, *, numbers: Iterable[int] = FIRST_TURNS) -> list[LatencyOfTurn]:
        """Return how long turns took, for all (number 0) and for each of these numbers; one request each."""
        found = []
        for number in (0, *numbers):
            only = [_has(a.TURN_NUMBER, str(number))] if number else []
            row = next(iter(self._observations(filters, _LATENCY, [*_named(a.SPAN_TURN), *only])), {})
            n, *ms = _latency(row)
            if n:
                found.append(LatencyOfTurn(number, n, *(round(each) for each in ms)))
        return found

    def usage_by_day(self, filters: Filters = ALL) -> list[CallsUsage]:
        """Return what was used by the day on which a call of a model began, in order; days without any are left out."""
        rows = self._observations(filters, _USED, _CALLS, by_day=True)
        return [_usage(_day(row), row) for row in rows if _whole(row, "count_count")]

    def usage_by_model(self, filters: Filters = ALL) -> list[CallsUsage]:
        """Return what was used by model, the dearest first."""
        rows = self._observations(filters, _USED, _CALLS, dimensions=[{"field": "providedModelName"}])
        return _dearest(_usage(row.get("providedModelName") or "", row) for row in rows)

    def usage_by(self, what: str, values: Iterable[str], filters: Filters = ALL) -> list[CallsUsage]:
        """Return what was used by something that stands in metadata, the dearest first; one request each.

        Args:
            what: ``tier``, ``channel``, ``org_id`` or ``topic``.
            values: The tiers, channels, ...
            filters: Which calls else.
        """
        if what not in _METADATA:
            raise ConfigurationError(f"Usage is asked by {what!r:.40}. Allowed are: {', '.join(_METADATA)}.")
        found = [(each, self._observations(filters.of(**{what: each}), _USED, _CALLS)) for each in values]
        return _dearest(_usage(each, rows[0]) for each, rows in found if rows and _whole(rows[0], "count_count"))

    def prunings_by(self, strategies: Iterable[str], filters: Filters = ALL) -> list[Counted]:
        """Return how often something was pruned by these strategies, the most frequent first; one request each."""
        found = []
        for strategy in strategies:
            only = [*_named(a.SPAN_PRUNE), _has(a.CONTEXT_STRATEGY, strategy)]
            row = next(iter(self._observations(filters, ["count_count"], only)), {})
            found.append(Counted(strategy, _whole(row, "count_count")))
        return sorted(found, key=lambda each: (-each.n, each.of))

    # --- asking -------------------------------------------------------------------------------------------------------
    def _dropoffs(self, name: str, values: Iterable[str], filters: Filters) -> list[Dropoffs]:
        found = []
        for value in values:
            ended = [*_named(a.SPAN_SESSION_END), _has(name, value)]
            counted = []
            for only in (ended, [*ended, _has(a.DROPOFF_DETECTED, "true")]):
                rows = self._observations(filters, ["count_count"], only)
                counted.append(_whole(rows[0], "count_count") if rows else 0)
            if counted[0]:
                found.append(Dropoffs(value, *counted))
        return found

    def _words(self, name: str, filters: Filters) -> list[Counted]:
        by_word = [{"field": "stringValue"}]
        rows = self._scores("scores-categorical", filters, ["count_count"], name, dimensions=by_word)
        found = [Counted(str(row.get("stringValue") or ""), _whole(row, "count_count")) for row in rows]
        return sorted(found, key=lambda each: (-each.n, each.of))

    def _first_by(self, field: str, measure: str, filters: Filters, limit: int) -> list[Measured]:
        alias = f"sum_{measure}"
        rows = self._observations(filters, [alias], _CALLS, **_first(field, alias, limit))
        return _measured(rows, field, alias, limit)

    def _observations(
        self, filters: Filters, measures: Sequence[str], only: Sequence[Query], *, by_day: bool = False, **query: Any
    ) -> list[Row]:
        known = ["user_id", *_METADATA, *(["model"] if only is _CALLS else [])]
        self._check(filters, "observations", known)
        asked = list(only)
        asked += [_has(name, value) for n, name in _METADATA.items() if (value := getattr(filters, n)) is not None]
        if filters.user_id is not None:
            asked.append(_is("userId", filters.user_id))
        if filters.model is not None:
            asked.append(_is("providedModelName", filters.model))
        if by_day:
            query["timeDimension"] = {"granularity": "day"}
        return self._ask("observations", filters, measures, asked, query)

    def _scores(self, view: str, filters: Filters, measures: Sequence[str], name: str, **query: Any) -> list[Row]:
        self._check(filters, "scores of sessions", ())
        return self._ask(view, filters, measures, [_is("name", name)], query)

    def _check(self, filters: Filters, what: str, known: Sequence[str]) -> None:
        allowed = ("since_ns", "until_ns", *known)
        given = [name for name in Filters.__slots__ if getattr(filters, name) is not None and name not in allowed]
        if given:
            raise ConfigurationError(
                f"Langfuse cannot filter {what} by {', '.join(given)}. Allowed are: {', '.join(allowed)}. "
                "Ask the ledger, or leave it out."
            )

    def _ask(
        self, view: str, filters: Filters, measures: Sequence[str], asked: Sequence[Query], query: Query
    ) -> list[Row]:
        until_ns = self._clock() if filters.until_ns is None else filters.until_ns
        since_ns = until_ns - _WITHOUT_SINCE_NS if filters.since_ns is None else filters.since_ns
        metrics = [dict(zip(("aggregation", "measure"), name.split("_", 1), strict=True)) for name in measures]
        whole: Query = {
            "view": view,
            "metrics": metrics,
            "dimensions": [],
            "filters": list(asked),
            "fromTimestamp": _iso(since_ns),
            "toTimestamp": _iso(until_ns),
            "config": {"row_limit": _MOST_ROWS},
        }
        rows: list[Row] = list(self._server.metrics({**whole, **query}))
        return rows


def _is(column: str, value: str) -> Query:
    return {"column": column, "operator": "=", "value": value, "type": "string"}


def _has(name: str, value: str) -> Query:
    """Filter by what a span of ours says, which Langfuse keeps as metadata."""
    return {"column": "metadata", "key": f"attributes.{name}", "operator": "=", "value": value, "type": "stringObject"}


def _named(name: str) -> list[Query]:
    return [_is("name", name)]


_CALLS: Final = [_is("type", "GENERATION")]
_LATENCY: Final = ("count_count", "p50_latency", "p95_latency", "p99_latency")
_USED: Final = ("count_count", "sum_inputTokens", "sum_outputTokens", "sum_totalCost")


def _first(field: str, alias: str, limit: int) -> Query:
    """Return what a query needs that names sessions or users. One row more: those without any are a row too."""
    order = [{"field": alias, "direction": "desc"}]
    rows = min(_MOST_ROWS, limit + 1)
    return {"dimensions": [{"field": field}], "orderBy": order, "config": {"row_limit": rows}}


def _measured(rows: Iterable[Row], field: str, alias: str, limit: int) -> list[Measured]:
    return [Measured(str(row[field]), _number(row, alias) or 0.0) for row in rows if row.get(field)][:limit]


def _usage(of: str, row: Row) -> CallsUsage:
    calls, given, answered = (_whole(row, name) for name in _USED[:3])
    return CallsUsage(of, calls, given, answered, _number(row, "sum_totalCost") or 0.0)


def _dearest(found: Iterable[CallsUsage]) -> list[CallsUsage]:
    return sorted(found, key=lambda usage: (-usage.cost_usd, -usage.input_tokens, usage.of))


def _latency(row: Row) -> tuple[int, float, float, float]:
    p50, p95, p99 = (_number(row, name) or 0.0 for name in _LATENCY[1:])
    return _whole(row, "count_count"), p50, p95, p99


def _day(row: Row) -> str:
    return str(row.get("time_dimension", ""))[:10]


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DeliveryError(f"Langfuse's Metrics API answers {name} with what is no number. Check LANGFUSE_BASE_URL.")
    return number


def _whole(row: Row, name: str) -> int:
    return round(_number(row, name) or 0.0)


def _iso(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns // NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
