"""Whether, at the end of a soak, the journals, the ledger, the spans received and the scores agree exactly."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, select

from loopback_store import Span
from soak_graphs import JOURNEY, MODEL_PRICE
from soak_worker import lines_of
from turntrace import attributes as a
from turntrace.export import scores_of, session_score, trace_score
from turntrace.ledger import Ledger
from turntrace.ledger.tables import metadata
from turntrace.testing import CapturedSpan, assert_all_tagged

Row = dict[str, Any]
SUMS = {
    "llm_calls": "llm_calls",
    "tool_calls": "tool_calls",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "unpriced_calls": "unpriced_calls",
    "active_ms": "latency_ms",
    "wait_ms": "wait_ms",
}
"""Columns of a session, and those of its turns that they are sums of."""

COUNTS = {"calls": "llm_calls", "input_tokens": "input_tokens", "output_tokens": "output_tokens", "tools": "tool_calls"}
"""What the app counted, and the columns of a turn."""

ALLOWED_WORDS = (
    *("cannot take anything now", "takes what is sent again"),
    *("stays in memory until it can be written", "the ledger can be written again", "Sending waits for it"),
)
"""What may be logged: that the server was away, or the ledger locked for too long, and that they are back."""


# --- what the workers saw ---------------------------------------------------------------------------------------------
@dataclass
class Expected:
    """A turn by what the workers saw of it.

    Attributes:
        statuses: What its status may be.
        exact: Whether all that happened in it was seen to its end, and is written for certain.
        counts: What the app counted.
        kinds: What happened in it, in order.
    """

    statuses: set[str] = field(default_factory=set)
    exact: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    kinds: list[str] = field(default_factory=list)


@dataclass
class Seen:
    """All journals, read.

    Attributes:
        turns: The turns that workers saw, by id.
        begun_only: How many runs were begun whose turn is not known, since their process was killed.
        feedback: What each feedback may be, by turn or session and name.
        converted: Users whose journey was converted for certain.
        exits: Sessions that were ended by hand, perhaps.
        kinds: How many parts of turns there were of each kind, and how each ended.
        words: The other lines, by what they say.
    """

    turns: dict[str, Expected] = field(default_factory=lambda: defaultdict(Expected))
    begun_only: int = 0
    feedback: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    sure_feedback: set[tuple[str, str]] = field(default_factory=set)
    converted: set[int] = field(default_factory=set)
    exits: set[str] = field(default_factory=set)
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    words: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))


def read_journals(folder: Path) -> Seen:
    """Read what all workers saw."""
    seen = Seen()
    parts: list[tuple[float, Row, bool]] = []
    feedback: list[tuple[float, Row, bool]] = []
    for path in sorted(folder.glob("journal-*")):
        lines = list(lines_of(path))
        written = max((line["lines"] for line in lines if line["do"] == "written"), default=0)
        ended = {line["key"] for line in lines if line["do"] == "end"}
        seen.begun_only += sum(line["do"] == "begin" and line["key"] not in ended for line in lines)
        for number, line in enumerate(lines):
            is_sure = number < written
            seen.words[line["do"]].append(line)
            if line["do"] == "end":
                parts.append((line["at"], line, is_sure))
            elif line["do"] == "feedback":
                feedback.append((line["at"], line, is_sure))
            elif line["do"] == "exit":
                seen.exits.add(line["session"])
    for _, line, is_sure in sorted(parts, key=lambda part: part[0]):
        _add_part(seen, line, is_sure)
    for _, line, is_sure in sorted(feedback, key=lambda part: part[0]):
        key: tuple[str, str] = (line.get("turn_id") or line["session_id"], line["name"])
        seen.feedback[key] = [line["value"]] if is_sure else [*seen.feedback.get(key, []), line["value"]]
        if is_sure:
            seen.sure_feedback.add(key)
    return seen


def _add_part(seen: Seen, line: Row, is_sure: bool) -> None:
    seen.kinds[line["kind"], line["status"]] += 1
    if not line["turn"]:  # a second answer to what does not wait any more runs no node, or one that is none of its own
        seen.begun_only += 1
        return
    turn = seen.turns[line["turn"]]
    turn.kinds.append(line["kind"])
    turn.exact &= is_sure and line["exact"]
    turn.counts.update({name: line[name] for name in COUNTS})
    status = line["status"]
    final = {"abandoned"} if status == "interrupted" else {status}  # nobody answered it in the end
    turn.statuses = final if is_sure else turn.statuses | final | {"abandoned", "completed"}
    if line.get("journey") == "converted" and is_sure and line["talk"] % 10 != 9:
        seen.converted.add(line["talk"] // 2)


# --- what is there ----------------------------------------------------------------------------------------------------
def read_ledger(url: str) -> dict[str, list[Row]]:
    """Return all rows of the ledger by table, without the prefix."""
    engine = create_engine(url)
    with engine.connect() as connection:
        found = {
            name.removeprefix("turntrace_"): [dict(row) for row in connection.execute(select(table)).mappings()]
            for name, table in metadata.tables.items()
        }
    engine.dispose()
    return found


def differences(
    seen: Seen, url: str, spans: list[Span], scores: Mapping[str, Mapping[str, Any]], logs: Iterable[str]
) -> list[str]:
    """Return where the four do not agree; nothing where all do.

    Args:
        seen: What the workers saw.
        url: Where the ledger is.
        spans: The spans that the server has, each as it came last.
        scores: The scores that the server has by id, each as it came last.
        logs: What the workers logged.
    """
    tables = read_ledger(url)
    by_turn: dict[str, list[Span]] = defaultdict(list)
    others: list[Span] = []
    for span in spans:
        turn_id = span.attributes.get(a.TURN_ID)
        (others if turn_id is None else by_turn[turn_id]).append(span)
    return [
        *_of_workers(seen, logs),
        *_of_turns(seen, tables["turns"], tables["open_turns"]),
        *_of_conversations(tables["turns"], tables["conversations"]),
        *_of_sessions(seen, tables["sessions"], tables["turns"]),
        *_of_spans(seen, tables["turns"], by_turn),
        *_of_other_spans(tables["sessions"], tables["stages"], others, by_turn),
        *_of_scores(seen, url, tables, scores),
        *_of_journeys(seen, tables["journeys"]),
        *_of_outbox(seen, tables),
    ]


def _of_workers(seen: Seen, logs: Iterable[str]) -> Iterator[str]:
    for line in seen.words["broken"]:
        yield f"a worker broke:\n{line['what']}"
    for logged in logs:
        if logged and not any(words in logged for words in ALLOWED_WORDS):
            yield f"a worker logged: {logged}"


def _of_turns(seen: Seen, rows: list[Row], still_open: list[Row]) -> Iterator[str]:
    for row in still_open:
        yield f"turn {row['id']} is still open"
    known = {row["id"]: row for row in rows}
    if len(known) != len(rows):
        yield f"{len(rows) - len(known)} turns are in the ledger twice"
    for turn_id, turn in seen.turns.items():
        what = f"turn {turn_id} ({' + '.join(turn.kinds)})"
        if turn_id not in known:
            yield f"{what} is not in the ledger"
            continue
        row = known[turn_id]
        if row["status"] not in turn.statuses:
            yield f"{what}: status {row['status']} in the ledger, {sorted(turn.statuses)} by the journal"
        for name, column in COUNTS.items():
            counted, there = turn.counts[name], row[column]
            if counted != there if turn.exact else counted < there and "answered twice" not in turn.kinds:
                yield f"{what}: {column} {there} in the ledger, {counted} by the app (exact: {turn.exact})"
        cost = sum(
            row[side] * price for side, price in zip(("input_tokens", "output_tokens"), MODEL_PRICE, strict=True)
        )
        if abs(row["cost_usd"] - cost) > 1e-9:
            yield f"{what}: cost_usd {row['cost_usd']} in the ledger, {cost} by its tokens"
    unknown = known.keys() - seen.turns.keys()
    if len(unknown) > seen.begun_only:
        yield f"{len(unknown)} turns of the ledger nobody saw, and {seen.begun_only} were cut short: {sorted(unknown)}"
    for turn_id in unknown:
        if known[turn_id]["status"] not in ("abandoned", "completed", "failed"):
            yield f"turn {turn_id}, which was cut short, has the status {known[turn_id]['status']}"


def _of_conversations(rows: list[Row], conversations: list[Row]) -> Iterator[str]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        numbers[row["conversation_id"]].append(row["number"])
    for conversation, found in numbers.items():
        if sorted(found) != list(range(1, len(found) + 1)):
            yield f"conversation {conversation} has the numbers {sorted(found)}"
    totals = {row["id"]: row["total_turns"] for row in conversations}
    for conversation in totals.keys() | numbers.keys():
        if totals.get(conversation) != len(numbers[conversation]):
            yield (
                f"conversation {conversation}: total_turns {totals.get(conversation)}, "
                f"and {len(numbers[conversation])} turns"
            )


def _of_sessions(seen: Seen, sessions: list[Row], rows: list[Row]) -> Iterator[str]:
    of_session: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_session[row["session_id"]].append(row)
    for session in sessions:
        own = of_session.pop(session["id"], [])
        for total, name in SUMS.items():
            if session[total] != sum(row[name] for row in own):
                yield f"session {session['id']}: {total} {session[total]}, its turns {sum(row[name] for row in own)}"
        if session["total_turns"] != len(own):
            yield f"session {session['id']}: total_turns {session['total_turns']}, and {len(own)} turns"
        failed = sum(row["status"] == "failed" for row in own)
        if session["failed_turns"] != failed:
            yield f"session {session['id']}: failed_turns {session['failed_turns']}, and {failed} failed"
        if abs(session["total_cost_usd"] - sum(row["cost_usd"] for row in own)) > 1e-9:
            yield f"session {session['id']}: cost {session['total_cost_usd']}, its turns {own}"
        if session["ended_ns"] is None:
            yield f"session {session['id']} has not ended"
        if session["end_reason"] not in ("inactive_timeout", "user_exit"):
            yield f"session {session['id']} ended as {session['end_reason']}"
        if session["end_reason"] == "user_exit" and session["id"] not in seen.exits:
            yield f"session {session['id']} ended as user_exit, and nobody ended it"
    for session_id, own in of_session.items():
        yield f"{len(own)} turns are in the session {session_id}, which the ledger does not have"


def _of_spans(seen: Seen, rows: list[Row], by_turn: dict[str, list[Span]]) -> Iterator[str]:
    known = {row["id"] for row in rows}
    for turn_id in by_turn.keys() - known:
        yield f"{len(by_turn[turn_id])} spans are of the turn {turn_id}, which the ledger does not have"
    for row in rows:
        own = by_turn.get(row["id"], [])
        kinds = " + ".join(seen.turns[row["id"]].kinds) if row["id"] in seen.turns else "cut short"
        yield from (f"turn {row['id']} ({kinds}): {each}" for each in _of_trace(row, own, _is_cut(seen, row)))
    captured = [
        CapturedSpan(
            span.name,
            span.trace_id,
            span.span_id,
            span.parent_id,
            span.scope,
            span.attributes,
            span.start_ns,
            span.end_ns,
        )
        for own in by_turn.values()
        for span in own
    ]
    try:
        assert_all_tagged(captured)
    except AssertionError as error:
        yield str(error)


def _is_cut(seen: Seen, row: Row) -> bool:
    return row["id"] not in seen.turns or not seen.turns[row["id"]].exact


def _of_trace(row: Row, own: list[Span], is_cut: bool) -> Iterator[str]:
    if {span.trace_id for span in own} != {row["trace_id"]}:
        yield f"trace {row['trace_id']} in the ledger, {sorted({span.trace_id for span in own})} on the server"
    steps = [span for span in own if not is_cut or span.name != a.JOURNEY_STAGE]
    if not len(steps) <= row["spans"] <= len(own):  # where the process was killed, a step of a journey stands alone
        yield f"{row['spans']} spans in the ledger, {len(own)} on the server: {Counter(span.name for span in own)}"
    roots = [span for span in own if span.name == a.SPAN_TURN]
    if [root.span_id for root in roots] != [row["root_span_id"]]:
        yield f"root {row['root_span_id']} in the ledger, {[root.span_id for root in roots]} on the server"
    for root in roots:
        said = root.attributes
        for name, column in _OF_ROOT.items():
            if said.get(name) != row[column]:
                yield f"{name} {row[column]!r} in the ledger, {said.get(name)!r} on its root"
    generations = [span.attributes for span in own if span.attributes.get("langfuse.observation.type") == "generation"]
    tools = sum(span.attributes.get("langfuse.observation.type") == "tool" for span in own)
    sums = {
        "llm_calls": len(generations),
        "tool_calls": tools,
        "input_tokens": sum(said.get(a.GEN_AI_INPUT_TOKENS, 0) for said in generations),
        "output_tokens": sum(said.get(a.GEN_AI_OUTPUT_TOKENS, 0) for said in generations),
    }
    for column, there in sums.items():
        if row[column] != there:
            yield f"{column} {row[column]} in the ledger, {there} by its spans"
    cost = sum(json.loads(said.get(a.LANGFUSE_COST_DETAILS, '{"total": 0}'))["total"] for said in generations)
    if abs(cost - row["cost_usd"]) > 1e-9:
        yield f"cost {row['cost_usd']} in the ledger, {cost} by its spans"


_OF_ROOT = {
    a.TURN_STATUS: "status",
    a.TURN_NUMBER: "number",
    a.SESSION_ID: "session_id",
    a.CONVERSATION_ID: "conversation_id",
    a.TURN_LLM_CALLS: "llm_calls",
    a.TURN_INPUT_TOKENS: "input_tokens",
    a.TURN_OUTPUT_TOKENS: "output_tokens",
}


def _of_other_spans(
    sessions: list[Row], stages: list[Row], others: list[Span], by_turn: dict[str, list[Span]]
) -> Iterator[str]:
    counted: Counter[tuple[str, str]] = Counter()
    for span in others:
        if span.name == a.JOURNEY_STAGE:
            continue
        if span.name not in (a.SPAN_SESSION_START, a.SPAN_SESSION_END):
            yield f"the span {span.name} ({span.span_id}) is in no turn: {span.attributes}"
        counted[span.name, str(span.attributes.get(a.SESSION_ID))] += 1
    expected = {(name, row["id"]): 1 for row in sessions for name in (a.SPAN_SESSION_START, a.SPAN_SESSION_END)}
    for key in counted.keys() | expected.keys():
        if counted[key] != expected.get(key, 0):
            yield f"{key[0]} of session {key[1]}: {counted[key]} spans on the server, not {expected.get(key, 0)}"
    totals = {row["id"]: row for row in sessions}
    for span in others:
        row = totals.get(str(span.attributes.get(a.SESSION_ID)))
        if span.name == a.SPAN_SESSION_END and row is not None:
            said = span.attributes
            there = (said.get(a.SESSION_TOTAL_TURNS), said.get(a.SESSION_TOTAL_TOKENS), said.get(a.SESSION_END_REASON))
            known = (row["total_turns"], row["input_tokens"] + row["output_tokens"], row["end_reason"])
            if there != known:
                yield f"session {row['id']}: {known} in the ledger, {there} on its session.end"
    steps: Counter[tuple[Any, ...]] = Counter(
        (row["session_id"], row["stage"], bool(row["converted"])) for row in stages
    )
    events: Counter[tuple[Any, ...]] = Counter(
        (said.get(a.SESSION_ID), said.get(a.JOURNEY_STAGE), said.get(a.JOURNEY_CONVERTED))
        for own in (others, *by_turn.values())
        for span in own
        if span.name == a.JOURNEY_STAGE and (said := span.attributes)
    )
    if steps != events:
        yield f"steps of journeys: only in the ledger {steps - events}, only on the server {events - steps}"


def _of_scores(
    seen: Seen, url: str, tables: dict[str, list[Row]], scores: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    expected: dict[str, tuple[str, Any, str]] = {}

    def expect(score: dict[str, Any]) -> None:
        about = str(score.get("sessionId") or score.get("traceId"))
        expected[score["id"]] = (score["name"], score["value"], about)

    ledger = Ledger(url)
    try:
        for row in tables["sessions"]:
            summary = ledger.session(row["id"])
            assert summary is not None
            for name, value in scores_of(summary).items():
                expect(session_score(row["id"], name, value))
    finally:
        ledger.close()
    traces = {row["id"]: row["trace_id"] for row in tables["turns"]}
    there: dict[tuple[str, str], float] = {}
    for row in tables["feedback"]:
        about = row["turn_id"] or row["session_id"]
        there[about, row["name"]] = row["value"]
        value = row["value"] if row["value"] not in (0.0, 1.0) else bool(row["value"])
        expect(
            session_score(about, row["name"], value)
            if row["turn_id"] is None
            else trace_score(traces[about], about, row["name"], value)
        )
    for key, may_be in seen.feedback.items():
        if key in there and there[key] not in may_be:
            yield f"feedback {key}: {there[key]} in the ledger, {may_be} by the journal"
        if key not in there and key in seen.sure_feedback:
            yield f"feedback {key} is not in the ledger: {may_be} by the journal"
    for key in there.keys() - seen.feedback.keys():
        yield f"feedback {key} is in the ledger, and nobody gave it"
    known = {
        score_id: (score["name"], score["value"], str(score.get("sessionId") or score.get("traceId")))
        for score_id, score in scores.items()
    }
    for score_id in known.keys() - expected.keys():
        name, value, _ = known[score_id]
        if (name, value) == (a.DROPOFF_LAST_INTENT, "unknown"):  # one that was told before, and holds no longer
            del known[score_id]
    for score_id in expected.keys() | known.keys():
        if expected.get(score_id) != known.get(score_id):
            yield f"score {score_id}: {expected.get(score_id)} by the ledger, {known.get(score_id)} on the server"


def _of_journeys(seen: Seen, journeys: list[Row]) -> Iterator[str]:
    converted = sum(row["converted_ns"] is not None for row in journeys if row["name"] == JOURNEY)
    if converted < len(seen.converted):
        yield f"{converted} journeys are converted in the ledger, {len(seen.converted)} by the journal"


def _of_outbox(seen: Seen, tables: dict[str, list[Row]]) -> Iterator[str]:
    for name in ("outbox", "refused"):
        if tables[name]:
            yield f"{len(tables[name])} rows are in {name}: {[row.get('why') for row in tables[name]][:3]}"
    for line in seen.words["sent"]:
        if not line["empty"] or line["refused"] or line["dropped"]:
            yield f"not all is sent: {line['left']}"
    for line in seen.words["sweep again"]:
        if line["sessions"] or line["turns"]:
            yield f"the second of two sweeps ended {line['sessions']} sessions and {line['turns']} turns"
    if not seen.words["sent"]:
        yield "nobody could see to the end of it"
