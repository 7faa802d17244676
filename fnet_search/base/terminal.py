"""Tables on a terminal, fitted to its width."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """A console on standard output, 160 columns wide if that is not a terminal."""
    standard = Console()
    return standard if standard.is_terminal else Console(width=160)


def fitting(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    texts: Mapping[str, int],
    least: Iterable[str],
    between: int = 3,
    around: int = 1,
) -> list[int]:
    """Indices of the columns that fit into `width` characters.

    Columns named in `least` are dropped, in that order, until the rest fits. `texts` gives the widths to which columns
    of text may be folded. A column takes `between` more characters, the whole table `around` more.
    """
    widths = [
        max(cell_len(line) for cell in column for line in cell.split("\n")) for column in zip(names, *rows, strict=True)
    ]
    kept, droppable = list(range(len(names))), iter(least)

    def needed() -> int:
        return around + sum(between + min(widths[place], texts.get(names[place], widths[place])) for place in kept)

    while needed() > width and (dropped := next(droppable, None)) is not None:
        kept = [place for place in kept if names[place] != dropped]
    return kept


@dataclass(frozen=True)
class PlainTable:
    """A table of plain text with one column per name, cut to the width of the console by `fitting`.

    Columns in `texts` are folded if need be. All others hold numbers: aligned right, never wrapped.
    """

    title: str
    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Mapping[str, int]
    least: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        places = fitting(self.names, self.rows, options.max_width, self.texts, self.least)
        table = Table(title=Text(self.title), title_justify="left")
        for place in places:
            if self.names[place] in self.texts:
                table.add_column(self.names[place], overflow="fold")
            else:
                table.add_column(self.names[place], justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(row[place]) for place in places))
        yield table
