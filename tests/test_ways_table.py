"""The table of the README: ways to run a graph, by what is tracked. Each cell is measured here.

``python tests/test_ways_table.py`` writes it into the README again.
"""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from langchain.agents import create_agent
from langchain_core.tools import tool
from langgraph import prebuilt
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.types import Command, interrupt
from langgraph_supervisor import create_supervisor
from langgraph_swarm import create_handoff_tool, create_swarm
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from apps import App, FakeModel, asks, single
from test_agents import calls
from test_middleware import ToolModel
from turntrace import SessionCallbackHandler, SessionTracker, current_turn, track_graph
from turntrace import attributes as a
from turntrace.middleware import SessionMiddleware
from turntrace.testing import CapturedSpan, assert_all_tagged, outbox_spans

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- ways: made by tests/test_ways_table.py -->", "<!-- /ways -->"
USER = "zoe-42@example.com"
TURNS = 2
pytestmark = pytest.mark.filterwarnings("ignore:.*create_react_agent has been moved")


class Desk:
    """One tracker, its handler, and what is to be seen of it afterwards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tracker = SessionTracker(f"sqlite:///{path}", tracer_provider=TracerProvider(), outbox=True)
        self.handler = SessionCallbackHandler(self.tracker)
        self.saver = InMemorySaver()

    @property
    def config(self) -> Any:
        metadata = {"user_id": USER, "channel": "web"}
        return {"configurable": {"thread_id": "c1"}, "metadata": metadata, "callbacks": [self.handler]}

    def restart(self) -> None:
        """Go on as another process does: with nothing but the ledger and the checkpoints."""
        self.tracker.shutdown()
        self.__init__(self.path)  # type: ignore[misc]

    def compile(self, builder: Any, *, tracked: bool = True, **options: Any) -> Any:
        return (track_graph(builder) if tracked else builder).compile(checkpointer=self.saver, **options)


class Way(NamedTuple):
    """A way to run a graph: what it is called, what runs it twice, and how many calls of a model a turn has."""

    name: str
    run: Callable[[Desk], object]
    llm_calls: int = 2
    turns: int = TURNS


def twice(call: Callable[[Any, Any, Any], object], *, is_async: bool = False, tracked: bool = True) -> Any:
    def run(desk: Desk) -> None:
        graph = desk.compile(App(is_async=is_async).tools(), tracked=tracked)
        for _ in range(TURNS):
            call(graph, asks(), desk.config)

    return run


def awaited(call: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], None]:
    return lambda graph, given, config: asyncio.run(call(graph, given, config))


def streamed(mode: Any, **options: Any) -> Callable[[Any, Any, Any], object]:
    return lambda graph, given, config: [*graph.stream(given, config, stream_mode=mode, **options)]


def astreamed(mode: Any, **options: Any) -> Callable[[Any, Any, Any], None]:
    async def call(graph: Any, given: Any, config: Any) -> None:
        async for _ in graph.astream(given, config, stream_mode=mode, **options):
            pass

    return awaited(call)


async def events(graph: Any, given: Any, config: Any) -> None:
    async for _ in graph.astream_events(given, config, version="v2"):
        pass


def batches(call: Callable[[Any, list[Any], list[Any]], object]) -> Callable[[Desk], None]:
    def run(desk: Desk) -> None:
        graph = desk.compile(App().tools())
        for _ in range(TURNS):
            call(graph, [asks()], [desk.config])

    return run


def of(builder: Callable[[App], Any], *, is_async: bool = False) -> Callable[[Desk], None]:
    def run(desk: Desk) -> None:
        graph = desk.compile(builder(App(is_async=is_async)))
        for _ in range(TURNS):
            if is_async:
                asyncio.run(graph.ainvoke(asks(), desk.config))
            else:
                graph.invoke(asks(), desk.config)

    return run


def in_blocks(desk: Desk) -> None:
    graph = App().tools().compile(checkpointer=desk.saver)  # neither callback nor track_graph
    with desk.tracker.session(user_id=USER) as session:
        for _ in range(TURNS):
            with session.conversation("c1").turn("What does tea cost?") as turn:
                graph.invoke(turn.input, {"configurable": {"thread_id": "c1"}})


def in_threads(desk: Desk) -> None:
    graph = App().tools().compile(checkpointer=desk.saver)
    with desk.tracker.session(user_id=USER) as session:
        for _ in range(TURNS):
            with session.conversation("c1").turn("What does tea cost?") as turn:
                thread = threading.Thread(target=graph.invoke, args=(turn.input, turn.config))
                thread.start()
                thread.join()


def handed_over(desk: Desk) -> None:
    for _ in range(TURNS):
        session = desk.tracker.start_session(user_id=USER, session_id="s1")
        carrier = session.conversation("c1").start_turn("What does tea cost?").carrier()
        saver = desk.saver
        desk.restart()
        desk.saver = saver
        with desk.tracker.resume_turn(carrier) as turn:
            desk.compile(App().tools()).invoke(asks(), turn.config)


def asks_a_person(_state: Any) -> dict[str, Any]:
    FakeModel().invoke("think")
    return {"messages": [("ai", f"You said {interrupt('Really?')}.")]}


def interrupted(*, elsewhere: bool) -> Callable[[Desk], None]:
    def run(desk: Desk) -> None:
        for _ in range(TURNS):
            desk.compile(single(asks_a_person)).invoke(asks(), desk.config)
            if elsewhere:
                saver = desk.saver
                desk.restart()
                desk.saver = saver
            desk.compile(single(asks_a_person)).invoke(Command(resume="yes"), desk.config)

    return run


def functional(desk: Desk) -> None:
    @task
    def price(item: str) -> str:
        return str(FakeModel().invoke(item).content)

    @entrypoint(checkpointer=desk.saver)
    def sell(given: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [("ai", price("tea").result() + price("cake").result())]}

    for _ in range(TURNS):
        sell.invoke(asks(), desk.config)


@tool
def price_of() -> str:
    """Look up the price."""
    return "5 euros"


def agents(make: Callable[[], Any], *, is_async: bool = False) -> Callable[[Desk], None]:
    def run(desk: Desk) -> None:
        agent = make()
        for number in range(TURNS):
            config = {**desk.config, "configurable": {"thread_id": "c1", "number": number}}
            if is_async:
                asyncio.run(agent.ainvoke(asks(), config))
            else:
                agent.invoke(asks(), config)

    return run


def swarm() -> Any:
    react: Any = prebuilt.create_react_agent
    to_bob = create_handoff_tool(agent_name="bob")
    alice = react(ToolModel(says=calls("transfer_to_bob")), [to_bob], name="alice")
    bob = react(ToolModel(says=lambda _messages: "I am Bob."), [price_of], name="bob")
    return create_swarm([alice, bob], default_active_agent="alice").compile()


def team() -> Any:
    react: Any = prebuilt.create_react_agent
    pricer = react(ToolModel(says=lambda _messages: "5 euros"), [price_of], name="pricer")
    built: Any = create_supervisor([pricer], model=ToolModel(says=calls("transfer_to_pricer")))
    return built.compile()


def seller(*middleware: Any) -> Any:
    return create_agent(ToolModel(says=calls("price_of")), [price_of], middleware=middleware)


def reacts() -> Any:
    react: Any = prebuilt.create_react_agent
    return react(ToolModel(says=calls("price_of")), [price_of])


MANY: list[Any] = ["values", "updates", "messages", "custom"]
WAYS: Sequence[Way] = (
    Way("`invoke`, with the callback alone", twice(lambda graph, *call: graph.invoke(*call), tracked=False)),
    Way("`invoke`, with `track_graph`", twice(lambda graph, *call: graph.invoke(*call))),
    Way("`invoke` inside a turn's block, without callback and config", in_blocks),
    Way("`invoke` in another thread, with `turn.config`", in_threads),
    Way("`stream`, each mode", twice(lambda *call: [streamed(mode)(*call) for mode in MANY]), turns=2 * len(MANY)),
    Way("`stream`, several modes at once, with subgraphs", twice(streamed(MANY, subgraphs=True))),
    Way("`batch`", batches(lambda graph, *calls: graph.batch(*calls))),
    Way("`ainvoke`, async nodes", twice(awaited(lambda graph, *call: graph.ainvoke(*call)), is_async=True)),
    Way("`ainvoke`, sync nodes", twice(awaited(lambda graph, *call: graph.ainvoke(*call)))),
    Way("`astream`, each mode", twice(lambda *call: [astreamed(m)(*call) for m in MANY], is_async=True), turns=8),
    Way("`astream_events` v2", twice(awaited(events), is_async=True)),
    Way("`abatch`", batches(lambda graph, *calls: asyncio.run(graph.abatch(*calls)))),
    Way("`Send` fan-out", of(App.fan_out), llm_calls=1),
    Way("subgraph as a node", of(App.subgraph), llm_calls=1),
    Way("graph run inside a node, without the config", of(App.nested), llm_calls=1),
    Way("the same, async", of(App.nested, is_async=True), llm_calls=1),
    Way("functional API: `@entrypoint`, `@task`", functional),
    Way("interrupt, answered in the same process", interrupted(elsewhere=False)),
    Way("interrupt, answered by another process", interrupted(elsewhere=True)),
    Way("turn begun here, finished by a worker (`turn.carrier()`)", handed_over),
    Way("langchain's `create_agent`, with `SessionMiddleware`", agents(lambda: seller(SessionMiddleware()))),
    Way("langchain's `create_agent`, async", agents(seller, is_async=True)),
    Way("`create_react_agent`", agents(reacts)),
    Way("langgraph-swarm", agents(swarm)),
    Way("langgraph-supervisor", agents(team), llm_calls=3),
)
COLUMNS = ("all spans tagged", "one trace a turn", "numbers", "tokens", "nothing left behind")


def measured(way: Way, folder: Path) -> list[str]:
    """Run a way, and return its cells: yes, or what is wrong."""
    desk = Desk(folder / "ledger.db")
    way.run(desk)
    desk.tracker.flush()
    sessions = desk.tracker.ledger.sessions()
    turns = sorted(
        (turn for each in sessions for turn, _ in desk.tracker.ledger.turns(each.id)), key=lambda t: t.number
    )
    latest = {span.span_id: span for span in outbox_spans(desk.tracker.ledger)}
    spans = [span for span in latest.values() if a.TURN_ID in span.attributes]
    cells = [
        _tagged(spans),
        _traces(spans, turns),
        _numbers(turns, way),
        _tokens(turns, way),
        _left(desk, turns, folder),
    ]
    desk.tracker.shutdown()
    return cells


def _tagged(spans: list[CapturedSpan]) -> str:
    try:
        assert_all_tagged(spans)
    except AssertionError as error:
        return f"no: {error}"
    return "yes" if spans else "no spans"


def _traces(spans: list[CapturedSpan], turns: list[Any]) -> str:
    known = {span.span_id for span in spans}
    tops = sorted(span.trace_id for span in spans if span.parent_id not in known)
    by_turn = {(span.attributes[a.TURN_ID], span.trace_id) for span in spans}
    right = tops == sorted(str(turn.trace_id) for turn in turns) and len(by_turn) == len(turns)
    return "yes" if right else f"no: {len(tops)} tops of {len(turns)} turns"


def _numbers(turns: list[Any], way: Way) -> str:
    numbers = [turn.number for turn in turns]
    done = all(turn.status == "completed" for turn in turns)
    return "yes" if done and numbers == list(range(1, way.turns + 1)) else f"no: {numbers}"


def _tokens(turns: list[Any], way: Way) -> str:
    used = [(turn.llm_calls, turn.input_tokens, turn.output_tokens) for turn in turns]
    wanted = (way.llm_calls, 100 * way.llm_calls, 20 * way.llm_calls)
    return "yes" if used == way.turns * [wanted] else f"no: {used}"


def _left(desk: Desk, turns: list[Any], folder: Path) -> str:
    here = trace.get_current_span().get_span_context().is_valid or bool(current_turn())
    runs = any(desk.tracker.live_turn(turn.id) for turn in turns)
    raw = any(USER.encode() in path.read_bytes() for path in folder.glob("*"))
    wrong = [word for word, it_is in (("current", here), ("a turn", runs), ("the user's id", raw)) if it_is]
    if desk.handler.open_runs:
        wrong.append("a run")
    return "yes" if not wrong else f"no: {', '.join(wrong)}"


def written() -> str:
    """Return the table as it stands in the README."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table of Markdown."""
    lines = [("way to run", *COLUMNS), ("---",) + len(COLUMNS) * ("---",), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_way_to_run_is_tracked_whole(way: Way, tmp_path: Path) -> None:
    assert dict(zip(COLUMNS, measured(way, tmp_path), strict=True)) == dict.fromkeys(COLUMNS, "yes")


def test_the_table_of_the_readme_is_the_one_that_is_measured() -> None:
    assert written() == as_table([(way.name, *len(COLUMNS) * ["yes"]) for way in WAYS])


def _rows() -> Iterator[tuple[str, ...]]:
    for way in WAYS:
        with TemporaryDirectory() as folder:
            yield (way.name, *measured(way, Path(folder)))


def main() -> None:
    """Measure all ways and write the table."""
    table = as_table(list(_rows()))
    text = README.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    README.write_text(f"{before}\n{table}\n{after}", encoding="utf-8")
    print(table, file=sys.stdout)


if __name__ == "__main__":
    main()
