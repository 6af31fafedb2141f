"""The code of the README is run by the tests, on a ledger of its own."""

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser


@pytest.fixture(scope="module")
def ledger_of_the_readme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep the README's code away from the ledger of whoever runs the tests."""
    path = tmp_path_factory.mktemp("readme") / "ledger.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURNTRACE_LEDGER_URL", f"sqlite:///{path}")
        yield path


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["README.md"], fixtures=["ledger_of_the_readme"]
).pytest()
