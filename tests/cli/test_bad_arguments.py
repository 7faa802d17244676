"""Bad input of the commands that begin a run: one line, exit code 2, nothing touched."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.support.command_line import PLAIN, TINY, remove

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
        (("run", *TINY, "--dataset", "cifar10"), "data set cifar10 is not in data/; set --download, or set --data-dir"),
        (("run", *TINY, "--recipe", "quik"), "unknown recipe 'quik'; did you mean 'quick'?"),
        (("run", *TINY, "--recipe", "."), "unknown recipe '.'; known: finetune, paper, quick"),
        (("run", *TINY, "--ranges", "percentile:60"), "write minmax, mse or percentile:P with 0 <= P < 50"),
        (("run", *TINY, "--scheme", "atuo"), "scheme 'atuo': unknown range method 'atuo'; write minmax, mse or perc"),
        (
            ("run", *TINY, "--scheme", "paper", "--ranges", "mse", "--per-channel"),
            "--scheme cannot be combined with --ranges, --per-channel: a scheme includes them",
        ),
        (
            ("evaluate", "--plan", "f2", "--scheme", "auto", "--bias-correct"),
            "--scheme cannot be combined with --bias-correct",
        ),
        (("study", "run", "paper", "--scheme", "mse", "--ranges", "mse"), "--scheme cannot be combined with --ranges"),
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
        (("run", *TINY, "--warm-epochs", "1.5"), "--warm-epochs 1.5 must be a whole number or a part of one epoch"),
        (("run", *TINY, "--final-epochs", "-1"), "Invalid value for '--final-epochs': -1 is not in the range x>=0."),
        (
            ("run", *TINY, "--no-warm-start", "--warm-epochs", "3"),
            "--warm-epochs requires --warm-start; set that too, or leave it out",
        ),
        (("evaluate", "--space", "tiny", "--plan", "f2", "--warm-epochs", "3"), "'--warm-epochs'"),
        (("run", *TINY, "--numerics-of", "none"), "none is not a run folder: it has no config.json"),
        (
            ("run", *TINY, "--numerics-of", "none", "--threads", "3"),
            "--numerics-of sets --threads too; leave one of them out",
        ),
        (("run", *TINY, "--device", "cuda:77"), "device 'cuda:77' is not available; this machine has: cpu"),
        (("run", *TINY, "--device", "meta"), "unknown device 'meta'; known: auto, cpu, cuda, cuda:N"),
        (("run", *TINY, "--device", "cpu:1"), "unknown device 'cpu:1'; did you mean 'cpu'?"),
        (
            ("run", *TINY, *PLAIN, "--storage", "garbage"),
            "give an Optuna storage URL, as in postgresql+psycopg://user@host/db",
        ),
        (
            ("run", *TINY, *PLAIN, "--storage", ""),
            "give an Optuna storage URL, as in postgresql+psycopg://user@host/db",
        ),
        (("run", *TINY, *PLAIN, "--storage", "sqlite:////no/such/folder/s.db"), "unable to open database file"),
        (("evaluate", "--space", "tiny"), "Missing option '--plan'."),
        (("evaluate", "--space", "tiny", "--plan", "reglar"), "unknown plan 'reglar'; did you mean 'regular'?"),
        (("evaluate", "--space", "tiny", "--plan", "init3"), "unknown plan 'init3'; reverse pyramids are init1, init2"),
        (("evaluate", "--space", "tiny", "--plan", "f3"), "unknown plan 'f3'; uniform rates are f1, f2, f4, f8, f16"),
        (("evaluate", "--space", "tiny", "--plan", "conv_9=2"), "unknown layer 'conv_9'; did you mean 'conv_8'?"),
        (
            ("evaluate", "--space", "tiny", "--plan", "conv_in=2"),
            "layer 'conv_in' cannot be factorized; factorizable layers",
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
            "space mine has no factorizable layer",
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
