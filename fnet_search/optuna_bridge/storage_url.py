"""Storage URLs and the length of a lease, without importing Optuna, which takes a second."""

import re
from pathlib import Path

from fnet_search.base.errors import FnetError

WANTED = "give an Optuna storage URL, as in postgresql+psycopg://user@host/db, grpc://host:13000 or journal:PATH"
LEASE_SECONDS = 120.0
"""A lease that is not renewed for this long expires. Longer than a network outage of a minute."""


def masked(url: str) -> str:
    """A storage URL without its password, for people and files."""
    hidden = re.sub(r"(?<=://)([^:/@]*):.*@", r"\1:***@", url)
    return re.sub(r"(?i)((?:password|passwd)=)[^&]*", r"\1***", hidden)


def cannot_open(url: str, reason: str) -> FnetError:
    """The error for a storage that cannot be opened, without its password."""
    return FnetError(f"cannot open storage {masked(url)} ({reason}); {WANTED}")


def check_there(url: str, new: bool) -> None:
    """Raises FnetError if the file of a URL does not exist; if it may be `new`, only if a journal's folder does not."""
    file = re.fullmatch(r"(journal:|sqlite(?:\+\w+)?:///)([^?]+)(?:\?.*)?", url)
    if file is None:
        return
    path = Path(file[2])
    if not new and not path.is_file():
        raise cannot_open(url, f"the file {path} does not exist")
    if file[1] == "journal:" and not path.parent.is_dir():
        raise cannot_open(url, f"the folder {path.parent} does not exist")
