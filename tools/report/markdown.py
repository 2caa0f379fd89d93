"""A report as Markdown, for documents that lie in a repository."""

from __future__ import annotations

import os
from pathlib import Path

from cspd.tools.report.parts import Section


def markdown(subtitle: str, sections: list[Section], plots: Path | None, out: Path) -> str:
    """Tables, commands and plots of `sections`; links to the folder `plots` are relative to `out`.

    Without `plots` there are no files to link to, and the plots are left out.
    """
    lines = [subtitle, ""]
    for section in sections:
        lines += [f"## {section.title}", "", *([section.text, ""] if section.text else [])]
        lines += [table.markdown(section.title) for table in (*section.tables, *section.data)]
        if plots is not None:
            folder = os.path.relpath(plots, out.parent)
            lines += [f"![{plot.caption}]({folder}/{plot.name}.png)\n" for plot in section.plots]
        if section.code:
            lines += ["```", section.code, "```", ""]
    return "\n".join(lines)
