"""Pieces of a page that stands alone: no script, font or picture from elsewhere. Every text is escaped here."""

import base64
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --page: #f4f6f8; --card: #ffffff; --ink: #1b1f24; --faint: #5d6772; --rule: #e1e5ea;
  --mark: #0072b2; --warn: #fff4e0; --warn-ink: #7a4a00; --good: #00734f; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1216; --card: #171b21; --ink: #e6e9ed; --faint: #9aa4b0; --rule: #2b313a;
  --mark: #56b4e9; --warn: #33270f; --warn-ink: #ffce7a; --good: #2fc79a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 16px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 10px; }
p { margin: 6px 0; }
.faint { color: var(--faint); }
.small { font-size: 13px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; margin: 12px 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 10px; margin: 18px 0; }
.numbers .card { margin: 0; padding: 10px 14px; }
.numbers b { display: block; font-size: 22px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.numbers span { display: block; font-size: 13px; color: var(--faint); }
.numbers .lead b { color: var(--mark); }
.note { background: var(--warn); color: var(--warn-ink); border: 0; }
.note p { margin: 2px 0; }
.picture { padding: 6px; }
.picture img { display: block; width: 100%; height: auto; border-radius: 6px; }
.row { margin: 14px 0; display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 12px; }
.row .card { margin: 0; }
.pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); }
tr:last-child td { border-bottom: 0; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
td { overflow-wrap: break-word; min-width: 60px; }
td:first-child { white-space: nowrap; }
td:last-child { overflow-wrap: anywhere; min-width: 150px; }
.runs th { white-space: normal; overflow-wrap: anywhere; vertical-align: bottom; }
.runs td, .runs th { min-width: 136px; max-width: 240px; overflow-wrap: anywhere; }
.runs td:first-child, .runs th:first-child { position: sticky; left: 0; background: var(--card); }
td.best { color: var(--good); font-weight: 700; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 6px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
"""


class Html(str):
    """Text that is HTML already; any other str is escaped before it gets on a page."""


def text(value: object) -> Html:
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(parts: Iterable[object]) -> Html:
    return Html("".join(map(text, parts)))


def tag(name: str, *parts: object, css: str = "") -> Html:
    """<name class="css">parts</name>."""
    opening = f'<{name} class="{escape(css)}">' if css else f"<{name}>"
    return Html(f"{opening}{join(parts)}</{name}>")


def section(title: str, *parts: object) -> Html:
    return join([tag("h2", title), *parts])


def folded(title: str, *parts: object) -> Html:
    return tag("details", tag("summary", title), *parts)


def numbers(found: Iterable[tuple[str, str, str]]) -> Html:
    """A grid of (large figure, what it is, small print); the first one stands out."""
    cards = [
        tag("div", tag("b", value), tag("span", name), tag("span", also), css="card" if index else "card lead")
        for index, (value, name, also) in enumerate(found)
    ]
    return tag("div", *cards, css="numbers")


def table(header: Sequence[object], rows: Iterable[Sequence[object]], css: str = "") -> Html:
    """A card with a table. A cell that is `Html` from `tag("td", ...)` is taken as it is. css "runs": a column a run."""
    head = [tag("tr", *(tag("th", cell) for cell in header))] if header else []
    body = [tag("tr", *(cell if cell.startswith("<td") else tag("td", cell) for cell in map(text, row))) for row in rows]
    return tag("div", tag("table", *head, *body), css=f"card scroll {css}".strip())


def notes(lines: Sequence[object]) -> Html:
    return tag("div", *(tag("p", line) for line in lines), css="card note") if lines else Html("")


def picture(light: bytes, dark: bytes, caption: str) -> Html:
    """A PNG inside the page, in the version that suits the reader's theme."""
    inner = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{escape(caption)}"></picture>'
    )
    return tag("div", Html(inner), css="card picture")


def page(title: str, *parts: object) -> str:
    """The whole file."""
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{tag("main", *parts)}\n</body>\n</html>\n'


def write(path: Path, content: str | bytes) -> None:
    """The file, all of it or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", errors="replace"))
    os.replace(temporary, path)


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
