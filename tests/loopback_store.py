"""What the server on loopback keeps, and how it gives it back."""

import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue

from loopback_answers import OBSERVATIONS, SCORES, filters_of, matches, mistakes_of, time_of, wrong_data, wrong_request


@dataclass(frozen=True)
class Span:
    """A span as it came, and when; by the time two are not told apart."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    scope: str
    resource: dict[str, Any]
    scope_version: str = ""
    is_error: bool = False
    status_message: str = ""
    received_ns: int = field(default=0, compare=False)


def decode(body: bytes) -> Iterator[Span]:
    """Give the spans of an OTLP request."""
    request = ExportTraceServiceRequest()
    request.ParseFromString(body)
    for resource in request.resource_spans:
        about = _pairs(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex() or None,
                    span.name,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    _pairs(span.attributes),
                    scope.scope.name,
                    about,
                    scope.scope.version,
                    span.status.code == span.status.STATUS_CODE_ERROR,
                    span.status.message,
                )


def encode(*spans: Span) -> bytes:
    """Make an OTLP request of spans, each with its resource and scope."""
    request = ExportTraceServiceRequest()
    for span in spans:
        about = request.resource_spans.add()
        about.resource.attributes.extend(_as_pairs(span.resource))
        within = about.scope_spans.add()
        within.scope.name, within.scope.version = span.scope, span.scope_version
        within.spans.add(
            trace_id=bytes.fromhex(span.trace_id),
            span_id=bytes.fromhex(span.span_id),
            parent_span_id=bytes.fromhex(span.parent_id or ""),
            name=span.name,
            start_time_unix_nano=span.start_ns,
            end_time_unix_nano=span.end_ns,
            attributes=_as_pairs(span.attributes),
            status={"code": 2 if span.is_error else 0, "message": span.status_message},
        )
    return bytes(request.SerializeToString())


def _as_pairs(values: Mapping[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=name, value=_as_value(value)) for name, value in values.items()]


def _as_value(value: Any) -> AnyValue:
    if isinstance(value, list):
        return AnyValue(array_value=ArrayValue(values=[_as_value(each) for each in value]))
    names = {bool: "bool_value", int: "int_value", float: "double_value", str: "string_value"}
    return AnyValue(**{names[type(value)]: value})


def _pairs(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return None if kind is None else getattr(value, kind)


class Store:
    """Keeps what came. Spans are decoded when they are asked for.

    Attributes:
        scores: The scores by id, each as it came last.
        score_counts: How often each came.
    """

    def __init__(self) -> None:
        self._bodies: list[tuple[int, bytes]] = []
        self._spans: dict[tuple[str, str], Span] = {}
        self._lock = threading.Lock()
        self.scores: dict[str, dict[str, Any]] = {}
        self.score_counts: dict[str, int] = {}

    def put_spans(self, body: bytes) -> int:
        """Keep an OTLP request, and tell how many spans it has."""
        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        with self._lock:
            self._bodies.append((time.time_ns(), body))
        return sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)

    def take_scores(self, given: Any, *, arrays: bool) -> Any:
        """Answer ``POST /api/public/scores``.

        Args:
            given: What came: a score, or several.
            arrays: Whether several may come, as to a server that is newer than 4.16.

        Raises:
            BadRequestError: If one of them is refused; then none is kept.
        """
        is_array = isinstance(given, list) and arrays
        scores = given if is_array else [given]
        mistakes = [mistake for score in scores for mistake in mistakes_of(score)]
        if mistakes:
            raise wrong_data(*mistakes)
        # 4.16 stamps a score when it comes, whatever time it says: its source has no such field.
        unknown = () if arrays else ("timestamp",)
        ids = []
        for score in scores:
            known = {name: value for name, value in score.items() if name not in unknown}
            ids.append({"id": score.get("id") or str(uuid.uuid4())})
            self.put_score(known | ids[-1])
        return ids if is_array else ids[0]

    def put_score(self, score: dict[str, Any]) -> None:
        """Keep a score; one of the same id is replaced."""
        now = time.time_ns()
        with self._lock:
            known = self.scores.get(score["id"], {"created_ns": now})
            self.scores[score["id"]] = {**score, "created_ns": known["created_ns"], "received_ns": now}
            self.score_counts[score["id"]] = self.score_counts.get(score["id"], 0) + 1

    def spans(self) -> list[Span]:
        """Return the spans, each once, as it came last."""
        with self._lock:
            for received_ns, body in self._bodies:
                for span in decode(body):
                    self._spans[span.trace_id, span.span_id] = replace(span, received_ns=received_ns)
            self._bodies.clear()
            return list(self._spans.values())

    def forget(self, span_id: str) -> None:
        """Lose a span."""
        self.spans()
        with self._lock:
            self._spans = {key: span for key, span in self._spans.items() if span.span_id != span_id}

    # --- reading back -------------------------------------------------------------------------------------------------
    def observations(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """Answer ``GET /api/public/v2/observations``, the newest first.

        Raises:
            BadRequestError: If a real server refuses what is asked.
        """
        wanted = filters_of(asked)
        found = [observation for observation in map(_observation, self.spans()) if matches(observation, wanted)]
        page = OBSERVATIONS.page(found, asked)
        groups = asked.get("fields", "core,basic").split(",")
        shown = {name for group in ("core", *groups) for name in _GROUPS.get(group, ())} | set(_ALWAYS)
        data = [{name: value for name, value in each.items() if name in shown} for each in page["data"]]
        return page | {"data": data}

    def read_scores(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """Answer ``GET /api/public/v3/scores``, the newest first.

        Raises:
            BadRequestError: If a real server refuses what is asked.
        """
        subjects = [name for name in ("traceId", "sessionId") if name in asked]
        if len(subjects) > 1:
            raise wrong_request("At most one of traceId, sessionId, observationId, experimentId may be specified")
        names = [name for name in (*subjects, "id", "name") if name in asked]
        with self._lock:
            scores = list(self.scores.values())
        # Each of them may be several, with a comma between them.
        mine = [score for score in scores if all(score.get(name) in asked[name].split(",") for name in names)]
        page = SCORES.page([_score(score) for score in mine], asked)
        groups = asked.get("fields", "core").split(",")
        hidden = {name for group, names in _SCORE_GROUPS.items() if group not in groups for name in names}
        data = [{name: value for name, value in each.items() if name not in hidden} for each in page["data"]]
        return page | {"data": data}


def _time(ns: int) -> str:
    return time_of(datetime.fromtimestamp(ns // 10**9, UTC).replace(microsecond=ns // 1000 % 10**6))


# --- observations -----------------------------------------------------------------------------------------------------
_GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "core": ("id", "traceId", "startTime", "endTime", "projectId", "parentObservationId", "type"),
    "basic": (
        *("name", "level", "statusMessage", "version", "environment", "bookmarked", "public"),
        *("userId", "sessionId", "isRootObservation"),
    ),
    "time": ("completionStartTime", "createdAt", "updatedAt"),
    "io": ("input", "output"),
    "metadata": ("metadata",),
    "model": ("model", "internalModelId", "modelParameters"),
    "usage": (
        *("usageDetails", "inputUsage", "outputUsage", "totalUsage", "costDetails", "inputCost", "outputCost"),
        *("totalCost", "usagePricingTierId", "usagePricingTierName"),
    ),
    "prompt": ("promptId", "promptName", "promptVersion"),
    "metrics": ("latency", "timeToFirstToken"),
    "trace_context": ("tags", "release", "traceName"),
}
_ALWAYS: Final = ("modelId", "inputPrice", "outputPrice", "totalPrice")
_SAID_ELSEWHERE: Final = {f"langfuse.{of}.{side}" for of in ("observation", "trace") for side in ("input", "output")}


def _observation(span: Span) -> dict[str, Any]:
    said = span.attributes
    return {
        **_basics(span),
        "completionStartTime": _json(said, "langfuse.observation.completion_start_time", None),
        "createdAt": _time(span.received_ns),
        "updatedAt": _time(span.received_ns),
        "input": said.get("langfuse.observation.input"),
        "output": said.get("langfuse.observation.output"),
        "metadata": _metadata(span),
        "model": said.get("gen_ai.response.model")
        or said.get("gen_ai.request.model")
        or said.get("langfuse.observation.model.name", ""),
        "internalModelId": "",
        "modelParameters": _json(said, "langfuse.observation.model.parameters", {}),
        **_usage(said),
        "latency": (span.end_ns // 10**6 - span.start_ns // 10**6) / 1000 or None,
        "timeToFirstToken": None,
        "promptId": None,
        "promptName": said.get("langfuse.observation.prompt.name"),
        "promptVersion": said.get("langfuse.observation.prompt.version"),
        "tags": said.get("langfuse.trace.tags", []),
        "release": said.get("langfuse.release") or span.resource.get("langfuse.release") or "",
        "traceName": said.get("langfuse.trace.name", ""),
        **dict.fromkeys(_ALWAYS),
    }


def _basics(span: Span) -> dict[str, Any]:
    said = span.attributes
    return {
        "id": span.span_id,
        "traceId": span.trace_id,
        "startTime": _time(span.start_ns),
        "endTime": _time(span.end_ns),
        "projectId": "local-project",
        "parentObservationId": span.parent_id,
        "type": str(said.get("langfuse.observation.type", "span")).upper(),
        "name": span.name,
        "level": said.get("langfuse.observation.level") or ("ERROR" if span.is_error else "DEFAULT"),
        "statusMessage": said.get("langfuse.observation.status_message", span.status_message),
        "version": said.get("langfuse.version") or span.resource.get("service.version", ""),
        "environment": said.get("langfuse.environment") or span.resource.get("langfuse.environment") or "default",
        "userId": said.get("user.id"),
        "sessionId": said.get("session.id"),
        "isRootObservation": span.parent_id is None or said.get("langfuse.internal.is_app_root") is True,
        "bookmarked": False,
        "public": said.get("langfuse.trace.public") is True,
    }


def _metadata(span: Span) -> dict[str, Any]:
    """Return all that was said: of a span of Langfuse's own SDK no attributes (F1), of another all but what it says."""
    found: dict[str, Any] = {}
    if not span.scope.startswith("langfuse-sdk"):
        found = {f"attributes.{name}": v for name, v in span.attributes.items() if name not in _SAID_ELSEWHERE}
    found |= {f"resourceAttributes.{name}": value for name, value in span.resource.items()}
    found |= {"scope.name": span.scope, "scope.version": span.scope_version}
    for prefix in ("langfuse.observation.metadata.", "langfuse.trace.metadata."):
        found |= {name.removeprefix(prefix): v for name, v in span.attributes.items() if name.startswith(prefix)}
    return found


def _usage(said: Mapping[str, Any]) -> dict[str, Any]:
    tokens = {side: int(said.get(f"gen_ai.usage.{side}_tokens", 0)) for side in ("input", "output")}
    usage = _json(said, "langfuse.observation.usage_details", tokens if any(tokens.values()) else {})
    if usage and "total" not in usage:
        usage = {**usage, "total": sum(usage.values())}
    cost = _json(said, "langfuse.observation.cost_details", {})
    return {
        "usageDetails": usage,
        "inputUsage": usage.get("input", 0),
        "outputUsage": usage.get("output", 0),
        "totalUsage": usage.get("total", 0),
        "costDetails": cost,
        "inputCost": cost.get("input"),
        "outputCost": cost.get("output"),
        "totalCost": cost.get("total", sum(cost.values())),
        "usagePricingTierId": None,
        "usagePricingTierName": None,
    }


def _json(said: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    try:
        return json.loads(said[name])
    except (KeyError, ValueError):
        return said.get(name, otherwise)


# --- scores -----------------------------------------------------------------------------------------------------------
_SCORE_GROUPS: Final = {"details": ("comment", "configId", "metadata"), "subject": ("subject",)}


def _score(score: dict[str, Any]) -> dict[str, Any]:
    value, kind = score["value"], score.get("dataType")
    given = score.get("timestamp")
    return {
        "id": score["id"],
        "projectId": "local-project",
        "name": score["name"],
        "source": "API",
        "timestamp": time_of(datetime.fromisoformat(given)) if given else _time(score["received_ns"]),
        "environment": score.get("environment", "default"),
        "createdAt": _time(score["created_ns"] // 10**9 * 10**9),  # recorded: to the second
        "updatedAt": _time(score["received_ns"]),
        "comment": score.get("comment"),
        "configId": score.get("configId"),
        "metadata": score.get("metadata") or {},
        "subject": _subject(score),
        "dataType": kind or ("CATEGORICAL" if isinstance(value, str) else "NUMERIC"),
        "value": bool(value) if kind == "BOOLEAN" else value,
    }


def _subject(score: dict[str, Any]) -> dict[str, Any]:
    if score.get("observationId"):
        return {"kind": "observation", "id": score["observationId"], "traceId": score["traceId"]}
    names = {"sessionId": "session", "traceId": "trace", "datasetRunId": "experiment"}
    return next({"kind": kind, "id": score[name]} for name, kind in names.items() if score.get(name))
