"""A turn: one exchange between a user and the app, which is one trace."""

from collections.abc import Sequence
from typing import Any, Final, Self

from opentelemetry import baggage, trace
from opentelemetry.context import Context

from turntrace.current import Scope, current_scope, enter, leave
from turntrace.errors import StateError
from turntrace.identity import check_text, safe_text
from turntrace.lifecycle.carrying import headers_of
from turntrace.lifecycle.feedback import FEEDBACK_NAME, PutFeedback
from turntrace.lifecycle.journey import Journey
from turntrace.lifecycle.running import RunningTurn, is_abandoning

TURN_ID_KEY: Final = "turntrace_turn_id"
"""Key by which a run joins a turn, in the config's metadata, and by which a process takes one up, in a carrier."""


class Turn(RunningTurn):
    """One exchange: what the user said, what the agent did, what it answered.

    A turn is made by `Conversation.turn` or `Conversation.start_turn`, or by the callback for a run that stands alone.
    Within its block, or with its `config`, runs of graphs join it.

    Attributes:
        id: Id of the turn and, when it began a trace of its own, of its trace: 32 hexadecimal digits.
        number: Its number in the conversation, from 1.
        conversation: The conversation that it is a turn of.
    """

    _entered: tuple[Scope, Context, Context] | None = None

    def __repr__(self) -> str:
        return f"<Turn {self.number} of conversation {self.conversation.id!r}, {self.id}>"

    @property
    def input(self) -> Any:
        """The input for the graph: the user's message under the handler's ``messages_key``; empty without a message."""
        if self.message is None:
            return {}
        key = next((handler.messages_key for handler in self._tracker.callbacks()), "messages")
        return {key: [("user", self.message) if isinstance(self.message, str) else self.message]}

    @property
    def config(self) -> Any:
        """The config for the graph: the thread, the callback, and what makes the run join this turn.

        It is needed where the turn's block does not reach: in other threads, or with `Conversation.start_turn`.
        """
        carried = self.headers() if self.travels else {}
        return {
            "configurable": {"thread_id": self.conversation.id},
            "metadata": {TURN_ID_KEY: self.id, **carried},
            "callbacks": self._tracker.callbacks(),
        }

    # --- what the app tells -------------------------------------------------------------------------------------------
    def set_intent(self, intent: str) -> None:
        """Say what the user wants in this turn, as ``turn.intent``; the last word counts."""
        self.intent = safe_text(intent)

    def set_answer(self, message: Any) -> None:
        """Say what the app answered, where no run of a graph tells it.

        Args:
            message: A text or a message; of it only its length and kind are recorded unless the content policy allows
                more.
        """
        self.answer = message

    def feedback(self, value: float | bool, name: str = FEEDBACK_NAME, comment: str | None = None) -> None:
        """Give feedback on the turn. Nobody waits for it to be written; it may come after the turn has ended.

        Args:
            value: True, False, or a number from 0 to 1.
            name: Its name; feedback of the same name on the same turn replaces it.
            comment: What the user said; it leaves only as far as the content policy allows.

        Raises:
            ConfigurationError: If the value cannot be used.
        """
        about = (self.id, self.planned_ids[0])
        session_id = self.conversation.session.id
        self._tracker.submit(PutFeedback(self._tracker, session_id, about, value, name, comment))

    def journey(self, name: str, stages: Sequence[str] | None = None) -> Journey:
        """Begin or continue a journey of the user, whose steps are events of this turn; as `Session.journey`."""
        session = self.conversation.session
        return Journey(session, check_text(name, "name"), self._tracker.stages_of(session, name, stages), self)

    def end(self, status: str = "completed", *, error: BaseException | None = None) -> None:
        """End the turn; ending it again does nothing.

        Nobody waits: the spans and the ledger's row are written by a thread of turntrace's own.

        Args:
            status: ``completed``, ``failed``, ``abandoned``, or ``interrupted``: then it waits for a person, and goes
                on with `Conversation.resume_turn` or with the run that answers.
            error: The error that ended it; then the status is ``failed``. Only its class is recorded.

        Raises:
            StateError: If the status is none of these.
        """
        if status not in _STATUSES:
            raise StateError(f"A turn cannot end as {status!r:.40}. Allowed are {', '.join(_STATUSES)}.")
        ended_ns = self.leave(error)
        if ended_ns is not None:
            if error is not None:
                status = "abandoned" if is_abandoning(error) else "failed"
            self._tracker.finish(self, status, ended_ns)

    async def aend(self, status: str = "completed", *, error: BaseException | None = None) -> None:
        """End the turn, as `end` does, which does not wait either."""
        self.end(status, error=error)

    def carrier(self) -> dict[str, str]:
        """Hand the turn over to another process, and return what that takes up: `SessionTracker.resume_turn`.

        The turn goes on there, as the same turn and the same trace; here it is over. It waits until what happened in
        it so far is written down. A job that is delivered again may take it up again.

        Returns:
            A small dictionary of texts, to go with the job: it holds no content, and nothing of the user.

        Raises:
            StateError: If the turn has ended.
        """
        if self._finished:
            raise StateError(
                f"{self!r} has ended, so it cannot be handed over. Call turn.carrier() instead of its end."
            )
        self.handed_over = True
        self.end("interrupted")
        self._tracker.flush_writer()
        return {TURN_ID_KEY: self.id}

    async def acarrier(self) -> dict[str, str]:
        """Hand the turn over, as `carrier` does, without blocking the event loop."""
        return await self._tracker.run_off_loop(self.carrier)

    def headers(self) -> dict[str, str]:
        """Return the turn as HTTP headers: W3C ``traceparent`` and ``baggage``, for a request to another server.

        The server's handler finds the turn by them when its tracker has ``propagate=True``. What they hold is what
        every span carries: ids, the hash of the user, channel, tier, organisation and topic.
        """
        scope = current_scope()
        here: Any = None if scope is None or scope.turn is not self else scope.step
        return headers_of(trace.set_span_in_context((here or self.root).span, self.baggage_in(Context())))

    def baggage_in(self, context: Context) -> Context:
        """Return a context with what every span of the turn carries as baggage."""
        for name, value in self.tags.items():
            context = baggage.set_baggage(name, str(value), context)
        return context

    @property
    def travels(self) -> bool:
        """Whether what runs inside takes the turn along in its requests to other servers."""
        return self._tracker.propagate

    # --- the block ----------------------------------------------------------------------------------------------------
    def __enter__(self) -> Self:
        if self._entered is not None:
            raise StateError(f"{self!r} is entered already. Use one block a turn: with conversation.turn(...) as turn:")
        self._entered = enter(self, self.root)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        entered, self._entered = self._entered, None
        if entered is not None:
            leave(*entered)
        self.end("interrupted" if self.interrupted else "completed", error=error)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.__exit__(kind, error, traceback)


_STATUSES: Final = ("completed", "interrupted", "failed", "abandoned")
