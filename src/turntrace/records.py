"""What turntrace records, as frozen dataclasses that render themselves as attributes.

A field made by `word` stands under the attribute names given there; what is None is left out.
"""

from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from turntrace import attributes as a
from turntrace.attributes import AttributeValue

NS_PER_MS = 1_000_000


def word(*names: str, default: Any = None) -> Any:
    """Declare a field that is rendered under these attribute names."""
    return field(default=default, metadata={"names": names})


_words: dict[type, tuple[tuple[str, tuple[str, ...]], ...]] = {}


def _words_of(record: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    words = _words.get(record)
    if words is None:
        named = ((each.name, each.metadata["names"]) for each in fields(record) if "names" in each.metadata)
        words = _words[record] = tuple(named)
    return words


class Record:
    """Base of the records: gives them `attributes`."""

    __slots__ = ()

    def attributes(self) -> dict[str, AttributeValue]:
        """Return what is set, by attribute name."""
        rendered: dict[str, AttributeValue] = {}
        for name, words in _words_of(type(self)):
            value = getattr(self, name)
            if value is not None:
                for each in words:
                    rendered[each] = value
        return rendered


def iso_time(ns: int) -> str:
    """Write a time in nanoseconds since 1970 as ISO 8601 in UTC, with microseconds."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000).isoformat(timespec="microseconds")


def share_of(tokens: int | None, limit: int | None) -> float | None:
    """Return which share of a window tokens take; None when one of them is not known."""
    return tokens / limit if tokens is not None and limit else None


def elapsed_ms(start_ns: int, end_ns: int) -> int:
    """Return whole milliseconds from one time to another; 0 when the clock went back in between."""
    return max(0, end_ns - start_ns) // NS_PER_MS


@dataclass(frozen=True, slots=True)
class SessionFacts(Record):
    """What is known of a session from its start.

    Attributes:
        id: Id of the session.
        user_id: Hash of the user's id; None for an unknown user.
        started_ns: When it began, in nanoseconds since 1970.
        previous_id: The user's session before this one.
        sessions_total: Sessions of the user so far, this one included.
    """

    id: str = word(a.SESSION_ID)
    user_id: str | None = word(a.USER_ID)
    channel: str | None = word(a.SESSION_CHANNEL)
    type: str | None = word(a.SESSION_TYPE)
    tier: str | None = word(a.USER_TIER)
    org_id: str | None = word(a.USER_ORG_ID)
    locale: str | None = word(a.SESSION_LOCALE)
    client_version: str | None = word(a.SESSION_CLIENT_VERSION)
    previous_id: str | None = word(a.SESSION_PREVIOUS_ID)
    sessions_total: int | None = word(a.USER_SESSIONS_TOTAL)
    started_ns: int = 0

    def attributes(self) -> dict[str, AttributeValue]:
        """Return the attributes of the span ``session.start``."""
        # An explicit super(): a dataclass with slots is another class than the one this method was defined in.
        rendered = Record.attributes(self)
        if self.user_id is None:
            rendered.pop(a.USER_SESSIONS_TOTAL, None)  # of nobody
        return rendered | {a.SESSION_START_TIME: iso_time(self.started_ns)}


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """What a run that stands alone says about the turn that it is to be; None is what it does not say.

    Attributes:
        session_id: The session, when the app chose it.
        user_id: The raw id of the user; it is hashed before anything is kept.
        conversation_id: The conversation: LangGraph's ``thread_id``, or what the app chose.
        tags: Tags for the trace.
        counted_tokens: Tokens of what models were given, as counted here, in calls whose provider counted them too.
        counted_of_tokens: What the provider counted in these calls.
        forked_from: The turn that it replays from a checkpoint, or goes on from.
    """

    session_id: str | None = None
    user_id: str | None = None
    conversation_id: str | None = None
    channel: str | None = None
    topic: str | None = None
    tier: str | None = None
    org_id: str | None = None
    locale: str | None = None
    client_version: str | None = None
    tags: tuple[str, ...] = ()
    forked_from: str | None = None


@dataclass(frozen=True, slots=True)
class TurnOwn:
    """What a turn began with that its session does not tell.

    Attributes:
        tier: The user's tier, where it is another than the session's.
        org_id: The user's organisation, where it is another than the session's.
        topic: What the conversation was said to be about.
        tags: Tags for the trace.
        above: The span of the request that its root stands below: its id and flags, as in W3C's ``traceparent``.
    """

    tier: str | None = None
    org_id: str | None = None
    topic: str | None = None
    tags: tuple[str, ...] = ()
    above: str | None = None


@dataclass(frozen=True, slots=True)
class TurnTags(Record):
    """What every span of a turn carries."""

    session_id: str = word(a.SESSION_ID)
    turn_id: str = word(a.TURN_ID)
    conversation_id: str = word(a.CONVERSATION_ID, a.GEN_AI_CONVERSATION_ID)
    number: int = word(a.TURN_NUMBER, a.CONVERSATION_TURN_NUMBER)
    user_id: str | None = word(a.USER_ID)
    channel: str | None = word(a.SESSION_CHANNEL)
    tier: str | None = word(a.USER_TIER)
    org_id: str | None = word(a.USER_ORG_ID)
    topic: str | None = word(a.CONVERSATION_TOPIC)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call of a model, as its provider counted them.

    Attributes:
        input_tokens: All input tokens, those from and to a cache included.
        output_tokens: All output tokens, those for reasoning included.
        cache_read_tokens: Of the input, those read from a cache.
        cache_creation_tokens: Of the input, those written to a cache.
        reasoning_tokens: Of the output, those for reasoning.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_creation_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LLMCall(Record):
    """What is known of one call of a model when it has ended.

    Attributes:
        usage: Its tokens; None when the provider gave none.
        cost_usd: What it cost, in US dollars, where that was told with its tokens; else its price is looked up.
    """

    model: str | None = word(a.GEN_AI_RESPONSE_MODEL)
    provider: str | None = word(a.GEN_AI_PROVIDER_NAME)
    usage: Usage | None = None
    cost_usd: float | None = None

    def attributes(self) -> dict[str, AttributeValue]:
        """Return the attributes of the generation; kinds of tokens that do not occur are left out."""
        rendered = Record.attributes(self)
        if (usage := self.usage) is not None:
            rendered[a.GEN_AI_INPUT_TOKENS] = usage.input_tokens
            rendered[a.GEN_AI_OUTPUT_TOKENS] = usage.output_tokens
            for name, tokens in (
                (a.GEN_AI_CACHE_READ_TOKENS, usage.cache_read_tokens),
                (a.GEN_AI_CACHE_CREATION_TOKENS, usage.cache_creation_tokens),
                (a.GEN_AI_REASONING_TOKENS, usage.reasoning_tokens),
            ):
                if tokens:
                    rendered[name] = tokens
        return rendered


@dataclass(frozen=True, slots=True)
class TurnSummary(Record):
    """What is known of a turn when it has ended.

    Attributes:
        started_ns: When it began, in nanoseconds since 1970.
        ended_ns: When it ended; None while it is open.
        unpriced_calls: Calls of models whose price is not known: they are not in ``cost_usd``.
        error: Class of the error that ended it; never its text.
        context_tokens: Tokens that the model was given when its window was fullest.
        context_messages: Messages that it was given then.
        context_limit: Tokens that it can be given.
        prunings: How often something was pruned from what a model was given.
        messages_pruned: Messages that were dropped or replaced.
        tokens_pruned: Tokens of them, as far as they were counted.
        forked_from: The turn that it replays from a checkpoint, or goes on from.
        checkpoint_id: LangGraph's checkpoint at which it waits for a person.
        own: What it began with that its session does not tell, as the ledger keeps it (see `TurnOwn`).
    """

    id: str
    session_id: str = word(a.CONVERSATION_SESSION_ID)
    conversation_id: str = ""
    user_id: str | None = None
    number: int = word(a.CONVERSATION_TOTAL_TURNS, default=0)
    started_ns: int = 0
    ended_ns: int | None = None
    status: str | None = word(a.TURN_STATUS)
    role: str | None = word(a.TURN_ROLE)
    input_length: int | None = word(a.TURN_INPUT_LENGTH)
    output_length: int | None = word(a.TURN_OUTPUT_LENGTH)
    input_type: str | None = word(a.TURN_INPUT_TYPE)
    output_type: str | None = word(a.TURN_OUTPUT_TYPE)
    has_attachments: bool | None = word(a.TURN_HAS_ATTACHMENTS)
    intent: str | None = word(a.TURN_INTENT)
    agent_runs: int = word(a.TURN_AGENT_RUNS, default=0)
    tool_calls: int = word(a.TURN_TOOL_CALLS, default=0)
    llm_calls: int = word(a.TURN_LLM_CALLS, default=0)
    input_tokens: int = word(a.TURN_INPUT_TOKENS, default=0)
    output_tokens: int = word(a.TURN_OUTPUT_TOKENS, default=0)
    cost_usd: float = word(a.TURN_COST_USD, default=0.0)
    unpriced_calls: int = 0
    latency_ms: int = word(a.TURN_LATENCY_MS, default=0)
    wait_ms: int = word(a.TURN_WAIT_MS, default=0)
    time_to_first_token_ms: int | None = word(a.TURN_TIME_TO_FIRST_TOKEN_MS)
    model: str | None = None
    error: str | None = None
    trace_id: str | None = None
    root_span_id: str | None = None
    context_tokens: int | None = word(a.CONVERSATION_CONTEXT_TOKENS)
    context_messages: int | None = word(a.CONVERSATION_MESSAGES_IN_CONTEXT)
    context_limit: int | None = None
    prunings: int = 0
    messages_pruned: int = 0
    tokens_pruned: int = 0
    counted_tokens: int = 0
    counted_of_tokens: int = 0
    forked_from: str | None = word(a.TURN_FORKED_FROM)
    checkpoint_id: str | None = None
    own: str | None = None

    @property
    def context_window_pct(self) -> float | None:
        """How full the model's window was at its fullest, from 0 to 1; None when that is not known."""
        return share_of(self.context_tokens, self.context_limit)

    def attributes(self) -> dict[str, AttributeValue]:
        """Return the attributes of the turn's root; those of the context window where a model was called."""
        rendered = Record.attributes(self)
        if (share := self.context_window_pct) is not None:
            rendered[a.CONVERSATION_CONTEXT_WINDOW_PCT] = share
        if self.prunings or self.context_messages is not None:
            rendered[a.CONTEXT_PRUNED] = self.prunings > 0
            rendered[a.CONTEXT_MESSAGES_PRUNED] = self.messages_pruned
            rendered[a.CONTEXT_TOKENS_PRUNED] = self.tokens_pruned
        return rendered


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a turn, for looking at it without a server: a run of a graph, a node, a call of a model or a tool.

    Attributes:
        span_id: Id of its span, 16 hexadecimal digits.
        parent_id: Id of the span above it.
        name: Name of the node, the model, the tool or the graph.
        kind: ``agent``, ``chain``, ``generation``, ``tool`` or ``retriever``.
        start_ms: From the start of the turn, in milliseconds.
        duration_ms: How long it ran, in milliseconds.
        error: Class of the error that ended it.
        context_tokens: Tokens that the model was given, for a generation.
        context_limit: Tokens that it can be given.
        attempt: Which attempt of a node or a task it is, for those after the first.
    """

    span_id: str
    parent_id: str
    name: str
    kind: str
    start_ms: int
    duration_ms: int
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    error: str | None = None
    context_tokens: int | None = None
    context_limit: int | None = None
    attempt: int | None = None
