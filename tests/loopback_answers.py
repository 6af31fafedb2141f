"""How a Langfuse 4.16 refuses, filters and pages, in its own words.

Recorded (F11b) are the answers to spans and scores, a limit that is too large, and a cursor of observations. The rest
is as the reference of the API and the source of that version say: filters, names and ids of scores, their cursors.
"""

import base64
import json
import operator
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

Json = dict[str, Any]
WRONG_KEYS: Final = {"message": "Invalid credentials. Confirm that you've configured the correct host."}
NOT_HERE: Final = {
    "message": "This endpoint is not available on deployments running in Langfuse v4 events_only mode. "
    "Learn more about Langfuse v4 at: https://langfuse.com/docs/v4"
}
NO_JSON: Final = "Invalid JSON"
"""What is answered to a body that is none: a text of 12 bytes without a content type."""
_MISSING: Final = object()
_KINDS: Final[dict[type, str]] = {
    **{bool: "boolean", str: "string", int: "number", float: "number"},
    **{list: "array", dict: "object", type(None): "null", object: "undefined"},
}


class BadRequestError(Exception):
    """What was asked is answered with 400.

    Args:
        body: What is answered.
    """

    def __init__(self, body: Json) -> None:
        super().__init__(body["message"])
        self.body = body


def wrong_data(*mistakes: Json) -> BadRequestError:
    """Refuse data for the mistakes that are in them."""
    return BadRequestError({"message": "Invalid request data", "error": list(mistakes)})


def wrong_request(words: str) -> BadRequestError:
    """Refuse a request that is well formed and cannot be answered."""
    return BadRequestError({"message": words, "error": "InvalidRequestError"})


def _wrong_type(expected: str, value: Any, *path: str | int) -> Json:
    received = "NaN" if value != value else _KINDS[type(value)]
    words = f"Invalid input: expected {expected}, received {received}"
    return {"expected": expected, "code": "invalid_type", "path": list(path), "message": words}


def _no_such(discriminator: str, *path: str | int) -> Json:
    found = {"code": "invalid_union", "errors": [], "note": "No matching discriminator", "discriminator": discriminator}
    return {**found, "path": [*path, discriminator], "message": "Invalid input"}


def _no_option(options: Sequence[str], *path: str | int) -> Json:
    words = "|".join(f'"{option}"' for option in options)
    said = f"Invalid option: expected one of {words}" if len(options) > 1 else f"Invalid input: expected {words}"
    return {"code": "invalid_value", "values": list(options), "path": list(path), "message": said}


def _out_of_bounds(code: str, bound: int, words: str, *path: str, origin: str = "number") -> Json:
    name = "maximum" if code == "too_big" else "minimum"
    return {"origin": origin, "code": code, name: bound, "inclusive": True, "path": list(path), "message": words}


# --- spans ------------------------------------------------------------------------------------------------------------
def job_of(number: int, public_key: str, headers: Mapping[str, str]) -> Json:
    """Return what is answered to spans: the job that will take them in.

    Args:
        number: How many jobs there have been.
        public_key: The key that they came with.
        headers: The headers that they came with, their names in lower case.
    """
    now, project = datetime.now(UTC), "local-project"
    version = headers.get("x-langfuse-ingestion-version", "")
    baggage = [f"langfuse.header.x-langfuse-ingestion-version={version}"] if version else []
    baggage += ["langfuse.clickhouse.surface=publicapi", f"langfuse.project.id={project}"]
    key, scope = f"events/otel/{project}/{now:%Y/%m/%d/%H/%M}/{uuid.uuid4()}.json", {"projectId": project}
    payload = {
        "data": {"fileKey": key, "publicKey": public_key},
        "authCheck": {"validKey": True, "scope": {**scope, "accessLevel": "project", "orgId": "local-org"}},
        "sdkName": headers.get("x-langfuse-sdk-name", "unknown"),
        "sdkVersion": headers.get("x-langfuse-sdk-version", "unknown"),
        "ingestionVersion": version,
    }
    name = "otel-ingestion-job"
    tries = {"attempts": 6, "removeOnComplete": True, "removeOnFail": 100000}
    return {
        "name": name,
        "data": {"id": str(uuid.uuid4()), "timestamp": time_of(now), "name": name, "payload": payload},
        "opts": {
            **tries,
            "backoff": {"type": "exponential", "delay": 5000},
            "traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
            "baggage": ",".join(baggage),
        },
        "id": str(number),
        **{"progress": 0, "returnvalue": None, "stacktrace": None, "priority": 0},
        **{"attemptsStarted": 0, "attemptsMade": 0, "stalledCounter": 0},
        "timestamp": int(now.timestamp() * 1000),
        "queueQualifiedName": "bull:otel-ingestion-queue",
    }


def time_of(at: datetime) -> str:
    """Write a time as Langfuse does: in UTC, to the millisecond, with a Z."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- scores -----------------------------------------------------------------------------------------------------------
_SUBJECTS: Final = ("traceId", "sessionId", "datasetRunId", "observationId")
_ONE_SUBJECT: Final = (
    "Provide exactly one of the following: traceId (with optional observationId), sessionId or datasetRunId. "
    "ObservationId requires traceId."
)
_VALUES: Final = {
    **{"NUMERIC": "number", "BOOLEAN": "number"},
    **{"CATEGORICAL": "string", "CORRECTION": "string", "TEXT": "string"},
}
_NO_BOOLEAN: Final = "Value must be a number equal to either 0 or 1 for data type BOOLEAN"


def mistakes_of(score: Any) -> list[Json]:
    """Return why a score is refused: nothing if it is taken."""
    if not isinstance(score, dict):
        return [_wrong_type("object", score)] * 2  # once as a score, and once as one of its type
    found = [*_mistakes_in_texts(score), *_mistakes_in_value(score)]
    if all(mistake["code"] in ("custom", "too_small") for mistake in found) and not _has_one_subject(score):
        found.append({"code": "custom", "path": list(_SUBJECTS), "message": _ONE_SUBJECT})
    return found


def _mistakes_in_texts(score: Json) -> list[Json]:
    name = score.get("name", _MISSING)
    found = [] if isinstance(name, str) else [_wrong_type("string", name, "name")]
    if name == "":
        words = "Too small: expected string to have >=1 characters"
        found.append(_out_of_bounds("too_small", 1, words, "name", origin="string"))
    for key in ("id", *_SUBJECTS, "comment"):
        value = score.get(key)
        if value is not None and not isinstance(value, str):
            found.append(_wrong_type("string", value, key))
    return found


def _mistakes_in_value(score: Json) -> list[Json]:
    kind, value = score.get("dataType", _MISSING), score.get("value", _MISSING)
    is_number = _KINDS[type(value)] == "number" and abs(value) != float("inf")
    if kind is _MISSING:  # a number is NUMERIC, a text is CATEGORICAL
        errors = [[_wrong_type(each, value)] for each in ("string", "number")]
        either = {"code": "invalid_union", "errors": errors, "path": ["value"], "message": "Invalid input"}
        return [] if is_number or isinstance(value, str) else [either]
    if not isinstance(kind, str) or kind not in _VALUES:
        return [_no_such("dataType")]
    if not (is_number if _VALUES[kind] == "number" else isinstance(value, str)):
        return [_wrong_type(_VALUES[kind], value, "value")]
    if kind == "BOOLEAN" and value not in (0, 1):
        return [{"code": "custom", "path": ["value"], "message": _NO_BOOLEAN}]
    return []


def _has_one_subject(score: Json) -> bool:
    given = [name for name in _SUBJECTS if score.get(name)]
    return given in (["traceId"], ["traceId", "observationId"], ["sessionId"], ["datasetRunId"])


# --- filters ----------------------------------------------------------------------------------------------------------
_TEXT: Final = ("=", "contains", "does not contain", "starts with", "ends with")
_NUMBER: Final = ("=", ">", "<", ">=", "<=")
_OPERATORS: Final[dict[str, tuple[str, ...]]] = {
    "datetime": (">", "<", ">=", "<="),
    "string": _TEXT,
    "number": _NUMBER,
    "stringOptions": ("any of", "none of"),
    "categoryOptions": ("any of", "none of"),
    "arrayOptions": ("any of", "none of", "all of"),
    "stringObject": _TEXT,
    "numberObject": _NUMBER,
    "booleanObject": ("=", "<>"),
    "boolean": ("=", "<>"),
    "null": ("is null", "is not null"),
}
_MATCHES: Final = "matches"
_HAVE_KEY: Final = ("stringObject", "numberObject", "booleanObject", "categoryOptions")
_COLUMNS: Final[dict[str, tuple[str, str]]] = {
    **{name: ("stringOptions", name) for name in ("id", "type", "name", "environment", "level", "promptName")},
    **{name: ("string", name) for name in ("traceId", "userId", "sessionId", "statusMessage", "version", "release")},
    **{name: ("string", name) for name in ("input", "output", "parentObservationId")},
    **dict.fromkeys(("model", "providedModelName"), ("stringOptions", "model")),
    **{name: ("datetime", name) for name in ("startTime", "endTime")},
    **{name: ("number", name) for name in ("latency", "promptVersion", "totalCost", "inputCost", "outputCost")},
    **{f"{side}Tokens": ("number", f"{side}Usage") for side in ("input", "output", "total")},
    **dict.fromkeys(("tags", "traceTags"), ("arrayOptions", "tags")),
    "traceName": ("stringOptions", "traceName"),
    "isRootObservation": ("boolean", "isRootObservation"),
    "metadata": ("stringObject", "metadata"),
}
"""The columns that this server knows, with their type and the field of an observation; a real one has more."""
_ALSO: Final = dict.fromkeys(("string", "stringOptions"), ("string", "stringOptions")) | {
    "arrayOptions": ("arrayOptions", "stringOptions")
}
_PARAMETERS: Final = (
    *("sessionId", "traceId", "name", "type", "userId", "level", "version", "environment", "parentObservationId"),
)


def filters_of(asked: Mapping[str, str]) -> list[Json]:
    """Read which observations are asked for: by ``filter``, and by parameters for columns that it does not name.

    Raises:
        BadRequestError: If a real server refuses it.
    """
    try:
        wanted = json.loads(asked.get("filter") or "[]")
    except ValueError:
        raise wrong_request("Invalid JSON in filter parameter") from None
    if not isinstance(wanted, list):
        raise wrong_data(_wrong_type("array", wanted, "filter"))
    mistakes = [mistake for at, each in enumerate(wanted) for mistake in _mistakes_in_filter(each, at)]
    if mistakes:
        raise wrong_data(*mistakes)
    for each in wanted:
        _check_column(each)
    said = [each for each in wanted if each["column"] in ("input", "output")]
    if said and not any(each["operator"] in ("=", _MATCHES) for each in said):
        raise wrong_request("Input/output filters require at least one `matches` or `=` operator.")
    named = {each["column"] for each in wanted}
    simple = [name for name in _PARAMETERS if name in asked and name not in named]
    return wanted + [{"type": "string", "column": name, "operator": "=", "value": asked[name]} for name in simple]


def _mistakes_in_filter(each: Any, at: int) -> list[Json]:
    path = ("filter", at)
    if not isinstance(each, dict):
        return [_wrong_type("object", each, *path)]
    kind = each.get("type")
    if not isinstance(kind, str) or kind not in _OPERATORS:
        return [_no_such("type", *path)]
    found = []
    for name in ("column", "key") if kind in _HAVE_KEY else ("column",):
        if not isinstance(each.get(name), str):
            found.append(_wrong_type("string", each.get(name, _MISSING), *path, name))
    allowed = _OPERATORS[kind]
    if allowed is _TEXT and each.get("operator") not in (*_TEXT, _MATCHES):
        errors = [[_no_option(_TEXT)], [_no_option([_MATCHES])]]
        either = {"code": "invalid_union", "errors": errors, "path": [*path, "operator"], "message": "Invalid input"}
        found.append(either)
    elif allowed is not _TEXT and each.get("operator") not in allowed:
        found.append(_no_option(allowed, *path, "operator"))
    value = each.get("value", _MISSING)
    expected = "array" if kind.endswith("Options") else kind.removesuffix("Object").replace("null", "string")
    if _KINDS[type(value)] != expected.replace("datetime", "string") or (kind == "datetime" and not _moment(value)):
        found.append(_wrong_type(expected.replace("datetime", "date"), value, *path, "value"))
    return found


def _moment(text: str) -> datetime | None:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def _check_column(each: Json) -> None:
    column, kind = each["column"], each["type"]
    if column not in _COLUMNS:
        raise wrong_request(f"Column {column} does not match a UI / CH table mapping.")
    expected = _COLUMNS[column][0]
    if kind != "null" and kind not in _ALSO.get(expected, (expected,)):
        words = f"Invalid filter type '{kind}' for column '{column}'. Expected filter type '{expected}'."
        raise wrong_request(words)


_TESTS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    **{"=": operator.eq, "<>": operator.ne, ">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le},
    **{"contains": operator.contains, _MATCHES: operator.contains, "does not contain": lambda held, v: v not in held},
    **{"starts with": str.startswith, "ends with": str.endswith},
    "any of": lambda held, values: bool(set(held) & set(values)),
    "none of": lambda held, values: not set(held) & set(values),
    "all of": lambda held, values: set(held) >= set(values),
    "is null": lambda held, _: held in (None, "", {}, []),
    "is not null": lambda held, _: held not in (None, "", {}, []),
}


def matches(observation: Json, wanted: Sequence[Json]) -> bool:
    """Tell whether an observation is one of those that are asked for."""
    return all(_holds(observation, each) for each in wanted)


def _holds(observation: Json, each: Json) -> bool:
    held, kind, value = observation[_COLUMNS[each["column"]][1]], each["type"], each["value"]
    if kind in _HAVE_KEY:
        if each["key"] not in held:
            return False
        held = held[each["key"]]
    if kind in ("string", "stringObject"):  # F2: filters see texts, so that a number is found by its digits
        held = held if isinstance(held, str) else "" if held is None else json.dumps(held)
    elif kind == "datetime":
        held, value = _moment(held), _moment(value)
    elif kind.endswith("Options"):
        held = held if isinstance(held, list) else [held]
    elif kind == "number" and held is None:
        return False
    return _TESTS[each["operator"]](held, value)


# --- pages ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pages:
    """How a list is given page by page, the newest first: after the last of a page comes what is older than that.

    Attributes:
        by: The fields that items are ordered by, the time first; together they are of one item only.
        least: The least limit.
        most: The most that a page may have.
        names: What a cursor calls them.
        is_said: Whether the limit is said with a page.
        more: What else stands in a cursor.
    """

    by: tuple[str, ...]
    least: int
    most: int
    names: tuple[str, ...]
    is_said: bool = False
    more: Json = field(default_factory=dict)

    def page(self, found: list[Json], asked: Mapping[str, str]) -> Json:
        """Return the page that is asked for.

        Raises:
            BadRequestError: If the limit or the cursor cannot be used.
        """
        limit, after = self._limit(asked.get("limit")), self._position(asked.get("cursor"))
        ordered = sorted(found, key=self._key, reverse=True)
        rest = [item for item in ordered if after is None or self._key(item) < after]
        meta: Json = {"limit": limit} if self.is_said else {}
        if 0 < limit < len(rest):
            where = self.more | dict(zip(self.names, self._key(rest[limit - 1]), strict=True))
            meta["cursor"] = base64.b64encode(json.dumps(where, separators=(",", ":")).encode()).decode()
        return {"data": rest[:limit], "meta": meta}

    def _key(self, item: Json) -> tuple[str, ...]:
        return tuple(item[name] for name in self.by)

    def _limit(self, given: str | None) -> int:
        try:
            limit = int(given or 50)
        except ValueError:
            raise wrong_data(_wrong_type("number", float("nan"), "limit")) from None
        if limit > self.most:
            words = f"Too big: expected number to be <={self.most}"
            raise wrong_data(_out_of_bounds("too_big", self.most, words, "limit"))
        if limit < self.least:
            words = f"Too small: expected number to be >={self.least}"
            raise wrong_data(_out_of_bounds("too_small", self.least, words, "limit"))
        return limit

    def _position(self, cursor: str | None) -> tuple[str, ...] | None:
        if cursor is None:
            return None
        try:
            where = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4)))
        except ValueError:
            raise wrong_request("Invalid cursor format") from None
        if not isinstance(where, dict):
            raise wrong_data(_wrong_type("object", where, "cursor"))
        for name in self.names:
            if not isinstance(where.get(name), str):
                raise wrong_data(_wrong_type("string", where.get(name, _MISSING), "cursor", name))
        return tuple(where[name] for name in self.names)


OBSERVATIONS: Final = Pages(
    by=("startTime", "traceId", "id"), least=0, most=1000, names=("lastStartTimeTo", "lastTraceId", "lastId")
)
SCORES: Final = Pages(
    by=("timestamp", "id"), least=1, most=100, names=("lastTimestamp", "lastId"), is_said=True, more={"v": 1}
)
