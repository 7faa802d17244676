"""What people see on a terminal: tables, as wide as it is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """Standard output; where it is no terminal, wide enough for any table."""
    found = Console()
    return found if found.is_terminal else Console(width=160)


def fitting(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    texts: Mapping[str, int],
    least: Iterable[str],
    between: int = 3,
    around: int = 1,
) -> list[int]:
    """The places of the columns of a table that `width` characters have room for.

    Those of `least` are left out where there is not, the first of them first. Columns of `texts` may be folded to so
    many characters. `between` two columns and `around` all of them stand so many more.
    """
    widths = [
        max(cell_len(line) for cell in column for line in cell.split("\n")) for column in zip(names, *rows, strict=True)
    ]
    found, going = list(range(len(names))), iter(least)

    def needed() -> int:
        return around + sum(between + min(widths[place], texts.get(names[place], widths[place])) for place in found)

    while needed() > width and (out := next(going, None)) is not None:
        found = [place for place in found if names[place] != out]
    return found


@dataclass(frozen=True)
class PlainTable:
    """A table of plain text with a column a name, as wide as the console at most, if `fitting` can make it so.

    Columns of `texts` are folded where they must; all others are numbers, which stand on the right, whole.
    """

    title: str
    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Mapping[str, int]
    least: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        places = fitting(self.names, self.rows, options.max_width, self.texts, self.least)
        found = Table(title=Text(self.title), title_justify="left")
        for place in places:
            if self.names[place] in self.texts:
                found.add_column(self.names[place], overflow="fold")
            else:
                found.add_column(self.names[place], justify="right", no_wrap=True)
        for row in self.rows:
            found.add_row(*(Text(row[place]) for place in places))
        yield found
