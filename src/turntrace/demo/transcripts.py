"""Reading files of recorded conversations, one JSON object a line, without holding more than a line of them."""

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from turntrace.demo.checking import transcript_of
from turntrace.demo.json_lines import value_of
from turntrace.demo.recording import Transcript
from turntrace.errors import TranscriptError

STDIN: Final = "-"
"""Stands for the standard input where a file is asked for."""

_LONGEST_LINE: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Source:
    """Where transcripts are read from.

    Attributes:
        name: What the user calls it.
        path: The file; None for the standard input.
        size: Its length in bytes, where that is known.
    """

    name: str
    path: Path | None
    size: int | None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a source, read: a transcript, or why it is none.

    Attributes:
        source: Name of the source.
        number: The line, from 1.
        length: Its length in bytes.
        problem: Why it cannot be played; it never says what stands there.
    """

    source: str
    number: int
    length: int
    transcript: Transcript | None = None
    problem: str | None = None


def find_sources(names: Iterable[str]) -> list[Source]:
    """Find the files to read, before any of them is read.

    Args:
        names: Files, folders (for all ``*.jsonl`` in them, sorted) and ``-`` for the standard input.

    Raises:
        TranscriptError: If one does not exist or cannot be read, if a folder has no such file, or if the standard
            input is named twice.
    """
    sources: list[Source] = []
    for name in names:
        if name == STDIN:
            if any(source.path is None for source in sources):
                raise TranscriptError("The standard input (-) can be read only once: name it once.")
            sources.append(Source("<stdin>", None, None))
        elif (path := Path(name)).is_dir():
            found = sorted(file for file in path.glob("*.jsonl") if not file.is_dir())
            if not found:
                raise TranscriptError(f"The folder {name} has no file *.jsonl. Name the files themselves.")
            sources += [_source(str(file), file) for file in found]
        else:
            sources.append(_source(name, path))
    return sources


def _source(name: str, path: Path) -> Source:
    try:
        status = path.stat()
    except OSError as error:
        raise TranscriptError(f"The file {name} cannot be read: {error.strerror}.") from None
    if not os.access(path, os.R_OK):  # opened only when its turn comes: a pipe can be opened once
        raise TranscriptError(f"The file {name} cannot be read: Permission denied.")
    return Source(name, path, status.st_size if stat.S_ISREG(status.st_mode) else None)


def read_lines(sources: Iterable[Source]) -> Iterator[Line]:
    """Read sources line by line; a line that cannot be read is given with its problem, an empty one is left out."""
    for source in sources:
        number = 0
        try:
            with _open(source) as file:
                for number, raw in enumerate(_lines(file), start=1):
                    if raw is None or raw.strip():
                        yield _read(source.name, number, raw)
        except OSError as error:
            yield Line(source.name, number + 1, 0, problem=f"the file cannot be read on: {error.strerror}")


def _open(source: Source) -> BinaryIO:
    if source.path is not None:
        return source.path.open("rb")
    # Not sys.stdin.buffer: a thread that still waits in it when the program ends would bring the interpreter down.
    return open(sys.stdin.fileno(), "rb", closefd=False)


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Give the lines of a file, and None for one that is too long to be held."""
    while raw := file.readline(_LONGEST_LINE):
        if raw.endswith(b"\n") or len(raw) < _LONGEST_LINE:
            yield raw
            continue
        yield None
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(_LONGEST_LINE)


def _read(source: str, number: int, raw: bytes | None) -> Line:
    if raw is None:
        return Line(source, number, 0, problem=f"it is longer than {_LONGEST_LINE // 1024**2} MB")
    try:
        return Line(source, number, len(raw), transcript=transcript_of(value_of(raw)))
    except TranscriptError as error:
        return Line(source, number, len(raw), problem=str(error))
    except RecursionError:
        return Line(source, number, len(raw), problem="it is nested too deeply")
