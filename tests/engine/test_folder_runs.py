"""Whole runs on folders of images: what their accuracies were measured on, and that anybody can measure them again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fnet_search import Outcome, search
from fnet_search.deploy.export import float_model, read_model, write_model
from fnet_search.engine.request import Machine
from fnet_search.importing.spaces import save_space
from fnet_search.policy.evaluation import HELD_OUT, MAYBE_KNOWN
from fnet_search.rundir.recorded_run import metadata, open_run
from fnet_search.training.datasets import hold_out, load_dataset
from tests.support.command_line import PLAIN

pytestmark = pytest.mark.usefixtures("one_picture")

ONE = ("--space", "tiny", "--budget", "100%", "--policy", "progressive-doubling", "--trials", "1", *PLAIN)
SHORT = (*ONE, "--epochs", "1", "--no-warm-start")
KINDS = ("exif.jpg", "exif.tif", "grey.png", "rgba.png", "cmyk.jpg", "cmyk.tif", "palette.gif", "clear.png", "la.png")
DEEP = ("16.png", "16.tif", "int.tif", "float.tif", "one.bmp")


def write(folder: Path, kind: str, pixels: NDArray[np.uint8]) -> None:
    """An image [H, W, 3] as a file of some kind, which people's data sets have."""
    name, _, suffix = kind.partition(".")
    image, options = Image.fromarray(pixels), {}
    grey = np.asarray(image.convert("L"))
    if name == "exif":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
        image = Image.fromarray(np.rot90(pixels).copy())
    elif name == "rgba":
        image.putalpha(Image.fromarray(255 - grey))
    elif name == "cmyk":
        image = image.convert("CMYK")
    elif name in ("palette", "clear"):
        image = image.quantize(16)
        options |= {"transparency": 3} if name == "clear" else {}
    elif name == "16":
        image = Image.fromarray(grey.astype(np.uint16) * 201)
    elif name == "int":
        image = Image.fromarray(grey.astype(np.int32) * 199)
    elif name == "float":
        image = Image.fromarray(grey.astype(np.float32) / 256)
    else:
        image = image.convert({"grey": "L", "la": "LA", "one": "1"}[name])
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{name}-{len(list(folder.iterdir())):02}.{suffix}", **options)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that are hard to tell apart, of every kind of file."""
    root, rng = tmp_path_factory.mktemp("images") / "images", np.random.default_rng(1)
    for part, count in (("train", 28), ("val", 14), ("test", 28)):
        for place, name in enumerate(("bright", "dark", "middle")):
            for number in range(count):
                height, width = rng.integers(20, 50, 2)
                colour = rng.normal((150, 80, 110)[place], 30, 3)
                pixels = np.clip(rng.normal(colour, 50, (height, width, 3)), 0, 255).astype(np.uint8)
                write(root / part / name, (*KINDS, *DEEP)[number % 14], pixels)
    return root


@pytest.fixture(scope="module")
def found(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A search on them."""
    machine = Machine("cpu", "float32", 1, False, workers=0)
    options = {"policy": "progressive-doubling", "trials": 1, "epochs": 3, "warm_start": False, "machine": machine}
    out = tmp_path_factory.mktemp("run") / "run"
    return search("tiny", f"imagefolder:{images}", budget="100%", min_quint8=0.01, out=out, **options)


def alone(model: Path, folder: Path) -> float:
    """The accuracy of an exported network on the images in class folders, by what its metadata say of how to read them,
    with Pillow, numpy and ONNX Runtime only."""
    session = onnxruntime.InferenceSession(model)
    facts = session.get_modelmeta().custom_metadata_map
    how, classes = json.loads(facts["preprocessing"]), json.loads(facts["classes"])
    channels, height, width = how["shape"]
    assert channels == 3
    mean, std = (np.array(how[name], dtype=np.float32)[:, None, None] for name in ("mean", "std"))
    right, paths = 0, sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        with path.open("rb") as file:
            opened = Image.open(file)
            image = ImageOps.exif_transpose(opened)
        if image.mode == "F" or (image.mode == "I" and opened.format == "TIFF"):
            values = np.asarray(image).astype(np.float64)
            tops = [255, 65535, 16777215, 2147483647]
            top = next(top for top in ([1] if image.mode == "F" else []) + tops if values.max() <= top)
            image = Image.fromarray(np.rint(255 * values / top).astype(np.uint8))
        elif image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        elif image.mode == "P":
            image = image.convert("RGBA")
        image = image.convert("RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32)
        (logits,) = session.run(None, {"input": ((pixels / 255 - mean) / std)[None]})
        right += classes[int(logits[0].argmax())] == path.parent.name
    return right / len(paths)


def test_anybody_can_measure_the_accuracies_again(found: Outcome, images: Path, tmp_path: Path) -> None:
    assert found.winner is not None
    assert found.test is not None
    exported = found.folder / "best" / "model.onnx"
    assert alone(exported, images / "val") == found.winner.quint8_accuracy
    assert alone(exported, images / "test") == found.test.quint8_accuracy
    assert 1 / 3 < found.test.quint8_accuracy < 1
    opened = open_run(found.folder)
    folded, _ = opened.networks[0].load(opened.space)
    facts = metadata(opened.config, opened.space, found.winner, found.test, "float32")
    write_model(tmp_path / "float.onnx", float_model(folded, facts))
    assert alone(tmp_path / "float.onnx", images / "test") == found.test.fp32_accuracy
    assert facts["validation"] == "val"


def test_validation_images_of_the_folder_are_what_candidates_are_compared_on(found: Outcome, images: Path) -> None:
    (one,) = found.evaluations
    assert (one.validation, one.images, one.trained_images) == ("val", 3 * 14, 3 * 3 * 28)
    assert list(pd.read_csv(found.folder / "candidates.csv")["validation"]) == ["val"]
    assert "; constraints checked on the validation images (val); quantized with " in found.headline()
    assert found.cautions == []
    page = found.report.read_text()
    assert "at least 1.00 %, checked on the validation images (val)" in page
    opened = open_run(found.folder)
    assert opened.config["data"]["validation"] == "val"
    elsewhere = open_run(found.folder).data(Path("data"), lambda done, total: None, validation=str(images / "val"))
    assert elsewhere.fingerprint() == opened.config["data"]["fingerprint"]


def test_without_test_images(fnet: Callable, refused: Callable, images: Path, tmp_path: Path) -> None:
    """And with validation images elsewhere, and an image that cannot be read."""
    for part in ("train", "val"):
        shutil.copytree(images / part, tmp_path / ("data/train" if part == "train" else "mine"))
    asked = ("--dataset", "imagefolder:data", "--validation", "mine", "--out", "run")
    assert "data/test does not exist; class folders must lie in" in refused(
        "run", *SHORT, "--dataset", "imagefolder:data"
    )
    (tmp_path / "data/train/dark/broken.jpg").write_bytes(b"no image")
    assert "cannot read image" in refused("run", *SHORT, *asked)
    code, out, _ = fnet("run", *SHORT, *asked, "--skip-unreadable")
    assert code == 0
    assert f"left out, 1 unreadable image: {tmp_path}/data/train/dark/broken.jpg: cannot identify" in out
    caution = (
        "the data set has no test images (test/): the accuracy of the winner on images that chose nothing is not known"
    )
    assert out.count(f"warning: {caution}") == 2, "at the beginning and at the end"
    assert "; no test images; quantized with " in out.splitlines()[-1]
    assert not (tmp_path / "run/best/test.json").exists()
    facts = read_model(tmp_path / "run/best/model.onnx")[1]
    assert facts["validation"] == str(tmp_path / "mine")
    assert alone(tmp_path / "run/best/model.onnx", tmp_path / "mine") == float(facts["validation_quint8_accuracy"])
    assert not any(name.startswith("test_") for name in facts)
    page = (tmp_path / "run/report.html").read_text()
    assert "T" + caution[1:] in page
    assert "1 unreadable image left out, no test images" in page
    assert "The winner on the validation split: the share of each class that is classified right" in page
    assert pd.read_csv(tmp_path / "run/best/confusion.csv")["images"].sum() == 42
    again = fnet("run", *SHORT, *asked, "--skip-unreadable")
    assert again[1].splitlines()[-1] == out.splitlines()[-1]
    assert "training candidate" not in again[1]
    (tmp_path / "data/train/dark/broken.jpg").unlink()
    assert fnet("run", *SHORT, *asked)[0] == 0, "the images that count are the same"
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert "--validation" in refused("audit", "run")
    code, out, _ = fnet("audit", "run", "--validation", "moved")
    assert code == 0
    assert "0 of 42 predictions differ; validation images, run/best/model.onnx" in out
    assert fnet("report", "run")[1].count("warning: ") == 1
    for options, fault in (
        (
            (),
            "data/test does not exist; class folders must lie in train/ and test/, or, for the validation split, as in",
        ),
        (
            ("--validation", "moved"),
            "--validation requires --split validation; give that too, or leave it out",
        ),
    ):
        assert fault in refused("evaluate", "--space", "tiny", "--plan", "regular", *asked[:2], *options)


def test_validation_images_that_the_weights_may_know(
    fnet: Callable, found: Outcome, images: Path, tmp_path: Path
) -> None:
    """A folder without val/; later one comes: what was begun goes on as it was, as runs of earlier versions do."""
    shutil.copytree(images, tmp_path / "data", ignore=shutil.ignore_patterns("val"))
    weights = str(found.folder / "candidates/000/weights.safetensors")
    save_space(found.space, tmp_path / "three.toml")
    asked = (*ONE, "--dataset", "imagefolder:data", "--weights", weights, "--final-epochs", "0", "--min-quint8", "1%")
    asked = (*asked, "--space", "three.toml", "--out", "run")
    code, out, err = fnet("run", *asked)
    assert (code, err) == (0, "")
    caution = "the validation images are a part of the training images, which the weights may have been trained on"
    assert out.count(f"warning: {caution}: accuracies and constraints on them may be too good") == 2
    checked = f"; constraints checked on the validation images ({MAYBE_KNOWN}); quantized with "
    assert checked in out.splitlines()[-1]
    assert set(pd.read_csv("run/candidates.csv")["validation"]) == {MAYBE_KNOWN}
    page = Path("run/report.html").read_text()
    assert "T" + caution[1:] in page
    assert f"at least 1.00 %, checked on the validation images ({MAYBE_KNOWN})" in page

    shutil.copytree(images / "val", tmp_path / "data/val")
    config = json.loads(Path("run/config.json").read_text())
    assert [config["data"].pop(name) for name in ("validation", "has_test", "skipped")] == [HELD_OUT, True, 0]
    Path("run/config.json").write_text(json.dumps(config))
    code, again, _ = fnet("run", *asked)
    assert (code, again.splitlines()[-1]) == (0, out.splitlines()[-1])
    assert " starts" not in again
    data = open_run(Path("run")).data(Path("data"), lambda done, total: None)
    assert data.fingerprint() == hold_out(load_dataset("imagefolder:data", (3, 32, 32))).fingerprint()
    assert fnet("audit", "run")[0] == 0
    assert "data.fingerprint" in fnet("run", *asked, "--validation", "data/val")[2]
