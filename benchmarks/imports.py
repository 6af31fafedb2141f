"""How long importing turntrace's handler takes in a process that has imported langgraph.graph and langfuse.

That is all that an app imports for it; its tracker, which is made once, loads the database's library.

Each time is of a fresh interpreter, with bytecode on disk; the cases take turns. Beside it: what the two take
themselves, and what Langfuse's own handler takes over them.

    python benchmarks/imports.py [--rounds 15] [--json FILE]
"""

import subprocess
import sys

from _tables import Report, arguments, as_installed, middle, summary

BASE = "import langgraph.graph, langfuse"
HANDLER = "from turntrace import SessionCallbackHandler"
CASES = {
    "langgraph.graph and langfuse": ("", BASE),
    "turntrace's handler, over them": (BASE, HANDLER),
    "the first tracker, over that": (f"{BASE}\n{HANDLER}, SessionTracker", "SessionTracker('sqlite://')"),
    "langfuse.langchain, over them": (BASE, "import langfuse.langchain"),
}
OURS = "turntrace's handler, over them"
TIMED = """{before}
import time
wall, cpu = time.perf_counter(), time.process_time()
{timed}
print(time.process_time() - cpu, time.perf_counter() - wall)
"""
MOST_MS = 150.0


def once(before: str, timed: str) -> tuple[float, float]:
    """Return milliseconds of CPU and of wall that something takes after something else."""
    code = TIMED.format(before=before, timed=timed)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=as_installed())
    cpu, wall = map(float, done.stdout.split())
    return cpu * 1e3, wall * 1e3


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    report = Report("Imports", __doc__)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for round_ in range(-1, options.rounds):
        for name, case in CASES.items():
            times = once(*case)
            if round_ >= 0:
                found[name].append(times)
    rows = []
    for name, times in found.items():
        cpu, wall = ([each[which] for each in times] for which in (0, 1))
        rows.append([name, middle(cpu), middle(wall)])
        report.results[name] = {"cpu_ms": summary(cpu), "wall_ms": summary(wall)}
    report.table("Import", ("what", "CPU, ms", "wall, ms"), rows)
    report.target("import of turntrace", report.results[OURS]["wall_ms"]["median"], at_most=MOST_MS, unit=" ms")
    report.write(options.json)


if __name__ == "__main__":
    main()
