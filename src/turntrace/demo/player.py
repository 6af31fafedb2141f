"""Plays recorded conversations as sessions: each once, and from where an earlier replay was stopped."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Literal

from turntrace.context import ContextTracker
from turntrace.demo.recorded import stage_for
from turntrace.demo.recording import Exchange, Transcript
from turntrace.errors import TranscriptError
from turntrace.identity import derived_id, new_id
from turntrace.lifecycle import Conversation, SessionTracker, Turn
from turntrace.summaries import SessionSummary

CHANNEL: Final = "replay"
"""The channel of replayed sessions, which tells them apart from those of the app."""

Outcome = Literal["played", "continued", "skipped", "stopped"]
"""What became of a conversation: played from its start, from where it stood, not at all since it is complete, or
stopped in between."""

_planned_id: ContextVar[str | None] = ContextVar("turntrace_planned_id", default=None)


@contextmanager
def _planned(turn_id: str) -> Iterator[None]:
    """Give the turn that begins in a block this id."""
    token = _planned_id.set(turn_id)
    try:
        yield
    finally:
        _planned_id.reset(token)


def _next_id() -> str:
    return _planned_id.get() or new_id()


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is still to be played of a conversation.

    Attributes:
        session_id: Id of its session.
        turn_ids: Ids of its turns, those that are in the ledger already included.
        done: How many of its turns are in the ledger.
        is_complete: Whether nothing is left to do.
    """

    session_id: str
    turn_ids: Sequence[str]
    done: int
    is_complete: bool


class Player:
    """Plays recorded conversations into a ledger.

    All ids derive from the recording: the session's from the user (by the hash that the ledger knows) and the
    conversation, a turn's also from all that was said until its end, by a keyed hash. So a conversation that is
    complete in the ledger is not played again, and one that was stopped goes on where it stood.

    Args:
        ledger: URL of the ledger. Default: ``TURNTRACE_LEDGER_URL``, else the one in the user's data folder.
        context_limit: Tokens that models can be given; the history is fitted into them. Default: the history as it was.
        settings: What else `SessionTracker` takes.

    Raises:
        ConfigurationError: If the URL cannot be used.
        LedgerError: If the ledger cannot be opened.
    """

    def __init__(self, ledger: str | None = None, *, context_limit: int | None = None, **settings: Any) -> None:
        self.tracker = SessionTracker(ledger, ids=_next_id, **settings)
        self._context_limit = context_limit
        self._contexts: dict[str, ContextTracker] = {}
        self._stopping = False  # no Event: its lock is not to be waited for in a handler of a signal

    def stop(self) -> None:
        """Have every conversation stop at the end of its turn; from any thread, and from a handler of a signal."""
        self._stopping = True

    def close(self) -> None:
        """Write down what has ended and close the ledger."""
        self.tracker.shutdown()

    def play(self, transcript: Transcript) -> Outcome:
        """Play a conversation, in this thread.

        Raises:
            TranscriptError: If the ledger has another conversation of the same id.
            LedgerError: If the ledger cannot be read or written.
        """
        plan = self._plan(transcript)
        if plan.is_complete:
            return "skipped"
        stage = stage_for(transcript, self._context_for(transcript))
        for exchange in transcript.exchanges[: plan.done]:
            stage.graph.invoke(stage.script.begin(exchange), _untracked(transcript, exchange))
        session = self.tracker.start_session(**_facts(transcript, plan))
        conversation = session.conversation(transcript.conversation_id, topic=transcript.topic)
        for turn_id, exchange in self._ahead(transcript, plan):
            with _planned(turn_id), conversation.turn(exchange.message, role=exchange.role) as turn:
                stage.graph.invoke(stage.script.begin(exchange), _tracked(turn, exchange))
        return self._ended(conversation, transcript, plan)

    async def aplay(self, transcript: Transcript) -> Outcome:
        """Play a conversation as `play` does, in the running event loop."""
        plan = await self.tracker.run_off_loop(self._plan, transcript)
        if plan.is_complete:
            return "skipped"
        stage = stage_for(transcript, self._context_for(transcript))
        for exchange in transcript.exchanges[: plan.done]:
            await stage.graph.ainvoke(stage.script.begin(exchange), _untracked(transcript, exchange))
        session = await self.tracker.astart_session(**_facts(transcript, plan))
        conversation = session.conversation(transcript.conversation_id, topic=transcript.topic)
        for turn_id, exchange in self._ahead(transcript, plan):
            with _planned(turn_id):
                async with conversation.turn(exchange.message, role=exchange.role) as turn:
                    await stage.graph.ainvoke(stage.script.begin(exchange), _tracked(turn, exchange))
        return self._ended(conversation, transcript, plan)

    def _context_for(self, transcript: Transcript) -> ContextTracker | None:
        model, limit = transcript.model, self._context_limit
        if limit is not None and model not in self._contexts:
            self._contexts[model] = ContextTracker(model, limit=limit)
        return self._contexts.get(model)

    def summary(self, transcript: Transcript) -> SessionSummary | None:
        """Return what the ledger knows of a conversation's session, once all that has ended is written down."""
        return self.tracker.session_summary(self._session_id(transcript))

    def _session_id(self, transcript: Transcript) -> str:
        # By the user's hash: an id made of the raw one would tell whoever guesses it that they are right.
        user = self.tracker.hash_user(transcript.user_id)
        return derived_id("replay", user, transcript.conversation_id)

    def _plan(self, transcript: Transcript) -> _Plan:
        session_id = self._session_id(transcript)
        turn_ids = [
            derived_id("replay", session_id, str(number), self.tracker.hash_user(exchange.fingerprint))
            for number, exchange in enumerate(transcript.exchanges, start=1)
        ]
        ledger = self.tracker.ledger
        known = sorted((turn for turn, _ in ledger.turns(session_id)), key=lambda turn: turn.number)
        done = [turn.id for turn in known if turn.ended_ns is not None]
        shared = min(len(done), len(turn_ids))
        if done[:shared] != turn_ids[:shared] or len(ledger.turn_numbers(transcript.conversation_id)) != len(done):
            raise TranscriptError(
                "its conversation_id is in the ledger already, with another user or other messages: replay it into "
                "another ledger (--ledger sqlite:///other.db), or give it another conversation_id"
            )
        if len(done) < len(known):
            with ledger.writing() as writer:  # left open by a replay that was killed: played again, by the same ids
                writer.withdraw_open_turns(session_id)
        session = ledger.session(session_id)
        has_ended = session is not None and session.ended_ns is not None
        return _Plan(session_id, turn_ids, shared, is_complete=shared == len(turn_ids) and has_ended)

    def _ahead(self, transcript: Transcript, plan: _Plan) -> Iterator[tuple[str, Exchange]]:
        for turn_id, exchange in zip(plan.turn_ids[plan.done :], transcript.exchanges[plan.done :], strict=True):
            if self._stopping:
                return
            yield turn_id, exchange

    def _ended(self, conversation: Conversation, transcript: Transcript, plan: _Plan) -> Outcome:
        if self._stopping:
            return "stopped"  # perhaps after its last turn: then only the end is left for the next replay
        conversation.session.end(transcript.end_reason)
        return "continued" if plan.done else "played"


def _facts(transcript: Transcript, plan: _Plan) -> dict[str, Any]:
    return {"session_id": plan.session_id, "user_id": transcript.user_id, "channel": CHANNEL}


def _untracked(transcript: Transcript, exchange: Exchange) -> Any:
    return {"configurable": {"thread_id": transcript.conversation_id}, "recursion_limit": _most_steps(exchange)}


def _tracked(turn: Turn, exchange: Exchange) -> Any:
    return {**turn.config, "recursion_limit": _most_steps(exchange)}


def _most_steps(exchange: Exchange) -> int:
    return 2 * len(exchange.replies) + 10
