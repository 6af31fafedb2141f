"""The root of a turn: what it begins with, and how another process starts it again."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from opentelemetry import trace

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.export import SpanTarget
from turntrace.ledger import own_from
from turntrace.lifecycle.steps import root_attributes
from turntrace.records import SessionFacts, TurnOwn, TurnSummary, TurnTags


class RootStart(NamedTuple):
    """What the root of a turn begins with.

    Attributes:
        tags: What every span of the turn carries.
        session: The session that it is in.
        own: What the turn began with that its session does not tell.
        ids: The ids of its trace and of the root, in hexadecimal.
        started_ns: When it began, in nanoseconds since 1970.
    """

    tags: TurnTags
    session: SessionFacts
    own: TurnOwn
    ids: tuple[str, str]
    started_ns: int

    @classmethod
    def of(
        cls,
        session: SessionFacts,
        own: TurnOwn,
        *,
        turn_id: str,
        conversation_id: str,
        number: int,
        ids: tuple[str, str],
        started_ns: int,
    ) -> "RootStart":
        """Return how the root of a turn of a session begins."""
        tags = TurnTags(
            session_id=session.id,
            turn_id=turn_id,
            conversation_id=conversation_id,
            number=number,
            user_id=session.user_id,
            channel=session.channel,
            tier=own.tier or session.tier,
            org_id=own.org_id or session.org_id,
            topic=own.topic,
        )
        return cls(tags, session, own, ids, started_ns)

    @classmethod
    def again(cls, turn: TurnSummary, session: SessionFacts) -> "RootStart":
        """Return how the root of a turn began that the ledger knows."""
        return cls.of(
            replace(session, user_id=turn.user_id),
            own_from(turn.own),
            turn_id=turn.id,
            conversation_id=turn.conversation_id,
            number=turn.number,
            ids=(str(turn.trace_id), str(turn.root_span_id)),
            started_ns=turn.started_ns,
        )

    def start(
        self,
        target: SpanTarget,
        late: Mapping[str, AttributeValue],
        *,
        below: trace.Span | None = None,
        linked: trace.SpanContext | None = None,
        has_ended: bool = False,
    ) -> trace.Span:
        """Start the root.

        Args:
            target: Where spans go.
            late: What came to be known since the turn began.
            below: The span of the request that it stands below; by default the one that it began below.
            linked: The span of other code that was current, for a root that stands below nothing.
            has_ended: Whether the turn has ended.
        """
        return target.start_root(
            a.SPAN_TURN,
            attributes={**root_attributes(self.tags, self.session, self.own.tags), **late},
            start_ns=self.started_ns,
            ids=(int(self.ids[0], 16), int(self.ids[1], 16)),
            below=below or self._above(),
            linked=linked,
            has_ended=has_ended,
        )

    def _above(self) -> trace.Span | None:
        if self.own.above is None:
            return None
        span_id, flags = self.own.above.split("-")
        known = trace.SpanContext(
            int(self.ids[0], 16), int(span_id, 16), is_remote=True, trace_flags=trace.TraceFlags(int(flags, 16))
        )
        return trace.NonRecordingSpan(known)


def above_of(span: trace.Span) -> str:
    """Write down the span that a root stands below, as `TurnOwn.above`."""
    context = span.get_span_context()
    return f"{trace.format_span_id(context.span_id)}-{context.trace_flags:02x}"
