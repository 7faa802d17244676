import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from fnet_search.base.errors import FnetError
from fnet_search.policy.evaluation import HELD_OUT
from fnet_search.training.datasets import hold_out, load_dataset, natural_shape, read_dataset
from fnet_search.training.imagefolder import EXTENSIONS, LISTED, VALIDATION, decode, list_folder

RED, GREY = (255, 0, 0), (90, 90, 90)


def image_folder(root: Path, *others: tuple[str, Image.Image]) -> str:
    """Two classes with an image each in train/ and test/, all 4x6 (width x height), and other files."""
    for path in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 6), GREY).save(root / path)
    for path, image in others:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / path)
    return f"imagefolder:{root}"


def loaded(root: Path, name: str, image: Image.Image, channels: int = 3) -> list[list[list[int]]]:
    """The pixels of an image that stands alone in class b of test/, as [C, 6, 4]."""
    source = image_folder(root, (f"test/b/{name}", image))
    (root / "test/b/1.png").unlink()
    pixels: list[list[list[int]]] = load_dataset(source, (channels, 6, 4)).test.images[1].tolist()
    return pixels


def solid(*channels: int) -> list[list[list[int]]]:
    return [[[value] * 4] * 6 for value in channels]


def palette() -> Image.Image:
    image = Image.new("P", (4, 6), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


def transparent_palette() -> Image.Image:
    image = palette()
    image.info["transparency"] = bytes([9, 128])
    return image


def sixteen_bits(value: int) -> Image.Image:
    return Image.fromarray(np.full((6, 4), value, dtype=np.uint16))


def floats(value: float) -> Image.Image:
    return Image.fromarray(np.full((6, 4), value, dtype=np.float32))


def integers(value: int) -> Image.Image:
    """Of 32 bits."""
    return Image.fromarray(np.full((6, 4), value, dtype=np.int32))


def big_endian(value: int) -> Image.Image:
    return Image.frombytes("I;16B", (4, 6), np.full((6, 4), value, dtype=">u2").tobytes())


def animated() -> tuple[Image.Image, dict[str, object]]:
    """A red frame, and a grey one after it."""
    return Image.new("RGB", (4, 6), RED), {"save_all": True, "append_images": [Image.new("RGB", (4, 6), GREY)]}


MODES = [
    ("L.png", Image.new("L", (4, 6), 77), [77, 77, 77], 77),
    ("RGB.bmp", Image.new("RGB", (4, 6), RED), [255, 0, 0], 76),
    ("RGBA.png", Image.new("RGBA", (4, 6), (*RED, 128)), [255, 0, 0], 76),
    ("P.png", palette(), [255, 0, 0], 76),
    ("P.PNG", transparent_palette(), [255, 0, 0], 76),
    ("CMYK.tif", Image.new("CMYK", (4, 6), (0, 255, 255, 0)), [255, 0, 0], 76),
    ("CMYK.jpg", Image.new("CMYK", (4, 6), (0, 0, 0, 0)), [255, 255, 255], 255),
    ("one.png", Image.new("1", (4, 6), 1), [255, 255, 255], 255),
    ("zero.tiff", Image.new("1", (4, 6), 0), [0, 0, 0], 0),
    ("LA.png", Image.new("LA", (4, 6), (77, 200)), [77, 77, 77], 77),
    ("I;16.png", sixteen_bits(65535), [255, 255, 255], 255),
    ("I;16.tif", sixteen_bits(7 * 257), [7, 7, 7], 7),
    ("I;16.PNG", sixteen_bits(65280), [254, 254, 254], 254),
    ("I;16.pgm", sixteen_bits(65535), [255, 255, 255], 255),
    ("dark.pgm", sixteen_bits(200), [0, 0, 0], 0),
    ("I;16B.tif", big_endian(65280), [254, 254, 254], 254),
    ("F to 1.tif", floats(0.5), [128, 128, 128], 128),
    ("F of a byte.tif", floats(77 / 255), [77, 77, 77], 77),
    ("F to 255.tif", floats(254.4), [254, 254, 254], 254),
    ("F to 65535.tif", floats(256), [1, 1, 1], 1),
    ("I to 255.tif", integers(200), [200, 200, 200], 200),
    ("I to 65535.tif", integers(257 * 9), [9, 9, 9], 9),
    ("I to 2^24.tif", integers(2**24 - 1), [255, 255, 255], 255),
    ("I to 2^31.tif", integers(2**31 - 1), [255, 255, 255], 255),
    ("P.gif", palette(), [255, 0, 0], 76),
    ("RGB.jfif", Image.new("L", (4, 6), 90), [90, 90, 90], 90),
    ("RGB.jp2", Image.new("L", (4, 6), 90), [90, 90, 90], 90),
    ("RGBA.tga", Image.new("RGBA", (4, 6), (*RED, 0)), [255, 0, 0], 76),
    ("one.pbm", Image.new("1", (4, 6), 1), [255, 255, 255], 255),
    ("lossless.webp", Image.new("RGB", (4, 6), GREY), [90, 90, 90], 90),
    ("L.pgm", Image.new("L", (4, 6), 3), [3, 3, 3], 3),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "image", "colour", "grey"), MODES, ids=[name for name, *_ in MODES])
def test_every_mode(tmp_path: Path, name: str, image: Image.Image, colour: list[int], grey: int) -> None:
    assert loaded(tmp_path / "colour", name, image) == solid(*colour)
    assert loaded(tmp_path / "grey", name, image, 1) == solid(grey)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_of_several_images_in_a_file_the_first(tmp_path: Path, name: str) -> None:
    image, options = animated()
    image.save(tmp_path / name, lossless=True, **options)
    assert decode(tmp_path / name, (3, 6, 4)).tolist() == solid(*RED)


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), 1e10])
def test_values_whose_range_is_not_known_are_refused(tmp_path: Path, value: float) -> None:
    source = image_folder(tmp_path, ("train/a/x.tif", floats(value)))
    with pytest.raises(FnetError, match=re.escape(f"x.tif: its values are from {value:g} to {value:g}; scale them")):
        load_dataset(source, (1, 6, 4))


@pytest.mark.parametrize("size", [(1, 1), (40, 3), (3, 40), (8, 12), (5, 7)])
def test_any_size_is_resized(tmp_path: Path, size: tuple[int, int]) -> None:
    assert loaded(tmp_path, "x.png", Image.new("RGB", size, (10, 20, 30))) == solid(10, 20, 30)


def test_height_and_width_stay_apart(tmp_path: Path) -> None:
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    assert loaded(tmp_path / "same", "x.png", Image.fromarray(pixels)) == pixels.transpose(2, 0, 1).tolist()
    large = pixels.repeat(5, axis=0).repeat(3, axis=1)
    found = np.array(loaded(tmp_path / "large", "x.png", Image.fromarray(large)))
    assert np.abs(found - pixels.transpose(2, 0, 1)).max() <= 3


SIDES = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
"""By EXIF's orientation, whether rows and columns of the upright image go on downwards and to the right in the file."""


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
@pytest.mark.parametrize("orientation", SIDES)
def test_every_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4)
    down, right = SIDES[orientation]
    stored = upright[::down, ::right]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"compression": "tiff_lzw"} if suffix == "tiff" else {}
    Image.fromarray((stored.T if orientation >= 5 else stored).copy()).save(
        tmp_path / f"x.{suffix}", exif=exif, **options
    )
    assert decode(tmp_path / f"x.{suffix}", (1, 6, 4)).tolist() == [upright.tolist()]


def test_orientation_of_a_photograph(tmp_path: Path) -> None:
    upright = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4)
    path = tmp_path / "test/b/x.png"
    expected = loaded(tmp_path, path.name, Image.fromarray(upright), 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: show it turned by 90 degrees clockwise.
    Image.fromarray(np.rot90(upright).copy()).save(path, exif=exif)
    assert load_dataset(f"imagefolder:{tmp_path}", (1, 6, 4)).test.images[1].tolist() == expected == [upright.tolist()]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_natural_size_is_that_of_the_upright_image(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    path = tmp_path / "train/a" / f"x.{suffix}"
    path.parent.mkdir(parents=True)
    Image.new("L", (30, 20)).save(path, exif=exif)
    assert natural_shape(f"imagefolder:{tmp_path}", 3) == (3, 30, 20)


def test_broken_exif_does_not_break_an_image(tmp_path: Path) -> None:
    Image.new("L", (4, 6), 90).save(tmp_path / "x.jpg", exif=b"Exif\0\0no header")
    assert decode(tmp_path / "x.jpg", (1, 6, 4)).tolist() == solid(90)


def test_classes_are_folders_in_order(tmp_path: Path) -> None:
    source = image_folder(
        tmp_path,
        ("train/b/deeper/2.png", Image.new("L", (4, 6), 1)),
        ("train/a/0.png", Image.new("L", (4, 6), 2)),
        ("train/Z/0.png", Image.new("L", (4, 6), 3)),
    )
    (tmp_path / "train/a/notes.txt").write_text("no image")
    (tmp_path / "train/README.md").write_text("no folder")
    data = load_dataset(source, (1, 6, 4))
    assert data.classes == ("Z", "a", "b")
    assert data.train.labels.tolist() == [0, 1, 1, 2, 2]
    assert data.train.images[:, 0, 0, 0].tolist() == [3, 2, 90, 90, 1]
    assert data.test.labels.tolist() == [1, 2]
    assert data.flips
    again = load_dataset(source, (1, 6, 4))
    assert again.fingerprint() == data.fingerprint()


def test_hidden_files_and_what_systems_leave_are_no_samples(tmp_path: Path) -> None:
    white = Image.new("L", (4, 6), 255)
    places = [".ipynb_checkpoints", ".cache/a", "a/.ipynb_checkpoints", "a/.git/x", "__MACOSX", "a/@eaDir/1.png"]
    source = image_folder(tmp_path)
    before = load_dataset(source, (1, 6, 4))
    for place in places:
        for part in ("train", "test", "val"):
            image_folder(tmp_path, (f"{part}/{place}/1.png", white))
    for name in ("a/._1.png", "a/.hidden.jpg", "a/Thumbs.db", "a/desktop.ini", "a/.DS_Store", ".DS_Store"):
        (tmp_path / "train" / name).write_bytes(b"no image")
    white.save(tmp_path / "train" / "0.png")  # in no class
    after = load_dataset(source, (1, 6, 4))
    assert after.classes == ("a", "b")
    assert after.fingerprint() == before.fingerprint()
    (tmp_path / "train" / "a" / ".0.png").write_bytes((tmp_path / "train" / "a" / "1.png").read_bytes())
    Image.new("L", (9, 9)).save(tmp_path / "train" / "0.png")
    assert natural_shape(source, 1) == (1, 6, 4)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    source = image_folder(
        tmp_path / "data",
        ("../elsewhere/deep/2.png", Image.new("L", (4, 6), 2)),
        ("../elsewhere/3.png", Image.new("L", (4, 6), 3)),
        ("../class/4.png", Image.new("L", (4, 6), 4)),
    )
    train = tmp_path / "data" / "train"
    (train / "a" / "0").symlink_to(tmp_path / "elsewhere")
    (train / "b" / "5.png").symlink_to(tmp_path / "class" / "4.png")
    (train / "c").symlink_to(tmp_path / "class")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    (train / "a" / "itself").symlink_to(train / "a")
    data = load_dataset(source, (1, 6, 4))
    assert data.train.images[:, 0, 0, 0].tolist() == [3, 2, 90, 90, 4, 4]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 2]
    theirs = ImageFolder(str(train), is_valid_file=lambda path: "itself" not in path and "up" not in path)
    listed = list_folder(tmp_path / "data", needs_test=True)[1]["train"]
    assert sorted((Path(path), label) for path, label in theirs.samples) == sorted(listed)


def test_links_to_nothing_are_named(tmp_path: Path) -> None:
    source = image_folder(tmp_path)
    (tmp_path / "train/a/more").symlink_to(tmp_path / "gone")
    with pytest.raises(FnetError, match=r"cannot read image .*train/a/more: \[Errno 2\] No such file"):
        load_dataset(source, (1, 6, 4))
    (tmp_path / "train/a/more").unlink()
    (tmp_path / "train/c").symlink_to(tmp_path / "gone")
    with pytest.raises(FnetError, match=r"train/c is a broken link"):
        load_dataset(source, (1, 6, 4))


def test_names_in_other_letters_however_they_are_spelled(tmp_path: Path) -> None:
    """macOS writes an accent as a letter of its own, Linux does not: a class may be one way in train/ and another in
    test/, and both come in the order of one of them."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    source = image_folder(
        tmp_path,
        (f"train/{composed}/1.png", Image.new("L", (4, 6), 1)),
        (f"test/{apart}/\u4e00.png", Image.new("L", (4, 6), 2)),
        ("train/cafz/1.png", Image.new("L", (4, 6), 3)),
    )
    data = load_dataset(source, (1, 6, 4))
    assert data.classes == ("a", "b", "cafz", composed)
    assert data.test.labels.tolist() == [0, 1, 3]
    (tmp_path / "train" / composed).rename(tmp_path / "train" / apart)
    again = load_dataset(source, (1, 6, 4))
    assert (again.classes, again.fingerprint()) == (data.classes, data.fingerprint())
    (tmp_path / "train" / composed).mkdir()
    with pytest.raises(FnetError, match=f"train holds class '{composed}' twice"):
        load_dataset(source, (1, 6, 4))


def test_no_file_that_torchvision_takes_is_left_out() -> None:
    assert set(IMG_EXTENSIONS) < set(EXTENSIONS)


def test_progress_counts_every_image(tmp_path: Path) -> None:
    source = image_folder(tmp_path, *((f"train/a/{n}.png", Image.new("L", (4, 6))) for n in range(300)))
    seen: list[tuple[int, int]] = []
    load_dataset(source, (1, 6, 4), progress=lambda done, total: seen.append((done, total)))
    total = len(list(tmp_path.rglob("*.png")))
    assert seen[-1] == (total, total)
    assert seen == sorted(set(seen))


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8))
    for name in ("x.png", "x.jpg", "x.tif", "x.webp", "x.bmp", "x.ppm"):
        path = tmp_path / name / "train/a" / name
        source = image_folder(tmp_path / name, (f"train/a/{name}", noise))
        whole = path.read_bytes()
        load_dataset(source, (3, 6, 4))
        for content in (whole[: len(whole) // 2], b"", b"no image at all"):
            path.write_bytes(content)
            with pytest.raises(FnetError) as caught:
                load_dataset(source, (3, 6, 4))
            assert str(caught.value).startswith(f"cannot read image {path}: ")
            assert "\n" not in str(caught.value)


def broken_folder(root: Path, count: int) -> str:
    source = image_folder(root)
    for number in range(count):
        (root / f"train/a/x{number:02}.jpg").write_bytes(b"no image")
    return source


def test_all_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    source = broken_folder(tmp_path / "few", 2)
    (tmp_path / "few/test/b/photo.heic").write_bytes(b"")  # of a kind that is not read, but not left out without a word
    with pytest.raises(FnetError) as caught:
        load_dataset(source, (3, 6, 4))
    faults = str(caught.value).replace(f"{tmp_path}/few/", "").split("; ")
    assert faults[0].startswith("cannot read 3 of 7 images: train/a/x00.jpg: cannot identify image file")
    assert [fault.partition(": ")[0] for fault in faults[1:-1]] == ["train/a/x01.jpg", "test/b/photo.heic"]
    assert faults[-1] == "`skip_unreadable` leaves out unreadable images"
    with pytest.raises(FnetError) as caught:
        load_dataset(broken_folder(tmp_path / "many", LISTED + 3), (3, 6, 4))
    assert str(caught.value).count(".jpg: ") == LISTED
    assert "; and 3 more; " in str(caught.value)


def test_what_cannot_be_read_is_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    source = broken_folder(tmp_path, 2)
    (tmp_path / "test/b/0.png").write_bytes(b"")
    data = load_dataset(source, (3, 6, 4), skip_unreadable=True)
    names = ["train/a/x00.jpg", "train/a/x01.jpg", "test/b/0.png"]
    assert [text.partition(": ")[0] for text in data.unreadable] == [str(tmp_path / name) for name in names]
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [0, 1])
    assert len(data.train.images) == 2
    assert data.fingerprint() == load_dataset(image_folder(tmp_path / "whole"), (3, 6, 4)).fingerprint()
    (tmp_path / "test/b/1.png").write_bytes(b"")
    with pytest.raises(
        FnetError, match=r"^no image of the class of .*/test/b/0\.png can be read; replace one of them$"
    ):
        load_dataset(source, (3, 6, 4), skip_unreadable=True)


def test_a_mode_that_cannot_be_shown_is_named(tmp_path: Path) -> None:
    source = image_folder(tmp_path, ("train/a/lab.tif", Image.new("LAB", (4, 6))))
    with pytest.raises(FnetError, match=r"cannot read image .*lab\.tif: conversion from LAB"):
        load_dataset(source, (1, 6, 4))


def test_folders_that_are_wrong(tmp_path: Path) -> None:
    def fault(root: Path) -> str:
        with pytest.raises(FnetError) as caught:
            load_dataset(f"imagefolder:{root}", (3, 6, 4))
        return str(caught.value).replace(str(root), "ROOT")

    root = tmp_path / "root"
    wanted = "class folders must lie in train/ and test/"
    without = "or, for the validation split, as in a search, in train/ and val/"
    assert fault(root) == f"imagefolder ROOT: ROOT/train does not exist; {wanted}"
    (root / "train").mkdir(parents=True)
    assert fault(root) == f"imagefolder ROOT: ROOT/test does not exist; {wanted}, {without}"
    (root / "test").mkdir()
    assert fault(root) == "imagefolder ROOT: train/ holds 0 class folders; at least 2 are needed"
    (root / "train/a").mkdir()
    assert fault(root) == "imagefolder ROOT: train/ holds 1 class folders; at least 2 are needed"
    (root / "train/b").mkdir()
    assert fault(root).startswith("imagefolder ROOT: ROOT/train/a holds no image (.jpg, .jpeg, .png")
    image_folder(root)
    (root / "test/c").mkdir()
    assert fault(root) == "imagefolder ROOT: class 'c' is in test/ but not among the training images"
    (root / "test/c").rmdir()
    for name in ("a", "b"):
        (root / f"test/{name}/1.png").unlink()
    assert fault(root).startswith("imagefolder ROOT: ROOT/test holds no image (.jpg")


def split_folder(root: Path, *parts: str) -> str:
    """Three classes with two images each in train/, one of a class and shade in each other part."""
    shades = {part: 10 * place for place, part in enumerate(parts)}
    for part in ("train", *parts):
        for place, name in enumerate("abc" if part == "train" else "ab"):
            for number in range(2 if part == "train" else 1):
                path = root / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (4, 6), 100 + place if part == "train" else shades[part] + place).save(path)
    return f"imagefolder:{root}"


@pytest.mark.parametrize("name", VALIDATION)
def test_a_folder_may_have_its_validation_images(tmp_path: Path, name: str) -> None:
    source = split_folder(tmp_path, "test", name)
    data = load_dataset(source, (1, 6, 4), split="validation")
    assert data.validation == name
    assert data.evaluation.images[:, 0, 0, 0].tolist() == [10, 11], "a class may be missing"
    assert data.test.images[:, 0, 0, 0].tolist() == [0, 1]
    assert len(data.train) == 6, "nothing is held out"
    held = load_dataset(source, (1, 6, 4), split="validation", validation=HELD_OUT)
    assert (held.validation, len(held.train), len(held.evaluation)) == (HELD_OUT, 3, 3)
    assert held.fingerprint() == hold_out(load_dataset(source, (1, 6, 4))).fingerprint()
    assert load_dataset(source, (1, 6, 4)).validation is None


def test_validation_images_in_another_folder(tmp_path: Path) -> None:
    source = split_folder(tmp_path / "data", "test", "val", "valid")
    split_folder(tmp_path / "other", "mine")
    both = r"^imagefolder .*/data has val/ and valid/; name the folder of validation images with `validation`$"
    with pytest.raises(FnetError, match=both):
        load_dataset(source, (1, 6, 4), split="validation")
    mine = tmp_path / "other" / "mine"
    cases = [(str(mine), str(mine), 0), ("valid", "valid", 20), (f"{tmp_path}/data/val", "val", 10)]
    for given, recorded, shade in cases:
        data = load_dataset(source, (1, 6, 4), split="validation", validation=given)
        assert (data.validation, int(data.evaluation.images[0, 0, 0, 0])) == (recorded, shade)
    for part, name in (("train", "training"), ("test", "test")):
        with pytest.raises(
            FnetError, match=rf"the validation images .*{part} are the {name} images; name another folder with"
        ):
            load_dataset(source, (1, 6, 4), split="validation", validation=part)
    with pytest.raises(FnetError, match=r"`validation` .*/none is not an existing folder; give one that holds"):
        load_dataset(source, (1, 6, 4), split="validation", validation="none")
    (mine / "d").mkdir()
    with pytest.raises(FnetError, match="class 'd' is in mine/ but not among the training images"):
        load_dataset(source, (1, 6, 4), split="validation", validation=str(mine))


def test_validation_images_of_any_data_set(tmp_path: Path) -> None:
    for digit in "07":
        (tmp_path / digit).mkdir()
        Image.new("L", (8, 8), 7).save(tmp_path / digit / "1.png")
    data = load_dataset("digits", (1, 8, 8), split="validation", validation=str(tmp_path))
    assert data.evaluation.labels.tolist() == [0, 7]
    assert (len(data.train), len(data.test)) == (1437, 360)


def test_test_images_may_be_missing(tmp_path: Path) -> None:
    source = split_folder(tmp_path / "data", "val")
    data = load_dataset(source, (1, 6, 4), split="validation")
    assert (len(data.train), len(data.evaluation), data.has_test) == (6, 2, False)
    data.save(tmp_path / "data.safetensors")
    again = read_dataset(tmp_path / "data.safetensors")
    assert (again.has_test, again.fingerprint()) == (False, data.fingerprint())
    assert torch.equal(again.evaluation.images, data.evaluation.images)
    for split, validation in (("test", None), ("validation", HELD_OUT)):
        with pytest.raises(FnetError, match=r"data/test does not exist; class folders must lie in train/ and test/"):
            load_dataset(source, (1, 6, 4), split=split, validation=validation)


def test_a_class_may_be_missing_from_the_test_images(tmp_path: Path) -> None:
    source = image_folder(tmp_path)
    (tmp_path / "test/a/1.png").unlink()
    (tmp_path / "test/a").rmdir()
    assert load_dataset(source, (3, 6, 4)).test.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("size", "shape"), [((20, 30), (3, 30, 20)), ((640, 480), (3, 224, 224)), ((300, 100), (3, 100, 224))]
)
def test_a_network_of_any_size_takes_that_of_the_images(
    tmp_path: Path, size: tuple[int, int], shape: tuple[int, int, int]
) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.txt").write_text("not an image")
    Image.new("RGB", size).save(tmp_path / "train" / "a" / "2.png")
    assert natural_shape(f"imagefolder:{tmp_path}", 3) == shape
