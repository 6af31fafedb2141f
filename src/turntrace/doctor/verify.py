"""Whether Langfuse has of a session what the ledger has of it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from turntrace import attributes as a
from turntrace.export import Score, from_otlp, read_score, scores_of, session_score, trace_score
from turntrace.identity import derived_id
from turntrace.ledger import ABANDONED, INTERRUPTED, OPEN, Ledger
from turntrace.records import Step, TurnSummary
from turntrace.summaries import Feedback, SessionSummary
from turntrace.waiting import SPANS

_PAGE: Final = 200
_MOST_EXTRA: Final = 20
_TOLERANCE: Final = 1e-6
Observation = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Something that both sides know.

    Attributes:
        what: What it is.
        ledger: What the ledger says.
        langfuse: What Langfuse says.
        ok: Whether they agree.
        differences: Where they do not, by name.
    """

    what: str
    ledger: str
    langfuse: str
    ok: bool
    differences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LedgerTurn:
    """A turn as the ledger has it.

    Attributes:
        summary: What is known of it.
        steps: Its steps.
        spans: How many spans its trace has, those of other code included.
    """

    summary: TurnSummary
    steps: Sequence[Step] = ()
    spans: int = 0

    @property
    def name(self) -> str:
        """What it is called."""
        return f"turn {self.summary.number} of the conversation {self.summary.conversation_id}"


def read_turns(ledger: Ledger, session_id: str) -> list[LedgerTurn]:
    """Read the turns of a session, each with the number of its spans."""
    spans = ledger.span_counts(session_id)
    return [LedgerTurn(turn, steps, spans.get(turn.id, 0)) for turn, steps in ledger.turns(session_id)]


def waiting_of(ledger: Ledger, session_id: str, turns: Sequence[LedgerTurn]) -> tuple[int, int]:
    """Return how many spans and scores of a session and its turns wait in the outbox."""
    traces = {turn.summary.trace_id for turn in turns}
    mark, spans, scores, last = session_id.encode(), 0, 0, 0
    while items := ledger.outbox(limit=_PAGE, after_id=last):
        last = items[-1].id
        for item in items:
            if item.kind != SPANS:
                score = read_score(item.body)
                scores += score.get("sessionId") == session_id or score.get("traceId") in traces
            elif mark in item.body:
                spans += sum(of == session_id for of in _sessions_in(item.body))
    return spans, scores


def _sessions_in(body: bytes) -> Iterator[str]:
    for resource in from_otlp(body).resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield from (pair.value.string_value for pair in span.attributes if pair.key == a.SESSION_ID)


def verify(
    session: SessionSummary,
    turns: Sequence[LedgerTurn],
    observations: Iterable[Observation],
    scores: Iterable[Score],
    feedback: Iterable[Feedback] = (),
) -> list[Comparison]:
    """Compare a session in the ledger with what Langfuse has of it.

    Turns that still run are left out on both sides. The scores of a session are sent when it ends, so those of one that
    is open are not compared, except for feedback, which is sent when it is given.

    Args:
        session: The session.
        turns: Its turns.
        observations: What Langfuse has under its id, as ``GET /api/public/v2/observations`` returns it.
        scores: Its scores there and those of its turns' traces, as ``GET /api/public/v3/scores`` returns them.
        feedback: The feedback that it was given, and its turns.
    """
    spans = _Sides(session, turns, observations).compared()
    return [*spans, *_compare_scores(_expected(session, turns, feedback), scores)]


class _Sides:
    """Both sides of a session's spans: what there is in Langfuse, by what it belongs to in the ledger."""

    def __init__(
        self, session: SessionSummary, turns: Sequence[LedgerTurn], observations: Iterable[Observation]
    ) -> None:
        self.session = session
        self.turns = [turn for turn in turns if turn.summary.status != OPEN]
        self.by_trace: dict[str, dict[str, Observation]] = {}
        for each in observations:
            self.by_trace.setdefault(each["traceId"], {})[each["id"]] = each
        for turn in turns:
            if turn.summary.status == OPEN and turn.summary.trace_id is not None:
                self.by_trace.pop(turn.summary.trace_id, None)
        self.there = [each for trace in self.by_trace.values() for each in trace.values()]
        self.marks = self._find_marks()
        self.extra = self._find_extra()

    def _find_marks(self) -> dict[str, int]:
        """Count the events at the start and the end; an end of a session that went on is of no account."""
        found = {}
        for name in (a.SPAN_SESSION_START, a.SPAN_SESSION_END):
            found[name] = len(self.by_trace.get(derived_id(name, self.session.id), {}))
        if self.session.ended_ns is None:
            del found[a.SPAN_SESSION_END]
        return found

    def _find_extra(self) -> list[Observation]:
        """Find what is in no turn of the ledger; a stage of a journey may be entered outside of turns."""
        known = {turn.summary.trace_id for turn in self.turns}
        known |= {derived_id(name, self.session.id) for name in (a.SPAN_SESSION_START, a.SPAN_SESSION_END)}
        others = [each for trace_id, trace in self.by_trace.items() if trace_id not in known for each in trace.values()]
        return [each for each in others if each.get("name") != a.JOURNEY_STAGE]

    def of(self, turn: LedgerTurn) -> dict[str, Observation]:
        """Return what Langfuse has of a turn, by id."""
        return self.by_trace.get(turn.summary.trace_id or "", {})

    def count(self, turn: LedgerTurn) -> int:
        """Count the observations of a turn; of one whose process died the ledger knows the root only.

        The root of one that waits is not counted: it is sent as it stands, and again when the turn ends.
        """
        there = self.of(turn)
        found = len(there) - (turn.summary.status == INTERRUPTED and turn.summary.root_span_id in there)
        return self._as_known(turn, found, turn.spans)

    def tokens(self, turn: LedgerTurn) -> tuple[int, int]:
        """Sum up the input and output tokens of a turn."""
        found = [sum(_usage(each, side) for each in self.of(turn).values()) for side in ("input", "output")]
        known = (turn.summary.input_tokens, turn.summary.output_tokens)
        return self._as_known(turn, found[0], known[0]), self._as_known(turn, found[1], known[1])

    def _as_known(self, turn: LedgerTurn, found: int, known: int) -> int:
        return min(found, known) if turn.summary.status == ABANDONED else found

    def compared(self) -> Iterator[Comparison]:
        """Give the comparisons."""
        yield self._observations()
        for name, count in self.marks.items():
            missing = () if count else (f"{name} is not there",)
            yield Comparison(name, "1", str(count), count == 1, missing)
        yield self._each("trace and root span of each turn", self._root)
        yield self._each("observations of each turn", self._missing)
        yield self._each("tokens of each turn", self._other_tokens)
        rest = [
            sum(_usage(each, side) for trace in self.by_trace.values() for each in trace.values())
            - sum(_usage(each, side) for turn in self.turns for each in self.of(turn).values())
            for side in ("input", "output")
        ]
        known = (self.session.input_tokens, self.session.output_tokens)
        for at, side in enumerate(("input", "output")):
            found = rest[at] + sum(self.tokens(turn)[at] for turn in self.turns)
            differs = () if found == known[at] else (f"{side} tokens: {known[at]:,} here, {found:,} in Langfuse",)
            yield Comparison(f"{side} tokens", f"{known[at]:,}", f"{found:,}", not differs, differs)
        untagged = [each for each in self.there if each.get("sessionId") != self.session.id]
        words = tuple(f"{_called(each)} does not carry the session's id" for each in untagged)
        tagged = len(self.there) - len(untagged)
        yield Comparison("with the session's id", f"{len(self.there):,}", f"{tagged:,}", not untagged, words)

    def _observations(self) -> Comparison:
        expected = sum(turn.spans for turn in self.turns) + len(self.marks)
        found = sum(self.count(turn) for turn in self.turns) + sum(self.marks.values()) + len(self.extra)
        words = [f"{_called(each)} is in no turn of the ledger" for each in self.extra[:_MOST_EXTRA]]
        if len(self.extra) > _MOST_EXTRA:
            words.append(f"and {len(self.extra) - _MOST_EXTRA:,} more are in no turn of the ledger")
        ok = expected == found and not self.extra
        return Comparison("observations", f"{expected:,}", f"{found:,}", ok, tuple(words))

    def _each(self, what: str, wrong: Callable[[LedgerTurn], str | None]) -> Comparison:
        words = tuple(f"{turn.name}: {why}" for turn in self.turns if (why := wrong(turn)) is not None)
        agree = len(self.turns) - len(words)
        return Comparison(what, f"{len(self.turns):,}", f"{agree:,}", not words, words)

    def _root(self, turn: LedgerTurn) -> str | None:
        waits = turn.summary.status == INTERRUPTED  # its root comes when it ends
        if not turn.spans or waits or (turn.summary.root_span_id or "") in self.of(turn):
            return None
        what = f"its root span {turn.summary.root_span_id}" if self.of(turn) else "its trace"
        return f"{what} is not there (trace {turn.summary.trace_id})"

    def _missing(self, turn: LedgerTurn) -> str | None:
        found = self.count(turn)
        if found == turn.spans:
            return None
        absent = [
            f"{step.kind} {step.name} ({step.span_id})" for step in turn.steps if step.span_id not in self.of(turn)
        ]
        named = f"; not there: {', '.join(absent)}" if absent and found else ""
        return f"{turn.spans:,} spans here, {found:,} in Langfuse{named}"

    def _other_tokens(self, turn: LedgerTurn) -> str | None:
        known = (turn.summary.input_tokens, turn.summary.output_tokens)
        found = self.tokens(turn)
        if known == found:
            return None
        return f"{known[0]:,} in and {known[1]:,} out here, {found[0]:,} in and {found[1]:,} out in Langfuse"


def _called(each: Observation) -> str:
    return f"{each.get('name') or 'an observation'} ({each['id']}, trace {each['traceId']})"


def _usage(each: Observation, side: str) -> int:
    tokens = each.get(f"{side}Usage")
    return int((each.get("usageDetails") or {}).get(side, 0) if tokens is None else tokens)


# --- scores -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Expected:
    """A score that Langfuse is to have, and what the ledger says of it."""

    what: str
    score: Score
    value: Any


def _expected(
    session: SessionSummary, turns: Sequence[LedgerTurn], feedback: Iterable[Feedback]
) -> Iterator[_Expected]:
    for name, value in scores_of(session).items() if session.ended_ns is not None else ():
        yield _Expected(f"score {name}", session_score(session.id, name, value), value)
    sampled = {turn.summary.id: turn for turn in turns if turn.spans}
    for given in feedback:
        if given.turn_id is None:
            yield _Expected(f"score {given.name}", session_score(session.id, given.name, given.value), given.value)
        elif given.turn_id in sampled:
            turn = sampled[given.turn_id]
            score = trace_score(turn.summary.trace_id or "", given.turn_id, given.name, given.value)
            yield _Expected(f"score {given.name} of {turn.name}", score, given.value)


def _compare_scores(expected: Iterable[_Expected], scores: Iterable[Score]) -> Iterator[Comparison]:
    there = {score["id"]: score for score in scores}
    others = {(score["subject"]["id"], score["name"]): score["id"] for score in there.values()}
    for each in expected:
        wanted, known = each.score, _shown(each.value)
        score = there.get(wanted["id"])
        if score is None or score["name"] != wanted["name"]:
            words = f"the {each.what} is not there"
            subject = wanted.get("sessionId") or wanted.get("traceId") or ""
            if (subject, wanted["name"]) in others:
                words = f"the {each.what} has the id {others[subject, wanted['name']]} and not {wanted['id']}"
            yield Comparison(each.what, known, "-", False, (words,))
            continue
        ok = _is_same(each.value, score.get("value"))
        found = _shown(score.get("value"))
        words = f"the {each.what} is {known} here and {found} in Langfuse"
        yield Comparison(each.what, known, found, ok, () if ok else (words,))


def _is_same(known: Any, found: Any) -> bool:
    if isinstance(known, str):
        return bool(known == found)
    if not isinstance(found, bool | int | float):
        return False
    return math.isclose(known, found, rel_tol=_TOLERANCE, abs_tol=1e-9)  # a yes or no reads back as true or false


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}" if value != int(value) or abs(value) > 1e15 else f"{int(value)}"
    return str(value)
