"""A document as GitHub-flavoured Markdown. Pictures are left out: their numbers stand in tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html import escape

from repdeploy.page.document import (
    Cell,
    Column,
    Command,
    Document,
    Fold,
    Listing,
    Node,
    Notice,
    Pairs,
    Paragraph,
    Section,
    Table,
)

SPECIAL = re.compile(r"([\\`*_\[\]<>#|~$&])")
LIST_OR_RULE = re.compile(r"^(\d{0,9})([-+=.)])(?=[-=\s]|$)")
"""What begins a list item, a rule or a heading's underline."""
ALERTS = {"good": "TIP", "bad": "CAUTION"}
TOP = 2
"""The level of a section's heading."""


def markdown(document: Document) -> str:
    """Headings, tables, alerts and folds as GitHub shows them."""
    tiles = Table(
        tuple(Column(tile.label) for tile in document.tiles),
        (tuple(Cell(f"{tile.value} ({tile.detail})") for tile in document.tiles),),
        "",
    )
    parts = [f"# {_escaped(document.title)}", _escaped(document.subtitle), _table(tiles), _pairs(document.facts)]
    return "\n\n".join((*parts, *_nodes(document.sections, TOP)))


def _nodes(nodes: Iterable[Node], level: int) -> Iterator[str]:
    for node in nodes:
        match node:
            case Section():
                yield f"{'#' * level} {_escaped(node.title)}"
                yield from _nodes(node.nodes, level + 1)
            case Fold():
                yield f"<details><summary>{escape(' '.join(node.title.split()))}</summary>"  # HTML here
                yield from _nodes(node.nodes, level + 1)
                yield "</details>"
            case Paragraph():
                yield _escaped(node.text)
            case Command():
                yield _fenced(node.text)
            case Notice():
                yield _notice(node)
            case Pairs():
                yield _pairs(node)
            case Listing():
                yield "\n".join(f"- {_escaped(item)}" for item in node.items)
            case Table():
                yield _table(node)


def _notice(notice: Notice) -> str:
    remedy = (f"What to do: {notice.remedy}",) if notice.remedy else ()
    parts = [f"**{_escaped(notice.title)}**", *map(_escaped, (*notice.lines, *remedy))]
    return "\n".join((f"> [!{ALERTS.get(notice.tone, 'WARNING')}]", "\n>\n".join(f"> {part}" for part in parts)))


def _pairs(pairs: Pairs) -> str:
    return "\n".join(f"- {_escaped(name)}: {_cell(cell)}" for name, cell in pairs.items)


def _table(table: Table) -> str:
    heads = [_escaped(column.name) or " " for column in table.columns]
    rules = ["---:" if column.numeric else "---" for column in table.columns]
    rows = ([_in_table(cell) for cell in row] for row in table.rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows))


def _in_table(cell: Cell) -> str:
    """A bar would end the cell, in code too: there a backslash hides it, if no other backslash is near to be taken for that."""
    if cell.code and "|" in cell.text:
        return _escaped(cell.text) if "\\" in cell.text else _code(cell.text).replace("|", r"\|")
    return _cell(cell)


def _cell(cell: Cell) -> str:
    if cell.code and cell.text:
        return _code(cell.text)
    text = _escaped(cell.text)
    return f"**{text}**" if text and cell.tone in ("strong", "bad") else text


def _code(text: str) -> str:
    """A code span, which may hold backticks."""
    text = " ".join(text.split())
    fence = "`" * (_longest_run(text) + 1)
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


def _fenced(text: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}sh\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall(r"`+", text)), default=0)


def _escaped(text: str) -> str:
    """Names come from users' files: nothing in them may become markup, a link or a line of its own."""
    return LIST_OR_RULE.sub(r"\1\\\2", SPECIAL.sub(r"\\\1", " ".join(text.split())))
