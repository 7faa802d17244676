"""Checks names of data sets without reading the data. No torch, which takes seconds to import."""

from os.path import isdir
from pathlib import Path

from fnet_search.base.errors import FnetError, unknown
from fnet_search.base.plugins import installed
from fnet_search.training.imagefolder import training_folder, validation_folder

FOLDER = "imagefolder:"
BUILT_IN = ("digits", "cifar10", "cifar100", "fashion-mnist")
GROUP = "fnet_search.datasets"
"""The group of entry points; each names a `datasets.Source`."""


def root_of(name: str) -> Path | None:
    """The folder in ``imagefolder:PATH``; None for other data sets."""
    return Path(name.removeprefix(FOLDER)).expanduser() if name.startswith(FOLDER) else None


def check_dataset(name: str, validation: str | None = None) -> None:
    """Raises FnetError for an unknown data set, and for image folders that do not exist; `validation` is the folder of
    the validation images (`imagefolder.validation_folder`)."""
    root = root_of(name)
    if validation is not None:
        validation_folder(root, validation)
    if root is not None:
        training_folder(root)
    elif name not in BUILT_IN and name not in installed(GROUP):
        if isdir(name):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
            raise FnetError(f"unknown data set {name!r}; for images in a folder write {FOLDER}{name}")
        raise unknown("data set", name, [*BUILT_IN, f"{FOLDER}PATH", *installed(GROUP)])
