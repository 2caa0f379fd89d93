"""What a report is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from cspd.engines.console.table import Table


@dataclass(frozen=True)
class Picture:
    """An image inside the page; `name` is that of its PNG file, if one was written."""

    caption: str
    data: str
    look: str = ""  # "map": colours that mean something, which dark mode must not change
    name: str = ""


@dataclass(frozen=True)
class PairRow:
    """The images of one setting, from the same noise as those of the other rows."""

    name: str
    images: list[str]


@dataclass(frozen=True)
class Pairs:
    """Rows of images that belong together column by column."""

    title: str
    rows: list[PairRow]


@dataclass(frozen=True)
class Card:
    """One figure that the page leads with; `look` is "good", "bad" or nothing."""

    value: str
    label: str
    look: str = ""


@dataclass
class Section:
    """A part of the page; `data` are tables behind the plots, folded in until asked for."""

    title: str
    anchor: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    data: list[Table] = field(default_factory=list)
    plots: list[Picture] = field(default_factory=list)
    pairs: list[Pairs] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    code: str = ""
