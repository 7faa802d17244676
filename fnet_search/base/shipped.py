"""Finds the data that ships with the package, in a wheel and in a checkout."""

from os.path import isfile
from pathlib import Path

from fnet_search.base.errors import FnetError, unknown

PACKAGE = Path(__file__).parents[1]
"""The package folder `fnet_search`."""


def folder(kind: str) -> Path:
    """The folder of shipped files of a kind (``spaces``, ``recipes``): in the package, else in the checkout."""
    return next((folder for folder in (PACKAGE / kind, PACKAGE.parent / kind) if folder.is_dir()), PACKAGE / kind)


def names(kind: str) -> list[str]:
    """Names of the shipped TOML files of a kind, without the ending, sorted."""
    return sorted(path.stem for path in folder(kind).glob("*.toml"))


def find(kind: str, singular: str, name: str) -> Path:
    """The path of a TOML file, given as a shipped name or as the path of a file.

    Raises FnetError if it is neither, naming the nearest shipped name.
    """
    shipped = folder(kind) / f"{name}.toml"
    if name in names(kind):
        return shipped
    if name.endswith(".toml") or isfile(name):  # noqa: PTH113 (Path.is_file raises for a name that is too long)
        if not isfile(name):  # noqa: PTH113
            raise FnetError(f"{singular} file {name} does not exist")
        return Path(name)
    raise unknown(singular, name, names(kind))
