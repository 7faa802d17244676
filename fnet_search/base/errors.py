"""The error that users see: one line that says what is wrong, then what would be right.

A message names a parameter by its Python name in backquotes, as in "choose another `out`". The command line replaces it
by the option of that name (`cli.shared_options.with_options`).
"""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 100
"""Characters of a name that an error quotes at most."""
FEW = 12
"""Up to this many known names are listed after the nearest one."""


class FnetError(Exception):
    """Bad input or an unusable file. The command line prints it as one line and exits with code 2."""


def check_least(least: int, **given: float | None) -> None:
    """Raises FnetError, naming the parameter, if a value is below `least`. None is not checked."""
    for name, value in given.items():
        if value is not None and value < least:
            raise FnetError(f"`{name}` must be at least {least}, not {value}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, else the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: ``; did you mean 'x'?`` for the known name closest to `name`, else the known names."""
    names = list(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"; known: {shown}" if names else ""


def unknown(what: str, name: str, known: Iterable[str]) -> FnetError:
    """The error for an unknown name: suggests the nearest known one and lists all if there are at most FEW;
    without a near one, lists the first 20."""
    names = list(known)
    shown = name if len(name) <= LONGEST else f"{name[:LONGEST]}..."
    hint = nearest(shown, names)
    others = f" known: {', '.join(names)}" if hint.endswith("?") and 1 < len(names) <= FEW else ""
    return FnetError(f"unknown {what} {shown!r}{hint}{others}")
