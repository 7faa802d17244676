# ruff: noqa: E501 (tables)
"""Bad inputs and broken files: one line, exit code 2, nothing touched; or the work is done again, and ends the same.

``BAD_INPUTS_TABLE=table.md pytest -n 0 tests/cli/test_broken.py`` writes what is said of each.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest

from fnet_search.optuna_bridge.storage import open_url
from tests.support.command_line import PLAIN, SMALL, Result, files_in, remove

pytestmark = pytest.mark.usefixtures("one_picture")

RUN = ("run", *SMALL, "--out", "run")
"""The command that `finished` is from."""
WORKER = ("worker", "--storage", "journal:study.log", "--study", "study")


@dataclass(frozen=True)
class Case:
    """A copy of a finished run lies in ``run``; `spoil` is given the folder above it."""

    what: str
    spoil: Callable[[Path], object]
    command: tuple[str, ...]
    message: str
    """Part of the line; of a repaired folder, of what is said."""
    repaired: bool = False


def winner(folder: Path) -> Path:
    number = json.loads((folder / "run" / "best" / "evaluation.json").read_text())["number"]
    return folder / "run" / "candidates" / f"{number:03d}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[: len(lines) // 2], b"not JSON\n", *lines[len(lines) // 2 :]]))


def other_study(journal: Path) -> None:
    journal.unlink()
    optuna.create_study(storage=open_url(f"journal:{journal}"), study_name="another")
    for left in journal.parent.glob("journal.log.*"):
        left.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def nothing(folder: Path) -> None:
    pass


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def study(folder: Path) -> None:
    optuna.create_study(storage=open_url(f"journal:{folder}/study.log"), study_name="study")


def link_outside(folder: Path) -> None:
    """An evaluation whose scheme would lead out of the run folder."""
    edit(winner(folder) / "evaluation.json", scheme="../../../outside")


REFUSED = [
    # The files of a run
    Case("config.json is empty", lambda at: empty(at / "run/config.json"), RUN, "cannot read run/config.json: "),
    Case("config.json is cut", lambda at: cut(at / "run/config.json"), RUN, "cannot read run/config.json: "),
    Case("config.json is missing", lambda at: (at / "run/config.json").unlink(), RUN, "is not a run folder"),
    Case("config.json is a list", lambda at: write(at / "run/config.json", "[]"), RUN, "not the configuration of a run"),
    Case("config.json has no seed", lambda at: edit(at / "run/config.json", seed=None), RUN, "has no proper 'seed'"),
    Case("config.json has another seed", lambda at: edit(at / "run/config.json", seed=5), RUN, "seed: 5 recorded"),
    Case("config.json has odd numerics", lambda at: edit(at / "run/config.json", numerics={"x": 1}), RUN, "'numerics'"),
    Case("config.json has a broken space", lambda at: edit(at / "run/config.json", space="["), ("report", "run"), "^cannot read space run/config.json: "),
    Case("the journal is something else", lambda at: write(at / "run/journal.log", "a\nb\n"), RUN, "cannot read journal"),
    Case("the journal is binary", lambda at: (at / "run/journal.log").write_bytes(b"\0\1\n\2\n"), RUN, "cannot read journal"),
    Case("the journal is a folder", lambda at: (remove(at / "run/journal.log"), (at / "run/journal.log").mkdir()), RUN, "Is a directory"),
    Case("the journal is words, to report", lambda at: write(at / "run/journal.log", "a dog"), ("report", "run"), "has lost candidates 0, 1; "),
    Case("the journal is words", lambda at: write(at / "run/journal.log", "a dog"), RUN, "cannot read journal"),
    Case("the journal is empty, to report", lambda at: empty(at / "run/journal.log"), ("report", "run"), "has lost candidates 0, 1; "),
    Case("the journal is gone, to report", lambda at: (at / "run/journal.log").unlink(), ("report", "run"), "there is no such file"),
    Case("the journal is cut, to report", lambda at: cut(at / "run/journal.log"), ("report", "run"), r"has lost candidates \d"),
    Case("the journal is cut, to quantize", lambda at: cut(at / "run/journal.log"), ("quantize", "run", "--candidate", "1", "--ranges", "mse"), r"has lost candidates \d"),
    Case("the journal is cut, to time", lambda at: cut(at / "run/journal.log"), ("latency", "run"), r"has lost candidates \d"),
    Case("a line of the journal is broken, to report", lambda at: garble(at / "run/journal.log"), ("report", "run"), "cannot read journal"),
    Case("the journal is another study's", lambda at: other_study(at / "run/journal.log"), ("report", "run"), "has lost "),
    Case("an evaluation is cut", lambda at: cut(winner(at) / "evaluation.json"), RUN, "cannot read "),
    Case("an evaluation is a list", lambda at: write(winner(at) / "evaluation.json", "[]"), RUN, "is not the evaluation of a candidate"),
    Case("an evaluation lacks its plan", lambda at: write(winner(at) / "evaluation.json", "{}"), RUN, "is not the evaluation of a candidate"),
    Case("weights are gone, to export", lambda at: (winner(at) / "weights.safetensors").unlink(), ("export", "run", "-o", "m.onnx", "--float"), r"^candidate \d has no weights \(a search keeps"),
    Case("weights are cut, to analyze", lambda at: cut(winner(at) / "weights.safetensors"), ("analyze", "run"), "cannot read weights"),
    Case("weights are empty, to quantize", lambda at: empty(at / "run/candidates/001/weights.safetensors"), ("quantize", "run", "--candidate", "1", "--ranges", "mse"), "cannot read weights"),
    Case("weights are another plan's", lambda at: shutil.copy(at / "run/candidates/000/weights.safetensors", at / "run/candidates/001/weights.safetensors"), ("export", "run", "--candidate", "1", "-o", "m.onnx"), "does not hold the weights of plan"),
    Case("codes are another network's", lambda at: shutil.copy(at / "run/candidates/000/quantized.safetensors", at / "run/candidates/001/quantized.safetensors"), ("export", "run", "--candidate", "1", "-o", "m.onnx"), "does not hold the codes of"),
    Case("codes are cut, to export", lambda at: cut(at / "run/candidates/001/quantized.safetensors"), ("export", "run", "--candidate", "1", "-o", "m.onnx"), "cannot read weights"),
    Case("a scheme that leads outside", link_outside, ("export", "run", "-o", "m.onnx"), r"^unknown range method '../../../outside'; write minmax, "),
    Case("a folder that may not be written", nothing, (*RUN[:-1], "/proc/self/run"), "cannot write to /proc/self/run: "),
    Case("the run folder is a file", lambda at: (remove(at / "run"), write(at / "run", "")), RUN, "exists and is not a run folder"),
    Case("the run folder is somebody else's", lambda at: (remove(at / "run"), write(at / "run/notes.txt", "")), RUN, "exists and is not a run folder"),
    # What is asked of a run
    Case("a candidate that is not there", nothing, ("export", "run", "--candidate", "77", "-o", "m.onnx"), "has no network '77'"),
    Case("a candidate that is no number", nothing, ("audit", "run", "--candidate", "../1"), "has no network '../1'"),
    Case("a candidate outside the folder", nothing, ("quantize", "run", "--candidate", "1/../../x", "--ranges", "mse"), "has no network '1/../../x'"),
    Case("an export into no folder", nothing, ("export", "run", "-o", "no/m.onnx"), "the folder no does not exist"),
    Case("a run that is not there", nothing, ("dashboard", "nowhere"), "nowhere is not a run folder"),
    Case("a storage that has no such study", nothing, ("report", "run", "--storage", "journal:other.log"), "the file other.log does not exist"),
    Case("a storage without the study", study, ("report", "run", "--storage", "journal:study.log"), "has no study"),
    Case("a data base that is not there", nothing, ("report", "run", "--storage", "sqlite:///no.db"), "the file no.db does not exist"),
    Case("a storage with a password, unreachable", nothing, ("report", "run", "--storage", "postgresql+psycopg://me:secret@127.0.0.1:1/db"), r"me:\*\*\*@127.0.0.1:1"),
    Case("ranges that are none", nothing, ("quantize", "run", "--candidate", "1", "--ranges", "max"), "write minmax, mse or percentile:P"),
    Case("too few images", nothing, ("analyze", "run", "--images", "1"), "is not in the range x>=2"),
    Case("a port that is none", nothing, ("dashboard", "run", "--port", "70000"), "is not in the range 0<=x<=65535"),
    # Workers
    Case("a worker without a storage", nothing, ("worker", "--study", "study"), "Missing option '--storage'"),
    Case("a worker without a study", nothing, ("worker", "--storage", "journal:study.log"), "Missing option '--study'"),
    Case("a worker in no storage", nothing, ("worker", "--storage", "garbage", "--study", "s"), "give an Optuna storage URL"),
    Case("a worker on a journal in no folder", nothing, ("worker", "--storage", "journal:no/study.log", "--study", "s"), "the file no/study.log does not exist"),
    Case("a worker on a proxy that is down", nothing, ("worker", "--storage", "grpc://127.0.0.1", "--study", "s"), "no host and port"),
    Case("a worker of a study of somebody else", study, WORKER, "was not begun by fnet-search run --storage"),
    Case("a worker on a journal of something else", lambda at: write(at / "study.log", "hello\nworld\n"), WORKER, "cannot read journal"),
    Case("artifacts of a study of one's own", nothing, ("run", *SMALL, "--artifacts", "store"), "--artifacts requires --storage"),
    Case("artifacts in no folder", nothing, ("run", *SMALL, "--storage", "journal:a.log", "--artifacts", "/no/such/store"), "cannot open artifact store"),
    Case("a lease of no time", nothing, ("run", *SMALL, "--lease", "1"), "is not in the range x>=2"),
    # What a user writes
    Case("a budget that is none", nothing, ("run", "--budget", "12OMMAC"), "malformed budget '12OMMAC'"),
    Case("a budget of nothing", nothing, ("run", "--budget", "0%"), "is less than one MAC"),
    Case("a budget below every network", nothing, ("run", "--space", "tiny", "--budget", "1KMAC"), "^budget 1KMAC is below the smallest network of space 'tiny'"),
    Case("a space with a name too long for a path", nothing, ("show", "x" * 5000), "unknown space"),
    Case("a plan too long for a path", nothing, ("show", "tiny", "--plan", "y" * 5000), "unknown plan"),
    Case("a space whose layer is called <script> twice", lambda at: write(at / "s.toml", 'input = [3, 8, 8]\n[[layer]]\nname = "<script>"\nkind = "activation"\n[[layer]]\nname = "<script>"\nkind = "activation"\n'), ("show", "s.toml"), r"^s.toml, line 5: layer '<script>' \(number 2\): this name is taken"),
    Case("a space that is cut", lambda at: write(at / "s.toml", 'input = [3, 8, 8]\n[[layer]]\nname = "a'), ("show", "s.toml"), "cannot read space s.toml"),
    Case("a space of 10,000 layers in a cycle", lambda at: write(at / "s.toml", "input = [3, 8, 8]\n" + "".join(f'[[layer]]\nname = "a{n}"\nkind = "activation"\ninputs = ["a{(n + 1) % 10000}"]\n' for n in range(10000))), ("show", "s.toml"), "lies on a cycle"),
    Case("a space whose weights lie elsewhere", lambda at: write(at / "s.toml", 'input = [3, 8, 8]\nweights = "../w.safetensors"\n[[layer]]\nname = "a"\nkind = "activation"\n'), ("show", "s.toml"), "weights must be the name of a file in the same folder"),
    Case("weights that are a pickle", lambda at: (at / "w.pt").write_bytes(b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x0etouch /tmp/evil\x94\x85\x94R\x94."), ("show", "torchvision:squeezenet1_1", "--weights", "w.pt"), "^w.pt does not hold a state dict alone; "),
    Case("weights that are empty", lambda at: empty(at / "w.safetensors"), ("show", "torchvision:squeezenet1_1", "--weights", "w.safetensors"), "^cannot read weights w.safetensors: it is empty"),
    Case("a recipe that is cut", lambda at: write(at / "r.toml", "epochs = "), ("run", *SMALL, "--recipe", "r.toml"), "cannot read recipe r.toml"),
    Case("a plan file that is cut", lambda at: write(at / "p.toml", "[rates"), ("show", "tiny", "--plan", "p.toml"), "cannot read plan p.toml"),
    Case("a plan of another space", lambda at: write(at / "p.toml", "[rates]\nconv_64_1 = 2\n"), ("show", "tiny", "--plan", "p.toml"), "unknown layer 'conv_64_1'"),
    Case("a study file that is cut", lambda at: write(at / "s.toml", "plans = ["), ("study", "run", "s.toml"), "^cannot read study s.toml: "),
    Case("a study that is not there", nothing, ("study", "run", "papper"), "did you mean 'paper'?"),
    Case("a time limit that is none", nothing, ("run", *SMALL, "--time-limit", "soon"), "must be a time above 0"),
    Case("images that are none", lambda at: write(at / "images/train/a/1.png", "a dog"), ("run", *SMALL, "--dataset", "imagefolder:images"), "images/test does not exist"),
]  # fmt: skip

REPAIRED = [
    Case("best/test.json is cut", lambda at: cut(at / "run/best/test.json"), RUN, "winner:", True),
    Case("the journal is empty", lambda at: empty(at / "run/journal.log"), RUN, "winner:", True),
    Case("candidates.csv is cut", lambda at: cut(at / "run/candidates.csv"), RUN, "winner:", True),
    Case("the winner's weights are cut", lambda at: (cut(winner(at) / "weights.safetensors"), remove(at / "run/best")), RUN, "once more", True),
    Case("the winner's codes are empty", lambda at: (empty(winner(at) / "quantized.safetensors"), remove(at / "run/best")), RUN, "once more", True),
    Case("the winner's folder is gone", lambda at: (remove(winner(at)), remove(at / "run/best")), RUN, "once more", True),
    Case("best/ has lost its model", lambda at: (at / "run/best/model.onnx").unlink(), RUN, "winner:", True),
    Case("a temporary file was left", lambda at: write(at / "run/.x.1.tmp", "x"), RUN, "winner:", True),
]  # fmt: skip


def tell(case: Case, code: int, line: str) -> None:
    if table := os.environ.get("BAD_INPUTS_TABLE"):
        command = " ".join(part if len(part) < 60 else f"{part[:20]}..." for part in case.command)
        command = command.replace(" ".join(SMALL), "...")
        said, what = (text.replace("|", "\\|") for text in (line[:300], case.what))
        with Path(table).open("a") as opened:
            opened.write(
                f"| {what} | `{command}` | {code} | {said} | {'as before' if case.repaired else 'untouched'} |\n"
            )


@pytest.fixture
def spoiled(tmp_path: Path, finished: tuple[Path, Result]) -> Callable[[Case], None]:
    def spoil(case: Case) -> None:
        shutil.copytree(finished[0], tmp_path / "run")
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        case.spoil(tmp_path)

    return spoil


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.what)
def test_refused(case: Case, spoiled: Callable[[Case], None], refused: Callable[..., str], tmp_path: Path) -> None:
    spoiled(case)
    line = refused(*case.command)
    assert re.search(case.message, line), line
    assert "secret" not in line
    assert not Path("/tmp/evil").exists()
    tell(case, 2, line)


WHOLE = ("candidates.csv", "best/model.onnx", "best/test.json", "candidates/000/layers.csv")


@pytest.mark.parametrize("case", REPAIRED, ids=lambda case: case.what)
def test_repaired(
    case: Case,
    spoiled: Callable[[Case], None],
    fnet: Callable[..., Result],
    finished: tuple[Path, Result],
    tmp_path: Path,
) -> None:
    """The same command again; then all is as it was."""
    spoiled(case)
    code, out, err = fnet(*case.command)
    assert (code, err) == (0, "")
    assert case.message in out
    now, before = files_in(tmp_path / "run"), files_in(finished[0])
    for name in WHOLE:
        if name == "best/model.onnx":  # it has the run's folder in its metadata
            continue
        assert now[name] == before[name], name
    assert not [name for name in now if name.endswith(".tmp")]
    tell(case, 0, next(line for line in out.splitlines() if case.message in line))


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, finished: tuple[Path, Result]) -> None:
    """A limit on the size of files stands for it; what was recorded before is still there, and the run goes on."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    alike = (*SMALL[: -len(PLAIN)], "--workers", "1", "--numerics-of", str(finished[0]))
    command = [sys.executable, "-m", "fnet_search", "run", *alike, "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("fnet-search: ")
    assert "Traceback" not in done.stdout
    tell(Case("no file may grow beyond 20 kB", nothing, RUN, ""), 2, line.removeprefix("fnet-search: "))
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "candidates.csv").read_bytes() == (finished[0] / "candidates.csv").read_bytes()
