"""Runs commands in this process, with what they print and what they print as errors apart."""

import inspect
from typing import Any

from typer.testing import CliRunner

APART: Any = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner.__init__).parameters else {}
"""What an older click is told, which puts both together by default."""


def runner() -> CliRunner:
    """Return what runs a command."""
    return CliRunner(**APART)
