"""The two streams of a terminal, and how tables and numbers are written on them."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from repdeploy_cli import options

PIPED_WIDTH = 200
"""Columns where no terminal says how many it has: whoever reads a pipe wants whole names."""


class _Pipe(Console):
    """A console whose reader may leave (`| head`): the application decides what that means."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def stdout() -> Console:
    is_piped = not sys.stdout.isatty()
    width = PIPED_WIDTH if is_piped and "COLUMNS" not in os.environ else None
    return _Pipe(highlight=False, markup=False, soft_wrap=is_piped, width=width)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False)


def printed(record: Any, schema: str = "", name: str = "") -> bool:
    """Whether --json was asked for, and so the record was printed as one document."""
    if not options.as_json():
        return False
    import json

    from repdeploy.records import plain

    document = {"schema": schema, name: plain(record)} if name else plain(record)
    print(json.dumps(document, indent=1, ensure_ascii=False))
    return True


def table_of(*columns: str) -> Table:
    """Column names; a leading > aligns numbers to the right, a trailing ~ lets long text wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name in columns:
        side: Literal["left", "right"] = "right" if name.startswith(">") else "left"
        table.add_column(name.strip(">~"), justify=side, no_wrap=not name.endswith("~"), overflow="fold")
    return table


def flops_of(count: int) -> str:
    for unit, size in (("GFLOP", 1e9), ("MFLOP", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kFLOP"


def number_of(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def size_of(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def time_of(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
