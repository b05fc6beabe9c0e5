"""How the stages say how far they are: a callback, so that the library prints nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""(what is being done, how many steps are done, of how many)"""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def each(progress: Progress, stage: str, items: Sequence[T] | Iterable[T]) -> Iterator[T]:
    """Go through items and report each one."""
    listed = list(items)
    for index, item in enumerate(listed):
        progress(stage, index, len(listed))
        yield item
    progress(stage, len(listed), len(listed))
