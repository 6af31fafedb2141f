"""The strategy that has a chat model sum up what it drops."""

import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Final, TypeAlias

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig

from turntrace.content import read_message, to_json
from turntrace.context.counter import role_of
from turntrace.context.overfull import SUMMARY_KEY, Overfull, is_summary
from turntrace.context.strategies import check_count, oldest_turns
from turntrace.errors import ConfigurationError, ContextError
from turntrace.identity import new_id

PROMPT: Final = """\
You keep the running summary of a conversation between a user and an assistant. The assistant will see your summary in \
place of the messages. Keep what it needs to go on: who the user is, what they want, what was decided, done, found out \
and promised, names, numbers and ids to the letter, and what is still open. Write plain sentences, the most important \
first, at most {words} words. Answer with the summary alone.

The summary so far:
{summary}

The messages since:
{messages}"""

HEADING: Final = "Summary of the conversation so far:\n"
"""What stands before the summary in the message that the model is given."""

_CONFIG: Final[RunnableConfig] = {"run_name": "summarize", "tags": ["nostream"]}  # not to be streamed to the user
_REMEMBERED: Final = 10_000
_CHARACTERS_A_TOKEN: Final = 3
_WORDS_A_TOKEN: Final = 0.6

_Asking: TypeAlias = Generator[str, str, Sequence[BaseMessage]]


class Summarize:
    """Drops the oldest turns and puts a summary by a chat model in their place.

    The summary is one message, at the place of the oldest one dropped. With `Window.update` it stays in the graph's
    state, and is brought up to date when more is dropped. Without, it is remembered in this process by the ids of the
    messages that it stands for, so the model is asked again only when more must go.

    When it is needed it goes down to half of what the window may have, so that it is not needed at every call. When the
    model fails, `DropOldestTurns` does the work, with a line in the log.

    Args:
        model: The chat model that sums up; a small one will do.
        keep_last: How many of the newest turns are kept whole as long as they fit, at least 1.
        summary_tokens: Tokens that are kept free for the summary; the model is asked for as many words.
        piece_tokens: Tokens of messages that the model is given at once; more are summed up piece by piece.
        prompt: What it is asked, with ``{summary}``, ``{messages}`` and perhaps ``{words}``.
    """

    def __init__(
        self,
        model: BaseChatModel,
        *,
        keep_last: int = 2,
        summary_tokens: int = 500,
        piece_tokens: int = 8_000,
        prompt: str = PROMPT,
    ) -> None:
        if not (callable(getattr(model, "invoke", None)) and callable(getattr(model, "ainvoke", None))):
            raise ConfigurationError(
                f"model is a {type(model).__name__}. Allowed is a chat model: "
                "Summarize(init_chat_model('gpt-4o-mini'))."
            )
        missing = [name for name in ("{summary}", "{messages}") if name not in prompt]
        if missing:
            raise ConfigurationError(
                f"prompt lacks {' and '.join(missing)}. Write where the summary so far and the messages are to stand."
            )
        self._model = model
        self._keep_last = check_count(keep_last, "keep_last", least=1)
        self._summary_tokens = check_count(summary_tokens, "summary_tokens", least=1)
        self._piece_tokens = check_count(piece_tokens, "piece_tokens", least=100)
        self._prompt = prompt
        self._known: OrderedDict[str, tuple[list[str], str]] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Summarize({type(self._model).__name__}, keep_last={self._keep_last})"

    def prune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        """Return the summary of the oldest turns, and the others."""
        asking = self._asking(overfull)
        try:
            question = next(asking)
            while True:
                question = asking.send(_text_of(self._model.invoke(question, _CONFIG)))
        except StopIteration as done:
            found: Sequence[BaseMessage] = done.value
            return found

    async def aprune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        """Return what `prune` returns, waiting for the model without blocking the event loop."""
        asking = self._asking(overfull)
        try:
            question = next(asking)
            while True:
                question = asking.send(_text_of(await self._model.ainvoke(question, _CONFIG)))
        except StopIteration as done:
            found: Sequence[BaseMessage] = done.value
            return found

    def _asking(self, overfull: Overfull) -> _Asking:
        """Yield what the model is to be asked, be sent its answers, and return the messages."""
        messages = overfull.messages
        standing = next((index for index, message in enumerate(messages) if is_summary(message)), None)
        free = overfull.target - self._summary_tokens + (0 if standing is None else overfull.tokens[standing])
        needed = sorted(oldest_turns(overfull, self._keep_last, until=free))
        if not needed:
            return messages
        known = self._remembered(messages, needed)
        if known is None or not set(needed) <= set(known[0]):
            gone = sorted(oldest_turns(overfull, self._keep_last, until=free // 2))
            done, summary = (
                ([], _text_of(messages[standing]) if standing is not None else "") if known is None else known
            )
            gone = sorted({*gone, *done})
            for piece in self._pieces(overfull, [index for index in gone if index not in set(done)]):
                words = int(self._summary_tokens * _WORDS_A_TOKEN)
                summary = yield (
                    self._prompt.replace("{words}", str(words))
                    .replace("{summary}", summary or "(none yet)")
                    .replace("{messages}", piece)
                )
                if not summary.strip():
                    raise ContextError(f"{self!r} got an empty summary from its model.")
            self._remember(messages, gone, summary)
        else:
            gone, summary = known
        return self._with_summary(overfull, gone, standing, summary.removeprefix(HEADING))

    def _with_summary(
        self, overfull: Overfull, gone: list[int], standing: int | None, summary: str
    ) -> Sequence[BaseMessage]:
        place = gone[0] if standing is None else standing
        # Under the id of the message whose place it takes, so that a state's reducer puts it there too.
        message = HumanMessage(
            HEADING + summary, id=overfull.messages[place].id or new_id(), additional_kwargs={SUMMARY_KEY: True}
        )
        rest = set(gone) - {place}
        kept = [
            message if index == place else each for index, each in enumerate(overfull.messages) if index not in rest
        ]
        left = overfull.again(kept, overfull.places(kept))
        if left.total <= left.target:
            return kept
        return left.without(oldest_turns(left, self._keep_last, until=left.target))  # it came out longer than asked for

    def _pieces(self, overfull: Overfull, indexes: Sequence[int]) -> Iterator[str]:
        lines: list[str] = []
        size = 0
        for index in indexes:
            tokens = min(overfull.tokens[index], self._piece_tokens)
            if lines and size + tokens > self._piece_tokens:
                yield "\n".join(lines)
                lines, size = [], 0
            lines.append(_line(overfull.messages[index], self._piece_tokens * _CHARACTERS_A_TOKEN))
            size += tokens
        if lines:
            yield "\n".join(lines)

    # --- what was summed up before ------------------------------------------------------------------------------------
    def _remembered(self, messages: Sequence[BaseMessage], needed: Sequence[int]) -> tuple[list[int], str] | None:
        """Return the indexes that a known summary stands for, and the summary, where it is one of these messages."""
        known = self._known.get(messages[needed[0]].id or "")
        if known is None:
            return None
        ids, summary = known
        place = {message.id: index for index, message in enumerate(messages)}
        indexes = [place.get(each) for each in ids]
        found = [index for index in indexes if index is not None]
        return (found, summary) if len(found) == len(ids) else None

    def _remember(self, messages: Sequence[BaseMessage], gone: Sequence[int], summary: str) -> None:
        ids = [messages[index].id for index in gone]
        known = [each for each in ids if each is not None]
        if len(known) < len(ids):
            return
        with self._lock:
            self._known[known[0]] = (known, summary)
            self._known.move_to_end(known[0])
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)


def _text_of(message: BaseMessage) -> str:
    read = read_message(message)
    return "" if read is None else read.text


def _line(message: BaseMessage, most: int) -> str:
    text = _text_of(message)
    if isinstance(message, AIMessage):
        calls: list[Any] = [*message.tool_calls, *message.invalid_tool_calls]
        text += "".join(f" [calls {call['name']} with {to_json(call['args'])}]" for call in calls)
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} [...] {text[-most // 3 :]}"
    return f"{role_of(message)}: {text}"
