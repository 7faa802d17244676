"""Networks of a user's own Python and of torchvision as spaces, their weights, and what is said of bad ones."""

import json
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.plan import legal_rates
from fnet_search.arch.space_file import to_toml
from fnet_search.base.errors import FnetError
from fnet_search.candidates.network_files import load_trained
from fnet_search.importing import torchvision_names
from fnet_search.importing.spaces import load_space, save_space
from fnet_search.rundir.recorded_run import open_run
from fnet_search.rundir.run_folder import read_evaluation
from fnet_search.training.network import pretrained
from tests.support.command_line import PLAIN, Result

pytestmark = pytest.mark.usefixtures("one_picture")

MODEL = '''
"""A user's own: a skip connection and a head."""
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.5))
        self.head = nn.Linear(width, 10)
        self.middle = torch.tensor(0.5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem((x - self.middle) / 0.25)))
        return self.head((x + self.gamma * self.body(x)).mean((2, 3)))


make = Net
ready = Net()
number = 3


def wide():
    return Net(16)


def broken():
    raise ValueError("no such width\\nand more")


def words():
    return "a network"
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With ``mine.py`` in it, and a package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "nets.py").write_text("from mine import make, wide")
    for name in ("mine", "pack", "pack.nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "called", "width"),
    [
        ("mine.py:make", "mine", 8),
        ("mine.py:Net", "mine-Net", 8),
        ("mine.py:ready", "mine-ready", 8),
        ("mine.py:wide", "mine-wide", 16),
        ("mine:make", "mine", 8),
        ("pack.nets:wide", "nets-wide", 16),
    ],
)
def test_a_network_of_ones_own(folder: Path, name: str, called: str, width: int) -> None:
    path = list(sys.path)
    space = load_space(name, default_shape=lambda channels: (channels, 9, 7))
    assert sys.path == path
    assert (space.name, space.input_shape, space.weights) == (called, (1, 9, 7), None)
    assert space.shapes["body"] == (width, 9, 7)
    assert space.description == f"imported from {name}"
    assert list(legal_rates(space)) == ["body"]
    assert load_space(name, (1, 5, 6)).input_shape == (1, 5, 6)


def test_what_lies_beside_a_file_can_be_imported(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    (other / "helper.py").write_text("WIDTH = 4")
    (other / "net.py").write_text("from helper import WIDTH\nfrom torch import nn\n" + MODEL.replace("=8", "=WIDTH"))
    assert load_space("other/net.py:make", (1, 4, 4)).shapes["body"] == (4, 4, 4)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("mine.py:mak", "space mine.py:mak: unknown name 'mak'; did you mean 'make'?"),
        ("mine.py:number", "space mine.py:number: TypeError: 'int' object is not callable"),
        ("mine.py:broken", "space mine.py:broken: ValueError: no such width"),
        ("mine.py:words", "space mine.py:words: it gives a str; a torch.nn.Module is needed"),
        ("gone.py:make", "space gone.py:make: the file gone.py does not exist"),
        ("no.such:make", "space no.such:make: ModuleNotFoundError: No module named 'no'"),
        ("torchvision:resnet19", "unknown torchvision network 'resnet19'; did you mean 'resnet18'?"),
        ("torchvision:fasterrcnn_resnet50_fpn", "unknown torchvision network 'fasterrcnn_resnet50_fpn'"),
    ],
)
def test_what_is_not_there_is_said(folder: Path, name: str, complaint: str) -> None:
    path = list(sys.path)
    with pytest.raises(FnetError) as error:
        load_space(name)
    assert str(error.value).startswith(complaint)
    assert "\n" not in str(error.value)
    assert sys.path == path


LEAVES = {
    *("AdaptiveAvgPool2d", "AvgPool2d", "BatchNorm2d", "Conv2d", "Dropout", "Hardsigmoid", "Hardswish", "Linear"),
    *("MaxPool2d", "ReLU", "ReLU6", "Sequential", "SiLU", "Sigmoid", "StochasticDepth"),
}
"""What the networks that `test_torchvision` imports are made of."""


def test_the_networks_of_torchvision_that_are_named_are_made_of_our_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each module of torchvision, built without weights. `benchmarks/imports.py NAME` imports any."""
    register = nn.Module.register_parameter

    def light(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    monkeypatch.setattr(nn.Module, "register_parameter", light)
    builders = {models.get_model_builder(name).__module__: name for name in models.list_models(module=models)}
    for name in builders.values():
        slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        modules = models.get_model_builder(name)(weights=None, **slow).modules()
        leaves = {type(module).__name__ for module in modules if not any(module.children())}
        assert (name in torchvision_names.NAMES) == (leaves <= LEAVES), name


def test_of_a_module_of_torchvision_all_networks_are_named_or_none() -> None:
    families = {name: models.get_model_builder(name).__module__ for name in models.list_models(module=models)}
    named = {families[name] for name in torchvision_names.NAMES}
    assert {name for name, family in families.items() if family in named} == set(torchvision_names.NAMES)


def test_code_that_does_not_parse(folder: Path) -> None:
    (folder / "bad.py").write_text("def make(:\n")
    with pytest.raises(FnetError, match=r"space bad.py:make: SyntaxError: invalid syntax"):
        load_space("bad.py:make")


def stored(folder: Path, width: int = 8) -> nn.Module:
    """A network like the user's with weights of its own, saved in several forms."""
    sys.path.insert(0, str(folder))
    try:
        from mine import Net  # type: ignore[import-not-found] (written by the test)
    finally:
        sys.path.remove(str(folder))
    torch.manual_seed(5)
    model: nn.Module = Net(width)
    state = model.state_dict()
    save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "w.pth")
    torch.save({"state_dict": prefixed("module.", state), "epoch": 3}, folder / "w.ckpt")
    return model.eval()


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth", "w.ckpt"])
def test_weights_from_a_file(folder: Path, file: str) -> None:
    model = stored(folder)
    space = load_space("mine.py:make", (1, 6, 6), file)
    x = torch.randn(2, 1, 6, 6)
    assert torch.equal(pretrained(space).eval()(x), model(x))


@pytest.mark.parametrize(
    ("prefix", "keys"),
    [
        ("", ("model_state_dict",)),
        ("module.", ("model",)),
        ("model.", ("state_dict",)),
        ("_orig_mod.", ()),
        ("module._orig_mod.", ("ema",)),
        ("net.backbone.", ("model", "module")),
    ],
)
def test_weights_as_training_scripts_save_them(folder: Path, prefix: str, keys: tuple[str, ...]) -> None:
    """DataParallel, Lightning, torch.compile; beside what else they hold, such as a loss's weights."""
    model = stored(folder)
    saved: dict[str, Any] = prefixed(prefix, model.state_dict())
    if prefix:
        saved["loss.weight"] = torch.ones(10)
    for key in reversed(keys):
        saved = {"epoch": 3, key: saved, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    torch.save(saved, folder / "saved.pth")
    space = load_space("mine.py:make", (1, 6, 6), "saved.pth")
    x = torch.randn(2, 1, 6, 6)
    assert torch.equal(pretrained(space).eval()(x), model(x))


def test_weights_themselves_come_before_their_average(folder: Path) -> None:
    model = stored(folder)
    average = {name: 0 * value for name, value in model.state_dict().items()}
    torch.save({"ema": average, "model": model.state_dict()}, folder / "both.pth")
    space = load_space("mine.py:make", (1, 6, 6), "both.pth")
    x = torch.randn(2, 1, 6, 6)
    assert torch.equal(pretrained(space).eval()(x), model(x))


def test_weights_that_a_module_comes_with(folder: Path) -> None:
    stored(folder)
    (folder / "own.py").write_text(LOADING)
    space, filled = (load_space(name, (1, 6, 6), w) for name, w in (("own.py:make", "own"), ("mine.py:make", "w.pth")))
    assert space.weights is not None
    assert filled.weights is not None
    assert all(torch.equal(space.weights[name], filled.weights[name]) for name in filled.weights)
    assert load_space("own.py:make", (1, 6, 6)).weights is None


LOADING = """
import torch
from mine import Net


def make():
    net = Net()
    net.load_state_dict(torch.load("w.pth", weights_only=True))
    return net
"""


class Evil:
    """Unpickled, it would write a file."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, ("evil", "w")


def test_no_pickle_is_loaded(folder: Path) -> None:
    (folder / "evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"weight": Evil()}, folder / "hidden.pth")
    for name in ("evil.pth", "hidden.pth"):
        with pytest.raises(FnetError, match=f"{name} does not hold a state dict alone"):
            load_space("mine.py:make", (1, 6, 6), name)
    assert not (folder / "evil").exists()


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("none.pth", r"the weights file none.pth does not exist; name a file, or own"),
        ("empty.pth", r"cannot read weights empty.pth: "),
        ("cut.safetensors", r"cannot read weights cut.safetensors: "),
        ("", r" is a folder; name the file of weights in it"),
        ("hello.pth", r"cannot read weights hello.pth: it is neither safetensors nor what torch.save writes"),
        ("list.pth", r"list.pth does not hold a state dict"),
        (
            "whole.pth",
            r"whole.pth does not hold a state dict alone; save one with torch.save\(model.state_dict\(\), PATH\) "
            r"\(it holds mine.Net, ",
        ),
        ("less.pth", r"the weights in less.pth do not fit: 'head.bias' is missing$"),
        ("more.pth", r"the weights in more.pth do not fit: 'extra' is not in this network$"),
        (
            "other.pth",
            r"do not fit: 'gamma', 'norm.weight', 'norm.bias' and 3 more are missing; 'bn.weight', 'bn.bias', "
            r"'bn.running_mean' and 2 more are not in this network$",
        ),
        ("codes.pth", r"the weights in codes.pth do not fit: 'body.weight' is int8, not float32"),
        ("twice.pth", r"twice.pth holds this network more than once \(.*'a.' and 'b.'"),
        ("wide.pth", r"the weights in wide.pth do not fit: size mismatch for "),
    ],
)
def test_weights_that_do_not_fit(folder: Path, file: str, complaint: str) -> None:
    state = stored(folder).state_dict()
    torch.save([1, 2], folder / "list.pth")
    torch.save(stored(folder), folder / "whole.pth")
    torch.save({name: value for name, value in state.items() if name != "head.bias"}, folder / "less.pth")
    torch.save({**state, "extra": torch.zeros(1)}, folder / "more.pth")
    renamed = {
        name.replace("norm.", "bn."): value for name, value in state.items() if name not in ("gamma", "head.bias")
    }
    torch.save(prefixed("module.", renamed), folder / "other.pth")
    torch.save({**state, "body.weight": state["body.weight"].to(torch.int8)}, folder / "codes.pth")
    torch.save(prefixed("a.", state) | prefixed("b.", state), folder / "twice.pth")
    (folder / "hello.pth").write_text("hello")
    torch.save({**state, "head.bias": torch.zeros(11)}, folder / "wide.pth")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "cut.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:100])
    with pytest.raises(FnetError, match=complaint) as error:
        load_space("mine.py:make", (1, 6, 6), file)
    assert "\n" not in str(error.value)


def test_weights_of_torchvision_have_names() -> None:
    with pytest.raises(
        FnetError, match=r"unknown weights of torchvision's resnet18 'DEFAULTS'; did you mean 'DEFAULT'"
    ):
        load_space("torchvision:resnet18", weights="DEFAULTS")


def test_a_saved_import_comes_back_without_its_code(folder: Path) -> None:
    stored(folder)
    space = load_space("mine.py:make", (1, 6, 6), "w.pth")
    save_space(space, folder / "kept.toml")
    (folder / "mine.py").unlink()
    sys.modules.pop("mine", None)
    again = load_space("kept.toml")
    assert again == space
    assert "mine" not in sys.modules
    x = torch.randn(2, 1, 6, 6)
    assert torch.equal(pretrained(again).eval()(x), pretrained(space).eval()(x))


@pytest.mark.parametrize("name", ["squeezenet1_1", pytest.param("shufflenet_v2_x0_5", marks=pytest.mark.slow)])
def test_a_large_import_comes_back(tmp_path: Path, name: str) -> None:
    space = load_space(f"torchvision:{name}", (3, 32, 32))
    save_space(space, tmp_path / "s.toml")
    assert load_space(str(tmp_path / "s.toml")) == space
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.toml"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('weights = "../w.safetensors"', r"weights must be the name of a file in the same folder, not '\.\./w"),
        ('weights = "/w.safetensors"', r"weights must be the name of a file in the same folder"),
        ("weights = 3", r"name, description and weights must be strings"),
        ('weights = "gone.safetensors"', r"the weights file .*gone.safetensors does not exist"),
        ('weights = "other.safetensors"', r"other.safetensors does not hold the weights of space 'mine': "),
        ("mean = [0.5]", r"mean and std must be 1 numbers each, one per channel"),
        ("mean = [nan]\nstd = [1]", r"mean must be finite"),
        ("mean = 0.5", r"mean and std must be lists of numbers"),
        ("mean = [0.5]\nstd = [0]", r"std positive, got \[0.5\] and \[0\]"),
        ("mean = [0.5, 0.5]\nstd = [1, 1]", r"mean and std must be 1 numbers each"),
        ("weight = 3", r"unknown key 'weight'; did you mean 'weights'?"),
    ],
)
def test_saved_spaces_that_were_changed(folder: Path, line: str, complaint: str) -> None:
    text = to_toml(load_space("mine.py:make", (1, 6, 6)))
    save_file({"layers.stem.weight": torch.zeros(3)}, folder / "other.safetensors")
    (folder / "s.toml").write_text(text.replace("input =", f"{line}\ninput =", 1))
    with pytest.raises(FnetError, match=complaint):
        load_space(str(folder / "s.toml"))


def test_how_images_are_normalised_is_kept(folder: Path, tmp_path: Path) -> None:
    plain = load_space("mine.py:make", (1, 6, 6))
    space = Macroarchitecture(plain.name, plain.input_shape, plain.nodes, mean=(0.4,), std=(0.25,))
    save_space(space, tmp_path / "n.toml")
    assert load_space(str(tmp_path / "n.toml")) == space != plain


SEARCH = ("run", "--policy", "reverse-pyramid", "--final-epochs", "0")
RUN = ("--dataset", "digits", "--input", "1x8x8", "--epochs", "1", *PLAIN)


def test_a_search_on_a_network_of_ones_own(folder: Path, fnet: Callable[..., Result]) -> None:
    """From start to an audited file; what is done to the run afterwards needs no code."""
    asked = (*SEARCH, "--space", "mine.py:wide", "--budget", "50%", "--trials", "2", *RUN)
    code, out, err = fnet(*asked)
    assert code == 0, err
    (run,) = (folder / "runs").iterdir()
    assert run.name == "mine-wide-digits-reverse-pyramid-50pct"
    assert (run / "best" / "model.onnx").is_file()
    assert " 0 of 2,870 " in out
    (folder / "mine.py").unlink()
    for command in (("audit", str(run)), ("export", str(run), "-o", "m.onnx"), ("report", str(run))):
        code, out, err = fnet(*command)
        assert code == 0, err


def test_a_search_from_trained_weights(folder: Path, fnet: Callable[..., Result]) -> None:
    """The network itself is taken as it is; candidates start from it."""
    stored(folder)
    asked = (*SEARCH, "--space", "mine.py:make", "--budget", "70%", "--trials", "1", *RUN)
    code, _, err = fnet(*asked, "--weights", "w.pth", "--normalise", "0.3/0.4")
    assert code == 0, err
    (run,) = (folder / "runs").iterdir()
    reference, *others = (read_evaluation(path) for path in sorted(run.glob("candidates/*/evaluation.json")))
    assert (reference.role, reference.epochs, reference.trained_images) == ("reference", 0, 0)
    trained = [one for one in others if one.state == "complete"]
    assert [(one.parent, one.epochs, one.inherited_epochs) for one in trained] == [(reference.number, 1, 0)]
    kept = load_trained(open_run(run).space, reference.plan, run / "candidates" / "000").state_dict()
    weights = load_space("mine.py:make", (1, 8, 8), "w.pth").weights
    assert weights is not None
    assert all(torch.equal(kept[name], value) for name, value in weights.items())
    data = json.loads((run / "config.json").read_text())["data"]
    assert (data["mean"], data["std"]) == ([0.3], [0.4])
    code, _, err = fnet(*asked, "--weights", "w.safetensors", "--normalise", "0.3/0.4")
    assert code == 0, err  # the same weights from another file
    torch.save({name: value + 1 for name, value in stored(folder).state_dict().items()}, "w.pth")
    code, _, err = fnet(*asked, "--weights", "w.pth", "--normalise", "0.3/0.4")
    assert code == 2
    assert "was made with another configuration (weights: " in err


def test_other_classes_want_training(folder: Path, fnet: Callable[..., Result]) -> None:
    (folder / "mine.py").write_text(MODEL.replace("nn.Linear(width, 10)", "nn.Linear(width, 7)"))
    asked = (*SEARCH, "--space", "mine.py:make", "--weights", "own", "--budget", "70%", "--trials", "1", *RUN)
    code, _, err = fnet(*asked)
    assert code == 2
    assert "the weights of mine are for 7 classes, the data set has 10" in err
    assert not list((folder / "runs").glob("*/config.json"))
    code, _, err = fnet(*asked, "--finetune")
    assert code == 0, err
    (run,) = (folder / "runs").iterdir()
    assert json.loads((run / "config.json").read_text())["recipe"]["name"] == "finetune"
    reference = read_evaluation(run / "candidates" / "000" / "evaluation.json")
    assert (reference.role, reference.epochs) == ("reference", 1)


def test_nothing_to_factorize_can_still_be_quantized(folder: Path, fnet: Callable[..., Result]) -> None:
    text = MODEL.replace("self.body = nn.Conv2d(width, width, 3, padding=1)", "self.body = nn.Conv2d(width, width, 1)")
    (folder / "mobile.py").write_text(text)
    code, _, err = fnet("run", "--space", "mobile.py:make", "--budget", "50%", *RUN)
    assert code == 2
    assert "space mobile has no factorizable layer" in err
    assert "fnet-search evaluate --plan regular" in err
    code, out, err = fnet("evaluate", "--space", "mobile.py:make", "--weights", "own", "--plan", "regular", *RUN)
    assert code == 0, err
    assert " 0 of 3,600 " in out
    (run,) = (folder / "runs").iterdir()
    for command in (("audit",), ("analyze",), ("quantize", "--candidate", "0", "--ranges", "mse")):
        code, _, err = fnet(*command, str(run))
        assert code == 0, err


def test_patterns_choose_layers(folder: Path, fnet: Callable[..., Result]) -> None:
    code, out, _ = fnet("show", "mine.py:make", "--input", "1x8x8", "--factorize", "st*", "--keep", "body", "--json")
    assert code == 0
    assert json.loads(out)["plan"]["rates"] == {"stem": 1}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--finetune",), "--finetune requires --weights"),
        (("--weights", "own", "--no-warm-start"), "--weights requires --warm-start in a search"),
        (("--input", "8x8"), "--input 8x8: write channels, height and width, as in 3x224x224"),
        (("--input", "1x0x8"), "--input 1x0x8: write channels"),
        (("--normalise", "0.5"), "--normalise 0.5: write imagenet, or MEAN/STD as in "),
        (("--normalise", "0.5/x"), "--normalise 0.5/x: write imagenet"),
        (("--normalise", "imagenet"), "mean and std must be 1 numbers each, one per channel"),
        (("--normalise", "0.5/0"), "std positive, got [0.5] and [0.0]"),
        (("--factorize", "bdy"), "'bdy' matches no convolution without groups of space 'mine'; did you mean 'body'?"),
        (("--space", "tiny", "--weights", "own"), "the weights file own does not exist"),
        (("--space", "tiny", "--input", "1x8x8"), "--input can only be given for an imported network; space "),
        (("--input", "2x8x8"), "cannot trace mine for an input of 2x8x8: "),
    ],
)
def test_options_that_do_not_go_together(
    folder: Path, refused: Callable[..., str], options: tuple[str, ...], complaint: str
) -> None:
    assert complaint in refused("run", "--space", "mine.py:make", "--budget", "50%", *options)


def test_weights_are_not_written_over_those_that_are_read(folder: Path, fnet: Callable[..., Result]) -> None:
    code, _, err = fnet("show", "mine.py:make", "--input", "1x8x8", "--weights", "own", "--save", "a.toml")
    assert code == 0, err
    before = (folder / "a.safetensors").read_bytes()
    code, _, err = fnet("show", "a.toml", "--weights", "a.safetensors", "--save", "./a.toml")
    assert (code, (folder / "a.safetensors").read_bytes()) == (2, before)
    assert "would overwrite the weights that are read, a.safetensors; choose another name" in err
