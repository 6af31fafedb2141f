"""What models were given in a turn, and what was taken out of it, worked out by the writer.

The app's threads only note what they saw: how messages were fitted, which messages a node found in its state, which
ones a model was sent. What was counted is set against what the provider counted, and messages that are gone without
one of our decisions were pruned by other code.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import is_
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from turntrace import attributes as a
from turntrace.boundary import never_breaks
from turntrace.context.limits import window_of
from turntrace.decisions import ContextGiven, PruningDecision
from turntrace.forking import lock_of
from turntrace.lifecycle.steps import Fit, Glimpse, OpenStep, TurnAccount

if TYPE_CHECKING:
    from turntrace.lifecycle.turn import Turn

_IDS_REMEMBERED: Final = 100_000
_ROOT_STATE: Final = (False, "")
_KINDS_OF_ID: Final = {str, type(None)}


# --- what a model was given -------------------------------------------------------------------------------------------
@never_breaks("setting the count of a context against its provider's")
def given_to(step: OpenStep) -> ContextGiven | None:
    """Return what the model of a generation was given; None where it is not known."""
    sent = step.sent
    if sent is None:
        return None
    provided = None if step.call is None or step.call.usage is None else step.call.usage.input_tokens or None
    fit = sent.fit
    if fit is None or not _is_of_fit(sent.messages, fit):
        limit = _window_of(step)
        return ContextGiven(messages=len(sent.messages), tokens=provided, limit=limit, counted=provided)
    counted = _count(sent.messages, sent.tools, fit)
    error = None
    if provided is not None:
        error = round((counted - provided) / provided * 100, 2)
        fit.meter.calibrate(counted, provided)
    return ContextGiven(
        messages=len(sent.messages),
        tokens=provided if provided is not None else counted,
        limit=fit.decision.limit,
        counted=counted,
        new_tokens=fit.decision.new_tokens,
        pruned=fit.decision.pruned,
        error_pct=error,
    )


def _is_of_fit(messages: Sequence[Any], fit: Fit) -> bool:
    """Tell whether what was sent is what was fitted, perhaps with other messages before."""
    if not messages or not fit.window:
        return False
    sent, fitted = messages[-1], fit.window[-1]
    return sent is fitted or (sent.id is not None and sent.id == getattr(fitted, "id", None))


def _count(messages: Sequence[Any], tools: Sequence[Any], fit: Fit) -> int:
    tokens = fit.decision.tokens_after
    is_same = len(messages) == len(fit.window) and all(map(is_, messages, fit.window))
    return tokens if is_same and tokens is not None and not tools else fit.meter.count(messages, tools=tools)


def _window_of(step: OpenStep) -> int | None:
    known = step.known or {}
    model = known.get(a.GEN_AI_REQUEST_MODEL) or (None if step.call is None else step.call.model)
    provider = known.get(a.GEN_AI_PROVIDER_NAME)
    return window_of(model, provider if isinstance(provider, str) else None) if isinstance(model, str) else None


def add_given(account: TurnAccount, given: ContextGiven) -> None:
    """Keep what a model was given when its window was fullest."""
    before = account.context_tokens
    if account.context_messages is None or (given.tokens is not None and (before is None or given.tokens > before)):
        account.context_messages = given.messages
        account.context_tokens, account.context_limit = given.tokens, given.limit
    if given.error_pct is not None and given.counted is not None and given.tokens is not None:
        account.counted_tokens += given.counted
        account.counted_of_tokens += given.tokens


# --- what was pruned --------------------------------------------------------------------------------------------------
class Noted(NamedTuple):
    """A decision that is on the record of its turn.

    Attributes:
        decision: The decision, with the time by the tracker's clock.
        dropped: Ids of the messages that it was the first to drop, as far as this process knows.
        step: The event ``context.prune``; None when nothing was pruned.
    """

    decision: PruningDecision
    dropped: tuple[str, ...]
    step: OpenStep | None


@dataclass(slots=True)
class _Site:
    """What was seen at one place: the state of one graph, or the calls of the models of one node."""

    ids: list[str | None] = field(default_factory=list)
    run: tuple[str, int] | None = None
    node: str = ""


@dataclass(slots=True)
class _Conversation:
    """What was seen of a conversation, in which turn last, and which messages it is known to have lost."""

    sites: dict[tuple[bool, str], _Site] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    turn_id: str = ""

    def enters(self, turn: "Turn") -> None:
        """Begin anew in a turn that replays another one: what came after its checkpoint is not pruned."""
        if turn.id != self.turn_id:
            self.turn_id = turn.id
            if turn.forked_from is not None:
                self.sites.clear()

    @property
    def size(self) -> int:
        return len(self.lost) + sum(len(site.ids) for site in self.sites.values())


class Windows:
    """What this process knows of the messages of conversations, by their ids.

    Args:
        most: Ids that are kept at most; beyond it the conversations that were seen longest ago are forgotten.
    """

    def __init__(self, most: int = _IDS_REMEMBERED) -> None:
        self._most = most
        self._size = 0
        self._known: OrderedDict[str, _Conversation] = OrderedDict()
        self._lock = lock_of(self)

    @property
    def size(self) -> int:
        """How many ids are kept."""
        return self._size

    def decisions(self, turn: "Turn", noted: Iterable[Fit | Glimpse], account: TurnAccount) -> list[Noted]:
        """Return the decisions of what was noted in a turn, in order, and add them to its account."""
        found = []
        with self._lock:
            conversation = self._known.pop(turn.conversation.id, None)
            self._size -= 0 if conversation is None else conversation.size
            conversation = conversation or _Conversation()
            conversation.enters(turn)
            ids = _Ids()
            for each in noted:
                if isinstance(each, Fit):
                    decided: _Decided | None = _fitted(each, conversation)
                else:
                    decided = _looked(turn, each, conversation, ids)
                if decided is not None:
                    found.append(decided)
            self._known[turn.conversation.id] = conversation
            self._size += conversation.size
            while self._size > self._most and len(self._known) > 1:
                self._size -= self._known.popitem(last=False)[1].size
        return [_put_down(turn, each, at, dropped, account) for each, at, dropped in found]


_Decided = tuple[PruningDecision, OpenStep | None, tuple[str, ...]]


def _fitted(fit: Fit, conversation: _Conversation) -> _Decided:
    first = tuple([each for each in fit.decision.dropped if each not in conversation.lost])
    conversation.lost.update(first)
    return replace(fit.decision, at_ns=fit.at_ns), fit.step, first


def _looked(turn: "Turn", glimpse: Glimpse, conversation: _Conversation, ids: "_Ids") -> _Decided | None:
    """Compare messages with those that were seen at the same place before; return the decision when some are gone."""
    nodes = [part.partition(":")[0] for part in glimpse.namespace.split("|")] if glimpse.namespace else []
    place = (glimpse.is_call, "|".join(nodes if glimpse.is_call else nodes[:-1]))
    node = nodes[-1] if nodes else glimpse.step.name
    site = conversation.sites.get(place)
    if site is None:
        site = conversation.sites[place] = _Site()
    messages, seen = glimpse.messages, site.ids
    count = len(seen)
    run = (turn.id, _top(glimpse.step).start_ns)
    before, site.node = site.node, node
    same_run, site.run = site.run == run, run
    if count <= len(messages) and (not count or _goes_on(messages, seen)):
        seen.extend(ids.of(messages) if not count else _ids_of(messages[count:]))
        return None
    if glimpse.is_call and same_run and count > 1 and _ids_of(messages) == seen[-1:]:
        return None  # the newest message alone, beside a call with the history: for a title, or by a guard
    site.ids = ids.of(messages)
    now = set(site.ids)
    gone = tuple([each for each in seen if each is not None and each not in now and each not in conversation.lost])
    overlaps = any(each is not None and each in now for each in seen)
    if not gone or not (overlaps or (same_run and place == _ROOT_STATE)):
        return None  # nothing is gone, or another list of messages altogether
    conversation.lost.update(gone)
    call = glimpse.step.call
    provided = None if call is None or call.usage is None else call.usage.input_tokens
    decision = PruningDecision(
        at_ns=glimpse.at_ns,
        trigger="external",
        strategy=node if glimpse.is_call else before if same_run else None,
        tokenizer=None if provided is None else "provider",
        tokens_after=provided,
        messages_before=count,
        messages_after=len(messages),
        dropped=gone,
        messages_pruned=len(gone),
    )
    return decision, glimpse.step, gone


def _top(step: OpenStep) -> OpenStep:
    while step.parent is not None:
        step = step.parent
    return step


def _goes_on(messages: Sequence[Any], seen: Sequence[str | None]) -> bool:
    """Tell whether messages begin with those that were seen: what is removed moves all that comes after it."""
    middle, last = len(seen) // 2, len(seen) - 1
    return seen[last] is not None and all(_id_of(messages[at]) == seen[at] for at in (0, middle, last))


class _Ids:
    """Reads the ids of lists of messages: of the objects that the longest list before began with too, only once.

    The nodes of a turn find the same objects in their state, and models are sent them, often after a system message.
    """

    def __init__(self) -> None:
        self._messages: Sequence[Any] = ()
        self._ids: list[str | None] = []

    def of(self, messages: Sequence[Any]) -> list[str | None]:
        """Return the ids of messages, in a list of its own."""
        known = len(self._messages)
        first = 0 if known and messages and messages[0] is self._messages[0] else 1
        if known and len(messages) >= first + known and all(map(is_, self._messages, messages[first:])):
            found = [*_ids_of(messages[:first]), *self._ids, *_ids_of(messages[first + known :])]
        else:
            found = _ids_of(messages)
        if len(messages) > known:  # a model may be sent a few of them only
            self._messages, self._ids = messages, found
        return list(found)


def _ids_of(messages: Sequence[Any]) -> list[str | None]:
    try:
        found = [None if message.type == "system" else message.id for message in messages]
    except AttributeError:
        return [_id_of(message) for message in messages]
    return found if {*map(type, found)} <= _KINDS_OF_ID else [_id_of(message) for message in messages]


def _id_of(message: Any) -> str | None:
    """Return the id of a message of the conversation; None for one without an id, and for a system message."""
    found = None if getattr(message, "type", None) == "system" else getattr(message, "id", None)
    return found if isinstance(found, str) else None


def _put_down(
    turn: "Turn", decision: PruningDecision, at: OpenStep | None, dropped: tuple[str, ...], account: TurnAccount
) -> Noted:
    if decision.tokens_after is not None:
        fitted = ContextGiven(decision.messages_after, decision.tokens_after, decision.limit)
        account.fitted = max(account.fitted or fitted, fitted, key=lambda each: each.tokens or 0)
    if not decision.pruned:
        return Noted(decision, dropped, None)
    account.prunings += 1
    # A decision that leaves out what the one before did, as when only what the model is given is pruned, adds what is
    # new in it.
    left_out, tokens = frozenset((*decision.dropped, *decision.replaced)), decision.tokens_pruned or 0
    again = bool(account.left_out) and account.left_out <= left_out
    account.messages_pruned += len(left_out) - (len(account.left_out) if again else 0)
    account.tokens_pruned += tokens - (account.left_out_tokens if again else 0)
    account.left_out, account.left_out_tokens = left_out, tokens
    above = at if at is None or at.kind != "generation" else at.parent
    event = turn.event_step(a.SPAN_PRUNE, decision.attributes(), above, decision.at_ns, decision.duration_us * 1_000)
    return Noted(decision, dropped, event)
