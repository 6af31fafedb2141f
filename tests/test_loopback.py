"""The server on loopback answers as a Langfuse 4.16 was recorded to: what is tested against it holds there too."""

import gzip
import json
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from loopback import OTLP, SCORES, Failure, LangfuseServer
from loopback_store import Span, encode

OBSERVATIONS, READ_SCORES = "/api/public/v2/observations", "/api/public/v3/scores"
PROTOBUF = {"Content-Type": "application/x-protobuf"}
VERSION, NO_VERSION = {"x-langfuse-ingestion-version": "4"}, {"x-langfuse-ingestion-version": ""}
ALL_FIELDS = "core,basic,time,io,metadata,model,usage,metrics"
START_NS = 1_700_000_000_000_000_000
Client = httpx.Client
Recorded = dict[str, dict[str, Any]]


@pytest.fixture
def server() -> Iterator[LangfuseServer]:
    with LangfuseServer() as server:
        yield server


@pytest.fixture
def client(server: LangfuseServer) -> Iterator[Client]:
    with client_of(server) as client:
        yield client


def client_of(server: LangfuseServer) -> Client:
    return Client(base_url=server.url, auth=(server.public_key, server.secret_key), trust_env=False, timeout=30)


def span(at: int = 1, **facts: Any) -> Span:
    ids: dict[str, Any] = {"trace_id": f"{at:032x}", "span_id": f"{at:016x}", "parent_id": None, "name": f"span-{at}"}
    usual = {"start_ns": START_NS, "end_ns": START_NS, "attributes": {}, "resource": {}, "scope": "turntrace"}
    return Span(**{**ids, **usual, "scope_version": "0.1.0", **facts})


def post_spans(client: Client, *sent: Span) -> None:
    assert client.post(OTLP, content=encode(*sent), headers=PROTOBUF).status_code == 200


def post_scores(client: Client, *scores: dict[str, Any]) -> None:
    for each in scores:
        assert client.post(SCORES, json=each).status_code == 200


def rated(**facts: Any) -> dict[str, Any]:
    return {"id": "rec", "sessionId": "s1", "name": "n", "value": 1, "dataType": "NUMERIC", **facts}


# --- as recorded ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recorded(airline: Path) -> Recorded:
    """Return the recorded answers by what was asked; they lie next to the recorded conversations."""
    file = airline.parents[1] / "langfuse-answers.json"
    return {answer["what"]: answer for answer in json.loads(file.read_text(encoding="utf-8"))["answers"]}


def spans(content: bytes, **headers: str) -> dict[str, Any]:
    return {"method": "POST", "url": OTLP, "content": content, "headers": PROTOBUF | VERSION | headers}


def score(**facts: Any) -> dict[str, Any]:
    return {"method": "POST", "url": SCORES, "json": rated(**facts)}


def get(url: str) -> dict[str, Any]:
    return {"method": "GET", "url": url}


BODY = encode(span(1), span(2))
WRONG = (LangfuseServer.public_key, "sk-lf-wrong")
ASKED: dict[str, dict[str, Any]] = {
    "otlp protobuf": spans(BODY),
    "otlp protobuf gzip": spans(gzip.compress(BODY), **{"Content-Encoding": "gzip"}),
    "otlp deflate": spans(zlib.compress(BODY), **{"Content-Encoding": "deflate", **NO_VERSION}),
    "otlp wrong secret": spans(BODY) | {"auth": WRONG},
    "otlp unknown public key": spans(BODY) | {"auth": ("pk-lf-unknown", LangfuseServer.secret_key)},
    "otlp no auth": spans(BODY) | {"auth": None},
    "otlp garbage protobuf": spans(b"\xff\xff no protobuf"),
    "otlp empty": spans(b""),
    "otlp json": spans(b'{"resourceSpans": []}', **{"Content-Type": "application/json"}),
    "otlp wrong content type": spans(BODY, **{"Content-Type": "text/plain"}),
    "otlp gzip header, plain body": spans(BODY, **{"Content-Encoding": "gzip"}),
    "otlp one span of 6 MB": spans(encode(span(attributes={"text": "x" * 6_000_000}))),
    "otlp 30 MB in 6 spans": spans(encode(*[span(at, attributes={"text": "x" * 5_000_000}) for at in range(1, 7)])),
    "score numeric on a session": score(id="rec-a"),
    "the same again": score(id="rec-a"),
    "score array (as SDK 5 sends it)": score() | {"json": [rated()]},
    "score boolean 2": score(dataType="BOOLEAN", value=2),
    "score boolean true": score(dataType="BOOLEAN", value=True),
    "score categorical": score(id="rec-d", dataType="CATEGORICAL", value="good"),
    "score without subject": score(sessionId=None),
    "score with session and trace": score(traceId="1" * 32),
    "score unknown session": score(id="rec-g", sessionId="nobody"),
    "score id of 300 characters": score(id="i" * 300),
    "score wrong secret": score() | {"auth": WRONG},
    "score NaN as text": {"method": "POST", "url": SCORES, "content": json.dumps(rated(value=float("nan")))},
    **{what: get(f"/api/public/{what}") for what in ("health", "ready", "projects")},
    "projects wrong secret": get("/api/public/projects") | {"auth": WRONG},
    "observations page limit 5000": get(f"{OBSERVATIONS}?limit=5000"),
    **{f"{what} (events_only)": get(f"/api/public/{what}") for what in ("sessions", "traces")},
}
READ_BACK = {"observations of a session", "scores of a session"}
VARIES = {"id", "timestamp", "fileKey", "publicKey", "traceparent", "baggage", "createdAt", "updatedAt"}


def shape(value: Any) -> Any:
    """Return names and types of a value."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    return [shape(each) for each in value] if isinstance(value, list) else type(value)


def without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {name: without(each, names) for name, each in value.items() if name not in names}
    return [without(each, names) for each in value] if isinstance(value, list) else value


def test_every_recorded_answer_is_compared_but_those_of_metrics(recorded: Recorded) -> None:
    """What was asked for metrics is cut in the recording, and nothing of ours asks for them."""
    assert ASKED.keys() | READ_BACK == {what for what in recorded if not what.startswith("metrics ")}


@pytest.mark.parametrize("what", ASKED)
def test_an_answer_is_as_recorded(what: str, recorded: Recorded, client: Client) -> None:
    expected, answer = recorded[what], client.request(**ASKED[what])
    assert answer.status_code == expected["status"]
    assert answer.headers.get("content-type") == expected["headers"].get("content-type")
    if isinstance(expected["body"], str):
        assert f"<{len(answer.content)} bytes>" == expected["body"]
        return
    assert shape(answer.json()) == shape(expected["body"])
    varies = VARIES if expected["body"].get("name") == "otel-ingestion-job" else set()
    assert without(answer.json(), varies) == without(expected["body"], varies)


def ns_of(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000) * 10**6


def as_sent(observation: dict[str, Any]) -> Span:
    """Return the span of which an observation was made."""
    attributes, resource = (
        {name.removeprefix(of): value for name, value in observation["metadata"].items() if name.startswith(of)}
        for of in ("attributes.", "resourceAttributes.")
    )
    attributes |= {f"langfuse.observation.{side}": observation[side] for side in ("input", "output")}
    ids = {"span_id": observation["id"], "trace_id": observation["traceId"], "name": observation["name"]}
    times = {f"{side}_ns": ns_of(observation[f"{side}Time"]) for side in ("start", "end")}
    return span(**ids, **times, attributes=attributes, resource=resource)


def test_observations_are_read_back_as_recorded(recorded: Recorded, client: Client) -> None:
    expected = recorded["observations of a session"]["body"]
    session_id = expected["data"][0]["sessionId"]
    for observation in reversed(expected["data"]):
        post_spans(client, as_sent(observation))
    post_spans(client, span(1, attributes={"session.id": session_id}), span(2, attributes={"session.id": "other"}))
    mine = [{"type": "string", "column": "sessionId", "operator": "=", "value": session_id}]
    found = client.get(OBSERVATIONS, params={"fields": ALL_FIELDS, "filter": json.dumps(mine), "limit": 2}).json()
    assert shape(found) == shape(expected)
    times = {"createdAt", "updatedAt"}
    assert without(found, times) == without(expected, times)


def test_scores_are_read_back_as_recorded(recorded: Recorded, client: Client) -> None:
    expected = recorded["scores of a session"]["body"]
    for score in reversed(expected["data"]):
        value = int(score["value"]) if score["dataType"] == "BOOLEAN" else score["value"]
        facts = {name: score[name] for name in ("id", "name", "dataType")}
        post_scores(client, rated(**facts, sessionId=score["subject"]["id"], value=value))
        time.sleep(0.002)  # the newest is first, to the millisecond
    post_scores(client, rated(sessionId="other"))
    asked = {"sessionId": expected["data"][0]["subject"]["id"], "fields": "core,subject,details"}
    found = client.get(READ_SCORES, params=asked).json()
    assert shape(found) == shape(expected)
    times = {"timestamp", "createdAt", "updatedAt"}
    assert without(found, times) == without(expected, times)
    assert all(score["createdAt"].endswith(".000Z") for score in found["data"])


# --- lost -------------------------------------------------------------------------------------------------------------
def test_what_is_lost_has_arrived_and_arrives_once_when_it_is_sent_again(
    server: LangfuseServer, client: Client
) -> None:
    two = [span(1, name="agent"), span(2, name="tool")]
    server.fail(Failure("lost"), times=2)
    with pytest.raises(httpx.TransportError):
        post_spans(client, *two)
    with pytest.raises(httpx.TransportError):
        post_scores(client, rated(value=0.5))
    assert [each.name for each in server.spans()] == ["agent", "tool"]
    assert server.scores()["rec"]["value"] == 0.5
    assert [(request.status, request.spans) for request in server.requests] == [(0, 2), (0, 0)]
    post_spans(client, *two)
    post_scores(client, rated(value=0.5))
    assert [each.name for each in server.spans()] == ["agent", "tool"]
    assert len(client.get(READ_SCORES).json()["data"]) == 1
    assert server.store.score_counts == {"rec": 2}


def test_a_lost_question_has_no_answer_and_what_is_refused_is_not_stored(
    server: LangfuseServer, client: Client
) -> None:
    server.fail(Failure("lost"), times=2)
    for lost in (get("/api/public/projects"), score(name=None)):
        with pytest.raises(httpx.TransportError):
            client.request(**lost)
    assert server.scores() == {}


# --- pages ------------------------------------------------------------------------------------------------------------
def pages(client: Client, path: str, *, between: Callable[[], None] = lambda: None, **asked: Any) -> list[list[str]]:
    found, cursor = [], None
    while True:
        page = client.get(path, params=asked if cursor is None else {**asked, "cursor": cursor}).json()
        found.append([each["id"] for each in page["data"]])
        cursor = page["meta"].get("cursor")
        if cursor is None:
            return found
        between()


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7, 1000])
def test_pages_of_spans_of_one_time_neither_repeat_nor_skip(limit: int, client: Client) -> None:
    sent = [span(trace * 8 + at, trace_id=f"{trace:032x}") for trace in (3, 1, 2) for at in (1, 0)]
    post_spans(client, *sent)

    def newer_ones_come() -> None:
        post_spans(client, *[span(at, start_ns=START_NS + 10**9) for at in (98, 99)])

    found = pages(client, OBSERVATIONS, limit=limit, between=newer_ones_come)
    assert [len(page) for page in found[:-1]] == [limit] * (len(found) - 1)
    assert [each for page in found for each in page] == sorted((each.span_id for each in sent), reverse=True)


def test_pages_of_scores_of_one_time_neither_repeat_nor_skip() -> None:
    at = "2023-11-14T22:13:20.000+00:00"
    with LangfuseServer(score_arrays=True) as server, client_of(server) as client:
        client.post(SCORES, json=[rated(id=f"score-{number}", timestamp=at) for number in range(5)])
        found = pages(client, READ_SCORES, limit=2)
        assert found == [["score-4", "score-3"], ["score-2", "score-1"], ["score-0"]]
        assert client.get(READ_SCORES).json()["meta"] == {"limit": 50}


@pytest.mark.parametrize("path", [OBSERVATIONS, READ_SCORES])
@pytest.mark.parametrize("asked", ["limit=x", "limit=-1", "limit=1001", "cursor=MTA=", "cursor=x", "cursor=e30="])
def test_a_page_that_there_cannot_be_is_refused(asked: str, path: str, client: Client) -> None:
    answer = client.get(f"{path}?{asked}")
    assert answer.status_code == 400
    assert answer.json()["message"] in ("Invalid request data", "Invalid cursor format")


# --- what is shown ----------------------------------------------------------------------------------------------------
def test_only_the_groups_that_are_asked_for_are_shown(client: Client) -> None:
    post_spans(client, span(attributes={"langfuse.observation.input": "said"}))
    core = {"id", "traceId", "startTime", "endTime", "projectId", "parentObservationId", "type"}
    always = {"modelId", "inputPrice", "outputPrice", "totalPrice"}
    [least] = client.get(f"{OBSERVATIONS}?fields=core").json()["data"]
    assert least.keys() == core | always
    [some] = client.get(f"{OBSERVATIONS}?fields=io,unknown").json()["data"]
    assert some.keys() == core | always | {"input", "output"}
    [usual] = client.get(OBSERVATIONS).json()["data"]
    assert {"name", "level", "sessionId", "isRootObservation"} <= usual.keys()
    assert {"metadata", "input", "usageDetails", "createdAt"}.isdisjoint(usual)
    post_scores(client, rated())
    assert {"subject", "comment"}.isdisjoint(client.get(READ_SCORES).json()["data"][0])


@pytest.mark.parametrize("scope", ["turntrace", "langfuse-sdk"])
def test_attributes_of_langfuses_own_spans_are_dropped_but_for_what_they_mean(scope: str, client: Client) -> None:
    said = {"turn.number": 5, "session.id": "s1", "langfuse.observation.type": "tool"}
    post_spans(client, span(attributes={**said, "langfuse.observation.metadata.turn": "5"}, scope=scope))
    [found] = client.get(f"{OBSERVATIONS}?fields=basic,metadata").json()["data"]
    assert (found["type"], found["sessionId"], found["metadata"]["turn"]) == ("TOOL", "s1", "5")
    raw = {name: value for name, value in found["metadata"].items() if name.startswith("attributes.")}
    assert bool(raw) is (scope == "turntrace")
    assert not raw or {f"attributes.{name}": value for name, value in said.items()}.items() <= raw.items()


# --- filters ----------------------------------------------------------------------------------------------------------
def one(column: str, operator: str, value: Any, kind: str = "string", **more: Any) -> dict[str, Any]:
    return {"type": kind, "column": column, "operator": operator, "value": value, **more}


def of_metadata(key: str, operator: str, value: Any) -> dict[str, Any]:
    return one("metadata", operator, value, "stringObject", key=key)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (one("sessionId", "=", "s-1"), "ab"),
        (one("sessionId", "=", "s"), ""),
        (one("name", "contains", "turn"), "ac"),
        (one("name", "does not contain", "turn"), "b"),
        (one("name", "starts with", "turn"), "a"),
        (one("name", "ends with", "turn"), "c"),
        (one("type", "any of", ["TOOL", "AGENT"], "stringOptions"), "b"),
        (one("latency", ">", 1.5, "number"), "c"),
        (one("startTime", "<", "2023-11-14T22:13:21Z", "datetime"), "a"),
        (one("isRootObservation", "=", True, "boolean"), "abc"),
        (of_metadata("attributes.turn.number", "=", "2"), "b"),
        (of_metadata("attributes.turn.number", "contains", "1"), "ac"),
        (of_metadata("attributes.turn.number", "does not contain", "2"), "ac"),
        (of_metadata("attributes.premium", "=", "true"), "a"),
        (of_metadata("attributes.nobody.said", "does not contain", "x"), ""),
    ],
)
def test_filters_find_what_they_say(wanted: dict[str, Any], found: str, client: Client) -> None:
    known: list[tuple[str, str, dict[str, Any]]] = [
        ("turn one", "s-1", {"turn.number": 1, "premium": True}),
        ("search", "s-1", {"turn.number": 2, "langfuse.observation.type": "tool"}),
        ("last turn", "s-2", {"turn.number": 11}),
    ]
    for at, (name, session_id, attributes) in enumerate(known):
        start_ns, said = START_NS + at * 10**9, {"session.id": session_id, **attributes}
        post_spans(client, span(at + 1, name=name, start_ns=start_ns, end_ns=start_ns + at * 10**9, attributes=said))
    data = client.get(OBSERVATIONS, params={"filter": json.dumps([wanted])}).json()["data"]
    assert sorted(each["name"] for each in data) == sorted(known["abc".index(letter)][0] for letter in found)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ([one("sessionId", ">=", "s1")], "Invalid request data"),
        ([one("sessionId", "=", 1)], "Invalid request data"),
        ([one("sessionId", "=", "s1", "text")], "Invalid request data"),
        ([{"type": "stringObject", "column": "metadata", "operator": "=", "value": "x"}], "Invalid request data"),
        ({"column": "sessionId"}, "Invalid request data"),
        ("nonsense", "Invalid request data"),
        ([one("session", "=", "s1")], "Column session does not match a UI / CH table mapping."),
        (
            [one("metadata", ">=", 2, "numberObject", key="attributes.turn.number")],
            "Invalid filter type 'numberObject' for column 'metadata'. Expected filter type 'stringObject'.",
        ),
        ([one("output", "contains", "x")], "Input/output filters require at least one `matches` or `=` operator."),
    ],
)
def test_filters_that_langfuse_cannot_answer_are_refused(wanted: Any, words: str, client: Client) -> None:
    answer = client.get(OBSERVATIONS, params={"filter": json.dumps(wanted)})
    assert (answer.status_code, answer.json()["message"]) == (400, words)


# --- scores -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("facts", "path", "words"),
    [
        ({"name": None}, ["name"], "expected string, received null"),
        ({"name": ""}, ["name"], "Too small"),
        ({"observationId": "1" * 16}, None, "Provide exactly one of"),
        ({"observationId": "1" * 16, "sessionId": None}, None, "ObservationId requires traceId."),
        ({"value": True}, ["value"], "expected number, received boolean"),
        ({"value": "1"}, ["value"], "expected number, received string"),
        ({"value": 0.5, "dataType": "BOOLEAN"}, ["value"], "either 0 or 1"),
        ({"value": 1, "dataType": "CATEGORICAL"}, ["value"], "expected string, received number"),
        ({"dataType": "OTHER"}, ["dataType"], "Invalid input"),
        ({"id": 1}, ["id"], "expected string, received number"),
    ],
)
def test_a_score_with_a_mistake_is_refused_in_words(
    facts: dict[str, Any], path: list[str] | None, words: str, server: LangfuseServer, client: Client
) -> None:
    answer = client.post(SCORES, json=rated(**facts))
    assert answer.status_code == 400
    [mistake] = answer.json()["error"]
    assert mistake["path"] == (path or ["traceId", "sessionId", "datasetRunId", "observationId"])
    assert words in mistake["message"]
    assert server.scores() == {}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "nonsense"])
def test_a_number_that_json_does_not_know_is_no_json(value: str, server: LangfuseServer, client: Client) -> None:
    answer = client.post(SCORES, content=f'{{"sessionId": "s1", "name": "n", "value": {value}}}')
    assert (answer.status_code, answer.text) == (400, "Invalid JSON")
    assert server.scores() == {}


def test_a_score_may_be_without_an_id_or_a_type_and_of_an_observation(server: LangfuseServer, client: Client) -> None:
    ids = []
    for value in (0.5, "good"):
        score = {"traceId": "1" * 32, "observationId": "2" * 16, "name": "n", "value": value}
        ids.append(client.post(SCORES, json=score).json()["id"])
    assert server.scores().keys() == set(ids)
    found = client.get(READ_SCORES, params={"traceId": "1" * 32, "fields": "core,subject"}).json()["data"]
    assert {each["id"]: each["dataType"] for each in found} == dict(zip(ids, ("NUMERIC", "CATEGORICAL"), strict=True))
    assert found[0]["subject"] == {"kind": "observation", "id": "2" * 16, "traceId": "1" * 32}
