"""Where a run folder has its configuration. Light, so that a path that is no run is told of at once."""

from pathlib import Path

from fnet_search.base.errors import FnetError

CONFIG = "config.json"


def config_file(folder: Path) -> Path:
    """Raises FnetError for a folder that is not one of a run."""
    if not (folder / CONFIG).is_file():
        raise FnetError(f"{folder} is not a run folder: it has no {CONFIG}")
    return folder / CONFIG
