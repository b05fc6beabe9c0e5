"""The names in a table of tensors, as a tree: what lies under a name, which children are numbered."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property


class Keys:
    """`shapes`: per tensor key, its shape."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    @cached_property
    def names(self) -> frozenset[str]:
        """Every key and every dotted level above one."""
        return frozenset(key[:end] for key in self.shapes for end in [*(i for i, c in enumerate(key) if c == "."), len(key)])

    @cached_property
    def _children(self) -> Mapping[str, tuple[str, ...]]:
        numbers: dict[str, list[int]] = {}
        for name in self.names:
            parent, _, last = name.rpartition(".")
            if last.isdecimal():
                numbers.setdefault(parent, []).append(int(last))
        return {parent: tuple(f"{parent}.{i}" for i in sorted(found)) for parent, found in numbers.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def children(self, name: str) -> tuple[str, ...]:
        """The numbered names directly under a name, in numerical order."""
        return self._children.get(name, ())


def join(name: str, part: str) -> str:
    return f"{name}.{part}" if name and part else name or part


def inside(name: str, other: str) -> bool:
    """Whether a name lies strictly below another; everything lies below ""."""
    return other == "" or name.startswith(f"{other}.")
