"""The configuration file of a run folder. Imports nothing heavy, so that a wrong path is reported at once."""

from pathlib import Path

from fnet_search.base.errors import FnetError

CONFIG = "config.json"


def config_path(folder: Path) -> Path:
    """The path of the configuration file. Raises FnetError if `folder` is not a run folder."""
    if not (folder / CONFIG).is_file():
        raise FnetError(f"{folder} is not a run folder: it has no {CONFIG}")
    return folder / CONFIG
