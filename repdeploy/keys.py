"""The names in a table of tensors, as a tree: what lies under a name, which children are numbered."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

MAX_DIGITS = 10
"""A longer number counts nothing."""


class Keys:
    """`shapes`: per tensor key, its shape."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    @cached_property
    def names(self) -> frozenset[str]:
        """Every key and every dotted level above one."""
        return frozenset(key[:end] for key in self.shapes for end in [*(i for i, c in enumerate(key) if c == "."), len(key)])

    @cached_property
    def _below(self) -> Mapping[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for key in self.shapes:
            for end in [*(i for i, c in enumerate(key) if c == "."), len(key)]:
                found.setdefault(key[:end], []).append(key)
        return {name: tuple(keys) for name, keys in found.items()}

    def below(self, name: str) -> tuple[str, ...]:
        """The tensor of that name, or every tensor under it."""
        return self._below.get(name, ())

    @cached_property
    def _children(self) -> Mapping[tuple[str, str], tuple[str, ...]]:
        numbers: dict[tuple[str, str], list[int]] = {}
        for name in self.names:
            parent, _, last = name.rpartition(".")
            prefix = last.rstrip("0123456789")
            if prefix != last and len(last) - len(prefix) < MAX_DIGITS:
                numbers.setdefault((parent, prefix), []).append(int(last.removeprefix(prefix)))
        return {place: tuple(join(place[0], f"{place[1]}{i}") for i in sorted(set(found))) for place, found in numbers.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def children(self, name: str, prefix: str = "") -> tuple[str, ...]:
        """The numbered names directly under a name, in numerical order; `prefix` stands in front of the number."""
        return self._children.get((name, prefix), ())


def join(name: str, part: str) -> str:
    return f"{name}.{part}" if name and part else name or part


def inside(name: str, other: str) -> bool:
    """Whether a name lies strictly below another; everything lies below ""."""
    return other == "" or name.startswith(f"{other}.")
