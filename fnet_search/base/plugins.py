"""Python code of users: named as ``FILE.py:NAME`` or ``package.module:NAME``, or installed as an entry point of one of
the groups ``fnet_search.policies``, ``fnet_search.datasets`` and ``fnet_search.range_methods``. Loading it runs it."""

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
    """Names of the installed entry points of a group, sorted."""
    return sorted(entry_points(group=group).names)


def load_installed(
    group: str,
    what: str,
    name: str,
    built_in: Iterable[str] = (),
    make: Callable[[Any], Any] = lambda loaded: loaded,
) -> Any:
    """`make` applied to the object of the entry point `name`. `what` is its kind in messages, as in "policy".

    Raises FnetError for a name that is not in the group (listing `built_in` names too) and for code that fails.
    """
    matching = entry_points(group=group, name=name)
    if not matching:
        raise unknown(what, name, [*built_in, *installed(group)])
    entry = next(iter(matching))
    try:
        return make(entry.load())
    except Exception as error:  # code of third parties may raise anything
        raise FnetError(f"{what} {name!r} cannot be loaded: {fault(error, entry.module)}") from error


@contextmanager
def importable(where: str) -> Iterator[None]:
    """Puts the folder of a ``.py`` file, or else the current folder, on the import path."""
    folder = str(Path(where).resolve().parent) if where.endswith(".py") else str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def load_object(where: str, what: str) -> Any:
    """The attribute `what` of a file or module; call it within `importable`.

    Raises FnetError if the file or the attribute does not exist, and whatever the loaded code raises.
    """
    module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    loaded = getattr(module, what, None)
    if loaded is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown("name", what, known)
    return loaded


def fault(error: BaseException, where: str) -> str:
    """Describes an error of a user's code, with the innermost line of the file or module `where` that led to it:
    ``ValueError: no plan today (halving.py, line 12)``."""
    description = f"{type(error).__name__}: {first_line(error)}"
    file = _file_of(where)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == file]
    if not frames or isinstance(error, SyntaxError):  # the message of a SyntaxError names its place
        return description
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f"{description} ({shown}, line {frames[-1].lineno})"


def _file_of(where: str) -> Path:
    file = getattr(sys.modules.get(where), "__file__", None)
    if file is None and not where.endswith(".py"):
        with suppress(Exception):  # `where` may not be importable
            file = getattr(importlib.util.find_spec(where), "origin", None)
    return Path(file or where).resolve()


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
