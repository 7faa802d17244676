"""The command `study`."""

import re
from collections.abc import Callable
from pathlib import Path

from fnet_search.base import shipped
from tests.support.command_line import PLAIN, last_line


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
