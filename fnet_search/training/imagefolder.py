"""Images in class folders, as torchvision's ImageFolder takes them: which files are samples, and their pixels."""

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
    *(".avif", ".heic", ".heif"),  # named as unreadable where Pillow cannot read them, not left out
)
VALIDATION = ("val", "valid", "validation")
"""What the folder of the validation images may be called."""
CLUTTER = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"}
"""Folders that operating systems, file servers and tools leave among those of the user."""
RANGES = (2**8 - 1, 2**16 - 1, 2**24 - 1, 2**31 - 1)
"""Largest values of as many whole bytes."""
LISTED = 10
"""So many unreadable images are named."""


def validation_folder(root: Path | None, named: str | None) -> Path | None:
    """Where the validation images lie: in `named`, which may be relative to the `root` of the data set's folders; else
    in the one of VALIDATION that is there. None: nowhere, or `named` is HELD_OUT.

    Raises FnetError for a folder that does not exist, for several, and for that of the training or the test images.
    """
    if named == HELD_OUT:
        return None
    if named is not None:
        found = [(root or Path()) / Path(named).expanduser()]
        if not found[0].is_dir():
            raise FnetError(f"`validation` {found[0]} does not exist, or is not a folder; class folders must lie in it")
    else:
        found = [] if root is None else [root / name for name in VALIDATION if (root / name).is_dir()]
    if len(found) > 1:
        names = " and ".join(f"{folder.name}/" for folder in found)
        raise FnetError(f"imagefolder {root}: {names} are there; name the validation images with `validation`")
    for folder in found:
        for part, name in (("train", "training"), ("test", "test")):
            if root is not None and (root / part).is_dir() and folder.samefile(root / part):
                raise FnetError(f"the validation images {folder} are the {name} images; name others with `validation`")
    return found[0] if found else None


CLASS_FOLDERS = "class folders must lie in train/ and test/"


def training_folder(root: Path) -> Path:
    """Where the training images of a data set in folders lie. Raises FnetError where it is not there."""
    if not (root / "train").is_dir():
        raise FnetError(f"imagefolder {root}: {root / 'train'} does not exist; {CLASS_FOLDERS}")
    return root / "train"


def list_folder(root: Path, needs_test: bool) -> tuple[tuple[str, ...], dict[str, Samples]]:
    """The classes of a data set in folders, and the samples of ``train`` and, where it is there, of ``test``.

    A class folder in test/ may be missing. Raises FnetError for fewer than two classes, one without a training image,
    one that only test/ has, and, if it is needed, a missing test/.
    """
    whose, train, test = f"imagefolder {root}", training_folder(root), root / "test"
    if needs_test and not test.is_dir():
        without = "or, for the validation split, as in a search, in train/ and val/"
        raise FnetError(f"{whose}: {test} does not exist; {CLASS_FOLDERS}, {without}")
    folders = class_folders(train)
    if len(folders) < 2:
        raise FnetError(f"{whose}: train/ holds {len(folders)} class folders; at least 2 are needed")
    files = {"train": samples(train, tuple(folders), whose, of_each=True)}
    if test.is_dir():
        files["test"] = samples(test, tuple(folders), whose)
    return tuple(folders), files


def class_folders(folder: Path) -> dict[str, Path]:
    """By the names of the classes, in order. Unicode writes one name in several ways, macOS others than Linux: names
    are in its form NFC. Raises FnetError where two are the same then, and for a link to nothing."""
    found: dict[str, Path] = {}
    for path in _inside(folder):
        name = _spelling(path.name)
        if not path.exists():
            raise FnetError(f"{path} is a link to nothing")
        if path.is_dir() and name in found:
            raise FnetError(f"{folder} holds class {name!r} twice, as Unicode may be written in several ways")
        if path.is_dir():
            found[name] = path
    return found


def samples(folder: Path, classes: Sequence[str], whose: str, of_each: bool = False) -> Samples:
    """The images in the class folders of `folder`, class by class, each class in order of paths.

    Raises FnetError, which begins with `whose` folder it is, for other classes, and where there is no image, or none
    `of_each` class.
    """
    folders = class_folders(folder)
    if others := [name for name in folders if name not in classes]:
        raise FnetError(f"{whose}: class {others[0]!r} is in {folder.name}/ but not among the training images")
    by_class = [_images(folders[name]) if name in folders else [] for name in classes]
    empty = [] if any(by_class) else [folder]
    if of_each:
        empty = [folders[name] for name, paths in zip(classes, by_class, strict=True) if not paths]
    if empty:
        raise FnetError(f"{whose}: {empty[0]} holds no image ({', '.join(EXTENSIONS)})")
    return [(path, label) for label, paths in enumerate(by_class) for path in paths]


def _images(folder: Path) -> list[Path]:
    return sorted(_walk(folder, frozenset()), key=lambda path: ([*map(_spelling, path.parts)], path.parts))


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Image files, in linked folders too, but not in one that is `above`; broken links, to be named."""
    status = folder.stat()
    place = status.st_dev, status.st_ino
    for path in [] if place in above else _inside(folder):
        if path.is_dir():
            yield from _walk(path, above | {place})
        elif not path.exists() or (path.is_file() and path.suffix.lower() in EXTENSIONS):
            yield path


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder, by name: nothing hidden, as ``._1.jpg`` of macOS, and no CLUTTER."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 (a generator's errors come later)
    except OSError as error:
        raise FnetError(f"cannot read folder {folder}: {error.strerror}") from None
    shown = (name for name in names if not name.startswith(".") and name not in CLUTTER)
    return [folder / name for name in sorted(shown, key=lambda name: (_spelling(name), name))]


def _spelling(name: str) -> str:
    return normalize("NFC", name)


def first_size(root: Path) -> tuple[int, int] | None:
    """Width and height of the first training image that can be read, upright; None: there is none."""
    for folder in class_folders(root / "train").values() if (root / "train").is_dir() else ():
        for path in _images(folder):
            with suppress(Exception):
                return _upright(path)[0].size
    return None


def read_images(
    files: Mapping[str, Samples], shape: tuple[int, int, int], progress: Progress, skip_unreadable: bool
) -> tuple[dict[str, tuple[Pixels, list[int]]], tuple[str, ...]]:
    """Of each split the images [N, C, H, W] and their classes; and which could not be read, with the reasons.

    Raises FnetError, naming them, for images that cannot be read, unless they are to be left out, and for a class of
    which all would be.
    """
    total, done = sum(map(len, files.values())), 0
    found: dict[str, tuple[Pixels, list[int]]] = {}
    unreadable: list[str] = []
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of Pillow, about large images and odd metadata
        for part, listed in files.items():
            images, labels = np.empty((len(listed), *shape), dtype=np.uint8), list[int]()
            for (path, label), image in zip(listed, pool.map(partial(_tried, shape=shape), listed), strict=True):
                if isinstance(image, str):
                    unreadable.append(f"{path}: {image}")
                else:
                    images[len(labels)] = image
                    labels.append(label)
                done += 1
                if done % 256 == 0 or done == total:
                    progress(done, total)
            found[part] = images[: len(labels)], labels
    if unreadable and not skip_unreadable:
        many = f"{len(unreadable):,} of {total:,} images:" if len(unreadable) > 1 else "image"
        raise FnetError(f"cannot read {many} {listing(unreadable)}; `skip_unreadable` leaves out what cannot be read")
    for part, (_, labels) in found.items():
        read = set(labels)
        if lost := [path for path, label in files[part] if label not in read]:
            raise FnetError(f"no image of the class of {lost[0]} can be read")
    return found, tuple(unreadable)


def listing(texts: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f"; and {len(texts) - LISTED:,} more" if len(texts) > LISTED else ""
    return "; ".join(texts[:LISTED]) + more


def _tried(sample: tuple[Path, int], shape: tuple[int, int, int]) -> Pixels | str:
    """The pixels, or why there are none."""
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
"""What `decode` does, in words, for whoever has to do it without this program."""


def decode(path: Path, shape: tuple[int, int, int]) -> Pixels:
    """One image of any mode and size as [C, H, W]. Raises whatever Pillow raises."""
    image = _eight_bits(*_upright(path))
    if image.mode == "P":
        image = image.convert("RGBA")  # else a palette with transparency gives a warning
    image = image.convert("RGB" if shape[0] == 3 else "L")
    if image.size != (shape[2], shape[1]):
        image = image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def _upright(path: Path) -> tuple[Image.Image, str | None]:
    """An image as the camera was held, by EXIF, and its format; as it is where EXIF is broken: its pixels may be whole.

    Not opened by name: Pillow would map an uncompressed file into memory, and mix up the pixels of a TIFF file that is
    to be turned.
    """
    with path.open("rb") as file, Image.open(file) as opened:
        opened.load()
        try:
            opened.getexif()
        except Exception:  # anything, as in `_tried`
            return opened, opened.format
        return ImageOps.exif_transpose(opened), opened.format


def _eight_bits(image: Image.Image, kind: str | None) -> Image.Image:
    """Scales grey of more than 8 bits, which Pillow would clip.

    What 32 bits hold is not said in the file: floats from 0 to 1, integers of 8, 12 or 16 bits. The range is that of
    the fewest whole bytes, so that it is the same for all images of a kind but those that are black in it. Raises
    ValueError for values below 0, and those that are not finite or too large.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or (image.mode == "I" and kind == "TIFF"):
        low, high = float(values.min()), float(values.max())
        tops: Iterable[int] = [top for top in ((1, *RANGES) if image.mode == "F" else RANGES) if high <= top]
        if not (low >= 0 and tops):
            raise ValueError(f"its values are from {low:g} to {high:g}; scale them to 0 to {RANGES[1]}, or floats to 1")
        scaled = np.rint(values.astype(np.float64) * 255 / min(tops))
    else:
        scaled = np.clip(values // 257, 0, 255)
    return Image.fromarray(scaled.astype(np.uint8))
