"""Hundreds of conversations at once on one handler, and thousands of turns: nothing mixed, nothing kept.

Run it by itself to see the memory of a process over 20,000 turns: ``python tests/test_load.py``.
"""

import asyncio
import gc
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START
from opentelemetry import trace

import turntrace
from apps import App, Builder, FakeModel, asks, config_of
from turntrace import SessionCallbackHandler, SessionTracker, current_turn, track_graph
from turntrace import attributes as a
from turntrace.current import Scope
from turntrace.export import written
from turntrace.graph import tree
from turntrace.graph.tree import Run
from turntrace.lifecycle import Turn, checks
from turntrace.lifecycle import sittings as sittings_module
from turntrace.lifecycle import turns as turns_module
from turntrace.lifecycle.steps import OpenStep
from turntrace.lifecycle.windows import Windows
from turntrace.testing import Capture, assert_all_tagged, captured_spans

TASKS = 500
THREADS = 32
TURNS = 2
CALLS = 2
"""Calls of the model in a turn."""

WARM_UP = 300
MEASURED = 800
MOST_BLOCKS_A_TURN = 0.5
"""Pieces of memory that may stay of a turn: one text that is kept of each would be 1, and a leak of 1 kB 2 or more."""


class CountingModel(FakeModel):
    """A model whose tokens say whom it talked with: to number 17 it says 17 tokens, and was given 1,017."""

    def _answer(self, messages: Sequence[BaseMessage]) -> AIMessage:
        number = int(str(messages[0].content).rpartition(" ")[2])
        usage = {"input_tokens": 1_000 + number, "output_tokens": number, "total_tokens": 1_000 + 2 * number}
        return super()._answer(messages).model_copy(update={"usage_metadata": usage})


def app_of(handler: SessionCallbackHandler, *, is_async: bool, tracked: bool) -> Any:
    builder = App(is_async=is_async, model=CountingModel(delay=0.001 if is_async else 0)).tools()
    built = track_graph(builder) if tracked else builder
    return built.compile(checkpointer=InMemorySaver()).with_config(callbacks=[handler])


@pytest.mark.parametrize("tracked", [False, True], ids=["callback", "tracked"])
def test_500_conversations_on_one_loop_and_32_threads_beside_it(
    capture: Capture, tmp_path: Path, tracked: bool
) -> None:
    tracker = capture.tracker(f"sqlite:///{tmp_path / 'ledger.db'}")
    handler = SessionCallbackHandler(tracker)
    app, async_app = (app_of(handler, is_async=is_async, tracked=tracked) for is_async in (False, True))

    def config(number: int) -> dict[str, Any]:
        return config_of(f"c-{number}", user_id=f"user {number}", channel="web")

    def sitting(number: int) -> None:
        for _ in range(TURNS):
            app.invoke(asks(f"I am {number}"), config(number))
            assert not current_turn()

    async def asitting(number: int) -> None:
        for _ in range(TURNS):
            await async_app.ainvoke(asks(f"I am {number}"), config(number))
            assert not current_turn()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(THREADS) as pool:
            beside = [loop.run_in_executor(pool, sitting, number) for number in range(TASKS, TASKS + THREADS)]
            await asyncio.gather(*map(asitting, range(TASKS)), *beside)

    asyncio.run(main())

    spans = captured_spans(capture.spans())
    assert_all_tagged(spans)
    assert handler.open_runs == 0
    assert not trace.get_current_span().get_span_context().is_valid
    user_of = {tracker.hash_user(f"user {number}"): number for number in range(TASKS + THREADS)}
    sessions = tracker.ledger.sessions(limit=10_000)
    assert sorted(user_of[str(session.user_id)] for session in sessions) == list(range(TASKS + THREADS))
    session_of = {}
    for session in sessions:
        number = user_of[str(session.user_id)]
        session_of[number] = session.id
        assert (session.total_turns, session.failed_turns) == (TURNS, 0)
        assert (session.llm_calls, session.tool_calls) == (TURNS * CALLS, TURNS)
        assert session.input_tokens == TURNS * CALLS * (1_000 + number)
        assert session.output_tokens == TURNS * CALLS * number
        turns = [turn for turn, _ in tracker.ledger.turns(session.id)]
        assert [(turn.conversation_id, turn.number) for turn in turns] == [(f"c-{number}", n + 1) for n in range(TURNS)]
        assert {(turn.status, turn.input_tokens) for turn in turns} == {("completed", CALLS * (1_000 + number))}
        assert not any(tracker.live_turn(turn.id) for turn in turns)
    names: Counter[str] = Counter()
    for span in spans:
        number = user_of[str(span.attributes[a.USER_ID])]
        assert span.attributes[a.SESSION_ID] == session_of[number]
        assert span.attributes.get(a.CONVERSATION_ID, f"c-{number}") == f"c-{number}"
        assert span.attributes.get(a.GEN_AI_OUTPUT_TOKENS, number) == number
        names[span.name] += 1
    once = ("session.start", a.SPAN_TURN, "LangGraph", "prepare", "price_of")
    all_turns = (TASKS + THREADS) * TURNS
    assert [names[name] for name in once] == [TASKS + THREADS, *[all_turns] * 4]
    assert names["agent"] == names["gpt-4o-mini"] == CALLS * all_turns


# --- memory -----------------------------------------------------------------------------------------------------------
OURS = (Turn, OpenStep, Run, Scope)
"""What lives as long as a turn."""


def alive() -> dict[str, int]:
    """Return how many objects of ours there are that should be gone when their turn is."""
    gc.collect()
    return dict(Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, OURS)))


async def blocks(tracker: SessionTracker) -> int:
    """Return how many pieces of memory Python holds once all that has ended is written."""
    await tracker.aflush()
    gc.collect()
    return sys.getallocatedblocks()


def chat() -> Builder:
    return App(is_async=True, model=FakeModel()).tools()


Ask = Callable[[int], Awaitable[None]]


def runs_of_users(tracker: SessionTracker, *, users: int | None) -> Ask:
    """Return what lets a user ask by a plain run: one of so many, who come again, or always a new one."""
    graph: Any = track_graph(chat()).compile().with_config(callbacks=[SessionCallbackHandler(tracker)])

    async def ask(number: int) -> None:
        who = number if users is None else number % users
        await graph.ainvoke(asks(), config_of(f"c-{who}", user_id=f"user {who}"))

    return ask


def streams_that_are_left(tracker: SessionTracker) -> Ask:
    """Return what lets a user leave the stream of an answer."""
    graph: Any = chat().compile().with_config(callbacks=[SessionCallbackHandler(tracker)])

    async def ask(number: int) -> None:
        parts: AsyncIterator[Any] = graph.astream(
            asks(), config_of(f"c-{number % 50}", user_id=f"user {number % 50}"), stream_mode="messages"
        )
        await anext(parts)
        await parts.aclose()  # type: ignore[attr-defined]

    return ask


def sessions_by_hand(tracker: SessionTracker) -> Ask:
    """Return what gives each turn a session of its own, which ends."""
    graph: Any = chat().compile()

    async def ask(number: int) -> None:
        async with (
            tracker.session(user_id=f"user {number % 50}") as session,
            session.conversation().turn("Hi") as turn,
        ):
            await graph.ainvoke(turn.input)

    return ask


KINDS: dict[str, Callable[[SessionTracker], Ask]] = {
    "the same users": lambda tracker: runs_of_users(tracker, users=50),
    "new users": lambda tracker: runs_of_users(tracker, users=None),
    "streams that are left": streams_that_are_left,
    "sessions by hand": sessions_by_hand,
}


@pytest.fixture
def _remembers_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what a process remembers of sessions and users, thousands of them, full by the time that is measured."""
    for name in ("_REMEMBERED", "_USED_REMEMBERED"):
        monkeypatch.setattr(sittings_module, name, 100)
    monkeypatch.setattr(checks, "_HASHES_REMEMBERED", 100)
    monkeypatch.setattr(turns_module, "_NUMBERS", 100)
    monkeypatch.setattr(tree, "_MOST_LATE", 0)  # a few runs that may go on are kept, with their turns
    monkeypatch.setattr(written, "_known_attribute", lru_cache(100)(written._new_attribute))


@pytest.mark.usefixtures("_remembers_little")
@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_flat_over_thousands_of_turns(kind: str, tmp_path: Path) -> None:
    with SessionTracker(f"sqlite:///{tmp_path / 'ledger.db'}") as tracker:
        tracker.windows = Windows(most=1_000)
        ask = KINDS[kind](tracker)

        async def main() -> tuple[int, int]:
            for number in range(WARM_UP):
                await ask(number)
            before = await blocks(tracker)
            for number in range(WARM_UP, WARM_UP + MEASURED):
                await ask(number)
            return before, await blocks(tracker)

        objects = alive()
        before, after = asyncio.run(main())
        assert alive() == objects, "turns that are over are kept"
        assert after - before < MOST_BLOCKS_A_TURN * MEASURED
        assert sum(session.total_turns for session in tracker.ledger.sessions(limit=10_000)) == WARM_UP + MEASURED


# --- time -------------------------------------------------------------------------------------------------------------
def calls_in_the_apps_thread(run: Callable[[], Any]) -> int:
    """Return how many calls of functions turntrace's code makes in this thread while a function runs."""
    folder, found = str(Path(turntrace.__file__).parent), 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal found
        if event in ("call", "c_call"):
            found += frame.f_code.co_filename.startswith(folder)

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def test_a_turn_makes_the_app_do_as_much_at_turn_1000_as_at_turn_2(tmp_path: Path) -> None:
    with SessionTracker(f"sqlite:///{tmp_path / 'ledger.db'}") as tracker:
        builder: Any = track_graph(App(model=FakeModel()).tools())
        graph = builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=[SessionCallbackHandler(tracker)])

        names = iter("abc")

        def turn_after(number: int) -> int:
            """Return the calls of the turn after so many, in a conversation that this process has not seen before."""
            config = config_of(next(names))
            said = [each for _ in range(number) for each in (HumanMessage("A question"), AIMessage("An answer"))]
            graph.update_state(config, {"messages": said}, as_node=START)
            return calls_in_the_apps_thread(lambda: graph.invoke(asks(), config))

        turn_after(1)  # which imports and compiles
        assert 100 < turn_after(999) <= turn_after(1) * 1.02


# --- the whole of it, by hand -----------------------------------------------------------------------------------------
def rss_mb() -> float:
    """Return the memory of this process, where the system tells it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def measure(kind: str, turns: int, every: int) -> None:
    """Print what a process holds while it runs so many turns."""
    with tempfile.TemporaryDirectory() as folder, SessionTracker(f"sqlite:///{folder}/ledger.db") as tracker:
        ask, started = KINDS[kind](tracker), time.perf_counter()
        print(f"{kind}\n   turns       RSS     blocks  objects of turns", flush=True)
        for number in range(turns + 1):
            if number % every == 0:
                held = await blocks(tracker)
                print(f"  {number:6,}  {rss_mb():6.1f}M  {held:9,}  {sum(alive().values()):16}", flush=True)
            await ask(number)
        print(f"  {turns / (time.perf_counter() - started):.0f} turns a second", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or KINDS:
        asyncio.run(measure(name, 20_000, 1_000))
