"""How many spans a second go through the outbox to a server, next to Langfuse's own exporter in the same run.

Both make the same spans, turn by turn, in rounds whose order changes, each on a provider of its own:

- outbox: the spans of a turn are a job of the tracker's writer, which encodes them and puts them into the outbox of a
  ledger on disk; the sender takes them from there to the server meanwhile;
- Langfuse's exporter: its client's span processor. It queues 2,048 spans and drops what is more, so it is flushed in
  time, and the flushing is part of the round.

The server runs on loopback in a process of its own and keeps what it is sent. A round ends when all is sent. Caller CPU
is that of the thread that makes the spans and hands them over, without the flushes. In the end it is checked that the
server has every span of both.

    python benchmarks/export.py [--turns 1000] [--rounds 9] [--json FILE]
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from _tables import Report, arguments, middle, summary
from langfuse import Langfuse
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import Tracer, set_span_in_context

from turntrace import SessionTracker
from turntrace.export import to_otlp
from turntrace.ledger import LedgerWriter

OURS, THEIRS, SECRET = "pk-lf-test", "pk-lf-other", "sk-lf-test"  # Langfuse's client is one for a key in a process
SPANS_A_TURN = 7
MOST_QUEUED = 1_400
WARM_UP_TURNS = 100
ATTRIBUTES = {
    "session.id": "0123456789abcdef0123456789abcdef",
    "user.id": "9f86d081884c7d659a2feaa0c55ad015",
    "conversation.id": "c-42",
    "gen_ai.conversation.id": "c-42",
    "turn.id": "fedcba9876543210fedcba9876543210",
    "turn.number": 7,
    "conversation.turn_number": 7,
    "session.channel": "web",
    "langfuse.observation.type": "generation",
    "gen_ai.operation.name": "chat",
    "gen_ai.request.model": "gpt-4o-mini",
    "gen_ai.usage.input_tokens": 1_200,
    "gen_ai.usage.output_tokens": 80,
}


@dataclass
class Figures:
    """What the rounds of a way came to."""

    per_second: list[float] = field(default_factory=list)
    caller_us: list[float] = field(default_factory=list)


def make_turn(tracer: Tracer) -> None:
    """Make the spans of a turn: a root, and the others below it."""
    root = tracer.start_span("conversation.turn", context=Context(), attributes=ATTRIBUTES)
    below = set_span_in_context(root, Context())
    for _ in range(SPANS_A_TURN - 1):
        tracer.start_span("agent", context=below, attributes=ATTRIBUTES).end()
    root.end()


class ByLangfuse:
    """Langfuse's client with its own exporter."""

    name = "Langfuse's exporter"

    def __init__(self, url: str) -> None:
        self._provider = TracerProvider()
        self._client = Langfuse(public_key=THEIRS, secret_key=SECRET, base_url=url, tracer_provider=self._provider)
        self._tracer = self._provider.get_tracer("benchmark")

    def round(self, turns: int) -> float:
        """Make turns and have them sent; return the caller's CPU in seconds."""
        cpu, queued = 0.0, 0
        for _ in range(turns):
            began = time.thread_time()
            make_turn(self._tracer)
            cpu += time.thread_time() - began
            queued += SPANS_A_TURN
            if queued > MOST_QUEUED:
                self._provider.force_flush()
                queued = 0
        self._provider.force_flush()
        return cpu


class Turn:
    """The spans of a turn, to be put into the outbox."""

    def __init__(self, spans: list[ReadableSpan]) -> None:
        self._spans = spans
        self._body = b""

    def prepare(self) -> None:
        """Encode them."""
        self._body = to_otlp(self._spans)

    def write(self, ledger: LedgerWriter) -> None:
        """Put them there."""
        ledger.put("spans", self._body, items=len(self._spans), created_ns=time.time_ns())


class ByOutbox:
    """turntrace: the writer, the outbox on disk and the sender."""

    name = "outbox"

    def __init__(self, url: str, folder: Path) -> None:
        os.environ.update(LANGFUSE_PUBLIC_KEY=OURS, LANGFUSE_SECRET_KEY=SECRET, LANGFUSE_BASE_URL=url)
        provider = TracerProvider()
        self._tracker = SessionTracker(f"sqlite:///{folder}/ledger.db", tracer_provider=provider)
        assert self._tracker.target.to_outbox
        self._target = self._tracker.target
        self._tracer = provider.get_tracer("turntrace")

    def round(self, turns: int) -> float:
        """Make turns and have them sent; return the caller's CPU in seconds."""
        cpu = 0.0
        for _ in range(turns):
            began = time.thread_time()
            with self._target.capturing() as spans:
                make_turn(self._tracer)
            self._tracker.submit(Turn(spans))
            cpu += time.thread_time() - began
        self._tracker.flush(None)
        return cpu

    def close(self) -> None:
        """Close the ledger."""
        self._tracker.shutdown()


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    server_file = Path(__file__).parent.parent / "tests" / "loopback.py"
    with subprocess.Popen([sys.executable, str(server_file)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            run(server.stdout.readline().strip(), options)
        finally:
            server.kill()


def run(url: str, options: argparse.Namespace) -> None:
    """Run the rounds, and print what they came to."""
    with tempfile.TemporaryDirectory() as folder:
        ours = ByOutbox(url, Path(folder))
        theirs = ByLangfuse(url)
        figures = {ours.name: Figures(), theirs.name: Figures()}
        for way in (ours, theirs):
            way.round(WARM_UP_TURNS)
        for number in range(options.rounds):
            ways = [ours, theirs]
            random.Random(number).shuffle(ways)
            for way in ways:
                measure(way.round, options.turns, figures[way.name])
        ours.close()
    made = 2 * SPANS_A_TURN * (WARM_UP_TURNS + options.rounds * options.turns)
    show(figures, options, made, arrived(url))


def measure(one_round: Callable[[int], float], turns: int, figures: Figures) -> None:
    """Measure a round."""
    began = time.perf_counter()
    cpu = one_round(turns)
    spans = turns * SPANS_A_TURN
    figures.per_second.append(spans / (time.perf_counter() - began))
    figures.caller_us.append(cpu / spans * 1e6)


def arrived(url: str) -> int:
    """Ask the server how many spans it has."""
    return int(httpx.get(f"{url}/count").json()["spans"])


def show(figures: dict[str, Figures], options: argparse.Namespace, made: int, has: int) -> None:
    """Print the figures."""
    report = Report("Sending", __doc__)
    rows = [[name, middle(of_way.per_second), middle(of_way.caller_us)] for name, of_way in figures.items()]
    report.table("Spans through the outbox", ("way", "spans/s", "caller CPU, us a span"), rows)
    ours, theirs = figures[ByOutbox.name], figures[ByLangfuse.name]
    pairs = [a / b for a, b in zip(ours.per_second, theirs.per_second, strict=True)]
    cpu = [a - b for a, b in zip(ours.caller_us, theirs.caller_us, strict=True)]
    report.say(f"Caller CPU, outbox - Langfuse's exporter: {middle(cpu)} us a span.")
    report.say(f"Spans made {made:,}, on the server {has:,}.")
    report.results.update(throughput_ratio=summary(pairs), caller_us_difference=summary(cpu))
    throughput = report.results["throughput_ratio"]["median"]
    report.target("spans a second, outbox to Langfuse's exporter", throughput, at_least=0.8, unit=" times")
    report.target("share of spans made that are on the server", has / made, at_least=1.0)
    report.write(options.json)
    if has != made:
        raise SystemExit("spans are missing")


if __name__ == "__main__":
    main()
