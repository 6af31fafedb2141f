"""A turn that several processes have a part in is one turn: its numbers are whole, and its words are its own."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

import postgres
from apps import Builder, FakeModel, State, asks, config_of
from turntrace import SessionCallbackHandler, SessionTracker, Turn, boundary
from turntrace import attributes as a
from turntrace.errors import StateError
from turntrace.ledger import LedgerWriter
from turntrace.lifecycle.sweep import Swept
from turntrace.records import Step, TurnRequest, TurnSummary
from turntrace.testing import Capture, CapturedSpan, Clock, assert_all_tagged, captured_spans, outbox_spans

MINUTE = 60_000
_servers = ExitStack()


@cache
def postgres_url() -> str:
    """Return the URL of the PostgreSQL server of these tests; it is started when it is first asked for."""
    return _servers.enter_context(postgres.server())


@pytest.fixture(scope="module", autouse=True)
def _stop_servers() -> Iterator[None]:
    yield
    _servers.close()
    postgres_url.cache_clear()


def latest(spans: list[CapturedSpan]) -> list[CapturedSpan]:
    """Return spans as a server keeps them: of those that came twice the latter."""
    return list({span.span_id: span for span in spans}.values())


class Workers:
    """Trackers on one ledger, as of several processes, which share the checkpoints of their graphs."""

    def __init__(self, url: str, capture: Capture) -> None:
        self.capture = capture
        self.clock = Clock()
        self.saver = InMemorySaver()
        self.url = url
        self.trackers: list[SessionTracker] = []

    def tracker(self, *, outbox: bool = True) -> SessionTracker:
        """Open one more."""
        self.trackers.append(self.capture.tracker(self.url, clock=self.clock, outbox=outbox))
        return self.trackers[-1]

    def graph(self, tracker: SessionTracker, *nodes: Any) -> Any:
        """Compile the same graph as another process does: nodes in a line, named by their functions."""
        builder: Builder = StateGraph(State)
        before = START
        for node in nodes:
            builder.add_node(node.__name__, node)
            builder.add_edge(before, node.__name__)
            before = node.__name__
        return builder.compile(checkpointer=self.saver).with_config(callbacks=[SessionCallbackHandler(tracker)])

    def rows(self) -> list[tuple[TurnSummary, list[Step]]]:
        for tracker in self.trackers:
            tracker.flush()
        ledger = self.trackers[0].ledger
        return [row for session in ledger.sessions() for row in ledger.turns(session.id)]

    def row(self) -> tuple[TurnSummary, list[Step]]:
        [row] = self.rows()
        return row

    def spans(self) -> list[CapturedSpan]:
        """Return what is sent of turns, as a server keeps it."""
        self.rows()
        return latest([span for span in outbox_spans(self.trackers[0].ledger) if a.TURN_ID in span.attributes])

    def is_whole(self, **figures: Any) -> TurnSummary:
        """Assert that there is one turn, and that its row, its session and its spans tell the same."""
        turn, steps = self.row()
        assert {name: getattr(turn, name) for name in figures} == figures
        [session] = self.trackers[0].ledger.sessions()
        sums = ("llm_calls", "tool_calls", "input_tokens", "output_tokens", "total_cost_usd", "active_ms", "wait_ms")
        of_turn = [getattr(turn, {"total_cost_usd": "cost_usd", "active_ms": "latency_ms"}.get(n, n)) for n in sums]
        assert [getattr(session, name) for name in sums] == pytest.approx(of_turn)
        assert (session.total_turns, session.failed_turns) == (1, turn.status == "failed")
        spans = self.spans()
        assert_all_tagged(spans)
        assert self.trackers[0].ledger.span_counts(session.id) == {turn.id: len(spans)}
        assert {step.span_id for step in steps} == {span.span_id for span in spans} - {turn.root_span_id}
        [root] = [span for span in spans if span.name == a.SPAN_TURN]
        told = turn.attributes()
        assert {name: root.attributes.get(name) for name in told} == told
        return turn


@pytest.fixture(params=["sqlite", "postgresql"])
def workers(request: pytest.FixtureRequest, capture: Capture, tmp_path: Path) -> Workers:
    url = f"sqlite:///{tmp_path}/shared.db"
    return Workers(postgres.new_schema(postgres_url()) if request.param == "postgresql" else url, capture)


def ask(_state: State) -> dict[str, Any]:
    return {"messages": [("ai", f"You said {interrupt('Really?')}.")]}


def think(_state: State) -> dict[str, Any]:
    FakeModel().invoke("think")
    return {}


def think_again(_state: State) -> dict[str, Any]:
    FakeModel().invoke("think again")
    return {}


# --- the sweep --------------------------------------------------------------------------------------------------------
def test_the_sweep_of_another_process_leaves_a_turn_alone_that_was_just_answered(workers: Workers) -> None:
    tracker, other = workers.tracker(), workers.tracker()
    swept: list[Swept] = []

    def work(_state: State) -> dict[str, Any]:
        workers.clock.advance(minutes=2)
        swept.append(other.sweep())
        return {"messages": [("ai", "Done.")]}

    graph = workers.graph(tracker, ask, work)
    graph.invoke(asks(), config_of("c1", user_id="ann"))
    tracker.flush()
    workers.clock.advance(minutes=29)
    graph.invoke(Command(resume="yes"), config_of("c1", user_id="ann"))
    assert swept == [Swept()]
    workers.is_whole(status="completed", wait_ms=29 * MINUTE)
    workers.clock.advance(seconds=10)
    graph.invoke(asks(), config_of("c2", user_id="ann"))
    tracker.flush()
    assert [(each.end_reason, each.total_turns) for each in tracker.ledger.sessions()] == [(None, 2)]


# --- two processes at once --------------------------------------------------------------------------------------------
class Waits:
    """A job of the writer's that keeps back all that is written after it."""

    def __init__(self) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def prepare(self) -> None:
        self.begun.set()
        assert self.goes_on.wait(30)

    def write(self, ledger: LedgerWriter) -> None:
        """Write nothing."""


def held_back(tracker: SessionTracker) -> Waits:
    """Keep back what a tracker is to write from now on."""
    waits = Waits()
    tracker.submit(waits)
    assert waits.begun.wait(30)
    return waits


def at_once(*calls: Callable[[], Any]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def approve_twice(workers: Workers, *, outbox: bool = True) -> None:
    """Have two workers go on with the same turn, each of which does the work before the other has ended."""
    both = threading.Barrier(2)

    def work(_state: State) -> dict[str, Any]:
        both.wait(30)
        FakeModel().invoke("work")
        both.wait(30)
        return {"messages": [("ai", "Done.")]}

    graphs = [workers.graph(workers.tracker(outbox=outbox), think, ask, work) for _ in range(2)]
    graphs[0].invoke(asks(), config_of("c1", user_id="ann"))
    workers.trackers[0].flush()
    calls = [lambda g=g: g.invoke(Command(resume="yes"), config_of("c1", user_id="ann")) for g in graphs]
    at_once(*calls)


def test_what_both_of_two_workers_did_that_took_up_one_turn_is_counted(workers: Workers) -> None:
    approve_twice(workers)
    turn = workers.is_whole(status="completed", agent_runs=3, llm_calls=3, input_tokens=300, output_tokens=60)
    assert turn.input_length == len("What does tea cost?")


def test_where_a_provider_of_the_apps_sends_the_root_goes_out_once(workers: Workers) -> None:
    approve_twice(workers, outbox=False)
    spans = [span for span in captured_spans(workers.capture.spans()) if a.TURN_ID in span.attributes]
    assert_all_tagged(spans)
    assert [span.name for span in spans].count(a.SPAN_TURN) == 1
    [turn] = [turn for turn, _ in workers.rows()]
    assert workers.trackers[0].ledger.span_counts(turn.session_id) == {turn.id: len(spans)}


def test_an_answer_that_comes_before_it_is_written_that_the_turn_waits_loses_nothing(workers: Workers) -> None:
    first, second = workers.tracker(), workers.tracker()
    written = held_back(first)
    workers.graph(first, think, ask).invoke(asks(), config_of("c1", user_id="ann"))
    workers.clock.advance(seconds=1)
    workers.graph(second, think, ask).invoke(Command(resume="yes"), config_of("c1", user_id="ann"))
    second.flush_writer()
    written.goes_on.set()
    turn = workers.is_whole(status="completed", agent_runs=2, llm_calls=1, input_tokens=100, output_type="answer")
    assert (turn.input_length, turn.input_type) == (len("What does tea cost?"), "question")


def test_the_totals_of_a_session_that_ended_meanwhile_are_sent_again_with_both_parts(workers: Workers) -> None:
    first, second = workers.tracker(), workers.tracker()
    written = held_back(first)
    workers.graph(first, think, ask).invoke(asks(), config_of("c1", user_id="ann"))
    workers.graph(second, think, ask).invoke(Command(resume="yes"), config_of("c1", user_id="ann"))
    second.flush_writer()
    [session] = second.ledger.sessions()
    second.end_session(session.id)
    second.flush_writer()
    written.goes_on.set()
    workers.is_whole(status="completed", llm_calls=1)
    [end] = [span for span in latest(outbox_spans(second.ledger)) if span.name == a.SPAN_SESSION_END]
    assert end.attributes[a.SESSION_TOTAL_TOKENS] == 120


def test_a_first_part_that_is_written_while_the_second_runs_is_told_by_the_root_too(workers: Workers) -> None:
    first, second = workers.tracker(), workers.tracker()
    written = held_back(first)
    workers.graph(first, think, ask).invoke(asks(), config_of("c1", user_id="ann"))
    turn = second.resume_for_run(TurnRequest(conversation_id="c1"), None, answers=True)
    assert turn is not None
    written.goes_on.set()
    first.flush_writer()
    workers.graph(second, think, ask).invoke(Command(resume="yes"), turn.config)
    turn.end()
    workers.is_whole(status="completed", agent_runs=2, llm_calls=1, input_tokens=100)


def test_a_first_part_that_is_written_when_the_third_runs_loses_nothing(workers: Workers) -> None:
    trackers = [workers.tracker() for _ in range(3)]
    entered, goes_on = threading.Event(), threading.Event()

    def ask_again(_state: State) -> dict[str, Any]:
        return {"messages": [("ai", str(interrupt("Are you sure?")))]}

    def work(_state: State) -> dict[str, Any]:
        entered.set()
        assert goes_on.wait(30)
        return {"messages": [("ai", "Done.")]}

    graphs = [workers.graph(tracker, think, ask, ask_again, work) for tracker in trackers]
    written = held_back(trackers[0])
    graphs[0].invoke(asks(), config_of("c1", user_id="ann"))
    graphs[1].invoke(Command(resume="yes"), config_of("c1", user_id="ann"))
    trackers[1].flush_writer()
    third = threading.Thread(target=lambda: graphs[2].invoke(Command(resume="sure"), config_of("c1", user_id="ann")))
    third.start()
    assert entered.wait(30)
    written.goes_on.set()
    trackers[0].flush_writer()
    goes_on.set()
    third.join()
    workers.is_whole(status="completed", agent_runs=3, llm_calls=1, input_tokens=100)


@pytest.mark.parametrize("level", ["metadata", "turn"])
def test_the_texts_of_both_parts_are_shown_where_they_may_be(level: str, capture: Capture, tmp_path: Path) -> None:
    workers = Workers(f"sqlite:///{tmp_path}/shared.db", capture)
    for _ in range(2):
        workers.trackers.append(capture.tracker(workers.url, clock=workers.clock, outbox=True, content=level))
    first, second = workers.trackers
    written = held_back(first)
    workers.graph(first, think, ask).invoke(asks(), config_of("c1", user_id="ann"))
    workers.graph(second, think, ask).invoke(Command(resume="yes"), config_of("c1", user_id="ann"))
    second.flush_writer()
    written.goes_on.set()
    workers.rows()
    shown: dict[str, Any] = {}  # as Langfuse has it, which takes what is there of each
    for root in [span for span in outbox_spans(first.ledger) if span.name == a.SPAN_TURN]:
        shown |= root.attributes
    assert ("What does tea cost?" in shown[a.LANGFUSE_OBSERVATION_INPUT]) is (level == "turn")
    assert shown[a.TURN_STATUS] == "completed"


def test_many_turns_of_one_session_that_are_answered_at_once_by_two_workers_are_all_whole(workers: Workers) -> None:
    graphs = [workers.graph(workers.tracker(), think, ask, think_again) for _ in range(2)]
    names = [f"c{n}" for n in range(8)]
    at_once(*[lambda n=n: graphs[0].invoke(asks(), config_of(n, user_id="ann")) for n in names])
    workers.rows()
    answers = [(graph, name) for name in names for graph in graphs]
    at_once(*[lambda g=g, n=n: g.invoke(Command(resume="yes"), config_of(n, user_id="ann")) for g, n in answers])
    turns = [turn for turn, _ in workers.rows()]
    assert {turn.status for turn in turns} == {"completed"}
    [session] = workers.trackers[0].ledger.sessions()
    calls = [span for span in workers.spans() if span.attributes[a.LANGFUSE_OBSERVATION_TYPE] == "generation"]
    assert session.llm_calls == sum(turn.llm_calls for turn in turns) == len(calls)
    assert session.total_turns == len(turns)
    assert sum(workers.trackers[0].ledger.span_counts(session.id).values()) == len(workers.spans())


class Unreadable(dict[str, Any]):
    """A message that cannot be read."""

    def get(self, key: str, default: Any = None) -> Any:
        raise RuntimeError(key)


def test_a_turn_that_cannot_be_summed_up_keeps_nobody_waiting(
    capture: Capture, lenient: None, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = capture.tracker()
    turn = tracker.start_session(user_id="ann").conversation("c1").start_turn("Hello")
    turn.set_answer(Unreadable())
    turn.end()
    tracker.flush()
    assert not tracker.holds(turn.id)
    assert sum(boundary.failures.values()) == 1
    [told] = [each for each in caplog.records if each.levelno >= logging.WARNING and each.name == "turntrace"]
    assert "writing down (FinishTurn) failed with RuntimeError" in told.getMessage()


# --- the turn's own words ---------------------------------------------------------------------------------------------
FREE = {"user_id": "ann", "tier": "free", "topic": "billing"}
PREMIUM = {"user_id": "ann", "tier": "premium", "org_id": "acme", "langfuse_tags": ["beta"]}


def begin_and_ask(workers: Workers, tracker: SessionTracker, **second: Any) -> None:
    """Have a turn of a session that was begun as `FREE`, and then one that says other things of itself, and asks."""
    workers.graph(tracker, think).invoke(asks(), config_of("c1", **FREE))
    workers.graph(tracker, ask).invoke(asks(), config_of("c1", **second))
    tracker.flush()


def of_turn(workers: Workers, number: int) -> list[CapturedSpan]:
    return [span for span in workers.spans() if span.attributes[a.TURN_NUMBER] == number]


def words_of(span: CapturedSpan) -> tuple[Any, ...]:
    names = (a.USER_TIER, a.USER_ORG_ID, a.CONVERSATION_TOPIC, a.LANGFUSE_TRACE_TAGS)
    return tuple(span.attributes.get(name) for name in names)


def test_a_turn_keeps_its_tier_organisation_topic_and_tags_when_it_goes_on(workers: Workers) -> None:
    begin_and_ask(workers, workers.tracker(), **PREMIUM)
    workers.graph(workers.tracker(), ask).invoke(Command(resume="yes"), config_of("c1", user_id="ann"))
    assert_all_tagged(workers.spans())
    spans = of_turn(workers, 2)
    assert {words_of(span)[:3] for span in spans} == {("premium", "acme", None)}
    [root] = [span for span in spans if span.name == a.SPAN_TURN]
    assert (root.attributes[a.TURN_STATUS], root.attributes[a.LANGFUSE_TRACE_TAGS]) == ("completed", ("beta",))
    [first] = [span for span in of_turn(workers, 1) if span.name == a.SPAN_TURN]
    assert words_of(first) == ("free", None, "billing", None)


def test_a_turn_that_is_abandoned_while_it_waits_keeps_its_own_words(workers: Workers) -> None:
    begin_and_ask(workers, workers.tracker(), **PREMIUM, topic="refunds")
    workers.clock.advance(minutes=31)
    assert workers.tracker().sweep() == Swept(sessions=1, turns=1)
    [root] = [span for span in of_turn(workers, 2) if span.name == a.SPAN_TURN]
    assert root.attributes[a.TURN_STATUS] == "abandoned"
    assert words_of(root) == ("premium", "acme", "refunds", ("beta",))


def test_a_turn_whose_process_died_keeps_its_own_words(workers: Workers) -> None:
    begin_and_ask(workers, workers.tracker(), **PREMIUM, topic="refunds")
    assert workers.tracker().resume_newest("c1") is not None
    third = TurnRequest(user_id="ann", conversation_id="c3", tier="trial", topic="prices", tags=("alpha", "beta"))
    workers.tracker().begin_turn(third, "Hello")
    workers.clock.advance(minutes=31)
    assert workers.tracker().sweep() == Swept(sessions=1, turns=2)
    roots = {span.attributes[a.CONVERSATION_ID]: span for span in of_turn(workers, 1) if span.name == a.SPAN_TURN}
    assert words_of(roots["c3"]) == ("trial", None, "prices", ("alpha", "beta"))
    [root] = [span for span in of_turn(workers, 2) if span.name == a.SPAN_TURN]
    assert words_of(root) == ("premium", "acme", "refunds", ("beta",))


def test_a_turn_that_says_nothing_of_its_own_writes_nothing_more(workers: Workers) -> None:
    tracker = workers.tracker()
    with tracker.session(user_id="ann", tier="free", org_id="acme") as session, session.conversation("c1").turn("Hi"):
        pass
    turn, _ = workers.row()
    assert turn.own is None


# --- below the span of a request --------------------------------------------------------------------------------------
def serve(workers: Workers, tracker: SessionTracker, given: Any, name: str) -> None:
    """Run a graph inside the span of a request, as an instrumented web framework does."""
    requests = workers.capture.provider.get_tracer("fastapi")
    with requests.start_as_current_span(name, kind=trace.SpanKind.SERVER):
        workers.graph(tracker, ask).invoke(given, config_of("c1", user_id="ann"))


@pytest.mark.parametrize("outbox", [False, True])
def test_a_turn_stays_below_the_request_in_which_it_began(workers: Workers, outbox: bool) -> None:
    serve(workers, workers.tracker(outbox=outbox), asks(), "POST /chat")
    serve(workers, workers.tracker(outbox=outbox), Command(resume="yes"), "POST /answer")
    spans = latest(captured_spans(workers.capture.spans()))
    assert_all_tagged(spans)
    [request] = [span for span in spans if span.name == "POST /chat"]
    [root] = [span for span in spans if span.name == a.SPAN_TURN]
    assert (root.trace_id, root.parent_id) == (request.trace_id, request.span_id)
    assert [span.name for span in spans if span.trace_id == root.trace_id and span.parent_id is None] == ["POST /chat"]


@pytest.mark.parametrize("dies", [False, True])
def test_a_turn_that_is_abandoned_stays_below_its_request(workers: Workers, dies: bool) -> None:
    serve(workers, workers.tracker(), asks(), "POST /chat")
    workers.rows()
    if dies:
        assert workers.tracker().resume_newest("c1") is not None
    workers.clock.advance(minutes=31)
    workers.tracker().sweep()
    spans = latest(captured_spans(workers.capture.spans()))
    assert_all_tagged(spans)
    [request] = [span for span in spans if span.name == "POST /chat"]
    [root] = [span for span in spans if span.name == a.SPAN_TURN]
    assert (root.attributes[a.TURN_STATUS], root.parent_id) == ("abandoned", request.span_id)


def test_a_turn_of_a_request_that_is_not_sampled_stays_unsampled(capture: Capture, tmp_path: Path) -> None:
    workers = Workers(f"sqlite:///{tmp_path}/shared.db", capture)
    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF))
    requests = provider.get_tracer("fastapi")
    answer: Any = Command(resume="yes")
    for given in (asks(), answer):
        tracker = capture.tracker(workers.url, clock=workers.clock, outbox=True, tracer_provider=provider)
        workers.trackers.append(tracker)
        with requests.start_as_current_span("POST /chat", kind=trace.SpanKind.SERVER):
            workers.graph(tracker, ask).invoke(given, config_of("c1", user_id="ann"))
        tracker.flush()
    assert [turn.status for turn, _ in workers.rows()] == ["completed"]
    assert workers.spans() == []


# --- jobs of a queue that delivers at least once ----------------------------------------------------------------------
def hand_over(workers: Workers) -> dict[str, str]:
    conversation = workers.tracker().start_session(user_id="ann").conversation("c1", topic="sums")
    return conversation.start_turn("Sum this up.").carrier()


def do(workers: Workers, tracker: SessionTracker, turn: Turn) -> None:
    """Do a job in 3 seconds."""
    with turn:
        workers.clock.advance(seconds=3)
        workers.graph(tracker, think).invoke(asks(), turn.config)


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError(), "failed"), (SystemExit(), "abandoned")], ids=["fails", "is-stopped"]
)
def test_a_job_that_is_tried_again_makes_its_turn_whole(workers: Workers, error: BaseException, status: str) -> None:
    carrier, worker = hand_over(workers), workers.tracker()
    with worker.resume_turn(carrier) as turn:
        workers.graph(worker, think).invoke(asks(), turn.config)
        turn.end(error=error)
    workers.is_whole(status=status, error=type(error).__name__, llm_calls=1)
    workers.clock.advance(minutes=2)
    do(workers, worker, worker.resume_turn(carrier))
    workers.is_whole(status="completed", error=None, agent_runs=2, llm_calls=2, latency_ms=123_000, wait_ms=0)


def test_a_job_that_is_delivered_again_after_its_worker_was_killed_completes_the_turn(workers: Workers) -> None:
    carrier = hand_over(workers)
    killed = workers.tracker().resume_turn(carrier)
    worker = workers.tracker()
    do(workers, worker, worker.resume_turn(carrier))
    workers.is_whole(status="completed", agent_runs=1, llm_calls=1)
    assert not killed.is_finished


def test_a_job_that_two_workers_do_at_once_is_one_turn_with_what_both_used(workers: Workers) -> None:
    carrier = hand_over(workers)
    both = [workers.tracker() for _ in range(2)]
    taken = [worker.resume_turn(carrier) for worker in both]
    for worker, turn in zip(both, taken, strict=True):
        do(workers, worker, turn)
        worker.flush()
    workers.is_whole(status="completed", agent_runs=2, llm_calls=2, input_tokens=200, latency_ms=3_000)


def test_a_job_that_lay_in_the_queue_until_the_sweep_came_makes_its_turn_whole(workers: Workers) -> None:
    carrier = hand_over(workers)
    workers.clock.advance(minutes=31)
    worker = workers.tracker()
    assert worker.sweep() == Swept(sessions=1, turns=1)
    do(workers, worker, worker.resume_turn(carrier))
    workers.is_whole(status="completed", error=None, agent_runs=1, latency_ms=31 * MINUTE + 3_000)
    [end] = [span for span in latest(outbox_spans(worker.ledger)) if span.name == a.SPAN_SESSION_END]
    assert (end.attributes[a.SESSION_TOTAL_TOKENS], end.attributes[a.DROPOFF_DETECTED]) == (120, False)


def test_a_worker_that_takes_up_a_job_after_the_sweep_is_left_alone_by_the_next_sweep(workers: Workers) -> None:
    carrier = hand_over(workers)
    workers.clock.advance(minutes=31)
    worker, other = workers.tracker(), workers.tracker()
    other.sweep()
    with worker.resume_turn(carrier):
        workers.clock.advance(minutes=2)
        assert other.sweep() == Swept()
    workers.is_whole(status="completed")


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_that_is_delivered_again_when_it_is_done_is_one_more_run_of_its_turn(
    workers: Workers, fails: bool
) -> None:
    carrier, worker = hand_over(workers), workers.tracker()
    do(workers, worker, worker.resume_turn(carrier))
    before = workers.is_whole(status="completed", agent_runs=1, llm_calls=1)
    active = worker.ledger.sessions()[0].last_activity_ns
    workers.clock.advance(minutes=5)
    again = workers.tracker()
    turn = again.resume_turn(carrier)
    if fails:
        with turn:
            workers.graph(again, think).invoke(asks(), turn.config)
            turn.end(error=ValueError())
    else:
        do(workers, again, turn)
    after = workers.is_whole(status="completed", agent_runs=2, llm_calls=2, input_tokens=200)
    assert (after.ended_ns, after.latency_ms) == (before.ended_ns, before.latency_ms)
    assert worker.ledger.sessions()[0].last_activity_ns == active  # nobody was there


def test_where_a_provider_of_the_apps_sends_a_job_done_twice_has_one_root(workers: Workers) -> None:
    worker = workers.tracker(outbox=False)
    carrier = worker.start_session(user_id="ann").conversation("c1").start_turn("Sum this up.").carrier()
    for _ in range(2):
        do(workers, worker, worker.resume_turn(carrier))
    spans = [span for span in captured_spans(workers.capture.spans()) if a.TURN_ID in span.attributes]
    assert_all_tagged(spans)
    assert [span.name for span in spans].count(a.SPAN_TURN) == 1
    assert [span.name for span in spans].count("think") == 2


@pytest.mark.parametrize("carrier", [None, "", {}, {"turn": "x"}, {"turntrace_turn_id": 3}, ["x"]], ids=repr)
def test_what_is_no_carrier_is_refused_and_says_what_is_one(carrier: Any, capture: Capture) -> None:
    with pytest.raises(StateError, match=r"what turn\.carrier\(\) returned"):
        capture.tracker().resume_turn(carrier)


def test_a_turn_that_the_ledger_does_not_have_is_refused(workers: Workers) -> None:
    carrier = hand_over(workers)
    workers.trackers[0].forget_user("ann")
    with pytest.raises(StateError, match="it is in another ledger, or was erased"):
        workers.tracker().resume_turn(carrier)
