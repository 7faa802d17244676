"""Data sets as uint8 tensors in memory, in the shape of a space's input; splits; batched augmentation."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from fnet_search.base.errors import FnetError, first_line
from fnet_search.base.plugins import load_installed
from fnet_search.policy.evaluation import HELD_OUT, SplitName
from fnet_search.training.dataset_names import GROUP, check_dataset, root_of
from fnet_search.training.imagefolder import (
    Progress,
    Samples,
    first_size,
    list_folder,
    read_images,
    samples,
    validation_folder,
)
from fnet_search.training.recipe import Augmentation
from fnet_search.training.weights import read_tensors, write_tensors

LARGEST = 224
"""Pixels per side of an image folder's images at most, unless given."""

Batches = Callable[[], Iterator[Tensor]]
"""Gives batches of normalised samples [N, C, H, W], from the start at each call."""


@dataclass(frozen=True)
class Split:
    """`images` uint8 [N, C, H, W], `labels` int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor) -> "Split":
        """The samples that an index or mask selects."""
        return Split(self.images[chosen], self.labels[chosen])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.images[start : start + size], self.labels[start : start + size]

    def to(self, device: str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


Loaded = tuple[tuple[str, ...], Split, Split]
"""Names of the classes, training split, test split; images [N, 1 or 3, H, W] of any size."""


@dataclass(frozen=True)
class Source:
    """How to load a named data set: built-in ones are in SOURCES, those of other packages in the group GROUP."""

    load: Callable[[Path, bool], Loaded]
    """Reads it from the folder of data sets; may download missing files if the second argument is True."""
    size: tuple[int, int] = (32, 32)
    """Height and width of the images for a network that takes any size."""
    flips: bool = True
    """Whether a mirrored image keeps its class."""


@dataclass(frozen=True)
class DataSet:
    """A loaded data set. `mean` and `std` are per channel, of the training images in [0, 1].

    Candidates are compared on `evaluation`: the validation split in a search, the test split in a run of given plans.
    An image folder may have no test images; then `test` is empty.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    evaluation: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool
    """Whether a mirrored image keeps its class."""
    validation: str | None = None
    """What `evaluation` is: the folder of its images, relative to that of the data set if inside it, or HELD_OUT; None:
    the test split."""
    unreadable: tuple[str, ...] = ()
    """Files that were skipped, with the reasons."""

    @property
    def has_test(self) -> bool:
        return len(self.test) > 0

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] to float32, with zero mean and unit variance per channel over the training images."""
        mean, std = (_per_channel(values, images.device) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def to(self, device: str) -> "DataSet":
        test = self.test.to(device)
        evaluation = test if self.evaluation is self.test else self.evaluation.to(device)
        return replace(self, train=self.train.to(device), evaluation=evaluation, test=test)

    def save(self, path: Path) -> None:
        """Writes the splits to one safetensors file, for `read_dataset`."""
        splits = {"train": self.train, "test": self.test}
        if self.evaluation is not self.test:
            splits["evaluation"] = self.evaluation
        tensors = {
            f"{name}.{part}": getattr(split, part) for name, split in splits.items() for part in ("images", "labels")
        }
        facts = {"name": self.name, "classes": self.classes, "mean": self.mean, "std": self.std, "flips": self.flips}
        write_tensors(path, tensors, {"facts": json.dumps(facts)})

    def fingerprint(self) -> str:
        """The first 16 hex digits of the SHA-256 over all images and labels."""
        digest = hashlib.sha256()
        for split in (self.train, self.evaluation, self.test):
            digest.update(split.images.contiguous().numpy().data)
            digest.update(split.labels.contiguous().numpy().data)
        return digest.hexdigest()[:16]


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values as a tensor [1, C, 1, 1], sent to each device once."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def read_dataset(path: Path) -> DataSet:
    """Inverse of `DataSet.save`."""
    tensors, metadata = read_tensors(path)
    facts = json.loads(metadata["facts"])
    train, test, evaluation = (
        Split(tensors[f"{name}.images"], tensors[f"{name}.labels"]) if f"{name}.images" in tensors else None
        for name in ("train", "test", "evaluation")
    )
    assert train is not None
    assert test is not None
    evaluation = test if evaluation is None else evaluation
    classes, mean, std = (tuple(facts[name]) for name in ("classes", "mean", "std"))
    return DataSet(facts["name"], classes, train, evaluation, test, mean, std, facts["flips"])


def natural_shape(name: str, channels: int) -> tuple[int, int, int]:
    """The input shape (C, H, W) for a network that takes images of any size.

    For an image folder it is the size of the first image, upright, at most LARGEST pixels per side; else `Source.size`
    (digits, 8 x 8, are enlarged to 32 x 32). Raises FnetError for an unknown name.
    """
    root = root_of(name)
    if root is None:
        return channels, *_source(name).size
    width, height = first_size(root) or (32, 32)
    return channels, min(height, LARGEST), min(width, LARGEST)


def load_dataset(
    name: str,
    input_shape: tuple[int, int, int],
    folder: Path = Path("data"),
    download: bool = False,
    progress: Progress = lambda done, total: None,
    split: SplitName = "test",
    validation: str | None = None,
    skip_unreadable: bool = False,
) -> DataSet:
    """Loads a data set in the shape of a space's input, with `split` as its `evaluation`.

    `folder` holds torchvision's data sets. The validation split is the folder `validation` (absolute, or relative to
    the image folder), else ``val/`` of the image folder; failing both, or for HELD_OUT, `hold_out` takes it from the
    training images.

    Raises FnetError for an unknown name, missing files without `download`, unreadable images without
    `skip_unreadable`, an image folder with neither test nor validation images, and a space whose input has neither 1
    nor 3 channels.
    """
    if input_shape[0] not in (1, 3):
        raise FnetError(f"the space's input has {input_shape[0]} channels; data sets need one with 1 or 3")
    root, splits, files = root_of(name), dict[str, Split](), dict[str, Samples]()
    validation_path = validation_folder(root, validation) if split == "validation" else None
    if root is not None:
        classes, files = list_folder(root, needs_test=validation_path is None)
    else:
        classes, *loaded = _load(name, folder, download)
        splits = {part: _fit(split, input_shape) for part, split in zip(("train", "test"), loaded, strict=True)}
    if validation_path is not None:
        files["validation"] = samples(validation_path, classes, f"validation images {validation_path}")
    read, unreadable = read_images(files, input_shape, progress, skip_unreadable)
    splits |= {part: Split(torch.from_numpy(images), torch.tensor(labels)) for part, (images, labels) in read.items()}
    train, mean, std = splits["train"], *_mean_and_std(splits["train"].images)
    test = splits.get("test", train.take(torch.arange(0)))
    facts = tuple(mean.tolist()), tuple(std.tolist()), root is not None or _source(name).flips
    data = DataSet(name, classes, train, test, test, *facts, unreadable=unreadable)
    if split == "test":
        return data
    if validation_path is None:
        return hold_out(data)
    where = (
        validation_path.relative_to(root)
        if root is not None and validation_path.is_relative_to(root)
        else validation_path
    )
    return replace(data, evaluation=splits["validation"], validation=str(where))


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images [N, C, H, W] in [0, 1], float32 [C].

    Computed from counts of the 256 values: exact, and without a float copy of all images.
    """
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values, number = torch.arange(256, dtype=torch.float64) / 255, counts.sum(1)
    mean = (counts * values).sum(1) / number
    variance = (counts * (values - mean[:, None]).square()).sum(1) / (number - 1).clamp_min(1)
    return mean.float(), variance.sqrt().clamp_min(1e-3).float()


def hold_out(data: DataSet) -> DataSet:
    """Moves a fixed, stratified part of the training images to `evaluation`: 10 %, or 20 % of fewer than 10,000 images.

    Raises FnetError for a class with fewer than two training images.
    """
    fraction = 0.1 if len(data.train) >= 10_000 else 0.2
    rng = np.random.default_rng(0)
    held = np.zeros(len(data.train), dtype=bool)
    labels = data.train.labels.numpy()
    for index, class_name in enumerate(data.classes):
        members = np.flatnonzero(labels == index)
        if len(members) < 2:
            raise FnetError(f"class {class_name!r} has {len(members)} training images; validation needs at least 2")
        held[rng.permutation(members)[: max(1, round(fraction * len(members)))]] = True
    kept = torch.from_numpy(~held)
    return replace(data, train=data.train.take(kept), evaluation=data.train.take(~kept), validation=HELD_OUT)


def _fit(split: Split, shape: tuple[int, int, int]) -> Split:
    """The images in the channels and size of `shape`: resized bilinearly with antialiasing, grey by ITU-R 601 luma."""
    images = split.images
    if images.shape[1] == 3 and shape[0] == 1:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        images = (images.float() * weights).sum(1, keepdim=True).round().to(torch.uint8)
    images = images.expand(-1, shape[0], -1, -1)
    if images.shape[2:] != shape[1:]:
        resized = F.interpolate(images.float(), shape[1:], mode="bilinear", antialias=True)
        images = resized.round_().clamp_(0, 255).to(torch.uint8)
    return Split(images.contiguous(), split.labels)


def _digits(folder: Path, download: bool) -> Loaded:
    """scikit-learn's 1,797 scanned digits, 8x8 grey, 0 to 16; a fixed, stratified fifth is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    whole = Split(images, torch.from_numpy(digits.target.astype(np.int64)))
    train, test = train_test_split(
        np.arange(len(whole)), test_size=0.2, stratify=digits.target, random_state=0, shuffle=True
    )
    chosen = torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(test))
    return tuple(str(digit) for digit in range(10)), whole.take(chosen[0]), whole.take(chosen[1])


def _torchvision(kind: str, name: str, folder: Path, download: bool) -> Loaded:
    """A data set of torchvision; `kind` is its class in ``torchvision.datasets``."""
    from torchvision import datasets

    splits = []
    for train in (True, False):
        try:
            part = getattr(datasets, kind)(str(folder), train=train, download=download)
        except Exception as error:  # torchvision raises many kinds: RuntimeError, URLError, OSError
            advice = (
                f"its download failed: {first_line(error)}"
                if download
                else "set `download`, or set `data_dir` to its folder"
            )
            raise FnetError(f"data set {name} is not in {folder}/; {advice}") from None
        images = torch.as_tensor(np.asarray(part.data))
        images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images.unsqueeze(1)
        splits.append(Split(images, torch.as_tensor(np.asarray(part.targets)).long()))
    return tuple(part.classes), splits[0], splits[1]


SOURCES: Mapping[str, Source] = {
    "digits": Source(_digits, flips=False),
    "cifar10": Source(partial(_torchvision, "CIFAR10", "cifar10")),
    "cifar100": Source(partial(_torchvision, "CIFAR100", "cifar100")),
    "fashion-mnist": Source(partial(_torchvision, "FashionMNIST", "fashion-mnist"), (28, 28)),
}


def _source(name: str) -> Source:
    """The source of a named data set. Raises FnetError for an unknown name."""
    check_dataset(name)
    if name in SOURCES:
        return SOURCES[name]
    source = load_installed(GROUP, "data set", name)
    if not isinstance(source, Source):
        raise FnetError(f"data set {name!r} cannot be loaded: it is a {type(source).__name__}, not a Source")
    return source


def _load(name: str, folder: Path, download: bool) -> Loaded:
    """Loads from a source and checks the result. Raises FnetError if it is not a data set."""
    source = _source(name)
    try:
        classes, train, test = source.load(folder, download)
    except FnetError:
        raise
    except Exception as error:  # code of third parties may raise anything
        raise FnetError(f"data set {name!r} cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    for part, split in (("training", train), ("test", test)):
        images, labels = split.images, split.labels
        good = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] in (1, 3) and len(images) > 0
        if not good:
            size, kind = tuple(images.shape), str(images.dtype).removeprefix("torch.")
            raise FnetError(f"data set {name!r}: its {part} images must be uint8 [N, 1 or 3, H, W], got {kind} {size}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise FnetError(f"data set {name!r}: its {part} labels must be int64, one per image")
        if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
            raise FnetError(f"data set {name!r}: its {part} labels must be class numbers from 0 to {len(classes) - 1}")
    return classes, train, test


def affine_maps(
    count: int, size: tuple[int, ...], how: Augmentation, flips: bool, generator: torch.Generator
) -> Tensor:
    """Random affine maps for `count` images of `size` (H, W), [count, 2, 3], for `augment`.

    Without `flips` nothing is mirrored, for data sets whose classes would change. `generator` lives on the CPU, so that
    the draws do not depend on the device.
    """
    height, width = size
    draw = torch.rand(count, 6, generator=generator)
    angle = (2 * draw[:, 0] - 1) * math.radians(how.rotation)
    scale = 1 + (2 * draw[:, 1] - 1) * how.zoom
    mirror = [
        torch.where(draw[:, 2 + axis] < 0.5, -1.0, 1.0) if wanted and flips else torch.ones(count)
        for axis, wanted in enumerate((how.horizontal_flip, how.vertical_flip))
    ]
    reach_x, reach_y = round(how.shift * width), round(how.shift * height)
    shift_x = torch.floor(draw[:, 4] * (2 * reach_x + 1)) - reach_x
    shift_y = torch.floor(draw[:, 5] * (2 * reach_y + 1)) - reach_y
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    # From output to input, in grid_sample's coordinates: [-1, 1] spans each side, so a rotation needs the aspect ratio.
    return torch.stack(
        [
            torch.stack([mirror[0] * cos, -mirror[0] * sin * height / width, 2 * shift_x / width], dim=1),
            torch.stack([mirror[1] * sin * width / height, mirror[1] * cos, 2 * shift_y / height], dim=1),
        ],
        dim=1,
    )


def augment(images: Tensor, maps: Tensor) -> Tensor:
    """A float batch [N, C, H, W] with each image transformed by its map [2, 3]: bilinear, reflected at the edges."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
