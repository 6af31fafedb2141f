"""What is recorded of a model's context window: how full it was at a call, and what was pruned to make it fit."""

from dataclasses import dataclass
from typing import Literal

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.records import Record, share_of, word

Trigger = Literal["threshold", "limit", "external"]


@dataclass(frozen=True, slots=True)
class PruningDecision(Record):
    """What was decided about the messages of a model's call: which were given to it, which were not, and why.

    There is one for every call of `turntrace.ContextTracker.fit`, also when nothing was pruned, and one of the trigger
    ``external`` when other code took messages away.

    Attributes:
        at_ns: When, in nanoseconds since 1970.
        trigger: ``threshold``: the tokens were over the tracker's threshold; ``limit``: they were over what the model
            can be given; ``external``: other code pruned; None: nothing was to be done.
        strategy: The strategy that was asked; for ``external`` the node that pruned, as far as that can be told.
        tokenizer: What counted: ``o200k_base``, ``cl100k_base``, ``o200k_base~estimate`` for models that tiktoken does
            not know, ``custom`` for a counter of the app's, ``provider`` where only the provider counted.
        model: The model whose window it is.
        limit: Tokens that the model can be given.
        tokens_before: Tokens of what went in, tools and the reply's priming included; None where nobody counted.
        tokens_after: Tokens of what came out.
        new_tokens: Tokens of the messages since the model's last call: its answer and what came after.
        messages_before: Messages that went in.
        messages_after: Messages that came out.
        dropped: Ids of the messages that went in and did not come out; one without an id by its position, as ``#3``.
        replaced: Ids of the messages whose content was replaced.
        added: Ids of the messages that came out and had not gone in.
        messages_pruned: How many messages were dropped or replaced. (The ledger names in ``dropped`` only those that a
            decision was the first to drop; this counts all.)
        duration_us: How long it took, in microseconds.
    """

    at_ns: int = 0
    trigger: Trigger | None = word(a.CONTEXT_TRIGGER)
    strategy: str | None = word(a.CONTEXT_STRATEGY)
    tokenizer: str | None = word(a.CONTEXT_TOKENIZER)
    model: str | None = None
    limit: int | None = word(a.CONTEXT_LIMIT)
    tokens_before: int | None = None
    tokens_after: int | None = word(a.CONTEXT_CURRENT_TOKENS)
    new_tokens: int | None = word(a.CONTEXT_NEW_TOKENS)
    messages_before: int = 0
    messages_after: int = 0
    dropped: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    messages_pruned: int = word(a.CONTEXT_MESSAGES_PRUNED, default=0)
    duration_us: int = 0

    @property
    def pruned(self) -> bool:
        """Whether messages were dropped or replaced."""
        return self.messages_pruned > 0

    @property
    def tokens_pruned(self) -> int | None:
        """How many tokens less came out than went in; None where nobody counted."""
        if self.tokens_before is None or self.tokens_after is None:
            return None
        return self.tokens_before - self.tokens_after

    def attributes(self) -> dict[str, AttributeValue]:
        """Return the attributes of the event ``context.prune``."""
        rendered = Record.attributes(self)
        rendered[a.CONTEXT_PRUNED] = self.pruned
        if self.tokens_pruned is not None:
            rendered[a.CONTEXT_TOKENS_PRUNED] = self.tokens_pruned
        return rendered


@dataclass(frozen=True, slots=True)
class ContextGiven(Record):
    """What a model was given in one call.

    Attributes:
        messages: How many messages.
        tokens: Their tokens: the provider's count where it gave one, else ours.
        limit: Tokens that the model can be given.
        counted: Tokens as they were counted here, else as the provider counted them.
        new_tokens: Tokens of the messages since the model's last call.
        pruned: Whether something was pruned for this call; None where nobody looked.
        error_pct: Our count against the provider's, in percent of the latter.
    """

    messages: int = word(a.CONVERSATION_MESSAGES_IN_CONTEXT)
    tokens: int | None = word(a.CONVERSATION_CONTEXT_TOKENS)
    limit: int | None = word(a.CONTEXT_LIMIT)
    counted: int | None = word(a.CONTEXT_CURRENT_TOKENS)
    new_tokens: int | None = word(a.CONTEXT_NEW_TOKENS)
    pruned: bool | None = word(a.CONTEXT_PRUNED)
    error_pct: float | None = word(a.CONTEXT_ESTIMATE_ERROR_PCT)

    def attributes(self) -> dict[str, AttributeValue]:
        """Return the attributes that the generation gets."""
        rendered = Record.attributes(self)
        if (share := share_of(self.tokens, self.limit)) is not None:
            rendered[a.CONVERSATION_CONTEXT_WINDOW_PCT] = share
        return rendered
