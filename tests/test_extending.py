"""One of each extension, from outside, in a few lines: docs/extending.md shows the same. Layer kinds are a closed set:
tests/test_layer_kinds.py."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import click
import pandas as pd
import pytest
from matplotlib.figure import Figure

from fnet_search import AskTell, Constraints, Evaluation, load_space, plan_cost, uniform
from fnet_search.arch.plan import regular
from fnet_search.base.errors import FnetError
from fnet_search.cli.main import COMMANDS, cli
from fnet_search.policy.conformance import made_up_probes
from fnet_search.policy.registry import load_policy, policy_names
from fnet_search.report import figures
from fnet_search.report.html_report import write_report
from fnet_search.report.outcome import Outcome
from tests.support.ceilings import WithLarger
from tests.support.command_line import PLAIN
from tests.support.evaluations import outcome, trained
from tests.support.packages import install
from tests.support.pictures import texts

TINY = load_space("tiny")

THEIR_DATA = """
import torch
from fnet_search.training.datasets import Source, Split

def stripes(folder, download):
    '''Upright ones and level ones.'''
    def split(images):
        labels = torch.arange(images) % 2
        lines = (torch.arange(16) % 4 < 2) * 200 + torch.randint(0, 50, (images, 1, 16, 16))
        return Split(torch.where(labels.view(-1, 1, 1, 1) == 1, lines, lines.mT).to(torch.uint8), labels)

    torch.manual_seed(0)
    return ("level", "upright"), split(200), split(40)

STRIPES = Source(stripes, size=(16, 16), flips=True)
"""
THEIR_RANGES = """
from fnet_search.quant.ranges import Observer
from fnet_search.quant.scheme import RangeSpec

class Part(Observer):
    '''So many percent of the range from min to max.'''
    def range(self):
        part = float(self.method.number) / 100
        return self.low * part, self.high * part

PART = RangeSpec("added_ranges:Part", (1, 101))
"""
THEIR_POLICY = """
from fnet_search import uniform

class Twice:
    def suggest(self, history):
        return None if history.seen else uniform(history.space, 2)
"""
THEIR_RECIPE = """
epochs = 2
batch_size = 20
learning_rate = 0.02
"""


ROOT = Path(__file__).parents[1]


def test_the_diffs_of_the_page_apply() -> None:
    """Every line that a diff takes away, or shows around what it adds, is in the file that is named before it."""
    seen, text = 0, ""
    for block in re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL):
        for line in block.splitlines():
            if name := re.match(r" # (fnet_search/[\w/]+\.py)", line):
                text = (ROOT / name[1]).read_text(encoding="utf-8")
            elif line and line[0] in " -":
                seen += 1
                assert line[1:] in text.splitlines()
    assert seen > 8


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages with a data set and a range method."""
    data, ranges = {"stripes": "added_data:STRIPES"}, {"part": "added_ranges:PART"}
    monkeypatch.syspath_prepend(install(tmp_path / "a", "added_data", THEIR_DATA, {"fnet_search.datasets": data}))
    group = {"fnet_search.range_methods": ranges}
    monkeypatch.syspath_prepend(install(tmp_path / "b", "added_ranges", THEIR_RANGES, group))


@pytest.mark.usefixtures("installed")
def test_a_data_set_a_range_method_a_policy_and_a_recipe(fnet: Callable, tmp_path: Path) -> None:
    """Named on the command line, trained with by a worker in another process, and found again by what opens the run."""
    (tmp_path / "twice.py").write_text(THEIR_POLICY)
    (tmp_path / "short.toml").write_text(THEIR_RECIPE)
    theirs = ("--dataset", "stripes", "--ranges", "part:90", "--policy", "twice.py:Twice", "--recipe", "short.toml")
    own = ("--space", "tiny", "--budget", "100%", "--no-warm-start", "--out", "run", *PLAIN)
    code, out, err = fnet("run", *theirs, *own)
    assert (code, err) == (0, "")
    assert "quantized with part:90" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["dataset"], config["data"]["classes"], config["data"]["images"]["test"]) == (
        *("stripes", ["level", "upright"]),
        [20, 20],
    )
    assert (config["policy"], config["scheme"]) == ("twice.py:Twice", "part:90")
    assert (config["recipe"]["name"], config["recipe"]["epochs"]) == ("short", 2)
    frame = pd.read_csv(tmp_path / "run" / "candidates.csv")
    assert frame[["plan", "scheme", "epochs", "differing_codes"]].values.tolist() == [
        [str(uniform(TINY, 2)), "part:90", 2, 0]
    ]
    code, out, _ = fnet("quantize", "run", "--candidate", "0", "--ranges", "part:50")
    assert (code, (tmp_path / "run/candidates/000/part-50/evaluation.json").is_file()) == (0, True)
    assert fnet("audit", "run", "--candidate", "0/part-50")[0] == 0


def test_a_constraint_that_is_not_a_sum_over_layers() -> None:
    """Known before training: above it nothing is trained, whatever the policy, and all that is said names it."""
    cost = plan_cost(TINY, regular(TINY))
    assert (cost.conv_macs, cost.params) == (811_008, 6_258)
    limits = WithLarger(conv_macs=811_008, larger=469_350)
    reason = "the larger number, 938,700, exceeds 469,350"
    assert limits.refusal(cost) == reason
    assert limits.of_cost(cost) == {"conv_macs": 0, "larger": 1}
    over = trained(TINY, regular(TINY), 0, 0.9, 0.9)
    assert (limits.missed(over), limits.misses(over, "images"), limits.feasible(over)) == (("larger",), [reason], False)
    assert limits.described()[1] == ("the larger number", "at most 469,350")
    for name in policy_names():
        loop = AskTell(load_policy(name), TINY, limits, probes=made_up_probes(TINY))
        for _ in range(4):
            if (plan := loop.ask()) is None:
                break
            assert limits.refusal(plan_cost(TINY, plan)) == ""
            loop.tell(Evaluation.of(TINY, plan, quint8_accuracy=0.8, fp32_accuracy=0.81))
        states = {one.state for one in loop.evaluations}
        assert "complete" in states, name


def test_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(outcome: Outcome) -> Figure | None:
        figure = Figure()
        figure.text(0.5, 0.5, f"{len(outcome.evaluations)} candidates")
        return figure

    mine = figures.RunFigure("how_many", "Look for more than one.", draw)
    nothing = figures.RunFigure("nothing", "Never shown.", lambda outcome: None)
    monkeypatch.setattr(figures, "FIGURES", (mine, nothing))
    found = outcome(TINY, Constraints(), [trained(TINY, regular(TINY), 0, 0.9, 0.8)], tmp_path)
    drawn = figures.run_figures(found)
    assert [text.get_text() for text in texts(drawn["how_many"])] == ["1 candidates"]
    pictures = figures.save_figures(drawn, tmp_path / "figures")
    assert [path.name for path in pictures] == ["how_many.png"]
    write_report(found, "mine", {}, pictures)
    page = found.report.read_text(encoding="utf-8")
    assert "Look for more than one." in page
    assert "Never shown." not in page


def test_a_command(fnet: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    @click.argument("name")
    def hello(name: str) -> None:
        """Greet."""
        if name == "nobody":
            raise FnetError("nobody is not there; name somebody")
        click.echo(f"hello, {name}")

    assert list(cli.commands) == [command.name for command in COMMANDS]
    monkeypatch.setitem(cli.commands, "hello", hello)
    assert fnet("hello", "you") == (0, "hello, you\n", "")
    assert fnet("hello", "nobody") == (2, "", "fnet-search: nobody is not there; name somebody\n")
    assert re.search(r"^  hello +Greet\.$", fnet("--help")[1], re.MULTILINE)
