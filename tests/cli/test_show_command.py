"""What `show` prints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.mark.parametrize(
    ("plan", "conv_macs"),
    [
        ("regular", 266_010_624),
        ("init2", 104_267_776),
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
