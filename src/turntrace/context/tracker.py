"""Fitting messages into a model's window, and putting every decision on record."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress, count
from operator import attrgetter
from typing import Any, Final

from langchain_core.messages import BaseMessage, RemoveMessage

from turntrace.boundary import caught, never_breaks, traceback_of
from turntrace.context import calibration
from turntrace.context.counter import REPLY_TOKENS, Counter, MessageCounter, read_messages, role_of
from turntrace.context.limits import window_of
from turntrace.context.overfull import Overfull, Pruned
from turntrace.context.strategies import DropOldestTurns, Strategy, apruned, check_strategy, sound
from turntrace.current import current_scope
from turntrace.decisions import PruningDecision, Trigger
from turntrace.errors import ConfigurationError, ContextError, ContextOverflowError, IdentityError, TurntraceError
from turntrace.identity import check_text

logger = logging.getLogger("turntrace")

_SHOWN: Final = 3
_ID: Final = attrgetter("id")
_MOST_TOKENS: Final = 10**12


@dataclass(frozen=True, slots=True)
class Window:
    """What a model is to be given.

    Attributes:
        messages: The messages, the oldest first.
        tokens: Their tokens, those of the tools and of the reply's priming included.
        decision: What was decided, also when nothing was pruned.
    """

    messages: list[BaseMessage]
    tokens: int
    decision: PruningDecision
    _removed: tuple[str, ...] = field(default=(), repr=False)
    _put_in: tuple[BaseMessage, ...] = field(default=(), repr=False)

    @property
    def update(self) -> list[BaseMessage]:
        """The update for the graph's messages that makes the pruning last: what to remove, and what to put in.

        Without it only what the model is given is pruned. It takes ids, which LangGraph gives to every message of a
        state; empty when nothing was pruned.
        """
        return [*(RemoveMessage(id=each) for each in self._removed), *self._put_in]


class ContextTracker:
    """Counts the messages that a model is to be given, prunes them when they are too many, and records what it did.

    ::

        context = ContextTracker(model="gpt-4o")

        def agent(state):
            window = context.fit(state["messages"])
            return {"messages": [llm.invoke(window.messages)], "context_tokens": window.tokens}

    Inside a turn (a node, a tool, a turn's block, and what they call) each decision goes on the record of the turn by
    itself: on its spans, in the ledger, and, from a tracked node, in the state's ``context_tokens``. One object serves
    all threads and tasks.

    Args:
        model: Name of the model: it says how tokens are counted and how many it can be given.
        limit: Tokens that the model can be given. Default: the model's window, by the list of genai-prices.
        threshold: Share of the limit, over 0 and at most 1, above which the strategy is asked.
        reserve_output: Tokens of the limit that are kept free for the answer.
        strategy: What goes when the messages are too many. Default: `DropOldestTurns`.
        counter: A counter in place of tiktoken, from a list of messages to their tokens (see
            `turntrace.context.counter.MessageCounter`).

    Raises:
        ConfigurationError: If an argument cannot be used, or the window of the model is not known.
    """

    def __init__(
        self,
        model: str,
        *,
        limit: int | None = None,
        threshold: float = 0.8,
        reserve_output: int = 0,
        strategy: Strategy | None = None,
        counter: Counter | None = None,
    ) -> None:
        self.model = _checked_model(model)
        self.limit = _window_of(self.model) if limit is None else _checked_tokens(limit, "limit", least=1)
        self.reserve_output = _checked_tokens(reserve_output, "reserve_output", least=0)
        self.threshold = _checked_share(threshold)
        if self.reserve_output >= self.limit:
            raise ConfigurationError(
                f"reserve_output is {self.reserve_output:,} of a limit of {self.limit:,} tokens, which leaves none for "
                "the messages. Allowed is less than the limit: reserve_output=1000."
            )
        self.strategy: Strategy = DropOldestTurns() if strategy is None else check_strategy(strategy)
        self._counter = MessageCounter(self.model, counter)
        self._most = self.limit - self.reserve_output
        self._target = max(1, math.floor(self._most * self.threshold + 1e-9))

    def __repr__(self) -> str:
        return f"ContextTracker({self.model!r}, limit={self.limit}, strategy={self.strategy!r})"

    @property
    def tokenizer(self) -> str:
        """What counts: an encoding's name, ``o200k_base~estimate`` for models tiktoken does not know, or ``custom``."""
        return self._counter.tokenizer

    # --- counting -----------------------------------------------------------------------------------------------------
    def count(self, messages: Sequence[Any], *, tools: Sequence[Any] = ()) -> int:
        """Return the tokens that a model is given with messages and tools, the reply's priming included.

        Args:
            messages: Messages in any form that LangGraph takes.
            tools: Tools in any form that ``bind_tools`` takes.

        Raises:
            ContextError: If a message or a tool cannot be read.
        """
        counted = sum(self._counter.counts(read_messages(messages)))
        return _scaled(counted + self._around(tools), self._factor)

    def calibrate(self, counted: int, provided: int) -> None:
        """Set a count of `count` against what the provider counted of the same, which corrects later estimates.

        Counts of models that tiktoken knows are not corrected. The adapter calls it after each call of a model.
        """
        if self._counter.is_estimate:
            calibration.learn(self.model, round(counted / self._factor), provided)

    @property
    def _factor(self) -> float:
        return calibration.factor_of(self.model) if self._counter.is_estimate else 1.0

    def _around(self, tools: Sequence[Any]) -> int:
        return REPLY_TOKENS + (self._counter.of_tools(tools) if tools else 0)

    # --- fitting ------------------------------------------------------------------------------------------------------
    def fit(self, messages: Sequence[Any], *, tools: Sequence[Any] = ()) -> Window:
        """Return the messages that the model is to be given, pruned where they are too many.

        Args:
            messages: The messages of the conversation, in any form that LangGraph takes.
            tools: The tools that the model is given with them, in any form that ``bind_tools`` takes; they are counted.

        Raises:
            ContextOverflowError: If what must stay is over the limit.
            ContextError: If a message or a tool cannot be read.
        """
        fitting = self._begin(messages, tools)
        if fitting.trigger is not None:
            overfull = fitting.overfull
            try:
                fitting.pruned = sound(overfull, self.strategy, self.strategy.prune(overfull))
            except Exception as error:
                fitting.pruned = _stand_in(overfull, self.strategy, error)
        return self._finish(fitting)

    async def afit(self, messages: Sequence[Any], *, tools: Sequence[Any] = ()) -> Window:
        """Return what `fit` returns, without blocking the event loop while a strategy waits for a model."""
        fitting = self._begin(messages, tools)
        if fitting.trigger is not None:
            overfull = fitting.overfull
            try:
                fitting.pruned = sound(overfull, self.strategy, await apruned(self.strategy, overfull))
            except Exception as error:
                fitting.pruned = _stand_in(overfull, self.strategy, error)
        return self._finish(fitting)

    def _begin(self, messages: Sequence[Any], tools: Sequence[Any]) -> "_Fitting":
        started = time.perf_counter_ns()
        history = read_messages(messages)
        counts = self._counter.counts(history)
        factor, around = self._factor, self._around(tools)
        tokens = _scaled(sum(counts) + around, factor)
        trigger: Trigger | None = None
        if tokens > self._most:
            trigger = "limit"
        elif tokens > self._target:
            trigger = "threshold"
        return _Fitting(self, started, history, counts, factor, around, tokens, trigger)

    def _finish(self, fitting: "_Fitting") -> Window:
        window = fitting.window()
        _record(window, self)
        if window.tokens > self._most:
            raise _overflow(self, fitting, window)
        return window


@dataclass(slots=True)
class _Fitting:
    """One call of `ContextTracker.fit`: what went in, and what came out."""

    tracker: ContextTracker
    started: int
    messages: list[BaseMessage]
    counts: list[int]
    factor: float
    around: int
    tokens: int
    trigger: Trigger | None
    overfull: Overfull = field(init=False)
    pruned: Pruned | None = None

    def __post_init__(self) -> None:
        if self.trigger is not None:
            tracker = self.tracker
            self.overfull = Overfull(  # its tokens are without the factor
                self.messages,
                self.counts,
                target=int(tracker._target / self.factor) - self.around,
                most=int(tracker._most / self.factor) - self.around,
                count=tracker._counter.count,
            )

    def window(self) -> Window:
        """Return what came out, and the decision."""
        before = self.messages
        removed: tuple[str, ...] = ()
        put_in: tuple[BaseMessage, ...] = ()
        dropped: tuple[str, ...] = ()
        replaced: tuple[str, ...] = ()
        added: tuple[str, ...] = ()
        after, tokens = before, self.tokens
        if self.pruned is not None:
            after, homes = list(self.pruned.messages), self.pruned.homes
            tokens = self._scaled(sum(self.overfull.counts(self.pruned)) + self.around)
            goes = bytearray(b"\1") * len(before)
            for home in homes:
                if home is not None:
                    goes[home] = 0
            ids = list(map(_ID, compress(before, goes)))
            dropped = removed = tuple(ids)
            if not all(ids):
                dropped = tuple([each or f"#{index}" for each, index in zip(ids, compress(count(), goes), strict=True)])
                removed = tuple([each for each in ids if each is not None])
            if homes is not self.pruned.places:
                new = [index for index, place in enumerate(self.pruned.places) if place is None]
                put_in = tuple([after[index] for index in new])
                replaced = tuple([after[index].id or f"#{homes[index]}" for index in new if homes[index] is not None])
                added = tuple([after[index].id or f"#{index}" for index in new if homes[index] is None])
        took = time.perf_counter_ns() - self.started
        decision = PruningDecision(
            at_ns=time.time_ns() - took,
            trigger=self.trigger,
            strategy=type(self.tracker.strategy).__name__,
            tokenizer=self.tracker.tokenizer,
            model=self.tracker.model,
            limit=self.tracker.limit,
            tokens_before=self.tokens,
            tokens_after=tokens,
            new_tokens=self._scaled(self._new()),
            messages_before=len(before),
            messages_after=len(after),
            dropped=dropped,
            replaced=replaced,
            added=added,
            messages_pruned=len(dropped) + len(replaced),
            duration_us=took // 1000,
        )
        return Window(after, tokens, decision, removed, put_in)

    def _scaled(self, tokens: int) -> int:
        return _scaled(tokens, self.factor)

    def _new(self) -> int:
        new = 0
        for message, tokens in zip(reversed(self.messages), reversed(self.counts), strict=True):
            new += tokens
            if role_of(message) == "assistant":
                break
        return new


def _scaled(tokens: int, factor: float) -> int:
    return tokens if factor == 1.0 else math.ceil(tokens * factor - 1e-9)


def _stand_in(overfull: Overfull, strategy: Strategy, error: Exception) -> Pruned:
    """Return what `DropOldestTurns` leaves, where the tracker's own strategy failed."""
    told = error
    if not isinstance(error, TurntraceError):
        logger.debug("turntrace: %s raised:\n%s", type(strategy).__name__, traceback_of(error))
        told = ContextError(
            f"{type(strategy).__name__} is set aside for this call: it raised {type(error).__name__}. "
            "Look at what it calls, as its model; its traceback is logged at DEBUG."
        )
        told.__cause__ = error
    caught("pruning by strategy=... (DropOldestTurns did it instead)", told)
    instead = DropOldestTurns()
    return sound(overfull, instead, instead.prune(overfull))


@never_breaks("recording how messages were fitted")
def _record(window: Window, tracker: ContextTracker) -> None:
    scope = current_scope()
    turn = None if scope is None else scope.turn
    if turn is not None:
        turn.note_fit(window.decision, window.messages, tracker)


def _overflow(tracker: ContextTracker, fitting: _Fitting, window: Window) -> ContextOverflowError:
    left, counts = window.messages, tracker._counter.counts(window.messages)
    positions = range(len(left)) if fitting.pruned is None else fitting.pruned.homes
    biggest = tuple(
        (-1 if (at := positions[index]) is None else at, role_of(left[index]), _scaled(counts[index], fitting.factor))
        for index in sorted(range(len(left)), key=lambda index: -counts[index])[:_SHOWN]
    )
    named = ", ".join(
        f"{'a new message' if at < 0 else f'message {at}'} ({role}, {tokens:,})" for at, role, tokens in biggest
    )
    most = tracker.limit - tracker.reserve_output
    return ContextOverflowError(
        f"The messages have {window.tokens:,} tokens after {tracker.strategy!r} and {most:,} fit: "
        f"{window.tokens - most:,} too many. The biggest: {named or 'none; the tools alone are too big'}. "
        "Shorten what goes into them, use a strategy that drops more, or a model with a larger window (limit=...).",
        tokens=window.tokens,
        limit=most,
        biggest=biggest,
    )


# --- what a tracker is given ------------------------------------------------------------------------------------------
def _checked_model(model: Any) -> str:
    if not isinstance(model, str) or not model:
        what = "empty" if isinstance(model, str) else f"a {type(model).__name__}"
        raise ConfigurationError(f"model is {what}. Allowed is the name of the model: ContextTracker(model='gpt-4o').")
    try:
        return check_text(model, "model")
    except IdentityError as error:
        raise ConfigurationError(str(error)) from error


def _window_of(model: str) -> int:
    found = window_of(model)
    if found is None:
        raise ConfigurationError(
            f"The window of the model {model!r} is not known to genai-prices. Say it: ContextTracker(model={model!r}, "
            "limit=128_000), or pass the name that the vendor gives the model."
        )
    return found


def _checked_tokens(value: Any, name: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_TOKENS:
        is_too_large = isinstance(value, int) and value > _MOST_TOKENS
        bound = f"at most {_MOST_TOKENS:,}" if is_too_large else f"at least {least}"
        raise ConfigurationError(f"{name} is {value!r:.40}. Allowed is a whole number of tokens, {bound}: {name}=4000.")
    return value


def _checked_share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        hint = f"threshold={value / 100:g}" if isinstance(value, int | float) and 1 < value <= 100 else "threshold=0.8"
        raise ConfigurationError(f"threshold is {value!r:.40}. Allowed is a share over 0 and at most 1: {hint}.")
    return float(value)
