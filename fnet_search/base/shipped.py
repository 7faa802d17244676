"""Where the data that ships with the package lies, in a wheel and in a checkout alike."""

from os.path import isfile
from pathlib import Path

from fnet_search.base.errors import FnetError, unknown

PACKAGE = Path(__file__).parents[1]
"""The folder of `fnet_search`."""


def folder(kind: str) -> Path:
    """The folder of the shipped ``kind`` (``spaces``, ``recipes``): in the package, else in the checkout."""
    return next((folder for folder in (PACKAGE / kind, PACKAGE.parent / kind) if folder.is_dir()), PACKAGE / kind)


def names(kind: str) -> list[str]:
    """Names of the shipped TOML files of a kind, sorted."""
    return sorted(path.stem for path in folder(kind).glob("*.toml"))


def find(kind: str, singular: str, name: str) -> Path:
    """The TOML file behind a shipped name or a path of the user's own.

    Raises FnetError for a name that is neither, naming the nearest shipped one.
    """
    shipped = folder(kind) / f"{name}.toml"
    if name in names(kind):
        return shipped
    if name.endswith(".toml") or isfile(name):  # noqa: PTH113 (False of what is too long for a path)
        if not isfile(name):  # noqa: PTH113
            raise FnetError(f"{singular} file {name} does not exist")
        return Path(name)
    raise unknown(singular, name, names(kind))
