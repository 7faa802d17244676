"""What people see on a terminal: tables, as wide as it is."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """Standard output; where it is no terminal, wide enough for any table."""
    found = Console()
    return found if found.is_terminal else Console(width=160)


def plain_table(
    title: str, texts: Sequence[str], numbers: Sequence[str], rows: Iterable[tuple[Sequence[str], Sequence[str]]]
) -> Table:
    """A table of plain text, each row what stands under `texts` and under `numbers`."""
    found = Table(title=Text(title), title_justify="left")
    for name in texts:
        found.add_column(name, overflow="fold")
    for name in numbers:
        found.add_column(name, justify="right")
    for words, values in rows:
        found.add_row(*map(Text, (*words, *values)))
    return found
