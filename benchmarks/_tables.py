"""What every benchmark says beside its figures, and how: tables, targets, the machine; printed, and as JSON."""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PACKAGES = ("turntrace", "langgraph", "langchain-core", "langfuse", "opentelemetry-sdk")
PEERS = ("openinference-instrumentation-langchain", "langsmith", "opik")
RESAMPLES = 300
LOST = "lost in noise"


def machine() -> str:
    """Name the machine and the versions that the figures belong to."""
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as info:
            model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the architecture says enough
    known = ", ".join(f"{name} {number}" for name in PACKAGES + PEERS if (number := _version(name)))
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}; {known}"


def as_installed() -> dict[str, str]:
    """Return the environment for a process in which Python keeps what it has compiled, as of a package's modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- figures ----------------------------------------------------------------------------------------------------------
def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the quartiles and how many there are."""
    low, middle_one, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    return {"median": middle_one, "q1": low, "q3": high, "n": len(values)}


def middle(values: Sequence[float]) -> str:
    """Write a median with the range of the middle half."""
    found = summary(values)
    return f"{found['median']:.2f}" + (f" ({found['q1']:.2f}..{found['q3']:.2f})" if len(values) > 3 else "")


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Return the ratio of two medians of the same rounds, with the range that nine in ten of resampled rounds give."""
    chance = random.Random(1)
    rounds = range(min(len(over), len(under)))
    found = []
    for _ in range(RESAMPLES):
        chosen = chance.choices(rounds, k=len(rounds))
        found.append(_divided([over[each] for each in chosen], [under[each] for each in chosen]))
    cuts = statistics.quantiles(found, n=20)
    return {"ratio": _divided(over, under), "low": cuts[0], "high": cuts[-1], "n": len(rounds)}


def _divided(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(over) / (statistics.median(under) or float("nan"))


def ranged(found: dict[str, float]) -> str:
    """Write what `ratio` returned, where the rounds tell it apart from none at all."""
    if found["low"] <= 0 or found["ratio"] <= 0:
        return LOST
    return f"{found['ratio']:.2f} ({found['low']:.2f}..{found['high']:.2f})"


# --- what is said -----------------------------------------------------------------------------------------------------
class Report:
    """What a benchmark found: printed as it comes, and written as JSON at the end.

    Args:
        title: What was measured.
        doc: The words about it; the first line of the module's docstring goes into BENCHMARKS.md.
    """

    def __init__(self, title: str, doc: str | None) -> None:
        self._console = Console(width=150, highlight=False)
        self._found: dict[str, Any] = {
            "title": title,
            "about": (doc or "").strip().split("\n\n")[0].replace("\n", " "),
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
            "load": os.getloadavg()[0],
            "tables": [],
            "targets": [],
            "notes": [],
            "results": {},
        }
        self._began = time.monotonic()
        self._console.print(f"[bold]{title}[/] on {escape(machine())}")

    @property
    def results(self) -> dict[str, Any]:
        """The figures, by name."""
        results: dict[str, Any] = self._found["results"]
        return results

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; a row without cells is a line."""
        table = Table(*map(escape, header), title=escape(title))
        for row in rows:
            if row:
                table.add_row(*map(escape, row))
            else:
                table.add_section()
        self._console.print(table)
        self._found["tables"].append({"title": title, "header": list(header), "rows": [list(row) for row in rows]})

    def say(self, words: str) -> None:
        """Print a line."""
        self._console.print(escape(words))
        self._found["notes"].append(words)

    def target(
        self,
        what: str,
        measured: float | dict[str, float],
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        unit: str = "",
    ) -> None:
        """Print a target, what was measured (a figure, or what `ratio` returned), and whether it is met."""
        figure = measured["ratio"] if isinstance(measured, dict) else measured
        said = ranged(measured) if isinstance(measured, dict) else f"{measured:.2f}"
        met = figure <= at_most if at_most is not None else figure >= (at_least or 0.0)
        verdict = "lost in noise" if said == LOST else "met" if met else "missed"
        wanted = f"at most {at_most:g}" if at_most is not None else f"at least {at_least:g}"
        colour = {"met": "green", "missed": "red"}.get(verdict, "yellow")
        self._console.print(
            f"{escape(what)}: {said}{unit if said != LOST else ''} ({wanted}{unit}): [{colour}]{verdict}[/]"
        )
        target = {
            "what": what,
            "measured": measured,
            "said": said if said == LOST else f"{said}{unit}",
            "wanted": f"{wanted}{unit}",
        }
        self._found["targets"].append(target | {"verdict": verdict})

    def write(self, path: Path | None) -> None:
        """Write all as JSON, where a path is given."""
        if path is not None:
            self._found["seconds"] = round(time.monotonic() - self._began)
            path.write_text(json.dumps(self._found, indent=1), encoding="utf-8")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was found here")
    return parser
