"""The model of the demo: it streams what the script says, and counts tokens as a provider would."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import ToolCallChunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult

from turntrace.demo.desk_script import ANSWERS, Answer, Ask, Outage

_THINKING_S: Final = 0.04
_WORD_S: Final = 0.002
_CHARACTERS_A_TOKEN: Final = 4
"""Good enough for a demo; a provider counts exactly."""
_FRAME_TOKENS: Final = 4


class DeskModel(BaseChatModel):
    """A chat model that answers by the script, word by word."""

    model: str = "gpt-4o-mini"
    streaming: bool = True

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return LangSmithParams(ls_provider="openai", ls_model_name=self.model, ls_model_type="chat")

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        time.sleep(_THINKING_S)
        for chunk in _chunks(self.model, messages):
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk
            time.sleep(_WORD_S)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        await asyncio.sleep(_THINKING_S)
        for chunk in _chunks(self.model, messages):
            if run_manager is not None:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk
            await asyncio.sleep(_WORD_S)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, run_manager, **kwargs))


def count_tokens(messages: Sequence[BaseMessage]) -> int:
    """Return how many tokens the model is given with these messages, as it counts them itself."""
    return sum(_tokens(str(message.content)) + _FRAME_TOKENS for message in messages)


def _chunks(model: str, messages: Sequence[BaseMessage]) -> Iterator[ChatGenerationChunk]:
    answer = _answer(messages)
    if isinstance(answer, Outage):
        raise TimeoutError("the model's provider did not answer")
    if isinstance(answer, Ask):
        arguments = json.dumps(answer.arguments)
        call = ToolCallChunk(name=answer.tool, args=arguments, id=f"call_{len(messages)}", index=0)
        yield ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[call]))
        made = _tokens(answer.tool + arguments)
    else:
        for word in answer.split(" "):
            yield ChatGenerationChunk(message=AIMessageChunk(content=f"{word} "))
        made = _tokens(answer)
    given = count_tokens(messages)
    usage = UsageMetadata(input_tokens=given, output_tokens=made, total_tokens=given + made)
    last = AIMessageChunk(
        content="", usage_metadata=usage, response_metadata={"model_name": model}, chunk_position="last"
    )
    yield ChatGenerationChunk(message=last)


def _answer(messages: Sequence[BaseMessage]) -> Answer:
    """Return what the script says to the user's last message, after as many answers as there are to it already."""
    answered = 0
    for message in reversed(messages):
        if isinstance(message, HumanMessage):
            return ANSWERS[str(message.content)][answered]
        answered += isinstance(message, AIMessage)
    raise ValueError("The model was given no message of a user.")


def _tokens(text: str) -> int:
    return len(text) // _CHARACTERS_A_TOKEN + 1
