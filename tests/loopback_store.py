"""What the server on loopback keeps, and how it gives it back."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_PAGE: Final = 50


@dataclass(frozen=True)
class Span:
    """A span as it came."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    scope: str
    resource: dict[str, Any]


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
                )


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
        self._bodies: list[bytes] = []
        self._spans: dict[tuple[str, str], Span] = {}
        self._lock = threading.Lock()
        self.scores: dict[str, dict[str, Any]] = {}
        self.score_counts: dict[str, int] = {}

    def put_spans(self, body: bytes) -> int:
        """Keep an OTLP request, and tell how many spans it has."""
        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        with self._lock:
            self._bodies.append(body)
        return sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)

    def put_score(self, score: dict[str, Any]) -> None:
        """Keep a score; one of the same id is replaced."""
        with self._lock:
            self.scores[score["id"]] = {**score, "received": time.time()}
            self.score_counts[score["id"]] = self.score_counts.get(score["id"], 0) + 1

    def spans(self) -> list[Span]:
        """Return the spans, each once, as it came last."""
        with self._lock:
            for body in self._bodies:
                for span in decode(body):
                    self._spans[span.trace_id, span.span_id] = span
            self._bodies.clear()
            return list(self._spans.values())

    def forget(self, span_id: str) -> None:
        """Lose a span."""
        self.spans()
        with self._lock:
            self._spans = {key: span for key, span in self._spans.items() if span.span_id != span_id}

    # --- reading back -------------------------------------------------------------------------------------------------
    def observations(self, asked: dict[str, str]) -> dict[str, Any]:
        """Answer ``GET /api/public/v2/observations``, the newest first."""
        wanted = json.loads(asked.get("filter", "[]"))
        found = [observation for observation in map(_observation, self.spans()) if _matches(observation, wanted)]
        found.sort(key=lambda each: (each["startTime"], each["traceId"], each["id"]), reverse=True)
        return _page(found, asked)

    def read_scores(self, asked: dict[str, str]) -> dict[str, Any]:
        """Answer ``GET /api/public/v3/scores``."""
        found = [
            _score(score)
            for score in self.scores.values()
            if all(asked[name] == score.get(name) for name in ("sessionId", "traceId") if name in asked)
        ]
        return _page(found, asked)


def _page(found: list[dict[str, Any]], asked: dict[str, str]) -> dict[str, Any]:
    limit = int(asked.get("limit", _PAGE))
    start = int(base64.b64decode(asked["cursor"])) if "cursor" in asked else 0
    meta: dict[str, Any] = {"limit": limit}
    if start + limit < len(found):
        meta["cursor"] = base64.b64encode(str(start + limit).encode()).decode()
    return {"data": found[start : start + limit], "meta": meta}


def _time(ns: float) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _observation(span: Span) -> dict[str, Any]:
    said = span.attributes
    # Raw attributes of Langfuse's own SDK are dropped (F1); of others they survive as metadata (F2).
    kept = {k: v for k, v in said.items() if k.startswith("langfuse.") or not span.scope.startswith("langfuse-sdk")}
    metadata = {f"attributes.{name}": value for name, value in kept.items()}
    metadata |= {f"resourceAttributes.{name}": value for name, value in span.resource.items()}
    for prefix in ("langfuse.observation.metadata.", "langfuse.trace.metadata."):
        metadata |= {name.removeprefix(prefix): v for name, v in said.items() if name.startswith(prefix)}
    kind = str(said.get("langfuse.observation.type", "span")).upper()
    tokens = [int(said.get(f"gen_ai.usage.{side}_tokens", 0)) for side in ("input", "output")]
    return {
        "id": span.span_id,
        "traceId": span.trace_id,
        "startTime": _time(span.start_ns),
        "endTime": _time(span.end_ns),
        "projectId": "local-project",
        "parentObservationId": span.parent_id,
        "type": kind,
        "name": span.name,
        "environment": said.get("langfuse.environment") or span.resource.get("langfuse.environment") or "default",
        "input": said.get("langfuse.observation.input"),
        "output": said.get("langfuse.observation.output"),
        "metadata": metadata | {"scope.name": span.scope},
        "model": said.get("gen_ai.response.model") or said.get("gen_ai.request.model") or "",
        "promptName": said.get("langfuse.observation.prompt.name"),
        "promptVersion": said.get("langfuse.observation.prompt.version"),
        "usageDetails": {"input": tokens[0], "output": tokens[1], "total": sum(tokens)} if any(tokens) else {},
        "inputUsage": tokens[0],
        "outputUsage": tokens[1],
        "totalUsage": sum(tokens),
        "userId": said.get("user.id"),
        "sessionId": said.get("session.id"),
        "isRootObservation": span.parent_id is None,
    }


def _matches(observation: dict[str, Any], wanted: list[dict[str, Any]]) -> bool:
    for each in wanted:
        held = observation.get(each["column"])
        if "key" in each:
            held = (held or {}).get(each["key"])
        value = each["value"]
        if each["operator"] == "contains" and str(value) not in str(held):
            return False
        if each["operator"] == "=" and str(held) != str(value):
            return False
    return True


def _score(score: dict[str, Any]) -> dict[str, Any]:
    kind = "session" if "sessionId" in score else "trace"
    value = score["value"]
    return {
        "id": score["id"],
        "projectId": "local-project",
        "name": score["name"],
        "source": "API",
        "timestamp": score.get("timestamp") or _time(score["received"] * 1e9),
        "environment": score.get("environment", "default"),
        "comment": score.get("comment"),
        "configId": None,
        "metadata": {},
        "subject": {"kind": kind, "id": score[f"{kind}Id"]},
        "dataType": score.get("dataType", "NUMERIC"),
        "value": bool(value) if score.get("dataType") == "BOOLEAN" else value,
    }
