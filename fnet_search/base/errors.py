"""The one error that users see: a line that says what is wrong and what would be right.

A message names a parameter by its Python name in backquotes, as in "choose another `out`". The command line replaces it
by the option of that name (`cli.options.with_options`).
"""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 100
"""Characters of a name that an error quotes."""
FEW = 12
"""So many names are listed beside the nearest."""


class FnetError(Exception):
    """Bad input or an unusable file. The command line prints it as one line and exits with code 2."""


def check_least(least: int, **given: float | None) -> None:
    """Raises FnetError for a parameter, by name, whose value is below `least`; None has no limit."""
    for name, value in given.items():
        if value is not None and value < least:
            raise FnetError(f"`{name}` must be at least {least}, not {value}")


def first_line(error: BaseException) -> str:
    """Of what others raise, the first line that says anything; the kind of the error where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the known name closest to `name`, or the known names."""
    names = list(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"; known: {shown}" if names else ""


def unknown(what: str, name: str, known: Iterable[str]) -> FnetError:
    """The error for a name that is not among the known ones, with the nearest of them, and all where they are few."""
    names = list(known)
    shown = name if len(name) <= LONGEST else f"{name[:LONGEST]}..."
    hint = nearest(shown, names)
    others = f" known: {', '.join(names)}" if hint.endswith("?") and 1 < len(names) <= FEW else ""
    return FnetError(f"unknown {what} {shown!r}{hint}{others}")
