"""The rooms of `fnet_search`: what imports what, read from the source, lazy and type-checking imports too."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import fnet_search

PACKAGE = Path(fnet_search.__file__).parent
ROOMS = re.findall(r"^    (\w+)  +\S", fnet_search.__doc__ or "", re.MULTILINE)
"""In the order of the package's docstring: each imports only from those before it."""
NO_TORCH = ("base", "arch", "policy", "report", "optuna_bridge")


def module_of(path: Path) -> str:
    return ".".join(["fnet_search", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(source: str, modules: set[str]) -> Iterator[str]:
    """Modules of the package that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            for alias in node.names:
                found = [name for name in (f"{node.module}.{alias.name}", node.module) if name in modules]
                yield from found[:1]


def graph_of(sources: dict[str, str]) -> "nx.DiGraph[str]":
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(sources)
    graph.add_edges_from((name, other) for name, text in sources.items() for other in imports(text, set(sources)))
    graph.remove_edges_from([(name, other) for name, other in graph.edges if name in ("fnet_search", other)])
    return graph


def circles(graph: "nx.DiGraph[str]") -> list[list[str]]:
    return sorted(sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1)


def against_the_order(graph: "nx.DiGraph[str]") -> list[tuple[str, str]]:
    """Imports of a room that comes later, and of the package itself, whose names are loaded from everywhere."""
    place = {room: number for number, room in enumerate(ROOMS)}

    def at(name: str) -> int:
        return place[name.split(".")[1]] if "." in name and name != "fnet_search.__main__" else len(place)

    return sorted((name, other) for name, other in graph.edges if at(other) > at(name))


SOURCES = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}


def test_no_file_lies_on_a_circle_of_imports() -> None:
    assert circles(graph_of(SOURCES)) == []


def test_each_room_imports_only_from_those_before_it() -> None:
    assert {name.split(".")[1] for name in SOURCES if "." in name} - {"__main__"} == set(ROOMS)
    assert against_the_order(graph_of(SOURCES)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import fnet_search.engine.run",
        "from fnet_search.engine import run",
        "from fnet_search.engine.run import run_study",
        "def lazy():\n    from fnet_search.engine.run import run_study",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fnet_search.engine.run import run_study",
    ],
)
def test_an_arrow_against_the_order_is_seen_however_it_is_written(line: str) -> None:
    name = "fnet_search.arch.layers"
    drawn = graph_of({**SOURCES, name: f"{SOURCES[name]}\n{line}\n"})
    assert against_the_order(drawn) == [(name, "fnet_search.engine.run")]
    assert any(name in circle for circle in circles(drawn))


def test_imports_of_the_package_itself_are_seen() -> None:
    name = "fnet_search.base.files"
    drawn = graph_of({**SOURCES, name: f"{SOURCES[name]}\nfrom fnet_search import FnetError\n"})
    assert against_the_order(drawn) == [(name, "fnet_search")]


def test_what_needs_no_torch_loads_none() -> None:
    names = [name for name in SOURCES if "." in name and name.split(".")[1] in NO_TORCH]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "api"])
def test_each_room_says_what_lives_there_and_what_to_read_first(room: str) -> None:
    text = ast.get_docstring(ast.parse(SOURCES[f"fnet_search.{room}"])) or ""
    said = re.search(r"^Belongs here: .*^Read first: `(\w+\.py)`", text, re.MULTILINE | re.DOTALL)
    assert said is not None
    assert (PACKAGE / room / said[1]).is_file()
