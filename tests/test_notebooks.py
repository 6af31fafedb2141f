"""Each notebook runs from a clean kernel, and what is committed in it is what it gives.

``python tests/test_notebooks.py`` runs them all and writes what they give into them.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = ["01_quickstart", "02_context_window", "03_dropoff_and_journeys"]
MOST_BYTES = 200_000
FIGURE = "application/vnd.plotly.v1+json"
_CHANGES = (
    (re.compile(r"\b[0-9a-f]{8,64}\b"), "<id>"),
    (re.compile(r"\b20\d\d-\d\d-\d\d([T ][\d:.]+(Z|[+-]\d\d:?\d\d)?)?"), "<time>"),
    (re.compile(r"\b\d[\d,.]* m?s\b"), "<duration>"),
    (re.compile(r" at 0x[0-9a-f]+"), ""),
)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def executed(path: Path, folder: Path, **variables: str) -> Any:
    """Run a copy of a notebook in a folder of its own, from a clean kernel, and return it."""
    work = folder / "notebooks"
    shutil.copytree(FOLDER, work, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    notebook = read(work / path.name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LANGFUSE_", "TURNTRACE_"))}
    homes = {name: str(folder / name) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    ledger = {"TURNTRACE_LEDGER_URL": f"sqlite:///{folder / 'ledger.db'}"}
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(work)}},
    )
    # A warning that Python would keep to itself is written to stderr, where the test finds it; one is LangGraph's own.
    warned = {"PYTHONWARNINGS": "default,ignore:AgentStatePydantic has been moved"}
    client.execute(env={**kept, **homes, **ledger, **warned, **variables})
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(cell: Any) -> list[tuple[str, Any]]:
    """Return what a cell gives: its texts, without what changes from run to run, and the names in its figures."""
    found: list[tuple[str, Any]] = []
    for output in cell.outputs:
        if output.output_type == "stream" and found and found[-1][0] == output.name:
            found[-1] = (output.name, found[-1][1] + output.text)  # it comes in as many pieces as it happens to
        elif output.output_type == "stream":
            found.append((output.name, output.text))
        elif output.output_type == "error":
            found.append(("error", output.ename))
        elif FIGURE in output.data:
            found.append(("figure", [trace.get("name") for trace in output.data[FIGURE]["data"]]))
        else:
            found.append(("result", output.data.get("text/plain", "")))
    return [(kind, unchanging(what) if isinstance(what, str) else what) for kind, what in found]


def unchanging(text: str) -> str:
    for pattern, instead in _CHANGES:
        text = pattern.sub(instead, text)
    return text


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_what_is_committed(path: Path, tmp_path: Path) -> None:
    committed = read(path)
    given = executed(path, tmp_path)
    for before, now in zip(code_cells(committed), code_cells(given), strict=True):
        outputs = outputs_of(now)
        assert not [what for kind, what in outputs if kind in ("stderr", "error")]
        assert outputs_of(before) == outputs, f"run python tests/{Path(__file__).name} to write what it gives"
    assert not (tmp_path / "ledger.db").exists()  # a notebook leaves the ledger of whoever runs it alone


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_small_and_in_order(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    for cell in notebook.cells:
        assert set(cell.metadata) == set()
    text = path.read_text(encoding="utf-8")
    for unwanted in ("/tmp/", "/home/", "/Users/", str(Path.cwd()), "plotly.js", "<script"):
        assert unwanted not in text


def test_conversations_of_ones_own_can_be_looked_at(airline: Path, tmp_path: Path) -> None:
    given = executed(FOLDER / "03_dropoff_and_journeys.ipynb", tmp_path, CONVERSATIONS=str(airline))
    outputs = [output for cell in code_cells(given) for output in outputs_of(cell)]
    assert {kind for kind, _ in outputs} == {"stdout", "figure"}
    assert " of 100 sessions" in "".join(what for kind, what in outputs if kind == "stdout")


def refresh() -> None:
    """Write what each notebook gives into it."""
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        nbformat.write(notebook, path)  # type: ignore[no-untyped-call]
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    refresh()
