"""Shapes that a graph computes while some sizes are open: vectors whose entries are numbers, names of sizes, or unknown.

Exporters write `x.reshape(x.shape[0], 64, -1)` as Shape, Gather, Concat and Reshape; where the batch is open no constant
folding sees through that, although every other size is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import onnx_ir as ir

from repdeploy.graph.attributes import axes_of

Size = int | str | None
"""A fixed size, the name of an open one, or None where nothing is known."""
Vector = tuple[Size, ...]


class OpenSizes:
    """The integer vectors of one graph that are partly known. `constant`: a value's numbers, if it is a small constant."""

    def __init__(self, constant: Callable[[ir.Value], Sequence[int] | None]) -> None:
        self._constant = constant
        self._found: dict[ir.Value, Vector] = {}

    def of(self, value: ir.Value | None) -> Vector | None:
        """The entries of a vector (or the one of a scalar)."""
        if value is None:
            return None
        constant = self._constant(value)
        return tuple(constant) if constant is not None else self._found.get(value)

    def shape_of(self, output: ir.Value, shape: Vector) -> None:
        """A Shape node's answer."""
        self._found[output] = shape

    def follow(self, node: ir.Node) -> None:
        """Through one node, if it moves or changes such a vector."""
        entries = [self.of(value) for value in node.inputs if value is not None]
        if not entries or any(item is None for item in entries):
            return
        found = _moved(node, [item for item in entries if item is not None])
        if found is not None:
            self._found[node.outputs[0]] = found


def reshaped(before: Vector, target: Vector) -> Vector:
    """The output of a Reshape: 0 copies a size, -1 is what is left, where the open sizes on both sides cancel."""
    copied = tuple(before[axis] if size == 0 and axis < len(before) else size for axis, size in enumerate(target))
    if -1 not in copied:
        return copied
    rest = [size for size in copied if size != -1]
    names = [Counter(size for size in side if isinstance(size, str)) for side in (before, rest)]
    left: Size = None
    if None not in before and None not in rest:
        ours, theirs = (math.prod(size for size in side if isinstance(size, int)) for side in (before, rest))
        missing = names[0] - names[1]
        if theirs and ours % theirs == 0 and not names[1] - names[0]:
            quotient = ours // theirs
            left = quotient if not missing else next(iter(missing)) if quotient == 1 and missing.total() == 1 else None
    return tuple(left if size == -1 else size for size in copied)


def expanded(before: Vector, target: Vector) -> Vector:
    """The output of an Expand: both broadcast against each other."""
    rank = max(len(before), len(target))
    pairs = zip(*((1,) * (rank - len(side)) + side for side in (before, target)), strict=True)
    return tuple(b if a == 1 else a if b == 1 or a == b or isinstance(a, int) else None for a, b in pairs)


def _moved(node: ir.Node, entries: list[Vector]) -> Vector | None:
    first = entries[0]
    if node.op_type in ("Cast", "Identity", "Squeeze", "Unsqueeze"):
        return first
    if node.op_type == "Reshape" and len(first) == 1:  # a number as a vector of one
        return first
    if node.op_type == "Concat":
        return tuple(size for item in entries for size in item)
    if node.op_type == "Gather" and len(entries) == 2:
        indices = [index for index in entries[1] if isinstance(index, int) and -len(first) <= index < len(first)]
        return tuple(first[index] for index in indices) if len(indices) == len(entries[1]) else None
    if node.op_type == "Slice" and len(entries) >= 3 and axes_of(node, None) in (None, (0,)):
        bounds = [item[0] for item in (*entries[1:3], *entries[4:5])]
        known = [bound for bound in bounds if isinstance(bound, int)]
        return first[slice(*known)] if len(known) == len(bounds) else None
    if node.op_type in ("Add", "Sub", "Mul", "Div") and len(entries) == 2:
        length = max(map(len, entries))
        if any(len(item) not in (1, length) for item in entries):
            return None
        pairs = zip(*(item * length if len(item) == 1 else item for item in entries), strict=True)
        return tuple(_computed(node.op_type, a, b) for a, b in pairs)
    return None


def _computed(operator: str, a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        if operator == "Div":
            return a // b if b else None
        return {"Add": a + b, "Sub": a - b, "Mul": a * b}[operator]
    neutral = 0 if operator in ("Add", "Sub") else 1
    if b == neutral:
        return a
    return b if a == neutral and operator in ("Add", "Mul") else None
