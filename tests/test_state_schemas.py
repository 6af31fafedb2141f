"""States of any schema: models, dataclasses, other keys, no messages at all; what is said and answered is known."""

import asyncio
import dataclasses
import json
import logging
import operator
from typing import Annotated, Any, NotRequired, TypedDict

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, RemoveMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command
from pydantic import BaseModel

from apps import MODEL, USAGE, Builder, FakeModel, State, asks, config_of, single
from turntrace import ContentPolicy, ContextTracker, SessionCallbackHandler, boundary, track_graph
from turntrace import attributes as a
from turntrace.errors import ConfigurationError
from turntrace.graph.state import CONTEXT_FIELD, STATE_IDS
from turntrace.testing import Capture, assert_all_tagged, captured_spans

QUESTION = "What does tea cost?"
ANSWER = "It costs 5 euros."
SECRET = "ann@example.com"
KNOWN = (len(QUESTION), "question", len(ANSWER), "answer")
UNKNOWN = (None, None, None, None)


# --- schemas ----------------------------------------------------------------------------------------------------------
class Model(BaseModel):
    """A state as a model, its fields declared as the documentation says."""

    messages: Annotated[list[Any], add_messages]
    found: Annotated[list[str], operator.add] = []
    session_id: str | None = None
    conversation_id: str | None = None
    turn_id: str | None = None
    turn_number: int | None = None
    context_tokens: int | None = None


@dataclasses.dataclass
class Data:
    messages: Annotated[list[Any], add_messages]
    found: Annotated[list[str], operator.add] = dataclasses.field(default_factory=list)
    session_id: str | None = None
    conversation_id: str | None = None
    turn_id: str | None = None
    turn_number: int | None = None
    context_tokens: int | None = None


class Ids(TypedDict, total=False):
    session_id: str
    conversation_id: str
    turn_id: str
    turn_number: int


class Chat(Ids):
    chat: Annotated[list[BaseMessage], add_messages]


class Form(TypedDict):
    question: str
    answer: NotRequired[str]


both_schemas = pytest.mark.parametrize("schema", [Model, Data])
sync_and_async = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


# --- graphs, runs and what came of them -------------------------------------------------------------------------------
def agent_and_after(schema: Any, seen: list[Any], *, is_async: bool = False) -> Builder:
    """Build: agent, which reads the state by attribute, and a node that notes the state it is given."""
    model = FakeModel()

    def agent(state: Any) -> Any:
        return {"messages": [model.invoke(state.messages)]}

    async def aagent(state: Any) -> Any:
        return {"messages": [await model.ainvoke(state.messages)]}

    def after(state: Any) -> None:
        seen.append(state)

    builder = single(aagent if is_async else agent, "agent", schema)
    builder.add_node("after", after)
    builder.add_edge("agent", "after")
    return builder


class Talk:
    """The same said in so many turns of one conversation, all of whose spans are tagged: the results and the roots."""

    def __init__(
        self, capture: Capture, builder: Builder, given: Any, *, times: int = 2, is_async: bool = False, **settings: Any
    ) -> None:
        self.tracker = capture.tracker(content=settings.pop("content", None))
        handler = SessionCallbackHandler(self.tracker, **settings)
        self.graph: Any = builder.compile(checkpointer=InMemorySaver())
        self.config: Any = {**config_of("c-1", user_id="ann"), "callbacks": [handler]}
        self.results = [self._run(given, is_async) for _ in range(times)]
        assert handler.open_runs == 0
        self.spans = captured_spans(capture.spans())
        assert_all_tagged(self.spans)
        self.roots = [span for span in self.spans if span.name == a.SPAN_TURN]
        assert [root.attributes[a.TURN_NUMBER] for root in self.roots] == list(range(1, times + 1))

    def _run(self, given: Any, is_async: bool) -> Any:
        return (
            asyncio.run(self.graph.ainvoke(given, self.config)) if is_async else self.graph.invoke(given, self.config)
        )

    def of_roots(self, name: str) -> list[Any]:
        return [root.attributes.get(name) for root in self.roots]

    @property
    def said(self) -> list[tuple[Any, ...]]:
        """What is known of what the user said and the app answered: lengths and types."""
        names = (a.TURN_INPUT_LENGTH, a.TURN_INPUT_TYPE, a.TURN_OUTPUT_LENGTH, a.TURN_OUTPUT_TYPE)
        return list(zip(*map(self.of_roots, names), strict=True))

    @property
    def content(self) -> list[tuple[Any, Any]]:
        """What Langfuse shows as the input and the output of the turns."""
        asked, told = self.of_roots(a.LANGFUSE_OBSERVATION_INPUT), self.of_roots(a.LANGFUSE_OBSERVATION_OUTPUT)
        return [(json.loads(one), json.loads(other)) for one, other in zip(asked, told, strict=True)]

    @property
    def ids(self) -> list[dict[str, Any]]:
        """The ids of the turns, as the state should have them."""
        names = (a.SESSION_ID, a.CONVERSATION_ID, a.TURN_ID, a.TURN_NUMBER)
        return [dict(zip(STATE_IDS, (root.attributes[name] for name in names), strict=True)) for root in self.roots]

    def in_the_end(self) -> dict[str, Any]:
        return ids_in(self.graph.get_state(self.config).values)


def ids_in(state: Any) -> dict[str, Any]:
    return {name: state.get(name) if isinstance(state, dict) else getattr(state, name) for name in STATE_IDS}


# --- models and dataclasses -------------------------------------------------------------------------------------------
@both_schemas
@sync_and_async
@pytest.mark.parametrize("is_instance", [False, True], ids=["dict", "instance"])
@pytest.mark.parametrize("is_tracked", [False, True], ids=["callback", "tracked"])
def test_turns_are_known_by_what_was_said_and_the_ids_are_in_the_state(
    capture: Capture, schema: Any, is_async: bool, is_instance: bool, is_tracked: bool
) -> None:
    seen: list[Any] = []
    builder = agent_and_after(schema, seen, is_async=is_async)
    given = schema(**asks()) if is_instance else asks()
    talk = Talk(capture, track_graph(builder) if is_tracked else builder, given, times=3, is_async=is_async)

    assert talk.said == [KNOWN] * 3
    assert talk.of_roots(a.CONVERSATION_MESSAGES_IN_CONTEXT) == [1, 3, 5]
    expected = talk.ids if is_tracked else [dict.fromkeys(STATE_IDS)] * 3
    assert all(isinstance(state, schema) for state in seen)
    assert [ids_in(state) for state in seen] == expected
    assert [ids_in(result) for result in talk.results] == expected
    assert talk.in_the_end() == expected[-1]


@both_schemas
def test_the_tokens_that_were_fitted_are_in_the_state(capture: Capture, schema: Any) -> None:
    context = ContextTracker(MODEL)
    fitted: list[int] = []

    def agent(state: Any) -> Any:
        window = context.fit(state.messages)
        fitted.append(window.tokens)
        return {"messages": [FakeModel().invoke(window.messages)]}

    talk = Talk(capture, track_graph(single(agent, schema=schema)), asks())

    assert [result[CONTEXT_FIELD] for result in talk.results] == fitted
    assert [span.attributes[a.CONTEXT_TOKENS] for span in talk.spans if span.name == "work"] == fitted


@pytest.mark.parametrize(("schema", "key"), [(Model, "messages"), (Data, "messages"), (Chat, "chat")])
def test_what_is_taken_out_of_the_messages_is_on_record(capture: Capture, schema: Any, key: str) -> None:
    def trim(state: Any) -> Any:
        messages = state[key] if isinstance(state, dict) else getattr(state, key)
        return {key: [RemoveMessage(each.id) for each in messages[:-1]]}

    talk = Talk(capture, single(trim, "trim", schema), {key: [("user", QUESTION)]}, times=3, messages_key=key)

    [session] = talk.tracker.ledger.sessions()
    [decision] = [decision for _, decision in talk.tracker.ledger.decisions(session.id)]
    assert (decision.trigger, decision.messages_before, decision.messages_after) == ("external", 2, 2)
    assert len(decision.dropped) == 1


@both_schemas
def test_first_nodes_side_by_side_may_all_write_the_ids(capture: Capture, schema: Any) -> None:
    """The documented fields have no reducer, so LangGraph would refuse two values in one step."""
    builder: Builder = StateGraph(schema)
    for name in ("left", "right"):
        builder.add_node(name, lambda state: {"found": ["one"]})
        builder.add_edge(START, name)

    talk = Talk(capture, track_graph(builder), asks())

    assert talk.results[-1]["found"] == ["one"] * 4
    assert [ids_in(result) for result in talk.results] == talk.ids


@both_schemas
def test_the_ids_are_there_when_a_node_returns_an_instance(capture: Capture, schema: Any) -> None:
    def node(state: Any) -> Any:
        return schema(messages=[AIMessage(ANSWER)], found=["tea"])

    talk = Talk(capture, track_graph(single(node, schema=schema)), asks())

    assert talk.results[-1]["found"] == ["tea"] * 2
    assert [ids_in(result) for result in talk.results] == talk.ids


@both_schemas
def test_an_instance_given_with_the_ids_of_another_turn_gets_those_of_its_own(capture: Capture, schema: Any) -> None:
    """As when an app sends back what a turn returned."""
    before = dict(zip(STATE_IDS, ("s", "c", "t", 7), strict=True))
    talk = Talk(capture, track_graph(agent_and_after(schema, [])), schema(**asks(), **before))
    assert [ids_in(result) for result in talk.results] == talk.ids


# --- messages under another key ---------------------------------------------------------------------------------------
CHATTED = {"chat": [("user", QUESTION)]}


def chatting(state: Any) -> Any:
    return {"chat": [FakeModel().invoke(state["chat"])]}


@sync_and_async
def test_messages_under_another_key_are_known(capture: Capture, is_async: bool) -> None:
    builder = track_graph(single(chatting, schema=Chat))
    talk = Talk(capture, builder, CHATTED, is_async=is_async, content="turn", messages_key="chat")

    assert talk.said == [KNOWN] * 2
    assert talk.of_roots(a.CONVERSATION_MESSAGES_IN_CONTEXT) == [1, 3]
    assert talk.of_roots(a.CONVERSATION_CONTEXT_TOKENS) == [USAGE["input_tokens"]] * 2
    recorded = ([{"role": "user", "content": QUESTION}], {"role": "assistant", "content": ANSWER})
    assert talk.content == [recorded] * 2
    assert [ids_in(result) for result in talk.results] == talk.ids


def test_a_state_without_the_messages_key_is_a_turn_of_which_less_is_known(capture: Capture) -> None:
    talk = Talk(capture, track_graph(single(chatting, schema=Chat)), CHATTED, content="turn")

    assert talk.said == [UNKNOWN] * 2
    assert talk.of_roots(a.TURN_STATUS) == ["completed"] * 2
    assert talk.of_roots(a.TURN_LLM_CALLS) == [1, 1]
    assert [ids_in(result) for result in talk.results] == talk.ids
    assert QUESTION not in str(talk.content)


# --- no messages at all -----------------------------------------------------------------------------------------------
ASKED = {"question": QUESTION}


def form(answer: str = ANSWER) -> Builder:
    return single(lambda state: {"answer": answer}, schema=Form)


@sync_and_async
@pytest.mark.parametrize(
    ("given", "told"),
    [
        pytest.param(lambda s: s["question"], lambda s: s["answer"], id="texts"),
        pytest.param(lambda s: HumanMessage(s["question"]), lambda s: AIMessage(s["answer"]), id="messages"),
    ],
)
def test_what_stands_for_question_and_answer_is_described(
    capture: Capture, is_async: bool, given: Any, told: Any
) -> None:
    talk = Talk(capture, form(), ASKED, is_async=is_async, describe_input=given, describe_output=told)

    assert talk.results == [{**ASKED, "answer": ANSWER}] * 2
    assert talk.said == [KNOWN] * 2
    assert not any(text in str(talk.content) for text in (QUESTION, ANSWER))


@pytest.mark.parametrize("level", ["turn", "full"])
def test_what_is_described_is_recorded_under_a_policy_that_lets_it_out(capture: Capture, level: Any) -> None:
    policy = ContentPolicy(level, redact=lambda text: text.replace("tea", "[item]"))
    describe: Any = {"describe_input": lambda state: state["question"], "describe_output": lambda s: s["answer"]}
    talk = Talk(capture, form("No tea today."), ASKED, content=policy, **describe)

    asked = [{"role": "user", "content": "What does [item] cost?"}]
    assert talk.content == [(asked, {"role": "assistant", "content": "No [item] today."})] * 2
    assert talk.of_roots(a.TURN_INPUT_LENGTH) == [len(QUESTION)] * 2


def test_a_description_goes_before_the_messages_and_brings_attachments(capture: Capture) -> None:
    shown: Any = [{"type": "text", "text": "Go on."}, {"type": "image_url", "image_url": {"url": "https://x.org/1"}}]
    describe: Any = {"describe_input": lambda _: HumanMessage(shown), "describe_output": lambda _: "Shall I?"}
    talk = Talk(capture, single(lambda state: {"messages": [AIMessage(ANSWER)]}), asks(), **describe)

    assert talk.said == [(len("Go on."), "command", len("Shall I?"), "question")] * 2
    assert talk.of_roots(a.TURN_HAS_ATTACHMENTS) == [True, True]


def test_what_is_described_as_none_is_not_known_and_only_the_graph_is_described(capture: Capture) -> None:
    seen: list[Any] = []
    talk = Talk(capture, form(), ASKED, times=1, describe_input=seen.append, describe_output=seen.append)

    assert seen == [ASKED, {**ASKED, "answer": ANSWER}]
    assert (talk.said, talk.of_roots(a.TURN_STATUS)) == ([UNKNOWN], ["completed"])


@pytest.mark.usefixtures("lenient")
@sync_and_async
def test_a_description_that_raises_costs_the_turn_nothing_else(
    capture: Capture, caplog: pytest.LogCaptureFixture, is_async: bool
) -> None:
    def fails(state: Any) -> Any:
        raise RuntimeError(SECRET)

    talk = Talk(capture, form(), ASKED, is_async=is_async, describe_input=fails, describe_output=fails)

    assert talk.results == [{**ASKED, "answer": ANSWER}] * 2
    assert talk.said == [UNKNOWN] * 2
    assert talk.of_roots(a.TURN_STATUS) == ["completed"] * 2
    assert sum(boundary.failures.values()) == 4
    told = [each for each in caplog.records if each.name == "turntrace" and each.levelno >= logging.WARNING]
    assert 1 <= len(told) <= 2, "it is said once, not for each turn"
    assert SECRET not in caplog.text


# --- input, output and private parts that differ from the state -------------------------------------------------------
class Asked(TypedDict):
    messages: list[Any]


class Answered(Asked):
    turn_id: NotRequired[str]


class Found(TypedDict):
    found: list[str]


class Private(TypedDict):
    secret: str


@sync_and_async
@pytest.mark.parametrize(("output", "keys"), [(Answered, {"messages", "turn_id"}), (Found, {"found"})])
def test_the_schemas_of_input_and_output_say_what_is_in_the_result(
    capture: Capture, is_async: bool, output: Any, keys: set[str]
) -> None:
    builder: Any = StateGraph(State, input_schema=Asked, output_schema=output)
    builder.add_node("work", lambda state: {"messages": [AIMessage(ANSWER)], "found": ["tea"]}, input_schema=State)
    builder.add_edge(START, "work")

    talk = Talk(capture, track_graph(builder), asks(), is_async=is_async)

    assert [set(result) for result in talk.results] == [keys] * 2
    told = [ids["turn_id"] if "turn_id" in keys else None for ids in talk.ids]
    assert [result.get("turn_id") for result in talk.results] == told
    assert talk.in_the_end() == talk.ids[-1]
    assert talk.said == [KNOWN if "messages" in keys else (*KNOWN[:2], None, None)] * 2


@both_schemas
def test_a_private_channel_between_two_nodes_stays_private(capture: Capture, schema: Any) -> None:
    given: list[Any] = []

    def second(state: Private) -> Any:
        given.append(state)
        return {"messages": [AIMessage(ANSWER)]}

    builder = single(lambda state: {"secret": SECRET}, "first", schema)
    builder.add_node("second", second)
    builder.add_edge("first", "second")

    talk = Talk(capture, track_graph(builder), asks())

    assert given == [{"secret": SECRET}] * 2
    assert not any("secret" in result for result in talk.results)
    assert [ids_in(result) for result in talk.results] == talk.ids
    assert SECRET not in str([span.attributes for span in talk.spans])


# --- a state that is a list of messages -------------------------------------------------------------------------------
@sync_and_async
@pytest.mark.parametrize("is_tracked", [False, True], ids=["callback", "tracked"])
def test_a_state_that_is_the_messages_themselves(capture: Capture, is_async: bool, is_tracked: bool) -> None:
    builder = single(lambda state: [FakeModel().invoke(state)], schema=Annotated[list[BaseMessage], add_messages])
    given = [("user", QUESTION)]
    talk = Talk(capture, track_graph(builder) if is_tracked else builder, given, is_async=is_async)

    assert [len(result) for result in talk.results] == [2, 4]
    assert talk.said == [KNOWN] * 2
    assert talk.of_roots(a.CONVERSATION_MESSAGES_IN_CONTEXT) == [1, 3]


# --- what the user wants ----------------------------------------------------------------------------------------------
class Wanting(State):
    intent: NotRequired[str]


@pytest.mark.parametrize("how", ["mapping", "command", "state"])
def test_what_a_node_writes_as_the_intent_is_the_turns_where_it_is_asked_for(how: str, capture: Capture) -> None:
    class Wants(BaseModel):
        messages: Annotated[list[Any], add_messages]
        intent: str | None = None

    def triage(state: Any) -> Any:
        if how == "state":
            return Wants(messages=[], intent="refund")
        return Command(update={"intent": "refund"}) if how == "command" else {"intent": "refund"}

    tracker = capture.tracker()
    schema: Any = Wants if how == "state" else Wanting
    builder: Any = StateGraph(schema)
    builder.add_node("triage", triage)
    builder.add_edge(START, "triage")
    for key in (None, "intent"):
        handler = SessionCallbackHandler(tracker, intent_key=key)
        graph: Any = builder.compile()
        graph.invoke(asks(), {**config_of("c1"), "callbacks": [handler]})
    tracker.flush()
    turns = [turn for session in tracker.ledger.sessions() for turn, _ in tracker.ledger.turns(session.id)]
    assert [turn.intent for turn in turns] == [None, "refund"]


def test_an_intent_of_an_earlier_turn_is_not_taken_for_that_of_this_one(capture: Capture) -> None:
    tracker = capture.tracker()
    builder: Builder = StateGraph(Wanting)
    intents = iter(["refund", None, 7, ""])

    def triage(_state: Any) -> Any:
        intent: Any = next(intents)
        return {} if intent is None else {"intent": intent}

    node: Any = triage
    builder.add_node("triage", node)
    builder.add_edge(START, "triage")
    handler = SessionCallbackHandler(tracker, intent_key="intent")
    graph: Any = builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=[handler])
    for _ in range(4):
        graph.invoke(asks(), config_of("c1"))
    tracker.flush()
    [session] = tracker.ledger.sessions()
    assert [turn.intent for turn, _ in tracker.ledger.turns(session.id)] == ["refund", None, None, None]


@pytest.mark.parametrize("key", ["", 7, ["intent"]], ids=str)
def test_a_key_that_is_none_says_what_to_type(key: Any, capture: Capture) -> None:
    with pytest.raises(ConfigurationError, match=r'SessionCallbackHandler\(intent_key="intent"\)'):
        SessionCallbackHandler(capture.tracker(), intent_key=key)


def test_a_tracker_that_is_none_says_what_to_pass() -> None:
    given: Any = "x"
    with pytest.raises(ConfigurationError, match=r"takes a SessionTracker and got a str: pass SessionCallbackHandler"):
        SessionCallbackHandler(given)
