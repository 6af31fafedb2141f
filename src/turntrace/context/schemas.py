"""How many tokens the schemas of tools are, by the rule that OpenAI published for functions.

Source: https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken ("Counting tokens for chat completions
API calls with tool calls"). The rule speaks of flat parameters; objects and lists in them are counted by the same
rule, a level deeper. For models of other vendors it is an estimate.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from langchain_core.utils.function_calling import convert_to_openai_tool

from turntrace.errors import ContextError
from turntrace.forking import lock_of

_FUNCTION_TOKENS: Final = {"cl100k_base": 10}
_FUNCTION_TOKENS_ELSE: Final = 7
_PROPERTIES_TOKENS: Final = 3
_PROPERTY_TOKENS: Final = 3
_ENUM_TOKENS: Final = -3
_ENUM_ITEM_TOKENS: Final = 3
_END_TOKENS: Final = 12

_DEEPEST: Final = 8
_REMEMBERED: Final = 64


class ToolCounter:
    """Counts the schemas of tools; of the same tools once.

    Args:
        encoding: Name of the encoding.
        of_text: Counts a text.
    """

    def __init__(self, encoding: str, of_text: Callable[[str], int]) -> None:
        self._function_tokens = _FUNCTION_TOKENS.get(encoding, _FUNCTION_TOKENS_ELSE)
        self._of_text = of_text
        # The tools are kept beside their count, so that their places in memory stay theirs.
        self._known: OrderedDict[tuple[int, ...], tuple[list[Any], int]] = OrderedDict()
        self._lock = lock_of(self)

    def __call__(self, tools: Iterable[Any]) -> int:
        """Return the tokens of tools in any form that ``bind_tools`` takes.

        Raises:
            ContextError: If one of them is none of these forms.
        """
        if isinstance(tools, Mapping | str) or not isinstance(tools, Iterable):
            raise ContextError(
                f"tools is a {type(tools).__name__}. Allowed is a list of tools: pass tools=[my_tool] for one."
            )
        tools = list(tools)
        if not tools:
            return 0
        key = tuple(map(id, tools))
        known = self._known.get(key)
        if known is not None:
            return known[1]
        tokens = _END_TOKENS + sum(self._of_tool(tool) for tool in tools)
        with self._lock:
            self._known[key] = (tools, tokens)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return tokens

    def _of_tool(self, tool: Any) -> int:
        schema = _schema_of(tool)
        function = schema.get("function")
        if not isinstance(function, Mapping):  # a tool of the provider's own, as web search
            return self._function_tokens + self._of_text(as_json(schema))
        described = f"{function.get('name', '')}:{_bare(function.get('description'))}"
        parameters = function.get("parameters")
        return self._function_tokens + self._of_text(described) + self._of_properties(parameters, _DEEPEST)

    def _of_properties(self, schema: Any, depth: int) -> int:
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        if not isinstance(properties, Mapping) or not properties or depth == 0:
            return 0
        tokens = _PROPERTIES_TOKENS
        for name, given in properties.items():
            tokens += _PROPERTY_TOKENS
            for said in _alternatives(given):
                values = said.get("enum")
                if isinstance(values, list):
                    tokens += _ENUM_TOKENS
                    tokens += sum(_ENUM_ITEM_TOKENS + self._of_text(str(value)) for value in values)
                tokens += self._of_properties(said, depth - 1) + self._of_properties(said.get("items"), depth - 1)
            kind = "|".join(str(said.get("type", "any")) for said in _alternatives(given))
            described = given.get("description") if isinstance(given, Mapping) else None
            tokens += self._of_text(f"{name}:{kind}:{_bare(described)}")
        return tokens


def as_json(value: Any) -> str:
    """Return a value as JSON, as LangChain writes it; in Python's own words where it has no JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):  # keys that are no text, or a circle
        return str(value)


def _schema_of(tool: Any) -> Mapping[str, Any]:
    if isinstance(tool, Mapping):
        kind = tool.get("type")
        if kind == "function" and "function" not in tool:
            return {"function": tool}  # OpenAI's Responses API
        if kind not in (None, "function", "object") and "input_schema" not in tool:
            return tool
    try:
        return convert_to_openai_tool(tool)
    except Exception as error:  # whatever a function's type hints or a class's schema make of LangChain's reading
        if isinstance(tool, Mapping) and tool:
            return tool
        raise ContextError(
            f"A tool cannot be counted: it is a {type(tool).__name__}. Allowed is what bind_tools takes: tools, "
            "functions with type hints, pydantic classes, and schemas as dicts. Pass tools=[my_tool]."
        ) from error


def _alternatives(given: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(given, Mapping):
        options = given.get("anyOf")
        yield from (each for each in options if isinstance(each, Mapping)) if isinstance(options, list) else (given,)


def _bare(description: Any) -> str:
    return description.removesuffix(".") if isinstance(description, str) else ""
