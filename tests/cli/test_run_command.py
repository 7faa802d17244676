"""What `run` and `report` do for a user: shown, refused, stopped and going on."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fnet_search.deploy.export import read_weight_type
from fnet_search.training.weights import read_tensors
from tests.support.command_line import PLAIN, SMALL, TINY, Result, files_in, last_line, process
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


def test_the_winners_file_is_stored_as_the_last_run_asked_for(
    fnet: Callable, tmp_path: Path, finished: tuple[Path, Result]
) -> None:
    """A run that does not ask leaves it as it is; nothing else changes."""
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    before = files_in(folder)
    for asked, stored in (("uint8", "uint8"), (None, "uint8"), ("int8", "int8")):
        options = () if asked is None else ("--weight-type", asked)
        assert fnet("run", *SMALL, *options, "--out", "again")[0] == 0
        assert read_weight_type(folder / "best/model.onnx") == stored
        after = files_in(folder)
        assert {name for name in before if before[name] != after[name]} <= {"best/model.onnx", "journal.log"}
    assert after["best/model.onnx"] == before["best/model.onnx"]
    for broken in (b"half a fi", before["best/model.onnx"][:-1000]):
        (folder / "best/model.onnx").write_bytes(broken)
        assert fnet("run", *SMALL, "--out", "again")[0] == 0
        assert (folder / "best/model.onnx").read_bytes() == before["best/model.onnx"], "it is written again"


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
    assert evaluated == "run is a search; choose another --out"


def test_a_password_in_a_storage_url_is_not_kept(fnet: Callable, tmp_path: Path, finished: tuple[Path, Result]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    _, _, err = fnet("run", *SMALL, "--out", "run", "--storage", "mysql://me:secret@host/db")
    assert "'mysql://me:***@host/db' wanted" in err


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
        assert err.strip() == ("" if signum == signal.SIGKILL else "interrupted; run the same command again to resume")
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
    code, out, err = fnet(*given, "--time-limit", "0.001s")
    assert (code, err) == (5, "")
    assert re.fullmatch(
        r"time limit of 0\.001s reached, [\d:]+ left; run the same command again to resume", last_line(out)
    )
    code, out, err = fnet(*given, "--time-limit", "1h")
    assert (code, err) == (0, "")
    assert last_line(out) == "1 network measured; files in run"
    assert refused(*given, "--time-limit", "25") == "--time-limit '25' needs a unit; write 25m for minutes, or s or h"


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
    assert said[0][1] == "choosing the fastest numerics on this device ..."
    assert not any("choosing" in line for line in said[1]), "the numerics are recorded"
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
