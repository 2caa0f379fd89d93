"""The Markdown of the project, and the commands in it."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROGRAMS = ("cspd-run", "cspd-export")
OURS = (*(f"{name} " for name in PROGRAMS), "python -m cspd.")


@dataclass(frozen=True)
class Command:
    """A command line of a page, its section up to it, and how the page begins."""

    page: str
    words: tuple[str, ...]
    context: str

    def __str__(self) -> str:
        return " ".join([self.page, *self.words])


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def commands() -> list[Command]:
    """Every command of ours in the code blocks of every page, but for usage lines."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.S | re.M):
            section = text[: block.end()].rpartition("\n## ")[2]
            context = text.partition("\n## ")[0] + section
            for line in block[2].splitlines():
                if line.startswith(OURS) and not block[1] and "[OPTIONS]" not in line:
                    words = tuple(shlex.split(line, comments=True))
                    name = str(page.relative_to(ROOT))
                    found.append(Command(name, words, context))
    return found
