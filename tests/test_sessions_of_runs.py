"""The session, the conversation and the user of a run that stands alone, from what its config says."""

import asyncio
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver

from apps import App, FakeModel, State, asks, config_of, new_thread, single
from turntrace import SessionCallbackHandler, SessionTracker, current_turn, track_graph
from turntrace import attributes as a
from turntrace.identity import safe_id
from turntrace.records import TurnRequest
from turntrace.testing import Capture, CapturedSpan, Clock, assert_all_tagged, captured_spans, format_tree, span_tree


@pytest.fixture
def clock() -> Clock:
    return Clock(tick_ns=1_000)


@pytest.fixture
def tracker(capture: Capture, clock: Clock) -> SessionTracker:
    return capture.tracker(clock=clock)


class Runs:
    """Runs a graph with a handler, and finds the turns that came of it."""

    def __init__(self, capture: Capture, tracker: SessionTracker) -> None:
        self.capture = capture
        self.tracker = tracker
        self.handler = SessionCallbackHandler(tracker)
        self.graph: Any = single(lambda state: None).compile()

    def __call__(self, **metadata: Any) -> CapturedSpan:
        """Run once, and return the turn's root."""
        thread = metadata.pop("thread_id", None)
        config: dict[str, Any] = {"callbacks": [self.handler], "metadata": metadata}
        if thread is not None:
            config["configurable"] = {"thread_id": thread}
        before = len(self.roots())
        self.graph.invoke(asks(), config)
        (root,) = self.roots()[before:]
        return root

    def spans(self) -> list[CapturedSpan]:
        return captured_spans(self.capture.spans())

    def roots(self) -> list[CapturedSpan]:
        return [span for span in self.spans() if span.name == a.SPAN_TURN]

    def ends(self) -> dict[Any, Any]:
        """Return the reasons of the sessions that have ended."""
        ended = [span.attributes for span in self.spans() if span.name == "session.end"]
        return {has[a.SESSION_ID]: has[a.SESSION_END_REASON] for has in ended}


@pytest.fixture
def run(capture: Capture, tracker: SessionTracker) -> Runs:
    return Runs(capture, tracker)


def session(root: CapturedSpan) -> Any:
    return root.attributes[a.SESSION_ID]


# --- the sitting ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "who", [{"user_id": "ann"}, {"thread_id": "c-1"}, {"user_id": "ann", "thread_id": "c-1"}], ids=str
)
@pytest.mark.parametrize(("minutes", "same"), [(0, True), (29, True), (31, False)])
def test_a_gap_of_half_an_hour_begins_a_new_session(
    run: Runs, clock: Clock, who: dict[str, Any], minutes: float, same: bool
) -> None:
    first = run(**who)
    clock.advance(minutes=minutes)
    second = run(**who)

    assert (session(first) == session(second)) is same
    assert run.ends() == ({} if same else {session(first): "inactive_timeout"})
    assert_all_tagged(run.spans())


def test_exactly_half_an_hour_is_still_the_same_session(capture: Capture) -> None:
    still = Clock()
    run = Runs(capture, capture.tracker(clock=still))
    first = run(user_id="ann")
    still.advance(minutes=30)
    assert session(run(user_id="ann")) == session(first)


def test_the_gap_counts_from_the_last_activity_not_from_the_start(run: Runs, clock: Clock) -> None:
    sessions = []
    for _ in range(5):
        sessions.append(session(run(user_id="ann")))
        clock.advance(minutes=25)
    assert len(set(sessions)) == 1


def test_the_gap_counts_from_the_end_of_a_long_turn(run: Runs, clock: Clock) -> None:
    run.graph = single(lambda state: clock.advance(minutes=50)).compile()
    first = run(user_id="ann")
    clock.advance(minutes=20)
    assert session(run(user_id="ann")) == session(first)


def test_a_turn_whose_process_was_killed_keeps_no_session_open(capture: Capture, clock: Clock, tmp_path: Any) -> None:
    """Nobody will end it; without a sweep the user's next visits would all be one sitting."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    killed, after = capture.tracker(url, clock=clock), capture.tracker(url, clock=clock)
    request = TurnRequest(user_id="ann", conversation_id="c")
    first = killed.begin_turn(request, "Hello?")
    found = [first.conversation.session.id]
    for minutes in (20, 31, 3 * 24 * 60):
        clock.advance(minutes=minutes)
        turn = after.begin_turn(request, "Hello again?")
        turn.end()
        assert after.flush()
        found.append(turn.conversation.session.id)
    assert found[0] == found[1]
    assert len(set(found[1:])) == 3
    assert after.flush()
    assert [each.end_reason for each in after.ledger.sessions()] == [None, "inactive_timeout", "inactive_timeout"]


def test_the_old_session_has_ended_with_its_totals_before_the_new_one(run: Runs, clock: Clock) -> None:
    first = run(user_id="ann")
    run(user_id="ann")
    clock.advance(minutes=31)
    second = run(user_id="ann")

    end = next(span for span in run.spans() if span.name == "session.end")
    assert end.attributes[a.SESSION_TOTAL_TURNS] == 2
    assert end.attributes[a.SESSION_INACTIVE_TIMEOUT] is True
    assert end.attributes[a.SESSION_IDLE_TIME_MS] == 30 * 60_000  # then it had ended, whenever that is found out
    starts = {span.attributes[a.SESSION_ID]: span.attributes for span in run.spans() if span.name == "session.start"}
    assert set(starts) == {session(first), session(second)}
    assert starts[session(second)][a.SESSION_PREVIOUS_ID] == session(first)
    assert starts[session(second)][a.USER_SESSIONS_TOTAL] == 2


def test_another_process_goes_on_with_the_session(capture: Capture, clock: Clock, tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    one, two = (Runs(capture, capture.tracker(url, clock=clock)) for _ in range(2))
    first = one(user_id="ann", thread_id="c-1")
    clock.advance(minutes=5)
    second = two(user_id="ann", thread_id="c-1")
    clock.advance(minutes=5)
    third = one(user_id="ann", thread_id="c-1")

    assert session(first) == session(second) == session(third)
    assert [root.attributes[a.TURN_NUMBER] for root in (first, second, third)] == [1, 2, 3]


def test_a_session_that_another_process_ended_is_not_continued(capture: Capture, clock: Clock, tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    one, two = (Runs(capture, capture.tracker(url, clock=clock)) for _ in range(2))
    first = one(user_id="ann")
    two.tracker.end_session(session(first), "handoff")
    two.tracker.flush()

    assert session(one(user_id="ann")) != session(first)


def test_a_session_that_was_ended_is_not_continued(run: Runs) -> None:
    first = run(user_id="ann")
    run.tracker.end_session(session(first))
    run.tracker.flush()

    assert session(run(user_id="ann")) != session(first)
    assert run.ends() == {session(first): "user_exit"}


def test_a_session_that_was_ended_just_now_is_not_continued(run: Runs) -> None:
    """Nobody waits for the end to be written; the next run must know of it all the same."""
    for number in range(10):
        first = run(user_id=f"user {number}")
        run.tracker.end_session(session(first))
        run.graph.invoke(asks(), {"callbacks": [run.handler], "metadata": {"user_id": f"user {number}"}})
    run.tracker.flush()

    sessions = [session(root) for root in run.roots()]
    assert len(set(sessions)) == 20, "a turn began in a session whose end had been said"


def test_a_run_right_after_a_session_block_is_not_in_its_session(run: Runs) -> None:
    with run.tracker.session(user_id="ann") as ended, ended.conversation().turn("Hi"):
        pass
    run.graph.invoke(asks(), {"callbacks": [run.handler], "metadata": {"user_id": "ann"}})

    first, second = run.roots()
    assert session(first) == ended.id
    assert session(second) != ended.id


def test_a_run_joins_the_open_explicit_session_of_its_user(run: Runs) -> None:
    opened = run.tracker.start_session(user_id="ann", channel="web")
    assert session(run(user_id="ann", channel="web")) == opened.id
    assert session(run(user_id="ann", channel="mobile")) != opened.id


# --- who and where ----------------------------------------------------------------------------------------------------
def test_two_channels_are_two_sessions(run: Runs) -> None:
    web, mobile, web_again = (run(user_id="ann", channel=channel) for channel in ("web", "mobile", "web"))
    assert session(web) == session(web_again) != session(mobile)
    assert (web.attributes[a.SESSION_CHANNEL], mobile.attributes[a.SESSION_CHANNEL]) == ("web", "mobile")


def test_two_users_are_two_sessions_also_in_one_thread(run: Runs) -> None:
    ann, bob = run(user_id="ann", thread_id="c-1"), run(user_id="bob", thread_id="c-1")
    assert session(ann) != session(bob)
    assert ann.attributes[a.USER_ID] != bob.attributes[a.USER_ID]


def test_one_user_in_two_threads_is_one_session(run: Runs) -> None:
    first, second = run(user_id="ann", thread_id="c-1"), run(user_id="ann", thread_id="c-2")
    assert session(first) == session(second)
    assert (first.attributes[a.TURN_NUMBER], second.attributes[a.TURN_NUMBER]) == (1, 1)


def test_without_a_user_the_thread_tells_sessions_apart(run: Runs) -> None:
    one, other, one_again = (run(thread_id=thread) for thread in ("c-1", "c-2", "c-1"))
    assert session(one) == session(one_again) != session(other)
    assert one_again.attributes[a.TURN_NUMBER] == 2
    assert a.USER_ID not in one.attributes


def test_with_neither_user_nor_thread_each_run_is_a_session(run: Runs) -> None:
    first, second = run(), run()
    assert session(first) != session(second)
    for root in (first, second):
        assert root.attributes[a.CONVERSATION_ID] == session(root)
        assert root.attributes[a.TURN_NUMBER] == 1


def test_the_user_is_hashed_and_is_nowhere_as_it_was(capture: Capture, clock: Clock, tmp_path: Any) -> None:
    path = tmp_path / "ledger.db"
    run = Runs(capture, capture.tracker(f"sqlite:///{path}", clock=clock, outbox=True))
    root = run(user_id="ann.smith@example.com")

    assert root.attributes[a.USER_ID] == run.tracker.hash_user("ann.smith@example.com")
    told = "".join(span.to_json() for span in capture.spans()).encode()
    stored = b"".join(file.read_bytes() for file in tmp_path.glob("ledger.db*"))
    assert b"ann.smith" not in told + stored


def test_the_same_user_by_number_and_by_text(run: Runs) -> None:
    assert run(user_id=42).attributes[a.USER_ID] == run(user_id="42").attributes[a.USER_ID]


# --- the words of the metadata ----------------------------------------------------------------------------------------
def test_every_word_of_the_metadata(run: Runs) -> None:
    root = run(
        session_id="s-1",
        user_id="ann",
        conversation_id="c-9",
        thread_id="t-1",
        channel="slack",
        topic="prices",
        tier="premium",
        org_id="org-1",
        locale="de-AT",
        client_version="1.2.3",
    )
    expected = {
        a.SESSION_ID: "s-1",
        a.USER_ID: run.tracker.hash_user("ann"),
        a.CONVERSATION_ID: "c-9",
        a.GEN_AI_CONVERSATION_ID: "c-9",
        a.SESSION_CHANNEL: "slack",
        a.CONVERSATION_TOPIC: "prices",
        a.USER_TIER: "premium",
        a.USER_ORG_ID: "org-1",
        a.SESSION_LOCALE: "de-AT",
        a.SESSION_CLIENT_VERSION: "1.2.3",
        a.SESSION_TYPE: "chat",
    }
    assert {name: root.attributes.get(name) for name in expected} == expected
    assert_all_tagged(run.spans())


def test_langfuses_own_words_mean_the_same(run: Runs) -> None:
    root = run(langfuse_session_id="s-1", langfuse_user_id="ann", langfuse_tags=["beta", "eu"], thread_id="t-1")
    assert session(root) == "s-1"
    assert root.attributes[a.USER_ID] == run.tracker.hash_user("ann")
    assert root.attributes[a.LANGFUSE_TRACE_TAGS] == ("beta", "eu")


def test_our_words_go_before_langfuses(run: Runs) -> None:
    root = run(session_id="ours", langfuse_session_id="theirs", user_id="ann", langfuse_user_id="bob")
    assert session(root) == "ours"
    assert root.attributes[a.USER_ID] == run.tracker.hash_user("ann")


def test_what_is_empty_counts_as_not_said(run: Runs) -> None:
    root = run(session_id="", user_id="", channel="", topic=None, thread_id="c-1")
    assert session(root)
    assert root.attributes[a.SESSION_CHANNEL] == "unknown"
    assert a.USER_ID not in root.attributes
    assert a.CONVERSATION_TOPIC not in root.attributes


def test_the_channel_of_the_tracker_counts_when_none_is_said(capture: Capture) -> None:
    run = Runs(capture, capture.tracker(channel="api"))
    assert run().attributes[a.SESSION_CHANNEL] == "api"


def test_a_session_of_the_apps_own_id_is_continued_whatever_its_age(run: Runs, clock: Clock) -> None:
    first = run(session_id="s-1", user_id="ann")
    clock.advance(minutes=24 * 60)
    run(session_id="s-1", user_id="ann")

    assert run.ends() == {}
    run.tracker.end_session("s-1")
    run.tracker.flush()
    run(session_id="s-1", user_id="ann")  # it is open again
    assert [session(root) for root in run.roots()] == [session(first)] * 3


def test_one_conversation_may_go_on_in_a_later_session(run: Runs, clock: Clock) -> None:
    first = run(user_id="ann", thread_id="c-1")
    clock.advance(minutes=31)
    second = run(user_id="ann", thread_id="c-1")
    assert session(first) != session(second)
    assert (first.attributes[a.TURN_NUMBER], second.attributes[a.TURN_NUMBER]) == (1, 2)
    assert second.attributes["conversation.session_id"] == session(second)


BAD_IDS = ["sitzung-ü", "x" * 201, "tab\there", "\ud800"]


@pytest.mark.parametrize("bad", BAD_IDS, ids=["not-ascii", "too-long", "control", "surrogate"])
@pytest.mark.parametrize("word", ["session_id", "conversation_id", "thread_id", "langfuse_session_id"])
def test_an_id_that_langfuse_would_refuse_is_hashed_not_lost(run: Runs, word: str, bad: str) -> None:
    first, second = run(**{word: bad}), run(**{word: bad})

    name = a.SESSION_ID if "session" in word else a.CONVERSATION_ID
    assert first.attributes[name] == second.attributes[name] == safe_id(bad)
    assert str(first.attributes[name]).isascii()
    assert len(str(first.attributes[name])) <= 200
    assert session(first) == session(second)
    assert_all_tagged(run.spans())


@pytest.mark.parametrize("word", ["channel", "topic", "tier", "org_id", "locale", "client_version"])
def test_a_text_that_is_too_long_is_cut(run: Runs, word: str) -> None:
    root = run(**{word: "x" * 1000})
    assert "x" * 200 in root.attributes.values()
    assert "x" * 201 not in root.attributes.values()


@pytest.mark.parametrize("thread", [7, "7"])
def test_a_thread_may_be_a_number(run: Runs, thread: Any) -> None:
    assert run(thread_id=thread).attributes[a.CONVERSATION_ID] == "7"


# --- which turn a run is in -------------------------------------------------------------------------------------------
def tree_of_turn(spans: list[CapturedSpan]) -> str:
    return format_tree(tree for tree in span_tree(spans) if tree.name == a.SPAN_TURN)


def test_a_run_inside_a_node_with_callbacks_of_its_own_joins(run: Runs) -> None:
    inner: Any = RunnableLambda(lambda text: FakeModel().invoke(text), name="helper")

    def work(state: State) -> None:
        inner.invoke("What does tea cost?", {"callbacks": [run.handler]})

    run.graph = single(work).compile()
    run(user_id="ann")

    assert len(run.roots()) == 1
    assert_all_tagged(run.spans())
    assert tree_of_turn(run.spans()) == "conversation.turn\n  LangGraph\n    work\n      helper\n        gpt-4o-mini"
    assert run.handler.open_runs == 0


def test_the_ledger_has_such_a_run_below_its_node_too(run: Runs) -> None:
    def work(state: State) -> None:
        FakeModel().invoke("What does tea cost?", {"callbacks": [run.handler]})

    run.graph = single(work).compile()
    root = run(user_id="ann")

    ((_, steps),) = run.tracker.ledger.turns(session(root))
    by_name = {step.name: step for step in steps}
    assert by_name["gpt-4o-mini"].parent_id == by_name["work"].span_id


def test_a_model_inside_a_node_with_another_handler_object_is_counted_once(run: Runs) -> None:
    def work(state: State) -> None:
        FakeModel().invoke("What does tea cost?", {"callbacks": [SessionCallbackHandler(run.tracker)]})

    run.graph = single(work).compile()
    root = run(user_id="ann")

    assert root.attributes[a.TURN_LLM_CALLS] == 1
    assert tree_of_turn(run.spans()) == "conversation.turn\n  LangGraph\n    work\n      gpt-4o-mini"


@pytest.mark.parametrize("others", [1, 2])
@pytest.mark.parametrize("same", [True, False], ids=["same-object", "other-object"])
def test_a_handler_attached_twice_makes_no_second_turn(run: Runs, same: bool, others: int) -> None:
    more = [run.handler if same else SessionCallbackHandler(run.tracker) for _ in range(others)]
    builder = track_graph(App().tools())
    run.graph = builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=more)

    for number in (1, 2):
        assert run(user_id="ann", thread_id="c-1").attributes[a.TURN_NUMBER] == number

    assert len(run.roots()) == 2
    assert run.roots()[0].attributes[a.TURN_LLM_CALLS] == 2
    assert_all_tagged(run.spans())
    assert all(handler.open_runs == 0 for handler in more)


def test_in_a_block_the_callback_in_the_config_makes_no_second_turn(run: Runs) -> None:
    graph: Any = App().tools().compile(checkpointer=InMemorySaver()).with_config(callbacks=[run.handler])
    with run.tracker.session(user_id="ann") as block, block.conversation("c-1").turn("Hi") as turn:
        graph.invoke(turn.input, turn.config)
        graph.invoke(turn.input, {"configurable": {"thread_id": "c-1"}})

    (root,) = run.roots()
    assert root.attributes[a.TURN_AGENT_RUNS] == 2
    assert (root.attributes[a.TURN_LLM_CALLS], root.attributes[a.TURN_TOOL_CALLS]) == (4, 2)
    assert_all_tagged(run.spans())


def test_without_a_checkpointer_a_block_needs_no_config_at_all(run: Runs) -> None:
    graph: Any = App().tools().compile()
    with run.tracker.session(user_id="ann") as block, block.conversation("c-1").turn("Hi") as turn:
        graph.invoke(turn.input)

    (root,) = run.roots()
    assert (root.attributes[a.CONVERSATION_ID], root.attributes[a.TURN_AGENT_RUNS]) == ("c-1", 1)


def test_the_config_of_a_turn_carries_it_to_where_its_block_does_not_reach(run: Runs) -> None:
    import threading

    graph: Any = App().tools().compile(checkpointer=InMemorySaver())
    turn = run.tracker.start_session(user_id="ann").conversation("c-1").start_turn("Hi")
    thread = threading.Thread(target=graph.invoke, args=(turn.input, turn.config))
    thread.start()
    thread.join()
    assert not current_turn()
    turn.end()

    (root,) = run.roots()
    assert root.attributes[a.TURN_ID] == turn.id
    assert root.attributes[a.TURN_AGENT_RUNS] == 1
    assert_all_tagged(run.spans())


def test_the_config_of_a_turn_goes_before_the_block_that_it_is_used_in(run: Runs) -> None:
    block = run.tracker.start_session(user_id="ann")
    other = block.conversation("c-2").start_turn("Something else")
    with block.conversation("c-1").turn("Hi") as around:
        run.graph.invoke(other.input, other.config)
    other.end()

    runs = {root.attributes[a.TURN_ID]: root.attributes[a.TURN_AGENT_RUNS] for root in run.roots()}
    assert runs == {around.id: 0, other.id: 1}, "a run that carries the config of a turn is in another one"


def test_a_turn_inside_a_node_is_a_turn_of_its_own(run: Runs) -> None:
    """As an agent that talks to a second user, or replays a conversation."""
    other: Any = single(lambda state: None, "inner").compile(name="other")

    def work(state: State) -> None:
        block = run.tracker.start_session(user_id="bob")
        with block.conversation("c-2").turn("Hi") as turn:
            other.invoke(turn.input)
        assert current_turn().conversation.id == "c-1"

    run.graph = single(work).compile()
    run.graph.invoke(asks(), {"callbacks": [run.handler], **config_of("c-1", user_id="ann")})

    trees = sorted(str(tree) for tree in span_tree(run.spans()) if tree.name == a.SPAN_TURN)
    assert len(trees) == 2
    assert {root.attributes[a.CONVERSATION_ID] for root in run.roots()} == {"c-1", "c-2"}
    assert_all_tagged(run.spans())


def test_a_run_that_is_part_of_a_chain_is_the_chains_turn(run: Runs) -> None:
    chain = RunnableLambda(lambda text: asks(text)) | run.graph
    chain.invoke("Hi", {"callbacks": [run.handler], "metadata": {"user_id": "ann"}})

    assert len(run.roots()) == 1
    assert_all_tagged(run.spans())
    assert "work" in {span.name for span in run.spans()}


def test_models_and_tools_called_without_a_graph_are_turns_too(run: Runs) -> None:
    FakeModel().invoke("What does tea cost?", {"callbacks": [run.handler], "metadata": {"user_id": "ann"}})

    assert tree_of_turn(run.spans()) == "conversation.turn\n  gpt-4o-mini"
    (root,) = run.roots()
    assert root.attributes[a.TURN_OUTPUT_LENGTH] == len("It costs 5 euros.")
    assert run.handler.open_runs == 0


def test_the_numbers_of_a_conversation_have_no_gaps_however_it_is_run(run: Runs) -> None:
    thread = new_thread()
    graph: Any = App().tools().compile(checkpointer=InMemorySaver())
    config = {"callbacks": [run.handler], **config_of(thread, user_id="ann")}
    graph.invoke(asks(), config)
    asyncio.run(graph.ainvoke(asks(), config))
    list(graph.stream(asks(), config))
    with run.tracker.session(user_id="ann") as block, block.conversation(thread).turn("Hi") as turn:
        graph.invoke(turn.input, turn.config)
    graph.batch([asks()], [config])

    numbers = [root.attributes[a.TURN_NUMBER] for root in run.roots()]
    assert numbers == list(itertools.islice(itertools.count(1), 5))


def test_runs_that_begin_at_once_in_a_new_conversation_without_a_user_are_one_session(run: Runs) -> None:
    graph: Any = single(lambda state: None).compile(checkpointer=InMemorySaver())
    thread, begin = new_thread(), threading.Barrier(4)

    def invoke(_: int) -> None:
        begin.wait()
        graph.invoke(asks(), {**config_of(thread), "callbacks": [run.handler]})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(invoke, range(4)))
    assert len({span.attributes[a.SESSION_ID] for span in run.roots()}) == 1
    assert sorted(int(str(span.attributes[a.TURN_NUMBER])) for span in run.roots()) == [1, 2, 3, 4]
