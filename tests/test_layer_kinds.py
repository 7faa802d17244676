"""The set of layer kinds is closed: whatever is done with a layer by its kind knows all of them.

A new kind is missing from many places at first. mypy names those that are written as a ``match``, and a network of all
kinds passes through the others. Here each part of each kind is taken away in turn, and the failure is seen.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

import fnet_search
from fnet_search.arch import space_file
from fnet_search.arch.layers import KINDS, Foldable, Layer, Moving, Stateless, Weighted
from fnet_search.arch.macroarchitecture import Macroarchitecture
from fnet_search.arch.space_file import parse_space, to_toml
from fnet_search.base.errors import FnetError
from fnet_search.base.toml_tables import build
from fnet_search.deploy.audit import audit
from fnet_search.deploy.export import float_model, quantized_model
from fnet_search.deploy.runtime import Runtime
from fnet_search.importing.operations import LAYERS, aten
from fnet_search.importing.translation import from_module
from fnet_search.quant.fold import fold
from fnet_search.quant.layer_statistics import profile
from fnet_search.quant.quantize import quantize
from fnet_search.quant.ranges import calibrate
from fnet_search.quant.scheme import MINMAX
from fnet_search.report.drawing import COLOURS, drawing
from fnet_search.training.network import pretrained
from tests.support.networks import batches_of, normal

PACKAGE = Path(fnet_search.__file__).parent
CLASSES = {layer.__name__: layer for layer in KINDS.values()}
PARTS = ("output_shape", "macs", "params")
"""Methods of every kind."""


class Every(nn.Module):
    """Becomes a layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gate, self.out = nn.Linear(4, 4), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu() * 0.5
        x = F.channel_shuffle(F.pad(x, (0, 1, 1, 0)), 2)
        first, second = x.chunk(2, 1)
        gate = torch.sigmoid(self.gate(first.mean((2, 3)))).view(-1, 4, 1, 1)
        x = torch.cat([first + second, first * second * gate], 1)
        x = F.avg_pool2d(F.interpolate(F.max_pool2d(x, 3), scale_factor=2, mode="nearest"), 3)
        x = torch.cat([x, F.max_pool2d(x, 1)], 1).flatten(1)[:, :64]
        return self.out(x.view(-1, 16, 2, 2).mean((2, 3)))


@pytest.fixture(scope="module")
def every() -> Macroarchitecture:
    return imported()


def imported() -> Macroarchitecture:
    torch.manual_seed(0)
    return from_module(Every().eval(), torch.zeros(1, 3, 8, 8), "every")


def test_there_is_one_class_a_kind() -> None:
    source = ast.parse((PACKAGE / "arch" / "layers.py").read_text(encoding="utf-8"))
    written = {
        node.name: ast.literal_eval(assign.value)
        for node in source.body
        if isinstance(node, ast.ClassDef)
        for assign in node.body
        if isinstance(assign, ast.AnnAssign) and ast.unparse(assign.target) == "kind" and assign.value is not None
    }
    assert written == {name: layer.kind for name, layer in CLASSES.items()}
    groups = [get_args(group) for group in (Weighted, Foldable, Stateless)]
    assert len(KINDS) == len(get_args(Layer)) == sum(map(len, groups)), "no kind is in two groups"
    assert set(get_args(Moving)) < set(get_args(Stateless))


def test_a_network_of_all_kinds_goes_all_the_way(every: Macroarchitecture) -> None:
    """Import, TOML, network, folding, ranges, simulator, statistics, export, drawing."""
    assert {node.layer.kind for node in every.nodes} == set(KINDS)
    assert parse_space(to_toml(every)) == every
    torch.manual_seed(0)
    module, trained, x = Every().eval(), pretrained(every).eval(), normal(8, 3, 8, 8)
    folded = fold(trained)
    float_runtime = Runtime(float_model(folded))
    for network in (trained, folded, float_runtime):
        torch.testing.assert_close(network(x), module(x), rtol=0, atol=1e-5)
    stats = calibrate(folded, batches_of(x), MINMAX)
    quantized = quantize(folded, stats)
    (found,) = audit(quantized, Runtime(quantized_model(quantized)), [x])
    assert (found.codes, found.differing) == (40, 0)
    weighted = [node.name for node in every.order if isinstance(node.layer, Weighted)]
    assert [one.layer for one in profile(trained, folded, quantized, stats, [(x, x)])] == weighted
    drawing(every)


OPERATORS: dict[str, Any] = {
    "conv": aten.conv2d,
    "dense": aten.linear,
    "batch_norm": aten._native_batch_norm_legit_no_training,
    "activation": aten.relu,
    "pool": aten.avg_pool2d,
    "resample": aten.upsample_nearest2d,
    "pad": aten.constant_pad_nd,
    "add": aten.add,
    "multiply": aten.mul,
    "concat": aten.cat,
}
"""What each kind is imported from; the others are constants of a product, and moves."""


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_import_of_each_kind_is_missed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LAYERS, OPERATORS[kind])  # type: ignore[arg-type]
    with pytest.raises(FnetError, match="no layer computes this"):
        imported()


@pytest.mark.parametrize("kind", KINDS)
def test_the_toml_of_each_kind_is_missed(kind: str, every: Macroarchitecture, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {name: layer for name, layer in KINDS.items() if name != kind}
    monkeypatch.setattr(space_file, "KINDS", others)
    with pytest.raises(FnetError, match=f"unknown layer kind '{kind}'"):
        parse_space(to_toml(every))


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_can_be_read_from_toml(kind: str) -> None:
    """A field of another type is a TypeError, whatever its value."""
    for option in fields(KINDS[kind]):
        with pytest.raises(FnetError, match=f"^{option.name} must be "):
            build(KINDS[kind], {option.name: object()}, "a layer")


@pytest.mark.parametrize("colour", [name for name in COLOURS if name not in ("input", "grouped convolution")])
def test_the_colour_of_each_kind_is_missed(
    colour: str, every: Macroarchitecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(COLOURS, colour)
    with pytest.raises(KeyError, match=colour):
        drawing(every)


# What is written as a match, and mypy looks at


def kinds_of(pattern: ast.pattern) -> set[str]:
    """The classes of layers that a pattern of one value names."""
    if isinstance(pattern, ast.MatchOr):
        return set().union(*map(kinds_of, pattern.patterns))
    return {ast.unparse(pattern.cls)} & CLASSES.keys() if isinstance(pattern, ast.MatchClass) else set()


def dispatches(tree: ast.AST) -> Iterator[ast.Match]:
    """Over kinds of layers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Match) and len(set().union(*(kinds_of(case.pattern) for case in node.cases))) > 1:
            yield node


def ends(match: ast.Match) -> bool:
    return ast.unparse(match.cases[-1]) == f"case _:\n    assert_never({ast.unparse(match.subject)})"


SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
DISPATCHES = {path: found for path, text in SOURCES.items() if (found := list(dispatches(ast.parse(text))))}


@pytest.mark.parametrize("path", DISPATCHES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_done_by_kind_is_complete(path: Path) -> None:
    assert [match.lineno for match in DISPATCHES[path] if not ends(match)] == []


def without(text: str, line: int, name: str) -> str:
    """A source whose match at a line does not know a kind."""
    tree = ast.parse(text)
    (match,) = (one for one in dispatches(tree) if one.lineno == line)
    for case in list(match.cases):
        if isinstance(case.pattern, ast.MatchOr):
            case.pattern.patterns = [one for one in case.pattern.patterns if kinds_of(one) != {name}]
        elif kinds_of(case.pattern) == {name}:
            match.cases.remove(case)
    return ast.unparse(tree)


def without_method(name: str, method: str) -> str:
    """The layers, of which one class has no such method, and what costs and shapes ask of any layer."""
    tree = ast.parse(SOURCES[PACKAGE / "arch" / "layers.py"])
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            node.bases = [base for base in node.bases if ast.unparse(base) != "_Weightless"] or [ast.Name("_Single")]
            node.body = [part for part in node.body if not (isinstance(part, ast.FunctionDef) and part.name == method)]
    return (
        ast.unparse(ast.fix_missing_locations(tree))
        + f"\ndef ask(layer: Layer) -> object:\n    return layer.{method}\n"
    )


@pytest.mark.slow
def test_mypy_names_whatever_is_taken_away(tmp_path: Path) -> None:
    """Each kind from each match, and each method from each class, in a copy; all copies in one run."""
    expected: dict[str, str] = {}
    for path, matches in DISPATCHES.items():
        for match in matches:
            for name in sorted(set().union(*(kinds_of(case.pattern) for case in match.cases))):
                copy = f"{path.stem}_{match.lineno}_{name.lower()}"
                (tmp_path / f"{copy}.py").write_text(without(SOURCES[path], match.lineno, name), encoding="utf-8")
                expected[copy] = rf'Argument 1 to "assert_never" has incompatible type "{name}"; expected "Never"'
    for name in CLASSES:
        for method in PARTS:
            copy = f"layers_{method}_{name.lower()}"
            (tmp_path / f"{copy}.py").write_text(without_method(name, method), encoding="utf-8")
            expected[copy] = rf'Item "{name}" of ".*" has no attribute "{method}"'
    command = ["-m", "mypy", "--config-file", "pyproject.toml", "--follow-imports", "silent", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    said: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if found := re.match(r".*?([^/\\]+)\.py:\d+: error: (.*)", line):
            said.setdefault(found[1], []).append(found[2])
    assert len(expected) > 120
    wrong = [copy for copy, error in expected.items() if not any(re.match(error, one) for one in said.get(copy, []))]
    assert wrong == [], done.stderr or done.stdout[:2000]
