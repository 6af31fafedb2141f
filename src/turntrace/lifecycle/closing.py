"""What the writer does when steps and turns end: it ends their spans and writes their rows together."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.boundary import never_breaks
from turntrace.content import Message, classify_output, read_message
from turntrace.export import ids_of
from turntrace.identity import safe_text
from turntrace.ledger import INTERRUPT, INTERRUPTED, LATE_SUMS, TurnEnd
from turntrace.lifecycle.abandoning import AbandonWaiting
from turntrace.lifecycle.ending import EndedStep, Failure, add_up, end_span, end_steps, words_of
from turntrace.lifecycle.jobs import SpanJob, known_json
from turntrace.lifecycle.session_jobs import EndSession
from turntrace.lifecycle.steps import Fit, Glimpse, TurnAccount
from turntrace.lifecycle.windows import Noted, add_given
from turntrace.records import Step, TurnSummary, elapsed_ms

if TYPE_CHECKING:
    from turntrace.ledger import LedgerWriter
    from turntrace.lifecycle.turn import Turn


class SettleTurn(SpanJob):
    """Writes down the steps of a turn that have ended while it goes on, or after it."""

    def __init__(self, turn: "Turn") -> None:
        super().__init__(turn.tracker)
        self._turn = turn
        self._late: TurnAccount | None = None
        self._noted: list[Noted] = []

    def prepare(self) -> None:
        """End the spans of the steps."""
        if self._turn.account.is_closed:
            self._late = TurnAccount()
        account = self._late or self._turn.account
        added, others = self._take_ended(account)
        self._keep([*end_steps(self._turn, added, account), *others])
        account.spans += len(others)

    def _take_ended(self, account: TurnAccount) -> tuple[list[EndedStep], list[ReadableSpan]]:
        """Add up what has ended, with an event for each time that something was pruned."""
        steps, others, noted = self._turn.take_ended()
        self._noted = (_decisions(self._turn, noted, account) or []) if noted else []
        events = [each.step for each in self._noted if each.step is not None]
        return add_up(steps + events, account), others

    def write(self, ledger: "LedgerWriter") -> None:
        """Put the spans into the outbox; what ended after its turn is added to the turn and its session."""
        session_id = self._turn.conversation.session.id
        if self._tracker.is_forgotten(self._turn) or self._was_erased(ledger, session_id):
            return
        self._put_spans(ledger)
        self._put_decisions(ledger)
        sums = {} if self._late is None else {name: getattr(self._late, name) for name in LATE_SUMS}
        late = {name: value for name, value in sums.items() if value}
        if late:
            whole = ledger.add_to_turn(self._turn.words, late)
            if whole is not None and late.keys() != {"spans"} and self._tracker.target.to_outbox:
                _WholeRoot(self._turn, whole).write(ledger)  # which overwrites the one that was sent
            # Where its session has ended, the totals that were sent then are sent again with this.
            EndSession(self._tracker, self._turn.conversation.session.id).write(ledger)

    def _was_erased(self, ledger: "LedgerWriter", session_id: str) -> bool:
        """Tell whether another process erased the user while the turn ran; a guest's session is in another ledger."""
        return not self._turn.is_visit and ledger.session(session_id) is None

    def _put_decisions(self, ledger: "LedgerWriter") -> None:
        tags = self._turn.words
        for noted in self._noted:
            ledger.put_decision(noted.decision, noted.dropped, tags)


@never_breaks("working out what was pruned")
def _decisions(turn: "Turn", noted: list[Fit | Glimpse], account: TurnAccount) -> list[Noted]:
    return turn.tracker.windows.decisions(turn, noted, account)


class FinishTurn(SettleTurn):
    """Writes down a turn that has ended, with its last spans."""

    def __init__(self, turn: "Turn", status: str, ended_ns: int) -> None:
        super().__init__(turn)
        self._status = status
        self._ended_ns = ended_ns
        self._summary: TurnSummary | None = None
        self._steps: list[Step] = []
        self._count = 0
        self._roots = 0
        self._failure: Failure | None = None
        self._root_to_end: trace.Span | None = None
        self._whole_root: _WholeRoot | None = None
        self._end_again: EndSession | None = None

    def prepare(self) -> None:
        """Sum the turn up, and end its spans, the root last."""
        try:
            self._end_spans()
        except BaseException:  # it is logged, and nobody is to wait for this turn
            self._tracker.finished(self._turn)
            raise

    def _end_spans(self) -> None:
        turn, account = self._turn, self._turn.account
        added, others = self._take_ended(account)
        account.is_closed = True
        question, answer = read_message(turn.message), read_message(turn.answer)
        summary = _sum_up(turn, self._status, self._ended_ns, question, answer)
        if self._status in ("failed", "abandoned"):
            self._failure = Failure(summary.error or self._status, None, self._status == "failed")
        waits = self._status == INTERRUPTED
        # One that waits is shown as it stands, where its root will be overwritten when it ends; elsewhere it ends once.
        target = self._tracker.target
        ends_root = not waits or target.to_outbox or not target.chooses_ids
        if ends_root:
            turn.root.end_ns = self._ended_ns
            turn.root.start(summary.attributes() | _content(turn, summary, question, answer) | words_of(self._failure))
        spans = end_steps(turn, added, account)
        account.spans += len(others)
        root = turn.root.started
        with target.capturing() as ended:
            if root is not None and ends_root:
                self._roots = int(root.is_recording() and not waits)
                if target.to_outbox or turn.before is None:
                    end_span(root, self._ended_ns, self._failure)
                else:  # another process may have been first: where nothing is overwritten, one of both ends it
                    self._root_to_end = root
        self._keep([*spans, *others, *ended])
        self._count = account.spans
        self._steps = list(account.steps)
        is_known = root is not None and root.get_span_context().is_valid
        trace_id, root_span_id = ids_of(root) if root is not None and is_known else turn.planned_ids
        if (trace_id, root_span_id) != turn.planned_ids:  # the app's provider chose them
            summary = replace(summary, trace_id=trace_id, root_span_id=root_span_id)
        self._summary = summary

    def write(self, ledger: "LedgerWriter") -> None:
        """Put the spans into the outbox and end the row of the turn, in one transaction."""
        if self._summary is None or self._tracker.is_forgotten(self._turn):
            self._tracker.finished(self._turn)
            return
        topic, before = self._turn.conversation.topic, self._turn.before
        end = ledger.finish_turn(
            self._summary, self._steps, spans=self._count + self._roots, topic=topic, before=before
        )
        if end is TurnEnd.ENDED_BEFORE and self._was_erased(ledger, self._summary.session_id):
            self._tracker.finished(self._turn)
            return
        self._put_spans(ledger)
        self._put_decisions(ledger)
        whole = ledger.whole
        if end is TurnEnd.ENDED_BEFORE:  # by another process, which was first
            added = ledger.add_part(self._summary, self._steps, spans=self._count, before=before)
            whole = None if added is None else added.turn
        elif self._root_to_end is not None:
            end_span(self._root_to_end, self._ended_ns, self._failure)
            self._root_to_end = None
        if whole is not None and self._tracker.target.to_outbox:
            self._whole_root = self._whole_root or _WholeRoot(self._turn, whole)
            self._whole_root.write(ledger)
        if self._summary.output_type == INTERRUPT and ledger.has_later_turn(self._summary):
            AbandonWaiting(self._tracker, self._turn.id).write(ledger)  # the user did not wait for this to be written
        if end is not TurnEnd.ENDED:
            # Its session may have ended while it ran: the totals that were sent then are sent again with this turn.
            self._end_again = self._end_again or EndSession(self._tracker, self._summary.session_id)
            self._end_again.write(ledger)
        self._tracker.finished(self._turn)


class _WholeRoot(SpanJob):
    """The root of a turn to which something came, from another process or late: it overwrites the ones before."""

    def __init__(self, turn: "Turn", whole: TurnSummary) -> None:
        super().__init__(turn.tracker)
        failure = None
        if whole.status in ("failed", "abandoned"):
            failure = Failure(whole.error or whole.status, None, whole.status == "failed")
        question, answer = read_message(turn.message), read_message(turn.answer)
        shown = _content(turn, whole, question, answer, only_texts=turn.tracker.content.records_turn)
        with turn.tracker.target.capturing() as ended:
            span = turn.root.starter(turn.root, whole.attributes() | shown | words_of(failure))
            end_span(span, whole.ended_ns, failure)
        self._keep(ended)

    def write(self, ledger: "LedgerWriter") -> None:
        """Put it into the outbox."""
        self._put_spans(ledger)


@never_breaks("classifying what the user said by classify=...", exits=True)
def _input_type(turn: "Turn", question: Message) -> str:
    return safe_text(turn.tracker.classify(question.text))[:_TYPE_LENGTH]


_INSTRUCTIONS: Final = ("system", "developer")
_RESULTS: Final = ("tool", "function")
_TYPE_LENGTH: Final = 40
_NEW: Final = TurnSummary(id="")
"""What is known before of a turn that did not wait."""


def _sum_up(turn: "Turn", status: str, ended_ns: int, question: Message | None, answer: Message | None) -> TurnSummary:
    account = turn.account
    if account.context_messages is None and account.fitted is not None:
        add_given(account, account.fitted)
    has_answer = turn.answer is not None and status != "failed"
    waits = status == INTERRUPTED and not turn.handed_over
    output_type = "error" if status == "failed" else INTERRUPT if waits else None
    before = _NEW if turn.before is None else turn.before.turn
    wait_ms = turn.wait_ns // 1_000_000
    if output_type is None and has_answer:
        output_type = classify_output(turn.answer)
    return TurnSummary(
        id=turn.id,
        session_id=turn.conversation.session.id,
        conversation_id=turn.conversation.id,
        user_id=turn.conversation.session.user_id,
        number=turn.number,
        started_ns=turn.started_ns,
        ended_ns=ended_ns,
        status=status,
        role=turn.role,
        input_length=len(question.text) if question is not None else before.input_length,
        output_length=len(answer.text) if answer is not None and has_answer else None,
        input_type=_input_type(turn, question) if question is not None else before.input_type,
        output_type=output_type,
        has_attachments=question.attachments > 0 if question is not None else before.has_attachments,
        intent=turn.intent,
        agent_runs=turn.agent_runs,
        tool_calls=account.tool_calls,
        llm_calls=account.llm_calls,
        input_tokens=account.input_tokens,
        output_tokens=account.output_tokens,
        cost_usd=account.cost_usd,
        unpriced_calls=account.unpriced_calls,
        latency_ms=max(0, elapsed_ms(turn.started_ns, ended_ns) - wait_ms),
        wait_ms=wait_ms,
        time_to_first_token_ms=_first_token_ms(turn, wait_ms),
        model=account.model,
        error=turn.error,
        context_tokens=account.context_tokens,
        context_messages=account.context_messages,
        context_limit=account.context_limit,
        counted_tokens=account.counted_tokens,
        counted_of_tokens=account.counted_of_tokens,
        prunings=account.prunings,
        messages_pruned=account.messages_pruned,
        tokens_pruned=account.tokens_pruned,
        forked_from=turn.forked_from,
        checkpoint_id=turn.checkpoint_id if waits else None,
        trace_id=turn.planned_ids[0],
        root_span_id=turn.planned_ids[1],
        own=turn.own,
    )


def _first_token_ms(turn: "Turn", wait_ms: int) -> int | None:
    """Return how long it took until the first token came, without what was waited before it."""
    before, first_ns = turn.before, turn.account.first_token_ns
    if before is not None and before.turn.time_to_first_token_ms is not None:
        return before.turn.time_to_first_token_ms
    return None if first_ns is None else max(0, elapsed_ms(turn.started_ns, first_ns) - (wait_ms if before else 0))


def _content(
    turn: "Turn", summary: TurnSummary, question: Message | None, answer: Message | None, *, only_texts: bool = False
) -> dict[str, AttributeValue]:
    """Return what Langfuse shows as the input and output of the turn: safe facts, or the texts where they may leave.

    Args:
        turn: The turn.
        summary: What is known of it.
        question: What the user said.
        answer: What the app answered.
        only_texts: Whether to leave out what is no text, where another process may have sent one.
    """
    policy = turn.tracker.content
    asked: Any = {"turn": summary.number, "type": summary.input_type, "length": summary.input_length}
    told: Any = {"status": summary.status, "type": summary.output_type, "length": summary.output_length}
    if (share := summary.context_window_pct) is not None:
        told["context"] = f"{share:.0%} of {summary.context_limit:,}"
    is_asked = question is not None and question.role not in (*_INSTRUCTIONS, *_RESULTS)
    # The result of a tool is an answer where the turn is over with it, and not where it only waits there.
    withheld = _INSTRUCTIONS if summary.status == "completed" else (*_INSTRUCTIONS, *_RESULTS)
    is_told = answer is not None and summary.output_length is not None and answer.role not in withheld
    shown: dict[str, AttributeValue] = {}
    if policy.records_turn and question is not None and is_asked:
        said = {"role": summary.role, "content": policy.clean(question.text)}
        shown[a.LANGFUSE_OBSERVATION_INPUT] = known_json([said])
    elif not only_texts:
        shown[a.LANGFUSE_OBSERVATION_INPUT] = known_json(asked)
    if policy.records_turn and answer is not None and is_told:
        shown[a.LANGFUSE_OBSERVATION_OUTPUT] = known_json({"role": answer.role, "content": policy.clean(answer.text)})
    elif not only_texts:
        shown[a.LANGFUSE_OBSERVATION_OUTPUT] = known_json(told)
    return shown
