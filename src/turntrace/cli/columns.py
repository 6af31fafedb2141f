"""Tables that fit the terminal: where it is too narrow for all columns, those that matter least are left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from turntrace.cli.render import is_plain

_GAP: Final = 2
NEEDED: Final = 4
_LONG: Final = 16
_ASCII: Final = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""What `rich.box.SIMPLE_HEAD` is where only ASCII can be shown."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its head.
        cells: Its cells.
        rank: How soon it is left out: the highest first, 0 never.
        justify: Where its cells stand.
        least: How narrow it may become, its texts cut; None for one whose cells are always whole.
        fill: How wide it is at least, so that it stands below that of another table.
    """

    name: str
    cells: Sequence[Text]
    rank: int = 0
    justify: Literal["left", "right"] = "left"
    least: int | None = None
    fill: int = 0

    @property
    def width(self) -> int:
        """How wide it is with all its texts whole."""
        return max(self.fill, len(self.name), *(cell.cell_len for cell in self.cells), 0)

    @property
    def good_width(self) -> int:
        """How wide it is with no text cut but very long ones."""
        return self.width if self.least is None else min(self.width, max(self.least_width, _LONG))

    @property
    def least_width(self) -> int:
        """How wide it is with its texts cut as far as they may be."""
        return self.width if self.least is None else min(self.width, max(self.least, len(self.name)))


def figures(name: str, cells: Sequence[str], rank: int = 0) -> Column:
    """Return a column of figures."""
    return Column(name, [Text(cell) for cell in cells], rank, "right")


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that stay in a terminal of so many columns; those of rank 0 also where they do not fit.

    Those of a rank above `NEEDED` are there only where texts are whole; before others go, texts are cut.
    """
    kept = list(columns)
    while kept and (last := max(kept, key=lambda column: column.rank)).rank:
        if fits(kept, width, whole=last.rank > NEEDED):
            break
        kept.remove(last)
    return kept


def fits(columns: Sequence[Column], width: int, *, whole: bool = False) -> bool:
    """Tell whether a table of these columns can be drawn in so many columns of a terminal.

    Args:
        columns: The columns.
        width: Columns of the terminal.
        whole: Whether no text may be cut but very long ones.
    """
    widths = (column.good_width if whole else column.least_width for column in columns)
    return sum(widths) + gaps(columns) <= width


def gaps(columns: Sequence[Column]) -> int:
    """Return how wide the gaps between the columns are together."""
    return _GAP * (len(columns) - 1)


def draw(console: Console, columns: Sequence[Column]) -> list[str]:
    """Draw a table of the columns that fit, and return the names of those that do not."""
    # The box puts a space between columns by itself.
    plain = is_plain(console)
    table = Table(
        box=_ASCII if plain else box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0)
    )
    cut: Literal["crop", "ellipsis"] = "crop" if plain else "ellipsis"
    kept = fitting(columns, console.width)
    for column, width in zip(kept, _widths(kept, console.width), strict=True):
        table.add_column(column.name, justify=column.justify, no_wrap=True, overflow=cut, width=width)
    for cells in zip(*(column.cells for column in kept), strict=True):
        table.add_row(*cells)
    console.print(table)
    return [column.name for column in columns if column.name and column not in kept]


def say_left_out(console: Console, names: Sequence[str]) -> None:
    """Say which columns the terminal has no room for; who reads from a pipe is told nothing."""
    if names and console.file.isatty():
        console.print(Text(f"left out for width: {', '.join(names)}; --json has all", style="dim"))


def _widths(columns: Sequence[Column], room: int) -> list[int]:
    """Return how wide the columns are: the widest of those that may be cut give way first."""
    widths = [column.width for column in columns]
    while sum(widths) + gaps(columns) > room:
        can = [number for number, column in enumerate(columns) if widths[number] > column.least_width]
        if not can:
            break
        widths[max(can, key=lambda number: widths[number])] -= 1
    return widths
