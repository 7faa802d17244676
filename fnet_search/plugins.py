"""What users name of their own Python, as ``FILE.py:NAME`` or ``package.module:NAME``; its code is run."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fnet_search.errors import FnetError, first_line, unknown


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


def fault(error: BaseException, where: object) -> str:
    """What a user's code raised, and the last line of `where` (a file or module) that led to it, or else of any code
    but ours: ``ValueError: no plan today (halving.py, line 12)``."""
    said = f"{type(error).__name__}: {first_line(error)}"
    file = Path(str(getattr(sys.modules.get(str(where)), "__file__", where))).resolve()
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith("<")]
    theirs = [one for one in frames if not Path(one.filename).is_relative_to(Path(__file__).parent)]
    own = [one for one in theirs if Path(one.filename).resolve() == file]
    if isinstance(error, SyntaxError) or not theirs:  # it says itself where
        return said
    last = (own or theirs)[-1]
    path = Path(last.filename)
    return f"{said} ({path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}, line {last.lineno})"


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
