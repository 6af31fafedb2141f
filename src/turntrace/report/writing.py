"""The report as a file."""

import contextlib
import os
import time
from pathlib import Path

from turntrace.analytics import ALL, Filters
from turntrace.errors import ConfigurationError
from turntrace.ledger import Ledger
from turntrace.report.collect import Report, collect
from turntrace.report.langfuse import LangfusePlace
from turntrace.report.page import render


def write_report(
    ledger: Ledger,
    path: str | os.PathLike[str],
    filters: Filters = ALL,
    *,
    langfuse: LangfusePlace | None = None,
    now_ns: int | None = None,
) -> Report:
    """Write the report into one HTML file, which is whole or as it was before.

    Args:
        ledger: The ledger.
        path: The file.
        filters: Which sessions and turns it is about.
        langfuse: Where sessions are in Langfuse; None for no links.
        now_ns: The time, in nanoseconds since 1970. Default: now.

    Returns:
        The figures that were written.

    Raises:
        ConfigurationError: If plotly is not installed, or the file cannot be written.
        LedgerError: If the ledger cannot be read.
    """
    report = collect(ledger, filters, now_ns=time.time_ns() if now_ns is None else now_ns)
    page = render(report, langfuse=langfuse)
    try:
        _write(Path(path), page)
    except OSError as error:
        raise ConfigurationError(
            f"The report cannot be written to {path}: {error.strerror}. Pass a file in a folder that is there and can "
            "be written, as -o report.html."
        ) from error
    return report


def _write(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():  # a pipe or a device is written as it is; a folder says so
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{path.name[:40]}-{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
