"""Self-contained HTML pages: their style, and the elements that they are made of."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from fnet_search.base.files import write_text
from fnet_search.report.style import DPI

NONE = "-"
"""Stands for a value that was not measured."""

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #5b6470; --line: #d8dde3; --back: #fff; --band: #f4f6f8;
  --mark: #fff4d6; --accent: #0b62a8; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #9aa4b0; --line: #39414b; --back: #15181c;
  --band: #1e2329; --mark: #3a3216; --accent: #6db7f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 74rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.25rem; margin: 3rem 0 .75rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { max-width: 46rem; }
a { color: var(--accent); }
.soft, figcaption, .plan, .reason { color: var(--soft); }
.caution { background: var(--mark); padding: .5rem .8rem; border-radius: .5rem; }
.verdict { font-size: 1.2rem; margin: 1rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.cards div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; background: var(--band); }
.cards dt { color: var(--soft); font-size: .85rem; }
.cards dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.cards small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .45rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--line); background: var(--band); vertical-align: bottom; }
td.number { white-space: nowrap; }
.number { text-align: right; }
.layers table { font-size: .76rem; }
.layers :is(th, td) { padding: .25rem .3rem; }
tr.best { background: var(--mark); }
.warning { border-left: .25rem solid #d55e00; background: var(--mark); padding: .4rem .8rem; }
.confusion td { min-width: 2.4rem; }
.confusion th.turned { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; }
.confusion td.right { background: color-mix(in srgb, #0072b2 calc(.6 * var(--share)), transparent); }
.confusion td.wrong { background: color-mix(in srgb, #d55e00 calc(.6 * var(--share)), transparent); }
.plan { display: block; font: .72rem/1.4 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.reason { display: block; font-size: .78rem; max-width: 12rem; }
td:has(.plan) { min-width: 13rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 1.5rem; }
.bar { display: inline-block; height: .7em; background: var(--accent); }
figure { margin: 1rem 0; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: .4rem; }
figcaption { font-size: .88rem; margin-top: .4rem; max-width: 46rem; overflow-wrap: anywhere; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
.glossary dt { font-weight: 600; margin-top: .6rem; }
.glossary dd { margin: 0; max-width: 46rem; }
@media print { :root { color-scheme: light; --text: #000; --soft: #444; --line: #bbb; --back: #fff; --band: #fff;
  --mark: #eee; --accent: #000; } body { padding: 0; max-width: none; font-size: 10pt; } .wide { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding: .15rem .3rem; } tr { break-inside: avoid; } details { display: none; } }
"""


def figure_html(figure: Figure, caption: str, alt: str) -> str:
    """A matplotlib figure as a PNG in the page."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi="figure", metadata={"Software": None})
    return picture_html(buffer.getvalue(), caption, alt)


def picture_html(data: bytes, caption: str, alt: str) -> str:
    """The bytes of a PNG file in the page, at 100 pixels for an inch of the figure."""
    width = round(int.from_bytes(data[16:20]) * 100 / DPI)
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = f'<img src="{source}" alt="{escape(alt)}" width="{width}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def html_table(head: str, rows: Iterable[str]) -> str:
    """A table from the HTML of its head and of its rows."""
    body = "\n".join(rows)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'


def head_row(texts: Iterable[str], numbers: Iterable[str] = ()) -> str:
    """The head of a html_table: the names of its columns of text, then those of its columns of numbers."""
    named = [f"<th>{name}</th>" for name in texts] + [f'<th class="number">{name}</th>' for name in numbers]
    return f"<tr>{''.join(named)}</tr>"


def plain_table(
    texts: Sequence[str],
    numbers: Sequence[str],
    rows: Iterable[tuple[Sequence[str], Sequence[str]]],
    best: str | None = None,
) -> str:
    """A table of plain text. Each row holds the cells under `texts` and those under `numbers`; the row whose first cell
    is `best` is highlighted."""
    lines = [
        f"<tr{' class=best' if words[0] == best else ''}>{cells(words, numbers=False)}{cells(values)}</tr>"
        for words, values in rows
    ]
    return html_table(head_row(texts, numbers), lines)


def cells(cells: Iterable[str], numbers: bool = True) -> str:
    """Table cells of plain text."""
    kind = ' class="number"' if numbers else ""
    return "".join(f"<td{kind}>{escape(cell)}</td>" for cell in cells)


def write_page(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Writes a page of sections, each a heading (may be empty) and HTML. The page loads nothing and runs nothing."""
    body = "".join(f"<section>{f'<h2>{head}</h2>' if head else ''}{text}</section>" for head, text in sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n",
    )
