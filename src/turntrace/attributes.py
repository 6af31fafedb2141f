"""Every attribute name that turntrace sets, once, with its type, unit, place and source.

A name marked ``every=True`` (the starred names of the design) stands on every span of a turn: `EVERY_SPAN` lists them.
Times are ISO 8601 in UTC, durations are integer milliseconds, lengths are characters, money is US dollars.

Sources: "Langfuse" is https://langfuse.com/integrations/native/opentelemetry (property mapping), "OTel GenAI" is
https://opentelemetry.io/docs/specs/semconv/gen-ai/, "turntrace" is this table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

AttributeValue: TypeAlias = str | int | float | bool | tuple[str, ...]
"""What an attribute may hold."""

SCOPE_NAME: Final = "turntrace"
"""Name of the instrumentation scope of all spans of ours."""

SPAN_SESSION_START: Final = "session.start"
SPAN_SESSION_END: Final = "session.end"
SPAN_TURN: Final = "conversation.turn"
SPAN_PRUNE: Final = "context.prune"
TRACE_NAME_TURN: Final = "chat_turn"


@dataclass(frozen=True, slots=True)
class Attribute:
    """What an attribute name stands for.

    Attributes:
        name: The name as it stands on the span.
        type: The Python type of its value.
        on: The spans that carry it: ``all``, or names of spans and kinds of spans.
        meaning: What the value says.
        unit: The unit of a number, empty where there is none.
        source: Whose name it is.
        every: Whether every span of a turn carries it (when it is known).
    """

    name: str
    type: type
    on: str
    meaning: str
    unit: str = ""
    source: str = "turntrace"
    every: bool = False


_TABLE: dict[str, Attribute] = {}


def _name(
    name: str, kind: type, on: str, meaning: str, *, unit: str = "", source: str = "turntrace", every: bool = False
) -> str:
    _TABLE[name] = Attribute(name, kind, on, meaning, unit, source, every)
    return name


# --- the session ------------------------------------------------------------------------------------------------------
SESSION_ID: Final = _name("session.id", str, "all", "one sitting", source="Langfuse, OTel", every=True)
SESSION_START_TIME: Final = _name("session.start_time", str, "session.start, session.end", "begin", unit="ISO 8601 UTC")
SESSION_END_TIME: Final = _name("session.end_time", str, "session.end", "end", unit="ISO 8601 UTC")
SESSION_TYPE: Final = _name("session.type", str, "session.start, turn", "chat, api or batch")
SESSION_CHANNEL: Final = _name("session.channel", str, "all", "web, mobile, api, slack, ...", every=True)
SESSION_CLIENT_VERSION: Final = _name("session.client_version", str, "session.start, turn", "version of the client")
SESSION_LOCALE: Final = _name("session.locale", str, "session.start, turn", "language and region, as de-AT")
SESSION_PREVIOUS_ID: Final = _name("session.previous_id", str, "session.start", "the user's session before this one")
SESSION_END_REASON: Final = _name(
    "session.end_reason",
    str,
    "session.end",
    "user_exit, completed, inactive_timeout, error, handoff, shutdown, or the app's own",
)
SESSION_DURATION_MS: Final = _name("session.duration_ms", int, "session.end", "first to last activity", unit="ms")
SESSION_ACTIVE_MS: Final = _name("session.active_ms", int, "session.end", "the agent working", unit="ms")
SESSION_WAIT_MS: Final = _name("session.wait_ms", int, "session.end", "waiting for a person inside a turn", unit="ms")
SESSION_TOTAL_TURNS: Final = _name("session.total_turns", int, "session.end", "turns of the session")
SESSION_TOTAL_TOKENS: Final = _name("session.total_tokens", int, "session.end", "input and output tokens of all calls")
SESSION_TOTAL_COST_USD: Final = _name("session.total_cost_usd", float, "session.end", "cost of all calls", unit="USD")
SESSION_AVG_TURN_LATENCY_MS: Final = _name(
    "session.avg_turn_latency_ms", float, "session.end", "mean working time of a turn", unit="ms"
)
SESSION_AVG_TURN_TOKENS: Final = _name("session.avg_turn_tokens", float, "session.end", "mean tokens of a turn")
SESSION_USER_SATISFACTION: Final = _name(
    "session.user_satisfaction", float, "session.end", "mean of the feedback; absent without any", unit="0..1"
)
SESSION_INACTIVE_TIMEOUT: Final = _name("session.inactive_timeout", bool, "session.end", "whether silence ended it")
SESSION_IDLE_TIME_MS: Final = _name("session.idle_time_ms", int, "session.end", "since the last activity", unit="ms")

# --- the user ---------------------------------------------------------------------------------------------------------
USER_ID: Final = _name("user.id", str, "all", "the hash of the user's id", source="Langfuse, OTel", every=True)
USER_TIER: Final = _name("user.tier", str, "all, when known", "safe to log", every=True)
USER_ORG_ID: Final = _name("user.org_id", str, "all, when known", "safe to log", every=True)
USER_SESSIONS_TOTAL: Final = _name("user.sessions_total", int, "session.start, session.end", "sessions so far")
USER_AVG_SESSION_LENGTH: Final = _name("user.avg_session_length", float, "session.end", "turns a session")
USER_RETENTION_DAYS: Final = _name(
    "user.retention_days", int, "session.end", "from the first to the latest session", unit="whole days"
)

# --- the conversation -------------------------------------------------------------------------------------------------
CONVERSATION_ID: Final = _name("conversation.id", str, "all", "LangGraph's thread_id", every=True)
GEN_AI_CONVERSATION_ID: Final = _name(
    "gen_ai.conversation.id", str, "all", "the same, by its OTel name", source="OTel GenAI", every=True
)
CONVERSATION_SESSION_ID: Final = _name("conversation.session_id", str, "turn", "the session this turn belongs to")
CONVERSATION_TOPIC: Final = _name("conversation.topic", str, "all, when known", "what it is about", every=True)
CONVERSATION_TURN_NUMBER: Final = _name(
    "conversation.turn_number", int, "all", "number in the conversation, from 1", every=True
)
CONVERSATION_TOTAL_TURNS: Final = _name("conversation.total_turns", int, "turn", "turns of the conversation so far")
CONVERSATION_MESSAGES_IN_CONTEXT: Final = _name(
    "conversation.messages_in_context", int, "turn, generation", "messages that the model was given"
)
CONVERSATION_CONTEXT_TOKENS: Final = _name(
    "conversation.context_tokens", int, "turn, generation", "tokens that the model was given"
)
CONVERSATION_CONTEXT_WINDOW_PCT: Final = _name(
    "conversation.context_window_pct", float, "turn, generation", "tokens over the model's limit", unit="0..1"
)

# --- the turn ---------------------------------------------------------------------------------------------------------
TURN_ID: Final = _name("turn.id", str, "all", "one exchange", every=True)
TURN_NUMBER: Final = _name("turn.number", int, "all", "the same as conversation.turn_number", every=True)
TURN_ROLE: Final = _name("turn.role", str, "turn", "user, or assistant when the agent began the exchange")
TURN_INPUT_LENGTH: Final = _name("turn.input_length", int, "turn", "length of the user's message", unit="characters")
TURN_OUTPUT_LENGTH: Final = _name("turn.output_length", int, "turn", "length of the answer", unit="characters")
TURN_INPUT_TYPE: Final = _name("turn.input_type", str, "turn", "question, command, feedback or statement")
TURN_OUTPUT_TYPE: Final = _name(
    "turn.output_type", str, "turn", "answer, question, refusal, tool_result, interrupt or error"
)
TURN_HAS_ATTACHMENTS: Final = _name("turn.has_attachments", bool, "turn", "images, audio or files in the input")
TURN_AGENT_RUNS: Final = _name("turn.agent_runs", int, "turn", "runs of a graph")
TURN_TOOL_CALLS: Final = _name("turn.tool_calls", int, "turn", "calls of tools")
TURN_LLM_CALLS: Final = _name("turn.llm_calls", int, "turn", "calls of models")
TURN_INPUT_TOKENS: Final = _name("turn.input_tokens", int, "turn", "input tokens of all calls")
TURN_OUTPUT_TOKENS: Final = _name("turn.output_tokens", int, "turn", "output tokens of all calls")
TURN_COST_USD: Final = _name("turn.cost_usd", float, "turn", "cost of all calls with a known price", unit="USD")
TURN_LATENCY_MS: Final = _name("turn.latency_ms", int, "turn", "working", unit="ms")
TURN_WAIT_MS: Final = _name("turn.wait_ms", int, "turn", "waiting for a person", unit="ms")
TURN_TIME_TO_FIRST_TOKEN_MS: Final = _name(
    "turn.time_to_first_token_ms", int, "turn, generation", "streaming only", unit="ms"
)
TURN_STATUS: Final = _name("turn.status", str, "turn", "completed, interrupted, failed or abandoned")
TURN_INTENT: Final = _name("turn.intent", str, "turn", "set by the app")
TURN_ATTEMPT: Final = _name("turn.attempt", int, "node", "which attempt it is, on those after the first")
TURN_HANDOFF_TO: Final = _name("turn.handoff_to", str, "tool", "the agent that a tool handed over to")
TURN_FORKED_FROM: Final = _name("turn.forked_from", str, "turn", "the turn that it replays from a checkpoint")
TURN_STEP: Final = _name("turn.step", int, "node", "LangGraph's step")

# --- the context window -----------------------------------------------------------------------------------------------
CONTEXT_TOKENS: Final = _name("context.tokens", int, "node", "the state's context_tokens, on tracked nodes")
CONTEXT_CURRENT_TOKENS: Final = _name(
    "context.current_tokens", int, "generation, context.prune", "tokens counted in what the model is given"
)
CONTEXT_NEW_TOKENS: Final = _name(
    "context.new_tokens", int, "generation, context.prune", "of them in messages that came since the model's last call"
)
CONTEXT_LIMIT: Final = _name("context.limit", int, "generation, context.prune", "tokens that the model can be given")
CONTEXT_PRUNED: Final = _name("context.pruned", bool, "turn, generation, context.prune", "whether something was pruned")
CONTEXT_MESSAGES_PRUNED: Final = _name(
    "context.messages_pruned", int, "turn, context.prune", "messages that were dropped or replaced"
)
CONTEXT_TOKENS_PRUNED: Final = _name(
    "context.tokens_pruned", int, "turn, context.prune", "tokens that pruning took out of what the model is given"
)
CONTEXT_STRATEGY: Final = _name("context.strategy", str, "context.prune", "what chose the messages to prune")
CONTEXT_TRIGGER: Final = _name("context.trigger", str, "context.prune", "threshold, limit or external")
CONTEXT_TOKENIZER: Final = _name(
    "context.tokenizer", str, "context.prune", "what counted: an encoding, an encoding as an ~estimate, or provider"
)
CONTEXT_ESTIMATE_ERROR_PCT: Final = _name(
    "context.estimate_error_pct", float, "generation", "our count against the provider's input tokens", unit="percent"
)

# --- journeys ---------------------------------------------------------------------------------------------------------
JOURNEY_NAME: Final = _name("journey.name", str, "journey.stage, session.end", "the journey")
JOURNEY_STAGE: Final = _name("journey.stage", str, "journey.stage, session.end", "its stage")
JOURNEY_STAGE_NUMBER: Final = _name("journey.stage_number", int, "journey.stage", "number of the stage, from 1")
JOURNEY_TOTAL_STAGES: Final = _name("journey.total_stages", int, "journey.stage", "how many stages there are")
JOURNEY_TIME_IN_STAGE_MS: Final = _name(
    "journey.time_in_stage_ms", int, "journey.stage", "in the stage that was left", unit="ms"
)
JOURNEY_CONVERTED: Final = _name("journey.converted", bool, "journey.stage, session.end", "whether it was converted")
JOURNEY_CONVERSION_TURN: Final = _name(
    "journey.conversion_turn", int, "journey.stage, session.end", "number of the turn in which it was converted"
)
JOURNEY_CONVERSION_TIME_MS: Final = _name(
    "journey.conversion_time_ms", int, "journey.stage, session.end", "from its first stage to its conversion", unit="ms"
)

# --- drop-off ---------------------------------------------------------------------------------------------------------
DROPOFF_DETECTED: Final = _name(
    "dropoff.detected", bool, "session.end", "the sitting ended by silence while something was open"
)
DROPOFF_LAST_TURN: Final = _name("dropoff.last_turn", int, "session.end", "number of the last turn")
DROPOFF_LAST_INTENT: Final = _name("dropoff.last_intent", str, "session.end", "what the user wanted in it")
DROPOFF_AGENT_LAST_ACTION: Final = _name(
    "dropoff.agent_last_action", str, "session.end", "asked_question, answered, called_tool, failed or interrupted"
)
DROPOFF_TIME_SINCE_LAST_TURN_MS: Final = _name(
    "dropoff.time_since_last_turn_ms", int, "session.end", "from the end of the last turn", unit="ms"
)

# --- names of others that we set --------------------------------------------------------------------------------------
LANGFUSE_TRACE_NAME: Final = _name("langfuse.trace.name", str, "turn", "name of the trace", source="Langfuse")
LANGFUSE_TRACE_TAGS: Final = _name("langfuse.trace.tags", tuple, "turn", "tags given by the app", source="Langfuse")
LANGFUSE_OBSERVATION_TYPE: Final = _name(
    "langfuse.observation.type", str, "all", "agent, chain, generation, tool, retriever or event", source="Langfuse"
)
LANGFUSE_OBSERVATION_INPUT: Final = _name(
    "langfuse.observation.input", str, "turn, session.start, session.end", "JSON; what it holds", source="Langfuse"
)
LANGFUSE_OBSERVATION_OUTPUT: Final = _name(
    "langfuse.observation.output", str, "turn, session.start, session.end", "JSON; what it holds", source="Langfuse"
)
LANGFUSE_OBSERVATION_LEVEL: Final = _name(
    "langfuse.observation.level", str, "spans that failed", "ERROR or WARNING", source="Langfuse"
)
LANGFUSE_STATUS_MESSAGE: Final = _name(
    "langfuse.observation.status_message", str, "spans that failed", "class of the error", source="Langfuse"
)
LANGFUSE_COST_DETAILS: Final = _name(
    "langfuse.observation.cost_details", str, "generation", "JSON of US dollars", unit="USD", source="Langfuse"
)
LANGFUSE_COMPLETION_START_TIME: Final = _name(
    "langfuse.observation.completion_start_time", str, "generation", "first token", unit="ISO 8601", source="Langfuse"
)
LANGFUSE_PROMPT_NAME: Final = _name(
    "langfuse.observation.prompt.name", str, "generation", "the linked prompt of Langfuse's", source="Langfuse"
)
LANGFUSE_PROMPT_VERSION: Final = _name(
    "langfuse.observation.prompt.version", int, "generation", "version of that prompt", source="Langfuse"
)
LANGFUSE_IS_APP_ROOT: Final = _name(
    "langfuse.internal.is_app_root", bool, "turn", "as Langfuse's SDK marks the root of a trace", source="Langfuse"
)
LANGFUSE_METADATA_PREFIX: Final = "langfuse.observation.metadata."

GEN_AI_OPERATION_NAME: Final = _name(
    "gen_ai.operation.name", str, "agent run, generation, tool", "invoke_agent, chat, execute_tool", source="OTel GenAI"
)
GEN_AI_AGENT_NAME: Final = _name("gen_ai.agent.name", str, "agent run", "name of the graph", source="OTel GenAI")
GEN_AI_TOOL_NAME: Final = _name("gen_ai.tool.name", str, "tool", "name of the tool", source="OTel GenAI")
GEN_AI_PROVIDER_NAME: Final = _name(
    "gen_ai.provider.name", str, "generation", "vendor of the model", source="OTel GenAI"
)
GEN_AI_REQUEST_MODEL: Final = _name("gen_ai.request.model", str, "generation", "model asked for", source="OTel GenAI")
GEN_AI_RESPONSE_MODEL: Final = _name(
    "gen_ai.response.model", str, "generation", "model that answered", source="OTel GenAI"
)
GEN_AI_INPUT_TOKENS: Final = _name(
    "gen_ai.usage.input_tokens", int, "generation", "all input tokens, cached ones included", source="OTel GenAI"
)
GEN_AI_OUTPUT_TOKENS: Final = _name(
    "gen_ai.usage.output_tokens", int, "generation", "all output tokens, reasoning included", source="OTel GenAI"
)
GEN_AI_CACHE_READ_TOKENS: Final = _name(
    "gen_ai.usage.cache_read.input_tokens", int, "generation", "of the input, read from a cache", source="OTel GenAI"
)
GEN_AI_CACHE_CREATION_TOKENS: Final = _name(
    "gen_ai.usage.cache_creation.input_tokens",
    int,
    "generation",
    "of the input, written to a cache",
    source="OTel GenAI",
)
GEN_AI_REASONING_TOKENS: Final = _name(
    "gen_ai.usage.reasoning.output_tokens", int, "generation", "of the output, for reasoning", source="OTel GenAI"
)
ERROR_TYPE: Final = _name("error.type", str, "spans that failed", "class of the error, never its text", source="OTel")

ATTRIBUTES: Final[Mapping[str, Attribute]] = MappingProxyType(_TABLE)
"""All names by name."""

EVERY_SPAN: Final = tuple(name for name, attribute in _TABLE.items() if attribute.every)
"""The names that every span of a turn carries when they are known."""

REQUIRED_ON_EVERY_SPAN: Final = (
    SESSION_ID,
    CONVERSATION_ID,
    GEN_AI_CONVERSATION_ID,
    CONVERSATION_TURN_NUMBER,
    TURN_ID,
    TURN_NUMBER,
)
"""Those of `EVERY_SPAN` that are always known."""
