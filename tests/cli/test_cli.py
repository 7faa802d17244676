import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from PIL import Image

from fnet_search.base import shipped
from fnet_search.cli.main import main
from fnet_search.training.weights import read_tensors
from tests.support.command_line import PLAIN, SMALL, TINY, Result, files_in, process, remove
from tests.support.networks import compiled

# What a user gets


def test_a_run_shows_what_it_does_and_names_the_winner(finished: tuple[Path, Result]) -> None:
    folder, (code, out, err) = finished
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "reading digits ..."
    assert "candidate 0 (init1, 0.696 MMAC) starts" in lines
    (epoch,) = (line for line in lines if line.startswith("candidate 1 (init2): epoch 1 of 1, validation acc"))
    assert epoch.endswith(" left")
    assert lines[-2] == f"report: runs/{folder.name}/report.html"
    assert lines[-1].startswith("winner: candidate ")
    assert " MMAC, validation fp32 " in lines[-1]
    assert lines[-1].endswith(f"; files in runs/{folder.name}/best")
    rows = (folder / "candidates.csv").read_text().splitlines()
    assert len(rows) == 3
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        *("config.json", "journal.log", "artifacts", "candidates.csv", "timings.csv", "candidates", "best"),
        *("figures", "report.html"),
    }


@pytest.mark.parametrize(
    ("plan", "conv_macs"),
    [
        ("regular", 266_010_624),
        ("f2", 153_812_992),
        ("f4", 92_471_296),
        ("f8", 61_800_448),
        ("f16", 46_465_024),
        ("init2", 104_267_776),
        ("init4", 67_698_688),
        ("dws", 33_415_168),
    ],
)
def test_show_prints_json_for_programs(fnet: Callable, plan: str, conv_macs: int) -> None:
    code, out, err = fnet("show", "factorizenet", "--plan", plan, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["conv_macs"] == conv_macs
    assert shown["plan"]["label"] == plan
    assert sum(layer["macs"] for layer in shown["layers"] if layer["kind"] == "conv") == conv_macs
    assert sum(layer["params"] for layer in shown["layers"]) == shown["params"]
    if plan == "regular":
        assert shown["params"] == 19_759_434


def test_show_prints_a_row_a_layer_and_the_totals(fnet: Callable, tmp_path: Path) -> None:
    code, out, _ = fnet("show", "tiny", "--plan", "conv_8=4", "--draw", "tiny.png")
    assert code == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert cells[0] == ["conv_in", "conv", "3x32x32", "8x32x32", "", "", f"{9 * 3 * 8 * 32 * 32:,}", f"{9 * 3 * 8:,}"]
    (grouped,) = (row for row in cells if row[0] == "conv_8.grouped")
    assert grouped[2:6] == ["8x16x16", "8x16x16", "1 2 4 8", "4"]
    assert out.splitlines()[-2].startswith("conv MACs 585,728 (0.586 MMAC), total MACs 585,888, parameters ")
    assert out.splitlines()[-1] == "drawn into tiny.png"
    assert Image.open(tmp_path / "tiny.png").format == "PNG"


def test_names_with_brackets_are_shown_as_they_are(fnet: Callable, tmp_path: Path) -> None:
    """They are markup to Rich, which prints the tables."""
    text = 'name = "m"\ndescription = "[/red] x"\ninput = [3, 8, 8]\nlayer = [\n'
    text += '{ name = "[/a]", kind = "conv", out_channels = 3, padding = 1, factorize = true },\n'
    text += '{ name = "flat", kind = "flatten" },\n{ name = "out", kind = "dense", out_features = 10 },\n]\n'
    (tmp_path / "m.toml").write_text(text)
    code, out, _ = fnet("show", "m.toml")
    assert code == 0
    assert "m: [/red] x; plan regular" in out
    assert "│ [/a] " in out


def test_without_arguments_the_help_is_shown(fnet: Callable) -> None:
    assert fnet() == fnet("--help")
    code, out, err = fnet()
    assert (code, err) == (0, "")
    assert "fnet-search run --budget 120MMAC" in out


def test_report_makes_figures_and_report_again(fnet: Callable, tmp_path: Path, finished: tuple[Path, Result]) -> None:
    """Of a folder that was moved, too."""
    folder = tmp_path / "moved"
    folder.mkdir()
    kept = {name: data for name, data in files_in(finished[0]).items() if not name.startswith("figures")}
    for name, data in kept.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if name in ("candidates.csv", "report.html") else data)
    code, out, err = fnet("report", "moved")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].replace("moved", f"runs/{finished[0].name}") == finished[1][1].splitlines()[-1]
    assert (folder / "candidates.csv").read_bytes() == kept["candidates.csv"]
    assert (folder / "report.html").read_bytes() == kept["report.html"]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == sorted(
        path.name for path in (finished[0] / "figures").iterdir()
    )


def test_a_policy_of_a_third_party_is_used_by_name(
    fnet: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    info = site / "theirs-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fnet_search.policies]\nonce = theirs:Once\nraises = theirs:Raises\nillegal = theirs:Illegal\n"
        "idle = theirs:Idle\nmissing = theirs:Missing\n"
    )
    (site / "theirs.py").write_text(
        "from fnet_search.arch.plan import FactorizationPlan, regular\n"
        "class Once:\n"
        "    def suggest(self, history):\n"
        "        return None if history.seen else regular(history.space)\n"
        "class Raises:\n"
        "    def suggest(self, history):\n"
        "        raise ValueError('no plan\\ntoday')\n"
        "class Illegal:\n"
        "    def suggest(self, history):\n"
        "        return FactorizationPlan((('conv_8', 3), ('conv_16_1', 1), ('conv_16_2', 1)))\n"
        "class Idle: pass\n"
    )
    monkeypatch.syspath_prepend(site)
    plain = (*PLAIN, "--no-warm-start")
    code, out, err = fnet("run", "--space", "tiny", "--budget", "50%", "--policy", "once", *plain)
    assert (code, err) == (3, "")
    assert "candidate 0 (regular) refused: 811,008 conv MACs exceed the budget of 405,504" in out
    assert out.splitlines()[-1] == "no candidate was trained; see runs/tiny-digits-once-50pct"
    failures = {
        "raises": "policy Raises failed at suggestion 0: ValueError: no plan (site/theirs.py, line 7)",
        "illegal": "policy Illegal failed at suggestion 0: illegal rate 3 for layer 'conv_8'; legal rates: 1, 2, 4, 8",
        "idle": "policy 'idle' has no method suggest(history)",
        "missing": "policy 'missing' cannot be loaded: AttributeError: module 'theirs' has no attribute 'Missing'",
    }
    for name, message in failures.items():
        code, _, err = fnet("run", *TINY, *plain, "--policy", name)
        assert (code, err) == (2, f"fnet-search: {message}\n")
    code, _, err = fnet("run", *TINY, *plain, "--policy", "raises", "--debug")
    assert code == 2
    trace, line = err.split("fnet-search: ")
    assert line == f"{failures['raises']}\n"
    assert trace.startswith("Traceback (most recent call last):\n")
    assert 'theirs.py", line 7, in suggest\n    raise ValueError' in trace
    assert fnet("--debug", "run", *TINY, *plain, "--policy", "idle")[2].startswith("Traceback")


# Bad input


@pytest.mark.parametrize("budget", ["", "much", "-5", "-45%", "nan", "inf", "120 K MAC", "1e999", "120TMAC", "--"])
def test_malformed_budgets(refused: Callable[..., str], budget: str) -> None:
    assert refused("run", "--space", "tiny", "--budget", budget) == (
        f"malformed budget {budget!r}; write 120MMAC, 0.12GMAC, 120e6 or 45%"
    )


@pytest.mark.parametrize("budget", ["0", "0MMAC", "0%", "1e-9"])
def test_budgets_of_nothing(refused: Callable[..., str], budget: str) -> None:
    assert f"budget {budget!r} is less than one MAC; write a positive one" in refused("run", "--budget", budget)


@pytest.mark.parametrize("budget", ["1MAC", "0.3MMAC", "39%"])
def test_budgets_below_the_smallest_network(refused: Callable[..., str], budget: str) -> None:
    assert refused("run", "--space", "tiny", "--budget", budget) == (
        f"budget {budget} is below the smallest network of space 'tiny', which has 0.324 MMAC (323,584 conv "
        f"MACs, {100 * 323_584 / 811_008:.1f} % of the regular one)"
    )


@pytest.mark.parametrize(
    ("budget", "meant"),
    [("45", "45%"), ("99.5", "99.5%"), ("39", ""), ("120", ""), ("500", "500KMAC"), ("0.5", "0.5MMAC or 50%")],
)
def test_a_budget_that_lacks_its_unit(refused: Callable[..., str], budget: str, meant: str) -> None:
    line = refused("run", "--space", "tiny", "--budget", budget)
    assert line.endswith(f"did you mean {meant}?" if meant else "of the regular one)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rnu",), "unknown command 'rnu'; did you mean 'run'?"),
        (("serach",), "unknown command 'serach'; known: run, evaluate, worker, show, list, report"),
        (("run",), "Missing option '--budget'."),
        (("run", *TINY, "more"), "Got unexpected extra argument (more)"),
        (("run", *TINY, "--polcy", "tpe"), "'--policy'"),
        (("run", "--space", "tiyn", "--budget", "1"), "unknown space 'tiyn'; did you mean 'tiny'?"),
        (("run", "--space", "no.toml", "--budget", "1"), "space file no.toml does not exist"),
        (("run", "--space", ".", "--budget", "1"), "unknown space '.'; known: factorizenet, factorizenet-first-bias, "),
        (("run", *TINY, "--policy", "tep"), "unknown policy 'tep'; did you mean 'tpe'?"),
        (("run", *TINY, "--dataset", "cifar"), "unknown data set 'cifar'; did you mean 'cifar10'?"),
        (
            ("run", *TINY, "--dataset", "imagefolder"),
            "unknown data set 'imagefolder'; did you mean 'imagefolder:PATH'?",
        ),
        (("run", *TINY, "--dataset", "cifar10"), "data set cifar10 is not in data/; set --download, or --data-dir"),
        (("run", *TINY, "--recipe", "quik"), "unknown recipe 'quik'; did you mean 'quick'?"),
        (("run", *TINY, "--recipe", "."), "unknown recipe '.'; known: finetune, paper, quick"),
        (("run", *TINY, "--ranges", "percentile:60"), "write minmax, mse or percentile:P with 0 <= P < 50"),
        (("run", *TINY, "--scheme", "atuo"), "scheme 'atuo': unknown range method 'atuo'; write minmax, mse or perc"),
        (
            ("run", *TINY, "--scheme", "paper", "--ranges", "mse", "--per-channel"),
            "--scheme says all of how to quantize; leave it or --ranges, --per-channel out",
        ),
        (("evaluate", "--plan", "f2", "--scheme", "auto", "--bias-correct"), "leave it or --bias-correct out"),
        (("study", "run", "paper", "--scheme", "mse", "--ranges", "mse"), "leave it or --ranges out"),
        (("study", "run", "paper", "--scheme", "mse", "--scheme", "auto"), "name it before mse"),
        (("run", *TINY, "--min-quint8", "80"), "--min-quint8 '80' must be above 0 and at most 1; write 80%"),
        (("run", *TINY, "--min-quint8", ""), "--min-quint8 '' must be above 0 and at most 1; write 0.8 or 80%"),
        (("run", *TINY, "--max-drop", "nan"), "--max-drop 'nan' must be above 0 and at most 1"),
        (("run", *TINY, "--max-params", "0"), "--max-params '0' must be a positive number; write 2M"),
        (("run", *TINY, "--max-params", ""), "--max-params '' must be a positive number; write 2M"),
        (
            ("run", *TINY, "--max-params", "1000"),
            "a limit of 1,000 parameters is below the smallest network of space 'tiny', which has 1,578",
        ),
        (("run", *TINY, "--seed", "-1"), "Invalid value for '--seed': -1 is not in the range 0<=x<=4294967295."),
        (("run", *TINY, "--seed", "9" * 20), "is not in the range 0<=x<=4294967295."),
        (("run", *TINY, "--workers", "-1"), "Invalid value for '--workers': -1 is not in the range x>=0."),
        (("run", *TINY, "--epochs", "0"), "Invalid value for '--epochs': 0 is not in the range x>=1."),
        (("run", *TINY, "--trials", "0"), "Invalid value for '--trials': 0 is not in the range x>=1."),
        (("run", *TINY, "--dtype", "float16"), "'float16' is not one of 'auto', 'float32', 'tf32', 'bfloat16'"),
        (("run", *TINY, "--dtype", "tf32", "--device", "cpu"), "dtype tf32 needs a CUDA device of compute capability"),
        (("run", *TINY, "--workers", "1000000"), "1000000 workers need about "),
        (("evaluate", "--space", "tiny", "--plan", "f2", "--workers", "1000000"), " GB are free; use --workers "),
        (("run", *TINY, "--threads", "0"), "Invalid value for '--threads': 0 is not in the range x>=1."),
        (("run", *TINY, "--warm-epochs", "0"), "Invalid value for '--warm-epochs': 0.0 is not in the range x>0."),
        (("run", *TINY, "--warm-epochs", "1.5"), "--warm-epochs 1.5 is neither a whole number nor a part of one epoch"),
        (("run", *TINY, "--final-epochs", "-1"), "Invalid value for '--final-epochs': -1 is not in the range x>=0."),
        (
            ("run", *TINY, "--no-warm-start", "--warm-epochs", "3"),
            "--warm-epochs is for candidates that start from others; leave it out, or set --warm-start",
        ),
        (("evaluate", "--space", "tiny", "--plan", "f2", "--warm-epochs", "3"), "'--warm-epochs'"),
        (("run", *TINY, "--numerics-of", "none"), "none is not a run folder: it has no config.json"),
        (
            ("run", *TINY, "--numerics-of", "none", "--threads", "3"),
            "--numerics-of says how to compute; leave it or --threads out",
        ),
        (("run", *TINY, "--device", "cuda:77"), "device 'cuda:77' is not there; this machine has: cpu"),
        (("run", *TINY, "--device", "meta"), "unknown device 'meta'; known: auto, cpu, cuda, cuda:N"),
        (("run", *TINY, "--device", "cpu:1"), "unknown device 'cpu:1'; did you mean 'cpu'?"),
        (
            ("run", *TINY, *PLAIN, "--storage", "garbage"),
            "an Optuna URL is wanted, as in postgresql+psycopg://user@host/db",
        ),
        (("run", *TINY, *PLAIN, "--storage", ""), "an Optuna URL is wanted, as in postgresql+psycopg://user@host/db"),
        (("run", *TINY, *PLAIN, "--storage", "sqlite:////no/such/folder/s.db"), "unable to open database file"),
        (("evaluate", "--space", "tiny"), "Missing option '--plan'."),
        (("evaluate", "--space", "tiny", "--plan", "reglar"), "unknown plan 'reglar'; did you mean 'regular'?"),
        (("evaluate", "--space", "tiny", "--plan", "init3"), "unknown plan 'init3'; reverse pyramids are init1, init2"),
        (("evaluate", "--space", "tiny", "--plan", "f3"), "unknown plan 'f3'; uniform rates are f1, f2, f4, f8, f16"),
        (("evaluate", "--space", "tiny", "--plan", "conv_9=2"), "unknown layer 'conv_9'; did you mean 'conv_8'?"),
        (
            ("evaluate", "--space", "tiny", "--plan", "conv_in=2"),
            "layer 'conv_in' cannot be factorized; those that can",
        ),
        (
            ("evaluate", "--space", "tiny", "--plan", "conv_8=3"),
            "illegal rate 3 for layer 'conv_8'; legal rates: 1, 2, 4, 8",
        ),
        (("evaluate", "--space", "tiny", "--plan", "conv_8"), "unknown plan 'conv_8'"),
        (("evaluate", "--space", "tiny", "--plan", "no.toml"), "cannot read plan no.toml"),
        (("show", "tinny"), "unknown space 'tinny'; did you mean 'tiny'?"),
        (("show", "tiny", "--plan", "initt2"), "unknown plan 'initt2'; did you mean 'init2'?"),
        (("show", "tiny", "--draw", "no/a.png"), "--draw no/a.png: the folder no does not exist"),
        (("show", "tiny", "--draw", "a.jpg"), "--draw a.jpg: only PNG can be drawn; name it a.png"),
        (("show", "tiny", "--draw", "/proc/a.png"), "No such file or directory"),
        (("report", "nowhere"), "nowhere is not a run folder: it has no config.json"),
        (("report", "."), ". is not a run folder: it has no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments(refused: Callable[..., str], arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(*arguments)


HEAD = 'name = "mine"\ninput = [3, 8, 8]\n\nlayer = [\n'
TAIL = '    { name = "flat", kind = "flatten" },\n    { name = "out", kind = "dense", out_features = 10 },\n]\n'


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        (
            "--space",
            HEAD
            + '    { name = "a", kind = "activation", inputs = ["b"] },\n    { name = "b", kind = "activation" },\n',
            "mine.toml, line 5: layer 'a' (number 1): lies on a cycle: a -> b -> a",
        ),
        (
            "--space",
            HEAD + '    { name = "a", kind = "activation", inputs = ["inptu"] },\n',
            "line 5: layer 'a' (number 1): takes its input from 'inptu', which is not a layer; did you mean 'input'?",
        ),
        (
            "--space",
            HEAD + '    { name = "a", kind = "pool" },\n    { name = "s", kind = "add", inputs = ["a", "input"] },\n',
            "line 6: layer 's' (number 2): cannot add shapes (3, 4, 4) and (3, 8, 8); they must be equal",
        ),
        (
            "--space",
            HEAD + '    { name = "a", kind = "covn", out_channels = 4 },\n',
            "line 5: layer 'a' (number 1): unknown layer kind 'covn'; did you mean 'conv'?",
        ),
        (
            "--space",
            HEAD + '    { name = "a", kind = "conv", out_channels = 4 },\n',
            "nothing to factorize in mine",
        ),
        ("--space", bytes(range(256)), "cannot read space mine.toml: 'utf-8' codec can't decode"),
        ("--recipe", "epochs = 1\nbatch_size = 64\n", "mine.toml: a recipe needs 'learning_rate'"),
        ("--recipe", "epochs = 1\nbatch_size = 64\nlearning_rate = nan\n", "learning_rate must be positive"),
        ("--recipe", "epochs = 1\nbatchsize = 64\n", "a recipe has no 'batchsize'; did you mean 'batch_size'?"),
        ("--recipe", bytes(range(256)), "cannot read recipe mine.toml: 'utf-8' codec can't decode"),
        ("--plan", "[rates]\nconv_8 = 3\n", "illegal rate 3 for layer 'conv_8'; legal rates: 1, 2, 4, 8"),
        ("--plan", "conv_8 = 2\n", "mine.toml: a plan file needs a [rates] table of layer = rate"),
        ("--plan", bytes(range(256)), "cannot read plan mine.toml: 'utf-8' codec can't decode"),
        ("--space", None, "space file mine.toml does not exist"),
        ("--recipe", None, "recipe file mine.toml does not exist"),
        ("--plan", None, "cannot read plan mine.toml: [Errno 21] Is a directory"),
    ],
)
def test_bad_files(
    refused: Callable[..., str], tmp_path: Path, option: str, content: str | bytes | None, message: str
) -> None:
    """None stands for a folder."""
    path = tmp_path / "mine.toml"
    if content is None:
        path.mkdir()
    else:
        whole = content + TAIL if isinstance(content, str) and option == "--space" else content
        path.write_bytes(whole.encode() if isinstance(whole, str) else whole)
    command = ("evaluate", "--space", "tiny") if option == "--plan" else ("run", *TINY)
    assert message in refused(*command, option, "mine.toml")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images in two classes."""
    root = tmp_path / "images"
    for part, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (9, 7), (40 * number, 99, 0)).save(root / part / label / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, "images/train does not exist; class folders must lie in train/ and test/"),
        (lambda root: remove(root / "test"), "images/test does not exist; class folders must lie in train/ and test/"),
        (lambda root: remove(root / "train" / "cat"), "train/ holds 1 class folders; at least 2 are needed"),
        (lambda root: [remove(path) for path in (root / "train" / "cat").iterdir()], "train/cat holds no image (.jpg"),
        (lambda root: (root / "test" / "dog" / "1.png").write_bytes(b""), "cannot read image"),
        (lambda root: (root / "test" / "dog" / "1.png").write_text("a dog"), "images/test/dog/1.png: cannot identify"),
    ],
)
def test_bad_image_folders(
    refused: Callable[..., str], images: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(images)
    assert message in refused("run", *TINY, "--dataset", "imagefolder:images")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "file exists and is not a run folder; choose another --out"),
        ("file/run", "cannot write to file/run: Not a directory"),
        ("foreign", "foreign exists and is not a run folder; choose another --out"),
        ("/proc/run", "cannot write to /proc/run: No such file or directory"),
        ("torn", "cannot read torn/config.json: "),
        ("other", "other/config.json is not the configuration of a run: it has no proper 'recipe'"),
        ("list", "list/config.json is not the configuration of a run"),
    ],
)
def test_bad_run_folders(refused: Callable[..., str], tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    config = '{"space": "", "dataset": "", "policy": "", "scheme": "", "split": ""}'
    for name, text in {"foreign/notes": "", "torn/config.json": '{"space"', "other/config.json": config}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    assert message in refused("run", *TINY, "--out", out)
    if (tmp_path / out / "config.json").exists():
        assert message in refused("report", out)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--epochs", "2", "recipe.epochs: 1 recorded, 2 wanted"),
        ("--budget", "90%", "--budget (conv MACs): 811008 recorded, 729907 wanted"),
        ("--max-drop", "5%", "--max-drop: None recorded, 0.05 wanted"),
        ("--ranges", "minmax", "--scheme: 'auto' recorded, 'minmax' wanted"),
        ("--dtype", "bfloat16", "numerics.dtype: 'float32' recorded, 'bfloat16' wanted"),
    ],
)
def test_another_configuration_is_refused_and_named(
    refused: Callable[..., str], tmp_path: Path, finished: tuple[Path, Result], option: str, value: str, named: str
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.json", ".lock"):
        (tmp_path / "run" / name).write_bytes((finished[0] / name).read_bytes())
    assert named in refused("run", *SMALL, "--out", "run", option, value)


def test_plans_are_not_evaluated_in_a_search(
    refused: Callable[..., str], tmp_path: Path, finished: tuple[Path, Result]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    evaluated = refused("evaluate", "--space", "tiny", "--plan", "f2", "--epochs", "1", "--out", "run")
    assert evaluated == "run is a run of a search; choose another --out"


def test_a_password_in_a_storage_url_is_not_kept(fnet: Callable, tmp_path: Path, finished: tuple[Path, Result]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    _, _, err = fnet("run", *SMALL, "--out", "run", "--storage", "mysql://me:secret@host/db")
    assert "'mysql://me:***@host/db' wanted" in err


def test_a_terminal_without_the_letters_of_a_path(
    fnet: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In tables, lines and errors, and where the name of a file is no text at all."""
    space = (shipped.folder("spaces") / "tiny.toml").read_text().replace("conv_8", "conv_é")
    for name in ("netz-ñ.toml", os.fsdecode(b"netz-\xff.toml")):
        (tmp_path / name).write_text(space)
        out, err = (TextIOWrapper(BytesIO(), encoding="ascii", errors="strict") for _ in range(2))
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            patched.setattr(sys, "stderr", err)
            for command, expected in ((("show", name), 0), (("report", name), 2)):
                patched.setattr(sys, "argv", ["fnet-search", *command])
                with pytest.raises(SystemExit) as end:
                    main()
                assert (end.value.code or 0) == expected
        table, line = (stream.detach().getvalue() for stream in (out, err))  # type: ignore[attr-defined]
        assert b"conv_\\xe9 " in table
        assert line.startswith(b"fnet-search: ")
        assert b"netz-" in line
    code, out_text, _ = fnet("show", "netz-ñ.toml")
    assert code == 0
    assert "conv_é " in out_text


# Being stopped


def until(run: "subprocess.Popen[str]", pattern: str) -> list[str]:
    """What a process prints up to a line like this."""
    assert run.stdout is not None
    said = []
    for line in run.stdout:
        said.append(line.rstrip("\n"))
        if re.search(pattern, line):
            break
    assert re.search(pattern, said[-1])
    return said


STOPS = (
    (signal.SIGTERM, 128 + signal.SIGTERM, r"^candidate 0 .*: epoch 1 of 3"),
    (signal.SIGINT, 130, r"^candidate 0 .*: epoch 2 of 3"),
    (signal.SIGKILL, -signal.SIGKILL, r"^candidate 1 .*: epoch 1 of 3"),
)
"""SIGTERM, Ctrl-C (which goes to the workers too) and SIGKILL, each within a training."""


@pytest.mark.parametrize(
    ("stops", "again"),
    [
        (STOPS[1:2], ["up to 2 candidates;", "candidate 0 goes on from epoch 3\n"]),
        pytest.param(
            STOPS,
            ["up to 2 candidates, 1 trained before;", "candidate 1 goes on from epoch 2\n"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["Ctrl-C", "three times"],
)
def test_a_stopped_run_goes_on_and_ends_like_one_that_was_not(
    fnet: Callable, tmp_path: Path, stops: tuple[tuple[int, int, str], ...], again: list[str]
) -> None:
    arguments = ("run", "--space", "tiny", "--budget", "60%", "--policy", "random", "--trials", "2", "--epochs", "3")
    arguments += ("--no-warm-start", "--min-quint8", "100%", "--scheme", "paper")
    said = {}
    for signum, code, pattern in stops:
        run = process(*arguments, *PLAIN, "--workers", "1", "--out", "stopped", cwd=tmp_path)
        said[signum] = until(run, pattern)
        os.killpg(run.pid, signum)
        _, err = run.communicate()
        assert run.returncode == code
        assert err.strip() == ("" if signum == signal.SIGKILL else "interrupted; the same command goes on from here")
    if signal.SIGTERM in said:
        second = said[signal.SIGINT]
        assert "candidate 0 goes on from epoch 2" in second
        assert not any(": epoch 1 of 3" in line for line in second), "what it had reached is not told again"
    code, out, err = fnet(*arguments, *PLAIN, "--out", "stopped")
    assert (code, err) == (3, "")
    assert all(text in out for text in again)
    nearest = out.splitlines()[-1].replace("stopped", "whole")
    assert nearest.startswith("no candidate met the constraints; nearest, missing min_quint8: candidate ")
    code, out, err = fnet(*arguments, "--workers", "0", "--numerics-of", "stopped", "--out", "whole")
    assert (code, out.splitlines()[-1]) == (3, nearest)
    whole, stopped = files_in(tmp_path / "whole"), files_in(tmp_path / "stopped")
    assert whole["candidates.csv"] == stopped["candidates.csv"]
    codes = [read_tensors(tmp_path / name / "best" / "quantized.safetensors")[0] for name in ("whole", "stopped")]
    assert codes[0].keys() == codes[1].keys()
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    kinds = [{name for name in files if not name.startswith("artifacts")} for files in (whole, stopped)]
    assert kinds[0] == kinds[1], "nothing is left of what was interrupted"


@pytest.mark.slow
def test_a_warm_run_that_is_killed_goes_on_and_ends_like_one_that_was_not(fnet: Callable, tmp_path: Path) -> None:
    """The host, by SIGKILL: within the training of a child, and of the final one."""
    arguments = ("run", "--space", "tiny", "--budget", "60%", "--policy", "random", "--trials", "2", "--epochs", "2")
    arguments += ("--warm-epochs", "2")
    for pattern in (
        r"^candidate 2 \(.*\): epoch 1 of 2, ",
        r"^final training 3 \(.*\): epoch 1 of 2, ",
    ):
        run = process(*arguments, *PLAIN, "--workers", "1", "--out", "stopped", cwd=tmp_path)
        said = until(run, pattern)
        run.kill()
        run.communicate()
    started = [line.partition(" (")[0] for line in said if " starts" in line]
    assert started == ["candidate 2", "final training 3"], "nothing that ended is trained again"
    code, out, err = fnet(*arguments, *PLAIN, "--out", "stopped")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    (start,) = (line for line in lines if " starts" in line)
    assert re.fullmatch(r"final training 3 \(.*, 0\.\d+ MMAC\) starts, from candidate [12]", start)
    assert "│ reference: others start from it │" in out
    code, out, err = fnet(*arguments, "--workers", "0", "--numerics-of", "stopped", "--out", "whole")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == lines[-1].replace("stopped", "whole")
    whole, stopped = (files_in(tmp_path / name) for name in ("whole", "stopped"))
    assert whole["candidates.csv"] == stopped["candidates.csv"]
    kinds = [{name for name in files if not name.startswith("artifacts")} for files in (whole, stopped)]
    assert kinds[0] == kinds[1], "nothing is left of what was interrupted"


def test_a_time_limit_stops_at_the_end_of_an_epoch(fnet: Callable, refused: Callable[..., str]) -> None:
    given = ("evaluate", "--space", "tiny", "--plan", "f2", "--epochs", "2", *PLAIN, "--out", "run")
    code, out, err = fnet(*given, "--time-limit", "1s")
    assert (code, err) == (5, "")
    assert re.fullmatch(r"time limit of 1s reached, [\d:]+ left; the same command goes on from here", last_line(out))
    code, out, err = fnet(*given, "--time-limit", "1h")
    assert (code, err) == (0, "")
    assert last_line(out) == "1 network measured; files in run"
    assert refused(*given, "--time-limit", "25") == "--time-limit '25' needs a unit; write 25m for minutes, or s or h"


def last_line(out: str) -> str:
    return out.splitlines()[-1]


@pytest.mark.slow
def test_a_run_with_what_is_measured_to_be_fast(tmp_path: Path) -> None:
    """No option but for the size of it: a worker a core, kernels compiled where they are faster."""
    said = []
    for _ in range(2):
        run = process(
            *("run", "--space", "tiny", "--budget", "60%", "--epochs", "1", "--trials", "2", "--out", "run"),
            cwd=tmp_path,
        )
        out, err = run.communicate()
        assert (run.returncode, err) == (0, "")
        said.append(out.splitlines())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["policy"] == "layer-guided"
    assert said[0][1] == "measuring what this device is fast with ..."
    assert not any("measuring what" in line for line in said[1]), "what was measured is recorded"
    begun = [next(line for line in lines if line.startswith("study run in run: ")) for lines in said]
    assert begun[1] == begun[0].replace("2 candidates; ", "2 candidates, 2 trained before; ")
    starts = [[line.partition(" ")[0] for line in lines if " starts" in line] for lines in said]
    assert starts == [["reference", "candidate", "candidate", "final"], []]
    assert said[1][-1] == said[0][-1]
    assert said[0][-1].startswith("winner: candidate ")


@pytest.mark.slow
@compiled
@pytest.mark.skipif(os.name != "posix", reason="finds its compiler otherwise")
def test_a_run_with_fused_norms_where_the_compiler_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be looked at; to go on, or to begin one like it, takes a compiler: nothing is lost for the lack of one."""
    arguments = ("run", *TINY, "--policy", "random", "--epochs", "1", "--no-warm-start", "--workers", "1")
    arguments += ("--out", "run")
    first = process(*arguments, "--trials", "1", "--dtype", "float32", "--fused", cwd=tmp_path)
    out, err = first.communicate()
    assert (first.returncode, err) == (0, "")
    before = (tmp_path / "run" / "candidates.csv").read_bytes()
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    again = process("report", "run", cwd=tmp_path)
    last, err = again.communicate()
    assert (again.returncode, err, last.splitlines()[-1]) == (0, "", out.splitlines()[-1])
    for given in ((*arguments, "--trials", "2"), ("run", *TINY, "--dtype", "float32", "--fused", "--out", "new")):
        run = process(*given, cwd=tmp_path)
        _, err = run.communicate()
        assert run.returncode == 2
        (line,) = err.splitlines()
        assert line.startswith("fnet-search: the kernels of --fused cannot be compiled here: ")
    assert (tmp_path / "run" / "candidates.csv").read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_studies_are_listed_and_shown(fnet: Callable) -> None:
    code, out, err = fnet("study")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: fnet-search study")
    code, out, err = fnet("study", "list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == shipped.names("studies")
    code, out, err = fnet("study", "show", "clipping")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "clipping: Activation ranges: 1 % clipped as in the paper, 0.1 %, none, least squared error; trained once",
        "data set cifar10; seed 0; plans regular, f16, dws",
        "space factorizenet; recipe paper, 200 epochs, batch 128, steps, glorot_uniform",
        f"quantized with percentile:1, percentile:0.1, minmax, mse; about {3 * 200} epochs in all",
    ]
    code, out, err = fnet("study", "show", "budget-120mmac")
    assert "search of 6 candidates by layer-guided under 120MMAC" in out
    assert f"about {3 * (6 + 6 * 1 + 6)} epochs in all" in out


def test_a_study_of_your_own(fnet: Callable, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('space = "tiny"\ndataset = "digits"\nrecipe = "quick"\nplans = ["f2"]\n')
    given = ("study", "run", "mine.toml", "--epochs", "2", "--seed", "4", *PLAIN)
    code, out, err = fnet(*given, "--time-limit", "1s")
    assert (code, err) == (5, "")
    assert "results so far: runs/study-mine-digits/results.md" in out
    assert "Nothing is trained yet." in (tmp_path / "runs" / "study-mine-digits" / "results.md").read_text()
    code, out, err = fnet(*given)
    assert (code, err) == (0, "")
    table, last = out.splitlines()[-2], last_line(out)
    assert re.fullmatch(r"\| f2 \| 0\.508 \| auto \| 1 \| [\d.]+ \| [\d.]+ \| .* 0 of 3,600 \|", table)
    assert last == "results: runs/study-mine-digits/results.md"
    page = (tmp_path / "runs" / "study-mine-digits" / "results.md").read_text()
    assert table in page
    assert "- seeds: 4\n" in page
    for arguments, message in (
        (("mien",), "unknown study 'mien'"),
        (("none.toml",), "study file none.toml does not exist"),
        (("mine.toml", "--epochs", "1", "--seed", "4"), "seed4 was made with another configuration (recipe.epochs: 2"),
        (("mine.toml", "--time-limit", "soon"), "must be a time above 0"),
        (("mine.toml", "--device", "gpu"), "unknown device 'gpu'"),
    ):
        assert message in refused("study", "run", *arguments)
