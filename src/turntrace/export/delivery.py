"""Sending a few rows of the outbox: what is too large is split, and what the server will not take is found."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from turntrace.content import to_json
from turntrace.export.encode import halves
from turntrace.export.scores import read_score
from turntrace.export.server import Answer, LangfuseServer, Outcome, several
from turntrace.waiting import SCORE, SPANS, OutboxItem, Refusal

MAX_REQUEST_BYTES: Final = 4_500_000
"""A request holds so many bytes at most, before compression: Langfuse Cloud takes 5 MB."""

_SCORES_A_REQUEST: Final = 100
_SIDE_BY_SIDE: Final = 8

_takes_arrays: dict[str, bool] = {}
"""By URL: whether a server takes scores as an array, where that is known."""


@dataclass(slots=True)
class Delivered:
    """What became of some rows.

    Attributes:
        sent: Ids of the rows that are done with.
        refused: What of them the server will not take, each span and score by itself.
        items: How many spans and scores it took.
        stopped_by: The answer because of which the rest waits; None when nothing is left.
        spans_are_done: Whether all spans among them were sent or set apart: what is left are scores.
    """

    sent: list[int] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    items: int = 0
    stopped_by: Answer | None = None
    spans_are_done: bool = False


class _StoppedError(Exception):
    """The server takes nothing now."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.words)
        self.answer = answer


def deliver(server: LangfuseServer, items: Sequence[OutboxItem], still_ours: Callable[[], bool]) -> Delivered:
    """Send rows of the outbox.

    Args:
        server: Where to.
        items: The rows, the oldest first.
        still_ours: Called before each request: whether nobody else sends them meanwhile.
    """
    done = Delivered()
    delivery = _Delivery(server, done, still_ours)
    try:
        for group in _requests([item for item in items if item.kind == SPANS]):
            delivery.send_spans(group)
        done.spans_are_done = True
        delivery.send_scores([item for item in items if item.kind == SCORE])
        delivery.set_apart([item for item in items if item.kind not in (SPANS, SCORE)])
    except _StoppedError as stop:
        done.stopped_by = stop.answer
    return done


def _requests(items: Iterable[OutboxItem]) -> list[list[OutboxItem]]:
    """Put rows together to requests that are not too large."""
    groups: list[list[OutboxItem]] = []
    room = 0
    for item in items:
        if not groups or len(item.body) > room:
            groups.append([])
            room = MAX_REQUEST_BYTES
        groups[-1].append(item)
        room -= len(item.body)
    return groups


class _Delivery:
    def __init__(self, server: LangfuseServer, done: Delivered, still_ours: Callable[[], bool]) -> None:
        self._server = server
        self._done = done
        self._still_ours = still_ours

    def _checked(self, answer: Answer) -> Answer:
        if answer.outcome in (Outcome.LATER, Outcome.CLOSED):
            raise _StoppedError(answer)
        return answer

    def _before_request(self) -> None:
        if not self._still_ours():
            raise _StoppedError(Answer(Outcome.LATER, "another process sends"))

    def set_apart(self, items: Sequence[OutboxItem]) -> None:
        """Set apart what this version of turntrace does not know, as a newer one may have written it."""
        self._done.refused += [Refusal(item, f"this turntrace does not know what {item.kind!r} is") for item in items]
        self._done.sent += [item.id for item in items]

    # --- spans --------------------------------------------------------------------------------------------------------
    def send_spans(self, group: Sequence[OutboxItem]) -> None:
        """Send rows of spans; they are done with when all of their spans were taken or set apart."""
        refused: list[Refusal] = []
        self._send(group, refused)
        self._done.refused += refused
        self._done.sent += [item.id for item in group]
        self._done.items += sum(item.items for item in group) - len(refused)

    def _send(self, pieces: Sequence[OutboxItem], refused: list[Refusal]) -> None:
        """Send pieces together, or, where they are too large or one of them is refused, in halves."""
        body = b"".join(piece.body for piece in pieces)  # messages of protobuf put together are one message
        is_one = len(pieces) == 1 and pieces[0].items <= 1
        if is_one or len(body) <= MAX_REQUEST_BYTES:
            self._before_request()
            answer = self._checked(self._server.post_spans(body))
            if answer.outcome is Outcome.ACCEPTED:
                return
            if is_one:
                refused.append(Refusal(pieces[0], answer.words))
                return
        if len(pieces) == 1:
            pieces = _halves(pieces[0], refused)
        middle = len(pieces) // 2
        for half in (pieces[:middle], pieces[middle:]):
            if half:
                self._send(half, refused)

    # --- scores -------------------------------------------------------------------------------------------------------
    def send_scores(self, items: Sequence[OutboxItem]) -> None:
        """Send scores; of one that was given again only the newest value."""
        newest = {read_score(item.body)["id"]: item for item in items}
        older = [item.id for item in items if newest[read_score(item.body)["id"]] is not item]
        left = list(newest.values())
        for first in range(0, len(left), _SCORES_A_REQUEST):
            few = left[first : first + _SCORES_A_REQUEST]
            if len(few) == 1 or _takes_arrays.get(self._server.url) is False or not self._send_array(few):
                self._send_each(few)
        self._done.sent += older

    def _send_array(self, items: Sequence[OutboxItem]) -> bool:
        """Send scores as an array; tell whether it was taken."""
        self._before_request()
        bodies = [to_json(_with_time(item)).encode() for item in items]
        answer = self._checked(self._server.post_scores(several(bodies)))
        if answer.outcome is Outcome.ACCEPTED:
            _takes_arrays[self._server.url] = True
            self._note_sent(items)
        return answer.outcome is Outcome.ACCEPTED

    def _send_each(self, items: Sequence[OutboxItem]) -> None:
        """Send scores one a request, several at the same time."""
        self._before_request()
        answers = _side_by_side(lambda item: self._server.post_scores(item.body), items)
        refused = [
            Refusal(item, answer.words)
            for item, answer in answers
            if answer.outcome in (Outcome.REFUSED, Outcome.TOO_LARGE)
        ]
        taken = [item for item, answer in answers if answer.outcome is Outcome.ACCEPTED]
        self._note_sent(taken)
        self._done.refused += refused
        self._done.sent += [refusal.item.id for refusal in refused]
        if len(taken) == len(items) > 1:  # what was not taken as an array, each by itself was
            _takes_arrays[self._server.url] = False
        for _, answer in answers:
            self._checked(answer)

    def _note_sent(self, items: Sequence[OutboxItem]) -> None:
        self._done.sent += [item.id for item in items]
        self._done.items += len(items)


def _halves(piece: OutboxItem, refused: list[Refusal]) -> Sequence[OutboxItem]:
    try:
        return [replace(piece, body=body, items=count) for body, count in halves(piece.body)]
    except ValueError as error:
        refused.append(Refusal(piece, str(error)))
        return []


def _with_time(item: OutboxItem) -> dict[str, Any]:
    """Return a score with the time when it was given, which a server that takes arrays knows."""
    given = datetime.fromtimestamp(item.created_ns / 1e9, UTC).isoformat(timespec="milliseconds")
    return {**read_score(item.body), "timestamp": given}


def _side_by_side(send: Callable[[OutboxItem], Answer], items: Sequence[OutboxItem]) -> list[tuple[OutboxItem, Answer]]:
    """Send each item, several at a time, until one answer says that nothing is taken now."""
    waiting = iter(items)
    lock = threading.Lock()
    answers: list[tuple[OutboxItem, Answer]] = []
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                item = next(waiting, None)
            if item is None:
                return
            answer = send(item)
            with lock:
                answers.append((item, answer))
            if answer.outcome in (Outcome.LATER, Outcome.CLOSED):
                stopped.set()

    others = [threading.Thread(target=work, daemon=True) for _ in range(min(_SIDE_BY_SIDE, len(items)) - 1)]
    started = []
    for other in others:
        try:
            other.start()
        except RuntimeError:  # no new threads while the interpreter exits
            break
        started.append(other)
    work()
    for other in started:
        other.join()
    return answers
