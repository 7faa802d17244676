"""What can be named as a data set, checked without reading it. No torch, which takes seconds to import."""

from os.path import isdir
from pathlib import Path

from fnet_search.base.errors import FnetError, unknown
from fnet_search.base.plugins import installed
from fnet_search.training.imagefolder import training_folder, validation_folder

FOLDER = "imagefolder:"
BUILT_IN = ("digits", "cifar10", "cifar100", "fashion-mnist")
GROUP = "fnet_search.datasets"
"""Of entry points: each is a `datasets.Source`."""


def root_of(name: str) -> Path | None:
    """The folder of an image folder's name; None for other data sets."""
    return Path(name.removeprefix(FOLDER)).expanduser() if name.startswith(FOLDER) else None


def check_dataset(name: str, validation: str | None = None) -> None:
    """Raises FnetError for a name that no data set has, and for folders of images that are not there; `validation` is
    that of the validation images, where one is named."""
    root = root_of(name)
    if validation is not None:
        validation_folder(root, validation)
    if root is not None:
        training_folder(root)
    elif name not in BUILT_IN and name not in installed(GROUP):
        if isdir(name):  # noqa: PTH112 (False of what is too long for a path)
            raise FnetError(f"unknown data set {name!r}; images in a folder are {FOLDER}{name}")
        raise unknown("data set", name, [*BUILT_IN, f"{FOLDER}PATH", *installed(GROUP)])
