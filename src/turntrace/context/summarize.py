"""The strategy that has a chat model sum up what it drops."""

import re
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig

from turntrace.content import read_message, to_json
from turntrace.context.counter import role_of
from turntrace.context.overfull import SUMMARY_KEY, Overfull
from turntrace.context.strategies import check_count, oldest_turns
from turntrace.errors import ConfigurationError, ContextError
from turntrace.identity import new_id

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

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
_PLACES: Final = re.compile(r"\{(?:summary|messages|words)\}")
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
        model: "BaseChatModel",
        *,
        keep_last: int = 2,
        summary_tokens: int = 500,
        piece_tokens: int = 8_000,
        prompt: str = PROMPT,
    ) -> None:
        self._model = _checked_model(model)
        self._keep_last = check_count(keep_last, "keep_last", least=1)
        self._summary_tokens = check_count(summary_tokens, "summary_tokens", least=1)
        self._piece_tokens = check_count(piece_tokens, "piece_tokens", least=100)
        self._prompt = _checked_prompt(prompt)
        self._known: OrderedDict[int, tuple[list[int], str]] = OrderedDict()
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
        standing = overfull.summaries[0] if overfull.summaries else None
        held = 0 if standing is None else overfull.tokens[standing]
        spare = max(0, self._summary_tokens - held)  # what the summary may take beside what it takes now
        free, most = overfull.target - spare, overfull.most - spare
        needed = oldest_turns(overfull, self._keep_last, until=free, most=most)
        if overfull.total_without(needed) > most:  # no room for a summary beside what must stay
            gone = oldest_turns(overfull, self._keep_last, until=overfull.target, most=overfull.most)
            return overfull.without(overfull.with_summaries(gone))
        if not needed:
            return overfull.messages
        done, summary = self._remembered(overfull, min(needed)) or (set(), None)
        if summary is not None and needed <= done:
            return self._with_summary(overfull, done, standing, summary)
        if summary is None and standing is not None:
            summary = _text_of(overfull.messages[standing]).removeprefix(HEADING)
        gone = oldest_turns(overfull, self._keep_last, until=free // 2, most=most) | done
        for piece in self._pieces(overfull, sorted(gone - done)):
            summary = yield self._question(summary or "(none yet)", piece)
            if not summary.strip():
                raise ContextError(f"{self!r} got an empty summary from its model.")
        pruned = self._with_summary(overfull, gone, standing, summary or "")
        self._remember(overfull, gone, summary or "")
        return pruned

    def _question(self, summary: str, piece: str) -> str:
        words = str(int(self._summary_tokens * _WORDS_A_TOKEN))
        told = {"{summary}": summary, "{messages}": piece, "{words}": words}
        return _PLACES.sub(lambda found: told[found[0]], self._prompt)

    def _with_summary(
        self, overfull: Overfull, gone: set[int], standing: int | None, summary: str
    ) -> Sequence[BaseMessage]:
        place = min(gone) if standing is None else standing
        # Under the id of the message whose place it takes, so that a state's reducer puts it there too.
        message = HumanMessage(
            HEADING + summary, id=overfull.messages[place].id or new_id(), additional_kwargs={SUMMARY_KEY: True}
        )
        rest = gone - {place}
        kept = [
            message if index == place else each for index, each in enumerate(overfull.messages) if index not in rest
        ]
        left = overfull.again(overfull.read(kept))
        if left.total <= left.target:
            return kept
        more = oldest_turns(left, self._keep_last, until=left.target, most=left.most)  # it is longer than asked for
        if (total := left.total_without(more)) > left.most:
            raise ContextError(
                f"{self!r} got a summary that does not fit: {total - left.most:,} tokens too many. Give it more room "
                f"(summary_tokens={overfull.count(message)}), or a model that keeps to the words that it is asked for."
            )
        return left.without(more)

    def _pieces(self, overfull: Overfull, indexes: Sequence[int]) -> Iterator[str]:
        lines: list[str] = []
        size = 0
        for index in indexes:
            tokens = min(overfull.tokens[index], self._piece_tokens)
            if size + tokens > self._piece_tokens:
                yield "\n".join(lines)
                lines, size = [], 0
            lines.append(_line(overfull.messages[index], self._piece_tokens * _CHARACTERS_A_TOKEN))
            size += tokens
        if lines:
            yield "\n".join(lines)

    # --- what was summed up before ------------------------------------------------------------------------------------
    def _remembered(self, overfull: Overfull, first: int) -> tuple[set[int], str] | None:
        """Return the indexes that a known summary stands for, and the summary, where it is one of these messages."""
        known = self._known.get(_print_of(overfull.messages[first]))
        if known is None:
            return None
        prints, summary = known
        place = {_print_of(message): index for index, message in enumerate(overfull.messages)}
        done = {place[each] for each in prints if each in place}
        together = all(done.issuperset(overfull.together(index)) for index in done)
        # Messages can have been taken back since, so that one of them is the user's newest.
        return (done, summary) if len(done) == len(prints) and together and done.isdisjoint(overfull.pinned) else None

    def _remember(self, overfull: Overfull, gone: set[int], summary: str) -> None:
        messages = [overfull.messages[index] for index in sorted(gone)]
        if any(message.id is None for message in messages):
            return
        prints = [_print_of(message) for message in messages]
        with self._lock:
            self._known[prints[0]] = (prints, summary)
            self._known.move_to_end(prints[0])
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)


def _print_of(message: BaseMessage) -> int:
    """Return a hash of a message: ids alone may be those of another conversation, as in imported ones."""
    content: Any = message.content
    return hash((message.id, message.type, content if isinstance(content, str) else to_json(content)))


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


def _checked_model(model: Any) -> "BaseChatModel":
    if isinstance(model, type) or not all(callable(getattr(model, name, None)) for name in ("invoke", "ainvoke")):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ConfigurationError(
            f"model is {what}. Allowed is a chat model: Summarize(init_chat_model('gpt-4o-mini'))."
        )
    found: BaseChatModel = model
    return found


def _checked_prompt(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise ConfigurationError(f"prompt is {prompt!r:.40}. Allowed is a text with {{summary}} and {{messages}}.")
    missing = [name for name in ("{summary}", "{messages}") if name not in prompt]
    if missing:
        raise ConfigurationError(
            f"prompt lacks {' and '.join(missing)}. Write where the summary so far and the messages are to stand."
        )
    return prompt
