"""Pure functions from what LangChain and LangGraph hand over to facts."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langgraph.errors import GraphBubbleUp, GraphInterrupt
from langgraph.types import Command, Send

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.boundary import never_breaks
from turntrace.content import last_message
from turntrace.identity import as_text, safe_id, safe_text
from turntrace.records import LLMCall, TurnRequest, Usage

HIDDEN_TAG: Final = "langsmith:hidden"
_STEP_TAG: Final = "graph:step:"
_STEP_DIGITS: Final = 9
_EDIT: Final = "UpdateState"
_INTERRUPTS: Final = "__interrupt__"
_SENT: Final = "__pregel_push"
_TASK_PATH: Final = 4
_ERROR_HANDLER: Final = "__error_handler__"
_PROMPT_KEY: Final = "langfuse_prompt"
_MAX_VERSION: Final = 2**31 - 1
_MOST_TOKENS: Final = 10**12
"""More is no count of tokens, and a few of them would be more than a database holds."""
_MOST_USD: Final = 10**6
"""More is no price of a call."""
_SERVICE_TIERS: Final = ("", "flex_", "priority_")
"""What langchain-openai writes before the kinds of tokens of a call, by the service tier that it was made in."""
_WRITTEN_TO_CACHE: Final = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")
"""Under these langchain-anthropic and langchain-aws tell what was written to a cache, and 0 as ``cache_creation``."""
_TEXTS: Final = frozenset({"channel", "topic", "tier", "org_id", "locale", "client_version"})
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
_REQUEST_KEYS: Final = _TEXTS | {
    *("session_id", "user_id", "conversation_id", "thread_id"),
    *("langfuse_session_id", "langfuse_user_id", "langfuse_tags"),
}


def request_of(metadata: Mapping[str, Any], given: Mapping[str, Any] = MappingProxyType({})) -> TurnRequest:
    """Read what a config's metadata says about the turn that its run is to be.

    Langfuse's own keys (``langfuse_session_id``, ``langfuse_user_id``, ``langfuse_tags``) mean the same as ours. An id
    that Langfuse would refuse is replaced by a hash of it, so that its turns stay together. What cannot be read at all
    (an id that is a list, an object that has no text) is told once and left out: the turn is recorded without it.

    Args:
        metadata: The metadata.
        given: What the run was given beside it, by the same names; it counts where the metadata says nothing.
    """
    said = {name: value for name, value in metadata.items() if name in _REQUEST_KEYS and is_said(value)}
    if given:
        said = {**{name: value for name, value in given.items() if name in _REQUEST_KEYS}, **said}
    tags = said.get("langfuse_tags", ())
    return TurnRequest(
        session_id=_first(_id, said, "session_id", "langfuse_session_id"),
        user_id=_first(_user, said, "user_id", "langfuse_user_id"),
        conversation_id=_first(_id, said, "conversation_id", "thread_id"),
        tags=tuple(text for tag in (tags if isinstance(tags, list | tuple) else (tags,)) if (text := _text(tag))),
        **{name: _text(said[name]) for name in _TEXTS if name in said},
    )


def is_said(value: Any) -> bool:
    """Tell whether a value of a config says something: not where it is None, or an empty text."""
    return value is not None and not (isinstance(value, str) and not value)


def _first(read: Callable[[Any, str], str | None], said: Mapping[str, Any], *names: str) -> str | None:
    """Return the first of what stands under these names that can be read, or None."""
    return next((found for name in names if name in said and (found := read(said[name], name)) is not None), None)


@never_breaks("reading an id in a config (the turn goes without it)")
def _id(value: Any, name: str) -> str:
    return safe_id(value, name)


@never_breaks("reading an id in a config (the turn goes without it)")
def _user(value: Any, name: str) -> str:
    return as_text(value, name)


@never_breaks("reading a text in a config (the turn goes without it)")
def _text(value: Any) -> str:
    return safe_text(value)


def step_of(tags: Sequence[str] | None) -> int | None:
    """Return LangGraph's step when a run is that of a node, else None."""
    for tag in tags or ():
        if isinstance(tag, str) and tag.startswith(_STEP_TAG):  # the app may put anything beside LangGraph's own
            number = tag[len(_STEP_TAG) :]
            return int(number) if number.isdecimal() and len(number) <= _STEP_DIGITS else 0
    return None


def is_task(metadata: Mapping[str, Any] | None) -> bool:
    """Tell whether a run is that of a task of the functional API, or below one."""
    path = (metadata or {}).get("langgraph_path")
    return isinstance(path, tuple | list) and len(path) == _TASK_PATH and path[0] == _SENT and path[3] is True


def name_of_node(name: str | None) -> str:
    """Return the name of a node or a task; what LangGraph runs when a node has failed is called after that."""
    if isinstance(name, str) and name.startswith(_ERROR_HANDLER):
        return f"{name[len(_ERROR_HANDLER) :]} error handler"
    return name_of(name, "node")


def name_of(name: Any, otherwise: str) -> str:
    """Return a name that an app or a provider gave, as it can be kept; where it is none, another one."""
    return safe_text(name) if isinstance(name, str) and name else otherwise


def arguments_of(arguments: Any) -> Any:
    """Return what a model gave a tool, without what LangGraph injected: the state, a store, a runtime.

    A model's arguments are JSON; what holds anything else is none of them. (Newer versions leave it out themselves.)
    """
    if not isinstance(arguments, Mapping):
        return arguments
    return {name: value for name, value in arguments.items() if _is_json(value)}


def _is_json(value: Any, depth: int = 20) -> bool:
    if value is None or isinstance(value, str | int | float) or depth == 0:
        return True
    if isinstance(value, Mapping):
        return all(_is_json(each, depth - 1) for each in value.values())
    return isinstance(value, list | tuple) and all(_is_json(each, depth - 1) for each in value)


def handed_to(output: Any) -> str | None:
    """Return the agent that a tool handed over to: the node of the graph above that its command goes to, or None."""
    if not isinstance(output, Command) or output.graph != Command.PARENT:
        return None
    goes = output.goto if isinstance(output.goto, list | tuple) else [output.goto]
    names = [each.node if isinstance(each, Send) else each for each in goes]
    return safe_text(", ".join(name for name in names if isinstance(name, str))) or None


def is_hidden(tags: Sequence[str] | None) -> bool:
    """Tell whether LangGraph marks a run as plumbing of its own."""
    return tags is not None and HIDDEN_TAG in tags


def is_inside_graph(metadata: Mapping[str, Any] | None) -> bool:
    """Tell whether a run is below a node of a graph."""
    return metadata is not None and "langgraph_node" in metadata


def messages_of_state(inputs: Any, key: str, metadata: Mapping[str, Any] | None) -> list[Any] | None:
    """Return the messages of the state that a node was given; None when it was given something of its own."""
    path = (metadata or {}).get("langgraph_path")
    if isinstance(path, tuple | list) and path and path[0] == _SENT:
        return None
    messages = inputs.get(key) if isinstance(inputs, Mapping) else getattr(inputs, key, None)
    return messages if isinstance(messages, list) and messages else None


def namespace_of(metadata: Mapping[str, Any] | None) -> str:
    """Return LangGraph's checkpoint namespace of a node: ``outer:id|inner:id``; empty outside of nodes."""
    namespace = (metadata or {}).get("langgraph_checkpoint_ns")
    return namespace if isinstance(namespace, str) else ""


def tools_of(options: Mapping[str, Any]) -> Sequence[Any]:
    """Return the schemas of the tools that a call of a model is given."""
    params = options.get("invocation_params")
    tools = params.get("tools") if isinstance(params, Mapping) else None
    return tools if isinstance(tools, list | tuple) else ()


def prompt_of(metadata: Mapping[str, Any] | None) -> Mapping[str, AttributeValue] | None:
    """Return the attributes that link a generation to the prompt of Langfuse's that a run's metadata names.

    Returns:
        None when it names no prompt; nothing when it names one that cannot be linked: a fallback that stands for a
        prompt that could not be fetched, or something that is none.
    """
    prompt = None if metadata is None else metadata.get(_PROMPT_KEY)
    if prompt is None:
        return None
    try:
        if not prompt:
            return None
        name, version = prompt.name, prompt.version
        if getattr(prompt, "is_fallback", False) or not isinstance(name, str) or type(version) is not int:
            return {}
        name.encode()  # what UTF-8 cannot hold cannot be sent
    except Exception:  # the app may put anything there
        return {}
    if not name or not 0 <= version <= _MAX_VERSION:
        return {}
    return {a.LANGFUSE_PROMPT_NAME: name, a.LANGFUSE_PROMPT_VERSION: version}


def checkpoint_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the checkpoint at which a root run is to begin, when its config names one."""
    checkpoint_id = metadata.get("checkpoint_id")
    return checkpoint_id if isinstance(checkpoint_id, str) and checkpoint_id else None


def is_answer(inputs: Any) -> bool:
    """Tell whether a root run was given the answer that a graph waits for: ``Command(resume=...)``."""
    return isinstance(inputs, Command) and inputs.resume is not None


def has_interrupts(outputs: Any) -> bool:
    """Tell whether what a graph gave back says that it stopped to wait for a person."""
    return isinstance(outputs, Mapping) and bool(outputs.get(_INTERRUPTS))


def is_edit_of_state(name: Any) -> bool:
    """Tell whether a root run is how ``update_state`` writes what is edited, and so no run of the graph.

    LangGraph names it after the graph and tells nothing else that holds for every graph and version.
    """
    return isinstance(name, str) and name.endswith(_EDIT)


def message_in(inputs: Any, key: str = "messages") -> Any:
    """Return the message that a root run was given: the last one under the messages key, or None."""
    if isinstance(inputs, Mapping):
        return last_message(inputs.get(key))
    if isinstance(inputs, Command):
        return message_in(inputs.update, key)
    if isinstance(inputs, str | BaseMessage | list):
        return last_message(inputs)
    return last_message(getattr(inputs, key, None))  # of a state that is a dataclass or a model of pydantic


def answer_in(outputs: Any, key: str = "messages") -> Any:
    """Return the messages that a root run gave back, or what stands for them; None when there are none."""
    if isinstance(outputs, Mapping):
        return outputs.get(key)
    if isinstance(outputs, str | BaseMessage | list):
        return outputs
    return getattr(outputs, key, None)


def is_control_flow(error: BaseException) -> bool:
    """Tell whether an error is LangGraph's way to interrupt or to hand over to a parent, and so none."""
    return isinstance(error, GraphBubbleUp)


def is_interrupt(error: BaseException) -> bool:
    """Tell whether an error is LangGraph's way to stop and wait for a person."""
    return isinstance(error, GraphInterrupt)


def name_of_model(metadata: Mapping[str, Any] | None, options: Mapping[str, Any]) -> str | None:
    """Return the name of the model that a call asks for."""
    asked = (metadata or {}).get("ls_model_name")
    if isinstance(asked, str) and asked:
        return safe_text(asked)
    params = options.get("invocation_params")
    if isinstance(params, Mapping):
        for name in ("model", "model_name", "model_id", "deployment_name"):
            if isinstance(value := params.get(name), str) and value:
                return safe_text(value)
    return None


def name_of_provider(metadata: Mapping[str, Any] | None) -> str | None:
    """Return the vendor of the model that a call asks for, as LangChain names it."""
    provider = (metadata or {}).get("ls_provider")
    return safe_text(provider) if isinstance(provider, str) and provider else None


def call_of(result: LLMResult, *, model: str | None, provider: str | None) -> LLMCall:
    """Read what a model's provider said about a call.

    Args:
        result: What the model returned.
        model: The model that was asked for, which counts when the provider does not name one.
        provider: The vendor, as LangChain names it.
    """
    message = message_of(result)
    answered = None if message is None else _mapping(message.response_metadata).get("model_name")
    if not isinstance(answered, str):
        answered = _mapping(result.llm_output).get("model_name")
    return LLMCall(
        model=safe_text(answered) if isinstance(answered, str) and answered else model,
        provider=provider,
        usage=_usage_of_message(message) or _usage_of_output(result.llm_output),
        cost_usd=_cost_of_message(message),
    )


def message_of(result: LLMResult) -> AIMessage | None:
    """Return the message that a chat model answered with, or None."""
    for batch in result.generations:
        for generation in batch:
            if isinstance(generation, ChatGeneration) and isinstance(generation.message, AIMessage):
                return generation.message
    return None


def _usage_of_message(message: AIMessage | None) -> Usage | None:
    usage: Any = None if message is None else message.usage_metadata
    if not isinstance(usage, Mapping):
        return None
    of_input, of_output = _mapping(usage.get("input_token_details")), _mapping(usage.get("output_token_details"))
    return Usage(
        input_tokens=_count(usage.get("input_tokens")),
        output_tokens=_count(usage.get("output_tokens")),
        cache_read_tokens=_in_all_tiers(of_input, "cache_read"),
        cache_creation_tokens=max(
            _in_all_tiers(of_input, "cache_creation"), sum(_count(of_input.get(name)) for name in _WRITTEN_TO_CACHE)
        ),
        reasoning_tokens=_in_all_tiers(of_output, "reasoning"),
    )


def _in_all_tiers(details: Mapping[str, Any], name: str) -> int:
    return sum(_count(details.get(tier + name)) for tier in _SERVICE_TIERS)


def _cost_of_message(message: AIMessage | None) -> float | None:
    """Return what a call cost where that is told beside its tokens: 0 for an answer from LangChain's cache."""
    cost: Any = None if message is None else _mapping(message.usage_metadata).get("total_cost")
    return float(cost) if type(cost) in (int, float) and 0 <= cost <= _MOST_USD else None


def _usage_of_output(output: Mapping[str, Any] | None) -> Usage | None:
    for key in ("token_usage", "usage"):
        usage = _mapping(output).get(key)
        if isinstance(usage, Mapping):
            given = _first_count(usage, "prompt_tokens", "input_tokens")
            made = _first_count(usage, "completion_tokens", "output_tokens")
            if given is not None or made is not None:
                return Usage(input_tokens=given or 0, output_tokens=made or 0)
    return None


def _first_count(usage: Mapping[str, Any], *names: str) -> int | None:
    return next((_count(usage[name]) for name in names if usage.get(name) is not None), None)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value <= _MOST_TOKENS else 0


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return what a provider's integration should have filled in as a mapping; nothing where it is none."""
    return value if isinstance(value, Mapping) else _NOTHING


def answer_of(result: LLMResult) -> Any:
    """Return what a model answered, calls of tools included. Only for policies that let it out."""
    message = message_of(result)
    if message is None:
        return [generation.text for batch in result.generations for generation in batch]
    told: dict[str, Any] = {"role": "assistant", "content": message.content}
    if isinstance(message.tool_calls, list) and message.tool_calls:
        calls = map(_mapping, message.tool_calls)
        told["tool_calls"] = [{"name": call.get("name"), "args": call.get("args")} for call in calls]
    return told
