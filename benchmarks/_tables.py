"""What every benchmark says beside its figures: the machine, the versions, medians with their ranges."""

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def machine() -> str:
    """Name the machine and the versions that the figures belong to."""
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as info:
            model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the architecture says enough
    packages = ("turntrace", "langgraph", "langchain-core", "langfuse", "opentelemetry-sdk")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}; {versions}"


def middle(values: Sequence[float]) -> str:
    """Write a median with the range of the middle half."""
    if len(values) < 4:
        return f"{statistics.median(values):.2f}"
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.2f} ({low:.2f}..{high:.2f})"
