"""Run all benchmarks, one after the other, each in a process of its own, and put what they found together.

With --quick, each is a small one: together they take less than three minutes on an idle machine with two cores, and say
whether something has changed much, not by how much.

    python benchmarks/run.py [--quick] [--only NAME ...] [--json FILE] [--markdown FILE] [--from FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUICK = {
    "turn_overhead": ["--rounds", "5", "--turns", "1", "400", "--together", "1"],
    "ways": ["--rounds", "5"],
    "memory": ["--growth", "1000", "--repeats", "1"],
    "imports": ["--rounds", "2"],
    "context": ["--rounds", "5", "--conversations", "200"],
    "ledger": ["--rounds", "20", "--turns", "20000"],
    "export": ["--rounds", "2", "--turns", "100"],
    "analytics": ["--rounds", "2", "--turns", "20000"],
}
"""The benchmarks, in the order in which they run, with what makes them quick."""
HEAD = """# Benchmarks

`make bench` wrote this file: run it again on an idle machine for figures of your own. It makes an environment beside
the tests' (`{venv}`) with the other tracers and runs every script in `benchmarks/`; this run took {took}.
`make bench-quick` runs small ones with what is installed, in less than three minutes, and writes no file but
`benchmarks/results/quick.json`; `python benchmarks/NAME.py --help` runs one by itself.

Each figure was measured in one run beside what it is compared with, in an order that changed from round to round; a
table has medians, in brackets the middle half. What is measured how stands at the top of each script.

- Date: {date}, {rounds}
- Machine: {machine}
- Load before it began: {load:.1f}; above 0.5 the machine was not idle, and figures of time are not to be relied on
"""

LIMITS = {
    "process CPU below Langfuse's": (
        "Who sends spans pays for making them and for a request. The row `one bare OTel span a run` is what that takes "
        "with OpenTelemetry's own exporter, with nothing written down and nothing known of the turn; a ledger comes on "
        "top of it. By how much that row is below Langfuse's handler stands among the ratios: where that is less than "
        "the target, no ledger can meet it. Of what the thread that writes takes, a third is SQLite itself, and of the "
        "rest no line of Python more than a twentieth. At turn 400 the same work takes it more than twice the time of "
        "turn 1, while the graph beside it puts all else out of the processor's caches. An encoder and a ledger in C "
        "would bring turntrace nearer to that row."
    ),
    "turntrace to one span a run, in callbacks": (
        "The ledger gives a turn its number before the first node runs, so that every span has it: a row of SQLite's, "
        "about a quarter of the time in callbacks. A number guessed in memory would be quicker, and wrong where two "
        "processes serve a conversation."
    ),
    "turntrace in callbacks, turn": (
        "Nothing in the callbacks reads the history: they make as many calls of functions at turn 1,000 as at turn 2 "
        "(a test). But a graph with a long one leaves the processor's caches cold for whatever runs next: the row `one "
        "bare OTel span a run` grows as well."
    ),
    "most memory of turntrace": (
        "SQLAlchemy takes about 13 MB of it, the price list of genai-prices 5, the client for HTTP 4, of which HTTP/2 "
        "is 1.4 and not turntrace's: httpx loads it in the environment of the other tracers. A ledger without "
        "SQLAlchemy would save the first. An app that imports `langfuse`, or has a provider of its own, has Langfuse's "
        "client beside it, which takes 7."
    ),
    "growth of turntrace": "Caches with a bound (sessions, ids and counts of messages) that are not full yet.",
    "fit, 3 new, faster than recount": (
        "A fit looks at every message of the list, to know that it is the one that was counted."
    ),
    "prunes to half, to one pass": (
        "That pass knows the messages by identity from the call before, and takes 0.14 ms of 1,000. Pruning looks anew "
        "at what each one is and which belong together; kept beside the history that is held, a third of its time "
        "would be saved. (The target was met when the pass took 0.36 ms and pruning 0.98; now pruning takes 0.72.)"
    ),
    "all that a report asks": (
        "SQLite counts by sorting: six of the questions read every turn and sort a million rows, in C. A scan of all "
        "turns takes 0.1 s and a sort of them 0.1 to 0.6 s. More processors help (four are used where they are)."
    ),
}
"""By words of a target: what limits it where it is missed, and what would help."""


def run(names: list[str], *, quick: bool) -> dict[str, Any]:
    """Run benchmarks; return what each found."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / f"{name}.json"
            command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(path), *(QUICK[name] if quick else [])]
            done = subprocess.run(command, check=False)
            if not path.exists():
                raise SystemExit(f"benchmarks/{name}.py found nothing: it ended with {done.returncode}.")
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


# --- what is written --------------------------------------------------------------------------------------------------
def row_of(cells: list[str]) -> str:
    """Write a row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table_of(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    """Write a Markdown table."""
    lines = [row_of(header), row_of(["---"] * len(header)), *(row_of(row) for row in rows if row)]
    return [f"**{title}**", "", *lines, ""] if title else [*lines, ""]


def targets_of(found: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of targets."""
    return [
        [f"{name}.py", target["what"], target["wanted"], target["said"], target["verdict"]]
        for name, each in found.items()
        for target in each["targets"]
    ]


def limits_of(rows: list[list[str]]) -> list[str]:
    """Return a list of what limits the targets that are missed."""
    missed = [what for _, what, _, _, verdict in rows if verdict != "met"]
    lines = [f"- {words}: {why}" for words, why in LIMITS.items() if any(words in what for what in missed)]
    return ["What limits those that are missed, and what would help:", "", *lines, ""] if lines else []


def markdown(found: dict[str, Any], took_s: float, *, quick: bool) -> str:
    """Write all that was found."""
    any_of = next(iter(found.values()))
    took = f"about {max(1, round(took_s / 60))} minutes"
    rounds = "a small run (--quick)" if quick else "a full run"
    its = {"date": any_of["date"], "machine": any_of["machine"], "load": any_of["load"]}
    head = HEAD.format(venv=".venv-bench", took=took, rounds=rounds, **its)
    lines = [head, "## Targets", ""]
    rows = targets_of(found)
    lines += [*table_of("", ["by", "what", "target", "measured", ""], rows), *limits_of(rows)]
    for name, each in found.items():
        lines += [f"## {each['title']}", "", f"{each['about']} (`benchmarks/{name}.py`, {each['seconds']} s)", ""]
        for table in each["tables"]:
            lines += table_of(table["title"], table["header"], table["rows"])
        lines += [line for note in each["notes"] for line in (note, "")]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(QUICK), default=list(QUICK), metavar="NAME")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "results.json")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--from", dest="found", type=Path, help="write the tables of an earlier run's JSON")
    options = parser.parse_args()
    if options.found is not None:
        earlier = json.loads(options.found.read_text(encoding="utf-8"))
        found, took_s, quick = earlier["benchmarks"], earlier["seconds"], earlier["quick"]
    else:
        began, quick = time.monotonic(), options.quick
        found = run(options.only, quick=options.quick)
        took_s = time.monotonic() - began
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"seconds": took_s, "quick": quick, "benchmarks": found}, indent=1), encoding="utf-8"
        )
        print(f"All took {took_s:.0f} s; the figures are in {options.json}.")
    targets = targets_of(found)
    missed = [row for row in targets if row[-1] != "met"]
    print(f"{len(targets) - len(missed)} targets met, {len(missed)} not:", flush=True)
    for by, what, wanted, said, verdict in missed:
        print(f"  {by}: {what}: {said} ({wanted}): {verdict}")
    if options.markdown is not None:
        options.markdown.write_text(markdown(found, took_s, quick=quick), encoding="utf-8")


if __name__ == "__main__":
    main()
