"""Old transcripts become sessions, with the times and tokens that they had; doing it twice adds nothing.

Run it alone: ``python examples/backfill.py``. It needs no server and no keys. It writes a few transcripts into a
temporary folder: one JSON object a line, messages in OpenAI's form, with when each was sent (``at``). To use it, take
all down to `backfill`, and change what reads your form. Where times do not matter or are not known,
``turntrace replay FILE`` does it all, but as if it had happened today.
"""

import json
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from turntrace import SessionTracker, Turn
from turntrace.analytics import sessions_over_time
from turntrace.records import LLMCall, Usage
from turntrace.testing import Clock

IDLE_S = 30 * 60  # a longer silence begins a new session
clock = Clock()  # tells the time of the message that is looked at


@dataclass
class Sitting:
    """What becomes a session: messages of a transcript without a long silence between them."""

    id: str
    user_id: str
    conversation_id: str
    started_ns: int
    exchanges: list[list[dict]] = field(default_factory=list)  # each becomes a turn


def read_sittings(path: Path) -> list[Sitting]:
    """Read the sittings of all transcripts, the oldest first, so that the sessions of a user are counted in order."""
    sittings: list[Sitting] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        transcript = json.loads(line)
        user_id, conversation_id, last_ns = transcript["user_id"], transcript["conversation_id"], None
        for message in transcript["messages"]:
            at_ns = ns_of(message)
            if last_ns is None or at_ns - last_ns > IDLE_S * 1_000_000_000:
                # Its id derives from the transcript, so that another run finds the session that this one makes.
                own_id = uuid.uuid5(uuid.NAMESPACE_OID, f"{conversation_id} {at_ns}").hex
                sittings.append(Sitting(own_id, user_id, conversation_id, at_ns))
            if message["role"] == "user" or not sittings[-1].exchanges:
                sittings[-1].exchanges.append([])
            sittings[-1].exchanges[-1].append(message)
            last_ns = at_ns
    return sorted(sittings, key=lambda sitting: sitting.started_ns)


def ns_of(message: dict) -> int:
    """Return when a message was sent, in nanoseconds since 1970."""
    return int(datetime.fromisoformat(message["at"]).timestamp() * 1000) * 1_000_000


def play(turn: Turn, messages: list[dict]) -> None:
    """Record in a turn what its messages tell: calls of the model, calls of tools, the answer."""
    calls = {}
    for message in messages:
        before_ns = clock.now_ns
        clock.set(ns_of(message))
        if message["role"] == "assistant":
            used = message["usage"]
            usage = Usage(input_tokens=used["prompt_tokens"], output_tokens=used["completion_tokens"])
            step = turn.open_step(message["model"], "generation", start_ns=before_ns)
            turn.close_step(step, call=LLMCall(message["model"], "openai", usage))  # it costs what it costs today
            for call in message.get("tool_calls", ()):
                calls[call["id"]] = turn.open_step(call["function"]["name"], "tool")
            turn.set_answer(message)
        elif message["role"] == "tool":
            turn.close_step(calls.pop(message["tool_call_id"]))


def backfill(path: Path, tracker: SessionTracker) -> int:
    """Bring what is in a file and not in the ledger into the ledger, and return how many turns that were."""
    added = 0
    for sitting in read_sittings(path):
        done = len(tracker.ledger.turns(sitting.id))  # all; some where an earlier run was stopped
        for messages in sitting.exchanges[done:]:
            clock.set(ns_of(messages[0]))
            session = tracker.start_session(user_id=sitting.user_id, session_id=sitting.id, channel="web")
            is_asked = messages[0]["role"] == "user"  # else the assistant began
            with session.conversation(sitting.conversation_id).turn(
                messages[0] if is_asked else None, role="user" if is_asked else "assistant"
            ) as turn:
                play(turn, messages)
            added += 1
    # Nobody said when a sitting was over: the sweep ends each, half an hour after its last message.
    tracker.sweep(time.time_ns())
    return added


TRANSCRIPTS = [
    {
        "conversation_id": "parcel",
        "user_id": "ann@example.com",
        "messages": [
            {"at": "2025-03-03T10:00:00Z", "role": "user", "content": "Where is my parcel?"},
            {
                "at": "2025-03-03T10:00:02Z",
                "role": "assistant",
                "model": "gpt-4o-mini",
                "usage": {"prompt_tokens": 60, "completion_tokens": 12},
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "find", "arguments": "{}"}}],
            },
            {"at": "2025-03-03T10:00:03Z", "role": "tool", "tool_call_id": "1", "content": "on its way"},
            {
                "at": "2025-03-03T10:00:05Z",
                "role": "assistant",
                "model": "gpt-4o-mini",
                "usage": {"prompt_tokens": 80, "completion_tokens": 9},
                "content": "It comes tomorrow. Is that all right?",
            },
            {"at": "2025-03-05T09:30:00Z", "role": "user", "content": "It did not come."},  # two days later
            {
                "at": "2025-03-05T09:30:04Z",
                "role": "assistant",
                "model": "gpt-4o-mini",
                "usage": {"prompt_tokens": 95, "completion_tokens": 20},
                "content": "Then I send you another one.",
            },
        ],
    },
    {
        "conversation_id": "invoice",
        "user_id": "bob@example.com",
        "messages": [
            {"at": "2025-03-03T16:00:00Z", "role": "user", "content": "Send me the invoice"},
            {
                "at": "2025-03-03T16:00:01Z",
                "role": "assistant",
                "model": "gpt-4o-mini",
                "usage": {"prompt_tokens": 50, "completion_tokens": 5},
                "content": "Sent.",
            },
        ],
    },
]


def main() -> None:
    """Bring the transcripts in twice, and look at the days."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "transcripts.jsonl")
        path.write_text("".join(json.dumps(each) + "\n" for each in TRANSCRIPTS), encoding="utf-8")
        # With the ledger of your app (left out: TURNTRACE_LEDGER_URL) users meet themselves there: same key, same hash.
        with SessionTracker(f"sqlite:///{folder}/ledger.db", idle_after=IDLE_S, clock=clock) as tracker:
            print(f"the first time {backfill(path, tracker)} turns came in, the second time {backfill(path, tracker)}")

            for day in sessions_over_time(tracker.ledger):
                print(f"{day.day}: sessions {day.sessions}, turns {day.turns}, tokens {day.tokens}")
            for session in reversed(tracker.ledger.sessions()):
                dropoff = "a drop-off: the agent had asked" if session.dropoff else "no drop-off"
                print(f"\nsession {session.id[:8]}, ended by {session.end_reason}, {dropoff}")
                for turn, steps in tracker.ledger.turns(session.id):
                    took = f"{turn.latency_ms / 1000:.0f} s"
                    print(f"  turn {turn.number} of {turn.conversation_id}: {turn.input_type}, {took}")
                    print(f"    {', '.join(f'{step.kind} {step.name}' for step in steps)}")


if __name__ == "__main__":
    main()
