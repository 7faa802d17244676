"""The pages in docs/: what they name exists, and the rules of quint8.md are those that the code cites."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CITING = ("fnet_search", "policies", "tests", "benchmarks", "examples", "README.md")
"""What may cite rules."""
FOLDERS = ("docs", "fnet_search", "policies", "tests", "benchmarks", "examples", "spaces", "studies", "hub")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def quoted(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text_of(page))


@cache
def names_of(path: Path) -> frozenset[str]:
    """What a source defines at its top level, and in its classes as ``Class.name``."""

    def defined(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from defined(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return frozenset(defined(ast.parse(text_of(path)).body))


def missing(named: str) -> str:
    """What is wrong with a ``path::name``, or a path; empty if nothing is."""
    file, _, name = named.partition("::")
    path = ROOT / file
    if not path.exists():
        return f"{file} does not exist"
    if name and name.replace("::", ".") not in names_of(path):
        return f"{file} does not define {name}"
    return ""


@each_page
def test_files_functions_and_tests_that_a_page_names_exist(page: Path) -> None:
    named = [one for one in quoted(page) if one.split("/")[0] in FOLDERS and "/" in one]
    assert [problem for one in named if (problem := missing(one))] == []


def test_what_does_not_exist_is_noticed() -> None:
    assert missing("tests/test_docs.py::test_what_does_not_exist_is_noticed") == ""
    assert missing("fnet_search/quant/fold.py::FoldedNetwork.apply_node") == ""
    assert missing("fnet_search/quant/unfold.py") == "fnet_search/quant/unfold.py does not exist"
    assert missing("fnet_search/quant/fold.py::unfold") == "fnet_search/quant/fold.py does not define unfold"


@each_page
def test_each_name_after_a_double_colon_has_a_path(page: Path) -> None:
    """Else it would not be checked above."""
    assert [one for one in quoted(page) if "::" in one and one.split("/")[0] not in FOLDERS] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.name))
def test_links_lead_to_pages_and_their_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        other = page if not file else page.parent / file
        assert other.is_file(), target
        headings = re.findall(r"^#+ (.+)$", text_of(other), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]
        assert not anchor or anchor in anchors, target


def rules() -> list[int]:
    return [int(one) for one in re.findall(r"^### Rule (\d+): ", text_of(ROOT / "docs/quint8.md"), re.MULTILINE)]


def test_rules_are_numbered_without_gaps() -> None:
    assert rules() == list(range(1, 19))


def test_each_rule_has_its_formula_or_claim_its_evidence_its_code_and_its_tests() -> None:
    parts = re.split(r"^### Rule \d+: .+\n", text_of(ROOT / "docs/quint8.md"), flags=re.MULTILINE)[1:]
    for number, part in enumerate(parts, 1):
        part = re.split(r"^## ", part, flags=re.MULTILINE)[0]
        described, checked, code, tests = re.split(r"^- (?:Checked against|Code|Tests): ", part, flags=re.MULTILINE)
        assert described.strip(), number
        assert checked.strip(), number
        assert re.findall(r"`fnet_search/\S+\.py::\w", code), number
        assert re.findall(r"`tests/\S+\.py::test_\w", tests), number


def cited(text: str) -> list[int]:
    """Numbers in ``rule 4``, ``rules 3, 6 and 10``, ``rules 5 to 18``, also over the end of a line."""
    found = re.findall(r"\brules?\s+(\d+(?:(?:,|\s+and|\s+to)\s+\d+)*)", re.sub(r"\n\s*#?", " ", text), re.IGNORECASE)
    return [int(number) for numbers in found for number in re.findall(r"\d+", numbers)]


def sources() -> Iterator[Path]:
    for name in CITING:
        path = ROOT / name
        yield from (
            [path] if path.is_file() else (one for one in path.rglob("*") if one.suffix in (".py", ".md", ".toml"))
        )


def test_citations_are_found_however_they_are_written() -> None:
    text = '"""Rules 3, 6\n    and 10: as rule\n18, rules 5 to 7; the rule of 12, ruler 13."""'
    assert cited(text) == [3, 6, 10, 18, 5, 7]


def test_every_rule_that_is_cited_exists() -> None:
    found = {path.relative_to(ROOT): set(cited(text_of(path))) for path in sources() if path != Path(__file__)}
    assert {path: numbers for path, numbers in found.items() if not numbers <= {*rules()}} == {}
    assert {number for path, numbers in found.items() if path.parts[0] == "fnet_search" for number in numbers}


def test_pages_that_the_code_cites_exist() -> None:
    found = {one for path in sources() for one in re.findall(r"\bdocs/[\w-]+\.md\b", text_of(path))}
    assert "docs/quint8.md" in found
    assert [one for one in sorted(found) if not (ROOT / one).is_file()] == []


def test_nothing_cites_what_is_not_in_the_repository() -> None:
    pattern = re.compile(r"\bdesign(?:, section|\.md)|rules of the desi[g]n", re.IGNORECASE)
    assert [path for path in sources() if path != Path(__file__) and pattern.search(text_of(path))] == []


TERMS = (
    *("space", "layer", "rate", "plan", "regular network", "reference", "candidate", "evaluation", "probe", "policy"),
    *("host", "history", "suggestion", "refused", "pruned", "final training", "parent", "warm start", "scheme"),
    *(
        "range method",
        "code",
        "carrier",
        "simulator",
        "audit",
        "run",
        "run folder",
        "recorded run",
        "outcome",
        "winner",
    ),
    *("study", "comparison", "trial", "lease", "worker", "pool", "artifact store", "metric", "score", "loss"),
    *("divergence", "trained on", "qmse", "qce", "numerics", "recipe", "fidelity"),
)
"""Words of the code and its messages that a reader may look up."""


def test_the_glossary_is_a_page_and_defines_each_term_once() -> None:
    text = text_of(ROOT / "docs/glossary.md")
    assert len(text.splitlines()) <= 70
    terms = [term.lower() for term in re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", text)]
    assert sorted(terms) == sorted(set(terms))
    assert set(TERMS) - set(terms) == set()
