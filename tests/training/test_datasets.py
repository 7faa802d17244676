import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fnet_search.base.errors import FnetError
from fnet_search.training.datasets import (
    DataSet,
    Split,
    affine_maps,
    augment,
    hold_out,
    load_dataset,
    natural_shape,
    read_dataset,
)
from fnet_search.training.recipe import Augmentation
from tests.support.packages import install


def counts(split: Split) -> list[int]:
    return torch.bincount(split.labels, minlength=10).tolist()


def rows(*splits: Split) -> list[bytes]:
    """Every image with its label, sorted."""
    return sorted(
        bytes([int(label)]) + image.numpy().tobytes()
        for split in splits
        for image, label in zip(split.images, split.labels, strict=True)
    )


def test_digits_are_all_there_in_stratified_splits() -> None:
    data = load_dataset("digits", (1, 8, 8))
    whole = load_digits()
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.evaluation is data.test
    assert data.classes == tuple("0123456789")
    expected = np.bincount(whole.target)
    assert np.array_equal(np.add(counts(data.train), counts(data.test)), expected)
    assert np.abs(counts(data.test) - 0.2 * expected).max() < 1
    images = np.rint(whole.images * (255 / 16)).astype(np.uint8)
    assert rows(data.train, data.test) == sorted(
        bytes([label]) + image.tobytes() for label, image in zip(whole.target, images, strict=True)
    )
    assert not data.flips


def test_digits_in_the_shape_of_the_input() -> None:
    data = load_dataset("digits", (3, 32, 24))
    assert data.train.images.shape == (1437, 3, 32, 24)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert torch.equal(data.train.images[:, 0], data.train.images[:, 2])
    small = load_dataset("digits", (1, 8, 8))
    assert torch.equal(small.train.labels, data.train.labels)
    down, across = ((np.arange(side) + 0.5) * 8 / side - 0.5 for side in (32, 24))
    for large, image in zip(data.train.images[:20, 0], small.train.images[:20, 0], strict=True):
        wide = [np.interp(across, range(8), row) for row in image]
        expected = np.transpose([np.interp(down, range(8), column) for column in np.transpose(wide)])
        assert np.abs(large.numpy() - expected).max() <= 0.5 + 1e-3


def test_normalised_training_images_have_zero_mean_and_unit_variance() -> None:
    data = load_dataset("digits", (3, 8, 8))
    x = data.normalise(data.train.images)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    image = data.test.images[:1]
    expected = (image[0, 1, 3, 3] / 255 - data.mean[1]) / data.std[1]
    torch.testing.assert_close(data.normalise(image)[0, 1, 3, 3], expected)


def test_held_out_images_are_stratified_disjoint_and_always_the_same() -> None:
    data = load_dataset("digits", (1, 8, 8))
    held = hold_out(data)
    assert rows(held.train, held.evaluation) == rows(data.train)
    assert len(held.train) + len(held.evaluation) == len(data.train)
    assert counts(held.evaluation) == [round(0.2 * count) for count in counts(data.train)]
    assert held.test is data.test
    assert (held.mean, held.std) == (data.mean, data.std)
    assert held.fingerprint() == hold_out(data).fingerprint() != data.fingerprint()
    torch.manual_seed(1234)
    assert torch.equal(hold_out(data).evaluation.images, held.evaluation.images)


@pytest.mark.parametrize(("images", "held"), [(2, 1), (3, 1), (7, 1), (8, 2), (4999, 1000), (5000, 500)])
def test_how_many_are_held_out(images: int, held: int) -> None:
    """Of two classes with as many images each: 20 % below 10,000 images, then 10 %; of every class at least one."""
    labels = torch.arange(2).repeat(images)
    split = Split(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels)
    data = DataSet("d", ("a", "b"), split, split, split, (0.0,), (1.0,), True)
    assert counts(hold_out(data).evaluation)[:2] == [held, held]
    assert counts(hold_out(data).train)[:2] == [images - held, images - held]


def test_a_class_with_one_image_cannot_be_held_out() -> None:
    split = Split(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), torch.tensor([0, 1, 0]))
    data = DataSet("d", ("cat", "dog"), split, split, split, (0.0,), (1.0,), True)
    with pytest.raises(FnetError, match="class 'dog' has 1 training images; validation needs at least 2"):
        hold_out(data)


@pytest.mark.parametrize("change", [lambda data: data, hold_out])
def test_a_data_set_comes_back_from_its_file(tmp_path: Path, change: Callable[[DataSet], DataSet]) -> None:
    data = change(load_dataset("digits", (1, 8, 8)))
    data.save(tmp_path / "data.safetensors")
    found = read_dataset(tmp_path / "data.safetensors")
    for name in ("train", "evaluation", "test"):
        assert torch.equal(getattr(found, name).images, getattr(data, name).images)
        assert torch.equal(getattr(found, name).labels, getattr(data, name).labels)
    assert (found.evaluation is found.test) == (data.evaluation is data.test)
    assert [getattr(found, fact) for fact in ("name", "classes", "mean", "std", "flips")] == [
        getattr(data, fact) for fact in ("name", "classes", "mean", "std", "flips")
    ]
    assert found.fingerprint() == data.fingerprint()


def test_a_fingerprint_is_of_every_image_and_label() -> None:
    data = load_dataset("digits", (1, 8, 8))
    images, labels = data.test.images.clone(), data.test.labels.clone()
    images[-1, 0, 7, 7] += 1
    labels[0] = (labels[0] + 1) % 10
    others = [replace(data, test=Split(images, data.test.labels)), replace(data, test=Split(data.test.images, labels))]
    others.append(replace(data, train=data.test))
    assert len({one.fingerprint() for one in [data, *others]}) == 4


def test_batches_cover_a_split_in_order() -> None:
    split = Split(torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1), torch.arange(7))
    assert [labels.tolist() for _, labels in split.batches(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [images.flatten().tolist() for images, _ in split.batches(3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_unknown_data_sets_and_inputs() -> None:
    with pytest.raises(FnetError, match=r"unknown data set 'digit'; did you mean 'digits'\?"):
        load_dataset("digit", (3, 32, 32))
    with pytest.raises(FnetError, match="the space's input has 4 channels; data sets need one with 1 or 3"):
        load_dataset("digits", (4, 32, 32))


THEIRS = """
import torch
from fnet_search.training.datasets import Source, Split

def split(images, labels):
    return Split(images, torch.tensor(labels))

def grey(*size):
    return torch.arange(size[0] * 4, dtype=torch.uint8).view(size[0], 1, 2, 2)

def good(folder, download):
    return ("a", "b"), split(grey(2), [0, 1]), split(grey(1), [1])

def floats(folder, download):
    return ("a", "b"), split(grey(2).float(), [0, 1]), split(grey(1), [1])

def flat(folder, download):
    return ("a", "b"), split(grey(2), [0, 1]), split(grey(1).flatten(1), [1])

def nothing(folder, download):
    return ("a", "b"), split(grey(2), [0, 1]), split(grey(1)[:0], [])

def short(folder, download):
    return ("a", "b"), split(grey(2), [0]), split(grey(1), [1])

def many(folder, download):
    return ("a", "b"), split(grey(2), [0, 1]), split(grey(1), [2])

def raises(folder, download):
    raise KeyError(f"nothing in {folder}, {download}")

SOURCES = {one.__name__: Source(one, (4, 6), False) for one in (good, floats, flat, nothing, short, many, raises)}
globals().update(SOURCES)
number = 3
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed third-party package with data sets, good and bad."""
    names = ("good", "floats", "flat", "nothing", "short", "many", "raises", "number", "gone")
    points = {"fnet_search.datasets": {f"their-{name}": f"their_data:{name}" for name in names}}
    monkeypatch.syspath_prepend(install(tmp_path, "their_data", THEIRS, points))


@pytest.mark.usefixtures("theirs")
def test_a_data_set_of_a_third_party() -> None:
    assert natural_shape("their-good", 3) == (3, 4, 6)
    data = load_dataset("their-good", (3, 2, 2))
    assert data.train.images[:, 0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert torch.equal(data.train.images, data.train.images[:, :1].expand(-1, 3, -1, -1))
    assert (data.name, data.classes, data.flips) == ("their-good", ("a", "b"), False)
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [1])
    assert load_dataset("their-good", (1, 4, 6)).train.images.shape == (2, 1, 4, 6)


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("their-god", "unknown data set 'their-god'; did you mean 'their-good'?"),
        ("their-floats", ": its training images must be uint8 [N, 1 or 3, H, W], got float32 (2, 1, 2, 2)"),
        ("their-flat", ": its test images must be uint8 [N, 1 or 3, H, W], got uint8 (1, 4)"),
        ("their-nothing", ": its test images must be uint8 [N, 1 or 3, H, W], got uint8 (0, 1, 2, 2)"),
        ("their-short", ": its training labels must be int64, one per image"),
        ("their-many", ": its test labels must be class numbers from 0 to 1"),
        ("their-raises", " cannot be loaded: KeyError: 'nothing in data, True'"),
        ("their-number", " cannot be loaded: it is a int, not a Source"),
        ("their-gone", " cannot be loaded: AttributeError: module 'their_data' has no attribute 'gone'"),
    ],
)
def test_bad_data_sets_of_a_third_party(name: str, complaint: str) -> None:
    with pytest.raises(FnetError) as caught:
        load_dataset(name, (3, 4, 4), download=True)
    assert str(caught.value).removeprefix(f"data set {name!r}").startswith(complaint)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_missing_files_say_how_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(FnetError) as caught:
        load_dataset(name, (3, 32, 32), tmp_path)
    assert f"data set {name} is not in {tmp_path}/; set `download`, or set `data_dir`" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.rglob("*-ubyte")) == []


def test_fashion_mnist_in_the_shape_of_the_input(tmp_path: Path) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    shades = {"train": [0, 200], "t10k": [10, 20, 30]}
    for part, values in shades.items():
        images = np.repeat(np.array(values, dtype=np.uint8), 28 * 28)
        head = [(0x803, len(values), 28, 28), (0x801, len(values))]
        for kind, numbers, content in zip(
            ("images-idx3", "labels-idx1"), head, (images, np.arange(len(values), dtype=np.uint8)), strict=True
        ):
            (folder / f"{part}-{kind}-ubyte").write_bytes(np.array(numbers, dtype=">i4").tobytes() + content.tobytes())
    data = load_dataset("fashion-mnist", (3, 32, 32), tmp_path)
    assert data.train.images.shape == (2, 3, 32, 32)
    assert data.test.images.flatten(1).unique(dim=1).tolist() == [[10], [20], [30]]
    assert data.test.labels.tolist() == [0, 1, 2]
    assert data.mean == pytest.approx([100 / 255] * 3)
    assert (len(data.classes), data.flips) == (10, True)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9))


def changed(images: Tensor, how: Augmentation, flips: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return augment(images, affine_maps(len(images), images.shape[2:], how, flips, generator))


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (24, 40)])
def test_nothing_changes_where_nothing_is_asked_for(size: tuple[int, int]) -> None:
    images = noise(8, 3, *size)
    torch.testing.assert_close(changed(images, Augmentation()), images, rtol=0, atol=1e-5)
    everything = Augmentation(horizontal_flip=True, vertical_flip=True)
    torch.testing.assert_close(changed(images, everything, flips=False), images, rtol=0, atol=1e-5)


def test_shifts_move_whole_pixels_and_reflect_the_edge() -> None:
    images = noise(200, 2, 16, 24)
    reach_y, reach_x = round(0.125 * 16), round(0.125 * 24)
    found = changed(images, Augmentation(shift=0.125))
    padded = torch.from_numpy(
        np.pad(images.numpy(), ((0, 0), (0, 0), (reach_y, reach_y), (reach_x, reach_x)), mode="symmetric")
    )
    seen = set()
    for image, wide in zip(found, padded, strict=True):
        fits = [
            (y - reach_y, x - reach_x)
            for y in range(2 * reach_y + 1)
            for x in range(2 * reach_x + 1)
            if (wide[:, y : y + 16, x : x + 24] - image).abs().max() < 1e-5
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert {y for y, _ in seen} == set(range(-reach_y, reach_y + 1))
    assert {x for _, x in seen} == set(range(-reach_x, reach_x + 1))


@pytest.mark.parametrize(
    ("how", "axes"),
    [
        (Augmentation(horizontal_flip=True), [(), (2,)]),
        (Augmentation(vertical_flip=True), [(), (1,)]),
        (Augmentation(horizontal_flip=True, vertical_flip=True), [(), (1,), (2,), (1, 2)]),
    ],
)
def test_mirrors_are_exact(how: Augmentation, axes: list[tuple[int, ...]]) -> None:
    images = noise(100, 3, 12, 20)
    times = [0] * len(axes)
    for image, found in zip(images, changed(images, how), strict=True):
        near = [float((image.flip(axis) - found).abs().max()) < 1e-5 for axis in axes]
        assert sum(near) == 1
        times[near.index(True)] += 1
    assert min(times) > 0.6 * len(images) / len(axes)


EVERYTHING = Augmentation(0.1, 0.1, 15, True, True)


def test_the_generator_decides() -> None:
    images = noise(16, 3, 32, 32)
    assert torch.equal(changed(images, EVERYTHING), changed(images, EVERYTHING))
    assert not torch.equal(changed(images, EVERYTHING), changed(images, EVERYTHING, seed=1))
    generator = torch.Generator().manual_seed(0)
    first, second = (affine_maps(16, (32, 32), EVERYTHING, True, generator) for _ in range(2))
    assert torch.equal(augment(images, first), changed(images, EVERYTHING))
    assert not torch.equal(first, second)


def test_the_draws_of_one_change_do_not_depend_on_the_others() -> None:
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    affine_maps(16, (32, 32), Augmentation(), False, generators[0])
    affine_maps(16, (32, 32), EVERYTHING, True, generators[1])
    assert torch.equal(*(torch.rand(4, generator=generator) for generator in generators))
    alone, among = (
        affine_maps(100, (20, 40), how, True, torch.Generator().manual_seed(0))
        for how in (Augmentation(shift=0.1), Augmentation(0.1, 0.2, 30, True, True))
    )
    assert torch.equal(alone[:, :, 2], among[:, :, 2])


def test_maps_of_an_epoch_are_those_of_its_images_one_by_one() -> None:
    images = noise(6, 3, 12, 20)
    maps = affine_maps(6, (12, 20), EVERYTHING, True, torch.Generator().manual_seed(0))
    assert maps.shape == (6, 2, 3)
    found = augment(images, maps)
    for index in range(6):
        torch.testing.assert_close(augment(images[index][None], maps[index][None])[0], found[index], rtol=0, atol=1e-6)


def test_a_map_says_where_a_pixel_comes_from() -> None:
    """In units of half a side, y downwards: here one pixel to the right, two down, of a mirrored image."""
    image = torch.arange(6.0 * 8).view(1, 1, 6, 8)
    found = augment(image, torch.tensor([[[-1, 0, 2 / 8], [0, 1, 2 * 2 / 6]]]))
    padded = np.pad(image[0, 0].numpy(), ((0, 2), (0, 1)), mode="symmetric")
    expected = torch.from_numpy(padded[2:, 1:][:, ::-1].copy())
    torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=1e-4)


def test_draws_are_whole_pixels_and_right_angles_where_nothing_else_is_asked_for() -> None:
    """Shifts within reach, each as likely; mirrors in half of the images."""
    how = Augmentation(shift=0.125, horizontal_flip=True, vertical_flip=True)
    maps = affine_maps(4000, (16, 24), how, True, torch.Generator().manual_seed(0))
    assert torch.equal(maps[:, :, :2].abs(), torch.eye(2).expand(4000, 2, 2))
    for side, reach, shifts in ((24, 3, maps[:, 0, 2]), (16, 2, maps[:, 1, 2])):
        pixels = shifts * side / 2
        torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-5)
        times = torch.bincount((pixels.round() + reach).long(), minlength=2 * reach + 1)
        assert len(times) == 2 * reach + 1
        assert (times / 4000 - 1 / len(times)).abs().max() < 0.03
    for axis in (0, 1):
        assert float((maps[:, axis, axis] < 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    still = affine_maps(50, (16, 24), how, False, torch.Generator().manual_seed(0))
    assert torch.equal(still[:, :, :2], torch.eye(2).expand(50, 2, 2)), "where mirrors change the class"


def spots(height: int, width: int, places: list[tuple[float, float]]) -> Tensor:
    """An image of smooth spots, at (x, y) from its centre, in pixels."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    return sum((torch.exp(-((x - a) ** 2 + (y - b) ** 2) / 8) for a, b in places), torch.zeros(height, width))


@pytest.mark.parametrize("size", [(48, 96), (96, 48), (64, 64)])
@pytest.mark.parametrize("zoom", [0.0, 0.2])
def test_rotation_and_zoom_keep_shapes(size: tuple[int, int], zoom: float) -> None:
    """Two spots turn about the centre, as far from it and at a right angle, whatever the sides of the image."""
    images = torch.stack([spots(*size, [(9, 0)]), spots(*size, [(0, 9)])]).expand(60, 2, -1, -1)
    ground = torch.stack(torch.meshgrid(*(torch.arange(side) - (side - 1) / 2 for side in size), indexing="ij"), dim=-1)
    angles, distances = [], []
    for found in changed(images, Augmentation(rotation=30, zoom=zoom)):
        centres = (found[..., None] * ground).sum((1, 2)) / found.sum((1, 2))[:, None]
        (y1, x1), (y2, x2) = centres.tolist()
        assert math.hypot(x1, y1) == pytest.approx(math.hypot(x2, y2), abs=0.1)
        assert x1 * x2 + y1 * y2 == pytest.approx(0, abs=0.5)
        assert x1 * y2 - y1 * x2 > 0
        angles.append(math.degrees(math.atan2(y1, x1)))
        distances.append(math.hypot(x1, y1) / 9)
    assert max(map(abs, angles)) <= 30.5
    assert min(angles) < -25
    assert max(angles) > 25
    assert 1 - zoom - 0.01 < min(distances) < 1 - 0.8 * zoom + 0.01
    assert 1 + zoom + 0.01 > max(distances) > 1 + 0.8 * zoom - 0.01


def test_zoom_scales_about_the_centre() -> None:
    images = spots(64, 64, [(12, 0), (-12, 0), (0, 9), (0, -9)])[None, None].expand(60, 1, -1, -1)
    ground = torch.arange(64) - 63 / 2
    scales = []
    for found in changed(images, Augmentation(zoom=0.2))[:, 0]:
        across, down = (float((found.sum(axis) * ground**2).sum() / found.sum()) for axis in (0, 1))
        # Of each spot two lie on the axis that is looked at; a spot's own spread is 4.
        scales.append((math.sqrt(across / (12**2 / 2 + 4)), math.sqrt(down / (9**2 / 2 + 4))))
    assert all(across == pytest.approx(down, rel=0.02) for across, down in scales)
    assert 0.79 < min(scales)[0] < 0.86
    assert 1.14 < max(scales)[0] < 1.21


def test_the_size_of_known_data_sets() -> None:
    assert [natural_shape(name, 1) for name in ("digits", "cifar10", "fashion-mnist", "imagefolder:/none")] == [
        *([(1, 32, 32)] * 2),
        (1, 28, 28),
        (1, 32, 32),
    ]
