"""A report as one HTML page that needs no network and no script."""

from __future__ import annotations

import html
import importlib.resources
import re
from collections.abc import Iterator, Mapping

from zoo.bundle.wording import MISSING, plain
from zoo.report.document import Cell, Command, Exhibit, Grid, Report, Section
from zoo.report.figures import Rendered

MARK = '<meta name="generator" content="manygates report">'
"""By which a report is known as one."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_BESIDE = 7
"""A table of more columns stands below its figure instead of beside it."""
_TONES = ("good", "alarm", "unknown")


def page_of(report: Report, figures: Mapping[str, Rendered]) -> str:
    """Return the page; `figures` are those of `report.pictures`, by name."""
    style = (importlib.resources.files("zoo.report") / "page.css").read_text(encoding="utf-8")
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        MARK,
        f"<title>{_text(report.title)}</title>",
        f"<style>\n{style}</style>",
        "</head>",
        "<body>",
        '<a class="skip" href="#main">Skip to the report</a>',
        "<header>",
        f"<h1>{_text(report.title)}</h1>",
        f'<p class="subtitle">{_text(report.subtitle)}</p>',
        *_contents(report),
        "</header>",
        '<main id="main">',
    ]
    for section in report.sections:
        lines += _section(section, figures)
    lines += ["</main>", "</body>", "</html>"]
    return "\n".join(lines) + "\n"


def figure_files(page: str) -> set[str]:
    """Return the names of the figure files that a page refers to."""
    return set(re.findall(r'href="figures/([a-z0-9-]+\.(?:svg|png))"', page))


def _contents(report: Report) -> Iterator[str]:
    yield '<nav aria-label="Contents">'
    yield "<ul>"
    for section in report.sections:
        yield f'<li><a href="#{section.key}">{_text(section.title)}</a></li>'
    yield "</ul>"
    yield "</nav>"


def _section(section: Section, figures: Mapping[str, Rendered]) -> Iterator[str]:
    yield f'<section id="{section.key}" aria-labelledby="{section.key}-title">'
    yield f'<h2 id="{section.key}-title">{_text(section.title)}</h2>'
    if section.intro:
        yield f'<p class="intro">{_text(section.intro)}</p>'
    for exhibit in section.exhibits:
        yield from _exhibit(exhibit, figures)
    yield "</section>"


def _exhibit(exhibit: Exhibit, figures: Mapping[str, Rendered]) -> Iterator[str]:
    yield '<div class="exhibit">'
    if exhibit.title:
        yield f"<h3>{_text(exhibit.title)}</h3>"
    picture = exhibit.picture
    if picture is not None:
        wide = any(len(grid.header) > _BESIDE for grid in exhibit.grids if not grid.folded)
        yield f'<div class="pair{" wide" if wide else ""}">'
        yield "<figure>"
        yield figures[picture.name].inline
        links = (f'<a href="figures/{picture.name}.{kind}">{kind.upper()}</a>' for kind in ("svg", "png"))
        yield f'<figcaption class="files">{" · ".join(links)}</figcaption>'
        yield "</figure>"
        yield '<div class="numbers">'
    open_grids = sum(not grid.folded for grid in exhibit.grids)
    for grid in exhibit.grids:
        if not grid.folded:
            yield from _grid(grid, captioned=open_grids > 1)
    if exhibit.remarks:
        yield '<ul class="remarks">'
        yield from (f"<li>{_text(remark)}</li>" for remark in exhibit.remarks)
        yield "</ul>"
    if picture is not None:
        yield "</div>"
        yield "</div>"
    folded = [grid for grid in exhibit.grids if grid.folded]
    if folded:
        said = "The whole table" if len(folded) == 1 else f"The {len(folded)} whole tables"
        yield f"<details><summary>{said}</summary>"
        for grid in folded:
            yield from _grid(grid, captioned=True)
        yield "</details>"
    yield from _commands(exhibit.commands)
    yield "</div>"


def _commands(commands: tuple[Command, ...]) -> Iterator[str]:
    if commands:
        yield "<dl>"
        for command in commands:
            yield f"<dt>{_text(command.about)}</dt>"
            yield f"<dd><pre><code>{_text(command.line)}</code></pre></dd>"
        yield "</dl>"


def _grid(grid: Grid, *, captioned: bool) -> Iterator[str]:
    """Yield a table; its caption is always there for those who listen, and `captioned` shows it to all."""
    caption = _text(grid.caption)
    # it can be scrolled by keyboard, as a wide table must be on a narrow screen
    yield f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0">'
    yield "<table>"
    yield f'<caption class="{"shown" if captioned else "heard"}">{caption}</caption>'
    yield "<thead>"
    if grid.groups:
        yield "<tr>"
        yield from (_cell(cell, "colgroup") for cell in grid.groups)
        yield "</tr>"
    yield "<tr>"
    yield from (_cell(cell, "col") for cell in grid.header)
    yield "</tr>"
    yield "</thead>"
    yield "<tbody>"
    for row in grid.rows:
        yield "<tr>"
        for index, cell in enumerate(row):
            yield _cell(cell, "row" if index < grid.headings else "")
        yield "</tr>"
    yield "</tbody>"
    yield "</table>"
    yield "</div>"


def _cell(cell: Cell, scope: str) -> str:
    text = _text(cell.text)
    if cell.value is not None:
        text = f'<data value="{cell.value!r}">{text}</data>'
    if cell.detail:
        text += f"<small>{_text(cell.detail)}</small>"
    if cell.apart:
        text += f'<small class="apart">{_text(cell.apart)}</small>'
    if scope == "colgroup" and not cell.text:
        return f'<td colspan="{cell.span}"></td>'
    number = cell.value is not None or cell.text == MISSING
    names = [*(["number"] if number else []), *([cell.tone] if cell.tone in _TONES else [])]
    attributes = f' class="{" ".join(names)}"' if names else ""
    attributes += f' colspan="{cell.span}"' if cell.span > 1 else ""
    return f'<th scope="{scope}"{attributes}>{text}</th>' if scope else f"<td{attributes}>{text}</td>"


def _text(text: str) -> str:
    """Escape for HTML, between tags and in attributes."""
    return html.escape(plain(text), quote=True)
