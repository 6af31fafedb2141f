"""Whatever an app, its users or its models put into a run: the answer is as without turntrace, and the turn is kept."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import StructuredTool

from apps import App, Builder, FakeModel, asks, single
from odd import NoEquals, NoText, steady, texts, values
from turntrace import ContextTracker, SessionCallbackHandler, SessionTracker, boundary, track_graph
from turntrace import attributes as a
from turntrace.errors import TurntraceError
from turntrace.records import Step, TurnSummary
from turntrace.testing import Capture, CapturedSpan, assert_all_tagged, outbox_spans

pytestmark = pytest.mark.usefixtures("lenient")

LEFT_OUT = "in a config (the turn goes without it)"


class Tracked:
    """A graph with turntrace, and what came of its runs.

    Attributes:
        tracker: Its tracker.
    """

    def __init__(self, tracker: SessionTracker, builder: Builder) -> None:
        boundary.failures.clear()
        self.tracker = tracker
        self._graph: Any = track_graph(builder).compile().with_config(callbacks=[SessionCallbackHandler(tracker)])

    def run(self, config: Any = None) -> Any:
        return answer_of(self._graph, config)

    def turn(self) -> tuple[TurnSummary, list[Step]]:
        """Return the only turn on record, with its steps, after looking that its spans are there too."""
        assert self.tracker.flush()
        ledger = self.tracker.ledger
        (found,) = [turn for session in ledger.sessions() for turn in ledger.turns(session.id)]
        assert found[0].status in ("completed", "failed")
        spans = self.spans()
        assert [span.name for span in spans].count(a.SPAN_TURN) == 1
        assert {step.span_id for step in found[1]} < {span.span_id for span in spans}
        assert_all_tagged(spans)
        return found

    def spans(self) -> list[CapturedSpan]:
        return outbox_spans(self.tracker.ledger)


@contextmanager
def tracked(builder: Builder, **settings: Any) -> Iterator[Tracked]:
    with Capture() as capture:
        yield Tracked(capture.tracker(outbox=True, **settings), builder)


def answer_of(graph: Any, config: Any = None) -> Any:
    """Return what a graph answers, or the error that it raises."""
    try:
        answer = graph.invoke(asks(), config)["messages"][-1]
    except Exception as error:
        return type(error)
    return type(answer), type(answer.content)


# --- what stands in a config ------------------------------------------------------------------------------------------
IDS = ("session_id", "user_id", "conversation_id", "langfuse_session_id", "langfuse_user_id")
WORDS = ("channel", "topic", "tier", "org_id", "locale", "client_version", "langfuse_tags")
OTHERS = ("turntrace_turn_id", "traceparent", "baggage", "checkpoint_id", "ls_model_name", "ls_provider")
LANGGRAPHS = ("langfuse_prompt", "langgraph_path", "langgraph_step", "langgraph_node", "langgraph_checkpoint_ns")
said = st.dictionaries(st.sampled_from(IDS + WORDS + OTHERS + LANGGRAPHS) | texts, values, min_size=1, max_size=4)


@steady(100)
@given(st.sampled_from(["metadata", "configurable"]), said, st.booleans())
@example("metadata", {"user_id": 1.5, "session_id": ["s"], "conversation_id": NoText(), "topic": NoText()}, False)
@example("configurable", {"user_id": NoEquals(), "tier": NoText(), "langgraph_auth_user_id": NoEquals()}, True)
@example("metadata", {"turntrace_turn_id": NoText(), "langfuse_tags": [NoText(), "\ud800", 5]}, True)
def test_whatever_a_config_says_the_answer_is_the_same_and_the_turn_is_recorded(
    where: str, config: dict[str, Any], propagate: bool
) -> None:
    bare = answer_of(App().tools().compile(), {where: config})
    with tracked(App().tools(), propagate=propagate) as app:
        assert app.run({where: config}) == bare
        turn, steps = app.turn()

    assert (turn.status, turn.llm_calls, turn.tool_calls) == ("completed", 2, 1)
    assert len(steps) > 3
    assert [kind for kind in boundary.failures if LEFT_OUT not in kind] == []


@pytest.mark.parametrize("word", ["conversation_id", "session_id", "user_id"])
def test_an_id_that_is_none_goes_back_to_what_else_says_it(word: str, caplog: pytest.LogCaptureFixture) -> None:
    others = {"conversation_id": "thread_id", "session_id": "langfuse_session_id", "user_id": "langfuse_user_id"}
    with tracked(App().tools()) as app:
        app.run({"metadata": {word: {"an": "object"}, others[word]: "c-1"}})
        turn, _ = app.turn()
        users = {"user_id": app.tracker.hash_user("c-1")}

    assert getattr(turn, word) == users.get(word, "c-1")
    (told,) = [record.getMessage() for record in caplog.records if record.name == "turntrace"]
    assert f"{word} is a dict. Allowed is a string, an int or a UUID." in told


names = st.none() | st.integers() | st.text(max_size=3) | texts


@steady(40)
@given(names, st.lists(st.none() | st.integers() | texts, max_size=3))
@example("\ud800", [7, None, "graph:step:" + "9" * 5000])
@example(5, ["graph:step:\u00b2"])
def test_whatever_runs_are_called_and_tagged_the_turn_is_recorded(name: Any, tags: list[Any]) -> None:
    def work(_state: Any) -> dict[str, Any]:
        RunnableLambda(lambda given: given).invoke(1, {"run_name": name, "tags": tags})
        tool.invoke({"item": "tea"})
        return {"messages": [AIMessage("Done.")]}

    tool = StructuredTool.from_function(lambda item: item, name="look_up", description="Looks something up.")
    tool.name = name if isinstance(name, str) else "look_up"
    config = {"run_name": name, "tags": tags}
    bare = answer_of(single(work).compile(), config)
    with tracked(single(work), content="full") as app:
        assert app.run(config) == bare
        turn, _ = app.turn()

    assert turn.tool_calls == 1
    assert not boundary.failures


@pytest.mark.parametrize("name", ["a\x00b", "x" * 10_000, "\x1b[31m", "'; DROP TABLE turntrace_turns; --"])
def test_a_node_of_any_name_is_a_step(name: str) -> None:
    with tracked(single(lambda _: {"messages": [AIMessage("Done.")]}, name)) as app:
        app.run()
        _, steps = app.turn()

    assert sorted(step.kind for step in steps) == ["agent", "chain"]
    assert all(len(step.name) <= 200 for step in steps)
    assert not boundary.failures


# --- what models and tools give back ----------------------------------------------------------------------------------
class OddModel(FakeModel):
    """A model whose integration fills its message in as it likes."""

    fields: Any = None

    def _generate(self, *_: Any, **__: Any) -> ChatResult:
        message = AIMessage("The price is 5 euros.")
        message.__dict__.update(self.fields)
        return ChatResult(generations=[ChatGeneration(message=message)], llm_output=self.llm_output)


def asking(model: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda state: {"messages": [model.invoke(state["messages"])]}


counts = st.dictionaries(
    st.sampled_from(["input_tokens", "output_tokens", "total_tokens", "input_token_details", "prompt_tokens"]),
    values | st.dictionaries(st.sampled_from(["cache_read", "cache_creation", "reasoning"]), values, max_size=2),
    max_size=3,
)
calls = st.lists(values | st.fixed_dictionaries({"name": values, "args": values, "id": values}), max_size=2)
fields = st.fixed_dictionaries(
    {},
    optional={
        "usage_metadata": counts | values,
        "response_metadata": st.dictionaries(st.sampled_from(["model_name", "token_usage"]), values, max_size=2),
        "additional_kwargs": st.dictionaries(st.sampled_from(["refusal", "tool_calls"]), values, max_size=2) | values,
        "tool_calls": calls | values,
        "content": st.lists(st.fixed_dictionaries({"type": values, "text": values}), max_size=2) | values,
        "name": texts,
    },
)


@steady(80)
@given(fields, st.none() | st.dictionaries(st.sampled_from(["token_usage", "model_name"]), counts | values, max_size=2))
@example({"usage_metadata": {"input_tokens": 10**30, "output_tokens": 2**63}}, None)
@example({"usage_metadata": "none", "response_metadata": {"model_name": "\ud800"}}, None)
@example({"usage_metadata": {"input_tokens": 1, "input_token_details": ["cache"]}}, None)
@example({"additional_kwargs": "none", "tool_calls": [{"name": "no args"}, None]}, {"token_usage": [1]})
@example(
    {"content": [{"type": ["list"], "text": NoText()}]}, {"model_name": "\x00", "token_usage": {"prompt_tokens": 5}}
)
def test_whatever_a_model_answers_its_call_and_the_turn_are_recorded(said: Any, output: Any) -> None:
    model = OddModel(fields=said, llm_output=output)
    bare = answer_of(single(asking(model)).compile())
    for level in ("metadata", "full"):
        with tracked(single(asking(model)), content=level) as app:
            assert app.run() == bare
            turn, steps = app.turn()
            calls = [span for span in app.spans() if span.attributes[a.LANGFUSE_OBSERVATION_TYPE] == "generation"]

        assert turn.llm_calls == len(calls) == 1
        assert sorted(step.kind for step in steps) == ["agent", "chain", "generation"]
        assert not boundary.failures


def test_a_count_that_is_none_costs_only_that_count() -> None:
    model = OddModel(fields={"usage_metadata": {"input_tokens": 10**30, "output_tokens": 7, "total_tokens": 7}})
    with tracked(single(asking(model))) as app:
        app.run()
        turn, _ = app.turn()

    assert (turn.input_tokens, turn.output_tokens) == (0, 7)


def using(odd: Any) -> Callable[[Any], dict[str, Any]]:
    tool: Any = StructuredTool.from_function(lambda item: odd, name="look_up", description="Looks something up.")
    tool.args_schema = {"type": "object", "properties": {"item": {}}}

    def work(_state: Any) -> dict[str, Any]:
        tool.invoke({"item": odd})
        return {"messages": [AIMessage("Done.")]}

    return work


@steady(40)
@given(values)
@example({"a": NoText(), 1: 2})
def test_whatever_a_tool_is_given_and_gives_back_its_call_is_recorded(odd: Any) -> None:
    assert_called_the_tool(odd)


def test_a_tool_may_give_back_what_holds_itself() -> None:
    ring: list[Any] = []
    ring.append(ring)
    assert_called_the_tool(ring)


def assert_called_the_tool(odd: Any) -> None:
    bare = answer_of(single(using(odd)).compile())
    with tracked(single(using(odd)), content="full") as app:
        assert app.run() == bare
        turn, _ = app.turn()

    assert turn.tool_calls == 1
    assert not boundary.failures


# --- what is fitted into a window -------------------------------------------------------------------------------------
def odd_message(kind: Any, told: dict[str, Any]) -> Any:
    """Return a message as odd as LangChain takes it."""
    known = {"tool_call_id": "1"} if kind is ToolMessage else {}
    try:
        return kind(**{"content": "Hi", **known, **told})
    except Exception:
        return kind("Hi", **known)


odd_messages = st.lists(
    st.builds(odd_message, st.sampled_from([HumanMessage, AIMessage, SystemMessage, ToolMessage]), fields)
    | st.builds(lambda text: ("user", text), texts)
    | st.builds(lambda content: {"role": "user", "content": content}, values)
    | values,
    min_size=1,
    max_size=4,
)


@steady(80)
@given(odd_messages)
@example([odd_message(AIMessage, {"tool_calls": [{"name": "", "args": {"a": 10**400}, "id": None}]})])
@example([odd_message(HumanMessage, {"content": [{"type": ["list"], "text": 5}, {"type": "image_url"}, "\ud800"]})])
def test_any_messages_are_fitted_or_refused_with_why_and_async_is_the_same(messages: Any) -> None:
    def outcome(fit: Callable[[], Any]) -> Any:
        try:
            window = fit()
        except TurntraceError as error:
            return type(error), len(str(error)) < 2000
        return window.tokens, len(window.messages) <= len(messages)

    context = ContextTracker("gpt-4o", limit=1000)
    found = outcome(lambda: context.fit(messages))
    assert found[1]
    assert outcome(lambda: asyncio.run(context.afit(messages))) == found
