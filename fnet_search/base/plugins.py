"""What users bring of their own Python, whose code is run: named as ``FILE.py:NAME`` or ``package.module:NAME``, or
installed as an entry point of one of the groups ``fnet_search.policies``, ``.datasets`` and ``.range_methods``."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fnet_search.base.errors import FnetError, first_line, unknown


def installed(group: str) -> list[str]:
    """Names of the entry points of a group."""
    return sorted(entry_points(group=group).names)


def load_installed(
    group: str,
    what: str,
    name: str,
    built_in: Iterable[str] = (),
    make: Callable[[Any], Any] = lambda found: found,
) -> Any:
    """What `make` makes of the entry point of that name; `what` it is, for people.

    Raises FnetError for a name that is neither in the group nor `built_in`, and for code that fails.
    """
    found = entry_points(group=group, name=name)
    if not found:
        raise unknown(what, name, [*built_in, *installed(group)])
    entry = next(iter(found))
    try:
        return make(entry.load())
    except Exception as error:  # a third party's code raises what it likes
        raise FnetError(f"{what} {name!r} cannot be loaded: {fault(error, entry.module)}") from error


@contextmanager
def importable(where: str) -> Iterator[None]:
    """What lies beside a file, or in the current folder, can be imported."""
    folder = str(Path(where).resolve().parent) if where.endswith(".py") else str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def load_object(where: str, what: str) -> Any:
    """The object `what` of a file or module; to be called within `importable`. Raises FnetError for what is not there,
    and whatever the code raises."""
    module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    found = getattr(module, what, None)
    if found is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown("name", what, known)
    return found


def fault(error: BaseException, where: str) -> str:
    """What a user's code raised, and the last line of `where`, a file or module, that led to it:
    ``ValueError: no plan today (halving.py, line 12)``."""
    said = f"{type(error).__name__}: {first_line(error)}"
    file = _file_of(where)
    own = [one for one in traceback.extract_tb(error.__traceback__) if Path(one.filename).resolve() == file]
    if not own or isinstance(error, SyntaxError):  # which says itself where
        return said
    return (
        f"{said} ({file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}, line {own[-1].lineno})"
    )


def _file_of(where: str) -> Path:
    known = getattr(sys.modules.get(where), "__file__", None)
    if known is None and not where.endswith(".py"):
        with suppress(Exception):  # it may be no module at all
            known = getattr(importlib.util.find_spec(where), "origin", None)
    return Path(known or where).resolve()


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FnetError(f"the file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"fnet_search_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
