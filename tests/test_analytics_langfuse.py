"""Questions to Langfuse's Metrics API, of a server on loopback that answers in the form that was recorded (F11b)."""

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import SecretStr

from conftest import AIRLINE
from turntrace import analytics
from turntrace.analytics import Dropoffs, Filters, LatencyOfTurn, Rate
from turntrace.analytics.langfuse import (
    ACTIONS,
    WHY_NOT,
    CallsUsage,
    Counted,
    LangfuseMetrics,
    LatencyOfDay,
    Measured,
    ScoreFigures,
)
from turntrace.errors import ConfigurationError, DeliveryError
from turntrace.export import LangfuseServer
from turntrace.settings import LangfuseSettings

SECOND = 1_000_000_000
NOW = 1_795_608_000 * SECOND  # 2026-11-25T12:00:00Z
HIGH_CARDINALITY = ("sessionId", "userId")
VIEWS = ("observations", "scores-numeric", "scores-boolean", "scores-categorical")
Json = dict[str, Any]


@dataclass
class Server:
    """Answers each query with what is said for it, and refuses as Langfuse does what it would refuse.

    Attributes:
        asked: The queries, as they came.
        answers: Rows by what a query's filters ask for, joined: ``name=session.start``; of others no rows.
    """

    url: str = ""
    status: int = 200
    asked: list[Json] = field(default_factory=list)
    answers: dict[str, list[Json]] = field(default_factory=dict)

    def answer(self, query: Json) -> tuple[int, Json]:
        self.asked.append(query)
        if self.status != 200:
            return self.status, {"message": "Invalid credentials. Confirm that you've configured the correct host."}
        assert query["view"] in VIEWS
        assert query["metrics"]
        fields = [each["field"] for each in query["dimensions"]]
        ordered = any(each["direction"] == "desc" for each in query.get("orderBy", ()))
        for name in HIGH_CARDINALITY:
            if name in fields and not ("row_limit" in query["config"] and ordered):
                words = (
                    f"High cardinality dimension(s) '{name}' require both 'config.row_limit' and 'orderBy' with "
                    "direction 'desc' on a measure field."
                )
                return 400, {"message": words, "error": "InvalidRequestError"}
        assert not any("metadata" in name for name in fields)
        wanted = ", ".join(f"{each.get('key', each['column'])}={each['value']}" for each in query["filters"])
        return 200, {"data": self.answers.get(wanted, [])}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            assert parts.path == "/api/public/v2/metrics"
            status, answer = made.answer(json.loads(parse_qs(parts.query)["query"][0]))
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.url = f"http://127.0.0.1:{http.server_port}"
    yield made
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def metrics(server: Server) -> Iterator[LangfuseMetrics]:
    settings = LangfuseSettings(public_key="pk-lf-test", secret_key=SecretStr("sk-lf-test"), base_url=server.url)
    langfuse = LangfuseServer(settings)
    yield LangfuseMetrics(langfuse, clock=lambda: NOW)
    langfuse.close()


def day(number: int, **measures: Any) -> Json:
    return {"time_dimension": f"2026-11-{number:02}", **measures}


# --- how it is asked --------------------------------------------------------------------------------------------------
def test_a_query_says_view_measures_filters_and_time_range(metrics: LangfuseMetrics, server: Server) -> None:
    metrics.sessions_over_time(Filters(channel="web", user_id="9f86"))
    assert server.asked == [
        {
            "view": "observations",
            "metrics": [{"aggregation": "count", "measure": "count"}],
            "dimensions": [],
            "filters": [
                {"column": "name", "operator": "=", "value": "session.start", "type": "string"},
                {
                    **{"column": "metadata", "key": "attributes.session.channel", "operator": "="},
                    **{"value": "web", "type": "stringObject"},
                },
                {"column": "userId", "operator": "=", "value": "9f86", "type": "string"},
            ],
            "timeDimension": {"granularity": "day"},
            "fromTimestamp": "2026-10-26T12:00:00Z",
            "toTimestamp": "2026-11-25T12:00:00Z",
            "config": {"row_limit": 1000},
        }
    ]


def test_the_time_range_is_the_filters(metrics: LangfuseMetrics, server: Server) -> None:
    metrics.end_reasons(Filters(since_ns=NOW - 3600 * SECOND, until_ns=NOW - 60 * SECOND))
    [query] = server.asked
    assert (query["fromTimestamp"], query["toTimestamp"]) == ("2026-11-25T11:00:00Z", "2026-11-25T11:59:00Z")


@pytest.mark.parametrize(
    ("question", "filters", "named"),
    [
        ("satisfaction", Filters(channel="web"), "scores of sessions by channel"),
        ("dropoff_rate", Filters(tier="free", user_id="u"), "scores of sessions by tier, user_id"),
        ("sessions_over_time", Filters(model="gpt-4o"), "observations by model"),
        ("usage_by_day", Filters(end_reason="error"), "observations by end_reason"),
    ],
)
def test_a_filter_that_langfuse_does_not_have_is_refused_before_it_is_asked(
    metrics: LangfuseMetrics, server: Server, question: str, filters: Filters, named: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"Langfuse cannot filter {named}. Allowed are: since_ns, until_ns"):
        getattr(metrics, question)(filters)
    assert server.asked == []


def test_calls_of_models_can_be_filtered_by_model(metrics: LangfuseMetrics, server: Server) -> None:
    metrics.usage_by_day(Filters(model="gpt-4o", tier="premium"))
    wanted = [(each.get("key", each["column"]), each["value"]) for each in server.asked[0]["filters"]]
    assert wanted == [("type", "GENERATION"), ("attributes.user.tier", "premium"), ("providedModelName", "gpt-4o")]


def test_what_langfuse_refuses_is_raised_with_its_words(metrics: LangfuseMetrics, server: Server) -> None:
    server.status = 401
    with pytest.raises(DeliveryError, match=r"401: .*Invalid credentials"):
        metrics.end_reasons()


# --- what it answers --------------------------------------------------------------------------------------------------
def test_sessions_over_time_are_the_starts_of_each_day(metrics: LangfuseMetrics, server: Server) -> None:
    server.answers["name=session.start"] = [day(1, count_count=0), day(2, count_count=3), day(4, count_count="2")]
    assert metrics.sessions_over_time() == [Counted("2026-11-02", 3), Counted("2026-11-04", 2)]


def test_latency_is_of_turns_by_day(metrics: LangfuseMetrics, server: Server) -> None:
    empty = day(1, count_count=0, p50_latency=None, p95_latency=None, p99_latency=None)
    some = day(2, count_count=4, p50_latency=31.5, p95_latency=90, p99_latency=99)
    server.answers["name=conversation.turn"] = [empty, some]
    assert metrics.latency_by_day() == [LatencyOfDay("2026-11-02", 4, 31.5, 90.0, 99.0)]
    asked = [f"{each['aggregation']}_{each['measure']}" for each in server.asked[0]["metrics"]]
    assert asked == ["count_count", "p50_latency", "p95_latency", "p99_latency"]


def test_latency_by_turn_asks_once_for_each_number(metrics: LangfuseMetrics, server: Server) -> None:
    row = {"p50_latency": 30.4, "p95_latency": 90, "p99_latency": 99}
    server.answers["name=conversation.turn"] = [{"count_count": 9, **row}]
    server.answers["name=conversation.turn, attributes.turn.number=2"] = [{"count_count": 4, **row}]
    assert metrics.latency_by_turn(numbers=(1, 2)) == [LatencyOfTurn(0, 9, 30, 90, 99), LatencyOfTurn(2, 4, 30, 90, 99)]
    assert len(server.asked) == 3


USED = {"sum_inputTokens": 9000, "sum_outputTokens": 600, "sum_totalCost": 0.00171}
NOTHING_USED = {"count_count": 0, "sum_inputTokens": 0, "sum_outputTokens": 0, "sum_totalCost": None}


def test_usage_is_of_generations_by_day_model_and_what_stands_in_metadata(
    metrics: LangfuseMetrics, server: Server
) -> None:
    calls = "type=GENERATION"
    server.answers[calls] = [day(1, **NOTHING_USED), day(22, count_count=6, **USED)]
    assert metrics.usage_by_day() == [CallsUsage("2026-11-22", 6, 9000, 600, 0.00171)]
    free = {"providedModelName": None, "count_count": 1, "sum_inputTokens": 5, "sum_outputTokens": 1}
    server.answers[calls] = [free, {"providedModelName": "gpt-4o", "count_count": 6, **USED}]
    assert metrics.usage_by_model() == [CallsUsage("gpt-4o", 6, 9000, 600, 0.00171), CallsUsage("", 1, 5, 1, 0.0)]
    assert server.asked[-1]["dimensions"] == [{"field": "providedModelName"}]
    server.answers[f"{calls}, attributes.user.tier=free"] = [{"count_count": 2, **USED}]
    server.answers[f"{calls}, attributes.user.tier=gone"] = [NOTHING_USED]
    assert metrics.usage_by("tier", ("gone", "free")) == [CallsUsage("free", 2, 9000, 600, 0.00171)]
    with pytest.raises(ConfigurationError, match=r"'plan'\. Allowed are: channel, tier, org_id, topic"):
        metrics.usage_by("plan", ("free",))


def test_the_dropoff_rate_is_that_of_the_boolean_score_with_its_n(metrics: LangfuseMetrics, server: Server) -> None:
    server.answers["name=dropoff.detected"] = [{"count_count": 7, "avg_value": 3 / 7}]
    assert metrics.dropoff_rate() == Rate(3, 7)
    assert server.asked[0]["view"] == "scores-boolean"
    server.answers.clear()
    assert metrics.dropoff_rate() == Rate(0, 0)


def test_dropoffs_are_counted_by_turn_action_and_the_intents_that_there_are(
    metrics: LangfuseMetrics, server: Server
) -> None:
    def says(name: str, value: str, ended: int, dropped: int) -> None:
        key = f"name=session.end, attributes.{name}={value}"
        server.answers[key] = [{"count_count": ended}]
        server.answers[f"{key}, attributes.dropoff.detected=true"] = [{"count_count": dropped}]

    says("dropoff.last_turn", "1", 5, 2)
    says("dropoff.last_turn", "3", 4, 0)
    assert metrics.dropoff_by_turn(numbers=range(1, 5)) == [Dropoffs("1", 5, 2), Dropoffs("3", 4, 0)]
    says("dropoff.agent_last_action", "failed", 2, 2)
    says("dropoff.agent_last_action", "answered", 9, 3)
    server.asked.clear()
    assert metrics.dropoff_by_action() == [Dropoffs("answered", 9, 3), Dropoffs("failed", 2, 2)]
    assert len(server.asked) == 2 * len(ACTIONS)
    server.answers["name=dropoff.last_intent"] = [{"stringValue": "refund", "count_count": 3}]
    says("dropoff.last_intent", "refund", 3, 1)
    assert metrics.dropoff_by_intent(Filters(channel="web")) == []
    assert metrics.dropoff_by_intent() == [Dropoffs("refund", 3, 1)]


def test_end_reasons_are_the_words_of_the_categorical_score(metrics: LangfuseMetrics, server: Server) -> None:
    rows = [{"stringValue": "error", "count_count": 1}, {"stringValue": "user_exit", "count_count": 4}]
    server.answers["name=session.end_reason"] = rows
    assert metrics.end_reasons() == [Counted("user_exit", 4), Counted("error", 1)]
    assert (server.asked[0]["view"], server.asked[0]["dimensions"]) == (
        "scores-categorical",
        [{"field": "stringValue"}],
    )


def test_satisfaction_and_lengths_are_those_of_numeric_scores(metrics: LangfuseMetrics, server: Server) -> None:
    server.answers["name=session.user_satisfaction"] = [
        {"count_count": 3, "avg_value": 0.75, "p50_value": 1, "p95_value": 1}
    ]
    server.answers["name=session.total_turns"] = [{"count_count": 2, "avg_value": 4, "p50_value": 3, "p95_value": 5}]
    assert metrics.satisfaction() == ScoreFigures(3, 0.75, 1.0, 1.0)
    assert metrics.session_lengths() == (ScoreFigures(2, 4.0, 3.0, 5.0), ScoreFigures(0, None, None, None))
    assert {query["view"] for query in server.asked} == {"scores-numeric"}


RECORDED: list[Json] = [
    {"sessionId": None, "sum_totalCost": 0.00171, "sum_totalTokens": 9600, "count_count": 6},
    {"sessionId": "lf-sync-6950d", "sum_totalCost": 0.00171, "sum_totalTokens": 9600, "count_count": 9},
    {"sessionId": "look-d8ef7c", "sum_totalCost": 0.001259999999, "sum_totalTokens": 6600, "count_count": 13},
]
"""What Langfuse answered to "metrics by sessionId, top 3" (../shared/data/langfuse-answers.json)."""


def test_the_rows_by_session_are_those_that_were_recorded() -> None:
    path = AIRLINE.parents[1] / "langfuse-answers.json"
    if not path.exists():
        pytest.skip("the recorded answers (../shared/data) are not on this machine")
    answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
    [rows] = [each["body"]["data"] for each in answers if each["what"] == "metrics by sessionId, top 3"]
    assert rows == RECORDED
    [refused] = [each for each in answers if each["what"] == "metrics by sessionId without row_limit"]
    made = Server()
    query = {
        "view": "observations",
        "metrics": [{}],
        "dimensions": [{"field": "sessionId"}],
        "config": {},
        "filters": [],
    }
    assert made.answer(query) == (refused["status"], refused["body"])


def test_the_dearest_sessions_leave_out_what_is_of_none(metrics: LangfuseMetrics, server: Server) -> None:
    server.answers["type=GENERATION"] = list(RECORDED)
    dearest = [Measured("lf-sync-6950d", 0.00171), Measured("look-d8ef7c", 0.001259999999)]
    assert metrics.sessions_by("dearest", limit=2) == dearest
    assert metrics.sessions_by("dearest", limit=1) == dearest[:1]
    assert server.asked[0]["orderBy"] == [{"field": "sum_totalCost", "direction": "desc"}]
    assert [query["config"] for query in server.asked] == [{"row_limit": 3}, {"row_limit": 2}]
    assert metrics.sessions_by("most tokens") == [Measured("lf-sync-6950d", 9600), Measured("look-d8ef7c", 6600)]


def test_the_longest_sessions_are_told_by_their_score(metrics: LangfuseMetrics, server: Server) -> None:
    server.answers["name=session.duration_ms"] = [{"sessionId": "s", "max_value": 4200}]
    assert metrics.sessions_by("longest") == [Measured("s", 4200.0)]
    assert metrics.sessions_by("slowest") == []
    with pytest.raises(ConfigurationError, match=r"'newest'\. Allowed of Langfuse are: dearest, most tokens, longest"):
        metrics.sessions_by("newest")


def test_users_are_named_by_their_hashes(metrics: LangfuseMetrics, server: Server) -> None:
    server.answers["type=GENERATION"] = [{"userId": "9f86", "sum_totalCost": 0.5}, {"userId": "", "sum_totalCost": 0.1}]
    assert metrics.users_by() == [Measured("9f86", 0.5)]
    with pytest.raises(ConfigurationError, match=r"'latest'\. Allowed are: dearest, most tokens"):
        metrics.users_by("latest")


def test_prunings_are_counted_by_known_strategies(metrics: LangfuseMetrics, server: Server) -> None:
    key = "name=context.prune, attributes.context.strategy="
    server.answers[f"{key}DropOldestTurns"] = [{"count_count": 2}]
    found = metrics.prunings_by(("KeepLast", "DropOldestTurns"))
    assert found == [Counted("DropOldestTurns", 2), Counted("KeepLast", 0)]


# --- and what it does not ---------------------------------------------------------------------------------------------
ANSWERED_AS = {
    **dict.fromkeys(("usage_by_tier", "usage_by_channel"), "usage_by"),
    **{"dropoff_by_reason": "end_reasons", "by_model": "usage_by_model"},
}


def test_each_question_of_the_ledger_is_answered_or_says_why_not() -> None:
    helpers = ("ask_together", "day_of", "interval", "funnel", "slow_above_ms")
    questions = [name for name in analytics.__all__ if re.fullmatch(r"[a-z_]+", name) and name not in helpers]
    for name in questions:
        assert hasattr(LangfuseMetrics, ANSWERED_AS.get(name, name)) or name in WHY_NOT, name
    assert {name.split(",")[0] for name in WHY_NOT} <= set(questions)
    assert all(why[0].isupper() and why.endswith(".") for why in WHY_NOT.values())
