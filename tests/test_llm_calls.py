"""What is recorded of a turn: calls of models, tools and retrievers, tokens, cost, times, and no content by default."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import genai_prices
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.language_models import FakeListLLM
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode

from apps import App, Builder, FakeModel, State, asks, config_of, single
from turntrace import ContentPolicy, SessionCallbackHandler, SessionTracker, track_graph
from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.records import TurnSummary
from turntrace.testing import Capture, CapturedSpan, Clock, assert_all_tagged, captured_spans

RICH: UsageMetadata = {
    "input_tokens": 1000,
    "output_tokens": 200,
    "total_tokens": 1200,
    "input_token_details": {"cache_read": 600, "cache_creation": 100},
    "output_token_details": {"reasoning": 150},
}


class Turns:
    """Runs one turn, and has what is known of it."""

    def __init__(self, capture: Capture, **settings: Any) -> None:
        self.capture = capture
        self.tracker: SessionTracker = capture.tracker(**settings)
        self.handler = SessionCallbackHandler(self.tracker)

    def run(self, builder: Builder, asked: Any = None, *, stream: bool = False) -> None:
        graph: Any = builder.compile(checkpointer=InMemorySaver())
        config = {**config_of(user_id="ann"), "callbacks": [self.handler]}
        if stream:
            list(graph.stream(asked or asks(), config, stream_mode="messages"))
        else:
            graph.invoke(asked or asks(), config)
        assert_all_tagged(self.capture.spans())

    def run_model(self, model: Any, *, stream: bool = False) -> dict[str, AttributeValue]:
        """Run a turn of one call of a model, and return what is on the call's span."""
        self.run(single(lambda state: {"messages": [model.invoke(state["messages"])]}), stream=stream)
        (call,) = self.of_type("generation")
        return dict(call.attributes)

    def of_type(self, kind: str) -> list[CapturedSpan]:
        spans = captured_spans(self.capture.spans())
        return [span for span in spans if span.attributes.get(a.LANGFUSE_OBSERVATION_TYPE) == kind]

    @property
    def root(self) -> dict[str, AttributeValue]:
        (root,) = [span for span in captured_spans(self.capture.spans()) if span.name == a.SPAN_TURN]
        return dict(root.attributes)

    @property
    def row(self) -> TurnSummary:
        ((row, _),) = self.tracker.ledger.turns(str(self.root[a.SESSION_ID]))
        return row


@pytest.fixture
def turns(capture: Capture) -> Turns:
    return Turns(capture)


# --- tokens -----------------------------------------------------------------------------------------------------------
def test_usage_by_kind(turns: Turns) -> None:
    has = turns.run_model(FakeModel(usage=RICH))
    assert {name: has.get(name) for name in has if name.startswith("gen_ai.usage")} == {
        a.GEN_AI_INPUT_TOKENS: 1000,
        a.GEN_AI_OUTPUT_TOKENS: 200,
        a.GEN_AI_CACHE_READ_TOKENS: 600,
        a.GEN_AI_CACHE_CREATION_TOKENS: 100,
        a.GEN_AI_REASONING_TOKENS: 150,
    }
    assert (turns.row.input_tokens, turns.row.output_tokens, turns.row.llm_calls) == (1000, 200, 1)


def test_tokens_stand_on_generations_only(turns: Turns) -> None:
    """Langfuse adds them up over all observations."""
    turns.run(App().tools())
    counted = [span for span in captured_spans(turns.capture.spans()) if a.GEN_AI_INPUT_TOKENS in span.attributes]
    assert {span.attributes[a.LANGFUSE_OBSERVATION_TYPE] for span in counted} == {"generation"}
    assert len(counted) == 2
    assert (turns.root[a.TURN_INPUT_TOKENS], turns.root[a.TURN_OUTPUT_TOKENS]) == (200, 40)
    assert (turns.row.input_tokens, turns.row.output_tokens) == (200, 40)


@pytest.mark.parametrize(
    "output",
    [
        {"token_usage": {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 37}},
        {"usage": {"input_tokens": 30, "output_tokens": 7}},
    ],
    ids=["openai", "anthropic"],
)
def test_the_models_output_tells_where_its_message_does_not(turns: Turns, output: dict[str, Any]) -> None:
    has = turns.run_model(FakeModel(usage=None, llm_output=output))
    assert (has[a.GEN_AI_INPUT_TOKENS], has[a.GEN_AI_OUTPUT_TOKENS]) == (30, 7)


def test_the_message_goes_before_the_models_output(turns: Turns) -> None:
    has = turns.run_model(FakeModel(usage=RICH, llm_output={"token_usage": {"prompt_tokens": 1}}))
    assert has[a.GEN_AI_INPUT_TOKENS] == 1000


def test_without_any_usage_there_are_no_tokens_and_no_cost(turns: Turns) -> None:
    has = turns.run_model(FakeModel(usage=None))
    assert a.GEN_AI_INPUT_TOKENS not in has
    assert a.LANGFUSE_COST_DETAILS not in has
    assert (turns.row.input_tokens, turns.row.cost_usd, turns.row.unpriced_calls) == (0, 0.0, 1)


@pytest.mark.parametrize(
    "output",
    [{"token_usage": None}, {"token_usage": "many"}, {"token_usage": {"prompt_tokens": "many"}}, {"usage": []}, {}],
    ids=str,
)
def test_nonsense_in_the_models_output_harms_nothing(turns: Turns, output: dict[str, Any]) -> None:
    turns.run_model(FakeModel(usage=None, llm_output=output))
    assert turns.row.status == "completed"


def test_usage_that_does_not_add_up_harms_nothing(turns: Turns) -> None:
    odd: UsageMetadata = {
        "input_tokens": 10,
        "output_tokens": 5,
        "total_tokens": 15,
        "input_token_details": {"cache_read": 100, "cache_creation": 100},
    }
    turns.run_model(FakeModel(usage=odd))
    assert (turns.row.status, turns.row.input_tokens) == ("completed", 10)


# --- the model and its cost -------------------------------------------------------------------------------------------
PRICED = [("gpt-4o-mini", "openai"), ("gpt-4o", "openai"), ("claude-sonnet-4-5", "anthropic"), ("gpt-4o", None)]


@pytest.mark.parametrize(("model", "provider"), PRICED)
@pytest.mark.parametrize(
    "usage", [RICH, {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}], ids=["rich", "few"]
)
def test_the_cost_is_that_of_genai_prices(turns: Turns, model: str, provider: str | None, usage: UsageMetadata) -> None:
    has = turns.run_model(FakeModel(model_name=model, provider=provider, usage=usage))

    details = usage.get("input_token_details", {})
    price = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=usage["input_tokens"],
            output_tokens=usage["output_tokens"],
            cache_read_tokens=details.get("cache_read", 0),
            cache_write_tokens=details.get("cache_creation", 0),
        ),
        model_ref=model,
        provider_id=provider,
    )
    expected = pytest.approx(float(price.total_price), rel=1e-9)
    assert json.loads(str(has[a.LANGFUSE_COST_DETAILS])) == {"total": expected}
    assert turns.row.cost_usd == expected
    assert turns.row.unpriced_calls == 0


@pytest.mark.parametrize(
    ("of_input", "of_output", "means"),
    [
        # langchain-anthropic 1 and langchain-aws 1: what was written to the cache is told by how long it is kept
        ({"cache_read": 600, "cache_creation": 0, "ephemeral_5m_input_tokens": 70}, {"reasoning": 150}, (600, 70, 150)),
        ({"ephemeral_5m_input_tokens": 70, "ephemeral_1h_input_tokens": 30}, {}, (0, 100, 0)),
        ({"cache_creation": 100, "ephemeral_5m_input_tokens": 70, "ephemeral_1h_input_tokens": 30}, {}, (0, 100, 0)),
        # langchain-openai 1 beside a service tier
        ({"flex_cache_read": 600, "flex": 400}, {"flex_reasoning": 150, "flex": 50}, (600, 0, 150)),
        ({"priority_cache_read": 600, "priority_cache_creation": 9}, {"priority_reasoning": 150}, (600, 9, 150)),
    ],
)
def test_kinds_of_tokens_are_found_however_an_integration_names_them(
    turns: Turns, of_input: Any, of_output: Any, means: tuple[int, int, int]
) -> None:
    usage: Any = {**RICH, "input_token_details": of_input, "output_token_details": of_output}
    has = turns.run_model(FakeModel(model_name="claude-sonnet-4-5", provider="anthropic", usage=usage))

    names = a.GEN_AI_CACHE_READ_TOKENS, a.GEN_AI_CACHE_CREATION_TOKENS, a.GEN_AI_REASONING_TOKENS
    assert tuple(has.get(name, 0) for name in names) == means
    price = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=1000, output_tokens=200, cache_read_tokens=means[0], cache_write_tokens=means[1]
        ),
        model_ref="claude-sonnet-4-5",
    )
    assert turns.row.cost_usd == pytest.approx(float(price.total_price), rel=1e-9)


def test_an_answer_from_langchains_cache_costs_nothing(turns: Turns) -> None:
    model = FakeModel(cache=InMemoryCache())
    model.invoke("the same")
    turns.run(single(lambda state: {"messages": [model.invoke("the same")]}))
    (call,) = turns.of_type("generation")
    assert json.loads(str(call.attributes[a.LANGFUSE_COST_DETAILS])) == {"total": 0.0}
    assert (turns.row.cost_usd, turns.row.unpriced_calls, turns.row.llm_calls) == (0.0, 0, 1)


@pytest.mark.parametrize("told", [-1, True, float("nan"), float("inf"), "free", None])
def test_a_cost_that_is_none_is_looked_up(turns: Turns, told: Any) -> None:
    usage: Any = {**RICH, "total_cost": told}
    turns.run_model(FakeModel(model_name="gpt-4o", usage=usage))
    assert 0 < turns.row.cost_usd < 1


def test_a_vendor_by_a_name_of_langchains_is_priced_all_the_same(turns: Turns) -> None:
    turns.run_model(FakeModel(model_name="gpt-4o", provider="azure_openai_of_mine"))
    assert turns.row.unpriced_calls == 0
    assert turns.row.cost_usd > 0


def test_a_model_without_a_price_is_counted_as_such(turns: Turns) -> None:
    has = turns.run_model(FakeModel(model_name="our-own-llm", provider="us"))
    assert a.LANGFUSE_COST_DETAILS not in has
    assert (turns.row.cost_usd, turns.row.unpriced_calls, turns.row.input_tokens) == (0.0, 1, 100)
    turns.tracker.end_session(str(turns.root[a.SESSION_ID]))
    summary = turns.tracker.session_summary(str(turns.root[a.SESSION_ID]))
    assert summary is not None
    assert summary.unpriced_calls == 1


def test_the_name_of_the_model(turns: Turns) -> None:
    answer = AIMessage("5 euros", response_metadata={"model_name": "gpt-4o-2024-08-06"})
    has = turns.run_model(FakeModel(model_name="gpt-4o", says=lambda _: answer))
    assert (has[a.GEN_AI_REQUEST_MODEL], has[a.GEN_AI_RESPONSE_MODEL]) == ("gpt-4o", "gpt-4o-2024-08-06")
    assert has[a.GEN_AI_PROVIDER_NAME] == "openai"
    assert has[a.GEN_AI_OPERATION_NAME] == "chat"
    assert turns.row.model == "gpt-4o-2024-08-06"


def test_a_model_that_completes_text(turns: Turns) -> None:
    model = FakeListLLM(responses=["5 euros"])
    turns.run(single(lambda state: {"messages": [AIMessage(model.invoke("What does tea cost?"))]}))
    assert len(turns.of_type("generation")) == 1
    assert (turns.row.llm_calls, turns.row.unpriced_calls) == (1, 1)


def test_a_batch_of_calls(turns: Turns) -> None:
    def work(state: State) -> None:
        FakeModel().batch(["one", "two", "three"])

    turns.run(single(work))
    assert (turns.row.llm_calls, turns.row.input_tokens) == (3, 300)
    assert len(turns.of_type("generation")) == 3


# --- time to the first token ------------------------------------------------------------------------------------------
def test_the_time_to_the_first_token_of_a_stream(capture: Capture) -> None:
    clock = Clock()
    turns = Turns(capture, clock=clock)

    def says(_messages: object) -> str:
        clock.advance(seconds=2)
        return "one two three"

    has = turns.run_model(FakeModel(says=says), stream=True)

    assert turns.root[a.TURN_TIME_TO_FIRST_TOKEN_MS] == 2000
    assert turns.row.time_to_first_token_ms == 2000
    assert str(has[a.LANGFUSE_COMPLETION_START_TIME]).startswith("2026-01-01T00:00:02")


def test_the_time_to_the_first_token_stands_on_the_generation_too(capture: Capture) -> None:
    """As `attributes.py` says of ``turn.time_to_first_token_ms``: from the start of the call."""
    clock = Clock()
    turns = Turns(capture, clock=clock)

    def says(_messages: object) -> str:
        clock.advance(seconds=2)
        return "one two three"

    has = turns.run_model(FakeModel(says=says), stream=True)

    assert "generation" in a.ATTRIBUTES[a.TURN_TIME_TO_FIRST_TOKEN_MS].on
    assert has[a.TURN_TIME_TO_FIRST_TOKEN_MS] == 2000


def test_without_a_stream_there_is_no_first_token(turns: Turns) -> None:
    has = turns.run_model(FakeModel())
    assert a.TURN_TIME_TO_FIRST_TOKEN_MS not in turns.root
    assert a.LANGFUSE_COMPLETION_START_TIME not in has
    assert turns.row.time_to_first_token_ms is None


def test_a_streamed_call_counts_its_tokens_once(turns: Turns) -> None:
    turns.run_model(FakeModel(usage=RICH), stream=True)
    assert (turns.row.input_tokens, turns.row.output_tokens) == (1000, 200)


# --- tools and retrievers ---------------------------------------------------------------------------------------------
def test_calls_of_tools(turns: Turns) -> None:
    turns.run(App().tools())
    (call,) = turns.of_type("tool")
    assert call.name == "price_of"
    assert call.attributes[a.GEN_AI_TOOL_NAME] == "price_of"
    assert call.attributes[a.GEN_AI_OPERATION_NAME] == "execute_tool"
    assert (turns.root[a.TURN_TOOL_CALLS], turns.row.tool_calls) == (1, 1)


def test_tools_called_side_by_side(turns: Turns) -> None:
    @tool
    def wait(seconds: float) -> str:
        """Wait."""
        time.sleep(seconds)
        return "done"

    calls = [{"name": "wait", "args": {"seconds": 0.005}, "id": str(n), "type": "tool_call"} for n in range(3)]
    asked = {"messages": [AIMessage("", tool_calls=calls)]}
    turns.run(single(ToolNode([wait]), "tools"), asked)

    spans = turns.of_type("tool")
    assert len(spans) == turns.row.tool_calls == 3
    assert len({span.parent_id for span in spans}) == 1


def test_calls_of_retrievers(turns: Turns) -> None:
    class Shelf(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            return [Document("tea")]

    def work(state: State) -> None:
        Shelf().invoke("tea")

    turns.run(single(work))
    (call,) = turns.of_type("retriever")
    assert call.name == "Shelf"
    assert turns.row.tool_calls == 0


def test_every_span_of_ours_says_what_it_is(turns: Turns) -> None:
    turns.run(App().subgraph())
    spans = captured_spans(turns.capture.spans())
    assert {(span.name, span.attributes.get(a.LANGFUSE_OBSERVATION_TYPE)) for span in spans} == {
        ("session.start", "event"),
        ("conversation.turn", "agent"),
        ("LangGraph", "agent"),
        ("first", "chain"),
        ("child", "chain"),  # the node,
        ("child", "agent"),  # and the run of the subgraph in it
        ("inner", "chain"),
        ("expert", "chain"),
        ("gpt-4o-mini", "generation"),
    }


def test_the_step_of_langgraph_stands_on_its_nodes(turns: Turns) -> None:
    turns.run(App().tools())
    steps = [span.attributes[a.TURN_STEP] for span in turns.of_type("chain")]
    assert steps == [1, 2, 3, 4]


# --- the turn's own words ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (asks("What does tea cost?"), ("user", 19, "question", False)),
        (asks("Order tea."), ("user", 10, "command", False)),
        ({"messages": [SystemMessage("Be brief."), HumanMessage("Tea for me")]}, ("user", 10, "statement", False)),
        ({"messages": "thanks"}, ("user", 6, "feedback", False)),
        ({"messages": {"role": "user", "content": "What?"}}, ("user", 5, "question", False)),
        (
            {
                "messages": [
                    HumanMessage(
                        [
                            {"type": "text", "text": "What is this?"},
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                        ]
                    )
                ]
            },
            ("user", 13, "question", True),
        ),
    ],
)
def test_the_input(turns: Turns, asked: Any, expected: tuple[str, int, str, bool]) -> None:
    turns.run(single(lambda state: {"messages": [AIMessage("5 euros")]}), asked)
    names = (a.TURN_ROLE, a.TURN_INPUT_LENGTH, a.TURN_INPUT_TYPE, a.TURN_HAS_ATTACHMENTS)
    assert tuple(turns.root[name] for name in names) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (AIMessage("It costs 5 euros."), (17, "answer")),
        (AIMessage("Which tea?"), (10, "question")),
        (AIMessage("I'm sorry, but I can't help with that."), (38, "refusal")),
        (ToolMessage("5 euros", tool_call_id="1"), (7, "tool_result")),
    ],
)
def test_the_output(turns: Turns, answer: Any, expected: tuple[int, str]) -> None:
    turns.run(single(lambda state: {"messages": [answer]}))
    assert (turns.root[a.TURN_OUTPUT_LENGTH], turns.root[a.TURN_OUTPUT_TYPE]) == expected


def test_a_graph_that_answers_nothing_has_no_output(turns: Turns) -> None:
    """The last message of its state is then the user's own, which is no answer."""
    turns.run(single(lambda state: None))
    assert a.TURN_OUTPUT_LENGTH not in turns.root
    assert a.TURN_OUTPUT_TYPE not in turns.root
    assert turns.row.output_length is None


def test_the_messages_under_another_key(capture: Capture) -> None:
    turns = Turns(capture)
    turns.handler = SessionCallbackHandler(turns.tracker, messages_key="chat")
    builder: Builder = StateGraph(dict)
    builder.add_node("work", lambda state: {"chat": [*state["chat"], AIMessage("5 euros")]})
    builder.add_edge(START, "work")
    turns.run(builder, {"chat": [HumanMessage("What does tea cost?")]})
    assert (turns.root[a.TURN_INPUT_LENGTH], turns.root[a.TURN_OUTPUT_LENGTH]) == (19, 7)


def test_a_classifier_of_the_apps_own(capture: Capture) -> None:
    turns = Turns(capture, classify=lambda text: "riddle" if "tea" in text else "chat")
    turns.run(single(lambda state: None))
    assert turns.root[a.TURN_INPUT_TYPE] == "riddle"


# --- content ----------------------------------------------------------------------------------------------------------
QUESTION = 'What does "green\ntea" cost, asks ann.smith@example.com?'
ANSWER = 'The "green\ntea" of ann.smith@example.com costs 5 euros.'
ARGUMENT, RESULT = "args for ann.smith@example.com", "result for ann.smith@example.com"
HISTORY = "an older message that was said before"
FAILURE = "failure of ann.smith@example.com"
SAID = (QUESTION, ANSWER, ARGUMENT, RESULT, HISTORY, FAILURE)


def talkative() -> Builder:
    """Build an app whose every part says something: its model, its tool, its error, its history."""

    @tool
    def look_up(what: str) -> str:
        """Look something up."""
        return RESULT

    @tool
    def fail(what: str) -> str:
        """Fail."""
        raise LookupError(FAILURE)

    def says(messages: Any) -> AIMessage:
        if isinstance(messages[-1], ToolMessage):
            return AIMessage(ANSWER)
        calls = [
            {"name": name, "args": {"what": ARGUMENT}, "id": name, "type": "tool_call"} for name in ("look_up", "fail")
        ]
        return AIMessage("", tool_calls=calls)

    model = FakeModel(says=says)
    builder: Builder = StateGraph(State)
    builder.add_node("agent", lambda state: {"messages": [model.invoke(state["messages"])]})
    builder.add_node("tools", ToolNode([look_up, fail], handle_tool_errors=True))
    builder.add_node("last", lambda state: {"messages": [model.invoke(state["messages"])]})
    builder.add_edge(START, "agent")
    builder.add_edge("agent", "tools")
    builder.add_edge("tools", "last")
    return track_graph(builder)


@pytest.fixture
def talk(capture: Capture, tmp_path: Path) -> Callable[..., Turns]:
    def run(content: Any) -> Turns:
        turns = Turns(capture, ledger=f"sqlite:///{tmp_path / 'ledger.db'}", outbox=True, content=content)
        asked = {"messages": [HumanMessage(HISTORY), AIMessage(HISTORY), HumanMessage(QUESTION)]}
        turns.run(talkative(), asked)
        turns.tracker.flush()
        return turns

    return run


def told(turns: Turns) -> str:
    """Return all that any span says, as it was before it was made JSON."""
    values: list[str] = []
    for span in turns.capture.spans():
        values.extend(str(value) for value in (span.attributes or {}).values())
        values.extend(str(dict(event.attributes or {})) for event in span.events)
        values.append(str(span.status.description))
    return "\n".join(values).replace("\\n", "\n").replace('\\"', '"').replace("\\\\", "\\")


@pytest.mark.parametrize("content", [None, "metadata", ContentPolicy()], ids=["default", "by-name", "policy"])
def test_by_default_nothing_of_what_was_said_is_anywhere(
    talk: Callable[..., Turns], tmp_path: Path, content: Any
) -> None:
    turns = talk(content)

    stored = b"".join(path.read_bytes() for path in tmp_path.glob("ledger.db*"))
    everywhere = told(turns).encode() + "".join(span.to_json() for span in turns.capture.spans()).encode() + stored
    for word in ("ann.smith", "green", "costs", "args for", "result for", "older", "failure"):
        assert word.encode() not in everywhere, f"{word!r} got out"
    shown = json.loads(str(turns.root[a.LANGFUSE_OBSERVATION_INPUT]))
    assert shown == {"turn": 1, "type": "question", "length": len(QUESTION)}
    only = {
        span.name for span in captured_spans(turns.capture.spans()) if a.LANGFUSE_OBSERVATION_INPUT in span.attributes
    }
    assert only == {"session.start", "conversation.turn"}


def test_of_a_turn_the_question_and_the_answer_on_its_root_only(talk: Callable[..., Turns]) -> None:
    turns = talk("turn")

    asked = json.loads(str(turns.root[a.LANGFUSE_OBSERVATION_INPUT]))
    answered = json.loads(str(turns.root[a.LANGFUSE_OBSERVATION_OUTPUT]))
    assert asked == [{"role": "user", "content": QUESTION}]
    assert answered == {"role": "assistant", "content": ANSWER}
    everywhere = told(turns)
    for text in (ARGUMENT, RESULT, HISTORY):
        assert text not in everywhere
    assert everywhere.count(QUESTION) == everywhere.count(ANSWER) == 1


def test_in_full_the_steps_too_but_never_the_history(talk: Callable[..., Turns]) -> None:
    turns = talk("full")

    everywhere = told(turns)
    assert HISTORY not in everywhere
    (good,) = [span for span in turns.of_type("tool") if span.name == "look_up"]
    assert ARGUMENT in str(good.attributes[a.LANGFUSE_OBSERVATION_INPUT])
    assert good.attributes[a.LANGFUSE_OBSERVATION_OUTPUT] == RESULT
    first, last = turns.of_type("generation")
    assert json.loads(str(first.attributes[a.LANGFUSE_OBSERVATION_OUTPUT]))["tool_calls"][0]["args"] == {
        "what": ARGUMENT
    }
    assert json.loads(str(last.attributes[a.LANGFUSE_OBSERVATION_OUTPUT])) == {"role": "assistant", "content": ANSWER}
    (failed,) = [span for span in turns.of_type("tool") if span.name == "fail"]
    assert failed.attributes[a.LANGFUSE_STATUS_MESSAGE] == f"LookupError: {FAILURE}"


@pytest.mark.parametrize("level", ["turn", "full"])
def test_a_redactor_sees_everything_before_it_gets_out(talk: Callable[..., Turns], tmp_path: Path, level: Any) -> None:
    seen: list[str] = []

    def redact(text: str) -> str:
        seen.append(text)
        return text.replace("ann.smith@example.com", "[user]")

    turns = talk(ContentPolicy(level, redact=redact))

    everywhere = told(turns)
    assert "ann.smith" not in everywhere
    assert "[user]" in everywhere
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("ledger.db*"))
    assert b"ann.smith" not in stored
    if level == "full":
        assert any(FAILURE in text for text in seen)


def test_a_redactor_is_given_the_texts_themselves_not_their_json(talk: Callable[..., Turns]) -> None:
    """Else a pattern over a line's end or a quotation mark misses what it is to find."""
    turns = talk(ContentPolicy("full", redact=lambda text: text.replace('"green\ntea"', "[tea]")))
    assert "green" not in told(turns)


def test_what_a_redactor_fails_on_stays_here(talk: Callable[..., Turns], caplog: pytest.LogCaptureFixture) -> None:
    def redact(text: str) -> str:
        raise KeyError(text)

    turns = talk(ContentPolicy("full", redact=redact))

    everywhere = told(turns)
    for text in SAID:
        assert text not in everywhere
    assert "withheld" in everywhere
    assert "ann.smith" not in caplog.text
    assert turns.row.status == "completed"


def test_content_that_json_cannot_hold_is_named_by_its_type(capture: Capture) -> None:
    turns = Turns(capture, content="full")

    class Secret:
        def __repr__(self) -> str:
            return "ann.smith@example.com"

    @tool
    def look_up() -> Any:
        """Look something up."""
        return {"found": Secret()}

    def work(state: State) -> None:
        look_up.invoke({})

    turns.run(single(work))
    assert "ann.smith" not in told(turns)


# --- long turns -------------------------------------------------------------------------------------------------------
def test_a_turn_of_very_many_steps(capture: Capture) -> None:
    turns = Turns(capture, outbox=True)

    def work(state: State) -> None:
        for _ in itertools.repeat(None, 450):
            FakeModel().invoke("tea")

    turns.run(single(work))
    assert (turns.row.llm_calls, turns.row.input_tokens) == (450, 45_000)
    assert len(turns.of_type("generation")) == 450
