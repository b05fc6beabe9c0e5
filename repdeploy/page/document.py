"""What a page consists of, whatever it is written in: sections of text, tables, notices and pictures. All text is plain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from repdeploy.page.pictures import Picture

Tone = Literal["", "good", "bad", "warn", "quiet", "strong"]


@dataclass(frozen=True, slots=True)
class Cell:
    """`share`: a part of 1, drawn as a small bar; `code`: something to be copied or found in a file."""

    text: str
    tone: Tone = ""
    share: float | None = None
    code: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    numeric: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str
    kind: ClassVar = "table"


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str
    tone: Tone = ""
    kind: ClassVar = "paragraph"


@dataclass(frozen=True, slots=True)
class Command:
    """Something to be typed."""

    text: str
    kind: ClassVar = "command"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that must not be overlooked. `lines`: one paragraph each; `remedy`: what to do about it."""

    title: str
    lines: tuple[str, ...] = ()
    remedy: str = ""
    tone: Tone = "warn"
    kind: ClassVar = "notice"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Names and what they stand for."""

    items: tuple[tuple[str, Cell], ...]
    kind: ClassVar = "pairs"


@dataclass(frozen=True, slots=True)
class Listing:
    items: tuple[str, ...]
    kind: ClassVar = "listing"


@dataclass(frozen=True, slots=True)
class Figure:
    """`caption`: how to read it. Left out where pictures cannot be shown: its numbers stand in a table as well."""

    picture: Picture
    caption: str
    kind: ClassVar = "figure"


@dataclass(frozen=True, slots=True)
class Fold:
    """What few readers want to see, closed at first."""

    title: str
    nodes: tuple[Node, ...]
    kind: ClassVar = "fold"


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    nodes: tuple[Node, ...]
    kind: ClassVar = "section"

    @property
    def anchor(self) -> str:
        return "-".join("".join(letter if letter.isalnum() else " " for letter in self.title.lower()).split())


Node = Table | Paragraph | Command | Notice | Pairs | Listing | Figure | Fold | Section


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the few numbers that most readers came for."""

    label: str
    value: str
    detail: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Document:
    title: str
    subtitle: str
    tiles: tuple[Tile, ...]
    facts: Pairs
    sections: tuple[Section, ...]


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Cell | str]]) -> Table:
    """Column names, a leading > aligning numbers to the right; columns in which no row has anything are left out."""
    cells = [tuple(item if isinstance(item, Cell) else Cell(item) for item in row) for row in rows]
    named = [Column(name.removeprefix(">"), name.startswith(">")) for name in columns]
    filled = [index for index in range(len(named)) if any(row[index].text for row in cells)]
    return Table(tuple(named[index] for index in filled), tuple(tuple(row[index] for index in filled) for row in cells), title)


def pairs(*items: tuple[str, Cell | str]) -> Pairs:
    """Names and values; what has no value is left out."""
    cells = ((name, value if isinstance(value, Cell) else Cell(value)) for name, value in items)
    return Pairs(tuple((name, cell) for name, cell in cells if cell.text))


def code(text: str) -> Cell:
    return Cell(text, code=True)
