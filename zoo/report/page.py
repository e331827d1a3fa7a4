"""A report as one HTML page that needs no network and no script: `templates/report.html.jinja` with its style."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.bundle.wording import MISSING, plain
from zoo.report.document import Report
from zoo.report.figures import Rendered

if TYPE_CHECKING:
    import jinja2

MARK = '<meta name="generator" content="manygates report">'
"""By which a report is known as one."""
_TONES = ("good", "alarm", "unknown")


def page_of(report: Report, figures: Mapping[str, Rendered]) -> str:
    """Return the page; `figures` are those of `report.pictures`, by name."""
    template = environment_of("zoo.report").get_template("report.html.jinja")
    return template.render(report=report, figures=figures, mark=MARK, missing=MISSING, tones=_TONES)


def environment_of(package: str) -> jinja2.Environment:
    """Return the environment of a package's folder `templates`, in which every text is made printable and escaped."""
    import jinja2
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        """Make a text printable; what is already HTML stays, and jinja2 escapes the rest."""
        return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def figure_files(page: str) -> set[str]:
    """Return the names of the figure files that a page refers to."""
    return set(re.findall(r'href="figures/([a-z0-9-]+\.(?:svg|png))"', page))
