"""What other processes do to a ledger: for tests that start processes, which import this module and little else."""

from multiprocessing.synchronize import Barrier

from sqlalchemy import create_engine

from turntrace.ledger import Ledger, TurnEnd
from turntrace.records import SessionFacts, TurnSummary

NOON = 1_767_268_800_000_000_000  # 2026-01-01T12:00:00Z
SECOND = 1_000_000_000
IDLE = 1800 * SECOND


def begin(
    ledger: Ledger,
    turn_id: str,
    *,
    session: str = "s1",
    conversation: str = "c1",
    user: str | None = "u1",
    at: int = NOON,
    active_since: int = 0,
) -> int | None:
    """Begin a turn with what matters to a test."""
    begun = ledger.begin_turn(
        turn_id,
        session_id=session,
        conversation_id=conversation,
        user_id=user,
        role="user",
        started_ns=at,
        active_since_ns=active_since,
        trace_id=turn_id.rjust(32, "0")[-32:],
        root_span_id=turn_id.rjust(16, "0")[-16:],
    )
    return None if begun is None else begun.number


def ended(turn_id: str, *, at: int = NOON, **facts: object) -> TurnSummary:
    """Return a turn that has ended."""
    return TurnSummary(
        **{  # type: ignore[arg-type]
            "id": turn_id,
            "session_id": "s1",
            "conversation_id": "c1",
            "user_id": "u1",
            "number": 1,
            "started_ns": at,
            "ended_ns": at,
            "status": "completed",
            "role": "user",
            "trace_id": "f" * 32,
            "root_span_id": "f" * 16,
            **facts,
        }
    )


def finish(ledger: Ledger, turn: TurnSummary, *, spans: int = 1) -> TurnEnd:
    """Write down a turn that has ended, with something in the outbox beside it."""
    with ledger.writing() as writer:
        writer.put("spans", turn.id.encode(), items=spans, created_ns=turn.ended_ns or 0)
        return writer.finish_turn(turn, [], spans=spans)


def open_many(url: str, rounds: int, barrier: Barrier) -> list[str]:
    """Open one new file after the other, each at the same moment as the other processes do; return the keys."""
    found = []
    for each in range(rounds):
        barrier.wait(60)
        try:
            ledger = Ledger(url.format(each))
            found.append(ledger.hash_key().hex())
            ledger.close()
        except Exception as error:  # told, so that the others do not wait for this one
            found.append(f"{type(error).__name__}: {error}")
    return found


def take_turns(url: str, process: int, turns: int, conversations: int, barrier: Barrier) -> list[tuple[str, int]]:
    """Take turns in conversations that other processes take turns in too; return conversation and number of each."""
    ledger = Ledger(url)
    barrier.wait(60)
    opened = ledger.open_session(
        SessionFacts(id=f"s{process}", user_id="u1", channel="web", type="chat", started_ns=NOON),
        idle_ns=IDLE,
        given_id=False,
    )
    session = opened.session.id
    taken = []
    for each in range(turns):
        turn_id, conversation = f"t{process}-{each}", f"c{each % conversations}"
        number = begin(ledger, turn_id, session=session, conversation=conversation, at=NOON + each)
        assert number is not None
        turn = ended(
            turn_id,
            at=NOON + each,
            session_id=session,
            conversation_id=conversation,
            number=number,
            input_tokens=each,
            output_tokens=1,
        )
        assert finish(ledger, turn)
        taken.append((conversation, number))
    ledger.close()
    return taken


def take_turns_with_engine(url: str, process: int, turns: int, conversations: int, barrier: Barrier) -> int:
    """Take turns as `take_turns` does, on an engine of the app's."""
    engine = create_engine(url)
    ledger = Ledger(engine)
    barrier.wait(60)
    for each in range(turns):
        opened = ledger.open_session(
            SessionFacts(id=f"s{process}-{each}", user_id=f"u{each}", channel="web", type="chat", started_ns=NOON),
            idle_ns=IDLE,
            given_id=False,
        )
        turn_id, conversation = f"t{process}-{each}", f"c{each % conversations}"
        number = begin(ledger, turn_id, session=opened.session.id, conversation=conversation)
        assert number is not None
        assert finish(ledger, ended(turn_id, session_id=opened.session.id, conversation_id=conversation, number=number))
    ledger.close()
    engine.dispose()
    return turns
