"""Images in class folders, as for torchvision's ImageFolder: lists the samples and decodes them."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from fnet_search.base.errors import FnetError, first_line
from fnet_search.policy.evaluation import HELD_OUT

Progress = Callable[[int, int], None]
"""Called with (images read, images in all)."""
Pixels = npt.NDArray[np.uint8]
Samples = list[tuple[Path, int]]
"""Files, each with the index of its class."""

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),  # torchvision's
    *(".gif", ".jpe", ".jfif", ".jp2", ".j2k", ".apng", ".pbm", ".pnm", ".dib", ".tga"),
    *(".avif", ".heic", ".heif"),  # listed, so that they are reported where Pillow cannot read them
)
VALIDATION = ("val", "valid", "validation")
"""Names that the folder of validation images may have."""
CLUTTER = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"}
"""Folders that operating systems, file servers and tools leave behind: no classes."""
RANGES = (2**8 - 1, 2**16 - 1, 2**24 - 1, 2**31 - 1)
"""The largest values of 1, 2 and 3 unsigned bytes and of 4 signed ones."""
LISTED = 10
"""Unreadable images that a message names at most."""


def validation_folder(root: Path | None, named: str | None) -> Path | None:
    """The folder of the validation images: `named`, absolute or relative to the data set's `root`, else the one of
    VALIDATION in `root`. None if there is none, or if `named` is HELD_OUT.

    Raises FnetError if `named` does not exist, if there are several, and if it is the folder of the training or the
    test images.
    """
    if named == HELD_OUT:
        return None
    if named is not None:
        folders = [(root or Path()) / Path(named).expanduser()]
        if not folders[0].is_dir():
            raise FnetError(f"`validation` {folders[0]} is not an existing folder; give one that holds class folders")
    else:
        folders = [] if root is None else [root / name for name in VALIDATION if (root / name).is_dir()]
    if len(folders) > 1:
        names = " and ".join(f"{folder.name}/" for folder in folders)
        raise FnetError(f"imagefolder {root} has {names}; name the folder of validation images with `validation`")
    for folder in folders:
        for part, name in (("train", "training"), ("test", "test")):
            if root is not None and (root / part).is_dir() and folder.samefile(root / part):
                raise FnetError(
                    f"the validation images {folder} are the {name} images; name another folder with `validation`"
                )
    return folders[0] if folders else None


CLASS_FOLDERS = "class folders must lie in train/ and test/"


def training_folder(root: Path) -> Path:
    """The folder of the training images of an image folder. Raises FnetError if it does not exist."""
    if not (root / "train").is_dir():
        raise FnetError(f"imagefolder {root}: {root / 'train'} does not exist; {CLASS_FOLDERS}")
    return root / "train"


def list_folder(root: Path, needs_test: bool) -> tuple[tuple[str, ...], dict[str, Samples]]:
    """The classes of an image folder, and the samples of ``train`` and, if it exists, of ``test``.

    A class folder in test/ may be missing. Raises FnetError for fewer than two classes, a class without a training
    image, a class that only test/ has, and a missing test/ if `needs_test`.
    """
    subject, train, test = f"imagefolder {root}", training_folder(root), root / "test"
    if needs_test and not test.is_dir():
        without = "or, for the validation split, as in a search, in train/ and val/"
        raise FnetError(f"{subject}: {test} does not exist; {CLASS_FOLDERS}, {without}")
    folders = class_folders(train)
    if len(folders) < 2:
        raise FnetError(f"{subject}: train/ holds {len(folders)} class folders; at least 2 are needed")
    files = {"train": samples(train, tuple(folders), subject, all_classes=True)}
    if test.is_dir():
        files["test"] = samples(test, tuple(folders), subject)
    return tuple(folders), files


def class_folders(folder: Path) -> dict[str, Path]:
    """The class folders in `folder` by class name, in order.

    Names are normalised to Unicode NFC, because macOS and Linux write the same name differently. Raises FnetError for
    two folders with the same normalised name, and for a broken link.
    """
    folders: dict[str, Path] = {}
    for path in _inside(folder):
        name = _spelling(path.name)
        if not path.exists():
            raise FnetError(f"{path} is a broken link; remove it")
        if path.is_dir() and name in folders:
            raise FnetError(
                f"{folder} holds class {name!r} twice, written differently in Unicode; merge the two folders"
            )
        if path.is_dir():
            folders[name] = path
    return folders


def samples(folder: Path, classes: Sequence[str], subject: str, all_classes: bool = False) -> Samples:
    """The images in the class folders of `folder`, class by class, each class ordered by path.

    Raises FnetError, its message starting with `subject`, for a folder of an unknown class and for a folder without
    images; with `all_classes`, also for a class without images.
    """
    folders = class_folders(folder)
    if others := [name for name in folders if name not in classes]:
        raise FnetError(f"{subject}: class {others[0]!r} is in {folder.name}/ but not among the training images")
    by_class = [_images(folders[name]) if name in folders else [] for name in classes]
    empty = [] if any(by_class) else [folder]
    if all_classes:
        empty = [folders[name] for name, paths in zip(classes, by_class, strict=True) if not paths]
    if empty:
        raise FnetError(f"{subject}: {empty[0]} holds no image ({', '.join(EXTENSIONS)})")
    return [(path, label) for label, paths in enumerate(by_class) for path in paths]


def _images(folder: Path) -> list[Path]:
    return sorted(_walk(folder, frozenset()), key=lambda path: ([*map(_spelling, path.parts)], path.parts))


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Yields the image files, following links to folders except to those `above`, and broken links, to report them."""
    status = folder.stat()
    place = status.st_dev, status.st_ino
    for path in [] if place in above else _inside(folder):
        if path.is_dir():
            yield from _walk(path, above | {place})
        elif not path.exists() or (path.is_file() and path.suffix.lower() in EXTENSIONS):
            yield path


def _inside(folder: Path) -> list[Path]:
    """The entries of a folder by name, without hidden ones (as ``._1.jpg`` of macOS) and CLUTTER."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 (Path.iterdir raises only when it is iterated)
    except OSError as error:
        raise FnetError(f"cannot read folder {folder}: {error.strerror}") from None
    shown = (name for name in names if not name.startswith(".") and name not in CLUTTER)
    return [folder / name for name in sorted(shown, key=lambda name: (_spelling(name), name))]


def _spelling(name: str) -> str:
    return normalize("NFC", name)


def first_size(root: Path) -> tuple[int, int] | None:
    """Width and height, upright, of the first readable training image; None if there is none."""
    for folder in class_folders(root / "train").values() if (root / "train").is_dir() else ():
        for path in _images(folder):
            with suppress(Exception):
                return _upright(path)[0].size
    return None


def read_images(
    files: Mapping[str, Samples], shape: tuple[int, int, int], progress: Progress, skip_unreadable: bool
) -> tuple[dict[str, tuple[Pixels, list[int]]], tuple[str, ...]]:
    """Reads the images [N, C, H, W] and classes of each split; also returns the unreadable files, with reasons.

    Raises FnetError, naming them, for unreadable images unless `skip_unreadable`, and for a class without a readable
    image.
    """
    total, done = sum(map(len, files.values())), 0
    splits: dict[str, tuple[Pixels, list[int]]] = {}
    unreadable: list[str] = []
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata
        for part, listed in files.items():
            images, labels = np.empty((len(listed), *shape), dtype=np.uint8), list[int]()
            for (path, label), image in zip(listed, pool.map(partial(_decoded, shape=shape), listed), strict=True):
                if isinstance(image, str):
                    unreadable.append(f"{path}: {image}")
                else:
                    images[len(labels)] = image
                    labels.append(label)
                done += 1
                if done % 256 == 0 or done == total:
                    progress(done, total)
            splits[part] = images[: len(labels)], labels
    if unreadable and not skip_unreadable:
        many = f"{len(unreadable):,} of {total:,} images:" if len(unreadable) > 1 else "image"
        raise FnetError(f"cannot read {many} {listing(unreadable)}; `skip_unreadable` leaves out unreadable images")
    for part, (_, labels) in splits.items():
        read = set(labels)
        if lost := [path for path, label in files[part] if label not in read]:
            raise FnetError(f"no image of the class of {lost[0]} can be read; replace one of them")
    return splits, tuple(unreadable)


def listing(texts: Sequence[str]) -> str:
    """The first LISTED texts, and the number of the others."""
    more = f"; and {len(texts) - LISTED:,} more" if len(texts) > LISTED else ""
    return "; ".join(texts[:LISTED]) + more


def _decoded(sample: tuple[Path, int], shape: tuple[int, int, int]) -> Pixels | str:
    """The pixels of a sample, or the reason why it is unreadable."""
    try:
        return decode(sample[0], shape)
    except Exception as error:  # broken files make Pillow's readers raise anything
        return first_line(error)


READING = (
    "Pillow: Image.open of an open file, its first image; ImageOps.exif_transpose",
    "grey of 16 bits: value // 257; grey of TIFF files of 32 bits: rint(255 * value / top), top the first of "
    f"{', '.join(map(str, RANGES))} (floats: of 1 and these) that no value of the image exceeds",
    "palettes: convert('RGBA')",
    "convert('RGB'), or for one channel convert('L'): transparency is dropped",
    "unless of this size: resize((width, height), BILINEAR), the whole image",
)
"""What `decode` does, in words, for programs that must read images in the same way."""


def decode(path: Path, shape: tuple[int, int, int]) -> Pixels:
    """Reads an image of any mode and size as uint8 [C, H, W]. Raises whatever Pillow raises."""
    image = _eight_bits(*_upright(path))
    if image.mode == "P":
        image = image.convert("RGBA")  # else a palette with transparency gives a warning
    image = image.convert("RGB" if shape[0] == 3 else "L")
    if image.size != (shape[2], shape[1]):
        image = image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def _upright(path: Path) -> tuple[Image.Image, str | None]:
    """An image rotated upright by its EXIF data, and its format; not rotated if its EXIF data is broken.

    Opened as a file object, not by name: Pillow would memory-map an uncompressed TIFF file, and rotating that garbles
    its pixels.
    """
    with path.open("rb") as file, Image.open(file) as opened:
        opened.load()
        try:
            opened.getexif()
        except Exception:  # broken EXIF data may raise anything
            return opened, opened.format
        return ImageOps.exif_transpose(opened), opened.format


def _eight_bits(image: Image.Image, kind: str | None) -> Image.Image:
    """Scales grey values of more than 8 bits to 8, which Pillow would clip.

    A file of 32 bits does not say its range: floats from 0 to 1, or integers of 8, 12 or 16 bits. The range is taken
    from the fewest whole bytes that hold all values, so that images of a kind get the same range unless they are almost
    black. Raises ValueError for values that are negative, not finite or too large.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or (image.mode == "I" and kind == "TIFF"):
        low, high = float(values.min()), float(values.max())
        tops: Iterable[int] = [top for top in ((1, *RANGES) if image.mode == "F" else RANGES) if high <= top]
        if not (low >= 0 and tops):
            raise ValueError(
                f"its values are from {low:g} to {high:g}; scale them to 0 to {RANGES[1]}, or floats to 0 to 1"
            )
        scaled = np.rint(values.astype(np.float64) * 255 / min(tops))
    else:
        scaled = np.clip(values // 257, 0, 255)
    return Image.fromarray(scaled.astype(np.uint8))
