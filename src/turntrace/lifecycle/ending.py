"""Ending the spans of steps, and adding up what they used."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from opentelemetry.trace import Span, StatusCode, format_span_id

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.boundary import never_breaks
from turntrace.content import to_json
from turntrace.decisions import ContextGiven
from turntrace.export import EndedSpan
from turntrace.lifecycle.pricing import cost_usd
from turntrace.lifecycle.steps import OpenStep, TurnAccount
from turntrace.lifecycle.windows import add_given, given_to
from turntrace.records import LLMCall, Step, elapsed_ms, iso_time

if TYPE_CHECKING:
    from turntrace.lifecycle.turn import Turn

_MAX_STEPS_KEPT: Final = 1_000
"""Steps of a turn that the ledger keeps for looking at; the spans have all of them."""


@dataclass(slots=True)
class Failure:
    """How a step or a turn went wrong: the class of the error, and what may be recorded of its text."""

    error: str
    text: str | None
    failed: bool

    @property
    def message(self) -> str:
        """What is said of it on the span."""
        return self.error if self.text is None else f"{self.error}: {self.text}"


@dataclass(slots=True)
class EndedStep:
    """A step that has ended, with what is known of it only now."""

    step: OpenStep
    late: dict[str, AttributeValue]
    cost: float | None
    given: ContextGiven | None = None


def add_up(steps: list[OpenStep], account: TurnAccount) -> list[EndedStep]:
    """Add what steps used to an account."""
    return [_add_step(step, account) for step in steps]


def _add_step(step: OpenStep, account: TurnAccount) -> EndedStep:
    late: dict[str, AttributeValue] = {} if step.extra is None else dict(step.extra)
    cost: float | None = None
    given: ContextGiven | None = None
    if step.kind == "generation" and step.again_of is None:
        account.llm_calls += 1
        given, step.sent = given_to(step), None  # the messages are not kept any longer
        if given is not None:
            late.update(given.attributes())
            add_given(account, given)
    elif step.kind == "tool":
        account.tool_calls += not step.waits  # it is called once, and run again when somebody has answered
    if step.first_token_ns is not None:
        late[a.LANGFUSE_COMPLETION_START_TIME] = iso_time(step.first_token_ns)
        late[a.TURN_TIME_TO_FIRST_TOKEN_MS] = elapsed_ms(step.start_ns, step.first_token_ns)
        if account.first_token_ns is None or step.first_token_ns < account.first_token_ns:
            account.first_token_ns = step.first_token_ns
    if step.kind == "generation" and step.call is None and account.model is None:
        asked = (step.known or {}).get(a.GEN_AI_REQUEST_MODEL)  # one that failed, or that nobody waited for
        account.model = asked if isinstance(asked, str) else None
    if step.call is not None:
        late.update(step.call.attributes())
        cost = _add_call(account, step.call)
        if cost is not None:
            late[a.LANGFUSE_COST_DETAILS] = to_json({"total": cost})
    return EndedStep(step, late, cost, given)


def end_steps(turn: "Turn", ended: list[EndedStep], account: TurnAccount) -> list[EndedSpan]:
    """End the spans of steps. They are started in the order in which the steps began, parents first."""
    failures = [_failure_of(turn, each.step) for each in ended]
    begun = sorted(zip(ended, failures, strict=True), key=lambda pair: pair[0].step.start_ns)
    for each, failure in begun:
        each.step.start(each.late | words_of(failure))
    with turn.tracker.target.capturing() as spans:
        for each, failure in zip(ended, failures, strict=True):
            is_again = each.step.again_of is not None
            account.spans += each.step.span.is_recording() and not is_again
            end_span(each.step.span, each.step.end_ns, failure)
            record = _as_record(turn, each)
            if is_again:
                account.steps = [record if known.span_id == record.span_id else known for known in account.steps]
            elif len(account.steps) < _MAX_STEPS_KEPT:
                account.steps.append(record)
    return spans


def _failure_of(turn: "Turn", step: OpenStep) -> Failure | None:
    if step.error is None and not step.abandoned:
        return None
    text = None if step.error_text is None else turn.tracker.content.clean(step.error_text)
    return Failure(step.error or "abandoned", text, failed=not (step.abandoned or step.is_retried))


def words_of(failure: Failure | None) -> dict[str, AttributeValue]:
    """Return the attributes of a span that went wrong."""
    if failure is None:
        return {}
    return {
        a.ERROR_TYPE: failure.error,
        a.LANGFUSE_OBSERVATION_LEVEL: "ERROR" if failure.failed else "WARNING",
        a.LANGFUSE_STATUS_MESSAGE: failure.message,
    }


def _add_call(account: TurnAccount, call: LLMCall) -> float | None:
    """Add the tokens and the cost of a call; return its cost, or None when that is not known."""
    account.model = call.model or account.model
    cost = call.cost_usd
    if call.usage is not None:
        account.input_tokens += call.usage.input_tokens
        account.output_tokens += call.usage.output_tokens
        if cost is None:
            cost = _cost_of(call.model, call.provider, call.usage)
    if cost is None:
        account.unpriced_calls += 1
    else:
        account.cost_usd += cost
    return cost


@never_breaks("ending a span: a span processor of the app raised an error")
def end_span(span: Span, end_ns: int | None, failure: Failure | None) -> None:
    """End a span; an error of a span processor of the app's is caught."""
    if failure is not None and failure.failed:
        span.set_status(StatusCode.ERROR, failure.message)
    span.end(end_ns)


_cost_of = never_breaks("looking up the price of a model")(cost_usd)


def _as_record(turn: "Turn", ended: EndedStep) -> Step:
    step, given = ended.step, ended.given
    usage = None if step.call is None else step.call.usage
    above = getattr(step.span, "parent", None)  # which may be a span of other code
    if above is None:
        above = (turn.root if step.parent is None else step.parent).span.get_span_context()
    return Step(
        span_id=format_span_id(step.span.get_span_context().span_id),
        parent_id=format_span_id(above.span_id),
        name=_name_of(step),
        kind=step.kind,
        start_ms=elapsed_ms(turn.started_ns, step.start_ns),
        duration_ms=elapsed_ms(step.start_ns, step.end_ns or step.start_ns),
        input_tokens=None if usage is None else usage.input_tokens,
        output_tokens=None if usage is None else usage.output_tokens,
        cost_usd=ended.cost,
        error=step.error or ("abandoned" if step.abandoned else None),
        context_tokens=None if given is None else given.tokens,
        context_limit=None if given is None else given.limit,
        attempt=step.attempt,
    )


def _name_of(step: OpenStep) -> str:
    """Return the name of a step: of a call that named no model, the model that answered."""
    if step.kind != "generation" or step.call is None or a.GEN_AI_REQUEST_MODEL in (step.known or {}):
        return step.name
    return step.call.model or step.name
