"""What waits to be sent to Langfuse: as the ledger's outbox holds it, and as the sender takes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

SPANS: Final = "spans"
"""Kind of a row of the outbox: an OTLP ``ExportTraceServiceRequest`` in protobuf."""

SCORE: Final = "score"
"""Kind of a row of the outbox: a score, as one JSON object."""


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """A row of the outbox.

    Attributes:
        kind: `SPANS` or `SCORE`.
        body: What is to be sent.
        items: How many spans the body holds; 1 for a score.
        created_ns: When it was put there, in nanoseconds since 1970.
    """

    id: int
    kind: str
    body: bytes
    items: int
    created_ns: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """What Langfuse will not take, with its words; it is set apart."""

    item: OutboxItem
    why: str


@dataclass(frozen=True, slots=True)
class Claim:
    """What a sender may send now.

    Attributes:
        items: The oldest rows; none when nothing waits, or another process is sending.
        busy_s: Seconds until a sender in another process must have said that it lives; 0 when there is none.
        is_all: Whether these were all that waited.
    """

    items: tuple[OutboxItem, ...] = ()
    busy_s: float = 0.0
    is_all: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """What of one kind is in the outbox.

    Attributes:
        rows: How many rows.
        items: How many spans or scores they hold.
        size: Their bytes.
        oldest_ns: When the oldest was put there, in nanoseconds since 1970.
    """

    rows: int = 0
    items: int = 0
    size: int = 0
    oldest_ns: int | None = None


@dataclass(frozen=True, slots=True)
class OutboxStatus:
    """What is in the outbox.

    Attributes:
        spans: Spans that wait.
        scores: Scores that wait.
        refused: What was set apart: the server's words, and how many spans and scores it said them of.
        dropped: How many spans and scores were dropped, since it was over its bound.
    """

    spans: Waiting
    scores: Waiting
    refused: tuple[tuple[str, int], ...]
    dropped: int

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not (self.spans.rows or self.scores.rows)

    @property
    def oldest_ns(self) -> int | None:
        """When the oldest of what waits was put there, in nanoseconds since 1970."""
        return min((each.oldest_ns for each in (self.spans, self.scores) if each.oldest_ns is not None), default=None)


class Outbox(Protocol):
    """What a sender takes from, as the ledger has it. One process at a time sends, so that the order is kept."""

    def claim(self, owner: str, *, lease_s: float, max_rows: int, max_bytes: int, kind: str | None = None) -> Claim:
        """Take the lease, and return the oldest rows, of one kind or of all."""

    def renew(self, owner: str, *, lease_s: float) -> bool:
        """Go on holding the lease; tell whether it is still held."""

    def settle(self, owner: str, sent: Sequence[int], refused: Sequence[Refusal], *, lease_s: float) -> None:
        """Take out what was sent and set apart what was refused; hold the lease on, or with 0 give it back."""

    def release(self, owner: str) -> None:
        """Give the lease back."""

    def status(self) -> OutboxStatus:
        """Return what is in it."""
